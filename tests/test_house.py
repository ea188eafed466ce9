"""The house keeps its order: who imports whom, what is public, what is never written."""

import ast
import subprocess
import sys
from pathlib import Path

import lapis

SOURCE = Path(lapis.__file__).parent

# room -> rooms that it may import; errors and config are free to all
MAY_IMPORT = {
    "families": set(),
    "checkpoint": {"families"},
    "text": {"checkpoint"},
    "model": {"checkpoint", "families", "text"},
    "weights": {"checkpoint", "families", "report"},
    "generation": {"checkpoint", "model", "text"},
    "evaluation": {"checkpoint", "families", "generation", "model", "text"},
    "training": {"model", "text", "checkpoint", "families", "generation", "evaluation"},
    "inside": {"checkpoint", "families", "model", "text", "report"},
    "planning": {"checkpoint", "evaluation", "families", "model", "report", "text", "weights"},
    "report": set(),
    "tour": {"checkpoint", "evaluation", "families", "generation", "model", "report", "text", "training", "weights"},
    "cli": {
        "checkpoint", "evaluation", "families", "generation", "inside", "model", "planning", "report", "text", "tour",
        "training", "weights",
    },
}  # fmt: skip


def imports(path: Path) -> set[str]:
    """Full names of the modules that a file imports, also inside functions."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names |= {f"{node.module}.{alias.name}" for alias in node.names} | {str(node.module)}
    return names


def test_rooms_import_only_what_the_design_allows() -> None:
    wrong = []
    for path in SOURCE.rglob("*.py"):
        room = path.relative_to(SOURCE).parts[0]
        if room not in MAY_IMPORT:
            continue
        for name in imports(path):
            parts = name.split(".")
            other = parts[1] if parts[0] == "lapis" and len(parts) > 1 else room
            if other in MAY_IMPORT and other != room and other not in MAY_IMPORT[room]:
                wrong.append(f"{path.relative_to(SOURCE)} imports {name}")
    assert not wrong, "\n".join(wrong)


def test_other_libraries_stay_outside() -> None:
    forbidden = {"transformers", "peft", "trl", "mergekit", "lm_eval", "pickle", "dill", "joblib"}
    adapters = {("evaluation/harness.py", "lm_eval")}  # the file that an extra is for
    found = {
        f"{path.relative_to(SOURCE)}: {name}"
        for path in SOURCE.rglob("*.py")
        for name in imports(path)
        if name.split(".")[0] in forbidden and (path.relative_to(SOURCE).as_posix(), name.split(".")[0]) not in adapters
    }
    assert not found


def test_public_names_are_pinned() -> None:
    assert lapis.__all__ == [
        "Causal", "Chat", "Checkpoint", "Classify", "LapisError", "Masked", "ModelConfig", "Sampling", "Tokenizer",
        "TrainConfig", "Transformer", "__version__", "diff", "generate", "graft", "lens", "load", "merge", "open",
        "plan", "train",
    ]  # fmt: skip
    for name in lapis.__all__:
        assert getattr(lapis, name) is not None


def test_files_are_short_and_no_room_is_a_junk_drawer() -> None:
    for path in SOURCE.rglob("*.py"):
        assert len(path.read_text(encoding="utf-8").splitlines()) <= 400, path
        assert path.stem not in {"utils", "util", "common", "helpers", "misc"}, path


def test_help_imports_no_torch_and_lapis_no_heavy_library() -> None:
    def loaded(code: str) -> set[str]:
        script = f"import sys\n{code}\nprint(*sorted({{m.split('.')[0] for m in sys.modules}}))"
        return set(subprocess.run([sys.executable, "-c", script], capture_output=True, text=True).stdout.split())

    help_ = "from lapis.cli.main import main\ntry: main(['--help'])\nexcept SystemExit: pass"
    assert not loaded(help_) & {"torch", "numpy", "transformers", "plotly"}
    assert not loaded("import lapis, lapis.evaluation, lapis.generation, lapis.training, lapis.model") & {
        "torch",
        "transformers",
        "plotly",
        "fastapi",
        "lm_eval",
    }
