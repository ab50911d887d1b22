import dataclasses

import pandas as pd
import pytest
import torch

from ff_utils import paths, results, study, training


@pytest.fixture
def tiny(tmp_path, monkeypatch):
    """A study of the digits that takes a second, its files in a folder of its own."""
    monkeypatch.setattr(paths, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(paths, "BUILD", tmp_path / "build")
    monkeypatch.setattr(study, "NETWORKS", tmp_path / "networks")
    monkeypatch.setattr(study, "VALIDATION", 200)
    kind = study.STUDIES["supervised"]
    made = dataclasses.replace(
        kind,
        dataset="digits",
        choices=kind.choices | {"hidden": [60]},
        course=kind.course | {"epochs": 3, "batch_size": 50, "learning_rate": 0.003},
    )
    monkeypatch.setattr(study, "STUDIES", {"tiny": made})
    return tmp_path


def test_a_run_leaves_a_record_and_a_network_that_errs_as_often(tiny):
    record = study.run("tiny", 1, quiet=True)
    metrics = record["metrics"]
    assert len(metrics["history"]) == 3 and record["data"]["name"] == "digits"
    assert metrics["chosen"] == min(
        metrics["validation_errors"], key=metrics["validation_errors"].get
    )
    assert metrics["test_error"] == metrics["test_errors"][metrics["chosen"]] < 0.2
    network, data = study.load_network("tiny", 1)
    for by, error in metrics["test_errors"].items():
        # 16 bits may move an image or two over the border.
        assert training.prediction_error(network, data, by) == pytest.approx(error, abs=0.01)
    assert study.run("tiny", 1) == study.run("tiny", 1, 2) == record  # read, not made again
    assert len(study.run("tiny", 2, 1, quiet=True)["metrics"]["history"]) == 1
    assert len(study.run("tiny", 2, 2, quiet=True)["metrics"]["history"]) == 2
    results.record_path("tiny-2", study.PROFILE).unlink()
    (row,) = study.table().itertuples()
    assert (row.study, row.seed, row.epochs) == ("tiny", 1, 3)
    assert study.history("tiny", 1).equals(pd.DataFrame(metrics["history"]))


def test_a_run_cut_short_goes_on_to_the_same_record(tiny, monkeypatch):
    expected = study.run("tiny", 0, quiet=True)["metrics"]
    results.record_path("tiny-0", study.PROFILE).unlink()
    (paths.BUILD / study.PROFILE / "tiny-0-3.pt").unlink()
    save = training.Checkpoint.save

    def save_and_stop(checkpoint, rows):
        save(checkpoint, rows)
        if len(rows) == 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(training.Checkpoint, "save", save_and_stop)
        study.run("tiny", 0, quiet=True)
    found = study.run("tiny", 0, quiet=True)["metrics"]
    assert found["test_errors"] == expected["test_errors"]
    assert [row["error"] for row in found["history"]] == [
        row["error"] for row in expected["history"]
    ]


def test_a_record_of_other_settings_is_made_anew(tiny, monkeypatch):
    old = study.run("tiny", 0, quiet=True)
    kind = study.STUDIES["tiny"]
    other = dataclasses.replace(kind, course=kind.course | {"dropout": 0.3})
    monkeypatch.setitem(study.STUDIES, "tiny", other)
    with pytest.raises(ValueError, match=r"is of a run whose dropout is 0\.2, not 0\.3"):
        study.run("tiny", 0, quiet=True)
    (paths.BUILD / study.PROFILE / "tiny-0-3.pt").unlink()
    new = study.run("tiny", 0, quiet=True)
    assert new["parameters"] == old["parameters"] | {"dropout": 0.3}
    assert new["metrics"]["history"] != old["metrics"]["history"]


def test_a_study_that_another_chose_for_trains_on_every_image(tiny, monkeypatch):
    seen = []

    def train(network, data, **course):
        seen.append(len(data.train_labels))
        return kind.train(network, data, **course)

    kind = study.STUDIES["tiny"]
    monkeypatch.setitem(
        study.STUDIES, "all", dataclasses.replace(kind, train=train, chosen_by="tiny")
    )
    with pytest.raises(ValueError, match=r"tiny-0.json is missing: run `python .* tiny --seed 0`"):
        study.run("all", 1, quiet=True)
    assert not seen
    chooser = study.run("tiny", 0, quiet=True)
    record = study.run("all", 1, quiet=True)
    assert seen == [record["data"]["train"]]
    assert record["parameters"]["validation"] == 0
    assert record["parameters"]["chosen_by"] == "tiny"
    for name in ("validation_errors", "chosen"):
        assert record["metrics"][name] == chooser["metrics"][name]
    assert (
        record["metrics"]["test_error"]
        == record["metrics"]["test_errors"][chooser["metrics"]["chosen"]]
    )
    assert study.run("all", 1) == record


def test_what_is_missing_or_unknown_is_one_sentence(tiny, capsys):
    with pytest.raises(ValueError, match="study is 'huge'; choose one of: tiny"):
        study.run("huge")
    with pytest.raises(ValueError, match=r"tiny-3.json is missing: run `python -m ff_utils.study"):
        study.history("tiny", 3)
    with pytest.raises(SystemExit, match=r"error: .*tiny-3.pt is missing: run `python -m"):
        study.main(["tiny", "--seed", "3", "--evaluate"])
    with pytest.raises(SystemExit, match=r"error: epochs is 0; give a whole number of at least 1"):
        study.main(["tiny", "--epochs", "0"])
    assert not list(tiny.rglob("*.json"))


def test_a_kept_network_that_is_gone_or_broken_says_how_to_make_it_again(tiny):
    study.run("tiny", 0, 1, quiet=True)
    path = study.NETWORKS / "tiny-0.pt"
    whole = torch.load(path, weights_only=True)
    broken = r"tiny-0.pt does not hold this study's network: fetch it again"
    del whole["layers.0.bias"]
    torch.save(whole, path)
    with pytest.raises(ValueError, match=broken):
        study.load_network("tiny", 0)
    for content in (b"", b"version https://git-lfs.github.com/spec/v1"):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=broken):
            study.load_network("tiny", 0)
    path.unlink()
    with pytest.raises(ValueError, match=r"missing: delete .*tiny-0.json and run `python"):
        study.load_network("tiny", 0)


def test_beside_the_paper_every_study_has_a_row(tiny):
    study.run("tiny", 0, quiet=True)
    (row,) = study.beside_the_paper(study.table()).to_dict("records")
    assert row["paper (%)"] == pytest.approx(1.36) and row["seeds"] == 1
    nothing = study.beside_the_paper(study.table()[:0])
    assert nothing.seeds.tolist() == [0] and nothing.epochs.tolist() == ["-"]


def test_a_kept_network_holds_weights_alone_in_16_bits(tiny):
    study.run("tiny", 0, quiet=True)
    state = torch.load(study.NETWORKS / "tiny-0.pt", weights_only=True)
    assert {tensor.dtype for tensor in state.values()} == {torch.float16}
    assert not any("moment" in name for name in state)
