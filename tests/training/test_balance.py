"""Mixtures of experts in the loop: the balance loss is added to any objective's, and evens out the choices."""

import dataclasses
from pathlib import Path

import torch

from lapis.families.config import Experts, ModelConfig
from lapis.model.transformer import Transformer
from lapis.text.corpus.corpus import Document
from lapis.text.tokenizer.tokenizer import Tokenizer
from lapis.training.config import TrainConfig
from lapis.training.loop.loop import train
from lapis.training.loop.progress import Silent
from lapis.training.objectives.supervised.next_token import Causal
from lapis.training.result import TrainResult

CONFIG = TrainConfig(steps=12, batch=8, lr=1e-2, warmup=2, log_every=12, precision="float32", threads=1, sample_every=0)


def run(
    balance: float, tokenizer: Tokenizer, documents: list[Document], out: Path, config: TrainConfig = CONFIG
) -> tuple[Transformer, TrainResult]:
    torch.manual_seed(0)
    model = Transformer(ModelConfig(
        dim=24, layers=2, heads=2, ffn_dim=16, vocab=tokenizer.rows, context=64, family="olmoe", qk_norm=True,
        qk_norm_over="all", experts=Experts(4, 1, False, balance=balance),
    ))  # fmt: skip
    with torch.no_grad():
        model.blocks[0].mlp.router.weight[0].fill_(1.0)  # the choices of this one are not even
    return model, train(model, Causal(tokenizer, documents, context=32), config, out, watch=Silent())


def test_the_loop_adds_the_balance_loss(tokenizer: Tokenizer, documents: list[Document], tmp_path: Path) -> None:
    _, without = run(0.0, tokenizer, documents, tmp_path / "without")
    again, even = run(1.0, tokenizer, documents, tmp_path / "even")
    assert "balance" not in without.log[-1]["metrics"]
    assert even.log[-1]["metrics"]["balance"] >= 1.0  # as even as can be is 1
    assert even.log[-1]["loss"] > without.log[-1]["loss"]
    config = dataclasses.replace(CONFIG, checkpointing="whole")
    same, _ = run(1.0, tokenizer, documents, tmp_path / "recomputed", config)
    for one, two in zip(again.parameters(), same.parameters(), strict=True):
        assert torch.equal(one, two)
