"""Activation differences, steering and patching: transformers' hidden states and hooks of its own modules by hand."""

import json

import pytest
import torch
import transformers

import lapis
from lapis.errors import CheckpointError, ConfigError, DataError, LapisError
from lapis.inside.compared.difference import activation_difference
from lapis.inside.compared.options import DifferenceOptions
from lapis.inside.compared.patching import patch
from lapis.inside.compared.vectors import DifferenceVectors, steer
from lapis.text.tokenizer.tokenizer import Tokenizer, train_tokenizer

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()

TEXT = "in Malaysia they say Kuala Lumpur is the capital of Malaysia, and Jakarta of Indonesia. "
SIZES = {
    "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 48, "vocab_size": 330,
    "max_position_embeddings": 64,
}  # fmt: skip
KINDS = {"llama": "LlamaForCausalLM", "persimmon": "PersimmonForCausalLM"}  # lapis' own, and one through transformers
PLACES, TEXTS = 3, 70


@pytest.fixture(scope="module")
def words() -> Tokenizer:
    return train_tokenizer([TEXT * 40], 320)


def make(kind: str, seed: int):
    torch.manual_seed(0)
    model_class = getattr(transformers, KINDS[kind])
    model = model_class(model_class.config_class(**SIZES)).eval()
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


@pytest.fixture(scope="module", params=KINDS)
def folders(request, words, tmp_path_factory):
    """Two models of one shape, as transformers has them and as folders, and a file of texts."""
    root = tmp_path_factory.mktemp(request.param)
    models = [make(request.param, seed) for seed in (1, 2)]
    for name, model in zip("ab", models, strict=True):
        model.save_pretrained(root / name)
        words.save(root / name)
    pieces = TEXT.split()
    texts = [" ".join(pieces[i % 11 :][:6]) + f" {i}" for i in range(TEXTS)]
    (root / "texts.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts) + "\n")
    return root, models, texts


@pytest.fixture(scope="module")
def difference(folders):
    root, _, _ = folders
    return activation_difference(
        root / "a", root / "b", root / "texts.jsonl", DifferenceOptions(texts=TEXTS, places=PLACES)
    )


def trunk(model):
    return model.base_model


def states(model, ids_BT: torch.Tensor) -> list[torch.Tensor]:
    """The embedding and the end of each layer, [B, T, D]; transformers' own last hidden state is normed, so a hook."""
    last = {}
    layers = trunk(model).layers
    handle = layers[-1].register_forward_hook(
        lambda _m, _a, out: last.update(x=out[0] if isinstance(out, tuple) else out)
    )
    with torch.inference_mode():
        hidden = model(ids_BT, output_hidden_states=True).hidden_states
    handle.remove()
    return [*hidden[:-1], last["x"]]


def test_the_mean_difference_equals_transformers_hidden_states(folders, difference, words):
    _, (one, other), texts = folders
    rows = [words.encode(text, add_special_tokens=True)[:PLACES] for text in texts]
    ids_BT = torch.tensor([row for row in rows if len(row) == PLACES])
    means = [torch.stack([x.double().mean(0) for x in states(model, ids_BT)], 1) for model in (one, other)]
    target_PLD = means[1] - means[0]
    assert difference.vectors.info["texts"] == len(ids_BT)
    assert (difference.vectors.differences_PLD - target_PLD).abs().max() <= 1e-5
    lengths_PL = torch.stack([x.double().norm(dim=2).mean(0) for x in states(one, ids_BT)], 1)
    assert torch.allclose(difference.vectors.norms_PL.double(), lengths_PL, rtol=1e-5)
    norm = getattr(trunk(other), "norm", None) or trunk(other).final_layernorm
    for reading in difference.readings:
        d_D = target_PLD[reading.place, 0 if reading.layer is None else reading.layer + 1].float()
        assert reading.relative_norm == pytest.approx(
            float(d_D.norm() / lengths_PL[reading.place, 0 if reading.layer is None else reading.layer + 1]), rel=1e-4
        )
        for sign, side in ((1, reading.toward), (-1, reading.away)):
            with torch.inference_mode():
                top = (other.get_output_embeddings()(norm(sign * d_D))).softmax(-1).topk(3)
            assert [index for _, index, _ in side[:3]] == top.indices.tolist()
            assert [p for _, _, p in side[:3]] == pytest.approx(top.values.tolist(), rel=1e-4)
    assert len(difference.readings) == PLACES * 4 and difference.most.place > 0
    assert difference.finding() in str(difference) and difference.to_json()["finding"] == difference.finding()
    assert len(difference.grid_rows()) == PLACES * 4 and difference.plot().data


def test_a_model_does_not_differ_from_itself(folders):
    root, _, _ = folders
    same = activation_difference(root / "a", root / "a", root / "texts.jsonl", DifferenceOptions(texts=5, places=2))
    assert not same.vectors.differences_PLD.any() and "the same at every place" in same.finding()
    assert all(not reading.toward and not reading.relative_norm for reading in same.readings)


def test_vectors_come_back_from_their_file(difference, tmp_path):
    path = tmp_path / "v.safetensors"
    difference.vectors.save(path)
    again = DifferenceVectors.open(path)
    assert torch.equal(again.differences_PLD, difference.vectors.differences_PLD)
    assert again.info == difference.vectors.info
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(CheckpointError):
        DifferenceVectors.open(path)


@pytest.mark.parametrize("place", [None, 1])
def test_steering_equals_a_hook_on_transformers_layer(folders, difference, words, place):
    root, (one, _), _ = folders
    model, tokenizer = opened(root / "a")
    ids_BT = torch.tensor([words.encode("in Malaysia they say")])
    added_D = difference.vectors.differences_PLD[:, 2]
    added_D = (added_D.mean(0) if place is None else added_D[place]) * -3.0
    hook = (
        trunk(one)
        .layers[1]
        .register_forward_hook(
            lambda _m, _a, out: (out[0] + added_D, *out[1:]) if isinstance(out, tuple) else out + added_D
        )
    )
    with torch.inference_mode():
        target = one(ids_BT).logits
        whole = one.generate(ids_BT, attention_mask=torch.ones_like(ids_BT), max_new_tokens=8, do_sample=False)
        hook.remove()
        plain = one(ids_BT).logits
        with steer(model, difference.vectors, 1, -3.0, place):
            assert (model(ids_BT) - target).abs().max() <= 1e-4
            text = lapis.generate(model, tokenizer, ids_BT[0].tolist(), lapis.Sampling(max_tokens=8))
        assert (model(ids_BT) - plain).abs().max() <= 1e-4 and (plain - target).abs().max() > 0.01
    assert text == words.decode(whole[0, ids_BT.shape[1] :].tolist())


def opened(folder):
    from lapis.checkpoint import open_checkpoint
    from lapis.model.reading.load import load_readable

    checkpoint = open_checkpoint(folder)
    return load_readable(checkpoint), Tokenizer.open(checkpoint)


def test_vectors_of_other_models_are_refused(folders, difference, tmp_path):
    root, _, _ = folders
    model, _ = opened(root / "a")
    for layer, place, message in ((3, None, "layers 0 to 2"), (-1, None, "layer is -1"), (0, PLACES, "places 0 to 2")):
        with pytest.raises(ConfigError, match=message), steer(model, difference.vectors, layer, 1.0, place):
            pass
    stranger = lapis.load(root / "a")[0] if (root / "a").parent.name.startswith("llama") else opened(root / "a")[0]
    with torch.no_grad():
        next(p for name, p in stranger.named_parameters() if "norm" in name and "final" in name).add_(0.5)
    with pytest.raises(LapisError, match="is neither"), steer(stranger, difference.vectors):
        pass
    narrow = DifferenceVectors(difference.vectors.differences_PLD[..., :8], difference.vectors.norms_PL,
                               difference.vectors.info)  # fmt: skip
    with pytest.raises(LapisError, match="3 layers of width 8"), steer(model, narrow):
        pass
    wrong = tmp_path / "x.safetensors"
    wrong.write_bytes((root / "a" / "model.safetensors").read_bytes())
    with pytest.raises(CheckpointError, match="no differences of activations"):
        DifferenceVectors.open(wrong)
    with pytest.raises(CheckpointError, match="no such file"):
        DifferenceVectors.open(tmp_path / "none")


def test_patching_equals_states_exchanged_in_transformers(folders, words):
    root, (one, other), _ = folders
    ours, theirs = (opened(root / name)[0] for name in "ab")
    ids = words.encode("they say Kuala Lumpur is")
    result = patch(ours, theirs, words, ids, "Malaysia, Jakarta", places=4)
    spellings = {w.text: [s.ids[0] for s in w.followed] for w in result.words}
    source = states(other, torch.tensor([ids]))[1:]
    with torch.inference_mode():
        for layer in range(3):
            for place, position in enumerate(result.positions):

                def put(_m, _a, out, layer=layer, position=position):
                    x = (out[0] if isinstance(out, tuple) else out).clone()
                    x[0, position] = source[layer][0, position]
                    return (x, *out[1:]) if isinstance(out, tuple) else x

                hook = trunk(one).layers[layer].register_forward_hook(put)
                chances = one(torch.tensor([ids])).logits[0, -1].softmax(-1)
                hook.remove()
                for word, first in spellings.items():
                    assert result.patched[word][layer][place] == pytest.approx(float(chances[first].sum()), rel=1e-4)
        for table, model in ((result.before, one), (result.there, other)):
            chances = model(torch.tensor([ids])).logits[0, -1].softmax(-1)
            assert table == pytest.approx({w: float(chances[first].sum()) for w, first in spellings.items()}, rel=1e-4)
    assert result.to_json()["layers"][1]["places"][0]["position"] == len(ids) - 4
    assert result.finding("Malaysia") in str(result) and result.plot("Malaysia").data


def test_patching_a_model_with_itself_changes_nothing(folders, words):
    root, _, _ = folders
    model, _ = opened(root / "a")
    result = patch(model, opened(root / "a")[0], words, "they say")
    for word, table in result.patched.items():
        assert all(value == pytest.approx(result.before[word], rel=1e-5) for line in table for value in line)
    assert len(result.words) == 1  # both say the same


def test_models_that_are_no_versions_of_one_are_refused(folders, words, tmp_path):
    root, (one, _), _ = folders
    kind = type(one)
    for name, changes, message in (
        ("narrow", {"hidden_size": 16, "num_attention_heads": 2}, "dim is 32|width is 32"),
        ("deep", {"num_hidden_layers": 4}, "layers is 3|number of layers is 3"),
    ):
        kind(kind.config_class(**{**SIZES, **changes})).save_pretrained(tmp_path / name)
        words.save(tmp_path / name)
        with pytest.raises(DataError, match=message):
            activation_difference(root / "a", tmp_path / name, root / "texts.jsonl")
        with pytest.raises(DataError, match=message):
            patch(opened(root / "a")[0], opened(tmp_path / name)[0], words, "they say")
    one.save_pretrained(tmp_path / "other")
    train_tokenizer(["quite another text, of other words and with other merges " * 40], 300).save(tmp_path / "other")
    with pytest.raises(DataError, match=r"texts.jsonl.*other tokens"):
        activation_difference(root / "a", tmp_path / "other", root / "texts.jsonl")
    (tmp_path / "short.txt").write_text("a")
    with pytest.raises(DataError, match="no text has 40 tokens"):
        activation_difference(root / "a", root / "b", tmp_path / "short.txt", DifferenceOptions(places=40))


def test_the_commands_write_steer_and_patch(folders, run, tmp_path):
    root, _, _ = folders
    a, b, file = root / "a", root / "b", tmp_path / "v.safetensors"
    texts = ("--activations", root / "texts.jsonl", "--texts", 30, "--places", 2)
    status, out, err = run("diff", a, b, *texts, "--vectors", file, "--html", tmp_path / "d.html", "--json")
    assert status == 0, err
    result = json.loads(out)["activations"]
    assert result["texts"] == 30 and len(result["readings"]) == 2 * 4 and result["vectors"] == str(file)
    assert "first places of unrelated texts" in (tmp_path / "d.html").read_text()
    status, out, _ = run("diff", a, b, *texts)
    assert status == 0 and "through the head the difference says" in out
    status, plain, _ = run("generate", a, "in Malaysia", "--max-tokens", 6, "--json")
    status, out, err = run("generate", a, "in Malaysia", "--max-tokens", 6, "--json", "--steer", file, "--layer", 1,
                           "--strength", 30)  # fmt: skip
    assert status == 0 and json.loads(out)["ids"] != json.loads(plain)["ids"]
    assert any("30" in note and "layer 1" in note for note in json.loads(out)["notes"])
    status, out, err = run("lens", a, "they say", "--against", b, "--patch", "--track", "Kuala", "--json", "--html",
                           tmp_path / "l.html")  # fmt: skip
    assert status == 0, err
    assert len(json.loads(out)["patch"]["layers"]) == 3
    assert "put into" in (tmp_path / "l.html").read_text()
    for arguments, message in (
        (("lens", a, "they say", "--patch"), "--patch is for --against"),
        (("generate", a, "x", "--layer", 1), "--layer is for --steer"),
        (("generate", a, "x", "--steer", file, "--layer", 9), "layers 0 to 2"),
        (("generate", a, "x", "--steer", root / "texts.jsonl"), "texts.jsonl"),
        (("diff", a, b, "--vectors", tmp_path / "w"), "--vectors is for --activations"),
        (("diff", a, b, *texts, "--vectors", file), "exists already"),
        (("diff", a, b, "--activations", tmp_path / "none.txt"), "none.txt"),
    ):
        status, _, err = run(*arguments)
        assert status == 1 and message in err and len(err.strip().splitlines()) == 1, (arguments, err)
