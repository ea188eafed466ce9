"""A table of differences: per tensor, grouped, by row; as JSON, pandas, text or a picture.

Groups add up sums and never average averages. Leaves out: where the sums come from (diff.py).
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from math import isfinite
from typing import TYPE_CHECKING, Any

from lapis.errors import CheckpointError, ConfigError, MissingExtra
from lapis.families.base import Part
from lapis.weights.diff.measures import Sums, direction, ratio
from lapis.wording import format_count, format_part

if TYPE_CHECKING:
    import pandas
    import plotly.graph_objects as go

UNRELATED = 0.05  # a fine-tune's tensors have cosines near 1 with its parent's; unrelated ones near 0
OUTLIER = 6.0  # robust z-score from which a row stands apart


@dataclass(frozen=True)
class Line:
    """One tensor: its name, where it belongs, and the sums of its difference."""

    name: str
    part: Part
    sums: Sums
    shape: tuple[int, ...] = ()
    extra: dict[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        part = {"layer": self.part.layer, "component": self.part.component, "kind": self.part.kind}
        return {"name": self.name, **part, "shape": list(self.shape), **self.sums.figures(), **self.extra}


@dataclass
class DiffTable:
    """What `diff` returns.

    Attributes:
        lines: A line for each tensor.
        rows: A line for each row of embedding and head, where rows were measured.
        new_rows: A line for each token that only b has: norm of its row, and the nearest of the tokens that both have.
        directions: A line for each leading singular direction of a matrix's change, where they were read.
        same_shape: Whether all tensors that both have are of one shape.
        only_in_a, only_in_b: Names of tensors.
        mismatched: A line for each pair of tensors of different shapes.
        notes: What a reader should know besides.
        bytes_read: From files.
    """

    lines: list[Line]
    rows: list[dict[str, Any]] = field(default_factory=list)
    new_rows: list[dict[str, Any]] = field(default_factory=list)
    directions: list[dict[str, Any]] = field(default_factory=list)
    same_shape: bool = True
    only_in_a: list[str] = field(default_factory=list)
    only_in_b: list[str] = field(default_factory=list)
    mismatched: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    bytes_read: int = 0

    @property
    def tensors(self) -> list[dict[str, Any]]:
        """name, layer, component, kind, shape, cosine, angle, relative_norm, mean_abs, max_abs, identical, ..."""
        return [line.to_json() for line in self.lines]

    @property
    def total(self) -> dict[str, Any]:
        """The figures of the whole model as one vector."""
        return sum((line.sums for line in self.lines), Sums()).figures()

    def by(self, *keys: str) -> list[dict[str, Any]]:
        """Grouped by "layer", "component" or "kind", or several of them; layers in order, the rest as in the model."""
        for key in keys:
            if key not in ("layer", "component", "kind"):
                raise ConfigError(f'diff: cannot group by "{key}"; give layer, component or kind')
        groups: dict[tuple[Any, ...], list[Sums]] = {}
        for line in self.lines:
            of = {"layer": line.part.layer, "component": line.part.group, "kind": line.part.kind}
            groups.setdefault(tuple(of[key] for key in keys), []).append(line.sums)
        if keys and keys[0] == "layer":
            order = sorted(groups, key=lambda group: (group[0] is not None, group[0] or 0))
        else:
            order = list(groups)
        return [
            dict(zip(keys, group, strict=True)) | {"tensors": len(groups[group])} | sum(groups[group], Sums()).figures()
            for group in order
        ]

    def unrelated(self) -> bool:
        """Whether no matrix of any block points the same way in both models."""
        cosines = [abs(x["cosine"]) for x in self.tensors if x["layer"] is not None and len(x["shape"]) > 1]
        return bool(cosines) and max(cosines) < UNRELATED

    def check_related(self, a: str, b: str) -> None:
        """Raises CheckpointError where the two models, so called, have nothing to do with each other."""
        if self.unrelated():
            raise CheckpointError(f"{a} and {b}: cosine 0.00 in every layer: these are not parent and child")

    def moved(self, count: int = 20) -> list[dict[str, Any]]:
        """The rows that changed most, relative to their length; rows that did not move are not among them."""
        moved = [row for row in self.rows if row["moved"]]
        return sorted(moved, key=lambda row: -row["relative_norm"])[:count]

    def rows_finding(self) -> str:
        """One sentence: which rows of embedding and head moved most, and how many tokens are new in b."""
        moved = self.moved(len(self.rows))
        new = len({row["token"] for row in self.new_rows})
        more = f"; {format_count(new, 'token is', 'tokens are')} only in b" if new else ""
        if not moved:
            return f"no row moved{more}"
        apart = [row for row in moved if row["z"] > OUTLIER][:3] or moved[:1]
        several = len({row["tensor"] for row in self.rows}) > 1
        names = list(dict.fromkeys(f"{row['token']} ({row['tensor']})" if several else row["token"] for row in apart))
        joined = " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)
        return f"{joined} moved most{more}"

    def outliers(self) -> list[dict[str, Any]]:
        """For each tensor of rows its figures with and without the rows that stand apart, and which those are."""
        result = []
        for name in dict.fromkeys(row["tensor"] for row in self.rows):
            rows = [row for row in self.rows if row["tensor"] == name]
            apart = [row for row in rows if row["z"] > OUTLIER]
            rest = [row for row in rows if row["z"] <= OUTLIER]
            result.append(
                {
                    "tensor": name,
                    "outliers": len(apart),
                    "special": sum(row["special"] for row in apart),
                    "tokens": [row["token"] for row in sorted(apart, key=lambda row: -row["z"])[:20]],
                    "with": _of_rows(rows),
                    "without": _of_rows(rest),
                }
            )
        return result

    def to_json(self) -> dict[str, Any]:
        """The object that `lapis diff --json` prints."""
        result: dict[str, Any] = {
            "tensors": self.tensors,
            "total": self.total,
            "same_shape": self.same_shape,
            "only_in_a": self.only_in_a,
            "only_in_b": self.only_in_b,
            "mismatched": self.mismatched,
            "notes": self.notes,
        }
        if self.directions:
            result["directions"] = self.directions
        if self.rows:
            result["rows"] = [{key: value for key, value in row.items() if key != "squares"} for row in self.rows]
            result["outliers"] = self.outliers()
            result["new_rows"] = self.new_rows
        return result

    def to_pandas(self, rows: bool = False) -> "pandas.DataFrame":
        """The tensors, or the rows, as a DataFrame."""
        try:
            import pandas
        except ImportError:
            raise MissingExtra("pandas", "data") from None
        return pandas.DataFrame(self.to_json()["rows"] if rows else self.tensors)

    def finding(self) -> str:
        """One sentence: where the change is largest, and how far the direction turned."""
        every = [cell for cell in self.by("layer", "component", "kind") if cell["kind"] == "weight"]
        cells = [cell for cell in every if isfinite(cell["relative_norm"])]
        if len(cells) < len(every):
            zero = next(cell for cell in every if cell not in cells)
            return f"{_place(zero)} is all zeros in the first model and not in the second"
        most = max(cells, key=lambda cell: cell["relative_norm"])
        if not most["relative_norm"]:
            return "No weight changed"
        turned = max(cells, key=lambda cell: cell["angle"])
        return (
            f"{_place(most)} changed most, by {most['relative_norm']:.2%} of its length; "
            f"{'it' if turned is most else _place(turned)} turned most, by {turned['angle']:.2f} degrees"
        )

    def floor_finding(self) -> str:
        """How many changes are smaller than what rounding does; "" where none is."""
        changed = [cell for cell in self.by("layer", "component") if cell["relative_norm"]]
        below = sum(cell["relative_norm"] < cell["rounding_floor"] for cell in changed)
        low = "below the rounding floor, and"
        return (
            format_part(below, len(changed), "change", f"is {low} says", f"are {low} say") + " little" if below else ""
        )

    def plot(self, rows: bool = False) -> "go.Figure":
        """A picture: layer by component, or, with rows, how far each token's row moved."""
        from lapis.report import plots

        if not rows:
            return plots.layer_heatmap(self.by("layer", "component", "kind"), self.finding())
        first = self.moved(1)[0]["tensor"] if self.moved(1) else self.rows[0]["tensor"] if self.rows else ""
        rows_ = sorted((row for row in self.rows if row["tensor"] == first), key=lambda row: -row["relative_norm"])
        return plots.embedding_rows(sorted(rows_, key=lambda row: int(row["id"])), self.rows_finding())

    def _repr_mimebundle_(self, include: object = None, exclude: object = None) -> dict[str, str]:
        """What a notebook shows: the finding, and the figures by layer."""
        from lapis.report.markup import Column, notebook

        rows = [{**g, "layer": "outside" if g["layer"] is None else str(g["layer"])} for g in self.by("layer")]
        columns = [
            Column("layer"), Column("cosine", "cosine", ".6f"), Column("angle", "angle", ".3f", unit="degrees"),
            Column("relative_norm", "|b − a| / |a|", ".3e"), Column("identical", "identical", ".1%"),
        ]  # fmt: skip
        return notebook(str(self), self.finding(), rows, columns, "`.plot()` draws it, `.to_pandas()` gives the rows")

    def __str__(self) -> str:
        lines = [f"{'layer':>6} {'cosine':>9} {'|b-a|/|a|':>10} {'identical':>10}"]
        for group in self.by("layer"):
            layer = "other" if group["layer"] is None else group["layer"]
            lines.append(
                f"{layer:>6} {group['cosine']:>9.6f} {group['relative_norm']:>10.3e} {group['identical']:>10.1%}"
            )
        return "\n".join(lines + self.notes)


def _place(cell: dict[str, Any]) -> str:
    return cell["component"] if cell["layer"] is None else f"{cell['component']} of layer {cell['layer']}"


def _of_rows(rows: Sequence[dict[str, Any]]) -> dict[str, float]:
    aa, bb, dd = _add(row["squares"] for row in rows)
    return {"rows": len(rows), "relative_norm": ratio(dd, aa), "cosine": direction(aa, bb, dd)[0]}


def _add(triples: Iterable[tuple[float, float, float]]) -> tuple[float, float, float]:
    a = b = d = 0.0
    for aa, bb, dd in triples:
        a, b, d = a + aa, b + bb, d + dd
    return a, b, d
