"""Files read and written whole: the parameters of a notebook, and atomic writes."""

import ast
import json
import os
from collections.abc import Callable
from pathlib import Path

from ff_utils import checks, paths


def parameter_names(notebook: str) -> list[str]:
    """Names in the cell tagged `parameters` of a notebook, in order; ValueError without one."""
    return list(parameters(notebook))


def parameters(notebook: str) -> dict[str, tuple[str, object]]:
    """Type (as written) and value of each name in a notebook's cell tagged `parameters`."""
    known = sorted(path.stem for path in paths.NOTEBOOKS.glob("*.ipynb"))
    checks.one_of("notebook", notebook, known)
    text = (paths.NOTEBOOKS / f"{notebook}.ipynb").read_text(encoding="utf-8")
    for cell in json.loads(text)["cells"]:
        if "parameters" in cell["metadata"].get("tags", []):
            lines = ast.parse("".join(cell["source"])).body
            return {
                line.target.id: (ast.unparse(line.annotation), ast.literal_eval(line.value))
                for line in lines
                if isinstance(line, ast.AnnAssign)
            }
    raise ValueError(f"{notebook} has no cell tagged `parameters`; add one.")


def write_atomically(path: Path, text: str) -> None:
    """Write a whole file or none: to a temporary name beside it, then rename."""
    replace(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def replace(path: Path, write: Callable[[Path], object]) -> None:
    """What `write` puts into the temporary file it is given becomes `path`, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        write(temporary)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
