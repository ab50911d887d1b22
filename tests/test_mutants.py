"""Mutants: the module with one line made wrong, which the tests of that line must notice.

Each runs in a process forked from one that has loaded PyTorch, so that it takes a second or two.
"""

import multiprocessing
import os
import shutil
import sys
from contextlib import redirect_stdout
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
# For each test: the file it holds to account, and mutants of it: what is wrong, the code as it is,
# the code made wrong.
MUTANTS = {
    "test_layers.py::test_step_has_autograds_gradient_to_1e_10": (
        "ff/layers.py",
        [
            ("sign", "softplus(-sign * x), -sign", "softplus(-sign * x), sign"),
            ("scale", "mul_(2 / y.shape[1])", "mul_(1 / y.shape[1])"),
            ("sharpness", "slope.mul_(sharpness / positive)", "slope.div_(positive)"),
            (
                "mean over all rows",
                "slope_negative / negative",
                "slope_negative / sum(part.counts)",
            ),
            ("pair swapped", "x[:positives] - x[positives:]", "x[positives:] - x[:positives]"),
            ("positive as negative", "[: part.positives], 1.0", "[: part.positives], -1.0"),
            ("divisor", "divisor.div_(math.sqrt(y.shape[1]))", "pass"),
            ("not normalised", "divisor = self.normalise_(y)", "divisor = self.normalise_(y + 0)"),
        ],
    ),
    "test_layers.py::test_sgd_follows_autograds_gradient": (
        "ff/layers.py",
        [("uphill", "alpha=-learning_rate", "alpha=learning_rate")],
    ),
    "test_network.py::test_step_trains_every_layer_on_what_the_layer_below_gave": (
        "ff/network.py",
        [("layer order", "for number in numbers:", "for number in [*numbers][::-1]:")],
    ),
    "test_negatives.py::test_hard_negatives_are_wrong_however_sure_the_network_is": (
        "ff/negatives.py",
        [("true label drawn", "labels[:, None], -torch.inf", "labels[:, None] - 1, -torch.inf")],
    ),
    "test_tracker.py::test_tracker_counts_what_pytorchs_own_tracker_counts": (
        "memory/tracker.py",
        [
            ("operation missed", "new = [", 'new = "addmm" not in str(function) and ['),
            ("freed memory counted", "self.live[category] -= size", "pass"),
        ],
    ),
    "test_offload.py::test_offloaded_network_learns_the_bits_of_one_in_memory": (
        "offload.py",
        [
            ("weights stay", '["moments", "weights"]', '["moments"]'),
            ("moments stay", '["moments", "weights"]', '["weights"]'),
            ("a layer stays", "if update:\n", "if update and number != 1:\n"),
            ("wrong layer read", 'read(f"{number}.', 'read(f"{max(1, number)}.'),
        ],
    ),
    "test_blocks.py::test_streamed_blocks_learn_the_same_and_are_away_when_not_at_work": (
        "ff/blocks.py",
        [("a block stays", "self.host[place].copy_(tensor)", "self.host[place].data")],
    ),
}
CASES = [
    pytest.param([test], f"ff_utils/{file}", old, new, id=what)
    for test, (file, mutants) in MUTANTS.items()
    for what, old, new in mutants
]
CASES.append(pytest.param(list(MUTANTS), "", "", "", id="as it is"))


@pytest.fixture(scope="module")
def forks():
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch._dynamo", "pytest", "pandas", "nbformat"])
    return context


@pytest.mark.parametrize(("tests", "file", "old", "new"), CASES)
def test_a_wrong_line_is_noticed(tmp_path, forks, tests, file, old, new):
    for name in ("ff_utils", "tests", "docs"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    if file:
        code = (tmp_path / file).read_text(encoding="utf-8")
        assert old in code, "the line has changed: change the mutant with it"
        (tmp_path / file).write_text(code.replace(old, new, 1), encoding="utf-8")
    said = tmp_path / "said"
    process = forks.Process(target=run_tests, args=(tmp_path, tests, said))
    process.start()
    process.join(120)
    expected = pytest.ExitCode.TESTS_FAILED if file else pytest.ExitCode.OK
    assert process.exitcode == expected, said.read_text()


def run_tests(folder: Path, tests: list[str], said: Path) -> None:
    os.chdir(folder)
    sys.path.insert(0, str(folder))
    names = " or ".join(test.partition("::")[2] for test in tests)
    files = {f"tests/{test.partition('::')[0]}" for test in tests}
    # Without plugins and without rewritten assertions: each takes a second to load.
    options = ["-x", "--assert=plain", "-p", "no:cacheprovider", "-p", "no:unraisableexception"]
    with said.open("w") as stream, redirect_stdout(stream):
        code = pytest.main([*options, "-p", "no:anyio", *files, "-k", names])
    sys.exit(int(code))
