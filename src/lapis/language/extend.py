"""More of a language in a model's vocabulary: `lapis tokenizer extend`.

    extend("smollm2", ["ko/"], "smollm2-ko", add=10_000, replay=["en/"])

Merges are learned on the text (text/tokenizer/extend.py), rows of the embedding and the head are made for them
(weights/rows.py, rows/), and the model is written as a folder that everything else loads. A folder
that holds a tokenizer alone gives a tokenizer alone.
"""

import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lapis.checkpoint import Checkpoint, open_checkpoint
from lapis.checkpoint.commit import check_output, commit
from lapis.checkpoint.hub.models import local_folder
from lapis.errors import ConfigError, DataError
from lapis.language.rows.init import Init
from lapis.language.texts import from_each, same_as_target
from lapis.text.corpus.files import refuse_replacing
from lapis.text.corpus.labels import bare_texts
from lapis.text.tokenizer.extend import LEAST, ExtendableTokenizer, Extension, changed_share
from lapis.text.tokenizer.roundtrip import holds_only_tokenizer
from lapis.weights.engine.job import MergeResult
from lapis.weights.rows import check_init, first_rows, token_tables, write_grown
from lapis.wording import format_count

Report = Callable[[float, float | None, str], None]
SNIPPETS = 100  # of text that a distilled row is trained on (Dobler et al., arXiv:2505.20133)
SAMPLE = 2_000_000  # bytes of text that are cut by both tokenizers, to tell what was won and what changed


@dataclass
class ExtendResult:
    """What `extend` did; `to_json` gives what `lapis tokenizer extend --json` prints.

    Attributes:
        out: The folder.
        added: New tokens.
        first: The id of the first.
        tokens_per_byte: Of a sample of the text that was learned from: `before` and `after`.
        replay_changed: The share of the replay text whose ids are others; None without such a text.
        rows: Embedding rows before and after; None where there is no model.
        init: How rows began, by what they are for.
        cut_marks: The share of letters whose combining mark the tokenizer's splitting cuts off; None without marks.
        examples: New tokens as they read, the most frequent first.
        sha256: Of the output's manifest.
        seconds: Time taken.
        notes: Lines for the user.
    """

    out: str
    added: int
    first: int
    tokens_per_byte: dict[str, float]
    replay_changed: float | None = None
    rows: dict[str, int] | None = None
    init: dict[str, str] = field(default_factory=dict)
    cut_marks: float | None = None
    examples: list[str] = field(default_factory=list)
    sha256: str = ""
    seconds: float = 0.0
    notes: list[str] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        return dict(self.__dict__)


def extend(
    model: str | os.PathLike[str],
    files: Sequence[str | Path],
    out: str | os.PathLike[str],
    *,
    add: int,
    init: Init | None = None,
    replay: Sequence[str | Path] = (),
    only_target: bool = False,
    least: int = LEAST,
    snippets: int = SNIPPETS,
    seed: int = 0,
    overwrite: bool = False,
    progress: Report = lambda done, total, label: None,
) -> ExtendResult:
    """Gives a model's tokenizer more tokens, and the model rows for them.

    Args:
        model: A model folder, a model of the hub, or a folder with a tokenizer alone.
        files: Text of the language: files, folders, globs.
        out: A new folder.
        add: New tokens.
        init: How the rows of new tokens begin: mean of the old tokens' rows, mean-norm (scaled to the rows' typical
            length), calibrated (means, of which those that score tokens are moved until each token is as likely as it
            is frequent), distilled (trained so that hidden states are those of the old tokens), random. By default
            mean-norm for an embedding, mean for a head and for an embedding that is tied to it.
        replay: Text of the language that the model knows already, to say how much of it is cut in another way, and in
            which calibrated rows leave new tokens unlikely.
        only_target: Learn nothing that would change the ids of the replay text.
        least: Times that a token must occur in the text.
        snippets: Stretches of text that each distilled row is trained on.
        seed: Of random rows, of the choice of text, and of the order of snippets.
        overwrite: Swap an existing folder for the new one, whole.
        progress: Called with what is done, what there is to do (None where nobody knows), and what it is.

    Raises:
        CheckpointError: For a tokenizer of a kind that cannot be extended, and for a model that is damaged.
        ConfigError: For options that do not go together.
        DataError: Where there is no text, or it carries fewer tokens than were asked for.
        OutputError: Where `out` cannot be written.
    """
    started = time.monotonic()
    for name, value in (("add", add), ("least", least), ("snippets", snippets)):
        if value < 1:
            raise ConfigError(f"extend: {name} is {value}; give 1 or more")
    if snippets != SNIPPETS and init != "distilled":
        raise ConfigError(
            "extend: snippets are what distilled rows are trained on; give init distilled, or leave them out"
        )
    if only_target and not replay:
        raise ConfigError("extend: only_target leaves the ids of replay text as they are; give that text with --replay")
    folder, checkpoint = open_source(model)
    check_output(Path(os.path.abspath(out)), overwrite=overwrite, inputs=[folder])
    refuse_replacing(out, [*files, *replay])
    tables = None if checkpoint is None else token_tables(checkpoint)
    if tables is None and init is not None:
        raise ConfigError(f"extend: init says how rows of a model begin, and {model} holds a tokenizer alone")
    if tables is not None:
        check_init(init, tables)
    base = ExtendableTokenizer.open(folder)
    counts = base.count_words(bare_texts(files), lambda done: progress(done, None, "reading text"))
    if not counts.bytes:
        raise DataError("extend: there is no text to learn from")
    held = None
    if only_target:
        held = base.count_words(bare_texts(replay), lambda done: progress(done, None, "reading replay text"))
    gained = base.learn(
        counts, add, least=least, replay=held, progress=lambda done, total: progress(done, total, "learning merges")
    )
    lacking = " and that the replay text lacks" if only_target else ""
    require_enough(gained, f"extend: add is {add:,}", "--add ", "more text, or a smaller --least", least, lacking)
    progress(0, None, "comparing")
    new = base.extended(gained)
    sample = list(from_each(files, SAMPLE))
    size = sum(len(text.encode()) for text in sample)
    result = ExtendResult(
        str(out), len(gained.tokens), gained.first,
        {
            name: sum(len(e.ids) for e in backend.encode_batch(sample, add_special_tokens=False)) / size
            for name, backend in (("before", base.backend), ("after", new))
        },
        changed_share(base.backend, new, from_each(replay, SAMPLE)) if replay else None,
        cut_marks=counts.cut_marks / counts.marks if counts.marks else None,
        examples=[text for token in gained.tokens if "\ufffd" not in (text := base.text(token))][:20],
    )  # fmt: skip
    if result.cut_marks:
        result.notes.append(
            f"the tokenizer's splitting cuts {result.cut_marks:.0%} of letters from their combining marks; it stays as "
            "it is, so no new token holds both"
        )
    if replay and (why := same_as_target(sample, from_each(replay, SAMPLE))):
        result.notes.append(why)
    if tables is None or checkpoint is None:
        with commit(Path(out), kind="tokenizer", overwrite=overwrite) as staging:
            base.copy_files(staging.path)
            result.notes += base.write(staging.path, gained)
        result.sha256 = staging.manifest_sha256
    else:
        _write_model(result, checkpoint, base, gained, init, files, replay, snippets, seed, overwrite, progress)
    result.seconds = time.monotonic() - started
    return result


def carried(gained: Extension, least: int = LEAST) -> str:
    """What a text carries, in a sentence."""
    what = format_count(len(gained.tokens), "new token that occurs", "new tokens that occur")
    return f"the text carries {what} {least} times or more"


def require_enough(
    gained: Extension, goal: str, option: str, more: str, least: int = LEAST, lacking: str = ""
) -> None:  # fmt: skip
    """Raises DataError where a text carries fewer new tokens than were asked for.

    Args:
        gained: What was learned.
        goal: What was asked for, as in "extend: add is 5,000".
        option: What stands before a number that can be had, as in "--add ".
        more: What else helps.
        least: Times that a token must occur.
        lacking: What else is asked of one.
    """
    if not gained.enough:
        fewer = f"{option}{len(gained.tokens)}, " if gained.tokens else ""
        raise DataError(f"{goal}, and {carried(gained, least)}{lacking}; give {fewer}{more}")


def open_source(model: str | os.PathLike[str]) -> tuple[Path, Checkpoint | None]:
    """The folder of a model's tokenizer, and the model; None where a folder holds a tokenizer alone."""
    place = Path(model)
    folder = place if place.is_dir() else local_folder(place)
    if folder is not None and holds_only_tokenizer(folder):
        return folder, None
    checkpoint = open_checkpoint(model)
    return checkpoint.beside(), checkpoint


def _write_model(
    result: ExtendResult, checkpoint: Checkpoint, base: ExtendableTokenizer, gained: Extension, init: Init | None,
    files: Sequence[str | Path], replay: Sequence[str | Path], snippets: int, seed: int, overwrite: bool,
    progress: Report,
) -> None:  # fmt: skip
    recipe = {"tokens_per_byte": result.tokens_per_byte, "replay_changed": result.replay_changed}
    written = add_rows(
        checkpoint, base, gained, result.out, init=init, files=files, replay=replay, snippets=snippets, seed=seed,
        recipe=recipe, overwrite=overwrite, progress=progress,
    )  # fmt: skip
    result.rows, result.init = written.vocabulary["rows"], written.vocabulary["init"]
    result.notes += written.notes
    result.sha256 = written.sha256


def add_rows(
    checkpoint: Checkpoint,
    base: ExtendableTokenizer,
    gained: Extension,
    out: str | os.PathLike[str],
    *,
    init: Init | None = None,
    files: Sequence[str | Path] = (),
    replay: Sequence[str | Path] = (),
    trusted: bool = False,
    snippets: int = SNIPPETS,
    seed: int = 0,
    recipe: Mapping[str, Any] | None = None,
    overwrite: bool = False,
    progress: Report = lambda done, total, label: None,
) -> MergeResult:
    """Writes a model with rows for the new tokens of its tokenizer.

    Args:
        checkpoint: The model.
        base: Its tokenizer.
        gained: What the tokenizer gains.
        out: A new folder.
        init: How rows begin; the arguments from here on are those of `extend`.
        files: Text that rows are calibrated by or distilled from.
        replay: Text in which calibrated rows leave new tokens unlikely.
        trusted: Whether special tokens that the replay text spells are tokens.
        snippets: Stretches of it for each distilled row.
        seed: Of random rows, of the choice of text, and of the order of snippets.
        recipe: More for the account of the output.
        overwrite: Swap an existing folder for the new one, whole.
        progress: Called with what is done, what there is to do, and what it is.

    Returns:
        What was done; `vocabulary` has `rows` before and after, and `init`.
    """
    checkpoint = checkpoint.fetched()
    tables = token_tables(checkpoint)
    simple = "mean" if init == "distilled" else None if init == "calibrated" else init
    progress(0, None, "making rows")
    rows = first_rows(checkpoint, tables, gained.old_tokens, simple, seed)
    trained, notes = tables.embed, list[str]()
    if init == "distilled":
        from lapis.language.rows.distill import distill

        rows[trained] = distill(
            checkpoint, base, gained, list(bare_texts(files)), rows[trained], snippets=snippets, seed=seed,
            progress=progress,
        )  # fmt: skip
    if init == "calibrated":
        from lapis.language.rows.calibrate import calibrate

        trained = tables.embed if tables.tied else tables.head[0]
        means_ND = rows[trained]
        rows[trained] = calibrate(
            checkpoint, base, gained, list(bare_texts(files)), rows[tables.embed], rows[trained], tied=tables.tied,
            replay=list(bare_texts(replay)) if replay else (), trusted=trusted, seed=seed, progress=progress,
        )  # fmt: skip
        if rows[trained] is means_ND:
            notes.append("new rows stay means: moved to their tokens' frequencies, they made text less likely")
    for name in tables.copies:
        rows[name] = rows[tables.embed]
    usual: str = "mean" if tables.tied else "mean-norm"
    rules = {"embedding": init or usual} | ({"head": "random" if init == "random" else "mean"} if tables.head else {})
    if init == "calibrated":
        rules = {"embedding": init} if tables.tied else {"embedding": usual, "head": init}
    settings = {
        "add": len(gained.tokens), "first_id": gained.first, **{f"init.{k}": v for k, v in rules.items()},
        "seed": seed, **(recipe or {}),
    }  # fmt: skip
    written = write_grown(
        checkpoint, out, tables, rows, gained.first, lambda folder: base.write(folder, gained), settings,
        overwrite=overwrite, progress=lambda done, total: progress(done, total, "writing"),
    )  # fmt: skip
    written.notes += notes
    grown = max(tables.rows, gained.first + len(gained.tokens))
    written.vocabulary = {"rows": {"before": tables.rows, "after": grown}, "init": rules}
    return written
