"""Folders with more than a language model: layers are the language model's, other towers are copied, and it is said."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from lapis.checkpoint import open_checkpoint
from lapis.checkpoint.towers import find_towers
from lapis.weights.diff.diff import diff
from lapis.weights.graft.graft import graft
from lapis.weights.merge.merge import merge

from .conftest import near, weights, words, write_model

LAYERS, VISION = 4, 3


def stack(stem, count=2, parts=("self_attn.q_proj", "mlp.up_proj")):
    return [f"{stem}layers.{i}.{part}.weight" for i in range(count) for part in parts]


# language stem, names of the language model, names of others
NAMES = {
    "text": ("model", ["model.embed_tokens.weight", "lm_head.weight", *stack("model.")], []),
    "bare": ("", ["embed_tokens.weight", *stack("")], []),
    "gemma3": (
        "model.language_model",
        ["model.language_model.embed_tokens.weight", "lm_head.weight", *stack("model.language_model.")],
        ["model.multi_modal_projector.mm_input_projection_weight", *stack("model.vision_tower.vision_model.encoder.")],
    ),
    "older gemma3": (
        "language_model.model",
        ["language_model.model.embed_tokens.weight", "language_model.lm_head.weight", *stack("language_model.model.")],
        ["multi_modal_projector.weight", *stack("vision_tower.vision_model.encoder.", 9)],
    ),
    "qwen2-vl": (
        "model",
        ["model.embed_tokens.weight", "lm_head.weight", *stack("model.")],
        ["visual.merger.mlp.0.weight", *(f"visual.blocks.{i}.attn.qkv.weight" for i in range(32))],
    ),
    "llava": (
        "model",
        ["model.embed_tokens.weight", *stack("model.")],
        ["model.mm_projector.0.weight", *stack("model.vision_tower.vision_tower.vision_model.encoder.", 5)],
    ),
    "two in one": (
        "language_model.model",
        ["language_model.model.embed_tokens.weight", *stack("language_model.model.")],
        [*stack("vision_model.transformer."), *stack("vision_model.global_transformer.")],
    ),
    "speech": (
        "thinker.model",
        ["thinker.model.embed_tokens.weight", "thinker.lm_head.weight", *stack("thinker.model.", 4)],
        ["thinker.audio_tower.conv1.weight", *stack("thinker.audio_tower."), "talker.model.embed_tokens.weight",
         *stack("talker.model.")],
    ),
    "omni": (  # Qwen2.5-Omni: what speaks has more layers here than what thinks
        "thinker.model",
        ["thinker.model.embed_tokens.weight", "thinker.model.norm.weight", "thinker.lm_head.weight",
         *stack("thinker.model.", 2)],
        ["thinker.audio_tower.proj.weight", *stack("thinker.audio_tower.", 5), "thinker.visual.merger.mlp.0.weight",
         *(f"thinker.visual.blocks.{i}.attn.q.weight" for i in range(5)), "talker.model.embed_tokens.weight",
         *stack("talker.model.", 6), "talker.model.norm.weight", "talker.codec_head.weight",
         "talker.thinker_to_talker_proj.weight", "token2wav.code2wav_dit_model.proj_out.weight",
         *(f"token2wav.code2wav_dit_model.transformer_blocks.{i}.ff.ff.0.weight" for i in range(4))],
    ),
    "omni with experts": (  # Qwen3-Omni
        "thinker.model",
        ["thinker.model.embed_tokens.weight", "thinker.lm_head.weight", *stack("thinker.model.", 2)],
        [*stack("talker.model.", 3), "talker.text_projection.linear_fc1.weight",
         *stack("talker.code_predictor.model.", 3), "talker.code_predictor.lm_head.0.weight",
         *stack("code2wav.pre_transformer.", 3), "code2wav.decoder.0.conv.weight"],
    ),
    "sees, hears and speaks": (  # MiniCPM-o
        "llm.model",
        ["llm.model.embed_tokens.weight", "llm.lm_head.weight", *stack("llm.model.")],
        ["resampler.attn.in_proj_weight", *stack("vpm.encoder.", 3), *stack("apm.", 3), *stack("tts.model.", 3),
         "tts.emb_code.0.weight", "audio_projection_layer.linear1.weight"],
    ),
    "speech in two depths": (  # CSM: the depth decoder has an embedding of its own
        "backbone_model",
        ["backbone_model.embed_tokens.weight", "lm_head.weight", *stack("backbone_model.")],
        ["depth_decoder.model.embed_tokens.weight", *stack("depth_decoder.model.", 4), "codec_model.quantizer.weight"],
    ),
    "extra predictions": ("model", ["model.embed_tokens.weight", *stack("model.")], stack("mtp.", 1)),
    "encoder and decoder": ("model", ["model.shared.weight", *stack("model.encoder."), *stack("model.decoder.")], []),
    "pictures only": ("vit.encoder", [f"vit.encoder.layer.{i}.attention.output.dense.weight" for i in range(3)], []),
    "experts": ("model", [f"model.layers.{i}.mlp.experts.{e}.up.weight" for i in range(2) for e in range(3)], []),
}  # fmt: skip


@pytest.mark.parametrize("kind", NAMES)
def test_names_are_sorted_into_towers(kind):
    stem, own, others = NAMES[kind]
    towers = find_towers([*others, *own])
    assert towers.stem == stem and set(towers.others) == set(others)
    assert all(towers.inner(name) for name in own) and not any(towers.inner(name) for name in others)
    if kind != "encoder and decoder" and stack("")[0] in {towers.inner(name) for name in own}:
        assert towers.inner(own[-1]).startswith("layers.")


def multimodal(folder, seed, like=None):
    """A folder as gemma 3 has it, with layers of its own in the vision tower; like: what it is a fine-tune of."""
    random = torch.Generator().manual_seed(seed)
    shapes = {"model.language_model.embed_tokens.weight": (64, 16), "model.language_model.norm.weight": (16,),
              "model.multi_modal_projector.mm_input_projection_weight": (8, 16)}  # fmt: skip
    for i in range(LAYERS):
        lead = f"model.language_model.layers.{i}."
        shapes |= {f"{lead}{part}.weight": (16, 16) for part in ("self_attn.q_proj", "mlp.up_proj", "mlp.down_proj")}
        shapes[f"{lead}input_layernorm.weight"] = (16,)
    for i in range(VISION):
        lead = f"model.vision_tower.vision_model.encoder.layers.{i}."
        shapes |= {f"{lead}{part}.weight": (8, 8) for part in ("self_attn.q_proj", "mlp.fc1")}
    tensors = {
        name: torch.randn(shape, generator=random) * (1.0 if like is None else 0.1)
        + (0 if like is None else like[name])
        for name, shape in shapes.items()
    }
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    text = {"model_type": "gemma3_odd", "num_hidden_layers": LAYERS, "hidden_size": 16, "intermediate_size": 16,
            "vocab_size": 64, "layer_types": ["sliding_attention", "full_attention"] * (LAYERS // 2)}  # fmt: skip
    config = {"architectures": ["Gemma3ForConditionalGeneration"], "model_type": "gemma3", "text_config": text,
              "vision_config": {"num_hidden_layers": VISION, "hidden_size": 8}}  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    return tensors


@pytest.fixture
def pair(tmp_path):
    a = multimodal(tmp_path / "a", 1)
    return a, multimodal(tmp_path / "b", 2, a)


def test_a_stack_repeats_the_layers_of_the_language_model_alone(pair, tmp_path):
    a, _ = pair
    slices = [{"sources": [{"model": str(tmp_path / "a"), "layer_range": span}]} for span in ([0, 3], [1, 4])]
    done = merge({"merge_method": "passthrough", "slices": slices, "dtype": "float32"}, tmp_path / "out")
    out = load_file(tmp_path / "out" / "model.safetensors")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["text_config"]["num_hidden_layers"] == 6 and config["vision_config"]["num_hidden_layers"] == VISION
    assert len(config["text_config"]["layer_types"]) == 6
    for i, source in enumerate([0, 1, 2, 1, 2, 3]):
        name = "model.language_model.layers.{}.mlp.up_proj.weight"
        assert torch.equal(out[name.format(i)], a[name.format(source)])
    others = {name for name in a if "vision" in name or "projector" in name}
    assert {name for name in out if "vision" in name or "projector" in name} == others
    assert all(torch.equal(out[name], a[name]) for name in others)
    assert any("vision_tower" in note and "copied" in note for note in done.notes)


@pytest.mark.parametrize("method", ["slerp", "linear"])
def test_gradients_run_over_the_language_model_alone(pair, tmp_path, method):
    a, b = pair
    parameter = {"t": [0, 1]} if method == "slerp" else {"weight": 0.5}
    recipe = {"merge_method": method, "models": [{"model": str(tmp_path / n)} for n in "ab"], "parameters": parameter,
              "dtype": "float32"} | ({"base_model": str(tmp_path / "a")} if method == "slerp" else {})  # fmt: skip
    done = merge(recipe, tmp_path / "out")
    out = load_file(tmp_path / "out" / "model.safetensors")
    assert all(torch.equal(out[name], a[name]) for name in a if "vision" in name or "projector" in name)
    first, last = (f"model.language_model.layers.{i}.mlp.up_proj.weight" for i in (0, LAYERS - 1))
    if method == "slerp":
        torch.testing.assert_close(out[first], a[first])
        torch.testing.assert_close(out[last], b[last])
    else:
        torch.testing.assert_close(out[first], (a[first] + b[first]) / 2)
    assert any("vision_tower" in note and "copied" in note for note in done.notes)


def test_scales_of_a_graft_number_the_language_model_alone(pair, tmp_path):
    a, b = pair
    done = graft(tmp_path / "a", tmp_path / "b", tmp_path / "a", tmp_path / "out", "0-1=0,2-3=1")
    out = load_file(tmp_path / "out" / "model.safetensors")
    for i in range(LAYERS):
        name = f"model.language_model.layers.{i}.mlp.up_proj.weight"
        torch.testing.assert_close(out[name], (a if i < 2 else b)[name])
    assert all(torch.equal(out[name], a[name]) for name in a if "vision" in name or "projector" in name)
    assert any("vision_tower" in note for note in done.notes)
    layers = {line["layer"] for line in diff(tmp_path / "a", tmp_path / "b").tensors if "vision" in line["name"]}
    assert layers == {None}


def omni(folder, tensors, text):
    """A folder that sees, hears, thinks and speaks: as many layers speak as think, and more see."""
    random = torch.Generator().manual_seed(7)
    shapes = {"thinker.visual.merger.mlp.0.weight": (4, 4), "thinker.audio_tower.proj.weight": (4, 4),
              "talker.model.embed_tokens.weight": (8, 4), "talker.codec_head.weight": (8, 4),
              "token2wav.dit.transformer_blocks.0.ff.weight": (4, 4)}  # fmt: skip
    for i in range(6):
        shapes |= {f"thinker.visual.blocks.{i}.attn.q.weight": (4, 4),
                   f"thinker.audio_tower.layers.{i}.fc1.weight": (4, 4)}  # fmt: skip
    for i in range(2):
        shapes |= {f"talker.model.layers.{i}.{part}.weight": (4, 4) for part in ("self_attn.q_proj", "mlp.up_proj")}
    others = {name: torch.randn(shape, generator=random) for name, shape in shapes.items()}
    inside = {"thinker." + name: tensor for name, tensor in tensors.items()}
    save_file({**others, **inside}, folder / "model.safetensors", metadata={"format": "pt"})
    thinker = {"model_type": "qwen2_5_omni_thinker", "text_config": text, "vision_config": {"depth": 6}}
    speech = {"num_hidden_layers": 2, "vocab_size": 8, "hidden_size": 4}
    config = {"model_type": "qwen2_5_omni", "architectures": ["X"], "thinker_config": thinker, "talker_config": speech}
    (folder / "config.json").write_text(json.dumps(config))
    return others


@pytest.mark.parametrize("role", ["base", "chat", "onto"])
def test_what_thinks_is_matched_and_what_speaks_is_copied(tmp_path, role):
    base = weights(1)
    tensors = {"base": base, "chat": near(base, 2), "onto": near(base, 3)}
    models = {name: write_model(tmp_path / name, t, vocab=words()) for name, t in tensors.items()}
    options = {"scale": "0=0.5,1=1", "norms": "add"}
    plain = graft(**models, out=tmp_path / "plain", **options)
    folder = write_model(tmp_path / "mm", tensors[role], vocab=words())
    others = omni(folder, tensors[role], json.loads((models[role] / "config.json").read_text()))
    assert open_checkpoint(folder).part("talker.model.layers.1.mlp.up_proj.weight").layer is None
    done = graft(**{**models, role: folder}, out=tmp_path / "out", **options)
    assert done.tensors["merged"] == plain.tensors["merged"]
    out, expected = (load_file(tmp_path / name / "model.safetensors") for name in ("out", "plain"))
    lead = "thinker." if role == "onto" else ""
    assert all(torch.equal(out[lead + name], tensor) for name, tensor in expected.items())
    if role == "onto":
        assert all(torch.equal(out[name], tensor) for name, tensor in others.items())
        assert {"talker", "visual", "audio_tower"} <= {note.split()[3] for note in done.notes if "copied" in note}
    table = diff(models["base"], folder if role != "base" else models["chat"])
    assert len(table.tensors) == len(base) and not table.only_in_a


def test_settings_of_what_thinks_are_changed(tmp_path):
    """A stack of more layers, in another dtype: the nested fields say so, and those of what speaks stay."""
    tensors = weights(1)
    folder = write_model(tmp_path / "a", tensors, vocab=words())
    others = omni(folder, tensors, json.loads((folder / "config.json").read_text()))
    slices = [{"sources": [{"model": str(folder), "layer_range": span}]} for span in ([0, 2], [1, 2])]
    merge({"merge_method": "passthrough", "slices": slices}, tmp_path / "out", dtype="float32")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    text = config["thinker_config"]["text_config"]
    assert text["num_hidden_layers"] == 3 and text["torch_dtype"] == "float32"
    assert config["talker_config"]["num_hidden_layers"] == 2 and config["thinker_config"]["vision_config"]["depth"] == 6
    out = load_file(tmp_path / "out" / "model.safetensors")
    assert all(torch.equal(out[name], tensor) for name, tensor in others.items())
    name = "thinker.model.layers.{}.mlp.up_proj.weight"
    assert torch.equal(out[name.format(2)], tensors["model.layers.1.mlp.up_proj.weight"].float())


@pytest.mark.parametrize("stem", ["model.language_model.", "language_model.model."])
@pytest.mark.parametrize("role", ["base", "chat", "onto"])
def test_a_text_only_and_a_multimodal_folder_of_one_model(tmp_path, stem, role):
    """The same language model, once by itself and once inside a multimodal folder, is matched by its inner names."""
    base = weights(1)
    tensors = {"base": base, "chat": near(base, 2), "onto": near(base, 3)}
    models = {name: write_model(tmp_path / name, t, vocab=words()) for name, t in tensors.items()}
    plain = graft(**models, out=tmp_path / "plain")
    inside = {stem + name.removeprefix("model."): tensor for name, tensor in tensors[role].items()}
    inside |= {"model.vision_tower.encoder.layers.0.fc.weight": torch.randn(4, 4)}
    text = json.loads((models[role] / "config.json").read_text())
    other = {"model_type": "gemma3", "architectures": ["X"], "text_config": text, "vision_config": {}}
    folder = write_model(tmp_path / "mm", tensors[role], vocab=words())
    save_file(inside, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(other))
    assert open_checkpoint(folder).part(f"{stem}layers.1.mlp.up_proj.weight").component == "mlp.up"
    done = graft(**{**models, role: folder}, out=tmp_path / "out")
    assert done.tensors["merged"] == plain.tensors["merged"] == 14
    out, expected = (load_file(tmp_path / name / "model.safetensors") for name in ("out", "plain"))
    lead = stem if role == "onto" else "model."
    for name, tensor in expected.items():
        assert torch.equal(out[lead + name.removeprefix("model.")], tensor), name
    table = diff(models["base"], folder if role != "base" else models["chat"])
    assert len(table.tensors) == len(base) and not table.only_in_a
