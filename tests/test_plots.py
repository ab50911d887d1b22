import numpy as np
import pandas as pd
import pytest
import torch
from matplotlib import pyplot as plt

from ff_utils.memory.arms import ARMS
from ff_utils.report import live, plots


@pytest.fixture(autouse=True)
def show(tmp_path):
    yield plots.start(tmp_path / "figures")
    plt.close("all")


def words(axis):
    return [text.get_text() for text in axis.texts if text.get_text()]


def titles(figure):
    return [axis.get_title(loc="left") for axis in figure.axes]


def test_series_are_named_by_arm_or_as_they_are():
    assert len({(arm.title, arm.colour) for arm in ARMS.values()}) == len(ARMS)
    named = plots.names_and_colours(["backprop", "other"], ["red", "green"])
    assert named["backprop"] == (ARMS["backprop"].title, ARMS["backprop"].colour)
    assert named["other"] == ("other", "green")


def test_pareto_front_is_what_nothing_beats_in_both():
    table = pd.DataFrame(
        {
            "arm": ["slow and lean", "beaten", "fast and fat", "middle", "tied in time, fatter"],
            "per_1000_images": [5.0, 4.0, 1.0, 3.0, 3.0],
            "peak_bytes": [10, 50, 90, 40, 60],
        }
    )
    front = plots.pareto_front(table)
    assert list(front.arm) == ["fast and fat", "middle", "slow and lean"]


def test_colour_image_is_shown_channel_by_channel():
    row = torch.rand(3 * 4 * 5, generator=torch.Generator().manual_seed(0))
    figure = plots.images(row[None], (3, 4, 5), ["one"])
    shown = torch.from_numpy(figure.axes[0].images[0].get_array().data)
    assert torch.allclose(shown.permute(2, 0, 1).flatten().float(), row)


def test_lines_are_the_mean_of_their_rows_in_the_unit_asked_for():
    rows = {"depth": [2, 2, 4, 4], "peak_bytes": [1e9, 3e9, 4e9, 6e9], "arm": "backprop"}
    table = pd.DataFrame(rows)
    (axis,) = plots.lines(table, "depth", "peak_bytes", "arm", scale=1 / plots.GB).axes
    assert axis.lines[0].get_xydata() == pytest.approx(np.array([[2, 2], [4, 5]]))
    assert words(axis) == [ARMS["backprop"].title]
    assert axis.texts[0].xy == pytest.approx((4, 5))
    assert list(axis.get_xticks()) == [2, 4]


@pytest.mark.parametrize("log", ["", "y", "xy"])
def test_names_of_lines_are_inside_the_axes_and_apart(log):
    series = {
        f"line {k}": pd.DataFrame({"epoch": [1, 9], "error": [3, 1 + k / 1000]}) for k in range(6)
    }
    series["short"] = pd.DataFrame({"epoch": [1, 5], "error": [3, 1]})
    figure = plots.lines(series, "epoch", "error", log=log)
    figure.canvas.draw()
    (axis,) = figure.axes
    named = [text for text in axis.texts if text.get_text()]
    boxes = [text.get_window_extent() for text in named]
    assert len(boxes) == 7
    assert not any(box.count_overlaps(boxes[:k]) for k, box in enumerate(boxes))
    frame = axis.get_window_extent()
    assert all(frame.x0 < box.x0 and box.x1 < frame.x1 for box in boxes)
    assert all(frame.y0 < box.y0 and box.y1 < frame.y1 for box in boxes)
    ends = [series[text.get_text()].error.iloc[-1] for text in named]
    heights = [box.y0 for box in boxes]
    assert np.argsort(heights, kind="stable").tolist() == np.argsort(ends, kind="stable").tolist()


def test_names_of_points_cover_no_point_and_no_name():
    x = np.linspace(1, 2, 8)
    table = pd.DataFrame({"name": [f"a long name, {k}" for k in range(8)], "x": x, "y": 3 - x})
    figure = plots.scatter(table, "x", "y", "name")
    figure.canvas.draw()
    (axis,) = figure.axes
    boxes = [text.get_window_extent() for text in axis.texts if text.get_text()]
    assert len(boxes) == 8
    assert not any(box.count_overlaps(boxes[:k]) for k, box in enumerate(boxes))
    points = axis.transData.transform(table[["x", "y"]])
    assert not any(box.contains(*point) for box in boxes for point in points)


def test_scatter_fills_the_points_on_the_front():
    table = pd.DataFrame({"name": ["a", "b", "c"], "x": [1, 2, 3], "y": [3, 4, 1]})
    points = plots.scatter(table, "x", "y", "name", scale=2).axes[0].collections[0]
    assert points.get_offsets().tolist() == [[2, 8], [1, 6], [3, 2]]  # filled ones above others
    white = [tuple(colour[:3]) == (1, 1, 1) for colour in points.get_facecolors()]
    assert white == [True, False, False]


def test_heat_map_shows_every_number_and_nothing_for_none():
    cells = pd.DataFrame([[1.5, None], [30, -2]], index=[0.001, 2], columns=[100, 5000])
    axis = plots.heat_map(cells, label="%", form=".1f", centre=0).axes[0]
    assert words(axis) == ["1.5", "30.0", "-2.0"]
    assert [tick.get_text() for tick in axis.get_xticklabels()] == ["100", "5,000"]
    assert axis.collections[0].get_clim() == (-2, 30)
    high = plots.heat_map(cells, label="%", high=5).axes[0]
    assert high.collections[0].get_clim()[1] == 5


def test_bars_carry_their_numbers_and_spreads():
    figure = plots.bars({"a": 1.0, "b": 2.0}, "t", "error (%)", ["red", "blue"], {"a": 0.1, "b": 0})
    assert words(figure.axes[0]) == ["1.00 ± 0.10", "2.00"]


def test_breakdown_sums_the_categories_in_megabytes():
    sizes = {category: [number * 1e6] for number, category in enumerate(plots.CATEGORIES)}
    (axis,) = plots.breakdown(pd.DataFrame({"arm": ["ff_resident"], **sizes}), title="t").axes
    assert words(axis) == ["15"]
    ends = [patch.get_x() + patch.get_width() for patch in axis.patches]
    assert ends == pytest.approx([0, 1, 3, 6, 10, 15])


def test_timelines_name_the_peak():
    live = dict.fromkeys(plots.CATEGORIES, 0)
    steps = [("a", live), ("b", live | {"activations": 5e6, "inputs": 2e6}), ("c", live)]
    figure = plots.timelines({"backprop": steps, "ff_resident": steps[:1] * 3}, title="t")
    assert words(figure.axes[0]) == ["peak 7 MB"]


def test_histograms_share_the_goodness_axis():
    low, high = torch.linspace(0, 1, 50), torch.linspace(1, 2, 50)
    figure = plots.histograms([("one", low, high), ("two", low, low)], 0.5, "t")
    assert titles(figure) == ["one", "two"]
    assert figure.axes[0].get_xlim() == figure.axes[1].get_xlim()


@pytest.fixture
def digits():
    """Three images, of labels 1, 0, 1: the first two read rightly, the last one misread."""
    goodness = torch.tensor(
        [[[1.0, 3, 2], [2, 1, 0], [0, 0, 1]], [[0.0, 1, 0], [1, 0, 0], [0, 0, 2]]]
    )
    return live.digits(torch.rand(3, 9), (3, 3), torch.tensor([1, 0, 1]), goodness)


def test_digits_are_one_of_each_label_and_those_that_are_misread(digits):
    assert list(digits) == ["0", "1", "1 read as 2"]
    assert digits["1"]["goodness"] == [[1, 3, 2], [0, 1, 0]]
    assert digits["1 read as 2"]["predicted"] == 2


def test_label_goodness_frames_the_true_label_and_adds_the_layers_up(digits):
    figure = plots.label_goodness(digits, "t", "1 read as 2", digit="1")
    bars = ["layer 1", "layer 2", "all layers"]
    assert titles(figure)[:4] == ["true label 1\nread as 1: right", *bars]
    assert titles(figure)[4:] == ["true label 1\nread as 2: wrong", *bars]
    for axis in figure.axes[1:4] + figure.axes[5:]:
        assert [bar.get_linewidth() > 0 for bar in axis.patches] == [False, True, False]
    assert [bar.get_height() for bar in figure.axes[3].patches] == [1, 4, 2]


def test_digit_that_is_drawn_is_read_and_shown_without_a_true_label(digits, monkeypatch):
    monkeypatch.delenv("FF_PROGRESS", raising=False)
    shown, asked = [], []
    monkeypatch.setattr(live, "display", shown.append)

    def label_goodness(images):
        asked.append(images)
        return torch.tensor([[[0.0, 1, 2]], [[1.0, 3, 0]]])

    def draw(digit):
        return plots.label_goodness(digits, "t", "0", digit=digit)

    live.drawing(label_goodness, draw, digits, (3, 3))
    (box,) = shown
    box.children[0].children[5].value = True
    assert asked[0].tolist() == [[0, 0, 0, 0, 0, 1, 0, 0, 0]]
    assert digits["drawn"]["pixels"] == [[0, 0, 0], [0, 0, 1], [0, 0, 0]]
    assert titles(shown[1])[0] == "drawn,\nread as 1"
    assert all(bar.get_linewidth() == 0 for bar in shown[1].axes[3].patches)


def test_goodness_chart_counts_every_input_and_its_figure_shows_the_step_that_is_chosen():
    low, high = torch.full((5,), 0.5), torch.linspace(1, 2, 5)
    chart = live.goodness_chart({0: (low, low), 8: (high, low)}, theta=0.7, bins=4)
    assert chart["steps"] == [0, 8] and chart["theta"] == 0.7
    assert [sum(counts) for counts in chart["positive"] + chart["negative"]] == [5] * 4
    assert chart["positive"][0] == chart["negative"][0] != chart["positive"][1]
    figure = plots.goodness_in_training(chart, "t", step=8)
    assert titles(figure)[0] == "at training step 8"
    assert figure.axes[0].patches[0].get_data().values.tolist() == chart["positive"][1]


def test_ranks_show_ff_above_pipelined_backprop():
    figure = plots.ranks([[(0, 1), (1, 3)]], [[(0, 1, "forward"), (1, 3, "backward")]], title="t")
    assert words(figure.axes[0]) == ["1", "2"]
    assert figure.axes[1].get_xlim()[1] >= 3


def test_figure_is_saved_with_its_description(show, tmp_path, monkeypatch):
    shown = []
    monkeypatch.setattr(plots, "display", shown.append)
    figure = plots.bars({"a": 1.0}, 12 * "a title ", "x", ["red"])
    show(figure, "name", "what it shows")
    assert max(map(len, titles(figure)[0].splitlines())) <= 60
    assert "what it shows" in (tmp_path / "figures" / "name.svg").read_text()
    assert b"what it shows" in (tmp_path / "figures" / "name.png").read_bytes()
    assert shown[0].alt == "what it shows"


def test_live_figure_follows_its_sliders_and_is_still_under_make(show, tmp_path, monkeypatch):
    drawn, shown = [], []
    monkeypatch.setattr(live, "display", shown.append)

    def draw(depth=7, arm="backprop"):
        drawn.append((depth, arm))
        return plt.figure()

    controls = {"depth": [2, 7, 47], "arm": ["backprop", "ff_resident"]}
    monkeypatch.setenv("FF_PROGRESS", "plain")
    live.live(show, "still", "what it shows", draw, **controls)
    assert drawn == [(7, "backprop")] and not shown
    assert (tmp_path / "figures" / "still.png").exists()
    monkeypatch.delenv("FF_PROGRESS")
    live.live(show, "still", "what it shows", draw, **controls)
    depth, arm = shown[-1].children[:2]
    assert (depth.value, arm.value) == (7, "backprop")
    depth.value = 47
    assert drawn[-1] == (47, "backprop")
    assert not plt.get_fignums()
