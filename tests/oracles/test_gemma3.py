"""Gemma 3 beside transformers, as a family whose block is its own: it generates, trains, and every room takes it."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import lapis
from lapis.checkpoint import open_checkpoint
from lapis.families.config import ModelConfig, Rope
from lapis.inside.trace import anatomy, trace
from lapis.model.cache import Cache
from lapis.model.check import plan_load
from lapis.model.load import load, save
from lapis.model.transformer import Transformer
from lapis.text.chat.chat import encode_chat
from lapis.text.tokenizer.tokenizer import Tokenizer, train_tokenizer

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()

TEXT = "the red is not the blue. a cat goes with a dog, and one goes with two. "
TALK = [{"role": "user", "content": "red"}, {"role": "assistant", "content": "not blue"}]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_tokenizer([TEXT * 40], 300)


def make(seed: int, vocab: int, **fields: Any) -> Transformer:
    torch.manual_seed(seed)
    shape: dict[str, Any] = {
        "dim": 32, "layers": 4, "heads": 4, "kv_heads": 2, "head_dim": 12, "ffn_dim": 48, "vocab": vocab, "context": 64,
        "family": "gemma3_text", "qk_norm": True, "mlp": "geglu_tanh", "tied": True, "query_scalar": 20.0, "window": 6,
        "window_layers": (0, 1, 3), "rope": Rope(theta=1e6), "window_rope": Rope(theta=1e4),
    }  # fmt: skip
    model = Transformer(ModelConfig(**{**shape, **fields})).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


@pytest.fixture(scope="module")
def folders(tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """base, chat (base that learned one reply) and onto (a little away from base)."""
    root, made = tmp_path_factory.mktemp("gemma"), {}
    for role in ("base", "chat", "onto"):
        model, made[role] = make(0, tokenizer.rows), root / role
        if role == "chat":
            ids, replies = (torch.tensor(each)[None] for each in encode_chat(tokenizer, TALK))
            optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
            for _ in range(10):
                optimizer.zero_grad()
                logits, target = model(ids)[:, :-1][replies[:, 1:]], ids[:, 1:][replies[:, 1:]]
                torch.nn.functional.cross_entropy(logits, target).backward()
                optimizer.step()
        elif role == "onto":
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.add_(torch.randn_like(parameter) * 0.02)
        save(model, made[role])
        tokenizer.save(made[role])
    return made


@pytest.mark.parametrize("layer_types", [True, False])
def test_older_fields_of_config_json_mean_the_same(layer_types: bool, tmp_path: Path) -> None:
    model = make(1, 97, layers=6, window_layers=(0, 1, 3, 4), rope=Rope(theta=7e5, kind="linear", factor=4.0))
    save(model, tmp_path)
    fields = json.loads((tmp_path / "config.json").read_text())
    del fields["rope_parameters"]
    if not layer_types:
        fields = {**fields, "layer_types": None, "sliding_window_pattern": 3}
    (tmp_path / "config.json").write_text(json.dumps(fields))
    ids = torch.arange(20)[None]
    again = load(tmp_path)
    assert again.config == model.config
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    assert (theirs(ids).logits - again(ids)).abs().max() <= 1e-5


def test_greedy_text_equals_transformers_past_the_window(folders: dict[str, Path], tokenizer: Tokenizer) -> None:
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folders["base"], dtype=torch.float32)
    for prompt in ("the red is", TEXT[:60]):
        ids = torch.tensor([tokenizer.encode(prompt)])
        expected = theirs.generate(ids, max_new_tokens=30, do_sample=False, eos_token_id=None, pad_token_id=0)
        ours, cached, plain, step = load(folders["base"]), [], ids, ids
        cache = Cache(ours.config, 1, 4)
        for _ in range(30):
            cached.append(int(ours(step, cache=cache)[0, -1].argmax()))
            assert int(ours(plain)[0, -1].argmax()) == cached[-1]
            step = torch.tensor([[cached[-1]]])
            plain = torch.cat((plain, step), 1)
        assert expected[0, ids.shape[1] :].tolist() == cached


def test_gradients_equal_those_of_transformers(folders: dict[str, Path]) -> None:
    ours = load(folders["base"]).train()
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folders["base"], dtype=torch.float32).train()
    ids = torch.randint(0, 250, (2, 17), generator=torch.Generator().manual_seed(0))
    theirs(ids, labels=ids).loss.backward()
    torch.nn.functional.cross_entropy(ours(ids)[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).backward()
    grads = {name: parameter.grad for name, parameter in theirs.named_parameters()}
    names = {targets[0]: name for name, _, targets in plan_load(open_checkpoint(folders["base"])).steps}
    for name, parameter in ours.named_parameters():
        true = grads[names[name]]
        assert (parameter.grad - true).norm() <= 1e-4 * true.norm() + 1e-8, name


def test_a_new_one_learns_by_the_settings_of_a_user(tokenizer: Tokenizer, tmp_path: Path) -> None:
    (tmp_path / "t.txt").write_text(TEXT * 30)
    tokenizer.save(tmp_path / "words")
    sizes = {"dim": 32, "layers": 2, "heads": 2, "ffn_dim": 64}
    settings = {
        "new": {"family": "gemma3_text", **sizes, "window": 8, "window_layers": [0]},
        "tokenizer": str(tmp_path / "words"), "data": str(tmp_path / "t.txt"), "context": 32, "steps": 30, "batch": 4,
        "out": str(tmp_path / "out"), "objective": "causal",
    }  # fmt: skip
    (tmp_path / "run.yaml").write_text(json.dumps(settings))
    from lapis.cli.main import main

    main(["train", str(tmp_path / "run.yaml"), "--json"])
    model = load(tmp_path / "out")
    assert model.config.tied and model.config.qk_norm and model.config.window_rope == Rope(theta=1e4)
    ids = torch.tensor([tokenizer.encode(TEXT)])
    assert float(torch.nn.functional.cross_entropy(model(ids).detach()[0, :-1], ids[0, 1:])) < 3.0
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    assert (theirs(ids).logits - model(ids)).abs().max() <= 1e-5


def test_lens_diff_graft_and_plan_open_it(folders: dict[str, Path], tokenizer: Tokenizer, tmp_path: Path) -> None:
    base, chat, onto = (folders[role] for role in ("base", "chat", "onto"))
    components = {row["component"] for row in lapis.diff(base, chat).tensors}
    assert {"norm.attn_out", "norm.mlp_out", "attn.q_norm", "mlp.gate", "embed"} <= components
    lapis.graft(base=base, chat=chat, onto=onto, out=tmp_path / "out")
    ids = torch.arange(20)[None]
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    assert (theirs(ids).logits - load(tmp_path / "out")(ids)).abs().max() <= 1e-5
    model = load(base)
    lens = lapis.lens(model, tokenizer, "the red is not", track=["blue"])
    assert lens.layers[-1].kl_to_final == pytest.approx(0, abs=1e-6)
    parts = anatomy(model)
    states = trace(parts, ids, (torch.tensor([0]), torch.tensor([19])))
    assert states.adds_up
    for before, added, after in zip(states.middle_LPD, states.mlp_LPD, states.after_LPD, strict=True):
        torch.testing.assert_close(before + added, after)
    chats = tmp_path / "chats.jsonl"
    chats.write_text(json.dumps({"messages": TALK}) + "\n")
    assert lapis.plan(base, chat, budget=0.5, chats=chats).layers
