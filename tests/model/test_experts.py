"""Mixtures of experts: the balance loss beside transformers', and in a step of training; folders that do not fit."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers

from lapis.errors import CheckpointError, ConfigError
from lapis.families import PRESETS, find, part_of
from lapis.families.config import Experts, ModelConfig
from lapis.families.patterns import covered_parts
from lapis.model.blocks.experts import MixtureOfExperts, few_shapes
from lapis.model.load import load, save
from lapis.model.transformer import Transformer
from lapis.training.objectives.balance import balance_loss, watched_choices
from tests.model.conftest import SHAPES

IDS = torch.tensor([[3, 4, 5, 30, 7, 8], [9, 30, 11, 4, 13, 14]])
MASK = torch.tensor([[True] * 6, [True] * 4 + [False] * 2])


def mixture(kind: str, balance: float = 0.5) -> Transformer:
    shape = SHAPES[kind]
    assert shape.experts is not None
    torch.manual_seed(0)
    model = Transformer(dataclasses.replace(shape, experts=dataclasses.replace(shape.experts, balance=balance)))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    return model


@pytest.mark.parametrize("kind", ["qwen3_moe", "qwen2_moe", "mixtral", "olmoe", "gpt_oss", "qwen3_5_moe", "qwen3_next"])
def test_balance_loss_and_its_gradient_are_transformers(kind: str, tmp_path: Path) -> None:
    ours = mixture(kind)
    save(ours, tmp_path)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    assert theirs.config.router_aux_loss_coef == 0.5
    for mask in (None, MASK):
        ours.zero_grad()
        theirs.zero_grad()
        with watched_choices(ours) as choices:
            ours.hidden(IDS, mask)
        loss = balance_loss(choices)
        expected = theirs(IDS, attention_mask=mask, output_router_logits=True).aux_loss
        loss.backward()
        expected.backward()
        torch.testing.assert_close(loss, expected, rtol=0, atol=1e-5)
        routers = 0
        for here, there in zip(ours.blocks, theirs.model.layers, strict=True):
            router = getattr(there.mlp, "gate", getattr(there.mlp, "router", None))
            if router is not None:  # and no ordinary MLP
                assert router.weight.grad.abs().max() > 1e-4
                torch.testing.assert_close(here.mlp.router.weight.grad, router.weight.grad, rtol=2e-4, atol=1e-5)
                routers += 1
        assert routers >= 2


def test_nothing_is_watched_where_no_loss_is_wanted() -> None:
    for model in (mixture("mixtral", 0.0), Transformer(SHAPES["llama"])):
        with watched_choices(model) as choices:
            model.hidden(IDS)
        assert choices == []


def test_a_token_alone_goes_through_its_experts_only() -> None:
    """One expert after the other, written out in float64."""
    block = mixture("olmoe").double().blocks[0].mlp
    assert isinstance(block, MixtureOfExperts)
    x_ND = torch.randn(7, 16, dtype=torch.float64)
    expected = torch.zeros_like(x_ND)
    for token, x_D in enumerate(x_ND):
        chances = block.router(x_D[None])[0].float().softmax(0)
        for expert in chances.argsort(descending=True)[: block.settings.active].tolist():
            expected[token] += chances[expert].double() * block.experts[expert](x_D)
    with torch.no_grad():
        torch.testing.assert_close(block(x_ND), expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(block(x_ND), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("kind", ["olmoe", "gpt_oss", "gemma4-experts"])
def test_products_in_bfloat16_have_few_shapes(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """oneDNN keeps a kernel for each: 1,024 of them held 700 MB. The rows that are added change nothing."""
    model, ids = mixture(kind).bfloat16(), torch.randint(0, 31, (3, 23))
    rows: set[int] = set()
    product = F.linear

    def seen(x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if x.dim() == 2 and x.shape[0] != ids.numel():  # of experts, and not of all tokens
            rows.add(len(x))
        return product(x, *args, **kwargs)

    def outcome() -> tuple[torch.Tensor, list[torch.Tensor | None]]:
        model.zero_grad()
        out = model(ids)
        out.float().square().mean().backward()
        return out, [parameter.grad for parameter in model.parameters()]

    out, grads = outcome()
    monkeypatch.setattr("lapis.model.blocks.experts.few_shapes", lambda count: count)
    plain, expected = outcome()
    torch.testing.assert_close(out, plain, rtol=2e-2, atol=2e-2)
    for one, other in zip(grads, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=5e-2, atol=2e-2)
    monkeypatch.undo()
    monkeypatch.setattr(F, "linear", seen)
    if kind != "gpt_oss":  # whose products are no F.linear
        for learns in (True, False):
            with torch.set_grad_enabled(learns):
                model(ids)
        assert len(rows) > 1 and all(few_shapes(count) == count for count in rows)


def test_few_shapes() -> None:
    assert [few_shapes(rows) for rows in (0, 1, 2, 3, 33, 64, 65, 128, 129)] == [0, 1, 2, 4, 64, 64, 128, 128, 192]


def test_patterns_choose_router_one_expert_or_all() -> None:
    names = [name for name, _ in mixture("qwen3_moe").named_parameters()]
    parts = {name: part_of(name) for name in names}
    family = find({"model_type": "qwen3_moe"})

    def chosen(pattern: str) -> int:
        covered = covered_parts([pattern], parts.values(), "test", family)
        return sum(part in covered for part in parts.values())

    counts = {"mlp.router": 2, "mlp.experts": 24, "experts": 24, "mlp.experts.2": 6, "mlp.experts.down": 8,
              "layers.1.mlp.experts.3.gate": 1, "gate_proj": 8}  # fmt: skip
    assert {pattern: chosen(pattern) for pattern in counts} == counts


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_experts": 6}, "config.json says 6 experts, the tensors have 4"),
        ({"num_experts": 3}, "config.json says 3 experts, the tensors have 4"),
        ({"num_experts_per_tok": 5}, "active is 5; expected 1 to 4"),
        ({"moe_intermediate_size": 30}, "gate_proj.weight is 24x16 but 30x16 by config.json"),
        ({"decoder_sparse_step": 2}, "has no place by config.json"),
        ({"mlp_only_layers": [2]}, r"mlp_only_layers is \[2\]; expected a list of layers from 0 to 1"),
        ({"mlp_only_layers": [0, 1]}, "leave no layer with experts"),
        ({"router_aux_loss_coef": -1.0}, "router_aux_loss_coef is -1.0"),
        ({"num_experts": 99_999}, "2 layers of 99,999 experts"),
    ],
)
def test_a_folder_that_does_not_fit_is_one_line(
    make_folder: Callable[..., Any], fields: dict[str, Any], message: str
) -> None:
    folder = make_folder("qwen3_moe")
    folder.set(**fields)
    with pytest.raises(CheckpointError, match=message):
        load(folder.path)


def test_a_router_of_another_shape_is_one_line(make_folder: Callable[..., Any]) -> None:
    folder = make_folder("qwen3_moe")
    name = "model.layers.1.mlp.gate.weight"
    folder.put({**folder.tensors, name: torch.zeros(5, 16)})
    with pytest.raises(CheckpointError, match=f"{name} is 5x16 but 4x16 by config.json"):
        load(folder.path)


def test_what_a_folder_cannot_say_is_refused() -> None:
    family = find(PRESETS["mixtral-8x7b"])
    assert family is not None
    shape = SHAPES["mixtral"]
    for experts in (Experts(4, 2, False), Experts(4, 2, True, 8), None):
        with pytest.raises(ConfigError, match="has no place in a mixtral folder"):
            family.write_config(dataclasses.replace(shape, experts=experts))
    with pytest.raises(ConfigError, match="a mixtral model has experts"):
        Transformer(ModelConfig(dim=16, layers=1, heads=2, ffn_dim=8, vocab=9, context=8, family="mixtral"))
