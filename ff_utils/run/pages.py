"""Pages: an executed notebook as one HTML file that needs no network.

Images, their alt text and equations (as MathML) are inside it; scripts are left out.
"""

import re
import sys
from html import escape
from pathlib import Path

from jinja2 import pass_context
from latex2mathml.converter import convert
from nbconvert import HTMLExporter
from nbconvert.filters.markdown_mistune import (
    IPythonRenderer,
    MarkdownWithMath,
    MathBlockParser,
    MathInlineParser,
)

from ff_utils import utils
from ff_utils.run.notebooks import read_notebook


class _Blocks(MathBlockParser):
    """Display math begins and ends a line; elsewhere `$$` is the inline parser's."""

    SPECIFICATION = MathBlockParser.SPECIFICATION | {
        "multiline_math": r"^ {0,3}\$\$(?s:.+?)\$\$[ \t]*$"
        r"|^ {0,3}\\begin\{(?P<math_env_name>[a-z]*\*?)\}(?s:.*?)\\end\{(?P=math_env_name)\}"
    }


class _Inlines(MathInlineParser):
    """Dollars as Pandoc reads them: no space inside, no digit after, a backslash escapes one."""

    SPECIFICATION = MathInlineParser.SPECIFICATION | {
        "inline_math_tex": r"(?<![$\\])\$(?=[^\s$])"
        r"(?P<math_inline_tex>(?:\\.|[^$\\\n]|\n(?!\s*\n))+?)(?<=\S)\$(?!\d)"
    }


class _Renderer(IPythonRenderer):
    """Equations as MathML. What is no LaTeX stays as it was written, with a warning."""

    cell = 0  # its number, for the warning

    def block_math(self, body: str) -> str:
        return self._mathml(body, "block", f"$${body}$$")

    def inline_math(self, body: str) -> str:
        return self._mathml(body, "inline", f"${body}$")

    def latex_environment(self, name: str, body: str) -> str:
        written = f"\\begin{{{name}}}{body}\\end{{{name}}}"
        return self._mathml(written, "block", written)

    def _mathml(self, latex: str, display: str, written: str) -> str:
        try:
            # latex2mathml knows `aligned` by the name `split`.
            return convert(re.sub(r"\{aligned\}", "{split}", latex), display=display)
        except Exception as error:
            about = f"{written!r} is not LaTeX ({type(error).__name__}); it is left as it is."
            print(f"warning: cell {self.cell}: {about}", file=sys.stderr)
            return escape(written)


class _Exporter(HTMLExporter):
    """nbconvert's exporter, with the markdown of the classes above."""

    @pass_context
    def markdown2html(self, context: dict, source: str) -> str:
        cell = context.get("cell", {})
        renderer = _Renderer(
            escape=False, embed_images=True, attachments=cell.get("attachments", {})
        )
        renderer.path = context.get("resources", {}).get("metadata", {}).get("path", "")
        renderer.cell = cell.get("metadata", {}).get("number", 0)
        return MarkdownWithMath(renderer, _Blocks(), _Inlines()).render(source)


def render(notebook: Path, output: Path) -> None:
    """Render an executed notebook as one HTML file."""
    cells = read_notebook(notebook)
    cells.metadata["title"] = notebook.stem.replace("_", " ")
    for number, cell in enumerate(cells.cells, start=1):
        cell.metadata["number"] = number
        for shown in cell.get("outputs", []):
            if image := shown.get("data", {}).get("image/png"):
                alt = escape(shown.metadata.get("image/png", {}).get("alt", notebook.stem))
                image = f'<img alt="{alt}" src="data:image/png;base64,{image}">'
                shown.data = {"text/html": f'<div class="jp-RenderedImage">{image}</div>'}
    resources = {"metadata": {"path": str(notebook.parent), "name": notebook.stem}}
    body, _ = _Exporter(embed_images=True).from_notebook_node(cells, resources)
    body = re.sub(r"<script\b.*?</script>", "", body, flags=re.DOTALL)
    # Links between notebooks stay among the rendered pages.
    body = re.sub(r'href="(\d\d_\w+)\.ipynb(#[^"]*)?"', r'href="\1.html\2"', body)
    utils.write_text(output, body)
