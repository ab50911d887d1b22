"""Notebooks run in real kernels, in a repository of one notebook; pages and publishing."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

from ff_utils import utils
from ff_utils.run import notebooks, pages

KERNEL = {"kernelspec": {"name": "python3", "language": "python", "display_name": "Python"}}
PARAMETERS = 'profile: str = "interactive"  # a name\ncount: int = 1  # 1 or more'


@pytest.fixture
def house(tmp_path, monkeypatch):
    """A repository of one notebook, `01_small`, and one profile."""
    (tmp_path / "notebooks" / "profiles").mkdir(parents=True)
    monkeypatch.setattr(utils, "ROOT", tmp_path)
    monkeypatch.setattr(utils, "NOTEBOOKS", tmp_path / "notebooks")
    monkeypatch.setattr(utils, "PROFILES", tmp_path / "notebooks" / "profiles")
    (utils.PROFILES / "quick.yaml").write_text("01_small:\n  count: 3\n")
    return tmp_path


def write(house, code="", parameters=PARAMETERS):
    cells = [
        new_markdown_cell("# Small"),
        new_code_cell(parameters, metadata={"tags": ["parameters"]}),
        new_code_cell(code),
    ]
    path = house / "notebooks" / "01_small.ipynb"
    nbformat.write(new_notebook(cells=cells, metadata=KERNEL), path)
    return path


def printed(path):
    cells = nbformat.read(path, 4).cells
    return "".join(o.get("text", "") for c in cells for o in c.get("outputs", []))


def names(folder):
    return sorted(path.name for path in folder.iterdir())


# --- values ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-3", 0.001),
        ("-2.5E+3", -2500.0),
        (".5", 0.5),
        ("3.", 3.0),
        ("-7", -7),
        ("010", 10),
        ("[1e3, 2]", [1000.0, 2]),
        ("1.2.3e4", "1.2.3e4"),
        ("1e-3x", "1e-3x"),
        ("true", True),
        ("null", None),
        ("'1'", "1"),
    ],
)
def test_yaml_numbers_are_what_people_type(text, value):
    read = notebooks.read_yaml(text, "here")
    assert read == value and type(read) is type(value)


def test_yaml_keeps_merge_keys_and_refuses_a_key_given_twice():
    assert notebooks.read_yaml("a: &a {x: 1}\nb: {<<: *a, x: 2, y: 3}", "here")["b"] == {
        "x": 2,
        "y": 3,
    }
    for text in ("a: 1\na: 2", "a: {b: 1, b: 1}"):
        with pytest.raises(ValueError, match=r"here is not YAML: the key '.' is given twice"):
            notebooks.read_yaml(text, "here")


@pytest.mark.parametrize(
    ("value", "kind", "result"),
    [
        (1, "float", 1.0),
        (1, "int", 1),
        ([1, 2.5], "list[float]", [1.0, 2.5]),
        ([[1], [2]], "list[list[int]]", [[1], [2]]),
        (None, "Optional[int]", None),
        (3, "Optional[int]", 3),
        ("a", "Path", "a"),
    ],
)
def test_values_take_the_annotated_type(value, kind, result):
    taken = notebooks.as_type(value, kind)
    assert taken == result and type(taken) is type(result)


@pytest.mark.parametrize(
    ("value", "kind"),
    [
        ("1", "float"),
        (True, "int"),
        (1.0, "int"),
        (1, "bool"),
        (1, "list[int]"),
        (float("inf"), "float"),
        (["a"], "list[int]"),
    ],
)
def test_values_of_another_type_are_refused(value, kind):
    with pytest.raises(TypeError):
        notebooks.as_type(value, kind)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"cells": [5]}', "[" * 5000, "\xff"])
def test_file_that_is_no_notebook_is_one_sentence(tmp_path, text):
    path = tmp_path / "x.ipynb"
    path.write_text(text, encoding="latin-1")
    with pytest.raises(ValueError, match=r"x\.ipynb is no whole notebook") as info:
        notebooks.read_notebook(path)
    assert "\n" not in str(info.value)


def test_notebook_is_never_its_own_output(house):
    path = write(house)
    with pytest.raises(ValueError, match="give another file"):
        notebooks.execute(path, path, {})


def test_parameters_are_read_as_people_write_them(house):
    text = "%matplotlib inline\n# sizes\nx = 1e-3\nok = True\n"
    text += 'names: list[str] = [\n    "a",\n]  # many'
    found = notebooks.parameters(write(house, parameters=text))
    assert found == {"x": ("float", 0.001), "names": ("list[str]", ["a"]), "ok": ("bool", True)}


@pytest.mark.parametrize("line", ["x = 1e-3 * 2", 'x = "a=b"', "x: int | None = 1", "x = f(1)"])
def test_parameters_that_cannot_be_read_are_refused_with_their_line(house, line):
    path = write(house, parameters=f"seed: int = 0  # any\n{line}")
    with pytest.raises(ValueError, match=r"01_small.ipynb, parameters' line 2: .* a literal"):
        notebooks.parameters(path)


def test_parameters_cells_are_exactly_one(house):
    path = write(house)
    notebook = nbformat.read(path, 4)
    twice = new_code_cell("x = 1", metadata={"tags": ["parameters"]})
    for cells in (notebook.cells[:1], [*notebook.cells, twice]):
        nbformat.write(new_notebook(cells=cells, metadata=KERNEL), path)
        with pytest.raises(ValueError, match="cells tagged `parameters`; it needs one"):
            notebooks.parameters(path)


# --- execution ------------------------------------------------------------------------------


def test_run_gives_the_profiles_values_or_others_and_then_another_record(house, monkeypatch):
    output = house / "build" / "01_small.ipynb"
    code = "from ff_utils import utils\nprint(profile, count * 2, utils.user_path('images'))"
    path = write(house, code)
    monkeypatch.chdir(house)
    notebooks.run(path, "quick", output)
    assert printed(output) == f"quick 6 {house / 'images'}\n"
    assert names(output.parent) == ["01_small.ipynb"]
    notebooks.run(path, "quick", output, {"count": 7})
    assert printed(output).startswith("interactive 14 ")


def test_failed_notebook_is_kept_for_reading_and_the_old_output_stays(house):
    output = house / "build" / "01_small.ipynb"
    output.parent.mkdir()
    output.write_text("old")
    (output.parent / ".01_small.ipynb.99999999.ipynb").touch()  # a killed run's
    broken = write(house, "print('so far')\nraise ValueError('count is 3; give less.')")
    with pytest.raises(
        notebooks.NotebookError, match=r"ValueError: count is 3; give less\."
    ) as info:
        notebooks.run(broken, "quick", output)
    assert "build/01_small.failed.ipynb" in str(info.value)
    assert info.value.reason == "ValueError: count is 3; give less."
    assert output.read_text() == "old"
    assert "so far" in printed(house / "build" / "01_small.failed.ipynb")
    notebooks.run(write(house, "print('mended')"), "quick", output)
    assert names(output.parent) == ["01_small.ipynb"]


def test_kernel_that_dies_is_one_sentence(house):
    output = house / "build" / "01_small.ipynb"
    killed = write(house, "import os, signal\nos.kill(os.getpid(), signal.SIGKILL)")
    with pytest.raises(notebooks.NotebookError, match="kernel died, most often for lack of memory"):
        notebooks.run(killed, "quick", output)
    assert not output.exists()


def test_kernel_is_of_this_python_and_its_sockets_fit_wherever_files_are(house, monkeypatch):
    specification = house / "jupyter" / "kernels" / "python3"
    specification.mkdir(parents=True)
    (specification / "kernel.json").write_text('{"argv": ["false"], "display_name": "x"}')
    long = house / ("temporary" * 10)
    long.mkdir()
    monkeypatch.setenv("JUPYTER_PATH", str(house / "jupyter"))
    monkeypatch.setenv("TMPDIR", str(long))
    monkeypatch.setattr("tempfile.tempdir", None)
    output = house / "build" / "01_small.ipynb"
    notebooks.run(write(house, "import sys\nprint(sys.executable)"), "quick", output)
    assert printed(output) == f"{sys.executable}\n"
    assert not names(long)


def test_unknown_names_and_values_fail_before_anything_runs(house):
    path = write(house, "raise SystemExit('ran')")
    output = house / "build" / "01_small.ipynb"
    for profile, overrides, sentence in (
        ("quick", {"cuont": 2}, "'cuont', which does not exist: did you mean count"),
        ("quick", {"count": "2"}, "count is '2'; 01_small wants int"),
        ("quick", {"profile": "default"}, "sets the parameter profile; give it as --profile"),
        ("slow", {}, "profile is 'slow'; choose one of: quick"),
        ("../quick", {}, "profile is '../quick'"),
    ):
        with pytest.raises(ValueError, match=sentence):
            notebooks.run(path, profile, output, overrides)
    for text, sentence in (
        ("01_smal:\n  count: 2\n", "section '01_smal', which does not exist"),
        ("01_small: {count: 1e-3}", "count is 0.001; 01_small wants int"),
        ("01_small: {profile: evil}", "typo.yaml sets the parameter profile"),
        ("01_small: [", "is not YAML"),
    ):
        (utils.PROFILES / "typo.yaml").write_text(text)
        with pytest.raises(ValueError, match=sentence):
            notebooks.run(path, "typo", output)
    assert not output.parent.exists()


def test_command_line_reads_numbers_and_refuses_in_one_sentence(house, capsys):
    path = str(write(house, "print(count)"))
    command = ["run", path, "--profile", "quick", "--output", str(house / "x.ipynb")]
    for text, sentence in (("count", "give NAME=VALUE"), ("count=[5", "is not YAML")):
        with pytest.raises(SystemExit, match=f"error: .*{sentence}"):
            notebooks.main([*command, "--set", text])
    with pytest.raises(SystemExit, match=r"count is 0\.001; 01_small wants int"):
        notebooks.main([*command, "--set", "count=1e-3"])


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signal_ends_a_run_with_one_word_and_leaves_nothing(house, number, tmp_path_factory):
    path = write(house, f"open({str(house / 'begun')!r}, 'w')\nimport time\ntime.sleep(60)")
    temporary = tmp_path_factory.mktemp("t")
    code = f"""
from pathlib import Path
from ff_utils import utils
utils.ROOT = Path({str(house)!r})
utils.NOTEBOOKS, utils.PROFILES = utils.ROOT / "notebooks", utils.ROOT / "notebooks" / "profiles"
from ff_utils.run import notebooks
notebooks.main()"""
    output = house / "build" / "01_small.ipynb"
    process = subprocess.Popen(
        [sys.executable, "-c", code, "run", path, "--profile", "quick", "--output", output],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=os.environ | {"TMPDIR": str(temporary), "PYTHONPATH": str(Path.cwd())},
        # What starts the tests in the background may ignore the interrupts of these.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    for _ in range(3000):  # a kernel starts slowly on a busy machine
        if (house / "begun").exists():
            break
        time.sleep(0.1)
    process.send_signal(number)
    said = process.communicate(timeout=60)[0]
    assert process.returncode == 128 + number, said
    assert said == "01_small (quick)\nstopped\n"
    assert not names(output.parent) and not names(temporary)


# --- publishing -----------------------------------------------------------------------------


def executed(path):
    notebook = nbformat.read(path, 4)
    notebook.cells.insert(2, new_code_cell("count = 3", metadata={"tags": ["injected-parameters"]}))
    notebook.cells[3].outputs = [
        new_output("execute_result", {"text/plain": "3"}, execution_count=9)
    ]
    notebook.metadata["papermill"] = {"duration": 1}
    return notebook


def test_published_outputs_are_those_of_the_run_and_nothing_else_changes(house):
    path = write(house, "count")
    source = nbformat.read(path, 4)
    published = notebooks.with_outputs(nbformat.read(path, 4), executed(path))
    assert [c.source for c in published.cells] == [c.source for c in source.cells]
    code = [c for c in published.cells if c.cell_type == "code"]
    assert [c.execution_count for c in code] == [1, 2]
    assert code[1].outputs[0].execution_count == 2 and "papermill" not in published.metadata


@pytest.mark.parametrize(
    ("output", "sentence"),
    [
        (lambda house: new_output("stream", text=f"{house}/data"), "prints a path"),
        (
            lambda _: new_output("display_data", {"application/vnd.jupyter.widget-view+json": {}}),
            "widget",
        ),
    ],
)
def test_published_outputs_hold_no_path_and_no_widget(house, output, sentence):
    path = write(house, "print(1)")
    done = executed(path)
    done.cells[3].outputs = [output(house)]
    with pytest.raises(notebooks.NotebookError, match=sentence):
        notebooks.with_outputs(nbformat.read(path, 4), done)


def test_published_outputs_are_not_those_of_other_cells(house):
    done = executed(write(house, "print(1)"))
    with pytest.raises(notebooks.NotebookError, match="edited after the default run"):
        notebooks.with_outputs(nbformat.read(write(house, "print(2)"), 4), done)


# --- pages ----------------------------------------------------------------------------------


def page(house, *markdown):
    path = house / "01_small.ipynb"
    cells = [new_markdown_cell(text) for text in markdown]
    code = new_code_cell("1")
    about = {"image/png": {"alt": "A picture of <one>"}}
    code.outputs = [new_output("display_data", {"image/png": "iVBORw0KGgo="}, metadata=about)]
    nbformat.write(new_notebook(cells=[*cells, code], metadata=KERNEL), path)
    pages.render(path, house / "01_small.html")
    return (house / "01_small.html").read_text()


def test_page_needs_no_network_and_has_equations_alt_text_and_links(house):
    body = page(
        house,
        "Energy is $e = m c^2$; see [two](02_other.ipynb#end).\n\n$$\\sum_i x_i$$",
        "$$\\begin{aligned} a &= b \\\\ c &= d \\end{aligned}$$",
    )
    assert not re.search(r"(src|href)=.?https?:|url\(.?https?:|@import|<script", body)
    main = body.split("<main>")[-1]
    assert main.count("<math") == 3 and "<msup>" in main and "$" not in main
    assert "<mtd" in main and "&amp;" not in main and ">&<" not in main
    assert 'alt="A picture of &lt;one&gt;"' in body and "<title>01 small</title>" in body
    assert 'href="02_other.html#end"' in body


@pytest.mark.parametrize(
    "text",
    [
        "It costs $5 to $10.",
        "`echo $HOME $PATH`",
        "`$$` and `$$`",
        r"\$5 and \$6",
        "```\na $x$ b\n```",
        "from $ 5 $ on",
        "20,000$x and y$30",
        "$a\n\nb$",
    ],
)
def test_page_leaves_dollars_that_are_no_equations_alone(house, text):
    main = page(house, text).split("<main>")[-1]
    assert "<math" not in main and "$" in main


@pytest.mark.parametrize("text", ["$x$", "($x$)", "$x + \\$y$", "$a\nb$", "**$x$**", "a $$x$$ b"])
def test_page_shows_equations_wherever_they_stand(house, text):
    main = page(house, text).split("<main>")[-1]
    assert main.count("<math") == 1 and "$x" not in main


def test_page_keeps_text_that_is_no_latex_and_names_its_cell(house, capsys):
    body = page(house, "# Fine", "Here is $x_{$ as it is.")
    assert "Here is $x_{$ as it is." in body
    assert "warning: cell 2: '$x_{$' is not LaTeX" in capsys.readouterr().err
