"""The loops that benchmarks/train.py runs lapis beside: a bare GPT with fused AdamW, and transformers' Trainer.

Each yields the seconds of a step. The GPT is nanoGPT's model written short: learned positions, LayerNorm, GELU, tied
head, SDPA. The Trainer trains transformers' GPT-2 of the same shape, with fused AdamW and bfloat16, its reports off.
"""

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class BareBlock(nn.Module):
    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.ln1, self.ln2 = nn.LayerNorm(dim, bias=False), nn.LayerNorm(dim, bias=False)
        self.qkv, self.o = nn.Linear(dim, 3 * dim, bias=False), nn.Linear(dim, dim, bias=False)
        self.up, self.down = nn.Linear(dim, 4 * dim, bias=False), nn.Linear(4 * dim, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        B, T, D = x.shape
        q, k, v = (part.view(B, T, self.heads, -1).transpose(1, 2) for part in self.qkv(self.ln1(x)).split(D, 2))
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.o(mixed.transpose(1, 2).reshape(B, T, D))
        return x + self.down(F.gelu(self.up(self.ln2(x))))


class BareGPT(nn.Module):
    def __init__(self, dim: int, layers: int, heads: int, vocab: int, context: int) -> None:
        super().__init__()
        self.tokens, self.places = nn.Embedding(vocab, dim), nn.Embedding(context, dim)
        self.blocks = nn.ModuleList(BareBlock(dim, heads) for _ in range(layers))
        self.ln = nn.LayerNorm(dim, bias=False)
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2:
                scale = (2 * layers) ** -0.5 if name.endswith(("o.weight", "down.weight")) else 1.0
                nn.init.normal_(parameter, 0.0, 0.02 * scale)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.tokens(ids) + self.places(torch.arange(ids.shape[1], device=ids.device))
        for block in self.blocks:
            x = block(x)
        return F.linear(self.ln(x), self.tokens.weight)


def bare_steps(
    batches: Iterator[tuple[Tensor, Tensor]], shape: dict[str, int], lr: float, seed: int = 0
) -> Iterator[Any]:
    """(seconds, model) of each step, without end."""
    torch.manual_seed(seed)
    model = BareGPT(shape["dim"], shape["layers"], shape["heads"], shape["vocab"], shape["context"])
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    while True:
        begin = time.perf_counter()
        ids, targets = next(batches)
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(ids)
            loss = F.cross_entropy(logits.view(-1, logits.shape[-1]).float(), targets.view(-1), ignore_index=-100)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        loss.item()
        yield time.perf_counter() - begin, model


def trainer_seconds(ids: Tensor, shape: dict[str, int], batch: int, steps: int, place: Path) -> list[float]:
    """Seconds of each step of transformers' Trainer on rows of token ids."""
    from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainerCallback, TrainingArguments

    class Clock(TrainerCallback):  # type: ignore[misc]
        def __init__(self) -> None:
            self.ends: list[float] = []

        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            self.ends.append(time.perf_counter())

    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(
        n_embd=shape["dim"], n_layer=shape["layers"], n_head=shape["heads"], vocab_size=shape["vocab"],
        n_positions=shape["context"], resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, use_cache=False,
        bos_token_id=None, eos_token_id=None,
    ))  # fmt: skip
    arguments = TrainingArguments(
        output_dir=str(place), per_device_train_batch_size=batch, max_steps=steps, bf16=True, use_cpu=True,
        optim="adamw_torch_fused", learning_rate=1e-3, max_grad_norm=1.0, report_to="none", save_strategy="no",
        logging_strategy="no", disable_tqdm=True, dataloader_num_workers=0, dataloader_pin_memory=False,
    )  # fmt: skip
    rows = [{"input_ids": row, "labels": row} for row in ids]
    clock = Clock()
    Trainer(model=model, args=arguments, train_dataset=rows, callbacks=[clock]).train()
    return [later - earlier for earlier, later in zip(clock.ends, clock.ends[1:], strict=False)]
