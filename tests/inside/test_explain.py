"""`lapis.explain`: every figure beside the model's own, computed here a second way, and what odd texts get."""

import base64
import json

import numpy as np
import pytest
import torch

import lapis
from lapis.errors import ConfigError, DataError
from lapis.inside.attention_map import attention_maps, maps_of
from lapis.inside.explain.explain import explain
from lapis.inside.explain.options import ExplainOptions
from lapis.inside.lens.options import LensOptions
from lapis.inside.trace import anatomy
from lapis.model.load import save
from lapis.text.tokenizer.tokenizer import train_tokenizer

from .conftest import make_model

PROMPT = "the capital of Malaysia is Kuala Lumpur"
HEADS = [(layer, head) for layer in range(3) for head in range(4)]


def unpacked(array: dict) -> np.ndarray:
    """An array of the JSON as numbers; NaN is what a mask hides."""
    raw = base64.b64decode(array["data"])
    if array["type"] == "f32":
        return np.frombuffer(raw, "<f4").reshape(array["shape"])
    steps = np.frombuffer(raw, "<u2").reshape(array["shape"]).astype(float)
    return np.where(steps == 65_535, np.nan, steps / 65_534)


def test_all_heads_are_the_attention_maps_of_the_model(model, words):
    result = explain(model, words, PROMPT, "Kuala")
    packed = unpacked(result.to_json()["attention"]["weights"])
    rows, columns = np.tril_indices(7)
    for layer, head in HEADS:
        (expected,) = attention_maps(model, words, PROMPT, [(layer, head)])
        hidden = expected.scores_TS == -torch.inf
        weights = result.weights(layer, head)
        assert torch.equal(weights.isnan(), hidden)
        assert torch.allclose(weights.nan_to_num(), expected.weights_TS, atol=1e-6)
        exact = expected.weights_TS.masked_fill(hidden, torch.nan).numpy()[rows, columns]
        assert np.nanmax(np.abs(packed[layer, head] - exact)) <= 0.51 / 65_534
        assert (np.isnan(packed[layer, head]) == np.isnan(exact)).all()
    moved = torch.stack([m.moved_TS for m in attention_maps(model, words, PROMPT, HEADS[:4])]).sum(0)
    shares = (moved / moved.sum(1, keepdim=True))[rows, columns]
    assert torch.allclose(result.stream.taken_LT[0], shares, atol=1e-6)


def test_maps_of_the_last_tokens_are_the_end_of_whole_maps(model, words):
    parts, ids = anatomy(model), words.encode(PROMPT)
    tokens = [words.text(i) for i in ids]
    whole, part = (maps_of(parts, ids, tokens, HEADS, last) for last in (0, 3))
    for one, other in zip(whole, part, strict=True):
        assert other.tokens == tokens[-3:] and other.first == len(ids) - 3
        for name in ("scores_TS", "weights_TS", "moved_TS"):
            assert torch.allclose(getattr(one, name)[-3:, -3:], getattr(other, name), atol=1e-6)
        assert torch.equal(one.value_SE[-3:], other.value_SE)
        assert other.lookup()[0]["position"] >= other.first


def test_a_head_in_detail_is_made_of_its_own_numbers(model, words):
    for detail in explain(model, words, PROMPT, "Kuala").attention.heads:
        (expected,) = attention_maps(model, words, PROMPT, [(detail.layer, detail.head)])
        seen = expected.scores_TS > -torch.inf
        assert torch.allclose(detail.scores_AA.float()[seen], expected.scores_TS[seen], atol=1e-4)
        assert detail.scale == pytest.approx(model.blocks[0].attn.core.scale, rel=1e-4)
        arrays = {"queries": detail.queries_AE, "keys": detail.keys_AE, "values": detail.values_AE,
                  "gram": detail.gram_AA, "weights": expected.weights_TS}  # fmt: skip
        for name, array in arrays.items():
            assert getattr(detail.ranks, name) == np.linalg.matrix_rank(array.double().numpy())
        assert torch.allclose(detail.cubic_AC, detail.gram_AA @ detail.states_AC)


def test_rows_that_are_the_same_lower_the_rank(words):
    """Without positions of its own a state of the embedding is its token: three tokens, two of them twice."""
    model = make_model(layers=1)
    ids = words.encode(" Malaysia Kuala Malaysia Kuala Jakarta")
    result = explain(model, words, ids)
    different = len(set(ids))
    assert different < len(ids)
    for detail in result.attention.heads:
        assert (detail.ranks.states, detail.ranks.gram, detail.ranks.cubic) == (different, different, different)


def test_the_stream_is_as_long_as_the_states(model, words):
    states: list[torch.Tensor] = []
    handles = [model.blocks[0].register_forward_pre_hook(lambda _m, args: states.append(args[0][0]))]
    handles += [block.register_forward_hook(lambda _m, _a, out: states.append(out[0])) for block in model.blocks]
    with torch.inference_mode():
        model(torch.tensor([words.encode(PROMPT)]))
    for handle in handles:
        handle.remove()
    result = explain(model, words, PROMPT)
    assert torch.allclose(result.stream.states_PN, torch.stack(states, 1).norm(dim=2), rtol=1e-5)
    assert torch.allclose(result.stream.start_PC, states[0][:, :24])
    learned = model.embed.position
    if learned is None:
        assert result.stream.positions_P is None
    else:
        assert torch.allclose(result.stream.positions_P, learned.weight[:7].norm(dim=1))


def test_grid_shares_and_end_are_those_of_the_lens_and_model(model, words):
    ids = words.encode(PROMPT)
    result = explain(model, words, PROMPT, "Kuala, Malaysia")
    expected = lapis.lens(model, words, PROMPT, "Kuala, Malaysia", LensOptions(positions=7))
    for reading in expected.grid:
        p, n = reading.position, 0 if reading.layer is None else reading.layer + 1
        assert result.grid.ids_PNK[p][n] == [i for _, i, _ in reading.top[:5]]
        assert result.grid.entropy_PN[p, n] == pytest.approx(reading.entropy, rel=1e-5)
        assert {word: ranks[p][n] for word, ranks in result.grid.ranks.items()} == reading.ranks
    with torch.inference_mode():
        logits = model(torch.tensor([ids]))[0].float()
    for place in (0, 3):  # a rank is that in the prompt cut off there
        alone = lapis.lens(model, words, ids[: place + 1], "Kuala, Malaysia")
        assert result.grid.ranks["Kuala"][place] == [
            r.ranks["Kuala"] for r in alone.readings if r.after != "attention"
        ]  # fmt: skip
        rank = 1 + int((logits[place] > logits[place, ids[place + 1]]).sum())
        chance = logits[place].double().softmax(0)[ids[place + 1]].item()
        assert result.ending.actual[place] == pytest.approx((rank, chance), rel=1e-4)
    assert torch.allclose(result.ending.logits_V, logits[-1].sort(descending=True).values, atol=1e-5)
    assert logits[-1][result.ending.ids].tolist() == pytest.approx(result.ending.logits_V[:256].tolist(), abs=1e-5)
    if cap := model.config.logit_cap:  # shares add up to a logit before its cap
        logits = cap * (logits / cap).atanh()
    for word in result.words:
        total = word.heads_LH.sum() + word.attention_L.sum() + word.mlp_L.sum() + sum(word.rest.values())
        assert total.item() == pytest.approx(logits[-1, word.token].item(), abs=1e-4)
        assert word.logit == pytest.approx(total.item())


def test_two_models_part_where_their_best_tokens_do(words):
    one, other = make_model(), make_model()
    with torch.no_grad():
        other.blocks[1].mlp.down.weight.add_(torch.randn_like(other.blocks[1].mlp.down.weight) * 0.5)
    ids = words.encode(PROMPT)
    parting = explain(one, words, PROMPT, against=(other, words), names=("one", "other")).against
    with torch.inference_mode():
        a, b = (m(torch.tensor([ids]))[0].double().log_softmax(1) for m in (one, other))
    expected = torch.nn.functional.kl_div(b, a, reduction="none", log_target=True).sum(1)
    assert torch.allclose(parting.kl_P, expected, rtol=1e-4, atol=1e-9) and parting.most == int(expected.argmax())
    assert float(parting.distance_PN[:, :2].abs().max()) == 0 and float(parting.distance_PN[:, 2:].min()) > 0
    traces = [lapis.lens(m, words, PROMPT, "Kuala", LensOptions(positions=7)) for m in (one, other)]
    best = [{(r.position, r.layer): r.top[0][1] for r in t.grid} for t in traces]
    for place, row in enumerate(parting.parted):
        same = [best[0][place, layer] == best[1][place, layer] for layer in (None, 0, 1, 2)]
        assert (row is None) == same[3]
        assert row is None or (not any(same[row:]) and (row == 0 or same[row - 1]))
    assert any(row is not None for row in parting.parted)


def test_a_model_beside_itself_does_not_part(model, words):
    parting = explain(model, words, PROMPT, against=(model, words)).against
    assert float(parting.kl_P.max()) < 1e-9 and parting.parted == [None] * 7 and float(parting.distance_PN.max()) == 0


def test_models_that_cut_otherwise_are_compared_at_the_end(words):
    other = train_tokenizer(["zebra giraffe " * 60], 280)
    result = explain(make_model(), words, PROMPT, against=(make_model(seed=1), other), names=("one", "other"))
    assert not result.against.same and result.against.kl_P is None and len(result.against.grid.ids_PNK) == 1
    assert "one and other cut the text into other tokens" in result.finding()
    assert result.against.texts.keys() >= set(result.against.grid.ids_PNK[0][-1])
    assert "only what they say at its end" in result.page().render()


def test_json_is_the_whole_tree_and_names_no_letters(words):
    result = explain(make_model(), words, PROMPT, "Kuala", against=(make_model(seed=1), words))
    tree = json.loads(json.dumps(result.to_json(), allow_nan=False))
    assert set(tree) >= {
        "model",
        "build",
        "tokens",
        "stream",
        "attention",
        "words",
        "grid",
        "ending",
        "cost",
        "against",
    }
    assert tree["finding"] == result.finding() and "part" in tree["finding"]
    assert np.array_equal(unpacked(tree["grid"]["kl"]), result.grid.kl_PN.float().numpy())
    assert tree["cost"]["example"][0]["parameters"] == (512 * 768) ** 2 + 512 * 768
    assert tree["cost"]["own"][2]["parameters"] == 4 * (32 * 32 + 32)


def test_a_text_beyond_the_context_is_refused(words):
    with pytest.raises(DataError, match=r"and the context of .* is 40; shorten it"):
        explain(make_model(), words, PROMPT * 9)
    with pytest.raises(DataError, match="empty"):
        explain(make_model(), words, "")


def test_a_text_of_a_single_token(model, words):
    result = explain(model, words, " Malaysia", against=(model, words))
    assert len(result.tokens) == result.total == 1 and result.ending.actual == []
    sunk = model.config.family == "gpt_oss"  # a part of the weight belongs to no token
    assert (result.weights(0, 0).item() < 1.0) == sunk and "Choosing the next token" in result.page().render()


def test_special_tokens_of_a_text_are_text_and_of_ids_are_marked(words):
    spelled = next(iter(words.special))
    as_text = explain(make_model(context=99), words, spelled + " Malaysia")
    assert not any(token.special for token in as_text.tokens) and len(as_text.tokens) > 2
    assert f"{spelled} in the text is plain text here, and not the special token that it spells." in as_text.notes
    as_ids = explain(make_model(), words, [words.special[spelled], *words.encode(" Malaysia")])
    assert [token.special for token in as_ids.tokens] == [True, False]


def test_ten_thousand_tokens_are_bounded_and_say_so(words):
    ids = (words.encode(PROMPT) * 2000)[:10_000]
    result = explain(make_model(context=16_000), words, ids)
    assert result.total == 10_000 and [t.place for t in result.tokens] == list(range(9_968, 10_000))
    assert "The text has 10,000 tokens; what is shown are the last 32 of them." in result.notes
    html = result.page().render()
    assert len(html) < 1_000_000 and "the last 32 of them" in html


def test_many_heads_and_tokens_stay_below_five_megabytes(words):
    model = make_model("qwen3", dim=32, heads=128, layers=12, head_dim=4, vocab=262_144, context=100)
    result = explain(model, words, (words.encode(PROMPT) * 9)[:60], options=ExplainOptions(places=60))
    assert result.attention.places == 27
    assert any("show the last 27 tokens, so that 1,536 heads have room" in note for note in result.notes)
    assert len(result.page().render().encode()) < 5_000_000


def test_a_model_of_transformers_is_explained_like_our_own(words, tmp_path):
    """The same weights behind both: maps, vectors of heads, shares, the stream."""
    transformers = pytest.importorskip("transformers")
    own = make_model("llama", bias="qkv", family="qwen2")
    save(own, tmp_path / "model")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32).eval()
    one, other = (explain(m, words, PROMPT, "Kuala", ExplainOptions(places=5)) for m in (own, theirs))
    assert torch.allclose(one.attention.weights_LHT, other.attention.weights_LHT, atol=1e-5)
    assert torch.allclose(one.stream.states_PN, other.stream.states_PN, rtol=1e-4)
    assert torch.allclose(one.stream.taken_LT, other.stream.taken_LT, atol=1e-5)
    assert torch.allclose(one.words[0].heads_LH, other.words[0].heads_LH, atol=1e-4)
    for mine, its in zip(one.attention.heads, other.attention.heads, strict=True):
        assert (mine.layer, mine.head, mine.ranks) == (its.layer, its.head, its.ranks)
        assert torch.allclose(mine.scores_AA, its.scores_AA, atol=1e-4)
    assert other.build.kv_heads == 2 and other.build.windows == [] and other.cost.lengths == []
    assert "all heads of all layers" in other.page().render().lower()


def test_a_model_without_attention_says_so_and_shows_the_rest(words):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.MambaConfig(
        hidden_size=32, num_hidden_layers=3, vocab_size=330, state_size=4, pad_token_id=0, bos_token_id=0,
        eos_token_id=0,
    )  # fmt: skip
    result = explain(transformers.MambaForCausalLM(config).eval(), words, PROMPT)
    assert result.attention is None and any("No attention maps" in note for note in result.notes)
    html = result.page().render()
    assert (
        "there are no maps; the other views are whole" in html
        and 'id="grid"' in html
        and 'id="choose-head"' not in html
    )


def test_options_out_of_range_are_refused():
    with pytest.raises(ConfigError, match="places is 97; expected 1 to 96"):
        ExplainOptions(places=97)
    with pytest.raises(ConfigError, match="heads is 0"):
        ExplainOptions(heads=0)
