"""The lens against transformers' hidden states through their own norm and head, and against float64 recomputation."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import tokenizers
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import lapis
from lapis.errors import LapisError
from lapis.inside.lens import readout
from lapis.inside.prompt import as_tokenizer
from lapis.inside.trace import anatomy, trace
from lapis.model.load import load

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()

WORDS = "the capital of malaysia is kuala lumpur jakarta and indonesia".split()
VOCAB = 97
DECODER = {
    "hidden_size": 48, "num_hidden_layers": 3, "num_attention_heads": 6, "num_key_value_heads": 3,
    "intermediate_size": 80, "vocab_size": VOCAB, "max_position_embeddings": 64,
}  # fmt: skip
GPT2 = {"n_embd": 48, "n_layer": 3, "n_head": 3, "vocab_size": VOCAB, "n_positions": 64}
FAMILIES = {
    "llama": ("LlamaForCausalLM", DECODER),
    "llama-biases": ("LlamaForCausalLM", {**DECODER, "attention_bias": True, "mlp_bias": True}),
    "mistral-window": ("MistralForCausalLM", {**DECODER, "sliding_window": 4}),
    "qwen2-tied": ("Qwen2ForCausalLM", {**DECODER, "tie_word_embeddings": True}),
    "qwen3": ("Qwen3ForCausalLM", {**DECODER, "head_dim": 10}),
    "gpt2": ("GPT2LMHeadModel", GPT2),
}
OTHERS = {
    "gemma": ("GemmaForCausalLM", {**DECODER, "head_dim": 8}),
    "phi": ("PhiForCausalLM", {**DECODER, "num_key_value_heads": 6}),  # attention and MLP side by side
    "neox": ("GPTNeoXForCausalLM", {**DECODER, "hidden_size": 48}),
    "opt": ("OPTForCausalLM", {**DECODER, "ffn_dim": 80, "word_embed_proj_dim": 48}),
    "olmo2": ("Olmo2ForCausalLM", DECODER),  # norms behind attention and MLP
}
IDS = [3, 50, 7, 31, 8, 90, 12]


@pytest.fixture(scope="module")
def words():
    """A tokenizer of ten words and 87 others, as transformers has it: every word one token."""
    vocab = {"Ġ" + word: i for i, word in enumerate(WORDS)} | {f"w{i}": i for i in range(len(WORDS), VOCAB)}
    backend = tokenizers.Tokenizer(models.WordLevel(vocab, unk_token="w96"))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="w96")


def make(kind: str, options: dict):
    torch.manual_seed(0)
    model_class = getattr(transformers, kind)
    model = model_class(model_class.config_class(**options, attn_implementation="eager")).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * (0.1 if parameter.dim() == 1 else 0.15))
    return model


def expected(theirs, ids: list[int]) -> torch.Tensor:
    """Logits of the states after each layer at the last token, [L + 1, V]: transformers' states, norm and head."""
    with torch.no_grad():
        out = theirs(torch.tensor([ids]), output_hidden_states=True)
        trunk = theirs.get_decoder() if hasattr(theirs, "get_decoder") else theirs.base_model
        parts = anatomy(theirs)
        assert any(parts.norm is child for child in trunk.children())
        states = [state[0, -1] for state in out.hidden_states[:-1]]  # their last one is normed already
        rows = [theirs.get_output_embeddings()(parts.norm(state)) for state in states]
        return torch.stack([*rows, out.logits[0, -1]])


def check_readings(result, logits_LV: torch.Tensor) -> None:
    chances_LV = logits_LV.double().softmax(-1)
    for reading, chances_V in zip([result.readings[0], *result.layers], chances_LV, strict=True):
        top = chances_V.topk(5)
        assert [index for _, index, _ in reading.top[:5]] == top.indices.tolist()
        assert [p for _, _, p in reading.top[:5]] == pytest.approx(top.values.tolist(), rel=1e-5)


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_equals_transformers(name, words, tmp_path):
    theirs = make(*FAMILIES[name])
    theirs.save_pretrained(tmp_path)
    ours = load(tmp_path)
    result = lapis.lens(ours, words, IDS)
    logits_LV = expected(theirs, IDS)
    check_readings(result, logits_LV)
    with torch.inference_mode():
        seen = trace(anatomy(ours), torch.tensor([IDS]), (torch.tensor([0]), torch.tensor([len(IDS) - 1])))
        states = torch.cat([seen.embed_PD, *seen.after_LPD])
        assert (ours.head(ours.norm.final(states)) - logits_LV).abs().max() <= 1e-5
    # and through hooks on transformers' own model: the same readings and contributions
    again = lapis.lens(theirs, words, IDS)
    for one, other in zip(result.readings, again.readings, strict=True):
        assert (one.layer, one.after, one.ranks) == (other.layer, other.after, other.ranks)
        assert one.entropy == pytest.approx(other.entropy, rel=1e-5)
        assert one.kl_to_final == pytest.approx(other.kl_to_final, rel=1e-4, abs=1e-7)
    for part, twin in zip(result.contributions, again.contributions, strict=True):
        assert part.label == twin.label and part.logit == pytest.approx(twin.logit, abs=1e-5)


@pytest.mark.parametrize("name", OTHERS)
def test_models_that_only_transformers_has(name, words):
    theirs = make(*OTHERS[name])
    result = lapis.lens(theirs, words, IDS, ["kuala", "jakarta"])
    check_readings(result, expected(theirs, IDS))
    sums = {w.text: sum(c.logit for c in result.contributions if c.word == w.text) for w in result.words}
    rest = [abs(c.logit) for c in result.contributions if c.part == "rounding"]
    if name == "olmo2":
        assert not sums["kuala"] and result.notes and len(result.readings) == 1 + len(result.layers)
    else:
        last = expected(theirs, IDS)[-1]
        for word in result.words:
            assert sums[word.text] == pytest.approx(last[word.spellings[0].ids[0]].item(), abs=1e-5)
        assert max(rest) < 1e-4 and any(c.part == "head" for c in result.contributions)


def test_a_model_that_does_more_at_its_end_is_refused(words):
    """A step behind the head that no config names: norm and head alone would mislead."""

    class Squeezed(transformers.LlamaForCausalLM):
        def forward(self, *args: Any, **options: Any) -> Any:
            out = super().forward(*args, **options)
            out.logits = out.logits.tanh()
            return out

    theirs = Squeezed(transformers.LlamaConfig(**DECODER)).eval()
    with pytest.raises(LapisError, match="off the model's own logits"):
        lapis.lens(theirs, words, IDS)


@pytest.mark.parametrize(("kind", "options"), [
    ("BertModel", {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 3, "vocab_size": VOCAB}),
    ("T5ForConditionalGeneration", {"d_model": 16, "d_kv": 4, "d_ff": 16, "num_layers": 2, "vocab_size": VOCAB}),
    ("LlamaModel", DECODER),
])  # fmt: skip
def test_encoders_and_bare_models_of_transformers_are_refused(kind, options, words):
    with pytest.raises(LapisError, match="lens: "):
        lapis.lens(make(kind, options), words, IDS)


def recomputed(rows_MD, matrix_VD, bias_V, reference_M) -> dict[str, np.ndarray]:
    """Entropy, KL, log-probabilities and ranks in float64, with full rows and a full sort."""
    logits = rows_MD.double().numpy() @ matrix_VD.double().numpy().T
    logits = logits if bias_V is None else logits + bias_V.double().numpy()
    high = logits.max(1, keepdims=True)
    logprobs = logits - high - np.log(np.exp(logits - high).sum(1, keepdims=True))
    chances = np.exp(logprobs)
    final = logprobs[reference_M]
    return {
        "entropy": -(chances * logprobs).sum(1),
        "kl": (np.exp(final) * (final - logprobs)).sum(1),
        "logprobs": logprobs,
        "ranks": 1 + (logits[:, :, None] < logits[:, None, :]).sum(2),
    }


@given(st.integers(0, 10_000), st.integers(1, 3), st.integers(2, 5), st.integers(8, 60), st.booleans(),
       st.sampled_from([torch.float32, torch.bfloat16]))  # fmt: skip
@settings(deadline=None, max_examples=40)
def test_figures_equal_float64_to_1e_6(seed, places, states, vocab, biased, dtype):
    """Any number of blocks: here 16 tokens each. Logits of a few units, as in a model; they are float32 sums."""
    draw = torch.Generator().manual_seed(seed)
    rows_MD = (torch.randn(places * states, 24, generator=draw) * 0.3).to(dtype)
    matrix_VD = torch.randn(vocab, 24, generator=draw).to(dtype)
    matrix_VD[vocab // 2] = matrix_VD[0]  # a tie
    bias_V = torch.randn(vocab, generator=draw).to(dtype) if biased else None
    if bias_V is not None:
        bias_V[vocab // 2] = bias_V[0]
    reference_M = (torch.arange(places).repeat_interleave(states) + 1) * states - 1
    tracked = [0, vocab // 2, vocab - 1, vocab // 3]
    own_FV = torch.nn.functional.linear(
        rows_MD[states - 1 :: states].float(), matrix_VD.float(), None if bias_V is None else bias_V.float()
    )
    result: Any = readout.read(
        rows_MD.view(places, states, 24), matrix_VD, bias_V, own_FV, more_XD=rows_MD[:2], tracked=tracked, width=16
    )  # fmt: skip
    result = SimpleNamespace(**{name.split("_P")[0]: value.flatten(0, 1) if "_PN" in name else value
                               for name, value in vars(result).items()})  # fmt: skip
    np.testing.assert_allclose(result.more_logprobs_XR, result.logprobs[:2], rtol=1e-6, atol=1e-6)
    target = recomputed(rows_MD, matrix_VD, bias_V, reference_M)
    np.testing.assert_allclose(result.entropy, target["entropy"], rtol=1e-6, atol=1e-7)
    np.testing.assert_allclose(result.kl, target["kl"], rtol=1e-6, atol=2e-6)
    np.testing.assert_allclose(result.logprobs, target["logprobs"][:, tracked], rtol=1e-6, atol=2e-6)
    np.testing.assert_array_equal(result.ranks[:, 0], result.ranks[:, 1])
    apart = np.abs(np.diff(np.sort(target["logprobs"], 1), axis=1))
    if apart[apart > 1e-9].min() > 1e-5:
        np.testing.assert_array_equal(result.ranks, target["ranks"][:, tracked])
        best = np.sort(target["logprobs"], 1)[:, ::-1][:, :8]
        np.testing.assert_allclose(result.top_logprobs[:, : best.shape[1]][:, :8], best, rtol=1e-5, atol=1e-5)


def test_the_readings_of_a_model_equal_float64(words):
    """The whole way, on a model: 1e-6 relative."""
    parts = anatomy(make(*FAMILIES["qwen2-tied"]))
    result = lapis.lens(parts.model, words, IDS, ["kuala"])
    with torch.inference_mode():
        seen = trace(parts, torch.tensor([IDS]), (torch.tensor([0]), torch.tensor([len(IDS) - 1])))
        states = [seen.embed_PD, *(x for pair in zip(seen.middle_LPD, seen.after_LPD, strict=True) for x in pair)]
        rows_MD = parts.norm(torch.cat(states))
    target = recomputed(rows_MD.clone(), parts.matrix.detach(), None, np.full(len(rows_MD), len(rows_MD) - 1))
    kuala = as_tokenizer(words).encode(" kuala")[0]
    for row, reading in enumerate(result.readings):
        assert reading.entropy == pytest.approx(target["entropy"][row], rel=1e-6)
        assert reading.kl_to_final == pytest.approx(target["kl"][row], rel=1e-6, abs=1e-7)
        assert reading.logprobs["kuala"] == pytest.approx(target["logprobs"][row, kuala], rel=1e-6)
        assert reading.ranks["kuala"] == target["ranks"][row, kuala]
