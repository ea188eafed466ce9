"""`lapis tokenizer train`: a byte-level BPE from text files. `lapis tokenizer extend`: more tokens for a model."""

from pathlib import Path
from typing import Any, Literal

from lapis.language.rows.init import Init
from lapis.wording import format_count


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
    from lapis.text.corpus.files import refuse_replacing
    from lapis.text.corpus.labels import bare_texts
    from lapis.text.tokenizer.tokenizer import train_tokenizer

    check_output(out, overwrite=overwrite)
    refuse_replacing(out, files)
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


def extend(
    model: str,
    files: list[Path],
    /,
    *,
    add: int,
    out: Path,
    init: Init | None = None,
    replay: list[Path] | None = None,
    only_target: bool = False,
    least: int = 5,
    snippets: int = 100,
    seed: int = 0,
    overwrite: bool = False,
    json: bool = False,
) -> None:
    """Add tokens of a language to a model's tokenizer, and rows for them to the model.

    Merges are learned on the text as the old tokenizer leaves it, and appended: old ids keep their meaning.

    Args:
        model: A model (or a folder with a tokenizer alone) whose tokenizer is a byte-level BPE, or one with byte
            fallback.
        files: Text of the language: text files, jsonl of documents or chats, .gz of these, folders or globs.
        add: New tokens.
        out: The folder to write: the model with its new vocabulary.
        init: How new rows begin: the mean of the old tokens' rows, mean-norm (scaled to the rows' typical length),
            calibrated (means, of which those that score tokens are moved until each token is as likely as it is
            frequent), distilled (trained on snippets until hidden states are those of the old tokens), random. By
            default mean-norm for an embedding, mean for a head and for an embedding that is tied to it.
        replay: Text of the language that the model knows already: how much of it is cut in another way is reported, and
            calibrated rows leave new tokens unlikely there.
        only_target: Learn nothing that changes the ids of the replay text.
        least: Times that a new token must occur in the text.
        snippets: Stretches of text that each distilled row is trained on.
        seed: Of random rows, of the choice of text, and of the order of snippets.
        overwrite: Replace the folder if it exists.
        json: Print one JSON object.
    """
    from lapis.cli.output import line, notes, number, progress, show
    from lapis.language.extend import extend as run

    with progress("opening") as report:
        result = run(
            model, files, out, add=add, init=init, replay=replay or (), only_target=only_target, least=least,
            snippets=snippets, seed=seed, overwrite=overwrite, progress=report,
        )  # fmt: skip

    def render() -> None:
        line(
            f"{out}: {format_count(result.added, 'new token')} from id {number(result.first)} on, in "
            f"{result.seconds:.1f} s"
        )
        before, after = result.tokens_per_byte["before"], result.tokens_per_byte["after"]
        line(f"tokens per byte of this text: {before:.4f} before, {after:.4f} after ({1 - after / before:.0%} less)")
        if result.replay_changed is not None:
            line(f"{result.replay_changed:.2%} of the replay text's characters are in other tokens than before")
        line("the most frequent: " + " ".join(f"|{token}|" for token in result.examples[:12]))
        notes(result.notes)

    show(result.to_json(), json, render)
