import os
import subprocess
from pathlib import Path

import pytest
import torch

from ff_utils import utils
from ff_utils.data import Dataset, is_downloaded, load_dataset
from ff_utils.run.faults import copy_checkout

torch.set_num_threads(1)  # tests' tensors are small: a second thread costs more than it saves


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


@pytest.fixture(scope="session")
def smoke(clone) -> Path:
    """The clone after `make reproduce PROFILE=smoke`: the one run that all tests read."""
    done = make(clone, "-j2", "reproduce", "PROFILE=smoke")  # two at a time, of a thread each
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return clone


def make(folder: Path, *arguments: str) -> subprocess.CompletedProcess:
    """`make` in a clone, which reads the data that this checkout reads."""
    downloaded = [str(f) for f in utils.data_folders("mnist") if f.exists()]
    environment = os.environ | ({"FF_DATA_DIR": downloaded[0]} if downloaded else {})
    environment["OMP_NUM_THREADS"] = "1"
    for name in ("MAKEFLAGS", "MAKELEVEL"):  # of a make that runs these tests
        environment.pop(name, None)
    command = ["make", "VENV=environment", *arguments]
    return subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, check=False
    )
