"""Folders of models that transformers is to run: what is refused before a weight is read, and the weights.

transformers opens no file: config.json is cleaned of all that could name code, tensors are read, checked for NaN and
handed over, and nothing is fetched.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch

from lapis.checkpoint import Checkpoint
from lapis.errors import CheckpointError, LapisError, MissingExtra
from lapis.families import known_types
from lapis.families.fields import LARGEST, MOST_LAYERS
from lapis.model.check import FLOATS, SMALL, dtype_of
from lapis.model.load import read_tensors
from lapis.model.reading.outside import OutsideConfig, OutsideModel
from lapis.wording import format_count

CODE = ("auto_map", "attn_implementation", "experts_implementation", "custom_pipelines")  # never handed on
CONTEXTS = ("max_position_embeddings", "max_seq_len", "n_positions", "seq_length")
UNNAMED_CONTEXT = 2048


def read_outline(checkpoint: Checkpoint) -> OutsideConfig:
    """The shape of a folder's model, before a weight is read.

    Args:
        checkpoint: Of a family that lapis does not run.

    Raises:
        MissingExtra: transformers is not installed.
        CheckpointError: transformers does not know the model_type either, or refuses the config; the weights are
            quantized; the folder is an adapter on such a model.
    """
    config, _ = _classes(checkpoint)
    text = config.get_text_config(decoder=True)
    sizes = {"hidden_size": LARGEST, "num_hidden_layers": MOST_LAYERS, "vocab_size": LARGEST}
    for name, most in sizes.items():
        value = getattr(text, name, None)
        if not isinstance(value, int) or not 1 <= value <= most:
            raise CheckpointError(f"{checkpoint.source}: config.json: {name} is {value!r:.40}; expected 1 to {most:,}")
    named = [value for name in CONTEXTS if isinstance(value := getattr(text, name, None), int) and value > 0]
    return OutsideConfig(
        family=str(checkpoint.config["model_type"]), dim=text.hidden_size, layers=text.num_hidden_layers,
        heads=int(getattr(text, "num_attention_heads", None) or 0), vocab=text.vocab_size,
        context=named[0] if named else UNNAMED_CONTEXT, named=bool(named),
    )  # fmt: skip


def load_outside(
    checkpoint: Checkpoint, dtype: torch.dtype | None = None, device: torch.device | str = "cpu"
) -> OutsideModel:
    """The model of a folder, run by transformers.

    Args:
        checkpoint: Of a family that lapis does not run.
        dtype: Of the weights in memory; by default that of most of the folder's.
        device: Where the weights go.

    Raises:
        CheckpointError: As `read_outline`, and for tensors that are missing, of a wrong shape, or no numbers.
        ConfigError: The model looks at later tokens.
    """
    read_outline(checkpoint)
    config, model_class = _classes(checkpoint)
    checkpoint = checkpoint.fetched()
    with torch.device("meta"), quiet():
        described = sum(parameter.numel() for parameter in _tried(checkpoint, model_class, config).parameters())
    held = sum(info.elements for info in checkpoint.index.values())
    if described > held:
        raise CheckpointError(
            f"{checkpoint.source}: config.json describes {described:,} parameters, the files hold {held:,}; fetch both"
        )
    floats = [name for name in checkpoint.names if checkpoint.index[name].dtype in FLOATS]
    dtype = dtype or getattr(torch, dtype_of(checkpoint, floats))
    model = load_tensors(checkpoint, dict(read_tensors(checkpoint, checkpoint.names, dtype)), dtype).to(device)
    _tried(checkpoint, model.prove)
    if not model.caches:
        model.notes.append("it keeps a state that cannot be handed on here: each new token reads the whole text again")
    return model


def load_tensors(checkpoint: Checkpoint, tensors: dict[str, torch.Tensor], dtype: torch.dtype) -> OutsideModel:
    """The model of a folder with these tensors in the place of its own; nothing is proved of it.

    Args:
        checkpoint: Of a family that lapis does not run; not all of its weights need be at hand.
        tensors: By their names on disk.
        dtype: Of the weights in memory.

    Raises:
        CheckpointError: As `load_outside`.
    """
    outline, (config, model_class) = read_outline(checkpoint), _classes(checkpoint)
    with quiet():
        inner, report = _tried(
            checkpoint, model_class.from_pretrained, None, config=config, state_dict=tensors, dtype=dtype,
            output_loading_info=True, trust_remote_code=False, local_files_only=True,
        )  # fmt: skip
    if missing := sorted(report["missing_keys"]):
        listed = ", ".join(map(str, missing[:4])) + (" ..." if len(missing) > 4 else "")
        raise CheckpointError(
            f"{checkpoint.source}: {format_count(len(missing), 'tensor is', 'tensors are')} missing: {listed}; "
            "fetch it again"
        )
    model = OutsideModel(inner.eval(), outline)
    generation = checkpoint.json("generation_config.json")
    model.generation = dict(generation) if isinstance(generation, Mapping) else {}
    model.notes = [*checkpoint.notes, *_notes(model, report)]
    return model


def _notes(model: OutsideModel, report: Mapping[str, Any]) -> Iterator[str]:
    import transformers

    config = model.config
    yield f"{config.family} runs through transformers {transformers.__version__}; lapis neither trains nor serves it"
    if not config.named:
        yield f"config.json names no context; {config.context:,} tokens are taken"
    if unused := report["unexpected_keys"]:
        yield (
            f"{format_count(len(unused), 'tensor has', 'tensors have')} no place in it: "
            f"{', '.join(sorted(map(str, unused))[:3])}"
        )


def _classes(checkpoint: Checkpoint) -> tuple[Any, Any]:
    """The config and the class of a causal model of transformers."""
    kind = checkpoint.config.get("model_type")
    try:
        import transformers
    except ImportError:
        raise MissingExtra(
            f"{checkpoint.source}: a model of the type {kind!s:.40} runs through transformers, which", "hf"
        ) from None
    if checkpoint.adapter is not None:
        raise CheckpointError(
            f"{checkpoint.source}: holds an adapter on a model that runs through transformers; make it a model with: "
            f"lapis fuse {checkpoint.source} --out DIR"
        )
    if "quantization_config" in checkpoint.config or any(i.dtype in SMALL for i in checkpoint.index.values()):
        raise CheckpointError(f"{checkpoint.source}: its weights are quantized; give a folder of 16-bit weights")
    if not isinstance(kind, str) or kind not in transformers.CONFIG_MAPPING:
        raise CheckpointError(
            f"{checkpoint.source}: config.json: model_type is {kind!s:.40}; lapis builds {known_types()}, and "
            f"transformers {transformers.__version__} does not know it either"
        )
    with quiet():
        config = _tried(checkpoint, transformers.CONFIG_MAPPING[kind].from_dict, _cleaned(checkpoint.config))
    causal = transformers.MODEL_FOR_CAUSAL_LM_MAPPING
    if type(config) not in causal or getattr(config, "is_encoder_decoder", False):
        raise CheckpointError(f"{checkpoint.source}: a {kind} says no next token; give a causal language model")
    return config, causal[type(config)]


def _cleaned(fields: Mapping[str, Any]) -> dict[str, Any]:
    """config.json without what names code, or where to get it from, at any depth."""
    return {
        name: _cleaned(value) if isinstance(value, Mapping) else value
        for name, value in fields.items() if not name.startswith("_") and name not in CODE
    }  # fmt: skip


def _tried(checkpoint: Checkpoint, call: Any, *given: Any, **options: Any) -> Any:
    """What a call into transformers gives; whatever it raises at a file's fault is one line."""
    try:
        return call(*given, **options)
    except LapisError:
        raise
    except Exception as error:
        reason = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise CheckpointError(f"{checkpoint.source}: transformers cannot run it: {reason:.300}") from None


@contextmanager
def quiet() -> Iterator[None]:
    """No bars and reports of transformers: what matters of them is said in our notes."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity(logging.CRITICAL)
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
