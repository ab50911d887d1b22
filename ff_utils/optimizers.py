"""Optimizers by name, for networks that autograd trains, and Adam with moments of 8 bits.

An FF layer updates itself with the same arithmetic: see the end of `ff.layers`.
"""

from collections.abc import Callable, Iterable

import torch
from torch.optim.adam import adam

# PyTorch's defaults, in one fused operation that makes no temporary.
ADAM = {"beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "fused": True, "decoupled_weight_decay": True}
ADAM |= {"amsgrad": False, "maximize": False}
BLOCK = 256  # numbers that share a scale
CHUNK = 2048 * BLOCK  # numbers that are unpacked at a time: about 6 MB with their temporaries


class Adam8bit(torch.optim.Optimizer):
    """Adam whose two moments take 8 bits a number instead of 32: Dettmers et al., arXiv 2110.02861.

    Each block of 256 numbers has a scale in float32, from its largest magnitude. The first moment
    is stored as its signed square root, in 127 steps each way; the second one as its fourth root,
    in 255 steps: small numbers get fine steps, as in the paper's code, by arithmetic instead of a
    table. A second moment is never rounded to zero: one of zero would make the step as large as the
    first moment divided by 1e-8. A chunk of a tensor is unpacked, updated by PyTorch's Adam and
    packed again before the next one.

    Own code, because bitsandbytes is native code, which no simulation can look into, and torchao's
    optimizer needs a compiler. foreach, fused: accepted as by `torch.optim.Adam`, without effect.
    """

    def __init__(
        self,
        params: Iterable,
        lr: float = 1e-3,
        *,
        foreach: bool | None = None,
        fused: bool | None = None,
    ) -> None:
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Callable[[], torch.Tensor] | None = None) -> torch.Tensor | None:
        """Update every parameter that has a gradient; returns what `closure` does."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    if not self.state[p]:
                        self.state[p] = moments_8bit(p)
                    update_8bit(p, p.grad, self.state[p], group["lr"])
        return loss

    def load_state_dict(self, state_dict: dict) -> None:
        """Take over the state of another; PyTorch would turn all of it into the weights' type."""
        super().load_state_dict(state_dict)
        for group, saved in zip(self.param_groups, state_dict["param_groups"], strict=True):
            for p, key in zip(group["params"], saved["params"], strict=True):
                if key in state_dict["state"]:
                    state = state_dict["state"][key]
                    self.state[p] = {n: t.to(p.device, copy=True) for n, t in state.items()}


def moments_8bit(p: torch.Tensor) -> dict[str, torch.Tensor]:
    """The state of a tensor before its first update: moments of zero, in whole blocks."""
    blocks = -(-p.numel() // BLOCK)
    return {
        "first_moment": p.new_zeros(blocks, BLOCK, dtype=torch.int8),
        "first_scale": p.new_zeros(blocks, 1, dtype=torch.float32),
        "second_moment": p.new_zeros(blocks, BLOCK, dtype=torch.uint8),
        "second_scale": p.new_zeros(blocks, 1, dtype=torch.float32),
        "steps": p.new_zeros((), dtype=torch.float32),
    }


@torch.no_grad()
def update_8bit(
    p: torch.Tensor,
    gradient: torch.Tensor,
    state: dict[str, torch.Tensor],
    learning_rate: float,
    weight_decay: float = 0.0,
) -> None:
    """One step of Adam on `p` along `gradient`, with a state as `moments_8bit` makes it.

    weight_decay: as in AdamW. ValueError for a tensor whose elements are not in a row in memory.
    """
    if not p.is_contiguous():
        raise ValueError("optimizer 'adam_8bit' needs contiguous parameters: take 'adam'.")
    moving = {"lr": learning_rate, "weight_decay": weight_decay}
    names = ("first_moment", "first_scale", "second_moment", "second_scale")
    packed = [state[name].split(CHUNK // BLOCK) for name in names]
    chunks = (p.view(-1).split(CHUNK), gradient.reshape(-1).split(CHUNK), *packed)
    for x, g, first, first_scale, second, second_scale in zip(*chunks, strict=True):
        m = _unpacked(first, first_scale, p.dtype)
        v = _unpacked(second, second_scale, p.dtype)
        moments = [m.view(-1)[: len(x)]], [v.view(-1)[: len(x)]]
        adam([x], [g], *moments, [], [state["steps"].clone()], **moving, **ADAM)
        _pack(m, first, first_scale)
        _pack(v, second, second_scale)
        del m, v, moments  # before the next chunk is unpacked
    state["steps"] += 1


def _unpacked(codes: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Numbers (blocks, 256) of what `_pack` stored."""
    x = codes.to(dtype)
    x = x.mul_(x.abs()) if codes.dtype == torch.int8 else x.square_().square_()
    return x.mul_(scale)


def _pack(x: torch.Tensor, codes: torch.Tensor, scale: torch.Tensor) -> None:
    """Store numbers x (blocks, 256), which are overwritten, as codes and a scale for each block."""
    signed = codes.dtype == torch.int8
    largest = (x.abs() if signed else x).amax(dim=1, keepdim=True)
    scale.copy_(largest.div_(127**2 if signed else 255**4))
    x.div_(scale.clamp(min=torch.finfo(scale.dtype).tiny))
    if signed:
        codes.copy_(x.abs().sqrt_().round_().copysign_(x))
    else:
        codes.copy_(x.sqrt_().sqrt_().round_().clamp_(1, 255))


TORCH_OPTIMIZERS = {"adam": torch.optim.Adam, "adam_8bit": Adam8bit, "sgd": torch.optim.SGD}
