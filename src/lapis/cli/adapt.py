"""`lapis adapt`: from a public model to one that speaks the user's language."""

from pathlib import Path


def adapt(
    plan: Path | None = None,
    /,
    *settings: str,
    base: str | None = None,
    chat: str | None = None,
    text: list[str] | None = None,
    replay: list[str] | None = None,
    chats: list[str] | None = None,
    vocab: str | None = None,
    minutes: float | None = None,
    language: str | None = None,
    out: str | None = None,
    dry_run: bool = False,
    json: bool = False,
) -> None:
    """Adapt a model to a language: measure, extend, train, graft, and say honestly what was won and what it cost.

    The output is a folder of steps. A run that is stopped goes on with the same command, and with
    `lapis adapt OUT/plan.yaml`.

    Args:
        plan: A YAML file with these options as keys, and with more: `lapis adapt --dry-run` writes it.
        settings: key=value, each in place of what the file says.
        base: The model to start from.
        chat: Its chat version, whose ability to chat is grafted on.
        text: Files, folders and globs of the language.
        replay: Text of what the model is not to lose.
        chats: Chats of the language, to measure replies on.
        vocab: New tokens: auto (the default) takes the recommendation of the first step, 0 adds none.
        minutes: Of training.
        language: A code such as ms, for the model card.
        out: The folder of the steps.
        dry_run: Check everything, write OUT/plan.yaml, and do nothing.
        json: Print one JSON object.
    """
    from lapis.cli.output import line, progress, show
    from lapis.config import load_yaml, override
    from lapis.errors import ConfigError
    from lapis.language.adapt import adapt as run
    from lapis.language.adapt import read_plan

    given = {
        "base": base, "chat": chat, "text": text, "replay": replay, "chats": chats, "minutes": minutes,
        "language": language, "out": out, "vocab": int(vocab) if vocab and vocab.isdecimal() else vocab,
    }  # fmt: skip
    merged = {
        **(override(load_yaml(plan), settings) if plan else {}),
        **{key: value for key, value in given.items() if value is not None},
    }
    missing = [key for key in ("base", "text", "out") if key not in merged]
    if missing:
        raise ConfigError(f"adapt: {missing[0]} is missing; give --{missing[0]}, or a plan.yaml that has it")
    result = run(
        read_plan(merged, str(plan) if plan else "adapt"),
        dry_run=dry_run,
        bar=progress,
        note=lambda remark: line(remark, error=True),
    )

    def render() -> None:
        if dry_run:
            line(f"{result['plan']}: written; nothing was done. These steps would be: {', '.join(result['steps'])}")
            line(f"next: lapis adapt {result['plan']}", "dim")
            return
        line(f"bits per byte of the language: {result['won']:.1%} fewer")
        if result["cost"] is not None:
            line(f"bits per byte of the replay text: {result['cost']:+.1%}")
        line(f"card: {result['card']}")

    show(result, json, render)
