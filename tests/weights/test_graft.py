"""A graft is exact arithmetic on the right tensors, and says what it did with the others."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from lapis.checkpoint.commit import verify
from lapis.errors import CheckpointError, ConfigError
from lapis.weights.graft.graft import graft


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("scale", [1.0, 0.7])
def test_equals_float64(trio, folders, tmp_path, shards, scale):
    models = trio(shards=shards)
    result = graft(**models, out=tmp_path / "out", scale=scale)
    base, chat, onto, out = (folders.read(folder) for folder in [*models.values(), tmp_path / "out"])
    assert out.keys() == onto.keys()
    for name, tensor in out.items():
        if "norm" in name:
            assert torch.equal(tensor, onto[name])
        elif "embed" in name:
            assert torch.equal(tensor[[33, 34]], chat[name][[33, 34]])
            rest = [i for i in range(tensor.shape[0]) if i not in (33, 34)]
            assert torch.equal(tensor[rest], onto[name][rest])
        else:
            exact = onto[name].double() + scale * (chat[name].double() - base[name].double())
            assert torch.equal(tensor, exact.to(tensor.dtype))
    assert result.tensors == {"merged": 14, "copied": 6, "skipped": 11}
    assert verify(tmp_path / "out") == []


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_other_dtypes(trio, folders, tmp_path, dtype):
    models = trio(dtype=dtype)
    graft(**models, out=tmp_path / "out", norms="add")
    base, chat, onto, out = (folders.read(folder) for folder in [*models.values(), tmp_path / "out"])
    name = "model.layers.1.input_layernorm.weight"
    assert out[name].dtype == dtype
    torch.testing.assert_close(out[name], onto[name] + chat[name] - base[name])


@pytest.mark.parametrize("name", ["float32", "float16"])
def test_the_output_may_have_another_dtype(trio, folders, tmp_path, name):
    """Every tensor has it, and config.json says so; in float32 nothing of the difference is lost."""
    models, dtype = trio(tied=False), getattr(torch, name)
    result = graft(**models, out=tmp_path / "out", scale=0.3, dtype=name)
    base, chat, onto, out = (folders.read(folder) for folder in [*models.values(), tmp_path / "out"])
    assert {tensor.dtype for tensor in out.values()} == {dtype}
    merged = "model.layers.1.mlp.up_proj.weight"
    exact = onto[merged].double() + 0.3 * (chat[merged].double() - base[merged].double())
    torch.testing.assert_close(out[merged].double(), exact, rtol=2e-3 if name == "float16" else 1e-6, atol=1e-7)
    for rows in ("model.embed_tokens.weight", "lm_head.weight"):
        expected = onto[rows].clone()
        expected[[33, 34]] = chat[rows][[33, 34]]
        assert torch.equal(out[rows], expected.to(dtype))
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["torch_dtype"] == name and verify(tmp_path / "out") == []
    assert (result.lost_to_rounding < 1e-4) == (name == "float32")
    with pytest.raises(ConfigError, match='dtype is "int8"; give float32 or bfloat16 or float16'):
        graft(**models, out=tmp_path / "other", dtype="int8")


def test_the_account_lists_every_tensor_of_every_input(trio, folders, tmp_path):
    models = trio(tied=False)
    result = graft(**models, out=tmp_path / "out", scale=0.5)
    account = json.loads((tmp_path / "out" / "lapis-merge.json").read_text())
    lines = {line["name"]: line for line in account["tensors"]}
    assert lines.keys() == folders.read(models["onto"]).keys()
    merged = {name for name, line in lines.items() if line["action"] == "merged"}
    skipped = {(line["role"], line["name"]) for line in account["skipped"]}
    for role in ("base", "chat"):
        for name in folders.read(models[role]):
            taken_for_rows = role == "chat" and name in ("model.embed_tokens.weight", "lm_head.weight")
            assert (name in merged or taken_for_rows) != ((role, name) in skipped)
    base, chat, onto, out = (folders.read(folder) for folder in [*models.values(), tmp_path / "out"])
    name = "model.layers.0.mlp.up_proj.weight"
    delta = 0.5 * (chat[name].double() - base[name].double())
    lost = (out[name].double() - onto[name].double() - delta).norm() / delta.norm()
    assert lines[name]["lost_to_rounding"] == pytest.approx(float(lost), rel=1e-5)
    assert lines[name]["delta_norm"] == pytest.approx(float(delta.norm()), rel=1e-6)
    assert account["inputs"]["base"]["headers_sha256"] and account["counts"] == result.tensors
    card = (tmp_path / "out" / "README.md").read_text()  # hubs read it: no folder of this machine is in it
    assert "library_name: transformers" in card and "base_model" not in card and str(tmp_path) not in card


def test_stacked_chats_and_scales_by_part(trio, folders, tmp_path):
    models = trio()
    base = folders.read(models["base"])
    second = folders.write(tmp_path / "chat2", folders.near(base, 9), vocab=folders.words(), template=folders.template)
    plan = tmp_path / "plan.yaml"
    plan.write_text("default: 0\nscales:\n- {layers: 1, components: [mlp], scale: 0.25}\n")
    graft(models["base"], [models["chat"], second], models["onto"], tmp_path / "out", ["0=0.5,1=2", str(plan)])
    chat, onto, out = (folders.read(folder) for folder in (models["chat"], models["onto"], tmp_path / "out"))
    other = folders.read(second)
    for name, one, two in (
        ("model.layers.0.mlp.up_proj.weight", 0.5, 0.0),
        ("model.layers.1.mlp.up_proj.weight", 2.0, 0.25),
        ("model.layers.1.self_attn.q_proj.weight", 2.0, 0.0),
    ):
        x = base[name].double()
        exact = onto[name].double() + one * (chat[name].double() - x) + two * (other[name].double() - x)
        assert torch.equal(out[name], exact.bfloat16())


def test_scales_by_the_names_on_disk(trio, folders, tmp_path):
    models = trio()
    graft(**models, out=tmp_path / "one", scale="self_attn=0,1.q_proj=0.5,mlp=0.25")
    graft(**models, out=tmp_path / "other", scale="attn=0,1.attn.q=0.5,mlp=0.25")
    one, other = (folders.read(tmp_path / name) for name in ("one", "other"))
    assert all(torch.equal(one[name], other[name]) for name in one)
    with pytest.raises(CheckpointError, match='"c_attn" matches nothing'):
        graft(**models, out=tmp_path / "third", scale="c_attn=0.5")


def test_embeddings_are_added_by_token_string(folders, tmp_path):
    """base, chat and onto number the same tokens differently; onto has words of its own, and padding."""
    base = folders.weights(1)
    names = folders.words()
    turned = {token: len(names) - 1 - i for token, i in names.items()}
    longer = {**turned, "wonly": len(names)}
    chat, onto = folders.near(base, 2), folders.near(base, 3)
    models = {
        "base": folders.write(tmp_path / "base", base, vocab=names, eos="<|endoftext|>"),
        "chat": folders.write(tmp_path / "chat", chat, vocab=turned, template=folders.template, eos="<|im_end|>"),
        "onto": folders.write(tmp_path / "onto", onto, vocab=longer, eos="<|endoftext|>"),
    }
    result = graft(**models, out=tmp_path / "out", scale=0.5, embeddings="add")
    assert result.vocabulary["onto_to_chat"] == "extended" and result.vocabulary["onto_to_base"] == "different"
    out = folders.read(tmp_path / "out")["model.embed_tokens.weight"]
    b, c, t = (m["model.embed_tokens.weight"].double() for m in (base, chat, onto))
    for token, row in longer.items():
        if token.startswith("<|im_"):
            expected = c[turned[token]]
        elif token == "wonly":
            expected = t[row]
        else:
            expected = t[row] + 0.5 * (c[turned[token]] - b[names[token]])
        assert torch.equal(out[row], expected.bfloat16()), token
    assert torch.equal(out[36:], onto["model.embed_tokens.weight"][36:])


def test_a_model_that_can_chat_keeps_its_template(folders, tmp_path):
    """onto is the one with a template here; what base read meanwhile is added, save to the template's rows."""
    base = folders.weights(1)
    read, talking = folders.near(base, 2), folders.near(base, 3)
    models = {
        "base": folders.write(tmp_path / "base", base, vocab=folders.words(), eos="<|endoftext|>"),
        "chat": folders.write(tmp_path / "read", read, vocab=folders.words(), template="other <|im_start|><|im_end|>"),
        "onto": folders.write(tmp_path / "chat", talking, vocab=folders.words(), template=folders.template,
                              eos="<|im_end|>"),
    }  # fmt: skip
    result = graft(**models, out=tmp_path / "out", embeddings="add", template="onto")
    assert any("2 rows stay onto's" in note for note in result.notes)
    name = "model.embed_tokens.weight"
    out = folders.read(tmp_path / "out")[name]
    for row in (33, 34):
        assert torch.equal(out[row], talking[name][row])
    exact = talking[name].double() + read[name].double() - base[name].double()
    assert torch.equal(out[:33], exact.bfloat16()[:33])
    settings = json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())
    assert settings["chat_template"] == folders.template and settings["eos_token"] == "<|im_end|>"
    with pytest.raises(ConfigError, match='template is "base"; give chat or onto'):
        graft(**models, out=tmp_path / "other", template="base")


@pytest.mark.parametrize("size", [36, 40])  # leaves four rows of padding, or none
def test_template_tokens_that_onto_lacks_move_in(folders, tmp_path, size):
    base = folders.weights(1)
    mine = folders.words(extra=["<|endoftext|>"], count=size - 1)
    models = {
        "base": folders.write(tmp_path / "base", base, vocab=mine, eos="<|endoftext|>"),
        "chat": folders.write(
            tmp_path / "chat", folders.near(base, 2), vocab=folders.words(), template=folders.template
        ),
        "onto": folders.write(tmp_path / "onto", folders.near(base, 3), vocab=mine, eos="<|endoftext|>"),
    }
    result = graft(**models, out=tmp_path / "out")
    first = size
    assert result.vocabulary["new_tokens"] == {"<|im_start|>": first, "<|im_end|>": first + 1}
    out = folders.read(tmp_path / "out")["model.embed_tokens.weight"]
    chat = folders.read(models["chat"])["model.embed_tokens.weight"]
    assert out.shape[0] == max(40, first + 2)
    assert torch.equal(out[first : first + 2], chat[[33, 34]])
    assert torch.equal(out[:first], folders.read(models["onto"])["model.embed_tokens.weight"][:first])
    added = json.loads((tmp_path / "out" / "tokenizer.json").read_text())["added_tokens"]
    assert {t["content"]: t["id"] for t in added[-2:]} == result.vocabulary["new_tokens"]
    assert json.loads((tmp_path / "out" / "config.json").read_text())["vocab_size"] == out.shape[0]


def test_a_tied_chat_gives_its_embedding_to_an_untied_head(folders, tmp_path):
    tied = folders.weights(1)
    untied = {**folders.near(tied, 3), "lm_head.weight": folders.weights(8)["model.embed_tokens.weight"]}
    models = {
        "base": folders.write(tmp_path / "base", tied, vocab=folders.words(), eos="<|endoftext|>"),
        "chat": folders.write(
            tmp_path / "chat", folders.near(tied, 2), vocab=folders.words(), template=folders.template
        ),
        "onto": folders.write(tmp_path / "onto", untied, vocab=folders.words(), eos="<|endoftext|>"),
    }
    graft(**models, out=tmp_path / "out")
    head = folders.read(tmp_path / "out")["lm_head.weight"]
    assert torch.equal(head[33], folders.read(models["chat"])["model.embed_tokens.weight"][33])
    assert torch.equal(head[:33], untied["lm_head.weight"][:33])


def test_template_end_tokens_and_settings_come_from_chat(trio, tmp_path):
    models = trio()
    (models["chat"] / "generation_config.json").write_text('{"eos_token_id": [34, 32], "temperature": 0.7}')
    graft(**models, out=tmp_path / "out")
    settings = json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())
    assert "<|im_start|>" in settings["chat_template"] and settings["eos_token"] == "<|im_end|>"
    generation = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert generation == {"eos_token_id": [34, 32], "temperature": 0.7}


def test_loads_in_transformers(trio, folders, tmp_path):
    transformers = pytest.importorskip("transformers")
    graft(**trio(shards=2), out=tmp_path / "out")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.bfloat16)
    state, stored = model.state_dict(), folders.read(tmp_path / "out")
    assert all(torch.equal(state[name], tensor) for name, tensor in stored.items())
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert "<|im_start|>user" in tokenizer.apply_chat_template([{"role": "user", "content": "w1"}], tokenize=False)


def test_a_dry_run_writes_nothing_and_says_what_it_needs(trio, tmp_path):
    result = graft(**trio(), out=tmp_path / "deep" / "out", dry_run=True)
    assert result.dry_run and result.needs["disk_bytes"] > 0 and result.tensors["merged"] == 14
    assert not (tmp_path / "deep").exists()


def test_all_problems_are_told_at_once(trio, folders, tmp_path):
    models = trio()
    wide = {n: torch.cat([t, t]) if "1.mlp.up" in n else t for n, t in folders.read(models["chat"]).items()}
    del wide["model.layers.0.mlp.down_proj.weight"]
    models["chat"] = folders.write(tmp_path / "wide", wide, vocab=folders.words(), config={"num_attention_heads": 8})
    with pytest.raises(CheckpointError) as caught:
        graft(**models, out=tmp_path / "out")
    text = str(caught.value)
    assert text.startswith("graft: 3 problems") and "\n" not in text
    assert "num_attention_heads is 4 in onto and 8 in chat" in text
    assert "model.layers.1.mlp.up_proj.weight is 24x16 in onto and 48x16 in chat; a graft needs equal shapes" in text
    assert "model.layers.0.mlp.down_proj.weight is in onto and not in chat" in text
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("scale", "message"),
    [
        ("fast", "expected a number"),
        ("nan", "finite"),
        ("mpl=1", '"mpl" matches nothing; nearest: mlp'),
        ("7=1", '"layers.7" matches nothing; the layers are 0-1'),
        ("0-=1", "is no pattern such as"),
        ({"scale": 1}, 'expected "scales:"'),
        ({"scales": [{"layer": 0}]}, "needs a scale"),
        ({"scales": [{"leyer": 0, "scale": 1}]}, 'unknown key "leyer"; did you mean "layer"'),
    ],
)
def test_wrong_scales(trio, tmp_path, scale, message):
    with pytest.raises((ConfigError, CheckpointError), match=message):
        graft(**trio(), out=tmp_path / "out", scale=scale)


def test_an_unknown_family_with_experts_is_grafted_by_name(folders, tmp_path):
    names = ["backbone.embed_tokens.weight", "backbone.layers.0.input_layernorm.weight", "backbone.gate_bias"]
    names += [f"backbone.layers.{i}.experts.{e}.w{k}.weight" for i in range(2) for e in range(3) for k in (1, 2)]
    base = {name: torch.randn(8, 6) if name.endswith("weight") else torch.randn(3) for name in names}
    models = {}
    for role, tensors in (("base", base), ("chat", folders.near(base, 2)), ("onto", folders.near(base, 3))):
        models[role] = tmp_path / role
        models[role].mkdir()
        save_file(tensors, models[role] / "model.safetensors")
        (models[role] / "config.json").write_text('{"model_type": "strange"}')
    result = graft(**models, out=tmp_path / "out", scale="1.experts.2=0.5,default=0")
    assert any("strange is not known here" in note for note in result.notes)
    base, chat, onto, out = (folders.read(folder) for folder in [*models.values(), tmp_path / "out"])
    for name in names:
        scale = 0.5 if "layers.1.experts.2." in name else 0.0
        torch.testing.assert_close(out[name], onto[name] + scale * (chat[name] - base[name]))


def test_fault_16_fp8_with_block_scales_is_dequantized(trio, folders, tmp_path):
    models = trio()
    onto = folders.read(models["onto"])
    exact, stored = {}, {}
    for name, tensor in onto.items():
        stored[name] = tensor
        if name.endswith("up_proj.weight"):
            scales = torch.rand(2, 2) + 0.5  # blocks of 16 x 8 in 24 x 16
            wide = scales.repeat_interleave(16, 0)[:24].repeat_interleave(8, 1)
            stored[name] = (tensor.float() / wide).to(torch.float8_e4m3fn)
            stored[name + "_scale_inv"] = scales
            exact[name] = stored[name].double() * wide.double()
    config = {"quantization_config": {"quant_method": "fp8", "weight_block_size": [16, 8]}}
    models["onto"] = folders.write(tmp_path / "fp8", stored, vocab=folders.words(), config=config)
    result = graft(**models, out=tmp_path / "out")
    base, chat, out = (folders.read(folder) for folder in (models["base"], models["chat"], tmp_path / "out"))
    assert out.keys() == onto.keys() and result.tensors["merged"] == 14
    for name, tensor in exact.items():
        assert torch.equal(out[name], (tensor + chat[name].double() - base[name].double()).bfloat16())
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
def test_faults_16_and_17_numbers_without_a_scale_are_refused(trio, folders, tmp_path, dtype):
    models = trio()
    name = "model.layers.0.mlp.up_proj.weight"
    tensors = {**folders.read(models["chat"])}
    tensors[name] = (tensors[name].float() * 100).to(dtype)
    models["chat"] = folders.write(tmp_path / "quantized", tensors, vocab=folders.words())
    with pytest.raises(CheckpointError, match=r"up_proj.weight is (I8|F8_E4M3) in chat: numbers without a known scale"):
        graft(**models, out=tmp_path / "out")


def test_fault_18_dtypes_that_differ_are_promoted_and_reported(trio, folders, tmp_path):
    models = trio()
    wide = {name: tensor.float() * 1.0001 for name, tensor in folders.read(models["chat"]).items()}
    models["chat"] = folders.write(tmp_path / "wide", wide, vocab=folders.words(), template=folders.template)
    result = graft(**models, out=tmp_path / "out")
    assert any("dtypes differ" in note and "chat F32" in note for note in result.notes)
    base, onto, out = (folders.read(folder) for folder in (models["base"], models["onto"], tmp_path / "out"))
    name = "model.layers.0.mlp.up_proj.weight"
    assert torch.equal(out[name], (onto[name].double() + wide[name].double() - base[name].double()).bfloat16())
    assert torch.equal(out["model.embed_tokens.weight"][33], wide["model.embed_tokens.weight"][33].bfloat16())


@pytest.mark.parametrize("role", ["base", "chat", "onto"])
@pytest.mark.parametrize("bad", [float("nan"), float("-inf")])
def test_fault_19_nonfinite_inputs_stop_the_graft_or_are_counted(trio, folders, tmp_path, role, bad):
    models = trio()
    tensors = folders.read(models[role])
    tensors["model.layers.1.self_attn.k_proj.weight"][2, 3] = bad
    models[role] = folders.write(
        tmp_path / "bad", tensors, vocab=folders.words(), template=folders.template if role == "chat" else None
    )
    with pytest.raises(CheckpointError, match=rf"k_proj.weight in {role} holds 1 NaN or Inf.*--allow-nonfinite"):
        graft(**models, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert graft(**models, out=tmp_path / "out", allow_nonfinite=True).nonfinite == 1


def test_fault_19_an_overflow_in_rounding_stops_the_graft(trio, folders, tmp_path):
    models = trio(dtype=torch.float16)
    for role in ("chat", "onto"):
        path = models[role] / "model.safetensors"
        tensors = load_file(path)
        tensors["model.layers.0.mlp.up_proj.weight"][0, 0] = 60000.0
        save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match="1 result is NaN or too large"):
        graft(**models, out=tmp_path / "out")


def test_fault_23_a_tensor_that_one_model_lacks(trio, folders, tmp_path):
    models = trio()
    tensors = folders.read(models["base"])
    del tensors["model.layers.1.mlp.gate_proj.weight"]
    models["base"] = folders.write(tmp_path / "less", tensors, vocab=folders.words())
    with pytest.raises(CheckpointError, match=r"gate_proj\.weight is in onto and not in base"):
        graft(**models, out=tmp_path / "out")


def test_fault_24_every_shape_that_differs_is_listed(trio, folders, tmp_path):
    models = trio()
    tensors = {n: t[:, :-1].contiguous() if "down_proj" in n else t for n, t in folders.read(models["base"]).items()}
    models["base"] = folders.write(tmp_path / "narrow", tensors, vocab=folders.words())
    with pytest.raises(CheckpointError, match=r"2 problems.*layers.0.mlp.down_proj.*layers.1.mlp.down_proj"):
        graft(**models, out=tmp_path / "out")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"intermediate_size": 10**9}, r"chat: config.json says 1,000,000,000, but .*up_proj.weight is 24x16"),
        ({"num_hidden_layers": 3}, "chat: config.json says 3 layers, the tensors have 2"),
        ({"hidden_size": 32}, r"chat: config.json says 32, but model.embed_tokens.weight is 40x16"),
    ],
)
def test_faults_35_and_36_config_sizes_against_the_tensors(trio, folders, tmp_path, change, message):
    models = trio()
    models["chat"] = folders.write(tmp_path / "odd", folders.read(models["chat"]), vocab=folders.words(), config=change)
    with pytest.raises(CheckpointError, match=message):
        graft(**models, out=tmp_path / "out")


def test_faults_37_and_38_rows_against_config_and_tokenizer(trio, folders, tmp_path):
    models = trio()
    tensors = folders.read(models["chat"])
    many = folders.words() | {"<|late|>": 40}
    models["chat"] = folders.write(tmp_path / "late", tensors, vocab=many, config={"vocab_size": 64})
    with pytest.raises(CheckpointError, match=r'vocab_size 64, the embedding has 40 rows.*"<\|late\|>" has id 40'):
        graft(**models, out=tmp_path / "out")


def test_smaller_tiles_give_the_same_bytes(trio, tmp_path, monkeypatch):
    models = trio(tied=False)
    first = graft(**models, out=tmp_path / "one", scale=0.5, embeddings="add")
    for module in ("engine.stream", "engine.tiles", "graft.graft"):
        monkeypatch.setattr(f"lapis.weights.{module}.TILE", 7, raising=False)
    second = graft(**models, out=tmp_path / "two", scale=0.5, embeddings="add")
    assert first.tensors == second.tensors
    for file in ("model.safetensors", "config.json", "tokenizer.json"):
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()


def test_template_tokens_are_those_that_only_chatting_trained():
    from lapis.text.chat.template_tokens import template_tokens
    from lapis.text.tokenizer.vocabulary import Vocabulary

    ids = {"a": 0, "  ": 1, "<s>": 2, "</s>": 3, "<|user|>": 4, "<|end|>": 5, "<|pad|>": 6}
    added = frozenset(ids) - {"a"}
    special = added - {"  "}
    base = Vocabulary(ids, added, special, None, {"bos": "<s>", "eos": "</s>"}, (3,))
    chat = Vocabulary(ids, added, special, "  <|user|>{{ m }}", {"bos": "<s>", "eos": "<|end|>"}, (5, 3))
    assert template_tokens(chat, base) == ["<|user|>", "<|end|>"]
    joined = "{{ bos_token }}{% for m in messages %}{{ '<|' + m.role + '|>' }}  {{ m.content }}{% endfor %}"
    chat = Vocabulary(ids, added, special, joined, {"bos": "<s>", "eos": "<|end|>"}, (5, 3))
    assert template_tokens(chat, base) == ["<|user|>", "<|end|>"]  # put together, and the start that base knows
    endless = "{% for i in range(10**9) %}{% for j in range(10**9) %}{% endfor %}{% endfor %}<|user|>"
    chat = Vocabulary(ids, added, special, endless, {"eos": "<|end|>"}, (5,))
    assert template_tokens(chat, base) == ["<|user|>", "<|end|>"]  # as far as its source tells


def test_paths_and_opened_checkpoints_are_the_same(trio, tmp_path):
    from lapis.checkpoint import open_checkpoint

    models = trio()
    one = graft(**models, out=tmp_path / "one")
    two = graft(**{role: open_checkpoint(str(folder)) for role, folder in models.items()}, out=str(tmp_path / "two"))
    assert one.sha256 == two.sha256 and Path(two.out).is_dir()
