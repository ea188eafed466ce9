"""The first weights that copy: where their heads look, before any training, and what the model says with them."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lapis.errors import ConfigError
from lapis.families.config import ModelConfig
from lapis.model.transformer import Transformer
from lapis.tour.setup.copying import write_copying
from lapis.tour.setup.size import StorySize

SHAPES = [StorySize.of(minutes, real=real).model(3000) for minutes, real in [(5.0, False), (1.0, False), (5.0, True)]]
WORDS = 100


def said_twice(rows: int) -> Tensor:
    """Random words, and the same words again: [rows, 2 WORDS]."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(3000, (rows, WORDS), generator=generator).repeat(1, 2)


def attention(model: Transformer, ids_BT: Tensor) -> list[Tensor]:
    """Weights of each block, [B, H, T, T]."""
    weights: list[Tensor] = []
    for block in model.blocks:
        block.attn.core.register_forward_hook(
            lambda core, args, _: weights.append(core.weights(args[0], args[1], args[3], args[4]))
        )
    with torch.no_grad():
        model(ids_BT)
    return weights


@pytest.mark.parametrize("shape", SHAPES, ids=["world", "short", "real"])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_heads_look_at_the_word_before_and_at_what_followed(shape: ModelConfig, seed: int) -> None:
    torch.manual_seed(seed)
    model = Transformer(shape)
    write_copying(model)
    first, second = attention(model, said_twice(4))[:2]
    before = first.diagonal(-1, 2, 3).mean((0, 2))  # of each head: the weight on the place before
    followed = second[:, :, WORDS:].diagonal(1, 2, 3).mean((0, 2))  # on the place behind the same word's first
    served = shape.heads // shape.kv_heads
    assert before[0] > 0.8 and before[served] > 0.8 and before[1 if served > 1 else 2] < 0.1
    assert followed[0] > 5 / WORDS and followed[served] > 5 / WORDS


@pytest.mark.parametrize("shape", SHAPES, ids=["world", "short", "real"])
def test_a_word_that_was_said_before_is_likelier_at_once(shape: ModelConfig) -> None:
    torch.manual_seed(0)
    model, ids_BT = Transformer(shape), said_twice(8)

    def nll() -> float:
        with torch.no_grad():
            logits_BTV = model(ids_BT)[:, WORDS:-1].float()
        return F.cross_entropy(logits_BTV.flatten(0, 1), ids_BT[:, WORDS + 1 :].flatten()).item()

    random = nll()
    write_copying(model)
    assert nll() < random - 0.05


def test_all_other_weights_stay_and_a_seed_gives_the_same() -> None:
    def made(write: bool) -> dict[str, Tensor]:
        torch.manual_seed(3)
        model = Transformer(SHAPES[0])
        if write:
            write_copying(model)
        return dict(model.state_dict())

    plain, once, again = made(False), made(True), made(True)
    changed = {name for name, weight in plain.items() if not torch.equal(weight, once[name])}
    expected = {f"blocks.{layer}.attn.{part}.weight" for layer in (0, 1) for part in "qkvo"}
    assert changed == {"embed.weight", "head.weight", *expected} & set(plain)
    assert all(torch.equal(once[name], again[name]) for name in once)
    assert torch.equal(plain["embed.weight"][:, 1:], once["embed.weight"][:, 1:])


@pytest.mark.parametrize("change", [{"positions": "learned"}, {"layers": 1}, {"qk_norm": True}, {"tied": False}])
def test_a_model_that_cannot_have_them_is_refused(change: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match="first weights that copy"):
        write_copying(Transformer(dataclasses.replace(SHAPES[0], **change)))  # type: ignore[arg-type]
