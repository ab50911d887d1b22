"""What is committed holds together: rooms, lock, notebooks, records, README; and make works."""

import ast
import re
import statistics
import subprocess
import sys
import tomllib
from pathlib import Path

import nbformat
import pytest
import yaml
from conftest import make

from ff_utils import utils
from ff_utils.report import records
from ff_utils.run import notebooks, sweep

ROOT = utils.ROOT
NOTEBOOKS = sorted(utils.NOTEBOOKS.glob("*.ipynb"))
PROFILES = sorted(utils.PROFILES.glob("*.yaml"))
MODULES = sorted((ROOT / "ff_utils").rglob("*.py"))
# Imports go downwards only: to an earlier rank, or within a room.
RANKS = [
    ["utils"],
    ["config", "process"],
    ["data"],
    ["optimizers"],
    ["ff"],
    ["backprop"],
    ["offload"],
    ["training"],
    ["language", "original", "timing"],
    ["distributed"],
    ["parallel_backprop"],
    ["memory"],
    ["report"],
    ["run"],
    ["__init__", "__main__", "pipeline", "pipelined", "sweep"],
]
RANK = {room: rank for rank, rooms in enumerate(RANKS) for room in rooms}
# Overridden methods, which libraries call.
CALLED_BY_LIBRARIES = {
    "find_class",
    "_apply",
    "block_math",
    "inline_math",
    "latex_environment",
    "markdown2html",
}
REGISTRIES = r"py[p]i\.org|pythonhoste[d]\.org|anacond[a]\.org|npmj[s]\.org|proxy\.golan[g]"


def code(path):
    return [c for c in nbformat.read(path, 4).cells if c.cell_type == "code"]


def committed():
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True).stdout
    return [ROOT / name for name in listed.split() if (ROOT / name).is_file()]


# --- rooms ----------------------------------------------------------------------------------


def room(name):
    """Of `ff.layers` the room `ff`; of a module at the top itself."""
    return name.split(".")[0]


def imported(path):
    """Names below ff_utils that a module imports, as `ff.layers`."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module == "ff_utils":
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("ff_utils."):
            found.add(node.module.removeprefix("ff_utils."))
            names = {
                f"{node.module}.{alias.name}".removeprefix("ff_utils.") for alias in node.names
            }
            found |= {
                n for n in names if (ROOT / "ff_utils" / f"{n.replace('.', '/')}.py").exists()
            }
    return found


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(ROOT / "ff_utils")))
def test_imports_go_downwards_only(path):
    own = room(".".join(path.relative_to(ROOT / "ff_utils").with_suffix("").parts))
    assert own in RANK, f"{own} has no rank"
    for name in imported(path):
        assert room(name) == own or RANK[room(name)] < RANK[own], f"{path.name} imports {name}"


def test_report_reads_records_and_imports_no_model():
    allowed = {"utils", "config", "data", "memory.arms"}
    for path in (ROOT / "ff_utils" / "report").glob("*.py"):
        found = {name for name in imported(path) if room(name) != "report"}
        if path.stem == "claims":  # judges what the simulation says of memory
            found = {name for name in found if room(name) != "memory"}
        assert found <= allowed, path.name


def test_public_names_are_used_by_a_notebook_a_command_or_other_code():
    defined, text = {}, {}
    for path in MODULES:
        text[path] = path.read_text()
        for node in ast.parse(text[path]).body:
            nodes = [node, *node.body] if isinstance(node, ast.ClassDef) else [node]
            for part in nodes:
                if isinstance(part, ast.FunctionDef | ast.ClassDef):
                    defined.setdefault(part.name, path)
                elif isinstance(part, ast.Assign):
                    for target in part.targets:
                        if isinstance(target, ast.Name):
                            defined.setdefault(target.id, path)
    everything = "\n".join(text.values())
    for path in NOTEBOOKS:
        everything += "\n".join(cell.source for cell in code(path))
    for path in [ROOT / "Makefile", ROOT / "tests" / "conftest.py", *ROOT.glob("examples/*.py")]:
        everything += path.read_text()
    found = {}
    for word in re.findall(r"\w+", everything):
        found[word] = found.get(word, 0) + 1
    unused = {
        name: str(path.relative_to(ROOT)) for name, path in defined.items() if found[name] < 2
    }
    unused = {n: p for n, p in unused.items() if not n.startswith("__")}
    assert set(unused) - CALLED_BY_LIBRARIES == set(), unused


def test_every_module_is_packaged_and_known_to_make(clone):
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert project["tool"]["setuptools"]["packages"] == {"find": {"include": ["ff_utils*"]}}
    assert all((path.parent / "__init__.py").exists() for path in MODULES)
    printed = make(clone, "--eval", "sources: ; @echo $(SOURCES)", "sources").stdout.split()
    apart = {f"ff_utils/run/{name}.py" for name in ("sweep", "faults", "repeat")}
    assert set(printed) == {str(path.relative_to(ROOT)) for path in MODULES} - apart


# --- environment ----------------------------------------------------------------------------


def locked():
    lines = (ROOT / "requirements.lock").read_text().splitlines()
    pinned = [line.lower().split("==") for line in lines if line and not line.startswith("#")]
    return dict(pinned)


def test_dependencies_are_pinned_and_conda_users_get_the_same():
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


def test_hashes_are_of_the_locked_versions():
    text = (ROOT / "requirements.hashes").read_text().lower()
    found = dict(re.findall(r"^([\w.-]+)==(\S+) \\\n    --hash=sha256:[0-9a-f]{64}", text, re.M))
    assert {name: found.get(name) for name in locked() if name != "torch"} == {
        name: version for name, version in locked().items() if name != "torch"
    }
    assert "--hash" not in (ROOT / "requirements.lock").read_text()  # pip then wants them for all


def test_dependencies_are_those_that_are_imported():
    names = {"yaml": "pyyaml", "sklearn": "scikit-learn", "IPython": "ipykernel"}
    names |= {"jupyter_client": "ipykernel", "traitlets": "ipykernel", "jinja2": "nbconvert"}
    names |= {"PIL": "pillow"}
    found = set()
    for path in MODULES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                found |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                found.add(node.module.split(".")[0])
    found -= sys.stdlib_module_names | {"ff_utils"}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert {names.get(name, name) for name in found} <= set(project["dependencies"])


def test_environment_is_the_lock():
    command = [sys.executable, "-m", "pip", "freeze", "--exclude-editable"]
    installed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = dict(re.findall(r"^([\w.-]+)==([^+\s]+)", installed.lower(), flags=re.MULTILINE))
    different = {n: (v, found[n]) for n, v in locked().items() if n in found and found[n] != v}
    assert not different


# --- notebooks and records ------------------------------------------------------------------


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_notebook_keeps_the_house_rules(path):
    notebook = nbformat.read(path, 4)
    cells = code(path)
    opening = notebook.cells[0].source
    number = re.match(r"\d+", path.stem)
    assert opening.startswith(f"# {int(number[0])} · " if number else "# ") and "?**" in opening
    assert re.search(r"It\s+takes", opening)
    assert len(notebook.cells) <= 36
    lengths = [c.source.count("\n") + 1 for c in cells]
    assert statistics.median(lengths) <= 12 and max(lengths) <= 30
    (tagged,) = [c for c in cells if "parameters" in c.metadata.get("tags", [])]
    for line in tagged.source.splitlines():
        assert re.fullmatch(r"\w+: [\w\[\]]+ = .+  # [^=#]+", line), line
    kinds = notebooks.parameters(path)
    notebooks.check_values(path.stem, kinds, {name: value for name, (_, value) in kinds.items()})
    if path.stem != "05_your_own_network":  # which shows builders that a reader writes
        assert not any(re.search(r"^\s*(class|def) ", c.source, re.MULTILINE) for c in cells)
    assert "records.footer(record)" in cells[-1].source
    assert "Try it yourself" in notebook.cells[-1].source


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_notebook_links_lead_to_what_exists(path):
    for cell in nbformat.read(path, 4).cells:
        if cell.cell_type == "markdown":
            for target in re.findall(r"\]\((?!http)([^)#]+)", cell.source):
                assert (utils.NOTEBOOKS / target).exists(), target


@pytest.mark.parametrize("path", PROFILES, ids=lambda p: p.stem)
def test_profile_sets_parameters_that_exist_in_their_types(path):
    for notebook in NOTEBOOKS:
        values = notebooks.profile_values(path.stem, notebook.stem)
        notebooks.check_values(notebook.stem, notebooks.parameters(notebook), values)


@pytest.mark.parametrize("name", sweep.shipped())
def test_shipped_sweep_is_whole(name):
    assert sweep.load(name).points


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_committed_outputs_are_those_of_the_committed_record(path):
    cells = code(path)
    assert [c.execution_count for c in cells] == list(range(1, len(cells) + 1))
    shown = "".join(o.get("text", "") for o in cells[-1].outputs)
    record = records.read(path.stem, "default")
    assert f"digest    {records.digest(record)}" in shown
    text = path.read_text()
    assert "papermill" not in nbformat.read(path, 4).metadata
    assert "widget-view" not in text and "injected-parameters" not in text


def test_figures_were_drawn_from_the_committed_records():
    drawn = records.read("10_figures", "default")["metrics"]["digests"]
    for notebook, digest in drawn.items():
        assert records.digest(records.read(notebook, "default")) == digest
    names = {p.stem for p in (ROOT / "figures").glob("*.png")}
    assert names == {p.stem for p in (ROOT / "figures").glob("*.svg")}
    readme = (ROOT / "README.md").read_text()
    assert {Path(shown).stem for shown in re.findall(r"figures/\w+\.png", readme)} <= names


def test_readme_names_paths_that_exist():
    text = (ROOT / "README.md").read_text()
    for target in re.findall(r"\]\((?!http)([^)#]+)", text):
        assert (ROOT / target).exists(), target
    for shown in re.findall(
        r"`((?:ff_utils|notebooks|data|tests|figures|examples)/[\w./]*\w)`", text
    ):
        assert (ROOT / shown).exists(), shown
    for name in re.findall(r"-m (ff_utils[.\w]*)", text):
        place = ROOT / name.replace(".", "/")
        assert place.with_suffix(".py").exists() or (place / "__main__.py").exists(), name
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
    for target in re.findall(r"`make ([a-z-]+)", text):
        assert target in targets, target
    # Markdown ends a paragraph at a line that begins with a comment.
    assert not re.search(r"^\s*<!--", text, flags=re.MULTILINE)


def test_committed_records_keep_their_promises():
    ff = records.read("02_ff_training", "default")
    memory = records.read("04_memory_profiling", "default")["metrics"]
    assert ff["data"]["name"] == "mnist" and ff["data"]["train"] == 60_000
    assert ff["metrics"]["test_error"] < 0.03
    assert ff["metrics"]["test_error_by_goodness"][-1] < 0.03
    assert round(memory["backprop_7_layers"] / 1e6) == 683
    assert round(memory["slopes"]["backprop"] / 1e6) == 88
    real = {(r["arm"], r["depth"], r["instrument"]): r["peak_bytes"] for r in memory["real"]}
    pairs = [(real[a, d, "simulated"], real[a, d, "tracked"]) for a, d, i in real if i == "tracked"]
    assert len(pairs) >= 8 and all(simulated == tracked for simulated, tracked in pairs)


def test_committed_files_name_no_place_of_a_machine_and_no_registry():
    for path in committed():
        if path.suffix not in {".png", ".pt", ".parquet"} and "tests" not in path.parts:
            text = path.read_text(errors="replace")
            if path.suffix != ".ipynb":  # whose images are text too
                assert not re.search(r"/(home|root|Users|work)/\w", text), path
            else:
                assert not re.search(r"[\"' ]/(home|root|Users|work|tmp)/", text), path
            assert not re.search(REGISTRIES, text), path


# --- make -----------------------------------------------------------------------------------


def test_make_alone_prints_every_target(clone):
    done = make(clone)
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
    assert len(targets) > 10
    for target in targets:
        assert re.search(rf"^  {target} ", done.stdout, flags=re.MULTILINE), target


@pytest.mark.parametrize("profile", ["huge", "%", "smoke default", ""])
def test_make_refuses_an_unknown_profile(clone, profile):
    done = make(clone, "reproduce", f"PROFILE={profile}")
    assert done.returncode != 0
    assert f"PROFILE is '{profile}'; choose one of: default gpu paper smoke" in done.stderr


def test_make_trims_a_profile_and_works_only_where_the_repository_is(clone):
    assert "paper/01_" in make(clone, "-n", "01", "PROFILE= paper ").stdout
    done = make(clone / "data", "-f", "../Makefile", "help")
    assert "make runs in the repository's folder, as in: make -C FOLDER help" in done.stderr


def test_make_clears_no_folder_that_is_no_environment(clone, tmp_path):
    done = make(clone, "VENV=notebooks", "notebooks/ready")
    assert done.returncode != 0 and "error: VENV is notebooks, which is there" in done.stderr
    assert (clone / "notebooks" / "01_algorithm_walkthrough.ipynb").exists()
    done = make(clone, "VENV=my env", "help")
    assert "VENV is 'my env'; give a folder without spaces" in done.stderr


def test_make_refuses_an_old_python_in_one_sentence(clone, tmp_path):
    old = tmp_path / "python"
    old.write_text(
        "#!/bin/sh\nexec " + sys.executable + ' -c "import sys; sys.version_info = (3, 9, 1); $2"\n'
    )
    old.chmod(0o755)
    done = make(clone, "VENV=elsewhere", f"PYTHON={old}", "elsewhere/ready")
    assert done.returncode != 0
    assert "error: Python 3.9 is too old; give 3.11 or later" in done.stderr
    assert not (clone / "elsewhere").exists()


def test_every_notebook_runs_in_smoke_and_make_rebuilds_only_what_changed(smoke):
    for path in NOTEBOOKS:
        assert (smoke / "build" / "smoke" / path.name).exists()
        page = (smoke / "build" / "smoke" / f"{path.stem}.html").read_text()
        assert not re.search(r"(src|href)=.?https?:[^>]*\.(js|css)|<script", page)
        assert (smoke / "data" / "results" / "smoke" / f"{path.stem}.json").exists()
    before = {p.name: p.read_bytes() for p in (ROOT / "figures").glob("*")}
    assert {p.name: p.read_bytes() for p in (smoke / "figures").glob("*")} == before
    assert "Nothing to be done" in make(smoke, "reproduce", "PROFILE=smoke").stdout
    every = sorted(path.stem for path in NOTEBOOKS)
    trained = ["05_your_own_network", "06_every_form", "10_figures", "full_length"]
    rebuilt = {
        "notebooks/04_memory_profiling.ipynb": ["04_memory_profiling", "10_figures"],
        "notebooks/02_ff_training.ipynb": ["02_ff_training", "03_backprop_baseline", "10_figures"],
        "notebooks/forms.yaml": trained,
        "notebooks/profiles/smoke.yaml": every,
        "notebooks/profiles/paper.yaml": [],
        "ff_utils/ff/layers.py": every,
        "ff_utils/run/sweep.py": ["08_sweeps"],
    }
    for name, expected in rebuilt.items():
        planned = make(smoke, "-n", "-W", name, "reproduce", "PROFILE=smoke").stdout
        found = re.findall(r"ff_utils run notebooks/(\w+)", planned)
        assert sorted(found) == expected, name


def test_a_record_that_is_gone_is_made_again(smoke):
    record = smoke / "data" / "results" / "smoke" / "02_ff_training.json"
    kept = record.read_bytes()
    record.unlink()
    try:
        for target in ("02", "10"):  # as the advice says, or by itself
            planned = make(smoke, "-n", target, "PROFILE=smoke").stdout
            assert "ff_utils run notebooks/02" in planned
    finally:
        record.write_bytes(kept)
        for path in (smoke / "build" / "smoke").iterdir():
            path.touch()


def test_a_refused_parameter_stops_make_with_one_sentence_and_loses_nothing(smoke):
    output = smoke / "build" / "smoke" / "07_ff_language_model.ipynb"
    before = output.read_bytes()
    profile = smoke / "notebooks" / "profiles" / "smoke.yaml"
    kept = profile.read_text()
    try:
        for wrong, sentence in (
            ("epochs: 0", "ValueError: epochs is 0; give a whole number of at least 1"),
            ("epoch: 2", "'epoch', which does not exist: did you mean epochs?"),
        ):
            section = f"07_ff_language_model:\n  train_size: 2000\n  hidden: [20]\n  {wrong}\n"
            profile.write_text(section)
            done = make(smoke, "07", "PROFILE=smoke")
            assert done.returncode != 0 and sentence in done.stderr
            errors = [line for line in done.stderr.splitlines() if line.startswith("error:")]
            assert len(errors) == 1
            assert output.read_bytes() == before
    finally:
        profile.write_text(kept)
