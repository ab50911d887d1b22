"""The site: what its pages are made of, and that what they show and link to is there."""

import json
import re
import struct
import sys
import zlib
from base64 import b64encode
from html import unescape
from pathlib import Path

import chart_data
import make_site
import mathml
import nbformat
import pytest
import torch
from nbformat import v4

from ff_utils import load_dataset, memory, utils
from ff_utils.memory.formulas import FORMULAS
from ff_utils.report import claims

# MyST-NB is a version of Sphinx behind.
pytestmark = pytest.mark.filterwarnings("ignore:.*MystReferenceResolver")


def png(width, height):
    def chunk(kind, body):
        return (
            struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        )

    head = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    rows = zlib.compress((b"\0" + b"\xff" * width) * height)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


# --- parts ----------------------------------------------------------------------------------


def test_equations_become_mathml_and_what_is_no_latex_is_named():
    assert "<mfrac>" in mathml.mathml(r"\frac{1}{n}", "inline")
    assert 'display="block"' in mathml.mathml(r"\begin{aligned} a &= b \end{aligned}", "block")
    with pytest.raises(ValueError, match=r"is not LaTeX"):
        mathml.mathml(r"\begin{nothing}", "inline")


@pytest.fixture
def page(tmp_path):
    """A notebook of three code cells: short, long, and one that draws a figure with a chart."""
    image = v4.new_output(
        "display_data",
        {"image/png": b64encode(png(200, 100)).decode()},
        metadata={"image/png": {"alt": 'Goodness of "positive" inputs', "width": 100}},
    )
    view = "application/vnd.jupyter.widget-view+json"
    widget = v4.new_output("display_data", {view: {"model_id": "1"}, "text/plain": "slider"})
    cells = [
        v4.new_code_cell("a = 1"),
        v4.new_code_cell("\n".join(f"a += {n}" for n in range(20))),
        v4.new_code_cell('show(figure, "01_goodness", alt)', outputs=[image, widget]),
        v4.new_markdown_cell("The end."),
    ]
    path = tmp_path / "01_small.ipynb"
    nbformat.write(v4.new_notebook(cells=cells), path)
    return make_site.notebook_page(path, tmp_path / "cells")


def test_long_code_is_folded_and_widgets_are_left_out(page):
    folded = ["hide-input" in cell.metadata.get("tags", []) for cell in page.cells[:3]]
    assert folded == [False, True, False]
    assert len(page.cells[2].outputs) == 1


def test_image_becomes_a_file_with_size_alt_text_and_caption(page, tmp_path):
    shown = page.cells[2].outputs[0].data["text/html"]
    assert (tmp_path / "cells" / "01_small-3-1.png").read_bytes() == png(200, 100)
    assert 'width="100" height="50"' in shown
    assert 'alt="Goodness of &quot;positive&quot; inputs"' in shown
    assert "<b>Figure 1.1.</b> Goodness of" in shown


def test_chart_follows_the_cell_that_draws_its_figure(page):
    assert 'data-chart="goodness"' in page.cells[3].source
    assert page.cells[4].source == "The end."
    assert "charts.js" in page.cells[5].source


def test_every_figure_with_a_chart_is_drawn_by_one_cell():
    for figure in make_site.CHARTS:
        path = next(utils.NOTEBOOKS.glob(f"{figure[:2]}_*.ipynb"))
        sources = [cell.source for cell in nbformat.read(path, 4).cells]
        assert sum(f'"{figure}"' in text for text in sources) == 1, figure


def test_claim_leads_to_the_cell_that_computes_its_metric():
    name, cell = make_site.testing_cell("03_backprop_baseline: ff_time_ratio")
    cells = nbformat.read(utils.NOTEBOOKS / f"{name}.ipynb", 4).cells
    code = [cell.source for cell in cells if cell.cell_type == "code"]
    assert re.search(r"^ratio = ", code[cell - 1], flags=re.MULTILINE)
    name, cell = make_site.testing_cell("04_memory_profiling: claims.seed_growth")
    cells = nbformat.read(utils.NOTEBOOKS / f"{name}.ipynb", 4).cells
    assert "memory_metrics(" in [c.source for c in cells if c.cell_type == "code"][cell - 1]


def test_lab_has_the_settings_that_keep_committed_notebooks_unchanged():
    schemas = Path(sys.prefix) / "share" / "jupyter" / "lab" / "schemas"
    overrides = json.loads((utils.ROOT / "docs" / "lab" / "overrides.json").read_text())
    assert overrides["@jupyterlab/docmanager-extension:plugin"] == {"autosave": False}
    for plugin, settings in overrides.items():  # JupyterLab ignores names that it doesn't know
        package, name = plugin.split(":")
        known = json.loads((schemas / package / f"{name}.json").read_text())["properties"]
        assert set(settings) <= set(known), plugin
    started = re.search(r"^lab:.*\n\t(.*)", (utils.ROOT / "Makefile").read_text(), re.MULTILINE)
    assert "app_settings_dir=docs/lab" in started[1]


# --- charts ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def numbers():
    return json.loads(json.dumps(chart_data.chart_data()))


def test_goodness_chart_counts_every_input_and_parts_them(numbers):
    chart = numbers["goodness"]
    assert len(chart["positive"]) == len(chart["negative"]) == len(chart["steps"])
    totals = {sum(counts) for kind in ("positive", "negative") for counts in chart[kind]}
    assert totals == {1437}
    above = [edge >= chart["theta"] for edge in chart["edges"][:-1]]

    def share_above(counts):
        return sum(n for n, is_above in zip(counts, above, strict=True) if is_above) / 1437

    assert share_above(chart["positive"][0]) == share_above(chart["negative"][0]) == 0
    assert share_above(chart["positive"][-1]) > 0.7 > 0.3 > share_above(chart["negative"][-1])


def test_digit_chart_predicts_the_label_with_the_most_goodness(numbers):
    for digit in numbers["digits"]:
        sums = [sum(layer[label] for layer in digit["goodness"]) for label in range(10)]
        assert sums.index(max(sums)) == digit["predicted"]
        assert len(digit["pixels"]) == len(digit["pixels"][0]) == 8
    right = [digit["label"] for digit in numbers["digits"] if digit["label"] == digit["predicted"]]
    assert right == list(range(10))
    assert len(numbers["digits"]) > 10


def test_drawn_digits_are_read_by_a_network_that_knows_digits(numbers):
    """The chart's arithmetic, written out once more, on the rounded weights that the page has."""
    network, data = numbers["network"], load_dataset("digits")
    found = []
    for label in range(10):
        h, total = data.test_images.clone(), 0
        h[:, :10] = 0
        h[:, label] = network["scale"]
        for layer in network["layers"]:
            weight, bias = torch.tensor(layer["weight"]), torch.tensor(layer["bias"])
            h = h / (h.square().mean(dim=1, keepdim=True).sqrt() + 1e-8)
            h = torch.relu(h @ weight.t() + bias)
            total = total + h.square().mean(dim=1)
        found.append(total)
    wrong = torch.stack(found).argmax(0) != data.test_labels
    assert network["side"] ** 2 == data.pixels and wrong.float().mean() < 0.1


def test_memory_chart_has_the_formula_at_every_size(numbers):
    chart = numbers["memory"]
    assert len(chart["arms"]) == len(FORMULAS)
    at = chart["depths"].index(47), chart["widths"].index(2000), chart["images"].index(5000)
    place = (at[0] * len(chart["widths"]) + at[1]) * len(chart["images"]) + at[2]
    for shown, name in zip(chart["arms"], FORMULAS, strict=True):
        arm = memory.ARMS[name]
        expected = FORMULAS[name](memory.Sizes(47, 2000, arm.rows(5000))) / 1e6
        assert shown["peaks"][place] == pytest.approx(expected, abs=0.06), name


# --- the pages ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    folder = tmp_path_factory.mktemp("built") / "site"
    assert make_site.build(utils.NOTEBOOKS, folder) == 0
    return {
        path.relative_to(folder).as_posix(): path.read_text() for path in folder.rglob("*.html")
    }, folder


def test_site_has_a_page_for_every_notebook_and_table(site):
    pages, _ = site
    expected = {f"notebooks/{path.stem}.html" for path in utils.NOTEBOOKS.glob("*.ipynb")}
    names = ("charts", "ledger", "reference", "arms", "profiles", "sweeps", "api")
    expected |= {f"docs/{name}.html" for name in names} | {"index.html", "search.html"}
    assert expected <= set(pages)
    assert all(
        f'<code class="docutils literal notranslate"><span class="pre">{name}</span>'
        in pages["docs/arms.html"]
        for name in memory.ARMS
    )


def test_no_page_loads_anything_from_a_network(site):
    for name, text in site[0].items():
        for tag in re.findall(r"<(?:script|link|img|iframe|source)\b[^>]*>", text):
            assert not re.search(r"""(src|href)=["']?(https?:)?//""", tag), f"{name}: {tag}"
    styles = "".join(path.read_text() for path in site[1].rglob("*.css"))
    assert not re.search(r"url\(\s*[\"']?(https?:)?//|@import\s+[\"']?http", styles)


def test_every_link_image_and_script_of_a_page_is_there(site):
    pages, folder = site
    for name, text in pages.items():
        for target in re.findall(r"""<\w[^<>]*?\s(?:href|src)="([^"]*)\"""", text):
            if re.match(r"\w+:", target):
                continue
            path, _, anchor = unescape(target).partition("#")
            path = path.partition("?")[0]
            there = (folder / name).parent / path if path else folder / name
            assert there.exists(), f"{name}: {target}"
            if anchor and there.suffix == ".html":
                other = pages[there.resolve().relative_to(folder.resolve()).as_posix()]
                assert f'id="{anchor}"' in other, f"{name}: {target}"


def test_every_image_has_alt_text(site):
    for name, text in site[0].items():
        for image in re.findall(r"<img\b[^>]*>", text):
            assert re.search(r'alt="[^"]+"', image), f"{name}: {image[:200]}"


def test_ledger_has_every_claim_and_its_cell(site):
    page = site[0]["docs/ledger.html"]
    assert page.count('class="claim"') == len(claims.read())
    links = re.findall(r'href="\.\./notebooks/(\w+)\.html#in-(\d+)"', page)
    assert len(links) == sum(bool(claim.metric) for claim in claims.read())


def test_search_index_is_a_script_that_knows_the_notebooks(site):
    index = (site[1] / "searchindex.js").read_text()
    assert index.startswith("Search.setIndex(") and "notebooks/01_algorithm_walkthrough" in index
    assert "perplex" in index  # a word's stem
    options = (site[1] / "_static" / "documentation_options.js").read_text()
    assert re.search(r"SHOW_SEARCH_SUMMARY: false", options)  # a summary would be fetched
