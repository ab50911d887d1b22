import gzip
import shutil

import numpy as np
import pooch
import pytest
import torch

from ff_utils import datasets, paths


def idx(array):
    header = bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">u4").tobytes()
    return gzip.compress(header + array.astype(np.uint8).tobytes())


@pytest.fixture
def fake_mnist(tmp_path, monkeypatch):
    """A folder with a tiny MNIST whose checksums the module expects, and no network."""
    generator = np.random.default_rng(0)
    folder = tmp_path / "data" / "mnist"
    folder.mkdir(parents=True)
    checksums = {}
    for part, name in datasets.IDX_FILES.items():
        rows = 30 if part.startswith("train") else 10
        shape = (rows, 4, 4) if part.endswith("images") else (rows,)
        high = 256 if part.endswith("images") else 10
        (folder / name).write_bytes(idx(generator.integers(0, high, shape)))
        checksums[part] = "sha256:" + pooch.file_hash(str(folder / name), alg="sha256")
    monkeypatch.setitem(datasets.CHECKSUMS, "mnist", checksums)
    monkeypatch.setattr(paths, "DATA", tmp_path / "data")
    monkeypatch.setattr(paths, "ROOT", tmp_path / "checkout")
    monkeypatch.delenv("FF_DATA_DIR", raising=False)
    dead = ("http://127.0.0.1:9/",)
    monkeypatch.setattr(datasets, "MIRRORS", {"mnist": dead, "fashion_mnist": dead})
    return folder


def test_idx_files_become_images_from_0_to_1_and_labels(fake_mnist):
    data = datasets.load("mnist")
    assert data.train_images.shape == (30, 16) and data.test_images.shape == (10, 16)
    assert data.train_images.min() >= 0 and data.train_images.max() == 1
    assert data.train_labels.dtype == torch.int64
    raw = datasets.read_idx(fake_mnist / datasets.IDX_FILES["train_images"])
    assert torch.equal(
        (data.train_images * 255).round().to(torch.uint8).view(30, 4, 4), torch.from_numpy(raw)
    )


def test_ff_data_dir_names_the_folder_or_its_parent(fake_mnist, tmp_path, monkeypatch):
    elsewhere = tmp_path / "elsewhere"
    shutil.move(fake_mnist, elsewhere / "mnist")
    with pytest.raises(datasets.DataNotFoundError):
        datasets.load("mnist")
    for named in (elsewhere, elsewhere / "mnist"):
        monkeypatch.setenv("FF_DATA_DIR", str(named))
        assert len(datasets.load("mnist").train_labels) == 30


def test_a_folder_beside_the_checkout_is_found(fake_mnist, tmp_path):
    shutil.move(fake_mnist, tmp_path / "shared" / "data" / "mnist")
    assert len(datasets.load("mnist").train_labels) == 30


def test_without_files_and_network_mnist_fails_and_auto_takes_digits_aloud(fake_mnist, capsys):
    shutil.rmtree(fake_mnist)
    with pytest.raises(datasets.DataNotFoundError, match="set FF_DATA_DIR"):
        datasets.load("mnist")
    data = datasets.load("auto")
    assert data.name == "digits" and data.fallback
    assert "stand-in" in data.title
    assert "WARNING" in capsys.readouterr().out


@pytest.mark.parametrize(
    "damage", [lambda raw: raw[:-20], lambda raw: raw[:-9] + bytes([raw[-9] ^ 1]) + raw[-8:]]
)
def test_a_cut_or_altered_file_is_never_read(fake_mnist, damage):
    path = fake_mnist / datasets.IDX_FILES["train_images"]
    path.write_bytes(damage(path.read_bytes()))
    for name in ("mnist", "auto"):
        with pytest.raises(ValueError, match="damaged"):
            datasets.load(name)


def test_a_damaged_file_in_a_named_folder_is_named(fake_mnist, tmp_path, monkeypatch):
    shutil.copytree(fake_mnist, tmp_path / "mine" / "mnist")
    broken = tmp_path / "mine" / "mnist" / datasets.IDX_FILES["test_labels"]
    broken.write_bytes(b"no")
    monkeypatch.setenv("FF_DATA_DIR", str(tmp_path / "mine"))
    with pytest.raises(ValueError, match="delete or replace it"):
        datasets.load("mnist")


def test_an_altered_download_is_refused(fake_mnist, monkeypatch):
    path = fake_mnist / datasets.IDX_FILES["test_labels"]
    path.unlink()

    def altered(url, output_file, pooch, check_only=False):
        with open(output_file, "wb") as file:  # noqa: PTH123
            file.write(b"something else")

    monkeypatch.setattr(datasets.pooch, "HTTPDownloader", lambda **_: altered)
    with pytest.raises(datasets.DataNotFoundError, match="altered or cut short"):
        datasets.load("mnist")
    assert not path.exists()


def test_unknown_names_and_sizes_are_refused():
    with pytest.raises(ValueError, match="choose one of: auto, mnist"):
        datasets.load("imagenet")
    with pytest.raises(ValueError, match="train_size is 5000"):
        datasets.load("digits", train_size=5000)


def test_a_validation_split_holds_out_training_images_only():
    data = datasets.load("digits")
    split = data.validation_split(300, seed=1)
    assert len(split.train_labels) == len(data.train_labels) - 300
    both = torch.cat([split.train_images, split.test_images])
    assert torch.equal(both.sum(1).sort().values, data.train_images.sum(1).sort().values)
    again = data.validation_split(300, seed=1)
    assert torch.equal(split.test_images, again.test_images)


def test_published_checksums_are_those_of_the_official_files(data):
    if data.name != "mnist":
        pytest.skip("MNIST is not at hand")
    assert data.train_images.shape == (60_000, 784) and data.test_images.shape == (10_000, 784)
    assert data.train_labels.bincount().tolist() == [
        5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949,
    ]  # fmt: skip
