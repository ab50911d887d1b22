import itertools
import json
import shutil
import subprocess
import sys
import time
from dataclasses import asdict, replace
from itertools import pairwise
from types import SimpleNamespace

import psutil
import pytest
import torch
import torch.distributed as dist

from ff_utils import ForwardForward, distributed, goodness_errors, load_dataset
from ff_utils.distributed import Settings
from ff_utils.ff.negatives import random_negatives
from ff_utils.training import batches
from ff_utils.utils import ROOT

WIDE = Settings("digits", train_size=200, hidden=(900,) * 4, epochs=2, batch_size=60, seed=3)
LONG = Settings("digits", train_size=300, hidden=(24, 16, 24), epochs=60, batch_size=40)
ENDLESS = replace(LONG, epochs=10**6)


LAUNCH = """
import json
from ff_utils.distributed import Settings, launch

def two(settings, *options):
    try:
        print(json.dumps(launch(2, settings, *options)))
    except RuntimeError as error:
        print(error)

"""
RENAMED = ["unshare", "-Ur", "--uts", "sh", "-c", 'hostname nosuch.invalid && exec "$@"', "sh"]
ENDED = "rank 1 has ended before its work was done: the same command, on any number of ranks"


def one_process(settings):
    """What `ForwardForward` and its own step make of these settings, and the data."""
    data = load_dataset(settings.dataset, settings.train_size)
    network = ForwardForward(
        data.pixels, data.classes, list(settings.hidden), settings.configs()[0]
    )
    generator = torch.Generator().manual_seed(settings.seed)
    count = -(-settings.train_size // settings.batch_size)
    for epoch in range(settings.epochs):
        for number, (images, labels) in enumerate(batches(data, settings.batch_size, generator)):
            wrong = random_negatives(labels, data.classes, generator)
            h = network.encode(images.repeat(2, 1), torch.cat([labels, wrong]))
            done = (epoch * count + number) / (settings.epochs * count)
            network.step(h, len(labels), settings.learning_rate * min(1, 2 * (1 - done)))
    return network, data


def python(code):
    """A fresh Python, on a machine whose name does not resolve where that can be arranged."""
    renamed = shutil.which("unshare") and subprocess.call([*RENAMED, "true"]) == 0
    command = [*(RENAMED if renamed else []), sys.executable, "-c", LAUNCH + code]
    return psutil.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


@pytest.fixture(scope="module")
def alone():
    """This process as the only rank."""
    yield distributed.Ranks(60)
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def one(alone):
    return distributed.train(WIDE, alone)


@pytest.fixture(scope="module")
def refused_and_two():
    """What is said of too few layers, then the record of two ranks."""
    bad = replace(WIDE, hidden=(20,))
    run = python(f"two({bad!r}); two({WIDE!r})")
    refusal, record = run.communicate(timeout=120)[0].splitlines()
    return refusal, json.loads(record)


@pytest.fixture
def two(refused_and_two):
    return refused_and_two[1]


def test_ranks_learn_bit_for_bit_what_one_process_learns(one, two):
    network, data = one_process(WIDE)
    assert one["layers"] == two["layers"] == [distributed.digest(n) for n in network.layers]
    assert one["test_error"] == two["test_error"]
    assert one["test_error"] == pytest.approx(goodness_errors(network, data)[-1])
    losses = [[row | {"seconds": 0} for row in record["epochs"]] for record in (one, two)]
    assert losses[0] == losses[1] and set(losses[0][0]) >= {"epoch", "loss_1", "loss_4"}


def test_rank_needs_less_memory_than_one_process(one, two):
    whole = one["ranks"][0]["tensor_bytes"]
    layers = [4 * (a * b + b) for a, b in pairwise([64, *WIDE.hidden])]
    steps, gradient = 4 * 2 * 4, 4 * 900 * 900  # steps: two counts a layer
    assert whole == 3 * sum(layers) + steps + gradient
    assert sum(row["tensor_bytes"] for row in two["ranks"]) == whole + gradient
    assert all(row["tensor_bytes"] < row["peak_bytes"] < 2 * whole for row in two["ranks"])


def test_rank_takes_batch_after_batch(two):
    for row in two["ranks"]:
        assert len(row["timeline"]) == 4 and 0 < row["busy"] <= 1
        times = [time for span in row["timeline"] for time in span]
        assert times == sorted(times)


def test_next_batch_is_under_way_while_one_is_at_work(alone, monkeypatch):
    asked = []

    def irecv(h, _):
        asked.append(h.fill_(len(asked)))
        return SimpleNamespace(wait=lambda: None)

    monkeypatch.setattr(dist, "irecv", irecv)
    found = [(len(h), int(h[0, 0]), len(asked)) for h in alone.receive(10, 4, 3)]
    assert found == [(4, 0, 2), (4, 1, 3), (2, 2, 3)]


def test_killed_rank_ends_the_others_and_another_number_of_ranks_goes_on(alone, tmp_path):
    command = distributed.torchrun_command(3, LONG, "--checkpoint", str(tmp_path))
    run = psutil.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)
    wait_for_checkpoint(run, tmp_path)
    ranks = {child.environ().get("RANK"): child for child in run.children()}
    ranks["1"].kill()
    killed = time.perf_counter()
    (sentence,) = errors(run.communicate(timeout=60)[1])
    assert time.perf_counter() - killed < 30
    assert run.returncode != 0 and ENDED in sentence and str(tmp_path) in sentence
    assert not any(child.is_running() for child in ranks.values())
    (kept,) = tmp_path.glob("epoch-*.run")
    assert int(kept.stem.split("-")[1]) < LONG.epochs
    record = distributed.train(LONG, alone, tmp_path)
    network, _ = one_process(LONG)
    assert record["layers"] == [distributed.digest(layer) for layer in network.layers]
    assert [row["epoch"] for row in record["epochs"]] == list(range(1, LONG.epochs + 1))
    names = {f"epoch-{LONG.epochs}.{part}" for part in ("layer-0", "layer-1", "layer-2", "run")}
    assert {path.name for path in tmp_path.iterdir()} == names


def wait_for_checkpoint(run, folder):
    while not list(folder.glob("epoch-*.run")):
        assert run.poll() is None
        time.sleep(0.005)


def errors(text):
    return [line for line in text.splitlines() if line.startswith("error:")]


def test_checkpoint_survives_a_kill_while_it_is_written(alone, tmp_path, monkeypatch):
    short = replace(LONG, epochs=4)
    whole = distributed.train(short, alone, tmp_path / "whole")
    for victim in ("epoch-3.layer-1", "epoch-3.run", "epoch-2.layer-0"):
        folder, save = tmp_path / victim, distributed.save_state

        def killed(state, path, victim=victim, save=save):
            if path.name == victim:
                path.with_name(f".{path.name}.1").write_bytes(b"half")
                raise KeyboardInterrupt
            save(state, path)

        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(distributed, "save_state", killed)
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
    refused("seed is -1", seed=-1)
    refused("dataset is 'letters'", dataset="letters")
    short = replace(LONG, epochs=1)
    distributed.train(short, alone, tmp_path)
    changed = asdict(short) | {"seed": 1}
    refused("is of a run whose seed is 0, not 1: delete it", tmp_path, **changed)
    torch.save([1], tmp_path / "epoch-1.layer-1")
    refused("epoch-1.layer-1 is not a whole checkpoint: delete it", tmp_path, epochs=1)
    (tmp_path / "epoch-1.layer-0").write_bytes(b"short")
    refused("epoch-1.layer-0 is not a whole checkpoint: delete it", tmp_path, epochs=1)
    (tmp_path / "epoch-x.run").touch()
    torch.save({"epoch": 1}, tmp_path / "epoch-1.run")
    refused("epoch-1.run is not a whole checkpoint: delete it", tmp_path, epochs=1)
    (tmp_path / "file").touch()
    refused("file", tmp_path / "file", epochs=1)
    monkeypatch.setattr(alone, "size", 4)
    refused("hidden has 3 layers for 4 ranks")


def test_refusal_is_one_sentence(refused_and_two):
    sentence = "hidden has 1 layers for 2 ranks; give at least one layer for each."
    assert refused_and_two[0] == sentence


def test_ranks_but_the_first_refuse_settings_in_silence(monkeypatch, capsys):
    for rank in ("0", "1"):
        monkeypatch.setenv("RANK", rank)
        with pytest.raises(SystemExit):
            distributed.main(["--epochs", "0"])
        assert capsys.readouterr().err.count("epochs is 0") == (rank == "0")


def test_ranks_end_with_the_process_that_launched_them(tmp_path):
    launcher = python(f"two({ENDLESS!r}, '--checkpoint', {str(tmp_path)!r})")
    wait_for_checkpoint(launcher, tmp_path)
    children = launcher.children(recursive=True)
    assert len(children) >= 3  # torchrun and two ranks
    launcher.kill()
    _, alive = psutil.wait_procs([launcher, *children], timeout=60)
    assert not alive


def test_rank_that_waits_where_python_handles_no_signal_ends_after_sigterm():
    lines = ["import os", "from torch.distributed import TCPStore"]
    lines += ["store = TCPStore('127.0.0.1', 0, is_master=True, wait_for_workers=False)"]
    lines += ["from ff_utils import distributed", "distributed._watch([os.getpid()])"]
    lines += ["print('waits', flush=True)", "store.wait(['never'])"]
    run = python("\n".join(lines))
    assert run.stdout.readline() == "waits\n"
    time.sleep(0.5)
    run.terminate()
    assert run.wait(timeout=30) == 1


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
