"""`lapis card`: models side by side in two languages, as a page and a model card."""

from pathlib import Path


def card(
    models: list[Path],
    /,
    *,
    out: Path,
    text: list[Path] | None = None,
    replay: list[Path] | None = None,
    chats: list[Path] | None = None,
    replay_chats: list[Path] | None = None,
    choices: list[Path] | None = None,
    replay_choices: list[Path] | None = None,
    tuned: Path | None = None,
    language: str | None = None,
    license: str | None = None,
    base_model: list[str] | None = None,
    scored: int = 40_000,
    overwrite: bool = False,
    json: bool = False,
) -> None:
    """Measure models side by side: bits and tokens for a byte, speed, replies; what was won and what was lost.

    Args:
        models: A folder of `lapis adapt`, which brings its steps and its held-out text; or model folders, what was
            started from first and the result last. Of both: the steps first.
        out: A new folder: index.html (one offline page), README.md (a model card for a hub), card.json.
        text: Held-out text of the language.
        replay: Held-out text of what the models knew before.
        chats: Chats of the language, to measure replies on.
        replay_chats: Chats of what the models knew.
        choices: Questions of multiple choice in the language: jsonl, JSON or parquet (also Belebele's and INCLUDE's
            records), or task files of lm-evaluation-harness (.yaml; they may name Python that is run).
        replay_choices: The same in what the models knew.
        tuned: A model tuned on chats of the language: the yardstick of the gap that was closed. It begins at the first
            model here that was adapted without chat.
        language: A code such as ms.
        license: For the model card, as hubs spell it, such as apache-2.0.
        base_model: owner/name on the hub of what a local folder was started from; may be given again.
        scored: Bytes of each given text that are scored; of an adaptation's own all that it held out is.
        overwrite: Replace the folder if it exists.
        json: Print one JSON object.
    """
    from lapis.checkpoint.commit import check_output, commit
    from lapis.cli.output import line, notes, progress, show, table
    from lapis.language.card.card import make_card, write_card
    from lapis.language.card.folder import TUNED, gather
    from lapis.report.pages.card import FIGURES, TOKEN_BOUND, spelled_change, spelled_gap, title_of
    from lapis.text.corpus.files import refuse_replacing

    given = {
        "text": text, "replay": replay, "chats": chats, "replay_chats": replay_chats, "choices": choices,
        "replay_choices": replay_choices, "language": language, "license": license, "base_models": base_model,
    }  # fmt: skip
    check_output(out, overwrite=overwrite, inputs=[*models, *([tuned] if tuned is not None else [])])
    read = (text, replay, chats, replay_chats, choices, replay_choices)
    refuse_replacing(out, [path for paths in read for path in paths or ()])
    gathered = gather(models, {key: value for key, value in given.items() if value is not None}, scored, tuned)
    with progress("measuring") as report, commit(out, kind="card", overwrite=overwrite) as staging:
        result = make_card(
            gathered.models, gathered.held, tuned=tuned, gap_from=gathered.gap_from, how=gathered.how,
            notes=gathered.notes, progress=report,
        )  # fmt: skip
        write_card(staging.path, result)

    def render() -> None:
        changes = result["changes"].get(result["result"], {})
        rows = []
        for key, (label, _, _) in FIGURES.items():
            cells = [spelled_change(key, each[key]) if key in each else ("", "") for each in changes.values()]
            if any(value for value, _ in cells) and key not in TOKEN_BOUND:
                rows.append((label, *(f"{value} ({interval})" if value else "" for value, interval in cells)))
        first = next(iter(result["steps"]))
        if changes:
            table(f"{first} to {result['result']}", ["", *(title_of(result, name) for name in changes)], rows)
        if result["gap"] is not None:
            line(f"gap closed: {spelled_gap(result['gap'])[0]} of the way from {result['gap_from']} to {TUNED}")
        for key, why in result["reasons"].items():
            line(f"{key.replace('_', ' ')}: not known; {why}", "dim")
        for name, many in result["notes"].items():
            notes(f"{name} {note}" for note in many)
        line(f"card: {out / 'index.html'}")

    show({**result, "out": str(out), "card": str(out / "index.html")}, json, render)
