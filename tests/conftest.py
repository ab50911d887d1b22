import pytest

from ff_utils import datasets


@pytest.fixture(scope="session")
def data():
    """Real MNIST where it is at hand, else the built-in digits; never a download."""
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(datasets, "MIRRORS", {"mnist": (), "fashion_mnist": ()})
            return datasets.load("mnist")
    except datasets.DataNotFoundError:
        return datasets.load("digits")
