"""Tuning a small public model on chats, beside transformers' Trainer with PEFT: speed, memory, and held-out loss.

    python benchmarks/tune_peers.py --only peer-lora    or peer-full, lapis-lora, lapis-full, score; idle machine
    python benchmarks/tune_peers.py --write             puts the pieces into benchmarks/results/tune_peers.md

Needs SmolLM2-135M-Instruct (LAPIS_MODELS/smollm2-it) and chats (LAPIS_DATA/instruct). Both sides see the same chats
once, rendered by the same template with loss on the same tokens, and begin from the same weights; products in bfloat16,
float32 for what is trained, AdamW (fused), one rate, which falls in a line. lapis packs chats into rows that segments
keep apart; the Trainer gets batches grouped by length and padded to their longest (--peer pad), or laid end to end in
one row and kept apart by positions (--peer flat). Under a LoRA (rank 16, alpha 32, all linear layers) what is frozen is
in bfloat16 on both sides. Each piece runs in a process of its own and leaves a JSON file in --folder; `score` measures
held-out chats of all folders by one scorer.
"""

import argparse
import itertools
import json
import os
import resource
import statistics
import sys
import time
from datetime import date
from pathlib import Path
from typing import Any

import torch
from hardware import processor
from results_file import add_table

CHATS, HELD_OUT, STEPS, CONTEXT, RANK = 96, 40, 6, 512, 16
RATES = {"lora": 2e-4, "full": 2e-5}
PIECES = ("peer-lora", "peer-full", "lapis-lora", "lapis-full")


def records(given: argparse.Namespace, name: str, count: int) -> list[tuple[list[Any], list[int], list[int]]]:
    """Messages, ids, and targets with -100 where nothing is learned, of the first chats that fit into a row."""
    from lapis.evaluation.chats import encode_record
    from lapis.text.corpus.corpus import chats
    from lapis.text.tokenizer.tokenizer import Tokenizer

    tokenizer, result = Tokenizer.open(given.model), []
    for chat in chats([given.data / "instruct" / name]):
        ids, learned = encode_record(tokenizer, chat)
        if len(ids) <= CONTEXT and len(result) < count:
            targets = [token if yes else -100 for token, yes in zip(ids, learned, strict=True)]
            result.append((chat.messages, ids, targets))
    return result


def peer(given: argparse.Namespace, kind: str, out: Path) -> dict[str, Any]:
    """transformers' Trainer, with PEFT where only an adapter is trained."""
    import transformers
    from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainerCallback, TrainingArguments

    transformers.logging.set_verbosity_error()
    examples = records(given, "en.jsonl", CHATS)
    rows = -(-len(examples) // STEPS)
    dtype = torch.bfloat16 if kind == "lora" else torch.float32
    model = AutoModelForCausalLM.from_pretrained(given.model, dtype=dtype, attn_implementation="sdpa")
    model.config.use_cache = False
    if kind == "lora":
        from peft import LoraConfig, get_peft_model

        model = get_peft_model(model, LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules="all-linear",
                                                 task_type="CAUSAL_LM"))  # fmt: skip
    pad = AutoTokenizer.from_pretrained(given.model).pad_token_id
    marks: list[tuple[float, float, int]] = []

    class Clock(TrainerCallback):  # type: ignore[misc]
        def on_step_end(self, *arguments: Any, **more: Any) -> None:
            marks.append((time.perf_counter(), time.process_time(), sum(learned[: len(marks) + 1])))

    learned: list[int] = []  # of each batch, which the Trainer takes one ahead

    def collate(batch: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        learned.append(sum(sum(target != -100 for target in each["labels"][1:]) for each in batch))
        if given.peer == "flat":
            ids = [token for each in batch for token in each["input_ids"]]
            labels = [target for each in batch for target in (-100, *each["labels"][1:])]
            places = [place for each in batch for place in range(len(each["input_ids"]))]
            return {name: torch.tensor([value]) for name, value in
                    (("input_ids", ids), ("labels", labels), ("position_ids", places))}  # fmt: skip
        longest = max(len(each["input_ids"]) for each in batch)
        return {
            name: torch.tensor([each[name] + [fill] * (longest - len(each[name])) for each in batch])
            for name, fill in (("input_ids", pad), ("labels", -100), ("attention_mask", 0))
        }

    arguments = TrainingArguments(
        output_dir=str(out / "trainer"), per_device_train_batch_size=rows, num_train_epochs=1, bf16=True, use_cpu=True,
        optim="adamw_torch_fused", learning_rate=RATES[kind], weight_decay=0.0, adam_beta2=0.95, max_grad_norm=1.0,
        lr_scheduler_type="linear", warmup_steps=2, report_to="none", save_strategy="no", logging_strategy="no",
        disable_tqdm=True, dataloader_num_workers=0, dataloader_pin_memory=False, remove_unused_columns=False,
        train_sampling_strategy="group_by_length" if given.peer == "pad" else "random", seed=0,
    )  # fmt: skip
    data = [{"input_ids": ids, "labels": targets, "attention_mask": [1] * len(ids)} for _, ids, targets in examples]
    Trainer(model=model, args=arguments, train_dataset=data, data_collator=collate, callbacks=[Clock()]).train()
    measured = {**pace(marks), "peak_bytes": peak(), "steps": len(marks), "how": given.peer}
    model.save_pretrained(out / "model")
    AutoTokenizer.from_pretrained(given.model).save_pretrained(out / "model")
    return measured


def ours(given: argparse.Namespace, kind: str, out: Path) -> dict[str, Any]:
    """`lapis train`, as its configuration file would have it."""
    from lapis.training.loop.progress import Silent
    from lapis.training.objectives.supervised.next_token import Chat
    from lapis.training.run import read_settings, run

    chosen, taken = out / "chats.jsonl", records(given, "en.jsonl", CHATS)
    out.mkdir(parents=True, exist_ok=True)
    chosen.write_text("".join(json.dumps({"messages": messages}) + "\n" for messages, _, _ in taken))
    marks: list[tuple[float, float, int]] = []

    class Clock(Silent):
        def step(self, row: Any) -> None:
            marks.append((time.perf_counter(), time.process_time(), seen[0]))

    loss, seen = Chat.loss, [0]

    def counted(self: Any, model: Any, batch: Any) -> Any:
        result = loss(self, model, batch)
        seen[0] += result[1]
        return result

    Chat.loss = counted  # type: ignore[method-assign]
    settings = {
        "objective": "chat", "model": str(given.model), "data": str(chosen), "context": CONTEXT, "epochs": 1,
        "batch": given.batch, "lr": RATES[kind], "weight_decay": 0.0, "warmup": 2, "schedule": "linear",
        "precision": "bf16", "threads": given.threads, "compile": "off", "sample_every": 0,
        "certify": "off", "save_every": 10**6, "out": str(out / "model"),
        **({"lora": {"rank": RANK, "targets": ["attn", "mlp"], "base": "bfloat16"}} if kind == "lora" else {}),
    }  # fmt: skip
    result = run(read_settings(settings, "tune"), overwrite=True, fresh=True, watch=Clock())
    return {**pace(marks), "peak_bytes": peak(), "steps": result.steps, "how": "packed"}


def pace(marks: list[tuple[float, float, int]]) -> dict[str, float]:
    """Supervised tokens per second, and per second of a processor (which other jobs of the machine stretch less), after
    the first two steps; the seconds of a step in the middle."""
    (start, used, before), (end, all_used, after) = marks[1], marks[-1]
    seconds = [later - earlier for (earlier, _, _), (later, _, _) in itertools.pairwise(marks[1:])]
    return {"rate": (after - before) / (end - start), "rate_of_processor": (after - before) / (all_used - used),
            "step": statistics.median(seconds), "supervised": after}  # fmt: skip


def peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def score(given: argparse.Namespace) -> dict[str, Any]:
    """Nats per supervised token of held-out chats, of the model as it was and of all folders that are there."""
    import lapis
    from lapis.evaluation.chats import score_chats

    chats = [messages for messages, _, _ in records(given, "en.valid.jsonl", HELD_OUT)]
    result = {}
    for name in ("base", *PIECES):
        folder = given.model if name == "base" else given.folder / name / "model"
        if folder.exists():
            model, tokenizer = lapis.load(str(folder))
            result[name] = score_chats(model, tokenizer, chats, replies=[])["response_nll"]
            print(f"{name:12} {result[name]:.4f}", file=sys.stderr, flush=True)
    return result


def table(folder: Path) -> list[str]:
    """The dated lines."""
    found = {name: json.loads(path.read_text()) for name in PIECES if (path := folder / f"{name}.json").exists()}
    nats = json.loads((folder / "score.json").read_text())
    lines = [f"## {date.today()}, {processor()}, {len(os.sched_getaffinity(0))} cores, torch {torch.__version__}", ""]
    lines += [f"SmolLM2-135M-Instruct, {CHATS} chats once; before: {nats['base']:.4f} nats per supervised token.", "",
              "| | batches | steps | supervised tokens/s | against the Trainer | of the processor | against | peak MB "
              "| against | held-out nats |", "|---|---|--:|--:|--:|--:|--:|--:|--:|--:|"]  # fmt: skip
    for kind in (kind for kind in RATES if f"peer-{kind}" in found and f"lapis-{kind}" in found):
        theirs = found[f"peer-{kind}"]
        for name in (f"peer-{kind}", f"lapis-{kind}"):
            one = found[name]
            lines.append(
                f"| {name} | {one['how']} | {one['steps']} | {one['rate']:.0f} | {one['rate'] / theirs['rate']:.2f}x | "
                f"{one['rate_of_processor']:.0f} | {one['rate_of_processor'] / theirs['rate_of_processor']:.2f}x | "
                f"{one['peak_bytes'] / 1e6:,.0f} | {one['peak_bytes'] / theirs['peak_bytes']:.2f}x | {nats[name]:.4f} |"
            )
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=[*PIECES, "score"])
    parser.add_argument("--peer", choices=["pad", "flat"], default="pad", help="how the Trainer gets its batches")
    parser.add_argument("--batch", type=int, default=2, help="rows of a step of lapis")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--model", type=Path, default=Path(os.environ.get("LAPIS_MODELS", "models")) / "smollm2-it")
    parser.add_argument("--data", type=Path, default=Path(os.environ.get("LAPIS_DATA", "../shared/data")))
    parser.add_argument("--folder", type=Path, default=Path("runs/bench-tune"))
    parser.add_argument("--write", action="store_true", help="adds the table to benchmarks/results/tune_peers.md")
    given = parser.parse_args()
    given.folder.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(given.threads)
    if given.only == "score":
        found = score(given)
    elif given.only:
        side, kind = given.only.split("-")
        found = (peer if side == "peer" else ours)(given, kind, given.folder / given.only)
    if given.only:
        (given.folder / f"{given.only}.json").write_text(json.dumps(found, indent=1) + "\n")
        print(json.dumps(found))
    if given.write:
        add_table(__file__, "Tuning a public model beside transformers and PEFT", table(given.folder))


if __name__ == "__main__":
    main()
