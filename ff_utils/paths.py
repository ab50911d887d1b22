"""Where things are: every folder the repository reads or writes."""

import os
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
DATA = ROOT / "data"
RESULTS = DATA / "results"
NOTEBOOKS = ROOT / "notebooks"
PROFILES = NOTEBOOKS / "profiles"
BUILD = ROOT / "build"
RECORD = "FF_RECORD"  # in a kernel's environment: the file that a sweep wants the record in


def data_folders(dataset: str) -> list[Path]:
    """Folders that may hold the files of `dataset`, in the order they are searched.

    `FF_DATA_DIR` (the folder itself, or its parent); `data/` of this checkout, where
    downloads go; `shared/data/` beside it, which several checkouts can have in common.
    """
    folders = [DATA / dataset, ROOT.parent / "shared" / "data" / dataset]
    if named := os.environ.get("FF_DATA_DIR"):
        folders = [Path(named) / dataset, Path(named), *folders]
    return folders


def figures(profile: str) -> Path:
    """Folder for a profile's figures: `figures/` for the default one, else below `build/`."""
    return ROOT / "figures" if profile == "default" else BUILD / profile / "figures"


def relative(path: Path) -> str:
    """`path` as seen from the repository, so that no message or record names a home folder."""
    return os.path.relpath(path, ROOT)
