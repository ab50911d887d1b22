"""Times of an epoch: every round of every process is there, and each did the work."""

import os

from ff_utils import FFConfig, TrainConfig, timing

GIVEN = ("digits", 200, [20], FFConfig(), TrainConfig(epochs=1), TrainConfig(epochs=1), 2)


def test_both_algorithms_are_timed_in_every_round(monkeypatch):
    trained = []
    monkeypatch.setattr(timing, "fit", lambda network, *rest, **kind: trained.append(network))
    seconds = timing.time_epochs(*GIVEN)
    assert len(seconds) == 2 and (seconds > 0).all(axis=None)
    kinds = [type(network).__name__ for network in trained]
    assert kinds == ["ForwardForward", "Backprop"] * 3  # with the round that does not count


def test_every_process_is_a_new_one(monkeypatch):
    monkeypatch.setattr(timing, "time_epochs", process_number)
    found = timing.time_in_processes(2)
    assert list(found.process) == [1, 2]
    assert len({*found.number, os.getpid()}) == 3


def process_number():
    import pandas as pd

    return pd.DataFrame({"number": [os.getpid()]})
