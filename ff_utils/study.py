"""Full-length trainings: one resumable run, one record and one network each.

`python -m ff_utils.study supervised --seed 0` trains or goes on, reads the test set once at the
end, and writes the record; `--evaluate` reads the test set with the committed network instead.
"""

import argparse
import sys
from collections.abc import Callable
from dataclasses import dataclass, field

import pandas as pd
import torch
from torch import nn

from ff_utils import checks, datasets, files, paths, results, training
from ff_utils.datasets import Dataset
from ff_utils.networks import ForwardForward, backprop_network

PROFILE = "study"  # its records' folder below data/results/
NETWORKS = paths.DATA / "networks"
VALIDATION = 5000  # training images held out: they choose, the test set only reports


@dataclass(frozen=True)
class Study:
    """One system: how to build, train and read it, with settings chosen on validation images.

    network: (data, seed, device, **choices); train: (network, data, **course);
    errors: (network, data) -> test error by each way to predict.
    """

    title: str
    network: Callable[..., nn.Module]
    train: Callable[..., pd.DataFrame]
    errors: Callable[[nn.Module, Dataset], dict[str, float]]
    dataset: str = "mnist"
    choices: dict = field(default_factory=dict)
    course: dict = field(default_factory=dict)


def _forward_forward(data: Dataset, seed: int, device: str, **choices: object) -> ForwardForward:
    return ForwardForward(data.pixels, data.classes, seed=seed, device=device, **choices)


def _backprop(data: Dataset, seed: int, device: str, hidden: list[int]) -> nn.Module:
    return backprop_network(data.pixels, data.classes, hidden, seed=seed, device=device)


def _errors(network: ForwardForward, data: Dataset) -> dict[str, float]:
    by_goodness = training.goodness_errors(network, data)[-1]
    return {"softmax": training.softmax_error(network, data), "goodness": by_goodness}


def _backprop_errors(network: nn.Module, data: Dataset) -> dict[str, float]:
    return {"softmax": training.classifier_error(network, data)}


WIDTHS = [1000, 1000, 1000]
SUPERVISED = {"hidden": WIDTHS, "label_scale": 4.0, "loss": "pairwise", "scale": 30.0}
COURSE = {"epochs": 60, "batch_size": 100, "learning_rate": 0.001}
FF_COURSE = COURSE | {"guess_share": 0.5, "softmax_rate": 0.1}
STUDIES = {
    "supervised": Study(
        "supervised, label in the input",
        _forward_forward,
        training.train_forward_forward,
        _errors,
        choices=SUPERVISED,
        course=FF_COURSE,
    ),
    "jittered": Study(
        "supervised, images shifted by up to two pixels",
        _forward_forward,
        training.train_forward_forward,
        _errors,
        choices=SUPERVISED,
        course=FF_COURSE | {"epochs": 100, "jitter": 2},
    ),
    "backprop": Study(
        "backprop, the same network",
        _backprop,
        training.train_backprop,
        _backprop_errors,
        choices={"hidden": WIDTHS},
        course=COURSE,
    ),
}


def run(name: str, seed: int = 0, *, quiet: bool = False) -> dict:
    """The record of one study's run with one seed: read if it is there, else trained to.

    Training goes on from `build/study/NAME-SEED.pt` where an earlier call was cut short. The
    network that has been trained is kept beside it, in 16 bits.
    """
    study = _check(name, seed)
    label = f"{name}-{seed}"
    if results.record_path(label, PROFILE).exists():
        return results.read(label, PROFILE)
    about = {"seed": seed, **study.choices, **study.course, "validation": VALIDATION}
    begun = results.Run(label, PROFILE, about)
    device = training.default_device()
    data = datasets.load(study.dataset).to(device)
    split = data.validation_split(VALIDATION, seed)
    network = study.network(data, seed, device, **study.choices)
    place = paths.BUILD / PROFILE / f"{label}.pt"
    history = study.train(network, split, seed=seed, checkpoint=place, quiet=quiet, **study.course)
    validation, test = study.errors(network, split), study.errors(network, data)
    chosen = min(validation, key=validation.get)
    save_network(network, NETWORKS / f"{label}.pt")
    metrics = {
        "history": history,
        "validation_errors": validation,
        "test_errors": test,
        "chosen": chosen,
        "test_error": test[chosen],
        "seconds_an_epoch": history.seconds.mean(),
    }
    return begun.finish(metrics, data)


def table() -> pd.DataFrame:
    """Every record there is, a row each: study, title, seed, epochs, error (test), by."""
    rows = []
    for path in sorted((paths.RESULTS / PROFILE).glob("*.json")):
        record = results.read(path.stem, PROFILE)
        name, _, seed = path.stem.rpartition("-")
        metrics = record["metrics"]
        rows.append(
            {
                "study": name,
                "title": STUDIES[name].title,
                "seed": int(seed),
                "epochs": len(metrics["history"]),
                "error": metrics["test_error"],
                "by": metrics["chosen"],
            }
        )
    return pd.DataFrame(rows)


def save_network(network: nn.Module, path: paths.Path) -> None:
    """A trained network's weights alone, in 16 bits."""
    state = {
        name: tensor.half().cpu()
        for name, tensor in network.state_dict().items()
        if not name.endswith(("_moment", "_steps"))
    }
    files.replace(path, lambda temporary: torch.save(state, temporary))


def load_network(name: str, seed: int = 0) -> tuple[nn.Module, Dataset]:
    """The network that a run has kept, and its data; ValueError where it is missing."""
    study = _check(name, seed)
    path = NETWORKS / f"{name}-{seed}.pt"
    if not path.exists():
        command = f"python -m ff_utils.study {name} --seed {seed}"
        raise ValueError(f"{paths.relative(path)} is missing: run `{command}`.")
    device = training.default_device()
    data = datasets.load(study.dataset).to(device)
    network = study.network(data, seed, device, **study.choices)
    network.load_state_dict(torch.load(path, weights_only=True), strict=False)
    return network, data


def _check(name: str, seed: int) -> Study:
    checks.one_of("study", name, STUDIES)
    checks.number("seed", seed, 0, whole=True)
    return STUDIES[name]


def main(arguments: list[str] | None = None) -> None:
    """Train one study with one seed, or read the test set with the network it has kept."""
    parser = argparse.ArgumentParser(prog="python -m ff_utils.study", description=main.__doc__)
    parser.add_argument("study", help=", ".join(STUDIES))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--evaluate", action="store_true", help="the network that was kept")
    options = parser.parse_args(arguments)
    try:
        if options.evaluate:
            network, data = load_network(options.study, options.seed)
            found = STUDIES[options.study].errors(network, data)
        else:
            found = run(options.study, options.seed)["metrics"]["test_errors"]
    except (ValueError, OSError, RuntimeError, FloatingPointError) as error:
        sys.exit(f"error: {error}")
    for by, error in found.items():
        print(f"{options.study}, seed {options.seed}: test error by {by} {error:.2%}")


if __name__ == "__main__":
    main()
