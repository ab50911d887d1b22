import json
import random
import subprocess
import sys
from contextlib import nullcontext

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.mem_tracker import MemTracker

from ff_utils import closed_form, memory, seed
from ff_utils.arms import ARMS
from ff_utils.closed_form import Setting
from ff_utils.live_bytes import CATEGORIES, format_bytes
from ff_utils.memory import measure

OF_THE_SEED = ("backprop_seed", "ff_seed", "ff_seed_uncached", "ff_recurrent")
DEEPEST = {"ff_recurrent": 8, "ff_recurrent_analytic": 5}  # many time steps are slow to simulate


@pytest.mark.parametrize(("depth", "fake"), [(2, True), (7, True), (3, False)])
def test_live_bytes_are_those_of_pytorchs_own_tracker(depth, fake):
    with FakeTensorMode() if fake else nullcontext():
        arm = ARMS["backprop"].build(Setting(depth, 200, 300))
        arm.train()
        oracle = MemTracker()
        oracle.track_external(arm.network, *arm.optimizers, *arm.resident["inputs"])
        with oracle:
            arm.train()
    (snapshot,) = oracle.get_tracker_snapshot("peak").values()
    instrument = "simulated" if fake else "tracked"
    report = measure("backprop", depth=depth, hidden=200, batch=300, instrument=instrument)
    assert report.peak_bytes == snapshot["Total"]


def test_plain_backprop_needs_683_megabytes_at_7_layers_and_88_a_layer():
    peaks = [measure("backprop", depth=d, hidden=2000, batch=5000).peak_bytes for d in (7, 12)]
    assert round(peaks[0] / 1e6) == 683
    assert round((peaks[1] - peaks[0]) / 5e6) == 88


def test_forward_forward_needs_48_megabytes_a_layer():
    peaks = [measure("ff_resident", depth=d, hidden=2000, batch=5000).peak_bytes for d in (7, 12)]
    assert round((peaks[1] - peaks[0]) / 5e6) == 48


@pytest.mark.parametrize("arm", ARMS)
def test_simulated_is_tracked_to_the_byte(arm, monkeypatch):
    monkeypatch.setattr(seed, "DATASET_ROWS", 2000)
    for depth, hidden, batch in ((1, 30, 40), (2, 100, 64), (5, 64, 300)):
        sizes = {"depth": depth, "hidden": hidden, "batch": batch}
        simulated = measure(arm, **sizes)
        tracked = measure(arm, **sizes, instrument="tracked")
        assert simulated.peak_bytes == tracked.peak_bytes
        assert simulated.breakdown == tracked.breakdown
        assert simulated.evaluation_peak_bytes == tracked.evaluation_peak_bytes


@pytest.mark.parametrize("arm", ARMS)
def test_the_closed_form_is_within_one_percent_at_random_shapes(arm):
    chosen = random.Random(arm)
    for _ in range(5):
        sizes = {
            "depth": chosen.randint(1, DEEPEST.get(arm, 20)),
            "hidden": chosen.randint(64, 3000),
            "batch": chosen.choice([chosen.randint(500, 5000), chosen.randint(5000, 20_000)]),
            "optimizer": chosen.choice(["adam", "adam", "sgd"]),
            "precision": chosen.choice(["float32", "float32", "bfloat16", "float64"]),
        }
        report = measure(arm, **sizes)
        assert report.predicted_bytes == pytest.approx(report.peak_bytes, rel=0.01), sizes
        expected = closed_form.host(arm, Setting(**sizes))
        assert report.host_bytes == pytest.approx(expected, rel=0.02), sizes
        if arm not in OF_THE_SEED:
            assert report.evaluation_peak_bytes <= report.peak_bytes, sizes


def test_streamed_needs_under_200_megabytes_at_any_depth():
    for arm, deep in (("ff_streamed", 100), ("ff_frugal", 20), ("ff_layerwise", 47)):
        sizes = {"hidden": 2000, "batch": 5000}
        peaks = [measure(arm, depth=depth, **sizes).peak_bytes for depth in (2, 5, deep)]
        peaks.append(closed_form.peak(arm, Setting(1000, **sizes)))
        assert max(peaks) < 200e6
        assert max(peaks) / min(peaks) < 1.01


def test_the_recurrent_network_of_the_seed_needs_what_was_measured_of_it():
    for depth, megabytes in ((2, 1050), (7, 2390)):
        report = measure("ff_recurrent", depth=depth, hidden=2000, batch=5000)
        assert report.peak_bytes / 1e6 == pytest.approx(megabytes, rel=0.01)


def test_the_recurrent_network_done_right_needs_less_than_two_thirds_of_the_seeds():
    for depth in (2, 7, 15):
        setting = Setting(depth, 2000, 5000)
        peaks = [closed_form.peak(a, setting) for a in ("ff_recurrent_analytic", "ff_recurrent")]
        assert peaks[0] < 2 / 3 * peaks[1]


def test_all_remedies_together_need_the_least_backprop_can_without_streaming():
    family = [a for a in ARMS if a.startswith("backprop") and "streamed" not in a]
    for depth in (2, 12, 47):
        peaks = {arm: closed_form.peak(arm, Setting(depth, 2000, 5000)) for arm in family}
        assert peaks["backprop_frugal"] == min(peaks.values())


def test_the_breakdown_adds_up_and_knows_what_each_arm_keeps():
    report = measure("ff_resident", depth=4, hidden=300, batch=1000)
    assert sum(report.breakdown.values()) == report.peak_bytes
    weights = 4 * (784 * 300 + 3 * 300 * 300 + 4 * 300)
    assert report.breakdown["parameters"] == weights
    assert report.breakdown["optimizer_state"] == 2 * weights + 8 * 4
    assert report.breakdown["gradients"] == 4 * 784 * 300
    backprop = measure("backprop", depth=4, hidden=300, batch=5000)
    assert backprop.breakdown["activations"] == pytest.approx(4 * 4 * 300 * 5000, rel=0.01)


def test_the_seeds_cache_is_most_of_its_shallow_peak():
    report = measure("ff_seed", depth=2, hidden=2000, batch=5000)
    assert report.breakdown["inputs"] == pytest.approx(1.92e9, rel=0.03)
    assert report.peak_bytes > 5 * measure("backprop", depth=2, hidden=2000, batch=5000).peak_bytes


def test_evaluation_in_chunks_needs_less_than_training():
    report = measure("ff_resident", depth=5, hidden=1000, batch=2000)
    assert report.evaluation_peak_bytes < report.peak_bytes


def test_the_timeline_ends_where_it_began_and_holds_the_peak():
    steps = memory.timeline("ff_resident", depth=3, hidden=100, batch=500)
    sizes = [sum(live.values()) for _, live in steps]
    report = measure("ff_resident", depth=3, hidden=100, batch=500)
    assert max(sizes) == report.peak_bytes
    kept = report.breakdown
    stays = kept["parameters"] + kept["optimizer_state"] + kept["gradients"] + kept["inputs"]
    assert min(sizes) >= stays


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_fresh_process_measures_about_what_the_closed_form_says():
    report = measure("backprop", depth=6, hidden=800, batch=3000, instrument="rss")
    assert not report.error
    assert report.peak_bytes == pytest.approx(report.predicted_bytes, rel=0.25)
    assert report.evaluation_peak_bytes < report.peak_bytes
    assert report.step_seconds > 0


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_resident_memory_of_streamed_forward_forward_does_not_grow_with_depth():
    peaks = [
        measure("ff_streamed", depth=d, hidden=1500, batch=3000, instrument="rss").peak_bytes
        for d in (2, 12)
    ]
    assert peaks[1] < 1.1 * peaks[0]


@pytest.mark.parametrize("instrument", ["tracked", "rss"])
def test_what_cannot_fit_is_refused_with_the_number_and_simulated_all_the_same(instrument):
    sizes = {"depth": 40, "hidden": 40_000, "batch": 5000}
    with pytest.raises(ValueError, match=r"backprop needs [\d.]+ GiB and [\d.]+ GiB are free: "):
        measure("backprop", **sizes, instrument=instrument)
    assert measure("backprop", **sizes).peak_bytes > 5e11


def test_memory_that_runs_out_is_a_row(tmp_path):
    command = "ulimit -v 5000000; exec "
    command += f"{sys.executable} -m ff_utils.memory --arm backprop --depth 2 --hidden 64 --json"
    command += " --batch 2000000"
    for instrument in ("tracked", "rss"):
        done = subprocess.run(
            ["bash", "-c", f"{command} --instrument {instrument} --override"],
            capture_output=True,
            text=True,
            check=False,
        )
        found = json.loads(done.stdout)
        assert found["peak_bytes"] is None and found["predicted_bytes"] > 5e9
        assert "memory" in found["error"]


def test_time_is_taken_in_turns_and_traffic_beside_it():
    table = memory.time_steps(
        ["backprop", "backprop_offload", "ff_resident", "ff_streamed", "ff_seed"],
        depth=3,
        hidden=200,
        batch=400,
        repeats=2,
    ).set_index("arm")
    assert (table.fastest <= table.seconds).all() and (table.seconds <= table.slowest).all()
    assert table.moved_bytes["backprop"] == table.moved_bytes["ff_resident"] == 0
    layers = 3 * 4 * (784 * 200 + 2 * 200 * 200 + 3 * 200)
    # Each layer's weights and moments come and go once a step.
    assert table.moved_bytes["ff_streamed"] == pytest.approx(2 * layers, rel=0.01)
    assert table.images.to_dict() == {a: 400 if "backprop" in a else 200 for a in table.index}
    assert table.moved_bytes["backprop_offload"] >= 2 * 3 * 4 * 200 * 400


def test_a_process_that_dies_is_a_row_not_a_crash(monkeypatch):
    monkeypatch.setattr(sys, "executable", "/bin/false")
    report = measure("backprop", depth=2, hidden=20, batch=20, instrument="rss")
    assert report.peak_bytes is None and "status 1" in report.error


def test_a_sweep_has_a_row_for_every_arm_depth_and_instrument():
    table = memory.sweep(
        ["backprop", "ff_resident"],
        [1, 2],
        hidden=20,
        batch=20,
        instruments=["simulated", "tracked"],
    )
    assert len(table) == 8
    assert (table[list(CATEGORIES)].sum(axis=1) == table.peak_bytes).all()


def test_what_does_not_fit_is_a_row_of_a_sweep():
    table = memory.sweep(["backprop"], [2, 400_000], hidden=900, batch=20, instruments=["tracked"])
    assert table.peak_bytes.notna().tolist() == [True, False]
    assert "are free: lower depth" in table.error[1] and table.predicted_bytes[1] > 1e12


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"arm": "ff"}, "arm is 'ff'; choose one of: backprop"),
        ({"instrument": "top"}, "instrument is 'top'; choose one of: simulated"),
        ({"depth": 0}, "depth is 0"),
        ({"hidden": 1.5}, "hidden is 1.5"),
        ({"batch": 1}, "batch is 1"),
        ({"optimizer": "lion"}, "optimizer is 'lion'; choose one of: adam, sgd"),
        ({"precision": "int8"}, "precision is 'int8'; choose one of: float32"),
    ],
)
def test_bad_sizes_and_names_are_refused(given, message):
    with pytest.raises(ValueError, match=message):
        measure(**({"arm": "backprop", "depth": 2, "hidden": 9, "batch": 9} | given))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_cuda_without_a_device_is_refused_in_one_sentence():
    with pytest.raises(ValueError, match="there is no CUDA device; use 'simulated'"):
        measure("backprop", depth=2, hidden=9, batch=9, instrument="cuda")


def run(*arguments):
    command = [sys.executable, "-m", "ff_utils.memory", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_the_command_prints_a_table_or_one_json_object():
    sizes = ["--depth", "7", "--hidden", "2000", "--batch", "5000"]
    table = run("--arm", "backprop", *sizes)
    assert table.returncode == 0 and "651.4 MiB" in table.stdout
    found = json.loads(run("--arm", "ff_resident", *sizes, "--json").stdout)
    lean = run("--arm", "ff_streamed", "--depth", "20", "--hidden", "20000")
    assert lean.returncode == 0 and "on the host" in lean.stdout
    expected = {"arm", "depth", "hidden", "batch", "instrument"}
    assert expected | {"peak_bytes", "predicted_bytes", "breakdown"} <= set(found)
    assert sum(found["breakdown"].values()) == found["peak_bytes"]
    wrong = run("--arm", "nothing")
    assert wrong.returncode == 2 and wrong.stderr.startswith("error: arm is 'nothing'")
    assert len(wrong.stderr.splitlines()) == 1


def test_bytes_are_written_in_binary_units():
    shown = [format_bytes(n) for n in (0, 1023, 1024, 716_177_408, 3 * 2**30)]
    assert shown == ["0 B", "1023 B", "1.0 KiB", "683.0 MiB", "3.00 GiB"]
