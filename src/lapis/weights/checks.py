"""Proof, before a weight is read, that models fit together; every problem is told, not only the first."""

from collections.abc import Mapping, Sequence
from typing import Any

from lapis.checkpoint import Checkpoint
from lapis.weights.engine.fp8 import is_number
from lapis.weights.matching import counterparts, is_vocabulary
from lapis.weights.vocabulary import Vocabulary

# fields that make the same shapes mean another computation, and fields that only shift it
_DECISIVE = ("model_type", "num_attention_heads", "num_key_value_heads", "head_dim", "hidden_act", "sliding_window")
_TOLERABLE = ("rope_theta", "rope_scaling", "rms_norm_eps", "layer_norm_epsilon", "tie_word_embeddings")
_LAYERS = ("num_hidden_layers", "n_layer", "num_layers")
_WIDTH, _FFN = ("hidden_size", "n_embd"), ("intermediate_size", "n_inner")
_SHOWN = 12


def told(what: str, problems: Sequence[str]) -> str:
    """All problems as one line."""
    if len(problems) == 1:
        return f"{what}: {problems[0]}"
    listed = "; ".join(f"({i + 1}) {line}" for i, line in enumerate(problems[:_SHOWN]))
    more = f"; and {len(problems) - _SHOWN} more" if len(problems) > _SHOWN else ""
    return f"{what}: {len(problems)} problems: {listed}{more}"


def check_configs(inputs: Mapping[str, Checkpoint], owner: str = "onto") -> tuple[list[str], list[str]]:
    """Problems and notes from comparing config.json and dtypes of all inputs with those of the owner."""
    problems, notes = [], []
    onto = inputs[owner]
    for role, checkpoint in inputs.items():
        problems += [f"{role}: {line}" for line in check_sizes(checkpoint)]
        if checkpoint is onto:
            continue
        for key in _DECISIVE:
            ours, theirs = _setting(onto.config, key), _setting(checkpoint.config, key)
            if ours != theirs and None not in (ours, theirs):
                problems.append(
                    f"{key} is {ours} in {owner} and {theirs} in {role}; both must be fine-tunes of one model"
                )
        for key in _TOLERABLE:
            ours, theirs = _setting(onto.config, key), _setting(checkpoint.config, key)
            if ours != theirs:
                notes.append(f"{key} is {ours} in {owner} and {theirs} in {role}; {owner}'s is kept")
    notes += family_notes(onto)
    dtypes = {role: sorted({info.dtype for info in c.index.values()}) for role, c in inputs.items()}
    if len({tuple(found) for found in dtypes.values()}) > 1:
        spelled = ", ".join(f"{role} {'/'.join(found)}" for role, found in dtypes.items())
        notes.append(f"dtypes differ ({spelled}); computed in float32, rounded once")
    return problems, notes


def family_notes(checkpoint: Checkpoint) -> list[str]:
    """A line where the architecture is not known, and parts are read from tensor names."""
    if checkpoint.family is not None:
        return []
    kind = checkpoint.config.get("model_type")
    return [f"model_type {kind} is not known here: layers and components are read from the tensors' names"]


def check_sizes(checkpoint: Checkpoint) -> list[str]:
    """Where config.json and the tensors of one model disagree on layers and widths."""
    problems = []
    parts = {name: checkpoint.part(name) for name in checkpoint.names}
    layers = {part.layer for part in parts.values() if part.layer is not None}
    said = next((n for key in _LAYERS if isinstance(n := _setting(checkpoint.config, key), int)), None)
    if layers and said is not None and said != len(layers):
        problems.append(f"config.json says {said:,} layers, the tensors have {len(layers):,}")
    for keys, component in ((_WIDTH, "embed"), (_FFN, "mlp.up")):
        size = next((n for key in keys if isinstance(n := _setting(checkpoint.config, key), int)), None)
        names = [n for n, part in parts.items() if part.component == component and part.kind == "weight"]
        if size is not None and names and not any(size in checkpoint.info(name).shape for name in names):
            problems.append(f"config.json says {size:,}, but {names[0]} is {_x(checkpoint.info(names[0]).shape)}")
    return problems


def check_tensors(inputs: Mapping[str, Checkpoint], fates: Mapping[str, str]) -> list[str]:
    """Problems with names, shapes and dtypes. fates: what becomes of each tensor of onto (graft.py)."""
    problems = []
    onto = inputs["onto"]
    names = {role: counterparts(onto, checkpoint) for role, checkpoint in inputs.items()}
    for name, fate in fates.items():
        if fate not in ("merge", "rows"):
            continue
        info = onto.info(name)
        found = {"onto": info}
        for role, checkpoint in inputs.items():
            if checkpoint is onto:
                continue
            other = names[role].get(name)
            if other is None:
                problems.append(f"{name} is in onto and not in {role} ({checkpoint.source}); is it a whole model?")
                continue
            found[role] = checkpoint.info(other)
            ours, theirs = info.shape, found[role].shape
            if (ours[1:] if fate == "rows" else ours) != (theirs[1:] if fate == "rows" else theirs):
                problems.append(f"{name} is {_x(ours)} in onto and {_x(theirs)} in {role}; a graft needs equal shapes")
        for role, each in found.items():
            owner = name if role == "onto" else names[role][name]
            if not is_number(inputs[role], owner):
                problems.append(
                    f"{name} is {each.dtype} in {role}: numbers without a known scale; give the unquantized model"
                )
    return problems


def check_vocabularies(
    inputs: Mapping[str, Checkpoint], words: Mapping[str, Vocabulary | None], embeddings: str
) -> list[str]:
    """Problems of configs and tokenizers against embedding rows."""
    problems = []
    for role, checkpoint in inputs.items():
        vocabulary, rows = words[role], embedding_rows(checkpoint)
        size = _setting(checkpoint.config, "vocab_size")
        if rows is not None and isinstance(size, int) and size != rows:
            problems.append(f"{role}: config.json says vocab_size {size:,}, the embedding has {rows:,} rows")
        if vocabulary and rows is not None and vocabulary.size > rows:
            last = max(vocabulary.ids, key=lambda token: vocabulary.ids[token])
            problems.append(
                f'{role}: the token "{last}" has id {vocabulary.size - 1:,}, the embedding has {rows:,} rows'
            )
    unread = [role for role in inputs if words[role] is None]
    if unread and embeddings == "add":
        problems.append(f"no tokenizer.json in {', '.join(unread)}; embeddings can be added by token string only")
    return problems


def embedding_rows(checkpoint: Checkpoint) -> int | None:
    """Rows of the token embedding; None where no tensor is known as one."""
    for name, info in checkpoint.index.items():
        part = checkpoint.part(name)
        if part.component == "embed" and is_vocabulary(part) and len(info.shape) == 2:
            return info.shape[0]
    return None


def _setting(config: Mapping[str, Any], key: str) -> Any:
    """A field of config.json, or of its text_config, where models of several kinds keep it."""
    if key in config:
        return config[key]
    inner = config.get("text_config")
    return inner.get(key) if isinstance(inner, Mapping) else None


def _x(shape: Sequence[int]) -> str:
    return "x".join(map(str, shape)) or "a scalar"
