"""Merges of byte pair encoding learned on words that are cut into tokens already (Gage 1994; Sennrich et al. 2016).

A word is a run of token ids within which tokens may be joined, with the number of times that it occurs. The most
frequent pair of neighbors becomes a token, again and again. Counts of pairs are pairs up to date: a merge looks only at
the words that hold its pair, and the next pair comes from a heap whose stale entries are corrected when they come up.
Where a merge yields a token that there was before, merges of that token may apply at once, as they will when text is
encoded, since they rank before it. Leaves out: what a word is and what becomes of the merges (extend.py).
"""

import heapq
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

Pair = tuple[int, int]


@dataclass
class LearnedMerges:
    """What was learned.

    Attributes:
        merges: Pairs of ids and the id that they become, in the order of their ranks.
        counts: How often each new token occurred when it was learned, by its id.
        enough: Whether as many new tokens were possible as `add` says.
    """

    merges: list[tuple[int, int, int]] = field(default_factory=list)
    counts: dict[int, int] = field(default_factory=dict)
    enough: bool = True


def learn_merges(
    words: Mapping[tuple[int, ...], int],
    spelling: Mapping[int, str],
    ranks: Mapping[Pair, tuple[int, int]],
    first: int,
    add: int,
    *,
    least: int = 2,
    longest: int = 48,
    banned: Collection[Pair] = (),
    fit: Callable[[str, str], bool] = lambda left, right: True,
    progress: Callable[[int, int], None] | None = None,
) -> LearnedMerges:
    """Learns merges until they have made `add` new tokens.

    Args:
        words: Words as ids of the old tokenizer -> how often they occur.
        spelling: Id -> token as the vocabulary spells it, of every old token.
        ranks: The merges that there are: pair -> (rank, id of the result).
        first: The id of the first new token; the others follow.
        add: How many new tokens.
        least: Times that a pair must occur to be merged.
        longest: Characters of a token's spelling at most; of a byte-level tokenizer these are bytes.
        banned: Pairs that are never merged.
        fit: Says of two spellings whether they may become one token.
        progress: Called with new tokens so far, and `add`.

    Returns:
        The merges. Equally frequent pairs are taken in the order of their ids, so the same words give the same merges.
    """
    state = _Words(words, spelling, ranks, first, longest, banned, fit)
    result = LearnedMerges()
    while len(result.counts) < add:
        pair = state.most_frequent(least)
        if pair is None:
            result.enough = False
            break
        merged, count, new = state.merge(pair)
        result.merges.append((*pair, merged))
        if new:
            result.counts[merged] = count
            if progress and len(result.counts) % 100 == 0:
                progress(len(result.counts), add)
    return result


def saved_by(
    words: Mapping[tuple[int, ...], int],
    spelling: Mapping[int, str],
    ranks: Mapping[Pair, tuple[int, int]],
    first: int,
    merges: Iterable[Pair],
) -> list[int]:
    """How many tokens fewer a text has after each new token, all before it included.

    Args:
        words: The words of the text -> how often they occur.
        spelling: Id -> token, of every old token.
        ranks: The merges that there are: pair -> (rank, id of the result).
        first: The id of the first new token.
        merges: Pairs in the order of their ranks.

    Returns:
        A count for each new token. Merges that yield a token that there was before count with the new one before them.
    """
    state = _Words(words, spelling, ranks, first, 0, (), lambda left, right: False)
    saved: list[int] = []
    total = 0
    for pair in merges:
        before = state.tokens
        new = state.merge(pair)[2]
        total += before - state.tokens
        if new or not saved:
            saved.append(total)
        else:
            saved[-1] = total
    return saved


class _Words:
    """The words as they stand, how often each pair of neighbors occurs in them, and in which words."""

    def __init__(
        self,
        words: Mapping[tuple[int, ...], int],
        spelling: Mapping[int, str],
        ranks: Mapping[Pair, tuple[int, int]],
        first: int,
        longest: int,
        banned: Collection[Pair],
        fit: Callable[[str, str], bool],
    ) -> None:
        self.spelling = dict(spelling)
        self.ids = {token: i for i, token in self.spelling.items()}
        self.ranks = dict(ranks)
        self._next_rank = max((rank for rank, _ in self.ranks.values()), default=-1) + 1
        self._next_id, self._longest, self._banned, self._fit = first, longest, frozenset(banned), fit
        ordered = sorted((word for word in words if len(word) > 1), key=lambda word: (-words[word], word))
        self.words = [list(word) for word in ordered]
        self.times = [words[word] for word in ordered]
        self.tokens = sum(len(word) * times for word, times in zip(self.words, self.times, strict=True))
        self.count: dict[Pair, int] = defaultdict(int)
        self.where: dict[Pair, list[int]] = defaultdict(list)  # may name a word twice, or one that lost the pair
        for number, word in enumerate(self.words):
            times = self.times[number]
            for pair in pairwise(word):
                self.count[pair] += times
                self.where[pair].append(number)
        self._heap = [(-count, pair) for pair, count in self.count.items() if self._may_merge(pair)]
        heapq.heapify(self._heap)

    def most_frequent(self, least: int) -> Pair | None:
        """The pair that occurs most often, or None where none occurs `least` times."""
        while self._heap:
            negative, pair = self._heap[0]
            count = self.count.get(pair, 0)
            if count == -negative:
                return pair if count >= least else None
            if count >= least:
                heapq.heapreplace(self._heap, (-count, pair))
            else:
                heapq.heappop(self._heap)
        return None

    def merge(self, pair: Pair) -> tuple[int, int, bool]:
        """Joins a pair wherever it stands; the token's id, how often it occurred, and whether the token is new."""
        token = self.spelling[pair[0]] + self.spelling[pair[1]]
        count, merged = self.count.get(pair, 0), self.ids.get(token)
        new = merged is None
        if merged is None:
            merged, self._next_id = self._next_id, self._next_id + 1
            self.ids[token], self.spelling[merged] = merged, token
        self.ranks[pair] = self._next_rank, merged
        self._next_rank += 1
        changed: dict[Pair, int] = defaultdict(int)
        for number in dict.fromkeys(self.where.pop(pair, ())):
            before = self.words[number]
            after = _joined(before, pair, merged) if new else self._joined_on(before, pair, merged)
            if len(after) == len(before):
                continue
            times = self.times[number]
            self.tokens -= times * (len(before) - len(after))
            for old in pairwise(before):
                changed[old] -= times
            pairs = set(pairwise(before))
            for fresh in pairwise(after):
                changed[fresh] += times
                if fresh not in pairs:
                    pairs.add(fresh)
                    self.where[fresh].append(number)
            self.words[number] = after
        for other, difference in changed.items():
            self._change(other, difference)
        self.count.pop(pair, None)
        return merged, count, new

    def _change(self, pair: Pair, difference: int) -> None:
        if not difference:
            return
        count = self.count[pair] + difference
        if count <= 0:
            del self.count[pair]
            self.where.pop(pair, None)
            return
        self.count[pair] = count
        if difference > 0 and self._may_merge(pair):  # where it fell, the heap's entry is corrected when it comes up
            heapq.heappush(self._heap, (-count, pair))

    def _may_merge(self, pair: Pair) -> bool:
        if pair in self._banned or pair in self.ranks:
            return False
        left, right = self.spelling[pair[0]], self.spelling[pair[1]]
        return len(left) + len(right) <= self._longest and self._fit(left, right)

    def _joined_on(self, word: Sequence[int], pair: Pair, merged: int) -> list[int]:
        """The word with the pair joined, and with whatever merges of earlier ranks that makes possible."""
        result, place = list(word), 0
        while place < len(result) - 1:
            if (result[place], result[place + 1]) == pair:
                result[place : place + 2] = [merged]
                if self._settle(result):
                    place = 0
                    continue
            place += 1
        return result

    def _settle(self, word: list[int]) -> bool:
        """Applies merges of earlier ranks, the earliest first; True where there was one."""
        last = self._next_rank - 1
        any_merge = False
        while True:
            possible = [
                (known[0], place, known[1])
                for place, pair in enumerate(pairwise(word))
                if (known := self.ranks.get(pair)) is not None and known[0] < last
            ]
            if not possible:
                return any_merge
            _, place, merged = min(possible)
            word[place : place + 2] = [merged]
            any_merge = True


def _joined(word: Sequence[int], pair: Pair, merged: int) -> list[int]:
    """The word with each occurrence of the pair joined, from the left."""
    left, right = pair
    result: list[int] = []
    place, end = 0, len(word) - 1
    while place <= end:
        token = word[place]
        if token == left and place < end and word[place + 1] == right:
            result.append(merged)
            place += 2
        else:
            result.append(token)
            place += 1
    return result
