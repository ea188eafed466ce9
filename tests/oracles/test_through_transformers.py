"""Models that run through transformers: logits, lens, attention and greedy tokens equal its own."""

import json

import pytest
import tokenizers
import torch
import transformers
from tokenizers import models, pre_tokenizers

import lapis
from lapis.checkpoint import open_checkpoint
from lapis.checkpoint.tensor_file import read_tensors, write_tensors
from lapis.errors import CheckpointError, ConfigError, LapisError, MissingExtra
from lapis.generation.generate import Decoding, generate_batch
from lapis.generation.options import Sampling
from lapis.inside.attention_map import attention_maps
from lapis.inside.trace import anatomy, trace
from lapis.model.reading.opening import load_outside, read_outline
from lapis.model.reading.outside import OutsideHead
from lapis.model.scoring import ScoredSequence, nll
from lapis.text.tokenizer.tokenizer import Tokenizer, train_tokenizer

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()

VOCAB = 97
LLAMA = {
    "hidden_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2,
    "intermediate_size": 80, "vocab_size": VOCAB, "max_position_embeddings": 64, "pad_token_id": 0,
}  # fmt: skip
NEOX = {**LLAMA, "num_key_value_heads": 4}
KINDS = {
    "gpt_neox": ("GPTNeoXForCausalLM", NEOX),
    "opt": ("OPTForCausalLM", {**NEOX, "ffn_dim": 80, "word_embed_proj_dim": 48}),
    "bloom": ("BloomForCausalLM", {"hidden_size": 48, "n_layer": 3, "n_head": 4, "vocab_size": VOCAB}),
    "mpt": ("MptForCausalLM", {"d_model": 48, "n_layers": 3, "n_heads": 4, "vocab_size": VOCAB, "max_seq_len": 64}),
    "stablelm": ("StableLmForCausalLM", {**LLAMA, "partial_rotary_factor": 0.5}),
    "cohere2": ("Cohere2ForCausalLM", {**LLAMA, "sliding_window": 4, "logit_scale": 0.25}),
    "gemma2": ("Gemma2ForCausalLM", {
        **LLAMA, "head_dim": 12, "sliding_window": 4, "final_logit_softcapping": 3.0, "attn_logit_softcapping": 5.0,
    }),
    "phi": ("PhiForCausalLM", NEOX),  # a head with a bias
    "mixtral": ("MixtralForCausalLM", {**LLAMA, "num_local_experts": 4, "num_experts_per_tok": 2}),
    "minimax": ("MiniMaxForCausalLM", {  # wants a cache of its own
        **LLAMA, "num_local_experts": 4, "num_experts_per_tok": 2, "block_size": 16,
    }),
    "mamba": ("MambaForCausalLM", {"hidden_size": 48, "num_hidden_layers": 3, "vocab_size": VOCAB, "state_size": 4}),
}  # fmt: skip
IDS = [3, 50, 7, 31, 8, 90, 12, 44]


def make(name: str, **options):
    """A model of transformers whose weights are large enough that every part says something."""
    torch.manual_seed(0)
    kind, fields = KINDS[name]
    model_class = getattr(transformers, kind)
    model = model_class(model_class.config_class(**fields, **options)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * (0.05 if parameter.dim() == 1 else 0.15))
    return model


@pytest.fixture(scope="module")
def words() -> Tokenizer:
    """A word for each id; the last one is unknown, and none ends a text."""
    backend = tokenizers.Tokenizer(models.WordLevel({f"w{i}": i for i in range(VOCAB)}, unk_token="w96"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    return Tokenizer(backend, {"unk_token": "w96"}, {})


@pytest.fixture(scope="module", params=KINDS)
def pair(request, tmp_path_factory):
    """transformers' model, and what lapis makes of its folder, whichever families lapis runs by itself."""
    theirs = make(request.param)
    folder = tmp_path_factory.mktemp(request.param)
    theirs.save_pretrained(folder)
    return theirs, load_outside(open_checkpoint(folder))


def test_logits_equal_transformers_also_in_the_head_alone(pair):
    theirs, ours = pair
    ids_BT = torch.tensor([IDS, IDS[::-1]])
    with torch.inference_mode():
        logits_BTV = theirs(ids_BT).logits
        assert torch.equal(ours(ids_BT), logits_BTV) or (ours(ids_BT) - logits_BTV).abs().max() <= 1e-5
    assert isinstance(ours.head, OutsideHead) and ours.config.vocab == logits_BTV.shape[-1]
    scored = [ScoredSequence(IDS, [i > 2 for i in range(len(IDS))]), ScoredSequence(IDS[:5], [True] * 5)]
    for sequence, nats in zip(scored, nll(ours, scored), strict=True):
        with torch.inference_mode():
            logprobs_TV = theirs(torch.tensor([sequence.ids])).logits[0].double().log_softmax(-1)
        target = -sum(logprobs_TV[t - 1, sequence.ids[t]] for t in range(1, len(sequence.ids)) if sequence.scored[t])
        assert nats == pytest.approx(float(target), abs=1e-4)


def test_greedy_tokens_equal_generate_padded_and_not(pair, words):
    theirs, ours = pair
    prompts = [IDS, IDS[:3], IDS[2:7]]
    replies = generate_batch(ours, words, prompts, Sampling(max_tokens=12))
    for prompt, reply in zip(prompts, replies, strict=True):
        ids_BT = torch.tensor([prompt])
        whole = theirs.generate(
            ids_BT, attention_mask=torch.ones_like(ids_BT), max_new_tokens=12, do_sample=False, eos_token_id=None
        )  # fmt: skip
        ids = whole[0, len(prompt) :].tolist()
        ends = [i for i, token in enumerate(ids) if token in words.end_ids]
        assert list(reply.ids) == ids[: ends[0] + 1 if ends else None]
        (alone,) = generate_batch(ours, words, [prompt], Sampling(max_tokens=12))
        assert alone.ids == reply.ids


def test_the_cache_gives_what_a_whole_pass_gives(pair):
    _, ours = pair
    decoding = Decoding(ours, [IDS, IDS[:4]], Sampling(max_tokens=12))
    rows = [list(IDS), list(IDS[:4])]
    for _ in range(6):
        tokens = decoding.step()
        for row, token, logits_V in zip(rows, tokens, decoding._logits_BV, strict=True):
            with torch.inference_mode():
                assert (ours(torch.tensor([row]))[0, -1] - logits_V).abs().max() <= 1e-4
            row.append(token)


def final_norm(theirs):
    """The last norm that the model defines outside of its blocks."""
    outside = [m for name, m in theirs.named_modules() if "norm" in type(m).__name__.lower() and ".0." not in name
               and ".1." not in name and ".2." not in name]  # fmt: skip
    return outside[-1]


def test_the_lens_equals_the_head_on_hidden_states(pair, words):
    """By hand: transformers' hidden states through its own final norm, head, factor and cap."""
    theirs, ours = pair
    parts = anatomy(ours)
    result = lapis.lens(ours, words, IDS)
    with torch.inference_mode():
        out = theirs(torch.tensor([IDS]), output_hidden_states=True)
        norm, head, kind = final_norm(theirs), theirs.get_output_embeddings(), theirs.config.model_type
        states = list(out.hidden_states[: parts.layers])  # the last one is normed already
        if kind == "mamba":  # begins behind the first layer
            states = [theirs.get_input_embeddings()(torch.tensor([IDS])), *states[:-1]]
        rows = [head(norm(state[0, -1])) for state in states]
        if kind == "cohere2":
            rows = [row * theirs.config.logit_scale for row in rows]
        if cap := getattr(theirs.config, "final_logit_softcapping", None):
            rows = [torch.tanh(row / cap) * cap for row in rows]
        logits_LV = torch.stack([*rows, out.logits[0, -1]]).double()
    for reading, chances_V in zip([result.readings[0], *result.layers], logits_LV.softmax(-1), strict=True):
        top = chances_V.topk(5)
        assert [index for _, index, _ in reading.top[:5]] == top.indices.tolist()
        assert [p for _, _, p in reading.top[:5]] == pytest.approx(top.values.tolist(), rel=1e-4)
    entropy = -(logits_LV.softmax(-1) * logits_LV.log_softmax(-1)).sum(-1)
    assert [r.entropy for r in (result.readings[0], *result.layers)] == pytest.approx(entropy.tolist(), rel=1e-4)
    for word in result.words:
        shares = [c.logit for c in result.contributions if c.word == word.text]
        if shares:
            final = logits_LV[-1, word.spellings[0].ids[0]]
            final = cap * (final / cap).atanh() if cap else final
            assert sum(shares) == pytest.approx(float(final), abs=2e-4)
            assert sum(abs(c.logit) for c in result.contributions if c.part == "rounding") < 1e-2


def test_attention_equals_output_attentions(pair, words):
    theirs, ours = pair
    heads = [(layer, head) for layer in range(3) for head in range(4)]
    if theirs.config.model_type == "mamba":
        with pytest.raises(LapisError, match=r"no head|no attention"):
            attention_maps(ours, words, IDS, heads[:1])
        return
    if theirs.config.model_type == "minimax":
        with pytest.raises(LapisError, match=r"layer 1 of .* shows no attention weights"):  # it keeps a state there
            attention_maps(ours, words, IDS, heads)
        heads = [key for key in heads if key[0] == 0]
    maps = attention_maps(ours, words, IDS, heads)
    before = theirs.config._attn_implementation
    theirs.set_attn_implementation("eager")
    with torch.inference_mode():
        weights = theirs(torch.tensor([IDS]), output_attentions=True).attentions
    theirs.set_attn_implementation(before)
    for (layer, head), result in zip(heads, maps, strict=True):
        assert (result.weights_TS - weights[layer][0, head]).abs().max() <= 1e-6
        assert torch.allclose(result.scores_TS.softmax(1), result.weights_TS, atol=1e-6)
    if theirs.config.model_type in ("gpt_neox", "stablelm", "gemma2", "opt"):
        check_values(ours, maps)
    else:
        assert maps[0].moved_TS is None or theirs.config.model_type in ("cohere2", "phi", "mixtral", "minimax")


def check_values(ours, maps) -> None:
    """All heads' weighted values through the output map are what the attention gives to the stream."""
    parts = anatomy(ours)
    ids_BT, places = torch.tensor([IDS]), (torch.zeros(len(IDS), dtype=torch.long), torch.arange(len(IDS)))
    seen = trace(parts, ids_BT, places)
    for layer in range(3):
        of_layer = [m for m in maps if m.layer == layer]
        # of one token that only sees itself the length of what moves is the length of its value, which adds up
        first = [float(m.moved_TS[0, 0]) for m in of_layer]
        mixed_I = seen.mixed_LPI[layer][0]
        E = len(mixed_I) // 4
        with torch.inference_mode():
            for head, length in enumerate(first):
                alone_I = torch.zeros_like(mixed_I)
                alone_I[head * E : (head + 1) * E] = mixed_I[head * E : (head + 1) * E]
                mixer = parts.mixers[layer]
                assert float((mixer(alone_I) - mixer(alone_I * 0)).norm()) == pytest.approx(length, rel=1e-4)


def saved(tmp_path, name: str = "gpt_neox", **changes):
    make(name).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, **changes}))
    return tmp_path


def test_nothing_of_a_config_turns_code_on(tmp_path):
    """auto_map and attention kernels of the hub are dropped, wherever they stand."""
    folder = saved(tmp_path, auto_map={"AutoModelForCausalLM": "evil.Model"}, attn_implementation="evil/kernel",
                   _attn_implementation="evil/kernel", trust_remote_code=True)  # fmt: skip
    (folder / "evil.py").write_text("raise SystemExit('ran')")
    model = load_outside(open_checkpoint(folder))
    assert type(model.inner).__module__.startswith("transformers.models.gpt_neox")
    assert "runs through transformers" in model.notes[0]


@pytest.mark.parametrize(("changes", "message"), [
    ({"model_type": "starfish"}, "transformers .* does not know it either"),
    ({"model_type": "t5"}, "no next token"),
    ({"num_hidden_layers": 10**9}, "num_hidden_layers is 1000000000"),
    ({"num_hidden_layers": 4000}, "config.json describes"),
    ({"intermediate_size": 96}, "config.json describes"),
    ({"vocab_size": "many"}, "vocab_size|transformers cannot run it"),
    ({"quantization_config": {"bits": 4}}, "quantized"),
])  # fmt: skip
def test_a_folder_that_cannot_be_run_is_refused_in_a_line(changes, message, tmp_path):
    with pytest.raises(CheckpointError, match=message) as error:
        load_outside(open_checkpoint(saved(tmp_path, **changes)))
    assert "\n" not in str(error.value)


def test_missing_and_damaged_tensors_are_named(tmp_path):
    path = saved(tmp_path) / "model.safetensors"
    tensors = read_tensors(path)
    name = "gpt_neox.layers.1.attention.dense.weight"
    write_tensors(path, {key: value for key, value in tensors.items() if key != name})
    with pytest.raises(CheckpointError, match=r"describes|attention.dense.weight"):
        load_outside(open_checkpoint(tmp_path))
    write_tensors(path, {**{k: v for k, v in tensors.items() if k != name}, "spare": tensors[name]})
    with pytest.raises(CheckpointError, match=r"1 tensor is missing: .*attention.dense.weight"):
        load_outside(open_checkpoint(tmp_path))
    write_tensors(path, {**tensors, name: tensors[name] * torch.nan})
    with pytest.raises(CheckpointError, match=f"{name} holds"):
        load_outside(open_checkpoint(tmp_path))


def test_a_model_that_sees_later_tokens_is_refused(tmp_path):
    """A BERT may be configured to speak or not; transformers builds both."""
    config = transformers.RobertaConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48, vocab_size=VOCAB
    )
    transformers.RobertaForMaskedLM(config).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="sees later tokens"):
        load_outside(open_checkpoint(tmp_path))


def test_without_the_extra_the_command_to_install_it_is_named(tmp_path, monkeypatch):
    checkpoint = open_checkpoint(saved(tmp_path))
    monkeypatch.setitem(__import__("sys").modules, "transformers", None)
    with pytest.raises(MissingExtra, match=r"gpt_neox.*pip install 'lapis\[hf\]'"):
        read_outline(checkpoint)


def test_the_commands_take_such_a_folder_as_typed(tmp_path, run):
    """lens with attention maps, eval, generate; and one line where lapis' own model is needed."""
    folder, text = tmp_path / "m", tmp_path / "text.txt"
    config = transformers.BloomConfig(hidden_size=48, n_layer=3, n_head=4, vocab_size=330)
    transformers.BloomForCausalLM(config).save_pretrained(folder)
    text.write_text("in Malaysia they say Kuala Lumpur")
    train_tokenizer(["in Malaysia they say Kuala Lumpur " * 40], 300).save(folder)
    status, out, err = run("eval", folder, "--text", text, "--json")
    assert status == 0, err
    assert any("runs through transformers" in note for note in json.loads(out)["notes"])
    status, out, err = run("generate", folder, "in Malaysia", "--max-tokens", 4, "--json")
    assert status == 0 and any("runs through transformers" in note for note in json.loads(out)["notes"]), err
    page = tmp_path / "page.html"
    status, out, err = run("lens", folder, "in Malaysia", "--track", "Kuala", "--html", page, "--json")
    assert status == 0 and "runs through transformers" in err, err
    assert len(json.loads(out)["layers"]) == 3
    for arguments in (
        ("generate", folder, "x", "--weights", "int8"), ("eval", folder, "--pairs", text), ("serve", folder),
        ("export", folder, "--gguf", tmp_path / "x.gguf"),
    ):  # fmt: skip
        status, _, err = run(*arguments)
        assert status == 1 and len(err.strip().splitlines()) == 1, (arguments, err)
