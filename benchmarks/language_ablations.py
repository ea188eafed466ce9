"""Which settings of `lapis adapt` win, on models small enough for three seeds.

    python benchmarks/language_ablations.py --out runs/language-ablations [--seeds 0 1 2] [--arms ...]
    python benchmarks/language_ablations.py --out runs/language-ablations --write     the tables into results/

A base of 4 layers, 128 wide, with a tokenizer of 4,096 tokens, reads English. Then it gains 2,000 tokens of Korean, and
reads Korean in two steps, as `lapis adapt` does: a fifth of the steps trains new rows alone, the rest trains everything
with some English mixed in. Each arm differs from the first in one setting. Equal steps, and so equal tokens, for all.
Scored on documents that no step reads: bits per byte of Korean, and of English beside the base's. Seeds are of
everything, the base too.
"""

import argparse
import json
import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from language_runs import (
    DATA,
    ENGLISH,
    HELD_ENGLISH,
    bits_per_byte,
    held_out,
    keep,
    kept,
    mean_spread,
    mixture,
    run,
    say,
    table,
)

import lapis
from lapis.checkpoint import open_checkpoint
from lapis.checkpoint.files import read_json
from lapis.language.extend import Init
from lapis.language.replay import draw_texts
from lapis.language.rows.calibrate import calibrate_again
from lapis.language.texts import write_texts
from lapis.language.training.settings import SEED_APART
from lapis.text.corpus import corpus
from lapis.text.tokenizer.extend import ExtendableTokenizer
from lapis.text.tokenizer.tokenizer import train_tokenizer

SHAPE = {"dim": 128, "layers": 4, "heads": 4, "kv_heads": 2, "ffn_dim": 352, "context": 256, "family": "qwen3",
         "qk_norm": True}  # fmt: skip
VOCABULARY, ADDED, CONTEXT = 4096, 2000, 256
ROWS = {"context": CONTEXT, "batch": 8}
BASE_STEPS, STEPS = 600, 120
SNIPPETS = 10  # of text that a distilled row is trained on
KOREAN = [DATA / "corpus/ko/train.jsonl", DATA / "corpus/ko/reviews-train.jsonl"]
HELD = {"ko": [DATA / "corpus/ko/valid.jsonl", DATA / "corpus/ko/reviews-valid.jsonl"],
        "en": [HELD_ENGLISH]}  # fmt: skip
HELD_BYTES = 40_000


@dataclass(frozen=True)
class Arm:
    """What `lapis adapt` would be told. rows_rate: of embedding and head, times that of the blocks. old_rows: Whether
    the rows of old tokens are trained with everything else. share_rows: Whether new rows learn from those of tokens
    that have characters in common. again: Whether new tokens are calibrated again at the end. drawn: Whether replay is
    text that the base draws itself, in place of English."""

    init: Init | None = None
    embedded: float = 0.2
    rows_lr: float = 3e-3
    lr: float = 1e-3
    rows_rate: float = 1.0
    replay: float = 0.1
    ema: float = 0.0
    merge_back: float = 0.0
    old_rows: bool = True
    tied: bool = True
    extended: bool = True
    share_rows: bool = False
    again: bool = False
    drawn: bool = False


NEW = "old rows frozen, new 10x"
MORE: dict[str, dict[str, float]] = {
    "not embedded first": {"embedded": 0.0}, "replay 0": {"replay": 0.0}, "replay 0.25": {"replay": 0.25},
    "merge back 0.1": {"merge_back": 0.1}, "merge back 0.25": {"merge_back": 0.25}, "lr 0.003, new 3x":
    {"lr": 3e-3, "rows_rate": 3.0},
}  # fmt: skip
ADAPT = Arm("calibrated", old_rows=False, rows_rate=10.0, rows_lr=1e-2, share_rows=True, again=True)  # as by default
DEFAULT = "as lapis adapt does it"
OTHER: dict[str, dict[str, Any]] = {
    "not calibrated again": {"again": False},
    "not embedded first": {"embedded": 0.0},
    "not embedded first, not calibrated again": {"embedded": 0.0, "again": False},
    "rows begin as means": {"init": None, "again": False},
    "rows begin distilled": {"init": "distilled", "again": False},
    "rows begin at random": {"init": "random", "again": False},
    "rows share nothing": {"share_rows": False},
    "new 3x": {"rows_rate": 3.0, "rows_lr": 3e-3},
    "replay 0": {"replay": 0.0},
    "replay 0.1 of its own": {"drawn": True},
    "replay 0.25": {"replay": 0.25},
    "ema 0.98": {"ema": 0.98},
    "merge back 0.1": {"merge_back": 0.1},
}
ARMS = {
    DEFAULT: ADAPT,
    **{f"{DEFAULT}, {what}": replace(ADAPT, **more) for what, more in OTHER.items()},
    "first": Arm(),
    "no new tokens": Arm(extended=False, embedded=0.0),
    **{f"lr {rate:g}": Arm(lr=rate) for rate in (3e-4, 3e-3)},
    "init distilled": Arm("distilled"),
    "init random": Arm("random"),
    "rows 10x": Arm(rows_rate=10.0),
    "rows 0.1x": Arm(rows_rate=0.1),
    "old rows frozen": Arm(old_rows=False),
    "old rows frozen, new 10x": Arm(old_rows=False, rows_rate=10.0),
    "old rows frozen, new 30x": Arm(old_rows=False, rows_rate=30.0),
    **{f"{NEW}, {what}": Arm(**{"old_rows": False, "rows_rate": 10.0, **more}) for what, more in MORE.items()},
    "not embedded first": Arm(embedded=0.0),
    "replay 0": Arm(replay=0.0),
    "replay 0.25": Arm(replay=0.25),
    "ema 0.98": Arm(ema=0.98),
    "merge back 0.1": Arm(merge_back=0.1),
    "merge back 0.25": Arm(merge_back=0.25),
    "untied, calibrated": Arm("calibrated", tied=False),
    "untied, mean": Arm("mean", tied=False),
    "untied, mean-norm": Arm("mean-norm", tied=False),
    "untied, distilled": Arm("distilled", tied=False),
    "untied, random": Arm("random", tied=False),
}  # fmt: skip


def base_of(root: Path, seed: int, tied: bool) -> Path:
    return root / f"base-{'tied' if tied else 'untied'}-{seed}"


def place_of(root: Path, arm: Arm, seed: int) -> Path:
    """Where an arm's model lies."""
    place = root / f"seed-{seed}" / f"adapted-{embedded_name(arm)}-{arm.lr}-{arm.rows_rate}-{arm.replay}-{arm.ema}"
    marks = ((not arm.old_rows, "new"), (arm.share_rows, "shared"), (arm.again, "again"), (arm.drawn, "drawn"))
    for said, what in marks:
        place = place.with_name(f"{place.name}-{what}") if said else place
    return place.with_name(f"merged-{place.name}-{arm.merge_back}") if arm.merge_back else place


def start_name(arm: Arm) -> str:
    init = (arm.init or "default") if arm.extended else "none"
    return f"{init}-{'tied' if arm.tied else 'untied'}"


def embedded_name(arm: Arm) -> str:
    return f"{start_name(arm)}-{arm.embedded}-{arm.rows_lr}" + ("-shared" if arm.share_rows else "")


def make_base(root: Path, seed: int, tied: bool) -> Path:
    tokenizer = root / "tokenizer"
    if not tokenizer.is_dir():
        root.mkdir(parents=True, exist_ok=True)
        train_tokenizer([ENGLISH], VOCABULARY).save(tokenizer)
    return run(base_of(root, seed, tied), new={**SHAPE, "tied": tied}, seed=seed, tokenizer=str(tokenizer),
               data=[str(ENGLISH)], steps=BASE_STEPS, **ROWS)  # fmt: skip


def drawn_text(root: Path, base: Path, tokens: int, seed: int) -> Path:
    """Text that a base draws itself. It goes without the chat template of its tokenizer, which it never read."""
    plain, file = root / f"{base.name}-plain", root / f"drawn-{seed}.jsonl"
    if not file.exists():
        shutil.copytree(base, plain, ignore=shutil.ignore_patterns("*.jinja", "additional_chat_templates"))
        config = plain / "tokenizer_config.json"
        kept_fields = {key: value for key, value in read_json(config).items() if key != "chat_template"}
        config.write_text(json.dumps(kept_fields))
        say(f"drawing {file}")
        write_texts(file, (each.text for each in draw_texts(plain, tokens, seed)))
    return file


def make(root: Path, arm: Arm, seed: int) -> Path:
    """The model of an arm: extended, its rows trained alone, everything trained, merged."""
    start = base = make_base(root, seed, arm.tied)
    place, result = root / f"seed-{seed}", place_of(root, arm, seed)
    if arm.extended:
        start = place / f"start-{start_name(arm)}"
        if not start.is_dir():
            say(f"extending {start}")
            snippets = {"snippets": SNIPPETS} if arm.init == "distilled" else {}
            lapis.extend(base, KOREAN, start, add=ADDED, init=arm.init, seed=seed, **snippets)
    if arm.again:
        if not result.is_dir():
            trained, own = make(root, replace(arm, again=False), seed), ExtendableTokenizer.open(base)
            known = root / f"drawn-{seed}.jsonl" if arm.drawn else ENGLISH
            korean, english = ([each.text for each in corpus.documents(files)] for files in (KOREAN, [known]))
            calibrate_again(open_checkpoint(trained), own, own.read_extension(start), korean, result, replay=english,
                            seed=seed)  # fmt: skip
        return result
    new_rows = list(range(VOCABULARY, VOCABULARY + ADDED))
    alone = round(arm.embedded * STEPS)
    if alone:
        start = run(place / f"embedded-{embedded_name(arm)}", model=str(start), data=[*map(str, KOREAN)], steps=alone,
                    lr=arm.rows_lr, freeze=["all"], tokens=new_rows, share_rows=arm.share_rows, seed=seed,
                    **ROWS)  # fmt: skip
    if arm.merge_back:
        if not result.is_dir():
            trained = make(root, replace(arm, merge_back=0.0), seed)
            lapis.merge(f'{1 - arm.merge_back} * "{trained}" + {arm.merge_back} * "{start}"', result)
        return result
    rate = arm.lr * arm.rows_rate
    rates = {"embed": rate} | ({} if arm.tied else {"head": rate}) if arm.rows_rate != 1 else {}
    frozen = (
        {}
        if arm.old_rows
        else {"freeze": ["embed"] if arm.tied else ["embed", "head"], "tokens": new_rows, "share_rows": arm.share_rows}
    )
    data: Any = mixture(KOREAN, arm.replay)
    if arm.drawn:
        tokens = round(arm.replay * (STEPS - alone) * ROWS["batch"] * CONTEXT)
        drawn = {"path": str(drawn_text(root, base, tokens, seed)), "weight": arm.replay, "special": "trusted"}
        data = [*({"path": path, "weight": share} for path, share in data.items() if path != str(ENGLISH)), drawn]
    return run(result, **frozen, model=str(start), steps=STEPS - alone, lr=arm.lr, rates=rates, ema=arm.ema,
               seed=seed + SEED_APART * bool(alone), data=data, **ROWS)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/language-ablations"))
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2])
    parser.add_argument("--arms", nargs="*", choices=ARMS, default=list(ARMS))
    parser.add_argument("--write", action="store_true", help="the tables of what is there, into results/")
    options = parser.parse_args()
    if options.write:
        text = tables(options.out)
        print("\n".join(text))
        keep(__file__, "Settings of an adaptation", text)
        return
    texts = {name: held_out(files, HELD_BYTES) for name, files in HELD.items()}
    for seed in options.seeds:
        for name in options.arms:
            base, after = make_base(options.out, seed, ARMS[name].tied), make(options.out, ARMS[name], seed)
            before, scores = (scored(folder, texts) for folder in (base, after))
            cost = scores["en"] / before["en"] - 1
            say(f"{seed} {name:20} ko {scores['ko']:.3f} (base {before['ko']:.3f}), en {cost:+.1%}")


TABLES = {
    "The defaults, and one other setting": (DEFAULT, *(f"{DEFAULT}, {what}" for what in OTHER)),
    "How new rows begin, head tied": ("first", "init distilled", "init random"),
    "How new rows begin, head of its own": tuple(name for name in ARMS if name.startswith("untied")),
    "Rates": (
        "first",
        "rows 10x",
        "rows 0.1x",
        "old rows frozen",
        NEW,
        "old rows frozen, new 30x",
        "lr 0.0003",
        "lr 0.003",
    ),
    "New rows alone first": ("first", "not embedded first", "no new tokens"),
    "Replay": ("replay 0", "first", "replay 0.25"),
    "The winning rates, and one more setting": (NEW, *(f"{NEW}, {what}" for what in MORE)),
    "Averages": ("first", "ema 0.98", "merge back 0.1", "merge back 0.25"),
}


def tables(root: Path) -> list[str]:
    """One table for each setting; an arm is in it as soon as a seed of it is done."""
    result = []
    for title, names in TABLES.items():
        rows = []
        for name in names:
            places = {seed: place_of(root, ARMS[name], seed) for seed in (0, 1, 2)}
            files = {seed: place.with_name(place.name + ".json") for seed, place in places.items()}
            done = {seed: json.loads(path.read_text()) for seed, path in files.items() if path.exists()}
            if done:
                tied = ARMS[name].tied
                base = {seed: json.loads(base_of(root, seed, tied).with_suffix(".json").read_text()) for seed in done}
                cost = [100 * (done[seed]["en"] / base[seed]["en"] - 1) for seed in done]
                rows.append([name, mean_spread([each["ko"] for each in done.values()]), mean_spread(cost, 1),
                             str(len(done))])  # fmt: skip
        if rows:
            head = ["arm", "Korean, bits per byte", "English, % more bits", "seeds"]
            result += ["", f"**{title}**", "", *table(head, rows)]
    return result


def scored(folder: Path, texts: dict[str, list[str]]) -> dict[str, float]:
    return dict(kept(folder.with_name(folder.name + ".json"), lambda: bits_per_byte(folder, texts, CONTEXT)))


if __name__ == "__main__":
    main()
