import gzip
import io
import shutil
import tarfile

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

    monkeypatch.setattr(pooch, "HTTPDownloader", lambda **_: altered)
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


def old_pickle(images, labels, reconstruct=b"numpy.core.multiarray\n_reconstruct\n"):
    """A batch as CIFAR-10's authors pickled theirs: Python 2, protocol 2."""
    raw, count = images.astype(np.uint8).tobytes(), len(images).to_bytes(1, "little")
    width = images.shape[1].to_bytes(2, "little")
    dtype = b"cnumpy\ndtype\nU\x02u1K\x00K\x01\x87R(K\x03U\x01|NNN" + 2 * b"J\xff\xff\xff\xff"
    array = b"c" + reconstruct + b"cnumpy\nndarray\nK\x00\x85U\x01b\x87R"
    array += b"(K\x01K" + count + b"M" + width + b"\x86" + dtype + b"K\x00tb\x89"
    array += b"T" + len(raw).to_bytes(4, "little") + raw + b"tb"
    numbers = b"](" + b"".join(b"K" + bytes([label]) for label in labels) + b"e"
    return b"\x80\x02}(U\x04data" + array + b"U\x06labels" + numbers + b"u."


@pytest.fixture
def fake_cifar(tmp_path, monkeypatch):
    """`write(batches)` puts an archive with these where it is looked for; no network."""
    path = tmp_path / "cifar10" / datasets.CIFAR_FILE
    path.parent.mkdir()
    monkeypatch.setenv("FF_DATA_DIR", str(tmp_path))
    monkeypatch.setattr(paths, "DATA", tmp_path / "data")
    monkeypatch.setattr(paths, "ROOT", tmp_path / "checkout")
    monkeypatch.setattr(datasets, "MIRRORS", {"cifar10": ("http://127.0.0.1:9/",)})

    def write(batches):
        with tarfile.open(path, "w:gz") as archive:
            for name, raw in batches.items():
                member = tarfile.TarInfo(f"cifar-10-batches-py/{name}")
                member.size = len(raw)
                archive.addfile(member, io.BytesIO(raw))
        checksum = "md5:" + pooch.file_hash(str(path), alg="md5")
        monkeypatch.setitem(datasets.CHECKSUMS, "cifar10", {"archive": checksum})
        return path

    return write


NAMES = [*(f"data_batch_{number}" for number in range(1, 6)), "test_batch"]


def test_cifars_batches_become_colour_images_and_labels(fake_cifar):
    images = np.random.default_rng(0).integers(0, 256, (6, 4, 3072))
    labels = np.arange(24).reshape(6, 4) % 10
    fake_cifar({n: old_pickle(*both) for n, *both in zip(NAMES, images, labels, strict=True)})
    data = datasets.load("cifar10")
    assert data.shape == (3, 32, 32) and data.title == "CIFAR-10"
    expected = torch.from_numpy(images).float() / 255
    assert torch.allclose(data.train_images, expected[:5].flatten(0, 1))
    assert torch.allclose(data.test_images, expected[5])
    assert data.train_labels.tolist() == labels[:5].flatten().tolist()
    assert data.test_labels.tolist() == labels[5].tolist()


def test_a_pickle_that_names_anything_but_arrays_is_refused_not_run(fake_cifar, tmp_path):
    batch = old_pickle(np.zeros((2, 3072)), [0, 1])
    evil = old_pickle(np.zeros((2, 3072)), [0, 1], reconstruct=b"os\nsystem\n")
    for second in (evil, batch[:200]):
        fake_cifar({NAMES[0]: batch, NAMES[1]: second})
        with pytest.raises(ValueError, match=r"cifar-10-python.tar.gz is not CIFAR-10's archive"):
            datasets.load("cifar10")


def test_cifar_missing_or_damaged_is_one_sentence(fake_cifar, tmp_path):
    path = fake_cifar({})
    path.write_bytes(b"cut short")
    with pytest.raises(ValueError, match=r"is not cifar10's file \(its checksum differs\)"):
        datasets.load("cifar10")
    path.unlink()
    with pytest.raises(datasets.DataNotFoundError, match="is missing and could not be downloaded"):
        datasets.load("cifar10")


def test_the_published_checksum_of_cifars_archive_is_the_one_that_is_asked_for():
    assert datasets.CHECKSUMS["cifar10"]["archive"] == "md5:c58f30108f718f92721af3b95e74349a"


def test_colour_digits_are_the_digits_in_colours_that_say_nothing():
    grey, colour = datasets.load("digits"), datasets.load("colour_digits")
    assert colour.shape == (3, 8, 8) and colour.train_images.shape == (1437, 192)
    assert torch.equal(colour.train_labels, grey.train_labels)
    assert colour.train_images.min() >= 0 and colour.train_images.max() <= 1
    planes = colour.train_images.view(-1, 3, 64)
    ground, ink = planes.min(dim=2, keepdim=True)[0], planes.max(dim=2, keepdim=True)[0]
    found = (planes - ground) / (ink - ground)
    lightest, darkest = (grey.train_images[:, None].amin(2), grey.train_images[:, None].amax(2))
    expected = (grey.train_images[:, None] - lightest[..., None]) / (darkest - lightest)[..., None]
    assert torch.allclose(found, expected.expand(-1, 3, -1), atol=1e-3)
    colours = ground[:, :, 0]
    means = torch.stack([colours[colour.train_labels == k].mean(0) for k in range(10)])
    assert (means - colours.mean(0)).abs().max() < 0.06
    assert torch.equal(colour.train_images, datasets.load("colour_digits").train_images)
