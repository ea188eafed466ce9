"""The choice from effects that are given: what harms least comes first, the budget holds, sets are measured whole."""

from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lapis.planning.choice import LEAST, PRICE, TRIES, at_random, choose, search, value, worth
from lapis.planning.effects import Effects
from lapis.planning.pieces import Piece

PIECES = [Piece(layer, component, (f"{layer}.{component}",), 10) for layer in range(4) for component in ("attn", "mlp")]
STYLE = {piece.label: 0.1 + 0.05 * piece.layer for piece in PIECES}
HARM = {piece.label: 0.02 if piece.component == "mlp" else 0.001 for piece in PIECES}
SINGLE = {label: {"style": STYLE[label], "knowledge": HARM[label]} for label in STYLE}


def test_harm_is_weighed_by_that_of_the_whole_difference() -> None:
    assert value(0.5, 0.01, 0.1) == pytest.approx(0.5 - PRICE * 0.1)
    assert value(0.5, None, None) == 0.5  # no text was given
    assert value(0.5, -0.3, 0.1) == 0.5  # text that gets easier is no reason to choose
    assert value(0.5, LEAST, 0.0) == pytest.approx(0.5 - PRICE)  # the whole does no harm; a piece alone does


def test_what_harms_text_is_left_out_before_what_carries_little() -> None:
    worths = worth("style", PIECES, SINGLE, whole=0.1)
    assert [p.label for p in choose(PIECES, worths, 20)] == ["2.attn", "3.attn"]
    without_price = worth("style", PIECES, SINGLE, whole=0.1, price=0.0)
    assert {p.layer for p in choose(PIECES, without_price, 20)} == {3}


def test_knowledge_goes_where_nothing_is_harmed() -> None:
    worths = worth("knowledge", PIECES, SINGLE)
    assert {p.component for p in choose(PIECES, worths, 40)} == {"attn"}
    untold = {label: {"style": STYLE[label], "knowledge": None} for label in STYLE}
    assert {p.layer for p in choose(PIECES, worth("knowledge", PIECES, untold), 40)} == {0, 1}


@given(st.integers(1, 8), st.integers(0, 1000))
def test_choices_fit_the_room_and_keep_the_order(count: int, seed: int) -> None:
    for taken in (choose(PIECES, worth("style", PIECES, SINGLE, 0.1), 10 * count), at_random(PIECES, 10 * count, seed)):
        assert len(taken) == count
        assert taken == sorted(taken, key=PIECES.index)


def test_the_search_ends_with_the_best_set_it_measured() -> None:
    """Effects of a set that are not the sum of its pieces': two of a kind bring nothing."""
    inside: set[str] = set()
    seen = []

    def put(names: tuple[str, ...], side: str) -> None:
        (inside.update if side == "chat" else inside.difference_update)(names)

    def score() -> dict[str, float]:
        layers = {name.split(".")[0] for name in inside}
        seen.append((0.1 * len(layers) - 0.02 * sum(n.endswith("mlp") for n in inside), set(inside)))
        harm = 0.02 * sum(name.endswith("mlp") for name in inside)
        return {"response_nll": 2 - 0.1 * len(layers), "bits_per_byte": 1 + harm / 100}

    bench = SimpleNamespace(put=put)
    runner = SimpleNamespace(start=lambda: None, score=score, recorded=lambda key, measure: measure())
    home, full = {"response_nll": 2.0, "bits_per_byte": 1.0}, {"response_nll": 1.0, "bits_per_byte": 1.01}
    result = search(bench, runner, Effects(home, full), PIECES, SINGLE, [p.names[0] for p in PIECES], 40, seed=0)  # type: ignore[arg-type]
    assert len(seen) == TRIES and not inside
    assert {piece.label for piece in result} == {"0.attn", "1.attn", "2.attn", "3.attn"}
