"""`lapis plan` as a user has it: the choice, the files it writes, who reads them, and what it refuses."""

import html
import inspect
import json
import os
import signal
from dataclasses import fields, replace
from typing import Any

import pytest
import torch
import yaml

import lapis
from lapis.cli.main import main
from lapis.errors import CheckpointError, ConfigError, DataError
from lapis.evaluation.chats import score_chats
from lapis.families.base import Part
from lapis.families.config import ModelConfig
from lapis.model.check import read_config
from lapis.model.transformer import Transformer
from lapis.planning.choice import at_random
from lapis.planning.held_out import PlanJournal
from lapis.planning.options import PlanOptions
from lapis.planning.pieces import Piece, pieces_of
from lapis.weights.graft.scale import read_scale


@pytest.fixture(scope="module")
def outcome(pair):
    return lapis.plan(pair.base, pair.planted, budget=0.3, chats=pair.chats, text=pair.text, choices=pair.choices)


def test_the_piece_that_was_tuned_is_chosen_and_explains_all(outcome):
    assert outcome.tune == [{"layer": 1, "component": "mlp"}]
    by_label = {row["layer"]: row for row in outcome.pieces}
    assert by_label["1.mlp"]["style"] == pytest.approx(1.0, abs=1e-6)
    assert all(row["style"] == pytest.approx(0.0, abs=1e-6) for label, row in by_label.items() if label != "1.mlp")
    assert outcome.measured["chosen"]["style"] == pytest.approx(1.0, abs=1e-6)
    assert outcome.measured["chosen"]["style_out"] == pytest.approx(1.0, abs=1e-6)
    assert by_label["1.mlp"]["energy"] == pytest.approx(1.0)
    assert by_label["1.mlp"]["gradient_chats"] > 0 and by_label["0.mlp"]["gradient_chats"] == 0
    assert {"response_nll", "bits_per_byte", "stop_rate", "accuracy"} <= outcome.measured["control"].keys()


def test_control_has_the_size_of_the_choice_and_repeats(pair):
    parts = pieces_of(lapis.open(pair.base), "components")
    size = sum(piece.parameters for piece in parts) // 4
    draws = [at_random(parts, size, seed) for seed in (0, 0, 1)]
    assert draws[0] == draws[1] != draws[2]
    for draw in draws:
        taken = sum(piece.parameters for piece in draw)
        assert size - min(piece.parameters for piece in parts) < taken <= size


def test_the_budget_holds_and_pieces_make_up_the_blocks(pair, outcome):
    checkpoint = lapis.open(pair.base)
    sizes = {
        size: sum(p.parameters for p in pieces_of(checkpoint, size)) for size in ("layers", "halves", "components")
    }
    assert len(set(sizes.values())) == 1
    assert outcome.share <= 0.3
    assert Piece(2, "", (), 0).entries() == [{"layer": 2, "component": "attn"}, {"layer": 2, "component": "mlp"}]


def test_graft_reads_the_plan_as_it_is(pair, outcome, tmp_path):
    path = tmp_path / "plan.yaml"
    outcome.save(path)
    scale = read_scale(path)
    assert scale.of(Part(1, "mlp.up", "weight")) == 1.0
    assert scale.of(Part(1, "attn.q", "weight")) == scale.of(Part(0, "mlp.up", "weight")) == 0.0
    lapis.graft(pair.base, pair.planted, pair.base, tmp_path / "out", path)
    table = lapis.diff(tmp_path / "out", pair.planted)
    assert max(line["relative_norm"] for line in table.tensors if line["component"].startswith(("mlp", "attn"))) < 1e-6
    written = yaml.safe_load(path.read_text())
    assert written["format"] == "lapis-plan/1" and written["model"]["layers"] == 3
    assert written["tune"] == outcome.tune and written["control"] == outcome.control
    assert written["tokens"] == outcome.template == ["<|im_start|>", "<|im_end|>"]


def test_a_plan_for_another_shape_is_refused_by_graft(pair, outcome, tmp_path):
    path = tmp_path / "plan.yaml"
    outcome.save(path)
    path.write_text(path.read_text().replace("layers: 3", "layers: 5", 1))
    with pytest.raises(CheckpointError, match=r"made for another model \(layers 5 there, 3 here\)"):
        lapis.graft(pair.base, pair.planted, pair.onto, tmp_path / "out", path)


def test_scales_are_learned_on_the_model_to_chat_and_grafted(pair, tmp_path):
    plan = lapis.plan(pair.base, pair.chat, chats=pair.chats, text=pair.text, onto=pair.onto, cost=0.05, replies=False)
    assert len(plan.scales) == 7 and len({line["scale"] for line in plan.scales}) > 1
    assert plan.embeddings == "add" and plan.scales[-1]["components"] == ["embed"]
    plan.save(tmp_path / "plan.yaml")
    assert read_scale(tmp_path / "plan.yaml").of(Part(0, "attn.q", "weight")) == plan.scales[0]["scale"]
    lapis.graft(pair.base, pair.chat, pair.onto, tmp_path / "out", tmp_path / "plan.yaml")
    model, tokenizer = lapis.load(tmp_path / "out")
    outcome = score_chats(model, tokenizer, pair.records, replies=[None] * len(pair.records))
    assert outcome["response_nll"] == pytest.approx(plan.measured["scaled"]["response_nll"], rel=1e-3)
    assert plan.measured["scaled"]["knowledge"] <= 0.05


def test_without_chats_tensors_alone_choose_as_the_plan_says(pair):
    plan = lapis.plan(pair.base, pair.planted, budget=0.3, spectra=True)
    assert plan.tune == [{"layer": 1, "component": "mlp"}] and plan.measured == {}
    assert any("no chats" in note for note in plan.notes)
    assert plan.pieces[0]["weight_snr"] > 0


def test_the_command_prints_one_object_and_writes_plan_and_page(pair, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        main([
            "plan", "--base", str(pair.base), "--chat", str(pair.chat), "--budget", "0.5", "--pieces", "components",
            "--chats", str(pair.chats), "--text", str(pair.text), "--out", str(tmp_path / "plan.yaml"),
            "--html", str(tmp_path / "plan.html"), "--json",
        ])  # fmt: skip
        raise SystemExit(0)
    assert stop.value.code == 0
    result = json.loads(capsys.readouterr().out)
    assert {"layers", "components", "scores", "control", "measured"} <= result.keys()
    assert {"layer", "style", "knowledge"} <= result["scores"][0].keys()
    page = (tmp_path / "plan.html").read_text()
    assert result["finding"] in html.unescape(page) and "random, same size" in page


@pytest.mark.parametrize("graft", [False, True])
def test_a_plan_that_was_killed_goes_on_to_the_same_end(pair, tmp_path, graft):
    """Stopped at several places, and with a line of the journal cut in two, it measures nothing twice."""
    options = {"chats": pair.chats, "text": pair.text, "draws": 2, "budget": 0.4, "journal": tmp_path / "journal"}
    if graft:
        options |= {"onto": pair.onto, "replies": False, "cost": 0.05}
    whole = lapis.plan(pair.base, pair.chat, **{**options, "journal": None})
    journal = options["journal"]
    for stop in (3, 20, 40):
        spent = []

        def watch(what, done, total, spent=spent, stop=stop):
            spent.append(done)
            if what == "measuring" and len(spent) > stop + 50 * graft:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            lapis.plan(pair.base, pair.chat, **options, progress=watch)
        with journal.open("ab") as file:
            file.write(b'{"key": "cut in t')
    messages = []
    again = lapis.plan(pair.base, pair.chat, **options, report=messages.append)
    assert any("going on" in line for line in messages) and not journal.exists()
    same = {key: value for key, value in whole.to_json().items() if key not in ("seconds", "passes")}
    assert {key: again.to_json()[key] for key in same} == same


def test_the_journal_of_another_plan_is_not_gone_on_with(pair, tmp_path):
    def stop(what, done, total):
        if what == "measuring" and done > 10:
            raise KeyboardInterrupt

    options = {"chats": pair.chats, "text": pair.text, "draws": 1, "journal": tmp_path / "journal"}
    with pytest.raises(KeyboardInterrupt):
        lapis.plan(pair.base, pair.chat, **options, progress=stop)
    messages = []
    lapis.plan(pair.base, pair.chat, **options, seed=1, report=messages.append)
    assert not any("going on" in line for line in messages)


def test_what_a_plan_costs_is_said_before_it_is_spent(pair):
    events: list[Any] = []
    plan = lapis.plan(
        pair.base, pair.chat, chats=pair.chats, text=pair.text, draws=3, report=events.append,
        progress=lambda what, done, total: events.append(done) if what == "measuring" else None,
    )  # fmt: skip
    assert "forward passes over" in events[0] and f"{plan.tokens['chats']:,} of chats" in events[0]
    announced = float(events[0].split("about ")[1].split(" ")[0])
    assert announced == pytest.approx(plan.passes, rel=0.1)
    assert any("a pass takes" in str(event) for event in events[:8])


def test_the_choice_is_compared_with_several_random_ones(outcome):
    assert len(outcome.controls) == 8 and len({row["seed"] for row in outcome.controls}) == 8
    styles = [row["style"] for row in outcome.controls]
    assert f"({min(styles):.0%} to {max(styles):.0%})" in outcome.finding() and "8 random choices" in outcome.finding()
    assert outcome.measured["control"]["style"] == styles[0]
    for style in styles:  # one piece is planted, the others bring nothing
        assert style == pytest.approx(1.0, abs=1e-6) or style == pytest.approx(0.0, abs=1e-6)
    lucky = sum(style > 0.99 for style in styles)
    assert ("better than all of these" in outcome.finding()) == (lucky == 0)
    assert (f"better than {8 - lucky} of 8: it may be no better than chance" in outcome.finding()) == (lucky > 0)


def test_text_that_gets_easier_is_said_to_get_easier(outcome):
    outcome = replace(
        outcome, measured={**outcome.measured, "chosen": {**outcome.measured["chosen"], "knowledge": -0.008}}
    )
    assert "plain text gets 0.8% easier" in outcome.finding() and "-0.8" not in outcome.finding()
    outcome.measured["chosen"]["knowledge"] = 0.012
    assert "plain text gets 1.2% harder" in outcome.finding()


def test_what_is_said_of_the_templates_rows_was_measured(pair, outcome):
    plan = lapis.plan(pair.base, pair.chat, budget=0.3)
    base, chat = (lapis.load(folder)[0].embed.weight.detach() for folder in (pair.base, pair.chat))
    rows = {row["token"]: row for row in plan.template_rows}
    assert set(rows) == {"<|im_start|>", "<|im_end|>"}
    for token, row in rows.items():
        i = pair.tokenizer.id(token)
        assert row["in_base"]
        assert row["moved"] == pytest.approx(float((chat[i] - base[i]).norm() / base[i].norm()), rel=1e-6)
    assert any("<|im_end|>: chat moved its row by" in line for line in plan.template_findings())
    # where only an MLP was tuned, chat has the rows that base has, and that is what is said
    assert all(line.endswith("chat's row is the one that base has") for line in outcome.template_findings())
    assert not any("never" in line for line in [*plan.template_findings(), *plan.notes, plan.finding()])


def test_the_options_of_python_and_of_the_command_are_the_same():
    parameters = inspect.signature(lapis.plan).parameters
    for field in fields(PlanOptions):
        assert parameters[field.name].default == field.default, field.name
    models = {"base", "chat", "chats", "text", "choices", "onto", "progress", "report", "journal"}
    assert set(parameters) == {field.name for field in fields(PlanOptions)} | models


def test_python_gives_picture_table_and_page(outcome):
    assert len(outcome.plot().data) >= 1
    assert "1.mlp" in outcome.to_html()
    assert list(outcome.to_pandas()["layer"])[:2] == ["0.attn", "0.mlp"]


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"budget": 0.0}, ConfigError, "budget is 0; it is a share"),
        ({"budget": 1.5}, ConfigError, "budget is 1.5"),
        ({"budget": 0.001}, ConfigError, "the smallest piece has"),
        ({"goal": "looks"}, ConfigError, 'goal is "looks"'),
        ({"chats": "absent.jsonl"}, DataError, "absent.jsonl"),
        ({"text": "empty.txt"}, DataError, "empty.txt"),
        ({"onto": "base"}, ConfigError, "with onto give both"),
        ({"chat": "base"}, CheckpointError, "the same in every layer"),
        ({"chat": "wider"}, CheckpointError, "dim is 24 in .* and 32 in"),
        ({"base": "chat", "chat": "base"}, DataError, "no likelier than base"),
    ],
)
def test_bad_input_gets_one_clear_line(pair, tmp_path, options, error, words):
    if options.get("chat") == "wider":
        shape = ModelConfig(dim=32, ffn_dim=32, family="qwen2", bias="qkv", layers=3, heads=2, kv_heads=1, tied=True,
                            vocab=pair.tokenizer.rows, context=64)  # fmt: skip
        options = {"chat": pair.write(Transformer(shape), pair.tokenizer, tmp_path / "wider")}
    (tmp_path / "empty.txt").write_text("")
    known = {"base": pair.base, "chat": pair.chat, "empty.txt": tmp_path / "empty.txt"}
    settings = {"base": pair.base, "chat": pair.chat}
    if "onto" not in options:
        settings |= {"chats": pair.chats, "text": pair.text}
    settings |= {key: known.get(value, value) for key, value in options.items()}
    with pytest.raises(error, match=words) as caught:
        lapis.plan(**settings, journal=tmp_path / "journal")
    assert "\n" not in str(caught.value) and not (tmp_path / "journal").exists()


@pytest.mark.parametrize("stranger", ["chat", "onto"])
def test_strangers_are_refused_unless_allowed(pair, tmp_path, stranger):
    """The difference of unrelated models means nothing, whichever of the two it is."""
    torch.manual_seed(1)
    other = pair.write(Transformer(read_config(pair.base)), pair.tokenizer, tmp_path / "other")
    settings = {"base": pair.base, "chat": pair.chat, "chats": pair.chats, "text": pair.text, stranger: other}
    with pytest.raises(
        CheckpointError, match=f"plan: {stranger} is no fine-tune of base: the cosine of their"
    ) as caught:
        lapis.plan(**settings)
    assert "--allow-unrelated" in str(caught.value) and "\n" not in str(caught.value)
    if stranger == "chat":
        result = lapis.plan(pair.base, other, allow_unrelated=True)
        assert any("is no fine-tune of base" in note and "allow-unrelated" in note for note in result.notes)


def test_sigterm_keeps_what_was_measured_and_says_so(pair, tmp_path, monkeypatch, capsys):
    command = [
        "plan", "--base", str(pair.base), "--chat", str(pair.chat), "--chats", str(pair.chats), "--budget", "0.5",
        "--draws", "1", "--no-replies", "--out", str(tmp_path / "plan.yaml"),
    ]  # fmt: skip
    add = PlanJournal.add

    def stop_after_three(self, *messages):
        add(self, *messages)
        if len(self.lines) == 3:
            os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(PlanJournal, "add", stop_after_three)
        with pytest.raises(SystemExit) as end:
            main(command)
    assert end.value.code == 128 + signal.SIGTERM
    assert "plan: what was measured is kept; the same command goes on from there" in capsys.readouterr().err
    main(command)
    assert "going on: 3 measurements are there already" in capsys.readouterr().err
    assert (tmp_path / "plan.yaml").is_file() and not (tmp_path / ".plan.yaml.journal").exists()
