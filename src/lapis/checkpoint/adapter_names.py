"""Names in PEFT's folders: which modules an adapter is on, and which tensors of experts that lie in one.

PEFT puts the adapter of a parameter (`target_parameters`) around the module that has it, and that of a second one
around both: "experts" is then the last parameter's, "experts.base_layer" that of the one before.
"""

from collections import defaultdict
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any

from lapis.errors import CheckpointError
from lapis.parsing import quoted

PARAMETERS = ("gate_up_proj", "down_proj")  # in the order in which PEFT puts adapters around them
EXPERTS = ".experts"  # what such a module is called, where target_parameters does not name it
_INNER = ".base_layer"
APART = ("is adapted as all experts in one tensor, and the base holds each expert apart; merge the two in PEFT "
         "(merge_and_unload) and give the merged model")  # fmt: skip
RUNS_APART = "is adapted as all experts in one tensor, and run here expert by expert; make it a model with: lapis fuse"


def shortest(targets: Collection[str], everything: Collection[str], least: int = 1) -> list[str]:
    """The shortest endings of names that mean just the adapted ones, or else their full names.

    Args:
        targets: Names of modules, or of parameters.
        everything: All that there are.
        least: Pieces of a name that are kept in any case.
    """
    targets, endings = set(targets), defaultdict[str, set[str]](set)
    for module in targets | set(everything):
        pieces = module.split(".")
        for i in range(len(pieces)):
            endings[".".join(pieces[i:])].add(module)
    result: set[str] = set()
    for module in targets:
        pieces = module.split(".")
        options = [".".join(pieces[i:]) for i in reversed(range(len(pieces) - least + 1))]
        result.add(next(ending for ending in options if endings[ending] <= targets))
    return sorted(result)


def short_name(module: str) -> str:
    """The last piece of a module's name that says something; PEFT takes a classifier of several layers as one."""
    pieces = module.split(".")
    if pieces[0] in ("classifier", "head"):
        return pieces[0]
    return ".".join(pieces[-2:]) if pieces[-1] == "dense" else pieces[-1]


def stem_of(tensor: str, adapted: Collection[str]) -> str:
    """What the names of a tensor's adapter begin with.

    Args:
        tensor: Its name on disk ("model.layers.0.mlp.experts.gate_up_proj").
        adapted: All tensors that have such an adapter.
    """
    module, _, own = tensor.rpartition(".")
    outer = PARAMETERS[PARAMETERS.index(own) + 1 :]
    return module + _INNER * sum(f"{module}.{name}" in adapted for name in outer)


def stacked_tensors(place: Path, targets: Any, stems: Iterable[str]) -> dict[str, str]:
    """Which names of adapters are of which tensors: what names begin with -> tensor on disk.

    Args:
        place: Of the settings, for errors.
        targets: target_parameters.
        stems: What the names of all adapters in the file begin with.

    Raises:
        CheckpointError: For parameters that are no experts' matrices, and names that do not fit what is targeted.
    """
    known = isinstance(targets, list) and all(
        isinstance(target, str) and target.rpartition(".")[2] in PARAMETERS for target in targets
    )
    if not known:
        raise CheckpointError(
            f"{place}: target_parameters is {quoted(targets)}; lapis reads {' and '.join(PARAMETERS)} of experts"
        )
    stems, tensors = set(stems), dict[str, str]()
    for module in sorted({_outermost(stem) for stem in stems}):
        names = [f"{module}.{name}" for name in PARAMETERS]
        chosen = [target for target in targets if "." in target or f".{module}".endswith(EXPERTS)]
        adapted = [name for name in names if any(f".{name}".endswith(f".{target}") for target in chosen)]
        own_stems = {stem_of(name, adapted): name for name in adapted}
        if adapted and own_stems.keys() != {stem for stem in stems if _outermost(stem) == module}:
            raise CheckpointError(
                f"{place}: target_parameters names {len(adapted)} of {module}, which its tensors deny; save it again"
            )
        tensors |= own_stems
    return tensors


def _outermost(stem: str) -> str:
    while stem.endswith(_INNER):
        stem = stem.removesuffix(_INNER)
    return stem
