"""`lapis lens`: the keys that other programs rely on, the page in a browser, and what bad input gets."""

import json
import os
import re
from pathlib import Path
from typing import Any

import pytest
import torch

import lapis
from lapis.cli.main import main
from lapis.families.config import ModelConfig
from lapis.model.load import save
from lapis.model.transformer import Transformer
from lapis.text.tokenizer.tokenizer import train_tokenizer

TEXT = "in Malaysia they say Kuala Lumpur is the capital of Malaysia, and Jakarta of Indonesia. "
PROMPT = "the capital of Malaysia is"
ARGUMENTS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync"
).split()
# Where on the screen the middle point of a picture's first line lies
MIDDLE_POINT = """plot => {
  const trace = plot._fullData.find(trace => trace.visible === true && trace.hoverinfo !== "skip");
  const [box, layout, i] = [plot.getBoundingClientRect(), plot._fullLayout, Math.floor(trace.x.length / 2)];
  return [box.left + layout.xaxis._offset + layout.xaxis.d2p(trace.x[i]),
          box.top + layout.yaxis._offset + layout.yaxis.d2p(trace.y[i])];
}"""


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> list[str]:
    """Two models of one shape, an encoder, and a model with NaN, all with one tokenizer."""
    root = tmp_path_factory.mktemp("lens")
    tokenizer = train_tokenizer([TEXT * 40], 320)
    shape = {"dim": 32, "heads": 4, "ffn_dim": 48, "vocab": tokenizer.vocab_size, "context": 40}
    bert = {"causal": False, "norm_place": "post", "norm": "layer", "positions": "learned", "bias": "all",
            "mlp": "gelu", "types": 2, "tied": True, "family": "bert", "head": "masked"}  # fmt: skip
    result = []
    for seed, name in enumerate(("one", "other", "encoder", "damaged")):
        torch.manual_seed(seed)
        model = Transformer(ModelConfig(**shape, layers=3, **(bert if name == "encoder" else {})))
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.15)
            if name == "damaged":
                model.blocks[1].mlp.up.weight[3, 5] = torch.nan
        save(model, root / name)
        tokenizer.save(root / name)
        result.append(str(root / name))
    return result


def run(capsys, *arguments: str) -> tuple[Any, str, str]:
    with pytest.raises(SystemExit) as end:
        main(["lens", *arguments])
        raise SystemExit(0)
    out, err = capsys.readouterr()
    return end.value.code, out, err


def test_json_is_one_object_and_nothing_else(folders, capsys):
    status, out, err = run(capsys, folders[0], PROMPT, "--track", "Kuala, Jakarta", "--json")
    result = json.loads(out)
    assert (status, err) == (0, "") and result["tokens"][3] == " Malaysia"
    assert [layer["layer"] for layer in result["layers"]] == [0, 1, 2]
    for layer in result["layers"]:
        assert layer["entropy"] > 0 and layer["kl_to_final"] >= 0 and len(layer["top"]) == 10
        assert set(layer["ranks"]) == {"Kuala", "Jakarta"}
    status, out, _ = run(capsys, folders[0], PROMPT, "--against", folders[1], "--head", "swapped", "--json")
    result = json.loads(out)
    assert status == 0 and len(result["against"]["layers"]) == 3 and result["head"] == folders[1]


def test_people_see_every_layer_and_what_wrote_the_word(folders, capsys):
    status, out, _ = run(capsys, folders[0], PROMPT, "--track", "Kuala")
    assert status == 0 and "embed" in out and "Kuala" in out and "added to the logit" in out
    assert re.search(r'did most to \w+ "Kuala": it added \+[\d.]+ to the logit, all parts together [+-][\d.]+', out)
    assert len([line for line in out.splitlines() if line.strip()[:1] in "012"]) >= 3


def test_a_tuned_lens_is_made_once_and_used_again(folders, tmp_path, capsys):
    text = tmp_path / "text.txt"
    text.write_text(TEXT * 900)
    place = str(tmp_path / "tuned")
    status, out, _ = run(capsys, folders[0], PROMPT, "--tuned", place, "--tune", str(text), "--json")
    assert status == 0 and json.loads(out)["tuned"] == place
    assert run(capsys, folders[0], PROMPT, "--tuned", place, "--json")[1] == out
    assert "exists already" in run(capsys, folders[0], PROMPT, "--tuned", place, "--tune", str(text))[2]
    assert "another model" in run(capsys, folders[1], PROMPT, "--tuned", place)[2]


@pytest.fixture(scope="module")
def bfloat16_folder(folders, tmp_path_factory) -> str:
    """The first model, its weights in bfloat16 on disk."""
    root = tmp_path_factory.mktemp("bfloat16") / "model"
    model, tokenizer = lapis.load(folders[0])
    save(model.bfloat16(), root)
    tokenizer.save(root)
    return str(root)


def test_what_dtype_says_is_what_is_computed(bfloat16_folder, capsys):
    result = json.loads(run(capsys, bfloat16_folder, PROMPT, "--track", "Kuala", "--dtype", "float32", "--json")[1])
    model, tokenizer = lapis.load(bfloat16_folder, torch.float32)
    with torch.inference_mode():
        logits = model(torch.tensor([tokenizer.encode(PROMPT)]))[0, -1].double()
    exact = logits.log_softmax(-1)
    assert result["layers"][-1]["entropy"] == pytest.approx(-(exact.exp() * exact).sum().item(), rel=1e-5)
    rounded = json.loads(run(capsys, bfloat16_folder, PROMPT, "--track", "Kuala", "--dtype", "bfloat16", "--json")[1])
    assert rounded["layers"][-1]["entropy"] != result["layers"][-1]["entropy"]


def test_a_page_changes_no_figure(bfloat16_folder, tmp_path, capsys):
    command = (bfloat16_folder, PROMPT, "--track", "Kuala, zebra", "--json")
    plain = json.loads(run(capsys, *command)[1])
    paged = json.loads(run(capsys, *command, "--html", str(tmp_path / "page.html"))[1])
    for key in ("embedding", "layers", "contributions", "words"):
        assert plain[key] == paged[key]


def test_a_typed_space_and_the_followed_token_reach_the_page(folders, tmp_path, capsys):
    page = tmp_path / "page.html"
    out = run(capsys, folders[0], PROMPT, "--track", " Malaysia, zebra", "--html", str(page), "--json")[1]
    result = json.loads(out)
    assert set(result["layers"][0]["ranks"]) == {" Malaysia", "zebra"}
    for layer in (result["embedding"], *result["layers"]):
        assert layer["ranks"][" Malaysia"] == layer["spellings"][" Malaysia"]["rank"]
    text = page.read_text()
    assert "␣Malaysia" in text and result["words"][1]["label"] in text and "(its piece " in result["words"][1]["label"]


def test_two_models_stand_side_by_side_in_one_table(folders, tmp_path, capsys):
    page = tmp_path / "page.html"
    run(capsys, folders[0], PROMPT, "--track", "Kuala", "--against", folders[1], "--html", str(page))
    text = page.read_text()
    table = text[text.index("Side by side, at the last token") :].split("</table>")[0]
    assert re.findall(r'<th scope="colgroup" colspan="(\d)">([^<]*)</th>', table) == [
        ("2", "one"), ("2", "other"), ("1", "rank, one"), ("1", "rank, other"),
    ]  # fmt: skip
    assert re.findall(r'<th scope="row">([^<]*)</th>', table) == ["embed", "0", "1", "2"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("one", "the " * 50), "the context of"),
        (("one", ""), "the prompt is empty"),
        (("encoder", PROMPT), "is an encoder (bert)"),
        (("damaged", PROMPT), "model.layers.1.mlp.up_proj.weight holds 1 NaN or Inf"),
        (("nowhere", PROMPT), "there is no such folder"),
        (("one", PROMPT, "--head", "swapped"), "--head swapped is for --against"),
        (("one", PROMPT, "--tune", "x.txt"), "say with --tuned DIR"),
        (("one", PROMPT, "--positions", "0"), "positions is 0"),
        (("one", PROMPT, "--against", "encoder"), "is an encoder"),
    ],
)
def test_bad_input_gets_one_line(folders, capsys, monkeypatch, arguments, said):
    monkeypatch.chdir(Path(folders[0]).parent)
    status, out, err = run(capsys, *arguments)
    assert status == 1 and out == "" and said in err and err.count("\n") == 1


def test_an_existing_page_is_kept_unless_told(folders, tmp_path, capsys):
    page = tmp_path / "page.html"
    page.write_text("mine")
    status, _, err = run(capsys, folders[0], PROMPT, "--html", str(page))
    assert status == 1 and "exists already" in err and page.read_text() == "mine"
    assert run(capsys, folders[0], PROMPT, "--html", str(page), "--overwrite")[0] == 0
    assert page.read_text().startswith("<!doctype html>")


@pytest.mark.browser
def test_pages_draw_without_complaint_wide_and_narrow_and_hover(folders, tmp_path, chromium, capsys):
    sync = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: pip install 'lapis[dev]'")
    alone, beside = tmp_path / "alone.html", tmp_path / "beside.html"
    run(capsys, folders[0], PROMPT, "--track", "Kuala,Jakarta", "--html", str(alone))
    run(capsys, folders[0], PROMPT, "--against", folders[1], "--html", str(beside))
    complaints: list[str] = []
    with sync.sync_playwright() as play:
        browser = play.chromium.launch(executable_path=chromium, args=ARGUMENTS, env={**os.environ, "LANG": "C.UTF-8"})
        for file, width in ((alone, 1280), (beside, 400)):
            page = browser.new_page(viewport={"width": width, "height": 900})
            page.on("console", lambda message: complaints.append(message.text))
            page.on("pageerror", lambda error: complaints.append(str(error)))
            page.goto(file.as_uri())
            page.wait_for_selector("html[data-ready]", timeout=60_000)
            plots = page.locator(".plot")
            plots.nth(plots.count() - 1).locator(".main-svg").first.wait_for(timeout=60_000)
            assert page.evaluate("document.documentElement.scrollWidth") == width
            if width == 1280:
                plots.first.scroll_into_view_if_needed()
                x, y = plots.first.evaluate(MIDDLE_POINT)
                page.mouse.move(x - 2, y - 2)
                page.mouse.move(x, y)
                page.wait_for_selector(".hoverlayer .hovertext")
                assert "layer" in page.locator(".hoverlayer .hovertext").first.text_content()
            page.close()
        browser.close()
    assert complaints == []
