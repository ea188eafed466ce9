"""LoRA on mixtures of experts beside PEFT, which adapts the experts of a block as one parameter."""

import dataclasses
import json
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file

from lapis.errors import CheckpointError, ConfigError
from lapis.families.config import Experts
from lapis.model.adapter import restore_adapter, write_adapter
from lapis.model.load import load, save
from lapis.model.lora import LoraConfig, off, stacked_adapters, wrap
from lapis.model.transformer import Transformer
from lapis.weights.fuse.fuse import fuse
from tests.model import conftest as models
from tests.oracles.adapted import IDS, MIXTURES, STACKED, as_peft, disturb, disturb_theirs, logits, shape_of

REFUSED = ("qwen2_moe", "qwen3_5_moe")
STACKS = {  # targets here -> what PEFT is told
    ("mlp.experts",): (["experts.gate_up_proj", "experts.down_proj"], []),
    ("mlp.experts.down", "attn.q"): (["experts.down_proj"], ["q_proj"]),
    ("layers.1.mlp.experts", "layers.0.mlp.experts.gate_up"): (
        ["layers.1.mlp.experts.down_proj", "experts.gate_up_proj"], []),
}  # fmt: skip


@pytest.mark.parametrize("targets", [("experts",), ("mlp.experts.down", "attn")], ids=str)
@pytest.mark.parametrize("family", MIXTURES)
def test_adapters_of_experts_are_stacked_by_peft(family: str, targets: tuple[str, ...], tmp_path: Path) -> None:
    torch.manual_seed(4)
    model = Transformer(MIXTURES[family]).eval()
    save(model, tmp_path / "base")
    wrap(model, LoraConfig(rank=3, targets=targets), str(tmp_path / "base"))
    disturb(model)
    write_adapter(model, tmp_path / "adapter")
    theirs = as_peft(family, tmp_path / "base", tmp_path / "adapter")
    torch.testing.assert_close(model(IDS), logits(theirs), rtol=0, atol=1e-5)
    fuse(tmp_path / "adapter", tmp_path / "fused")
    torch.testing.assert_close(load(tmp_path / "fused")(IDS), model(IDS), rtol=0, atol=1e-5)


@pytest.mark.parametrize("targets", [("delta", "attn"), ("delta.qkv", "layers.1.attn")], ids=str)
def test_adapters_of_what_a_matrix_holds_in_groups_are_pefts(targets: tuple[str, ...], tmp_path: Path) -> None:
    """Of q, k, v and gate of a delta net, which lie in one matrix by heads of keys: with one A, as PEFT sees it."""
    torch.manual_seed(4)
    model = Transformer(MIXTURES["qwen3_next"]).eval()
    save(model, tmp_path / "base")
    wrap(model, LoraConfig(rank=3, targets=targets), str(tmp_path / "base"))
    disturb(model)
    write_adapter(model, tmp_path / "adapter")
    theirs = as_peft("qwen3_next", tmp_path / "base", tmp_path / "adapter")
    torch.testing.assert_close(model(IDS), logits(theirs), rtol=0, atol=1e-5)
    torch.testing.assert_close(load(tmp_path / "adapter")(IDS), model(IDS), rtol=0, atol=1e-6)
    fuse(tmp_path / "adapter", tmp_path / "fused")
    torch.testing.assert_close(load(tmp_path / "fused")(IDS), model(IDS), rtol=0, atol=1e-5)


@pytest.mark.parametrize("targets", [("experts",), ("layers.1.mlp.experts",)], ids=str)
@pytest.mark.parametrize("family", MIXTURES)
def test_rslora_of_stacked_experts_is_scaled_twice(family: str, targets: tuple[str, ...], tmp_path: Path) -> None:
    """PEFT doubles rank and alpha where it stacks gate and up: 2 alpha / sqrt(2 rank), which is sqrt(2) too much."""
    torch.manual_seed(4)
    model = Transformer(MIXTURES[family]).eval()
    save(model, tmp_path / "base")
    wrap(model, LoraConfig(rank=3, alpha=5.0, rslora=True, targets=targets), str(tmp_path / "base"))
    disturb(model)
    write_adapter(model, tmp_path / "adapter")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the layers whose experts have no adapter
        theirs = shape_of(family).from_pretrained(
            tmp_path / "base", dtype=torch.float64, experts_implementation="eager"
        )
        theirs = peft.PeftModel.from_pretrained(theirs, tmp_path / "adapter", autocast_adapter_dtype=False).double()
    stacked = [m for m in theirs.modules() if getattr(m, "parameter_name", "") == "gate_up_proj"]
    assert stacked
    for module in stacked:
        assert module.r["default"] == 6 and module.scaling["default"] == pytest.approx(2**0.5 * 5 / 3**0.5)
    ours = model.double()(IDS)
    assert (logits(theirs) - ours).abs().max() > 1e-3
    for module in stacked:
        module.scaling["default"] /= 2**0.5
    torch.testing.assert_close(ours, logits(theirs), rtol=0, atol=1e-6)  # routers stay in float32


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("targets", STACKS, ids=str)
@pytest.mark.parametrize("family", STACKED)
def test_experts_in_one_tensor_are_pefts(
    family: str, targets: tuple[str, ...], rslora: bool, tmp_path: Path
) -> None:  # fmt: skip
    """What is computed, its gradients, the file with its names and shapes, and the merged weights, bit by bit."""
    torch.manual_seed(4)
    model = Transformer(STACKED[family]).eval()
    save(model, tmp_path / "base")
    before = model(IDS)
    wrap(model, LoraConfig(rank=3, alpha=5.0, targets=targets, rslora=rslora), str(tmp_path / "base"))
    torch.testing.assert_close(model(IDS), before, rtol=0, atol=1e-6)
    disturb(model)
    write_adapter(model, tmp_path / "adapter")
    theirs = as_peft(family, tmp_path / "base", tmp_path / "adapter").train()
    assert (model(IDS) - before).abs().max() > 1e-2
    torch.testing.assert_close(model(IDS), logits(theirs), rtol=0, atol=1e-6)
    with off(model):
        torch.testing.assert_close(model(IDS), before, rtol=0, atol=1e-6)

    for name, parameter in theirs.named_parameters():
        parameter.requires_grad_("lora" in name)
    theirs.base_model.model.set_experts_implementation("eager")  # which computes in float64: in float32 a small sum of
    model, theirs = model.double(), theirs.double()  # large terms is rounded like these
    weights = torch.randn_like(before).double()
    (model(IDS) * weights).sum().backward()
    (theirs(input_ids=IDS).logits * weights).sum().backward()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad and parameter.grad is not None:
                parameter.copy_(parameter.grad)
    write_adapter(model, tmp_path / "gradients")
    with torch.no_grad():
        for parameter in theirs.parameters():
            if parameter.requires_grad:
                parameter.copy_(parameter.grad)
    theirs.save_pretrained(tmp_path / "theirs")
    ours, expected = (load_file(tmp_path / f / "adapter_model.safetensors") for f in ("gradients", "theirs"))
    assert {k: v.shape for k, v in ours.items()} == {k: v.shape for k, v in expected.items()}
    for name, tensor in expected.items():
        assert tensor.abs().max() > 1e-3
        torch.testing.assert_close(
            ours[name].double(), tensor.double(), rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.parametrize("targets", STACKS, ids=str)
@pytest.mark.parametrize("family", STACKED)
def test_stacked_experts_merge_and_load_as_peft_does(family: str, targets: tuple[str, ...], tmp_path: Path) -> None:
    """Of a folder that PEFT writes from what it is told itself; ranks and alphas of their own included."""
    torch.manual_seed(5)
    save(Transformer(STACKED[family]), tmp_path / "base")
    parameters, modules = STACKS[targets]
    if family == "gemma4-experts":
        parameters = [name.replace("mlp.experts", "experts") for name in parameters]
    config = peft.LoraConfig(
        r=3, lora_alpha=5, target_parameters=parameters, target_modules=modules, task_type="CAUSAL_LM",
        rank_pattern={"down_proj": 2}, alpha_pattern={r".*experts\.down_proj": 7}, init_lora_weights=False,
    )  # fmt: skip
    base = shape_of(family).from_pretrained(tmp_path / "base", dtype=torch.float32)
    theirs = peft.get_peft_model(base, config)
    disturb_theirs(theirs)
    theirs.save_pretrained(tmp_path / "adapter")
    ours = load(tmp_path / "adapter")
    assert len(stacked_adapters(ours)) == len([m for m in theirs.modules() if hasattr(m, "parameter_name")])
    expected = logits(theirs)
    torch.testing.assert_close(ours(IDS), expected, rtol=0, atol=1e-6)
    write_adapter(ours, tmp_path / "again")
    written, read = (load_file(tmp_path / f / "adapter_model.safetensors") for f in ("again", "adapter"))
    assert written.keys() == read.keys() and all(torch.equal(written[name], read[name]) for name in read)
    torch.testing.assert_close(logits(as_peft("llama", tmp_path / "base", tmp_path / "adapter")), expected)
    disturb(ours)
    restore_adapter(ours, tmp_path / "again")
    torch.testing.assert_close(ours(IDS), expected, rtol=0, atol=1e-6)
    fuse(tmp_path / "adapter", tmp_path / "fused")
    merged, fused = theirs.merge_and_unload().state_dict(), load_file(tmp_path / "fused" / "model.safetensors")
    stacked = [name for name in fused if name.endswith(("experts.gate_up_proj", "experts.down_proj"))]
    assert stacked and all(torch.equal(fused[name], merged[name]) for name in stacked)
    torch.testing.assert_close(load(tmp_path / "fused")(IDS), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("square", [False, True])
def test_a_square_matrix_of_experts_is_not_turned(square: bool, tmp_path: Path) -> None:
    """GPT-OSS' own is square: which side is read is the family's to say; and tiles end within the tensor."""
    torch.manual_seed(6)
    shape = models.SHAPES["gpt_oss"]
    model = Transformer(dataclasses.replace(shape, ffn_dim=shape.dim if square else 300, experts=Experts(70, 3)))
    save(model, tmp_path / "base")
    disturb(wrap(model, LoraConfig(rank=2, targets=("experts",)), str(tmp_path / "base")))
    write_adapter(model, tmp_path / "adapter")
    theirs = as_peft("gpt_oss", tmp_path / "base", tmp_path / "adapter")
    torch.testing.assert_close(model.eval()(IDS), logits(theirs), rtol=0, atol=1e-6)
    fuse(tmp_path / "adapter", tmp_path / "fused")
    torch.testing.assert_close(load(tmp_path / "fused")(IDS), model(IDS), rtol=0, atol=1e-6)


@pytest.mark.parametrize(("setting", "text"), [({"dora": True}, "dora is True"), ({"dropout": 0.1}, "dropout is 0.1")])
def test_what_peft_has_not_beside_stacked_experts(setting: dict[str, Any], text: str) -> None:
    with pytest.raises(ConfigError, match=f"lora: {text}, and .*experts.gate_up holds all experts in one tensor"):
        wrap(Transformer(STACKED["gpt_oss"]), LoraConfig(rank=2, **setting))
    theirs = transformers.GptOssForCausalLM(transformers.GptOssConfig(
        vocab_size=31, hidden_size=16, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2, head_dim=4,
        intermediate_size=12, num_local_experts=2, num_experts_per_tok=1,
    ))  # fmt: skip
    names = {"dora": "use_dora", "dropout": "lora_dropout"}
    config = peft.LoraConfig(r=2, target_modules=[], target_parameters=["experts.down_proj"],
                             **{names[name]: value for name, value in setting.items()})  # fmt: skip
    with pytest.raises(ValueError, match="does not work with"):
        peft.get_peft_model(theirs, config)


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"target_parameters": ["experts.gate_up_proj_bias"]}, "lapis reads gate_up_proj and down_proj of experts"),
        ({"target_parameters": "down_proj"}, "target_parameters is 'down_proj'; lapis reads"),
        ({"target_parameters": ["experts.down_proj"]}, "names 1 of model.layers.0.mlp.experts, which its tensors deny"),
        ({"target_parameters": None}, "the rank of model.layers.0.mlp.experts.base_layer is 3 here, and 12 by"),
        ({"use_dora": True}, "use_dora is True, which does not go with target_parameters"),
        ({"r": 5}, "the rank of model.layers.0.mlp.experts.gate_up_proj is 5 here, and 12 by"),
        ({"rank_pattern": {"down_proj": 0.5}}, "of model.layers.0.mlp.experts.down_proj is 0.5 here, and 12 by"),
        ({"r": 2}, "has adapters of 6 experts of 48x16; the base has 4 of 48x16"),
    ],
)
def test_a_stacked_adapter_that_does_not_fit_is_one_line(changes: dict[str, Any], text: str, tmp_path: Path) -> None:
    model = Transformer(STACKED["gpt_oss"])
    save(model, tmp_path / "base")
    write_adapter(wrap(model, LoraConfig(rank=3, targets=("experts",)), str(tmp_path / "base")), tmp_path / "adapter")
    path = tmp_path / "adapter" / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    for read in (load, lambda adapter: fuse(adapter, tmp_path / "fused")):
        with pytest.raises(CheckpointError) as error:
            read(tmp_path / "adapter")
        assert "\n" not in str(error.value)
        assert text in str(error.value) or read is not load
    assert not (tmp_path / "fused").exists()


@pytest.mark.parametrize("family", REFUSED)
def test_experts_that_peft_does_not_find(family: str, tmp_path: Path) -> None:
    """It stacks adapters of experts for models that are like these, and not for them; lapis fuses such adapters."""
    torch.manual_seed(4)
    model = Transformer(models.SHAPES[family]).eval()
    save(model, tmp_path / "base")
    disturb(wrap(model, LoraConfig(rank=3, targets=("mlp.experts",)), str(tmp_path / "base")))
    write_adapter(model, tmp_path / "adapter")
    with pytest.raises(ValueError, match=r"Target modules .* not found in the base model"):
        as_peft(family, tmp_path / "base", tmp_path / "adapter")
    torch.testing.assert_close(load(tmp_path / "adapter")(IDS), model(IDS), rtol=0, atol=1e-6)
    fuse(tmp_path / "adapter", tmp_path / "fused")
    torch.testing.assert_close(load(tmp_path / "fused")(IDS), model(IDS), rtol=0, atol=1e-5)


@pytest.mark.parametrize("family", REFUSED)
def test_attention_beside_experts_that_peft_does_not_find(family: str, tmp_path: Path) -> None:
    torch.manual_seed(4)
    model = Transformer(models.SHAPES[family]).eval()
    save(model, tmp_path / "base")
    disturb(wrap(model, LoraConfig(rank=3, targets=("attn",)), str(tmp_path / "base")))
    write_adapter(model, tmp_path / "adapter")
    torch.testing.assert_close(model(IDS), logits(as_peft(family, tmp_path / "base", tmp_path / "adapter")),
                               rtol=0, atol=1e-5)  # fmt: skip


@pytest.mark.parametrize(("family", "remedy"), [("qwen3_moe", "give the merged model"), ("qwen3_5_moe", "lapis fuse")])
def test_a_stack_that_the_base_holds_apart_is_one_line(family: str, remedy: str, tmp_path: Path) -> None:
    """PEFT can adapt what transformers stacks. Folders of Qwen3-MoE do not; those of Qwen3.5 may, and are fused."""
    save(Transformer(models.SHAPES[family]), tmp_path / "base")
    config = peft.LoraConfig(r=2, target_modules=[], target_parameters=["experts.down_proj"])
    base = shape_of(family).from_pretrained(tmp_path / "base", dtype=torch.float32)
    peft.get_peft_model(base, config).save_pretrained(tmp_path / "adapter")
    for read, end in ((load, remedy), (lambda adapter: fuse(adapter, tmp_path / "fused"), "give the merged model")):
        with pytest.raises(CheckpointError, match=f"down_proj is adapted as all experts in one .*{end}"):
            read(tmp_path / "adapter")
    assert not (tmp_path / "fused").exists()
