"""Activation patching: one state of another model is put into this one, and what then becomes of words is seen.

A state at one place after one layer comes from the other model's pass over the same tokens, the rest of this model
runs on, and the probability of the tracked words at the end is read (Meng et al. 2022, arXiv:2202.05262, section 2;
between models: Prakash et al. 2024, arXiv:2402.14811). All places of a layer are rows of one batch. Leaves out: states
after attention, and several states at once.

Shapes: P places, T tokens, B rows, L layers, D model dim, V vocabulary.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lapis.errors import DataError
from lapis.inside.lens.options import GRID
from lapis.inside.prompt import (
    Prompt,
    TrackedWord,
    as_tokenizer,
    as_words,
    check_length,
    encode,
    show,
    token_text,
    token_word,
)
from lapis.inside.trace import Anatomy, anatomy, trace
from lapis.model.scoring import BATCH_TOKENS, evaluating

if TYPE_CHECKING:
    import plotly.graph_objects as go


@dataclass(frozen=True)
class Patching:
    """What `patch` returns.

    Attributes:
        model, source: The model that ran, and the one that the states are from.
        tokens: The prompt's.
        positions: The places that were patched.
        words: What is tracked.
        before, there: Probability of each word in the model itself, and in the source.
        patched: word -> layers x places: its probability with that one state in place.
    """

    model: str
    source: str
    tokens: list[str]
    positions: list[int]
    words: list[TrackedWord]
    before: dict[str, float]
    there: dict[str, float]
    patched: dict[str, list[list[float]]] = field(repr=False)

    def most(self, word: str) -> tuple[int, int]:
        """(layer, position) of the state that changes a word's probability most."""
        table = self.patched[word]
        cells = [(layer, place) for layer in range(len(table)) for place in range(len(self.positions))]
        layer, place = max(cells, key=lambda cell: abs(table[cell[0]][cell[1]] - self.before[word]))
        return layer, self.positions[place]

    def finding(self, word: str) -> str:
        """One sentence: which state does most to a word."""
        layer, position = self.most(word)
        reached = self.patched[word][layer][self.positions.index(position)]
        return (
            f'"{show(word)}" has {self.before[word]:.1%} in {self.model} and {self.there[word]:.1%} in {self.source}; '
            f'the state after layer {layer} at "{show(self.tokens[position])}" brings it to {reached:.1%}'
        )

    def to_json(self) -> dict[str, Any]:
        """before, there: word -> probability. layers: (layer, places: (position, token, probabilities))."""
        layers = [
            {"layer": layer, "places": [
                {"position": position, "token": self.tokens[position],
                 "probabilities": {word: table[layer][place] for word, table in self.patched.items()}}
                for place, position in enumerate(self.positions)
            ]}
            for layer in range(len(next(iter(self.patched.values()))))
        ]  # fmt: skip
        return {"source": self.source, "before": self.before, "there": self.there, "layers": layers}

    def plot(self, word: str) -> "go.Figure":
        """Layer by place: by how much one state changes a word's probability."""
        from lapis.report import plots

        names = [show(self.tokens[position]) for position in self.positions]
        changes = [[value - self.before[word] for value in line] for line in self.patched[word]]
        return plots.matrix(
            changes, [str(layer) for layer in range(len(changes))], names, self.finding(word),
            unit="change of the probability", format="+.2f", x="place of the state", y="layer", signed=True,
        )  # fmt: skip

    def __str__(self) -> str:
        width = max(7, *(min(len(show(self.tokens[p])), 12) + 1 for p in self.positions))
        lines = []
        for word, table in self.patched.items():
            names = "".join(f"{show(self.tokens[position])[:12]:>{width}}" for position in self.positions)
            lines += [f'"{show(word)}"', f"{'layer':>6}{names}"]
            lines += [f"{layer:>6}" + "".join(f"{v:>{width}.1%}" for v in line) for layer, line in enumerate(table)]
            lines.append(self.finding(word))
        return "\n".join(lines)


@torch.inference_mode()
def patch(
    model: nn.Module,
    other: nn.Module,
    tokenizer: Any,
    prompt: Prompt,
    track: str | Iterable[str | TrackedWord] = (),
    *,
    places: int = GRID,
    other_tokenizer: Any = None,
    names: tuple[str, str] = ("", ""),
    progress: Callable[[int, int], None] | None = None,
) -> Patching:
    """What one state of another model, put into this one, does to the probability of words.

    Args:
        model: lapis' own, or a causal one of transformers.
        other: Another version of it, from which the states are.
        tokenizer: That of both, or of the first.
        prompt: A text, a chat, or token ids.
        track: Words, whose first token is followed; without any, what each of the two would say next.
        places: How many of the last tokens are patched, one at a time.
        other_tokenizer: The second's, where it could be another.
        names: What the two are called.
        progress: Called with (passes done, passes in all); a pass is one row of the prompt.

    Raises:
        DataError: The models differ in width, layers or vocabulary, or the prompt does not fit.
        ConfigError: The tokenizer cannot express a word.
        LapisError: A model is no causal language model, or holds NaN.
    """
    one, two = anatomy(model, names[0]), anatomy(other, names[1])
    check_versions(one, two)
    tokens = as_tokenizer(tokenizer)
    ids = encode(tokens, prompt, len(one.matrix), one.name)
    if other_tokenizer is not None and encode(as_tokenizer(other_tokenizer), prompt, len(two.matrix), two.name) != ids:
        raise DataError(
            f"lens: {one.name} and {two.name} read the prompt as other tokens; states are exchanged place by place"
        )
    check_length(ids, 0, min(one.context, two.context), one.name)
    positions = list(range(max(0, len(ids) - places), len(ids)))
    words = as_words(track, tokens, len(one.matrix))
    with evaluating(one.model), evaluating(two.model):
        own_V, theirs_V, states_LPD = _ends(one, two, ids, positions)
        if not words:
            best = dict.fromkeys(int(logits_V.argmax()) for logits_V in (own_V, theirs_V))
            words = [token_word(index, tokens) for index in best]
        ids_of = {word.text: [spelling.ids[0] for spelling in word.followed] for word in words}
        before, there = (_chances(logits_V[None], ids_of) for logits_V in (own_V, theirs_V))
        patched: dict[str, list[list[float]]] = {word: [] for word in ids_of}
        done, total = 0, one.layers * len(positions)
        for layer, state_PD in enumerate(states_LPD):
            lines: dict[str, list[float]] = {word: [] for word in ids_of}
            rows = max(1, BATCH_TOKENS // len(ids))
            for first in range(0, len(positions), rows):
                some = slice(first, first + rows)
                logits_BV = _with_states(one, ids, layer, positions[some], state_PD[some])
                for word, chances in _chances(logits_BV, ids_of).items():
                    lines[word] += chances
                done += len(logits_BV)
                if progress:
                    progress(done, total)
            for word, line in lines.items():
                patched[word].append(line)
    return Patching(
        one.name, two.name, [token_text(index, tokens) for index in ids], positions, words,
        {word: chances[0] for word, chances in before.items()}, {word: chances[0] for word, chances in there.items()},
        patched,
    )  # fmt: skip


def check_versions(one: Anatomy, other: Anatomy) -> None:
    """Raises DataError where a state of one model has no place in the other."""
    sizes = {"width": [p.matrix.shape[1] for p in (one, other)], "number of layers": [one.layers, other.layers],
             "number of rows of the head": [len(p.matrix) for p in (one, other)]}  # fmt: skip
    for what, (mine, theirs) in sizes.items():
        if mine != theirs:
            raise DataError(
                f"lens: the {what} is {mine:,} in {one.name} and {theirs:,} in {other.name}; states are exchanged "
                "between versions of one model"
            )


def _ends(
    one: Anatomy, two: Anatomy, ids: Sequence[int], positions: Sequence[int]
) -> tuple[Tensor, Tensor, list[Tensor]]:  # fmt: skip
    """The logits [V] of both models at the end, and the states of the second after each layer at some places."""
    ends = []
    for parts in (one, two):
        places_P = torch.tensor(positions, device=parts.matrix.device)
        ids_BT = torch.tensor([ids], device=parts.matrix.device)
        ends.append(trace(parts, ids_BT, (torch.zeros_like(places_P), places_P)))
    last = slice(len(positions) - 1, len(positions))
    own_V, theirs_V = (run.own(last)[0] for run in ends)
    return own_V, theirs_V, ends[1].after_LPD


def _with_states(
    parts: Anatomy, ids: Sequence[int], layer: int, positions: Sequence[int], state_BD: Tensor
) -> Tensor:  # fmt: skip
    """The logits [B, V] at the end, in each row with one state after a layer exchanged."""
    device = parts.matrix.device
    rows, places = torch.arange(len(positions), device=device), torch.tensor(positions, device=device)

    def exchange(_module: nn.Module, _args: Any, out: Any) -> Any:
        x_BTD = (out[0] if isinstance(out, tuple) else out).clone()
        x_BTD.view(len(rows), len(ids), -1)[rows, places] = state_BD.to(x_BTD)
        return (x_BTD, *out[1:]) if isinstance(out, tuple) else x_BTD

    handle = parts.blocks[layer].register_forward_hook(exchange)
    try:
        ids_BT = torch.tensor([ids], device=device).repeat(len(rows), 1)
        return parts.run(ids_BT, None, None, (rows, torch.full_like(rows, len(ids) - 1)))(slice(0, len(rows)))
    finally:
        handle.remove()


def _chances(logits_BV: Tensor, ids_of: dict[str, list[int]]) -> dict[str, list[float]]:
    """Each word's probability in each row: that of its spellings' first tokens, added up."""
    logits_BV = logits_BV.float()
    total_B = logits_BV.logsumexp(1)
    return {word: (logits_BV[:, ids] - total_B[:, None]).exp().sum(1).tolist() for word, ids in ids_of.items()}
