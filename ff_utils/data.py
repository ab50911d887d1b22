"""Images: MNIST, Fashion-MNIST, CIFAR-10, built-in digits, and folders of anyone's own pictures."""

import gzip
import hashlib
import io
import pickle
import sys
import tarfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path

import numpy as np
import pooch
import torch
from PIL import Image
from pooch.hashes import hash_matches
from requests import RequestException

from ff_utils import utils
from ff_utils.utils import check_choice, check_number

TITLES = {
    "mnist": "MNIST",
    "fashion_mnist": "Fashion-MNIST",
    "cifar10": "CIFAR-10",
    "digits": "8x8 digits",
    "colour_digits": "8x8 colour digits",
}
TENSORS = ("train_images", "train_labels", "test_images", "test_labels")
IDX_FILES = (
    "train-images-idx3-ubyte.gz",
    "train-labels-idx1-ubyte.gz",
    "t10k-images-idx3-ubyte.gz",
    "t10k-labels-idx1-ubyte.gz",
)
MNIST = (
    "sha256:440fcabf73cc546fa21475e81ea370265605f56be210a4024d2ca8f203523609",
    "sha256:3552534a0a558bbed6aed32b30c495cca23d567ec52cac8be1a0730e8010255c",
    "sha256:8d422c7b0a1c1c79245a5bcf07fe86e33eeafee792b84584aec276f5a2dbc4e6",
    "sha256:f7ae60f92e00ec6debd23a6088c31dbd2371eca3ffa0defaefb259924204aec6",
)
MNIST_UNPACKED = (
    "sha256:ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
    "sha256:65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
    "sha256:0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
    "sha256:ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2",
)
FASHION_MNIST = (
    "md5:8d4fb7e6c68d591d4c3dfef9ec88bf0d",
    "md5:25c81989df183df01b3e8a0aad5dffbe",
    "md5:bef4ecab320f06d8554ea6380940ec79",
    "md5:bb300cfdad3c16e7a12a480ee83cd310",
)
# Files of each data set in the order they are read, with the checksum of each; for MNIST also of
# the same files unpacked, as torchvision leaves them.
REGISTRY = {
    "mnist": dict(zip(IDX_FILES, MNIST, strict=True)),
    "fashion_mnist": dict(zip(IDX_FILES, FASHION_MNIST, strict=True)),
    "cifar10": {"cifar-10-python.tar.gz": "md5:c58f30108f718f92721af3b95e74349a"},
}
UNPACKED = {"mnist": dict(zip(IDX_FILES, MNIST_UNPACKED, strict=True))}
MIRRORS = {
    "mnist": (
        "https://ossci-datasets.s3.amazonaws.com/mnist/",
        "https://storage.googleapis.com/cvdf-datasets/mnist/",
    ),
    "fashion_mnist": (
        "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/",
        "https://raw.githubusercontent.com/zalandoresearch/fashion-mnist/master/data/fashion/",
    ),
    "cifar10": ("https://www.cs.toronto.edu/~kriz/",),
}
TORCHVISION_FOLDERS = {"mnist": "MNIST", "fashion_mnist": "FashionMNIST"}
FOLDER = "folder:"  # what the name of a folder of images begins with
SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".tif", ".tiff", ".webp", ".pgm", ".ppm")
UNREADABLE = (OSError, SyntaxError, ValueError, Image.DecompressionBombError)


class DataNotFoundError(RuntimeError):
    """The files of a data set are neither on disk nor to be downloaded."""


@dataclass(frozen=True)
class Dataset:
    """Images (N, pixels) float32 in [0, 1] and labels (N,) int64, for training and for testing.

    shape: (height, width) of an image, or (channels, height, width) of one in colour.
    checksum: SHA-256 of the files that were read.
    fallback: empty, or says why this is not the data set that was asked for.
    """

    name: str
    shape: tuple[int, ...]
    classes: int
    train_images: torch.Tensor
    train_labels: torch.Tensor
    test_images: torch.Tensor
    test_labels: torch.Tensor
    checksum: str
    fallback: str = ""

    @property
    def pixels(self) -> int:
        """Numbers in one image."""
        return self.train_images.shape[1]

    @property
    def title(self) -> str:
        """Name for a figure's title; says so when it is a stand-in."""
        title = TITLES.get(self.name, self.name)
        return f"{title} (stand-in: MNIST not found)" if self.fallback else title

    def subset(self, train: int | None, test: int | None = None) -> "Dataset":
        """The first `train` and `test` samples; None keeps all."""
        if train is not None:
            check_number("train_size", train, 1, len(self.train_labels), whole=True)
        if test is not None:
            check_number("test_size", test, 1, len(self.test_labels), whole=True)
        sizes = (train, train, test, test)
        return self._with_tensors(t[:n] for t, n in zip(self._tensors(), sizes, strict=True))

    def validation_split(self, size: int, seed: int) -> "Dataset":
        """Hold `size` random training samples out: they replace the test set of the result."""
        count = len(self.train_labels)
        check_number("validation_size", size, 1, count - 1, whole=True)
        order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
        held_out, kept = order[:size], order[size:]
        images, labels = self.train_images, self.train_labels
        parts = images[kept], labels[kept], images[held_out], labels[held_out]
        return self._with_tensors(parts)

    def to(self, device: str | torch.device) -> "Dataset":
        """The same data on `device`."""
        return self._with_tensors(tensor.to(device) for tensor in self._tensors())

    def _tensors(self) -> list[torch.Tensor]:
        return [getattr(self, name) for name in TENSORS]

    def _with_tensors(self, tensors: Iterable[torch.Tensor]) -> "Dataset":
        return replace(self, **dict(zip(TENSORS, tensors, strict=True)))


def test_batches(data: Dataset, rows: int = 2000) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """The test images and labels in order, `rows` at a time."""
    yield from zip(data.test_images.split(rows), data.test_labels.split(rows), strict=True)


def load_dataset(
    name: str = "auto", train_size: int | None = None, test_size: int | None = None
) -> Dataset:
    """Load a data set by name, or a folder of images, as in `folder:~/flowers`.

    `auto` is MNIST where it is on disk or can be downloaded, else the built-in digits, with a
    warning. Raises ValueError for an unknown name or size, a file whose checksum is wrong, a
    folder that is not as `image_folder` wants it or an `FF_DATA_DIR` that is no folder,
    DataNotFoundError without files and network.
    """
    if isinstance(name, str) and name.startswith(FOLDER):
        return image_folder(name.removeprefix(FOLDER)).subset(train_size, test_size)
    check_choice("dataset", name, ("auto", *TITLES, f"{FOLDER}PATH"))
    load = {"digits": _digits, "colour_digits": _colour_digits, "cifar10": _cifar10}
    try:
        data = load[name]() if name in load else _mnist("mnist" if name == "auto" else name)
    except DataNotFoundError as error:
        if name != "auto":
            raise
        data = replace(_digits(), fallback=str(error))
        print(f"WARNING: using scikit-learn's 8x8 digits instead of MNIST. {error}", flush=True)
        train_size = train_size and min(train_size, len(data.train_labels))
        test_size = test_size and min(test_size, len(data.test_labels))
    return data.subset(train_size, test_size)


def is_downloaded(name: str) -> bool:
    """Whether the files of a downloaded data set are on disk, so that nothing is downloaded."""
    return all(any(_on_disk(name, file_name)) for file_name in REGISTRY[name])


def _digits() -> Dataset:
    """scikit-learn's 1,797 8x8 digits; a fixed shuffle, the last 360 are the test set."""
    from sklearn.datasets import load_digits

    bunch = load_digits()
    order = np.random.default_rng(0).permutation(len(bunch.target))
    images = torch.from_numpy(bunch.data[order] / 16).float()
    labels = torch.from_numpy(bunch.target[order]).long()
    checksum = _sha256(images.numpy().tobytes(), labels.numpy().tobytes())
    parts = images[:-360], labels[:-360], images[-360:], labels[-360:]
    return Dataset("digits", (8, 8), 10, *parts, checksum)


def _colour_digits() -> Dataset:
    """The 8x8 digits, each in a colour of its own on a ground of another, (3, 8, 8): the colours
    say nothing of the class."""
    digits, generator = _digits(), np.random.default_rng(1)

    def tinted(images: torch.Tensor) -> torch.Tensor:
        colours = generator.random((2, len(images), 3, 1), dtype=np.float32)
        # At least half of the range apart in brightness, so that every digit can be read.
        ink, ground = torch.from_numpy(colours * 0.5 + np.float32([0.5, 0])[:, None, None, None])
        share = images[:, None]
        return (share * ink + (1 - share) * ground).flatten(1)

    train, test = tinted(digits.train_images), tinted(digits.test_images)
    checksum = _sha256(train.numpy().tobytes(), test.numpy().tobytes())
    parts = train, digits.train_labels, test, digits.test_labels
    return Dataset("colour_digits", (3, 8, 8), 10, *parts, checksum)


def _mnist(name: str) -> Dataset:
    """MNIST or Fashion-MNIST from its four IDX files."""
    files = [_find(name, file_name) for file_name in REGISTRY[name]]
    contents = [path.read_bytes() for path in files]
    arrays = [
        _idx_array(gzip.decompress(raw) if path.suffix == ".gz" else raw)
        for path, raw in zip(files, contents, strict=True)
    ]
    return _from_bytes(name, tuple(arrays[0].shape[1:]), arrays, _sha256(*contents))


def _from_bytes(
    name: str, shape: tuple[int, ...], arrays: list[torch.Tensor], checksum: str
) -> Dataset:
    train_images, train_labels, test_images, test_labels = arrays
    train = train_images.flatten(1).float().div_(255), train_labels.long()
    test = test_images.flatten(1).float().div_(255), test_labels.long()
    return Dataset(name, shape, 10, *train, *test, checksum)


def _idx_array(raw: bytes) -> torch.Tensor:
    """Array of unsigned bytes in an IDX file: 4 bytes, the last the dimensions; sizes; values."""
    shape = np.frombuffer(raw, ">u4", count=raw[3], offset=4).tolist()
    return torch.frombuffer(bytearray(raw), dtype=torch.uint8, offset=4 + 4 * raw[3]).view(shape)


ARRAY_PARTS = {
    ("numpy", "dtype"): np.dtype,
    ("numpy", "ndarray"): np.ndarray,
    ("numpy.core.multiarray", "_reconstruct"): np.empty(0).__reduce__()[0],
}


class _ArraysOnly(pickle.Unpickler):
    """Reads arrays in plain containers; whatever else a pickle names is refused, not run."""

    def find_class(self, module: str, name: str) -> object:
        """What a pickle names, if it is part of an array."""
        if (module, name) not in ARRAY_PARTS:
            raise pickle.UnpicklingError(f"it names {module}.{name}")
        return ARRAY_PARTS[module, name]


def _cifar10() -> Dataset:
    """CIFAR-10 from its archive of Python pickles: five training batches, one test batch."""
    (archive_name,) = REGISTRY["cifar10"]
    path = _find("cifar10", archive_name)
    names = [*(f"data_batch_{number}" for number in range(1, 6)), "test_batch"]
    images, labels = [], []
    try:
        with tarfile.open(path) as archive:
            for name in names:
                member = archive.extractfile(f"cifar-10-batches-py/{name}")
                batch = _ArraysOnly(member, encoding="bytes").load()
                images.append(torch.from_numpy(batch[b"data"]))
                labels.append(torch.tensor(batch[b"labels"]))
    except (OSError, EOFError, KeyError, tarfile.TarError, pickle.UnpicklingError) as error:
        place = utils.relative(path)
        raise ValueError(f"{place} is not CIFAR-10's archive: delete it ({error}).") from error
    arrays = [torch.cat(images[:-1]), torch.cat(labels[:-1]), images[-1], labels[-1]]
    return _from_bytes("cifar10", (3, 32, 32), arrays, _sha256(path.read_bytes()))


def image_folder(path: str | Path, seed: int = 0) -> Dataset:
    """A folder of images with one sub-folder a class, as torchvision's `ImageFolder`.

    If it has the folders `train` and `test`, each has the classes' folders; else a sixth of the
    images, drawn by `seed`, is the test set. Classes are numbered in their names' order. Images
    are grey if all are, else in colour. The data set has the folder's name. ValueError for a
    folder without images or with one class, images of several sizes or that cannot be read.
    Suffixes of images are in `SUFFIXES`; of a moving one the first picture is read.
    """
    folder = utils.user_path(path)
    place = utils.relative(folder)
    if folder in (Path.home(), Path(folder.anchor)):
        raise ValueError(f"{place} is no folder of images: give one, as in {FOLDER}~/flowers.")
    parts = [folder / part for part in ("train", "test")]
    split = all(part.is_dir() for part in parts)
    files = [_images_by_class(part) for part in (parts if split else [folder])]
    classes = sorted(files[0])
    if not split and len(classes) < 2 and parts[0].is_dir():
        raise ValueError(f"{place} has train/ and no test/: give both, or the classes' folders.")
    if len(classes) < 2:
        raise ValueError(
            f"{place} has images of {len(classes)} classes: give at least two folders of images, "
            "one a class, or such folders in train/ and test/."
        )
    if split and (unknown := sorted(set(classes) ^ set(files[1]))):
        raise ValueError(f"{place} has the class {unknown[0]} in train/ or in test/ only.")
    digest, arrays = hashlib.sha256(), []
    for part in files:
        images, labels = _read_images(part, classes, digest)
        arrays += [images, labels]
    if len({tuple(images.shape[1:]) for images in arrays[::2]}) > 1:
        raise ValueError(f"{place}: train/ and test/ have images of different sizes or colours.")
    if not split:
        images, labels = arrays
        order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
        test, train = order.tensor_split([-(-len(labels) // 6)])
        arrays = [images[train], labels[train], images[test], labels[test]]
        if missing := sorted(set(range(len(classes))) - set(labels[train].tolist())):
            raise ValueError(
                f"{place} has too few images of class {classes[missing[0]]}, all of which the test "
                "set has drawn: add images, or make train/ and test/."
            )
    data = _from_bytes(folder.name, tuple(arrays[0].shape[1:]), arrays, digest.hexdigest())
    return replace(data, classes=len(classes))


def _images_by_class(folder: Path) -> dict[str, list[Path]]:
    """The images in each sub-folder, by its name, in order; those without images are left out."""
    if not folder.is_dir():
        raise ValueError(f"{utils.relative(folder)} is no folder: give one that exists.")
    found = {}
    for inner in sorted(path for path in folder.iterdir() if path.is_dir()):
        if images := sorted(p for p in inner.rglob("*") if p.suffix.lower() in SUFFIXES):
            found[inner.name] = images
    return found


def _read_images(
    files: dict[str, list[Path]], classes: list[str], digest: "hashlib._Hash"
) -> tuple[torch.Tensor, torch.Tensor]:
    """Images (N, height, width) or (N, 3, height, width) of bytes, and their labels (N,)."""
    images, labels = [], []
    for label, name in enumerate(classes):
        for path in files[name]:
            try:
                raw = path.read_bytes()
                with Image.open(io.BytesIO(raw)) as image:
                    if image.mode[0] in "IF":
                        raise ValueError("more than 8 bits a colour")
                    grey = image.mode in ("1", "L", "LA")
                    pixels = np.asarray(image.convert("L" if grey else "RGB"))
            except UNREADABLE as error:
                place = utils.relative(path)
                raise ValueError(
                    f"{place} is no 8-bit image that can be read: delete or replace it."
                ) from error
            if images and pixels.shape[:2] != images[0].shape[:2]:
                (height, width), (tall, wide) = images[0].shape[:2], pixels.shape[:2]
                raise ValueError(
                    f"{utils.relative(path)} has {wide}x{tall} pixels and the first image "
                    f"{width}x{height}: give images of one size."
                )
            digest.update(f"{name}/{path.name}\0".encode())
            digest.update(raw)
            images.append(pixels)
            labels.append(label)
    if any(image.ndim == 3 for image in images):
        images = [image if image.ndim == 3 else np.stack([image] * 3, -1) for image in images]
        images = np.stack(images).transpose(0, 3, 1, 2)
    return torch.from_numpy(np.ascontiguousarray(images)), torch.tensor(labels)


def _sha256(*parts: bytes) -> str:
    return hashlib.sha256(b"".join(parts)).hexdigest()


def _on_disk(dataset: str, file_name: str) -> Iterator[tuple[Path, str]]:
    """Every such file in the folders that are searched, unpacked ones too, with its checksum."""
    names = {file_name: REGISTRY[dataset][file_name]}
    if checksum := UNPACKED.get(dataset, {}).get(file_name):
        names[file_name.removesuffix(".gz")] = checksum
    folders = utils.data_folders(dataset)
    if dataset in TORCHVISION_FOLDERS:
        folders += utils.data_folders(TORCHVISION_FOLDERS[dataset])
        folders = [place for folder in folders for place in (folder, folder / "raw")]
    for folder in folders:
        for name, checksum in names.items():
            if (folder / name).is_file():
                yield folder / name, checksum


def _find(dataset: str, file_name: str) -> Path:
    """The checked file: on disk if it is there, else downloaded from a mirror."""
    download_to = utils.DATA / dataset
    for path, checksum in _on_disk(dataset, file_name):
        if hash_matches(path, checksum):
            return path
        # Fashion-MNIST's files have MNIST's names: a folder may hold the other's.
        known = chain.from_iterable(files.values() for files in REGISTRY.values())
        if path.parent != download_to and not any(hash_matches(path, one) for one in known):
            raise ValueError(
                f"{utils.relative(path)} is not {dataset}'s file (its checksum differs): delete "
                "or replace it."
            )
    return _download(dataset, file_name, download_to)


def _download(dataset: str, file_name: str, folder: Path) -> Path:
    """Fetch a file into `folder` from the first mirror that gives it whole."""
    remedy = "set FF_DATA_DIR to a folder that holds the file"
    damaged, failures = (folder / file_name).exists(), []
    for mirror in MIRRORS[dataset]:
        source = pooch.create(folder, base_url=mirror, registry=REGISTRY[dataset])
        fetch = pooch.HTTPDownloader(progressbar=sys.stderr.isatty(), timeout=30)  # seconds
        try:
            return Path(source.fetch(file_name, downloader=fetch))
        except ValueError:
            failures.append(f"{mirror}: altered or cut short")
        except RequestException as error:
            failures.append(f"{mirror}: {type(error).__name__}")
        except OSError as error:
            raise DataNotFoundError(
                f"{file_name} could not be written to {utils.relative(folder)} "
                f"({type(error).__name__}): make that folder writable, {remedy}, or choose "
                "dataset=digits."
            ) from error
    tried, place = "; ".join(failures), utils.relative(folder / file_name)
    if damaged:
        raise ValueError(
            f"{place} is damaged and no good copy could be downloaded ({tried}): delete it, or "
            f"{remedy}."
        )
    raise DataNotFoundError(
        f"{place} is missing and could not be downloaded ({tried}): connect to the network, "
        f"{remedy}, or choose dataset=digits."
    )


def main() -> None:
    """Fetch MNIST and say where it is (`make data`)."""
    try:
        data = load_dataset("auto")
    except ValueError as error:
        sys.exit(f"error: {error}")
    print(
        f"{data.name}: {len(data.train_labels):,} training and {len(data.test_labels):,} test "
        f"images of {data.shape[0]}x{data.shape[1]}, sha256 {data.checksum[:12]}"
    )
