"""The page of a run's certificate: from what it was made, how, what it took, and what was checked on its own model.

Takes the object of certificate.json and the rows of the learning curve. The curve is drawn as SVG, so that the page is
small enough to lie in the folder of every run.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from lapis.report.markup import Column, escape
from lapis.report.page import Page
from lapis.report.theme import Row

WIDTH, HEIGHT = 600, 200  # of the drawing, which is stretched to its box
_LISTED = 12  # entries of a list that are shown
_STYLE = """
.curve { display: grid; grid-template-columns: auto 1fr; column-gap: .6rem; max-width: 52rem; margin: 1.6rem 0 .6rem; }
.curve div { display: flex; justify-content: space-between; color: var(--quiet); font-size: .8rem; line-height: 1; }
.curve .values { flex-direction: column; text-align: right; }
.curve .steps { grid-column: 2; padding-top: .5rem; }
.curve svg { width: 100%; height: 14rem; display: block; overflow: visible; }
.curve path { fill: none; vector-effect: non-scaling-stroke; stroke-linejoin: round; stroke-linecap: round; }
.curve .grid { stroke: var(--rule); }
.curve .learned { stroke: var(--lapis); stroke-width: 2; }
.curve .held-out { stroke: var(--orange); stroke-width: 8; }
"""


def certificate_title(name: str) -> str:
    """The title of the page, by which a report knows it again."""
    return f"Certificate of {name}"


def certificate_page(facts: Mapping[str, Any], log: Sequence[Row]) -> Page:
    """The page of one run.

    Args:
        facts: certificate.json.
        log: The rows of its learning curve.
    """
    name = str(facts["run"])
    page = Page(
        certificate_title(name),
        f"How `{name}` came to be: from which data and settings, with what, and what was checked on the very model. "
        "`certificate.json` beside this page holds the same for programs.",
    )
    checks = facts.get("checks") or []
    computed = [check for check in checks if check["difference"] is not None]
    held = sum(bool(check["holds"]) for check in computed)
    page.stats([
        ("loss at the end", f"{facts['loss']:.3f}", "per supervised count"),
        *[(f"held-out {key.replace('_', ' ')}", f"{value:.4g}", "") for key, value in
          list((facts.get("held_out") or {}).items())[:2]],
        ("steps", f"{facts['steps']:,}", f"{facts['tokens']:,} tokens"),
        ("checks that hold", f"{held} of {len(computed)}", "computed on this model" if computed else "none computed"),
    ])  # fmt: skip
    if len([row for row in log if row.get("loss") is not None]) > 1:
        page.drawing(_curve(log), style=_STYLE)
    _add_checks(page, checks, str(facts.get("not_checked") or ""))
    _add_cost(page, facts)
    _add_origin(page, facts)
    return page


def _add_checks(page: Page, checks: Sequence[Row], why_not: str) -> None:
    page.section(
        "What ought not to matter",
        "Each line was computed in two ways on this run's last weights and its own data. The difference is relative; "
        "0 is the same bytes."
        if checks
        else f"Nothing was checked: {why_not}."
        if why_not
        else "Nothing was checked.",
    )
    rows = [
        {
            "check": check["name"],
            "verdict": {True: "holds", False: "differs", None: "not computed"}[check["holds"]],
            "difference": _small(check["difference"]) if check["difference"] is not None else None,
            "limit": _small(check["limit"]) if check["difference"] is not None else None,
        }
        for check in checks
    ]
    if rows:
        page.table(rows, [Column("check", "computed"), "verdict", "difference", Column("limit", "may be up to")])
    for check in checks:
        page.text(f"**{check['name']}**: {check['how']}" + (f"; {check['why_not']}." if check["why_not"] else "."))


def _add_cost(page: Page, facts: Mapping[str, Any]) -> None:
    expected, taken = facts.get("predicted") or {}, {**facts["taken"], "steps": facts["steps"]}
    text = facts.get("not_predicted") or "Nothing was predicted."
    if expected:
        text = f"Predicted after step {expected['after_steps']:,}, beside what the whole run took."
        text += " It was bounded by time, and its steps were predicted." if "steps" in expected else ""
    page.section("What it took", text)
    rows = []
    steps = [("steps", "steps", 1.0)] if "steps" in expected else []
    for label, key, unit in (("seconds", "seconds", 1.0), *steps, ("peak memory", "memory_bytes", 1e6)):
        row: dict[str, Any] = {"of": label + (", MB" if unit > 1 else ""), "taken": round(taken[key] / unit, 1)}
        if expected:
            row |= {"predicted": round(expected[key] / unit, 1), "off": expected[key] / max(taken[key], 1e-9) - 1}
        rows.append(row)
    columns = [Column("of", "what"), *([Column("predicted", format=",.1f")] if expected else [])]
    columns += [Column("taken", format=",.1f"), *([Column("off", "off by", "+.1%")] if expected else [])]
    page.table(rows, columns)


def _add_origin(page: Page, facts: Mapping[str, Any]) -> None:
    page.section("From what", "\n\n".join(f"{line}." for line in facts.get("coverage") or []))
    trained = facts.get("trained") or {}
    if trained:
        page.text(f"{trained['parameters']:,} of {trained['of']:,} parameters were trained.")
    began = {**(facts.get("origin") or {}), **(facts.get("options") or {})}
    page.table(_settings(began), ["setting", "value"], "The model, its parts, and the objective's options")
    data = facts.get("data")
    digests = [{"of": f"data: {name}", "sha256": _digest(value)} for name, value in _leaves(data)]
    digests += [{"of": f"held out: {name}", "sha256": _digest(value)} for name, value in _leaves(facts.get("valid"))]
    digests += [{"of": "tokenizer", "sha256": _digest(facts.get("tokenizer"))}] if facts.get("tokenizer") else []
    digests += [{"of": f"weights at the {name}", "sha256": value} for name, value in facts["weights"].items() if value]
    page.table([row for row in digests if row["sha256"]], [Column("of", "what"), Column("sha256")], "Digests")
    versions = [{"what": name, "value": value} for name, value in {**facts["versions"], **facts["machine"]}.items()]
    page.table(versions, ["what", "value"], "Versions and machine")
    if facts.get("changes"):
        page.table(facts["changes"], [Column("what"), Column("after_step")], "Changed on the way")
    if facts.get("skipped"):
        page.table(facts["skipped"], [Column("step"), "what", "batch"], "Batches that were left out")
    page.table(_settings(facts["config"]), ["setting", "value"], folded="Settings, the seed among them")


def _settings(values: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Rows of those that say something."""
    return [{"setting": key, "value": _spelled(value)} for key, value in values.items()
            if value not in (None, "", {}, [], ())]  # fmt: skip


def _spelled(value: Any) -> str:
    """A setting; of a long list its ends and how much it holds, for all of it is in certificate.json."""
    if not isinstance(value, (list, tuple)):
        return str(value)
    if len(value) <= _LISTED:
        return ", ".join(map(str, value))
    return f"{value[0]}, {value[1]}, …, {value[-1]} ({len(value):,} in all)"


def _leaves(value: Any) -> list[tuple[str, Any]]:
    """Digests by name, whether there is one or a mapping of them."""
    if isinstance(value, Mapping):
        return [(str(name) or "all", entry) for name, entry in value.items()]
    return [("all", value)] if value else []


def _digest(value: Any) -> str:
    return str(value.get("digest", "")) if isinstance(value, Mapping) else str(value or "")


def _small(value: float) -> str:
    return "0" if value == 0 else f"{value:.1e}".replace("-", "\u2212") if math.isfinite(value) else str(value)


def _curve(log: Sequence[Row]) -> str:
    """The loss by step as SVG, held-out losses as dots; "" where none is a number."""
    points = [(row["step"], row["loss"]) for row in log if row.get("loss") is not None]
    dots = [(row["step"], loss) for row in log for loss in [(row.get("held_out") or {}).get("valid_loss")]
            if isinstance(loss, int | float) and math.isfinite(loss)]  # fmt: skip
    values = [value for _, value in (*points, *dots) if math.isfinite(value)]
    if not values:
        return ""
    low, high, last = min(values), max(values), max(step for step, _ in points)
    spread = (high - low) or 1.0

    def place(step: float, value: float) -> str:
        return f"{WIDTH * step / last:.1f} {HEIGHT * (high - value) / spread:.1f}"

    line = "L".join(place(*point) for point in points if math.isfinite(point[1]))
    marks = "".join(f"M{place(*dot)}h0" for dot in dots)
    grid = "".join(f"M0 {HEIGHT * share}H{WIDTH}" for share in (0, 0.5, 1))
    scale = "".join(f"<span>{value:.3g}</span>" for value in (high, (low + high) / 2, low))
    words = f"The loss from {points[0][1]:.3f} to {points[-1][1]:.3f}"
    return (
        f'<div class="curve"><div class="values">{scale}</div>'
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" preserveAspectRatio="none" role="img" aria-label="{escape(words)}">'
        f'<path class="grid" d="{grid}"/><path class="learned" d="M{line}"/><path class="held-out" d="{marks}"/></svg>'
        f'<div class="steps"><span>step 0</span><span>step {last:,}</span></div></div>'
        f'<p class="caption">{escape(words)}.{" Dots are held-out." if dots else ""}</p>'
    )
