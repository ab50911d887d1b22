"""Training block by block: each block's gradient is autograd's, of its own loss alone."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional

from ff_utils.config import TrainConfig
from ff_utils.ff.blocks import (
    BlockLocal,
    add_waves,
    chunked_cross_entropy,
    find_blocks,
    goodness_of,
    split_tensors,
    write_label,
)
from ff_utils.training import fit


def cnn(side=8):
    torch.manual_seed(1)
    return nn.Sequential(
        nn.Unflatten(1, (1, side, side)),
        nn.Conv2d(1, 4, 3, padding=1),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Conv2d(4, 6, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(6 * (side // 2) ** 2, 10),
    ).double()


def batch(rows=12, pixels=64):
    torch.manual_seed(2)
    return torch.rand(rows, pixels).double(), torch.randint(10, (rows,))


def after_step(trained, before):
    """The gradients of one step of plain gradient descent at rate 1."""
    return [old - new for old, new in zip(before, trained.network.parameters(), strict=True)]


def gradients_by_blocks(network, runs, loss_of, x):
    """Autograd's gradients of each run's own loss, its input taken as given."""
    found = []
    for number, run in enumerate(runs):
        y = x
        for module in run:
            y = module(y)
        loss, x = loss_of(number, y)
        parameters = [p for module in run for p in module.parameters()]
        found += torch.autograd.grad(loss, parameters)
    return found


def assert_close(found, expected):
    assert len(found) == len(expected)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def test_blocks_begin_where_a_matrix_does():
    assert [(b.name, len(b.modules)) for b in find_blocks(cnn())] == [("0", 4), ("4", 4), ("8", 1)]
    layers = nn.ModuleList(nn.Linear(2, 2) for _ in range(3))
    holder = nn.ModuleDict({"stem": nn.Linear(2, 2), "layers": layers})
    assert [b.name for b in find_blocks(holder)] == ["layers.0", "layers.1", "layers.2"]
    assert [b.name for b in find_blocks(holder, ["stem", "layers.2"])] == ["stem", "layers.2"]
    with pytest.raises(ValueError, match="no module"):
        find_blocks(holder, ["head"])
    with pytest.raises(ValueError, match="name its blocks"):
        find_blocks(nn.Linear(2, 2))


def test_one_block_is_backprop():
    network, (x, labels) = cnn(), batch()
    twin = copy.deepcopy(network)
    loss = functional.cross_entropy(twin(x), labels)
    expected = torch.autograd.grad(loss, [*twin.parameters()])
    before = [p.detach().clone() for p in network.parameters()]
    holder = nn.Sequential(network)
    trained = BlockLocal(holder, blocks=["0"], optimizer="sgd", learning_rate=1.0)
    losses = trained.step(x, labels)
    assert list(losses) == ["loss"]
    torch.testing.assert_close(losses["loss"], loss.detach())
    assert_close(after_step(trained, before), expected)


@pytest.mark.parametrize(("micro_batches", "grid"), [(1, 1), (3, 1), (1, 2)])
def test_blocks_with_classifiers_learn_from_their_own_loss(micro_batches, grid):
    network, (x, labels) = cnn(), batch()
    if micro_batches > 1:
        network[2] = nn.Identity()  # batch statistics differ from part to part
    kind = {"optimizer": "sgd", "learning_rate": 1.0}
    trained = BlockLocal(network, micro_batches=micro_batches, grid=grid, **kind)
    trained.prepare(x, labels)
    twin, heads = copy.deepcopy(network), copy.deepcopy(trained.classifiers)
    before = [p.detach().clone() for p in network.parameters()]
    heads_before = [p.detach().clone() for p in trained.classifiers.parameters()]
    losses = trained.step(x, labels)
    assert sorted(losses) == ["loss", "loss_1", "loss_2"]

    def averaged(y):
        cells = [half for rows in y.chunk(grid, 2) for half in rows.chunk(grid, 3)]
        return torch.stack([cell.mean(dim=(2, 3)) for cell in cells], dim=2).flatten(1)

    def loss_of(number, y):
        pooled = averaged(y) if y.dim() == 4 else y
        logits = heads[str(number)](pooled) if number < 2 else y
        return functional.cross_entropy(logits, labels), y.detach()

    for module in twin.modules():
        module._forward_hooks.clear()
    expected = gradients_by_blocks(twin, [twin[:4], twin[4:8], twin[8:]], loss_of, x)
    assert_close(after_step(trained, before), expected)
    moved = [
        old - new for old, new in zip(heads_before, trained.classifiers.parameters(), strict=True)
    ]
    pooled = averaged(twin[:4](x)).detach()
    loss = functional.cross_entropy(heads["0"](pooled), labels)
    assert_close(moved[:2], torch.autograd.grad(loss, [*heads["0"].parameters()]))
    assert all(p.grad is None for p in trained.parameters())


def test_blocks_with_goodness_learn_from_their_own_loss():
    network, (x, labels) = cnn(), batch()
    trained = BlockLocal(
        network, 10, loss="goodness", optimizer="sgd", learning_rate=1.0, sharpness=3.0
    )
    twin = copy.deepcopy(network)
    for module in twin.modules():
        module._forward_hooks.clear()
    trained._generator = torch.Generator().manual_seed(3)
    wrong = (labels + torch.randint(1, 10, (12,), generator=torch.Generator().manual_seed(3))) % 10
    assert not (wrong == labels).any()
    both = torch.cat([write_label(x, labels, 10), write_label(x, wrong, 10)])
    trained.prepare(x, labels)
    before = [p.detach().clone() for p in network.parameters()]
    losses = trained.step(x, labels)

    def loss_of(number, y):
        squares = y.square().flatten(1).mean(1)
        loss = functional.softplus(3 * (squares[12:] - squares[:12])).mean()
        torch.testing.assert_close(losses[f"loss_{number + 1}"], loss.detach())
        shape = (-1, *[1] * (y.dim() - 1))
        return loss, (y / (squares.sqrt() + 1e-8).view(shape)).detach()

    expected = gradients_by_blocks(twin, [twin[:4], twin[4:8], twin[8:]], loss_of, both)
    assert_close(after_step(trained, before), expected)


@pytest.mark.parametrize("loss", ["classifier", "goodness"])
def test_streamed_blocks_learn_the_same_and_are_away_when_not_at_work(loss):
    (x, labels), start = batch(), cnn().state_dict()
    found, away = [], []
    for streamed in (False, True):
        network = cnn()
        network.load_state_dict(start)
        local = BlockLocal(network, 10, loss=loss, streamed=streamed)
        local._generator = torch.Generator().manual_seed(1)
        torch.manual_seed(5)  # of the local classifiers
        network[4].register_forward_hook(
            lambda *_, n=network: away.append([p.numel() for p in (n[1].weight, n[8].weight)])
        )
        for _ in range(3):
            losses = local.step(x, labels)
        guesses = local.predict(x)
        if streamed:
            assert network[1].weight.numel() == network[8].weight.numel() == 0
            assert away[-1] == [0, 0] != away[0]
        state = {name: value.clone() for name, value in local.state_dict().items()}
        found.append((losses, guesses, state))
        local.load_state_dict({name: 2 * value for name, value in state.items()})
        local.predict(x)
        assert torch.equal(local.state_dict()["network.1.weight"], 2 * state["network.1.weight"])
    (losses, guesses, state), (streamed_losses, streamed_guesses, streamed_state) = found
    assert losses == streamed_losses and torch.equal(guesses, streamed_guesses)
    assert list(state) == list(streamed_state)
    assert all(torch.equal(state[name], streamed_state[name]) for name in state)


def test_streamed_blocks_keep_what_they_share_and_refuse_micro_batches():
    network = nn.Sequential(*(nn.Sequential(nn.Linear(8, 8), nn.ReLU()) for _ in range(3)))
    network[2][0].weight = network[0][0].weight
    BlockLocal(network, streamed=True).step(torch.rand(4, 8), torch.arange(4))
    sizes = [[p.numel() for p in block.parameters()] for block in network]
    assert sizes == [[64, 0], [0, 0], [64, 0]]
    with pytest.raises(ValueError, match="give micro_batches 1"):
        BlockLocal(network, streamed=True, micro_batches=2)


def test_what_goes_on_has_mean_square_one():
    seen = []
    network, (x, labels) = cnn(), batch()
    network[4].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    BlockLocal(network, 10, loss="goodness").step(x, labels)
    torch.testing.assert_close(goodness_of(seen[-1]), torch.ones(24).double(), rtol=1e-6, atol=0)


def test_goodness_predicts_the_label_with_most():
    trained = BlockLocal(cnn(), 10, loss="goodness")
    x, labels = batch()
    trained.step(x, labels)
    trained.eval()
    sums = []
    for label in range(10):
        y, total = write_label(x, torch.full((12,), label), 10), 0
        for number, run in enumerate((slice(0, 4), slice(4, 8), slice(8, 9))):
            for module in trained.network[run]:
                y = module.forward(y)
            squares = y.square().flatten(1).mean(1)
            total = total + squares * (number > 0)
            y = y / (squares.sqrt() + 1e-8).view(-1, *[1] * (y.dim() - 1))
        sums.append(total)
    assert torch.equal(trained.predict(x), torch.stack(sums, 1).argmax(1))


def test_network_is_the_same_when_not_training():
    x, _ = batch()
    trained = BlockLocal(cnn())
    plain = cnn().eval()(x)
    assert torch.equal(trained.eval()(x), plain)
    assert torch.equal(trained.predict(x), plain.argmax(1))


def test_tokens_share_a_classifier():
    torch.manual_seed(0)
    layers = [nn.Sequential(nn.Linear(6, 6), nn.Tanh()) for _ in range(3)]
    network = nn.Sequential(nn.Embedding(20, 6), *layers, nn.Linear(6, 20))
    tokens = torch.randint(20, (2, 3, 7))
    trained = BlockLocal(network)
    losses = trained.step(*tokens)
    assert len(trained.classifiers) == 1 and len(losses) == 5
    shuffled = BlockLocal(copy.deepcopy(network), loss="goodness")
    assert len(shuffled.step(*tokens)) == 5


def test_loss_in_chunks_is_the_loss(monkeypatch):
    monkeypatch.setattr("ff_utils.ff.blocks.CHUNK_ELEMENTS", 250)
    torch.manual_seed(0)
    head = nn.Linear(6, 50).double()
    features = torch.randn(4, 3, 6).double().requires_grad_()
    labels = torch.randint(50, (4, 3))
    chunked = torch.autograd.grad(chunked_cross_entropy(features, labels, head), features)
    logits = head(features).flatten(0, 1)
    whole = torch.autograd.grad(functional.cross_entropy(logits, labels.flatten()), features)
    assert_close(chunked, whole)


def test_waves_differ_by_class_everywhere():
    images = torch.zeros(10, 3 * 8 * 8).double()
    waves = add_waves(images, torch.arange(10), 10, (3, 8, 8)).view(10, 3, 8, 8)
    assert torch.equal(waves[:, 0], waves[:, 2])
    torch.testing.assert_close(waves[0, 0, 5], torch.arange(8).double().mul(torch.pi / 2).cos())
    for corner in (waves[:, 0, :5, :5], waves[:, 0, 3:, 3:]):
        assert torch.cdist(corner.flatten(1), corner.flatten(1)).add(10 * torch.eye(10)).min() > 1
    with pytest.raises(ValueError, match="two dimensions"):
        add_waves(images, torch.arange(10), 10, (192,))


@pytest.mark.parametrize(("rows", "parts"), [(12, 3), (7, 3), (2, 8), (1, 4), (24, 8)])
def test_micro_batches_hold_every_row_once(rows, parts):
    x = torch.arange(rows)
    found = split_tensors((x, {"y": x * 2, "scale": 3.0}), parts)
    assert torch.equal(torch.cat([part[0] for part, _ in found]), x)
    assert all(torch.equal(part[1]["y"], 2 * part[0]) for part, _ in found)
    assert sum(share for _, share in found) == pytest.approx(1)
    short = split_tensors(x, parts, short=True)
    assert len(short) == min(3, parts, rows) and torch.equal(short[-1][0], found[-1][0][0])


def test_bad_networks_are_refused():
    x, labels = batch()
    shared = nn.Linear(64, 64).double()
    with pytest.raises(ValueError, match="runs 2 times"):
        twice = nn.Sequential(shared, nn.ReLU(), nn.Linear(64, 10).double())
        twice.forward = lambda h: twice[2](shared(shared(h)))
        BlockLocal(twice, blocks=["0", "2"]).step(x, labels)
    with pytest.raises(ValueError, match="one class label"):
        BlockLocal(nn.Sequential(shared, nn.Linear(64, 64).double())).step(x, x)
    with pytest.raises(ValueError, match="loss"):
        BlockLocal(cnn(), loss="hebbian")
    with pytest.raises(ValueError, match="pixels"):
        net = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 10))
        BlockLocal(net, 10, loss="goodness").step(torch.rand(3, 8), torch.randint(10, (3,)))


@pytest.mark.parametrize("loss", ["classifier", "goodness"])
def test_fit_trains_and_goes_on_to_the_same_bits(loss, tmp_path):
    from sklearn.datasets import load_digits  # 8x8 images that need no download

    from ff_utils.data import Dataset

    x, y = load_digits(return_X_y=True)
    x = torch.tensor(x, dtype=torch.float32) / 16
    y = torch.tensor(y)
    fields = {"train_images": x[:600], "train_labels": y[:600], "test_images": x[600:900]}
    fields |= {"test_labels": y[600:900], "checksum": "digits"}
    data = Dataset(name="digits", classes=10, shape=(8, 8), **fields)

    def trained(**options):
        torch.manual_seed(1)
        layers = [nn.Linear(64, 100), nn.ReLU(), nn.Linear(100, 100), nn.ReLU()]
        network = cnn().float() if loss == "classifier" else nn.Sequential(*layers)
        network = BlockLocal(network, 10, loss=loss)
        config = TrainConfig(epochs=5, batch_size=50, learning_rate=1e-2, dropout=0.1)
        return network, fit(network, data, config, quiet=True, **options)

    network, history = trained()
    assert history.error.iloc[-1] < (0.3 if loss == "classifier" else 0.6)
    assert history.loss_1.iloc[-1] < history.loss_1.iloc[0]

    epochs = iter(range(5))

    def interrupt():
        if next(epochs) == 2:
            raise KeyboardInterrupt
        return {}

    path = tmp_path / "run.pt"
    with pytest.raises(KeyboardInterrupt):
        trained(checkpoint=path, note=interrupt)
    resumed, again = trained(checkpoint=path)
    assert again.error.tolist() == history.error.tolist()
    for name, value in network.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name])


def test_goodness_takes_as_many_classes_as_the_network_has():
    torch.manual_seed(0)
    network = nn.Sequential(*(nn.Sequential(nn.Linear(60, 60), nn.ReLU()) for _ in range(2)))
    network.append(nn.Linear(60, 40))
    local = BlockLocal(network, loss="goodness")
    losses = local.step(torch.rand(8, 60), torch.arange(32, 40))
    assert all(torch.isfinite(loss) for loss in losses.values()) and local.classes == 40
