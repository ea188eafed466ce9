"""What a family gets without a line of its own: training, diff, graft, merge, plan, lens, attention maps, patterns."""

import dataclasses
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import lapis
from lapis.checkpoint import open_checkpoint
from lapis.errors import LapisError
from lapis.families import family_of, part_of
from lapis.families.patterns import covered_parts
from lapis.inside.attention_map import attention_maps
from lapis.inside.trace import anatomy
from lapis.model.load import load, save
from lapis.model.transformer import Transformer
from lapis.planning.pieces import pieces_of
from lapis.text.corpus.corpus import Document
from lapis.text.tokenizer.tokenizer import Tokenizer, train_tokenizer
from lapis.weights.matching import is_norm, is_vocabulary
from tests.model.conftest import SHAPES

READING = [name for name, shape in SHAPES.items() if shape.head in ("lm", "masked")]
TEXT = "the red is not the blue. a cat goes with a dog, and the sun with the moon."


@pytest.fixture(scope="module")
def words() -> Tokenizer:
    return train_tokenizer([TEXT * 8], 300)


@pytest.fixture(scope="module", params=READING)
def family(request, words, tmp_path_factory) -> SimpleNamespace:
    """base, and chat: a step of every weight towards what a chat says."""
    root: Path = tmp_path_factory.mktemp(request.param)
    shape = dataclasses.replace(SHAPES[request.param], vocab=words.rows, context=64)
    if shape.layer_inputs is not None:  # which has a row for each token, too
        inputs = dataclasses.replace(shape.layer_inputs, vocab=words.rows)
        shape = dataclasses.replace(shape, layer_inputs=inputs)
    torch.manual_seed(0)
    model = Transformer(shape)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * (0.05 if parameter.dim() == 1 else 0.1))
    for name in ("base", "chat"):
        save(model.eval(), root / name)
        words.save(root / name)
        if name == "base":
            ids = torch.tensor([words.encode(text * 8)[:40] for text in (TEXT, "red. not the blue. ")])
            with torch.enable_grad():
                model.requires_grad_(True)
                logits_BTV = model(ids[:, :-1])
                torch.nn.functional.cross_entropy(logits_BTV.flatten(0, 1), ids[:, 1:].flatten()).backward()
            with torch.no_grad():
                for parameter in model.parameters():
                    if parameter.grad is not None:
                        parameter.sub_(0.01 * parameter.grad / (parameter.grad.norm() + 1e-9) * parameter.norm())
    return SimpleNamespace(name=request.param, shape=shape, base=root / "base", chat=root / "chat")


def test_training_lets_the_loss_fall(family, words, tmp_path):
    documents = [Document(TEXT[i % 7 :] * 3, tmp_path / "t.txt", i) for i in range(16)]
    config = lapis.TrainConfig(
        steps=12, batch=2, lr=3e-3, precision="float32", threads=1, log_every=1, compile="off", sample_every=0
    )
    model = load(family.base)
    if family.shape.causal:
        result = lapis.train(model, lapis.Causal(words, documents, context=32), config, out=tmp_path / "run")
    else:
        pieces = train_tokenizer([TEXT * 8], words.rows, "masked")
        result = lapis.train(model, lapis.Masked(pieces, documents, context=32), config, out=tmp_path / "run")
    assert result.log[-1]["loss"] < result.log[0]["loss"] - (0.1 if family.shape.logit_divisor < 8 else 0.005)
    assert load(tmp_path / "run").config == family.shape


def test_diff_names_every_layer_and_component(family):
    table = lapis.diff(family.base, family.chat)
    known = {part_of(name).group for name in Transformer(family.shape).state_dict()}
    assert {row["layer"] for row in table.tensors} == {None, *range(family.shape.layers)}
    fused = {"attn.qkv", "mlp.gate_up", "attn.q_gate", "delta.qkv_gate", "delta.beta_decay"}
    assert {lapis_group(row["component"]) for row in table.tensors} <= known | fused
    assert not table.only_in_a and not table.only_in_b and not any("not known" in note for note in table.notes)


def lapis_group(component: str) -> str:
    return part_of(f"blocks.0.{component}.weight").group


def test_graft_adds_the_difference_and_merge_means(family, tmp_path):
    lapis.graft(base=family.base, chat=family.chat, onto=family.base, out=tmp_path / "graft")
    chat, base = open_checkpoint(family.chat), open_checkpoint(family.base)
    for name in chat.names:
        part = chat.part(name)
        own = chat if not (is_norm(part) or is_vocabulary(part)) else base
        if not is_vocabulary(part):  # of these the template's rows are chat's
            torch.testing.assert_close(
                open_checkpoint(tmp_path / "graft").read(name), own.read(name), atol=1e-6, rtol=0
            )
    lapis.merge(f'0.5*"{family.base}" + 0.5*"{family.chat}"', tmp_path / "merge")
    merged = open_checkpoint(tmp_path / "merge")
    for name in chat.names:
        mean = (base.read(name) + chat.read(name)) / 2
        torch.testing.assert_close(merged.read(name), mean, atol=1e-6, rtol=0)
    assert load(tmp_path / "merge").config == family.shape


def test_a_plan_has_a_piece_for_every_matrix_of_a_layer(family):
    checkpoint = open_checkpoint(family.base)
    for size in ("layers", "halves", "components"):
        names = [name for piece in pieces_of(checkpoint, size) for name in piece.names]
        layered = {name for name in checkpoint.names if checkpoint.part(name).layer is not None}
        assert len(names) == len(set(names)) and set(names) <= layered
        assert all(is_norm(checkpoint.part(name)) for name in layered - set(names))
    if not family.shape.causal:
        with pytest.raises(LapisError, match="no causal language model"):
            lapis.plan(family.base, family.chat, budget=0.6)
        return
    plan = lapis.plan(family.base, family.chat, budget=0.6, pieces="halves")
    assert {row["layer"] for row in plan.scores} == set(range(family.shape.layers)) and plan.tune
    model = load(family.base)
    chosen = covered_parts([f"{e['layer']}.{e['component']}" for e in plan.tune], parts_of(model), "plan")
    assert chosen and all(part.layer in plan.layers for part in chosen)


def parts_of(model):
    return [part_of(name) for name, _ in model.named_parameters()]


def test_patterns_choose_layers_and_components(family):
    parts = parts_of(load(family.base))
    where = family_of(family.shape)
    last = family.shape.layers - 1
    assert {part.layer for part in covered_parts([f"layers.{last}"], parts, "tune", where)} == {last}
    mlp = covered_parts(["mlp"], parts, "tune", where)
    assert {part.layer for part in mlp} == set(range(family.shape.layers))
    mixers = covered_parts(["attn", "delta"] if family.shape.delta else ["attn"], parts, "tune", where)
    assert {part.layer for part in mixers} == set(range(family.shape.layers)) and not mixers & mlp
    assert covered_parts(["all"], parts, "tune", where) == set(parts)


def test_the_lens_reads_every_layer_and_names_what_writes(family, words):
    model = load(family.base)
    if not family.shape.causal:
        with pytest.raises(LapisError, match="is an encoder"):
            lapis.lens(model, words, "the red is not the")
        return
    trace = lapis.lens(model, words, "the red is not the", track=["Malaysia"])
    assert [reading.layer for reading in trace.layers] == list(range(family.shape.layers))
    with torch.inference_mode():
        chances_V = model(torch.tensor([trace.ids]))[0, -1].double().softmax(-1)
    _, index, share = trace.readings[-1].top[0]
    assert index == int(chances_V.argmax()) and share == pytest.approx(float(chances_V.max()), rel=1e-4)
    for spelling in trace.words[0].spellings:  # of several tokens
        with torch.inference_mode():
            said_TV = model(torch.tensor([[*trace.ids, *spelling.ids]]))[0].double().log_softmax(-1)
        total = sum(float(said_TV[len(trace.ids) - 1 + i, index]) for i, index in enumerate(spelling.ids))
        assert len(spelling.ids) > 1
        assert trace.readings[-1].spellings[spelling.text]["logprob"] == pytest.approx(total, rel=1e-4)
    states = set() if family.shape.delta is None else set(family.shape.delta.layers)
    assert {r.layer for r in trace.readings if r.after == "delta net"} == states
    if trace.contributions:
        assert {c.layer for c in trace.contributions if c.part == "delta net"} == states
        assert {c.layer for c in trace.contributions if c.part == "head"} == set(range(family.shape.layers)) - states
        assert sum(abs(c.logit) for c in trace.contributions if c.part == "rounding") < 1e-3


def test_attention_maps_are_weights_in_layers_that_have_any(family, words):
    model = load(family.base)
    if not family.shape.causal:
        with pytest.raises(LapisError, match="is an encoder"):
            attention_maps(model, words, "the red is", [(0, 0)])
        return
    parts = anatomy(model)
    for layer in range(family.shape.layers):
        if layer in parts.states:
            with pytest.raises(LapisError, match=rf"layer {layer} of .* is a delta net"):
                attention_maps(model, words, "the red is", [(layer, 0)])
            continue
        (head,) = attention_maps(model, words, "the red is", [(layer, 0)])
        sums_T = head.weights_TS.sum(1)
        assert (sums_T <= 1 + 1e-5).all() and (head.weights_TS.triu(1) == 0).all()
        assert (
            torch.allclose(sums_T, torch.ones_like(sums_T), atol=1e-5) or family.name == "gpt_oss"
        )  # sinks take a part
