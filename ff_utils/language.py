"""Characters as classes: the next of 30 symbols from the ten before it.

Hinton, arXiv 2212.13345, section 3.4. Negatives end in the network's own guess, or are what it
wrote by itself (`Rollouts`). Baselines: backprop and n-grams.
"""

import hashlib
import math
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pandas as pd
import torch
from sklearn.model_selection import ParameterGrid
from torch import nn

from ff_utils.backprop import Backprop, mlp
from ff_utils.config import FFConfig, TrainConfig
from ff_utils.data import Dataset, test_batches
from ff_utils.ff.network import ForwardForward
from ff_utils.training import fit
from ff_utils.utils import DATA, ROOT, check_choice, check_number, user_path

SYMBOLS = "abcdefghijklmnopqrstuvwxyz ,;."
FABLES = DATA / "fables.txt"
JOINED = FFConfig(label="joined")
METHODS = ("hard", "rollout", "random", "backprop")
# windows (rows, window * 30) -> logits (rows, 30)
Classify = Callable[[torch.Tensor], torch.Tensor]


def clean(text: str) -> str:
    """Lower-case text in the 30 symbols; every run of other marks, line ends too, is one space.

    Question and exclamation marks become full stops, colons semicolons; apostrophes vanish.
    """
    text = text.lower().replace("'", "").replace(":", ";")
    text = re.sub(r"[?!]", ".", text)
    return re.sub("[^a-z,;.]+", " ", text).strip()


def load_text(path: str = "", window: int = 10) -> Dataset:
    """Windows of `window` characters, one-hot (N, window * 30), and the character after each.

    path: a UTF-8 text file, whose last tenth is the test set; empty for the built-in fables.
        ValueError for one that cannot be read or is too short.
    """
    check_number("window", window, 1, 100, whole=True)
    source = user_path(path) if path else FABLES
    try:
        text = clean(source.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"text is {path!r}, which cannot be read as UTF-8: {error}.") from error
    if len(text) < 100 * window:
        raise ValueError(
            f"text is {path!r}, with {len(text)} of the 30 symbols; give at least {100 * window}."
        )
    codes = encode(text)
    split = round(len(codes) * 0.9)
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


def validation_part(data: Dataset) -> Dataset:
    """The last ninth of the training text in the test text's place; no window crosses into it.

    A random choice of windows would not do: nine of a window's characters are its neighbour's.
    """
    count, window = len(data.train_labels), data.shape[0]
    size = round(count / 9)
    if not 0 < size < count - window:
        raise ValueError(f"{data.name} has {count} windows to train on: too few; give more text.")
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


def score(classify: Classify, data: Dataset) -> dict[str, float]:
    """Perplexity and error of `classify` on `data`'s test text."""
    logits = torch.cat([classify(images) for images, _ in test_batches(data)])
    wrong = (logits.argmax(1) != data.test_labels).float().mean()
    return {"perplexity": perplexity(logits, data.test_labels), "error": float(wrong)}


class NGram:
    """Interpolated n-gram model of characters (Witten-Bell smoothing), orders 1 to `order`.

    p(c | context) = (count(context, c) + kinds(context) p(c | shorter context))
                     / (count(context) + kinds(context)),
    where kinds counts the different characters seen after the context; below order 1, 1/30.
    """

    def __init__(self, codes: torch.Tensor, order: int) -> None:
        check_number("order", order, 1, 20, whole=True)
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
            pairs = zip(SYMBOLS, found, strict=True)
            found = [(counts[symbol] + kinds * p) / (total + kinds) for symbol, p in pairs]
        return found

    def logits(self, codes: torch.Tensor, window: int) -> torch.Tensor:
        """Log probabilities (length - window, 30) of each character after the first `window`."""
        text = decode(codes)
        rows = [self.probabilities(text[:end][-window:]) for end in range(window, len(text))]
        return torch.tensor(rows).log()


def generate(
    classify: Classify,
    start: str,
    length: int,
    window: int,
    seed: int = 0,
    device: str | torch.device = "cpu",
) -> str:
    """`length` characters after `start`, drawn one by one from the logits of `classify`."""
    generator = torch.Generator().manual_seed(seed)
    codes = encode(start.rjust(window))
    for _ in range(length):
        row = nn.functional.one_hot(codes[-window:], len(SYMBOLS)).flatten()[None].float()
        probabilities = classify(row.to(device)).softmax(1)[0].cpu()
        codes = torch.cat([codes, torch.multinomial(probabilities, 1, generator=generator)])
    return decode(codes[-length:])


def train(
    method: str,
    data: Dataset,
    hidden: list[int],
    train_config: TrainConfig,
    *,
    config: FFConfig = JOINED,
    start: str = "the fox said ",
    **options: object,
) -> tuple[Classify, pd.DataFrame]:
    """Train a network to predict the next character; returns its logits and its history.

    method: "backprop", or the negatives of FF: "hard", "rollout" or "random".
    config: of FF's network. Backprop's starts from the seed of `train_config`. options: `fit`'s.
    The history is `fit`'s, with the perplexity on `data`'s test text, and forty characters that
    the network writes after `start`.
    """
    check_choice("method", method, METHODS)
    sizes, device = (data.pixels, data.classes, hidden), data.train_images.device
    if method == "backprop":
        network = Backprop(mlp(*sizes, seed=train_config.seed, device=device))
        classify = torch.no_grad()(network.forward)
    else:
        network = ForwardForward(*sizes, config, device=device)
        train_config, classify = replace(train_config, negatives=method), network.classify

    def note() -> dict:
        sample = generate(classify, start, 40, data.shape[0], device=device)
        return {"perplexity": score(classify, data)["perplexity"], "sample": sample}

    return classify, fit(network, data, train_config, note=note, **options)


def choose(
    method: str,
    data: Dataset,
    hidden: list[int],
    grid: dict[str, list],
    train_config: TrainConfig,
    *,
    checkpoints: str = "",
    **settings: object,
) -> tuple[Classify, pd.DataFrame, pd.DataFrame]:
    """Train with every combination of a grid's values and keep the lowest final perplexity on
    `data`'s test text, which must be a validation part.

    grid: fields of `TrainConfig`, each with the values to try. settings: more of `train`'s.
    checkpoints: a folder below the repository's in which each run saves itself and goes on.
    Returns the best network's logits and history, and a row a run: method, the grid's fields,
    perplexity, error.
    """
    best, rows = None, []
    for tried in ParameterGrid(grid):
        values = {name: tried[name] for name in grid}
        name = "-".join(["language", method, *map(str, values.values())])
        place = ROOT / Path(checkpoints).expanduser() / f"{name}.pt" if checkpoints else None
        run_config = replace(train_config, **values)
        classify, history = train(method, data, hidden, run_config, checkpoint=place, **settings)
        end = history.iloc[-1]
        rows.append({"method": method, **values, "perplexity": end.perplexity, "error": end.error})
        if best is None or end.perplexity < best[1].perplexity.iloc[-1]:
            best = classify, history
    return *best, pd.DataFrame(rows)
