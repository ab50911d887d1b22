"""What the site's charts draw: small trainings, most by notebook 1's record, and formulas."""

from ff_utils import FFConfig, ForwardForward, TrainConfig, fit, load_dataset, memory
from ff_utils.memory.formulas import FORMULAS
from ff_utils.report import records

# Sizes that the memory chart offers.
DEPTHS = [2, 3, 5, 7, 10, 15, 22, 33, 47, 70, 100]
WIDTHS = [250, 500, 1000, 2000, 4000, 8000]
IMAGES = [10, 50, 100, 250, 500, 1000, 2500, 5000, 10000, 50000]


def chart_data() -> dict[str, object]:
    """The numbers of every chart, by its name in docs/_static/charts.js.

    "goodness" is as `live.goodness_chart` gives it, "digits" are the values of `live.digits`,
    "network" reads what a visitor draws.
    """
    trained = records.read("01_algorithm_walkthrough", "default")["metrics"]["live"]
    return trained | {"network": small_network(), "memory": memory_by_size()}


def small_network() -> dict[str, object]:
    """Weights of a small network that is trained here on the 8x8 digits, as in notebook 1."""
    data = load_dataset("digits")
    config = FFConfig(label_scale=4.0, threshold=1.0, sharpness=30.0)
    network = ForwardForward(data.pixels, data.classes, [100, 100], config)
    fit(network, data, TrainConfig(epochs=20, batch_size=50, learning_rate=0.003), quiet=True)
    rounded = lambda tensor: [round(value, 3) for value in tensor.tolist()]  # noqa: E731
    layers = [
        {"weight": [rounded(row) for row in layer.weight], "bias": rounded(layer.bias)}
        for layer in network.layers
    ]
    return {"side": data.shape[0], "scale": config.label_scale, "layers": layers}


def memory_by_size() -> dict[str, object]:
    """MB that a step needs on the device, for every arm that has a formula.

    peaks: of an arm, for every depth, width and number of images, the last of them fastest.
    """
    arms = [memory.ARMS[name] for name in FORMULAS]
    sizes = [(d, h, images) for d in DEPTHS for h in WIDTHS for images in IMAGES]
    return {
        "depths": DEPTHS,
        "widths": WIDTHS,
        "images": IMAGES,
        "arms": [
            {
                "title": arm.title,
                "colour": arm.colour,
                "pale": arm.original,
                "peaks": [
                    round(FORMULAS[arm.name](memory.Sizes(d, h, arm.rows(images))) / 1e6, 1)
                    for d, h, images in sizes
                ],
            }
            for arm in arms
        ],
    }
