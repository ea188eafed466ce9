"""docs/api.md from the docstrings of the public names. `make docs` writes it; a test says when it is old.

    python scripts/api_page.py [--check]

Reads source text only, so that nothing is imported but lapis itself, and every Python gives the same page.
"""

import ast
import importlib.util
import inspect
import re
import sys
from pathlib import Path

import lapis

PAGE = Path(__file__).parents[1] / "docs" / "api.md"
SECTIONS = {
    "Functions": [
        "open", "load", "generate", "train", "lens", "explain", "patch", "diff", "activation_difference", "steer",
        "plan", "graft", "merge", "prompt_states", "delta_extract", "delta_apply", "open_delta", "fertility", "extend",
        "adapt", "push", "export_gguf", "import_gguf", "serve",
    ],
    "Types": ["Checkpoint", "ModelConfig", "Transformer", "Tokenizer", "Sampling", "TrainConfig"],
    "Objectives": [
        "Objective", "Causal", "Masked", "Classify", "Chat", "Reward", "DPO", "IPO", "KTO", "ORPO", "SimPO", "GRPO",
        "RLOO", "PPO",
    ],
    "Errors": [
        "LapisError", "CheckpointError", "ConfigError", "DataError", "TemplateError", "OutputError", "TrainingError",
        "MissingExtra",
    ],
}  # fmt: skip
HEAD = """# The Python API

Made from the docstrings by `make docs`. Everything here is imported from `lapis` and loaded when it is first used;
`import lapis` itself loads no torch. The options of every command are in `lapis COMMAND --help`.
"""
Definition = ast.FunctionDef | ast.ClassDef


def definition(name: str) -> Definition:
    """Where a public name is defined."""
    module, there = "lapis", name
    for candidate, entries in lapis._PUBLIC.items():
        for entry in entries.split():
            public, _, other = entry.partition("=")
            if public == name:
                module, there = candidate, other or public
    return search(module, there)


def search(module: str, name: str) -> Definition:
    """A top-level function or class of a module, also one that the module imports from another of lapis."""
    spec = importlib.util.find_spec(module)
    assert spec and spec.origin, module
    tree = ast.parse(Path(spec.origin).read_text(encoding="utf-8"))
    for node in tree.body:
        if isinstance(node, Definition) and node.name == name:
            return node
        if isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                if (alias.asname or alias.name) == name:
                    return search(node.module, alias.name)
    raise SystemExit(f"{module} defines no {name}")


def signature(name: str, function: ast.FunctionDef, *, method: bool = False) -> str:
    """As it is written, one parameter a line where a function's is long. method: in one line, without `self`."""
    function = Unquoted().visit(ast.parse(ast.unparse(function)).body[0])
    if method and not any(ast.unparse(d) == "staticmethod" for d in function.decorator_list):
        del function.args.args[0]
    pieces = parameters(function.args)
    returns = f" -> {ast.unparse(function.returns)}" if function.returns else ""
    line = f"{name}({', '.join(pieces)}){returns}"
    return line if method or len(line) <= 100 else f"{name}(\n    " + ",\n    ".join(pieces) + f",\n){returns}"


class Unquoted(ast.NodeTransformer):
    """Annotations without their quotes."""

    def visit_arg(self, node: ast.arg) -> ast.arg:
        node.annotation = self.plain(node.annotation)
        return node

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.FunctionDef:
        node.returns = self.plain(node.returns)
        node.args = self.visit(node.args)
        return node

    @staticmethod
    def plain(annotation: ast.expr | None) -> ast.expr | None:
        if isinstance(annotation, ast.Constant) and isinstance(annotation.value, str):
            return ast.parse(annotation.value, mode="eval").body
        return annotation


def parameters(arguments: ast.arguments) -> list[str]:
    """Each parameter with its annotation and default."""
    plain = arguments.posonlyargs + arguments.args
    defaults: list[ast.expr | None] = [None] * (len(plain) - len(arguments.defaults)) + list(arguments.defaults)
    pieces = []
    for i, (argument, default) in enumerate([*zip(plain, defaults, strict=True)]):
        pieces.append(ast.unparse(argument) + (f" = {ast.unparse(default)}" if default else ""))
        if arguments.posonlyargs and i + 1 == len(arguments.posonlyargs):
            pieces.append("/")
    if arguments.kwonlyargs:
        pieces.append("*")
    for argument, default in zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True):
        pieces.append(ast.unparse(argument) + (f" = {ast.unparse(default)}" if default else ""))
    return pieces


def prose(docstring: str) -> str:
    """A docstring as Markdown: Google's sections become lists, indented code becomes code."""
    lines, result, section = inspect.cleandoc(docstring).splitlines(), [], ""
    for line in lines:
        if heading := re.fullmatch(r"(Args|Attributes|Returns|Raises|Yields):", line):
            section = heading[1]
            result += [f"**{section}**", ""]
        elif section and re.match(r"    \S", line):
            entry = re.match(r"    ([\w.*]+)(?: \([^)]*\))?: (.*)", line)
            takes_names = section not in ("Returns", "Yields")
            result.append(f"- `{entry[1]}`: {entry[2]}" if entry and takes_names else f"{line.strip()}")
        elif section and line.startswith("     "):
            result.append("  " + line.strip())
        else:
            section = "" if line and not line.startswith(" ") else section
            result.append(line)
    return "\n".join(result)


def render(name: str) -> str:
    node = definition(name)
    title = f"lapis.{name}"
    if isinstance(node, ast.FunctionDef):
        return f"### {title}\n\n```python\n{signature(title, node)}\n```\n\n{prose(ast.get_docstring(node) or '')}\n"
    bases = ", ".join(ast.unparse(base) for base in node.bases)
    code = [f"class {title}({bases}):" if bases else f"class {title}:"]
    methods = []
    for child in node.body:
        if isinstance(child, ast.AnnAssign) and isinstance(child.target, ast.Name):
            if not child.target.id.startswith("_"):
                code.append(f"    {ast.unparse(child)}")
        elif isinstance(child, ast.FunctionDef) and not child.name.startswith("_"):
            decorators = {ast.unparse(d).rpartition(".")[2] for d in child.decorator_list}
            first = (ast.get_docstring(child) or "").partition("\n\n")[0].replace("\n", " ")
            shown = (
                child.name
                if decorators & {"property", "cached_property"}
                else signature(child.name, child, method=True)
            )
            methods.append(f"- `{shown}`" + (f": {first}" if first else ""))
        elif isinstance(child, ast.FunctionDef) and child.name == "__init__":
            del child.args.args[0]
            child.returns = None
            code.append(signature(title, child))
    body = f"### {title}\n\n```python\n" + "\n".join(code) + f"\n```\n\n{prose(ast.get_docstring(node) or '')}\n"
    return body + ("\n" + "\n".join(methods) + "\n" if methods else "")


def page() -> str:
    listed = sorted(name for names in SECTIONS.values() for name in names)
    public = sorted(set(lapis.__all__) - {"__version__"})
    if listed != public:
        raise SystemExit(f"scripts/api_page.py: SECTIONS and lapis.__all__ differ: {set(listed) ^ set(public)}")
    parts = [HEAD]
    for title, names in SECTIONS.items():
        parts += [f"## {title}\n", *(render(name) for name in names)]
    return "\n".join(parts)


if __name__ == "__main__":
    text = page()
    if "--check" not in sys.argv:
        PAGE.write_text(text, encoding="utf-8")
    elif not PAGE.exists() or PAGE.read_text(encoding="utf-8") != text:
        sys.exit("docs/api.md is old; write it anew with: make docs")
