"""Images, checked by checksum: MNIST, Fashion-MNIST, CIFAR-10, and two built-in sets of digits."""

import gzip
import hashlib
import pickle
import sys
import tarfile
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from ff_utils import checks, paths

TIMEOUT_SECONDS = 30
IDX_FILES = {
    "train_images": "train-images-idx3-ubyte.gz",
    "train_labels": "train-labels-idx1-ubyte.gz",
    "test_images": "t10k-images-idx3-ubyte.gz",
    "test_labels": "t10k-labels-idx1-ubyte.gz",
}
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
CHECKSUMS = {
    "mnist": {
        "train_images": "sha256:440fcabf73cc546fa21475e81ea370265605f56be210a4024d2ca8f203523609",
        "train_labels": "sha256:3552534a0a558bbed6aed32b30c495cca23d567ec52cac8be1a0730e8010255c",
        "test_images": "sha256:8d422c7b0a1c1c79245a5bcf07fe86e33eeafee792b84584aec276f5a2dbc4e6",
        "test_labels": "sha256:f7ae60f92e00ec6debd23a6088c31dbd2371eca3ffa0defaefb259924204aec6",
    },
    "fashion_mnist": {
        "train_images": "md5:8d4fb7e6c68d591d4c3dfef9ec88bf0d",
        "train_labels": "md5:25c81989df183df01b3e8a0aad5dffbe",
        "test_images": "md5:bef4ecab320f06d8554ea6380940ec79",
        "test_labels": "md5:bb300cfdad3c16e7a12a480ee83cd310",
    },
    "cifar10": {"archive": "md5:c58f30108f718f92721af3b95e74349a"},
}
CIFAR_FILE = "cifar-10-python.tar.gz"
TITLES = {
    "mnist": "MNIST",
    "fashion_mnist": "Fashion-MNIST",
    "cifar10": "CIFAR-10",
    "digits": "8x8 digits",
    "colour_digits": "8x8 colour digits",
}
DATASETS = ("auto", *TITLES)


class DataNotFoundError(RuntimeError):
    """The files of a data set are neither on disk nor to be downloaded."""


@dataclass(frozen=True)
class Dataset:
    """Images (N, pixels) float32 in [0, 1] and labels (N,) int64, for training and for testing.

    shape: (height, width) of an image, or (channels, height, width) of one in colour.
    `fallback` is empty, or says why this is not the data set that was asked for.
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
        for name, wanted, there in (
            ("train_size", train, len(self.train_labels)),
            ("test_size", test, len(self.test_labels)),
        ):
            if wanted is not None:
                checks.number(name, wanted, 1, there, whole=True)
        return replace(
            self,
            train_images=self.train_images[:train],
            train_labels=self.train_labels[:train],
            test_images=self.test_images[:test],
            test_labels=self.test_labels[:test],
        )

    def validation_split(self, size: int, seed: int) -> "Dataset":
        """Hold `size` random training samples out: they replace the test set of the result."""
        checks.number("validation_size", size, 1, len(self.train_labels) - 1, whole=True)
        order = torch.randperm(
            len(self.train_labels), generator=torch.Generator().manual_seed(seed)
        )
        held_out, kept = order[:size], order[size:]
        return replace(
            self,
            train_images=self.train_images[kept],
            train_labels=self.train_labels[kept],
            test_images=self.train_images[held_out],
            test_labels=self.train_labels[held_out],
        )

    def to(self, device: str | torch.device) -> "Dataset":
        """The same data on `device`."""
        moved = {
            field: getattr(self, field).to(device)
            for field in ("train_images", "train_labels", "test_images", "test_labels")
        }
        return replace(self, **moved)


def load(
    name: str = "auto", train_size: int | None = None, test_size: int | None = None
) -> Dataset:
    """Load a data set by name.

    `auto` is MNIST where it is on disk or can be downloaded, else the built-in digits, said
    aloud. Raises ValueError for an unknown name or size, DataNotFoundError without files and
    network, and ValueError for a file whose checksum is wrong.
    """
    checks.one_of("dataset", name, DATASETS)
    built_in = {"digits": _digits, "colour_digits": _colour_digits, "cifar10": _cifar10}
    if name != "auto":
        whole = built_in[name]() if name in built_in else _idx(name)
        return whole.subset(train_size, test_size)
    try:
        return _idx("mnist").subset(train_size, test_size)
    except DataNotFoundError as error:
        digits = _digits(fallback=str(error))
        print(f"WARNING: using scikit-learn's 8x8 digits instead of MNIST. {error}", flush=True)
        limits = (len(digits.train_labels), len(digits.test_labels))
        sizes = (train_size, test_size)
        return digits.subset(*(s and min(s, n) for s, n in zip(sizes, limits, strict=True)))


def at_hand(name: str) -> bool:
    """Whether the files of a downloaded data set are on disk, so that nothing is downloaded."""
    folders = paths.data_folders(name)
    files = [CIFAR_FILE] if name == "cifar10" else IDX_FILES.values()
    return all(any((f / file).exists() for f in folders) for file in files)


def _digits(fallback: str = "") -> Dataset:
    """scikit-learn's 1,797 8x8 digits; a fixed shuffle, the last 360 are the test set."""
    from sklearn.datasets import load_digits

    bunch = load_digits()
    order = np.random.default_rng(0).permutation(len(bunch.target))
    images = torch.from_numpy(bunch.data[order] / 16).float()
    labels = torch.from_numpy(bunch.target[order]).long()
    checksum = hashlib.sha256(images.numpy().tobytes() + labels.numpy().tobytes()).hexdigest()
    return Dataset(
        name="digits",
        shape=(8, 8),
        classes=10,
        train_images=images[:-360],
        train_labels=labels[:-360],
        test_images=images[-360:],
        test_labels=labels[-360:],
        checksum=checksum,
        fallback=fallback,
    )


def _colour_digits() -> Dataset:
    """The 8x8 digits, each in a colour of its own on a ground of another, (3, 8, 8): the colours
    say nothing of the class."""
    digits, generator = _digits(), np.random.default_rng(1)

    def tinted(images: torch.Tensor) -> torch.Tensor:
        colours = generator.random((2, len(images), 3, 1), dtype=np.float32)
        # At least half of the range apart in brightness, so that every digit is to be read.
        ink, ground = torch.from_numpy(colours * 0.5 + np.float32([0.5, 0])[:, None, None, None])
        share = images[:, None]
        return (share * ink + (1 - share) * ground).flatten(1)

    train, test = tinted(digits.train_images), tinted(digits.test_images)
    checksum = hashlib.sha256(train.numpy().tobytes() + test.numpy().tobytes()).hexdigest()
    return replace(
        digits,
        name="colour_digits",
        shape=(3, 8, 8),
        train_images=train,
        test_images=test,
        checksum=checksum,
    )


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
    path = _find("cifar10", CIFAR_FILE, CHECKSUMS["cifar10"]["archive"])
    names = [*(f"data_batch_{number}" for number in range(1, 6)), "test_batch"]
    images, labels = [], []
    try:
        with tarfile.open(path) as archive:
            for name in names:
                member = archive.extractfile(f"cifar-10-batches-py/{name}")
                batch = _ArraysOnly(member, encoding="bytes").load()
                images.append(torch.from_numpy(batch[b"data"]).view(-1, 3 * 32 * 32))
                labels.append(torch.tensor(batch[b"labels"]))
    except (OSError, EOFError, KeyError, tarfile.TarError, pickle.UnpicklingError) as error:
        place = paths.relative(path)
        raise ValueError(f"{place} is not CIFAR-10's archive: delete it ({error}).") from error
    return Dataset(
        name="cifar10",
        shape=(3, 32, 32),
        classes=10,
        train_images=torch.cat(images[:-1]).float().div_(255),
        train_labels=torch.cat(labels[:-1]),
        test_images=images[-1].float().div_(255),
        test_labels=labels[-1],
        checksum=hashlib.sha256(path.read_bytes()).hexdigest(),
    )


def _idx(name: str) -> Dataset:
    """MNIST or Fashion-MNIST from its four gzipped IDX files."""
    arrays, digest = {}, hashlib.sha256()
    for part, file_name in IDX_FILES.items():
        path = _find(name, file_name, CHECKSUMS[name][part])
        digest.update(path.read_bytes())
        arrays[part] = read_idx(path)
    images = {
        part: torch.from_numpy(arrays[part].reshape(len(arrays[part]), -1)).float().div_(255)
        for part in ("train_images", "test_images")
    }
    return Dataset(
        name=name,
        shape=arrays["train_images"].shape[1:],
        classes=10,
        train_images=images["train_images"],
        train_labels=torch.from_numpy(arrays["train_labels"]).long(),
        test_images=images["test_images"],
        test_labels=torch.from_numpy(arrays["test_labels"]).long(),
        checksum=digest.hexdigest(),
    )


def _find(dataset: str, file_name: str, checksum: str) -> Path:
    """The checked file: on disk if it is there, else downloaded from a mirror."""
    download_to = paths.DATA / dataset
    for folder in paths.data_folders(dataset):
        path = folder / file_name
        if not path.exists():
            continue
        if _matches(path, checksum):
            return path
        # Fashion-MNIST's files have MNIST's names: a folder may hold the other's.
        of_another = any(
            _matches(path, known) for parts in CHECKSUMS.values() for known in parts.values()
        )
        if folder != download_to and not of_another:
            raise ValueError(
                f"{path} is not {dataset}'s file (its checksum differs): delete or replace it."
            )
    return _download(dataset, file_name, checksum, download_to)


def _matches(path: Path, checksum: str) -> bool:
    algorithm, expected = checksum.split(":")
    with path.open("rb") as file:
        return hashlib.file_digest(file, algorithm).hexdigest() == expected


def _download(dataset: str, file_name: str, checksum: str, folder: Path) -> Path:
    damaged = (folder / file_name).exists()
    try:
        import pooch
    except ModuleNotFoundError as error:
        raise DataNotFoundError(
            f"{file_name} is not at hand, and pooch, which would fetch it, is not installed: set "
            "FF_DATA_DIR to a folder that holds the file, or choose dataset=digits."
        ) from error
    failures = []
    for mirror in MIRRORS[dataset]:
        try:
            fetched = pooch.retrieve(
                mirror + file_name,
                known_hash=checksum,
                fname=file_name,
                path=folder,
                downloader=pooch.HTTPDownloader(
                    progressbar=sys.stderr.isatty(), timeout=TIMEOUT_SECONDS
                ),
            )
            return Path(fetched)
        except ValueError:
            failures.append(f"{mirror}: altered or cut short")
        except OSError as error:  # requests' errors are OSErrors too, like a full disk
            failures.append(f"{mirror}: {type(error).__name__}")
    tried = "; ".join(failures)
    place = paths.relative(folder / file_name)
    if damaged:
        raise ValueError(
            f"{place} is damaged and no good copy could be downloaded ({tried}): delete it, or "
            "set FF_DATA_DIR to a folder that holds the file."
        )
    raise DataNotFoundError(
        f"{place} is missing and could not be downloaded ({tried}): connect to the network, set "
        "FF_DATA_DIR to a folder that holds the file, or choose dataset=digits."
    )


def read_idx(path: Path) -> np.ndarray:
    """Array in a gzipped IDX file of unsigned bytes; ValueError if it is cut short."""
    try:
        raw = gzip.decompress(path.read_bytes())
        dimensions = raw[3]
        shape = np.frombuffer(raw, ">u4", count=dimensions, offset=4)
        return np.frombuffer(raw, np.uint8, offset=4 + 4 * dimensions).reshape(shape).copy()
    except (OSError, EOFError, ValueError, IndexError) as error:
        raise ValueError(f"{path} is not a whole IDX file: delete it ({error}).") from error


def main() -> None:
    """Fetch MNIST and say where it is (`make data`)."""
    try:
        data = load("auto")
    except ValueError as error:
        sys.exit(f"error: {error}")
    print(
        f"{data.name}: {len(data.train_labels):,} training and {len(data.test_labels):,} test "
        f"images of {data.shape[0]}x{data.shape[1]}, sha256 {data.checksum[:12]}"
    )


if __name__ == "__main__":
    main()
