"""A config.json read through an allow-list: what a family asks for is checked; all else is left out, with a note.

Leaves out: which fields a family has (its own file).
"""

from collections.abc import Collection, Mapping
from typing import Any

from lapis.errors import CheckpointError
from lapis.parsing import quoted

LARGEST = 2**31 - 1
MOST_LAYERS = 10_000
SMALLEST, HIGHEST = 2.0**-126, 2.0**127 * (2 - 2**-23)  # normal numbers of float32

# written into config.json by one version of transformers or another, and without meaning for the numbers
GENERIC = frozenset(
    """transformers_version torch_dtype dtype model_type architectures use_cache return_dict output_hidden_states
    output_attentions torchscript use_bfloat16 pruned_heads chunk_size_feed_forward is_encoder_decoder
    tie_encoder_decoder max_length min_length do_sample early_stopping num_beams num_beam_groups diversity_penalty
    temperature top_k top_p typical_p repetition_penalty length_penalty no_repeat_ngram_size
    encoder_no_repeat_ngram_size bad_words_ids num_return_sequences output_scores return_dict_in_generate
    forced_bos_token_id forced_eos_token_id remove_invalid_values exponential_decay_length_penalty suppress_tokens
    begin_suppress_tokens finetuning_task tokenizer_class prefix sep_token_id decoder_start_token_id
    task_specific_params problem_type tf_legacy_loss cross_attention_hidden_size gradient_checkpointing
    pretraining_tp n_ctx encoder_stride num_labels unk_token_id _name_or_path _model_name_or_path""".split()
)
TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")
CODE = ("auto_map", "trust_remote_code", "custom_pipelines")


class Fields:
    """The fields of one config.json. What is asked for counts as known; `notes` tells of the rest."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        self.config = config
        self.known: set[str] = set()
        self.extra: dict[str, Any] = {}

    def integer(self, name: str, default: int | None = None, *, least: int = 1, most: int = LARGEST) -> int:
        """A whole number; without a default the field must be there."""
        value = self._value(name, default)
        if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
            raise CheckpointError(
                f"config.json: {name} is {quoted(value)}; expected a whole number from {least} to {most:,}"
            )
        return value

    def layers(self, name: str) -> int:
        """How many blocks; limited, since they are counted one by one."""
        return self.integer(name, most=MOST_LAYERS)

    def layer_types(self, layers: int, names: Collection[str]) -> list[str] | None:
        """The kind of each layer by `layer_types`; None where the field is null or not there.

        Args:
            layers: Of the model; the list must have as many entries.
            names: What each may be.
        """
        self.known.add("layer_types")
        types = self.config.get("layer_types")
        if types is None:
            return None
        if not isinstance(types, list) or len(types) != layers or not set(map(str, types)) <= set(names):
            raise CheckpointError(
                f"config.json: layer_types is {quoted(types)}; expected a list of {layers} names, each "
                f"{' or '.join(names)}"
            )
        return [str(name) for name in types]

    def optional(self, name: str, *, least: int = 1) -> int | None:
        """A whole number, or None where the field is null or not there."""
        self.known.add(name)
        return None if self.config.get(name) is None else self.integer(name, least=least)

    def number(self, name: str, default: float | None = None) -> float:
        """A positive number of float32's range; without a default the field must be there."""
        value = self._value(name, default)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not SMALLEST <= value <= HIGHEST:
            raise CheckpointError(
                f"config.json: {name} is {quoted(value)}; expected a number above 0, which float32 can hold"
            )
        return float(value)

    def flag(self, name: str, default: bool) -> bool:
        value = self._value(name, default)
        if not isinstance(value, bool):
            raise CheckpointError(f"config.json: {name} is {quoted(value)}; expected true or false")
        return value

    def choice(self, name: str, options: Mapping[str, str], default: str | None = None) -> str:
        """The option's value; CheckpointError names those that can be read."""
        value = self._value(name, default)
        if not isinstance(value, str) or value not in options:
            raise CheckpointError(f"config.json: {name} is {quoted(value)}; lapis reads {', '.join(sorted(options))}")
        return options[value]

    def only(self, name: str, *values: Any) -> None:
        """A field whose other values change the computation in a way that is not built: refused, never ignored."""
        self.known.add(name)
        value = self.config.get(name, values[0])
        if value not in values:
            raise CheckpointError(f"config.json: {name} is {quoted(value)}; lapis reads only {quoted(values[0])}")

    def mapping(self, name: str) -> Mapping[str, Any]:
        """A nested object; empty where it is null or not there."""
        self.known.add(name)
        value = self.config.get(name)
        if value is None:
            return {}
        if not isinstance(value, Mapping):
            raise CheckpointError(f"config.json: {name} is {quoted(value)}; expected an object")
        return value

    def head(self, heads: Mapping[str, str], default: str) -> str:
        """Which head the folder has, from the end of `architectures`' name; `default` where it has none."""
        named = self.config.get("architectures")
        if not named:
            return default
        name = named[0] if isinstance(named, list) and isinstance(named[0], str) else repr(named)
        for ending, head in heads.items():
            if name.endswith(ending):
                return head
        raise CheckpointError(
            f"config.json: architectures is {name:.60}; lapis reads names that end in {', '.join(heads)}"
        )

    def labels(self) -> int:
        """How many classes a classifier has, by id2label or num_labels; transformers' default is 2."""
        names = self.mapping("id2label")
        self.keep("id2label", "label2id", "problem_type")
        return len(names) or self.integer("num_labels", 2)

    def keep(self, *names: str) -> None:
        """Fields that do not shape the model and are handed on when it is saved (token ids, labels, dropout)."""
        self.known.update(names)
        for name in names:
            value = self.config.get(name)
            if value is not None and _is_plain(value):
                self.extra[name] = value

    def notes(self) -> list[str]:
        """One line for fields that could run code, one for fields that are not known."""
        code = [name for name in CODE if name in self.config]
        unknown = sorted(self.unknown() - set(code))
        lines = [f"config.json: {', '.join(code)} is ignored; no file turns code on"] if code else []
        if unknown:
            shown = ", ".join(name[:40] for name in unknown[:8])
            lines.append(f"config.json: left out, not known here: {shown}{' ...' if len(unknown) > 8 else ''}")
        return lines

    def unknown(self) -> set[str]:
        """Fields that were not asked for and have no known meaning."""
        return {name for name in self.config if name not in self.known and name not in GENERIC}

    def _value(self, name: str, default: Any) -> Any:
        self.known.add(name)
        value = self.config.get(name)
        if value is None:
            value = default
        if value is None:
            raise CheckpointError(f"config.json: {name} is missing; fetch the file again")
        return value


def _is_plain(value: Any) -> bool:
    """A JSON scalar, or a small list or object of them."""
    if isinstance(value, (list, tuple)):
        return len(value) <= 100_000 and all(isinstance(item, (str, int, float, bool)) for item in value)
    if isinstance(value, Mapping):
        return len(value) <= 100_000 and all(isinstance(item, (str, int, float, bool)) for item in value.values())
    return isinstance(value, (str, int, float, bool))
