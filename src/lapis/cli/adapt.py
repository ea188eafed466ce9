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
    tokens: int | None = None,
    minutes: float | None = None,
    lr: float | None = None,
    rows_lr: float | None = None,
    replay_share: float | None = None,
    ema: float | None = None,
    merge_back: float | None = None,
    scale: str | None = None,
    onto: str | None = None,
    cost: float | None = None,
    seed: int | None = None,
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
        settings: key=value for any key of that file, with a file or without one.
        base: The model to start from.
        chat: Its chat version, whose ability to chat is grafted on.
        text: Files, folders and globs of the language.
        replay: Text of what the model is not to lose; self has the model draw it.
        chats: Chats of the language, to measure replies on.
        vocab: New tokens: auto (the default) takes the recommendation of the first step, 0 adds none.
        tokens: That are trained on; how long that takes on this machine is told.
        minutes: In place of tokens: as many as this machine trains in that time, measured once and kept in plan.yaml.
        lr: Peak learning rate while everything is trained.
        rows_lr: Peak learning rate of new rows, in both trainings.
        replay_share: The share of replay in what is read.
        ema: Decay of a running average of the weights, which is then the result.
        merge_back: The share of the weights before the training of everything, mixed into the result.
        scale: Of the graft; plan learns one for each component.
        onto: base (the default) trains the base and grafts chat onto it, chat trains the chat model itself.
        cost: By which share bits per byte of the replay text may rise; where they rise more, training ends.
        seed: Of everything.
        language: A code such as ms, for the model card.
        out: The folder of the steps.
        dry_run: Check everything, write OUT/plan.yaml, and do nothing.
        json: Print one JSON object.
    """
    from lapis.cli.output import line, progress, show
    from lapis.config import load_yaml, override
    from lapis.errors import ConfigError
    from lapis.language.adapt import adapt as run
    from lapis.language.plan import read_plan

    key, equals, _ = str(plan or "").partition("=")
    if plan and equals and "/" not in key and not plan.exists():  # no file: the first of the settings
        plan, settings = None, (str(plan), *settings)
    given = {
        "base": base, "chat": chat, "text": text, "replay": replay, "chats": chats, "tokens": tokens,
        "minutes": minutes, "lr": lr, "rows_lr": rows_lr, "replay_share": replay_share, "ema": ema,
        "merge_back": merge_back, "scale": scale, "onto": onto, "cost": cost, "seed": seed, "language": language,
        "out": out, "vocab": int(vocab) if vocab and vocab.removeprefix("-").isdecimal() else vocab,
    }  # fmt: skip
    merged = {
        **override(load_yaml(plan) if plan else {}, settings),
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
        if "card" not in result:
            line(f"not measured; next: lapis card {result['out']} --out DIR")
            return
        won = result["won"]
        line(f"bits per byte of the language: {abs(won):.1%} {'fewer' if won >= 0 else 'more'} than before")
        if result["cost"] is not None:
            line(f"bits per byte of the replay text: {result['cost']:+.1%}")
        line(f"card: {result['card']}")

    show(result, json, render)
