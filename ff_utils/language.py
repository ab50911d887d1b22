"""Characters as classes: the next-character task, its n-gram baseline, perplexity, samples.

Hinton, arXiv 2212.13345, section 3.4: 30 symbols, the next character from the ten before it;
negatives that end in the network's own guess, or that it wrote by itself (`pairs.Rollouts`).
"""

import hashlib
import math
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from itertools import product
from pathlib import Path

import pandas as pd
import torch
from torch import nn

from ff_utils import checks, networks, paths, training
from ff_utils.datasets import Dataset

SYMBOLS = "abcdefghijklmnopqrstuvwxyz ,;."
FABLES = paths.DATA / "fables.txt"
METHODS = ("hard", "rollout", "random", "backprop")
Guess = Callable[[torch.Tensor], torch.Tensor]  # windows (rows, window * 30) -> logits (rows, 30)


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


def validation_part(data: Dataset, part: float = 1 / 9) -> Dataset:
    """The last `part` of the training text in the test text's place; no window crosses into it.

    A random choice of windows would not do: nine of a window's characters are its neighbour's.
    """
    checks.number("part", part, 0, 0.5, above=True)
    size, window = round(part * len(data.train_labels)), data.shape[0]
    if not 0 < size < len(data.train_labels) - window:
        raise ValueError(
            f"{data.name} has {len(data.train_labels)} windows to train on: too few to hold "
            f"{part:.2g} of them out; give more text."
        )
    return replace(
        data,
        train_images=data.train_images[: -size - window],
        train_labels=data.train_labels[: -size - window],
        test_images=data.train_images[-size:],
        test_labels=data.train_labels[-size:],
    )


def text_of(images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Positions in SYMBOLS (length,) of the text that windows (N, window * 30) and labels cover."""
    first = images[0].reshape(-1, len(SYMBOLS)).argmax(1)
    return torch.cat([first, labels])


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


def score(guess: Guess, data: Dataset) -> dict[str, float]:
    """Perplexity and error of `guess` on `data`'s test text."""
    logits = torch.cat([guess(images) for images, _ in training.test_batches(data)])
    wrong = (logits.argmax(1) != data.test_labels).float().mean()
    return {"perplexity": perplexity(logits, data.test_labels), "error": float(wrong)}


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
    guess: Guess,
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


def diary(guess: Guess, data: Dataset, start: str) -> Callable[[], dict]:
    """A function to call after each epoch: perplexity on `data`'s test text, and forty characters
    that `guess` writes after `start`."""

    def write() -> dict:
        sample = generate(guess, start, 40, data.shape[0], device=data.test_images.device)
        return {"perplexity": score(guess, data)["perplexity"], "sample": sample}

    return write


def train(
    method: str,
    data: Dataset,
    hidden: list[int],
    *,
    choices: dict | None = None,
    seed: int = 0,
    start: str = "the fox said ",
    **course: object,
) -> tuple[Guess, pd.DataFrame]:
    """A network that has learned what comes next: its guess, and its history, a row an epoch,
    with perplexity and error on `data`'s test text and what it writes after `start`.

    method: "backprop", or the negatives that FF learns from: "hard", "rollout" or "random".
    choices: of `ForwardForward`; course: of `training.fit`.
    """
    checks.one_of("method", method, METHODS)
    given = {"seed": seed, "device": data.train_images.device}
    if method == "backprop":
        network = networks.backprop_network(data.pixels, data.classes, hidden, **given)
        guess = torch.no_grad()(network.forward)
        note = diary(guess, data, start)
        history = training.train_backprop(network, data, after_epoch=note, seed=seed, **course)
        return guess, history
    given |= {"label": "joined", **(choices or {})}
    network = networks.ForwardForward(data.pixels, data.classes, hidden, **given)
    history = training.train_forward_forward(
        network,
        data,
        negatives=method,
        after_epoch=diary(network.guess, data, start),
        seed=seed,
        **course,
    )
    return network.guess, history


def choose(
    method: str,
    data: Dataset,
    hidden: list[int],
    grid: dict[str, list],
    *,
    checkpoints: str = "",
    **settings: object,
) -> tuple[Guess, pd.DataFrame, pd.DataFrame]:
    """Train with every combination of a grid's values: guess and history of the network that ends
    with the lowest perplexity on `data`'s test text, which must be a validation part.

    grid: of settings of `train`, each with the values to try. settings: the others.
    checkpoints: a folder below the repository's in which each run saves itself and goes on; empty
        for none.
    The third thing returned is a table, a row a run: method, the grid's, perplexity, error.
    """
    best, rows = None, []
    for values in product(*grid.values()):
        name = "-".join(["language", method, *map(str, values)])
        place = paths.ROOT / checkpoints / f"{name}.pt" if checkpoints else None
        tried = dict(zip(grid, values, strict=True))
        guess, history = train(method, data, hidden, checkpoint=place, **tried, **settings)
        end = history.iloc[-1]
        rows.append({"method": method, **tried, "perplexity": end.perplexity, "error": end.error})
        if best is None or end.perplexity < best[1].perplexity.iloc[-1]:
            best = guess, history
    return *best, pd.DataFrame(rows)
