"""Merges against mergekit 0.1.5, run in this process on tiny models: within one bf16 step, recipe for recipe."""

import copy
import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from lapis.weights.merge.merge import merge

mergekit_config = pytest.importorskip("mergekit.config")

LAYERS, DIM, FFN, WORDS = 3, 32, 48, 50


@pytest.fixture(scope="session")
def models(tmp_path_factory):
    """make(name) -> a folder. base, one, two, three in float32; the same with -bf16; short has fewer layers."""
    from transformers import LlamaConfig, LlamaForCausalLM

    root = tmp_path_factory.mktemp("mergekit")
    config = LlamaConfig(
        hidden_size=DIM, intermediate_size=FFN, num_hidden_layers=LAYERS, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=WORDS, tie_word_embeddings=False, initializer_range=0.05,
    )  # fmt: skip
    torch.manual_seed(0)
    base = LlamaForCausalLM(config)
    shared = {name: torch.randn_like(p) * 0.01 for name, p in base.named_parameters()}
    for i, name in enumerate(("base", "one", "two", "three")):
        torch.manual_seed(i)
        model = copy.deepcopy(base)
        if i:
            for key, parameter in model.named_parameters():
                parameter.data += shared[key] + torch.randn_like(parameter) * 0.02
        model.save_pretrained(root / name)
        model.to(torch.bfloat16).save_pretrained(root / f"{name}-bf16")
    return root


def by_mergekit(recipe, out):
    from mergekit.merge import run_merge
    from mergekit.options import MergeOptions

    options = MergeOptions(copy_tokenizer=False, quiet=True, write_model_card=False)
    run_merge(mergekit_config.MergeConfiguration.model_validate(recipe), str(out), options)
    return {name: tensor for path in sorted(out.glob("*.safetensors")) for name, tensor in load_file(path).items()}


def by_lapis(recipe, out):
    merge(recipe, out)
    return load_file(out / "model.safetensors")


def steps_apart(one, other):
    """How many bf16 values lie between two tensors, at most; noise below 1e-7 of a cancelled sum counts for nothing."""
    assert one.dtype == other.dtype == torch.bfloat16 and one.shape == other.shape

    def place(tensor):
        bits = tensor.view(torch.int16).int()
        return torch.where(bits < 0, -(bits & 0x7FFF), bits)

    noise = (one.float() - other.float()).abs() < 1e-7
    return torch.where(noise, 0, (place(one) - place(other)).abs())


def recipe_of(models, method, count=2, base=True, kind="", each=None, **parameters):
    names = ("one", "two", "three")[:count]
    listed = [{"model": str(models / f"{name}{kind}"), "parameters": {k: v[i] for k, v in (each or {}).items()}}
              for i, name in enumerate(names)]  # fmt: skip
    recipe = {"merge_method": method, "models": listed, "parameters": parameters, "dtype": "float32"}
    if base:
        recipe["base_model"] = str(models / f"base{kind}")
    return recipe | {"out_dtype": "bfloat16"} | ({"dtype": "float64"} if method == "arcee_fusion" else {})


W = {"weight": [0.7, 0.5, 0.3]}
WD = W | {"density": [0.4, 0.6, 0.3]}
CASES = {
    "linear": {"base": False, "count": 3, "each": W},
    "linear-not-normalized": {"base": False, "each": W, "normalize": False},
    "task_arithmetic": dict(each=W, count=3, **{"lambda": 0.8}),
    "task_arithmetic-normalized": {"each": W, "normalize": True},
    "ties": {"each": WD, "count": 3},
    "ties-not-normalized": dict(each=WD, normalize=False, **{"lambda": 0.6}),
    "ties-rescaled": {"each": WD, "rescale": True},
    "breadcrumbs": {"each": WD, "gamma": 0.05},
    "breadcrumbs_ties": {"each": WD, "gamma": 0.05, "count": 3},
    "slerp": {"count": 1, "t": 0.4},
    "slerp-gradient": {"count": 1, "t": [{"filter": "self_attn", "value": [0, 0.5, 0.3, 1]}, {"value": 0.4}]},
    "nuslerp": {"base": False, "each": W},
    "nuslerp-base": {"each": W},
    "nuslerp-rows": {"each": W, "nuslerp_flatten": False},
    "nuslerp-columns": {"base": False, "each": W, "nuslerp_flatten": False, "nuslerp_row_wise": True},
    "multislerp": {"base": False, "count": 3, "each": W},
    "multislerp-base": {"count": 3, "each": W, "normalize_weights": False},
    "karcher": {"base": False, "count": 3},
    "model_stock": {"count": 3},
    "model_stock-filters": {"count": 2, "filter_wise": True},
    "nearswap": {"count": 1, "t": 0.01},
    "sce": {"count": 3},
    "sce-selected": {"count": 3, "select_topk": 0.3},
    "arcee_fusion": {"count": 1},
    "ram": {"count": 3, "epsilon": 0.01},
    "ramplus_tl": {"count": 3, "epsilon": 0.01, "r": 0.3},
}


@pytest.mark.parametrize("case", CASES)
def test_within_one_bf16_step(case, models, tmp_path):
    recipe = recipe_of(models, case.split("-")[0], **CASES[case])
    theirs = by_mergekit(copy.deepcopy(recipe), tmp_path / "theirs")
    ours = by_lapis(recipe, tmp_path / "ours")
    assert ours.keys() == theirs.keys()
    apart = {name: steps_apart(ours[name], theirs[name]) for name in ours}
    worst = max(apart, key=lambda name: int(apart[name].max()))
    assert int(apart[worst].max()) <= 1, (worst, int(apart[worst].max()), int((apart[worst] > 1).sum()))


@pytest.mark.parametrize("case", ["linear", "slerp"])
def test_within_one_bf16_step_of_models_in_bf16(case, models, tmp_path):
    recipe = recipe_of(models, case, kind="-bf16", **CASES[case]) | {"dtype": "bfloat16"}
    theirs = by_mergekit(copy.deepcopy(recipe), tmp_path / "theirs")
    ours = by_lapis(recipe, tmp_path / "ours")
    assert all(int(steps_apart(ours[name], theirs[name]).max()) <= 1 for name in ours)


def test_nearer_to_the_formula_than_arithmetic_in_bf16(models, tmp_path):
    """mergekit computes differences in the dtype that it loads, and loses more than a step where a sum cancels."""
    recipe = recipe_of(models, "task_arithmetic", kind="-bf16", each=W) | {"dtype": "bfloat16"}
    theirs = by_mergekit(copy.deepcopy(recipe), tmp_path / "theirs")
    ours = by_lapis(recipe, tmp_path / "ours")
    base, one, two = (load_file(models / f"{name}-bf16" / "model.safetensors") for name in ("base", "one", "two"))
    for name in ours:
        b, x, y = (tensors[name].double() for tensors in (base, one, two))
        exact = b + 0.7 * (x - b) + 0.5 * (y - b)
        error, other = ((side[name].double() - exact).abs() for side in (ours, theirs))
        assert bool((error <= exact.abs() * 2**-8 + 1e-9).all()) and float(error.sum()) <= float(other.sum())


def test_ties_differs_only_among_equal_magnitudes(models, tmp_path):
    """mergekit breaks ties between equal magnitudes by an unstable sort; nothing else may differ."""
    recipe = recipe_of(models, "ties", kind="-bf16", each={"weight": [1.0], "density": [0.5]}, count=1)
    theirs = by_mergekit(copy.deepcopy(recipe), tmp_path / "theirs")
    ours = by_lapis(recipe, tmp_path / "ours")
    base, one = (load_file(models / f"{name}-bf16" / "model.safetensors") for name in ("base", "one"))
    for name in ours:
        delta = (one[name].float() - base[name].float()).abs()
        threshold = delta.flatten().sort(descending=True).values[max(1, delta.numel() // 2) - 1]
        differs = steps_apart(ours[name], theirs[name]) > 1
        assert bool((delta[differs] == threshold).all())
        assert int((ours[name] != base[name]).sum()) == int((theirs[name] != base[name]).sum())


def test_layers_are_stacked(models, tmp_path):
    one, two = (str(models / f"{name}-bf16") for name in ("one", "two"))
    recipe = {
        "merge_method": "passthrough",
        "slices": [
            {"sources": [{"model": one, "layer_range": [0, 2]}]},
            {"sources": [{"model": two, "layer_range": [1, 3], "parameters": {
                "scale": [{"filter": "o_proj", "value": 0.5}, {"filter": "down_proj", "value": 0}, {"value": 1}]}}]},
        ],
        "dtype": "bfloat16",
    }  # fmt: skip
    theirs = by_mergekit(copy.deepcopy(recipe), tmp_path / "theirs")
    ours = by_lapis(recipe, tmp_path / "ours")
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    for key in ("num_hidden_layers", "vocab_size", "tie_word_embeddings"):
        assert json.loads((tmp_path / "ours/config.json").read_text()).get(key) == json.loads(
            (tmp_path / "theirs/config.json").read_text()
        ).get(key)
    from transformers import AutoModelForCausalLM

    logits = [
        AutoModelForCausalLM.from_pretrained(tmp_path / side, dtype=torch.float32)(torch.arange(9)[None]).logits
        for side in ("ours", "theirs")
    ]
    assert torch.equal(*logits)


def test_slices_with_gradients(models, tmp_path):
    base, one = str(models / "base"), str(models / "one")
    recipe = {
        "merge_method": "slerp",
        "base_model": base,
        "slices": [
            {"sources": [{"model": base, "layer_range": [0, 2]}, {"model": one, "layer_range": [0, 2]}],
             "parameters": {"t": [0.2, 0.9]}},
            {"sources": [{"model": base, "layer_range": [0, 2]}, {"model": one, "layer_range": [1, 3]}]},
        ],
        "parameters": {"t": [1, 0.5]},
        "dtype": "float32",
        "out_dtype": "bfloat16",
    }  # fmt: skip
    theirs = by_mergekit(copy.deepcopy(recipe), tmp_path / "theirs")
    ours = by_lapis(recipe, tmp_path / "ours")
    assert ours.keys() == theirs.keys()
    assert all(int(steps_apart(ours[name], theirs[name]).max()) <= 1 for name in ours)


TOKENS = {"base": ["<s>", "<a>", "<b>"], "one": ["<s>", "<b>", "<c>"], "two": ["<d>", "<s>", "<c>", "<a>", "<e>"]}


@pytest.fixture(scope="session")
def spoken(models):
    """The bf16 models with tokenizers of their own, whose added tokens overlap and stand in different rows."""
    learned = {f"w{i}": i for i in range(40)}
    for name, added in TOKENS.items():
        folder = models / f"{name}-words"
        source = models / f"{name}-bf16"
        rows = 40 + len(added)
        folder.mkdir()
        tensors = load_file(source / "model.safetensors")
        for key in ("model.embed_tokens.weight", "lm_head.weight"):
            tensors[key] = tensors[key][:rows].clone()
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        config = json.loads((source / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | {"vocab_size": rows}))
        entries = [
            {"id": 40 + i, "content": token, "single_word": False, "lstrip": False, "rstrip": False,
             "normalized": False, "special": True}
            for i, token in enumerate(added)
        ]  # fmt: skip
        (folder / "tokenizer.json").write_text(json.dumps({
            "version": "1.0", "added_tokens": entries, "pre_tokenizer": {"type": "Whitespace"},
            "model": {"type": "WordLevel", "vocab": learned, "unk_token": "w0"},
        }))  # fmt: skip
        (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}))
    return models


@pytest.mark.parametrize("source", ["union", "base", "two"])
def test_vocabularies_are_aligned(source, spoken, tmp_path):
    recipe = recipe_of(spoken, "linear", kind="-words", each={"weight": [0.7, 0.5]})
    recipe["models"].insert(0, {"model": recipe["base_model"], "parameters": {"weight": 1.0}})
    recipe["tokenizer_source"] = source if source != "two" else str(spoken / "two-words")
    theirs = by_mergekit(copy.deepcopy(recipe), tmp_path / "theirs")
    ours = by_lapis(recipe, tmp_path / "ours")
    from transformers import AutoTokenizer

    words = [AutoTokenizer.from_pretrained(tmp_path / side).get_vocab() for side in ("ours", "theirs")]
    assert set(words[0]) == set(words[1])
    for name in ours:
        if name in ("model.embed_tokens.weight", "lm_head.weight"):
            rows = [[vocabulary[token] for token in sorted(words[0])] for vocabulary in words]
            assert int(steps_apart(ours[name][rows[0]], theirs[name][rows[1]]).max()) <= 1, name
        else:
            assert int(steps_apart(ours[name], theirs[name]).max()) <= 1, name
