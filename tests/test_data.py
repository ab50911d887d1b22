import gzip
import hashlib
import io
import pickle
import shutil
import tarfile

import numpy as np
import pooch
import pytest
import torch
from PIL import Image

from ff_utils import data, utils

IDX_FILES = data.IDX_FILES
DEAD_MIRROR = ("http://127.0.0.1:9/",)


def idx(array):
    """An IDX file as its authors describe it: type 8 (unsigned byte), dimensions, sizes, values."""
    header = bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">u4").tobytes()
    return header + array.astype(np.uint8).tobytes()


def sha256(raw):
    return "sha256:" + hashlib.sha256(raw).hexdigest()


@pytest.fixture
def no_network(tmp_path, monkeypatch):
    """A checkout without data, and mirrors that do not answer."""
    monkeypatch.setattr(utils, "DATA", tmp_path / "checkout" / "data")
    monkeypatch.setattr(utils, "ROOT", tmp_path / "checkout")
    monkeypatch.setattr(data, "MIRRORS", dict.fromkeys(data.MIRRORS, DEAD_MIRROR))
    monkeypatch.delenv("FF_DATA_DIR", raising=False)
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def mnist(no_network, tmp_path, monkeypatch):
    """A tiny MNIST in the checkout's folder, whose checksums the module expects: the arrays."""
    generator, arrays = np.random.default_rng(0), []
    folder = utils.DATA / "mnist"
    folder.mkdir(parents=True)
    packed, unpacked = {}, {}
    for name in IDX_FILES:
        rows = 30 if name.startswith("train") else 10
        shape, high = ((rows, 4, 4), 256) if "images" in name else ((rows,), 10)
        arrays.append(generator.integers(0, high, shape))
        raw = idx(arrays[-1])
        unpacked[name] = sha256(raw)
        (folder / name).write_bytes(gzip.compress(raw))
        packed[name] = sha256((folder / name).read_bytes())
    monkeypatch.setitem(data.REGISTRY, "mnist", packed)
    monkeypatch.setitem(data.UNPACKED, "mnist", unpacked)
    return arrays


def test_idx_files_become_images_from_0_to_1_and_labels(mnist):
    loaded = data.load_dataset("mnist")
    train_images, train_labels, test_images, test_labels = mnist
    assert loaded.shape == (4, 4) and loaded.pixels == 16
    assert loaded.train_images.dtype == torch.float32 and loaded.train_labels.dtype == torch.int64
    for found, wanted in ((loaded.train_images, train_images), (loaded.test_images, test_images)):
        np.testing.assert_allclose(found, wanted.reshape(-1, 16) / 255, rtol=1e-6)
    assert loaded.train_labels.tolist() == train_labels.tolist()
    assert loaded.test_labels.tolist() == test_labels.tolist()
    every = b"".join((utils.DATA / "mnist" / name).read_bytes() for name in IDX_FILES)
    assert loaded.checksum == hashlib.sha256(every).hexdigest()


def test_data_dir_is_the_folder_or_its_parent_from_the_callers_folder(mnist, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    shutil.move(utils.DATA / "mnist", tmp_path / "elsewhere" / "mnist")
    assert not data.is_downloaded("mnist")
    for given in ("elsewhere", "elsewhere/mnist", "~/elsewhere", str(tmp_path / "elsewhere")):
        monkeypatch.setenv("FF_DATA_DIR", given)
        assert data.is_downloaded("mnist")
        assert len(data.load_dataset("mnist").train_labels) == 30


@pytest.mark.parametrize("name", ["mnist", "auto", "cifar10"])
def test_data_dir_that_is_no_folder_is_an_error_and_no_fallback(mnist, monkeypatch, name):
    monkeypatch.setenv("FF_DATA_DIR", "nowhere")
    with pytest.raises(ValueError, match="FF_DATA_DIR is 'nowhere', which is no folder"):
        data.load_dataset(name)
    with pytest.raises(SystemExit, match="error: FF_DATA_DIR is 'nowhere'"):
        data.main()


def test_folder_beside_the_checkout_is_found(mnist, tmp_path):
    shutil.move(utils.DATA / "mnist", tmp_path / "shared" / "data" / "mnist")
    assert len(data.load_dataset("mnist").train_labels) == 30


@pytest.mark.parametrize("unpacked", [False, True])
def test_torchvisions_folders_are_read(mnist, tmp_path, monkeypatch, unpacked):
    before = data.load_dataset("mnist")
    raw = tmp_path / "root" / "MNIST" / "raw"
    shutil.move(utils.DATA / "mnist", raw)
    if unpacked:
        for name in IDX_FILES:
            whole = gzip.decompress((raw / name).read_bytes())
            (raw / name).with_suffix("").write_bytes(whole)
            (raw / name).unlink()
    for given in ("root", "root/MNIST", "root/MNIST/raw"):
        monkeypatch.setenv("FF_DATA_DIR", given)
        assert data.is_downloaded("mnist")
        assert torch.equal(data.load_dataset("mnist").train_images, before.train_images)
    if unpacked:
        (raw / IDX_FILES[0]).with_suffix("").write_bytes(b"no")
        with pytest.raises(ValueError, match="train-images-idx3-ubyte is not mnist's file"):
            data.load_dataset("mnist")


def test_fashion_mnists_files_are_not_taken_for_mnists_of_the_same_names(
    mnist, tmp_path, monkeypatch
):
    other = tmp_path / "fashion_mnist"
    other.mkdir()
    checksums = {}
    for name in IDX_FILES:
        (other / name).write_bytes(gzip.compress(b"another " + name.encode()))
        checksums[name] = "md5:" + pooch.file_hash(str(other / name), alg="md5")
    monkeypatch.setitem(data.REGISTRY, "fashion_mnist", checksums)
    monkeypatch.setenv("FF_DATA_DIR", str(other))
    assert len(data.load_dataset("mnist").train_labels) == 30


def test_mnist_without_files_and_network_fails_and_auto_takes_digits_with_a_warning(mnist, capsys):
    shutil.rmtree(utils.DATA / "mnist")
    with pytest.raises(data.DataNotFoundError, match="connect to the network, set FF_DATA_DIR"):
        data.load_dataset("mnist")
    loaded = data.load_dataset("auto", train_size=10_000, test_size=20)
    assert loaded.name == "digits" and "127.0.0.1" in loaded.fallback
    assert (len(loaded.train_labels), len(loaded.test_labels)) == (1437, 20)
    assert "stand-in" in loaded.title
    assert "WARNING: using scikit-learn's 8x8 digits" in capsys.readouterr().out


def test_download_folder_that_cannot_be_written_is_named(no_network, monkeypatch, capsys):
    named = r"could not be written to data/mnist \({}\): make that folder writable"
    utils.DATA.mkdir(parents=True)
    (utils.DATA / "mnist").write_text("a file where the folder should be")
    with pytest.raises(data.DataNotFoundError, match=named.format("NotADirectoryError")):
        data.load_dataset("mnist")

    def refused(*_, **__):  # for root no folder is closed
        raise PermissionError(13, "Permission denied")

    (utils.DATA / "mnist").unlink()
    monkeypatch.setattr("os.makedirs", refused)
    with pytest.raises(data.DataNotFoundError, match=named.format("PermissionError")):
        data.load_dataset("mnist")
    assert data.load_dataset("auto").name == "digits"
    assert "written to data/mnist" in capsys.readouterr().out


@pytest.mark.parametrize(
    "damage", [lambda raw: raw[:-20], lambda raw: raw[:-9] + bytes([raw[-9] ^ 1]) + raw[-8:]]
)
def test_damaged_file_is_never_read(mnist, damage):
    path = utils.DATA / "mnist" / IDX_FILES[0]
    path.write_bytes(damage(path.read_bytes()))
    for name in ("mnist", "auto"):
        with pytest.raises(ValueError, match="damaged"):
            data.load_dataset(name)


def test_damaged_file_in_a_named_folder_is_named(mnist, tmp_path, monkeypatch):
    shutil.copytree(utils.DATA / "mnist", tmp_path / "mine" / "mnist")
    (tmp_path / "mine" / "mnist" / IDX_FILES[3]).write_bytes(b"no")
    monkeypatch.setenv("FF_DATA_DIR", "mine")
    with pytest.raises(ValueError, match=r"mine/mnist/t10k-labels.* delete or replace it"):
        data.load_dataset("mnist")


def mirrors(monkeypatch, contents):
    """Let each mirror (its address a key) give these bytes, or raise; returns who was asked."""
    asked = []

    def fetch(url, output_file, pooch):
        asked.append(url)
        content = next(c for mirror, c in contents.items() if url.startswith(mirror))
        with open(output_file, "wb") as file:  # noqa: PTH123
            file.write(content)

    monkeypatch.setattr(pooch, "HTTPDownloader", lambda **_: fetch)
    monkeypatch.setattr(data, "MIRRORS", {"mnist": tuple(contents)})
    return asked


def test_download_takes_the_next_mirror_after_an_altered_file(mnist, monkeypatch):
    path = utils.DATA / "mnist" / IDX_FILES[3]
    whole = path.read_bytes()
    for start in (None, b"damaged"):  # missing, then damaged: both are replaced
        path.unlink() if start is None else path.write_bytes(start)
        asked = mirrors(monkeypatch, {"http://a/": b"something else", "http://b/": whole})
        assert len(data.load_dataset("mnist").test_labels) == 10
        assert asked == [f"http://a/{path.name}", f"http://b/{path.name}"]
        assert path.read_bytes() == whole
    path.unlink()
    mirrors(monkeypatch, {"http://a/": b"something else"})
    with pytest.raises(data.DataNotFoundError, match="http://a/: altered or cut short"):
        data.load_dataset("mnist")
    assert not path.exists()


def test_unknown_names_and_sizes_are_refused():
    with pytest.raises(ValueError, match="dataset is 'imagenet'; choose one of: auto, mnist"):
        data.load_dataset("imagenet")
    with pytest.raises(ValueError, match="train_size is 5000"):
        data.load_dataset("digits", train_size=5000)
    with pytest.raises(ValueError, match="test_size is 0"):
        data.load_dataset("digits", test_size=0)


def test_validation_split_holds_out_training_images_only():
    digits = data.load_dataset("digits")
    split = digits.validation_split(300, seed=1)
    order = torch.randperm(1437, generator=torch.Generator().manual_seed(1))
    assert torch.equal(split.test_images, digits.train_images[order[:300]])
    assert torch.equal(split.train_labels, digits.train_labels[order[300:]])
    with pytest.raises(ValueError, match="validation_size is 1437"):
        digits.validation_split(1437, seed=1)


def test_test_batches_are_all_test_images_in_order():
    digits = data.load_dataset("digits")
    images, labels = zip(*data.test_batches(digits, 100), strict=True)
    assert [len(part) for part in labels] == [100, 100, 100, 60]
    assert torch.equal(torch.cat(images), digits.test_images)
    assert torch.equal(torch.cat(labels), digits.test_labels)


def test_data_moves_to_a_device_whole():
    moved = data.load_dataset("digits", 10, 10).to("meta")
    assert all(getattr(moved, name).device.type == "meta" for name in data.TENSORS)


def test_published_checksums_are_those_of_the_official_files():
    if not data.is_downloaded("mnist"):
        pytest.skip("MNIST is not on disk")
    loaded = data.load_dataset("mnist")
    assert loaded.train_images.shape == (60_000, 784) and loaded.test_images.shape == (10_000, 784)
    assert loaded.train_labels.bincount().tolist() == [
        5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949,
    ]  # fmt: skip
    for name in IDX_FILES:
        raw = gzip.decompress(data._find("mnist", name).read_bytes())
        assert sha256(raw) == data.UNPACKED["mnist"][name]


def test_published_checksum_of_cifars_archive_is_the_one_that_is_asked_for():
    (checksum,) = data.REGISTRY["cifar10"].values()
    assert checksum == "md5:c58f30108f718f92721af3b95e74349a"


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
def cifar(no_network, tmp_path, monkeypatch):
    """`write(batches)` puts an archive with these where it is looked for."""
    (tmp_path / "cifar10").mkdir()
    path = tmp_path / "cifar10" / "cifar-10-python.tar.gz"
    monkeypatch.setenv("FF_DATA_DIR", str(tmp_path))

    def write(batches):
        with tarfile.open(path, "w:gz") as archive:
            for name, raw in batches.items():
                member = tarfile.TarInfo(f"cifar-10-batches-py/{name}")
                member.size = len(raw)
                archive.addfile(member, io.BytesIO(raw))
        checksum = "md5:" + pooch.file_hash(str(path), alg="md5")
        monkeypatch.setitem(data.REGISTRY, "cifar10", {path.name: checksum})
        return path

    return write


NAMES = [*(f"data_batch_{number}" for number in range(1, 6)), "test_batch"]


def test_cifars_batches_become_colour_images_and_labels(cifar):
    images = np.random.default_rng(0).integers(0, 256, (6, 4, 3072))
    labels = np.arange(24).reshape(6, 4) % 10
    cifar({n: old_pickle(*both) for n, *both in zip(NAMES, images, labels, strict=True)})
    loaded = data.load_dataset("cifar10")
    assert loaded.shape == (3, 32, 32) and loaded.title == "CIFAR-10"
    expected = torch.from_numpy(images).float() / 255
    assert torch.allclose(loaded.train_images, expected[:5].flatten(0, 1))
    assert torch.allclose(loaded.test_images, expected[5])
    assert loaded.train_labels.tolist() == labels[:5].flatten().tolist()
    assert loaded.test_labels.tolist() == labels[5].tolist()


def test_pickle_that_names_anything_but_arrays_is_refused_and_not_run(cifar, tmp_path):
    class Evil:
        def __reduce__(self):
            return (open, (str(tmp_path / "was_run"), "w"))

    batch = old_pickle(np.zeros((2, 3072)), [0, 1])
    system = old_pickle(np.zeros((2, 3072)), [0, 1], reconstruct=b"os\nsystem\n")
    for second in (system, pickle.dumps(Evil()), batch[:200]):
        cifar({NAMES[0]: batch, NAMES[1]: second})
        with pytest.raises(ValueError, match=r"cifar-10-python.tar.gz is not CIFAR-10's archive"):
            data.load_dataset("cifar10")
    assert not (tmp_path / "was_run").exists()


def test_cifar_missing_or_damaged_is_one_sentence(cifar):
    path = cifar({})
    path.write_bytes(b"cut short")
    with pytest.raises(ValueError, match=r"is not cifar10's file \(its checksum differs\)"):
        data.load_dataset("cifar10")
    path.unlink()
    with pytest.raises(data.DataNotFoundError, match="is missing and could not be downloaded"):
        data.load_dataset("cifar10")


def test_colour_digits_are_the_digits_in_colours_that_say_nothing():
    grey, colour = data.load_dataset("digits"), data.load_dataset("colour_digits")
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
    assert torch.equal(colour.train_images, data.load_dataset("colour_digits").train_images)


def test_make_data_says_what_it_found(mnist, capsys):
    data.main()
    assert "mnist: 30 training and 10 test images of 4x4, sha256 " in capsys.readouterr().out


# --- folders of images ----------------------------------------------------------------------


def write_images(folder, classes, count=6, size=(5, 4), mode="L", ending="png"):
    """`count` images of a class in each sub-folder; returns their pixels by path."""
    generator, written = np.random.default_rng(0), {}
    for name in classes:
        (folder / name).mkdir(parents=True, exist_ok=True)
        for number in range(count):
            shape = (size[1], size[0]) if mode == "L" else (size[1], size[0], 3)
            pixels = generator.integers(0, 256, shape, dtype=np.uint8)
            path = folder / name / f"{number}.{ending}"
            Image.fromarray(pixels).save(path)
            written[path] = pixels
    return written


def test_folder_of_images_with_a_test_part_is_read_as_it_is(no_network, tmp_path):
    train = write_images(tmp_path / "flowers" / "train", ["rose", "aster"])
    test = write_images(tmp_path / "flowers" / "test", ["aster", "rose"], count=2, ending="PNG")
    loaded = data.load_dataset("folder:flowers")
    assert (loaded.name, loaded.title, loaded.classes) == ("flowers", "flowers", 2)
    assert loaded.shape == (4, 5) and loaded.train_labels.tolist() == [0] * 6 + [1] * 6
    for images, written in ((loaded.train_images, train), (loaded.test_images, test)):
        expected = np.stack([written[path] for path in sorted(written)]).reshape(-1, 20) / 255
        np.testing.assert_allclose(images, expected, rtol=1e-6)
    (tmp_path / "flowers").rename(tmp_path / "moved")
    moved = data.load_dataset(f"folder:{tmp_path / 'moved'}", train_size=3)
    assert moved.checksum == loaded.checksum and len(moved.train_labels) == 3
    (tmp_path / "moved" / "test" / "rose" / "1.PNG").unlink()
    assert data.load_dataset("folder:moved").checksum != loaded.checksum


def test_folder_of_images_without_a_test_part_is_split_by_seed(tmp_path):
    write_images(tmp_path, ["b", "a", "c"], mode="RGB", ending="jpeg")
    write_images(tmp_path, ["a"], count=1)  # one in grey among the coloured
    (tmp_path / "a" / "notes.txt").write_text("no image")
    (tmp_path / "empty").mkdir()
    loaded, other = (data.image_folder(tmp_path, seed) for seed in (0, 1))
    assert loaded.shape == (3, 4, 5) and loaded.classes == 3
    assert (len(loaded.train_labels), len(loaded.test_labels)) == (15, 4)
    every = torch.cat([loaded.train_labels, loaded.test_labels])
    assert every.bincount().tolist() == [7, 6, 6]
    assert torch.equal(data.image_folder(tmp_path).test_images, loaded.test_images)
    assert not torch.equal(other.test_images, loaded.test_images)
    assert len(torch.cat([loaded.train_images, loaded.test_images]).unique(dim=0)) == 19


@pytest.mark.parametrize("ending", ["gif", "webp", "bmp", "tiff"])
def test_images_of_other_types_are_read(tmp_path, ending):
    written = write_images(tmp_path, ["a", "b"], ending=ending)
    loaded = data.image_folder(tmp_path)
    assert (len(loaded.train_labels), len(loaded.test_labels)) == (10, 2)
    if ending != "webp":  # which loses some detail
        images = torch.cat([loaded.train_images, loaded.test_images])
        images = images.view(12, -1, 20)[:, 0]  # a GIF is read in colour
        found = sorted(images.mul(255).round().long().tolist())
        assert found == sorted(pixels.flatten().tolist() for pixels in written.values())


def test_folder_of_images_that_is_wrong_is_one_sentence(no_network, tmp_path):
    def refused(sentence):
        with pytest.raises(ValueError, match=sentence) as info:
            data.load_dataset("folder:pictures")
        assert "\n" not in str(info.value)

    folder = tmp_path / "pictures"
    refused("pictures is no folder: give one that exists")
    folder.mkdir()
    refused("pictures has images of 0 classes: give at least two folders of images")
    write_images(folder, ["only"])
    refused("pictures has images of 1 classes")
    write_images(folder, ["few"], count=1)
    shutil.rmtree(folder / "only")
    write_images(folder, ["only"], count=1)
    refused("pictures has too few images of class")
    shutil.rmtree(folder / "few")
    write_images(folder, ["only"])
    write_images(folder, ["wide"], size=(6, 4))
    refused(r"wide/0.png has 6x4 pixels and the first image 5x4: give images of one size")
    shutil.rmtree(folder / "wide")
    write_images(folder, ["other"])
    whole = (folder / "other" / "3.png").read_bytes()
    for damaged in (b"", b"text", whole[: len(whole) // 2], whole[:12] + bytes(len(whole) - 12)):
        (folder / "other" / "3.png").write_bytes(damaged)
        refused(r"other/3.png is no 8-bit image that can be read: delete or replace it")
    Image.fromarray(np.full((4, 5), 1000, np.uint16)).save(folder / "other" / "3.png")
    refused("other/3.png is no 8-bit image")
    shutil.rmtree(folder)
    write_images(folder / "train", ["a", "b"])
    refused("pictures has train/ and no test/")
    for place in ("~", "/"):
        with pytest.raises(ValueError, match="is no folder of images: give one"):
            data.load_dataset(f"folder:{place}")
    write_images(folder / "test", ["a"])
    refused("pictures has the class b in train/ or in test/ only")
    write_images(folder / "test", ["a", "b"], mode="RGB")
    refused("train/ and test/ have images of different sizes or colours")
