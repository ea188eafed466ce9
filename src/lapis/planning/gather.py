"""A model and text in, what its layers read or how much its weights matter out, for merges that weigh with it.

gram: of each matrix of a layer the mean of v v^T over the tokens, v the vector that it is multiplied with. fisher: of
each weight the mean over texts and chats of the squared gradient of their log-probability: the empirical Fisher
information, with the texts' own tokens where Matena and Raffel (2022) draw them from the model. prompt_states: where
prompts lie in the stream, for the gates of a mixture of experts. Leaves out: merging with them (weights/merge/).

Shapes: T tokens, I inputs, L layers, D width.
"""

import hashlib
import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lapis.checkpoint import Checkpoint
from lapis.checkpoint.commit import check_output, commit
from lapis.checkpoint.tensor_file import write_tensors
from lapis.errors import CheckpointError, ConfigError, DataError
from lapis.evaluation.chats import encode_record
from lapis.evaluation.text import windows_of
from lapis.model.check import plan_load
from lapis.model.load import load
from lapis.model.scoring import ScoredSequence, token_log_probabilities
from lapis.model.transformer import Transformer
from lapis.text.corpus import corpus
from lapis.text.tokenizer.tokenizer import Tokenizer
from lapis.weights.fuse.opening import open_model
from lapis.weights.matching import is_vocabulary
from lapis.weights.merge.statistics import FILE, describe

Kind = Literal["gram", "fisher"]
Files = str | Path | Iterable[str | Path]


def gather(
    model: str | os.PathLike[str] | Checkpoint,
    out: str | os.PathLike[str],
    kind: Kind = "gram",
    *,
    text: Files | None = None,
    chats: Files | None = None,
    tokens: int = 65_536,
    context: int = 512,
    overwrite: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Writes statistics of a model as a folder that recipes name: `statistics` of an input.

    Args:
        model: A folder, a model of the hub, or an opened checkpoint.
        out: A new folder.
        kind: gram, for regmean, or fisher, for fisher.
        text: Files of plain text, of the kind that the model is for.
        chats: jsonl of chats; all that is said in them is read.
        tokens: So many are read.
        context: Of a window of text, and the most of a chat.
        overwrite: Swap an existing folder for the new one.
        progress: Called with tokens, done and in all.

    Returns:
        What was gathered: out, kind, tensors, tokens, sequences, bytes, seconds.

    Raises:
        ConfigError: For neither text nor chats, or a number that cannot be.
        CheckpointError: For a model that cannot be run.
        DataError: For files without a token.
        OutputError: Where `out` cannot be written.
    """
    started = time.perf_counter()
    if kind not in ("gram", "fisher"):
        raise ConfigError(f'gather: kind is "{kind}"; give gram or fisher')
    if text is None and chats is None:
        raise ConfigError("gather: there is nothing to read; give --text or --chats")
    if tokens < 1 or context < 2:
        raise ConfigError(f"gather: tokens is {tokens} and context {context}; give 1 and 2 or more")
    opened = open_model(model)
    check_output(Path(os.path.abspath(out)), overwrite=overwrite, inputs=[opened.root])
    tokenizer = Tokenizer.open(opened)
    runner = load(opened, torch.float32)
    context = min(context, runner.config.context)
    sequences = list(_sequences(tokenizer, text, chats, context, tokens))
    if not sequences:
        raise DataError("gather: the files hold no token to learn from; give other --text or --chats")
    total = sum(len(each.ids) for each in sequences)
    done = 0

    def reached(count: int) -> None:
        nonlocal done
        done += count
        if progress:
            progress(done, total)

    compute = _grams if kind == "gram" else _fisher
    tensors, same = compute(runner, opened, sequences, reached)
    values = hashlib.sha256()
    for name in tensors:
        values.update(tensors[name].numpy().data)
    metadata = describe(kind, opened, same, values_sha256=values.hexdigest(), tokens=total, sequences=len(sequences))
    needs = sum(each.nbytes for each in tensors.values()) + (1 << 20)
    with commit(Path(out), kind="statistics", overwrite=overwrite, needs_bytes=needs, inputs=[opened.root]) as staging:
        write_tensors(staging.path / FILE, tensors, metadata)
    return {
        "out": str(out), "kind": kind, "tensors": len(tensors) + len(same), "tokens": total,
        "sequences": len(sequences), "bytes": needs - (1 << 20), "seconds": time.perf_counter() - started,
    }  # fmt: skip


def prompt_states(model: Checkpoint) -> Callable[[Sequence[Sequence[int]]], Tensor]:
    """What a mixture of experts' gates are made from: `states` of `lapis.merge`.

    Args:
        model: The base of the mixture; it is run in float32.

    Returns:
        A function: ids of prompts -> [L, D], float32: the vector of a prompt's last token before each layer, mean over
        the prompts.

    Raises:
        CheckpointError: For a model that cannot be run.
    """
    runner = load(model, torch.float32)
    held: list[Tensor] = []

    def keep(_: nn.Module, inputs: tuple[Any, ...]) -> None:
        held.append(inputs[0][0, -1])

    def states(prompts: Sequence[Sequence[int]]) -> Tensor:
        handles = [block.register_forward_pre_hook(keep) for block in runner.blocks]
        total = torch.zeros(len(handles), runner.config.dim)
        try:
            with torch.inference_mode():
                for ids in prompts:
                    held.clear()
                    runner.hidden(torch.tensor([list(ids)]))
                    total += torch.stack(held)
        finally:
            for handle in handles:
                handle.remove()
        return total / len(prompts)

    return states


def _sequences(
    tokenizer: Tokenizer, text: Files | None, chats: Files | None, context: int, tokens: int
) -> Iterator[ScoredSequence]:
    """Chats and windows of text by turns, until there are so many tokens."""
    lead = tokenizer.document_lead

    def windows() -> Iterator[ScoredSequence]:
        for document in corpus.documents(text) if text is not None else ():
            yield from windows_of([*([] if lead is None else [lead]), *tokenizer.encode(document.text)], context)

    def talks() -> Iterator[ScoredSequence]:
        for chat in corpus.chats(chats) if chats is not None else ():
            ids, _ = encode_record(tokenizer, chat)
            if len(ids) > 1:
                yield ScoredSequence(ids[: context + 1], [place > 0 for place in range(len(ids[: context + 1]))])

    kinds, left = [windows(), talks()], tokens
    while kinds and left > 0:
        for source in list(kinds):
            sequence = next(source, None)
            if sequence is None:
                kinds.remove(source)
            elif left > 0:
                yield sequence
                left -= len(sequence.ids)


def _grams(
    model: Transformer, checkpoint: Checkpoint, sequences: list[ScoredSequence], reached: Callable[[int], None]
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Of each matrix of a layer what it reads; those that read the same vectors have one entry."""
    modules: dict[str, str] = {}  # of the model -> tensor on disk
    for name, rule, targets in plan_load(checkpoint).steps:
        matrix = len(checkpoint.info(name).shape) == 2 and not is_vocabulary(checkpoint.part(name))
        if matrix and not rule.transform.transposed and checkpoint.part(name).layer is not None:
            modules[targets[0].removesuffix(".weight")] = name
    sums: dict[str, Tensor] = {}
    same: dict[str, str] = {}
    taken: dict[tuple[int, str], str] = {}  # where vectors lie -> the tensor that has their entry
    holding: list[Tensor] = []
    count = 0

    def add(module: str, x_TI: Tensor) -> None:
        name = modules[module]
        place = x_TI.data_ptr(), f"{x_TI.shape}"
        if place in taken and taken[place] != name:
            same[name] = taken[place]
            return
        taken[place] = name
        holding.append(x_TI)  # as long as it lives nothing else has its place
        sums.setdefault(name, torch.zeros(x_TI.shape[-1], x_TI.shape[-1], dtype=torch.float64))
        sums[name] += (x_TI.T @ x_TI).double()

    with torch.inference_mode(), _hooked(model, modules, add):
        for sequence in sequences:
            taken.clear()
            holding.clear()
            model.hidden(torch.tensor([list(sequence.ids)]))
            count += len(sequence.ids)
            reached(len(sequence.ids))
    if not sums:
        raise CheckpointError(f"gather: {checkpoint.source} has no matrix of which Gram matrices can be gathered")
    return {name: (total / count).float() for name, total in sums.items()}, same


@contextmanager
def _hooked(model: nn.Module, modules: dict[str, str], add: Callable[[str, Tensor], None]) -> Iterator[None]:
    """Inside, add(module, vectors [T, I]) is called with what each module is given."""
    handles = []
    for module in modules:

        def hook(_: nn.Module, inputs: tuple[Tensor, ...], module: str = module) -> None:
            add(module, inputs[0].reshape(-1, inputs[0].shape[-1]))

        handles.append(model.get_submodule(module).register_forward_pre_hook(hook))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _fisher(
    model: Transformer, checkpoint: Checkpoint, sequences: list[ScoredSequence], reached: Callable[[int], None]
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The mean of squared gradients, one for each sequence, as the tensors lie on the disk."""
    parameters = dict(model.named_parameters())
    squares = {name: torch.zeros_like(parameter) for name, parameter in parameters.items()}
    for sequence in sequences:
        model.zero_grad(set_to_none=True)
        ids_T = torch.tensor(list(sequence.ids))
        places = torch.tensor([place for place, scored in enumerate(sequence.scored) if scored and place])
        hidden_TD = model.hidden(ids_T[None])[0]
        token_log_probabilities(model, hidden_TD[places - 1], ids_T[places]).sum().backward()  # type: ignore[no-untyped-call]
        for name, parameter in parameters.items():
            if parameter.grad is not None:
                squares[name].addcmul_(parameter.grad, parameter.grad, value=1 / len(sequences))
        reached(len(sequence.ids))
    return {
        name: rule.transform.invert([squares[target] for target in targets]).contiguous()
        for name, rule, targets in plan_load(checkpoint).steps
        if all(target in squares for target in targets)
    }, {}
