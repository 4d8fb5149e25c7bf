"""Pictures of activations: values over image patches, over layers and positions, and over tokens.

Each function returns a `Drawing`: a matplotlib figure, and the numbers that it shows. Notebooks display the figure;
`drawing.figure.savefig("name.png")` writes it. Needs matplotlib: pip install "pgfunc[plot]".
"""

from collections.abc import Sequence
from io import BytesIO
from typing import Any, NamedTuple

import numpy as np
import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor

from pgfunc.errors import SettingError

SIGNED, POSITIVE, POSITIVE_OVERLAY = "RdBu_r", "viridis", "OrRd"  # colour maps
MOST_TICKS = 24  # labels on one axis
MOST_NUMBERS = 12  # columns of a grid whose numbers are written into it
STRIP_COLUMNS = 12  # tokens in one line of a strip


class Drawing(NamedTuple):
    """A matplotlib figure and the numbers that it shows."""

    figure: Any
    data: np.ndarray

    def _repr_png_(self) -> bytes:
        """The picture, for notebooks."""
        buffer = BytesIO()
        self.figure.savefig(buffer, format="png")
        return buffer.getvalue()


def heat(
    pixels: Float[Tensor, "3 y x"], values: Float[Tensor, "p"], title: str = "", limit: float | None = None
) -> Drawing:
    """A picture, and the same picture under the values of its image tokens.

    `pixels` are those of `pg.prepare`, in [-1, 1]. If a value is negative, the colours are blue and red around white;
    otherwise they go from white to red. `limit` is the value of the strongest colour. The data are the values as a
    grid. Raises SettingError if the number of values is not that of a square grid.
    """
    side = round(len(values) ** 0.5)
    if side**2 != len(values) or not side:
        raise SettingError(f"there are {len(values)} values, which is not a square grid of patches")
    grid_values = as_numpy(rearrange(values, "(gy gx) -> gy gx", gx=side))
    picture = as_numpy(rearrange((pixels + 1) / 2, "c y x -> y x c")).clip(0, 1)
    figure, (left, right) = subplots(1, 2, (9.2, 4.4))
    height, width = picture.shape[:2]
    left.imshow(picture)
    right.imshow(picture.mean(-1), cmap="gray", vmin=-1, vmax=1)  # pale, so that the colours stand out
    image = right.imshow(
        grid_values, extent=(0, width, height, 0), alpha=0.75, **colours(grid_values, limit, POSITIVE_OVERLAY)
    )
    figure.colorbar(image, ax=right, fraction=0.046, pad=0.03)
    for axes, name in ((left, "picture"), (right, title)):
        axes.set_axis_off()
        axes.set_title(name, fontsize=11)
    return Drawing(figure, grid_values)


def grid(
    values: Float[Tensor, "rows columns"],
    rows: Sequence[str] | str = "layer",
    columns: Sequence[str] | str = "position",
    title: str = "",
    limit: float | None = None,
) -> Drawing:
    """A table of colours, such as layers times positions.

    `rows` and `columns` are labels, or the name of an axis that is numbered. The first row is at the bottom, as the
    first layer is below the others. Small tables show their numbers. Raises SettingError for a wrong number of labels.
    """
    table = as_numpy(values)
    height, width = table.shape
    if not table.size:
        raise SettingError(f"the table is {height} x {width}, which leaves nothing to draw")
    size = (min(16.0, 2.2 + 0.42 * max(width, 8)), min(12.0, 1.4 + 0.34 * max(height, 5)))
    figure, axes = subplots(1, 1, size)
    scale = colours(table, limit)
    image = axes.imshow(table, origin="lower", aspect="auto", **scale)
    figure.colorbar(image, ax=axes, fraction=0.03, pad=0.02)
    label(axes.xaxis, columns, width, "columns")
    label(axes.yaxis, rows, height, "rows")
    axes.set_title(title, fontsize=11)
    if width <= MOST_NUMBERS:
        for y, x in np.ndindex(table.shape):
            axes.text(
                x, y, f"{table[y, x]:.3g}", ha="center", va="center", fontsize=8, color=ink(image, float(table[y, x]))
            )
    return Drawing(figure, table)


def strip(tokens: Sequence[str], probabilities: Float[Tensor, "t"], title: str = "") -> Drawing:
    """Tokens in reading order, each over the colour and the number of its probability.

    Raises SettingError if there is not one probability for each token.
    """
    shares = as_numpy(probabilities)
    if shares.shape != (len(tokens),) or not len(tokens):
        raise SettingError(f"there are {len(tokens)} tokens and probabilities of shape {shares.shape}")
    lines = -(-len(tokens) // STRIP_COLUMNS)
    figure, axes = subplots(1, 1, (11.0, 0.5 + 0.62 * lines))
    table = np.full((lines, min(len(tokens), STRIP_COLUMNS)), np.nan)
    table.flat[: len(tokens)] = shares
    image = axes.imshow(table, aspect="auto", cmap="Greens", vmin=0, vmax=1.2)
    for i, (token, share) in enumerate(zip(tokens, shares, strict=True)):
        y, x = divmod(i, STRIP_COLUMNS)
        color = ink(image, share)
        axes.text(x, y - 0.15, shown(token), ha="center", va="center", fontsize=9, color=color, parse_math=False)
        axes.text(x, y + 0.27, f"{share:.2f}", ha="center", va="center", fontsize=7, color=color)
    axes.set_axis_off()
    axes.set_title(title, fontsize=11)
    return Drawing(figure, shares)


# --- parts ------------------------------------------------------------------------------------------------------------


def subplots(rows: int, columns: int, size: tuple[float, float]) -> tuple[Any, Any]:
    """A figure that belongs to no window, and its axes. Raises SettingError if matplotlib is not installed."""
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        if str(error.name).partition(".")[0] != "matplotlib":
            raise
        raise SettingError('pictures need matplotlib, which is not installed: pip install "pgfunc[plot]"') from None
    figure = Figure(figsize=size, dpi=120, layout="constrained")
    return figure, figure.subplots(rows, columns)


def colours(table: np.ndarray, limit: float | None, positive: str = POSITIVE) -> dict[str, Any]:
    """The colour map and its range, which is symmetric around 0 if a value is negative."""
    finite = table[np.isfinite(table)]
    largest = limit or float(np.abs(finite).max(initial=0.0)) or 1.0
    if (finite < 0).any():
        return {"cmap": SIGNED, "vmin": -largest, "vmax": largest}
    return {"cmap": positive, "vmin": 0.0, "vmax": largest}


def label(axis: Any, names: Sequence[str] | str, count: int, what: str) -> None:
    """Label the ticks of an axis, at most `MOST_TICKS` of them."""
    if not isinstance(names, str) and len(names) != count:
        raise SettingError(f"there are {len(names)} labels for {count} {what}")
    ticks = range(0, count, -(-count // MOST_TICKS))
    texts = [str(i) if isinstance(names, str) else shown(names[i]) for i in ticks]
    turned = axis.axis_name == "x" and max(map(len, texts), default=0) > 3
    axis.set_ticks([*ticks], texts, fontsize=8, rotation=60 if turned else 0, parse_math=False)
    if isinstance(names, str):
        axis.set_label_text(names, fontsize=9)


def ink(image: Any, value: float) -> str:
    """Black or white, whichever is legible on the colour of this value."""
    red, green, blue, _ = image.cmap(image.norm(value))
    return "black" if 0.3 * red + 0.59 * green + 0.11 * blue > 0.55 else "white"


def shown(token: str) -> str:
    """A token with its white space made visible, and `?` for control characters."""
    text = token.replace("▁", " ").replace("\n", "↵").replace("\t", "→")
    text = "".join(each if each.isprintable() else "?" for each in text)
    return text if text.strip() else text.replace(" ", "␣")


def as_numpy(x: Tensor) -> np.ndarray:
    return x.detach().to("cpu", torch.float64).numpy()
