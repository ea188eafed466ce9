"""What `lapis plan` found: scores of every piece, the choice, the random control, and both measured.

Leaves out the page (report/pages/plan.py draws it from plain rows).
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lapis.checkpoint.commit import commit_file
from lapis.errors import MissingExtra
from lapis.families.plan_file import PlanFile
from lapis.planning.choice import value
from lapis.wording import format_count

if TYPE_CHECKING:
    import pandas
    import plotly.graph_objects as go


@dataclass
class PlanResult:
    """What a plan found.

    scores, pieces: rows with every signal, by layer and by piece. tune, control: [{layer, component}], the choice and
    a random one. measured: figures of "chosen", "control", "full", "home" and, for a graft, "scaled". controls: figures
    of each random choice of the same size, the control first. template: tokens of the chat template, whose rows are
    trained with either. template_rows: what the embeddings say of these (`describe_template_rows`). scales: [{layers,
    components, scale}]. share: of the blocks' parameters that were taken. passes: forward passes over the held-out
    material that the measurements took.
    """

    goal: str
    budget: float
    base: str
    chat: str
    model: dict[str, Any]
    tune: list[dict[str, Any]] = field(default_factory=list)
    control: list[dict[str, Any]] = field(default_factory=list)
    controls: list[dict[str, Any]] = field(default_factory=list)
    template: list[str] = field(default_factory=list)
    template_rows: list[dict[str, Any]] = field(default_factory=list)
    scales: list[dict[str, Any]] = field(default_factory=list)
    scores: list[dict[str, Any]] = field(default_factory=list)
    pieces: list[dict[str, Any]] = field(default_factory=list)
    embeddings: str = "keep"
    share: float = 0.0
    measured: dict[str, dict[str, Any]] = field(default_factory=dict)
    tokens: dict[str, int] = field(default_factory=dict)
    seed: int = 0
    signal: str = "magnitude"
    passes: float = 0.0
    seconds: float = 0.0
    notes: list[str] = field(default_factory=list)

    @property
    def layers(self) -> list[int]:
        """Layers of which something is chosen."""
        return sorted({entry["layer"] for entry in self.tune})

    def to_yaml(self) -> str:
        """plan.yaml, as `lapis train` (plan: FILE) and `lapis graft --scale FILE` read it."""
        return PlanFile(
            goal=self.goal,
            budget=self.budget,
            made_from={"base": self.base, "chat": self.chat, "signal": self.signal, "seed": self.seed},
            model=self.model,
            tune=tuple(self.tune),
            tokens=tuple(self.template),
            control=tuple(self.control),
            embeddings=self.embeddings,
            scales=tuple(self.scales),
            scores=tuple(self.scores),
        ).to_yaml()

    def save(self, path: str | Path, *, overwrite: bool = False) -> None:
        """Writes plan.yaml. Raises OutputError where the file exists."""
        with commit_file(path, overwrite=overwrite) as temporary:
            temporary.write_text(self.to_yaml(), encoding="utf-8")

    def to_json(self) -> dict[str, Any]:
        """The object that `lapis plan --json` prints."""
        words = {"finding": self.finding(), "template_findings": self.template_findings()}
        return {**vars(self), "layers": self.layers, "components": self.tune, **words}

    def to_pandas(self, layers: bool = False) -> "pandas.DataFrame":
        """The pieces, or the layers, with every signal."""
        try:
            import pandas
        except ImportError:
            raise MissingExtra("pandas", "data") from None
        return pandas.DataFrame(self.scores if layers else self.pieces)

    def finding(self) -> str:
        """What the choice does, beside random choices of the same size, and whether it is better than they are."""
        chosen, controls = self.measured.get("chosen"), self.controls
        what = f"{self.share:.0%} of the blocks' parameters ({_spelled(self.tune)})"
        if chosen is None or not controls:
            return f"By {self.signal} alone, without a measurement: {what}"
        many = f"{len(controls)} random choices" if len(controls) > 1 else "one random choice"
        text = f"{what} carry {chosen['style']:.0%} of what chat gained on replies; {many} of the same size carry "
        text += _spread([row["style"] for row in controls], lambda share: f"{share:.0%}")
        if chosen.get("knowledge") is not None:
            text += f". With it plain text gets {_harder(chosen['knowledge'])}; with these "
            text += _spread([row["knowledge"] for row in controls], _harder)
        return f"{text}. {self.verdict()}"

    def verdict(self) -> str:
        """Of how many of the random choices the choice is better, for its goal."""
        whole = (self.measured.get("full") or {}).get("knowledge")

        def merit(row: Mapping[str, Any]) -> float:
            return value(row["style"], row["knowledge"], whole) if self.goal == "style" else -(row["knowledge"] or 0.0)

        if self.goal == "knowledge" and self.measured["chosen"].get("knowledge") is None:
            return "Whether it is better is not measured: no text and no choices were given"
        better = sum(merit(self.measured["chosen"]) > merit(row) for row in self.controls)
        count = len(self.controls)
        if better == count:
            return f"It is better than {'all of these' if count > 1 else 'that one'}"
        return f"It is better than {better} of {count}: it may be no better than chance"

    def template_findings(self) -> list[str]:
        """A sentence for each token of the template: whether base has it, and how far chat moved its row."""
        sentences = []
        for row in self.template_rows:
            if not row["in_base"]:
                sentences.append(f"{row['token']}: base has no such token")
            elif row.get("moved") == 0:
                sentences.append(f"{row['token']}: chat's row is the one that base has")
            elif row.get("moved") is not None:
                sentences.append(
                    f"{row['token']}: chat moved its row by {row['moved']:.0%}, other rows by "
                    f"{row['moved_median']:.0%} (median); in base its length is {row['norm']:.2f} of the median row's"
                )
        return sentences

    def plot(self, layers: bool = False) -> "go.Figure":
        """Every piece (or layer) by what it does to replies and to plain text; the chosen ones stand out."""
        from lapis.report import plots

        return plots.plan_scatter(self.scores if layers else self.pieces, self.finding())

    def to_html(self, path: str | Path | None = None) -> str:
        """The page as one string of HTML; written to `path` as well, where one is given."""
        from lapis.report.pages.plan import plan_page

        html: str = plan_page(self.to_json()).render()
        if path is not None:
            with commit_file(path, overwrite=True) as temporary:
                temporary.write_text(html, encoding="utf-8")
        return html

    def __str__(self) -> str:
        lines = [f"{'layer':>6} {'style':>8} {'knowledge':>10}"]
        lines += [
            f"{row['layer']:>6} {_number(row.get('style')):>8} {_number(row.get('knowledge')):>10}"
            for row in self.scores
        ]
        return "\n".join([*lines, self.finding(), *self.template_findings(), *self.notes])


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"


def _spelled(entries: list[dict[str, Any]]) -> str:
    """`attn of layers 0, 3; mlp of layer 5`; of many kinds only their number."""
    groups: dict[str, list[int]] = {}
    for entry in entries:
        groups.setdefault(entry["component"], []).append(entry["layer"])
    if len(groups) > 2:
        return (
            f"{format_count(len(entries), 'piece')} of "
            f"{format_count(len({entry['layer'] for entry in entries}), 'layer')}"
        )
    return "; ".join(
        f"{component} of layer{'s' if len(layers) > 1 else ''} {', '.join(map(str, layers))}"
        for component, layers in groups.items()
    )


def _harder(share: float) -> str:
    """`1.2% harder`, `0.8% easier`, or `no harder`."""
    if abs(share) < 0.0005:
        return "no harder"
    return f"{abs(share):.1%} {'harder' if share > 0 else 'easier'}"


def _spread(values: Sequence[float], spelled: Callable[[float], str]) -> str:
    """The mean of some figures, and from where to where they go."""
    mean = sum(values) / len(values)
    return spelled(mean) if len(values) == 1 else f"{spelled(mean)} ({spelled(min(values))} to {spelled(max(values))})"
