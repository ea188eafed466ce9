"""Fragments of HTML made from plain values: text, tables, replies, samples and key figures.

Every string that comes in is untrusted (most of it was written by a model) and leaves escaped; a block of foreign text
finds its own writing direction (`dir="auto"`) and cannot turn the text around it. The only markup that text may carry
is `code` in backticks and **strong** words, and only where `prose` is called. The page around it all is page.py.
"""

from __future__ import annotations

import html
import math
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

Row = Mapping[str, Any]

OPTION = re.compile(r"(?<![\w-])--?[A-Za-z][\w-]{0,30}(?![\w-])")  # longer ones would not fit into a narrow screen


@dataclass(frozen=True)
class Column:
    """One column of a table.

    key: where the value stands in a row. label: the heading (default: the key in words). format: a format
    specification (".3f", ".1%", ",") or a function value -> text. best: mark the smallest or largest value. group:
    neighboring columns with the same group share a heading above theirs. unit: shown small beside the label.
    """

    key: str
    label: str = ""
    format: str | Callable[[Any], str] = ""
    best: Literal["", "min", "max"] = ""
    group: str = ""
    unit: str = ""

    @property
    def heading(self) -> str:
        return self.label or self.key.replace("_", " ")

    def show(self, value: Any) -> str:
        """The value as text; what was not measured (None, NaN) is a dash."""
        if value is None or (isinstance(value, float) and math.isnan(value)):
            return "–"
        if callable(self.format):
            return self.format(value)
        if isinstance(value, bool):
            return "yes" if value else "no"
        if isinstance(value, int | float):
            spec = self.format or ("," if isinstance(value, int) else ".4g")
            return "0" if value == 0 and spec.endswith("e") else format(value, spec).replace("-", "−")
        return str(value)


def escape(text: object) -> str:
    """Text for HTML: markup escaped, control characters made visible, lone surrogates replaced."""
    shown = "".join(chr(0x2400 + ord(c)) if ord(c) < 0x20 and c not in "\n\t" else c for c in str(text))
    return html.escape(shown.encode("utf-8", "replace").decode("utf-8"), quote=True)


def breakable(name: str) -> str:
    """A name for HTML, which a narrow column may break after its dots, slashes and underscores."""
    return re.sub(r"(?<=\w)([./_]+)(?=\w)", r"\1<wbr>", escape(name)) if len(name) > 12 else escape(name)


def unbroken(safe: str) -> str:
    """Escaped text in which no line breaks inside the name of an option: `--tuned` would break after its dashes."""
    return OPTION.sub(lambda name: f'<span class="whole">{name[0]}</span>', safe)


def prose(text: str) -> str:
    """Our own text: `code` and **strong** are honored, everything else is escaped."""
    safe = unbroken(escape(text.strip()))
    safe = re.sub(r"`([^`]+)`", r"<code>\1</code>", safe)
    return re.sub(r"\*\*([^*]+)\*\*", r"<strong>\1</strong>", safe)


def paragraphs(text: str, css: str = "") -> str:
    """Paragraphs, parted by blank lines."""
    mark = f' class="{css}"' if css else ""
    return "\n".join(f"<p{mark}>{prose(part)}</p>" for part in re.split(r"\n\s*\n", text.strip()) if part)


def table(
    rows: Sequence[Row],
    columns: Sequence[Column | str],
    title: str,
    *,
    caption: str = "",
    mark: Collection[str] = (),
    sortable: bool = False,
    level: int = 3,
) -> str:
    """A table with a heading. The first column names the rows; `mark` lists the names of rows to set off."""
    heads = [column if isinstance(column, Column) else Column(column) for column in columns]
    numeric = [_numeric(rows, head.key) for head in heads]
    best = [_best(rows, head) for head in heads]
    words = escape(title or "The numbers")
    lines = ['<div class="table">', f"<h{level}>{prose(title)}</h{level}>" if title else ""]
    lines += [f'<div class="wide" role="region" tabindex="0" aria-label="{words}">']
    lines += [f'<table class="marked" aria-label="{words}">' if mark else f'<table aria-label="{words}">']
    lines += ["<thead>", *_head(heads, numeric, sortable), "</thead>", "<tbody>"]
    for row in rows:
        cells = []
        for i, head in enumerate(heads):
            value = row.get(head.key)
            text = unbroken(breakable(head.show(value)) if i == 0 else escape(head.show(value)))
            css = ["number"] if numeric[i] else []
            if best[i] is not None and value == best[i]:
                css.append("best")
                text += '<span class="hidden"> (best)</span>'
            attributes = f' class="{" ".join(css)}"' if css else ""
            if sortable:
                attributes += f' data-value="{"" if head.show(value) == "–" else escape(value)}"'
            cells.append(f'<th scope="row"{attributes}>{text}</th>' if i == 0 else f"<td{attributes}>{text}</td>")
        name = str(row.get(heads[0].key))
        css_row = ' class="mark"' if name in mark else ""
        lines.append(f"<tr{css_row}>{''.join(cells)}</tr>")
    lines += ["</tbody>", "</table>", "</div>"]
    if caption:
        lines.append(f'<p class="caption">{prose(caption)}</p>')
    return "\n".join([*lines, "</div>"])


def _numeric(rows: Sequence[Row], key: str) -> bool:
    values = [row[key] for row in rows if row.get(key) is not None]
    return bool(values) and all(isinstance(value, int | float) and not isinstance(value, bool) for value in values)


def _best(rows: Sequence[Row], column: Column) -> float | None:
    values = [row[column.key] for row in rows if column.show(row.get(column.key)) != "–"]
    if not column.best or len(values) < 2:
        return None
    best: float = min(values) if column.best == "min" else max(values)
    return best


def _head(heads: Sequence[Column], numeric: Sequence[bool], sortable: bool) -> list[str]:
    """One heading row, or two where columns are grouped."""
    lines = []
    grouped = any(head.group for head in heads)
    if grouped:
        cells: list[str] = []
        i = 0
        while i < len(heads):
            span = 1
            while heads[i].group and i + span < len(heads) and heads[i + span].group == heads[i].group:
                span += 1
            label = escape(heads[i].group)
            cells.append(f'<th scope="colgroup" colspan="{span}">{label}</th>' if label else "<td></td>")
            i += span
        lines.append(f'<tr class="groups">{"".join(cells)}</tr>')
    cells = []
    css = ("", ' class="number"')
    for i, head in enumerate(heads):
        label = unbroken(escape(head.heading)) + (f" <small>{escape(head.unit)}</small>" if head.unit else "")
        if sortable:
            label = f'<button class="sort" type="button">{label}</button>'
        cells.append(f'<th scope="col" data-column="{i}"{css[numeric[i]]}>{label}</th>')
    return [*lines, f"<tr>{''.join(cells)}</tr>"]


def replies(rows: Sequence[Row]) -> str:
    """Replies side by side. See Page.replies for the shape of a row."""
    lines = ['<div class="replies">']
    for row in rows:
        lang = f' lang="{escape(row["language"])}"' if row.get("language") else ""
        lines += ['<div class="reply">', f'<p class="prompt" dir="auto"{lang}>{escape(row["prompt"])}</p>']
        if row.get("wanted") is not None:
            lines.append(f'<p class="wanted">wanted: <span dir="auto"{lang}>{escape(row["wanted"])}</span></p>')
        lines.append('<dl class="answers">')
        for model, text in row["replies"].items():
            right = model in row.get("right", ())
            tick = (
                ' <span class="tick" aria-hidden="true">✓</span><span class="hidden"> (right)</span>' if right else ""
            )
            css = ' class="right"' if right else ""
            body = escape(text.strip()) or '<span class="empty">(nothing)</span>'
            lines.append(f'<div{css}><dt>{escape(model)}{tick}</dt><dd dir="auto"{lang}>{body}</dd></div>')
        lines += ["</dl>", "</div>"]
    return "\n".join([*lines, "</div>"])


def samples(texts: Sequence[str], title: str, language: str = "", level: int = 3) -> str:
    """A numbered list of texts that a model wrote."""
    lang = f' lang="{escape(language)}"' if language else ""
    items = "\n".join(f'<li dir="auto"{lang}>{escape(text.strip())}</li>' for text in texts)
    heading = f"<h{level}>{prose(title)}</h{level}>\n" if title else ""
    return f'<div class="samples">\n{heading}<ol>\n{items}\n</ol>\n</div>'


def stats(figures: Sequence[tuple[str, str, str]]) -> str:
    """Key figures: (label, value, note)."""
    items = "\n".join(
        f'<div><dt>{prose(label)}</dt><dd class="value">{escape(value)}</dd><dd class="note">{prose(note)}</dd></div>'
        for label, value, note in figures
    )
    return f'<dl class="stats">\n{items}\n</dl>'


def notebook(text: str, title: str, rows: Sequence[Row], columns: Sequence[Column | str], hint: str) -> dict[str, str]:
    """What an object shows of itself at the end of a notebook's cell: a table as HTML, and plain text."""
    shown = table(rows, columns, title, level=4)
    return {"text/plain": text, "text/html": f"<div>\n{shown}\n<p><small>{prose(hint)}</small></p>\n</div>"}
