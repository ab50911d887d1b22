"""Notebooks: their parameters, their execution, their pages, and publishing.

`python -m ff_utils run NOTEBOOK --profile smoke --output FILE`
`python -m ff_utils html NOTEBOOK --output FILE`
`python -m ff_utils publish`

Heavy packages are imported where they are used: make starts a process for every notebook.
"""

import argparse
import ast
import json
import logging
import math
import os
import re
import shutil
import signal
import sys
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import nbformat
import psutil
import yaml

from ff_utils import utils

SECONDS_TO_START = 300  # of a kernel, on a busy machine
SOCKET_PATH = 60  # longest temporary folder that leaves room for a socket's name
NUMBER = r"[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?$"


class NotebookError(RuntimeError):
    """A notebook that failed, in one sentence. `reason` is the cause alone."""

    reason = ""


# --- Values ---------------------------------------------------------------------------------


class _Loader(yaml.SafeLoader):
    """YAML with numbers as people type them (1e-3 is one), and no key given twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        keys = [key for key, _ in node.value if not key.tag.endswith(":merge")]
        names = [self.construct_object(key, deep=True) for key in keys]
        if twice := [name for name in names if names.count(name) > 1]:
            raise yaml.constructor.ConstructorError(
                None, None, f"the key {twice[0]!r} is given twice", node.start_mark
            )
        return super().construct_mapping(node, deep)


def _number(loader: yaml.SafeLoader, node: yaml.ScalarNode) -> int | float:
    text = loader.construct_scalar(node)
    return int(text) if re.fullmatch(r"[-+]?\d+", text) else float(text)


_KINDS_OF_NUMBERS = ("tag:yaml.org,2002:int", "tag:yaml.org,2002:float")
_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag not in _KINDS_OF_NUMBERS]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver("!number", re.compile(NUMBER), list("-+.0123456789"))
_Loader.add_constructor("!number", _number)


def read_yaml(text: str, place: str) -> object:
    """The value that YAML text stands for; ValueError, in one line, if it is not YAML."""
    try:
        return yaml.load(text, _Loader)
    except yaml.YAMLError as error:
        raise ValueError(f"{place} is not YAML: {' '.join(str(error).split())}") from error


def read_notebook(path: Path) -> nbformat.NotebookNode:
    """A notebook's cells; ValueError for a file that is no notebook."""
    try:
        return nbformat.read(path, 4)
    except FileNotFoundError:
        raise
    except Exception as error:  # nbformat has many ways to say so
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(f"{utils.relative(path)} is no whole notebook: {reason}") from error


def parameters(notebook: Path) -> dict[str, tuple[str, object]]:
    """Type and default of each parameter of a notebook, from its cell tagged `parameters`.

    A parameter without an annotation has the type of its default. ValueError, with the line, for
    what papermill does not read.
    """
    import papermill

    place = utils.relative(notebook)
    cells = read_notebook(notebook).cells
    tagged = [cell for cell in cells if "parameters" in cell.metadata.get("tags", [])]
    if len(tagged) != 1:
        raise ValueError(f"{place} has {len(tagged)} cells tagged `parameters`; it needs one.")
    logging.getLogger("papermill").setLevel(logging.CRITICAL)  # what it cannot read is said below
    found = papermill.inspect_notebook(notebook)
    kinds = {}
    for number, line in enumerate(tagged[0].source.splitlines(), start=1):
        named = re.match(r"(\w+)\s*(:[^=]+)?=", line)
        if not named:
            continue
        try:
            default = ast.literal_eval(found[named[1]]["default"])
        except (KeyError, ValueError, SyntaxError) as error:
            raise ValueError(
                f"{place}, parameters' line {number}: `{line}` cannot be read; write `name: type = "
                "value`, the value a literal, with no other = and no # in it."
            ) from error
        kind = found[named[1]]["inferred_type_name"]
        kinds[named[1]] = (type(default).__name__ if kind == "None" else kind, default)
    return kinds


def check_values(notebook: str, kinds: dict[str, tuple[str, object]], given: dict) -> dict:
    """`given` in the parameters' types; ValueError for an unknown name or another type."""
    utils.check_names(f"{notebook} is given the parameter", given, kinds)
    checked = {}
    for name, value in given.items():
        try:
            checked[name] = as_type(value, kinds[name][0])
        except TypeError as error:
            raise ValueError(f"{name} is {value!r}; {notebook} wants {kinds[name][0]}.") from error
    return checked


def as_type(value: object, kind: str) -> object:
    """`value` as an annotation (`float`, `list[int]`, `Optional[int]`) has it; TypeError if not.

    An int becomes the float it stands for. An unknown type takes anything.
    """
    if optional := re.fullmatch(r"Optional\[(.+)\]", kind):
        return None if value is None else as_type(value, optional[1])
    if listed := re.fullmatch(r"[Ll]ist\[(.+)\]", kind):
        if not isinstance(value, list):
            raise TypeError
        return [as_type(item, listed[1]) for item in value]
    if kind == "float" and type(value) is int:
        return float(value)
    if isinstance(value, float) and not math.isfinite(value):
        raise TypeError
    types = {"int": int, "float": float, "str": str, "bool": bool, "list": list, "dict": dict}
    if kind in types and type(value) is not types[kind]:
        raise TypeError
    return value


def profile_values(profile: str, notebook: str) -> dict:
    """What a profile sets in a notebook; ValueError for an unknown profile or section."""
    known = sorted(path.stem for path in utils.PROFILES.glob("*.yaml"))
    utils.check_choice("profile", profile, known)
    path = utils.PROFILES / f"{profile}.yaml"
    place = utils.relative(path)
    sections = read_yaml(path.read_text(encoding="utf-8"), place) or {}
    notebooks = {path.stem for path in utils.NOTEBOOKS.glob("*.ipynb")}
    utils.check_names(f"{place} has a section", sections, notebooks)
    values = sections.get(notebook) or {}
    _refuse_profile(place, values)
    return values


def _refuse_profile(where: str, values: dict) -> None:
    if "profile" in values:
        raise ValueError(f"{where} sets the parameter profile; give it as --profile NAME.")


# --- Execution ------------------------------------------------------------------------------


def run(notebook: Path, profile: str, output: Path, overrides: dict | None = None) -> None:
    """Execute a notebook with a profile's values and others. ValueError, NotebookError.

    With other values it is not the profile's run any more, so that its record is kept apart.
    """
    overrides = overrides or {}
    _refuse_profile("--set", overrides)
    values = profile_values(profile, notebook.stem) | overrides
    values = check_values(notebook.stem, parameters(notebook), values)
    values["profile"] = "interactive" if overrides else profile
    execute(notebook, output, values, show=True)


def execute(
    notebook: Path,
    output: Path,
    values: dict,
    *,
    environment: dict[str, str] | None = None,
    show: bool = False,
) -> None:
    """Execute a notebook to `output`, whole or not at all, in a kernel of this Python.

    environment: added to this process's. show: print what the cells print. The cells run in a
    temporary copy, renamed on success; a failed one is kept as `NAME.failed.ipynb`. Raises
    NotebookError. Threads of one process may each execute a notebook.
    """
    import papermill
    from jupyter_client import AsyncKernelManager
    from jupyter_client.kernelspec import KernelSpec
    from traitlets.config import Config

    added = {"FF_PROGRESS": "plain", "FF_WORKING_DIR": str(utils.user_path("."))}
    added |= environment or {}

    class Kernel(AsyncKernelManager):
        """A kernel of this Python, whatever kernel specifications are installed."""

        @property
        def kernel_spec(self) -> KernelSpec:
            command = [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"]
            return KernelSpec(argv=command, language="python", env=added)

    if output.resolve() == notebook.resolve():
        raise ValueError(f"--output is {utils.relative(output)}, the notebook: give another file.")
    logging.getLogger("papermill").setLevel(logging.CRITICAL)
    output.parent.mkdir(parents=True, exist_ok=True)
    temporary = output.with_name(f".{output.name}.{os.getpid()}.ipynb")
    failed = output.with_name(f"{output.stem}.failed.ipynb")
    _remove_leftovers(output.parent.glob(f".{output.name}.*.ipynb"))
    try:
        with temporary_folder() as sockets:
            place = {"transport": "ipc", "connection_file": f"{sockets}/{output.stem[:20]}.json"}
            papermill.execute_notebook(
                notebook,
                temporary,
                parameters=values,
                resources={"metadata": {"path": str(notebook.parent)}},  # the kernel's folder
                kernel_name="python3",
                start_timeout=SECONDS_TO_START,
                progress_bar=False,
                stdout_file=sys.stdout if show else None,
                stderr_file=sys.stderr if show else None,
                kernel_manager_class=Kernel,
                extra_arguments=["--log-level=CRITICAL"],  # the interrupt at its end is no error
                config=Config({"KernelManager": place}),
            )
        temporary.replace(output)
        failed.unlink(missing_ok=True)
    except papermill.PapermillExecutionError as error:
        raise _failure(notebook, temporary, failed, f"{error.ename}: {error.evalue}") from error
    except RuntimeError as error:  # the kernel died, or did not start
        reason = str(error)
        if "died" in reason:
            reason = "its kernel died, most often for lack of memory: lower its sizes"
        raise _failure(notebook, temporary, failed, reason) from error
    except OSError as error:
        raise _failure(notebook, temporary, failed, str(error)) from error
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def temporary_folder() -> Iterator[Path]:
    """A temporary folder, removed at the end, or by the next that is made after this process.

    Its path is short enough for sockets. They take the place of ports, which kernels that start
    together may both choose.
    """
    parent = Path(tempfile.gettempdir())
    if len(str(parent)) > SOCKET_PATH:
        parent = Path("/tmp")
    _remove_leftovers(parent.glob("ff-*.*"))
    folder = Path(tempfile.mkdtemp(prefix="ff-", suffix=f".{os.getpid()}", dir=parent))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _remove_leftovers(paths: Iterable[Path]) -> None:
    """Remove what killed processes left: paths that end with the id of one that is gone."""
    for path in paths:
        number = re.search(r"\.(\d+)(\.ipynb)?$", path.name)
        if number and not psutil.pid_exists(int(number[1])):
            shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(
                missing_ok=True
            )


def _failure(notebook: Path, temporary: Path, failed: Path, reason: str) -> NotebookError:
    kept = ""
    if temporary.exists():
        temporary.replace(failed)
        kept = f" (the notebook up to there: {utils.relative(failed)})"
    error = NotebookError(f"{utils.relative(notebook)}: {reason}{kept}")
    error.reason = reason
    return error


# --- Publishing -----------------------------------------------------------------------------


def publish() -> None:
    """Put the default run's outputs into the committed notebooks, and its numbers into README."""
    from ff_utils.report import claims, records

    for source in sorted(utils.NOTEBOOKS.glob("*.ipynb")):
        executed = utils.BUILD / "default" / source.name
        if not executed.exists():
            raise NotebookError(f"{utils.relative(executed)} is missing: run `make reproduce`.")
        published = with_outputs(nbformat.read(source, 4), nbformat.read(executed, 4))
        utils.write_text(source, nbformat.writes(published, version=4, indent=1) + "\n")
        # What was made of the source is as new as it is: make has nothing to do again.
        executed.touch()
        executed.with_suffix(".html").touch()
        records.record_path(source.stem, "default").touch()
    claims.fill_readme()


def with_outputs(
    source: nbformat.NotebookNode, executed: nbformat.NotebookNode
) -> nbformat.NotebookNode:
    """`source` with `executed`'s outputs: same cells, counted 1..n, nothing else added."""
    injected = "injected-parameters"
    ran = [cell for cell in executed.cells if injected not in cell.metadata.get("tags", [])]
    if [cell.source for cell in ran] != [cell.source for cell in source.cells]:
        raise NotebookError(
            "a notebook was edited after the default run: run `make reproduce` first."
        )
    count = 0
    for cell, done in zip(source.cells, ran, strict=True):
        if cell.cell_type != "code":
            continue
        count += 1
        cell.execution_count, cell.outputs = count, done.outputs
        for output in cell.outputs:
            if "execution_count" in output:
                output.execution_count = count
            if "application/vnd.jupyter.widget-view+json" in output.get("data", {}):
                raise NotebookError("a notebook shows a widget, which cannot be published.")
        if str(utils.ROOT) in json.dumps(cell.outputs):
            raise NotebookError(f"cell {count} prints a path of this machine: {cell.source[:60]}")
    source.metadata.pop("papermill", None)
    source.metadata.pop("widgets", None)
    return source


# --- Command line ---------------------------------------------------------------------------


def end_quietly(number: int, _: object) -> None:
    """A signal's handler: one word, and the exit status that shells give it."""
    print("stopped", file=sys.stderr)
    sys.exit(128 + number)


def main(arguments: list[str] | None = None) -> None:
    """Run one command; a failure is one sentence and a non-zero exit."""
    parser = argparse.ArgumentParser(prog="python -m ff_utils")
    commands = parser.add_subparsers(dest="command", required=True)
    for name in ("run", "html"):
        command = commands.add_parser(name)
        command.add_argument("notebook", type=Path)
        command.add_argument("--output", type=Path, required=True)
        if name == "run":
            command.add_argument("--profile", default="default")
            about = "a parameter of the notebook, its value as YAML"
            command.add_argument(
                "--set", action="append", default=[], metavar="NAME=VALUE", help=about
            )
    commands.add_parser("publish")
    options = parser.parse_args(arguments)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, end_quietly)
    try:
        if options.command == "run":
            overrides = dict(map(_name_and_value, options.set))
            print(f"{options.notebook.stem} ({options.profile})", flush=True)
            run(options.notebook, options.profile, options.output, overrides)
        elif options.command == "html":
            from ff_utils.run import pages

            pages.render(options.notebook, options.output)
        else:
            publish()
    except (NotebookError, ValueError, OSError) as error:
        sys.exit(f"error: {error}")


def _name_and_value(text: str) -> tuple[str, object]:
    name, separator, value = text.partition("=")
    if not separator:
        raise ValueError(f"--set is {text!r}; give NAME=VALUE.")
    return name, read_yaml(value, f"--set {text}")
