"""What `lapis plan` found: scores of every piece, the choice, the random control, and both measured.

Leaves out: the page (report/figures/plan.py draws it from plain rows).
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lapis.checkpoint.commit import commit_file
from lapis.errors import MissingExtra
from lapis.families.plan_file import PlanFile

if TYPE_CHECKING:
    import pandas
    import plotly.graph_objects as go


@dataclass
class PlanResult:
    """scores, pieces: rows with every signal, by layer and by piece. measured: of "chosen", "control", "full", "home"
    and, for a graft, "scaled".

    tune, control: [{layer, component}]. template: tokens of the chat template, whose rows are trained with either: base
    never learned them. scales: [{layers, components, scale}]. share: of the blocks' parameters that
    were taken. passes: forward passes over the exam that the scoring took.
    """

    goal: str
    budget: float
    base: str
    chat: str
    model: dict[str, Any]
    tune: list[dict[str, Any]] = field(default_factory=list)
    control: list[dict[str, Any]] = field(default_factory=list)
    template: list[str] = field(default_factory=list)
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
        return {**vars(self), "layers": self.layers, "components": self.tune, "finding": self.finding()}

    def to_pandas(self, layers: bool = False) -> "pandas.DataFrame":
        """The pieces, or the layers, with every signal."""
        try:
            import pandas
        except ImportError:
            raise MissingExtra("pandas", "data") from None
        return pandas.DataFrame(self.scores if layers else self.pieces)

    def finding(self) -> str:
        """One sentence: what the choice does, beside the control."""
        chosen, control = self.measured.get("chosen"), self.measured.get("control")
        what = f"{self.share:.0%} of the blocks' parameters ({_told(self.tune)})"
        if chosen is None or control is None:
            return f"By {self.signal} alone, without a measurement: {what}"
        said = f"{what} carry {chosen['style']:.0%} of what chat gained on replies, a random choice of the same size "
        said += f"{control['style']:.0%}"
        if chosen.get("knowledge") is not None:
            said += f"; plain text gets harder by {chosen['knowledge']:+.1%} and {control['knowledge']:+.1%}"
        return said

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
        return "\n".join([*lines, self.finding(), *self.notes])


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"


def _told(entries: list[dict[str, Any]]) -> str:
    """`attn of layers 0, 3; mlp of layer 5`; of many kinds only their number."""
    groups: dict[str, list[int]] = {}
    for entry in entries:
        groups.setdefault(entry["component"], []).append(entry["layer"])
    if len(groups) > 2:
        return f"{len(entries)} pieces of {len({entry['layer'] for entry in entries})} layers"
    return "; ".join(
        f"{component} of layer{'s' if len(layers) > 1 else ''} {', '.join(map(str, layers))}"
        for component, layers in groups.items()
    )
