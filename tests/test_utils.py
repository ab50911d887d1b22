import os
import subprocess
import sys
from pathlib import Path

import pytest

from ff_utils import utils


@pytest.mark.parametrize("value", [0, -1, 1.5, "3", None, True, float("nan"), float("inf")])
def test_number_out_of_range_is_refused_by_name_and_value(value):
    with pytest.raises(ValueError, match=r"epochs is .*; give a whole number of at least 1"):
        utils.check_number("epochs", value, 1, 100, whole=True)
    with pytest.raises(ValueError, match=r"sharpness is .*; give a number above 2\."):
        utils.check_number("sharpness", value, 2, above=True)


def test_number_range_includes_its_ends_unless_above_is_given():
    utils.check_number("rate", 0, 0, 1)
    utils.check_number("rate", 1, 0, 1)
    with pytest.raises(ValueError, match="above 0 and at most 1"):
        utils.check_number("rate", 0, 0, 1, above=True)


@pytest.mark.parametrize("value", ["huber", 3, None, ["a"]])
def test_choice_unknown_lists_the_known_ones(value):
    with pytest.raises(ValueError, match=r"loss is .*; choose one of: a, b\."):
        utils.check_choice("loss", value, {"a": 1, "b": 2})


def test_ints_bad_entry_is_named_by_its_place():
    with pytest.raises(ValueError, match=r"hidden\[1\] is 0"):
        utils.check_ints("hidden", [10, 0], 1)
    for empty in ([], 5, "10"):
        with pytest.raises(ValueError, match="non-empty list"):
            utils.check_ints("hidden", empty, 1)


def test_names_unknown_is_answered_with_the_nearest_or_with_all():
    utils.check_names("it has the key", ["grid"], {"grid", "notebook"})
    with pytest.raises(ValueError, match=r"key 'gird', which does not exist: did you mean grid\?"):
        utils.check_names("it has the key", ["grid", "gird"], {"grid", "notebook"})
    with pytest.raises(ValueError, match=r"'xyz', which does not exist: it has: grid, notebook\."):
        utils.check_names("it has the key", ["xyz"], {"notebook", "grid"})
    with pytest.raises(ValueError, match="key 7, which"):
        utils.check_names("it has the key", [7], {"grid"})


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1.00 kB"),
        (14_234_000, "14.2 MB"),
        (683_000_000, "683 MB"),
        (999_600_000, "1.00 GB"),
        (4_200_000_000, "4.20 GB"),
        (1.2e12, "1.20 TB"),
        (5e15, "5000 TB"),
        (-2_500_000, "-2.50 MB"),
    ],
)
def test_bytes_are_decimal_with_three_digits(count, text):
    assert utils.format_bytes(count) == text


def test_user_path_expands_home_and_starts_at_the_callers_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    assert utils.user_path("~/data") == tmp_path / "home" / "data"
    assert utils.user_path("data/x.txt") == tmp_path / "data" / "x.txt"
    assert utils.user_path("/data") == Path("/data")
    with pytest.raises(ValueError, match="~nobody_of_that_name/data names a home folder"):
        utils.user_path("~nobody_of_that_name/data")


def test_data_dir_means_one_folder_from_wherever_it_is_read(tmp_path, monkeypatch):
    (tmp_path / "mine").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    for given in ("mine", "~/mine", str(tmp_path / "mine")):
        monkeypatch.setenv("FF_DATA_DIR", given)
        first, second, *_ = utils.data_folders("mnist")
        assert (first, second) == (tmp_path / "mine" / "mnist", tmp_path / "mine")
    for missing in ("nowhere", "~/nowhere"):
        monkeypatch.setenv("FF_DATA_DIR", missing)
        with pytest.raises(ValueError, match=rf"FF_DATA_DIR is '{missing}', which is no folder"):
            utils.data_folders("mnist")
    monkeypatch.setenv("FF_DATA_DIR", "")
    assert utils.data_folders("mnist")[0] == utils.DATA / "mnist"


def test_file_is_replaced_whole_or_not_at_all(tmp_path):
    path = tmp_path / "new" / "a.txt"
    utils.write_text(path, "first é")
    assert path.read_text(encoding="utf-8") == "first é"

    def fails(temporary):
        temporary.write_text("half")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        utils.replace_file(path, fails)
    assert path.read_text(encoding="utf-8") == "first é"
    assert os.listdir(path.parent) == ["a.txt"]  # noqa: PTH208


def test_track_says_how_many_are_done_and_what_is_left(capsys, monkeypatch):
    monkeypatch.setenv("FF_PROGRESS", "plain")
    assert list(utils.track(range(3), "epoch", done=2, total=5)) == [0, 1, 2]
    lines = capsys.readouterr().err.splitlines()
    assert [line.split(",")[0] for line in lines] == [f"epoch {n} of 5" for n in (3, 4, 5)]
    assert lines[-1].endswith(" s")


def test_timing_alternates_between_tasks_after_a_warm_up(capsys):
    calls = []
    seconds = utils.time_alternately({n: lambda n=n: calls.append(n) for n in "ab"}, rounds=2)
    assert calls == list("ababab")
    assert list(seconds.columns) == ["a", "b"] and len(seconds) == 2
    assert (seconds >= 0).all(axis=None)


def test_allocation_category_is_the_innermost_and_ends_with_its_block():
    assert utils.current_category() is None
    with utils.allocation_category("inputs"):
        with pytest.raises(KeyError), utils.allocation_category(utils.HOST):
            assert utils.current_category() == "host"
            raise KeyError
        assert utils.current_category() == "inputs"
    assert utils.current_category() is None


def test_importing_utils_and_config_loads_no_heavy_library():
    code = (
        "import sys, ff_utils.config; print([n for n in ('torch', 'pandas') if n in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=utils.ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("command", ["run", "sweep", "memory", "distributed", "data", "verify"])
def test_windows_is_refused_in_one_sentence_that_names_wsl(command):
    code = "import runpy, sys; sys.modules['resource'] = sys.modules['fcntl'] = None; "
    code += (
        f"sys.argv = ['ff_utils', '{command}']; runpy.run_module('ff_utils', run_name='__main__')"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=utils.ROOT, capture_output=True, text=True, check=False
    )
    sentence = "error: ff_utils runs on Linux and macOS; on Windows install it inside WSL."
    assert (done.returncode, done.stderr.strip()) == (1, sentence)


def test_notebooks_are_read_without_a_grammar_that_takes_seconds():
    code = "import ff_utils.utils, sys, nbformat; sys.exit('lark' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
