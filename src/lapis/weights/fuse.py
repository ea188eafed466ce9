"""An adapter added to its base: W + scale * B A, tensor by tensor, on disk (Hu et al. 2021, section 4).

DoRA's rows are brought to their trained lengths; trained rows of tokens stand in place of the base's; modules that
were saved whole replace theirs. Computed in float32 and rounded once to the base's dtype; a tied head stays tied. The
model is never built: peak memory is a few tiles and one adapter. Leaves out: bases of which only quantized weights are
there; adding to them would be lost in their rounding.
"""

import json
import os
import re
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from lapis.checkpoint import Checkpoint
from lapis.checkpoint.adapter import CONFIG, WEIGHTS, Adapter, base_of, open_adapter
from lapis.checkpoint.commit import check_output
from lapis.checkpoint.store import INDEX
from lapis.checkpoint.tensor_file import torch_dtype
from lapis.errors import CheckpointError
from lapis.weights.checks import missing_tensors
from lapis.weights.engine.job import Entry, MergeResult, count, produce, write_account
from lapis.weights.engine.outputs import Account, Kernel, Output
from lapis.weights.engine.sources import COMPUTABLE, Source, Stored
from lapis.weights.engine.tiles import Tile
from lapis.weights.matching import format_problems
from lapis.weights.merge.layout import sharded
from lapis.weights.tokenizer_files import carry, write_index

_WORDS = re.compile(
    r"tokenizer.*\.(json|model)|special_tokens_map\.json|added_tokens\.json|vocab\.(json|txt)|merges\.txt"
    r"|chat_template\.jinja|generation_config\.json|preprocessor_config\.json"
)
_HEADS = re.compile(r"(ForCausalLM|LMHeadModel|ForMaskedLM|ForPreTraining|Model)$")
TOLD = 6


def fuse(
    adapter: Adapter | str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    base: str | os.PathLike[str] | None = None,
    overwrite: bool = False,
    allow_nonfinite: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> MergeResult:
    """Writes the base with the adapter added as a model folder at `out`.

    base: in place of the one that the adapter names. progress(done, total) is called in bytes. A killed run of the same
    fuse goes on where it stopped. Raises CheckpointError for an adapter that does not fit its base, or a base of 4-bit
    weights; OutputError where `out` cannot be written.
    """
    started = time.perf_counter()
    adapter = adapter if isinstance(adapter, Adapter) else open_adapter(adapter)
    onto = base_of(adapter, base)
    _refuse_quantized(onto, adapter)
    if problems := missing_tensors({"base": onto}):
        raise CheckpointError(format_problems("fuse", problems))
    _Plan(adapter, onto).outputs()  # all that headers can show, before a weight of the hub is fetched
    onto = onto.fetched()
    plan = _Plan(adapter, onto)
    files = sharded(plan.outputs())
    inputs = {"base": onto, "adapter": adapter.weights}
    check_output(Path(os.path.abspath(out)), overwrite=overwrite, inputs=[adapter.root, onto.root])
    disk = sum(output.nbytes for outputs in files.values() for output in outputs)
    result = MergeResult(str(out), count(plan.entries), needs={"disk_bytes": disk}, notes=plan.notes)
    recipe = {"method": "dora" if adapter.dora else "lora", "rank": adapter.config["r"],
              "alpha": adapter.config["lora_alpha"], "modules": len(adapter.pairs)}  # fmt: skip

    def beside(folder: Path, account: Account) -> None:
        plan.notes += carry(onto, folder, config=plan.config)
        for path in sorted(adapter.root.iterdir()):
            found = adapter.weights.file(path.name) if _WORDS.fullmatch(path.name) else None
            if found is not None:  # the adapter's tokens and template are those that it was trained with
                shutil.copyfile(found, folder / path.name)
        (folder / INDEX).unlink(missing_ok=True)
        if len(files) > 1:
            write_index(folder, files)
        write_account(folder, "fuse", recipe, inputs, plan.entries, account.figures, plan.notes)

    settings = json.loads((adapter.root / CONFIG).read_bytes())
    produce(
        result, files, inputs, [recipe, settings, plan.config], beside,
        overwrite=overwrite, allow_nonfinite=allow_nonfinite, progress=progress,
    )  # fmt: skip
    result.seconds = time.perf_counter() - started
    return result


@dataclass
class _Plan:
    """What becomes of each tensor. Raises CheckpointError with everything that does not fit."""

    adapter: Adapter
    onto: Checkpoint
    entries: list[Entry] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.modules = {self._canonical(f"{module}.weight"): module for module in self.adapter.pairs}
        self.rows = {self._canonical(f"{module}.weight"): module for module in self.adapter.rows}
        self.whole = {self._canonical(name): stored for name, stored in self.adapter.whole.items()}
        self.names = {self._canonical(name): name for name in self.onto.names}
        self.classes = self._classes()
        self.config = self._config()
        tied = bool(self.onto.config.get("tie_word_embeddings", self.onto.config.get("model_type") in ("gpt2", "bert")))
        by_component = {self._component(name): name for name in self.names}
        self.embed, self.head = by_component.get("embed"), by_component.get("head")
        if tied and self.classes == 0:
            touched = [name for name in (self.embed, self.head) if name in self.modules or name in self.whole]
            if touched and not (self.embed in touched and self.head in touched):
                self.problems.append(f"{touched[0]} is adapted, and tied to another; untie the base first")
            if self.head and self.embed in self.rows:
                self.rows[self.head] = self.rows[self.embed]
            if self.head not in self.names or self.head is None:
                self.rows = {name: module for name, module in self.rows.items() if name in self.names}

    def outputs(self) -> list[Output]:
        """The tensors of the output, in the base's order; what the adapter brings anew comes last."""
        for kind, wanted in (("adapts", self.modules), ("has rows for", self.rows)):
            self.problems += [f"the adapter {kind} {name}, which the base lacks" for name in wanted.keys() - self.names]
        found = [made for name in self.names if (made := self._output(name)) is not None]
        dtype = max((output.dtype for output in found), key=lambda d: sum(o.dtype == d for o in found))
        for name in sorted(self.whole.keys() - self.names):
            if self._component(name).startswith("head") or self._component(name) == "classifier":
                source = Stored("adapter", self.adapter.weights, self.whole[name])
                found.append(Output(name, dtype, source.shape, (source,), _plain()))
                self.entries.append(Entry(name, "merged", "a head that the adapter brings", role="adapter"))
            else:
                self.problems.append(f"the adapter holds {name} whole, which the base lacks")
        if self.problems:
            more = f" ... and {len(self.problems) - TOLD} more" if len(self.problems) > TOLD else ""
            told = "; ".join(sorted(self.problems)[:TOLD])
            raise CheckpointError(f"fuse: {told}{more}. Is {self.onto.source} the adapter's base?")
        return found

    def _output(self, canonical: str) -> Output | None:
        stored = self.names[canonical]
        name = canonical if self.classes and self.onto.family else stored
        component = self._component(canonical)
        if self.classes and (component == "head" or component.startswith(("head.transform", "head.norm"))):
            self.entries.append(Entry(stored, "skipped", "the output has a classifier in its place", role="base"))
            return None
        info = self.onto.info(stored)
        dtype = torch_dtype(info.dtype)
        touched = canonical in self.modules or canonical in self.rows or canonical in self.whole
        if touched and dtype not in COMPUTABLE:
            self.problems.append(f"{stored} is {info.dtype}, to which nothing can be added; give --base in 16 bits")
            return None
        source: Source = Stored("base", self.onto, stored)
        output = Output(name, source.dtype, source.shape, (source,))
        if canonical in self.whole:
            given = Stored("adapter", self.adapter.weights, self.whole[canonical])
            if given.shape != source.shape:
                self.problems.append(f"{stored} is {_spelled(source.shape)}, in the adapter {_spelled(given.shape)}")
            self.entries.append(Entry(name, "merged", "the adapter's own", role="adapter"))
            return replace(output, sources=(given,), kernel=_plain())
        if canonical in self.modules:
            kernel = self._kernel(canonical, source)
            if kernel is None:
                return None
            output = replace(output, kernel=kernel)
        if canonical in self.rows:
            ids, rows = self.adapter.rows[self.rows[canonical]]
            shape = self.adapter.weights.info(rows).shape
            if shape[1:] != source.shape[1:] or max(ids) >= source.shape[0]:
                self.problems.append(f"{stored} is {_spelled(source.shape)}; the adapter's rows go to {max(ids)}")
                return None
            values = self.adapter.weights.read(rows).to(source.dtype)
            output = replace(output, patch=_patch(ids, values))
        reason = f"{len(ids):,} rows of tokens" if canonical in self.rows else ""
        self.entries.append(Entry(name, "merged" if touched else "copied", reason))
        return output

    def _kernel(self, canonical: str, source: Source) -> Kernel | None:
        module = self.modules[canonical]
        names, read = self.adapter.pairs[module], self.adapter.weights
        rank = self.adapter.rank(module)
        inputs, outputs = read.info(names["A"]).shape[1], read.info(names["B"]).shape[0]
        transposed = self._transposed(canonical, names["A"])
        expected = (inputs, outputs) if transposed else (outputs, inputs)
        if source.shape != expected:
            self.problems.append(f"{canonical} is {_spelled(source.shape)}, the adapter's {_spelled(expected)}")
            return None
        low = _LowRank(read, names, rank, self.adapter.scale(module), transposed)
        return low.kernel()

    def _transposed(self, canonical: str, a_name: str) -> bool:
        """Whether the weight lies on disk with its inputs first."""
        if "lora_embedding_A" in a_name:
            return True
        matched = self.onto.family.match(canonical) if self.onto.family else None
        if matched:
            return matched[0].transform.transposed
        return bool(self.adapter.config.get("fan_in_fan_out"))

    def _canonical(self, name: str) -> str:
        """A name as its family writes it, so that a bare folder's and the adapter's meet."""
        family = self.onto.family
        matched = family.match(name) if family else None
        return family.disk_name(*matched) if family and matched else name

    def _component(self, name: str) -> str:
        return self.onto.part(name).component

    def _classes(self) -> int:
        """Classes of a head that the adapter brings and the base lacks."""
        for name, stored in self.whole.items():
            if name not in self.names and name in ("classifier.weight", "score.weight"):
                return self.adapter.weights.info(stored).shape[0]
        return 0

    def _config(self) -> dict[str, Any]:
        config = dict(self.onto.config)
        if self.classes:
            image = "image_size" in config
            ending = "ForImageClassification" if image else "ForSequenceClassification"
            kinds = config.get("architectures") or [str(config.get("model_type", "")).capitalize()]
            config["architectures"] = [_HEADS.sub("", str(kinds[0])) + ending]
            config["num_labels"] = self.classes
            config |= {"id2label": {str(i): f"LABEL_{i}" for i in range(self.classes)},
                       "label2id": {f"LABEL_{i}": i for i in range(self.classes)}}  # fmt: skip
        labels = json.loads(self.adapter.weights.headers[WEIGHTS].metadata.get("id2label", "null"))
        if isinstance(labels, Mapping) and labels:
            config |= {"id2label": dict(labels), "label2id": {text: int(number) for number, text in labels.items()}}
        return config


class _LowRank:
    """scale * B A for tiles of a weight. transposed: the weight lies on disk as [inputs, outputs]."""

    def __init__(self, read: Checkpoint, names: Mapping[str, str], rank: int, scale: float, transposed: bool) -> None:
        self._read, self._names, self._scale, self._transposed = read, names, scale, transposed
        self._held: tuple[torch.Tensor, torch.Tensor] | None = None

    def kernel(self) -> Kernel:
        if "magnitude" not in self._names:
            return Kernel(self._add, rows=True)
        if self._transposed:  # the length of an output is known only when all rows were seen
            return Kernel(self._renormed, (self._squares,), lambda _, parts, __: sum(parts).sqrt(), rows=True)
        return Kernel(self._renormed, rows=True)

    def _summed(self, tile: Tile) -> tuple[torch.Tensor, torch.Tensor]:
        """The weight and what is added to it, [rows of the tile, columns]."""
        if self._held is None:
            a_RI, b_OR = (self._read.read(self._names[kind]).float() for kind in "AB")
            self._held = (a_RI.T.contiguous(), b_OR.T.contiguous()) if self._transposed else (b_OR, a_RI)
        left, right = self._held
        first, last = tile.first // tile.columns, tile.last // tile.columns
        return tile.inputs[0].view(-1, tile.columns), (left[first:last] @ right).mul_(self._scale)

    def _add(self, tile: Tile, _state: Any) -> tuple[torch.Tensor, torch.Tensor]:
        weight, added = self._summed(tile)
        return (weight + added).view(-1), added.view(-1)

    def _squares(self, tile: Tile, _state: Any) -> torch.Tensor:
        weight, added = self._summed(tile)
        return (weight + added).double().square().sum(0)

    def _renormed(self, tile: Tile, lengths_O: Any) -> tuple[torch.Tensor, torch.Tensor]:
        weight, added = self._summed(tile)
        moved = weight + added
        magnitude = self._read.read(self._names["magnitude"]).float().flatten()
        if self._transposed:
            moved *= (magnitude / lengths_O)[None].float()
        else:
            rows = slice(tile.first // tile.columns, tile.last // tile.columns)
            moved *= (magnitude[rows] / torch.linalg.vector_norm(moved, dim=1))[:, None]
        return moved.view(-1), (moved - weight).view(-1)


def _plain() -> Kernel:
    """Only rounds to the output's dtype."""
    return Kernel(lambda tile, _: (tile.inputs[0], None))


def _patch(ids: list[int], values_ND: torch.Tensor) -> Callable[[int, int, torch.Tensor], None]:
    """Overwrites the rows `ids` of a [V, D] matrix."""
    columns = values_ND.shape[1]

    def patch(first: int, last: int, values: torch.Tensor) -> None:
        for row, value in zip(ids, values_ND, strict=True):
            start, end = max(row * columns, first), min((row + 1) * columns, last)
            if start < end:
                values[start - first : end - first] = value[start - row * columns : end - row * columns]

    return patch


def _refuse_quantized(onto: Checkpoint, adapter: Adapter) -> None:
    settings = onto.config.get("quantization_config")
    packed = [name for name in onto.names if name.endswith((".absmax", ".quant_map")) or ".quant_state." in name]
    if packed or (isinstance(settings, Mapping) and settings.get("load_in_4bit", settings.get("_load_in_4bit"))):
        raise CheckpointError(
            f"fuse: {onto.source} holds 4-bit weights; what {adapter.root.name} adds is smaller than their steps and "
            "would be lost in rounding. Give --base, the same model in 16 bits"
        )


def _spelled(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape)) or "a scalar"
