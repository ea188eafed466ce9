"""The house keeps its order: who imports whom, what is public, how things are named, what is never written."""

import ast
import re
import subprocess
import sys
from collections import Counter, defaultdict
from collections.abc import Iterator
from functools import cache
from itertools import pairwise
from pathlib import Path

import lapis

SOURCE = Path(lapis.__file__).parent
TESTS = Path(__file__).parent

# room -> rooms that it may import; errors and config are free to all
MAY_IMPORT = {
    "families": set(),
    "checkpoint": {"families"},
    "text": {"checkpoint"},
    "model": {"checkpoint", "families", "text"},
    "weights": {"checkpoint", "families", "report", "text"},
    "generation": {"checkpoint", "model", "text"},
    "evaluation": {"checkpoint", "families", "generation", "model", "report", "text"},
    "training": {"model", "text", "checkpoint", "families", "generation", "evaluation", "report"},
    "inside": {"checkpoint", "model", "text", "report"},
    "planning": {"checkpoint", "evaluation", "families", "model", "report", "text", "weights"},
    "report": set(),
    "formats": {"checkpoint", "evaluation", "families", "model", "text", "weights"},
    "language": {
        "checkpoint", "evaluation", "families", "generation", "model", "planning", "report", "text", "training",
        "weights",
    },
    "serving": {"checkpoint", "families", "generation", "inside", "model", "report", "text"},
    "tour": {"checkpoint", "evaluation", "families", "generation", "model", "report", "text", "training", "weights"},
    "cli": {
        "checkpoint", "evaluation", "families", "formats", "generation", "inside", "language", "model", "planning",
        "report", "serving", "text", "tour", "training", "weights",
    },
}  # fmt: skip

# sub-packages of more than ten files, with the reason
MANY_FILES = {
    "checkpoint": "one of the twelve is the script of another process",
    "cli": "one file for each command",
    "families": "one file for each architecture",
    "weights/engine": "reading ahead, downloads and several processes each have a file beside the ten",
    "model/blocks": "one file for each block that is its own",
    "text/tokenizer": "one of the eleven is the script of another process",
}

# rooms in which every docstring of more than one line lists its arguments
DOCUMENTED = {"generation", "model", "text"}

# words that do not say what a name stands for (docs/glossary.md)
VAGUE = {
    "asked", "begun", "carry", "claims", "exam", "found", "guarded", "heed", "kept", "meant", "said", "say", "told",
    "wanted", "wish",
}  # fmt: skip
NO_FILE = {"utils", "util", "common", "helpers", "misc", "scaled", "swap", "tell"}


@cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


@cache
def sources() -> list[Path]:
    return sorted(SOURCE.rglob("*.py"))


def place(path: Path) -> str:
    return path.relative_to(SOURCE).as_posix()


@cache
def nodes(path: Path) -> list[ast.AST]:
    """The imports and definitions of a file, wherever they stand in it; expressions are not walked through."""
    listed: list[ast.AST] = []
    waiting: list[ast.AST] = [tree(path)]
    while waiting:
        node = waiting.pop()
        listed.append(node)
        waiting += [child for child in ast.iter_child_nodes(node) if not isinstance(child, ast.expr)]
    return listed


@cache
def imports(path: Path) -> set[str]:
    """Full names of the modules that a file imports, also inside functions and for types."""
    names: set[str] = set()
    for node in nodes(path):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names |= {f"{node.module}.{alias.name}" for alias in node.names} | {str(node.module)}
    return names


def imported_modules() -> dict[str, set[str]]:
    """Module -> the modules of lapis that it imports. `from package import module` is an import of that module."""
    names = {".".join(["lapis", *path.relative_to(SOURCE).with_suffix("").parts]): path for path in sources()}
    modules = {name.removesuffix(".__init__"): path for name, path in names.items()}
    graph: dict[str, set[str]] = {name: set() for name in modules}
    for name, path in modules.items():
        for node in nodes(path):
            if isinstance(node, ast.Import):
                graph[name] |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                full = {f"{node.module}.{alias.name}" for alias in node.names}
                graph[name] |= {other if other in modules else str(node.module) for other in full}
        graph[name] = (graph[name] & set(modules)) - {name, "lapis"}
    return graph


def rooms_imported(path: Path) -> Iterator[tuple[str, str]]:
    """(room, name) of what a file imports from other rooms."""
    own = path.relative_to(SOURCE).parts[0]
    for name in imports(path):
        parts = name.split(".")
        if parts[0] == "lapis" and len(parts) > 1 and parts[1] in MAY_IMPORT and parts[1] != own:
            yield parts[1], name


def circles(graph: dict[str, set[str]]) -> list[list[str]]:
    """Groups of nodes that reach each other (Tarjan's strongly connected components of two or more)."""
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    groups: list[list[str]] = []

    def visit(node: str) -> None:
        index[node] = low[node] = len(index)
        stack.append(node)
        for other in sorted(graph[node]):
            if other not in index:
                visit(other)
                low[node] = min(low[node], low[other])
            elif other in stack:
                low[node] = min(low[node], index[other])
        if low[node] == index[node]:
            cut = stack.index(node)
            if len(stack) - cut > 1:
                groups.append(sorted(stack[cut:]))
            del stack[cut:]

    for node in sorted(graph):
        if node not in index:
            visit(node)
    return groups


def definitions(path: Path) -> Iterator[ast.FunctionDef | ast.ClassDef]:
    for node in nodes(path):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            yield node


def names_given(path: Path) -> Iterator[str]:
    """Functions, classes, parameters, variables and attributes that a file names itself."""
    for node in ast.walk(tree(path)):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            yield node.name
        elif isinstance(node, ast.arg):
            yield node.arg
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            yield node.attr


def words_of(name: str) -> set[str]:
    """The words of a snake_case or CamelCase name, in lower case."""
    return {word.lower() for word in re.findall(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])", name)}


def test_rooms_import_only_what_the_design_allows() -> None:
    wrong = [
        f"{place(path)} imports {name}"
        for path in sources()
        for room, name in rooms_imported(path)
        if (own := path.relative_to(SOURCE).parts[0]) in MAY_IMPORT and room not in MAY_IMPORT[own]
    ]
    assert not wrong, "\n".join(wrong)


def test_every_permission_to_import_is_used() -> None:
    used = {(path.relative_to(SOURCE).parts[0], room) for path in sources() for room, _ in rooms_imported(path)}
    unused = [f"{own} -> {room}" for own, rooms in MAY_IMPORT.items() for room in rooms if (own, room) not in used]
    assert not unused, unused


def test_no_import_circle_inside_a_room() -> None:
    assert not circles(imported_modules())


def test_circles_are_seen_where_there_are_some() -> None:
    graph = {"a": {"b"}, "b": {"c"}, "c": {"b", "d"}, "d": set(), "e": {"a"}}
    assert circles(graph) == [["b", "c"]]
    assert circles(graph | {"d": {"a"}}) == [["a", "b", "c", "d"]]
    assert circles({"a": {"b"}, "b": set()}) == []


def test_no_class_name_stands_twice() -> None:
    places = defaultdict(list)
    for path in sources():
        for node in definitions(path):
            if isinstance(node, ast.ClassDef):
                places[node.name].append(place(path))
    twice = {name: where for name, where in places.items() if len(where) > 1}
    assert not twice


def test_names_say_what_they_are() -> None:
    vague = {
        f"{place(path)}: {name}"
        for path in sources()
        for name in names_given(path)
        if words_of(name) & VAGUE and not name.endswith("Error")
    }
    vague |= {place(path) for path in sources() if words_of(path.stem) & VAGUE or path.stem in NO_FILE}
    assert not vague, "\n".join(sorted(vague))


def test_each_package_says_what_enters_and_what_leaves() -> None:
    wrong = []
    for path in sources():
        if path.name != "__init__.py" or path.parent == SOURCE:
            continue
        package = path.parent.relative_to(SOURCE).as_posix()
        first, _, rest = (ast.get_docstring(tree(path)) or "").partition("\n")
        sentence = first.endswith(".") and (not rest or rest.startswith("\n"))
        if not (sentence and re.search(r"\bin\b.*\bout\b", first)):
            wrong.append(f'{package}: "{first}" should be one line: "... in, ... out."')
    assert not wrong, "\n".join(wrong)


def public_functions(path: Path) -> Iterator[tuple[ast.FunctionDef, bool]]:
    """Public functions and methods of public classes that take arguments, and whether each is a method."""
    for node in tree(path).body:
        inner = node.body if isinstance(node, ast.ClassDef) and not node.name.startswith("_") else []
        for function, method in [(node, False), *((child, True) for child in inner)]:
            if isinstance(function, ast.FunctionDef) and not function.name.startswith("_"):
                arguments = [*function.args.posonlyargs, *function.args.args, *function.args.kwonlyargs]
                if any(argument.arg not in ("self", "cls") for argument in arguments):
                    yield function, method


def test_docstrings_of_public_functions_explain_their_arguments() -> None:
    """One line, or Google's sections. A method may go without where its name is a rule's (forward, to, read, ...)."""
    exported = {name for entries in lapis._PUBLIC.values() for entry in entries.split() for name in entry.split("=")}
    wrong = []
    for path in sources():
        room = path.relative_to(SOURCE).parts[0]
        for function, method in public_functions(path):
            lines = (ast.get_docstring(function) or "").splitlines()
            public = function.name in exported and not method
            if room in DOCUMENTED and ((not lines and not method) or (len(lines) > 1 and "Args:" not in lines)):
                wrong.append(f"{place(path)}: {function.name}")
            elif public and room != "cli" and "Args:" not in lines:
                wrong.append(f"{place(path)}: {function.name} is public and has no Args")
    assert not wrong, "\n".join(wrong)


def test_packages_hold_ten_files_or_say_why_more() -> None:
    sizes = Counter(path.parent.relative_to(SOURCE).as_posix() for path in sources() if path.name != "__init__.py")
    assert not {package: n for package, n in sizes.items() if n > 10 and package not in MANY_FILES}


def test_names_of_tests_are_sixty_characters_at_most() -> None:
    long = [
        f"{path.relative_to(TESTS)}: {node.name}"
        for path in sorted(TESTS.rglob("test_*.py"))
        for node in nodes(path)
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_") and len(node.name) > 60
    ]
    assert not long, "\n".join(long)


def test_other_libraries_stay_outside() -> None:
    forbidden = {"transformers", "peft", "trl", "mergekit", "lm_eval", "pickle", "dill", "joblib"}
    adapters = {  # the files that an extra is for
        ("evaluation/harness.py", "lm_eval"),
        ("model/reading/eager.py", "transformers"),
        ("model/reading/opening.py", "transformers"),
        ("model/reading/outside.py", "transformers"),
        ("text/tokenizer/sentence_piece.py", "transformers"),
    }
    wrong = {
        f"{place(path)}: {name}"
        for path in sources()
        for name in imports(path)
        if name.split(".")[0] in forbidden and (place(path), name.split(".")[0]) not in adapters
    }
    assert not wrong


def test_files_are_short() -> None:
    for path in sources():
        assert len(path.read_text(encoding="utf-8").splitlines()) <= 400, path


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


# plurals behind numbers that are never 1: limits that were passed, a constant, a name, a verb
MANY = {
    "checkpoint/remote/stores.py": "files", "evaluation/harness.py": "new tokens", "families/config.py": "layers",
    "families/gguf.py": "layers", "language/replay.py": "replies", "text/tokenizer/trial.py": "steps",
    "tour/page.py": "chats", "weights/merge/recipes/recipe.py": "layers",
}  # fmt: skip
COUNTED = re.compile(
    r" (changes|chats|documents|files|layers|matrices|new tokens|problems|replies|results|shards|steps|tensors|texts|"
    r"threads)\b"
)


def test_one_is_one() -> None:
    """What is counted in a sentence goes through format_count, which says "1 step"."""
    wrong = []
    for path in sources():
        for node in ast.walk(tree(path)):
            if not isinstance(node, ast.JoinedStr):
                continue
            for value, behind in pairwise(node.values):
                noun = COUNTED.match(str(behind.value)) if isinstance(behind, ast.Constant) else None
                if noun and isinstance(value, ast.FormattedValue) and MANY.get(place(path)) != noun[1]:
                    constant = isinstance(value.value, ast.Name) and value.value.id.isupper()
                    wrong += [] if constant else [f"{place(path)}:{node.lineno}: {noun[1]}"]
    assert not wrong, "\n".join(wrong)
