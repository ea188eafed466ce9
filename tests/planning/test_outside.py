"""Plans of models that run through transformers: the same as lapis' own, and true to models that were written."""

import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import transformers

import lapis
from lapis.checkpoint import open_checkpoint
from lapis.checkpoint.tensor_file import read_tensors, write_tensors
from lapis.errors import CheckpointError
from lapis.model.reading import places
from lapis.model.reading.opening import load_outside
from lapis.model.reading.places import places_of, tensors_of
from lapis.planning.pieces import Bench, pieces_of
from lapis.text.chat.chat import encode_chat

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()

SIZES = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "vocab_size": 300}
LLAMA = {**SIZES, "num_key_value_heads": 2, "intermediate_size": 40, "max_position_embeddings": 64}
EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
KINDS = {
    "opt": {**SIZES, "ffn_dim": 48, "word_embed_proj_dim": 32, "max_position_embeddings": 64, "dropout": 0.0},
    "falcon": {**SIZES, "new_decoder_architecture": True, "num_kv_heads": 2},
    "bloom": {"hidden_size": 32, "n_layer": 3, "n_head": 4, "vocab_size": 300},
    "mpt": {"d_model": 32, "n_layers": 3, "n_heads": 4, "vocab_size": 300, "max_seq_len": 64},
    "mamba": {"hidden_size": 32, "num_hidden_layers": 3, "vocab_size": 300, "state_size": 4},
    "minimax": {**LLAMA, **EXPERTS, "block_size": 16},
    "granitemoe": {**LLAMA, **EXPERTS},
}


def made(kind: str, rows: int = 300):
    torch.manual_seed(0)
    config = transformers.CONFIG_MAPPING[kind](**{**KINDS[kind], "vocab_size": rows})
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return model


def rows_of(pair):
    return [encode_chat(pair.tokenizer, record) for record in pair.records]


def mean_nll(model, rows) -> float:
    """Nats per token of the replies, by transformers alone."""
    total, count = 0.0, 0
    for ids, scored in rows:
        with torch.inference_mode():
            logits_TV = model(torch.tensor([ids])).logits[0].double().log_softmax(-1)
        picked = [-float(logits_TV[t - 1, ids[t]]) for t in range(1, len(ids)) if scored[t]]
        total, count = total + sum(picked), count + len(picked)
    return total / count


@pytest.fixture(scope="module", params=["opt", "falcon", "minimax"])
def foreign(request, pair, tmp_path_factory):
    """base and chat of a family that lapis does not run, chat tuned on the replies."""
    root = tmp_path_factory.mktemp(request.param)
    model = made(request.param, pair.tokenizer.rows)
    folders = {}
    for name in ("base", "chat"):
        folders[name] = root / name
        model.save_pretrained(folders[name])
        pair.tokenizer.save(folders[name])
        if name == "base":
            optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
            for _ in range(12):
                optimizer.zero_grad()
                for ids, scored in rows_of(pair):
                    keep = torch.tensor(scored[1:])
                    logits_TV = model(torch.tensor([ids[:-1]])).logits[0]
                    torch.nn.functional.cross_entropy(logits_TV[keep], torch.tensor(ids[1:])[keep]).backward()
                optimizer.step()
    return SimpleNamespace(**folders, kind=request.param, root=root)


@pytest.mark.parametrize("graft", [False, True])
def test_a_plan_equals_that_of_lapis_own_model(pair, graft):
    """The same folders, once run by lapis and once by transformers."""
    options = {"chats": pair.chats, "text": pair.text, "choices": pair.choices, "budget": 0.4, "draws": 2}
    options |= {"pieces": "halves"} if graft else {"pieces": "components"}
    folders = [pair.base, pair.chat, *([pair.onto] if graft else [])]
    plans = []
    for family in ("own", "transformers"):
        opened = [open_checkpoint(folder) for folder in folders]
        if family == "transformers":
            opened = [replace(checkpoint, family=None) for checkpoint in opened]
        base, chat, *onto = opened
        plans.append(lapis.plan(base, chat, onto=onto[0] if onto else None, **options))
    own, theirs = plans
    assert any("runs through transformers" in note for note in theirs.notes)
    assert not any("runs through transformers" in note for note in own.notes)
    assert theirs.tune == own.tune and theirs.control == own.control and theirs.template == own.template
    for mine, other in zip([*own.pieces, *own.scores], [*theirs.pieces, *theirs.scores], strict=True):
        figures = {key: value for key, value in mine.items() if isinstance(value, float)}
        assert {key: other[key] for key in figures} == pytest.approx(figures, rel=2e-3, abs=2e-5), mine["layer"]
    for mine, other in zip(own.scales, theirs.scales, strict=True):
        assert other["scale"] == pytest.approx(mine["scale"], abs=2e-3) and other["components"] == mine["components"]
    for name, figures in own.measured.items():
        assert theirs.measured[name] == pytest.approx(figures, rel=2e-3, abs=2e-5), name
    assert theirs.passes > own.passes  # it is run whole each time


def test_figures_are_those_of_models_that_were_written(pair, foreign):
    """A piece's tensors are copied from chat into base on disk, and transformers scores what came of it."""
    plan = lapis.plan(
        foreign.base, foreign.chat, chats=pair.chats, text=pair.text, budget=0.4, draws=1, replies=False,
        embeddings="keep",
    )  # fmt: skip
    rows, checkpoint = rows_of(pair), open_checkpoint(foreign.base)
    pieces = {piece.label: piece for piece in pieces_of(checkpoint, "halves")}
    assert set(pieces) == {row["layer"] for row in plan.pieces if row["layer"] not in ("embed", "head")}
    own, other = (read_tensors(folder / "model.safetensors") for folder in (foreign.base, foreign.chat))
    tables = [name for name in own if checkpoint.part(name).component in ("embed", "head")]
    ids = [pair.tokenizer.id(token) for token in ("<|im_start|>", "<|im_end|>")]
    for row in plan.pieces:
        if row["layer"] not in pieces:
            continue
        changed = {name: other[name] if name in pieces[row["layer"]].names else value for name, value in own.items()}
        for table in tables:
            changed[table] = changed[table].clone()
            changed[table][ids] = other[table][ids]
        config = transformers.AutoConfig.from_pretrained(foreign.base)
        kind = transformers.MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
        model = kind.from_pretrained(None, config=config, state_dict=changed)
        assert row["response_nll_in"] == pytest.approx(mean_nll(model.eval(), rows), rel=2e-4), row["layer"]
    taken = sum(pieces[label].parameters for label in pieces if label in {row["layer"] for row in plan.pieces})
    assert taken == sum(piece.parameters for piece in pieces_of(checkpoint, "layers"))


def test_the_command_plans_and_graft_reads_it(pair, foreign, tmp_path, capsys):
    out = tmp_path / "plan.yaml"
    status = lapis_status(
        "plan", "--base", foreign.base, "--chat", foreign.chat, "--budget", 0.4, "--chats", pair.chats, "--text",
        pair.text, "--out", out, "--html", tmp_path / "plan.html", "--draws", 1, "--json",
    )  # fmt: skip
    printed = capsys.readouterr()
    assert status == 0, printed.err
    result = json.loads(printed.out)
    assert result["model"]["family"] == foreign.kind and result["measured"]["chosen"]["style"] > 0
    assert any("runs through transformers" in note for note in result["notes"])
    status = lapis_status(
        "graft", "--base", foreign.base, "--chat", foreign.chat, "--onto", foreign.base, "--out", tmp_path / "grafted",
        "--scale", out,
    )  # fmt: skip
    assert status == 0, capsys.readouterr().err
    checkpoint = open_checkpoint(foreign.base)
    chosen = {(line["layer"], line["component"]) for line in result["tune"]}
    rows = {row["name"]: row for row in lapis.diff(foreign.base, tmp_path / "grafted").tensors}
    for piece in pieces_of(checkpoint, "halves"):
        moved = max(rows[name]["relative_norm"] for name in piece.names)
        assert (moved > 0) == ((piece.layer, piece.component) in chosen), piece.label


def lapis_status(*arguments) -> int:
    from lapis.cli.main import main

    try:
        main([str(argument) for argument in arguments])
    except SystemExit as stop:
        return int(stop.code or 0)
    return 0


@pytest.mark.parametrize("kind", KINDS)
def test_put_makes_chat_of_base_and_base_again(kind, tmp_path):
    """With all of chat's tensors put in, the model gives transformers' logits of chat; then those of base."""
    base, chat = tmp_path / "base", tmp_path / "chat"
    model = made(kind)
    ids_BT = torch.arange(3, 23)[None]
    logits = []
    for folder in (base, chat):
        model.save_pretrained(folder)
        with torch.inference_mode():
            logits.append(model(ids_BT).logits)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.03)
    assert (logits[0] - logits[1]).abs().max() > 0.01
    one, two = open_checkpoint(base), open_checkpoint(chat)
    bench = Bench(one, one, two)
    assert all(bench.movable(name) for name in one.names)
    for side, expected in (("chat", logits[1]), ("home", logits[0])):
        bench.put(one.names, side)
        with torch.inference_mode():
            assert (bench.model(ids_BT) - expected).abs().max() <= 1e-5


def test_a_tensor_that_is_computed_with_on_loading_is_refused(tmp_path, monkeypatch):
    """What transformers holds is not what lies on the disk: nothing is put in its place."""
    made("opt").save_pretrained(tmp_path)
    checkpoint = open_checkpoint(tmp_path)
    model = load_outside(checkpoint, torch.float32)
    name = "inner.model.decoder.layers.1.fc1.weight"
    with torch.no_grad():
        tensors_of(model)[name].add_(1)
    with pytest.raises(CheckpointError, match=r"computes with .*layers.1.fc1.weight as it loads") as error:
        places_of(checkpoint, model)
    assert "\n" not in str(error.value)


def test_a_changed_tensor_without_a_place_is_refused(tmp_path):
    """A layer's tensor that the model does not take cannot be planned with where it differs."""
    base, chat = tmp_path / "base", tmp_path / "chat"
    for folder, value in ((base, 0.0), (chat, 1.0)):
        made("opt").save_pretrained(folder)
        path = folder / "model.safetensors"
        write_tensors(path, {**read_tensors(path), "model.decoder.layers.1.spare.weight": torch.full((3,), value)})
    one, two = open_checkpoint(base), open_checkpoint(chat)
    with pytest.raises(CheckpointError, match=r"layers.1.spare.weight has no place"):
        Bench(one, one, two)
    assert Bench(one, one, one).movable("model.decoder.layers.1.fc1.weight")


def test_boxes_are_told_apart_only_where_cut_straight():
    stacked = torch.tensor([1.0, 2.0, 3.0])[:, None, None].repeat(1, 4, 2)
    stacked[:, 2:] += 10
    found = {number: tuple(index) for number, index in places._boxes(stacked)}
    assert found[12.0] == (slice(1, 2), slice(2, 4), slice(0, 2)) and len(found) == 6
    assert list(places._boxes(torch.tensor([[1.0, 1.0], [1.0, 2.0]]))) == []
