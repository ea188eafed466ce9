"""What a merge changes beside the weights: config.json's layer count, rows and dtype, and the chat template."""

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lapis.checkpoint import Checkpoint
from lapis.checkpoint.towers import language_levels
from lapis.errors import ConfigError
from lapis.families.base import Part
from lapis.text.tokenizer.folder import CHATML, CONFIG, read_object, write_json
from lapis.text.tokenizer.vocabulary import Vocabulary
from lapis.weights.config_fields import carried_config
from lapis.weights.engine.fp8 import without_quantization
from lapis.weights.engine.stream import Output
from lapis.weights.merge.placing import Placing

_LAYER_COUNTS = ("num_hidden_layers", "n_layer", "num_layers", "n_layers")
_TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id", "unk_token_id")


def output_config(
    owner: Checkpoint, donor: Checkpoint, placing: Placing, outputs: Sequence[Output], dtype: str | None
) -> tuple[dict[str, Any], list[str]]:
    """config.json of the output, and lines that say what changed. donor: the model whose tokens it has."""
    config, notes = carried_config(without_quantization(owner.config))
    places = language_levels(config)
    for place in places:
        for key in _LAYER_COUNTS:
            had = place.get(key)
            if isinstance(had, int) and had != len(placing.layers):
                place[key] = len(placing.layers)
                notes.append(f"{key} is {len(placing.layers)}; it was {had} in {owner.source}")
                for name, value in place.items():
                    if isinstance(value, list) and len(value) == had:  # one entry for each layer
                        place[name] = [value[layer] for layer in placing.layers if layer < had]
        if donor is not owner:
            place.update({key: donor.config[key] for key in _TOKEN_IDS if key in donor.config and key in place})
    parts = {each.name: each.part for each in placing.placed}
    embed = next((o for o in outputs if parts[o.name] == Part(None, "embed", "weight")), None)
    holder = next((place for place in places if "vocab_size" in place), config)
    if embed is not None and holder.get("vocab_size") != embed.shape[0]:
        notes.append(f"vocab_size is {embed.shape[0]:,}; it was {holder.get('vocab_size'):,} in {owner.source}")
        holder["vocab_size"] = embed.shape[0]
    if embed is not None and config.get("tie_word_embeddings") is False and not _has_head(parts.values()):
        config["tie_word_embeddings"] = True
        notes.append("the output has no head of its own: tie_word_embeddings is true")
    for place in places:
        for key in ("torch_dtype", "dtype"):
            if key in place and outputs:
                place[key] = dtype or str(outputs[0].dtype).removeprefix("torch.")
    return config, notes


def _has_head(parts: Any) -> bool:
    return any(part.component == "head" for part in parts)


def chat_template(request: str | None, words: Mapping[str, Vocabulary | None], donor: Checkpoint) -> str | None:
    """The template that a recipe asks for: "auto" (the one that most models have), "chatml", or a template's text."""
    if request is None:
        return None
    if words.get(donor.source) is None:
        raise ConfigError(f"chat_template: {donor.source} has no tokenizer to write it to")
    if request == "auto":
        had = Counter(vocabulary.template for vocabulary in words.values() if vocabulary and vocabulary.template)
        return had.most_common(1)[0][0] if had else None
    if request == "chatml":
        return CHATML
    if "{" not in request:
        raise ConfigError(f'chat_template is "{request}"; give auto, chatml, or the text of a template')
    return request


def write_tokenizer(folder: Path, document: Mapping[str, Any]) -> None:
    """tokenizer.json with added tokens that the donor's lacks, and their table in tokenizer_config.json."""
    write_json(folder / "tokenizer.json", document)
    settings = read_object(folder, CONFIG)
    if isinstance(settings.get("added_tokens_decoder"), dict):
        for entry in document["added_tokens"]:
            settings["added_tokens_decoder"][str(entry["id"])] = {k: v for k, v in entry.items() if k != "id"}
        write_json(folder / CONFIG, settings)
