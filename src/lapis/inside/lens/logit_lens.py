"""The logit lens: what every layer would say next, if the model ended there.

The state after each attention and each MLP goes through the model's own final norm and head (nostalgebraist 2020). One
traced pass gives the states, those at the later tokens of tracked words too; and one walk over the head reads all
states together. Leaves out: attention maps (attention_map.py).

Shapes: B batch, T time, P chosen places, M states, D model dim, L layers, R tracked tokens, V vocabulary.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from lapis.errors import DataError
from lapis.inside.contributions import Contribution, contributions
from lapis.inside.lens.options import LensOptions
from lapis.inside.lens.readout import Readout, read
from lapis.inside.lens.table import LensTrace, Reading
from lapis.inside.lens.tuned import TunedLens
from lapis.inside.prompt import (
    Prompt,
    Spelling,
    TrackedWord,
    as_tokenizer,
    as_words,
    check_length,
    encode,
    token_text,
    token_word,
)
from lapis.inside.trace import Anatomy, Branches, Places, Trace, anatomy, not_numbers, trace
from lapis.model.reading.readable import ReadableModel, TokenCache
from lapis.model.scoring import evaluating
from lapis.text.tokenizer.tokenizer import Tokenizer

DEFAULT = LensOptions()
GROUP = 64  # places of the grid that are read at once
ENDS = ("embedding", "mlp")  # what stands between two layers
AT_ONCE = 1024  # tokens of a prompt up to which tracked words ride along; their mask grows with its square


@dataclass
class Seen:
    """A prompt that ran through a model: the states at the chosen positions, and at the words' later tokens.

    later: (what stands before, after the prompt) -> its place in `onward`.
    """

    parts: Anatomy
    tokenizer: Tokenizer
    ids: list[int]
    positions: list[int]
    trace: Trace
    onward: Trace | None
    later: dict[tuple[int, ...], int]


def lens(
    model: nn.Module,
    tokenizer: Any,
    prompt: Prompt,
    track: str | Iterable[str | TrackedWord] = (),
    options: LensOptions = DEFAULT,
    *,
    tuned: TunedLens | None = None,
    name: str = "",
) -> LensTrace:
    """What each layer would say after a prompt, and how tracked words rank on the way.

    Args:
        model: lapis' own, or a loaded causal model of transformers, whose hidden states are read by hooks.
        tokenizer: The model's: lapis' own, or a fast one of transformers.
        prompt: A text, a chat (messages), or token ids.
        track: Words, or "Malaysia, Indonesia"; without any, the words that are best in some layer.
        options: What of the prompt is read, and how much of it is named.
        tuned: Maps that put each layer's states into the last one's terms.
        name: What the model is called; default: its family.

    Returns:
        A reading per state at the last token, the grid of the last tokens that the options name, and what each head
        and MLP adds to the logits of the words.

    Raises:
        DataError: The prompt is empty, or longer than the context.
        ConfigError: The tokenizer cannot express a word.
        LapisError: The model is an encoder, holds NaN, or its last state through norm and head is not its own logits,
            which each call checks.
    """
    parts, words_of = anatomy(model, name), as_tokenizer(tokenizer)
    ids = encode(words_of, prompt, len(parts.matrix), parts.name)
    words = as_words(track, words_of, len(parts.matrix))
    seen = see(parts, words_of, ids, words, options.positions or 1)
    given = bool(words)
    if not given:
        words = best_anywhere(seen, tuned=tuned)
    return look(seen, words, given, top=options.top, tuned=tuned)


@torch.inference_mode()
def see(
    parts: Anatomy, tokenizer: Tokenizer, ids: Sequence[int], words: Sequence[TrackedWord], positions: int = 1,
    cache: TokenCache | None = None,
) -> Seen:  # fmt: skip
    """Runs the prompt, and the beginnings of words that have more than one token: each of them once.

    Args:
        parts: The model.
        tokenizer: Its own.
        ids: The prompt.
        words: What is tracked.
        positions: How many of the last tokens are kept.
        cache: What one of lapis' own models has read of the prompt, at most all that is not kept. Is appended to, and
            used up where words have more than one token.
    """
    paths = [spelling.ids[:-1] for word in words for spelling in word.spellings if len(spelling.ids) > 1]
    longest = max(map(len, paths), default=0)
    check_length(ids, longest, parts.context, parts.name)
    chosen = list(range(max(0, len(ids) - max(1, positions)), len(ids)))
    later = {path: number for number, path in enumerate(sorted({p[: t + 1] for p in paths for t in range(len(p))}))}
    with evaluating(parts.model):
        if cache is None and parts.own and len(ids) <= AT_ONCE and not parts.states:  # a state cannot branch
            prompt, onward = _at_once(parts, list(ids), chosen, list(later))
        else:
            prompt, onward = _one_after_another(parts, list(ids), chosen, list(later), cache)
    return Seen(parts, tokenizer, list(ids), chosen, prompt, onward, later)


def _at_once(
    parts: Anatomy, ids: list[int], chosen: list[int], later: list[tuple[int, ...]]
) -> tuple[Trace, Trace | None]:  # fmt: skip
    """One pass over the weights: the words' tokens stand behind the prompt, and see it and their own beginnings."""
    device, T = parts.matrix.device, len(ids)
    places = _places([(0, t) for t in [*chosen, *range(T, T + len(later))]], device)
    row_BT = torch.tensor([[*ids, *(path[-1] for path in later)]], device=device)
    if not later:
        return trace(parts, row_BT, places), None
    positions_BT = torch.tensor([[*range(T), *(T + len(path) - 1 for path in later)]], device=device)
    seen_TT = torch.ones(row_BT.shape[1], row_BT.shape[1], dtype=torch.bool).tril()
    for row, path in enumerate(later):
        for column, other in enumerate(later):
            seen_TT[T + row, T + column] = path[: len(other)] == other
    whole = trace(parts, row_BT, places, branches=Branches(positions_BT, seen_TT.to(device)))
    return whole.part(0, len(chosen)), whole.part(len(chosen), len(chosen) + len(later))


def _one_after_another(
    parts: Anatomy, ids: list[int], chosen: list[int], later: list[tuple[int, ...]], cache: TokenCache | None
) -> tuple[Trace, Trace | None]:  # fmt: skip
    """The words' beginnings as a batch that goes on from the prompt: with the cache, where the model is lapis' own."""
    device, longest = parts.matrix.device, max(map(len, later), default=0)
    read = 0 if cache is None else cache.length
    if cache is None and later and parts.own:
        cache = cast(ReadableModel, parts.model).new_cache(1, len(ids) + longest)
    prompt_BT = torch.tensor([ids[read:]], device=device)
    prompt = trace(parts, prompt_BT, _places([(0, t - read) for t in chosen], device), cache)
    if not later:
        return prompt, None
    # Padding stands to the right, where a causal model does not see it
    rows_BT = torch.tensor([[*path, *[0] * (longest - len(path))] for path in later], device=device)
    start = 0
    if cache is not None:
        cache.select(torch.zeros(len(later), dtype=torch.long, device=device))
    else:
        start = len(ids)
        rows_BT = torch.cat((prompt_BT.expand(len(later), -1), rows_BT), 1)
    places = [(row, start + len(path) - 1) for row, path in enumerate(later)]
    return prompt, trace(parts, rows_BT, _places(places, device), cache)


@torch.inference_mode()
def look(
    seen: Seen,
    words: Sequence[TrackedWord],
    given: bool,
    *,
    top: int = 10,
    head: Anatomy | None = None,
    tuned: TunedLens | None = None,
    halves: bool = True,
) -> LensTrace:
    """Reads what was seen.

    Args:
        seen: The states.
        words: What is tracked.
        given: Whether the caller gave the words.
        top: Tokens named per layer.
        head: Another model whose final norm and head read the states.
        tuned: Maps that put each layer's states into the last one's terms.
        halves: Whether the states after attention are read, too, where they can be; twice the work.
    """
    parts, last = head or seen.parts, len(seen.positions) - 1
    end = slice(last, last + 1)
    if tuned is not None:
        tuned.check(seen.parts)
    if head is not None:
        check_fits(seen.parts, head)
        _read(seen.parts, _stack(seen.trace, end, False, None)[:, -1:], seen.trace.own(end))
    halves = halves and seen.trace.adds_up and tuned is None
    firsts = dict.fromkeys(spelling.ids[0] for word in words for spelling in word.spellings)
    tracked = list(firsts | dict.fromkeys(i for w in words for s in w.spellings for i in s.ids))
    later = None if seen.onward is None else _stack(seen.onward, slice(0, len(seen.later)), False, tuned)
    own_PV = None if head else seen.trace.own(end)
    readout = _read(parts, _stack(seen.trace, end, halves, tuned), own_PV, later, tracked, len(firsts), top)
    layers: list[tuple[int | None, str]] = [(None, "embedding")]
    for layer in range(parts.layers):
        half = "delta net" if layer in parts.states else "attention"
        layers += [(layer, half), (layer, "mlp")] if halves else [(layer, "mlp")]
    chances = _Chances(readout, tracked, seen.later, layers)
    readings = [
        replace(
            _reading(readout, 0, row, layer_, after, seen.positions[last], seen.tokenizer),
            ranks={w.text: min(chances.of(s, row)["rank"] for s in w.followed) for w in words},
            logprobs={w.text: _total([chances.of(s, row)["logprob"] for s in w.spellings]) for w in words},
            spellings={s.text: chances.of(s, row) for w in words for s in w.spellings},
        )
        for row, (layer_, after) in enumerate(layers)
    ]
    parts_of_logits: list[Contribution] = []
    notes = [] if seen.trace.adds_up else ["its blocks are not plain sums: no states after attention, no contributions"]
    if tuned is None and head is None:
        ends = [min(w.followed, key=lambda s: readings[-1].spellings[s.text]["rank"]).ids[0] for w in words]
        logits_R = readout.logits_PNR[0, -1, [tracked.index(i) for i in ends]]
        if parts.cap is not None:
            logits_R = parts.cap * (logits_R.double() / parts.cap).atanh()
            notes.append("its logits are capped: contributions add up to a logit before its cap")
        parts_of_logits = contributions(
            parts, seen.trace, last, [(w.text, i) for w, i in zip(words, ends, strict=True)], logits_R
        )
    grid = [
        *_grid(seen, parts, words, last, top, tuned, head is None),
        *(r for r in readings if r.after in ENDS),
    ]
    return LensTrace(
        model=seen.parts.name,
        tokens=[token_text(i, seen.tokenizer) for i in seen.ids],
        ids=seen.ids,
        words=list(words),
        given=given,
        readings=readings,
        grid=grid,
        contributions=parts_of_logits,
        head=parts.name if head else "own",
        tuned=tuned.source if tuned else "",
        notes=notes,
    )


@torch.inference_mode()
def best_anywhere(seen: Seen, head: Anatomy | None = None, tuned: TunedLens | None = None) -> list[TrackedWord]:
    """The tokens that are best at the end of any layer, the last layer's first."""
    end = slice(len(seen.positions) - 1, len(seen.positions))
    readout = _read(
        head or seen.parts, _stack(seen.trace, end, False, tuned), None if head else seen.trace.own(end), top=1
    )
    words = [token_word(i, seen.tokenizer) for i in dict.fromkeys(readout.top_ids_PNK[0, 1:, 0].flip(0).tolist())]
    return list({word.text: word for word in words}.values())


def check_fits(one: Anatomy, other: Anatomy) -> None:
    """Raises DataError where the states of one model cannot go through the head of the other."""
    if one.matrix.shape[1] != other.matrix.shape[1]:
        raise DataError(
            f"lens: {one.name} is {one.matrix.shape[1]} wide and {other.name} {other.matrix.shape[1]}; "
            "a head is swapped between versions of one model only"
        )


class _Chances:
    """Ranks and log-probabilities of spellings, from the readout of the prompt's end and of the words' later tokens."""

    def __init__(self, readout: Readout, tracked: Sequence[int], later: Mapping[tuple[int, ...], int],
                 layers: Sequence[tuple[int | None, str]]) -> None:  # fmt: skip
        self._ranks, self._logprobs = readout.ranks_PNR[0].tolist(), readout.logprobs_PNR[0].tolist()
        self._onward = readout.more_logprobs_XR.tolist()
        self._columns = {index: column for column, index in enumerate(tracked)}
        ends = [row for row, (_, after) in enumerate(layers) if after in ENDS]
        self._later, self._ends = later, {row: number for number, row in enumerate(ends)}

    def of(self, spelling: Spelling, row: int) -> dict[str, Any]:
        """Rank of the first token, and log-probability of all; the latter is measured at the ends of layers only."""
        column = self._columns[spelling.ids[0]]
        total: float | None = self._logprobs[row][column]
        for count, index in enumerate(spelling.ids[1:], 1):
            if row not in self._ends:
                total = None
                break
            there = self._later[spelling.ids[:count]] * len(self._ends) + self._ends[row]
            total = (total or 0.0) + self._onward[there][self._columns[index]]
        return {"rank": self._ranks[row][column], "logprob": total}


def _read(
    parts: Anatomy, stack_PND: Tensor, own_PV: Tensor | None, later_PND: Tensor | None = None,
    tracked: Sequence[int] = (), ranked: int = 0, top: int = 10,
) -> Readout:  # fmt: skip
    """States through norm and head; of the later ones only log-probabilities of tracked tokens."""
    more_XD = None if later_PND is None else parts.norm(later_PND).flatten(0, 1)
    readout = read(parts.norm(stack_PND), parts.matrix, parts.bias, own_PV, more_XD=more_XD, tracked=tracked,
                 ranked=ranked, top=top, cap=parts.cap)  # fmt: skip
    if not bool(readout.entropy_PN.isfinite().all() and readout.more_logprobs_XR.isfinite().all()):
        raise not_numbers(parts, "a logit")
    return readout


def _stack(trace: Trace, some: slice, halves: bool, tuned: TunedLens | None) -> Tensor:
    """The states at some places, first to last: embedding, then (after attention and) after each layer."""
    states = [trace.embed_PD[some]]
    for layer, after_PD in enumerate(trace.after_LPD):
        states += [trace.middle_LPD[layer][some], after_PD[some]] if halves else [after_PD[some]]
    stack_PND = torch.stack(states, 1)
    return stack_PND if tuned is None else tuned.translate(stack_PND)


def _grid(
    seen: Seen, parts: Anatomy, words: Sequence[TrackedWord], last: int, top: int, tuned: TunedLens | None, own: bool
) -> list[Reading]:  # fmt: skip
    """Readings at the end of each layer, for the places before the last."""
    rows = []
    firsts = list(dict.fromkeys(spelling.ids[0] for word in words for spelling in word.followed))
    for start in range(0, last, GROUP):
        some = slice(start, min(start + GROUP, last))
        own_PV = seen.trace.own(some) if own else None
        readout = _read(parts, _stack(seen.trace, some, False, tuned), own_PV, None, firsts, len(firsts), top)
        for place, position in enumerate(seen.positions[some]):
            for row, ranks in enumerate(readout.ranks_PNR[place].tolist()):
                layer, after = (row - 1, "mlp") if row else (None, "embedding")
                of_word = {w.text: min(ranks[firsts.index(s.ids[0])] for s in w.followed) for w in words}
                reading = _reading(readout, place, row, layer, after, position, seen.tokenizer)
                rows.append(replace(reading, ranks=of_word))
    return rows


def _reading(
    readout: Readout, place: int, row: int, layer: int | None, after: str, position: int, tokenizer: Tokenizer
) -> Reading:  # fmt: skip
    ids, chances = readout.top_ids_PNK[place, row].tolist(), readout.top_logprobs_PNK[place, row].exp().tolist()
    top = tuple((token_text(i, tokenizer), i, chance) for i, chance in zip(ids, chances, strict=True))
    return Reading(layer, after, position, top, float(readout.entropy_PN[place, row]), float(readout.kl_PN[place, row]))


def _total(logprobs: Sequence[float | None]) -> float | None:
    """log of the sum of probabilities."""
    if any(logprob is None for logprob in logprobs):
        return None
    values = [logprob for logprob in logprobs if logprob is not None]
    high = max(values)
    return high + math.log(sum(math.exp(value - high) for value in values))


def _places(pairs: Sequence[tuple[int, int]], device: torch.device) -> Places:
    rows, columns = zip(*pairs, strict=True)
    return torch.tensor(rows, device=device), torch.tensor(columns, device=device)
