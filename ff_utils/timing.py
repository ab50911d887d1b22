"""Time of an epoch, Forward-Forward beside backpropagation, in processes of their own."""

import multiprocessing
from concurrent.futures import ProcessPoolExecutor

import pandas as pd

from ff_utils.backprop import Backprop, mlp
from ff_utils.config import FFConfig, TrainConfig
from ff_utils.data import load_dataset
from ff_utils.ff.network import ForwardForward
from ff_utils.training import error_rate, fit
from ff_utils.utils import default_device, time_alternately, track


def time_epochs(
    dataset: str,
    images: int,
    hidden: list[int],
    ff: FFConfig,
    ff_training: TrainConfig,
    training: TrainConfig,
    rounds: int,
) -> pd.DataFrame:
    """Seconds of an epoch of both algorithms and of their evaluation, timed alternately.

    images: of an epoch; a fifth as many test images are predicted. hidden: widths, of both. ff,
    ff_training, training: settings of FF, of its training and of backprop's (one epoch each).
    rounds: rows of the result, after one round that does not count. Columns: "FF", "backprop"
    (to train); "FF by softmax", "FF by goodness", "backprop's classes" (to predict).
    """
    whole = load_dataset(dataset).to(default_device())
    data = whole.subset(min(images, len(whole.train_labels)), 1)  # so that fit hardly evaluates
    some = whole.subset(1, min(images // 5, len(whole.test_labels)))
    device = data.train_images.device
    network = ForwardForward(data.pixels, data.classes, hidden, ff, device=device)
    twin = mlp(data.pixels, data.classes, hidden, seed=ff.seed, device=device)
    return time_alternately(
        {
            "FF": lambda: fit(network, data, ff_training, quiet=True),
            "backprop": lambda: fit(Backprop(twin), data, training, quiet=True),
            "FF by softmax": lambda: error_rate(network, some),
            "FF by goodness": lambda: error_rate(network, some, "goodness"),
            "backprop's classes": lambda: error_rate(twin, some),
        },
        rounds,
        quiet=True,
    )


def time_in_processes(processes: int, *arguments: object) -> pd.DataFrame:
    """`time_epochs(*arguments)` in each of so many fresh processes, one process after the other.

    The ratio of two times depends on the process: on where its memory is, for one. Columns: as of
    `time_epochs`, and process, counted from 1.
    """
    tables = []
    for number in track(range(1, processes + 1), "process"):
        fresh = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(1, mp_context=fresh) as pool:
            table = pool.submit(time_epochs, *arguments).result()
        tables.append(table.assign(process=number))
    return pd.concat(tables, ignore_index=True)
