"""What of packed data is learned from, in figures and in lines: coverage(data), lines(data), figures(data); and what
lies in which row: named_rows(data, rows)."""

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lapis.text.rows.mixture import Data, Mixture
from lapis.text.rows.rows import Rows
from lapis.wording import format_count

_NAMED = 4  # special tokens that a line names
_RUNS = 8  # stretches of numbers that a line has


def coverage(data: Data) -> dict[str, float]:
    """Shares: `supervised` of the tokens carry loss, `padding` of the places hold none, `cut` of the tokens went."""
    counts = data.counts
    cut = counts.get("cut_tokens", 0)
    return {
        "supervised": counts["supervised"] / max(1, counts["tokens"]),
        "padding": counts["padding"] / (len(data) * data.length),
        "cut": cut / max(1, counts["tokens"] + cut),
    }


def lines(data: Data) -> list[str]:
    """Lines for a reader: how much there is, coverage, what was dropped, and of each source of a mixture its part."""
    counts, shares = data.counts, coverage(data)
    texts = counts["chats"] if data.chats else counts["documents"]
    result = [
        f"{format_count(len(data), 'row')} of {data.length:,} tokens from "
        f"{format_count(texts, data.info['kind'].removesuffix('s'))}",
        f"{shares['supervised']:.1%} of tokens carry loss, {shares['padding']:.1%} of places are padding, "
        f"{shares['cut']:.1%} of tokens were cut",
    ]
    if data.chats:
        result.append(
            f"cut: {format_count(counts['cut_chats'], 'chat')}; dropped: {counts['dropped_long']:,} too long, "
            f"{counts['dropped_silent']:,} with nothing of the assistant left"
        )
    if counts.get("empty"):
        result.append(f"skipped: {format_count(counts['empty'], 'document')} without text")
    if not isinstance(data, Mixture):
        return result + _source_lines(data.info)
    for name, rows, weight in zip(data.names, data.sources, data.weights, strict=True):
        times = weight * len(data) / len(rows)
        result.append(
            f"{weight:.1%} {name}: {format_count(len(rows), 'row')}, read {times:.2f} times in an epoch of "
            f"{len(data):,}"
        )
        result += [f"  {line}" for line in _source_lines(rows.info)]
    return result


def figures(data: Data) -> dict[str, Any]:
    """The same as JSON."""
    sources = data.sources if isinstance(data, Mixture) else [data]
    return {
        "kind": data.info["kind"],
        "rows": len(data),
        "length": data.length,
        "counts": data.counts,
        "coverage": coverage(data),
        "digest": data.digest,
        "format": [rows.info.get("source_format") for rows in sources],
        "special": {rows.source: special_counts(rows.info.get("notices", {})) for rows in sources},
        "open_replies": sum(rows.info.get("notices", {}).get("open_replies", 0) for rows in sources),
    }


def members(rows: Rows, row: int) -> range | list[int]:
    """The documents or chats of which a row holds tokens, counted from 1 in the order in which they were packed."""
    texts = np.cumsum([0, *(len(shard["starts"]) - 1 for shard in rows.shards)])  # before each shard
    if rows.chats:
        number = int(np.searchsorted(rows.begins, row, side="right")) - 1
        shard, own = rows.shards[number], row - int(rows.begins[number])
        chats = shard["order"][slice(*shard["rows"][own : own + 2])]
        return sorted(1 + int(texts[number]) + int(chat) for chat in chats)
    first = row * rows.length
    last = min(first + rows.length, int(rows.begins[-1])) - 1
    ends = []
    for place in (first, last):
        number = int(np.searchsorted(rows.begins, place, side="right")) - 1
        starts = rows.shards[number]["starts"][:-1]
        at = np.searchsorted(starts, place - int(rows.begins[number]), side="right")  # 0: it began in an earlier shard
        ends.append(int(texts[number] + at))
    return range(ends[0], ends[1] + 1)


def named_rows(data: Data, numbers: NDArray[np.int64]) -> str:
    """Rows, and what lies in them, in one line."""
    if isinstance(data, Mixture):
        at = np.searchsorted(data.begins, numbers, side="right") - 1
        parts = [(int(i), numbers[at == i] - data.begins[i]) for i in np.unique(at)]
        return "; ".join(f"{data.names[i]}: {named_rows(data.sources[i], own)}" for i, own in parts)
    texts = {text for row in numbers for text in members(data, int(row))}
    return f"rows {_spans(numbers.tolist())} ({data.info['kind']} {_spans(texts)})"


def _spans(numbers: Iterable[int]) -> str:
    """3-5, 9, 12 for 3, 4, 5, 9, 12."""
    spans: list[list[int]] = []
    for number in sorted(numbers):
        if spans and number == spans[-1][1] + 1:
            spans[-1][1] = number
        else:
            spans.append([number, number])
    listed = ", ".join(f"{a:,}" if a == b else f"{a:,}-{b:,}" for a, b in spans[:_RUNS])
    return listed + (f" and {len(spans) - _RUNS:,} more" if len(spans) > _RUNS else "")


def special_counts(notices: Mapping[str, int]) -> dict[str, int]:
    """How often the text spells each special token."""
    return {name.removeprefix("special "): count for name, count in notices.items() if name.startswith("special ")}


def special_line(counts: Mapping[str, int], trusted: bool) -> str | None:
    """One line on special tokens that the text spells; None where it spells none."""
    if not counts:
        return None
    most = ", ".join(f"{token} {count:,}" for token, count in Counter(counts).most_common(_NAMED))
    more = ", ..." if len(counts) > _NAMED else ""
    what = (
        "they are tokens, since the source is trusted"
        if trusted
        else "they stay plain text; where the text is your own, special: trusted makes them tokens"
    )
    return f"special tokens spelled in the text: {sum(counts.values()):,} ({most}{more}); {what}"


def _source_lines(info: Mapping[str, Any]) -> list[str]:
    notices = info.get("notices", {})
    result = [info.get("source_format"), special_line(special_counts(notices), info.get("special") == "trusted")]
    if notices.get("open_replies"):
        unclosed, replies = notices["open_replies"], notices["replies"]
        result.append(
            f"nothing closes a reply in {unclosed:,} of {replies:,}: no end token follows it in the template, so a "
            "model does not learn from these when to stop"
        )
    if notices.get("calls_as_text"):
        chats = notices["calls_as_text"]
        result.append(
            f"calls of tools are written as JSON text in {format_count(chats, 'chat')}: the chat template prints none"
        )
    if notices.get("tools_unseen"):
        what = format_count(notices["tools_unseen"], "chat")
        result.append(f"the tools of {what} do not appear: the chat template prints none")
    return [line for line in result if line]
