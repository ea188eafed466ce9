"""The fast tests on the lowest and the highest Python and torch that pyproject.toml allows.

    python scripts/check_matrix.py [--python 3.11 3.13] [--torch 2.11 2.13]

Each pair gets a virtual environment in .matrix, kept for the next time. A pair whose interpreter or torch cannot be had
on this machine is named in the table, and is no failure; a test that fails is.
"""

import argparse
import glob
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
# what the fast tests import beside lapis; parity with the other libraries, the tour and the book are in `make test`
NEEDS = [
    "pytest>=8.4",
    "pytest-xdist>=3.6",
    "hypothesis>=6.130",
    "transformers>=5.0",
    "peft>=0.21",
    "scikit-learn>=1.6",
]
FAST = ["-m", "not browser and not real_data", "--ignore=tests/oracles", "--ignore=tests/tour", "--ignore=tests/book"]


def interpreter(version: str) -> str | None:
    """Where Python `version` ("3.11") is on this machine: on the path, from pyenv or from uv."""
    candidates = [path] if (path := shutil.which(f"python{version}")) else []
    candidates += sorted(glob.glob(os.path.expanduser(f"~/.pyenv/versions/{version}.*/bin/python")), reverse=True)
    if uv := shutil.which("uv"):
        candidates += subprocess.run([uv, "python", "find", version], capture_output=True, text=True).stdout.split()
    for candidate in candidates:
        code = "import sys, venv, ensurepip; print('%d.%d' % sys.version_info[:2])"
        answer = subprocess.run([candidate, "-c", code], capture_output=True, text=True)
        if answer.stdout.strip() == version:
            return candidate
    return None


def environment(version: str, torch: str) -> tuple[Path | None, str]:
    """The interpreter of an environment with lapis and torch `torch`, or None and why there is none."""
    base = interpreter(version)
    if base is None:
        return None, f"no Python {version} on this machine"
    folder = ROOT / ".matrix" / f"py{version}-torch{torch}"
    python = folder / "bin" / "python"
    if not python.exists():
        subprocess.run([base, "-m", "venv", folder], check=True)
    command = [
        str(python),
        "-m",
        "pip",
        "install",
        "--quiet",
        f"torch=={torch}.*",
        "-e",
        f"{ROOT}[data,gguf,images]",
        *NEEDS,
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.startswith("ERROR")] or ["pip failed"]
        return None, f"torch {torch} for Python {version} cannot be had here ({lines[0][:120]})"
    return python, ""


def check(python: Path, jobs: str) -> tuple[bool, str]:
    """Runs the fast tests; whether all passed, and pytest's last line."""
    command = [str(python), "-m", "pytest", "-q", "-n", jobs, *FAST]
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    lines = [line for line in done.stdout.splitlines() if line.strip()] or ["no output"]
    if done.returncode:
        print(done.stdout[-6000:], file=sys.stderr)
    return done.returncode == 0, lines[-1]


def main() -> int:
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    allowed = (
        re.search(r'requires-python = ">=3\.(\d+),<3\.(\d+)"', text),
        re.search(r'"torch>=2\.(\d+),<2\.(\d+)"', text),
    )
    assert all(allowed)
    pythons, torches = ([low, str(int(high) - 1)] for low, high in (match.groups() for match in allowed if match))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--python", nargs="+", default=[f"3.{minor}" for minor in pythons])
    parser.add_argument("--torch", nargs="+", default=[f"2.{minor}" for minor in torches])
    parser.add_argument("--jobs", default="auto")
    options = parser.parse_args()
    rows, failed = [], False
    for version in options.python:
        for torch in options.torch:
            print(f"Python {version}, torch {torch} ...", file=sys.stderr)
            python, why = environment(version, torch)
            if python is None:
                rows.append((version, torch, f"not at hand: {why}"))
                continue
            passed, last = check(python, options.jobs)
            failed |= not passed
            rows.append((version, torch, ("passed: " if passed else "FAILED: ") + last.strip("= ")))
    print("| Python | torch | fast tests |\n|---|---|---|")
    for row in rows:
        print("| {} | {} | {} |".format(*row))
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
