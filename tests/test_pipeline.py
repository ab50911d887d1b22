import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

from ff_utils import files, paths, pipeline


@pytest.fixture
def house(tmp_path, monkeypatch):
    """A repository of one notebook, `01_small`, and one profile."""
    (tmp_path / "notebooks" / "profiles").mkdir(parents=True)
    monkeypatch.setattr(paths, "ROOT", tmp_path)
    monkeypatch.setattr(paths, "NOTEBOOKS", tmp_path / "notebooks")
    monkeypatch.setattr(paths, "PROFILES", tmp_path / "notebooks" / "profiles")
    profile = paths.PROFILES / "quick.yaml"
    profile.write_text("01_small:\n  count: 3\n")
    return tmp_path


def write(house, code):
    parameters = 'profile: str = "interactive"  # a name\ncount: int = 1  # 1 or more'
    cells = [
        new_markdown_cell("# Small"),
        new_code_cell(parameters, metadata={"tags": ["parameters"]}),
        new_code_cell(code),
    ]
    path = house / "notebooks" / "01_small.ipynb"
    about = {"kernelspec": {"name": "python3", "language": "python", "display_name": "Python"}}
    nbformat.write(new_notebook(cells=cells, metadata=about), path)
    return path


def printed(path):
    cells = nbformat.read(path, 4).cells
    return "".join(o.get("text", "") for c in cells for o in c.get("outputs", []))


def test_a_profiles_parameters_reach_the_notebook(house):
    output = house / "build" / "01_small.ipynb"
    pipeline.run(write(house, "print(profile, count * 2)"), "quick", output)
    assert printed(output) == "quick 6\n"
    assert [p.name for p in output.parent.iterdir()] == ["01_small.ipynb"]


def test_a_run_with_other_parameters_does_not_write_the_profiles_record(house):
    output = house / "build" / "01_small.ipynb"
    pipeline.run(write(house, "print(profile, count)"), "quick", output, {"count": 7})
    assert printed(output) == "interactive 7\n"


def test_a_failed_notebook_is_kept_for_reading_and_the_old_output_stays(house):
    output = house / "build" / "01_small.ipynb"
    pipeline.run(write(house, "print('good')"), "quick", output)
    broken = write(house, "print('so far')\nraise ValueError('count is 3; give less.')")
    with pytest.raises(
        pipeline.PipelineError, match=r"ValueError: count is 3; give less\."
    ) as info:
        pipeline.run(broken, "quick", output)
    assert "01_small.failed.ipynb" in str(info.value)
    assert printed(output) == "good\n"
    assert "so far" in printed(house / "build" / "01_small.failed.ipynb")
    pipeline.run(write(house, "print('mended')"), "quick", output)
    assert [p.name for p in output.parent.iterdir()] == ["01_small.ipynb"]


def test_a_kernel_that_dies_is_one_sentence(house):
    output = house / "build" / "01_small.ipynb"
    killed = write(house, "import os, signal\nos.kill(os.getpid(), signal.SIGKILL)")
    with pytest.raises(pipeline.PipelineError, match=r"kernel died, most often for lack of memory"):
        pipeline.run(killed, "quick", output)
    assert not output.exists()


def test_unknown_parameters_profiles_and_sections_fail_before_anything_runs(house):
    path = write(house, "raise SystemExit('ran')")
    output = house / "build" / "01_small.ipynb"
    with pytest.raises(pipeline.PipelineError, match="'cuont', which does not exist: did you mean"):
        pipeline.run(path, "quick", output, {"cuont": 2})
    with pytest.raises(pipeline.PipelineError, match="profile is 'slow'; choose one of: quick"):
        pipeline.run(path, "slow", output)
    (paths.PROFILES / "typo.yaml").write_text("01_smal:\n  count: 2\n")
    with pytest.raises(pipeline.PipelineError, match="section '01_smal', which does not exist"):
        pipeline.run(path, "typo", output)
    (paths.PROFILES / "broken.yaml").write_text("01_small: [")
    with pytest.raises(pipeline.PipelineError, match="is not YAML"):
        pipeline.run(path, "broken", output)
    assert not output.exists()


def test_published_outputs_are_those_of_the_run_and_nothing_else_changes(house):
    path = write(house, "print(count)\ncount")
    output = house / "build" / "01_small.ipynb"
    pipeline.run(path, "quick", output)
    source = nbformat.read(path, 4)
    published = pipeline.with_outputs(nbformat.read(path, 4), nbformat.read(output, 4))
    assert [c.source for c in published.cells] == [c.source for c in source.cells]
    code = [c for c in published.cells if c.cell_type == "code"]
    assert [c.execution_count for c in code] == [1, 2]
    assert code[1].outputs[0].text == "3\n" and code[1].outputs[1].execution_count == 2


def test_paths_and_widgets_are_not_published(house):
    path = write(house, "print(1)")
    source = nbformat.read(path, 4)
    for output in (
        new_output("stream", text=f"{house}/data"),
        new_output("display_data", {"application/vnd.jupyter.widget-view+json": {}}),
    ):
        executed = nbformat.read(path, 4)
        executed.cells[2].outputs = [output]
        with pytest.raises(pipeline.PipelineError):
            pipeline.with_outputs(source, executed)


def test_an_edited_notebook_is_not_given_old_outputs(house):
    executed = nbformat.read(write(house, "print(1)"), 4)
    edited = nbformat.read(write(house, "print(2)"), 4)
    with pytest.raises(pipeline.PipelineError, match="edited after the default run"):
        pipeline.with_outputs(edited, executed)


def test_html_needs_no_network_and_has_equations_and_alt_text(house):
    cells = [
        new_markdown_cell("Energy is $e = m c^2$; see [two](02_other.ipynb).\n\n$$\\sum_i x_i$$"),
        new_code_cell("1"),
    ]
    png = {"image/png": "iVBORw0KGgo="}
    about = {"image/png": {"alt": "A picture of <one>"}}
    cells[1].outputs = [new_output("display_data", png, metadata=about)]
    path = house / "01_small.ipynb"
    nbformat.write(new_notebook(cells=cells), path)
    pipeline.html(path, house / "01_small.html")
    body = (house / "01_small.html").read_text()
    assert body.count("<math") == 2 and "<msup>" in body and "$" not in body.split("<main>")[-1]
    assert 'alt="A picture of &lt;one&gt;"' in body
    assert 'href="02_other.html"' in body


def test_parameters_are_read_from_the_tagged_cell(house):
    write(house, "other: int = 2")
    assert files.parameter_names("01_small") == ["profile", "count"]
    with pytest.raises(ValueError, match="notebook is '09_none'"):
        files.parameter_names("09_none")
