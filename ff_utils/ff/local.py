"""Local receptive fields: layers each of whose units sees a small field of the layer below.

No weights are shared, unlike in a convolution: Hinton, arXiv 2212.13345, sections 3.2 and 4.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch
from torch import nn

from ff_utils.config import LocalConfig
from ff_utils.ff.layers import EPSILON, FFLayer, Part, goodness, normalise_
from ff_utils.ff.negatives import DenseInput
from ff_utils.ff.network import ForwardForward
from ff_utils.utils import check_choice, check_number

SHARED_GAIN = 4  # times less that is copied, from which on a row of positions shares a copy


class Fields(nn.Module):
    """Which inputs the units at each position of a grid see, and products with these inputs.

    grid: (height, width, units) numbers of the inputs; label: (classes,) numbers that every
    position sees too. field, stride, padded: as in `LocalForwardForward`.
    shape: positions and inputs seen by each; beyond: (positions, 1, inputs seen), which of them lie
    beyond the edge, or None where nothing is padded. Where the fields of a row of positions
    overlap much, all of them read one copy of what the row sees: a larger product, most of whose
    weights are zero, is faster than a copy for each position.
    """

    def __init__(
        self,
        grid: torch.Tensor,
        label: torch.Tensor,
        field: int,
        stride: int,
        *,
        padded: bool,
    ) -> None:
        super().__init__()
        margin = field // 2 if padded else 0
        rows = nn.functional.pad(grid, (0, 0, *(margin,) * 4), value=-1).unfold(0, field, stride)
        seen = rows.unfold(1, field, stride).flatten(2)
        self.high, self.wide = seen.shape[:2]
        seen = torch.cat([seen, label.expand(self.high, self.wide, -1)], dim=2).flatten(0, 1)
        shared = torch.cat([rows.flatten(1), label.expand(self.high, -1)], dim=1)
        numbers = torch.arange(shared.shape[1])
        places = numbers[: len(numbers) - len(label)].view(rows.shape[1:])
        places = places.unfold(0, field, stride).flatten(1)
        own_label = numbers[len(numbers) - len(label) :].expand(self.wide, -1)
        places = torch.cat([places, own_label], dim=1)[:, None]
        self.shape = tuple(seen.shape)
        self.overlap = SHARED_GAIN * shared.shape[1] <= self.wide * seen.shape[1]
        self.groups = self.high if self.overlap else len(seen)
        read = (shared if self.overlap else seen).clamp(min=0).flatten()
        beyond = (seen < 0)[:, None] if padded else None
        self.register_buffer("read", read, persistent=False)
        self.register_buffer("beyond", beyond, persistent=False)
        self.register_buffer("places", places if self.overlap else None, persistent=False)

    def inputs(self, h: torch.Tensor) -> torch.Tensor:
        """What each group of positions reads: (rows, in_features) -> (groups, read, rows)."""
        return h.t().index_select(0, self.read).view(self.groups, -1, len(h))

    def product(
        self, weight: torch.Tensor, bias: torch.Tensor, inputs: torch.Tensor
    ) -> torch.Tensor:
        """weight (positions, channels, seen), bias (out_features,) -> (out_features, rows)."""
        if self.overlap:
            zeros = weight.new_zeros(*self._by_row(weight).shape[:3], inputs.shape[1])
            weight = zeros.scatter(3, self._index(weight), self._by_row(weight))
        weight = weight.reshape(self.groups, -1, inputs.shape[1])
        y = torch.baddbmm(bias.view(self.groups, -1, 1), weight, inputs)
        return y.view(-1, inputs.shape[2])

    def add_gradient(
        self, dw: torch.Tensor, dz: torch.Tensor, inputs: torch.Tensor, beta: float
    ) -> None:
        """dw (positions, channels, seen) times `beta`, plus the gradient from dz (out_features,
        rows)."""
        dz = dz.view(self.groups, -1, dz.shape[1])
        if self.overlap:
            whole = torch.bmm(dz, inputs.transpose(1, 2))
            whole = whole.view(*self._by_row(dw).shape[:3], -1)
            dw.mul_(beta) if beta else dw.zero_()
            self._by_row(dw).add_(whole.gather(3, self._index(dw)))
        else:
            dw.baddbmm_(dz, inputs.transpose(1, 2), beta=beta)

    def _by_row(self, weight: torch.Tensor) -> torch.Tensor:
        return weight.view(self.high, self.wide, *weight.shape[1:])

    def _index(self, weight: torch.Tensor) -> torch.Tensor:
        return self.places.expand(self.high, -1, weight.shape[1], -1)


class LocalFFLayer(FFLayer):
    """As `FFLayer`, but each unit sees some of the inputs: locally connected.

    channels: units at each position of `fields`.
    Weights (positions, channels, seen); output (rows, positions * channels), position after
    position. A batch's numbers lie side by side in memory, so that a field is read in runs.
    """

    def __init__(
        self,
        fields: Fields,
        in_features: int,
        channels: int,
        config: LocalConfig = LocalConfig(),
        **kind: object,
    ) -> None:
        positions, seen = fields.shape
        shape = (positions, channels, seen)
        super().__init__(in_features, positions * channels, config, weight_shape=shape, **kind)
        self.groups = positions if config.local_goodness else 1
        self.fields = fields.to(self.weight.device)
        if self.fields.beyond is not None:
            self.weight.masked_fill_(self.fields.beyond, 0)

    def forward(self, h: torch.Tensor) -> torch.Tensor:
        """(rows, in_features) -> (rows, out_features)."""
        return self._output(self.fields.inputs(h))

    def normalise_(self, y: torch.Tensor) -> torch.Tensor:
        """Normalise in place; the divisor of each row (rows,), or with local goodness (positions,
        rows)."""
        return normalise_(y if self.groups == 1 else self._grouped(y), self.config.normalisation)

    def goodness_of(self, divisor: torch.Tensor) -> torch.Tensor:
        """Goodness (rows,), the mean over positions, of rows divided by `divisor`."""
        width = self.out_features // self.groups if self.config.normalisation == "length" else 1
        return divisor.sub_(EPSILON).square_().div_(width).view(self.groups, -1).mean(dim=0)

    def add_gradient(
        self, h: torch.Tensor, part: Part, dw: torch.Tensor, db: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """As `FFLayer.add_gradient`, a product for every position; `h` is left as it is."""
        inputs = self.fields.inputs(h)
        y = self._output(inputs)
        units = self._grouped(y)
        width = self.groups * units.shape[1]
        g = goodness(units)
        value, slope = self.local_loss(g.t(), part)
        row_scale = self.normalise_(y).view(self.groups, -1).mul_(slope.t()).mul_(2 / width)
        dz = (self._grouped(y) * row_scale[:, None]).view(self.out_features, -1)
        self.fields.add_gradient(dw, dz, inputs, beta=0.0 if part.first else 1.0)
        if self.fields.beyond is not None:
            dw.masked_fill_(self.fields.beyond, 0)
        if part.first:
            db.zero_()
        db.add_(dz.sum(dim=1))
        return y, value / self.groups

    def _output(self, inputs: torch.Tensor) -> torch.Tensor:
        """(groups, read, rows) -> (rows, out_features)."""
        return self.fields.product(self.weight, self.bias, inputs).relu_().t()

    def _grouped(self, y: torch.Tensor) -> torch.Tensor:
        """Units that share a goodness: (rows, out_features) -> (groups, width, rows)."""
        return y.t().view(self.groups, -1, len(y))


class LocalForwardForward(ForwardForward):
    """`ForwardForward` with local receptive fields.

    shape: (height, width) or (channels, height, width) of an image.
    fields: of each layer the width of its square fields, the stride from one to the next, and
        the units at each position. Fields lie on the grid of positions below, all units of which
        they see; padded ones reach half their width beyond the edges.
    config: label "joined" to what every position of the first layer sees, or "none".
    """

    def __init__(
        self,
        shape: Sequence[int],
        classes: int,
        fields: Sequence[Sequence[int]],
        config: LocalConfig = LocalConfig(),
        *,
        device: str | torch.device = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        check_choice("label", config.label, ("joined", "none"))
        if len(shape) not in (2, 3):
            wanted = "(height, width) or (channels, height, width)"
            raise ValueError(f"shape is {tuple(shape)}; give {wanted}.")
        pixels = math.prod(shape)
        codes = classes if config.label == "joined" else 0
        self._plan, hidden, in_features = [], [], pixels + codes
        for seen, channels in fields_of(shape, fields, codes, padded=config.padded):
            make = partial(LocalFFLayer, seen, in_features, channels)
            self._plan.append((make, math.prod(seen.shape) * channels))
            in_features = seen.shape[0] * channels
            hidden.append(in_features)
        super().__init__(pixels, classes, hidden, config, device=device, dtype=dtype)
        del self._plan  # its tables are in the layers now
        self.image_shape = tuple(shape)
        self.settings |= {"shape": list(shape), "fields": [list(layer) for layer in fields]}

    def plan(self, in_features: int) -> list[tuple[Callable[..., FFLayer], int]]:
        """What makes each layer, and how many weights it has."""
        return self._plan

    def labelled_input(self, images: torch.Tensor) -> DenseInput:
        """As `ForwardForward`, the rows in memory."""
        return DenseInput(images, self.encode)


def fields_of(
    shape: Sequence[int], fields: Sequence[Sequence[int]], codes: int, *, padded: bool
) -> Iterator[tuple[Fields, int]]:
    """The fields of each layer on images of `shape`, and its units at each position.

    codes: numbers after the pixels, which every position of the first layer sees too.
    """
    pixels = math.prod(shape)
    grid = torch.arange(pixels).view(-1, *shape[-2:]).permute(1, 2, 0)
    label = torch.arange(pixels, pixels + codes)
    for number, layer in enumerate(fields, start=1):
        if len(layer) != 3:
            raise ValueError(f"layer {number} is {layer!r}; give field, stride and channels.")
        field, stride, channels = layer
        most = min(grid.shape[:2]) + (2 * (field // 2) if padded else 0)
        check_number(f"the field of layer {number}", field, 1, most, whole=True)
        check_number(f"the stride of layer {number}", stride, 1, whole=True)
        check_number(f"the channels of layer {number}", channels, 1, whole=True)
        seen = Fields(grid, label, field, stride, padded=padded)
        yield seen, channels
        high, wide = seen.high, seen.wide
        grid = torch.arange(high * wide * channels).view(high, wide, channels)
        label = label[:0]
