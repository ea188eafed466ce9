"""Pages made from what the commands really print and write: every figure under its own name, and each thing once."""

import json
import re

from lapis.report.page import Page
from lapis.report.pages.training import Run, add_runs, run_page
from lapis.report.pages.working_folder import report_of, run_of

from .conftest import lapis
from .test_runs import figures


def titles(page: str) -> list[str]:
    return [note["text"] for figure in figures(page) for note in figure["layout"].get("annotations", ())]


def test_a_report_shows_preference_pairs(studio, tmp_path):
    (tmp_path / "pairs.json").write_bytes((studio / "work" / "pairs.json").read_bytes())
    page = report_of([tmp_path]).render()
    scores = json.loads((studio / "work" / "pairs.json").read_text())
    assert "On pairs" in page and "On text" in page
    assert f"{scores['pairs']['margin']:.4g}".replace("-", "−") in page


def test_a_report_shows_tasks_of_lm_eval(studio, task_scores, tmp_path):
    (tmp_path / "tasks.json").write_text(task_scores)
    page = report_of([tmp_path])
    assert page.sections == ["Scores"] and "On birds" in page.render()
    assert f"{json.loads(task_scores)['tasks']['birds']['acc']:.4g}" in page.render()


def test_a_classifiers_page_has_both_curves_and_the_matrix(studio):
    page = (studio / "classify.html").read_text()
    losses = {trace["name"]: trace["y"] for trace in figures(page)[0]["data"]}
    rows = [json.loads(line) for line in (studio / "work" / "spam" / "log.jsonl").read_text().splitlines()]
    measured = [row["held_out"]["valid_loss"] for row in rows if "held_out" in row]
    assert len(measured) >= 3 and losses["spam, held-out"] == measured
    assert {"accuracy (share)", "F1, mean over the classes"} <= set(titles(page)) and "valid loss" not in titles(page)
    assert "What is taken for what" in page and "nats per example" in page
    assert figures(page)[0]["layout"]["yaxis"]["title"]["text"] == "loss (nats per example)"


def test_a_page_of_text_says_nats_per_token_and_no_more(studio):
    page = (studio / "causal.html").read_text()
    assert "nats per token" in page and "held-out" not in page and "Dots" not in page
    assert "What is taken" not in page and "What the objective measures" not in page


def test_the_loss_is_the_one_of_training_json(studio):
    for name, place in (("causal", "base"), ("classify", "spam")):
        facts = json.loads((studio / "work" / place / "training.json").read_text())
        page = (studio / f"{name}.html").read_text()
        assert f'<dd class="value">{facts["loss"]:.3f}</dd>' in page and f"to {facts['loss']:.3f}</h3>" in page


def test_over_fitting_is_named_with_its_step():
    log = [{"step": i, "loss": 1 / i, "held_out": {"valid_loss": 1 + abs(i - 4) / 5}} for i in range(1, 9)]
    page = run_page(log, {"objective": "causal"}, "run").render()
    assert "lowest at step 4, at 1.000, and rose to 1.800" in page
    assert "over-fits" not in run_page(log[:4], {"objective": "causal"}, "run").render()


def test_samples_of_the_log_stand_on_the_page():
    log = [{"step": 1, "loss": 2.0, "sample": "<b>who</b>"}, {"step": 2, "loss": 1.0}]
    page = add_runs(Page("p"), [Run("run", log)]).render()
    assert "Samples on the way" in page and "step 1: &lt;b&gt;who&lt;/b&gt;" in page


def test_a_plan_page_reads_the_keys_of_the_result(studio):
    plan, page = json.loads((studio / "plan.json").read_text()), (studio / "plan.html").read_text()
    assert plan["finding"].replace("'", "&#x27;") in page and plan["pieces"]
    cells = re.findall(r'<th scope="row"[^>]*>([^<]*)</th>', page)
    assert all(row["layer"] in cells for row in plan["pieces"])


def test_runs_of_different_objectives_are_never_on_one_axis(studio):
    page = report_of([studio / "work"])
    assert [title for title in page.sections if title.startswith("Learning")] == [
        "Learning curves: causal", "Learning curves: classify",
    ]  # fmt: skip
    for figure in figures(page.render()):
        assert not {"base", "spam"} <= {trace.get("name", "").split(",")[0] for trace in figure["data"]}


def test_a_report_says_first_what_is_there_and_each_thing_once(studio):
    page = report_of([studio / "work"])
    html = page.render()
    assert html.index("What is here</h2>") < html.index("Learning curves: causal</h2>")
    for name in ("work/base", "work/spam", "work/plan", "work/lens", "work/inspect", "work/pairs", "work/diff"):
        assert html.count(f'<th scope="row">{name}</th>') >= 1, name
    assert "What changed: work/diff" not in page.sections  # its page is there
    assert page.sections.count("From base to chat") == 1


def test_many_pages_are_folded(studio, tmp_path):
    for i in range(5):
        (tmp_path / f"{i}.html").write_bytes((studio / "mixers.html").read_bytes())
    assert report_of([tmp_path]).render().count('<details class="chapter">') == 5


def test_the_page_of_a_run_stands_for_nothing_twice(studio, tmp_path):
    run = tmp_path / "spam"
    run.mkdir()
    for name in ("log.jsonl", "training.json", "classes.json"):
        (run / name).write_bytes((studio / "work" / "spam" / name).read_bytes())
    (run / "page.html").write_bytes((studio / "classify.html").read_bytes())
    assert "Training of spam" not in report_of([run]).sections
    assert run_of(run).facts["classes.json"]["confusion"]


def test_a_diff_lists_what_changed_most_and_least(studio):
    page, table = (studio / "diff.html").read_text(), json.loads((studio / "diff.json").read_text())
    lines = sorted((x for x in table["tensors"] if x["relative_norm"]), key=lambda line: -line["relative_norm"])
    most, least = (page[page.index(f"Changed {end}</h3>") :].split("</table>")[0] for end in ("most", "least"))
    for shown, line in ((most, lines[0]), (least, lines[-1])):
        first = re.search(r'<th scope="row">(.*?)</th>', shown)[1]
        assert first.replace("<wbr>", "") == line["name"].removeprefix("model.").removesuffix(".weight")
    assert "<h3>By layer</h3>" in page and "By layer</summary>" not in page


def test_a_diff_in_which_no_row_moved_says_so(studio, tmp_path):
    lapis("diff", str(studio / "base"), str(studio / "base"), "--rows", "--html", str(tmp_path / "same.html"), "--json")
    page = (tmp_path / "same.html").read_text()
    assert "<strong>No row moved.</strong>" in page and "moved most" not in page and "Note: no row" not in page
    count = len(json.loads((studio / "diff.json").read_text())["tensors"])
    assert f"{count} of {count} tensors did not change at all: " in page and "Changed least" not in page
    text = lapis("diff", str(studio / "base"), str(studio / "base"), "--rows")
    assert "no row moved" in text and "moved most" not in text
