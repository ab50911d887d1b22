"""Records: one JSON file a run, with its parameters, metrics and provenance."""

import hashlib
import json
import os
import platform
import subprocess
import textwrap
import time
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

import pandas as pd
import torch

from ff_utils import utils
from ff_utils.data import Dataset

SCHEMA = 1
KEYS = {"schema", "notebook", "profile", "parameters", "data", "metrics", "provenance"}
PACKAGES = ("torch", "numpy", "pandas", "papermill")
INTERACTIVE = "interactive"  # the profile of a notebook that a person runs


@dataclass
class Run:
    """A run in progress. `file` is where its record goes, if not to its profile's folder."""

    notebook: str
    profile: str
    parameters: dict
    file: Path | None = None
    started: float = field(default_factory=time.perf_counter)

    @property
    def figures(self) -> Path:
        """Folder for this run's figures; every point of a sweep has its own."""
        if self.file:
            return utils.BUILD / "sweeps" / self.file.stem / "figures"
        return (utils.ROOT if self.profile == "default" else utils.BUILD / self.profile) / "figures"

    def finish(self, metrics: dict, data: Dataset | None = None) -> dict:
        """Write the record (atomically), print where it is and return it.

        metrics: nested dicts and lists of numbers and text; a pandas table becomes its rows.
        """
        record = {
            "schema": SCHEMA,
            "notebook": self.notebook,
            "profile": self.profile,
            "parameters": self.parameters,
            "data": {},
            "metrics": _plain(metrics),
            "provenance": provenance(),
        }
        record["provenance"]["wall_seconds"] = round(time.perf_counter() - self.started, 1)
        if data:
            counts = {"train": len(data.train_labels), "test": len(data.test_labels)}
            record["data"] = {"name": data.name, "checksum": data.checksum, **counts}
            record["data"]["fallback"] = data.fallback
        path = self.file or record_path(self.notebook, self.profile)
        utils.write_text(path, _text(record))
        print(f"record    {utils.relative(path)}")
        return record


def start(notebook: str, values: dict) -> Run:
    """Begin a run. `values` are a notebook's globals, which hold its parameters.

    A value `record_file`, which sweeps inject, is the path of the record, seen from the
    repository. Raises ValueError for a notebook that does not exist.
    """
    import papermill

    known = [path.stem for path in utils.NOTEBOOKS.glob("*.ipynb")]
    utils.check_choice("notebook", notebook, known)
    names = papermill.inspect_notebook(str(utils.NOTEBOOKS / f"{notebook}.ipynb"))
    parameters = {name: values[name] for name in names}
    profile = parameters.pop("profile", INTERACTIVE)
    torch.manual_seed(parameters.get("seed", 0))
    file = values.get("record_file")
    return Run(notebook, profile, parameters, utils.ROOT / file if file else None)


def record_path(notebook: str, profile: str) -> Path:
    """Where the record of a notebook's run in a profile is."""
    return utils.RESULTS / profile / f"{notebook}.json"


def read(notebook: str, profile: str) -> dict:
    """A checked record. ValueError with the remedy if it is missing or incomplete.

    The profile "interactive" reads the default profile's record if it has none of its own.
    """
    if profile == INTERACTIVE and not record_path(notebook, profile).exists():
        profile = "default"
    path = record_path(notebook, profile)
    target = notebook[:2] if notebook[:2].isdigit() else notebook
    remedy = f"run `make {target} PROFILE={profile}`"
    if not path.exists():
        raise ValueError(f"{utils.relative(path)} is missing: {remedy}.")
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        whole = record.keys() >= KEYS and record["metrics"]
    except (ValueError, AttributeError):  # it is not JSON, or not an object
        whole = False
    if not whole or (record["schema"], record["notebook"]) != (SCHEMA, notebook):
        place = utils.relative(path)
        raise ValueError(f"{place} is not a whole record of {notebook}: delete it and {remedy}.")
    return record


def digest(record: dict) -> str:
    """Short SHA-256 of a record as it is written."""
    return hashlib.sha256(_text(record).encode()).hexdigest()[:16]


def provenance() -> dict:
    """Where a number comes from: code, time, versions, device, vector instructions, threads."""
    return {
        "commit": git_commit(),
        "finished": datetime.now(UTC).isoformat(timespec="seconds"),
        "python": platform.python_version(),
        **{name: version(name) for name in PACKAGES},
        "system": platform.system(),
        "machine": platform.machine(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU",
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
    }


def git_commit() -> str:
    """Commit of the checkout, with a plus where files differ from it; "unknown" without git."""
    describe = ["git", "rev-parse", "--short=12", "HEAD"]
    changes = ["git", "status", "--porcelain", "--", "ff_utils", "notebooks/*.ipynb"]
    kind = {"cwd": utils.ROOT, "stderr": subprocess.DEVNULL, "text": True}
    try:
        commit = subprocess.check_output(describe, **kind).strip()
        return commit + ("+" if subprocess.check_output(changes, **kind).strip() else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def less(saved: float) -> str:
    """A share that is saved, in words: "12% less", or "3% more" if it is below zero."""
    return f"{abs(saved):.0%} {'less' if saved > 0 else 'more'}"


def footer(record: dict) -> None:
    """Print what made a record: the closing cell of every notebook."""
    made, data = record["provenance"], record["data"]
    print(f"digest    {digest(record)}")
    print(f"profile   {record['profile']}")
    if data:
        print(f"data      {data['name']}, sha256 {data['checksum'][:16]}")
    print(f"commit    {made['commit']}")
    print(f"versions  Python {made['python']}, " + ", ".join(f"{p} {made[p]}" for p in PACKAGES))
    device = " ".join(filter(None, [made["device"], made.get("cpu_capability")]))
    print(f"device    {device}, {made['threads']} threads, {made['system']}")
    print(f"time      {made['wall_seconds']:.0f} s")
    given = ", ".join(f"{name}={value!r}" for name, value in record["parameters"].items())
    print(textwrap.fill(given, 96, initial_indent="given     ", subsequent_indent=" " * 10))


def _text(record: dict) -> str:
    return json.dumps(record, indent=1) + "\n"


def _plain(metrics: dict) -> dict:
    """Only what JSON holds; numbers to 6 significant digits, so that records read well."""

    def other(value: object) -> object:
        if isinstance(value, pd.DataFrame):
            return value.astype(object).where(value.notna(), None).to_dict("records")
        return value.item()  # numbers of NumPy and PyTorch

    return json.loads(
        json.dumps(metrics, default=other),
        parse_float=lambda digits: float(f"{float(digits):.6g}"),
        parse_constant=lambda _: None,  # NaN and infinities
    )
