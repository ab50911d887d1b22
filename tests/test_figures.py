import pandas as pd

from ff_utils import figures
from ff_utils.arms import ARMS


def test_every_arm_has_a_colour_of_its_own():
    assert set(figures.COLOURS) == set(ARMS)
    assert len(set(figures.COLOURS.values())) == len(ARMS)


def test_the_pareto_front_is_what_nothing_beats_in_both():
    table = pd.DataFrame(
        {
            "arm": ["slow and lean", "beaten", "fast and fat", "middle", "tied in time, fatter"],
            "per_1000_images": [5.0, 4.0, 1.0, 3.0, 3.0],
            "peak_bytes": [10, 50, 90, 40, 60],
        }
    )
    front = figures.pareto_front(table)
    assert list(front.arm) == ["fast and fat", "middle", "slow and lean"]
