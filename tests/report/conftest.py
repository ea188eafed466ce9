"""A working folder with what the commands really write: every page and report of the tests is made from it."""

import contextlib
import io
import json
import os
from pathlib import Path

import pytest
import torch

from lapis.cli.main import main
from lapis.families.config import ModelConfig
from lapis.model.load import save
from lapis.model.transformer import Transformer
from lapis.text.tokenizer.tokenizer import train_tokenizer

TEXT = "in Malaysia they say Kuala Lumpur is the capital. "
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SHAPE = {"dim": 32, "layers": 3, "heads": 4, "kv_heads": 2, "ffn_dim": 48, "context": 64, "family": "llama"}
TASK = """
task: birds
dataset_path: json
dataset_kwargs: {data_files: {test: rows.jsonl}}
test_split: test
doc_to_text: "{{question}}"
output_type: multiple_choice
doc_to_choice: "{{[bad, good]}}"
doc_to_target: 1
metric_list: [{metric: acc}]
"""


def lapis(*arguments: str) -> str:
    """Runs a command in this process; what it printed."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        main(list(arguments))
    return out.getvalue()


def write_rows(path: Path, rows: list[dict]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


@pytest.fixture(scope="session")
def studio(tmp_path_factory) -> Path:
    """Models, data, runs and pages under one folder; `work` holds what `lapis report` is asked about."""
    root = tmp_path_factory.mktemp("studio")
    tokenizer = train_tokenizer([TEXT * 40], 290)
    tokenizer.templates["default"] = TEMPLATE
    torch.manual_seed(0)
    model = Transformer(ModelConfig(**SHAPE, vocab=300))
    for name in ("base", "chat", "other"):
        save(model, root / name)
        tokenizer.save(root / name)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.01)
    (root / "text.txt").write_text(TEXT * 60)
    chats = [{"messages": [{"role": "user", "content": f"say {i}"}, {"role": "assistant", "content": "the capital"}]}
             for i in range(8)]  # fmt: skip
    write_rows(root / "chats.jsonl", chats)
    write_rows(root / "pairs.jsonl", [{"prompt": f"{i}", "chosen": "Kuala Lumpur", "rejected": "in"} for i in range(6)])
    for name, count in (("labels", 24), ("held", 12)):
        write_rows(root / f"{name}.jsonl", [
            {"text": "they say" if i % 3 else "Kuala Lumpur", "label": "spam" if i % 3 else "ham"} for i in range(count)
        ])  # fmt: skip
    (root / "causal.yaml").write_text(
        f"objective: causal\nmodel: {root}/base\ndata: {root}/text.txt\ncontext: 32\nout: {root}/work/base\nsteps: 6\n"
        "log_every: 2\nthreads: 1\nbatch: 2\n"
    )
    (root / "classify.yaml").write_text(
        f"objective: classify\nmodel: {root}/base\ndata: {root}/labels.jsonl\nvalid: {root}/held.jsonl\ncontext: 32\n"
        f"out: {root}/work/spam\nsteps: 8\neval_every: 2\nlog_every: 2\nthreads: 1\nbatch: 4\nlr: 3e-3\n"
    )
    (root / "work").mkdir()
    for name in ("causal", "classify"):
        lapis("train", str(root / f"{name}.yaml"), "--html", str(root / f"{name}.html"), "--json")
    base, chat, other = (str(root / name) for name in ("base", "chat", "other"))
    for name, command in {
        "diff": ["diff", base, chat, "--rows", "--spectra"], "lineage": ["diff", base, chat, other],
        "inspect": ["inspect", base], "mixers": ["inspect", "--mixers", "64x32"],
        "lens": ["lens", base, "they say Kuala", "--track", "Kuala, capital"],
        "beside": ["lens", base, "they say Kuala", "--against", chat],
        "plan": ["plan", "--base", base, "--chat", chat, "--chats", str(root / "chats.jsonl"), "--text",
                 str(root / "text.txt"), "--limit", "4", "--context", "32"],
    }.items():  # fmt: skip
        (root / f"{name}.json").write_text(lapis(*command, "--html", str(root / f"{name}.html"), "--json"))
    pairs = lapis("eval", base, "--pairs", str(root / "pairs.jsonl"), "--text", str(root / "text.txt"), "--json")
    (root / "work" / "pairs.json").write_text(pairs)
    for name in ("diff.html", "diff.json", "plan.json", "lens.json", "inspect.json"):
        (root / "work" / name).write_bytes((root / name).read_bytes())
    return root


@pytest.fixture(scope="session")
def task_scores(studio, tmp_path_factory) -> str:
    """What `lapis eval --tasks ... --json` printed."""
    pytest.importorskip("lm_eval", reason="lm-eval is not installed: pip install 'lapis[eval]'")
    folder = tmp_path_factory.mktemp("tasks")
    rows = write_rows(folder / "rows.jsonl", [{"question": "they", "good": " say", "bad": " qq"}] * 4)
    (folder / "birds.yaml").write_text(TASK.replace("rows.jsonl", rows))
    before = os.environ.get("HF_DATASETS_CACHE")
    os.environ["HF_DATASETS_CACHE"] = str(folder / "cache")
    try:
        return lapis("eval", str(studio / "chat"), "--tasks", "birds", "--task-folder", str(folder), "--json")
    finally:
        os.environ.pop("HF_DATASETS_CACHE") if before is None else os.environ.update(HF_DATASETS_CACHE=before)
