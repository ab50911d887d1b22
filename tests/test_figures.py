import pandas as pd
import torch

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


def test_a_colour_image_is_shown_channel_by_channel():
    row = torch.rand(3 * 4 * 5, generator=torch.Generator().manual_seed(0))
    figure = figures.images(row[None], (3, 4, 5), ["one"])
    shown = torch.from_numpy(figure.axes[0].images[0].get_array().data)
    assert torch.allclose(shown.permute(2, 0, 1).flatten().float(), row)
