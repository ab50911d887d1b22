"""Equations as MathML, which browsers draw themselves: no script, no font."""

import re

from docutils import nodes
from latex2mathml.converter import convert


def mathml(latex: str, display: str) -> str:
    """One equation; ValueError for what is no LaTeX."""
    try:
        # latex2mathml knows `aligned` by the name `split`.
        return convert(re.sub(r"\{aligned\}", "{split}", latex), display=display)
    except Exception as error:
        raise ValueError(f"{latex!r} is not LaTeX ({type(error).__name__}).") from error


def visit_inline(writer: object, node: nodes.math) -> None:
    """Write an equation within a line."""
    writer.body.append(mathml(node.astext(), "inline"))
    raise nodes.SkipNode


def visit_display(writer: object, node: nodes.math_block) -> None:
    """Write an equation on a line of its own."""
    writer.body.append(f'<div class="equation">{mathml(node.astext(), "block")}</div>')
    raise nodes.SkipNode
