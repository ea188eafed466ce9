"""The tensors of a merge with their kernels: parameters resolved, vocabularies aligned, shapes and dtypes proved.

Arithmetic is in float32 whatever the recipe's dtype, which is that of the output and is rounded to once. Leaves out:
which tensors meet (placing.py), and what a method does with them (methods/).
"""

from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch

from lapis.checkpoint import Checkpoint
from lapis.errors import ConfigError
from lapis.text.tokenizer.vocabulary import Vocabulary, relation
from lapis.weights.account import Entry
from lapis.weights.engine.fp8 import is_number
from lapis.weights.engine.outputs import Kernel, Output, unchanged
from lapis.weights.engine.sources import COMPUTABLE, Source, Stored
from lapis.weights.matching import embedding_rows, is_vocabulary
from lapis.weights.merge.kernel import kernel_of
from lapis.weights.merge.placing import Placed, Placing
from lapis.weights.merge.recipes.parameters import Resolver
from lapis.weights.merge.recipes.recipe import Input, Recipe, recipe_scopes
from lapis.weights.merge.union import Aligned, Words, output_words, rows_of
from lapis.wording import format_count

SHARD = 5 * 10**9  # bytes of one weight file
_BUFFERS = ("I64", "BOOL")  # what checkpoints keep beside weights; other whole numbers are quantized weights


class Layout:
    """The output's tensors with their kernels."""

    def __init__(
        self,
        recipe: Recipe,
        inputs: dict[str, Checkpoint],
        placing: Placing,
        vocabularies: Mapping[str, Vocabulary | None],
        statistics: Mapping[str, Checkpoint] | None = None,
    ) -> None:
        self.recipe, self.inputs, self.placing, self.vocabularies = recipe, inputs, placing, vocabularies
        self.statistics = statistics or {}
        self.resolver = Resolver(recipe.method.name, list(recipe_scopes(recipe)))
        self.entries: list[Entry] = []
        self.problems: list[str] = []
        self.notes: list[str] = []
        self.method_notes: Counter[str] = Counter()
        self.words: Words | None = None
        self.token_models = list(
            dict.fromkeys(e.model for p in placing.placed if is_vocabulary(p.part) for e, _ in p.sources)
        )
        self._rows = {model: embedding_rows(inputs[model]) or 0 for model in inputs}

    def check_vocabularies(self) -> list[str]:
        """That rows of embeddings which are merged stand for the same tokens, or a vocabulary that makes it so."""
        models = self.token_models
        if self.recipe.tokens and models:
            base = self.recipe.base or self.placing.owner
            if self.recipe.tokens.source not in ("union", "base", *self.inputs):
                return [f"tokenizer_source is {self.recipe.tokens.source}; give union, base or one of the models"]
            named = dict.fromkeys([base, *models])
            self.words = output_words(
                self.recipe.tokens, base, {m: self.inputs[m] for m in named}, self.vocabularies, self._rows
            )
            self.notes += self.words.notes
            return self.words.problems
        problems = []
        first = self.vocabularies[models[0]] if models else None
        for model in models[1:]:
            other = self.vocabularies[model]
            if first is None or other is None:
                blind = models[0] if first is None else model
                note = f"{blind} has no tokenizer.json: rows are taken to stand for the same tokens"
                self.notes += [note] if note not in self.notes else []
            elif (how := relation(first, other)) in ("permuted", "different"):
                problems.append(
                    f"the tokens of {models[0]} and {model} stand in {how} rows; set tokenizer_source: base or union"
                )
        return problems

    def output(self, placed: Placed) -> Output | None:
        """One tensor, or None where it cannot be made, and the problem is noted."""
        stored = [
            Stored(e.model, self.inputs[e.model], name) for e, name in placed.sources if self._readable(e.model, name)
        ]
        if len(stored) < len(placed.sources):
            return None
        dtypes = {source.dtype for source in stored}
        if not dtypes <= set(COMPUTABLE):
            return self._buffer(placed, stored)
        if placed.tower:
            return self._copied(placed, stored[0])
        aligned = self.words is not None and is_vocabulary(placed.part)
        shapes = {source.shape[1:] if aligned else source.shape for source in stored}
        if len(shapes) > 1:
            spelled = ", ".join(f"{'x'.join(map(str, s.shape)) or 'a scalar'} in {s.role}" for s in stored)
            remedy = "tokenizer_source: base or union" if is_vocabulary(placed.part) else "a merge needs equal shapes"
            self.problems.append(f"{placed.name} is {spelled}; {remedy}")
            return None
        try:
            return self._merged(placed, stored, aligned)
        except ConfigError as error:
            if str(error) not in self.problems:
                self.problems.append(str(error))
            return None

    def _copied(self, placed: Placed, source: Stored) -> Output:
        """A tensor of another tower, as it is, but for the dtype that the recipe asks for."""
        dtype = getattr(torch, self.recipe.dtype) if self.recipe.dtype else widest([source])
        self.entries.append(Entry(placed.name, "copied", f"{placed.tower} of {source.role}"))
        return Output(placed.name, dtype, source.shape, (source,), None if dtype == source.dtype else Kernel(unchanged))

    def _merged(self, placed: Placed, stored: list[Stored], aligned: bool) -> Output:
        method, recipe = self.recipe.method, self.recipe
        uses_base = method.base != "ignored" and any(entry.model == placed.base for entry, _ in placed.sources)
        sources: list[Source] = list(self._aligned(placed, stored)) if aligned else list(stored)
        pairs = list(zip(placed.sources, sources, strict=True))
        merged = [pair for pair in pairs if not (uses_base and pair[0][0].model == placed.base)]
        shared = (placed.within.parameters, recipe.module, recipe.parameters)
        values: dict[str, Any] = {}
        for name, parameter in method.parameters.items():
            if parameter.per_model:
                values[name] = tuple(
                    self.resolver.value(parameter, tensor, placed.t, (entry.parameters, *shared), entry.model)
                    for (entry, tensor), _ in merged
                )
            else:
                values[name] = self.resolver.value(parameter, placed.name, placed.t, shared)
        dtype = getattr(torch, recipe.dtype) if recipe.dtype else widest(stored)
        shape = sources[0].shape
        if method.name == "passthrough" and values["scale"] == (1.0,) and not aligned and dtype == sources[0].dtype:
            self.entries.append(Entry(placed.name, "copied", f"{pairs[0][0][1]} of {pairs[0][0][0].model}"))
            return Output(placed.name, dtype, shape, tuple(sources))
        statistics = self._statistics(placed, [pair[0] for pair in merged], shape, aligned)
        grams = statistics if method.statistics == "gram" else []
        layer = not is_vocabulary(placed.part) and (bool(grams) or method.statistics != "gram")
        kernel = kernel_of(
            method, values, placed.name, shape, models=len(merged), base=uses_base, seed=recipe.seed, layer=layer,
            grams=grams, method_notes=self.method_notes,
        )  # fmt: skip
        inputs = [source for _, source in merged]
        inputs += [source for (entry, _), source in pairs if uses_base and entry.model == placed.base]
        inputs += statistics if not grams else []
        reason = f"{format_count(len(self.words.ids), 'token')} in {shape[0]:,} rows" if aligned and self.words else ""
        self.entries.append(Entry(placed.name, "merged", reason))
        return Output(placed.name, dtype, shape, tuple(inputs), replace(kernel, rows=kernel.rows or aligned))

    def _statistics(
        self, placed: Placed, models: list[tuple[Input, str]], shape: tuple[int, ...], aligned: bool
    ) -> list[Stored]:
        """What was gathered of a tensor in each model; none where there are Gram matrices of no model.

        Raises ConfigError where it is there for some of the models only, or does not fit.
        """
        kind = self.recipe.method.statistics
        if not kind:
            return []
        if aligned and kind == "fisher":
            raise ConfigError(
                f"{placed.name}: fisher weighs rows as they stand in the models; leave tokenizer_source out"
            )
        expected = shape if kind == "fisher" else shape[-1:] * 2
        lacking = [entry.model for entry, name in models if name not in self.statistics[entry.model].index]
        if lacking and (kind == "fisher" or len(lacking) < len(models)):
            raise ConfigError(f"{placed.name}: the statistics of {lacking[0]} lack it; gather them again")
        if lacking:
            if placed.part.layer is not None and len(shape) > 1:
                self.method_notes["are matrices without statistics, and were averaged"] += 1
            return []
        stored = [Stored(f"statistics of {e.model}", self.statistics[e.model], name) for e, name in models]
        for source in stored:
            if source.shape != expected:
                raise ConfigError(f"{placed.name}: {source.role} are of the shape {source.shape}, not {expected}")
        return stored

    def _aligned(self, placed: Placed, stored: list[Stored]) -> list[Aligned]:
        """The sources of an embedding or head in the rows of the output's vocabulary."""
        assert self.words is not None and self.recipe.tokens is not None
        tensors = {source.role: source for source in stored}
        for model in {self.words.donor, *self._row_models()} - tensors.keys():
            if model not in self.inputs:
                raise ConfigError(f"tokenizer: {model} is none of the models that are merged; rows come from these")
            same = [name for name in self.inputs[model].names if self.inputs[model].part(name) == placed.part]
            if not same:
                raise ConfigError(f"{placed.name}: {model} has no such tensor to take rows from")
            tensors[model] = Stored(model, self.inputs[model], same[0])
        words = {model: vocabulary for model, vocabulary in self.vocabularies.items() if vocabulary}
        listed = sorted(self.words.ids.values())
        return [
            Aligned(
                source.role,
                tensors,
                rows_of(
                    source.role, self.words, self.recipe.tokens, placed.base, list(tensors), words,
                    {model: tensor.shape[0] for model, tensor in tensors.items()},
                ),
                listed,
            )
            for source in stored
        ]  # fmt: skip

    def _row_models(self) -> list[str]:
        return (
            [source.model for source in self.recipe.tokens.tokens.values() if source.model]
            if self.recipe.tokens
            else []
        )

    def _readable(self, model: str, name: str) -> bool:
        """Whether a tensor holds numbers that mean something by themselves; notes the problem where not."""
        info = self.inputs[model].info(name)
        if is_number(self.inputs[model], name) or info.dtype in _BUFFERS:
            return True
        self.problems.append(
            f"{name} is {info.dtype} in {model}: numbers without a known scale; give the unquantized model"
        )
        return False

    def _buffer(self, placed: Placed, stored: list[Stored]) -> Output | None:
        """A tensor of whole numbers or booleans: copied where all models agree."""
        first = self.inputs[stored[0].role].read(stored[0].name)
        for other in stored[1:]:
            if not torch.equal(first, self.inputs[other.role].read(other.name)):
                self.problems.append(
                    f"{placed.name} holds {first.dtype} that differ in {stored[0].role} and {other.role}"
                )
                return None
        self.entries.append(Entry(placed.name, "copied", "whole numbers, the same in all"))
        return Output(placed.name, stored[0].dtype, stored[0].shape, (stored[0],))


def widest(stored: list[Stored]) -> torch.dtype:
    """The dtype that holds all the sources' numbers; FP8 with its scales counts as bfloat16."""
    dtypes = [torch.bfloat16 if source.scaled else source.dtype for source in stored]
    result = dtypes[0]
    for dtype in dtypes[1:]:
        result = torch.promote_types(result, dtype)
    return result


def sharded(outputs: list[Output]) -> dict[str, list[Output]]:
    """The output's files: one, or several of at most SHARD bytes."""
    shards: list[list[Output]] = [[]]
    for output in outputs:
        if shards[-1] and sum(each.nbytes for each in shards[-1]) + output.nbytes > SHARD:
            shards.append([])
        shards[-1].append(output)
    if len(shards) == 1:
        return {"model.safetensors": shards[0]}
    return {f"model-{i + 1:05}-of-{len(shards):05}.safetensors": shard for i, shard in enumerate(shards)}
