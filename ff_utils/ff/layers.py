"""The Forward-Forward layer: Hinton, "The Forward-Forward Algorithm", arXiv 2212.13345, section 2.

A layer sees positive rows (real data) and negative rows (wrong data). It learns to have goodness,
the mean of its squared activations, above a threshold on positive rows and below it on negative
ones. Its output is normalised, so that the next layer cannot read the goodness off the length.
The gradient is written out (`FFLayer.step`): no autograd, no graph, nothing stored.
"""

import math
from collections.abc import Iterable, Iterator
from itertools import islice
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import nn
from torch.nn.functional import cross_entropy, softplus
from torch.optim.adam import adam

from ff_utils.config import LayerConfig
from ff_utils.optimizers import ADAM, moments_8bit, update_8bit
from ff_utils.utils import allocation_category, check_number

if TYPE_CHECKING:
    from ff_utils.ff.negatives import FactoredInput

# As losses vanish, gradients and Adam's moments come so near to zero that a CPU's arithmetic slows
# down several times. With this, such numbers (below 1e-38) are zero, in threads started later too.
torch.set_flush_denormal(True)
EPSILON = 1e-8  # keeps a row of zeros from being divided by zero


def goodness(y: torch.Tensor) -> torch.Tensor:
    """Mean of the squared activations of each row: (rows, width) -> (rows,)."""
    return torch.linalg.vector_norm(y, dim=1).square_().div_(y.shape[1])


def normalise_(y: torch.Tensor, kind: str) -> torch.Tensor:
    """Normalise each row of `y` (rows, width) in place; returns the divisor of each row (rows,).

    kind: "length" divides by the Euclidean norm (the original package); "mean_square" by the root
        mean square (Hinton), so that each activation stays near 1 however wide the layer is.
    """
    divisor = torch.linalg.vector_norm(y, dim=1)
    if kind == "mean_square":
        divisor.div_(math.sqrt(y.shape[1]))
    divisor.add_(EPSILON)
    y.div_(divisor[:, None])
    return divisor


# The losses. A layer asks "is this row positive?" and answers p = sigmoid(x), where
# x = sharpness * (goodness - threshold). A loss takes the x of rows whose true answer has a sign,
# +1 for positive rows and -1 for negative ones. It returns its value and its derivative in x.
Two = tuple[torch.Tensor, torch.Tensor]


def softplus_loss(x: torch.Tensor, sign: float) -> Two:
    """-log p for positive rows, -log(1 - p) for negative ones: section 2, equation 1; the
    original's `alternative_loss_fn`."""
    return softplus(-sign * x), -sign * torch.sigmoid(-sign * x)


def probabilistic_loss(x: torch.Tensor, sign: float) -> Two:
    """-log p for positive rows, +log p for negative ones: the original's `probabilistic_loss_fn`.

    Its gradient on negative rows vanishes where it should be largest: far above the threshold.
    """
    p = torch.sigmoid(x)
    return -sign * torch.log(p + 1e-6), -sign * p * (1 - p) / (p + 1e-6)


def linear_loss(x: torch.Tensor, sign: float) -> Two:
    """-x for positive rows, x for negative ones: the original's `loss_fn`, unbounded below."""
    return -sign * x, torch.full_like(x, -sign)


def pairwise_loss(x: torch.Tensor, positives: int) -> Two:
    """-log p(the positive row of a pair has more goodness): value (pairs,), derivative (rows,).

    The first `positives` rows are positive, and as many negative ones follow in the same order.
    The threshold cancels out, and so does what is easy or hard about an image. SymBa (Lee and
    Song, arXiv 2303.08418, section 3).
    """
    difference = x[:positives] - x[positives:]
    slope = -torch.sigmoid(-difference)
    return softplus(-difference), torch.cat([slope, -slope])


LOSS_FUNCTIONS = {"softplus": softplus_loss, "probabilistic": probabilistic_loss}
LOSS_FUNCTIONS |= {"linear": linear_loss, "pairwise": pairwise_loss}


class Part(NamedTuple):
    """Some rows of a batch: which, and how many of them are positive, which come first.

    counts: all positive and all negative rows of the batch: the loss is a mean over each.
    """

    rows: slice | torch.Tensor
    positives: int
    counts: tuple[int, int]
    first: bool


def split_batch(
    rows: int, positives: int, micro_batches: int = 1, pairs: bool = False
) -> list[Part]:
    """The parts of a batch of `rows` rows, the first `positives` of them positive.

    pairs: a part has the positive and the negative rows of some pairs, for a loss that compares
        them. Their rows are not side by side in memory: a part is a copy. ValueError for a batch
        that is not half positive.
    """
    if pairs and rows != 2 * positives:
        raise ValueError("loss 'pairwise' needs a negative row for each positive one.")
    counts, parts, size = (positives, rows - positives), [], -(-rows // micro_batches)
    if pairs and micro_batches > 1:
        chosen = torch.arange(positives).chunk(micro_batches)
        return [Part(torch.cat([p, p + positives]), len(p), counts, p is chosen[0]) for p in chosen]
    for start in range(0, rows, size):
        stop = min(start + size, rows)
        here = min(max(positives - start, 0), stop - start)
        parts.append(Part(slice(start, stop), here, counts, start == 0))
    return parts


class FFLayer(nn.Module):
    """Linear and ReLU, trained by its own goodness.

    Shapes: input (rows, in_features), normalised; output (rows, out_features), not normalised.
    weight_shape: the weight's shape where it is not (out_features, in_features).
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        config: LayerConfig = LayerConfig(),
        *,
        generator: torch.Generator | None = None,
        device: str | torch.device = "cpu",
        dtype: torch.dtype = torch.float32,
        weight_shape: tuple[int, ...] | None = None,
    ) -> None:
        super().__init__()
        self.in_features, self.out_features, self.config = in_features, out_features, config
        self.loss = LOSS_FUNCTIONS[config.loss]
        # PyTorch's own start for a linear layer: uniform within 1 / sqrt(inputs of a unit). Drawn
        # on the CPU, so that a seed means the same weights on every device.
        weight = torch.empty(weight_shape or (out_features, in_features), dtype=dtype)
        bound = 1 / math.sqrt(weight.shape[-1])
        weight.uniform_(-bound, bound, generator=generator)
        bias = torch.empty(out_features, dtype=dtype).uniform_(-bound, bound, generator=generator)
        self.weight = nn.Parameter(weight.to(device), requires_grad=False)
        self.bias = nn.Parameter(bias.to(device), requires_grad=False)
        self.optimizer = OPTIMIZERS[config.optimizer](self, config.weight_decay)

    def forward(self, h: "torch.Tensor | FactoredInput") -> torch.Tensor:
        """y = relu(h W^T + b): (rows, in_features) -> (rows, out_features)."""
        if isinstance(h, torch.Tensor):
            return torch.addmm(self.bias, h, self.weight.t()).relu_()
        return h.linear(self.weight, self.bias).relu_()

    def normalise_(self, y: torch.Tensor) -> torch.Tensor:
        """Normalise the output in place, as this layer does; the divisor of each row (rows,)."""
        return normalise_(y, self.config.normalisation)

    def goodness_of(self, divisor: torch.Tensor) -> torch.Tensor:
        """Goodness (rows,) of rows that were divided by `divisor`, which is overwritten."""
        # The divisor is the root of the goodness, times that of the width for unit length.
        width = self.out_features if self.config.normalisation == "length" else 1
        return divisor.sub_(EPSILON).square_().div_(width)

    def local_loss(self, g: torch.Tensor, part: Part) -> Two:
        """Loss () of the goodness (rows,) of a part of a batch; its derivative in g (rows,)."""
        (positive, negative), sharpness = part.counts, self.config.sharpness
        if self.loss is pairwise_loss:
            value, slope = pairwise_loss(g * sharpness, part.positives)
            return value.sum() / positive, slope.mul_(sharpness / positive)
        x = (g - self.config.threshold).mul_(sharpness)
        value_positive, slope_positive = self.loss(x[: part.positives], 1.0)
        value_negative, slope_negative = self.loss(x[part.positives :], -1.0)
        slope = torch.cat([slope_positive / positive, slope_negative / negative])
        value = value_positive.sum() / positive + value_negative.sum() / negative
        return value, slope.mul_(sharpness)

    def step(
        self,
        h: "torch.Tensor | FactoredInput",
        positives: int,
        learning_rate: float,
        grad_buffer: torch.Tensor,
        micro_batches: int = 1,
    ) -> Two:
        """Train on one batch; returns the normalised output (rows, out_features) and the loss ().

        h: (rows, in_features), normalised, the first `positives` rows positive, the rest
           negative. OVERWRITTEN: its memory is used for the gradient. Or a `FactoredInput`.
        grad_buffer: scratch memory of at least as many elements as the weight, shared by layers.
        micro_batches: parts the rows are taken in. With more than one, the output takes the
            input's memory where the widths are equal: one activation, and a part of one (two parts
            with pairs).

        With g = mean_j y_j^2 and L = mean over positives + mean over negatives of the loss,
            dL/dz = (dL/dg) 2 y / out_features     (ReLU's derivative is 1 wherever y > 0)
            dW    = (dL/dz)^T h,   db = sum over rows of dL/dz.
        With n the normalised output and d its divisor, y = d n, so row i of dL/dz is n_i times
        the number s_i = (dL/dg_i) 2 d_i / out_features: scale the rows of h by s, then dW = n^T h.
        Nothing of a batch's size is made but y itself, which leaves as the next layer's input.
        """
        dw = grad_buffer[: self.weight.numel()].view_as(self.weight)
        db = torch.empty_like(self.bias)
        parts = split_batch(len(h), positives, micro_batches, self.loss is pairwise_loss)
        if micro_batches == 1:
            output, loss = self.add_gradient(h, parts[0], dw, db)
        else:
            same = self.out_features == self.in_features
            output, loss = h if same else h.new_empty(len(h), self.out_features), 0
            for part in parts:
                y, value = self.add_gradient(h[part.rows], part, dw, db)
                loss = loss + value
                output[part.rows] = y
                del y  # before the next part's is made
        self.optimizer.update([dw, db], learning_rate)
        return output, loss

    def add_gradient(
        self, h: "torch.Tensor | FactoredInput", part: Part, dw: torch.Tensor, db: torch.Tensor
    ) -> Two:
        """Add the gradient of a part of a batch to `dw` and `db`; the first part overwrites them.

        h: the part's rows, OVERWRITTEN; or a `FactoredInput`, which is a whole batch.
        Returns the rows' normalised output and their share of the loss.
        """
        beta = 0.0 if part.first else 1.0
        y = self(h)
        divisor = self.normalise_(y)
        g = self.goodness_of(divisor.clone())
        value, slope = self.local_loss(g, part)
        row_scale = divisor.mul_(slope).mul_(2 / y.shape[1])
        if isinstance(h, torch.Tensor):
            dw.addmm_(y.t(), h.mul_(row_scale[:, None]), beta=beta)
        else:
            h.write_gradient(y, row_scale, dw)
        db.addmv_(y.t(), row_scale, beta=beta)
        return y, value


class SoftmaxClassifier(nn.Module):
    """A linear softmax over the layers' normalised activations, trained analytically.

    It sends nothing back into the layers. From the neutral label's activations it predicts the
    class and says which wrong labels are hard (section 3.3). Activations are read at mean square
    1, whatever the layers' normalisation: logits = sum over layers of gain_l h_l A_l^T + a.
    They may come one at a time: none is kept. widths: of all layers; first: the first one read.
    """

    def __init__(
        self,
        widths: list[int],
        classes: int,
        config: LayerConfig = LayerConfig(),
        *,
        first: int = 1,
        **kind: object,
    ) -> None:
        super().__init__()
        check_number("first_read", first, 1, len(widths), whole=True)
        self.unread, self.widths = first - 1, widths[first - 1 :]
        unit_length = config.normalisation == "length"
        self.gains = [math.sqrt(w) if unit_length else 1.0 for w in self.widths]
        weight, bias = torch.zeros(classes, sum(self.widths), **kind), torch.zeros(classes, **kind)
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.bias = nn.Parameter(bias, requires_grad=False)
        self.optimizer = OPTIMIZERS[config.optimizer](self)
        self.register_buffer("confusion", torch.full((classes, classes), 1 / classes, **kind))

    def forward(self, activations: Iterable[torch.Tensor]) -> torch.Tensor:
        """Logits (rows, classes) of all layers' normalised activations, each (rows, width)."""
        logits = self.bias
        for h, gain, block in self._read(activations, self.weight):
            logits = torch.addmm(logits, h, block.t(), alpha=gain)
        return logits

    def step(
        self,
        activations: Iterable[torch.Tensor],
        logits: torch.Tensor,
        labels: torch.Tensor,
        learning_rate: float,
    ) -> torch.Tensor:
        """One step of cross-entropy on `logits` = self(activations); returns the loss ()."""
        loss = cross_entropy(logits, labels)
        error = logits.softmax(dim=1)
        error[torch.arange(len(labels), device=labels.device), labels] -= 1
        error /= len(labels)
        dw = torch.zeros_like(self.weight)
        for h, gain, block in self._read(activations, dw):
            block.addmm_(error.t(), h, alpha=gain)
        self.optimizer.update([dw, error.sum(dim=0)], learning_rate)
        return loss

    def update_confusion(self, logits: torch.Tensor, labels: torch.Tensor) -> None:
        """Keep a running mean of the probabilities given to images of each class: `confusion`
        (true class, predicted class)."""
        predicted = logits.softmax(dim=1)
        sums = torch.zeros_like(self.confusion).index_add_(0, labels, predicted)
        counts = sums.sum(dim=1, keepdim=True)  # each image's probabilities add up to one
        mean = torch.where(counts > 0, sums / counts, self.confusion)
        self.confusion.lerp_(mean, 0.1)

    def _read(
        self, activations: Iterable[torch.Tensor], weight: torch.Tensor
    ) -> Iterator[tuple[torch.Tensor, float, torch.Tensor]]:
        """Of every layer that is read: its activations, their gain, its columns of `weight`."""
        read = islice(activations, self.unread, None)
        return zip(read, self.gains, weight.split(self.widths, dim=1), strict=False)


class SGD:
    """Gradient descent on a module's `weight` and `bias`, without momentum.

    weight_decay: how much of a tensor each step takes away, as a share of the learning rate.
    """

    def __init__(self, module: nn.Module, weight_decay: float = 0.0) -> None:
        self.module, self.weight_decay = module, weight_decay

    def update(self, gradients: list[torch.Tensor], learning_rate: float) -> None:
        """One step along the gradients of weight and bias."""
        for p, gradient in zip((self.module.weight, self.module.bias), gradients, strict=True):
            if self.weight_decay:
                p.mul_(1 - learning_rate * self.weight_decay)
            p.add_(gradient, alpha=-learning_rate)


class Adam(SGD):
    """Adam on a module's `weight` and `bias`, its state in the module's buffers.

    Weight decay does not pass through the moments (AdamW: Loshchilov and Hutter, arXiv 1711.05101).
    """

    def __init__(self, module: nn.Module, weight_decay: float = 0.0) -> None:
        super().__init__(module, weight_decay)
        for name in ("weight", "bias"):
            tensor = getattr(module, name)
            module.register_buffer(f"{name}_first_moment", torch.zeros_like(tensor))
            module.register_buffer(f"{name}_second_moment", torch.zeros_like(tensor))
            module.register_buffer(f"{name}_steps", torch.zeros((), device=tensor.device))

    def before_update(self) -> None:
        """Called when the state is about to be used: an offloaded layer's is waited for here."""

    def update(self, gradients: list[torch.Tensor], learning_rate: float) -> None:
        """One step along the gradients of weight and bias."""
        self.before_update()
        parameters, first, second, steps = (
            [getattr(self.module, f"{name}{state}") for name in ("weight", "bias")]
            for state in ("", "_first_moment", "_second_moment", "_steps")
        )
        moving = {"lr": learning_rate, "weight_decay": self.weight_decay}
        adam(parameters, gradients, first, second, [], steps, **moving, **ADAM)


class Adam8bit(SGD):
    """`optimizers.Adam8bit` on a module's `weight` and `bias`, its state in buffers."""

    def __init__(self, module: nn.Module, weight_decay: float = 0.0) -> None:
        super().__init__(module, weight_decay)
        self.states = {}
        for name in ("weight", "bias"):
            state = moments_8bit(getattr(module, name))
            self.states[name] = {part: f"{name}_{part}" for part in state}
            for part, tensor in state.items():
                module.register_buffer(f"{name}_{part}", tensor)

    def update(self, gradients: list[torch.Tensor], learning_rate: float) -> None:
        """One step along the gradients of weight and bias."""
        with allocation_category("temporaries"):
            for (name, parts), gradient in zip(self.states.items(), gradients, strict=True):
                state = {part: getattr(self.module, buffer) for part, buffer in parts.items()}
                p = getattr(self.module, name)
                update_8bit(p, gradient, state, learning_rate, self.weight_decay)


OPTIMIZERS = {"adam": Adam, "adam_8bit": Adam8bit, "sgd": SGD}
