import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from ff_utils import utils
from ff_utils.data import Dataset, is_downloaded, load_dataset
from ff_utils.run.faults import copy_checkout

torch.set_num_threads(1)  # tests' tensors are small: a second thread costs more than it saves


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests that read the smoke run come last, when it has ended."""
    items.sort(key=lambda item: "smoke" in item.fixturenames)


@pytest.fixture(scope="session")
def data() -> Dataset:
    """MNIST where it is downloaded, else the built-in digits."""
    return load_dataset("mnist" if is_downloaded("mnist") else "digits")


@pytest.fixture(scope="session")
def clone(tmp_path_factory) -> Path:
    """The repository as a fresh clone has it, with this environment."""
    folder = tmp_path_factory.mktemp("clone") / "repository"
    copy_checkout(folder)
    return folder


@pytest.fixture(scope="session", autouse=True)
def smoke_run(request) -> Iterator[subprocess.Popen | None]:
    """`make reproduce PROFILE=smoke` in the clone, beside the tests that do not read it."""
    if not any("smoke" in item.fixturenames for item in request.session.items):
        yield None
        return
    clone = request.getfixturevalue("clone")
    with (clone.parent / "smoke.log").open("w") as log:
        process = subprocess.Popen(
            make_command("reproduce", "PROFILE=smoke"),
            cwd=clone,
            env=make_environment(),
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    yield process
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGTERM)
        process.wait()


@pytest.fixture(scope="session")
def smoke(clone, smoke_run) -> Path:
    """The clone after `make reproduce PROFILE=smoke`: the one run that all tests read."""
    assert smoke_run.wait() == 0, (clone.parent / "smoke.log").read_text()[-2000:]
    return clone


def make(folder: Path, *arguments: str) -> subprocess.CompletedProcess:
    """`make` in a clone, which reads the data that this checkout reads."""
    return subprocess.run(
        make_command(*arguments),
        cwd=folder,
        env=make_environment(),
        capture_output=True,
        text=True,
        check=False,
    )


def make_command(*arguments: str) -> list[str]:
    return ["make", "VENV=environment", *arguments]


def make_environment() -> dict[str, str]:
    downloaded = [str(f) for f in utils.data_folders("mnist") if f.exists()]
    environment = os.environ | ({"FF_DATA_DIR": downloaded[0]} if downloaded else {})
    environment["OMP_NUM_THREADS"] = "1"
    for name in ("MAKEFLAGS", "MAKELEVEL"):  # of a make that runs these tests
        environment.pop(name, None)
    return environment
