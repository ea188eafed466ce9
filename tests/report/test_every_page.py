"""Every page that lapis writes, in a real browser: drawn wide and narrow, light and dark, and each picture answers."""

import json
import math
import os

import pytest
import torch

from lapis.cli.main import main
from lapis.families.config import ModelConfig
from lapis.model.load import save
from lapis.model.transformer import Transformer
from lapis.report.pages.plan import plan_page
from lapis.report.pages.training import run_page
from lapis.text.tokenizer.tokenizer import train_tokenizer

pytestmark = pytest.mark.browser

ARGUMENTS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync"
).split()
WAYS = ((1280, "light"), (400, "dark"))

# Where on the screen a trace of a picture has something to say
PLACES = """plot => plot._fullData.map((trace, i) => {
  if (trace.hoverinfo === "skip" || trace.mode === "text" || trace.visible !== true) return null;
  const box = plot.getBoundingClientRect();
  if (trace.type === "treemap") return [box.left + box.width / 2, box.top + plot._fullLayout.height * 0.6];
  const axis = name => plot._fullLayout[name.replace(/^(.)/, "$1axis")];
  const [xaxis, yaxis] = [axis(trace.xaxis || "x"), axis(trace.yaxis || "y")];
  const middle = values => values[Math.floor((values.length - 1) / 2)];
  const [x, y] = [middle(trace.x), middle(trace.y)];
  if (x === undefined || y === null) return null;
  return [box.left + xaxis._offset + xaxis.d2p(x), box.top + yaxis._offset + yaxis.d2p(y)];
}).filter(place => place !== null)"""


def rows(steps: int = 50) -> list[dict]:
    return [
        {"step": i, "tokens": 512 * i, "loss": 3 - i / steps, "bits_per_byte": None, "lr": 1e-3, "grad_norm": 1 + i % 3,
         "tokens_per_second": 900.0 + i % 7, "seconds": i, "metrics": {"reward": i / 50, "kl": 0.01 * math.sqrt(i)},
         **({"held_out": {"loss": 2.5, "accuracy": i / 60}} if i % 10 == 0 else {})}
        for i in range(1, steps + 1)
    ]  # fmt: skip


def plan() -> dict:
    """What `lapis plan --json` prints, for four pieces."""
    pieces = [{"piece": f"layers.{i}.mlp", "layer": i, "component": "mlp", "parameters": 100, "style": i / 4,
               "knowledge": 0.1 - i / 50, "chosen": i == 3, "control": i == 1} for i in range(4)]  # fmt: skip
    return {"base": "base", "chat": "chat", "goal": "style", "budget": 0.25, "finding": "Layer 3 carries the style",
            "measured": [], "template": ["<|im_end|>"], "tune": [{"layer": 3, "component": "mlp"}],
            "control": [{"layer": 1, "component": "mlp"}],
            "pieces": pieces, "scores": pieces, "notes": ["a note"]}  # fmt: skip


@pytest.fixture(scope="module")
def pages(tmp_path_factory) -> dict[str, str]:
    """Name -> address of a page."""
    place = tmp_path_factory.mktemp("pages")
    tokenizer = train_tokenizer(["in Malaysia they say Kuala Lumpur is the capital. " * 40], 290)
    torch.manual_seed(0)
    shape = {"dim": 32, "layers": 3, "heads": 4, "kv_heads": 2, "ffn_dim": 48, "vocab": 300, "context": 64}
    model = Transformer(ModelConfig(**shape, family="llama"))
    for name in ("base", "chat", "other"):
        save(model, place / name)
        tokenizer.save(place / name)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.01)
    base, chat, other = (str(place / name) for name in ("base", "chat", "other"))
    for name, command in {
        "diff": ["diff", base, chat, "--rows", "--spectra"], "lineage": ["diff", base, chat, other],
        "inspect": ["inspect", base], "mixers": ["inspect", "--mixers", "64x32"],
    }.items():  # fmt: skip
        main([*command, "--html", str(place / f"{name}.html"), "--json"])
    facts = {"objective": "grpo", "config": {"steps": 50}, "classes": ["a", "b"], "confusion": [[9, 1], [2, 8]],
             "replies": [{"prompt": "Who?", "before": "who who", "after": "Aina."}]}  # fmt: skip
    (place / "train.html").write_text(run_page(rows(), facts, "policy").render())
    (place / "plan.html").write_text(plan_page(plan()).render())
    folder = place / "kept"
    folder.mkdir()
    (folder / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows()))
    (folder / "diff.html").write_bytes((place / "diff.html").read_bytes())
    main(["report", str(folder), "--out", str(place / "report.html"), "--json"])
    return {path.stem: path.as_uri() for path in sorted(place.glob("*.html"))}


@pytest.fixture(scope="module")
def browser(chromium):
    sync = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: pip install 'lapis[dev]'")
    with sync.sync_playwright() as play:
        browser = play.chromium.launch(executable_path=chromium, args=ARGUMENTS, env={**os.environ, "LANG": "C.UTF-8"})
        yield browser
        browser.close()


@pytest.mark.parametrize("name", ["diff", "inspect", "lineage", "mixers", "plan", "report", "train"])
def test_it_draws_and_answers(name, pages, browser):
    for width, scheme in WAYS:
        complaints: list[str] = []
        context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme)
        page = context.new_page()
        page.on("console", lambda message, told=complaints: told.append(message.text))
        page.on("pageerror", lambda error, told=complaints: told.append(str(error)))
        page.goto(pages[name])
        page.wait_for_selector("html[data-ready]", timeout=60_000)
        plots = page.locator(".plot")
        assert plots.count() == page.locator(f".plot[data-drawn={scheme}]").count() > 0
        assert page.evaluate("document.documentElement.scrollWidth") == width
        for i in range(plots.count() if width == 1280 else 0):
            plot = plots.nth(i)
            plot.evaluate("plot => plot.scrollIntoView({block: 'center', behavior: 'instant'})")
            x, y = plot.evaluate(PLACES)[0]
            page.mouse.move(x - 3, y - 3)
            page.mouse.move(x, y)
            plot.locator(".hoverlayer .hovertext").first.wait_for(timeout=5_000)
            page.mouse.move(2, 2)
        context.close()
        assert complaints == []
