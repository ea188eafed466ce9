"""The flow of an adaptation: every step once, again when what it read changed, and nothing that was edited is lost."""

import json
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from lapis.errors import CheckpointError, ConfigError, DataError, LapisError, OutputError
from lapis.language.adapt import adapt
from lapis.language.card.naming import share_in_language
from lapis.language.card.readme import readme
from lapis.language.plan import AdaptPlan, read_plan
from lapis.language.replay import draw_texts
from lapis.language.steps import Steps
from lapis.language.training import machine
from lapis.model.check import read_config
from lapis.model.load import load
from lapis.model.size import activation_bytes, measure
from lapis.report.pages.card import card_page
from lapis.text.tokenizer.extend import ExtendableTokenizer, changed_share
from lapis.text.tokenizer.tokenizer import Tokenizer
from lapis.training.loop.progress import Silent
from lapis.training.optim.optimizers import Average
from lapis.training.run import read_settings
from lapis.training.run import run as train

from .conftest import ENGLISH, MALAY, STEP, SUBJECTS, TINY, make, write


def times(out: Path) -> dict[str, int]:
    return {step.name: step.stat().st_mtime_ns for step in out.iterdir() if step.is_dir()}


def test_every_step_is_made_once_and_the_card_tells(plan: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    result = adapt(plan())
    out = tmp_path / "out"
    names = ["measure", "tokenizer", "start", "embedded", "adapted", "calibrated", "grafted", "card"]
    assert list(result["steps"]) == names
    assert all((out / name / "lapis-manifest.json").is_file() for name in names)
    assert list(result["scores"]) == ["base", "chat", "start", "embedded", "adapted", "calibrated", "grafted"]
    for scores in result["scores"].values():
        assert set(scores) == {"target", "replay"}
        for figure in scores["target"].values():
            low, high = figure["interval"]
            assert low <= figure["value"] <= high and figure["n"] >= 3
    target = result["scores"]["grafted"]["target"]
    assert set(target) == {
        "bits_per_byte", "tokens_per_byte", "characters_per_second", "response_nll", "response_bits_per_byte",
        "stop_rate", "in_language",
    }  # fmt: skip
    before, after = (result["scores"][name]["target"]["bits_per_byte"]["value"] for name in ("base", "grafted"))
    assert result["won"] == pytest.approx(1 - after / before)
    before, after = (result["scores"][name]["replay"]["bits_per_byte"]["value"] for name in ("base", "grafted"))
    assert result["cost"] == pytest.approx(after / before - 1)
    assert Tokenizer.open(out / "adapted").rows == 340 == load(out / "grafted").config.vocab

    base, start, embedded, adapted, again = (load(Path(p), torch.float32).state_dict() for p in (
        plan()["base"], out / "start", out / "embedded", out / "adapted", out / "calibrated"))  # fmt: skip
    assert all(again[name][: 300 if "embed" in name else None].equal(adapted[name][: 300 if "embed" in name else None])
               for name in adapted)  # fmt: skip
    old = {name: (a.equal(b[:300] if "embed" in name else b)) for name, a in base.items() for b in [embedded[name]]}
    assert all(old.values())  # rows of new tokens alone were trained
    assert not start["embed.weight"][300:].equal(embedded["embed.weight"][300:])
    assert adapted["embed.weight"][:300].equal(base["embed.weight"])  # old rows stay, all else is trained
    assert not adapted["embed.weight"][300:].equal(embedded["embed.weight"][300:])
    assert not any(adapted[name].equal(embedded[name]) for name in adapted if "embed" not in name)

    seen = times(out)
    assert adapt(plan())["scores"] == result["scores"]
    assert times(out) == seen

    remarks: list[str] = []
    adapt(plan(scale=0.5), note=remarks.append)
    redone = {name for name, changed in times(out).items() if changed != seen[name]}
    assert redone == {"grafted", "card", ".steps"}


@pytest.mark.parametrize("old_rows", [False, True])
def test_rows_of_old_tokens_are_trained_where_the_plan_says_so(
    plan: Callable[..., dict[str, Any]], tmp_path: Path, old_rows: bool
) -> None:
    base = make(tmp_path / "untied", 0, tied=False)
    out = Path(adapt(plan(base=str(base), chat=None, card=False, old_rows=old_rows))["steps"]["adapted"])
    before, after = (load(path, torch.float32).state_dict() for path in (base, out))
    assert {"embed.weight", "head.weight"} <= {*before}
    for name in ("embed.weight", "head.weight"):
        assert after[name][:300].equal(before[name]) is not old_rows
    assert not any(after[name].equal(before[name]) for name in before if name not in ("embed.weight", "head.weight"))


def test_every_new_row_is_trained(plan: Callable[..., dict[str, Any]]) -> None:
    steps = adapt(plan(chat=None, card=False, vocab=60, replay_share=0.25, calibrate_again=False))["steps"]
    rows = [load(steps[name], torch.float32).embed.weight for name in ("start", "embedded", "adapted")]
    for before, after in pairwise(rows):
        assert [i for i in range(360) if not torch.equal(before[i], after[i])] == list(range(300, 360))


def test_a_step_that_was_edited_is_refused(plan: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    settings = plan(chat=None, vocab=0, card=False)
    adapt(settings)
    config = tmp_path / "out" / "adapted" / "config.json"
    config.write_text(config.read_text() + " ")
    with pytest.raises(OutputError, match=r"adapted: config.json was changed.*made again"):
        adapt(settings)
    assert config.read_text().endswith(" ")


def test_without_new_tokens_the_base_is_trained_as_it_is(plan: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    few = str(write(tmp_path / "few.jsonl", MALAY[:30]))  # so little text carries nothing
    result = adapt(plan(chat=None, vocab="auto", chats=[], text=[few]))
    assert list(result["steps"]) == ["measure", "adapted", "card"]
    reason = json.loads((tmp_path / "out" / "measure" / "fertility.json").read_text())["recommendation"]["reason"]
    assert "do not extend" in reason
    card = json.loads((tmp_path / "out" / "card" / "card.json").read_text())
    head = yaml.safe_load(readme(card).split("---")[1])
    assert head["language"] == ["ms", "en"] and "base_model" not in head  # which no folder of this machine is
    assert (tmp_path / "out" / "card" / "index.html").read_text() == card_page(card).render()


def test_what_cannot_be_is_refused_before_anything_is_done(plan: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    stranger = make(tmp_path / "stranger", 9)
    for changes, error, text in (
        ({"replay": plan()["text"]}, DataError, "100% of the replay documents"),
        ({"text": [str(tmp_path / "nothing")]}, DataError, "nothing"),
        ({"chat": str(stranger)}, CheckpointError, "no fine-tune of base"),
        ({"base": str(tmp_path / "nowhere")}, CheckpointError, "nowhere"),
        ({"replay_share": 1.0}, ConfigError, "replay_share"),
        ({"vocab": -1}, ConfigError, "vocab is -1"),
        ({"speed": 3}, ConfigError, "speed"),
        ({"cost": -0.1}, ConfigError, "cost is -0.1"),
        ({"merge_back": 1.0}, ConfigError, "merge_back"),
        ({"train": {"lr": 1e-3}}, ConfigError, "train: lr is settled by lr and rows_lr of the plan"),
        ({"train": {"steps": 5}}, ConfigError, "train: steps is settled by tokens of the plan"),
        ({"train": {"warmpu": 3}}, ConfigError, 'adapt: train: unknown key "warmpu"; did you mean "warmup"'),
        ({"train": {"warmup": -1}}, ConfigError, "warmup is -1"),
        ({"train": {"threads": "all"}}, ConfigError, "threads"),
        ({"train": {"early_stop": 2, "eval_every": 0}}, ConfigError, "early_stop and best need eval_every"),
        ({"train": {"accumulate": 3}}, ConfigError, "batch 4 does not divide into accumulate 3"),
        ({"train": {"tune": ["atn"]}}, ConfigError, "atn"),
        ({"train": {"plan": "nowhere.yaml"}}, ConfigError, "train: plan says what is trained, and so does adapt"),
        ({"train": {"plan": "nowhere.yaml"}, "vocab": 0}, LapisError, "nowhere.yaml"),
        ({"train": {"best": True, "watch_metric": "target/loss"}}, ConfigError, "watch_metric is"),
        ({"train": {"field": "body"}}, ConfigError, "train: field is settled by text and replay of the plan"),
        ({"train": {"device": "cuda:99", "accumulate": 1}}, ConfigError, "device is"),
        ({"train": {"lora": {"rank": 4}}}, ConfigError, "train: lora makes an adapter, which gains no tokens"),
        ({"train": {"lora": {"rnk": 4}}, "vocab": 0, "chat": None}, ConfigError, "rnk"),
        ({"train": {"lora": {"tokens": ["<a>"]}}, "vocab": 0, "chat": None}, ConfigError, '"<a>" is no token'),
    ):
        with pytest.raises(error, match=text):
            adapt(plan(**changes))
        assert not (tmp_path / "out" / "measure").exists()
    (tmp_path / "out").mkdir(exist_ok=True)
    (tmp_path / "out" / "mine.txt").write_text("mine")
    with pytest.raises(OutputError, match="no adaptation"):
        adapt(plan())


def test_a_dry_run_writes_a_plan_that_can_be_run(
    plan: Callable[..., dict[str, Any]], tmp_path: Path, run: Callable[..., tuple[int, str, str]]
) -> None:
    settings = plan(chat=None, vocab=0, chats=[])
    options = [f"--{key}={settings[key]}" for key in ("base", "out", "vocab")]
    options += ["--text", settings["text"][0], "--replay", settings["replay"][0], "--dry-run", "--json"]
    options += ["train.warmup=3", "--lr", "5e-5"]
    for first in ("rows_lr=2e-3", f"base={settings['base']}"):  # settings need no file, and may hold a path
        status, output, error = run("adapt", first, *options, "rows_lr=2e-3")
        assert status == 0, error
    assert list(json.loads(output)["steps"]) == ["measure", "adapted", "card"]
    written = yaml.safe_load((tmp_path / "out" / "plan.yaml").read_text())
    given = {key: settings[key] for key in ("base", "out", "vocab", "text", "replay")}
    assert read_plan(written) == read_plan({**given, "rows_lr": 2e-3, "train": {"warmup": 3}, "lr": 5e-5})
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["plan.yaml"]


def steps_of(folder: Path) -> int:
    return int(json.loads((folder / "training.json").read_text())["steps"])


def test_fault_60_killed_while_its_plan_is_written_it_goes_on(
    plan: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    """What a kill then leaves is no reason to refuse the folder; what else lies in it is."""
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / ".plan.yaml.lapis-0123456789abcdef").write_text("base: hal")
    adapt(plan(), dry_run=True)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["plan.yaml"]
    (tmp_path / "out" / "plan.yaml").rename(tmp_path / "out" / "mine.yaml")
    with pytest.raises(OutputError, match="is no adaptation"):
        adapt(plan(), dry_run=True)


def test_how_much_is_trained_is_counted_in_tokens(plan: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    out, remarks = tmp_path / "out", list[str]()
    settings = plan(chat=None, card=False, embedded=0.25)
    adapt(settings, note=remarks.append)
    assert [steps_of(out / name) for name in ("embedded", "adapted")] == [3, 9]
    measured = read_plan(yaml.safe_load((out / "plan.yaml").read_text()))
    speed, length = measured.tokens_per_second, measured.time_of(0.25, 0.75)
    assert speed and length and f"training: {12 * STEP:,} tokens, {length}" in remarks

    seen = times(out)
    adapt(settings)  # measured no second time
    assert yaml.safe_load((out / "plan.yaml").read_text())["tokens_per_second"] == speed
    written = {**yaml.safe_load((out / "plan.yaml").read_text()), "minutes": 1.0, "tokens_per_second": 8 * STEP / 60}
    adapt(written)
    assert [steps_of(out / name) for name in ("embedded", "adapted")] == [2, 6]
    adapt({**settings, "minutes": 1.0})  # goes by what is in the folder's plan
    assert [steps_of(out / name) for name in ("embedded", "adapted")] == [2, 6]
    assert times(out)["start"] == seen["start"]


def test_a_step_is_computed_in_parts_that_have_room(
    plan: Callable[..., dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = plan(chat=None, card=False, vocab=0, batch=4)
    config = read_config(settings["base"])
    held, row = 16 * measure(config).total, activation_bytes(config, settings["context"], 4)

    def chosen(free: int, **more: Any) -> Any:
        monkeypatch.setattr(machine, "available", lambda device: free)
        adapt({**settings, **more})
        return yaml.safe_load((tmp_path / "out" / "plan.yaml").read_text())["train"].get("accumulate")

    assert chosen(2 * (held + 3 * row)) == 2  # two rows of four; three are no equal part
    seen = times(tmp_path / "out")
    assert chosen(2 * (held + 9 * row)) == 2 and times(tmp_path / "out") == seen  # as it began
    assert chosen(1, train={"accumulate": 1}) == 1
    assert chosen(1, train={"checkpointing": "whole"}) is None
    assert chosen(1, batch=2) == 2  # a row alone, however little is free


def test_measures_of_another_model_are_made_again(plan: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    """A plan.yaml holds what was found out, so that going on with it is the same run; with another model it is not."""
    settings = plan(chat=None, vocab=0, minutes=1.0, train={**TINY, "accumulate": 4}, tokens_per_second=1000.0)
    adapt(settings, dry_run=True)
    remarks: list[str] = []
    adapt({**settings, "batch": 6}, dry_run=True, note=remarks.append)  # does not divide into 4 parts
    written = yaml.safe_load((tmp_path / "out" / "plan.yaml").read_text())
    assert "accumulate" not in written["train"] and written["tokens_per_second"] == 1000.0
    assert "accumulate: batch 6 does not divide into 4 parts; the number is chosen anew" in remarks
    adapt({**settings, "base": plan()["chat"]}, dry_run=True, note=remarks.append)
    written = yaml.safe_load((tmp_path / "out" / "plan.yaml").read_text())
    assert written["tokens_per_second"] is None
    assert "tokens_per_second: 1,000 is of another model; it is measured anew" in remarks


def test_minutes_are_tokens_at_the_measured_speed() -> None:
    plan = AdaptPlan("b", ("t",), "o", minutes=2.0, tokens_per_second=100.0, batch=4, context=50)
    assert plan.trained_tokens == 12_000 and plan.steps(0.25, 50) == 15 and plan.steps(1e-9, 50) == 1
    assert AdaptPlan("b", ("t",), "o", tokens=5, tokens_per_second=100.0).trained_tokens == 5


def test_what_is_found_out_on_the_way_is_told(plan: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    """That marks are cut from letters, that the text carries no more tokens, how much of the replay text changes."""
    hindi = "हिन्दी भाषा में लिखी हुई किताबें पढ़ना अच्छा है"
    text = str(write(tmp_path / "both.jsonl", [*MALAY, *[f"{hindi} {word}" for word in SUBJECTS * 5]]))
    remarks: list[str] = []
    adapt(plan(text=[text], chat=None, card=False, tokens=128, language=""), note=remarks.append)
    written = json.loads((tmp_path / "out" / "measure" / "fertility.json").read_text())
    assert [f"measure: {note}" for note in written["notes"]] == [r for r in remarks if r.startswith("measure: ")][-2:]
    assert any(r.startswith("measure: the text carries ") for r in remarks)
    assert any(r.startswith("measure: the tokenizer's splitting cuts ") for r in remarks)
    base = ExtendableTokenizer.open(Path(plan()["base"]))
    grown = base.extended(base.read_extension(tmp_path / "out" / "tokenizer"))
    replay = [json.loads(line)["text"] for line in (tmp_path / "out" / "measure" / "replay.jsonl").open()]
    share = changed_share(base.backend, grown, replay)
    assert share > 0
    assert f"tokenizer: {share:.2%} of the replay text's characters are in other tokens than before" in remarks
    alone: list[str] = []
    adapt(plan(chat=None, card=False, tokens=128, replay=[], out=str(tmp_path / "alone")), note=alone.append)
    assert not any("replay text" in remark for remark in alone)


def test_a_scale_is_refused_where_nothing_is_grafted(plan: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    for changes, line in (
        ({"onto": "chat", "scale": 0.5}, "adapt: scale is 0.5, and onto: chat grafts nothing; leave scale out"),
        ({"onto": "chat", "scale": "plan"}, "adapt: scale is plan, and onto: chat grafts nothing; leave scale out"),
        ({"chat": None, "scale": "attn=1"}, "adapt: scale is attn=1, and a plan without chat grafts nothing; "),
    ):
        with pytest.raises(ConfigError, match=line):
            adapt(plan(**changes))
    for changes in ({"onto": "chat"}, {"chat": None}, {"chat": None, "scale": 1.0}):  # as plan.yaml has it by default
        adapt(plan(**changes, out=str(tmp_path / f"out-{'-'.join(changes)}")), dry_run=True)


def test_the_time_that_is_told_counts_evaluations() -> None:
    """Each reads the held-out text of each language, at a third of what a trained token costs."""
    how: dict[str, Any] = {"tokens": 60_000, "tokens_per_second": 10.0, "scored": 2_400, "batch": 2, "context": 100}
    told = "about {:.0f} minutes at 10 tokens a second, evaluations included"
    both = AdaptPlan("b", ("t",), "o", ("r",), vocab=0, **how)  # 300 steps, measured every 30 on 600 tokens of each
    assert both.time_of(1) == told.format((60_000 + 11 * 2 * 600 / 3) / 10 / 60)  # the start, from which `cost` counts
    assert replace(both, replay=()).time_of(1) == told.format((60_000 + 10 * 600 / 3) / 10 / 60)
    assert replace(both, train={"eval_every": 0}).time_of(1) == told.format((60_000 + 2 * 600 / 3) / 10 / 60)
    assert replace(both, train={"eval_every": 7}).time_of(1) == told.format((60_000 + 44 * 2 * 600 / 3) / 10 / 60)
    assert both.time_of(0.5) == told.format((30_000 + 11 * 2 * 600 / 3) / 10 / 60)  # as often in half the steps
    assert both.time_of(0.5, 0.5) == told.format((60_000 + 22 * 2 * 600 / 3) / 10 / 60)  # of two trainings
    assert AdaptPlan("b", ("t",), "o").time_of(1) == ""
    assert replace(both, tokens=150).tokens_of(0.5, 0.5) == 2 * 2 * 100  # whole steps, of which each takes one
    assert replace(both, tokens_per_second=1000.0).time_of(1).startswith("about 1 minute at 1,000 tokens")
    assert replace(both, tokens_per_second=1e4).time_of(1).startswith("less than a minute at 10,000 tokens")


def test_merged_back_is_between_both(plan: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    result = adapt(plan(merge_back=0.25, ema=0.5, scale="attn=0.5,mlp=0", card=False, calibrate_again=False))
    names = ["measure", "tokenizer", "start", "embedded", "adapted", "merged", "grafted"]
    assert list(result["steps"]) == names and "scores" not in result
    assert json.loads((tmp_path / "out" / "adapted" / "training.json").read_text())["config"]["ema"] == 0.5
    before, after, merged = (
        load(tmp_path / "out" / name, torch.float32).state_dict() for name in ("embedded", "adapted", "merged")
    )
    for name in merged:
        expected = 0.75 * after[name].double() + 0.25 * before[name].double()
        assert torch.allclose(merged[name].double(), expected, rtol=1e-6, atol=1e-7), name
    config = json.loads((tmp_path / "out" / "grafted" / "lapis-merge.json").read_text())
    assert "merged" in json.dumps(config["inputs"]) and len(config["recipe"]["scale"]["scales"]) == 2


def test_training_ends_where_the_replay_text_costs(plan: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    out, remarks = tmp_path / "out", list[str]()
    settings = plan(chat=None, card=False, vocab=0, cost=1e-4, lr=3e-2, replay_share=0.0, tokens=40 * STEP)
    adapt(settings, note=remarks.append)
    facts = json.loads((out / "adapted" / "training.json").read_text())
    bits = json.loads((out / "measure" / "base.json").read_text())["replay/bits_per_byte"]
    assert facts["config"]["limits"] == {"replay/bits_per_byte": round(bits * 1.0001, 6)}
    assert facts["start"]["replay/bits_per_byte"] == pytest.approx(bits, rel=1e-6)  # counted in the same way
    rows = [json.loads(line) for line in (out / "adapted" / "log.jsonl").read_text().splitlines()]
    measured = [row["held_out"] for row in rows if "held_out" in row]
    assert facts["steps"] < 40 and set(measured[0]) == {"target/bits_per_byte", "replay/bits_per_byte"}
    assert measured[-1]["replay/bits_per_byte"] > bits * 1.0001 >= facts["held_out"]["replay/bits_per_byte"]
    assert f"adapted: {facts['ended']}" in remarks


def test_replay_text_may_be_the_models_own(plan: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    settings = plan(chat=None, chats=[], replay=["self"], tokens=24 * STEP)
    result = adapt(settings)
    assert not (tmp_path / "out" / "measure" / "base.json").exists()  # there was no replay text to measure yet
    out = tmp_path / "out"
    assert list(result["steps"])[:2] == ["measure", "replay"] and result["cost"] is not None
    texts = [json.loads(line)["text"] for line in (out / "replay" / "replay.jsonl").read_text().splitlines()]
    assert len(texts) > 20 and len(set(texts)) > 20
    again = [drawn.text for drawn in draw_texts(settings["base"], 300, 0)]
    few = len(again) // 10 or 1
    assert again[few] in texts  # the same seed draws the same
    tokenizer = Tokenizer.open(settings["base"])
    special = set(tokenizer.encode(again[0], special=True)) & set(tokenizer.added)
    assert tokenizer.chat_template and len(special) >= 2  # a chat as the template writes it
    held = json.loads((out / "replay" / "replay.held.jsonl").read_text().splitlines()[0])["text"]
    assert not set(tokenizer.encode(held, special=True)) & special
    assert json.loads((out / "adapted" / "training.json").read_text())["data"].keys() == {
        str(out / "measure" / "text.jsonl"), str(out / "replay" / "replay.jsonl")}  # fmt: skip
    seen = times(out)
    adapt({**settings, "lr": 2e-4, "card": False})
    assert times(out)["replay"] == seen["replay"]


def test_a_model_without_a_template_draws_plain_text(tmp_path: Path) -> None:
    base = make(tmp_path / "base", 0)
    for path in [*base.glob("*.jinja"), *(base / "additional_chat_templates").glob("*")]:
        path.unlink()
    config = json.loads((base / "tokenizer_config.json").read_text())
    (base / "tokenizer_config.json").write_text(json.dumps({k: v for k, v in config.items() if k != "chat_template"}))
    assert Tokenizer.open(base).chat_template is None
    one, same, other = (draw_texts(base, 900, seed) for seed in (1, 1, 2))
    assert one == same and one != other and sum(drawn.tokens for drawn in one) >= 900
    assert all(drawn.text == drawn.plain and "\0" not in drawn.text for drawn in one)


def test_a_chat_model_is_trained_and_gets_back_what_it_lost(
    plan: Callable[..., dict[str, Any]], tmp_path: Path, run: Callable[..., tuple[int, str, str]]
) -> None:
    out = tmp_path / "out"
    result = adapt(plan(onto="chat", merge_back=0.25, old_rows=True, chats=[], calibrate_again=False))
    names = ["measure", "tokenizer", "start", "embedded", "adapted", "merged", "restored", "card"]
    assert list(result["steps"]) == names and list(result["scores"])[:3] == ["base", "chat", "start"]
    start, before, after, merged, restored = (
        load(out / name, torch.float32).state_dict() for name in ("start", "embedded", "adapted", "merged", "restored")
    )
    chat = load(plan()["chat"], torch.float32).state_dict()
    assert all(chat[name].equal(start[name][:300] if "embed" in name else start[name]) for name in chat)
    tokens = json.loads((out / "restored" / "lapis-merge.json").read_text())["vocabulary"]["template_tokens"]
    words = Tokenizer.open(out / "restored")
    rows = [words.id(token) for token in tokens]
    assert len(rows) >= 2
    for name in merged:
        expected = 0.75 * after[name].double() + 0.25 * before[name].double()
        assert torch.allclose(merged[name].double(), expected, rtol=1e-6, atol=1e-7), name
        if "embed" in name:  # the template's rows are chat's
            assert restored[name][rows].equal(chat[name][rows]) and not merged[name][rows].equal(chat[name][rows])
            others = [row for row in range(340) if row not in rows]
            assert restored[name][others].equal(merged[name][others])
        else:
            assert restored[name].equal(merged[name])
    assert words.chat_template == Tokenizer.open(plan()["chat"]).chat_template

    other = adapt(plan(out=str(tmp_path / "other"), vocab=0, chats=[]))  # the other way, and both in one table
    status, output, error = run("card", tmp_path / "other", out / "restored", "--json", "--out", tmp_path / "both")
    assert status == 0, error
    scores = json.loads(output)["scores"]
    assert {"base", "chat", "grafted", "restored"} <= set(scores)
    for name, mine in (("grafted", other), ("restored", result)):
        figure, same = (each[name]["target"]["bits_per_byte"]["value"] for each in (scores, mine["scores"]))
        assert figure == pytest.approx(same, rel=1e-6)
    with pytest.raises(ConfigError, match="chat is missing; onto: chat"):
        adapt(plan(onto="chat", chat=None))


def test_scales_are_learned_on_replies_to_the_language(plan: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    out, talks = tmp_path / "out", tmp_path / "talks.jsonl"
    turn = {"role": "assistant", "content": "The old dog stands by the river."}
    lines = [json.dumps({"messages": [{"role": "user", "content": text[:9]}, turn]}) for text in ENGLISH[:64]]
    talks.write_text("\n".join(lines) + "\n")
    how = {"objective": "chat", "data": str(talks), "model": plan()["base"], "context": 48, "batch": 8, "steps": 150}
    train(read_settings({**how, "lr": 3e-3, "out": str(tmp_path / "talks"), **TINY}, "test"), watch=Silent())
    settings = plan(scale="plan", vocab=0, card=False, cost=0.2, chat=str(tmp_path / "talks"))
    assert list(adapt(settings)["steps"])[-2:] == ["planned", "grafted"]
    chats = [json.loads(line) for line in (out / "planned" / "chats.jsonl").read_text().splitlines()]
    assert 32 < len(chats) <= 64 and all(chat["messages"][0]["content"] in "".join(MALAY) for chat in chats)
    learned = json.loads((out / "grafted" / "lapis-merge.json").read_text())["recipe"]["scale"]
    written = yaml.safe_load((out / "planned" / "plan.yaml").read_text())
    assert written["scales"] and len(learned["scales"]) == len(written["scales"])
    seen = times(out)
    adapt(settings)
    assert times(out) == seen
    with pytest.raises(ConfigError, match="chat is missing; onto: chat and scale: plan"):
        adapt({**settings, "chat": None})


class StopError(Exception):
    pass


def test_an_adaptation_goes_on_with_the_same_bytes(
    plan: Callable[..., dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    how = {"train": {**TINY, "save_every": 1}, "ema": 0.5, "merge_back": 0.25, "cost": 1e-4, "lr": 3e-3,
           "replay_share": 0.0, "card": False, "tokens_per_second": 100.0}  # fmt: skip
    update = Average.update

    def stopped(self: Average, step: int) -> None:
        if step == 3:
            raise StopError
        update(self, step)

    for name in ("whole", "killed"):
        settings = plan(**how, out=str(tmp_path / name))
        if name == "killed":
            with monkeypatch.context() as patch, pytest.raises(StopError):
                patch.setattr(Average, "update", stopped)
                adapt(settings)
        adapt(settings)
    for step in ("adapted", "merged", "grafted"):
        one, other = (tmp_path / name / step / "model.safetensors" for name in ("whole", "killed"))
        assert one.read_bytes() == other.read_bytes(), step
    assert json.loads((tmp_path / "killed" / "adapted" / "training.json").read_text())["start"]


def test_steps_go_on_where_they_were_stopped(tmp_path: Path) -> None:
    made: list[str] = []

    def make_step(folder: Path, overwrite: bool) -> None:
        made.append(folder.name)
        if overwrite:
            (folder / "file").write_text("second")
            return
        folder.mkdir(parents=True)
        (folder / "file").write_text("first")

    def stop(folder: Path, overwrite: bool) -> None:
        raise KeyboardInterrupt

    for after in ({"a": 1}, {"a": 2}):  # a first time, and while an older one is replaced
        with pytest.raises(KeyboardInterrupt):
            Steps(tmp_path).run("one", after, [], stop)
        Steps(tmp_path).run("one", after, [], make_step)
        Steps(tmp_path).run("one", after, [], stop)  # done: not called
    assert made == ["one", "one"] and (tmp_path / "one" / "file").read_text() == "second"
    note = tmp_path / ".steps" / "one.json"
    written = json.loads(note.read_text())
    note.write_text(json.dumps({**written, "stamps": None, "replaces": {"file": [1, 1]}}))
    Steps(tmp_path).run("one", {"a": 2}, [], stop)  # whole already, only its note was lacking
    (tmp_path / "two").mkdir()
    with pytest.raises(OutputError, match="no step of this adaptation"):
        Steps(tmp_path).run("two", {}, [], make_step)


def test_text_of_another_language_is_told() -> None:
    assert share_in_language("ms", MALAY[:50]) > 0.8
    assert share_in_language("ms", ENGLISH[:50]) < 0.2
    assert share_in_language("ko", [*MALAY[:15], *["나는 오늘 학교에서 밥을 먹었습니다."] * 5]) == 0.25
