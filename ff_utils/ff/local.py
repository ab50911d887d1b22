"""Local receptive fields: layers each of whose units sees a small field of the layer below.

No weights are shared, unlike in a convolution: Hinton, arXiv 2212.13345, sections 3.2 and 4.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import nn

from ff_utils.config import LocalConfig
from ff_utils.ff.layers import EPSILON, FFLayer, Part, goodness, normalise_
from ff_utils.ff.negatives import DenseInput
from ff_utils.ff.network import ForwardForward
from ff_utils.utils import check_choice, check_number


class LocalFFLayer(FFLayer):
    """As `FFLayer`, but each unit sees some of the inputs: locally connected.

    fields: (positions, seen), the numbers of the inputs that the units at each position see;
        -1 beyond the edge, only if `config.padded`.
    channels: units at each position.
    Weights (positions, channels, seen); output (rows, positions * channels), position after
    position. A batch's numbers lie side by side in memory, so that a field is gathered in runs.
    """

    def __init__(
        self,
        fields: torch.Tensor,
        in_features: int,
        channels: int,
        config: LocalConfig = LocalConfig(),
        **kind: object,
    ) -> None:
        positions, seen = fields.shape
        shape = (positions, channels, seen)
        super().__init__(in_features, positions * channels, config, weight_shape=shape, **kind)
        self.groups = positions if config.local_goodness else 1
        device = self.weight.device
        beyond = (fields < 0)[:, None].to(device) if config.padded else None
        self.register_buffer("fields", fields.clamp(min=0).flatten().to(device), persistent=False)
        self.register_buffer("beyond", beyond, persistent=False)
        if beyond is not None:
            self.weight.masked_fill_(beyond, 0)

    def forward(self, h: torch.Tensor) -> torch.Tensor:
        """(rows, in_features) -> (rows, out_features)."""
        return self._output(self._gather(h))

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
        seen = self._gather(h)
        y = self._output(seen)
        units = self._grouped(y)
        width = self.groups * units.shape[1]
        g = goodness(units)
        value, slope = self.local_loss(g.t(), part)
        row_scale = self.normalise_(y).view(self.groups, -1).mul_(slope.t()).mul_(2 / width)
        dz = (self._grouped(y) * row_scale[:, None]).view(*self.weight.shape[:2], -1)
        dw.baddbmm_(dz, seen.transpose(1, 2), beta=0.0 if part.first else 1.0)
        if self.beyond is not None:
            dw.masked_fill_(self.beyond, 0)
        if part.first:
            db.zero_()
        db.add_(dz.sum(dim=2).flatten())
        return y, value / self.groups

    def _gather(self, h: torch.Tensor) -> torch.Tensor:
        """What each position sees: (rows, in_features) -> (positions, seen, rows)."""
        seen = h.t().index_select(0, self.fields)
        return seen.view(len(self.weight), -1, len(h))

    def _output(self, seen: torch.Tensor) -> torch.Tensor:
        """(positions, seen, rows) -> (rows, out_features)."""
        bias = self.bias.view(*self.weight.shape[:2], 1)
        y = torch.baddbmm(bias, self.weight, seen).relu_()
        return y.view(self.out_features, -1).t()

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
        numbers = torch.arange(pixels + codes)
        grid, label = numbers[:pixels].view(-1, *shape[-2:]).permute(1, 2, 0), numbers[pixels:]
        self._plan, hidden, in_features = [], [], pixels + codes
        for number, layer in enumerate(fields, start=1):
            if len(layer) != 3:
                raise ValueError(f"layer {number} is {layer!r}; give field, stride and channels.")
            field, stride, channels = layer
            check_number(f"the channels of layer {number}", channels, 1, whole=True)
            seen = windows(grid, field, stride, config.padded, f"layer {number}")
            high, wide, _ = seen.shape
            seen = torch.cat([seen.flatten(0, 1), label.expand(high * wide, -1)], dim=1)
            make = partial(LocalFFLayer, seen, in_features, channels)
            self._plan.append((make, seen.numel() * channels))
            in_features = high * wide * channels
            hidden.append(in_features)
            grid, label = torch.arange(in_features).view(high, wide, channels), label[:0]
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


def windows(grid: torch.Tensor, field: int, stride: int, padded: bool, where: str) -> torch.Tensor:
    """Every field's numbers on a grid (height, width, channels) of them, -1 beyond the edges:
    (fields down, fields across, field * field * channels)."""
    margin = field // 2 if padded else 0
    check_number(f"the field of {where}", field, 1, min(grid.shape[:2]) + 2 * margin, whole=True)
    check_number(f"the stride of {where}", stride, 1, whole=True)
    wide = nn.functional.pad(grid, (0, 0, *(margin,) * 4), value=-1)
    return wide.unfold(0, field, stride).unfold(1, field, stride).flatten(2)
