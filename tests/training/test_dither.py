"""Dither: updates smaller than a step of bfloat16 are seen by products, and the weights are put back to the bit."""

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from lapis.model.transformer import Transformer
from lapis.text.corpus.corpus import Document
from lapis.text.tokenizer.tokenizer import Tokenizer
from lapis.training.config import TrainConfig
from lapis.training.distributed.pieces import own
from lapis.training.loop.loop import train
from lapis.training.loop.progress import Silent
from lapis.training.objectives.supervised.next_token import Causal
from lapis.training.optim.dither import Dither, hold_bfloat16, multiplied

Make = Callable[[], Transformer]
CONFIG = TrainConfig(
    steps=12, batch=8, lr=2e-5, warmup=0, schedule="constant", weight_decay=0.0, log_every=1, precision="bf16",
    threads=1, sample_every=0, compile="off", certify="off",
)  # fmt: skip


@pytest.fixture
def objective(tokenizer: Tokenizer, documents: list[Document]) -> Causal:
    return Causal(tokenizer, documents[:24], context=64)


@pytest.fixture
def public(new_model: Make) -> Make:
    """Makes a model whose weights were stored in bfloat16, as those of public models are."""
    return lambda: new_model().bfloat16().float()


def numbers(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1)).bfloat16().float()


def curve(model: Transformer, objective: Causal, out: Path, **changes: Any) -> list[float]:
    result = train(model, objective, replace(CONFIG, **changes), out, watch=Silent())
    return [row["loss"] for row in result.log]


def test_products_are_those_of_before_and_weights_come_back() -> None:
    matrix, other = nn.Parameter(numbers(300, 257)), nn.Parameter(torch.randn(40, 30))
    with torch.no_grad():
        matrix[3], matrix[4, :9] = 0.0, -0.0
        other[0] = 1e-39  # below what float32 holds with all its bits
    before = [p.detach().clone().view(torch.int32) for p in (matrix, other)]
    with Dither([matrix, other]).applied():
        assert torch.equal(matrix.bfloat16(), before[0].view(torch.float32).bfloat16())
        off = matrix.detach().view(torch.int32) != before[0]
        assert off.float().mean() > 0.98 and not off[3].any() and matrix.isfinite().all()
        assert torch.equal(other[0], before[1].view(torch.float32)[0])
    assert all(torch.equal(p.detach().view(torch.int32), bits) for p, bits in zip((matrix, other), before, strict=True))


@pytest.mark.parametrize("share", [0.02, 0.1, 0.4])
def test_a_small_update_is_seen_as_large_as_it_is(share: float) -> None:
    """share: of a step between two bfloat16 numbers, by which all weights grow."""
    start = numbers(512, 400)
    one = torch.exp2(start.abs().log2().floor() - 7)  # the step at each weight
    matrix = nn.Parameter(start + start.sign() * share * one)
    assert torch.equal(matrix.bfloat16().float(), start), "without dither nothing of it is seen"
    with Dither([matrix]).applied():
        seen = ((matrix.bfloat16().float() - start) * start.sign() / one).mean().item()
    assert seen == pytest.approx(share, rel=0.05)


def test_two_matrices_and_two_rows_are_off_differently() -> None:
    one, two = nn.Parameter(torch.full((64, 32), 1.5)), nn.Parameter(torch.full((64, 32), 1.5))
    with Dither([one, two]).applied():
        assert (one == two).float().mean() < 0.01 and len(one.unique(dim=0)) == 64
        assert abs((one - 1.5).mean().item()) < 2**-8 / 20


def test_which_models_need_it(public: Make, new_model: Make) -> None:
    assert hold_bfloat16(multiplied(public())) and not hold_bfloat16(multiplied(new_model()))
    model = public()
    names = {name for name, p in model.named_parameters() if any(p is other for other in multiplied(model))}
    assert "blocks.0.attn.q.weight" in names and not any(name.startswith(("embed", "norm")) for name in names)
    for parameter in model.blocks.parameters():
        parameter.requires_grad_(False)
    assert not hold_bfloat16(multiplied(model)) and not hold_bfloat16([torch.zeros(4, 4)])


def test_training_in_bf16_has_the_curve_of_float32(public: Make, objective: Causal, tmp_path: Path) -> None:
    """Weights of 0.16, whose half steps are 5e-4, at a rate below half of that, on the same rows each time."""

    def only_matrices() -> Transformer:
        model = public()
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name.startswith("blocks") and parameter.ndim == 2)
            if parameter.requires_grad:
                parameter.data *= 8
        return model

    changes = {"batch": objective.rows, "lr": 2e-4}
    exact = curve(only_matrices(), objective, tmp_path / "float32", precision="float32", **changes)
    seen = curve(only_matrices(), objective, tmp_path / "bf16", **changes)
    apart = max(abs(one - other) for one, other in zip(exact, seen, strict=True))
    assert exact[0] - exact[-1] > 0.05 and apart < 0.01 * (exact[0] - exact[-1])
    assert seen[0] - seen[1] == pytest.approx(exact[0] - exact[1], rel=0.1)


def test_a_run_that_was_stopped_gives_the_same_bytes(
    public: Make, objective: Causal, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    curve(public(), objective, tmp_path / "whole")

    class Ends(Silent):
        def step(self, row: Any) -> None:
            if row["step"] == 7:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(public(), objective, replace(CONFIG, save_every=3), tmp_path / "cut", watch=Ends())
    (journal,) = tmp_path.glob(".cut.lapis/.journal")
    assert json.loads((journal / "run.json").read_text())["dither"] is True
    curve(public(), objective, tmp_path / "cut", save_every=3)
    for name in ("model.safetensors", "log.jsonl"):
        assert (tmp_path / "cut" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name


def cut_for(rank: int) -> None:
    """Asserts that the pieces of one process of four, on two machines, are off as they are in the whole."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor
    from torch.testing._internal.distributed.fake_pg import FakeStore

    matrices = [nn.Parameter(numbers(7, 5)), nn.Parameter(numbers(50, 23))]
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=4)
    how = {"device_mesh": init_device_mesh("cpu", (2, 2)), "placements": [Replicate(), Shard(0)]}
    pieces = [nn.Parameter(distribute_tensor(p.detach().clone(), **how, src_data_rank=None)) for p in matrices]
    with Dither(matrices).applied(), Dither(pieces).applied():
        for matrix, piece in zip(matrices, pieces, strict=True):
            assert torch.equal(own(piece.detach()), matrix.detach().chunk(2)[rank % 2])


@pytest.mark.parametrize("rank", [2, 3])
def test_a_piece_is_off_as_in_the_whole_matrix(rank: int) -> None:
    """In a process of its own, since torch remembers which process it was."""
    code = f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); from test_dither import *; cut_for({rank})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
