"""Execute, render and publish the notebooks: what the Makefile calls.

`python -m ff_utils.pipeline run NOTEBOOK --profile smoke --output FILE`
`python -m ff_utils.pipeline html NOTEBOOK --output FILE`
`python -m ff_utils.pipeline publish`

Heavy packages are imported where they are used: make starts a process for every notebook.
"""

import argparse
import difflib
import json
import logging
import os
import re
import sys
import tempfile
from collections.abc import Collection, Iterable
from html import escape
from pathlib import Path

import nbformat
import yaml

from ff_utils import files, paths

SECONDS_TO_START = 300  # of a kernel, on a machine that does much else


class PipelineError(RuntimeError):
    """One sentence that says what to change; `reason` is why a notebook failed, and no more."""

    reason = ""


def profile_parameters(profile: str, notebook: str) -> dict:
    """What a profile sets in a notebook; PipelineError for a name neither of them has."""
    known = sorted(path.stem for path in paths.PROFILES.glob("*.yaml"))
    if profile not in known:
        raise PipelineError(f"profile is {profile!r}; choose one of: {', '.join(known)}.")
    path = paths.PROFILES / f"{profile}.yaml"
    try:
        sections = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except yaml.YAMLError as error:
        raise PipelineError(f"{paths.relative(path)} is not YAML: {error}") from error
    notebooks = {p.stem for p in paths.NOTEBOOKS.glob("*.ipynb")}
    refuse_unknown(f"{paths.relative(path)} has a section", sections, notebooks)
    return {**(sections.get(notebook) or {}), "profile": profile}


def check_parameters(notebook: str, parameters: dict) -> None:
    """PipelineError for a parameter the notebook does not have (papermill only warns)."""
    known = files.parameter_names(notebook)
    refuse_unknown(f"{notebook} is given the parameter", parameters, known)


def refuse_unknown(what: str, given: Iterable[str], known: Collection[str]) -> None:
    """PipelineError for the first name in `given` that is not in `known`, with the nearest."""
    for name in given:
        if name not in known:
            near = difflib.get_close_matches(str(name), known, n=1)
            hint = f"did you mean {near[0]}?" if near else f"it has: {', '.join(sorted(known))}."
            raise PipelineError(f"{what} {name!r}, which does not exist: {hint}")


def run(notebook: Path, profile: str, output: Path, overrides: dict | None = None) -> None:
    """Execute a notebook as a profile, or a profile with other values, says. PipelineError."""
    parameters = profile_parameters(profile, notebook.stem)
    if overrides:  # not the profile's run any more: its record is kept apart
        parameters |= {"profile": "interactive"} | overrides
    check_parameters(notebook.stem, parameters)
    execute(notebook, output, parameters)


def execute(
    notebook: Path, output: Path, parameters: dict, environment: dict[str, str] | None = None
) -> None:
    """Execute a notebook to `output`, whole or not at all, in a kernel with `environment` added.

    The cells run in a temporary copy, renamed on success; a failed copy is kept as
    `NAME.failed.ipynb` for reading. Raises PipelineError. Threads of one process may each
    execute a notebook.
    """
    import papermill
    from jupyter_client import AsyncKernelManager
    from traitlets.config import Config

    class Kernel(AsyncKernelManager):
        async def start_kernel(self, **settings: object) -> None:
            await super().start_kernel(env=os.environ | (environment or {}), **settings)

    output.parent.mkdir(parents=True, exist_ok=True)
    temporary = output.with_name(f".{output.name}.{os.getpid()}.ipynb")
    failed = output.with_name(f"{output.stem}.failed.ipynb")
    os.environ["FF_PROGRESS"] = "plain"
    sockets = tempfile.TemporaryDirectory(prefix="ff-")  # instead of ports, which can collide
    try:
        papermill.execute_notebook(
            str(notebook),
            str(temporary),
            parameters=parameters,
            resources={"metadata": {"path": str(notebook.parent)}},  # the kernel's folder
            kernel_name="python3",
            start_timeout=SECONDS_TO_START,
            progress_bar=False,
            log_output=True,
            kernel_manager_class=Kernel,
            extra_arguments=["--log-level=CRITICAL"],  # the interrupt at its end is no error
            config=Config({"KernelManager": {"transport": "ipc", "ip": f"{sockets.name}/kernel"}}),
        )
        temporary.replace(output)
        failed.unlink(missing_ok=True)
    except papermill.PapermillExecutionError as error:
        raise _failure(notebook, temporary, failed, f"{error.ename}: {error.evalue}") from error
    except RuntimeError as error:  # a kernel died, or never began
        reason = str(error)
        if "died" in reason:
            reason = "its kernel died, most often for lack of memory: lower its sizes"
        raise _failure(notebook, temporary, failed, reason) from error
    except OSError as error:
        raise _failure(notebook, temporary, failed, str(error)) from error
    finally:
        temporary.unlink(missing_ok=True)
        sockets.cleanup()


def _failure(notebook: Path, temporary: Path, failed: Path, reason: str) -> PipelineError:
    kept = ""
    if temporary.exists():
        temporary.replace(failed)
        kept = f" (the notebook up to there: {paths.relative(failed)})"
    error = PipelineError(f"{paths.relative(notebook)}: {reason}{kept}")
    error.reason = reason
    return error


def html(notebook: Path, output: Path) -> None:
    """Render an executed notebook as one HTML file that needs no network: images, alt text and
    equations (as MathML) are inside it."""
    from nbconvert import HTMLExporter

    cells = nbformat.read(notebook, 4)
    descriptions, equations = [], []
    for cell in cells.cells:
        if cell.cell_type == "markdown":
            cell.source = _take_equations(cell.source, equations)
        for shown in cell.get("outputs", []):
            if "image/png" in shown.get("data", {}):
                about = shown.metadata.get("image/png", {})
                descriptions.append(about.get("alt", notebook.stem))
    exporter = HTMLExporter(embed_images=True, mathjax_url="")
    logging.getLogger("traitlets").setLevel(logging.ERROR)
    body, _ = exporter.from_notebook_node(cells)
    for description in descriptions:
        # nbconvert reads no alt text from outputs: fill its placeholders in order.
        body = body.replace(
            "No description has been provided for this image", escape(description), 1
        )
    body = re.sub(r"EQUATION(\d+)END", lambda found: equations[int(found[1])], body)
    title = f"<title>{notebook.stem.replace('_', ' ')}</title>"
    body = re.sub(r"<title>.*?</title>", title, body, count=1)
    # Links between notebooks stay among the rendered pages.
    body = re.sub(r'href="(\d\d_\w+)\.ipynb"', r'href="\1.html"', body)
    files.write_atomically(output, body)


def _take_equations(markdown: str, equations: list[str]) -> str:
    """Markdown with a mark in place of each $$...$$ and $...$, whose MathML joins `equations`."""

    from latex2mathml.converter import convert as to_mathml

    def take(found: re.Match) -> str:
        block = found[1] is not None
        latex = found[1] if block else found[2]
        equations.append(to_mathml(latex, display="block" if block else "inline"))
        mark = f"EQUATION{len(equations) - 1}END"
        return f"\n\n{mark}\n\n" if block else mark

    return re.sub(r"\$\$(.+?)\$\$|\$([^$\n]+?)\$", take, markdown, flags=re.DOTALL)


def publish() -> None:
    """Put the default run's outputs into the committed notebooks, and its numbers into README."""
    for source in sorted(paths.NOTEBOOKS.glob("*.ipynb")):
        executed = paths.BUILD / "default" / source.name
        if not executed.exists():
            raise PipelineError(f"{paths.relative(executed)} is missing: run `make reproduce`.")
        published = with_outputs(nbformat.read(source, 4), nbformat.read(executed, 4))
        files.write_atomically(source, notebook_text(published))
        # The executed copy is as new as its source: make has nothing to do again.
        executed.touch()
        executed.with_suffix(".html").touch()
    from ff_utils.readme import write_tables

    write_tables()


def with_outputs(source, executed):
    """`source` with `executed`'s outputs: same cells, counted 1..n, nothing else added."""
    ran = [
        cell
        for cell in executed.cells
        if "injected-parameters" not in cell.metadata.get("tags", [])
    ]
    if [cell.source for cell in ran] != [cell.source for cell in source.cells]:
        raise PipelineError(
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
                raise PipelineError("a notebook shows a widget, which cannot be published.")
        if str(paths.ROOT) in json.dumps(cell.outputs):
            raise PipelineError(f"cell {count} prints a path of this machine: {cell.source[:60]}")
    source.metadata.pop("papermill", None)
    source.metadata.pop("widgets", None)
    return source


def notebook_text(notebook) -> str:
    """A notebook as it is committed."""
    return nbformat.writes(notebook, version=4, indent=1) + "\n"


class _CellOutput(logging.Filter):
    """Of papermill's log, only what the cells print."""

    def filter(self, record: logging.LogRecord) -> bool:
        return not re.match(
            r"Executing|Ending Cell|Input Notebook|Output Notebook|Black is|<IPython|<Figure|"
            r"Working directory|Translating|Parameters|\s*$",
            record.getMessage(),
        )


def main() -> None:
    """Run one command; a failure is one sentence and a non-zero exit."""
    parser = argparse.ArgumentParser(prog="python -m ff_utils.pipeline")
    commands = parser.add_subparsers(dest="command", required=True)
    for name in ("run", "html"):
        command = commands.add_parser(name)
        command.add_argument("notebook", type=Path)
        command.add_argument("--output", type=Path, required=True)
        if name == "run":
            command.add_argument("--profile", default="default")
            command.add_argument(
                "--set",
                action="append",
                default=[],
                metavar="NAME=VALUE",
                help="a parameter of the notebook, its value as YAML",
            )
    commands.add_parser("publish")
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="    %(message)s", stream=sys.stdout)
    for handler in logging.getLogger().handlers:
        handler.addFilter(_CellOutput())
    try:
        if options.command == "run":
            print(f"{options.notebook.stem} ({options.profile})", flush=True)
            overrides = dict(_pair(text) for text in options.set)
            run(options.notebook, options.profile, options.output, overrides)
        elif options.command == "html":
            html(options.notebook, options.output)
        else:
            publish()
    except (PipelineError, ValueError, OSError) as error:
        sys.exit(f"error: {error}")


def _pair(text: str) -> tuple[str, object]:
    name, separator, value = text.partition("=")
    if not separator:
        raise PipelineError(f"--set is {text!r}; give NAME=VALUE.")
    return name, yaml.safe_load(value)


if __name__ == "__main__":
    main()
