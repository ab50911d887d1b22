"""Figures with sliders in JupyterLab, still pictures everywhere else; the numbers they draw."""

import inspect
import os
from collections.abc import Callable, Sequence

import torch
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


def drawing(
    label_goodness: Callable, draw: Callable[..., Figure], digits: dict, shape: Sequence[int]
) -> None:
    """In JupyterLab: a grid of pixels to switch on and off, and the figure that is made of them.

    label_goodness: of images (1, pixels), as networks have it. draw: as in `live`, called with
    digit="drawn", the entry of `digits` that is made here, without a label. Nothing where a
    notebook runs without a reader.
    """
    if os.environ.get("FF_PROGRESS") == "plain":
        return
    import ipywidgets

    small = ipywidgets.Layout(width="26px", height="26px", margin="1px")
    pixels = [ipywidgets.ToggleButton(layout=small) for _ in range(shape[0] * shape[1])]
    below = ipywidgets.Output()

    def redraw(_: object) -> None:
        values = torch.tensor([float(pixel.value) for pixel in pixels])
        g = label_goodness(values.view(1, -1))[:, 0]
        drawn = {"label": None, "predicted": int(g.sum(0).argmax()), "goodness": _rounded(g)}
        digits["drawn"] = drawn | {"pixels": _rounded(values.view(*shape))}
        figure = draw(digit="drawn")
        plt.close(figure)
        below.clear_output(wait=True)
        with below:
            display(figure)

    for pixel in pixels:
        pixel.observe(redraw, "value")
    rows = ipywidgets.Layout(grid_template_columns=f"repeat({shape[1]}, 28px)")
    display(ipywidgets.VBox([ipywidgets.GridBox(pixels, layout=rows), below]))


def goodness_chart(
    found: dict[int, tuple[torch.Tensor, torch.Tensor]], theta: float, bins: int = 40
) -> dict[str, object]:
    """Histograms of goodness over training, as records and the site's chart hold them.

    found: by training step, the goodness of positive and of negative inputs, each (inputs,).
    Returns edges (of the bins), steps, positive and negative (a list of counts for each step),
    theta. The last bin holds the thousandth part that is beyond it.
    """
    every = torch.cat([g for pair in found.values() for g in pair])
    edges = torch.linspace(0, every.quantile(0.999).item(), bins + 1)

    def counts(kind: int) -> list[list[int]]:
        shown = [pair[kind].clamp(max=edges[-1]) for pair in found.values()]
        return [torch.histogram(g, edges)[0].int().tolist() for g in shown]

    return {
        "edges": [round(edge, 3) for edge in edges.tolist()],
        "steps": list(found),
        "positive": counts(0),
        "negative": counts(1),
        "theta": theta,
    }


def digits(
    images: torch.Tensor, shape: tuple[int, int], labels: torch.Tensor, goodness: torch.Tensor
) -> dict[str, dict]:
    """Some digits with every layer's goodness of every label, by name: the first of each label that
    is read rightly, then two that are misread.

    images: (N, pixels). labels: (N,), the true ones. goodness: (layers, N, classes).
    Each has label, predicted, pixels (rows of numbers from 0 to 1), goodness (a row per layer).
    """
    predicted = goodness.sum(0).argmax(1)
    is_right = predicted == labels
    chosen = {}
    for k in is_right.nonzero()[:, 0].tolist():
        chosen.setdefault(f"{labels[k]}", k)
    chosen = dict(sorted(chosen.items()))
    for k in (~is_right).nonzero()[:2, 0].tolist():
        chosen.setdefault(f"{labels[k]} read as {predicted[k]}", k)
    return {
        name: {
            "label": int(labels[k]),
            "predicted": int(predicted[k]),
            "pixels": _rounded(images[k].view(shape)),
            "goodness": _rounded(goodness[:, k]),
        }
        for name, k in chosen.items()
    }


def _rounded(values: torch.Tensor) -> list[list[float]]:
    return [[round(value, 3) for value in row] for row in values.tolist()]
