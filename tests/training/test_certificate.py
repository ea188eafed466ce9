"""The certificate: its checks agree with a second computation, find what is broken, and leave the run as it was."""

import errno
import json
import os
import re
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from lapis.errors import OutputError, TrainingError
from lapis.model import lora
from lapis.model.transformer import Transformer
from lapis.report.pages.certificate import certificate_page
from lapis.text.corpus.corpus import Document
from lapis.text.corpus.pairs import Pair
from lapis.text.tokenizer.tokenizer import Tokenizer
from lapis.training.certificate.certificate import CERTIFICATE, PAGE
from lapis.training.certificate.checks import LEAST_STEPS, run_checks, why_unchecked
from lapis.training.config import TrainConfig
from lapis.training.distributed.sharding import Sharding
from lapis.training.loop.loop import train
from lapis.training.loop.progress import Silent
from lapis.training.objectives.preference.preference import DPO, KTO, ORPO, SimPO
from lapis.training.objectives.supervised.next_token import Causal
from lapis.training.run import read_settings, run
from lapis.training.setup.select import select_parts

Make = Callable[[], Transformer]
CONFIG = TrainConfig(
    steps=4, batch=4, lr=1e-2, warmup=2, log_every=1, precision="float32", threads=1, sample_every=0, compile="off",
    certify="on",
)  # fmt: skip


@pytest.fixture
def objective(tokenizer: Tokenizer, documents: list[Document]) -> Causal:
    return Causal(tokenizer, documents, context=32, valid=0.1)


def certified(make: Make, objective: Any, config: TrainConfig, out: Path) -> dict[str, Any]:
    train(make(), objective, config, out, watch=Silent())
    return json.loads((out / CERTIFICATE).read_text())


def checks(certificate: dict[str, Any]) -> dict[str, Any]:
    return {check["name"]: check for check in certificate["checks"]}


def test_options_that_are_objects_are_left_out(
    new_model: Make, tokenizer: Tokenizer, documents: list[Document], tmp_path: Path
) -> None:
    """A reward or held-out data may be an object that holds a tokenizer, or every text: neither belongs on a page."""
    objective: Any = Causal(tokenizer, documents, context=32, valid=documents[:2])
    config = replace(CONFIG, certify="off")
    texts = certified(new_model, objective, config, tmp_path / "texts")
    assert texts["options"] == {"context": 32, "field": None, "workers": objective.workers}
    objective = Causal(tokenizer, documents, context=32)
    objective.field = Causal(tokenizer, documents, context=32)  # any dataclass that holds a tokenizer
    assert "field" not in certified(new_model, objective, config, tmp_path / "object")["options"]


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_checks_hold_and_leave_the_run_as_it_was(
    new_model: Make, objective: Causal, tmp_path: Path, optimizer: Any
) -> None:
    config = replace(CONFIG, optimizer=optimizer, ema=0.9)
    facts = certified(new_model, objective, config, tmp_path / "out")
    computed = checks(facts)
    assert all(check["holds"] for check in computed.values()) and len(computed) == 3
    assert computed["saved and restored"]["difference"] == 0.0
    assert 0 < computed["accumulated or not"]["difference"] < 1e-5  # another order of sums
    without = certified(new_model, objective, replace(config, certify="off"), tmp_path / "without")
    assert without["checks"] == [] and without["weights"] == facts["weights"]
    for name in ("model.safetensors", "log.jsonl"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "without" / name).read_bytes()


def test_rows_of_some_tokens_come_back_over_their_base(new_model: Make, objective: Causal, tmp_path: Path) -> None:
    """A checkpoint holds the matrix with its trained rows; under them the base stays as it was."""
    model, ids = new_model(), [3, 5]
    base = model.embed.weight.detach().clone()
    select_parts(model, freeze=["embed"], tokens=ids, tokenizer=objective.tokenizer)
    computed = checks(certified(lambda: model, objective, CONFIG, tmp_path / "out"))
    assert computed["saved and restored"]["difference"] == 0.0
    assert not torch.equal(model.embed.weight[ids], base[ids])
    with lora.off(model):
        assert torch.equal(model.embed.weight, base)


@pytest.mark.parametrize("kind, sums", [(DPO, True), (SimPO, True), (ORPO, False), (KTO, False)])
def test_a_loss_is_a_sum_over_rows_or_says_that_it_is_not(
    kind: Any, sums: bool, new_model: Make, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    pairs = [
        Pair([{"role": "user", "content": f"Where is {i}?"}], {"role": "assistant", "content": "Under the tree " * i},
             {"role": "assistant", "content": "There."}, Path("p.jsonl"), i)
        for i in range(1, 9)
    ]  # fmt: skip
    facts = certified(new_model, kind(tokenizer, pairs, context=64), CONFIG, tmp_path / "out")
    check = checks(facts)["accumulated or not"]
    assert check["holds"] if sums else "more than the sum" in check["why_not"]


def test_what_the_certificate_states_is_so(new_model: Make, objective: Causal, tmp_path: Path) -> None:
    facts = certified(new_model, objective, CONFIG, tmp_path / "out")
    written = json.loads((tmp_path / "out" / "training.json").read_text())
    times = json.loads((tmp_path / "out" / "times.json").read_text())
    assert facts["data"] == objective.examples.digest == written["data"] and facts["counts"] == written["counts"]
    assert facts["config"]["seed"] == 0 and facts["versions"]["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert facts["taken"]["seconds"] == times["seconds"] and facts["loss"] == written["loss"]
    assert facts["held_out"] == written["held_out"] and facts["weights"]["start"] != facts["weights"]["end"]
    page = (tmp_path / "out" / PAGE).read_text()
    for text in (facts["data"], facts["weights"]["end"], facts["tokenizer"], "accumulated or not", "<svg", "0 is the"):
        assert text in page, text
    assert len(page) < 100_000 and "http://" not in page.replace("http://www.w3.org", "")


def test_a_mask_that_leaks_between_texts_differs(new_model: Make, objective: Causal, tmp_path: Path) -> None:
    class Leaking(Causal):
        """As if the texts of a row saw each other."""

        def loss(self, model: Transformer, batch: Any) -> Any:
            one = replace(batch, segments_BT=torch.ones_like(batch.segments_BT))
            return super().loss(model, one)

    leaking = Leaking(objective.tokenizer, objective.examples, context=32)
    computed = checks(certified(new_model, leaking, CONFIG, tmp_path / "out"))
    assert computed["packed or not"]["holds"] is False and computed["packed or not"]["difference"] > 1e-3


def test_a_loss_that_depends_on_the_batch_differs(new_model: Make, objective: Causal, tmp_path: Path) -> None:
    class Averaged(Causal):
        """A mean of each micro-batch, which the loop then divides again."""

        def loss(self, model: Transformer, batch: Any) -> Any:
            total, count, metrics = super().loss(model, batch)
            return total / count * (1 + len(batch.ids_BT)), count, metrics

    averaged = Averaged(objective.tokenizer, objective.examples, context=32)
    assert checks(certified(new_model, averaged, CONFIG, tmp_path / "out"))["accumulated or not"]["holds"] is False


def test_a_checkpoint_that_gives_back_less_ends_the_run(
    new_model: Make, objective: Causal, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An optimizer whose momentum is lost on the way is no run that can be gone on with."""
    from lapis.training.optim.optimizers import Optimizers

    monkeypatch.setattr(Optimizers, "restore", lambda self, tensors: [part.state.clear() for part in self.parts])
    with pytest.raises(TrainingError, match="a checkpoint does not give back what was saved"):
        certified(new_model, objective, CONFIG, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_short_run_is_checked_only_where_asked(new_model: Make, objective: Causal, tmp_path: Path) -> None:
    facts = certified(new_model, objective, replace(CONFIG, certify="auto"), tmp_path / "out")
    assert facts["checks"] == [] and "Nothing was checked" in (tmp_path / "out" / PAGE).read_text()
    long = replace(CONFIG, certify="auto", steps=LEAST_STEPS, batch=1, log_every=25)
    computed = checks(certified(new_model, objective, long, tmp_path / "long"))
    assert computed["accumulated or not"]["why_not"] == "a micro-batch has one row"
    assert computed["packed or not"]["holds"] and computed["saved and restored"]["holds"]


def test_a_run_does_not_end_where_memory_lacks_for_its_checks(
    new_model: Make, objective: Causal, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lapis.training.certificate.checks.available", lambda device: 1000)
    computed = checks(certified(new_model, objective, CONFIG, tmp_path / "out"))
    for name, what in (("accumulated or not", "two gradients have"), ("saved and restored", "a checkpoint has")):
        why = computed[name]["why_not"]
        assert why.startswith(what) and why.endswith("GB, and 0.00 GB of memory are free")
    assert computed["packed or not"]["holds"]


@pytest.mark.parametrize("place, why", [
    ("lapis.training.certificate.checks.save", r"a checkpoint could not be written: out: the disk is full"),
    ("lapis.training.loop.state.write_tensors", r"a checkpoint could not be written: No space left on device"),
    ("lapis.training.certificate.checks.disk_usage", r"a checkpoint has 0\.00 GB, and 0\.00 GB of the disk are free"),
])  # fmt: skip
def test_a_run_does_not_end_where_the_disk_lacks_for_its_checks(
    place: str, why: str, new_model: Make, objective: Causal, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*given: Any) -> None:
        if place.endswith("save"):
            raise OutputError("out: the disk is full")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def checked(*given: Any) -> Any:  # the disk is full from here on, and empty again afterwards
        with monkeypatch.context() as patch:
            patch.setattr(place, fails if "disk" not in place else lambda folder: SimpleNamespace(free=1000))
            return run_checks(*given)

    monkeypatch.setattr("lapis.training.loop.loop.run_checks", checked)
    facts = certified(new_model, objective, CONFIG, tmp_path / "out")
    computed = checks(facts)
    assert re.fullmatch(why, computed["saved and restored"]["why_not"]), computed
    assert computed["accumulated or not"]["holds"] and computed["packed or not"]["holds"]
    without = certified(new_model, objective, replace(CONFIG, certify="off"), tmp_path / "without")
    assert without["weights"] == facts["weights"] and not (tmp_path / ".out.lapis").exists()


def test_it_names_the_model_its_parts_and_the_options(data_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(data_folder)
    common = {
        "objective": "causal", "data": "texts.jsonl", "context": 32, "steps": 2, "batch": 2, "threads": 1,
        "precision": "float32", "sample_every": 0,
    }  # fmt: skip
    shape = {"dim": 32, "layers": 2, "heads": 2, "ffn_dim": 48}
    run(read_settings({**common, "new": shape, "tokenizer": "tok", "out": "base"}, "here"), watch=Silent())
    base = json.loads(Path("base", CERTIFICATE).read_text())
    assert base["origin"] == {"new": shape, "tokenizer": "tok", "zero_init": True}
    assert base["options"].items() >= {"context": 32, "valid": None, "field": None}.items()
    assert base["trained"]["parameters"] == base["trained"]["of"] > 10_000
    assert base["machine"]["processes"] == 1 and len(base["machine"]["device_name"]) > 3
    assert base["not_checked"] == "the run has 2 steps, and by themselves those of 50 or more are checked"
    changes = {"model": "base", "valid": 0.1, "certify": "off"}
    adapter = read_settings({**common, **changes, "out": "a", "lora": {"rank": 2, "targets": ["attn"]}}, "here")
    run(adapter, watch=Silent())
    part = read_settings({**common, **changes, "out": "p", "tune": ["layers.0"], "freeze": ["layers.0.mlp"]}, "here")
    run(part, watch=Silent())
    adapted, tuned = (json.loads(Path(folder, CERTIFICATE).read_text()) for folder in ("a", "p"))
    assert adapted["origin"]["model"] == "base" and adapted["origin"]["lora"]["rank"] == 2
    assert adapted["trained"]["lora"]["targets"] == ["attn"] and adapted["trained"]["parameters"] < 3000
    assert tuned["origin"] == {"model": "base", "tune": ["layers.0"], "freeze": ["layers.0.mlp"]}
    assert tuned["options"]["valid"] == 0.1 and tuned["not_checked"] == "certify is off"
    many = certificate_page({**tuned, "origin": {"tokens": list(range(49152, 59152))}}, []).render()
    assert "49152, 49153, …, 59151 (10,000 in all)" in many and "49154" not in many
    page = Path("p", PAGE).read_text()
    for text in ("layers.0.mlp", "certify is off", "parameters were trained", base["machine"]["device_name"]):
        assert text in page, text


def test_checks_that_cannot_be_made_are_told_of(
    new_model: Make, objective: Causal, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Whole(Sharding):
        """As if a state were shared out, in one process."""

        def begin_part(self, last: bool) -> None:
            pass

        def settle(self) -> None:
            pass

        def whole_weights(self, here: bool) -> Any:
            return nullcontext()

    notes: list[str] = []

    class Listen(Silent):
        def note(self, text: str) -> None:
            notes.append(text)

    monkeypatch.setattr("lapis.training.loop.loop.shared_out", lambda model, *rest: Whole(model))
    saves = SimpleNamespace(finish=lambda: None, wait=lambda: None)
    monkeypatch.setattr("lapis.training.loop.loop.ShardedSaves", lambda world: saves)
    train(new_model(), objective, CONFIG, tmp_path / "out", watch=Listen())
    why = "weights are shared out over processes, and checks are of a run that holds them whole"
    assert f"train: certify is on, and nothing is checked: {why}; give shard=none where they fit" in notes
    facts = json.loads((tmp_path / "out" / CERTIFICATE).read_text())
    assert facts["checks"] == [] and facts["not_checked"] == why and why in (tmp_path / "out" / PAGE).read_text()
    state: Any = SimpleNamespace(step=80, sharding=None)
    assert why_unchecked(state, replace(CONFIG, certify="auto"), 2).startswith("the run has 2 processes, and by them")
    assert not why_unchecked(state, CONFIG, 2) and not why_unchecked(state, replace(CONFIG, certify="auto"), 1)
