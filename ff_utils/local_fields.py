"""Local receptive fields: layers each of whose units sees a small field of the layer below.

No weights are shared, unlike in a convolution: Hinton, arXiv 2212.13345, sections 3.2 and 4.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import nn

from ff_utils import checks, pairs
from ff_utils.layers import FFLayer, goodness, normalise_
from ff_utils.networks import ForwardForward
from ff_utils.pairs import EPSILON

# Each layer's field, stride and units at a position. Hinton's for MNIST: grids of 4x4, 3x3, 2x2.
MNIST_FIELDS = ((10, 6, 128), (2, 1, 220), (2, 1, 512))
# His for CIFAR-10, where fields reach beyond the edges: grids of 32x32.
CIFAR_FIELDS = ((11, 1, 3),) * 3


class LocalFFLayer(FFLayer):
    """As `FFLayer`, but each unit sees some of the inputs: locally connected.

    fields: (positions, seen), the numbers of the inputs that the units at each position see;
        -1 is beyond the edge, where there is nothing to see; only if `padded`.
    channels: units at each position.
    Weights (positions, channels, seen); output (rows, positions * channels), position after
    position. A row's numbers lie apart in memory and a batch's side by side, so that a field is
    gathered in runs.
    local_goodness: each position has a goodness, a loss and a normalisation of its own.
    """

    def __init__(
        self,
        fields: torch.Tensor,
        inputs: int,
        channels: int,
        *,
        padded: bool = False,
        local_goodness: bool = False,
        **settings: object,
    ) -> None:
        positions, seen = fields.shape
        shape = (positions, channels, seen)
        super().__init__(inputs, positions * channels, weight_shape=shape, **settings)
        self.groups = positions if local_goodness else 1
        device = self.weight.device
        beyond = (fields < 0)[:, None].to(device) if padded else None
        fields = fields.clamp(min=0).flatten().to(device)
        self.register_buffer("fields", fields, persistent=False)
        self.register_buffer("beyond", beyond, persistent=False)
        if beyond is not None:
            self.weight.masked_fill_(beyond, 0)

    def forward(self, h: torch.Tensor) -> torch.Tensor:
        """(rows, inputs) -> (rows, outputs)."""
        return self._answer(self._gather(h))

    def _gather(self, h: torch.Tensor) -> torch.Tensor:
        """What each position sees: (rows, inputs) -> (positions, seen, rows)."""
        seen = h.t().index_select(0, self.fields)
        return seen.view(len(self.weight), -1, len(h))

    def _answer(self, seen: torch.Tensor) -> torch.Tensor:
        bias = self.bias.view(*self.weight.shape[:2], 1)
        y = torch.baddbmm(bias, self.weight, seen).relu_()
        return y.view(self.outputs, -1).t()

    def normalise_(self, y: torch.Tensor) -> torch.Tensor:
        """The divisor of each row (rows,), or with local goodness (positions, rows)."""
        if self.groups == 1:
            return normalise_(y, self.normalisation)
        return normalise_(self._grouped(y), self.normalisation)

    def _grouped(self, y: torch.Tensor) -> torch.Tensor:
        return y.t().view(self.groups, -1, len(y))

    def goodness_of(self, divisor: torch.Tensor) -> torch.Tensor:
        """Goodness (rows,), the mean over positions, of rows divided by `divisor`."""
        width = self.outputs // self.groups if self.normalisation == "length" else 1
        return divisor.sub_(EPSILON).square_().div_(width).view(self.groups, -1).mean(dim=0)

    def add_gradient(
        self,
        h: torch.Tensor,
        rows: tuple[int, int, int],
        dw: torch.Tensor,
        db: torch.Tensor,
        first: bool,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """As `FFLayer.add_gradient`, a product for every position; `h` is left as it is."""
        start, positives, count = rows
        seen = self._gather(h)
        y = self._answer(seen)
        here = min(max(positives - start, 0), len(h))
        units = self._grouped(y)
        width = self.groups * units.shape[1]
        g = goodness(units)
        value, slope = self.local_loss(g.t(), here, (positives, count - positives))
        row_scale = self.normalise_(y).view(self.groups, -1).mul_(slope.t()).mul_(2 / width)
        dz = (self._grouped(y) * row_scale[:, None]).view(*self.weight.shape[:2], -1)
        dw.baddbmm_(dz, seen.transpose(1, 2), beta=0.0 if first else 1.0)
        if self.beyond is not None:
            dw.masked_fill_(self.beyond, 0)
        if first:
            db.zero_()
        db.add_(dz.sum(dim=2).flatten())
        return y, value / self.groups


class LocalForwardForward(ForwardForward):
    """`ForwardForward` with local receptive fields, for images of `shape` (height, width) or
    (channels, height, width).

    fields: of each layer the width of its square fields, the stride from one to the next, and
        the units at each position. The first layer's lie on the image, any other's on the grid
        of positions below, all units of which they see.
    padded: fields reach half their width beyond the edges, where there is nothing.
    label: "joined" to what every position of the first layer sees, or "none".
    Everything else is as in `ForwardForward`.
    """

    def __init__(
        self,
        shape: Sequence[int],
        classes: int,
        fields: Sequence[Sequence[int]],
        *,
        label: str = "joined",
        padded: bool = False,
        local_goodness: bool = False,
        **settings: object,
    ) -> None:
        checks.one_of("label", label, ("joined", "none"))
        codes = classes if label == "joined" else 0
        _check(shape, fields)
        pixels = math.prod(shape)
        image = torch.arange(pixels).view(-1, *shape[-2:]).permute(1, 2, 0)
        self._plan, hidden = [], []
        grid, inputs, joined = image, pixels + codes, torch.arange(pixels, pixels + codes)
        for number, (field, stride, channels) in enumerate(fields, start=1):
            checks.number(f"the channels of layer {number}", channels, 1, whole=True)
            seen = windows(grid, field, stride, padded, f"layer {number}")
            high, wide, _ = seen.shape
            seen = torch.cat([seen.flatten(0, 1), joined.expand(high * wide, -1)], dim=1)
            choices = {"padded": padded, "local_goodness": local_goodness}
            make = partial(LocalFFLayer, seen, inputs, channels, **choices)
            self._plan.append((make, seen.numel() * channels))
            hidden.append(high * wide * channels)
            grid, joined = torch.arange(hidden[-1]).view(high, wide, channels), joined[:0]
            inputs = hidden[-1]
        super().__init__(pixels, classes, hidden, label=label, **settings)
        del self._plan
        self.settings |= {"shape": list(shape), "fields": [list(layer) for layer in fields]}
        self.settings |= choices

    def plan(self, inputs: int) -> list[tuple[Callable[..., FFLayer], int]]:
        """What makes each layer, and how many weights it has."""
        return self._plan

    def labelled(self, images: torch.Tensor) -> pairs.Written:
        """Images (N, pixels) as the first layer reads them, whatever their labels will be."""
        return pairs.Written(images, self.inputs)


def windows(grid: torch.Tensor, field: int, stride: int, padded: bool, where: str) -> torch.Tensor:
    """The numbers in every field on a grid of numbers (height, width, channels): (fields down,
    fields across, field * field * channels), -1 beyond the edges."""
    margin = field // 2 if padded else 0
    checks.number(f"the field of {where}", field, 1, min(grid.shape[:2]) + 2 * margin, whole=True)
    checks.number(f"the stride of {where}", stride, 1, whole=True)
    wide = nn.functional.pad(grid, (0, 0, *(margin,) * 4), value=-1)
    return wide.unfold(0, field, stride).unfold(1, field, stride).flatten(2)


def _check(shape: Sequence[int], fields: Sequence[Sequence[int]]) -> None:
    if len(shape) not in (2, 3):
        wanted = "(height, width) or (channels, height, width)"
        raise ValueError(f"shape is {tuple(shape)}; give {wanted}.")
    if not fields:
        raise ValueError(f"fields is {fields!r}; give field, stride and channels of every layer.")
    for number, layer in enumerate(fields):
        if len(layer) != 3:
            raise ValueError(f"fields[{number}] is {layer!r}; give field, stride and channels.")
