"""A helper process imports nothing from the folder that a command is run in: files that lie there never run."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import lapis
from lapis.text.tokenizer.tokenizer import train_tokenizer

SOURCE = Path(lapis.__file__).parents[1]
NAMES = ("tokenizers", "torch", "yaml", "numpy", "jinja2", "cyclopts", "safetensors", "json", "resource", "subprocess",
         "sitecustomize", "lapis")  # fmt: skip

PACK = """
import lapis.text.rows.corpus_parts as corpus_parts
corpus_parts.SPAN = 1 << 14  # so that a small file is as many parts as 32 MB each would be of a large one
from lapis.text.rows.packing import pack
from lapis.text.tokenizer.tokenizer import Tokenizer
rows = pack("corpus.txt", Tokenizer.open("words"), "packed", 32, workers=2)
print(len(rows), len(rows.info["shards"]))
"""
TEMPLATE = """
from lapis.text.chat.template import render_jobs
print(render_jobs("{{ messages[0].content }}", [{"role": "user", "content": "hello"}], [(1, False)], {})[0].text)
"""
PATTERN = """
from pathlib import Path
from lapis.checkpoint.adapter import _match
print(_match(Path("x"), "alpha_pattern", ["(q|k)_proj"], ["layers.0.q_proj", "layers.0.mlp"]))
"""
REWARD = """
from lapis.training.rewards.functions import InWorker
from lapis.training.rewards.reward import Case
worker = InWorker("polite", "mine.py:polite", {}, 10.0)
print(worker.score([Case("a", "please", {}, "here")]))
worker.close()
"""


@pytest.fixture(scope="module")
def downloads(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a corpus, and beside it files named like what lapis imports. Each leaves a trace where it runs."""
    folder = tmp_path_factory.mktemp("downloads")
    (folder / "corpus.txt").write_text("\n".join(f"line {i} of a text that somebody wrote" for i in range(4000)))
    words = train_tokenizer(folder / "corpus.txt", 300)
    (folder / "words").mkdir()
    words.save(folder / "words")
    for name in NAMES:
        (folder / f"{name}.py").write_text(f"open('ran-{name}', 'w').close()\nraise SystemExit('{name} ran')\n")
    (folder / "mine.py").write_text("def polite(prompt, reply, record):\n    return float('please' in reply)\n")
    return folder


def run(folder: Path, *command: str) -> subprocess.CompletedProcess[str]:
    variables = {**os.environ, "PYTHONPATH": str(SOURCE)}
    return subprocess.run(
        [sys.executable, *command], cwd=folder, env=variables, capture_output=True, text=True, timeout=120
    )


@pytest.mark.parametrize(
    ("program", "says"),
    [(PACK, "1"), (TEMPLATE, "hello"), (PATTERN, "[['layers.0.q_proj']]"), (REWARD, "[1.0]")],
    ids=["pack", "template", "pattern", "reward"],
)
def test_files_beside_a_corpus_never_run(downloads: Path, program: str, says: str) -> None:
    done = run(downloads, "-P", "-c", program)
    assert done.returncode == 0 and says in done.stdout, done.stderr
    assert not list(downloads.glob("ran-*"))


def test_nor_where_lapis_is_run_as_a_module(downloads: Path) -> None:
    for name in NAMES:
        if name in sys.stdlib_module_names or name == "lapis":  # python -m itself looks for these there first
            (downloads / f"{name}.py").unlink(missing_ok=True)
    done = run(downloads, "-m", "lapis", "tokens", "words", "hello")
    assert done.returncode == 0, done.stderr
    assert not list(downloads.glob("ran-*"))
