"""What is committed holds together: lock, notebooks, records, README; and make works."""

import ast
import os
import re
import shutil
import statistics
import subprocess
import sys
import tomllib
from pathlib import Path

import nbformat
import pytest
import yaml

from ff_utils import files, paths, readme, results

ROOT = paths.ROOT
NOTEBOOKS = sorted(paths.NOTEBOOKS.glob("*.ipynb"))
PROFILES = sorted(paths.PROFILES.glob("*.yaml"))


def code(path):
    return [c for c in nbformat.read(path, 4).cells if c.cell_type == "code"]


def locked():
    lines = (ROOT / "requirements.lock").read_text().splitlines()
    pinned = [line.lower().split("==") for line in lines if line and not line.startswith("#")]
    return dict(pinned)


def test_every_dependency_is_pinned_and_conda_users_get_the_same():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert set(project["dependencies"]) <= set(locked())
    environment = yaml.safe_load((ROOT / "environment.yml").read_text())["dependencies"]
    conda = [entry for entry in environment if isinstance(entry, str)]
    (pip,) = [entry["pip"] for entry in environment if isinstance(entry, dict)]
    assert pip == ["-r requirements.lock", "-e ."]
    # Nothing else is named there, so nothing can differ.
    assert sorted(entry.split("=")[0] for entry in conda) == ["pip", "python"]
    lowest = project["requires-python"].removeprefix(">=")
    chosen = next(e for e in conda if e.startswith("python=")).removeprefix("python=")
    assert [int(n) for n in chosen.split(".")] >= [int(n) for n in lowest.split(".")]


def test_the_environment_is_the_lock():
    installed = subprocess.run(
        [sys.executable, "-m", "pip", "freeze", "--exclude-editable"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    found = dict(re.findall(r"^([\w.-]+)==([^+\s]+)", installed.lower(), flags=re.MULTILINE))
    different = {n: (v, found[n]) for n, v in locked().items() if n in found and found[n] != v}
    assert not different


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_notebooks_keep_the_house_rules(path):
    notebook = nbformat.read(path, 4)
    cells = code(path)
    opening = notebook.cells[0].source
    assert re.match(r"# \d+ · ", opening) and "?**" in opening
    assert re.search(r"It\s+takes", opening)
    assert len(notebook.cells) <= 32
    lengths = [c.source.count("\n") + 1 for c in cells]
    assert statistics.median(lengths) <= 8 and max(lengths) <= 30
    (parameters,) = [c for c in cells if "parameters" in c.metadata.get("tags", [])]
    for line in parameters.source.splitlines():
        assert re.fullmatch(r"\w+: [\w\[\]]+ = .+  # [^=#]+", line), line
    values = [node.value for node in ast.parse(parameters.source).body]
    assert all(ast.literal_eval(v) is not None for v in values)
    assert not any(re.search(r"^\s*(class|def) ", c.source, re.MULTILINE) for c in cells)
    assert "results.footer(record)" in cells[-1].source
    assert "Try it yourself" in notebook.cells[-1].source


@pytest.mark.parametrize("path", PROFILES, ids=lambda p: p.stem)
def test_profiles_name_notebooks_and_parameters_that_exist(path):
    for notebook, given in (yaml.safe_load(path.read_text()) or {}).items():
        assert set(given) <= set(files.parameter_names(notebook))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_committed_outputs_are_those_of_the_committed_record(path):
    cells = code(path)
    assert [c.execution_count for c in cells] == list(range(1, len(cells) + 1))
    shown = "".join(o.get("text", "") for o in cells[-1].outputs)
    record = results.read(path.stem, "default")
    assert f"digest    {results.digest(record)}" in shown
    text = path.read_text()
    assert "papermill" not in nbformat.read(path, 4).metadata
    assert "widget-view" not in text and "injected-parameters" not in text
    assert not re.search(r"/(home|root|Users|work|tmp)/", text)


def test_figures_were_drawn_from_the_committed_records():
    drawn = results.read("06_figures", "default")["metrics"]["digests"]
    for notebook, digest in drawn.items():
        assert results.digest(results.read(notebook, "default")) == digest
    names = {p.stem for p in (ROOT / "figures").glob("*.png")}
    assert names == {p.stem for p in (ROOT / "figures").glob("*.svg")}
    assert {
        "memory_by_depth",
        "memory_bars",
        "memory_breakdown",
        "learning_curves",
        "error_and_memory",
    } <= names


def test_the_readmes_numbers_are_the_records():
    text = (ROOT / "README.md").read_text()
    assert readme.filled(text) == text
    for target in re.findall(r"\]\((?!http)([^)#]+)", text):
        assert (ROOT / target).exists(), target


def test_the_committed_records_keep_their_promises():
    ff = results.read("02_ff_training", "default")
    memory = results.read("05_memory_profiling", "default")["metrics"]
    assert ff["data"]["name"] == "mnist" and ff["data"]["train"] == 60_000
    assert ff["metrics"]["test_error"] < 0.03
    assert ff["metrics"]["test_error_by_goodness"][-1] < 0.03
    assert round(memory["backprop_7_layers"] / 1e6) == 683
    assert round(memory["slopes"]["backprop"] / 1e6) == 88
    real = {(r["arm"], r["depth"], r["instrument"]): r["peak_bytes"] for r in memory["real"]}
    pairs = [(real[a, d, "simulated"], real[a, d, "tracked"]) for a, d, i in real if i == "tracked"]
    assert len(pairs) >= 10 and all(simulated == tracked for simulated, tracked in pairs)


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    """The repository as a fresh clone has it, with this environment."""
    folder = tmp_path_factory.mktemp("clone") / "repository"
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    for name in filter(None, listed.split("\0")):
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name)
    # An environment of the copy's own, whose packages are those of this one.
    environment = folder / "environment" / "bin"
    environment.mkdir(parents=True)
    python = environment / "python"
    python.write_text(f'#!/bin/sh\nPYTHONPATH="{folder}" exec "{sys.executable}" "$@"\n')
    python.chmod(0o755)
    (folder / "environment" / "ready").touch()
    return folder


def make(folder, *arguments):
    command = ["make", "VENV=environment", *arguments]
    at_hand = [str(f) for f in paths.data_folders("mnist") if f.exists()]
    environment = os.environ | ({"FF_DATA_DIR": at_hand[0]} if at_hand else {})
    return subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, check=False
    )


def test_make_alone_prints_every_target(copy):
    done = make(copy)
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
    for target in targets:
        assert re.search(rf"^  {target} ", done.stdout, flags=re.MULTILINE), target


def test_an_unknown_profile_is_refused(copy):
    done = make(copy, "reproduce", "PROFILE=huge")
    assert done.returncode != 0
    assert "PROFILE is 'huge'; choose one of: default paper smoke" in done.stderr


def test_an_old_python_gets_one_sentence(copy, tmp_path):
    old = tmp_path / "python"
    old.write_text(
        "#!/bin/sh\nexec " + sys.executable + ' -c "import sys; sys.version_info = (3, 9, 1); $2"\n'
    )
    old.chmod(0o755)
    done = make(copy, "VENV=elsewhere", f"PYTHON={old}", "elsewhere/ready")
    assert done.returncode != 0
    assert "error: Python 3.9 is too old; give 3.11 or later" in done.stderr
    assert not (copy / "elsewhere").exists()


def test_every_notebook_runs_in_smoke_and_make_rebuilds_only_what_changed(copy):
    done = make(copy, "reproduce", "PROFILE=smoke")
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    for path in NOTEBOOKS:
        assert (copy / "build" / "smoke" / path.name).exists()
        assert (copy / "build" / "smoke" / f"{path.stem}.html").exists()
        assert (copy / "data" / "results" / "smoke" / f"{path.stem}.json").exists()
    before = {p.name: p.read_bytes() for p in (ROOT / "figures").glob("*")}
    assert {p.name: p.read_bytes() for p in (copy / "figures").glob("*")} == before
    assert "Nothing to be done" in make(copy, "reproduce", "PROFILE=smoke").stdout
    rebuilt = {
        "notebooks/05_memory_profiling.ipynb": ["05", "06"],
        "notebooks/02_ff_training.ipynb": ["02", "04", "06"],
        "notebooks/profiles/smoke.yaml": [path.stem[:2] for path in NOTEBOOKS],
        "notebooks/profiles/paper.yaml": [],
        "ff_utils/figures.py": [path.stem[:2] for path in NOTEBOOKS],
    }
    for name, expected in rebuilt.items():
        planned = make(copy, "-n", "-W", name, "reproduce", "PROFILE=smoke").stdout
        found = re.findall(r"pipeline run notebooks/(\d\d)", planned)
        assert sorted(found) == expected, name


def test_a_refused_parameter_stops_make_with_one_sentence_and_loses_nothing(copy):
    output = copy / "build" / "smoke" / "03_ff_language_model.ipynb"
    if not output.exists():
        pytest.skip("the smoke run failed")
    before = output.read_bytes()
    profile = copy / "notebooks" / "profiles" / "smoke.yaml"
    kept = profile.read_text()
    try:
        for wrong, sentence in (
            ("epochs: 0", "ValueError: epochs is 0; give a whole number of at least 1"),
            ("epoch: 2", "'epoch', which does not exist: did you mean epochs?"),
        ):
            section = f"03_ff_language_model:\n  train_size: 2000\n  hidden: [20]\n  {wrong}\n"
            profile.write_text(section)
            done = make(copy, "03", "PROFILE=smoke")
            assert done.returncode != 0 and sentence in done.stderr
            errors = [line for line in done.stderr.splitlines() if line.startswith("error:")]
            assert len(errors) == 1
            assert output.read_bytes() == before
    finally:
        profile.write_text(kept)


def test_nothing_committed_names_a_place_it_was_made_at():
    listed = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.split()
    for name in listed:
        path = Path(ROOT / name)
        if path.suffix in {".png", ".ipynb"} or name.startswith("tests/") or not path.is_file():
            continue
        assert not re.search(r"/(home|root|Users|work)/\w", path.read_text(errors="replace")), name
