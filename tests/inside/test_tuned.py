"""The tuned lens: nowhere worse than the plain one, better where layers differ by an affine map, and safe on disk."""

import json

import pytest
import torch

import lapis
from lapis.errors import CheckpointError, DataError, LapisError, OutputError
from lapis.inside.lens.options import LensOptions
from lapis.inside.lens.tuned import TunedLens, tune

from .conftest import make_model

PROMPT = "the capital of Malaysia is"


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    file = tmp_path_factory.mktemp("text") / "text.txt"
    file.write_text("in Malaysia they say Kuala Lumpur is the capital, and Jakarta of Indonesia. " * 120)
    return file


@pytest.fixture(scope="module")
def turned():
    """A model whose second and third layers do nothing but turn the stream by a fixed linear map."""
    model = make_model()
    with torch.no_grad():
        for block in (model.blocks[1], model.blocks[2]):
            block.attn.o.weight.zero_()
    return model


@pytest.fixture(scope="module")
def tuned(turned, words, text):
    return tune(turned, words, text, tokens=1200)


def test_it_lowers_the_kl_on_unseen_text_and_is_nowhere_worse(turned, words, tuned):
    before, after = tuned.info["kl_before"], tuned.info["kl_after"]
    assert (
        len(after) == 3 and all(b <= a for a, b in zip(before, after, strict=True)) and sum(after) < 0.8 * sum(before)
    )
    result = lapis.lens(turned, words, PROMPT, ["Kuala"], LensOptions(positions=3), tuned=tuned)
    plain = lapis.lens(turned, words, PROMPT, ["Kuala"])
    assert result.readings[-1].top == plain.readings[-1].top and result.readings[-1].kl_to_final == 0
    assert [r.after for r in result.readings] == ["embedding", "mlp", "mlp", "mlp"] and not result.contributions


def test_saved_and_opened_it_is_the_same(turned, words, tuned, tmp_path):
    tuned.save(tmp_path / "t")
    again = TunedLens.open(tmp_path / "t")
    assert torch.equal(again.maps_LDD, tuned.maps_LDD) and again.info == tuned.info
    one, other = (lapis.lens(turned, words, PROMPT, ["Kuala"], tuned=t) for t in (tuned, again))
    assert one.readings == other.readings and other.tuned == str(tmp_path / "t")
    with pytest.raises(OutputError, match="exists"):
        tuned.save(tmp_path / "t")


def test_damage_and_strangers_are_refused(words, tuned, text, tmp_path):
    with pytest.raises(LapisError, match="another model"):
        lapis.lens(make_model(seed=5), words, PROMPT, tuned=tuned)
    with pytest.raises(DataError, match="give more text"):
        tune(make_model(), words, text, tokens=100_000)
    with pytest.raises(CheckpointError, match="no such folder"):
        TunedLens.open(tmp_path / "none")
    tuned.save(tmp_path / "t")
    info = json.loads((tmp_path / "t" / "tuned_lens.json").read_text())
    (tmp_path / "t" / "tuned_lens.json").write_text(json.dumps({**info, "dim": 10**9}))
    with pytest.raises(CheckpointError, match="not 3 maps"):
        TunedLens.open(tmp_path / "t")
