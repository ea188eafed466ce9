"""The fork server and the inputs, once for all tests of a process."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from .aimed import Forks, build
from .jobs import make_inputs


@pytest.fixture(scope="session")
def forks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Forks]:
    scratch = tmp_path_factory.mktemp("scratch")
    server = Forks(build(scratch), scratch)
    yield server
    server.close()


@pytest.fixture(scope="session")
def place(forks: Forks, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder with the inputs, in which jobs run one after the other."""
    folder = tmp_path_factory.mktemp("place")
    make_inputs(forks, folder / "inputs")
    return folder
