import itertools
import json
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import asdict, replace
from itertools import pairwise

import psutil
import pytest
import torch
import torch.distributed as dist

from ff_utils import FFConfig, ForwardForward, distributed, goodness_errors, load_dataset
from ff_utils.distributed import Settings
from ff_utils.ff.negatives import random_negatives
from ff_utils.training import batches
from ff_utils.utils import ROOT

WIDE = Settings("digits", train_size=200, hidden=(900,) * 4, epochs=2, batch_size=60, seed=3)
LONG = Settings("digits", train_size=300, hidden=(24, 16, 24), epochs=40, batch_size=40)


def one_process(settings):
    """What `ForwardForward` and its own step make of these settings, and the data."""
    data = load_dataset(settings.dataset, settings.train_size)
    names = ("label_scale", "threshold", "sharpness", "seed")
    config = FFConfig(classifier=False, **{name: getattr(settings, name) for name in names})
    network = ForwardForward(data.pixels, data.classes, list(settings.hidden), config)
    generator = torch.Generator().manual_seed(settings.seed)
    steps = settings.epochs * -(-settings.train_size // settings.batch_size)
    done = 0
    for _ in range(settings.epochs):
        for images, labels in batches(data, settings.batch_size, generator):
            wrong = random_negatives(labels, data.classes, generator)
            h = network.encode(images.repeat(2, 1), torch.cat([labels, wrong]))
            rate = settings.learning_rate * min(1, 2 * (1 - done / steps))
            network.step(h, len(labels), rate)
            done += 1
    return network, data


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def alone():
    """This process as the only rank."""
    yield distributed.Ranks(60)
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def records():
    return {number: distributed.launch(number, WIDE) for number in (1, 2, 3)}


def torchrun(ranks, settings, *more):
    command = distributed.torchrun_command(ranks, settings, *more)
    return subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)


def errors(text):
    return [line for line in text.splitlines() if line.startswith("error:")]


def test_ranks_learn_bit_for_bit_what_one_process_learns(records):
    network, data = one_process(WIDE)
    expected = [distributed.digest(layer) for layer in network.layers]
    for record in records.values():
        assert record["layers"] == expected
        assert record["test_error"] == pytest.approx(goodness_errors(network, data)[-1])
        assert record["epochs"][-1]["loss_3"] == records[1]["epochs"][-1]["loss_3"]


def test_rank_memory_falls_with_their_number(records):
    for size, falls in (("tensor_bytes", 1.25), ("peak_bytes", 1.05)):
        most = [max(row[size] for row in records[number]["ranks"]) for number in (1, 2, 3)]
        assert most[0] > falls * most[1] and most[1] > falls * most[2], (size, most)
    tensors = sum(row["tensor_bytes"] for row in records[3]["ranks"])
    layers = [4 * (a * b + b) for a, b in pairwise([64, *WIDE.hidden])]
    assert tensors == 3 * sum(layers) + 3 * 4 * 900 * 900 + 4 * 2 * 4  # two step counts a layer


def test_rank_works_on_a_batch_while_the_one_below_has_the_next(records):
    below, above = (row["timeline"] for row in records[2]["ranks"])
    assert len(below) == len(above) == 4
    for (_, sent), (begun, _) in zip(below, above, strict=True):
        assert begun >= sent - 0.005  # the clocks start a message apart
    assert all(end <= begun for row in (below, above) for (_, end), (begun, _) in pairwise(row))


def test_killed_rank_ends_the_others_and_another_number_of_ranks_goes_on(tmp_path):
    done = torchrun(3, LONG, "--checkpoint", str(tmp_path))
    ranks = {}
    while not list(tmp_path.glob("epoch-*.run")):
        assert done.poll() is None and time.sleep(0.005) is None
        if len(ranks) < 3:
            children = psutil.Process(done.pid).children()
            ranks = {child.environ().get("RANK"): child for child in children}
    ranks["1"].send_signal(signal.SIGKILL)
    killed = time.perf_counter()
    (sentence,) = errors(done.communicate(timeout=60)[1])
    assert time.perf_counter() - killed < 20
    assert done.returncode != 0
    assert "rank 1 has ended before its work was done" in sentence and str(tmp_path) in sentence
    assert not any(child.is_running() for child in ranks.values())
    (kept,) = tmp_path.glob("epoch-*.run")
    epoch = int(kept.stem.split("-")[1])
    assert epoch < LONG.epochs
    record = distributed.launch(2, LONG, tmp_path)
    network, _ = one_process(LONG)
    assert record["layers"] == [distributed.digest(layer) for layer in network.layers]
    assert [row["epoch"] for row in record["epochs"]] == list(range(1, LONG.epochs + 1))
    names = {f"epoch-40.{part}" for part in ("layer-0", "layer-1", "layer-2", "run")}
    assert {path.name for path in tmp_path.iterdir()} == names


def test_checkpoint_survives_a_kill_while_it_is_written(alone, tmp_path, monkeypatch):
    short = replace(LONG, epochs=4)
    whole = distributed.train(short, alone, tmp_path / "whole")
    for victim in ("epoch-3.layer-1", "epoch-3.run", "epoch-2.layer-0"):
        folder, save = tmp_path / victim, distributed._save

        def killed(state, path, victim=victim, save=save):
            if path.name == victim:
                path.with_name(f".{path.name}.1").write_bytes(b"half")
                raise KeyboardInterrupt
            save(state, path)

        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(distributed, "_save", killed)
            distributed.train(short, alone, folder)
        again = distributed.train(short, alone, folder)
        assert again["layers"] == whole["layers"] and again["test_error"] == whole["test_error"]
        assert len(list(folder.iterdir())) == 4


def test_settings_out_of_range_are_refused_in_one_sentence(alone, tmp_path, monkeypatch):
    def refused(message, checkpoint=None, **changed):
        with pytest.raises((ValueError, OSError), match=message):
            distributed.train(replace(LONG, **changed), alone, checkpoint)

    refused("epochs is 0", epochs=0)
    refused("batch_size is 301; give a whole number of at least 1 and at most 300", batch_size=301)
    refused(r"hidden\[1\] is 0", hidden=(5, 0))
    refused("learning_rate is 2", learning_rate=2.0)
    refused("threshold is -1", threshold=-1.0)
    refused("dataset is 'letters'", dataset="letters")
    short = replace(LONG, epochs=1)
    distributed.train(short, alone, tmp_path)
    changed = asdict(short) | {"seed": 1}
    refused("seed is 1, but .* holds a training where it is 0", tmp_path, **changed)
    (tmp_path / "epoch-1.layer-2").write_bytes(b"short")
    refused("epoch-1.layer-2 is missing or not whole", tmp_path, epochs=1)
    (tmp_path / "file").touch()
    refused("file", tmp_path / "file", epochs=1)
    monkeypatch.setattr(alone, "size", 4)
    refused("hidden has 3 layers for 4 ranks")


def test_refusal_is_said_by_the_first_rank_alone_whatever_the_host_is_called():
    command = distributed.torchrun_command(2, replace(LONG, hidden=(20,)))
    renamed = ["unshare", "-Ur", "--uts", "sh", "-c", 'hostname nosuch.invalid && exec "$@"', "sh"]
    if shutil.which("unshare") and not subprocess.run([*renamed, "true"], check=False).returncode:
        command = [*renamed, *command]
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode != 0
    expected = "error: hidden has 1 layers for 2 ranks; give at least one layer for each."
    assert errors(done.stderr) == [expected]


def test_ranks_end_with_the_process_that_launched_them(tmp_path):
    lines = ["from ff_utils.distributed import Settings, launch"]
    lines += [f"launch(2, {replace(LONG, epochs=10**6)!r}, {str(tmp_path)!r})"]
    command = [sys.executable, "-c", "; ".join(lines)]
    launcher = psutil.Popen(command, cwd=ROOT, stderr=subprocess.DEVNULL)
    while not list(tmp_path.glob("epoch-*.run")):
        assert launcher.poll() is None and time.sleep(0.05) is None
    children = launcher.children(recursive=True)
    assert len(children) >= 3  # torchrun and two ranks
    launcher.kill()
    _, alive = psutil.wait_procs([launcher, *children], timeout=30)
    assert not alive


def test_old_names_of_settings_are_read(alone, tmp_path, monkeypatch):
    settings = replace(LONG, epochs=1, hidden=(8,), threshold=2.0, sharpness=3.0)
    expected = distributed.train(settings, alone, tmp_path / "kept")
    (run,) = (tmp_path / "kept").glob("*.run")
    state = torch.load(run)
    for old, name in (("theta", "threshold"), ("scale", "sharpness")):
        state["settings"][old] = state["settings"].pop(name)
    torch.save(state, run)
    again = distributed.train(settings, alone, tmp_path / "kept")
    assert again["settings"] == expected["settings"] and again["layers"] == expected["layers"]
    given = []
    monkeypatch.setattr(distributed, "Ranks", lambda timeout: given.append(timeout) or alone)
    monkeypatch.setattr(dist, "destroy_process_group", lambda: None)
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    options = ["--dataset", "digits", "--train-size", "300", "--hidden", "8", "--epochs", "1"]
    options += ["--batch-size", "40", "--theta", "2", "--scale", "3", "--patience", "7"]
    distributed.main([*options, "--record", str(tmp_path / "record")])
    record = json.loads((tmp_path / "record").read_text())
    assert record["layers"] == expected["layers"] and given == [7]


def test_partition_is_as_even_as_whole_layers_allow():
    generator = torch.Generator().manual_seed(0)
    for depth, ranks in itertools.product((1, 2, 3, 5, 7), (1, 2, 3, 5)):
        if ranks > depth:
            continue
        widths = torch.randint(1, 50, (depth + 1,), generator=generator).tolist()
        costs = [below * above for below, above in pairwise(widths)]

        def largest(ends, costs=costs):
            return max(sum(costs[a:b]) for a, b in pairwise((0, *ends, len(costs))))

        found = distributed.partition(widths, ranks)
        assert [n for share in found for n in share] == list(range(depth)) and all(found)
        best = min(map(largest, itertools.combinations(range(1, depth), ranks - 1)))
        assert largest([share.stop for share in found[:-1]]) == best


@pytest.mark.parametrize(("ranks", "parts"), [(1, 1), (2, 4), (4, 3)])
def test_backprop_timeline_is_idle_as_long_as_is_known(ranks, parts):
    rows = distributed.backprop_timeline([0.6] * ranks, parts, batches=2)
    length = max(end for row in rows for _, end, _ in row)
    busy = sum(end - start for row in rows for start, end, _ in row) / (ranks * length)
    assert 1 - busy == pytest.approx((ranks - 1) / (parts + ranks - 1))
    for row in rows:
        assert all(end <= start + 1e-12 for (_, end, _), (start, _, _) in pairwise(row))
