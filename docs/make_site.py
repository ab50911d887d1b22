"""Build the site: `python docs/make_site.py` writes build/site/index.html and its pages.

No notebook is executed: the committed ones are shown with their outputs, and every table is read
from a record or from the code. The pages open from disk and ask nothing of a network.
"""

import argparse
import base64
import csv
import html
import inspect
import json
import re
import shutil
import struct
import sys
from collections.abc import Iterator
from pathlib import Path

import nbformat
import yaml
from chart_data import chart_data

import ff_utils
from ff_utils import memory, utils
from ff_utils.memory.formulas import FORMULAS
from ff_utils.report import claims, records
from ff_utils.run import notebooks

HERE = Path(__file__).parent
ORDER = [
    *sorted(utils.NOTEBOOKS.glob("[0-9]*.ipynb")),
    *sorted(utils.NOTEBOOKS.glob("[a-z]*.ipynb")),
]
OPEN_LINES = 8  # code cells that are longer are folded
TRAININGS = "06_every_form", "full_length"  # notebook and metric of claims about test errors
FAULTS = utils.RESULTS / "faults.json"
SCRIPTS = "".join(
    f'<script src="../_static/{name}.js"></script>\n' for name in ("charts-data", "charts")
)
LINK = re.compile(r"\]\(([^()\s#:]+)\)")
TO_NOTEBOOK = re.compile(r'href="(\w+)\.ipynb"')  # in a table, where Sphinx follows no links
EMPTY_HEADING = re.compile(r"<th\b([^>]*)>(?:\s|&nbsp;)*</th>")
# A chart follows the cell that draws the figure of this name.
CHARTS = {"01_goodness": "goodness", "01_prediction": "digits", "04_your_sizes": "memory"}


# --- Notebooks ------------------------------------------------------------------------------


def notebook_page(path: Path, pictures: Path) -> nbformat.NotebookNode:
    """A notebook as the site shows it: long code folded, images as files with captions.

    The cells that draw the figures of CHARTS are followed by charts to move.
    """
    page = nbformat.read(path, 4)
    page.metadata.pop("widgets", None)
    number = re.match(r"(\d\d)_", path.name)
    figures = 0
    charts = []
    code = [cell for cell in page.cells if cell.cell_type == "code"]
    for count, cell in enumerate(code, start=1):
        if len(cell.source.splitlines()) > OPEN_LINES:
            cell.metadata.setdefault("tags", []).append("hide-input")
        cell.outputs = [o for o in cell.outputs if not _is_widget(o)]
        for output in cell.outputs:
            if image := output.get("data", {}).get("image/png"):
                figures += 1
                name = f"{path.stem}-{count}-{figures}.png"
                content = base64.b64decode(image)
                _write(pictures / name, content)
                title = f"Figure {int(number[1])}.{figures}" if number else f"Figure {figures}"
                about = output.metadata.get("image/png", {})
                output.data = {"text/html": _figure(name, content, title, about)}
            elif "text/html" in output.get("data", {}):  # a table; an empty cell is no heading
                table = output.data["text/html"]
                table = EMPTY_HEADING.sub(r"<td\1></td>", table)
                output.data["text/html"] = TO_NOTEBOOK.sub(r'href="\1.html"', table)
        for figure, chart in CHARTS.items():
            if f'"{figure}"' in cell.source:
                charts.append((cell, f'<div class="chart" data-chart="{chart}"></div>'))
    for cell, chart in charts:
        page.cells.insert(page.cells.index(cell) + 1, nbformat.v4.new_markdown_cell(chart))
    if charts:
        page.cells.append(nbformat.v4.new_markdown_cell(SCRIPTS))
    return page


def _is_widget(output: nbformat.NotebookNode) -> bool:
    return "application/vnd.jupyter.widget-view+json" in output.get("data", {})


def _figure(name: str, content: bytes, title: str, about: dict) -> str:
    width, height = struct.unpack(">II", content[16:24])  # of a PNG
    shown = about.get("width", width)
    alt = html.escape(about.get("alt", title))
    size = f'width="{shown}" height="{round(height * shown / width)}"'
    source = f"../_static/cells/{name}"
    return (
        f'<figure><a href="{source}"><img src="{source}" alt="{alt}" {size} loading="lazy"></a>'
        f"<figcaption><b>{title}.</b> {alt}</figcaption></figure>"
    )


def testing_cell(metric: str) -> tuple[str, int]:
    """The notebook that a claim's metric comes from, and its code cell, counted from 1.

    It is the last cell that assigns the variable that the record has under the metric's first name,
    or the cell that writes the record.
    """
    place, _, asked = metric.partition(": ")
    if place == claims.ERRORS:
        place, asked = TRAININGS
    name = place.split("/")[-1]
    cells = nbformat.read(utils.NOTEBOOKS / f"{name}.ipynb", 4).cells
    sources = [cell.source for cell in cells if cell.cell_type == "code"]
    last = next(n for n, text in enumerate(sources, 1) if "run.finish(" in text)
    key = re.match(r"\w+", asked)[0]
    if kept := re.search(rf'"{key}": (\w+)', sources[last - 1]):
        assigned = re.compile(rf"^(\w+, )*{kept[1]}(, \w+)*( = |\[)", flags=re.MULTILINE)
        made = [n for n, text in enumerate(sources[: last - 1], 1) if assigned.search(text)]
        return name, made[-1] if made else last
    return name, last


# --- Generated pages ------------------------------------------------------------------------


def ledger_page() -> str:
    """Every claim with its verdict, and a link to the cell that tests it."""
    known = {name: records.read(name, "default") for name in claims.notebooks()}
    table = claims.judge(known).to_dict("records")
    rows = []
    for row, claim in zip(table, claims.read(), strict=True):
        links = "not measured yet"
        if claim.metric:
            name, cell = testing_cell(claim.metric)
            title = name.replace("_", " ").lstrip("0")
            links = (
                f'<a href="../notebooks/{name}.html#in-{cell}">notebook {title}, cell {cell}</a>'
            )
        text = {key: html.escape(str(value)) for key, value in row.items()}
        rows.append(
            f'<article class="claim" data-verdict="{text["verdict"]}">'
            f'<p><span class="verdict {text["verdict"]}">{text["verdict"]}</span> '
            f"<strong>{text['claim']}</strong></p><p>{text['why']}</p>"
            f"<dl><dt>claimed</dt><dd>{text['claimed']}</dd><dt>measured</dt>"
            f"<dd>{text['measured']}</dd><dt>source</dt><dd>{text['source']}</dd>"
            f"<dt>tested in</dt><dd>{links}</dd></dl></article>"
        )
    counts = {v: sum(row["verdict"] == v for row in table) for v in claims.VERDICTS}
    buttons = "".join(
        f'<button data-show="{v}" aria-pressed="false">{v} ({n})</button>'
        for v, n in counts.items()
    )
    return f"""# Claims, one by one

What others say of Forward-Forward's memory, accuracy and time, and what the records of this
study say. A claim *holds* or *fails* by the number that was measured, and is *indistinguishable*
where its interval has the claim inside. It is *open* where too little has been measured.
`make verify` judges every claim again. The entries are in [data/claims.yaml](../data/claims.yaml).

<div class="filter" role="group" aria-label="Show claims whose verdict is"><button data-show="" \
aria-pressed="true">all ({len(table)})</button>{buttons}</div>

{"".join(rows)}
"""


def arms_page() -> str:
    """The table of arms."""
    rows = [
        f"| `{arm.name}` | {arm.title} | {arm.description} | "
        f"{'yes' if arm.name in FORMULAS else ''} |"
        for arm in memory.ARMS.values()
    ]
    return f"""# Arms

An *arm* is one way to train: a network, a training step, and what the step does to save memory.
Every name below can be given to `--arm` of the
[command line](reference.md#memory-of-a-training-step), to `ff_utils.measure` and to the notebooks.
Where there is a formula, a test holds it to within 1 % of the simulation.

| name | in figures | what it does | formula |
|---|---|---|---|
{chr(10).join(rows)}
"""


def profiles_page() -> str:
    """Every notebook's parameters, and what each profile sets."""
    profiles = ["smoke", "paper", "gpu"]
    parts = []
    for path in ORDER:
        values = {
            name: notebooks.profile_values(name, path.stem) for name in ["default", *profiles]
        }
        comments = _comments(path)
        rows = []
        for name, (kind, default) in notebooks.parameters(path).items():
            if name == "profile":
                continue
            default = values["default"].get(name, default)
            shown = [
                _code(default),
                *(_code(values[p][name]) if name in values[p] else "" for p in profiles),
            ]
            rows.append(f"| `{name}` | {comments.get(name, kind)} | {' | '.join(shown)} |")
        head = f"| parameter | what | default | {' | '.join(profiles)} |\n|---|---|---|---|---|---|"
        parts.append(f"## [{_title(path)}](../notebooks/{path.name})\n\n{head}\n" + "\n".join(rows))
    return f"""# Parameters and profiles

A *profile* is a set of parameters for all notebooks: `default` makes the committed results,
`smoke` runs everything in miniature, `paper` runs the sizes of the original study, `gpu` measures
on a GPU. An empty cell means the default. Any parameter can be given for one run:

    .venv/bin/python -m ff_utils run notebooks/02_ff_training.ipynb --set seed=1 \\
        --output build/02.ipynb

{(chr(10) * 2).join(parts)}
"""


def _comments(path: Path) -> dict[str, str]:
    cells = nbformat.read(path, 4).cells
    tagged = next(cell for cell in cells if "parameters" in cell.metadata.get("tags", []))
    found = re.findall(r"^(\w+)\b[^#\n]*#\s*(.+)$", tagged.source, flags=re.MULTILINE)
    return {name: comment.replace("|", "\\|") for name, comment in found}


def _code(value: object) -> str:
    return f"`{json.dumps(value)}`".replace("|", "\\|")


def _title(path: Path) -> str:
    first = next(c for c in nbformat.read(path, 4).cells if c.cell_type == "markdown").source
    return re.search(r"^# (.+)$", first, flags=re.MULTILINE)[1]


def sweeps_page() -> str:
    """Every sweep that is defined, and the table that it filled."""
    parts = []
    for path in sorted((utils.NOTEBOOKS / "sweeps").glob("*.yaml")):
        table = utils.RESULTS / "sweeps" / f"{path.stem}.csv"
        found = "No table is committed."
        if table.exists():
            with table.open(encoding="utf-8", newline="") as file:
                count = sum(1 for _ in csv.reader(file)) - 1
            found = f"[Its table](../data/results/sweeps/{table.name}) has {count} rows."
        text = path.read_text(encoding="utf-8")
        about = " ".join(
            re.findall(r"^# ?(.*)$", text.split("\nnotebook", 1)[0], flags=re.MULTILINE)
        )
        body = yaml.safe_load(text)
        body = yaml.safe_dump(body, sort_keys=False, default_flow_style=None, width=90)
        parts.append(f"## {path.stem}\n\n{about} {found}\n\n```yaml\n{body}```")
    return f"""# Sweeps

A *sweep* runs one notebook at every point of a grid and gathers a table:
`make sweep SWEEP=NAME JOBS=2`.
[The reference](reference.md#sweeps) says how to write your own, and
[notebook 8](../notebooks/08_sweeps.ipynb) draws the tables.

{(chr(10) * 2).join(parts)}
"""


def faults_page() -> str:
    """The trials of `make faults`: how many were survived, and each one."""
    record = json.loads(FAULTS.read_text(encoding="utf-8"))
    trials, made = record["metrics"]["trials"], record["provenance"]
    counts: dict[tuple[str, str], list[int]] = {}
    for trial in trials:
        tried = counts.setdefault((trial["fault"], trial["of"]), [0, 0])
        tried[0] += 1
        tried[1] += trial["survived"]
    summary = [
        f"| {fault} | {of} | {tried} | {survived} |"
        for (fault, of), (tried, survived) in sorted(counts.items())
    ]
    rows = [
        f"| {t['seed']} | {t['fault']} | {t['of']} | {t['what'].replace('|', ' ')} | "
        f"{'yes' if t['survived'] else t['why']} |"
        for t in trials
    ]
    return f"""# Faults

Commands of this repository were killed at a random moment, ran out of disk, ran twice at once, or
were given damaged files. Then each was given again. It survived if it ended with the numbers of an
undisturbed run and left nothing behind: {sum(t["survived"] for t in trials)} of {len(trials)} did.
`make faults` repeats the trials; a trial's seed decides all that is random in it. (Commit
{made["commit"]}, {made["system"]}, {made["cores"]} cores.)

| fault | of | tried | survived |
|---|---|---|---|
{chr(10).join(summary)}

## Every trial

| seed | fault | of | what was done | survived |
|---|---|---|---|---|
{chr(10).join(rows)}
"""


def api_page() -> str:
    """The public names of `ff_utils`, from their docstrings."""
    names = [(ff_utils, name) for name in ff_utils.__all__]
    names += [(memory, name) for name in memory.__all__ if name not in ff_utils.__all__]
    lines = []
    for module, name in names:
        thing = getattr(module, name)
        if not (inspect.isclass(thing) or inspect.isfunction(thing)):
            continue  # ARMS has a page of its own
        place = f"{module.__name__}.{name}"
        kind = "autoclass" if inspect.isclass(thing) else "autofunction"
        lines += [f"## {name}\n", "```{eval-rst}", f".. {kind}:: {place}"]
        lines += ["   :members:"] if inspect.isclass(thing) else []
        lines += ["```", ""]
    return f"""# Python interface

What `ff_utils` and `ff_utils.memory` export, with their shapes, units and errors. `ARMS` is
listed on [a page of its own](arms.md).

{chr(10).join(lines)}
"""


def charts_page() -> str:
    """The charts, on one page."""
    return (HERE / "charts.md").read_text(encoding="utf-8") + f"\n{SCRIPTS}"


# --- All of it ------------------------------------------------------------------------------


def pages(source: Path, folder: Path) -> Iterator[tuple[str, str | bytes]]:
    """Name and content of every file that Sphinx reads; folder: of the notebooks that are shown."""
    for path in ORDER:
        page = notebook_page(folder / path.name, source / "_static" / "cells")
        yield f"notebooks/{path.name}", nbformat.writes(page, version=4)
    numbers = json.dumps(chart_data(), separators=(",", ":"))
    yield "_static/charts-data.js", f"window.chartData = {numbers};\n"
    generated = {
        "charts": charts_page(),
        "ledger": ledger_page(),
        "arms": arms_page(),
        "profiles": profiles_page(),
        "sweeps": sweeps_page(),
        "api": api_page(),
        "faults": faults_page(),
    }
    for name, text in generated.items():
        yield f"docs/{name}.md", text
    for name in ("docs/reference.md", "CONTRIBUTING.md", "CHANGELOG.md"):
        yield name, (utils.ROOT / name).read_text(encoding="utf-8")
    readme = (utils.ROOT / "README.md").read_text(encoding="utf-8")
    yield "index.md", readme + contents()


def linked(name: str, text: str) -> Iterator[Path]:
    """Files of the repository, other than pages, that a page shows or links to."""
    for target in LINK.findall(text):
        path = ((utils.ROOT / name).parent / target).resolve()
        if path.is_file() and path.suffix not in (".md", ".ipynb"):
            yield path


def contents() -> str:
    """The table of contents, for the end of the first page."""
    groups = {
        "Notebooks": [f"notebooks/{path.stem}" for path in ORDER],
        "Try it": ["docs/charts"],
        "Results": [f"docs/{name}" for name in ("ledger", "faults")],
        "Reference": [
            *(f"docs/{name}" for name in ("reference", "arms", "profiles", "sweeps", "api")),
            "CONTRIBUTING",
            "CHANGELOG",
        ],
    }
    return "".join(
        f"\n```{{toctree}}\n:hidden:\n:caption: {caption}\n\n" + "\n".join(names) + "\n```\n"
        for caption, names in groups.items()
    )


def _write(path: Path, content: str | bytes) -> None:
    """Write a file if it is not so already: Sphinx reads again only what is newer."""
    content = content.encode() if isinstance(content, str) else content
    if not path.exists() or path.read_bytes() != content:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)


def build(folder: Path, output: Path) -> int:
    """Build the site of the notebooks in `folder`; returns Sphinx's exit status."""
    from sphinx.cmd.build import main as sphinx

    source = output.with_name(f"{output.name}-source")
    written = set()
    for name, content in pages(source, folder):
        if name.endswith((".md", ".ipynb")):
            content = content.replace("README.md", "index.md")
            for path in linked(name, content):
                _write(source / path.relative_to(utils.ROOT), path.read_bytes())
        _write(source / name, content)
        written.add(source / name)
    for path in [p for p in source.rglob("*.*") if p.suffix in (".md", ".ipynb")]:
        if path not in written:
            path.unlink()
    shutil.copytree(HERE / "_static", source / "_static", dirs_exist_ok=True)
    static = f"html_static_path={source / '_static'}"
    return sphinx(["-q", "-b", "html", "-c", str(HERE), "-D", static, str(source), str(output)])


def main() -> None:
    """Build; exits with Sphinx's status."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--notebooks", type=Path, default=utils.NOTEBOOKS)
    parser.add_argument("--output", type=Path, default=utils.BUILD / "site")
    options = parser.parse_args()
    try:
        status = build(options.notebooks, options.output)
    except (ValueError, OSError) as error:  # a record or a claim that is missing, for one
        sys.exit(f"error: {error}")
    if status:
        sys.exit(status)
    print(f"site      {utils.relative(options.output / 'index.html')}")


if __name__ == "__main__":
    main()
