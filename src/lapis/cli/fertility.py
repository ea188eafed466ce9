"""`lapis fertility`: what a language costs a model, and whether more tokens would pay."""

from pathlib import Path

from lapis.wording import format_count


def fertility(
    model: str,
    files: list[Path],
    /,
    *,
    replay: list[Path] | None = None,
    against: str | None = None,
    run: bool = True,
    scored: int = 20_000,
    html: Path | None = None,
    overwrite: bool = False,
    json: bool = False,
) -> None:
    """Count what a language costs a model, for a byte of text, and what more tokens would change.

    Args:
        model: A model, or a folder with a tokenizer alone.
        files: Text of the language: text files, jsonl of documents or chats, .gz of these, folders or globs. One
            document in twenty is held out and measured on.
        replay: Text of a language that the model knows already, beside it.
        against: A second model on the same text.
        run: Load the model for bits per byte and characters per second.
        scored: Bytes of held-out text that bits per byte are measured on.
        html: Write a page to this file.
        overwrite: Replace an existing page.
        json: Print one JSON object.
    """
    from lapis.checkpoint.commit import check_file
    from lapis.cli.output import line, notes, number, progress, show, table, write_page
    from lapis.language.fertility import fertility as measure
    from lapis.report.pages.fertility import CURVE, LANGUAGES, fertility_page, language_rows
    from lapis.text.corpus.files import refuse_replacing

    if html is not None:
        check_file(html, overwrite=overwrite, inputs=[model], option="--html")
        refuse_replacing(html, [*files, *(replay or ())], "--html")
    with progress("opening") as report:
        result = measure(model, files, replay=replay or (), against=against, run=run, scored=scored, progress=report)
    shown = result.to_json()
    if html is not None:
        write_page(fertility_page(shown), html, overwrite=overwrite)

    def render() -> None:
        rows = language_rows(shown)
        columns = [(key, label) for key, label in LANGUAGES if any(row.get(key) is not None for row in rows)]
        table("Held-out text", [label for _, label in columns], [[row.get(key) for key, _ in columns] for row in rows])
        points = [(key, label) for key, label in CURVE if any(row.get(key) is not None for row in result.curve)]
        if result.curve:
            line()
            table(
                "With more tokens", [label for _, label in points],
                [[number(row.get(key)) for key, _ in points] for row in result.curve],
            )  # fmt: skip
            if result.knee:
                line(f"the curve bends at about {format_count(result.knee, 'token')}")
        line(result.recommendation["reason"], "bold")
        notes(result.notes)
        if add := result.recommendation["add"]:
            line(f"next: lapis tokenizer extend {model} FILES --add {add} --out DIR, or all of it: lapis adapt", "dim")

    show(shown, json, render)
