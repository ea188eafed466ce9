"""Training against a plain transformers loop with torch's AdamW: the same losses, gradients and weights."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from lapis.families.config import ModelConfig
from lapis.model.load import save
from lapis.model.transformer import Transformer
from lapis.text.corpus.corpus import ChatRecord, Document
from lapis.text.rows.rows import IGNORE, Cursor
from lapis.text.tokenizer.tokenizer import Tokenizer, train_tokenizer
from lapis.training.config import TrainConfig
from lapis.training.loop.loop import train
from lapis.training.loop.progress import Silent
from lapis.training.objectives.supervised.next_token import Causal, Chat

transformers = pytest.importorskip("transformers")

TEXT = " ".join(f"Tree {i} has {i * 3 % 7} birds and {i * 5 % 11} nests." for i in range(300))


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_tokenizer([TEXT], 300)


def pair(tokenizer: Tokenizer, folder: Path, tied: bool) -> tuple[Transformer, Any]:
    torch.manual_seed(3)
    config = ModelConfig(dim=32, layers=2, heads=4, kv_heads=2, ffn_dim=48, vocab=tokenizer.rows, context=64, tied=tied)
    ours = Transformer(config)
    save(ours, folder)
    return ours, transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).train()


def schedule(step: int, steps: int, warmup: int) -> float:
    return min((step + 1) / (warmup + 1), (steps - step) / (steps + 1))


@pytest.mark.parametrize("tied", [True, False])
def test_a_run_gives_the_weights_of_a_plain_loop(tokenizer: Tokenizer, tmp_path: Path, tied: bool) -> None:
    torch.set_num_threads(1)
    ours, theirs = pair(tokenizer, tmp_path / "start", tied)
    # one text that fills whole rows, since the other loop does not keep documents apart
    objective = Causal(tokenizer, [Document(TEXT, Path("t.txt"), 1)], context=32)
    config = TrainConfig(
        steps=8, batch=4, accumulate=2, lr=3e-3, warmup=0, decay=1.0, clip=0.5, weight_decay=0.1,
        precision="float32", threads=1, log_every=1, sample_every=0, seed=5,
    )  # fmt: skip
    log = train(ours, objective, config, tmp_path / "out", watch=Silent()).log

    decayed = [p for p in theirs.parameters() if p.ndim >= 2]
    others = [p for p in theirs.parameters() if p.ndim < 2]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}], lr=3e-3, betas=(0.9, 0.95)
    )
    cursor = Cursor(seed=5)
    for step in range(8):
        batch, cursor = objective.examples.batch(cursor, 4)
        logits = theirs(input_ids=batch.ids_BT).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch.targets_BT.flatten(), ignore_index=IGNORE)
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(theirs.parameters(), 0.5)
        for group in optimizer.param_groups:
            group["lr"] = 3e-3 * schedule(step, 8, 0)
        optimizer.step()
        assert log[step]["loss"] == pytest.approx(loss.item(), rel=1e-5)
        assert log[step]["grad_norm"] == pytest.approx(norm.item(), rel=1e-4)

    result = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    for (name, a), b in zip(result.named_parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=2e-5, msg=lambda m, name=name: f"{name}: {m}")


def test_chat_loss_is_transformers_loss_on_the_same_labels(tokenizer: Tokenizer, tmp_path: Path) -> None:
    ours, theirs = pair(tokenizer, tmp_path / "start", True)
    chat = ChatRecord(
        [
            {"role": "system", "content": "Short."},
            {"role": "user", "content": "How many birds?"},
            {"role": "assistant", "content": "3 birds."},
        ],
        Path("c.jsonl"),
        1,
    )
    objective = Chat(tokenizer, [chat], context=64)
    batch, _ = objective.examples.batch(Cursor(), 1)
    loss, count, _ = objective.loss(ours, batch)

    (folder := tmp_path / "tok").mkdir()
    tokenizer.save(folder)
    theirs_tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    ids = theirs_tokenizer.apply_chat_template(chat.messages, return_dict=False)
    prompt = theirs_tokenizer.apply_chat_template(chat.messages[:-1], add_generation_prompt=True, return_dict=False)
    end = len(ids) - 1 - ids[::-1].index(theirs_tokenizer.convert_tokens_to_ids("<|im_end|>"))
    labels = [i if len(prompt) <= place <= end else -100 for place, i in enumerate(ids)]
    expected = theirs(input_ids=torch.tensor([ids]), labels=torch.tensor([labels])).loss
    assert count == end + 1 - len(prompt)
    assert (loss / count).item() == pytest.approx(expected.item(), rel=1e-5)


def test_bfloat16_follows_float32(tokenizer: Tokenizer, tmp_path: Path) -> None:
    """The same run in bf16 autocast: the curve stays within a few hundredths of a nat."""
    curves = []
    make: Callable[[], Transformer] = lambda: pair(tokenizer, tmp_path / "start", True)[0]  # noqa: E731
    objective = Causal(tokenizer, [Document(TEXT, Path("t.txt"), 1)], context=32)
    for precision in ("float32", "bf16"):
        config = TrainConfig(
            steps=20, batch=4, lr=3e-3, precision=precision, threads=1, log_every=1, sample_every=0
        )  # fmt: skip
        log = train(make(), objective, config, tmp_path / precision, watch=Silent()).log
        curves.append([row["loss"] for row in log])
    assert curves[1] == pytest.approx(curves[0], abs=0.05)
