"""`lapis card`: models side by side in two languages, as a page and a model card."""

from pathlib import Path


def card(
    models: list[Path],
    /,
    *,
    text: list[Path],
    out: Path,
    replay: list[Path] | None = None,
    chats: list[Path] | None = None,
    scored: int = 40_000,
    overwrite: bool = False,
    json: bool = False,
) -> None:
    """Measure models side by side: bits and tokens for a byte, speed, replies; what was won and what was lost.

    Args:
        models: Model folders, what was started from first and the result last.
        text: Held-out text of the language.
        out: A new folder: index.html (one offline page), README.md (a model card for a hub), card.json.
        replay: Held-out text of what the models knew before.
        chats: Chats of the language, to measure replies on.
        scored: Bytes of text of each language that are scored.
        overwrite: Replace the folder if it exists.
        json: Print one JSON object.
    """
    from itertools import islice

    from lapis.checkpoint.commit import check_output, commit
    from lapis.cli.output import line, progress, show
    from lapis.errors import ConfigError
    from lapis.language.adapt import CHATS
    from lapis.language.card.card import make_card, write_card
    from lapis.language.card.scores import HeldOutText
    from lapis.text.corpus import corpus

    names = {model.name: model for model in models}
    if len(names) < len(models):
        raise ConfigError("card: two of these folders have the same name; give each a name of its own")
    check_output(out, overwrite=overwrite, inputs=models)
    talks = list(islice(corpus.chats(chats), CHATS)) if chats else []
    languages = {"target": HeldOutText(_texts(text, scored), talks)}
    if replay:
        languages["replay"] = HeldOutText(_texts(replay, scored))
    with progress("measuring") as report, commit(out, kind="card", overwrite=overwrite) as staging:
        result = make_card(names, languages, progress=report)
        write_card(staging.path, result)

    def render() -> None:
        line(f"bits per byte of the language: {result['won']:.1%} fewer")
        if result["cost"] is not None:
            line(f"bits per byte of the replay text: {result['cost']:+.1%}")
        line(f"card: {out / 'index.html'}")

    show({**result, "card": str(out / "index.html")}, json, render)


def _texts(files: list[Path], size: int) -> list[str]:
    from lapis.language.texts import first_bytes
    from lapis.text.corpus import corpus

    return list(first_bytes((document.text for document in corpus.documents(files)), size))
