"""Pages of runs: every metric of a log is drawn, and several pages become one without letting anything else in."""

import json
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lapis.errors import DataError
from lapis.report import Page, plots
from lapis.report.figures.curves import metric_panels
from lapis.report.pages.joined import is_ours, read_page
from lapis.report.pages.training import run_page
from lapis.report.pages.working_folder import report_of


def log(steps: int = 60, **metrics: float) -> list[dict]:
    rows = [
        {"step": i, "tokens": 512 * i, "loss": 3.0 - i / steps, "lr": 1e-3, "grad_norm": 1.0,
         "tokens_per_second": 900.0, "seconds": float(i), "bits_per_byte": None,
         "metrics": {k: v * i for k, v in metrics.items()}}
        for i in range(1, steps + 1)
    ]  # fmt: skip
    rows[-1]["held_out"] = {"loss": 2.5, "accuracy": 0.75}
    return rows


def figures(html: str) -> list[dict]:
    blocks = re.findall(r'<div class="plot".*?<script type="application/json">(.*?)</script>', html, re.DOTALL)
    return [json.loads(block) for block in blocks]


def test_every_metric_of_a_log_is_drawn():
    page = run_page(log(reward=0.01, kl=0.002, odd_figure=1.0), {"objective": "grpo"}, "policy").render()
    titles = [note["text"] for figure in figures(page) for note in figure["layout"].get("annotations", ())]
    for title in ("reward", "KL to the reference (nats)", "odd figure", "accuracy (share)", "learning rate"):
        assert title in titles
    assert "Reward: from 0.02 to 0.59" in page and "The loss fell from 2.967 to 2.017" in page
    loss = figures(page)[0]["data"]
    assert any("held-out" in trace["name"] and trace["y"] == [2.5] for trace in loss)


def test_panels_hold_the_numbers_of_the_rows():
    figure = metric_panels({"a": log(5, kl=1.0), "b": log(3, kl=2.0)}, ["kl", "absent"], "t", x="step")
    curves = {trace.name: list(trace.y) for trace in figure.data if trace.x[0] is not None}
    assert [trace.name for trace in figure.data if trace.showlegend is not False] == ["a", "b"]
    assert curves == {"a": [1, 2, 3, 4, 5], "b": [2, 4, 6]}


def test_replies_before_and_after_are_shown():
    facts = {"replies": [{"prompt": "Who?", "before": "who who", "after": "Aina."}], "config": {"steps": 60}}
    page = run_page(log(), facts, "chat").render()
    assert "who who" in page and "Aina." in page and "Settings" in page


def test_a_classifier_shows_what_it_takes_for_what():
    facts = {"held_out": {"accuracy": 0.9}, "labels": {"classes": ["ms", "id"], "confusion": [[9, 1], [0, 10]]}}
    page = run_page(log(), facts, "langid").render()
    assert "95.0% are right; ms is most often taken for id" in page
    drawn = [figure for figure in figures(page) if figure["data"][0]["type"] == "heatmap"]
    assert drawn[0]["data"][0]["z"] == [[9, 1], [0, 10]]


def test_a_report_puts_the_pages_of_folders_together(tmp_path):
    run, merged = tmp_path / "run", tmp_path / "merged"
    run.mkdir()
    merged.mkdir()
    (run / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in log()))
    (run / "training.json").write_text(json.dumps({"config": {"steps": 60}}))
    (run / "tokenizer.json").write_text("[]")
    account = {"command": "graft", "counts": {"merged": 21, "copied": 2, "skipped": 1}, "lost_to_rounding": 0.004,
               "inputs": {"base": {"source": "runs/base", "bytes": 10400}}, "notes": ["norms were kept"],
               "skipped": [{"role": "chat", "name": "lm_head.weight", "reason": "tied"}]}  # fmt: skip
    (merged / "lapis-merge.json").write_text(json.dumps(account))
    cells = [{"layer": i, "component": "attn.q", "kind": "weight", "cosine": 0.9, "relative_norm": 0.1, "name": f"l{i}"}
             for i in range(3)]  # fmt: skip
    (merged / "diff.json").write_text(json.dumps({"tensors": cells, "total": {}}))
    (merged / "classes.json").write_text(json.dumps({"classes": ["a", "b"], "confusion": [[1, 0], [1, 2]], "n": 4}))
    page = Page("Lens", "A lead.").section("Ranks", "Some **text**.")
    page.figure(plots.learning_curves([{"run": "x", "tokens": i, "loss": 1.0} for i in range(3)], "Curve"))
    page.table([{"a": 1, "b": "x"}], ["a", "b"], "Table", sortable=True)
    (merged / "lens.html").write_text(page.render())
    (merged / "other.html").write_text("<html><body><script>alert(1)</script></body></html>")
    whole = report_of([run, merged])
    assert whole.sections == [
        "Learning curves", "What the objective measures", "How the run went", "What was merged: merged",
        "What changed: merged/diff", "Scores", "What is taken for what", "Lens",
    ]  # fmt: skip
    html = whole.render()
    assert "norms were kept" in html and "<h3>Ranks</h3>" in html.replace(' id="s1"', "") and "alert(1)" not in html
    assert len(figures(html)) == 6 and html.count('id="plotly"') == 1
    ids = re.findall(r'\bid="([^"]+)"', html)
    assert len(ids) == len(set(ids))


def test_what_is_damaged_or_not_there_gets_one_line(tmp_path):
    with pytest.raises(DataError, match="no such folder"):
        report_of([tmp_path / "absent"])
    with pytest.raises(DataError, match="nothing that lapis draws"):
        report_of([tmp_path])
    (tmp_path / "log.jsonl").write_text('{"step": 1, "loss": 2}\nnot json\n')
    with pytest.raises(DataError, match="line 2: not JSON"):
        report_of([tmp_path])


def hostile(inner: str) -> str:
    return f'<meta name="generator" content="lapis"><h1>t</h1><main>{inner}</main>'


@pytest.mark.parametrize("inner", [
    "<script>alert(1)</script>", '<p onclick="alert(1)">x</p>', '<a href="javascript:alert(1)">x</a>',
    '<img src="http://x/y.png">', '<meta http-equiv="refresh" content="0;url=http://x">', '<iframe src="http://x">',
    '<div style="background:url(http://x)">x</div>', "<svg><script>alert(1)</script></svg>", '<base href="http://x">',
    '<script type="application/json">{"a": "</script', "<style>@import 'http://x'</style>", '<p id="plotly">x</p>',
])  # fmt: skip
def test_a_page_that_is_read_again_lets_nothing_else_in(inner, tmp_path):
    path = tmp_path / "page.html"
    path.write_text(hostile(inner))
    assert is_ours(path)
    try:
        blocks = read_page(path).blocks
    except DataError as error:
        assert "damaged" in str(error)
        return
    for word in ("alert", "http", "onclick", "javascript", "<img", "<meta", "<iframe", "<svg", "<base", "id="):
        assert word not in blocks


@settings(max_examples=60, deadline=None)
@given(st.lists(st.sampled_from(
    ["<div>", "</div>", "<section>", "</section>", "<p>", "</p>", "<main>", "</main>", "<script>", "</script>", "<b>",
     "x<y", "&lt;b&gt;", "<table><tr><td>", "</table>", "<!-- ", " -->", "<h2 id='s1'>", "</h2>"]
), max_size=14))  # fmt: skip
def test_what_is_read_is_always_well_formed(tmp_path_factory, pieces):
    path = tmp_path_factory.mktemp("page") / "page.html"
    path.write_text(hostile("".join(pieces)))
    blocks = read_page(path).blocks
    opened = []
    for end, tag in re.findall(r"<(/?)([a-z0-9]+)", blocks):
        if end:
            assert opened.pop() == tag
        else:
            opened.append(tag)
    assert not opened and "<script" not in blocks
