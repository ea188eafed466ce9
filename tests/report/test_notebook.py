"""Objects in a notebook: what IPython would show of them, and extras that are really there."""

import ast
import tomllib
from pathlib import Path

import pytest
import torch

import lapis
from lapis.checkpoint.tensor_file import header_bytes


def models(place: Path) -> tuple[Path, Path]:
    """Two tiny folders of two layers that differ a little."""
    torch.manual_seed(0)
    names = [f"model.layers.{i}.mlp.up_proj.weight" for i in range(2)]
    values = {name: torch.randn(6, 4) for name in names}
    for number, folder in enumerate((place / "a", place / "b")):
        folder.mkdir()
        (folder / "config.json").write_text('{"model_type": "llama"}')
        with (folder / "model.safetensors").open("wb") as file:
            file.write(header_bytes(dict.fromkeys(names, ("F32", (6, 4))), {}))
            for name in names:
                file.write((values[name] * (1 + 0.1 * number)).numpy().tobytes())
    return place / "a", place / "b"


def test_a_table_of_differences_shows_itself_in_a_notebook(tmp_path):
    result = lapis.diff(*models(tmp_path))
    shown = result._repr_mimebundle_()
    assert shown["text/plain"] == str(result)
    assert result.finding() in shown["text/html"] and "<td" in shown["text/html"]
    display = pytest.importorskip("IPython.core.formatters", reason="IPython is not installed").DisplayFormatter()
    formats, _ = display.format(result)
    assert formats["text/html"] == shown["text/html"]
    assert result.plot().data and len(result.to_pandas()) == 2


def test_every_extra_that_a_message_names_can_be_installed():
    root = Path(lapis.__file__).parents[2]
    extras = tomllib.loads((root / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    named = set()
    for path in (root / "src").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "MissingExtra":
                assert isinstance(node.args[1], ast.Constant), path
                named.add(node.args[1].value)
    assert named and named <= set(extras)
    assert any(need.startswith("transformers") for need in extras["hf"])
