"""Graft by plan: a scale for each piece, learned, against the best single scale, on the models of a tour.

    python benchmarks/plan_graft.py runs/tour ... [--data DIR --language ms] [--cost 0.03] [--pieces components]

Scales of both kinds are chosen on one half of the held-out material, at most `cost` of its bits per byte, and every
figure printed is of the other half. Where a tour has its own world, --data is not needed. Prints one JSON line a tour.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path

import yaml

from lapis.checkpoint import open_checkpoint
from lapis.model.load import load
from lapis.planning.choice import learn_scales
from lapis.planning.held_out import Runner, make_held_out
from lapis.planning.inputs import template_rows
from lapis.planning.pieces import Bench, outside, pieces_of
from lapis.text.tokenizer.tokenizer import Tokenizer
from lapis.tour.material import ENGLISH, Material
from lapis.tour.measure import gap_closed, held_out_halves
from lapis.weights.graft.graft import graft

SINGLE = {"keep": (0.6, 0.65, 0.7), "add": (0.3, 0.4, 0.5)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("tours", nargs="+", type=Path)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--language", default="ms")
    parser.add_argument("--cost", type=float, default=0.03)
    parser.add_argument("--aim", type=float, default=0.95, help="of the cost, on the half that chooses")
    parser.add_argument("--pieces", default="components", choices=("layers", "halves", "components"))
    parser.add_argument("--embeddings", action="store_true", help="also a scale for the embedding")
    parser.add_argument("--steps", type=int, default=40, help="0: the single scales only")
    parser.add_argument("--chats", type=int, default=150, help="to learn scales from, and 128 tokens of text for each")
    parser.add_argument("--no-singles", action="store_true")
    options = parser.parse_args()
    for tour in options.tours:
        print(json.dumps(compare(tour, options)), flush=True)


def compare(tour: Path, options: argparse.Namespace) -> dict:
    language, limit = options.language, options.cost * options.aim
    material = Material(options.data or tour / "world", language)
    choosing, reporting = held_out_halves(material)
    tokenizer = Tokenizer.open(tour / "tokenizer")

    def figures(folder: Path, exam) -> tuple[float, float]:
        model = load(folder)
        english = exam.likelihoods(model, tokenizer, ENGLISH)
        return english["response_nll"], exam.likelihoods(model, tokenizer, language)["bits_per_byte"]

    ends = {(name, half): figures(tour / name, exam) for name in ("adapted", "tuned")
            for half, exam in (("choosing", choosing), ("reporting", reporting))}  # fmt: skip

    def row(folder: Path, half: str, exam) -> dict[str, float]:
        nll, bits = figures(folder, exam)
        (adapted, own), (tuned, _) = ends["adapted", half], ends["tuned", half]
        return {"gap_closed": round(gap_closed(adapted, nll, tuned) or 0, 4), "cost": round(bits / own - 1, 4)}

    result = {"tour": tour.name, "pieces": options.pieces, "embeddings": options.embeddings, "limit": options.cost}
    with tempfile.TemporaryDirectory(prefix="plan-graft-") as scratch:
        singles = []
        for embeddings, scales in () if options.no_singles else SINGLE.items():
            for scale in scales:
                out = Path(scratch) / f"single-{embeddings}-{scale}"
                graft(tour / "base", tour / "chat", tour / "adapted", out, scale, embeddings)
                figures_ = {**row(out, "choosing", choosing), "reporting": row(out, "reporting", reporting)}
                singles.append({"scale": scale, "embeddings": embeddings, **figures_})
        fair = [one for one in singles if one["cost"] <= limit]
        for embeddings in dict.fromkeys(one["embeddings"] for one in fair):
            mine = [one for one in fair if one["embeddings"] == embeddings]
            result[f"single, {embeddings}"] = max(mine, key=lambda one: one["gap_closed"])
        result["singles"] = singles
        if not options.steps:
            return result
        started = time.perf_counter()
        onto, base, chat = (open_checkpoint(tour / name) for name in ("adapted", "base", "chat"))
        exam = make_held_out(
            tokenizer,
            choosing.chats[ENGLISH],
            choosing.texts[language],
            context=256,
            limit=options.chats,
        )
        bench = Bench(onto, base, chat, template_rows(onto, base, chat))
        pieces = pieces_of(onto, options.pieces) + (outside(onto) if options.embeddings else [])
        learned = learn_scales(bench, Runner(bench.model, exam), pieces, limit, options.steps)
        lines = [
            {"components": [piece.component] if piece.component else ["attn", "mlp"], "scale": round(scale, 4)}
            | ({} if piece.layer is None else {"layers": [piece.layer]})
            for piece, scale in zip(pieces, learned.scales.values(), strict=True)
        ]
        plan = Path(scratch) / "plan.yaml"
        plan.write_text(yaml.safe_dump({"default": 0.0, "scales": lines}))
        out = Path(scratch) / "by-plan"
        graft(tour / "base", tour / "chat", tour / "adapted", out, plan, "add" if options.embeddings else "keep")
        result |= {
            "plan": {"scales": {k: round(v, 3) for k, v in learned.scales.items()}, "tried": learned.rows,
                     **row(out, "choosing", choosing), "reporting": row(out, "reporting", reporting)},
            "seconds": round(time.perf_counter() - started, 1), "tokens": exam.tokens,
        }  # fmt: skip
    return result


if __name__ == "__main__":
    main()
