"""LoRA, freeze lists and plans in a run: what moves, what is written, exact resume, what wrong settings get."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

import lapis
from lapis.checkpoint.commit import commit
from lapis.errors import ConfigError, LapisError, TrainingError
from lapis.model.load import save
from lapis.model.transformer import Transformer
from lapis.text.corpus.corpus import Document
from lapis.text.tokenizer.tokenizer import Tokenizer
from lapis.training.config import TrainConfig
from lapis.training.loop.loop import train
from lapis.training.loop.progress import Silent
from lapis.training.objectives.supervised.next_token import Causal
from lapis.training.run import read_settings, run
from lapis.training.setup.lora import LoraConfig, of, off, token_rows, wrap
from lapis.training.setup.select import choose
from tests.model.conftest import SHAPES

RUN = {
    "steps": 6, "batch": 4, "lr": 3e-3, "precision": "float32", "threads": 1, "sample_every": 0.0, "save_every": 3,
    "log_every": 3,
}  # fmt: skip
Start = Callable[..., Any]


@pytest.fixture
def start(
    new_model: Callable[[], Transformer], tokenizer: Tokenizer, documents: list[Document], tmp_path: Path
) -> Start:
    """Runs settings on a base folder, beside which lie texts."""
    save(new_model(), tmp_path / "base")
    tokenizer.save(tmp_path / "base")
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps({"text": d.text}) + "\n" for d in documents))

    def call(out: str, watch: Silent | None = None, **settings: Any) -> Any:
        given = {"objective": "causal", "model": str(tmp_path / "base"), "data": str(tmp_path / "texts.jsonl"),
                 "context": 32, "out": str(tmp_path / out), **RUN, **settings}  # fmt: skip
        return run(read_settings(given, "test"), watch=watch or Silent())

    return call


def test_a_run_moves_only_the_adapter_and_its_result_is_one(start: Start, tokenizer: Tokenizer, tmp_path: Path) -> None:
    result = start(
        "adapter", lora={"rank": 4, "targets": ["attn.q", "layers.1.mlp"], "tokens": ["<|im_start|>", 3]}, lr=0.03
    )
    assert result.log[-1]["loss"] < result.log[0]["loss"]
    assert {p.name for p in result.out.iterdir()} >= {"adapter_config.json", "adapter_model.safetensors", "log.jsonl"}
    assert not (result.out / "model.safetensors").exists()
    written = json.loads((result.out / "adapter_config.json").read_text())
    assert written["trainable_token_indices"] == [tokenizer.id("<|im_start|>"), 3]
    assert Path(written["base_model_name_or_path"]) == tmp_path / "base"
    model, opened = lapis.load(result.out)
    assert opened.digest() == tokenizer.digest()
    base, _ = lapis.load(tmp_path / "base")
    ids = torch.tensor([[5, 6, 7, 3]])
    with torch.no_grad():
        assert not torch.allclose(model(ids), base(ids), atol=1e-4)
        with off(model):
            assert torch.equal(model(ids), base(ids))
    with pytest.raises(LapisError, match="holds an adapter; make it a model with: lapis fuse"):
        lapis.open(result.out)


class Stop(Silent):
    """Ends a run behind its checkpoint, as a kill would."""

    def row(self, row: dict[str, Any]) -> None:
        if row["step"] == 5:
            raise KeyboardInterrupt


@pytest.mark.parametrize("kind", [{}, {"dora": True, "dropout": 0.1, "tokens": (1, 2)}, {"rslora": True}])
def test_an_interrupted_run_goes_on_to_the_same_bytes(
    new_model: Callable[[], Transformer], tokenizer: Tokenizer, documents: list[Document], tmp_path: Path,
    kind: dict[str, Any],
) -> None:  # fmt: skip
    objective = Causal(tokenizer, documents, context=32)

    def go(out: str, watch: Silent) -> bytes:
        torch.manual_seed(1)
        model = wrap(new_model(), LoraConfig(rank=4, **kind), "base")
        config = TrainConfig(**{**RUN, "log_every": 1})  # type: ignore[arg-type]
        train(model, objective, config, tmp_path / out, watch=watch)
        return (tmp_path / out / "adapter_model.safetensors").read_bytes()

    whole = go("whole", Silent())
    with pytest.raises(KeyboardInterrupt):
        go("cut", Stop())
    assert (tmp_path / ".cut.lapis" / ".journal" / "step-3" / "adapter_model.safetensors").is_file()
    assert go("cut", Silent()) == whole


def test_a_rerun_with_another_adapter_is_refused(
    new_model: Callable[[], Transformer], tokenizer: Tokenizer, documents: list[Document], tmp_path: Path
) -> None:
    objective = Causal(tokenizer, documents, context=32)

    def go(watch: Silent, **changed: Any) -> None:
        torch.manual_seed(1)
        model = wrap(new_model(), LoraConfig(rank=4, **changed), "base")
        config = TrainConfig(**{**RUN, "log_every": 1})  # type: ignore[arg-type]
        train(model, objective, config, tmp_path / "out", watch=watch)

    with pytest.raises(KeyboardInterrupt):
        go(Stop())
    with pytest.raises(TrainingError, match=r"lora\.alpha was null, is 3"):
        go(Silent(), alpha=3.0)


def test_an_adapter_is_saved_in_the_type_that_is_asked_for(start: Start, tmp_path: Path) -> None:
    for name in ("float32", "bfloat16"):
        start(name, lora={"rank": 2}, save_dtype=name)
    full, half = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("float32", "bfloat16"))
    assert {name: tensor.bfloat16() for name, tensor in full.items()}.keys() == half.keys()
    assert all(torch.equal(full[name].bfloat16(), tensor) for name, tensor in half.items())


def test_an_adapter_can_be_trained_on(start: Start, tmp_path: Path) -> None:
    first = start("first", lora={"rank": 2}, steps=2)
    second = start("second", model=str(first.out), steps=2)
    model, _ = lapis.load(second.out)
    assert of(model).config.rank == 2 and of(model).base == str(tmp_path / "base")  # type: ignore[union-attr]


def test_tune_and_freeze_leave_the_rest_as_it_was(start: Start, tmp_path: Path) -> None:
    before, _ = lapis.load(tmp_path / "base")
    start("tuned", tune=["layers.1", "embed"], freeze=["layers.1.attn.q", "norm"])
    after, _ = lapis.load(tmp_path / "tuned")
    pairs = zip(before.named_parameters(), after.parameters(), strict=True)
    moved = {name for (name, a), b in pairs if not torch.equal(a, b)}
    assert moved == {n for n, _ in before.named_parameters()
                     if (n.startswith(("blocks.1.attn", "blocks.1.mlp")) and ".q." not in n) or n == "embed.weight"
                     }  # fmt: skip


@pytest.mark.parametrize("tied", [True, False])
def test_rows_of_tokens_are_trained_beside_what_is_tuned(start: Start, tmp_path: Path, tied: bool) -> None:
    before, tokenizer = lapis.load(tmp_path / "base")
    if not tied:
        config = dataclasses.replace(before.config, tied=False)
        untied = Transformer(config)
        untied.load_state_dict(before.state_dict() | {"head.weight": before.embed.weight.detach()}, strict=True)
        with commit(tmp_path / "untied") as staging:
            save(untied, staging.path)
            tokenizer.save(staging.path)
        before = untied
    start("rows", model=str(tmp_path / ("base" if tied else "untied")), tune=["layers.1.mlp"], tokens=["<|im_end|>", 5],
          weight_decay=0.5)  # fmt: skip
    after, _ = lapis.load(tmp_path / "rows")
    pairs = zip(before.named_parameters(), after.parameters(), strict=True)
    moved = {name for (name, a), b in pairs if not torch.equal(a, b)}
    tables = {"embed.weight"} if tied else {"head.weight"}  # the text does not hold them, so nothing reads their rows
    assert moved == {n for n, _ in before.named_parameters() if n.startswith("blocks.1.mlp")} | tables
    for name in tables:
        rows = (before.get_parameter(name) != after.get_parameter(name)).any(1).nonzero()[:, 0].tolist()
        assert rows == sorted({tokenizer.id("<|im_end|>"), 5})


def test_rows_of_tokens_go_on_from_a_checkpoint(start: Start, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"tune": ["layers.1.mlp"], "tokens": ["<|im_end|>", "a", "b"], "log_every": 1}
    settings |= {"certify": "on", "share_rows": True}
    whole = start("whole", **settings)
    with pytest.raises(KeyboardInterrupt):
        start("cut", watch=Stop(), **settings)
    with pytest.raises(TrainingError, match="tokens was"):
        start("cut", **{**settings, "tokens": ["<|im_start|>"]})
    resumed = start("cut", **settings)
    assert (resumed.out / "model.safetensors").read_bytes() == (whole.out / "model.safetensors").read_bytes()


def test_a_plan_is_tuned_or_adapted(start: Start, tmp_path: Path) -> None:
    shape = {"dim": 32, "layers": 2, "heads": 4, "vocab": 999}
    plan = {"format": "lapis-plan/1", "goal": "style", "model": shape, "tune": [{"layer": 1, "component": "mlp"}]}
    place = tmp_path / "plan.yaml"
    place.write_text(yaml.safe_dump(plan))
    start("adapted", plan=str(place), lora={"rank": 2})
    model, _ = lapis.load(tmp_path / "adapted")
    adapted = {n.rpartition(".lora_A")[0] for n, _ in model.named_parameters() if n.endswith("lora_A")}
    assert adapted == {"blocks.1.mlp.gate", "blocks.1.mlp.up", "blocks.1.mlp.down"}
    place.write_text(yaml.safe_dump({**plan, "tokens": ["<|im_end|>"]}))
    start("rows", plan=str(place))
    start("adapted rows", plan=str(place), lora={"rank": 2})
    model, tokenizer = lapis.load(tmp_path / "adapted rows")
    assert token_rows(model)["embed.weight"].ids_N.tolist() == [tokenizer.id("<|im_end|>")]
    before, after = lapis.load(tmp_path / "base")[0], lapis.load(tmp_path / "rows")[0]
    rows = (before.embed.weight != after.embed.weight).any(1).nonzero()[:, 0].tolist()
    assert rows == [tokenizer.id("<|im_end|>")]
    place.write_text(yaml.safe_dump({**plan, "model": {**shape, "dim": 64, "layers": 9}}))
    with pytest.raises(ConfigError, match=r"another model \(dim 64 there, 32 here; layers 9 there, 2 here\)"):
        start("other", plan=str(place))


@pytest.mark.parametrize("written, meant", [
    ({"rank": 2, "targets": ["q_proj", "layers.1.up_proj"]}, {"rank": 2, "targets": ["attn.q", "layers.1.mlp.up"]}),
    ({"rank": 2, "targets": ["model.layers.0.self_attn.v_proj"]}, {"rank": 2, "targets": ["layers.0.attn.v"]}),
    ({"rank": 2, "targets": "all-linear"}, {"rank": 2, "targets": ["attn", "mlp"]}),
    ({"rank": 2, "targets": ["self_attn"]}, {"rank": 2, "targets": ["attn"]}),
    (
        {"r": 2, "lora_alpha": 6, "lora_dropout": 0.0, "target_modules": ["q_proj", "v_proj"], "use_rslora": True,
         "modules_to_save": ["embed_tokens"], "bias": "none", "task_type": "CAUSAL_LM", "peft_type": "LORA"},
        {"rank": 2, "alpha": 6, "targets": ["attn.q", "attn.v"], "rslora": True, "whole": ["embed"]},
    ),
])  # fmt: skip
def test_the_names_of_peft_mean_the_same(
    start: Start, tmp_path: Path, written: dict[str, Any], meant: dict[str, Any]
) -> None:
    """The names of modules on disk and PEFT's own settings give the adapter that the names here give."""
    start("one", lora=written)
    start("other", lora=meant)
    one, other = (tmp_path / name / "adapter_model.safetensors" for name in ("one", "other"))
    assert one.read_bytes() == other.read_bytes()


@pytest.mark.parametrize("settings, message", [
    ({"lora": {"r": 2, "rank": 4}}, "r and rank are one setting"),
    ({"lora": {"r": 2, "bias": "all"}}, "bias is 'all'; it can be none"),
    ({"lora": {"r": 2, "peft_type": "LOHA"}}, "peft_type is 'LOHA'; it can be lora"),
    ({"lora": {"r": 2, "layers_to_transform": [0]}}, "name layers in targets, as layers.0-5.attn"),
    ({"lora": {"rank": 2, "targets": ["c_attn"]}}, '"c_attn" matches nothing; nearest: attn'),
    ({"lora": {"rank": 2, "targets": ["attn.qq"]}}, 'targets: "attn.qq" matches nothing; nearest: attn.q'),
    ({"lora": {"rank": 2, "targets": ["layers.5-9"]}}, "the layers are 0-1"),
    ({"lora": {"rank": 2, "targets": ["attn q"]}}, '"attn q" is no pattern'),
    ({"lora": {"rnk": 2}}, 'unknown key "rnk"; did you mean "rank"'),
    ({"lora": {"rank": 0}}, "rank is 0"),
    ({"lora": {"tokens": ["<|im_strt|>"]}}, 'is no token; did you mean "<|im_start|>"'),
    ({"lora": {"tokens": [90000]}}, "90000 has no row"),
    ({"tune": ["mlp"], "tokens": ["<|im_strt|>"]}, 'tokens: "<|im_strt|>" is no token; did you mean "<|im_start|>"'),
    ({"tokens": ["<|im_start|>"]}, "give tune or freeze as well"),
    ({"lora": {}, "tokens": [3]}, "lora.targets and lora.tokens"),
    ({"lora": {}, "tune": ["mlp"]}, "lora freezes the model itself"),
    ({"tune": ["mlp.upp"]}, 'tune: "mlp.upp" matches nothing; nearest: mlp.up'),
    ({"freeze": ["all"]}, "leave nothing to train"),
    ({"lora": {}, "model": None, "new": {"dim": 16, "layers": 1, "heads": 2, "ffn_dim": 24}}, "lora needs model"),
])  # fmt: skip
def test_wrong_settings_are_one_line(start: Start, tmp_path: Path, settings: dict[str, Any], message: str) -> None:
    if "new" in settings:
        settings = {**settings, "tokenizer": str(tmp_path / "base")}
    with pytest.raises(LapisError) as caught:
        start("out", **settings)
    assert message in str(caught.value) and "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_choose_counts_what_is_left(new_model: Callable[[], Transformer]) -> None:
    model = new_model()
    assert choose(model, ["layers.0.mlp"]) == sum(p.numel() for p in model.blocks[0].mlp.parameters())
    assert choose(model) == sum(p.numel() for p in model.parameters())


def test_a_model_of_pictures_has_no_rows_of_tokens() -> None:
    model = Transformer(SHAPES["vit"])
    assert choose(model, ["layers.0.mlp"]) == sum(p.numel() for p in model.blocks[0].mlp.parameters())
    with pytest.raises(ConfigError, match=r"tokens: \[3\] are ids of tokens, which a model of pictures has none of"):
        choose(model, ["mlp"], tokens=[3])
    with pytest.raises(ConfigError, match=r"tokens: \[3\] are ids of tokens"):
        wrap(Transformer(SHAPES["vit"]), LoraConfig(rank=2, tokens=(3,)))


@pytest.mark.parametrize("family", ["gpt_oss", "gemma4-experts"])
def test_experts_in_one_tensor_are_adapted_and_resumed(
    family: str, start: Start, tokenizer: Tokenizer, tmp_path: Path
) -> None:  # fmt: skip
    torch.manual_seed(0)
    shape = dataclasses.replace(SHAPES[family], vocab=tokenizer.rows, context=64)
    save(Transformer(shape), tmp_path / "experts")
    tokenizer.save(tmp_path / "experts")
    settings = {"model": str(tmp_path / "experts"), "lora": {"rank": 2, "targets": ["mlp"]}, "lr": 0.03}
    whole = start("whole", **settings)
    assert whole.log[-1]["loss"] < whole.log[0]["loss"]
    written = json.loads((whole.out / "adapter_config.json").read_text())
    assert written["target_parameters"] == ["experts.down_proj", "experts.gate_up_proj"]
    with pytest.raises(KeyboardInterrupt):
        start("parts", Stop(), log_every=1, **settings)
    parts = start("parts", log_every=1, **settings)
    one, other = ((run.out / "adapter_model.safetensors").read_bytes() for run in (whole, parts))
    assert one == other
