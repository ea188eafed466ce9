"""Which tensors of a folder are its language model, and which belong to another tower (vision, audio, speech out).

A multimodal folder numbers the layers of each tower from 0, and puts the language model's names under a stem of their
own (`model.language_model.layers.0...`, `language_model.model.layers.0...`, `thinker.model.layers.0...`), where a
text-only folder has `model.` or nothing. Here a stem is what stands before the number of a layer.
"""

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

_NESTED = ("thinker_config", "text_config", "llm_config", "language_config")  # each may hold one of the later ones
_STACK = re.compile(r"(.*?)(?:^|\.)(?:layers|layer|h|blocks|block)\.\d+\.")
_LANGUAGE = re.compile(r"(^|\.)(language_model|text_model|text_decoder|language|llm|thinker)(\.|$)")
_EMBEDDING = re.compile(r"(.*?)(?:^|\.)(?:embed_tokens|tok_embeddings|wte|word_embeddings)\.weight")
_OTHER = re.compile(
    r"vision|visual|image|video|audio|speech|multi_?modal|projector|connector|resampler|aligner|(^|[._])mm_"
    r"|talker|token2wav|code2wav|vocoder|codec|depth_decoder|code_predictor|(^|[._])tts([._]|$)"
)
_SIDES = re.compile(r"(^|\.)(encoder|decoder)(?=\.|$)")
_HEAD = re.compile(r"(?:.*\.)?lm_head\.(weight|bias)")


@dataclass(frozen=True)
class Towers:
    """The towers of one folder.

    Attributes:
        stem: What stands before the language model's own names ("model", "model.language_model", ""); its layers are
            `STEM.layers.0...`.
        others: Tensor -> the tower that it belongs to ("vision_tower"), for tensors that are not the language model's.
            Empty for a folder with one tower.
    """

    stem: str = ""
    others: dict[str, str] = field(default_factory=dict)

    def inner(self, name: str) -> str | None:
        """The name within the language model, the same in text-only and multimodal folders; None in other towers."""
        if name in self.others:
            return None
        if head := _HEAD.fullmatch(name):
            return f"lm_head.{head[1]}"
        return name[len(self.stem) + 1 :] if self.stem and name.startswith(f"{self.stem}.") else name


def find_towers(names: Iterable[str]) -> Towers:
    """Sorts the tensors of a folder into towers, by their names alone."""
    names = list(names)
    stacks = Counter(match[1] for name in names if (match := _STACK.match(name)))
    if not stacks:
        return Towers()
    language = _language_stem(stacks, names)
    sides = {stem for stem in stacks if _SIDES.sub("", stem) == _SIDES.sub("", language)}  # encoder and decoder
    stem = _shared_lead(sides) if len(sides) > 1 else language
    rest = {other for other in stacks if other not in sides and not other.startswith(f"{stem}.layers")}
    own_stem = bool(_LANGUAGE.search(stem)) and not _OTHER.search(stem)
    if not rest and not own_stem:
        return Towers(stem)
    leads = {_lead(other, stem) for other in rest}
    others = {}
    for name in names:
        lead = next((lead for lead in leads if name.startswith(f"{lead}.")), "")
        inside = name.startswith(f"{stem}.") if own_stem and stem else False
        if lead and not (inside and not lead.startswith(f"{stem}.")):
            others[name] = lead.rpartition(".")[2]
        elif not inside and not _HEAD.fullmatch(name) and _OTHER.search(name.rpartition(".")[0]):
            others[name] = next(piece for piece in name.split(".") if _OTHER.search(piece))
    return Towers(stem, others)


def language_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The fields of config.json that are the language model's: of a multimodal folder the nested ones come first."""
    for name in _NESTED:
        if isinstance(inner := config.get(name), Mapping):
            return {**{key: value for key, value in config.items() if key != name}, **language_config(inner)}
    return config


def language_levels(config: dict[str, Any]) -> list[dict[str, Any]]:
    """The mappings of config.json that hold fields of the language model, the innermost first and the top last.

    Args:
        config: Nested mappings on the way are replaced by copies, so that the levels can be changed.
    """
    for name in _NESTED:
        if isinstance(inner := config.get(name), Mapping):
            config[name] = dict(inner)
            return [*language_levels(config[name]), config]
    return [config]


def change_language_config(config: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """config.json with fields of the language model changed: where they stand, else at the innermost level."""
    result = dict(config)
    levels = language_levels(result)
    for key, value in changes.items():
        for level in [level for level in levels if key in level] or levels[:1]:
            level[key] = value
    return result


def _language_stem(stacks: Counter[str], names: list[str]) -> str:
    """The stem of the language model's layers: named so, or beside the embedding of tokens, or the one with most."""
    plain = [stem for stem in stacks if not _OTHER.search(stem)] or list(stacks)
    named = [stem for stem in plain if _LANGUAGE.search(stem)]
    embedded = {match[1] for name in names if (match := _EMBEDDING.fullmatch(name))}
    beside = [stem for stem in plain if any(stem == lead or stem.startswith(f"{lead}.") for lead in embedded if lead)]
    beside += [stem for stem in plain if stem in embedded]
    return max(named or beside or plain, key=lambda stem: stacks[stem])


def _shared_lead(stems: Iterable[str]) -> str:
    """The pieces that several stems begin with."""
    shared = []
    for pieces in zip(*(stem.split(".") for stem in stems), strict=False):
        if len(set(pieces)) > 1:
            break
        shared.append(pieces[0])
    return ".".join(shared)


def _lead(other: str, stem: str) -> str:
    """The first pieces of another tower's stem, up to where it leaves the language model's."""
    shared = _shared_lead([stem, other])
    return ".".join(other.split(".")[: (shared.count(".") + 1 if shared else 0) + 1])
