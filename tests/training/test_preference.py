"""The preference objectives in the loop: one forward pass, a reference that is kept, resume, and what is refused."""

import copy
import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import lapis
from lapis.cli.main import main
from lapis.errors import ConfigError, DataError, LapisError, TrainingError
from lapis.evaluation.preference import calibration_error, pair_figures, score_pairs
from lapis.evaluation.replies import collate, log_probabilities, reply_log_probabilities, reply_rewards, rewards
from lapis.model import lora
from lapis.model.load import load, save
from lapis.model.transformer import Transformer, put_head
from lapis.text.corpus.pairs import Pair
from lapis.text.rows.pair_rows import Paired
from lapis.text.tokenizer.tokenizer import Tokenizer
from lapis.training.config import TrainConfig
from lapis.training.loop.loop import train
from lapis.training.loop.progress import Silent
from lapis.training.objectives import objective_class, options
from lapis.training.objectives.preference.losses import (
    dpo_loss,
    ipo_loss,
    kto_loss,
    log1mexp,
    orpo_loss,
    simpo_loss,
)
from lapis.training.objectives.preference.preference import DPO, KTO, Reward
from lapis.training.objectives.reference import weights_cosine
from lapis.training.run import read_settings, run

NewModel = Callable[[], Transformer]


def said(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


PAIRS = [
    Pair([said("user", f"Where does cat {i} sleep?" + " Say it." * (i % 4))], said("assistant", f"Under tree {i % 5}."),
         said("assistant", f"It sat on the mat{' and counted' * (i % 3)}."), Path("pairs.jsonl"), i + 1)
    for i in range(12)
]  # fmt: skip
SETTINGS: dict[str, Any] = {"batch": 4, "lr": 1e-3, "warmup": 0, "precision": "float32", "threads": 1,
                            "sample_every": 0, "log_every": 1}  # fmt: skip


def test_rows_that_are_shared_change_no_number(tokenizer: Tokenizer, new_model: NewModel) -> None:
    question = [said("user", "Where does cat 3 sleep? Say it." * 12)]
    long = Pair(question, PAIRS[0].chosen, PAIRS[0].rejected, Path("pairs.jsonl"), 13)
    replies, model = Paired.read([long, *PAIRS[:5]], tokenizer, 512).replies, new_model()
    shared = collate([reply.spoken for reply in replies])
    alone = [collate([reply.spoken]) for reply in replies]
    assert shared.segments_BT is not None and len(shared.ids_BT) < len(replies)
    whole, told_R = log_probabilities(model, shared)
    one_by_one = torch.cat([log_probabilities(model, batch)[0] for batch in alone])
    torch.testing.assert_close(whole, one_by_one, rtol=1e-5, atol=1e-5)
    assert len(told_R) == sum(map(len, replies))
    np.testing.assert_allclose(whole.detach(), reply_log_probabilities(model, replies), rtol=1e-5, atol=1e-4)
    put_head(model, "scalar")
    together = rewards(model, collate(replies)).tolist()
    assert together == pytest.approx([rewards(model, collate([reply])).item() for reply in replies], abs=1e-5)
    assert together == pytest.approx(reply_rewards(model, replies, batch_tokens=60), abs=1e-5)


def test_blocks_of_the_head_give_the_same_gradient(
    tokenizer: Tokenizer, new_model: NewModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, model = Paired.read(PAIRS, tokenizer, 64), new_model()
    batch = collate([reply.spoken for reply in data.replies])
    grads = []
    for elements in (2**21, 1):  # all at once, and sixteen places at a time
        monkeypatch.setattr("lapis.model.scoring.LOGITS", {"cpu": elements})
        model.zero_grad()
        (log_probabilities(model, batch)[0] * torch.arange(24)).sum().backward()
        grads.append([parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None])
    for whole, blocks in zip(*grads, strict=True):
        torch.testing.assert_close(blocks, whole, rtol=1e-4, atol=1e-5)


def written_settings(name: str, tokenizer: Tokenizer, model: Transformer, place: Path) -> dict[str, Any]:
    """Settings of a run over PAIRS; they and the model are written to the folder."""
    save(model, place / "base")
    tokenizer.save(place / "base")
    lines = [{"prompt": p.prompt, "chosen": p.chosen["content"], "rejected": p.rejected["content"]} for p in PAIRS]
    (place / "pairs.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return {"objective": name, "model": str(place / "base"), "data": str(place / "pairs.jsonl"),
            "valid": str(place / "pairs.jsonl"), "context": 64, "out": str(place / "out"), "steps": 12,
            **SETTINGS}  # fmt: skip


@pytest.mark.parametrize("name", ["reward", "dpo", "ipo", "kto", "orpo", "simpo"])
def test_each_learns_its_pairs_from_settings(
    name: str, tokenizer: Tokenizer, new_model: NewModel, tmp_path: Path
) -> None:
    settings = written_settings(name, tokenizer, new_model(), tmp_path) | {"lr": 1e-2, "precision": "float32"}
    result = run(read_settings(settings, "test"), watch=Silent())
    assert result.held_out["accuracy"] == 1 and result.held_out["loss"] < math.log(2)
    assert result.log[-1]["loss"] < result.log[0]["loss"]
    facts = json.loads((tmp_path / "out" / "training.json").read_text())
    assert facts["counts"]["pairs"] == 12 and facts["objective"] == name
    again, words = load(tmp_path / "out"), Tokenizer.open(tmp_path / "out")
    if name in ("dpo", "kto"):
        outcome = score_pairs(again, words, PAIRS, reference=load(tmp_path / "base"))
        assert outcome["by"] == "log-ratio to the reference"
        assert {key: outcome[key] for key in result.held_out} == pytest.approx(dict(result.held_out), abs=1e-4)
    else:
        assert score_pairs(again, words, PAIRS)["accuracy"] == 1


@pytest.mark.parametrize("name", ["dpo", "reward"])
def test_with_lora(name: str, tokenizer: Tokenizer, new_model: NewModel, tmp_path: Path) -> None:
    settings = written_settings(name, tokenizer, new_model(), tmp_path) | {"lora": {"rank": 4}, "lr": 2e-2}
    if name == "dpo":
        settings["reference"] = "base"
    result = run(read_settings(settings, "test"), watch=Silent())
    assert result.held_out["accuracy"] == 1
    model, words = lapis.load(str(tmp_path / "out"))
    assert (tmp_path / "out" / "adapter_model.safetensors").is_file()
    outcome = score_pairs(model, words, PAIRS, reference=tmp_path / "base")
    assert outcome["margin"] == pytest.approx(result.held_out["margin"], rel=1e-4)


def test_accumulation_and_interruption_change_nothing(
    tokenizer: Tokenizer, new_model: NewModel, tmp_path: Path
) -> None:
    def weights(place: str, **more: Any) -> list[torch.Tensor]:
        model = new_model()
        config = TrainConfig(**{**SETTINGS, "steps": 6, **more})
        train(model, DPO(tokenizer, PAIRS, context=64), config, tmp_path / place, watch=Silent())
        return [parameter.detach() for parameter in model.parameters()]

    whole = weights("whole")
    for one, two in zip(whole, weights("parts", accumulate=4), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-5)

    class Dies(DPO):
        def loss(self, model: Transformer, batch: Any) -> Any:
            self.calls = getattr(self, "calls", 0) + 1
            if self.calls > 4:
                raise KeyboardInterrupt
            return super().loss(model, batch)

    config = TrainConfig(**{**SETTINGS, "steps": 6, "save_every": 2})
    with pytest.raises((KeyboardInterrupt, LapisError)):
        train(new_model(), Dies(tokenizer, PAIRS, context=64), config, tmp_path / "died", watch=Silent())
    cached = tmp_path / ".died.lapis" / ".journal" / "reference.json"
    stamp = cached.stat().st_mtime_ns
    model = new_model()
    train(model, DPO(tokenizer, PAIRS, context=64), config, tmp_path / "died", watch=Silent())
    assert all(torch.equal(a, b) for a, b in zip(whole, model.parameters(), strict=True))
    assert stamp > 0 and not cached.exists()  # read, not made anew, and gone with the run


def test_the_reference_is_computed_once_for_the_same_weights(
    tokenizer: Tokenizer, new_model: NewModel, tmp_path: Path
) -> None:
    model, other = new_model(), copy.deepcopy(new_model())
    objective = DPO(tokenizer, PAIRS, context=64)
    with pytest.raises(TrainingError, match="the reference is not known yet"):
        objective.prepare(model, next(iter(objective.batches(_state())))[0])
    objective.begin(model, tmp_path)
    expected = reply_log_probabilities(model, objective.examples.replies)
    np.testing.assert_allclose(objective._reference["train"], expected, rtol=1e-6)  # type: ignore[index]
    stamp = (tmp_path / "reference.safetensors").stat().st_mtime_ns
    DPO(tokenizer, PAIRS, context=64).begin(model, tmp_path)
    assert (tmp_path / "reference.safetensors").stat().st_mtime_ns == stamp
    with torch.no_grad():
        next(other.parameters()).add_(0.01)
    DPO(tokenizer, PAIRS, context=64).begin(other, tmp_path)
    assert (tmp_path / "reference.safetensors").stat().st_mtime_ns > stamp


def test_other_weights_in_the_reference_folder_are_another_run(
    tokenizer: Tokenizer, new_model: NewModel, tmp_path: Path
) -> None:
    place = tmp_path / "reference"

    def begin(change: float, folder: Path) -> None:
        model = new_model()
        with torch.no_grad():
            next(model.parameters()).add_(change)
        shutil.rmtree(place, ignore_errors=True)
        save(model, place)
        tokenizer.save(place)
        DPO(tokenizer, PAIRS, context=64, reference=str(place)).begin(new_model(), folder)

    journal = tmp_path / "journal"
    journal.mkdir()
    begin(0.0, journal)
    begin(0.01, journal)  # nothing was learned from the first reference yet
    (journal / "step-2").mkdir()
    begin(0.01, journal)
    with pytest.raises(TrainingError, match=r"reference has other weights than when the run began"):
        begin(0.02, journal)


def test_the_base_without_its_adapter_is_a_reference(tokenizer: Tokenizer, new_model: NewModel) -> None:
    base, model = new_model(), new_model()
    lora.wrap(model, lora.LoraConfig(rank=4))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05)
    for make in (DPO, KTO):
        objective = make(tokenizer, PAIRS, context=64, valid=PAIRS, reference="base")
        objective.begin(model)
        batch = objective.prepare(model, next(iter(objective.batches(_state())))[0])
        assert batch.reference_S is not None and not batch.reference_S.requires_grad
        expected = log_probabilities(base, batch.replies)[0]
        torch.testing.assert_close(batch.reference_S, expected.detach(), rtol=1e-5, atol=1e-5)
        assert objective.evaluate(model)["margin"] != 0
    with pytest.raises(ConfigError, match='it is "base", but the model carries no adapter'):
        DPO(tokenizer, PAIRS, context=64, reference="base").begin(base)


def test_a_reference_that_is_no_parent_is_refused(tokenizer: Tokenizer, new_model: NewModel, tmp_path: Path) -> None:
    model = new_model()
    parent, child = copy.deepcopy(model), copy.deepcopy(model)
    with torch.no_grad():
        for parameter in child.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.01)
        torch.manual_seed(9)
        stranger = Transformer(model.config)
    wide = Transformer(copy.copy(model.config).__class__(**{**vars(model.config), "ffn_dim": 64}))
    for name, one in {"parent": parent, "stranger": stranger, "wide": wide}.items():
        save(one, tmp_path / name)
        tokenizer.save(tmp_path / name)
    DPO(tokenizer, PAIRS, context=64, reference=str(tmp_path / "parent")).begin(child)
    assert weights_cosine(child, parent) > 0.8 and abs(weights_cosine(child, stranger)) < 0.1
    for name, why in (("stranger", "the cosine of their weights is"), ("wide", "its ffn_dim is 64, the policy's 48")):
        objective = DPO(tokenizer, PAIRS, context=64, reference=str(tmp_path / name))
        with pytest.raises(ConfigError, match=f"{name} is not the policy's parent: {why}") as caught:
            objective.begin(child)
        assert "\n" not in str(caught.value)
    with pytest.raises(LapisError, match="reference: "):
        DPO(tokenizer, PAIRS, context=64, reference=str(tmp_path / "nowhere")).begin(child)


def test_options_are_checked(tokenizer: Tokenizer) -> None:
    assert set(options(objective_class("dpo"))) == {
        "context",
        "too_long",
        "valid",
        "reference",
        "beta",
        "label_smoothing",
        "robust",
    }
    with pytest.raises(ConfigError, match="dpo: beta is 0; it must be above 0"):
        DPO(tokenizer, PAIRS, beta=0)
    with pytest.raises(ConfigError, match=r"dpo: label_smoothing is 0\.5"):
        DPO(tokenizer, PAIRS, label_smoothing=0.5)


def test_a_reward_model_needs_its_head(tokenizer: Tokenizer, new_model: NewModel) -> None:
    objective = Reward(tokenizer, PAIRS, context=64)
    with pytest.raises(ConfigError, match="the model's head is lm; put a scalar one on with"):
        objective.prepare(new_model(), next(iter(objective.batches(_state())))[0])
    with pytest.raises(DataError, match="a model with the head none does not rank replies"):
        bare = new_model()
        put_head(bare, "none")
        score_pairs(bare, tokenizer, PAIRS)


@given(st.lists(st.tuples(*[st.floats(-20, -0.01)] * 4), min_size=1, max_size=5), st.floats(0.05, 2))
def test_losses_have_the_properties_of_their_papers(values: list[tuple[float, ...]], beta: float) -> None:
    chosen, rejected, ref_chosen, ref_rejected = torch.tensor(values, dtype=torch.float64).T
    a, b = chosen - ref_chosen, rejected - ref_rejected
    zero = torch.zeros_like(a)
    torch.testing.assert_close(dpo_loss(zero, zero, beta), torch.full_like(a, math.log(2)))
    swapped = dpo_loss(b, a, beta)
    torch.testing.assert_close(dpo_loss(a, b, beta) - swapped, -beta * (a - b))  # log-odds of the two labels
    mixed = 0.8 * dpo_loss(a, b, beta) + 0.2 * swapped
    torch.testing.assert_close(dpo_loss(a, b, beta, 0.2), mixed)
    unbiased = 0.8 * dpo_loss(a, b, beta, 0.2, True) + 0.2 * dpo_loss(b, a, beta, 0.2, True)
    torch.testing.assert_close(unbiased, dpo_loss(a, b, beta))  # over labels that are flipped so often
    assert torch.all(ipo_loss(b + 1 / (2 * beta), b, beta) < 1e-20)
    losses = kto_loss(a, b, torch.tensor(1.0), beta)
    assert torch.all((losses >= 0) & (losses <= 1))
    torch.testing.assert_close(simpo_loss(chosen, rejected, beta, 0.0), dpo_loss(chosen, rejected, beta))
    odds = torch.logit(chosen.exp()) - torch.logit(rejected.exp())
    torch.testing.assert_close(orpo_loss(chosen, rejected, torch.tensor(1.5), beta),
                               1.5 - beta * torch.nn.functional.logsigmoid(odds), rtol=1e-6, atol=1e-9)  # fmt: skip


def test_log1mexp_has_a_gradient_everywhere() -> None:
    x = torch.tensor([-1e-12, -0.1, -0.7, -50.0, 0.0], requires_grad=True)
    log1mexp(x).sum().backward()
    assert x.grad is not None and torch.isfinite(x.grad).all()


def test_figures_of_pairs_by_hand() -> None:
    outcome = pair_figures([3.0, 1.0, 0.0, 2.0], [1.0, 2.0, 0.0, 0.0], [9, 4, 5, 1], [3, 8, 5, 6])
    assert outcome["accuracy"] == (1 + 0 + 0.5 + 1) / 4 and outcome["margin"] == 0.75
    assert outcome["longer_preferred"] == pytest.approx(2 / 3) and outcome["longer_chosen"] == pytest.approx(1 / 3)
    assert outcome["accuracy_chosen_longer"] == 1 and outcome["accuracy_chosen_shorter"] == 0.5
    assert outcome["length_correlation_within"] == pytest.approx(np.corrcoef([2, -1, 0, 2], [6, -4, 0, -5])[0, 1])
    assert outcome["loss"] == pytest.approx(np.mean(np.log1p(np.exp([-2, 1, 0, -2]))))
    assert calibration_error([0.75] * 4, [1, 1, 1, 0]) == 0 and calibration_error([0.95] * 2, [0, 0]) == 0.95
    assert pair_figures([1.0], [0.0], [4], [4])["longer_preferred"] is None


def test_lapis_eval_scores_pairs(
    tokenizer: Tokenizer, new_model: NewModel, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = new_model()
    save(model, tmp_path / "base")
    with torch.no_grad():
        next(model.parameters()).add_(0.01)
    save(model, tmp_path / "tuned")
    for name in ("base", "tuned"):
        tokenizer.save(tmp_path / name)
    lines = [{"prompt": p.prompt, "chosen": p.chosen["content"], "rejected": p.rejected["content"]} for p in PAIRS]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    command = ["eval", str(tmp_path / "tuned"), "--pairs", str(tmp_path / "pairs.jsonl"), "--json"]
    main([*command, "--reference", str(tmp_path / "base")])
    outcome = json.loads(capsys.readouterr().out)["pairs"]
    assert outcome["by"] == "log-ratio to the reference" and outcome["pairs"] == 12 and outcome["margin"] != 0
    main(command)
    assert json.loads(capsys.readouterr().out)["pairs"]["by"] == "log-probability per token"


def _state() -> Any:
    class State:
        rows, cursor, seed = 3, None, 0

    return State()
