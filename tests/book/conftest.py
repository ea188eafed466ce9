"""The whole book, built once: every chapter is run by nbclient, whichever worker comes first."""

import fcntl
import os
from pathlib import Path

import pytest

from scripts.book.__main__ import main


@pytest.fixture(scope="session")
def book_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """notebooks/, pages/ and site/, as `make book` makes them."""
    base = tmp_path_factory.getbasetemp()
    out = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "book"
    with open(f"{out}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (out / "site").exists():
            main(["--out", str(out)])
    return out
