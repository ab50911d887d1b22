"""Figures with sliders in JupyterLab, still pictures everywhere else."""

import inspect
import os
from collections.abc import Callable, Sequence

from IPython.display import display
from matplotlib import pyplot as plt
from matplotlib.figure import Figure


def live(show: Callable, name: str, alt: str, draw: Callable, **controls: Sequence) -> None:
    """Show the figure that `draw` makes: with a slider for each of `controls`, or a still picture.

    show: as `plots.start` returns it; it saves the still picture as `name`, described by `alt`.
    draw: takes one value of each control by name and returns a figure; its defaults are where the
    sliders start. controls: the values of each slider, in order. Where a notebook runs without a
    reader, as under make (FF_PROGRESS=plain), there is only the still picture, of the defaults.
    """
    show(draw(), name, alt)
    if os.environ.get("FF_PROGRESS") == "plain":
        return
    import ipywidgets  # takes a while to load
    from IPython.display import clear_output

    def redraw(**values: object) -> None:
        figure: Figure = draw(**values)
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
    clear_output()  # the sliders' own picture takes the still one's place
    display(ipywidgets.interactive(redraw, **sliders))
