"""`lapis tokenizer train`: a byte-level BPE from text files."""

from pathlib import Path
from typing import Any, Literal


def train(
    files: list[Path],
    /,
    *,
    vocab: int,
    out: Path,
    kind: Literal["chat", "masked"] = "chat",
    overwrite: bool = False,
    json: bool = False,
) -> None:
    """Train a byte-level BPE tokenizer.

    Args:
        files: Text files, jsonl of documents or chats, tables of labeled texts, .gz of these, folders or globs.
        vocab: Entries in all: 256 bytes, 3 or 4 special tokens, and merges.
        kind: chat has ChatML's special tokens and chat template, masked has BERT's special tokens, for encoders.
        out: The folder to write; transformers' AutoTokenizer loads it.
        overwrite: Replace the folder if it exists.
        json: Print one JSON object.
    """
    import time

    from lapis.checkpoint.commit import check_output, commit
    from lapis.cli.output import line, number, progress, show
    from lapis.text.corpus.labels import bare_texts
    from lapis.text.tokenizer.tokenizer import train_tokenizer

    check_output(out, overwrite=overwrite)
    begin = time.monotonic()
    read = {"bytes": 0}

    def counted() -> Any:
        for text in bare_texts(files):
            read["bytes"] += len(text.encode(errors="replace"))
            yield text

    with progress("reading and merging"), commit(out, kind="tokenizer", overwrite=overwrite) as staging:
        tokenizer = train_tokenizer(counted(), vocab, kind)
        tokenizer.save(staging.path)
    result = {
        "out": str(out),
        "vocab": tokenizer.vocab_size,
        "special": tokenizer.special,
        "bytes": read["bytes"],
        "seconds": time.monotonic() - begin,
    }

    def render() -> None:
        line(
            f"{out}: {number(tokenizer.vocab_size)} tokens from {number(read['bytes'])} bytes of text "
            f"in {result['seconds']:.1f} s"
        )
        if tokenizer.vocab_size < vocab:
            line(f"fewer than {number(vocab)}: the text has no more pairs that occur twice")

    show(result, json, render)
