"""What the site's charts draw: two small trainings, by notebook 1's record, and formulas."""

from ff_utils import memory
from ff_utils.memory.formulas import FORMULAS
from ff_utils.report import records

# Sizes that the memory chart offers.
DEPTHS = [2, 3, 5, 7, 10, 15, 22, 33, 47, 70, 100]
WIDTHS = [250, 500, 1000, 2000, 4000, 8000]
IMAGES = [10, 50, 100, 250, 500, 1000, 2500, 5000, 10000, 50000]


def chart_data() -> dict[str, object]:
    """The numbers of every chart, by its name in docs/_static/charts.js.

    "goodness" is as `live.goodness_chart` gives it, "digits" are the values of `live.digits`.
    """
    trained = records.read("01_algorithm_walkthrough", "default")["metrics"]["live"]
    return trained | {"memory": memory_by_size()}


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
