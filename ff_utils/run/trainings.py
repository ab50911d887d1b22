"""Full-length trainings: one resumable run, one record and one network for each form and seed.

The forms and their settings are in `notebooks/forms.yaml`. `notebooks/full_length.ipynb` trains
one of them.
"""

import json
import math
from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace
from functools import cache, partial
from itertools import count, takewhile
from pathlib import Path

import pandas as pd
import torch
from torch import nn

from ff_utils import utils
from ff_utils.backprop import Backprop, cnn, local_mlp, mlp
from ff_utils.config import Batch, FFConfig, LocalConfig, RecurrentConfig, TrainConfig
from ff_utils.data import Dataset, load_dataset, test_batches
from ff_utils.ff.blocks import BlockLocal
from ff_utils.ff.local import LocalForwardForward
from ff_utils.ff.network import PREDICTIONS, ForwardForward
from ff_utils.ff.recurrent import RecurrentForwardForward
from ff_utils.memory import CATEGORIES, track_step
from ff_utils.report import accuracy, records
from ff_utils.run.notebooks import read_yaml
from ff_utils.training import check_same_run, fit, goodness_errors, load_state

FOLDER = accuracy.FOLDER  # of the records, below data/results/, and of checkpoints, below build/
NETWORKS = utils.DATA / "networks"
GREY, COLOUR = (28, 28), (3, 32, 32)  # images of MNIST and of CIFAR-10
VALIDATION = 5000  # training images held out, or a sixth of them: they choose, the test set reports
NETWORK_CLASSES = {
    "ForwardForward": (ForwardForward, FFConfig),
    "LocalForwardForward": (LocalForwardForward, LocalConfig),
    "RecurrentForwardForward": (RecurrentForwardForward, RecurrentConfig),
    "Backprop": (Backprop, None),
    "BlockLocal": (BlockLocal, None),
}
OPTIMIZER_STATE = ("_moment", "_steps")  # how the names of its buffers end
OLD_NAMES = {  # of parameters, in records of the first version
    "scale": "sharpness",
    "jitter": "random_shift",
    "guess_share": "classifier_update_prob",
    "softmax_rate": "classifier_rate",
    "blurs": "mask_blurs",
}


@dataclass(frozen=True)
class Form:
    """One entry of `notebooks/forms.yaml`, which says what its keys mean."""

    title: str
    network: str
    train: dict
    hidden: list | None = None
    fields: list | None = None
    channels: list | None = None
    config: dict = field(default_factory=dict)
    paper: float | None = None
    dataset: str = "mnist"
    chosen_by: str | None = None
    candidate_for: str | None = None

    @property
    def train_config(self) -> TrainConfig:
        """How it trains, for as many epochs as its own."""
        return TrainConfig(**self.train)

    def parameters(self, seed: int, epochs: int) -> dict:
        """All that decides a run's result, as its record has it."""
        sizes = {"hidden": self.hidden, "fields": self.fields, "channels": self.channels}
        size = {name: value for name, value in sizes.items() if value}
        chosen = {"validation": 0, "chosen_by": self.chosen_by} if self.chosen_by else {}
        settings = {**size, **self.config, **self.train, "epochs": epochs}
        return {"seed": seed, **settings, "validation": VALIDATION} | chosen

    def build(self, data: Dataset, seed: int) -> nn.Module:
        """Its network, untrained."""
        network, config = NETWORK_CLASSES[self.network]
        device = data.train_images.device
        if config is None:
            kind = {"seed": seed, "device": device}
            if self.fields:
                layers = local_mlp(data.shape, data.classes, self.fields, padded=True, **kind)
            elif self.channels:
                layers = cnn(data.shape, data.classes, self.channels, **kind)
            else:
                layers = mlp(data.pixels, data.classes, self.hidden, **kind)
            network = network(layers, **self.config)
            network.start_training(data, replace(self.train_config, seed=seed))
            return network
        config = config(**self.config, seed=seed)
        if self.fields:
            return network(data.shape, data.classes, self.fields, config, device=device)
        return network(data.pixels, data.classes, self.hidden, config, device=device)

    @torch.no_grad()
    def wrong_images(self, network: nn.Module, data: Dataset) -> dict[str, list[int]]:
        """Numbers of the images in `data`'s test part that each way to predict gets wrong."""
        if self.network == "Backprop":
            ways = {"softmax": lambda images: network(images).argmax(1)}
        elif self.network == "BlockLocal":
            ways = {"softmax" if network.loss == "classifier" else "goodness": network.predict}
        else:
            names = ["softmax"] if self.config.get("label") == "none" else PREDICTIONS
            ways = {by: partial(network.predict, by=by) for by in names}
        wrong = {}
        for by, predict in ways.items():
            missed = [predict(images) != labels for images, labels in test_batches(data)]
            wrong[by] = torch.cat(missed).nonzero().flatten().tolist()
        return wrong


@cache
def forms() -> dict[str, Form]:
    """The forms by name; ValueError for a key that does not exist."""
    path = utils.NOTEBOOKS / "forms.yaml"
    place = utils.relative(path)
    specs = read_yaml(path.read_text(encoding="utf-8"), place)
    for name, spec in specs.items():
        utils.check_names(f"{place}: {name} has the key", spec, [f.name for f in fields(Form)])
        utils.check_choice(f"{place}: {name}: network", spec["network"], NETWORK_CLASSES)
    return {name: Form(**spec) for name, spec in specs.items()}


@dataclass(frozen=True)
class Run:
    """A form trained with one seed for a number of epochs, and where its files are."""

    name: str
    form: Form
    seed: int
    epochs: int
    dataset: str

    @property
    def own_data(self) -> bool:
        """Whether it is on the form's data set, and so one of the study's."""
        return self.dataset == self.form.dataset

    @property
    def title(self) -> str:
        """Names the record and the checkpoint, so that no other run overwrites them."""
        title = f"{self.name}-{self.seed}-{self.epochs}"
        return title if self.own_data else f"{title}-{self.dataset}"

    @property
    def record(self) -> Path:
        """Its record; of other data in build/, apart from the study's."""
        folder = utils.RESULTS if self.own_data else utils.BUILD
        return folder / FOLDER / f"{self.title}.json"

    @property
    def network(self) -> Path:
        """The weights that it learned: FORM-SEED.pt after the form's own epochs."""
        own = self.own_data and self.epochs == self.form.train["epochs"]
        return NETWORKS / (f"{self.name}-{self.seed}.pt" if own else f"{self.title}.pt")

    def read(self) -> dict:
        """Its record, parameters under today's names; ValueError if it is missing or incomplete."""
        place = utils.relative(self.record)
        command = f"make train FORM={self.name} SEED={self.seed} EPOCHS={self.epochs}"
        try:
            record = json.loads(self.record.read_text(encoding="utf-8"))
            parameters = record["parameters"]
            record["metrics"]["validation_errors"]
        except FileNotFoundError as error:
            raise ValueError(f"{place} is missing: run `{command}`.") from error
        except (ValueError, LookupError, TypeError) as error:
            raise ValueError(f"{place} is not whole: delete it and run `{command}`.") from error
        renamed = {OLD_NAMES.get(name, name): value for name, value in parameters.items()}
        return record | {"parameters": renamed}


def plan(name: str, seed: int = 0, epochs: int = 0, dataset: str = "") -> Run:
    """The run that is asked for; 0 epochs are the form's own, and so is no data set."""
    utils.check_choice("form", name, forms())
    utils.check_number("seed", seed, 0, whole=True)
    utils.check_number("epochs", epochs, 0, whole=True)
    form = forms()[name]
    return Run(name, form, seed, epochs or form.train["epochs"], dataset or form.dataset)


def train(
    name: str,
    seed: int = 0,
    epochs: int = 0,
    dataset: str = "",
    *,
    checkpoints: str = "",
    quiet: bool = False,
) -> dict:
    """The record of one run: read if it is there, else trained to.

    epochs, dataset: as in `plan`. checkpoints: folder, seen from the repository, of the file that
    is written after every epoch (`build/full_length` where empty); a run that was cut short goes
    on from it to the same bits. The network is kept, in 16 bits. Raises ValueError for a record of
    other settings: it is never made anew unasked.
    """
    run = plan(name, seed, epochs, dataset)
    form, parameters = run.form, run.form.parameters(seed, run.epochs)
    if run.record.exists():
        record = run.read()
        check_same_run(run.record, record["parameters"], parameters, "delete it to train anew")
        return record
    chosen_by = plan(form.chosen_by).read()["metrics"] if form.chosen_by else None
    begun = records.Run(run.title, FOLDER, parameters, file=run.record)
    data = load_dataset(run.dataset).to(utils.default_device())
    held_out = min(VALIDATION, len(data.train_labels) // 6)
    split = data.validation_split(held_out, seed)
    if chosen_by:  # its error after an epoch is then on images that it has trained on
        everything = {"train_images": data.train_images, "train_labels": data.train_labels}
        split = replace(split, **everything)
    network = form.build(data, seed)
    history = fit(
        network,
        split,
        replace(form.train_config, epochs=run.epochs, seed=seed),
        checkpoint=utils.ROOT / (checkpoints or utils.BUILD / FOLDER) / f"{run.title}.pt",
        note=partial(_note, network, split),
        quiet=quiet,
    )
    if chosen_by:
        validation = chosen_by["validation_errors"]
    else:
        validation = _errors(form.wrong_images(network, split), split)
    chosen = min(validation, key=validation.get)
    metrics = {
        "history": history,
        "validation_errors": validation,
        "chosen": chosen,
        "seconds_an_epoch": history.seconds.mean(),
    }
    if not form.candidate_for:
        wrong = form.wrong_images(network, data)
        test = _errors(wrong, data)
        metrics |= {"test_errors": test, "test_error": test[chosen], "wrong": wrong[chosen]}
        save_network(network, run.network)
    return begun.finish(metrics, data)


def _errors(wrong: dict[str, list[int]], data: Dataset) -> dict[str, float]:
    return {by: len(missed) / len(data.test_labels) for by, missed in wrong.items()}


def _note(network: nn.Module, data: Dataset) -> dict:
    """The error by goodness after an epoch, of a network whose layers learn from labels."""
    if isinstance(network, ForwardForward) and network.config.label != "none":
        return {"goodness_error": goodness_errors(network, data)[-1]}
    return {}


def evaluate(name: str, seed: int = 0, epochs: int = 0, dataset: str = "") -> dict[str, float]:
    """Test error, by each way to predict, of the network that a run has kept."""
    network, data = load_network(name, seed, epochs, dataset)
    return _errors(forms()[name].wrong_images(network, data), data)


def history(name: str, seed: int = 0, epochs: int = 0) -> pd.DataFrame:
    """A run's row an epoch, from its record; ValueError where there is none."""
    return pd.DataFrame(plan(name, seed, epochs).read()["metrics"]["history"])


def beside_the_paper() -> pd.DataFrame:
    """Every form's test error beside the paper's, all errors and intervals in %.

    interval: 95 %; over seeds where there are several, else of one network on its test images.
    """
    rows, runs, summaries = [], accuracy.latest(), accuracy.over_seeds()
    for name, form in forms().items():
        mine = runs[runs.form == name]
        if form.candidate_for:
            continue
        row = {"system": form.title, "paper (%)": 100 * form.paper if form.paper else None}
        row |= {"here (%)": 100 * mine.error.mean(), "95 % interval": "-", "interval over": "-"}
        if len(mine):
            summary = summaries[name] if len(mine) > 1 else mine.iloc[0]
            row["95 % interval"] = f"{100 * summary['low']:.2f} to {100 * summary['high']:.2f}"
            row["interval over"] = "seeds" if len(mine) > 1 else "test images"
        row |= {"seeds": len(mine), "epochs": str(mine.epochs.max()) if len(mine) else "-"}
        rows.append(row)
    return pd.DataFrame(rows)


def candidates(name: str) -> pd.DataFrame:
    """A form and the candidates for it that have run: learning rate, validation (%), seeds.

    validation (%): mean over the seeds, from 0 up, that all of them have been trained with.
    """
    tried = {}
    for other, form in forms().items():
        if name in (other, form.candidate_for):
            runs = takewhile(lambda run: run.record.exists(), (plan(other, k) for k in count()))
            errors = [run.read()["metrics"]["validation_errors"].values() for run in runs]
            tried[form.train["learning_rate"]] = [100 * min(found) for found in errors]
    seeds = min((len(errors) for errors in tried.values() if errors), default=0)
    rows = [
        {"learning rate": rate, "validation (%)": sum(errors[:seeds]) / seeds, "seeds": seeds}
        for rate, errors in sorted(tried.items())
        if errors
    ]
    return pd.DataFrame(rows)


def error_and_memory(names: list[str]) -> pd.DataFrame:
    """Accuracy, memory and time of one and the same training, a form a row.

    error (%), low and high: as in `beside_the_paper`. step (MB): peak of one training step at the
    form's own sizes and batch, counted tensor by tensor; of which weights and optimizer state.
    epoch (s): mean over the run's epochs.
    """
    table, rows = beside_the_paper().set_index("system"), []
    for name in names:
        form = forms()[name]
        peak = step_bytes(form)
        stays = peak["parameters"] + peak["optimizer_state"]
        row = {"system": form.title, "test error (%)": table["here (%)"][form.title]}
        row["95 % interval"] = table["95 % interval"][form.title]
        total = sum(peak.values())
        row |= {"step (MB)": total / 1e6, "weights and moments (MB)": stays / 1e6}
        row["epoch (s)"] = plan(name).read()["metrics"]["seconds_an_epoch"]
        rows.append(row)
    return pd.DataFrame(rows)


def step_bytes(form: Form) -> dict[str, int]:
    """Bytes at the peak of one training step of a form, by category."""
    network, step, batch = example_step(form)
    tracker = track_step(step, network, inputs=batch, optimizers=network.optimizers)
    return {name: size for name, size in tracker.peak.items() if name in CATEGORIES}


def example_step(form: Form) -> tuple[nn.Module, Callable[[], object], list[torch.Tensor]]:
    """A form's network, a training step of it, and the step's batch: random images of its size.

    Where the form chooses hard negatives, it does so in this step, which is the largest that the
    training has.
    """
    rows, shape = form.train["batch_size"], COLOUR if "cifar" in form.dataset else GREY
    images, labels = torch.rand(rows, math.prod(shape)), torch.arange(rows) % 10
    data = Dataset("random", shape, 10, images, labels, images, labels, "")
    network, config = form.build(data, 0), form.train_config
    if form.train.get("classifier_update_prob"):
        config = replace(config, classifier_update_prob=1.0)
    stage = network.start_training(data, config)[0]
    generator = torch.Generator().manual_seed(0)
    batch = Batch(images, labels, config.learning_rate, generator, config, stage)
    return network, lambda: network.train_batch(batch), [images, labels]


def save_network(network: nn.Module, path: Path) -> None:
    """A trained network's weights alone, in 16 bits."""
    state = {
        name: tensor.half().cpu()
        for name, tensor in network.state_dict().items()
        if not name.endswith(OPTIMIZER_STATE)
    }
    utils.replace_file(path, lambda temporary: torch.save(state, temporary))


def load_network(
    name: str, seed: int = 0, epochs: int = 0, dataset: str = ""
) -> tuple[nn.Module, Dataset]:
    """The network that a run has kept, and its data; ValueError where it is missing or broken."""
    run = plan(name, seed, epochs, dataset)
    place = utils.relative(run.network)
    command = f"make train FORM={name} SEED={seed} EPOCHS={run.epochs}"
    if not run.network.exists():
        first = f"delete {utils.relative(run.record)} and " if run.record.exists() else ""
        raise ValueError(f"{place} is missing: {first}run `{command}`.")
    data = load_dataset(run.dataset).to(utils.default_device())
    network = run.form.build(data, seed)
    try:
        weights = load_state(run.network)
        missing, unknown = network.load_state_dict(weights, strict=False)
    except (ValueError, RuntimeError):
        missing, unknown = ["everything"], []
    if unknown or not all(key.endswith(OPTIMIZER_STATE) for key in missing):
        raise ValueError(
            f"{place} is not whole, or not this form's network: fetch it again, or delete it and "
            f"its record and run `{command}`."
        )
    return network, data
