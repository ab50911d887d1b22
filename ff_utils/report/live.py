"""Sliders that redraw a figure in JupyterLab."""

import inspect
import os
from collections.abc import Callable, Sequence

from IPython.display import display
from matplotlib import pyplot as plt
from matplotlib.figure import Figure


def live(draw: Callable[..., Figure], **controls: Sequence) -> None:
    """Show a slider for each of `controls` and, below them, the figure that `draw` makes.

    draw: takes one value of each control by name and returns a figure; its defaults are where the
    sliders start. controls: the values of each slider, in order. Where a notebook runs without a
    reader, as under make (FF_PROGRESS=plain), nothing is shown: the still picture stays.
    """
    if os.environ.get("FF_PROGRESS") == "plain":
        return
    import ipywidgets  # takes a while to load

    def redraw(**values: object) -> None:
        figure = draw(**values)
        plt.close(figure)
        display(figure)

    sliders = {
        name: ipywidgets.SelectionSlider(
            options=list(values),
            value=inspect.signature(draw).parameters[name].default,
            description=name.replace("_", " "),
            continuous_update=False,
        )
        for name, values in controls.items()
    }
    display(ipywidgets.interactive(redraw, **sliders))
