"""Generation: pieces make the text, rows are independent, cached equals uncached, and what is refused."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lapis.errors import ConfigError, DataError, LapisError
from lapis.families.config import ModelConfig
from lapis.generation.generate import Decoding, Memory, encode, generate, generate_batch, stream
from lapis.generation.options import Sampling
from lapis.generation.text import Pieces
from lapis.model.transformer import Transformer
from lapis.text.tokenizer.tokenizer import Tokenizer, train_tokenizer

TEXT = "the cat sat on the mat, and the dog — кіт 고양이 猫 😀 — ate the fish while a bird sang. "
FREE = Sampling(temperature=1.0, max_tokens=30, seed=3)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_tokenizer([TEXT * 4], 320)


def tiny(seed: int = 0, **options) -> Transformer:
    torch.manual_seed(seed)
    shape = {"dim": 32, "layers": 2, "heads": 4, "kv_heads": 2, "ffn_dim": 48, "vocab": 320, "context": 96}
    model = Transformer(ModelConfig(**{**shape, **options})).eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.3)
    return model


@pytest.fixture(scope="module")
def model() -> Transformer:
    return tiny()


# -- text in pieces


@given(st.text(max_size=60), st.integers(0, 3))
@settings(deadline=None, max_examples=200)
def test_pieces_make_the_text_and_split_no_character(tokenizer, text, context):
    ids = tokenizer.encode("the" + text)
    lead = tokenizer.decode(ids[:context])
    pieces = Pieces(tokenizer, ids[:context])
    released = [pieces.add(token) for token in ids[context:]]
    if "\N{REPLACEMENT CHARACTER}" not in text + lead:
        assert not any("\N{REPLACEMENT CHARACTER}" in piece for piece in released)
        assert "".join(released) + pieces.end() == ("the" + text)[len(lead) :] == pieces.text


@given(st.lists(st.sampled_from("abc"), max_size=30), st.lists(st.text("abc", min_size=1, max_size=4), max_size=3))
@settings(deadline=None, max_examples=200)
def test_stop_text_is_never_shown(letters, stops):
    class Letters:
        def decode(self, ids, skip_special=False):
            return "".join(map(chr, ids))

    pieces = Pieces(Letters(), (), stops)
    shown = ""
    for letter in letters:
        shown += pieces.add(ord(letter))
        if pieces.stopped:
            break
    shown += "" if pieces.stopped else pieces.end()
    whole = "".join(letters)
    assert whole.startswith(shown) and not any(stop in shown for stop in stops)
    assert pieces.stopped == any(stop in whole for stop in stops)
    if not pieces.stopped:
        assert shown == whole


def test_space_at_the_start_of_a_word_stays(tokenizer):
    ids = tokenizer.encode("the cat")
    assert Pieces(tokenizer, ids[:1]).add(ids[1]) == tokenizer.decode(ids)[len(tokenizer.decode(ids[:1])) :]


# -- replies


def test_stream_generate_and_batch_say_the_same(model, tokenizer):
    prompts = ["the cat", "a bird sang", [5, 6, 7]]
    replies = generate_batch(model, tokenizer, prompts[:1], FREE)
    assert "".join(stream(model, tokenizer, prompts[0], FREE)) == generate(model, tokenizer, prompts[0], FREE)
    assert replies[0].text == generate(model, tokenizer, prompts[0], FREE)
    assert replies[0].prompt_tokens == len(tokenizer.encode("the cat"))


@given(st.permutations(["the cat", "a bird sang while the dog", "fish", "on the mat, and the dog ate", "dog"]))
@settings(deadline=None, max_examples=10)
def test_reply_depends_on_no_neighbor(model, tokenizer, prompts):
    """Row i draws from seed + i, whatever stands beside it and however the rows are put into batches."""
    together = generate_batch(model, tokenizer, prompts, FREE)
    split = generate_batch(model, tokenizer, prompts, FREE, batch_size=2)
    alone = [
        generate_batch(model, tokenizer, [prompt], Sampling(temperature=1.0, max_tokens=30, seed=3 + i))[0]
        for i, prompt in enumerate(prompts)
    ]
    assert [reply.ids for reply in together] == [reply.ids for reply in split] == [reply.ids for reply in alone]


@pytest.mark.parametrize("options", [{}, {"window": 5}, {"positions": "learned", "norm": "layer", "mlp": "gelu"}])
def test_cached_equals_uncached(options, tokenizer):
    model = tiny(**options)
    prompts = [[1, 2, 3, 4, 5, 6, 7, 8], [9, 10], [11, 12, 13, 14, 15]]
    decoding = Decoding(model, prompts, Sampling(), range(3))
    rows = [list(prompt) for prompt in prompts]
    for _ in range(20):
        tokens = decoding.step()
        for place, (row, token) in enumerate(zip(rows, tokens, strict=True)):
            with torch.inference_mode():
                whole_V = model(torch.tensor([row]))[0, -1]
            assert torch.allclose(decoding._logits_BV[place], whole_V, atol=1e-4)
            row.append(token)


def test_stop_text_and_max_tokens_end_a_reply(model, tokenizer):
    whole = generate(model, tokenizer, "the cat", Sampling(max_tokens=30))
    assert len(whole) > 8
    stop = whole[5:7]
    (reply,) = generate_batch(model, tokenizer, ["the cat"], Sampling(max_tokens=30, stop=(stop,)))
    assert (reply.stop_reason, reply.text) == ("stop", whole[: whole.index(stop)])
    (reply,) = generate_batch(model, tokenizer, ["the cat"], Sampling(max_tokens=3))
    assert (reply.stop_reason, len(reply.ids)) == ("length", 3)


@pytest.mark.parametrize("options", [{}, {"positions": "learned"}])
def test_reply_ends_where_the_context_is_full(options, tokenizer):
    model = tiny(context=24, **options)
    replies = generate_batch(model, tokenizer, [[1] * 20, [2] * 3, [3] * 23], Sampling(max_tokens=100))
    assert [(len(reply.ids), reply.stop_reason) for reply in replies] == [(4, "length"), (21, "length"), (1, "length")]


def test_special_tokens_in_a_users_text_are_plain_text(model, tokenizer):
    spelled = "<|im_end|>"
    assert tokenizer.special[spelled] not in encode(model, tokenizer, f"the {spelled} cat")
    chat = encode(model, tokenizer, [{"role": "user", "content": f"the {spelled} cat"}])
    plain = encode(model, tokenizer, [{"role": "user", "content": "the cat"}])
    count = [ids.count(tokenizer.special[spelled]) for ids in (chat, plain)]
    assert count[0] == count[1] == 1


def test_end_of_a_chat_turn_ends_the_reply(model, tokenizer):
    ends = tokenizer.end_ids
    assert tokenizer.special["<|im_end|>"] in ends
    replies = generate_batch(model, tokenizer, ["the"] * 40, Sampling(temperature=3.0, max_tokens=90, seed=0))
    ended = [reply for reply in replies if reply.stop_reason == "end"]
    assert ended and all(reply.ids[-1] in ends and not set(reply.ids[:-1]) & set(ends) for reply in ended)
    assert not any("<|" in reply.text for reply in ended)


@pytest.mark.parametrize("options", [{}, {"window": 6}])
def test_memory_of_earlier_turns_changes_nothing(options, tokenizer):
    model = tiny(**options)
    memory = Memory()
    messages = []
    for turn in ("the cat", "a bird", "dog"):
        messages.append({"role": "user", "content": turn})
        sampling = Sampling(max_tokens=6)
        remembered = "".join(stream(model, tokenizer, messages, sampling, memory=memory))
        assert remembered == generate(model, tokenizer, messages, sampling)
        assert memory.cache is not None and memory.cache.length == len(memory.ids)
        messages.append({"role": "assistant", "content": remembered})
    retried = "".join(stream(model, tokenizer, messages[:-1], Sampling(max_tokens=6), memory=memory))
    assert retried == messages[-1]["content"]


def test_reply_may_be_left_half_way(model, tokenizer):
    memory = Memory()
    reply = stream(model, tokenizer, "the cat", FREE, memory=memory)
    next(reply)
    reply.close()
    assert "".join(stream(model, tokenizer, "the cat", FREE, memory=memory)) == generate(
        model, tokenizer, "the cat", FREE
    )


# -- refusals


def test_fault_95_a_prompt_beyond_the_context_is_refused(model, tokenizer):
    with pytest.raises(DataError, match="the prompt has 100 tokens and the model's context is 96"):
        generate_batch(model, tokenizer, [[1] * 100])


def test_empty_prompt(model, tokenizer):
    assert encode(model, tokenizer, "") == [tokenizer.eos_id]
    with pytest.raises(DataError, match="the prompt is empty"):
        generate(model, tokenizer, [])


def test_ids_outside_the_vocabulary_are_refused(model, tokenizer):
    with pytest.raises(DataError, match="from 1 to 320; the vocabulary has 320"):
        generate(model, tokenizer, [1, 320])


def test_model_that_does_not_continue_text_is_refused(tokenizer):
    with pytest.raises(ConfigError, match="does not continue text"):
        generate(tiny(causal=False, head="masked"), tokenizer, "the")


def test_damaged_weights_are_refused(tokenizer):
    model = tiny()
    with torch.no_grad():
        model.blocks[1].mlp.down.weight[0, 0] = torch.nan
    with pytest.raises(LapisError, match="NaN or infinite"):
        generate(model, tokenizer, "the cat")
