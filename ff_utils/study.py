"""Full-length trainings: one resumable run, one record and one network each.

`python -m ff_utils.study supervised --seed 0` trains or goes on, reads the test set once at the
end, and writes the record; `--evaluate` reads the test set with the committed network instead.
"""

import argparse
import json
import pickle
import sys
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import pandas as pd
import torch
from torch import nn

from ff_utils import checks, datasets, files, paths, recurrent, results, training, unsupervised
from ff_utils.datasets import Dataset
from ff_utils.local_fields import CIFAR_FIELDS, MNIST_FIELDS, LocalForwardForward
from ff_utils.networks import PREDICTIONS, ForwardForward, backprop_network
from ff_utils.recurrent import RecurrentForwardForward

PROFILE = "study"  # its records' folder below data/results/
NETWORKS = paths.DATA / "networks"
VALIDATION = 5000  # training images held out: they choose, the test set only reports


@dataclass(frozen=True)
class Study:
    """One system: how to build, train and read it, with settings chosen on validation images.

    network: (data, seed, device, **choices); train: (network, data, **course);
    errors: (network, data) -> test error by each way to predict.
    chosen_by: the study whose validation images made this one's choices, the way to predict
    included (its seed 0), but for what is set anew beside it; this one then trains on those images
    too, and chooses nothing.
    """

    title: str
    paper: float | None  # test error in Hinton, arXiv 2212.13345
    network: Callable[..., nn.Module]
    train: Callable[..., pd.DataFrame]
    errors: Callable[[nn.Module, Dataset], dict[str, float]]
    dataset: str = "mnist"
    choices: dict = field(default_factory=dict)
    course: dict = field(default_factory=dict)
    chosen_by: str | None = None


def _forward_forward(data: Dataset, seed: int, device: str, **choices: object) -> ForwardForward:
    return ForwardForward(data.pixels, data.classes, seed=seed, device=device, **choices)


def _local(data: Dataset, seed: int, device: str, **choices: object) -> LocalForwardForward:
    return LocalForwardForward(data.shape, data.classes, seed=seed, device=device, **choices)


def _recurrent(data: Dataset, seed: int, device: str, **choices: object) -> nn.Module:
    return RecurrentForwardForward(data.pixels, data.classes, seed=seed, device=device, **choices)


def _backprop(data: Dataset, seed: int, device: str, hidden: list[int]) -> nn.Module:
    return backprop_network(data.pixels, data.classes, hidden, seed=seed, device=device)


def _train(network: ForwardForward, data: Dataset, **course: object) -> pd.DataFrame:
    def note() -> dict:
        return {"goodness_error": training.goodness_errors(network, data)[-1]}

    return training.train_forward_forward(network, data, after_epoch=note, **course)


def _errors(network: nn.Module, data: Dataset) -> dict[str, float]:
    return {by: training.prediction_error(network, data, by) for by in PREDICTIONS}


def _softmax_error(network: ForwardForward, data: Dataset) -> dict[str, float]:
    return {"softmax": training.prediction_error(network, data, "softmax")}


def _backprop_errors(network: nn.Module, data: Dataset) -> dict[str, float]:
    return {"softmax": training.classifier_error(network, data)}


WIDTHS = [1000, 1000, 1000]
UNLABELLED_FIELDS = ((12, 4, 100), (2, 1, 100), (2, 1, 200))  # grids of 5x5, 4x4 and 3x3
SUPERVISED = {"hidden": WIDTHS, "label_scale": 4.0, "loss": "pairwise", "scale": 30.0}
COURSE = {"epochs": 50, "batch_size": 100, "learning_rate": 0.001}
OTHERS = {"label_scale": 2.0, "loss": "pairwise", "scale": 30.0}
UNDECAYED = OTHERS | {"hidden": [1000, 1000], "label_scale": 10.0, "steps": 5}
RECURRENT = UNDECAYED | {"weight_decay": 0.1}
RECURRENT_COURSE = COURSE | {"epochs": 60, "softmax_rate": 0.1, "dropout": 0.2}
RECURRENT_STUDY = partial(
    Study,
    network=_recurrent,
    train=recurrent.train_recurrent,
    errors=_errors,
    course=RECURRENT_COURSE,
)
FF_COURSE = COURSE | {"guess_share": 0.5, "softmax_rate": 0.1}
STUDIES = {
    "supervised": Study(
        "supervised, label in the input",
        0.0136,
        _forward_forward,
        _train,
        _errors,
        choices=SUPERVISED,
        course=FF_COURSE | {"dropout": 0.2},
    ),
    "wide": Study(
        "the same at the paper's widths",
        0.0136,
        _forward_forward,
        _train,
        _errors,
        choices=SUPERVISED | {"hidden": [2000] * 4},
        course=FF_COURSE | {"epochs": 60, "dropout": 0.2},
    ),
    "jittered": Study(
        "supervised, images shifted by up to two pixels",
        0.0064,
        _forward_forward,
        _train,
        _errors,
        choices=SUPERVISED | {"weight_decay": 0.1},
        course=FF_COURSE | {"epochs": 100, "jitter": 2},
    ),
    "unsupervised": Study(
        "unsupervised, a softmax on frozen layers of local fields",
        0.0116,
        _local,
        unsupervised.train_unsupervised,
        _softmax_error,
        choices={"fields": UNLABELLED_FIELDS, "label": "none", "loss": "pairwise", "scale": 30.0},
        course=COURSE | {"epochs": 30, "blurs": 2, "dropout": 0.2},
    ),
    "local": Study(
        "supervised, local receptive fields",
        None,
        _local,
        _train,
        _errors,
        choices=OTHERS | {"fields": MNIST_FIELDS},
        course=FF_COURSE | {"epochs": 40, "dropout": 0.2},
    ),
    "local_jittered": Study(
        "local receptive fields, images shifted by up to two pixels",
        None,
        _local,
        _train,
        _errors,
        choices=OTHERS | {"fields": MNIST_FIELDS},
        course=FF_COURSE | {"epochs": 100, "jitter": 2},
    ),
    "recurrent": RECURRENT_STUDY("recurrent, top-down and bottom-up", 0.0131, choices=RECURRENT),
    "recurrent_all": RECURRENT_STUDY(
        "the same, trained on the validation images too",
        0.0131,
        choices=RECURRENT,
        course=RECURRENT_COURSE | {"epochs": 90},
        chosen_by="recurrent",
    ),
    "recurrent_wide": RECURRENT_STUDY(  # twice as wide: half the rate, and as much decay a step
        "the same at the paper's widths",
        0.0131,
        choices=RECURRENT | {"hidden": [2000, 2000], "weight_decay": 0.2},
        course=RECURRENT_COURSE | {"epochs": 48, "learning_rate": 0.0005},
        chosen_by="recurrent",
    ),
    "recurrent_undecayed": RECURRENT_STUDY(
        "recurrent, without weight decay", None, choices=UNDECAYED
    ),
    "cifar10": Study(
        "CIFAR-10, local receptive fields",
        0.41,
        _local,
        _train,
        _errors,
        dataset="cifar10",
        choices=OTHERS | {"fields": CIFAR_FIELDS, "padded": True},
        course=FF_COURSE,
    ),
    "backprop": Study(
        "backprop, the supervised network's layers",
        None,
        _backprop,
        training.train_backprop,
        _backprop_errors,
        choices={"hidden": WIDTHS},
        course=COURSE | {"epochs": 60, "dropout": 0.2},
    ),
}


def run(name: str, seed: int = 0, epochs: int | None = None, *, quiet: bool = False) -> dict:
    """The record of one study's run with one seed: read if it is there, else trained to.

    epochs: fewer or more than the study's own; a record of no fewer, and of the same settings, is
    read and not made again.
    Training goes on from its checkpoint in `build/study/` where an earlier call was cut short.
    The network that has been trained is kept in `data/networks/`, in 16 bits.
    """
    study = _check(name, seed)
    label, course = f"{name}-{seed}", dict(study.course)
    if epochs is not None:
        checks.number("epochs", epochs, 1, whole=True)
        course["epochs"] = epochs
    about = {"seed": seed, **study.choices, **course, "validation": VALIDATION}
    if study.chosen_by:
        about |= {"validation": 0, "chosen_by": study.chosen_by}
    if results.record_path(label, PROFILE).exists():
        record = results.read(label, PROFILE)
        made = record["parameters"]
        longer = made["epochs"] >= course["epochs"]
        if longer and made | {"epochs": None} == json.loads(json.dumps(about | {"epochs": None})):
            return record
    if study.chosen_by:
        chooser = f"{study.chosen_by}-0"
        _refuse_missing(results.record_path(chooser, PROFILE), study.chosen_by, 0)
        validation = results.read(chooser, PROFILE)["metrics"]["validation_errors"]
    begun = results.Run(label, PROFILE, about)
    device = training.default_device()
    data = datasets.load(study.dataset).to(device)
    split = data.validation_split(VALIDATION, seed)
    if study.chosen_by:  # its error after an epoch is then on images that it has trained on
        everything = {"train_images": data.train_images, "train_labels": data.train_labels}
        split = replace(split, **everything)
    network = study.network(data, seed, device, **study.choices)
    place = paths.BUILD / PROFILE / f"{label}-{course['epochs']}.pt"
    history = study.train(network, split, seed=seed, checkpoint=place, quiet=quiet, **course)
    if not study.chosen_by:
        validation = study.errors(network, split)
    chosen, test = min(validation, key=validation.get), study.errors(network, data)
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
        if name not in STUDIES:
            continue
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
    return pd.DataFrame(rows, columns=["study", "title", "seed", "epochs", "error", "by"])


def history(name: str, seed: int = 0) -> pd.DataFrame:
    """A run's row an epoch, from its record; ValueError where there is none."""
    _check(name, seed)
    _refuse_missing(results.record_path(f"{name}-{seed}", PROFILE), name, seed)
    return pd.DataFrame(results.read(f"{name}-{seed}", PROFILE)["metrics"]["history"])


def beside_the_paper(runs: pd.DataFrame) -> pd.DataFrame:
    """Each study's test error in %, the paper's and ours: mean and spread over seeds, and how far
    ours has been taken. runs: as `table` gives them."""
    rows = []
    for name, study in STUDIES.items():
        mine = runs[runs.study == name]
        rows.append(
            {
                "system": study.title,
                "paper (%)": None if study.paper is None else 100 * study.paper,
                "here (%)": 100 * mine.error.mean(),
                "±": 100 * mine.error.std(),
                "seeds": len(mine),
                "epochs": "-" if mine.empty else str(mine.epochs.max()),
            }
        )
    return pd.DataFrame(rows)


def save_network(network: nn.Module, path: Path) -> None:
    """A trained network's weights alone, in 16 bits."""
    state = {
        name: tensor.half().cpu()
        for name, tensor in network.state_dict().items()
        if not name.endswith(("_moment", "_steps"))
    }
    files.replace(path, lambda temporary: torch.save(state, temporary))


def load_network(name: str, seed: int = 0) -> tuple[nn.Module, Dataset]:
    """The network that a run has kept, and its data; ValueError where it is missing or broken."""
    study = _check(name, seed)
    path, record = NETWORKS / f"{name}-{seed}.pt", results.record_path(f"{name}-{seed}", PROFILE)
    _refuse_missing(path, name, seed, record)
    device = training.default_device()
    data = datasets.load(study.dataset).to(device)
    network = study.network(data, seed, device, **study.choices)
    try:
        weights = torch.load(path, weights_only=True)
        missing, unknown = network.load_state_dict(weights, strict=False)
    except (RuntimeError, EOFError, pickle.UnpicklingError):
        missing, unknown = ["everything"], []
    if unknown or not all(key.endswith(("_moment", "_steps")) for key in missing):
        raise ValueError(
            f"{paths.relative(path)} does not hold this study's network: fetch it again, or delete "
            "it and its record and train anew."
        )
    return network, data


def _refuse_missing(path: Path, name: str, seed: int, record: Path | None = None) -> None:
    """record: what has to go before `path` is made again."""
    if not path.exists():
        first = f"delete {paths.relative(record)} and " if record and record.exists() else ""
        command = f"python -m ff_utils.study {name} --seed {seed}"
        raise ValueError(f"{paths.relative(path)} is missing: {first}run `{command}`.")


def _check(name: str, seed: int) -> Study:
    checks.one_of("study", name, STUDIES)
    checks.number("seed", seed, 0, whole=True)
    return STUDIES[name]


def main(arguments: list[str] | None = None) -> None:
    """Train one study with one seed, or read the test set with the network it has kept."""
    parser = argparse.ArgumentParser(prog="python -m ff_utils.study", description=main.__doc__)
    parser.add_argument("study", help=", ".join(STUDIES))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--epochs", type=int, help="others than the study's own")
    parser.add_argument("--evaluate", action="store_true", help="the network that was kept")
    options = parser.parse_args(arguments)
    try:
        if options.evaluate:
            network, data = load_network(options.study, options.seed)
            found, after = STUDIES[options.study].errors(network, data), ""
        else:
            metrics = run(options.study, options.seed, options.epochs)["metrics"]
            found, after = metrics["test_errors"], f", {len(metrics['history'])} epochs"
    except (ValueError, OSError, RuntimeError, FloatingPointError) as error:
        sys.exit(f"error: {error}")
    for by, error in found.items():
        print(f"{options.study}, seed {options.seed}{after}: test error by {by} {error:.2%}")


if __name__ == "__main__":
    main()
