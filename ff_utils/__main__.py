"""One command line: `python -m ff_utils COMMAND ...`; `COMMAND --help` explains each."""

import sys
from importlib import import_module

COMMANDS = {
    "run": ("run.notebooks", "execute a notebook"),
    "html": ("run.notebooks", "render an executed notebook as a page"),
    "publish": ("run.notebooks", "put the default run's outputs into the notebooks and README"),
    "sweep": ("run.sweep", "run a notebook at every point of a grid"),
    "memory": ("memory.__main__", "measure the memory of training steps"),
    "distributed": ("distributed", "train layers on several ranks"),
    "data": ("data", "fetch and check the data"),
    "faults": ("run.faults", "disturb commands and see whether the next run mends it"),
    "verify": ("report.claims", "judge every claim against the records"),
    "repeat": ("run.repeat", "run the smoke profile twice and compare its metrics"),
}


def main() -> None:
    """Run the command that is named, or list the commands."""
    name = sys.argv[1] if len(sys.argv) > 1 else "--help"
    if name not in COMMANDS:
        lines = [f"  {command:12} {what}" for command, (_, what) in COMMANDS.items()]
        text = "\n".join(["usage: python -m ff_utils COMMAND ...", *lines])
        sys.exit(print(text) if name in ("-h", "--help") else f"error: no command {name!r}\n{text}")
    module = import_module(f"ff_utils.{COMMANDS[name][0]}")
    sys.argv = sys.argv if module.__name__.endswith("notebooks") else [name, *sys.argv[2:]]
    module.main()


if __name__ == "__main__":
    main()
