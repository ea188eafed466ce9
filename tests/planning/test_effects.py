"""The signals against what they stand for: models that were really written, and slopes that were really walked."""

import shutil

import pytest
import torch

from lapis import load
from lapis.checkpoint import open_checkpoint
from lapis.evaluation.chats import score_chats
from lapis.evaluation.choices import read_choices, score_choices
from lapis.evaluation.text import score_text
from lapis.model.load import save
from lapis.planning.choice import learn_scales
from lapis.planning.effects import Gradients, sweep
from lapis.planning.held_out import Runner, make_held_out
from lapis.planning.inputs import template_rows
from lapis.planning.pieces import Bench, outside, pieces_of
from lapis.text.corpus.corpus import chats


@pytest.fixture
def bench(pair):
    base, chat = open_checkpoint(pair.base), open_checkpoint(pair.chat)
    return Bench(base, base, chat, template_rows(base, base, chat))


@pytest.fixture
def runner(pair, bench):
    exam = make_held_out(pair.tokenizer, chats(pair.chats), pair.texts, read_choices(pair.choices), context=63)
    return Runner(bench.model, exam)


def written(pair, parameters, start="base"):
    """A model of the parameters of `start`, some of them chat's, written to disk and scored by lapis.evaluate."""
    model, _ = load(getattr(pair, start))
    other, _ = load(pair.base if start == "chat" else pair.chat)
    state = model.state_dict()
    for name, value in other.state_dict().items():
        if parameters(name):
            state[name] = value
    rows = [pair.tokenizer.id(token) for token in ("<|im_start|>", "<|im_end|>")]
    state["embed.weight"][rows] = load(pair.chat)[0].state_dict()["embed.weight"][rows]
    folder = pair.root / "written"
    shutil.rmtree(folder, ignore_errors=True)
    save(model, folder, state=state)
    pair.tokenizer.save(folder)
    model, tokenizer = load(folder)
    return {
        "response_nll": score_chats(model, tokenizer, pair.records, replies=[None] * 6)["response_nll"],
        "bits_per_byte": score_text(model, tokenizer, pair.texts, 63)["bits_per_byte"],
        "accuracy": score_choices(model, tokenizer, read_choices(pair.choices))["accuracy"],
    }


CASES = {
    "1": lambda name: name.startswith("blocks.1.") and "norm" not in name,
    "1.mlp": lambda name: name.startswith("blocks.1.mlp"),
    "2.attn.q": lambda name: name.startswith("blocks.2.attn.q"),
    "embed": lambda name: name.startswith("embed"),
}


def test_a_sweep_measures_what_written_models_measure(pair, bench, runner):
    base = bench.home
    pieces = [p for size in ("layers", "halves", "components") for p in pieces_of(base, size)] + outside(base)
    pieces = [piece for piece in pieces if piece.label in CASES]
    effects = sweep(bench, runner, pieces, base.names)
    assert {piece.label for piece in pieces} == set(CASES)
    for label, names in CASES.items():
        for result, start in ((effects.into[label], "base"), (effects.out[label], "chat")):
            truth = written(pair, names, start)
            assert {key: result[key] for key in truth} == pytest.approx(truth, rel=2e-5), (label, start)
    after = {name: p.clone() for name, p in bench.model.named_parameters()}
    fresh = Bench(base, base, bench.chat, bench.template).model
    assert all(torch.equal(value, after[name]) for name, value in fresh.named_parameters())


def test_distances_are_zero_at_nothing_and_grow(bench, runner):
    runner.start()
    still = runner.score(keep=True)
    assert still["kl_chats"] == 0 and still["kl_text"] == 0
    bench.put(bench.home.names, "chat", 0.5)
    runner.start()
    half = runner.score()
    bench.put(bench.home.names, "chat")
    runner.start()
    assert 0 < half["kl_chats"] < runner.score()["kl_chats"]


def test_layers_are_scored_within_three_times_the_passes(bench, runner):
    pieces = pieces_of(bench.home, "layers")
    effects = sweep(bench, runner, pieces, bench.home.names)
    assert effects.passes <= len(pieces) + 7  # two sweeps: half a pass for each layer, and the starts


def test_gradient_times_difference_is_the_slope(bench, runner):
    name = next(n for n in bench.home.names if "layers.1.mlp.down_proj" in n)
    gradients = Gradients(bench, bench.home.names)
    losses = gradients.run(batch for batch in runner.batches if batch.kind == "chats")
    step = 1e-3
    bench.put([name], "chat", step)
    runner.start()
    above = runner.score()["response_nll"]
    bench.put([name], "chat", -step)
    runner.start()
    below = runner.score()["response_nll"]
    bench.put([name], "home")
    runner.start()
    assert losses["chats"] == pytest.approx(runner.score()["response_nll"], rel=1e-5)
    assert gradients.dots[name]["chats"] == pytest.approx((above - below) / (2 * step), rel=0.02)
    assert all(p.grad is None for p in bench.model.parameters())


def test_learned_scales_beat_the_single_scale_of_their_cost(pair):
    onto, base, chat = (open_checkpoint(folder) for folder in (pair.onto, pair.base, pair.chat))
    bench = Bench(onto, base, chat, template_rows(onto, base, chat))
    runner = Runner(bench.model, make_held_out(pair.tokenizer, chats(pair.chats), pair.texts, context=63))
    pieces = pieces_of(onto, "halves")
    learned = learn_scales(bench, runner, pieces, 0.05, steps=25)
    best = min((row for row in learned.rows if row["cost"] <= 0.05), key=lambda row: row["response_nll"])
    names = [name for piece in pieces for name in piece.names]
    singles = []
    for scale in (i / 20 for i in range(1, 31)):
        bench.put(names, "chat", scale)
        runner.start()
        singles.append(runner.score())
    home = Runner(bench.model, runner.held_out)
    bench.put(names, "home")
    home.start()
    bits = home.score()["bits_per_byte"]
    fair = [row["response_nll"] for row in singles if row["bits_per_byte"] / bits - 1 <= 0.05]
    assert best["response_nll"] <= min(fair) + 1e-3
