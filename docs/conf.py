"""Sphinx's settings, for the pages that docs/make_site.py prepares."""

import re
import sys
from pathlib import Path

from docutils import nodes

sys.path.insert(0, str(Path(__file__).parent))
from mathml import visit_display, visit_inline

project = "Forward-Forward, weighed"
copyright = "2026, the authors of this study"
html_title = "What Forward-Forward really saves"

extensions = ["myst_nb", "sphinx.ext.autodoc"]
root_doc = "index"
nb_execution_mode = "off"  # the committed outputs are shown
nb_render_markdown_format = "myst"
nb_code_prompt_show = "Show the code"
nb_code_prompt_hide = "Hide the code"
myst_enable_extensions = ["amsmath", "dollarmath"]
myst_heading_anchors = 3
html_math_renderer = "mathml"
default_role = "code"
autodoc_typehints = "signature"
autodoc_member_order = "bysource"
add_module_names = False

html_theme = "furo"
html_css_files = ["site.css"]
html_js_files = ["site.js"]
html_copy_source = False
html_show_sourcelink = False
html_show_search_summary = False  # a summary is fetched, which a page opened from disk may not do
html_theme_options = {
    "light_css_variables": {"color-brand-primary": "#a8410f", "color-brand-content": "#a8410f"},
    "dark_css_variables": {"color-brand-primary": "#ff9e6b", "color-brand-content": "#ff9e6b"},
}
suppress_warnings = ["mystnb.unknown_mime_type"]


def number_cells(app: object, doctree: object) -> None:
    """Give the n-th code cell of a notebook the id `in-n`, which the ledger links to."""
    cells = (n for n in doctree.findall(nodes.container) if n.get("nb_element") == "cell_code")
    for number, cell in enumerate(cells, start=1):
        cell["ids"].append(f"in-{number}")


def as_restructured_text(
    app: object, what: str, name: str, thing: object, options: object, lines: list[str]
) -> None:
    """Docstrings as Sphinx reads them: an indented rest as a list, examples as blocks."""
    text = re.sub(r"(?<!`)`([^`\n]+)`(?!`)", r"``\1``", "\n".join(lines))
    text = re.sub(r"(?<!\*)\*(?=\w)", r"\\*", text)
    blocks = []
    for block in re.split(r"\n\s*\n", text.strip()):
        if block.startswith("    "):
            block = f"::\n\n{block}"
        elif re.search(r"^    ", block, flags=re.MULTILINE):
            block = re.sub(
                r"^(?=\S)",
                "* ",
                re.sub(r"^    ", "  ", block, flags=re.MULTILINE),
                flags=re.MULTILINE,
            )
        blocks.append(block)
    lines[:] = "\n\n".join(blocks).split("\n")


def setup(app: object) -> None:
    """Register what is ours."""
    app.add_html_math_renderer("mathml", (visit_inline, None), (visit_display, None))
    app.connect("doctree-read", number_cells)
    app.connect("autodoc-process-docstring", as_restructured_text)
