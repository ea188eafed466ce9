"""An adapter and its base in, what becomes of each tensor out, from headers alone (but for copies that must be equal).

Trained rows of tokens stand in place of the base's, and modules that were saved in full replace theirs. A head that is
tied to the embedding stays tied while both are changed alike; where an adapter changes one of them, as PEFT computes
it, the output has a head of its own. Rows may have been added to both since the base was written.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch

from lapis.checkpoint import Checkpoint
from lapis.checkpoint.adapter_names import APART
from lapis.checkpoint.store import Adapter
from lapis.checkpoint.tensor_file import torch_dtype
from lapis.errors import CheckpointError
from lapis.families.config import ModelConfig, class_fields
from lapis.weights.account import Entry
from lapis.weights.config_fields import carried_config, settled_tie
from lapis.weights.engine.job import with_dtype
from lapis.weights.engine.outputs import Output
from lapis.weights.engine.sources import COMPUTABLE, Source, Stored
from lapis.weights.fuse.low_rank import LowRank, StackedLowRank, patch_rows, rounding
from lapis.wording import format_count

_HEADS = re.compile(r"(ForCausalLM|LMHeadModel|ForMaskedLM|ForPreTraining|Model)$")
_CLASSIFIERS = ("classifier.weight", "score.weight", "classifier.out_proj.weight")
SHOWN = 6  # problems


@dataclass
class FuseLayout:
    """What becomes of each tensor.

    Attributes:
        adapter: What is added.
        onto: Its base.
        dtype: Of all weights of the output; None keeps each tensor's own.
        config: config.json of the output.
        entries, notes: For the account.
    """

    adapter: Adapter
    onto: Checkpoint
    dtype: torch.dtype | None = None
    entries: list[Entry] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        adapter = self.adapter
        self.modules = {self._canonical(adapter.tensor(module)): module for module in adapter.pairs}
        self.rows = {self._canonical(f"{module}.weight"): module for module in adapter.rows}
        self.whole = {self._canonical(name): stored for name, stored in adapter.whole.items()}
        self.bases = {self._canonical(f"{module}.weight"): stored for module, stored in adapter.bases.items()}
        self.names = {self._canonical(name): name for name in self.onto.names}
        self.classes = self._classes()
        self.config = self._config()
        components = {self._component(name): name for name in self.names}
        self.embed = components.get("embed")
        self.head = components.get("head") or self._missing_head()
        if self._tied() and self.embed and self.head and self.classes == 0:
            self._settle_tie(self.embed, self.head)

    @cached_property
    def _shape(self) -> ModelConfig | None:
        """The base's, where its family is known and reads its config.json."""
        try:
            return self.onto.family.read_config(self.onto.config) if self.onto.family else None
        except CheckpointError:
            return None

    def _tied(self) -> bool:
        """Whether the base's head is its embedding, as config.json or else the family says."""
        return self._shape.tied if self._shape else bool(self.onto.config.get("tie_word_embeddings"))

    def _replaced(self, component: str) -> bool:
        """Whether a classifier takes the place of this part of the base's head."""
        if component.startswith(("head.transform", "head.norm")):
            return self._shape is None or self._shape.class_dense != "masked"
        return component == "head"

    def outputs(self) -> list[Output]:
        """The tensors of the output, in the base's order; what the adapter brings anew comes last.

        Raises:
            CheckpointError: With everything that does not fit.
        """
        for kind, names in (("adapts", self.modules), ("has rows for", self.rows)):
            self.problems += [f"{name} {APART}" if name in self.adapter.stacked else
                              f"the adapter {kind} {name}, which the base lacks"
                              for name in names.keys() - self.names]  # fmt: skip
        outputs = [made for name in self.names if (made := self._output(name)) is not None]
        dtype = max((output.dtype for output in outputs), key=lambda d: sum(o.dtype == d for o in outputs))
        for name in sorted(self.whole.keys() - self.names):
            if self._component(name).startswith("head") or self._component(name) == "classifier":
                source = Stored("adapter", self.adapter.weights, self.whole[name])
                outputs.append(Output(name, dtype, source.shape, (source,), rounding()))
                self.entries.append(Entry(name, "merged", "a head that the adapter brings", role="adapter"))
            else:
                self.problems.append(f"the adapter holds {name} in full, which the base lacks")
        self._settle_vocabulary({output.name: output.shape for output in outputs})
        if self.problems:
            more = f" ... and {len(self.problems) - SHOWN} more" if len(self.problems) > SHOWN else ""
            lines = "; ".join(sorted(self.problems)[:SHOWN])
            raise CheckpointError(f"{self.adapter.root}: {lines}{more}. Was the adapter trained on another model?")
        return outputs

    def _settle_tie(self, embed: str, head: str) -> None:
        """Decides whether a head that the base ties to the embedding stays tied."""
        both = (self.modules, self.whole, self.bases, self.rows)
        changed = {name for name in (embed, head) if name in self.modules or name in self.whole}
        if self.adapter.ties and embed in changed:  # PEFT did to the head what it did to the embedding
            for table in both:
                table.pop(head, None)
                if head in self.names and embed in table:
                    table[head] = table[embed]
            return
        if self._equal(embed, head):
            changed.clear()
            if head not in self.names:
                del self.whole[head]
        if changed:
            self.names.setdefault(head, self.names[embed])
            copies = [self.bases[name] for name in (embed, head) if name in self.bases]
            for name in (embed, head) if copies else ():  # the base's one matrix
                self.bases.setdefault(name, copies[0])
            self.config["tie_word_embeddings"] = False
            self.notes.append(f"{head} is no longer tied to {embed}: the adapter changes one without the other")
        if head in self.names and embed in self.rows:
            self.rows.setdefault(head, self.rows[embed])
        elif head not in self.names:
            self.rows.pop(head, None)
            self.bases.pop(head, None)

    def _equal(self, embed: str, head: str) -> bool:
        """Whether the adapter holds both in full, and the same."""
        if embed not in self.whole or head not in self.whole or embed in self.modules or head in self.modules:
            return False
        one, two = (self.adapter.weights.read(self.whole[name]) for name in (embed, head))
        return one.shape == two.shape and bool((one == two).all())

    def _settle_vocabulary(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """vocab_size, where the adapter's embedding has another number of rows than the base's."""
        rows = {name: shapes[name][0] for name in (self.embed, self.head) if name and name in shapes}
        if len(set(rows.values())) > 1:
            sizes = " and ".join(f"{name} has {count:,} rows" for name, count in rows.items())
            self.problems.append(f"{sizes}; give --base, the base with the rows that were added to it")
        elif self.embed is None or self.embed not in rows or rows[self.embed] == self._base_rows():
            return
        elif "vocab_size" not in self.config:
            self.problems.append(f"{self.embed} has {rows[self.embed]:,} rows, and config.json no vocab_size to change")
        else:
            self.config["vocab_size"] = rows[self.embed]
            self.notes.append(f"the vocabulary has {rows[self.embed]:,} rows, in the base {self._base_rows():,}")

    def _base_rows(self) -> int:
        assert self.embed is not None
        return self.onto.info(self.names[self.embed]).shape[0]

    def _output(self, canonical: str) -> Output | None:
        stored = self.names[canonical]
        name = canonical if (self.classes and self.onto.family) or canonical == self.head else stored
        component = self._component(canonical)
        if self.classes and self._replaced(component):
            self.entries.append(Entry(stored, "skipped", "the output has a classifier in its place", role="base"))
            return None
        info = self.onto.info(stored)
        dtype = torch_dtype(info.dtype)
        touched = canonical in self.modules or canonical in self.rows or canonical in self.whole
        if touched and dtype not in COMPUTABLE:
            self.problems.append(f"{stored} is {info.dtype}, to which nothing can be added; give --base in 16 bits")
            return None
        source: Source = Stored("base", self.onto, stored)
        output = Output(name, self._dtype(source.dtype), source.shape, (source,))
        if output.dtype != source.dtype:
            output = replace(output, kernel=rounding())
        if canonical in (self.embed, self.head) and canonical in self.bases and canonical not in self.whole:
            source = Stored("adapter", self.adapter.weights, self.bases[canonical])
            output = replace(output, shape=source.shape, sources=(source,), kernel=rounding())
        if canonical in self.whole:
            given = Stored("adapter", self.adapter.weights, self.whole[canonical])
            fits = given.shape[1:] == source.shape[1:] if canonical in (self.embed, self.head) else False
            if given.shape != source.shape and not fits:
                self.problems.append(f"{stored} is {_spelled(source.shape)}, in the adapter {_spelled(given.shape)}")
            self.entries.append(Entry(name, "merged", "the adapter's own", role="adapter"))
            return replace(output, shape=given.shape, sources=(given,), kernel=rounding())
        if canonical in self.modules:
            output = replace(output, kernel=self._low_rank(canonical, source).kernel())
        if canonical in self.rows:
            ids, rows = self.adapter.rows[self.rows[canonical]]
            shape = self.adapter.weights.info(rows).shape
            if shape[1:] != source.shape[1:] or max(ids) >= source.shape[0]:
                self.problems.append(f"{stored} is {_spelled(source.shape)}; the adapter's rows go to {max(ids)}")
                return None
            values_ND = self.adapter.weights.read(rows).to(output.dtype)
            output = replace(output, patch=patch_rows(ids, values_ND))
        reason = f"{format_count(len(ids), 'row')} of tokens" if canonical in self.rows else ""
        self.entries.append(Entry(name, "merged" if touched else "copied", reason))
        return output

    def _dtype(self, dtype: torch.dtype) -> torch.dtype:
        return self.dtype if self.dtype is not None and dtype in COMPUTABLE else dtype

    def _low_rank(self, canonical: str, source: Source) -> LowRank | StackedLowRank:
        module, read = self.modules[canonical], self.adapter.weights
        names = self.adapter.pairs[module]
        if module in self.adapter.stacked:
            return self._stacked(canonical, module, source)
        inputs, outputs = read.info(names["A"]).shape[1], read.info(names["B"]).shape[0]
        transposed = self._transposed(canonical, names["A"])
        expected = (inputs, outputs) if transposed else (outputs, inputs)
        if source.shape != expected:
            self.problems.append(f"{canonical} is {_spelled(source.shape)}, the adapter's {_spelled(expected)}")
        holder = self.onto if source.role == "base" else read
        return LowRank(self.adapter, module, transposed=transposed, weight=lambda: holder.read(source.name))

    def _stacked(self, canonical: str, tensor: str, source: Source) -> StackedLowRank:
        """Of experts in one tensor, whose matrices lie as their sizes say, or else the family."""
        adapter, family = self.adapter, self.onto.family
        (rows, inputs), (outputs, _) = (adapter.weights.info(adapter.pairs[tensor][kind]).shape for kind in "AB")
        count = rows // adapter.ranks[tensor]
        plain, turned = (count, outputs, inputs), (count, inputs, outputs)
        if source.shape not in (plain, turned):
            self.problems.append(f"{canonical} is {_spelled(source.shape)}, the adapter's {_spelled(plain)}")
        elif plain == turned and not (family and family.match(canonical)):
            self.problems.append(f"{canonical} is {_spelled(plain)}, and which side of it is read is not known")
        first = self._transposed(canonical, "") if plain == turned else source.shape == turned
        return StackedLowRank(adapter, tensor, inputs_first=first)

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

    def _missing_head(self) -> str | None:
        """The name of a head that the base does not hold."""
        own = [name for name in (*self.modules, *self.whole, *self.rows) if self._component(name) == "head"]
        if own:
            return own[0]
        family = self.onto.family
        heads = [
            rule for rule in (family.rules if family else ()) if rule.component == "head" and rule.kind == "weight"
        ]
        return family.disk_name(heads[0], None) if family and heads else None

    def _classes(self) -> int:
        """Classes of a head that the adapter brings and the base lacks."""
        for name, stored in self.whole.items():
            if name not in self.names and name in _CLASSIFIERS:
                return self.adapter.weights.info(stored).shape[0]
        return 0

    def _config(self) -> dict[str, Any]:
        config, dropped = carried_config(self.onto.config)
        config, untied = settled_tie(config, {"base": self.onto})
        self.notes += dropped + untied
        if self.dtype is not None:
            config = with_dtype(config, str(self.dtype).removeprefix("torch."))
        if self.classes:
            image = "image_size" in config
            ending = "ForImageClassification" if image else "ForSequenceClassification"
            kinds = config.get("architectures") or [str(config.get("model_type", "")).capitalize()]
            config["architectures"] = [_HEADS.sub("", str(kinds[0])) + ending]
            config |= {"num_labels": self.classes, **class_fields([f"LABEL_{i}" for i in range(self.classes)])}
        config |= class_fields(self.adapter.class_names(self.classes))
        return config


def _spelled(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape)) or "a scalar"


def refuse_quantized(onto: Checkpoint, adapter: Adapter) -> None:
    """Raises CheckpointError for a base of 4-bit weights."""
    settings = onto.config.get("quantization_config")
    packed = [name for name in onto.names if name.endswith((".absmax", ".quant_map")) or ".quant_state." in name]
    if packed or (isinstance(settings, Mapping) and settings.get("load_in_4bit", settings.get("_load_in_4bit"))):
        raise CheckpointError(
            f"{onto.source}: holds 4-bit weights; what {adapter.root.name} adds is smaller than their steps and "
            "would be lost in rounding. Give --base, the same model in 16 bits"
        )
