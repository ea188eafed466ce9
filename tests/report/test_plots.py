"""Rows in, figure out: the numbers of a figure are the numbers of the rows, and foreign text stays text."""

import math
import subprocess
import sys

import pytest

from lapis.report import plots
from lapis.report.figures.curves import moving_average
from lapis.report.figures.scores import short

DIFF = [
    {"layer": layer, "component": part, "cosine": 1 - 0.01 * (layer + 1), "relative_norm": 0.1 * (layer + 1)}
    for layer in range(3)
    for part in ("mlp.down", "attn.q")
] + [
    {"layer": None, "component": "embed", "cosine": 0.5, "relative_norm": 0.9},
    {"layer": None, "component": "norm.final", "cosine": 1.0, "relative_norm": 0.0},
]
MODELS = ("base", "adapted", "grafted")
SCORES = [{"model": m, "language": g, "nll": i + 1.5} for i, m in enumerate(MODELS) for g in ("English", "Malay")]
SWEEP = [{"scale": s, "gap_closed": s / 2, "cost": s / 100} for s in (0.0, 1.0, 0.5)]
EMBED = [
    {"token": f"w{i}", "id": i, "special": i < 2, "relative_norm": 1.0 if i < 2 else 0.01 * (i % 7), "cosine": 0.9}
    for i in range(60)
]
LENS = [
    {"layer": layer, "position": p, "token": t, "top": [(f"{t}{layer}", 0.2 + 0.3 * layer), ("x", 0.1)]}
    for layer in range(3)
    for p, t in enumerate(("a", "<b>", "a"))
]
PLAN = [{"layer": i, "style": i / 9, "knowledge": 1 - i / 9, "chosen": i > 6, "control": i == 2} for i in range(10)]
MIXERS = [{"mixer": name, "parameters": p, "flops": 2 * p} for name, p in (("full", 10**11), ("attention", 10**6))]
GROWTH = [{"context": n, "weights": 10**8, "cache": 10**5 * n, "flops": 10**8 + 10**4 * n, "attention": 10**4 * n}
          for n in (128, 256, 512)]  # fmt: skip
SPECTRA = [{"name": "attn.q", "values": [4.0, 2.0, 1.0]}, {"name": "mlp.up", "values": [3.0, 2.9]}]
ERRORS = [{**row, "name": str(i), "error": 10.0**-i if i else 0.0} for i, row in enumerate(DIFF)]
SIZES = [{"layer": row["layer"], "component": row["component"], "parameters": 10 + i} for i, row in enumerate(DIFF)]
CURVES = [{"run": r, "tokens": i, "loss": 3 - i / 50} for r in ("base", "chat") for i in range(10)]
RANKS = [{"word": w, "layer": i, "rank": 10 ** (4 - i)} for w in ("Kuala", "Bangkok") for i in range(5)]
HEADS = [{"head": f"head {h}", "weights": [[1.0, 0.0], [0.25, 0.75]]} for h in range(3)]

FIGURES = {
    "curves": lambda: plots.learning_curves(CURVES, "t"),
    "sweep": lambda: plots.scale_sweep(SWEEP, "t", chosen=0.5, budget=0.03),
    "bars": lambda: plots.scores(SCORES, "t", metric="nll"),
    "dots": lambda: plots.scores(SCORES, "t", metric="nll", kind="dot"),
    "plan": lambda: plots.plan_scatter(PLAN, "t"),
    "stack": lambda: plots.plan_stack([{**row, "layer": f"{row['layer']}.attn"} for row in PLAN], "t"),
    "growth": lambda: plots.growth(GROWTH, "t"),
    "mixers": lambda: plots.mixers(MIXERS, "t"),
    "heatmap": lambda: plots.layer_heatmap(DIFF, "t"),
    "rows": lambda: plots.embedding_rows(EMBED, "t"),
    "spectra": lambda: plots.spectra(SPECTRA, "t"),
    "errors": lambda: plots.tensor_errors(ERRORS, "t"),
    "treemap": lambda: plots.parameter_treemap(SIZES, "t"),
    "lens": lambda: plots.lens_grid(LENS, "t"),
    "ranks": lambda: plots.rank_trajectories(RANKS, "t"),
    "matrix": lambda: plots.matrix([[1.0, -0.5], [-0.5, 1.0]], ["a", "b"], ["a", "b"], "t", unit="cosine", signed=True),
    "panels": lambda: plots.metric_panels({"a": [{"step": 1, "kl": 2.0}, {"step": 2, "kl": 1.0}]}, ["kl"], "t"),
    "attention": lambda: plots.attention_map(HEADS, ["a", "b"], "t"),
}


def test_nothing_of_plotly_is_imported_before_a_figure_is_made():
    code = "import sys, lapis, lapis.report, lapis.report.plots; sys.exit('plotly' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("name", FIGURES)
def test_every_figure_has_a_finding_and_a_narrow_form(name):
    figure = FIGURES[name]()
    assert figure.layout.meta["title"] == figure.layout.title.text == "t"
    assert figure.to_json() and len(figure.data) > 0
    for path in figure.layout.meta["narrow"]:
        assert path.split(".")[0] in figure.layout, path  # a mistyped path would be silently without effect


@pytest.mark.parametrize("name", sorted(set(FIGURES) - {"treemap", "heatmap", "lens", "attention", "matrix", "panels"}))
def test_axes_are_named(name):
    figure = FIGURES[name]()
    assert figure.layout.xaxis.title.text
    assert figure.layout.yaxis.title.text or name in ("bars", "dots", "mixers")  # there the lines are named themselves


def test_learning_curves_hold_the_rows():
    figure = FIGURES["curves"]()
    assert [trace.name for trace in figure.data] == ["base", "chat"]
    assert list(figure.data[0].y) == [row["loss"] for row in CURVES[:10]]
    long = [{"run": "r", "seconds": i, "loss": float(i % 5)} for i in range(5001)]
    raw, smooth = plots.learning_curves(long, "t", x="seconds").data
    assert len(raw.x) <= 1001 and raw.x[-1] == 5000 and len(smooth.y) == len(raw.x)


def test_moving_average_is_centered_and_keeps_a_straight_line():
    line = [0.5 * i for i in range(30)]
    assert moving_average(line, 7) == pytest.approx(line)
    assert moving_average([0.0, 3.0, 0.0], 3) == pytest.approx([0.0, 1.0, 0.0])
    assert moving_average([], 3) == []


def test_scale_sweep_is_ordered_by_scale():
    trace = FIGURES["sweep"]().data[0]
    assert list(trace.customdata) == [0.0, 0.5, 1.0] and list(trace.y) == [0.0, 0.25, 0.5]


def test_scores_have_a_panel_per_language_without_gaps():
    figure = plots.scores([*SCORES, {"model": "tuned", "language": "Malay", "nll": None}], "t", metric="nll")
    assert [list(trace.x) for trace in figure.data] == [[1.5, 2.5, 3.5]] * 2
    assert list(figure.data[0].y) == list(MODELS)


def test_layer_heatmap_holds_direction_and_magnitude():
    direction, magnitude = FIGURES["heatmap"]().data
    assert list(direction.x) == ["in", "0", "1", "2", "out"]
    assert list(direction.y) == ["embed", "attn.q", "mlp.down", "norm.final"]
    assert direction.customdata[1][1:4] == pytest.approx([0.01, 0.02, 0.03])
    assert magnitude.customdata[0][0] == 0.9 and magnitude.customdata[3][4] == 0.0
    assert math.log10(0.5) == pytest.approx(direction.z[0][0])  # more than a factor of 30: a logarithmic scale


def test_layer_heatmap_averages_experts_and_parts_biases():
    rows = [
        {"name": f"m.{i}.weight", "layer": 0, "component": "mlp.up", "cosine": 1 - d, "relative_norm": d}
        for i, d in enumerate((0.1, 0.3))
    ]
    rows += [{"name": "m.bias", "layer": 0, "component": "mlp.up", "cosine": float("nan"), "relative_norm": 0.5}]
    direction, magnitude = plots.layer_heatmap(rows, "t").data
    assert list(magnitude.y) == ["mlp.up", "mlp.up bias"]
    assert [line[0] for line in magnitude.customdata] == pytest.approx([0.2, 0.5])
    assert magnitude.text[0][0] == ", mean of 2" and direction.z[1][0] is None


def test_embedding_rows_name_special_tokens_and_thin_out():
    tokens, special = FIGURES["rows"]().data
    assert list(special.text) == ["w0", "w1"] and list(special.x) == [0, 1] and len(tokens.x) == 58
    many = [{"token": "t", "id": i, "special": False, "relative_norm": i / 9000} for i in range(9000)]
    *band, points = plots.embedding_rows(many, "t").data
    assert len(points.x) == 200 and min(points.x) == 8800 and len(band[0].x) == 200


def test_lens_grid_holds_probabilities_words_and_the_top_ten():
    grid, weak, strong = FIGURES["lens"]().data
    assert [list(line) for line in grid.z] == [pytest.approx([0.2 + 0.3 * layer] * 3) for layer in range(3)]
    assert [*weak.text, *strong.text] == ["a0", "&lt;b&gt;0", "a0", "a1", "&lt;b&gt;1", "a1", "a2", "&lt;b&gt;2", "a2"]
    assert "20.0%" in grid.customdata[0][1] and "&lt;b&gt;0" in grid.customdata[0][1]


def test_ranks_run_downwards_on_a_logarithmic_axis():
    figure = FIGURES["ranks"]()
    foot, top = figure.layout.yaxis.range
    assert figure.layout.yaxis.type == "log" and foot > 4 and -1 < top < 0  # rank 1 stands just below the upper edge
    assert list(figure.data[0].y) == [10000, 1000, 100, 10, 1]


def test_attention_hides_what_the_mask_hid():
    assert [list(line) for line in FIGURES["attention"]().data[0].z] == [[1.0, None], [0.25, 0.75]]


def test_attention_maps_name_their_tokens_and_both_axes():
    layout = FIGURES["attention"]().layout
    for axis in (layout.xaxis, layout.yaxis, layout.xaxis3, layout.yaxis3):
        assert list(axis.ticktext) == ["a", "b"] and axis.showticklabels is not False
    assert (layout.xaxis2.title.text, layout.yaxis2.title.text) == ("looked at", "looking")


def test_a_narrow_screen_shows_the_last_tokens_of_the_grid():
    rows = [{"layer": 0, "position": p, "token": "t", "top": [("x", 0.5)]} for p in range(9)]
    meta = plots.lens_grid(rows, "t").layout.meta
    assert meta["narrow"]["xaxis.range"] == [4.5, 8.5] and meta["narrow"]["meta.min_width"] == 0
    assert meta["end"] and meta["more"] == "The last 4 of 9 tokens; a wider screen shows all."
    assert "more" not in plots.lens_grid(rows[:3], "t").layout.meta


def test_the_stack_shows_the_choice_and_rings_the_control():
    rows = [{"layer": f"{i}.{part}", "chosen": i == 1 and part == "mlp", "control": i == 0 and part == "attn"}
            for i in range(2) for part in ("attn", "mlp")]  # fmt: skip
    stack, _, control = plots.plan_stack([*rows, {"layer": "embed", "chosen": False}], "t").data
    assert [list(line) for line in stack.z] == [[0, 0], [0, 1]] and list(stack.x) == ["attn", "mlp"]
    assert (list(control.x), list(control.y)) == (["attn"], [0])


def test_growth_holds_the_numbers_of_the_rows():
    weights, cache, flops, attention = FIGURES["growth"]().data
    assert list(cache.y) == pytest.approx([0.0128, 0.0256, 0.0512]) and list(weights.y) == [0.1] * 3
    assert list(flops.y) == [row["flops"] for row in GROWTH] and list(attention.x) == [128, 256, 512]


def test_no_two_ticks_of_an_axis_read_the_same():
    """Where values lie close together, shares have more decimals, and a layer stands once."""
    rows = [{"layer": str(i), "style": 0.1 * i, "knowledge": 0.0004 + 0.0001 * i, "chosen": i == 0} for i in range(4)]
    layout = plots.plan_scatter(rows, "t").layout
    step = (rows[-1]["knowledge"] - rows[0]["knowledge"]) / 7
    assert format(0.0005, layout.xaxis.tickformat) != format(0.0005 + step, layout.xaxis.tickformat)
    assert layout.xaxis.tickformat[0] == "+" and layout.yaxis.tickformat == ".0%"
    words = [{"word": "a", "layer": layer, "rank": 3} for layer in range(3)]
    few, many = plots.rank_trajectories(words, "t"), FIGURES["ranks"]()
    assert few.layout.xaxis.dtick == 1 and many.layout.xaxis.dtick == 1
    thirty = plots.rank_trajectories([{**words[0], "layer": layer} for layer in range(30)], "t")
    assert thirty.layout.xaxis.dtick == 3 and thirty.layout.meta["narrow"]["xaxis.dtick"] == 5


def test_treemap_adds_up():
    figure = FIGURES["treemap"]()
    sizes = dict(zip(figure.data[0].ids, figure.data[0].values, strict=True))
    assert sizes["model"] == sum(row["parameters"] for row in SIZES)
    assert sizes["layer 1"] == sizes["layer 1/attn.q"] + sizes["layer 1/mlp.down"]


def test_spectra_and_errors_keep_their_numbers_for_hovering():
    assert list(FIGURES["spectra"]().data[0].y) == [1.0, 0.5, 0.25]
    shown = {point[0]: point[1] for trace in FIGURES["errors"]().data for point in trace.customdata}
    assert shown == {row["name"]: row["error"] for row in ERRORS}


EMPTY = {
    **{name: getattr(plots, name) for name in plots.__all__},
    "scores": lambda rows, title: plots.scores(
        [{"model": "m", "language": "ms", "answers": None}], title, metric="answers"
    ),
    "attention_map": lambda rows, title: plots.attention_map(rows, [], title),
    "matrix": lambda rows, title: plots.matrix(rows, [], [], title),
    "metric_panels": lambda rows, title: plots.metric_panels({"run": rows}, ["kl"], title),
}


@pytest.mark.parametrize("name", EMPTY)
def test_what_was_not_measured_says_so(name):
    figure = EMPTY[name]([], "t")
    assert figure.layout.annotations[0].text == "nothing was measured" and figure.to_json()


def test_short_counts():
    assert [short(n) for n in (7, 1500, 124439808, 1.55e11)] == ["7", "1.5k", "124M", "155G"]
