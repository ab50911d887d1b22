import dataclasses
import json

import pandas as pd
import pytest
import torch

from ff_utils import training, utils
from ff_utils.data import load_dataset
from ff_utils.report import accuracy, records
from ff_utils.run import trainings

COMMITTED = sorted((utils.RESULTS / trainings.FOLDER).glob("*.json"))
NETWORKS = sorted(trainings.NETWORKS.glob("*-[0-9].pt"))


# --- what is committed ----------------------------------------------------------------------


@pytest.mark.parametrize("path", COMMITTED, ids=lambda path: path.stem)
def test_committed_record_is_read_and_nothing_trained(path, monkeypatch):
    monkeypatch.setattr(trainings, "fit", None)
    monkeypatch.setattr(trainings, "load_dataset", None)
    form, seed, epochs = path.stem.rsplit("-", 2)
    record = trainings.train(form, int(seed), int(epochs))
    assert record["metrics"] == json.loads(path.read_text())["metrics"]
    assert len(record["metrics"]["history"]) in (int(epochs), 2 * int(epochs))


def test_forms_have_settings_that_their_networks_take():
    data = load_dataset("digits", 100, 50)
    for name, form in trainings.forms().items():
        _, config = trainings.NETWORK_CLASSES[form.network]
        assert form.train_config.epochs == form.parameters(0, form.train["epochs"])["epochs"]
        if config:
            config(**form.config)
        if form.hidden:
            small = dataclasses.replace(form, hidden=[5] * len(form.hidden))
            assert isinstance(small.build(data, 0), torch.nn.Module), name
        assert form.chosen_by is None or form.chosen_by in trainings.forms()
        if form.candidate_for:  # differs from its form in how it trains, and in nothing else
            kept = trainings.forms()[form.candidate_for]
            same = {"title": kept.title, "train": kept.train, "candidate_for": None}
            assert dataclasses.replace(form, **same) == kept and form.train != kept.train


def test_one_convolutional_network_is_trained_three_ways():
    data = load_dataset("colour_digits", 100, 50)
    starts = []
    for name in ("cnn_backprop", "cnn_classifiers", "cnn_goodness"):
        form = dataclasses.replace(trainings.forms()[name], channels=[4, 5, 6])
        assert form.parameters(0, 1)["channels"] == [4, 5, 6]
        network, again = form.build(data, 0), form.build(data, 0)
        for one, other in zip(network.parameters(), again.parameters(), strict=True):
            assert torch.equal(one, other)
        starts.append(network.network[1][0].weight.detach().clone())
        config = dataclasses.replace(form.train_config, epochs=2, batch_size=10)
        history = training.fit(network, data, config, quiet=True)
        first = "loss" if name == "cnn_backprop" else "loss_1"
        assert history[first].iloc[-1] < history[first].iloc[0]
        by = "goodness" if name == "cnn_goodness" else "softmax"
        assert len(form.wrong_images(network, data)[by]) == round(history.error.iloc[-1] * 50)
    assert torch.equal(starts[0], starts[1]) and torch.equal(starts[0], starts[2])


@pytest.mark.parametrize("path", NETWORKS, ids=lambda path: path.stem)
def test_committed_network_fits_todays_classes(path, monkeypatch):
    shape = dataclasses.replace(load_dataset("digits", 10, 10), shape=(28, 28))
    images = {"train_images": torch.zeros(10, 784), "test_images": torch.zeros(10, 784)}
    blank = dataclasses.replace(shape, **images)
    monkeypatch.setattr(trainings, "load_dataset", lambda _: blank)
    name, seed = path.stem.rsplit("-", 1)
    network, _ = trainings.load_network(name, int(seed))
    assert network.layers[0].weight.abs().sum() > 0
    assert set(trainings.evaluate(name, int(seed))) == {"softmax", "goodness", "both"}


def test_table_beside_the_paper_has_an_interval_for_every_form_that_has_run():
    table = trainings.beside_the_paper().set_index("system")
    own = [form for form in trainings.forms().values() if not form.candidate_for]
    assert list(table.index) == [form.title for form in own] and table.index.is_unique
    supervised = table.loc[trainings.forms()["supervised"].title]
    assert supervised.seeds >= 3 and supervised["interval over"] == "seeds"
    recurrent = table.loc[trainings.forms()["recurrent_all"].title]
    assert tuple(recurrent[["95 % interval", "interval over", "seeds", "epochs"]]) == (
        "1.11 to 1.55",  # 131 of 10,000 wrong
        "test images",
        1,
        "90",
    )
    assert (table["95 % interval"] == "-").equals(table.seeds == 0)


def test_candidates_are_listed_with_their_validation_errors():
    found = trainings.candidates("backprop").set_index("learning rate")
    assert list(found.seeds) == [3, 3, 3]  # as many as the candidates have
    assert found["validation (%)"][0.001] == pytest.approx((1.42 + 1.22 + 1.44) / 3)


def test_a_training_has_its_accuracy_and_its_steps_memory_in_one_row():
    table = trainings.error_and_memory(["supervised", "backprop"])
    form = trainings.forms()["supervised"]
    peak = trainings.step_bytes(form)
    weights = 4 * (784 * 1000 + 2 * 1000 * 1000)
    assert peak["parameters"] > weights and peak["optimizer_state"] > 2 * weights
    assert table["step (MB)"][0] == pytest.approx(sum(peak.values()) / 1e6)
    # Backprop's gradients live at once, FF's one after the other.
    assert table["step (MB)"][1] - table["step (MB)"][0] > 4


# --- runs -----------------------------------------------------------------------------------


@pytest.fixture
def tiny(tmp_path, monkeypatch):
    """Forms of the digits that take a second, their files in a folder of their own."""
    monkeypatch.setattr(utils, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(utils, "BUILD", tmp_path / "build")
    monkeypatch.setattr(trainings, "NETWORKS", tmp_path / "networks")
    form = trainings.forms()["supervised"]
    train = form.train | {"epochs": 3, "batch_size": 50, "learning_rate": 0.003}
    supervised = dataclasses.replace(form, dataset="digits", hidden=[60], train=train)
    every = {"tiny": supervised, "all": dataclasses.replace(supervised, chosen_by="tiny")}
    every["backprop"] = dataclasses.replace(
        trainings.forms()["backprop"], dataset="digits", hidden=[30], train={"epochs": 1}
    )
    monkeypatch.setattr(trainings, "forms", lambda: every)
    return tmp_path


def test_run_leaves_a_record_and_a_network_that_is_wrong_as_often(tiny):
    record = trainings.train("tiny", 1, quiet=True)
    metrics = record["metrics"]
    assert len(metrics["history"]) == 3 and record["data"]["name"] == "digits"
    assert {"error", "goodness_error", "loss_1", "seconds"} <= set(metrics["history"][0])
    chosen = min(metrics["validation_errors"], key=metrics["validation_errors"].get)
    assert metrics["chosen"] == chosen
    assert metrics["test_error"] == metrics["test_errors"][chosen] < 0.2
    assert len(metrics["wrong"]) / record["data"]["test"] == pytest.approx(metrics["test_error"])
    for by, error in trainings.evaluate("tiny", 1).items():
        # 16 bits may change the class of an image or two.
        assert metrics["test_errors"][by] == pytest.approx(error, abs=0.01)
    state = torch.load(trainings.NETWORKS / "tiny-1.pt", weights_only=True)
    assert {tensor.dtype for tensor in state.values()} == {torch.float16}
    assert not any(name.endswith(("_moment", "_steps")) for name in state)
    assert trainings.history("tiny", 1).equals(pd.DataFrame(metrics["history"]))
    (row,) = accuracy.latest().itertuples()
    assert (row.form, row.seed, row.epochs) == ("tiny", 1, 3)


def test_runs_of_other_lengths_and_data_overwrite_nothing(tiny, monkeypatch):
    whole = trainings.train("tiny", 0, quiet=True)
    kept = (trainings.NETWORKS / "tiny-0.pt").read_bytes()
    short = trainings.train("tiny", 0, 1, quiet=True)
    assert len(short["metrics"]["history"]) == 1
    other = trainings.train("tiny", 0, 1, "colour_digits", quiet=True)
    assert other["data"]["name"] == "colour_digits"
    assert trainings.train("tiny", 0) == whole == trainings.train("tiny", 0, 3)
    assert trainings.train("tiny", 0, 1) == short
    assert trainings.train("tiny", 0, 1, "colour_digits") == other
    assert (trainings.NETWORKS / "tiny-0.pt").read_bytes() == kept
    assert list(accuracy.latest().epochs) == [3]
    names = sorted(path.name for path in (utils.RESULTS / trainings.FOLDER).iterdir())
    assert names == ["tiny-0-1.json", "tiny-0-3.json"]


def test_run_cut_short_goes_on_to_the_same_record(tiny, monkeypatch):
    expected = trainings.train("tiny", 0, quiet=True)["metrics"]
    records.record_path("tiny-0-3", trainings.FOLDER).unlink()
    (utils.BUILD / trainings.FOLDER / "tiny-0-3.pt").unlink()
    save = training.Checkpoint.save

    def save_and_stop(checkpoint, rows):
        save(checkpoint, rows)
        if len(rows) == 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(training.Checkpoint, "save", save_and_stop)
        trainings.train("tiny", 0, quiet=True, checkpoints=str(tiny / "unfinished"))
    found = trainings.train("tiny", 0, quiet=True, checkpoints=str(tiny / "unfinished"))["metrics"]
    assert found["test_errors"] == expected["test_errors"]
    timeless = [
        [{k: v for k, v in row.items() if k != "seconds"} for row in metrics["history"]]
        for metrics in (found, expected)
    ]
    assert timeless[0] == timeless[1]


def test_record_of_other_settings_is_refused_and_not_made_anew(tiny, monkeypatch):
    trainings.train("tiny", 0, quiet=True)
    form = trainings.forms()["tiny"]
    changed = dataclasses.replace(form, train=form.train | {"dropout": 0.3})
    monkeypatch.setitem(trainings.forms(), "tiny", changed)
    with pytest.raises(ValueError, match=r"whose dropout is 0\.2, not 0\.3: delete it to train"):
        trainings.train("tiny", 0)


def test_form_that_another_chose_for_trains_on_every_image(tiny, monkeypatch):
    seen = []

    def counted(network, data, config, **how):
        seen.append(len(data.train_labels))
        return training.fit(network, data, config, **how)

    monkeypatch.setattr(trainings, "fit", counted)
    with pytest.raises(ValueError, match=r"tiny-0-3.json is missing: run `make train FORM=tiny"):
        trainings.train("all", 1, quiet=True)
    assert not seen
    chooser = trainings.train("tiny", 0, 0, quiet=True)
    record = trainings.train("all", 1, 1, quiet=True)
    assert seen[0] < seen[1] == record["data"]["train"]
    assert record["parameters"]["validation"] == 0
    assert record["parameters"]["chosen_by"] == "tiny"
    for name in ("validation_errors", "chosen"):
        assert record["metrics"][name] == chooser["metrics"][name]
    by = chooser["metrics"]["chosen"]
    assert record["metrics"]["test_error"] == record["metrics"]["test_errors"][by]


def test_candidate_has_a_validation_error_and_never_reads_the_test_set(tiny, monkeypatch):
    tried = dataclasses.replace(trainings.forms()["tiny"], candidate_for="tiny")
    monkeypatch.setitem(trainings.forms(), "tried", tried)
    own, load = trainings.train("tiny", 0, quiet=True)["metrics"], trainings.load_dataset

    def without_test_images(name):
        data = load(name)
        none = {"test_images": data.test_images[:0], "test_labels": data.test_labels[:0]}
        return dataclasses.replace(data, **none)

    monkeypatch.setattr(trainings, "load_dataset", without_test_images)
    monkeypatch.setattr(records.Run, "finish", lambda run, metrics, data: {"metrics": metrics})
    found = trainings.train("tried", 0, quiet=True)["metrics"]
    assert found["validation_errors"] == pytest.approx(own["validation_errors"], rel=1e-5)
    assert "wrong" in own and not {"test_errors", "test_error", "wrong"} & found.keys()
    assert list(accuracy.latest().form) == ["tiny"]


def test_backprop_is_a_form_too(tiny):
    record = trainings.train("backprop", quiet=True)
    assert set(record["metrics"]["test_errors"]) == {"softmax"}
    network, _ = trainings.load_network("backprop")
    assert isinstance(network, torch.nn.Module)


def test_missing_and_unknown_is_one_sentence(tiny):
    with pytest.raises(ValueError, match="form is 'huge'; choose one of: tiny"):
        trainings.train("huge")
    for seed, epochs, sentence in (
        (-1, 0, "seed is -1"),
        (0, -2, "epochs is -2"),
        (0.5, 0, "seed"),
    ):
        with pytest.raises(ValueError, match=f"{sentence}.*give a whole number of at least 0"):
            trainings.train("tiny", seed, epochs)
    with pytest.raises(ValueError, match=r"tiny-3-3.json is missing: run `make train FORM=tiny"):
        trainings.history("tiny", 3)
    with pytest.raises(ValueError, match=r"tiny-3.pt is missing: run `make train FORM=tiny SEED=3"):
        trainings.evaluate("tiny", 3)
    assert not list(tiny.rglob("*.json"))


@pytest.mark.parametrize("text", ["", "{", "[]", '{"parameters": {}, "metrics": {}}'])
def test_record_that_is_not_whole_says_what_to_do(tiny, text):
    path = trainings.plan("tiny").record
    utils.write_text(path, text)
    with pytest.raises(ValueError, match=r"not whole: delete it and run `make train FORM=tiny"):
        trainings.train("tiny")


def test_network_that_is_gone_or_broken_says_how_to_make_it_again(tiny):
    trainings.train("tiny", 0, 1, quiet=True)
    path = trainings.plan("tiny", 0, 1).network
    whole = path.read_bytes()
    state = torch.load(path, weights_only=True)
    del state["layers.0.bias"]
    torch.save(state, path)
    broken = r"tiny-0-1.pt is not whole, or not this form's network: fetch it again"
    for content in (None, b"", b"version https://git-lfs.github.com/spec/v1", whole[:-500]):
        if content is not None:
            path.write_bytes(content)
        with pytest.raises(ValueError, match=broken):
            trainings.load_network("tiny", 0, 1)
    path.unlink()
    with pytest.raises(ValueError, match=r"missing: delete .*tiny-0-1.json and run `make train"):
        trainings.load_network("tiny", 0, 1)
