"""Result records: one JSON a run, with parameters, metrics and provenance."""

import hashlib
import json
import math
import os
import platform
import subprocess
import textwrap
import time
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path

import pandas as pd
import torch

from ff_utils import files, paths
from ff_utils.datasets import Dataset

SCHEMA = 1
KEYS = {"schema", "notebook", "profile", "parameters", "data", "metrics", "provenance"}
PACKAGES = ("torch", "numpy", "pandas", "papermill")
INTERACTIVE = "interactive"  # the profile of a notebook run by hand


@dataclass
class Run:
    """A notebook's run in progress: what it was asked, and since when."""

    notebook: str
    profile: str
    parameters: dict
    started: float = field(default_factory=time.perf_counter)

    @property
    def figures(self) -> Path:
        """Where this run's figures go; a sweep's points keep theirs apart."""
        named = os.environ.get(paths.RECORD)
        return paths.figures(f"sweeps/{Path(named).stem}" if named else self.profile)

    def finish(self, metrics: dict, data: Dataset | None = None) -> dict:
        """Write the record (atomically) and return it.

        metrics: nested dicts and lists of numbers and text; a pandas table becomes its rows.
        """
        about_data = {}
        if data is not None:
            about_data = {
                "name": data.name,
                "checksum": data.checksum,
                "train": len(data.train_labels),
                "test": len(data.test_labels),
                "fallback": data.fallback,
            }
        record = {
            "schema": SCHEMA,
            "notebook": self.notebook,
            "profile": self.profile,
            "parameters": self.parameters,
            "data": about_data,
            "metrics": _plain(metrics),
            "provenance": provenance()
            | {"wall_seconds": round(time.perf_counter() - self.started, 1)},
        }
        files.write_atomically(_own_path(self.notebook, self.profile), _text(record))
        return record


def start(notebook: str, values: dict) -> Run:
    """Begin a run: `values` (a notebook's globals) gives each of its parameters.

    Raises ValueError for a notebook name that does not exist.
    """
    parameters = {name: values[name] for name in files.parameter_names(notebook)}
    torch.manual_seed(parameters.get("seed", 0))
    profile = parameters.pop("profile", INTERACTIVE)
    return Run(notebook, profile, parameters)


def record_path(notebook: str, profile: str) -> Path:
    """Where the record of a notebook's run in a profile lives."""
    return paths.RESULTS / profile / f"{notebook}.json"


def _own_path(notebook: str, profile: str) -> Path:
    """Where this process's run keeps its record."""
    named = os.environ.get(paths.RECORD)
    return Path(named) if named else record_path(notebook, profile)


def read(notebook: str, profile: str) -> dict:
    """A checked record; ValueError with what to do where it is missing or not whole.

    Run by hand, a notebook reads the default profile's records of those not run by hand.
    """
    path = record_path(notebook, profile)
    if profile == INTERACTIVE and not path.exists():
        profile = "default"
        path = record_path(notebook, profile)
    place = paths.relative(path)
    remedy = f"run `make {notebook[:2]} PROFILE={profile}`"
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ValueError(f"{place} is missing: {remedy}.") from error
    except ValueError as error:
        raise ValueError(f"{place} is not whole JSON: delete it and {remedy}.") from error
    missing = KEYS - set(record) if isinstance(record, dict) else KEYS
    if missing or record["schema"] != SCHEMA or record["notebook"] != notebook:
        raise ValueError(f"{place} is not a record of {notebook}: delete it and {remedy}.")
    return record


def digest(record: dict) -> str:
    """Short SHA-256 of a record as it is written."""
    return hashlib.sha256(_text(record).encode()).hexdigest()[:16]


def provenance() -> dict:
    """Where a number comes from: code, versions, device, threads."""
    cuda = torch.cuda.is_available()
    return {
        "commit": git_commit(),
        "python": platform.python_version(),
        **{name: version(name) for name in PACKAGES},
        "system": platform.system(),
        "machine": platform.machine(),
        "device": torch.cuda.get_device_name() if cuda else "CPU",
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
    }


def git_commit() -> str:
    """Commit of the checkout, with a plus where files differ from it; "unknown" without git."""

    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", *arguments], cwd=paths.ROOT, capture_output=True, text=True, check=True
        ).stdout.strip()

    try:
        changed = git("status", "--porcelain", "--", "ff_utils", "notebooks/*.ipynb")
        return git("rev-parse", "--short=12", "HEAD") + ("+" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def less(saved: float) -> str:
    """A share that is saved, in words: "12% less", or "3% more" where it is below zero."""
    return f"{abs(saved):.0%} {'less' if saved > 0 else 'more'}"


def footer(record: dict) -> None:
    """Print what made a record: the closing cell of every notebook."""
    made = record["provenance"]
    print(f"record    {paths.relative(_own_path(record['notebook'], record['profile']))}")
    print(f"digest    {digest(record)}")
    print(f"profile   {record['profile']}")
    if record["data"]:
        about = record["data"]
        print(f"data      {about['name']}, sha256 {about['checksum'][:16]}")
    print(f"commit    {made['commit']}")
    print(f"versions  Python {made['python']}, " + ", ".join(f"{p} {made[p]}" for p in PACKAGES))
    print(f"device    {made['device']}, {made['threads']} threads, {made['system']}")
    print(f"time      {made['wall_seconds']:.0f} s")
    given = ", ".join(f"{name}={value!r}" for name, value in record["parameters"].items())
    print(textwrap.fill(given, 96, initial_indent="given     ", subsequent_indent=" " * 10))


def _text(record: dict) -> str:
    return json.dumps(record, indent=1) + "\n"


def _plain(value: object) -> object:
    """Only what JSON holds; numbers to 6 significant digits, so that records read well."""
    if isinstance(value, pd.DataFrame):
        return _plain(value.astype(object).where(value.notna(), None).to_dict("records"))
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, bool | str | None):
        return value
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else None
    if hasattr(value, "item"):  # numbers of NumPy and PyTorch
        return _plain(value.item())
    return int(value)
