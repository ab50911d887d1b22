"""Characters as classes: the next-character task, its n-gram baseline, perplexity, samples.

Hinton, arXiv 2212.13345, section 3.4: 30 symbols, the next character from the ten before it.
"""

import hashlib
import math
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from ff_utils import checks, paths
from ff_utils.datasets import Dataset

SYMBOLS = "abcdefghijklmnopqrstuvwxyz ,;."
FABLES = paths.DATA / "fables.txt"


def clean(text: str) -> str:
    """Lower-case text in the 30 symbols; every run of other marks becomes one space.

    Question and exclamation marks end sentences like full stops, colons pause like semicolons,
    and apostrophes vanish inside words. Line ends are spaces, so that no two words merge.
    """
    text = text.lower().replace("'", "").replace(":", ";")
    text = re.sub(r"[?!]", ".", text)
    return re.sub("[^a-z,;.]+", " ", text).strip()


def load_text(path: str = "", window: int = 10, held_out: float = 0.1) -> Dataset:
    """Windows of `window` characters, one-hot (N, window * 30), and the character after each.

    path: a UTF-8 text file; empty for the built-in fables. Its last `held_out` part is the
        test set. Raises ValueError for a missing or unreadable file or a text too short.
    """
    checks.number("window", window, 1, 100, whole=True)
    checks.number("held_out", held_out, 0, 0.5, above=True)
    source = Path(path) if path else FABLES
    try:
        text = clean(source.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"text is {path!r}, which cannot be read as UTF-8: {error}.") from error
    if len(text) < 100 * window:
        raise ValueError(
            f"text is {path!r}, with {len(text)} of the 30 symbols; give at least {100 * window}."
        )
    codes = encode(text)
    split = round(len(codes) * (1 - held_out))
    train, test = codes[:split], codes[split:]
    return Dataset(
        name=source.stem,
        shape=(window, len(SYMBOLS)),
        classes=len(SYMBOLS),
        train_images=windows(train, window),
        train_labels=train[window:],
        test_images=windows(test, window),
        test_labels=test[window:],
        checksum=hashlib.sha256(text.encode()).hexdigest(),
    )


def encode(text: str) -> torch.Tensor:
    """Positions in SYMBOLS (length,) of a clean text."""
    return torch.tensor([SYMBOLS.index(character) for character in text])


def decode(codes: torch.Tensor) -> str:
    """The text of positions in SYMBOLS (length,)."""
    return "".join(SYMBOLS[code] for code in codes.tolist())


def windows(codes: torch.Tensor, window: int) -> torch.Tensor:
    """Every window that has a next character, one-hot: (length - window, window * 30)."""
    stacked = codes.unfold(0, window, 1)[:-1]
    return nn.functional.one_hot(stacked, len(SYMBOLS)).flatten(1).float()


def perplexity(logits: torch.Tensor, labels: torch.Tensor) -> float:
    """exp of the mean cross-entropy of the true next characters: 30 is a blind guess."""
    return math.exp(float(nn.functional.cross_entropy(logits, labels)))


class NGram:
    """Interpolated n-gram model of characters (Witten-Bell smoothing), orders 1 to `order`.

    p(c | context) = (count(context, c) + kinds(context) p(c | shorter context))
                     / (count(context) + kinds(context)),
    where kinds counts the different characters seen after the context; below order 1, 1/30.
    """

    def __init__(self, codes: torch.Tensor, order: int) -> None:
        checks.number("order", order, 1, 20, whole=True)
        self.order = order
        text = decode(codes)
        self.followers: dict[str, Counter] = {}
        for length in range(order):
            for end in range(length, len(text)):
                context = text[end - length : end]
                self.followers.setdefault(context, Counter())[text[end]] += 1

    def probabilities(self, context: str) -> list[float]:
        """Probability of each symbol after `context`, of which the last order - 1 count."""
        found = [1 / len(SYMBOLS)] * len(SYMBOLS)
        for length in range(min(self.order, len(context) + 1)):
            counts = self.followers.get(context[len(context) - length :])
            if counts is None:
                break
            kinds, total = len(counts), sum(counts.values())
            found = [
                (counts[symbol] + kinds * below) / (total + kinds)
                for symbol, below in zip(SYMBOLS, found, strict=True)
            ]
        return found

    def logits(self, codes: torch.Tensor, window: int) -> torch.Tensor:
        """Log probabilities (length - window, 30) of each character after the first `window`."""
        text = decode(codes)
        rows = [self.probabilities(text[:end][-window:]) for end in range(window, len(text))]
        return torch.tensor(rows).log()


def generate(
    guess: Callable[[torch.Tensor], torch.Tensor],
    start: str,
    length: int,
    window: int,
    seed: int = 0,
    device: str | torch.device = "cpu",
) -> str:
    """`length` characters after `start`, drawn one by one from guess((1, window * 30)) logits."""
    generator = torch.Generator().manual_seed(seed)
    codes = encode(start.rjust(window))
    for _ in range(length):
        row = nn.functional.one_hot(codes[-window:], len(SYMBOLS)).flatten()[None].float()
        drawn = torch.multinomial(guess(row.to(device)).softmax(1)[0].cpu(), 1, generator=generator)
        codes = torch.cat([codes, drawn])
    return decode(codes[-length:])


def diary(
    guess: Callable[[torch.Tensor], torch.Tensor], data: Dataset, start: str
) -> Callable[[], dict]:
    """A function to call after each epoch: held-out perplexity, and forty characters that
    `guess` writes after `start`."""

    def write() -> dict:
        found = perplexity(guess(data.test_images), data.test_labels)
        sample = generate(guess, start, 40, data.shape[0], device=data.test_images.device)
        return {"perplexity": found, "sample": sample}

    return write
