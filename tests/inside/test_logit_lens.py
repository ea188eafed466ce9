"""The lens: what it reads, what it tracks, and what it refuses."""

import copy
import json
import math
import sys

import pytest
import torch

import lapis
from lapis.errors import ConfigError, DataError, LapisError, MissingExtra
from lapis.families.config import ModelConfig
from lapis.generation.ready import ready
from lapis.inside.lens import logit_lens
from lapis.inside.lens.options import LensOptions
from lapis.inside.lens.side_by_side import Opened, side_by_side
from lapis.inside.prompt import Spelling, TrackedWord, as_words, spell
from lapis.model.transformer import Transformer

from .conftest import make_model

PROMPT = "the capital of Malaysia is"


def logprobs(model: Transformer, ids: list[int]) -> torch.Tensor:
    with torch.inference_mode():
        return model(torch.tensor([ids]))[0].double().log_softmax(-1)


def test_the_last_row_is_the_model_itself(model, words):
    ids = words.encode(PROMPT)
    result = lapis.lens(model, words, PROMPT, ["Malaysia", "Kuala"])
    likeliest = logprobs(model, ids)[-1].exp().topk(10)
    assert [index for _, index, _ in result.readings[-1].top] == likeliest.indices.tolist()
    assert [p for _, _, p in result.readings[-1].top] == pytest.approx(likeliest.values.tolist(), rel=1e-5)
    assert result.readings[-1].kl_to_final == 0 and all(r.kl_to_final > 0 for r in result.readings[:-1])
    halves = ("attention", "mlp") if model.blocks[0].only_adds else ("mlp",)
    assert [(r.layer, r.after) for r in result.readings] == [
        (None, "embedding"), *((layer, half) for layer in range(3) for half in halves),
    ]  # fmt: skip


def test_words_of_several_tokens_equal_teacher_forcing(model, words):
    ids = words.encode(PROMPT)
    result = lapis.lens(model, words, PROMPT, "Malaysia, zebra")
    several = 0
    for word in result.words:
        expected = []
        for spelling in word.spellings:
            rows = logprobs(model, [*ids, *spelling.ids])
            total = sum(rows[len(ids) - 1 + i, index].item() for i, index in enumerate(spelling.ids))
            assert result.readings[-1].spellings[spelling.text]["logprob"] == pytest.approx(total, rel=1e-5)
            rank = 1 + int((rows[len(ids) - 1] > rows[len(ids) - 1, spelling.ids[0]]).sum())
            assert result.readings[-1].spellings[spelling.text]["rank"] == rank
            expected.append((rank, total))
            several += len(spelling.ids) > 1
        single = [rank for (rank, _), s in zip(expected, word.spellings, strict=True) if len(s.ids) == 1]
        assert result.readings[-1].ranks[word.text] == min(single or [rank for rank, _ in expected])
        both = math.log(sum(math.exp(total) for _, total in expected))
        assert result.readings[-1].logprobs[word.text] == pytest.approx(both, rel=1e-5)
    assert several >= 2 and result.layers[0].logprobs["zebra"] is not None
    if model.blocks[0].only_adds:
        assert next(r for r in result.readings if r.after == "attention").logprobs["zebra"] is None


def test_an_early_layer_reads_as_the_model_cut_off_there(words):
    """The same figures as a model of one layer with the same final norm and head."""
    model = make_model()
    short = make_model(layers=1)
    state = {name: p for name, p in model.state_dict().items() if not name.startswith(("blocks.1", "blocks.2"))}
    short.load_state_dict(state)
    whole, cut = (lapis.lens(m, words, PROMPT, ["Malaysia"]) for m in (model, short))
    assert whole.layers[0].ranks == cut.layers[0].ranks
    assert whole.layers[0].logprobs["Malaysia"] == pytest.approx(cut.layers[0].logprobs["Malaysia"], rel=1e-5)
    assert whole.layers[0].entropy == pytest.approx(cut.layers[0].entropy, rel=1e-6)


def test_a_packed_model_is_read_like_the_one_it_was(model, words):
    packed = ready(copy.deepcopy(model))
    expected, actual = (lapis.lens(m, words, PROMPT, "Malaysia, zebra") for m in (model, packed))
    for one, other in zip(expected.readings, actual.readings, strict=True):
        assert [index for _, index, _ in one.top] == [index for _, index, _ in other.top]
        if one.after != "attention":
            assert one.logprobs == pytest.approx(other.logprobs, rel=1e-4, abs=1e-5)
        assert one.kl_to_final == pytest.approx(other.kl_to_final, rel=1e-4, abs=1e-5)
    assert [c.label for c in expected.contributions] == [c.label for c in actual.contributions]
    logits = [c.logit for c in actual.contributions]
    assert [c.logit for c in expected.contributions] == pytest.approx(logits, rel=1e-3, abs=1e-4)


def test_the_layer_that_decided_leads_to_the_end(model, words):
    for prompt in ("the capital of Malaysia is", "in Malaysia", "they say Kuala", "Jakarta"):
        result = lapis.lens(model, words, prompt)
        best = [layer.top[0][1] for layer in result.layers]
        assert best[result.decided :] == [best[-1]] * (len(best) - result.decided)
        assert result.decided == 0 or best[result.decided - 1] != best[-1]
        assert result.to_json()["decided"] == result.decided
        assert f"leads from layer {result.decided} on" in result.finding()


def test_without_words_it_tracks_the_best_of_every_layer(model, words):
    result = lapis.lens(model, words, PROMPT)
    best = {layer.top[0][1] for layer in result.layers}
    assert not result.given and {w.spellings[0].ids[0] for w in result.words} == best
    assert all(layer.ranks[layer.top[0][0]] == 1 for layer in result.layers)
    assert result.leading()[0] == result.next_token


def test_the_grid_is_the_lens_of_each_prefix(model, words, monkeypatch):
    monkeypatch.setattr(logit_lens, "GROUP", 2)  # several walks over the head
    ids = words.encode(PROMPT)
    result = lapis.lens(model, words, PROMPT, ["Kuala"], LensOptions(positions=99))
    assert {r.position for r in result.grid} == set(range(len(ids))) and len(result.grid) == 4 * len(ids)
    for place in (0, 2, len(ids) - 1):
        alone = lapis.lens(model, words, ids[: place + 1], ["Kuala"])
        mine = {r.layer: r for r in result.grid if r.position == place}
        for reading in [alone.readings[0], *alone.layers]:
            there = mine[reading.layer]
            assert [i for _, i, _ in there.top[:4]] == [i for _, i, _ in reading.top[:4]]
            assert there.entropy == pytest.approx(reading.entropy, rel=1e-5)
            assert there.kl_to_final == pytest.approx(reading.kl_to_final, rel=1e-4, abs=1e-6)


def test_contributions_add_up_to_the_logit(model, words):
    result = lapis.lens(model, words, PROMPT, ["Malaysia", "Kuala"])
    if not model.blocks[0].only_adds:
        assert result.contributions == [] and any("no contributions" in note for note in result.notes)
        return
    with torch.inference_mode():
        logits = model(torch.tensor([result.ids]))[0, -1]
    if cap := model.config.logit_cap:  # they add up to a logit before its cap
        logits = cap * (logits / cap).atanh()
    for word in result.words:
        mine = [c for c in result.contributions if c.word == word.text]
        total = sum(c.logit for c in mine if c.part != "rounding")
        assert total == pytest.approx(logits[mine[0].token].item(), abs=2e-5)
        assert sum(c.part == "head" for c in mine) == 12 and sum(c.part == "mlp" for c in mine) == 3
        assert sum(abs(c.logit) for c in mine if c.part == "rounding") < 2e-5


def test_a_contribution_is_what_cutting_out_a_last_head_loses(words):
    """With the norm's scale frozen; in the last layer there is nothing behind a head but the MLP, which is cut too."""
    model = make_model()
    with torch.no_grad():
        model.blocks[2].mlp.down.weight.zero_()
    result = lapis.lens(model, words, PROMPT, ["Kuala"])
    mine = {(c.layer, c.head): c.logit for c in result.contributions if c.part == "head"}
    E, token, last = model.config.head_dim, result.contributions[0].token, {}
    with torch.inference_mode():
        handle = model.norm.final.register_forward_pre_hook(lambda m, a: last.update(x=a[0].view(-1, 32)[-1]))
        model(torch.tensor([result.ids]))
        scale = model.norm.final(last["x"]) / last["x"]
        reads = scale * model.head.matrix[token]
        whole = last["x"] @ reads
        model.blocks[2].attn.o.weight[:, E : 2 * E] = 0
        model(torch.tensor([result.ids]))
        handle.remove()
        assert mine[2, 1] == pytest.approx((whole - last["x"] @ reads).item(), abs=1e-5)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_bfloat16_is_read_in_full_from_its_own_states(kind, words):
    """Logits are float32 sums: ranks do not tie as rounded logits do, and figures are those of float64."""
    model = make_model(kind).bfloat16()
    result = lapis.lens(model, words, PROMPT, ["Kuala"])
    with torch.inference_mode():
        hidden = model.hidden(torch.tensor([result.ids]))[0, -1]
        exact = hidden.double() @ model.head.matrix.double().T
    token = result.words[0].spellings[0].ids[0]
    assert result.readings[-1].spellings[" Kuala"]["rank"] == 1 + int((exact > exact[token]).sum())
    assert result.readings[-1].spellings[" Kuala"]["logprob"] == pytest.approx(
        exact.log_softmax(-1)[token].item(), rel=1e-6
    )  # fmt: skip
    assert "rounding" in {c.part for c in result.contributions}


def test_no_hook_stays_on_the_plain_path(words):
    model = make_model()

    def hooks() -> int:
        return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())

    lapis.lens(model, words, PROMPT, ["zebra"])
    assert hooks() == 0
    with torch.no_grad():
        model.blocks[1].attn.v.weight[0, 0] = torch.nan
    with pytest.raises(LapisError):
        lapis.lens(model, words, PROMPT)
    assert hooks() == 0


def test_a_last_row_that_is_not_the_models_own_is_refused(words):
    model = make_model()
    handle = model.head.register_forward_hook(lambda module, args, out: out * 1.01)
    with pytest.raises(LapisError, match="off the model's own logits"):
        lapis.lens(model, words, PROMPT)
    handle.remove()


def test_two_models_side_by_side(words):
    one = Opened(make_model(seed=0), words, "one")
    other = Opened(make_model(seed=1), words, "other")
    a, b = side_by_side(one, other, PROMPT)
    assert [w.text for w in a.words] == [w.text for w in b.words]
    best = {layer.top[0][0] for trace in (a, b) for layer in trace.layers if layer.top[0][1] < words.rows}
    assert {w.text for w in a.words} == best  # a row of the head that has no token cannot be found in the other model
    assert a.readings == lapis.lens(one.model, words, PROMPT, a.words).readings
    swapped, _ = side_by_side(one, other, PROMPT, ["Kuala"], swapped=True)
    with torch.inference_mode():
        last = {}
        handle = one.model.norm.final.register_forward_pre_hook(lambda m, args: last.update(x=args[0][0, -1]))
        one.model(torch.tensor([a.ids]))
        handle.remove()
        logits = other.model.head(other.model.norm.final(last["x"]))
    assert swapped.head == "other" and swapped.readings[-1].top[0][1] == logits.argmax().item()
    with pytest.raises(DataError, match="wide"):
        side_by_side(one, Opened(make_model(dim=64), words, "wide"), PROMPT, swapped=True)


def test_json_has_the_keys_that_others_rely_on(words):
    result = json.loads(
        json.dumps(lapis.lens(make_model(), words, PROMPT, "Kuala,Jakarta", LensOptions(positions=3)).to_json())
    )
    assert result["tokens"] == ["the", " capital", " of", " Malaysia", " is"]
    assert [layer["layer"] for layer in result["layers"]] == [0, 1, 2]
    for layer in result["layers"]:
        assert set(layer) >= {"layer", "top", "entropy", "kl_to_final", "ranks", "after_attention"}
        assert set(layer["ranks"]) == {"Kuala", "Jakarta"} and all(rank >= 1 for rank in layer["ranks"].values())


def test_it_draws_itself_and_gives_rows(words):
    pandas = pytest.importorskip("pandas")
    result = lapis.lens(make_model(), words, PROMPT, ["Kuala"], LensOptions(positions=3))
    assert "Kuala" in str(result) and len(str(result).splitlines()) == 6
    frame = result.to_pandas()
    assert isinstance(frame, pandas.DataFrame) and len(frame) == len(result.readings)
    assert len(result.to_pandas("grid")) == 12 and result.to_pandas("contributions")["logit"].abs().sum() > 0
    for what in ("ranks", "grid", "contributions"):
        assert result.plot(what).data
    shown = result._repr_mimebundle_()
    assert shown["text/plain"] == str(result) and "Kuala" in shown["text/html"]
    with pytest.raises(ConfigError, match="cannot plot"):
        result.plot("pie")


def test_spellings(words):
    assert [s.text for s in spell("Malaysia", words).spellings] == [" Malaysia", "Malaysia"]
    assert spell(" Kuala", words).spellings == (Spelling(" Kuala", tuple(words.encode(" Kuala"))),)
    assert spell("<|im_end|>", words) == TrackedWord(
        "<|im_end|>", (Spelling("<|im_end|>", (words.special["<|im_end|>"],)),)
    )
    for word in ("Kuala", "吉隆坡", "naïve", "x"):
        for spelling in spell(word, words).spellings:
            assert words.decode(spelling.ids) == spelling.text


def test_a_word_is_followed_by_its_single_token(model, words):
    """ " Malaysia" is a token and "Malaysia" begins with a piece: the ranks are the token's."""
    result = lapis.lens(model, words, PROMPT, ["Malaysia", "zebra"])
    whole, piece = result.words[0].spellings
    assert len(whole.ids) == 1 < len(piece.ids)
    for reading in result.readings:
        assert reading.ranks["Malaysia"] == reading.spellings[" Malaysia"]["rank"]
    assert result.words[0].label == "Malaysia"
    assert [s["followed"] for s in result.to_json()["words"][0]["spellings"]] == [True, False]
    # without a token of its own, the label says of which piece the ranks are
    pieces = [words.text(s.ids[0]) for s in result.words[1].spellings]
    assert all(len(s.ids) > 1 for s in result.words[1].spellings) and result.words[1].pieces == tuple(pieces)
    label = result.words[1].label
    assert label.startswith("zebra (its piece ") and all(piece.strip() in label for piece in pieces)
    assert label in str(result) and result.to_json()["words"][1]["label"] == label


def test_a_contribution_is_that_of_the_followed_token(model, words):
    result = lapis.lens(model, words, PROMPT, ["Malaysia"])
    if model.blocks[0].only_adds:
        assert {c.token for c in result.contributions} == {result.words[0].spellings[0].ids[0]}


def test_a_typed_space_stays(words):
    def spaced(track):
        return [word.text for word in as_words(track, words, words.rows)]

    assert spaced(" Malaysia") == [" Malaysia"] and spaced("Malaysia") == ["Malaysia"]
    assert spaced(" Malaysia, Kuala,  Jakarta ,the") == [" Malaysia", "Kuala", " Jakarta", "the"]
    (typed,) = as_words(" Malaysia", words, words.rows)
    assert [s.text for s in typed.spellings] == [" Malaysia"] and typed.label == "␣Malaysia"
    assert spaced(",, ,") == [] and spaced("") == []


def test_a_word_that_the_tokenizer_cannot_express():
    import tokenizers
    from tokenizers import models, pre_tokenizers

    from lapis.text.tokenizer.tokenizer import Tokenizer

    backend = tokenizers.Tokenizer(models.WordLevel({"cat": 0, "dog": 1, "[UNK]": 2}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = Tokenizer(backend, {"unk_token": "[UNK]"}, {})
    assert spell("cat", tokenizer).spellings[0].ids == (0,)
    for word in ("zebra", "cat zebra"):
        with pytest.raises(ConfigError, match=f'cannot express "{word}"'):
            spell(word, tokenizer)
    for word in ("", " "):
        with pytest.raises(ConfigError, match="empty"):
            spell(word, tokenizer)


def test_bad_inputs_get_one_line(words):
    model = make_model()
    for prompt, track, message in (
        ("", (), "prompt is empty"),
        ("the " * 50, (), r"prompt has \d+ tokens, and the context of this llama model is 40; shorten it"),
        (words.encode("the " * 50)[:40], ["zebra"], "a tracked word 5 more"),
        ([1, 2, 330], (), "token 330 has no row"),
    ):
        with pytest.raises(DataError, match=message):
            lapis.lens(model, words, prompt, track)
    assert lapis.lens(model, words, words.encode("the " * 50)[:40]).next_token
    encoder = Transformer(ModelConfig(dim=16, layers=1, heads=2, ffn_dim=16, vocab=330, context=40, causal=False,
                                      norm_place="post", norm="layer", family="bert", head="masked"))  # fmt: skip
    with pytest.raises(LapisError, match=r"is an encoder \(bert\)"):
        lapis.lens(encoder, words, PROMPT)
    with pytest.raises(LapisError, match="has no head, not one over the vocabulary"):
        lapis.lens(make_model(head="none"), words, PROMPT)


@pytest.mark.parametrize(
    "name", ["blocks.1.attn.v.weight", "blocks.2.mlp.down.weight", "embed.weight", "norm.final.weight", "head.weight"]
)
def test_fault_19_nan_weights_are_named(name, words):
    model = make_model()
    with torch.no_grad():
        model.get_parameter(name)[words.encode(PROMPT)[0] if name == "embed.weight" else 7] = torch.nan
    with pytest.raises(LapisError, match=f"this llama model: {name} holds NaN or Inf; fetch the weights again"):
        lapis.lens(model, words, PROMPT)


def test_states_that_overflow_are_said_to(words):
    model = make_model().half()
    with torch.no_grad():
        model.blocks[1].mlp.down.weight.fill_(6e4)
    with pytest.raises(LapisError, match=r"layer [12] overflows torch.float16; load the model in float32"):
        lapis.lens(model, words, PROMPT)


def test_without_pandas_one_line_says_how_to_get_it(words, monkeypatch):
    result = lapis.lens(make_model(), words, PROMPT)
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(MissingExtra, match="pandas is not installed; pip install"):
        result.to_pandas()
