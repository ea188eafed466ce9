"""What `import lapis` offers: names, signatures and docstrings that programs rely on, and one version."""

import ast
import importlib.metadata
import inspect
import tomllib
from pathlib import Path

import pytest

import lapis
import lapis.errors
from lapis.training import objectives

ROOT = Path(__file__).parents[1]

ERRORS = [
    "CheckpointError", "ConfigError", "DataError", "LapisError", "MissingExtra", "OutputError", "TemplateError",
    "TrainingError",
]  # fmt: skip
OBJECTIVES = [
    "Causal", "Chat", "Classify", "DPO", "GRPO", "IPO", "KTO", "Masked", "ORPO", "PPO", "RLOO", "Reward", "SimPO",
]  # fmt: skip
FUNCTIONS = {
    "activation_difference": ["a", "b", "files", "options"],
    "delta_apply": ["delta", "onto", "out", "scale", "embeddings", "norms"],
    "delta_extract": ["base", "chat", "out", "bits", "rank"],
    "diff": ["a", "b", "rows", "spectra", "directions"],
    "explain": ["model", "tokenizer", "text", "track", "options"],
    "export_gguf": ["model", "out"],
    "adapt": ["plan"],
    "extend": ["model", "files", "out"],
    "fertility": ["model", "files"],
    "generate": ["model", "tokenizer", "prompt", "sampling"],
    "graft": ["base", "chat", "onto", "out", "scale", "embeddings", "norms"],
    "import_gguf": ["file", "out"],
    "lens": ["model", "tokenizer", "prompt", "track"],
    "load": ["source", "dtype", "device"],
    "merge": ["recipe", "out"],
    "open": ["source"],
    "open_delta": ["source"],
    "patch": ["model", "other", "tokenizer", "prompt", "track"],
    "plan": ["base", "chat", "goal", "budget"],
    "prompt_states": ["model"],
    "serve": ["models", "options", "runtime"],
    "push": ["folder", "name"],
    "steer": ["model", "vectors", "layer", "strength", "place"],
    "train": ["model", "objective", "config", "out"],
}
TYPES = ["Checkpoint", "ModelConfig", "Objective", "Sampling", "Tokenizer", "TrainConfig", "Transformer"]


def test_public_names_are_pinned() -> None:
    assert sorted(lapis.__all__) == sorted([*ERRORS, *OBJECTIVES, *FUNCTIONS, *TYPES, "__version__"])
    for name in lapis.__all__:
        assert getattr(lapis, name) is not None
    assert set(dir(lapis)) == set(lapis.__all__)


def test_every_error_is_public() -> None:
    defined = {name for name, value in vars(lapis.errors).items() if inspect.isclass(value)}
    assert defined == set(ERRORS)
    for name in ERRORS:
        assert getattr(lapis, name) is getattr(lapis.errors, name)
        assert issubclass(getattr(lapis, name), lapis.LapisError)


def test_every_objective_is_public() -> None:
    classes = {objectives.objective_class(name) for name in objectives.OBJECTIVES}
    assert classes == {getattr(lapis, name) for name in OBJECTIVES}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions_show_their_parameters(name: str) -> None:
    function = getattr(lapis, name)
    signature = inspect.signature(function)
    kinds = {parameter.kind for parameter in signature.parameters.values()}
    assert not kinds & {inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD}
    positional = [p.name for p in signature.parameters.values() if p.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD]
    assert positional[: len(FUNCTIONS[name])] == FUNCTIONS[name]
    assert signature.return_annotation is not inspect.Signature.empty


@pytest.mark.parametrize("name", [*FUNCTIONS, *OBJECTIVES, *TYPES, *ERRORS])
def test_every_public_name_has_a_docstring(name: str) -> None:
    own = getattr(lapis, name).__doc__
    assert own and not own.startswith(f"{name}(")  # what dataclass writes where nobody did


def test_type_checkers_see_what_is_imported_lazily() -> None:
    source = ast.parse(Path(lapis.__file__).read_text(encoding="utf-8"))
    block = next(n for n in source.body if isinstance(n, ast.If) and ast.unparse(n.test) == "TYPE_CHECKING")
    typed = {
        alias.asname or alias.name: f"{node.module}:{alias.name}"
        for node in block.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    entries = [
        (module, *entry.partition("=")[::2]) for module, names in lapis._PUBLIC.items() for entry in names.split()
    ]
    lazy = {name: f"{module}:{there or name}" for module, name, there in entries}
    assert typed == lazy


def test_the_version_is_written_once() -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    assert "version" not in settings["project"] and "version" in settings["project"]["dynamic"]
    assert settings["tool"]["setuptools"]["dynamic"]["version"] == {"attr": "lapis.__version__"}
    assert importlib.metadata.version("lapis") == lapis.__version__
