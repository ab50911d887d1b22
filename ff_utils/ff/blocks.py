"""Any network trained block by block: a local loss for each block, backpropagation only within it.

A block's graph is freed before the next block runs. Local losses: a linear classifier of the
block's pooled output (Mono-Forward, arXiv 2501.09238; AugLocal, arXiv 2402.17318), or goodness
on positive and negative samples (Hinton, arXiv 2212.13345). With one block, this is backprop.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import nn
from torch.nn import functional
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map, tree_unflatten
from torch.utils.checkpoint import checkpoint

from ff_utils.config import Batch, TrainConfig
from ff_utils.data import Dataset
from ff_utils.ff.negatives import drop_pixels, random_negatives, with_label
from ff_utils.ff.network import EVALUATION_ROWS, classification_error
from ff_utils.optimizers import TORCH_OPTIMIZERS
from ff_utils.utils import HOST, allocation_category, check_choice, check_number

LOCAL_LOSSES = ("classifier", "goodness")
IMAGE_LABELS = ("pixels", "waves")
CHUNK_ELEMENTS = 2**24  # logits at a time where a loss is computed in chunks


class Block(NamedTuple):
    """Modules that run one after the other, and the module that holds them."""

    name: str
    modules: list[nn.Module]
    parent: nn.Module


def find_blocks(network: nn.Module, names: Sequence[str] | None = None) -> list[Block]:
    """The blocks of `network`: the modules called `names`, or else the children of its outermost
    `nn.Sequential` and `nn.ModuleList`s.

    In an `nn.Sequential`, a block begins at each child that holds a matrix or a kernel; what
    follows without one (a normalisation, an activation, a pooling) belongs to it.
    """
    if names:
        known = dict(network.named_modules())
        if unknown := [name for name in names if not name or name not in known]:
            raise ValueError(f"blocks: {unknown[0]!r} is no module of {type(network).__name__}.")
        if len(set(names)) < len(names):
            raise ValueError("blocks: a name is given twice.")
        return [Block(name, [known[name]], known[name.rpartition(".")[0]]) for name in names]
    blocks = list(_outermost_blocks(network, ""))
    if len(blocks) < 2:
        children = ", ".join(name for name, _ in network.named_children()) or "none"
        raise ValueError(
            f"{type(network).__name__} has no nn.Sequential or nn.ModuleList of two or more "
            f"blocks: name its blocks (modules it holds: {children})."
        )
    return blocks


def _outermost_blocks(module: nn.Module, name: str) -> Iterator[Block]:
    if isinstance(module, (nn.Sequential, nn.ModuleList)) and len(module) > 1:
        runs: list[tuple[str, list[nn.Module]]] = []
        for child_name, child in module.named_children():
            starts = not runs or (
                any(p.dim() > 1 for p in child.parameters())
                and any(p.dim() > 1 for m in runs[-1][1] for p in m.parameters())
            )
            if starts or isinstance(module, nn.ModuleList):
                runs.append((child_name, []))
            runs[-1][1].append(child)
        yield from (Block(f"{name}{first}", run, module) for first, run in runs)
        return
    for child_name, child in module.named_children():
        yield from _outermost_blocks(child, f"{name}{child_name}.")


def task_loss(
    network: nn.Module, inputs: object, labels: torch.Tensor | None, loss: Callable | None = None
) -> torch.Tensor:
    """The network's own loss on a batch: `loss(output, labels)`, or what the network returns.

    inputs: a tensor, a tuple of arguments or a dict of named ones. Without `loss`: the output's
    `.loss` if it has one; the output itself if there are no labels; the mean squared error if
    labels are numbers; else cross-entropy, classes last where labels are of every token.
    """
    output = call(network, inputs)
    if loss is not None:
        return loss(output, labels)
    if getattr(output, "loss", None) is not None:
        return output.loss
    output = getattr(output, "logits", output)
    if not torch.is_tensor(output) or (labels is None and output.numel() != 1):
        raise ValueError(
            f"{type(network).__name__} returns no loss: give labels, as (inputs, labels), or a "
            "loss, as (network, batch, loss)."
        )
    if labels is None:
        return output
    if labels.is_floating_point():
        return functional.mse_loss(output, labels)
    if labels.dim() > 1 and output.shape[:-1] == labels.shape:
        return functional.cross_entropy(output.flatten(0, -2), labels.flatten())
    return functional.cross_entropy(output, labels)


def call(network: nn.Module, inputs: object) -> object:
    """`network` applied to a tensor, a tuple of arguments or a dict of named ones."""
    if isinstance(inputs, dict):
        return network(**inputs)
    return network(*inputs) if isinstance(inputs, (tuple, list)) else network(inputs)


def chunked_cross_entropy(
    features: torch.Tensor, labels: torch.Tensor, head: nn.Linear
) -> torch.Tensor:
    """Mean cross-entropy of `head(features)`, whose logits never live all at once.

    features (..., width), labels (...). Each chunk's logits are recomputed in the backward pass.
    """

    def loss_of(rows: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        logits = functional.linear(rows, head.weight, head.bias)
        return functional.cross_entropy(logits, targets, reduction="sum")

    features, labels = features.flatten(0, -2), labels.flatten()
    size = max(1, CHUNK_ELEMENTS // head.out_features)
    total = 0
    for rows, targets in zip(features.split(size), labels.split(size), strict=True):
        total = total + checkpoint(loss_of, rows, targets, use_reentrant=False)
    return total / len(labels)


def batch_rows(batch: object) -> int:
    """The length of a batch's first tensor that has one; else 1."""
    lengths = (len(t) for t in tree_leaves(batch) if torch.is_tensor(t) and t.dim())
    return next(lengths, 1)


def split_tensors(batch: object, parts: int, short: bool = False) -> list[tuple[object, float]]:
    """`batch` in up to `parts` micro-batches, each with its share of the rows.

    Every tensor as long as the first one is split; other values go to every part. short: only the
    first two parts and the last one, which is enough to simulate the memory of all.
    """
    leaves, structure = tree_flatten(batch)
    rows = batch_rows(leaves)
    if (parts := min(parts, rows)) == 1:
        return [(batch, 1.0)]
    split = [
        leaf.tensor_split(parts)
        if torch.is_tensor(leaf) and leaf.dim() and len(leaf) == rows
        else [leaf] * parts
        for leaf in leaves
    ]
    found = [
        (tree_unflatten(list(part), structure), (rows // parts + (number < rows % parts)) / rows)
        for number, part in enumerate(zip(*split, strict=True))
    ]
    return [*found[:2], found[-1]] if short and len(found) > 3 else found


class _Waiting:
    """A block's weights and optimizer state, which wait on the host while others are at work.

    state_of: a parameter's optimizer state.
    """

    def __init__(self, parameters: list[nn.Parameter], state_of: Callable[[nn.Parameter], dict]):
        self.parameters, self.state_of = parameters, state_of
        self.host: dict[tuple[int, str], torch.Tensor] = {}
        self.away = False

    def leave(self) -> None:
        """Copy the values to the host and free the device's tensors."""
        if self.away:
            return
        for number, parameter in enumerate(self.parameters):
            state = self.state_of(parameter)
            held = {name: t for name, t in state.items() if torch.is_tensor(t) and t.dim()}
            for name, tensor in {"weight": parameter.data, **held}.items():
                place = (number, name)
                if place not in self.host:
                    with allocation_category(HOST):
                        pinned = {"pin_memory": True} if tensor.is_cuda else {}
                        self.host[place] = torch.empty_like(tensor, device="cpu", **pinned)
                self.host[place].copy_(tensor)
                self._put(number, name, tensor.new_empty(0))
        self.away = True

    def come(self) -> None:
        """Copy the values back to the device."""
        if not self.away:
            return
        for (number, name), kept in self.host.items():
            category = "parameters" if name == "weight" else "optimizer_state"
            with allocation_category(category):
                tensor = torch.empty_like(kept, device=self.parameters[number].device)
            self._put(number, name, tensor.copy_(kept))
        self.away = False

    def _put(self, number: int, name: str, tensor: torch.Tensor) -> None:
        if name == "weight":
            self.parameters[number].data = tensor
        else:
            self.state_of(self.parameters[number])[name] = tensor


class _LastBlockDone(Exception):  # noqa: N818
    """Ends a forward pass after the last block."""


class BlockLocal(nn.Module):
    """Trains a network block by block; the network itself is unchanged.

    loss "classifier": each block but the last has a linear classifier of its own, on its output
    averaged over tokens, or over each cell of a `grid` x `grid` laid on an image; classifiers of
    every token share their weights and are not averaged. The last block and what follows it train
    on the network's own loss; what precedes the first block trains with it. Predictions are the
    network's.
    loss "goodness": each block raises its mean squared output on positive samples over that on
    their negatives, twice as many rows, by softplus(sharpness * (negative - positive)) (SymBa, Lee
    and Song, arXiv 2303.08418). Its output goes on with mean square 1. What follows the last block
    is not used; predictions are by goodness, of all blocks but the first. Negative images carry a
    wrong label, negative token sequences are shuffled.
    label "pixels": the first `classes` pixels are the one-hot label (Hinton, section 3.3).
    label "waves": a wave is added whose direction is the class's, so that every convolution sees
    the label (Scodellaro et al., arXiv 2312.14924); images are of `shape`, flat or not.
    Each parameter is updated, and its gradient freed, as soon as the gradient is complete.
    streamed: weights, optimizer state and local classifier of a block are on the device only while
    it is at work, and else on the host.
    blocks: as in `find_blocks`. network_loss: as in `task_loss`. short: as in `split_tensors`.
    """

    def __init__(
        self,
        network: nn.Module,
        classes: int | None = None,
        *,
        loss: str = "classifier",
        blocks: Sequence[str] | None = None,
        optimizer: str = "adam",
        learning_rate: float = 1e-3,
        sharpness: float = 30.0,
        grid: int = 1,
        label: str = "pixels",
        shape: tuple[int, ...] | None = None,
        micro_batches: int = 1,
        streamed: bool = False,
        network_loss: Callable | None = None,
        short: bool = False,
    ) -> None:
        super().__init__()
        if streamed and micro_batches > 1:
            raise ValueError("a streamed block has no gradient to add to: give micro_batches 1.")
        check_choice("loss", loss, LOCAL_LOSSES)
        check_choice("optimizer", optimizer, TORCH_OPTIMIZERS)
        check_number("micro_batches", micro_batches, 1, whole=True)
        check_number("grid", grid, 1, whole=True)
        check_number("sharpness", sharpness, 0, above=True)
        check_choice("label", label, IMAGE_LABELS)
        self.network, self.classes, self.loss = network, classes, loss
        self.label, self.shape, self.grid = label, shape, grid
        self.sharpness, self.network_loss = sharpness, network_loss
        self.micro_batches, self.short = micro_batches, short
        found = find_blocks(network, blocks)
        self.blocks = [block.name for block in found]
        self.streamed = streamed
        self._parameters_of, self._waiting = {}, {}
        for name, modules, _ in found:
            self._parameters_of[name] = [p for module in modules for p in module.parameters()]
            modules[0].register_forward_pre_hook(lambda *_, name=name: self._come(name))
            modules[-1].register_forward_hook(
                lambda _, inputs, output, name=name: self._after_block(name, output)
            )
        self.classifiers = nn.ModuleDict()
        self.optimizers: list[torch.optim.Optimizer] = []
        self._make_optimizer = lambda p: TORCH_OPTIMIZERS[optimizer](
            [p], lr=learning_rate, fused=True
        )
        self._mode: str | None = None
        self._ran: list[tuple[str, torch.Tensor]] = []
        self.settings = {"blocks": self.blocks, "loss": loss, "optimizer": optimizer}
        self.settings |= {"grid": grid, "label": label, "sharpness": sharpness}
        self.settings |= {"micro_batches": micro_batches}
        self.settings |= {"parameters": [list(p.shape) for p in network.parameters()]}

    def forward(self, inputs: object) -> object:
        """The network's output."""
        return call(self.network, inputs)

    def prepare(self, inputs: object, labels: torch.Tensor | None) -> None:
        """Make the local classifiers and the optimizers; the first step does so by itself."""
        training, self._mode, self._ran = self.training, "probe", []
        self.eval()
        with torch.no_grad():
            output = self(split_tensors(inputs, 2**30)[0][0])
        self.train(training)
        self._mode = None
        names = [name for name, _ in self._ran]
        if sorted(names) != sorted(self.blocks):
            odd = next(n for n in [*self.blocks, *names] if names.count(n) != 1)
            raise ValueError(
                f"block {odd!r} runs {names.count(odd)} times in a forward pass; local losses need "
                "blocks that run once."
            )
        self.blocks = names  # in the order in which they run
        logits = getattr(output, "logits", output)
        if self.classes is None and labels is not None and labels.dim() == 1:
            self.classes = logits.shape[-1]
        if self.loss == "classifier":
            self._make_classifiers(logits, labels)
        self._ran = []
        owners = {}
        for parameter in self.parameters():
            if parameter.requires_grad:
                own = owners[parameter] = self._make_optimizer(parameter)
                self.optimizers.append(own)
                parameter.register_post_accumulate_grad_hook(lambda _, own=own: self._update(own))
        if self.streamed:
            self._stream(lambda p: owners[p].state[p] if p in owners else {})

    def _make_classifiers(self, logits: torch.Tensor, labels: torch.Tensor | None) -> None:
        shared = labels is not None and labels.dim() == 2
        for number, (_, y) in enumerate(self._ran[:-1]):
            fits = labels is not None and (y.shape[1:-1] == labels.shape[1:] if shared else True)
            if not fits or labels.is_floating_point() or labels.dim() > 2:
                raise ValueError(
                    "local classifiers need one class label for each sample or token; use goodness."
                )
            width = y.shape[-1] if shared else pool(y, self.grid).shape[1]
            classes = self.classes or logits.shape[-1]
            if shared and number and self.classifiers["0"].in_features != width:
                raise ValueError("token classifiers share weights: blocks must have one width.")
            if not (shared and number):
                like = next(self.network.parameters())
                head = nn.Linear(width, classes, device=like.device, dtype=like.dtype)
                self.classifiers[str(number)] = head

    def _stream(self, state_of: Callable[[nn.Parameter], dict]) -> None:
        """Send every block to the host; what several blocks or other modules hold stays."""
        if len(self.classifiers) > 1:
            for number, name in enumerate(self.blocks[:-1]):
                self._parameters_of[name] += self.classifiers[str(number)].parameters()
        holders = Counter(p for module in self.modules() for p in module._parameters.values())
        for name, parameters in self._parameters_of.items():
            own = [p for p in parameters if holders[p] == 1]
            self._waiting[name] = _Waiting(own, state_of)
            self._leave(name)
        for hook in ("register_state_dict_pre_hook", "register_load_state_dict_pre_hook"):
            getattr(self.network, hook)(lambda *_: [self._come(name) for name in self._waiting])

    def _come(self, name: str) -> None:
        if name in self._waiting:
            self._waiting[name].come()

    def _leave(self, name: str) -> None:
        if name in self._waiting:
            self._waiting[name].leave()

    def step(self, inputs: object, labels: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
        """One update of every block from a batch; the losses by name, "loss" the network's own.

        With goodness, `labels` (rows,) are the true classes of images, which are flat or not.
        """
        if not self.optimizers:
            self.prepare(inputs, labels)
        losses: dict[str, torch.Tensor] = {}
        parts = split_tensors((inputs, labels), self.micro_batches, self.short)
        for number, ((part, part_labels), share) in enumerate(parts, start=1):
            self._last_part, self._labels, self._share = number == len(parts), part_labels, share
            self._mode, self._ran, self._losses = "train", [], {}
            try:
                if self.loss == "goodness":
                    part = self._with_negatives(part, part_labels)
                loss = task_loss(self.network, part, part_labels, self.network_loss)
                (loss * share).backward()
                self._losses["loss"] = loss.detach()
                del loss
                self._leave(self.blocks[-1])
            except _LastBlockDone:
                pass
            finally:
                self._mode, self._ran = None, []
            for name, value in self._losses.items():
                losses[name] = losses.get(name, 0) + value * share
        return losses

    def _update(self, optimizer: torch.optim.Optimizer) -> None:
        if self._last_part:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    def _after_block(self, name: str, output: object) -> object:
        """What goes on to the next block instead of `output`; None leaves it."""
        if self._mode is None:
            if not torch.is_grad_enabled():
                self._leave(name)
            return None
        leaves, structure = tree_flatten(output)
        position = next(i for i, leaf in enumerate(leaves) if torch.is_tensor(leaf))
        y = leaves[position]
        if self._mode == "probe":
            self._ran.append((name, y.detach()))
            return None
        number = self.blocks.index(name)
        last = number == len(self.blocks) - 1
        if self.loss == "classifier" and last:
            return None
        if self._mode == "train":
            loss = self._local_loss(number, y)
            (loss * self._share).backward()
            self._losses[f"loss_{number + 1}"] = loss.detach()
            del loss
        self._leave(name)
        y = y.detach()
        if self.loss == "goodness":
            squares = goodness_of(y)
            if self._mode == "score" and (number or last):
                self._ran.append((name, squares))
            if last:
                raise _LastBlockDone
            y = y / (squares.sqrt() + 1e-8).view(-1, *[1] * (y.dim() - 1))
        leaves = [leaf.detach() if torch.is_tensor(leaf) else leaf for leaf in leaves]
        leaves[position] = y
        return tree_unflatten(leaves, structure)

    def _local_loss(self, number: int, y: torch.Tensor) -> torch.Tensor:
        if self.loss == "goodness":
            positive, negative = goodness_of(y).chunk(2)
            return functional.softplus(self.sharpness * (negative - positive)).mean()
        if self._labels.dim() == 2:
            return chunked_cross_entropy(y, self._labels, self.classifiers["0"])
        logits = self.classifiers[str(number)](pool(y, self.grid))
        return functional.cross_entropy(logits, self._labels)

    def _with_negatives(self, inputs: object, labels: torch.Tensor | None) -> object:
        x = inputs if torch.is_tensor(inputs) else next(iter(tree_flatten(inputs)[0]))
        if not x.is_floating_point():
            return tree_map(lambda t: torch.cat([t, t[:, torch.randperm(t.shape[1])]]), inputs)
        if labels is None or labels.dim() != 1 or x is not inputs:
            raise ValueError("goodness needs class labels of images (rows,), or token sequences.")
        wrong = random_negatives(labels, self.classes, self._generator)
        return torch.cat([self._labelled(x, labels), self._labelled(x, wrong)])

    def _labelled(self, images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        if self.label == "waves":
            return add_waves(images, labels, self.classes, self.shape or images.shape[1:])
        return write_label(images, labels, self.classes)

    _generator: torch.Generator = torch.default_generator

    # --- As `training.fit` calls it -------------------------------------------------------------

    def start_training(self, data: Dataset, config: TrainConfig) -> list[None]:
        """The stages of a training: one, in which every batch trains every block."""
        self.shape, self.classes = self.shape or data.shape, self.classes or data.classes
        if not self.optimizers:
            with torch.random.fork_rng():
                torch.manual_seed(config.seed)
                self.prepare(data.train_images[:2], data.train_labels[:2])
        return [None]

    def train_batch(self, batch: Batch) -> dict[str, torch.Tensor]:
        """One batch, images (rows, pixels); returns each block's loss and the network's own."""
        self.train()
        self._generator = batch.generator
        for optimizer in self.optimizers:
            optimizer.param_groups[0]["lr"] = batch.learning_rate
        images = drop_pixels(batch.images, batch.config.dropout, batch.generator)
        return self.step(images, batch.labels)

    def after_epoch(self, data: Dataset, epoch: int, stage: None = None) -> dict[str, float]:
        """The error on `data`'s test part."""
        self.eval()
        return {"error": classification_error(self.scores, data)}

    def predict(
        self, images: torch.Tensor, by: str | None = None, rows: int = EVALUATION_ROWS
    ) -> torch.Tensor:
        """Class of each image (N,): the best of `scores`, `rows` images at a time."""
        return torch.cat([self.scores(part).argmax(1) for part in images.split(rows)])

    @torch.no_grad()
    def scores(self, images: torch.Tensor) -> torch.Tensor:
        """The network's logits (N, classes), or each label's goodness, summed over blocks."""
        if self.loss == "classifier":
            return self(images)
        scores = []
        for label in range(self.classes):
            self._mode, self._ran = "score", []
            labels = torch.full((len(images),), label, device=images.device)
            try:
                self(self._labelled(images, labels))
            except _LastBlockDone:
                scores.append(sum(squares for _, squares in self._ran))
            finally:
                self._mode, self._ran = None, []
        return torch.stack(scores, dim=1)


def pool(y: torch.Tensor, grid: int) -> torch.Tensor:
    """What a local classifier reads: features (rows, width), a token's (rows, tokens, width)
    averaged over tokens, or an image's (rows, channels, height, width) over each cell of a grid."""
    if y.dim() == 4:
        return functional.adaptive_avg_pool2d(y, grid).flatten(1)
    return y.mean(dim=1) if y.dim() == 3 else y.flatten(2).mean(2) if y.dim() > 3 else y


def goodness_of(y: torch.Tensor) -> torch.Tensor:
    """Mean of the squared outputs of each row: (rows, ...) -> (rows,)."""
    y = y.flatten(1)
    return torch.linalg.vector_norm(y, dim=1).square() / y.shape[1]


def write_label(images: torch.Tensor, labels: torch.Tensor, classes: int) -> torch.Tensor:
    """Images (rows, ...) whose first `classes` pixels hold the one-hot label, as a new tensor."""
    if images[0].numel() <= classes:
        raise ValueError(
            f"goodness needs images of more than {classes} pixels, one for each class."
        )
    return with_label(images.flatten(1), labels, classes).view_as(images)


def add_waves(
    images: torch.Tensor, labels: torch.Tensor, classes: int, shape: tuple[int, ...]
) -> torch.Tensor:
    """Images (rows, ...) plus a plane wave, four pixels long, in the direction of each label.

    shape: (..., height, width) of an image.
    """
    if len(shape) < 2:
        raise ValueError(f"label is 'waves', which needs images of two dimensions, not {shape}.")
    options = {"device": images.device, "dtype": images.dtype}
    angles = (torch.pi / classes * labels).to(images.dtype).view(-1, 1, 1)
    down = torch.arange(shape[-2], **options).view(-1, 1)
    across = torch.arange(shape[-1], **options)
    waves = torch.cos((down * angles.sin() + across * angles.cos()) * (torch.pi / 2))
    waves = waves.view(-1, *[1] * (len(shape) - 2), *shape[-2:])
    return (images.view(-1, *shape) + waves).view_as(images)
