"""The Forward-Forward layer: goodness, local losses, and the analytic local step.

No autograd anywhere: a layer's gradient is two rows of algebra (see `FFLayer.step`), so no
graph is built and nothing is stored for later. Source: Hinton, arXiv 2212.13345, section 2.
"""

import math
from collections.abc import Iterable, Iterator
from itertools import islice

import torch
from torch import nn
from torch.optim.adam import adam

from ff_utils import checks
from ff_utils.pairs import EPSILON, Labelled

# As losses vanish, gradients and Adam's moments come so near to zero that a CPU's arithmetic slows
# down several times. Such numbers (below 1e-38) are zero here; every thread learns it at its start.
torch.set_flush_denormal(True)
NORMALISATIONS = ("length", "mean_square")
# The names the seed's package gives the same three losses.
SEED_LOSSES = {
    "alternative_loss_fn": "softplus",
    "probabilistic_loss_fn": "probabilistic",
    "loss_fn": "linear",
}


def goodness(y: torch.Tensor) -> torch.Tensor:
    """Mean of the squared activations of each row: (rows, width) -> (rows,)."""
    return torch.linalg.vector_norm(y, dim=1).square_().div_(y.shape[1])


def normalise_(y: torch.Tensor, kind: str) -> torch.Tensor:
    """Normalise each row of `y` (rows, width) in place; returns the divisor of each row (rows,).

    kind: "length" divides by the Euclidean norm (the seed); "mean_square" by the root mean
        square (Hinton), so that each activation stays near 1 however wide the layer.
    What is left is the direction alone: the next layer cannot read this one's verdict.
    """
    divisor = torch.linalg.vector_norm(y, dim=1)
    if kind == "mean_square":
        divisor.div_(math.sqrt(y.shape[1]))
    divisor.add_(EPSILON)
    y.div_(divisor[:, None])
    return divisor


def softplus_loss(x: torch.Tensor, positive: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """-log p(right), where p(positive) = sigmoid(x): value and derivative in x, both (rows,).

    The seed's `alternative_loss_fn`, here without its overflow; also what its probabilistic
    loss becomes once the term for negatives is -log(1 - p). Hinton, equation 3.
    """
    sign = -1.0 if positive else 1.0
    return nn.functional.softplus(sign * x), sign * torch.sigmoid(sign * x)


def probabilistic_loss(x: torch.Tensor, positive: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """The seed's `probabilistic_loss_fn` as it is: -log p for positives, +log p for negatives.

    Its gradient for negatives vanishes where it should be largest (goodness far above theta).
    """
    p = torch.sigmoid(x)
    sign = 1.0 if positive else -1.0
    return -sign * torch.log(p + 1e-6), -sign * p * (1 - p) / (p + 1e-6)


def linear_loss(x: torch.Tensor, positive: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """The seed's `loss_fn`, kept as it is: -x for positives, x for negatives; unbounded below."""
    sign = -1.0 if positive else 1.0
    return sign * x, torch.full_like(x, sign)


def pairwise_loss(g: torch.Tensor, positives: int) -> tuple[torch.Tensor, torch.Tensor]:
    """-log p(the positive of each pair has more goodness): value (pairs,), derivative (rows,).

    g: goodness, scaled; the first `positives` rows are positive, and as many negatives follow in
    the same order. Theta has no part in it: what is easy or hard about an image cancels out.
    SymBa (Lee and Song, arXiv 2303.08418, section 3).
    """
    difference = g[:positives] - g[positives:]
    slope = -torch.sigmoid(-difference)
    return nn.functional.softplus(-difference), torch.cat([slope, -slope])


LOSSES = {
    "softplus": softplus_loss,
    "probabilistic": probabilistic_loss,
    "linear": linear_loss,
}


def loss_function(name: str):
    """The loss called `name`, by our name or the seed's; ValueError for any other."""
    name = SEED_LOSSES.get(name, name)
    checks.one_of("loss", name, (*LOSSES, "pairwise"))
    return LOSSES.get(name, pairwise_loss)


class Adam:
    """Adam's state for some tensors and its update, fused: no temporary is made.

    The state lives in `module`'s buffers, so that it is saved, moved and counted with it.
    weight_decay: how much of a tensor each step takes away, as a share of the learning rate; it
        does not pass through Adam's moments (AdamW: Loshchilov and Hutter, arXiv 1711.05101).
    """

    def __init__(self, module: nn.Module, names: list[str], weight_decay: float = 0.0) -> None:
        self.module, self.names, self.weight_decay = module, names, weight_decay
        for name in names:
            tensor = getattr(module, name)
            module.register_buffer(f"{name}_first_moment", torch.zeros_like(tensor))
            module.register_buffer(f"{name}_second_moment", torch.zeros_like(tensor))
            module.register_buffer(f"{name}_steps", torch.zeros((), device=tensor.device))

    def before_update(self) -> None:
        """Called when the state is about to be used: streaming waits here for its arrival."""

    def update(self, gradients: list[torch.Tensor], learning_rate: float) -> None:
        """One step along `gradients`, given in the order of `names`."""
        self.before_update()
        get = self.module.get_buffer
        adam(
            [self.module.get_parameter(name) for name in self.names],
            gradients,
            [get(f"{name}_first_moment") for name in self.names],
            [get(f"{name}_second_moment") for name in self.names],
            [],
            [get(f"{name}_steps") for name in self.names],
            fused=True,
            amsgrad=False,
            beta1=0.9,
            beta2=0.999,
            lr=learning_rate,
            weight_decay=self.weight_decay,
            decoupled_weight_decay=True,
            eps=1e-8,
            maximize=False,
        )


class SGD:
    """Plain gradient descent on some tensors of `module`: no state. weight_decay: as in `Adam`."""

    def __init__(self, module: nn.Module, names: list[str], weight_decay: float = 0.0) -> None:
        self.module, self.names, self.weight_decay = module, names, weight_decay

    def update(self, gradients: list[torch.Tensor], learning_rate: float) -> None:
        """One step along `gradients`, given in the order of `names`."""
        for name, gradient in zip(self.names, gradients, strict=True):
            parameter = self.module.get_parameter(name)
            if self.weight_decay:
                parameter.mul_(1 - learning_rate * self.weight_decay)
            parameter.add_(gradient, alpha=-learning_rate)


OPTIMIZERS = {"adam": Adam, "sgd": SGD}


class FFLayer(nn.Module):
    """Linear and ReLU, trained by its own goodness.

    The layer asks "is this sample real?" with logit x = scale * (goodness - theta).
    Shapes: input (rows, inputs), normalised; output (rows, outputs), not normalised.
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        *,
        normalisation: str = "mean_square",
        loss: str = "softplus",
        theta: float = 2.0,
        scale: float = 1.0,
        optimizer: str = "adam",
        weight_decay: float = 0.0,
        generator: torch.Generator | None = None,
        device: str | torch.device = "cpu",
        dtype: torch.dtype = torch.float32,
        weight_shape: tuple[int, ...] | None = None,
    ) -> None:
        super().__init__()
        checks.one_of("normalisation", normalisation, NORMALISATIONS)
        checks.number("theta", theta, 0, above=True)
        checks.number("scale", scale, 0, above=True)
        checks.one_of("optimizer", optimizer, OPTIMIZERS)
        checks.number("weight_decay", weight_decay, 0, 1)
        self.normalisation, self.theta, self.scale = normalisation, theta, scale
        self.loss = loss_function(loss)
        self.pairwise = self.loss is pairwise_loss
        # PyTorch's own start for a linear layer: uniform within 1 / sqrt(inputs of a unit). Drawn
        # on the CPU, so that a seed means the same weights on every device.
        self.outputs, self.inputs = outputs, inputs
        weight = torch.empty(weight_shape or (outputs, inputs), dtype=dtype)
        bound = 1 / math.sqrt(weight.shape[-1])
        weight.uniform_(-bound, bound, generator=generator)
        bias = torch.empty(outputs, dtype=dtype).uniform_(-bound, bound, generator=generator)
        self.weight = nn.Parameter(weight.to(device), requires_grad=False)
        self.bias = nn.Parameter(bias.to(device), requires_grad=False)
        self.optimizer = OPTIMIZERS[optimizer](self, ["weight", "bias"], weight_decay)

    def forward(self, h: torch.Tensor | Labelled) -> torch.Tensor:
        """y = relu(h W^T + b): (rows, inputs) -> (rows, outputs)."""
        if isinstance(h, Labelled):
            return h.times(self.weight, self.bias).relu_()
        return torch.addmm(self.bias, h, self.weight.t()).relu_()

    def normalise_(self, y: torch.Tensor) -> torch.Tensor:
        """`normalise_` as this layer has it: the divisor of each row (rows,)."""
        return normalise_(y, self.normalisation)

    def goodness_of(self, divisor: torch.Tensor) -> torch.Tensor:
        """Goodness (rows,) of rows that were divided by `divisor`, which is overwritten."""
        # The divisor is the root of the goodness, times that of the width for unit length.
        width = self.outputs if self.normalisation == "length" else 1
        return divisor.sub_(EPSILON).square_().div_(width)

    def step(
        self,
        h: torch.Tensor | Labelled,
        positives: int,
        learning_rate: float,
        gradient: torch.Tensor,
        micro_batches: int = 1,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Train on one batch; returns the normalised output (rows, outputs) and the loss ().

        h: (rows, inputs), normalised, the first `positives` rows positive, the rest negative.
           OVERWRITTEN: its memory is used for the gradient's sake. Or `Labelled` rows, whole.
        gradient: scratch memory of at least outputs * inputs elements, shared by all layers.
        micro_batches: parts the rows are taken in. With more than one, the output takes the
            input's memory where the widths are equal: one activation, and a part of one.

        With g = mean_j y_j^2 and L = mean over positives + mean over negatives of the loss,
            dL/dz = (dL/dg) 2 y / outputs     (ReLU's derivative is 1 wherever y > 0)
            dW    = (dL/dz)^T h,   db = sum over rows of dL/dz.
        With n the normalised output and d its divisor, y = d n, so row i of dL/dz is n_i times
        the number s_i = (dL/dg_i) 2 d_i / outputs: scale the rows of h by s, then dW = n^T h.
        Nothing of a batch's size is made but y itself, which leaves as the next layer's input.
        """
        dw, db = gradient[: self.weight.numel()].view_as(self.weight), torch.empty_like(self.bias)
        if micro_batches == 1:
            output, loss = self.add_gradient(h, (0, positives, len(h)), dw, db, first=True)
            self.optimizer.update([dw, db], learning_rate)
            return output, loss
        output = h if self.outputs == self.inputs else h.new_empty(len(h), self.outputs)
        loss = 0
        starts = range(0, len(h), -(-len(h) // micro_batches))
        for start in starts:
            part = h[start : start + starts.step]
            rows = (start, positives, len(h))
            y, value = self.add_gradient(part, rows, dw, db, first=start == 0)
            loss = loss + value
            output[start : start + len(part)] = y
            del y  # before the next part's is made
        self.optimizer.update([dw, db], learning_rate)
        return output, loss

    def add_gradient(
        self,
        h: torch.Tensor | Labelled,
        rows: tuple[int, int, int],
        dw: torch.Tensor,
        db: torch.Tensor,
        first: bool,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Add the gradient of some of a batch's rows to `dw` and `db` (or, if `first`, put it
        there); returns their normalised output and their share of the loss.

        h: OVERWRITTEN, or `Labelled` rows, of which there is no second part.
        rows: the batch's row that h begins with, its positive rows, all its rows.
        """
        start, positives, count = rows
        y = self(h)
        here = min(max(positives - start, 0), len(h))
        divisor = self.normalise_(y)
        g = self.goodness_of(divisor.clone())
        value, slope = self.local_loss(g, here, (positives, count - positives))
        row_scale = divisor.mul_(slope).mul_(2 / y.shape[1])
        if isinstance(h, Labelled):
            h.write_gradient(y, row_scale, dw)
        else:
            dw.addmm_(y.t(), h.mul_(row_scale[:, None]), beta=0.0 if first else 1.0)
        db.addmv_(y.t(), row_scale, beta=0.0 if first else 1.0)
        return y, value

    def local_loss(
        self, g: torch.Tensor, positives: int, counts: tuple[int, int]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Loss () of goodness (rows,) and its derivative in each row's goodness (rows,).

        The first `positives` rows are positive; `counts` positive and negative rows make the
        batch that these rows are of. ValueError where a pairwise loss is given a part of them.
        """
        if self.pairwise:
            if len(g) != 2 * positives or positives != counts[0]:
                raise ValueError("loss 'pairwise' needs whole batches, half of them positive.")
            value, slope = self.loss(g.mul(self.scale), positives)
            return value.sum() / positives, slope.mul_(self.scale / positives)
        x = (g - self.theta).mul_(self.scale)
        value_positive, slope_positive = self.loss(x[:positives], True)
        value_negative, slope_negative = self.loss(x[positives:], False)
        slope = torch.cat([slope_positive / counts[0], slope_negative / counts[1]])
        value = value_positive.sum() / counts[0] + value_negative.sum() / counts[1]
        return value, slope.mul_(self.scale)


class LocalSoftmax(nn.Module):
    """A linear softmax over the normalised activations of the layers, trained analytically.

    It sends nothing back into the layers. Its guess on a neutral label predicts the class and
    draws hard negatives (Hinton, section 3.3). Activations are read at mean square 1, whatever
    the layers' normalisation: logits = sum over layers of gain_l h_l A_l^T + a.
    first: the first layer that it reads, from 1.
    """

    def __init__(
        self,
        widths: list[int],
        classes: int,
        normalisation: str = "mean_square",
        optimizer: str = "adam",
        device: str | torch.device = "cpu",
        dtype: torch.dtype = torch.float32,
        first: int = 1,
    ) -> None:
        super().__init__()
        checks.number("first_read", first, 1, len(widths), whole=True)
        self.unread, widths = first - 1, widths[first - 1 :]
        self.widths = widths
        self.gains = [math.sqrt(w) if normalisation == "length" else 1.0 for w in widths]
        kind = {"device": device, "dtype": dtype}
        self.weight = nn.Parameter(torch.zeros(classes, sum(widths), **kind), requires_grad=False)
        self.bias = nn.Parameter(torch.zeros(classes, **kind), requires_grad=False)
        self.optimizer = OPTIMIZERS[optimizer](self, ["weight", "bias"])
        self.register_buffer("confusion", torch.full((classes, classes), 1 / classes, **kind))

    def forward(self, activations: Iterable[torch.Tensor]) -> torch.Tensor:
        """Activations of the first layers, each (rows, width), normalised -> (rows, classes).

        They may come one at a time: none is kept.
        """
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
        loss = nn.functional.cross_entropy(logits, labels)
        error = logits.softmax(dim=1)
        error[torch.arange(len(labels), device=labels.device), labels] -= 1
        error /= len(labels)
        dw = torch.zeros_like(self.weight)
        for h, gain, block in self._read(activations, dw):
            block.addmm_(error.t(), h, alpha=gain)
        self.optimizer.update([dw, error.sum(dim=0)], learning_rate)
        return loss

    def _read(
        self, activations: Iterable[torch.Tensor], weight: torch.Tensor
    ) -> Iterator[tuple[torch.Tensor, float, torch.Tensor]]:
        """Of every layer that is read: its activations, their gain, its part of `weight`."""
        read = islice(activations, self.unread, None)
        return zip(read, self.gains, weight.split(self.widths, dim=1), strict=False)

    def note_guess(self, logits: torch.Tensor, labels: torch.Tensor) -> None:
        """Keep what is guessed for each true class, as a running mean: `confusion` (true, said)."""
        guesses = logits.softmax(dim=1)
        sums = torch.zeros_like(self.confusion).index_add_(0, labels, guesses)
        counts = sums.sum(dim=1, keepdim=True)  # each guess adds up to one
        mean = torch.where(counts > 0, sums / counts, self.confusion)
        self.confusion.lerp_(mean, 0.1)
