"""A delta holds what a graft would add: exactly, or with the error that it states; it is believed only when whole."""

import contextlib
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from lapis.checkpoint import open_checkpoint
from lapis.checkpoint.commit import verify
from lapis.errors import CheckpointError, ConfigError, OutputError
from lapis.weights.delta import writing
from lapis.weights.delta.apply import delta_apply
from lapis.weights.delta.codes import factors
from lapis.weights.delta.codes.bits import BLOCK, from_blocks, from_signs, to_blocks, to_signs
from lapis.weights.delta.codes.factors import low_rank
from lapis.weights.delta.codes.planes import pack, unpack
from lapis.weights.delta.extract import delta_extract
from lapis.weights.delta.file import open_delta
from lapis.weights.graft.graft import graft

CODED = ({"bits": "exact"}, {"bits": 8}, {"bits": 4}, {"bits": 1}, {"rank": 4})


def weight_files(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(folder.glob("*.safetensors"))}


def files_of(folder: Path) -> dict[str, bytes]:
    return {file.relative_to(folder).as_posix(): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


# --- an exact delta and a graft -------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"scale": 0.7, "norms": "add"},
        {"scale": "attn=1,mlp=0.3,0.mlp=0"},
        {"embeddings": "add", "scale": 1.3},
        {"dtype": "float32"},
        {"template": "onto"},
    ],
    ids=lambda options: "-".join(options) or "plain",
)
def test_exact_gives_the_bytes_of_the_graft(trio, tmp_path, dtype, options):
    """Of the three models, though the base is gone."""
    models = trio(dtype=dtype, tied=dtype is not torch.bfloat16, shards=2)
    graft(**models, out=tmp_path / "graft", **options)
    embeddings = options.get("embeddings", "keep")
    delta_extract(models["base"], models["chat"], tmp_path / "delta", embeddings=embeddings)
    for role in ("base", "chat"):
        shutil.move(models[role], tmp_path / f"moved-{role}")
    result = delta_apply(tmp_path / "delta", models["onto"], tmp_path / "out", **options)
    assert weight_files(tmp_path / "out") == weight_files(tmp_path / "graft")
    ours, theirs = files_of(tmp_path / "out"), files_of(tmp_path / "graft")
    own = {"lapis-merge.json", "README.md", "lapis-manifest.json"}
    assert ours.keys() == theirs.keys() and all(ours[name] == theirs[name] for name in ours.keys() - own)
    assert verify(tmp_path / "out") == verify(tmp_path / "delta") == []
    assert set(result.tensors) == {"merged", "copied", "skipped"}


def test_new_tokens_of_the_template_go_where_a_graft_puts_them(folders, tmp_path):
    """onto has other words at other places, and no template tokens at all."""
    base = folders.weights(1)
    vocab = folders.words()
    folders.write(tmp_path / "base", base, vocab=vocab, eos="<|endoftext|>")
    folders.write(tmp_path / "chat", folders.near(base, 2), vocab=vocab, template=folders.template, eos="<|im_end|>")
    own = {f"w{i}": 31 - i for i in range(32)} | {"<|endoftext|>": 32, **{f"x{i}": 33 + i for i in range(7)}}
    folders.write(tmp_path / "onto", folders.near(base, 3), vocab=own, eos="<|endoftext|>")
    for embeddings in ("keep", "add"):
        out, delta = tmp_path / f"graft-{embeddings}", tmp_path / f"delta-{embeddings}"
        first = graft(tmp_path / "base", tmp_path / "chat", tmp_path / "onto", out, embeddings=embeddings)
        delta_extract(tmp_path / "base", tmp_path / "chat", delta, embeddings=embeddings)
        result = delta_apply(delta, tmp_path / "onto", tmp_path / f"out-{embeddings}", embeddings=embeddings)
        assert weight_files(tmp_path / f"out-{embeddings}") == weight_files(out)
        for name in ("config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json"):
            assert (tmp_path / f"out-{embeddings}" / name).read_bytes() == (out / name).read_bytes()
        assert result.vocabulary["new_tokens"] == first.vocabulary["new_tokens"]


def test_several_deltas_with_weights(folders, trio, tmp_path):
    models = trio()
    other = folders.near(folders.weights(1), 9)
    folders.write(tmp_path / "code", other, vocab=folders.words(), template=folders.template, eos="<|im_end|>")
    graft(models["base"], [models["chat"], tmp_path / "code"], models["onto"], tmp_path / "graft", [0.6, -0.3])
    for name in ("chat", "code"):
        delta_extract(models["base"], tmp_path / name, tmp_path / f"delta-{name}")
    deltas = [tmp_path / "delta-chat", tmp_path / "delta-code"]
    delta_apply(deltas, models["onto"], tmp_path / "out", [0.6, -0.3])
    assert weight_files(tmp_path / "out") == weight_files(tmp_path / "graft")
    with pytest.raises(ConfigError, match="2 deltas and 3 scales"):
        delta_apply(deltas, models["onto"], tmp_path / "no", [1, 1, 1])


def test_nothing_changed_is_nothing_added(trio, tmp_path):
    models = trio()
    for number, options in enumerate(CODED):
        delta_extract(models["base"], models["base"], tmp_path / f"d{number}", **options)
        delta_apply(tmp_path / f"d{number}", models["onto"], tmp_path / f"o{number}")
        assert weight_files(tmp_path / f"o{number}") == weight_files(models["onto"])


# --- what others lose, against float64 ------------------------------------------------------------------------------


@pytest.mark.parametrize("options", CODED[1:], ids=str)
def test_stated_errors_are_those_of_float64(trio, folders, tmp_path, options):
    models = trio(dtype=torch.float32)
    result = delta_extract(models["base"], models["chat"], tmp_path / "delta", **options)
    zero = {name: torch.zeros_like(tensor) for name, tensor in folders.read(models["onto"]).items()}
    file, base, chat = open_delta(tmp_path / "delta"), *(folders.read(models[role]) for role in ("base", "chat"))
    errors = {line["name"]: line for line in result.errors}
    total = [0.0, 0.0]
    for name in zero:
        if "embed" in name:
            continue
        source = file.difference("delta", name)
        stored = torch.empty(source.shape)
        source.read(0, stored.numel(), memoryview(stored.view(-1).view(torch.uint8).numpy()))
        exact = chat[name].double() - base[name].double()
        lost = (stored.double() - exact).norm() / exact.norm()
        assert errors[name]["relative_error"] == pytest.approx(float(lost), rel=1e-4, abs=1e-7)
        assert errors[name]["relative_norm"] == pytest.approx(
            float(exact.norm() / base[name].double().norm()), rel=1e-4
        )
        total[0] += float((stored.double() - exact).square().sum())
        total[1] += float(exact.square().sum())
    assert result.relative_error == pytest.approx((total[0] / total[1]) ** 0.5, rel=1e-4)
    assert {line["name"]: line["relative_error"] for line in file.to_json()["errors"] if line["code"]} == {
        name: line["relative_error"] for name, line in errors.items()
    }
    order = {"8": 0.01, "4": 0.12, "1": 0.7, "4 rank": 0.8}
    assert 0 < result.relative_error < order[str(options.get("bits", "4 rank"))]


def test_sizes_are_what_was_asked_for(tmp_path, folders):
    """Of the model's weights: 4 bits and a factor for 64 are 4.25 of 16, 1 bit and a factor for a row 1.04 at 896
    columns; an exact delta of a fine-tune that moves the weights by 1 % is under half."""
    random = torch.Generator().manual_seed(0)
    base = folders.weights(1)
    for name in base:
        if "proj" in name:
            base[name] = (torch.randn(256, 896, generator=random) * 0.02).bfloat16()
    chat = {n: (t.float() + 2e-4 * torch.randn(t.shape, generator=random)).bfloat16() for n, t in base.items()}
    for name, tensors in (("base", base), ("chat", chat)):
        folders.write(tmp_path / name, tensors, config={"intermediate_size": 256, "model_type": "unknown"})
    model = sum(t.nbytes for t in base.values())
    for options, share in (({}, 0.5), ({"bits": 8}, 0.54), ({"bits": 4}, 0.28), ({"bits": 1}, 0.08)):
        out = tmp_path / f"d{options.get('bits')}"
        result = delta_extract(tmp_path / "base", tmp_path / "chat", out, **options)
        assert result.bytes < share * model and result.model_bytes == model


NUMBERS = st.floats(width=32) | st.sampled_from([0.0, -0.0, 1e-45, -1e-40, 3e38, float("inf"), float("nan")])


@settings(max_examples=60, deadline=None)
@given(st.lists(NUMBERS, min_size=0, max_size=300), st.integers(0, 3), st.binary(max_size=64))
def test_planes_keep_every_bit(numbers, repeat, payload):
    """-0.0, subnormals and the payload of a NaN included."""
    raw = np.array(numbers * (repeat + 1), np.float32)
    raw = np.concatenate(
        [raw, np.frombuffer(payload[: len(payload) // 4 * 4], np.float32), np.zeros(repeat * 97, "f4")]
    )
    values = torch.from_numpy(raw.copy())
    data, sizes = pack(values)
    back = torch.full((len(values),), 7.0)
    unpack(memoryview(data), sizes, len(values), back)
    assert back.numpy().tobytes() == raw.tobytes() and sum(sizes) == len(data)


@pytest.mark.parametrize("spread", [0.002, 0.5], ids=["few values", "others, too"])
def test_two_planes_with_few_values_are_one(spread):
    random = torch.Generator().manual_seed(0)
    base = (torch.randn(20_000, generator=random) * 0.02).bfloat16().float()
    values = (base + torch.randn(20_000, generator=random) * spread * 0.02).bfloat16().float() - base
    values = values.round(decimals=3)  # few values
    values[::40] = torch.randn(500, generator=random).bfloat16().float()  # and some that are all others
    data, sizes = pack(values)
    assert sizes[2] == 0 and data[sizes[0] + sizes[1] :][:1] == b"j"
    back = torch.empty(20_000)
    unpack(memoryview(data), sizes, 20_000, back)
    assert torch.equal(back.view(torch.int32), values.view(torch.int32))
    start = sizes[0] + sizes[1]
    for place in (start + 1, start + 2, start + 3, start + 5, len(data) - 40):  # counts, and the plane itself
        bad = bytearray(data)
        bad[place] ^= 0x41
        with contextlib.suppress(CheckpointError):
            unpack(memoryview(bytes(bad)), sizes, 20_000, back)


def test_a_delta_of_the_first_format_is_read(trio, tmp_path):
    models = trio()
    delta_extract(models["base"], models["chat"], tmp_path / "delta")
    path = tmp_path / "delta" / "delta.safetensors"
    raw = path.read_bytes()
    assert raw.count(b'"version":"2"') == 1
    path.write_bytes(raw.replace(b'"version":"2"', b'"version":"1"'))
    assert open_delta(tmp_path / "delta").bits == "exact"


@settings(max_examples=60, deadline=None)
@given(st.binary(max_size=80), st.lists(st.integers(-1, 40), min_size=4, max_size=4), st.integers(0, 64))
def test_planes_of_a_stranger_are_refused_or_read(data, sizes, count):
    """No other error than a refusal, and no more memory than the count asks for."""
    try:
        unpack(memoryview(data), sizes, count, torch.empty(count))
    except CheckpointError:
        return
    assert sum(sizes) == len(data)


def test_a_bomb_is_not_inflated():
    import zlib

    deflate = zlib.compressobj(9, zlib.DEFLATED, -15)
    bomb = b"z" + deflate.compress(bytes(1 << 26)) + deflate.flush()
    with pytest.raises(CheckpointError, match="another length than 8"):
        unpack(memoryview(bomb), [len(bomb), 0, 0, 0], 8, torch.empty(8))


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 300), st.sampled_from([4, 8]), st.integers(0, 2**31), st.floats(1e-30, 1e30))
def test_blocks_are_as_near_as_their_steps(count, bits, seed, size):
    values = torch.randn(count, generator=torch.Generator().manual_seed(seed)) * size
    codes, factors_B = to_blocks(values, bits)
    assert len(codes) == -(-count * bits // 8) and len(factors_B) == -(-count // BLOCK)
    back = from_blocks(codes, factors_B, count, bits)
    top = torch.nn.functional.pad(values, (0, -count % BLOCK)).view(-1, BLOCK).abs().amax(1).repeat_interleave(BLOCK)
    # half a step, a whole one where the other end of the range is cut, and the factor's own rounding
    step = top[:count] / 2 ** (bits - 1)
    assert bool(((back - values).abs() <= 1.01 * step + top[:count] * 2.0**-8).all())


def test_blocks_of_zeros_and_of_the_smallest_numbers():
    for value in (0.0, -0.0, 1e-45, 1e-39):
        codes, factors_B = to_blocks(torch.full((65,), value), 4)
        assert bool(torch.isfinite(from_blocks(codes, factors_B, 65, 4)).all())
        assert float((from_blocks(codes, factors_B, 65, 4) - value).abs().max()) <= 2 * abs(value)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 9), st.integers(1, 70), st.integers(0, 2**31))
def test_signs_have_the_best_factor_for_each_row(rows, columns, seed):
    values = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))
    bits, factors_R = to_signs(values)
    assert bits.shape == (rows, -(-columns // 8))
    back = from_signs(bits, factors_R, columns)
    signs = torch.where(values >= 0, 1.0, -1.0)
    best = (values * signs).sum(1) / columns  # the least squares solution
    torch.testing.assert_close(back, signs * best[:, None])


@pytest.mark.parametrize("shape", [(40, 24), (24, 40), (5, 64)])
@pytest.mark.parametrize("exact", [True, False])
def test_low_rank_is_the_truncated_svd(shape, exact, monkeypatch):
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    matrix = matrix @ torch.diag(torch.logspace(0, -3, shape[1], dtype=torch.float64))
    if not exact:
        monkeypatch.setattr(factors, "EXACT", 4)
        monkeypatch.setattr(factors, "OVER", 8)
    left, right = low_rank(matrix.float(), 6, "name")
    values = torch.linalg.svdvals(matrix)
    best = float(values[6:].square().sum().sqrt())
    error = float((left.double() @ right.double() - matrix).norm())
    assert left.shape == (shape[0], min(6, *shape)) and right.shape == (min(6, *shape), shape[1])
    assert error <= best * (1 + (1e-5 if exact else 1e-3)) + 1e-5 * float(values[0])
    again = low_rank(matrix.float(), 6, "name")
    assert torch.equal(again[0], left) and torch.equal(again[1], right)


# --- NaN, Inf and other numbers -------------------------------------------------------------------------------------


def test_nonfinite_is_refused_or_kept_as_a_graft_keeps_it(trio, folders, tmp_path):
    models = trio()
    tensors = folders.read(models["chat"])
    name = "model.layers.1.mlp.up_proj.weight"
    raw = tensors[name].view(torch.int16)
    raw[0, :3] = torch.tensor([0x7FC1, -0x0040, 0x7F80], dtype=torch.int32).to(torch.int16)
    save_file(tensors, models["chat"] / "model.safetensors", metadata={"format": "pt"})
    for number, options in enumerate(CODED):
        with pytest.raises(CheckpointError, match=f"{name} in chat holds [123] NaN or Inf"):
            delta_extract(models["base"], models["chat"], tmp_path / f"no{number}", **options)
    with pytest.raises(ConfigError, match="only an exact delta can keep NaN"):
        delta_extract(models["base"], models["chat"], tmp_path / "no", 4, allow_nonfinite=True)
    graft(**models, out=tmp_path / "graft", allow_nonfinite=True)
    delta_extract(models["base"], models["chat"], tmp_path / "no0", allow_nonfinite=True)  # what stopped it is allowed
    (tmp_path / "no0").rename(tmp_path / "delta")
    with pytest.raises(CheckpointError, match="NaN or Inf"):
        delta_apply(tmp_path / "delta", models["onto"], tmp_path / "out")
    delta_apply(tmp_path / "delta", models["onto"], tmp_path / "out", allow_nonfinite=True)
    assert weight_files(tmp_path / "out") == weight_files(tmp_path / "graft")


def test_zeros_and_subnormals_are_those_of_the_graft(trio, folders, tmp_path):
    models = trio()
    for role in models:
        tensors = folders.read(models[role])
        for number, tensor in enumerate(tensors.values()):
            flat = tensor.view(-1)
            flat[0], flat[1], flat[2] = -0.0, 0.0, 1e-40 if role == "chat" else -1e-40
            flat[3] = -0.0 if number % 2 else 1e-38
        save_file(tensors, models[role] / "model.safetensors", metadata={"format": "pt"})
    graft(**models, out=tmp_path / "graft", norms="add")
    delta_extract(models["base"], models["chat"], tmp_path / "delta")
    delta_apply(tmp_path / "delta", models["onto"], tmp_path / "out", norms="add")
    assert weight_files(tmp_path / "out") == weight_files(tmp_path / "graft")


# --- whose delta it is ----------------------------------------------------------------------------------------------


def test_a_delta_of_another_base_is_refused_with_both_digests(trio, folders, tmp_path):
    models = trio()
    base = folders.weights(77)
    folders.write(tmp_path / "base2", base, vocab=folders.words(), eos="<|endoftext|>")
    folders.write(tmp_path / "chat2", folders.near(base, 2), vocab=folders.words(), template=folders.template)
    one = delta_extract(models["base"], models["chat"], tmp_path / "d1").base["weights_sha256"]
    two = delta_extract(tmp_path / "base2", tmp_path / "chat2", tmp_path / "d2").base["weights_sha256"]
    assert one != two
    with pytest.raises(CheckpointError, match="delta2 is of another base") as refusal:
        delta_apply([tmp_path / "d1", tmp_path / "d2"], models["onto"], tmp_path / "no")
    assert one[:16] in str(refusal.value) and two[:16] in str(refusal.value)
    with pytest.raises(CheckpointError, match="onto is no continuation of delta's base") as refusal:
        delta_apply(tmp_path / "d2", models["base"], tmp_path / "no")
    assert one[:16] in str(refusal.value) and two[:16] in str(refusal.value)
    result = delta_apply(tmp_path / "d2", models["base"], tmp_path / "out", allow_unrelated=True)
    assert any("--allow-unrelated" in note for note in result.notes)
    assert not (tmp_path / "no").exists()


def test_the_digest_is_of_values_and_not_of_files(trio, folders, tmp_path):
    models = trio()
    digest = delta_extract(models["base"], models["chat"], tmp_path / "d1").base["weights_sha256"]
    tensors = folders.read(models["base"])
    folders.write(tmp_path / "sharded", tensors, vocab=folders.words(), eos="<|endoftext|>", shards=3)
    for number, options in enumerate(CODED[1:]):
        again = delta_extract(tmp_path / "sharded", models["chat"], tmp_path / f"s{number}", **options)
        assert again.base["weights_sha256"] == digest
    tensors["model.layers.0.mlp.down_proj.weight"][0, 0] += 1
    folders.write(tmp_path / "other", tensors, vocab=folders.words(), eos="<|endoftext|>")
    assert delta_extract(tmp_path / "other", models["chat"], tmp_path / "o").base["weights_sha256"] != digest


def test_a_delta_says_where_it_comes_from(trio, tmp_path):
    models = trio()
    (models["chat"] / "README.md").write_text("---\nlicense: cc-by-4.0\nlanguage: [ms]\n---\n# Chat\n")
    (models["chat"] / "LICENSE").write_text("CC BY 4.0\n")
    (models["chat"] / "generation_config.json").write_text('{"eos_token_id": 34, "temperature": 0.6}')
    delta_extract(models["base"], models["chat"], tmp_path / "delta", 4)
    seen = open_delta(tmp_path / "delta").to_json()
    assert seen["license"] == "cc-by-4.0" and seen["bits"] == "4" and seen["rank"] is None
    assert seen["base"]["source"] == str(models["base"]) and seen["chat"]["source"] == str(models["chat"])
    assert seen["template_tokens"] == ["<|im_start|>", "<|im_end|>"] and seen["end_tokens"] == ["<|im_end|>"]
    for name in ("LICENSE", "generation_config.json", "tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "delta" / name).read_bytes() == (models["chat"] / name).read_bytes()
    with safe_open(tmp_path / "delta" / "delta.safetensors", "pt") as file:
        assert file.metadata()["format"] == "lapis-delta" and file.metadata()["version"] == "2"
        assert json.loads(file.metadata()["delta"])["base"] == seen["base"]
        rows = file.get_tensor("model.embed_tokens.weight:template")
    assert torch.equal(rows, load_file(models["chat"] / "model.safetensors")["model.embed_tokens.weight"][[33, 34]])
    delta_extract(models["base"], models["chat"], tmp_path / "other", license="mit")
    assert open_delta(tmp_path / "other").description["license"] == "mit"


def test_rows_are_those_that_changed_with_their_tokens(trio, folders, tmp_path):
    models = trio()
    tensors, base = folders.read(models["chat"]), folders.read(models["base"])
    name = "model.embed_tokens.weight"
    changed = [3, 7, 33]
    rows = base[name].clone()
    rows[changed] = tensors[name][changed]
    save_file(tensors | {name: rows}, models["chat"] / "model.safetensors", metadata={"format": "pt"})
    delta_extract(models["base"], models["chat"], tmp_path / "delta", embeddings="add")
    file = open_delta(tmp_path / "delta")
    assert file.ids(name) == changed and file.tensors[name].rows == 3
    graft(**models, out=tmp_path / "graft", embeddings="add")
    delta_apply(tmp_path / "delta", models["onto"], tmp_path / "out", embeddings="add")
    assert weight_files(tmp_path / "out") == weight_files(tmp_path / "graft")
    delta_extract(models["base"], models["chat"], tmp_path / "without")
    with pytest.raises(CheckpointError, match="made without embeddings; extract it with --embeddings add"):
        delta_apply(tmp_path / "without", models["onto"], tmp_path / "no", embeddings="add")


# --- what is refused ------------------------------------------------------------------------------------------------


def test_options_that_do_not_go_together(trio, tmp_path):
    models = trio()
    for options, words in (
        ({"bits": 2}, 'bits is "2"; give exact, 8, 4 or 1'),
        ({"bits": 4, "rank": 8}, "give one of the two"),
        ({"rank": 0}, "rank is 0"),
        ({"peft": True}, "give --rank"),
        ({"embeddings": "all"}, "give keep or add"),
    ):
        with pytest.raises(ConfigError, match=words):
            delta_extract(models["base"], models["chat"], tmp_path / "no", **options)
    with pytest.raises(OutputError, match="is the input"):
        delta_extract(models["base"], models["chat"], models["base"] / "d")
    with pytest.raises(CheckpointError, match=r"there is no such folder"):
        delta_apply(tmp_path / "absent", models["onto"], tmp_path / "no")
    with pytest.raises(CheckpointError, match=r"holds no delta\.safetensors"):
        delta_apply(models["base"], models["onto"], tmp_path / "no")


def test_a_model_and_its_chat_must_fit(trio, folders, tmp_path):
    models = trio()
    tensors = folders.read(models["chat"])
    del tensors["model.layers.0.mlp.down_proj.weight"]
    save_file(tensors, models["chat"] / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"down_proj\.weight is missing in"):
        delta_extract(models["base"], models["chat"], tmp_path / "no")
    folders.write(tmp_path / "far", folders.weights(9), vocab=folders.words())
    with pytest.raises(CheckpointError, match="chat is no fine-tune of base"):
        delta_extract(models["base"], tmp_path / "far", tmp_path / "no")


def test_a_delta_in_the_place_of_a_model_says_what_to_do(trio, tmp_path):
    models = trio()
    delta_extract(models["base"], models["chat"], tmp_path / "delta")
    with pytest.raises(CheckpointError, match=r"holds a delta; .* lapis delta apply"):
        open_checkpoint(tmp_path / "delta")


def test_a_newer_format_is_refused(trio, tmp_path):
    models = trio()
    delta_extract(models["base"], models["chat"], tmp_path / "delta")
    path = tmp_path / "delta" / "delta.safetensors"
    raw = path.read_bytes()
    for version, words in ((b'"3"', "take a newer lapis"), (b'"x"', "its format's version is")):
        path.write_bytes(raw.replace(b'"version":"2"', b'"version":' + version))
        with pytest.raises(CheckpointError, match=words):
            open_delta(tmp_path / "delta")


def test_flipped_bits_are_found(trio, tmp_path):
    models = trio()
    delta_extract(models["base"], models["chat"], tmp_path / "delta", 1)
    path = tmp_path / "delta" / "delta.safetensors"
    raw = path.read_bytes()
    start = 8 + int.from_bytes(raw[:8], "little")
    for place in {start, (start + len(raw)) // 2, len(raw) - 1}:
        path.write_bytes(raw[:place] + bytes([raw[place] ^ 4]) + raw[place + 1 :])
        with pytest.raises(CheckpointError, match=r"delta\.safetensors is not what was written"):
            delta_apply(tmp_path / "delta", models["onto"], tmp_path / "no")
    path.write_bytes(raw)
    (tmp_path / "delta" / "tokenizer.json").write_text("{}")
    with pytest.raises(CheckpointError):
        delta_apply(tmp_path / "delta", models["onto"], tmp_path / "no")
    (tmp_path / "delta" / "lapis-manifest.json").unlink()
    with pytest.raises(CheckpointError, match=r"lapis-manifest.json is missing|tokenizer.json"):
        delta_apply(tmp_path / "delta", models["onto"], tmp_path / "no")
    assert not (tmp_path / "no").exists()


def test_headers_of_strangers_are_refused(trio, tmp_path):
    """Every change of the description that does not fit the parts is one line, whatever it claims."""
    models = trio()
    delta_extract(models["base"], models["chat"], tmp_path / "delta", 4)
    path = tmp_path / "delta" / "delta.safetensors"
    raw = path.read_bytes()
    size = int.from_bytes(raw[:8], "little")
    head = json.loads(raw[8 : 8 + size])
    name = "model.layers.0.mlp.up_proj.weight"

    def write(change) -> None:
        description = json.loads(head["__metadata__"]["delta"])
        change(description)
        changed = {**head, "__metadata__": {**head["__metadata__"], "delta": json.dumps(description)}}
        text = json.dumps(changed).encode()
        path.write_bytes(len(text).to_bytes(8, "little") + text + raw[8 + size :])

    def entry(key, value):
        return lambda description: description["tensors"][name].update({key: value})

    changes = [
        entry("shape", [2**40, 2**19]), entry("shape", [-1, 3]), entry("shape", "x"), entry("shape", [3]),
        entry("code", "planes"), entry("code", "signs"), entry("code", "low-rank"), entry("code", "zip"),
        entry("code", ["x"]), entry("code", None), entry("dtype", "F4"), entry("dtype", 3), entry("rows", 2),
        entry("rows", 10**9), entry("template", True), entry("template", 1), entry("relative_error", "x"),
        lambda d: d["tensors"].pop(name), lambda d: d.update(tensors=[]), lambda d: d.update(tensors={}),
        lambda d: d.update(base=3), lambda d: d["base"].pop("weights_sha256"), lambda d: d["chat"].pop("source"),
        lambda d: d.update(bits="3"), lambda d: d.update(template_tokens=["a"]), lambda d: d.update(sample=["x"]),
        lambda d: d.update(sample=[]), lambda d: d.update(template_tokens=3), lambda d: d["tensors"].update(x=3),
    ]  # fmt: skip
    for change in changes:
        write(change)
        with pytest.raises(CheckpointError) as refusal:
            open_delta(tmp_path / "delta")
        assert "\n" not in str(refusal.value) and len(str(refusal.value)) < 1000
    for cut in (0, 7, 20, size // 2, len(raw) - 1):
        path.write_bytes(raw[:cut])
        with pytest.raises(CheckpointError):
            open_delta(tmp_path / "delta")
    path.write_bytes(raw)
    assert open_delta(tmp_path / "delta").bits == "4 bits"


# --- stopped and gone on with ---------------------------------------------------------------------------------------


class Stop(Exception):
    pass


@pytest.mark.parametrize("options", CODED, ids=str)
@pytest.mark.parametrize("after", [1, 9, 10**9])
def test_a_stopped_extraction_goes_on_to_the_same_bytes(trio, tmp_path, options, after, monkeypatch):
    """After the first tensors, in the middle, and when all but the commit was done."""
    models = trio()
    delta_extract(models["base"], models["chat"], tmp_path / "whole", **options)
    calls = 0

    def stop(done, total):
        nonlocal calls
        calls += 1
        if calls > after:
            raise Stop

    with monkeypatch.context() as patch, pytest.raises(Stop):
        if after == 10**9:
            patch.setattr("lapis.weights.delta.extract.write_beside", lambda *_: (_ for _ in ()).throw(Stop()))
        delta_extract(models["base"], models["chat"], tmp_path / "out", **options, progress=stop)
    assert not (tmp_path / "out").exists() and (tmp_path / ".out.lapis").exists()
    result = delta_extract(models["base"], models["chat"], tmp_path / "out", **options)
    assert result.bytes_resumed > 0
    assert files_of(tmp_path / "out") == files_of(tmp_path / "whole")


def test_a_replaced_input_is_not_mixed_in(trio, folders, tmp_path):
    models = trio()
    calls = 0

    def stop(done, total):
        nonlocal calls
        calls += 1
        if calls > 12:
            raise Stop

    with pytest.raises(Stop):
        delta_extract(models["base"], models["chat"], tmp_path / "out", progress=stop)
    tensors = folders.read(models["chat"])
    first = "model.layers.0.input_layernorm.weight"
    save_file(tensors | {first: tensors[first] + 1}, models["chat"] / "model.safetensors", metadata={"format": "pt"})
    delta_extract(models["base"], models["chat"], tmp_path / "out")
    delta_extract(models["base"], models["chat"], tmp_path / "fresh")
    assert files_of(tmp_path / "out") == files_of(tmp_path / "fresh")


def test_another_extraction_is_not_gone_on_with(trio, tmp_path):
    models = trio()

    def stop(done, total):
        raise Stop

    with pytest.raises(Stop):
        delta_extract(models["base"], models["chat"], tmp_path / "out", progress=stop)
    with pytest.raises(OutputError, match="a delta of the same inputs with other settings"):
        delta_extract(models["base"], models["chat"], tmp_path / "out", 4)
    delta_extract(models["base"], models["chat"], tmp_path / "out")


def test_tensors_of_many_tiles(folders, tmp_path, monkeypatch):
    """Tiles of another thread may come first; rows that are longer than a tile, and odd ends."""
    from lapis.weights.engine import tiles

    for module in ("lapis.weights.engine.tiles", "lapis.weights.delta.codes.code"):
        monkeypatch.setattr(f"{module}.TILE", 192)
    monkeypatch.setattr(writing, "AHEAD", 2)
    assert tiles.TILE == 192
    base = folders.weights(1)
    base["model.layers.0.mlp.up_proj.weight"] = torch.randn(7, 333).bfloat16()
    chat = folders.near(base, 2)
    for name, tensors in (("base", base), ("chat", chat), ("onto", folders.near(base, 3))):
        folders.write(tmp_path / name, tensors, config={"model_type": "unknown"}, vocab=folders.words())
    for number, options in enumerate(CODED):
        out = tmp_path / f"d{number}"
        result = delta_extract(tmp_path / "base", tmp_path / "chat", out, **options, embeddings="add")
        delta_apply(out, tmp_path / "onto", tmp_path / f"o{number}", embeddings="add", norms="add", dtype="float32")
        ours, onto = folders.read(tmp_path / f"o{number}"), folders.read(tmp_path / "onto")
        for line in result.errors:
            if "embed" in line["name"]:
                continue
            exact = chat[line["name"]].double() - base[line["name"]].double()
            added = ours[line["name"]].double() - onto[line["name"]].double()
            error = float((added - exact).norm() / exact.norm())
            assert error == pytest.approx(line["relative_error"], abs=1e-5)
