import torch

from ff_utils.original import STEPS, OriginalForwardForward, OriginalRecurrent


def loss_of(y, positives):
    g = y.square().mean(dim=1)
    return (2 - g[:positives]).exp().log1p().mean() + (g[positives:] - 2).exp().log1p().mean()


def test_original_step_follows_autograd_of_each_layers_own_loss():
    network = OriginalForwardForward(6, 4, [8, 5], optimizer="sgd")
    rows = torch.rand(6, 10)
    h, expected = rows, []
    for layer in network.layers:
        unit = h / h.norm(dim=1, keepdim=True)
        linear = layer.linear
        gradients = torch.autograd.grad(loss_of(layer(unit), 3), (linear.weight, linear.bias))
        after = [p.detach() - 0.03 * g for p, g in zip(linear.parameters(), gradients, strict=True)]
        expected.append(after)
        h = torch.nn.functional.linear(unit, *after).relu()
    network.step(rows, 3)
    for layer, after in zip(network.layers, expected, strict=True):
        for p, wanted in zip(layer.linear.parameters(), after, strict=True):
            assert torch.allclose(p, wanted, atol=1e-6)
            assert p.grad is not None  # the first study keeps its gradients


def test_original_last_stage_trains_the_last_layer_alone():
    network = OriginalForwardForward(6, 4, [8, 5], optimizer="adam")
    before = [layer.linear.weight.clone() for layer in network.layers]
    network.last_stage(batch=4, rows=10)
    changed = [
        not torch.equal(b, n.linear.weight) for b, n in zip(before, network.layers, strict=True)
    ]
    assert changed == [False, True]


def test_original_evaluation_gives_the_last_labels_goodness():
    network = OriginalForwardForward(6, 4, [8, 5], optimizer="adam")
    images = torch.rand(3, 6)
    h, expected = torch.cat([images, torch.eye(4)[3].expand(3, 4)], dim=1), 0
    for layer in network.layers:
        h = layer(h / h.norm(dim=1, keepdim=True))
        expected = expected + h.square().mean(dim=1)
    assert torch.allclose(network.evaluate(images), expected, atol=1e-6)


def test_original_recurrent_trains_all_but_label_reader_and_softmax():
    network = OriginalRecurrent(6, 4, [8, 8], optimizer="adam")
    before = {name: p.clone() for name, p in network.named_parameters()}
    network.step(torch.rand(5, 6), torch.eye(4)[[0, 1, 2, 3, 0]])
    changed = {n.rsplit(".", 2)[0] for n, p in network.named_parameters() if (p != before[n]).any()}
    assert changed == {"projector", "layers.0", "layers.1"}
    assert network.layers[0].optimizer.state[network.layers[0].linear.weight]["step"] == STEPS
    assert [state.shape for state in network.returned] == [(5, 8)] * 3 + [(5, 4)]
    goodness = network.evaluate(torch.rand(3, 6))
    assert goodness.shape == (3, 4) and len(goodness.unique()) > 4
