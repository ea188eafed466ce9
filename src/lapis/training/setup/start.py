"""The model that a run starts from: made anew from a shape, or a folder's, with the head that the objective needs.

Adapters and what is frozen come after it (lora.py, select.py).
"""

import dataclasses
import os
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch

from lapis.config import build, nearest
from lapis.errors import ConfigError
from lapis.families import PRESETS, find
from lapis.families.config import Head, ModelConfig, class_fields
from lapis.model.load import empty, load
from lapis.model.size import measure
from lapis.model.transformer import Transformer
from lapis.text.tokenizer.tokenizer import Tokenizer
from lapis.training.objectives.objective import Objective

HEADS: dict[str, Head] = {"language": "lm", "masked": "masked", "classes": "classes", "scalar": "scalar"}
# what a new language model is where its shape gives only sizes: Qwen3's block (RMSNorm, rotary positions, a norm on
# queries and keys (Henry et al. 2020), SwiGLU), which every public tool loads
_SIZES = {"dim", "layers", "heads", "kv_heads", "head_dim", "ffn_dim", "vocab", "context", "tied"}
# and how it is trained where the settings do not say: benchmarks/results/train.md has what each part gives
FRESH: dict[str, Any] = {"optimizer": "muon", "lr": 0.005, "weight_decay": 0.1, "schedule": "linear"}


def start_model(
    source: Path | str | None,
    new: Mapping[str, Any] | str | None,
    objective: Objective,
    *,
    context: int | None,
    seed: int,
    zero_init: bool = True,
    weights: bool = True,
) -> Transformer:
    """The folder `source` in float32, or a model of the shape `new`; with the head that the objective needs.

    Args:
        source: A folder, or None.
        new: Fields of ModelConfig, a preset's name, or None. Without sizes a family's fields change its preset.
        objective: Says which head, which classes, which tokenizer.
        context: Tokens of a row.
        seed: Of new weights.
        zero_init: A new model's blocks add nothing at first: what writes to the residual stream is zero (Zhang et al.
            2019, Fixup, arXiv:1901.09321; for transformers: Yang et al. 2022, arXiv:2203.03466, appendix D.2).
        weights: False makes the model without them, on the meta device, for a process that gets them from another.

    Returns:
        The model. What is random though it comes from a folder is named in its `notes`.

    Raises:
        ConfigError: For an unknown field of `new`, or rows longer than the model's context.
    """
    head = HEADS[objective.head]
    classes = objective.class_names
    context = None if objective.tokenizer is None else context  # a picture's is its patches
    torch.manual_seed(seed)
    if new is not None:
        shape, notes = _shape(new, objective.tokenizer, head, classes, context)
        if weights:
            _check_memory(shape)
        with nullcontext() if weights else torch.device("meta"):
            model = Transformer(shape)
        model.notes += notes
        if zero_init and head == "lm":
            zero_outputs(model)
    else:
        number = len(classes) if head == "classes" else 0
        if weights:
            model = load(str(source), dtype=torch.float32, head=head, classes=number)
        else:
            model = empty(str(source), head=head, classes=number)
    if classes:
        model.config = dataclasses.replace(model.config, extra={**model.config.extra, **class_fields(classes)})
    if objective.tokenizer is not None:
        objective.tokenizer.check_rows(model.config.vocab)
    if context is not None and context > model.config.context:
        raise ConfigError(f"train: context is {context}; the model has {model.config.context}, give that or less")
    return model


def _check_memory(shape: ModelConfig) -> None:
    """Raises ConfigError for a model whose weights alone are larger than the machine's memory, before it is made."""
    parameters, memory = measure(shape).total, os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if parameters * 4 > memory:
        raise ConfigError(
            f"train: new is a model of {parameters:,} parameters, whose weights take {parameters * 4 / 1e9:,.0f} GB; "
            f"this machine has {memory / 1e9:,.0f} GB of memory, give smaller sizes"
        )


@torch.no_grad()
def zero_outputs(model: Transformer) -> None:
    """Sets the projections that write to the residual stream to zero."""
    for name, parameter in model.named_parameters():
        if name.endswith(("attn.o.weight", ".down.weight")):
            parameter.zero_()


def preset_shape(new: Mapping[str, Any] | str) -> ModelConfig | None:
    """The preset that `new` names, by itself or by a family without sizes; None where `new` gives the sizes.

    Raises ConfigError for a name that is no preset.
    """
    name = new if isinstance(new, str) else new.get("family")
    if not isinstance(new, str) and ("dim" in new or name is None):
        return None
    if name not in PRESETS:
        of_family = [preset for preset, fields in PRESETS.items() if fields["model_type"] == name]
        known = f"give its sizes (dim, layers, heads, ffn_dim), or new: one of {', '.join(of_family)}"
        raise ConfigError(f'train: new is "{name}"; {known if of_family else nearest(str(name), PRESETS)}')
    family = find(PRESETS[name])
    assert family is not None
    return family.read_config(PRESETS[name])


def _shape(
    new: Mapping[str, Any] | str, tokenizer: Tokenizer | None, head: Head, classes: list[str], context: int | None
) -> tuple[ModelConfig, list[str]]:
    """ModelConfig from what `new` says, the family's kind of block, the tokenizer's size and the head; and notes."""
    preset, given = preset_shape(new), {} if isinstance(new, str) else dict(new)
    plain = "qwen3" if head == "lm" and set(given) <= _SIZES else "llama"
    family = preset.family if preset else str(given.get("family", "vit" if "image" in given else plain))
    known: dict[str, Any] = {"family": family, **_family_defaults(family)}
    notes = []
    if preset is not None:
        derived = {"kv_heads": preset.heads, "head_dim": preset.dim // preset.heads}  # to follow where heads change
        known |= {name: value for name, value in vars(preset).items() if derived.get(name) != value}
    known["head"] = head
    if tokenizer is not None:
        known["vocab"] = tokenizer.rows
        ids = {"bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id, "pad_token_id": tokenizer.pad_id}
        known["extra"] = {name: number for name, number in ids.items() if number is not None}
    if head == "classes":
        known["classes"] = len(classes)
    if family == "bert":
        known["pooler"] = head in ("classes", "scalar")
    if known.get("first_position") and tokenizer is not None and tokenizer.pad_id is not None:
        known["first_position"] = tokenizer.pad_id + 1
    if "image" in given:
        picture = given["image"] if isinstance(given["image"], Mapping) else {}
        known["vocab"] = 0
        known["context"] = (int(picture.get("size", 1)) // max(1, int(picture.get("patch", 1)))) ** 2 + 1
    elif context is not None and preset is None:
        known["context"] = context
        if known.get("positions") == "learned" and "context" not in given:
            notes.append(f"its table of positions has {context:,} rows, as many as context; new.context gives it more")
    return build(ModelConfig, {**known, **given}, "train: new"), notes


def _family_defaults(model_type: str) -> dict[str, Any]:
    family = find({"model_type": model_type})
    return dict(family.defaults.get(model_type, {})) if family else {}
