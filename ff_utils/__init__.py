"""Forward-Forward in PyTorch, trained and measured against backpropagation.

The names below are what a user imports. Each is loaded when it is first used, because make starts
many processes and most of them need no PyTorch. README shows the rooms of this package.
"""

import sys
from importlib import import_module
from importlib.util import find_spec

if find_spec("resource") is None:  # which Windows does not have
    sys.exit("error: ff_utils runs on Linux and macOS; on Windows install it inside WSL.")

# What reads a notebook's file imports jsonschema, which would compile a grammar of web addresses in
# every process, for three seconds. It does without where this package is not to be had. This comes
# before the other modules, of which some import nbformat first.
sys.modules.setdefault("rfc3987_syntax", None)

_HOMES = {
    "ForwardForward": "ff.network",
    "LocalForwardForward": "ff.local",
    "RecurrentForwardForward": "ff.recurrent",
    "OffloadedForwardForward": "offload",
    "Backprop": "backprop",
    "mlp": "backprop",
    "FFConfig": "config",
    "LocalConfig": "config",
    "RecurrentConfig": "config",
    "TrainConfig": "config",
    "load_dataset": "data",
    "fit": "training",
    "fit_greedy_cached": "training",
    "error_rate": "training",
    "goodness_errors": "training",
    "ARMS": "memory.arms",
    "measure": "memory.measure",
    "profile": "memory.profile",
}
__all__ = list(_HOMES)


def __getattr__(name: str) -> object:
    """A public name, from the module that holds it."""
    if name not in _HOMES:
        raise AttributeError(f"module 'ff_utils' has no attribute {name!r}")
    return getattr(import_module(f"ff_utils.{_HOMES[name]}"), name)
