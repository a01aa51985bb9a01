"""The pictures of a report, each from plain numbers or images to one file.

Axis letters: R rows, N images, K neighbours, C image channels, H W image.
"""

import importlib.util
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Okabe and Ito's colours, which differ for every kind of colour vision; yellow is too pale for a line.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
# Of each kind of method: its marker, whether that is filled, and what the legend calls it.
_KINDS = {
    "student": ("o", True, "student"),
    "span": ("D", True, "student and teacher"),
    "teacher": ("s", True, "teacher"),
    "ancestral": ("s", False, "teacher, ancestral"),
    "baseline": ("^", False, "baseline"),
}
_DPI, _FONT = 150, 8
# Pixels: what small images are enlarged to and large ones reduced to, the white between them, and the rim for words.
_SMALLEST, _LARGEST, _GAP, _RIM = 64, 128, 2, 26

Kind = Literal["student", "span", "teacher", "ancestral", "baseline"]


@dataclass(frozen=True)
class Point:
    """A method in the figure of quality against time.

    Attributes:
        name: written beside it.
        kind: decides the marker; a line joins those of kind `student` and `teacher`.
        milliseconds: time of an image.
        distance: mean over seeds.
        spread: its standard deviation.
    """

    name: str
    kind: Kind
    milliseconds: float
    distance: float
    spread: float


def check_matplotlib() -> None:
    """Ask for the package before anything is written.

    Raises:
        ValueError: it is not installed.
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise ValueError("the figures need matplotlib: pip install 'distilled-decoding[plot]'")


def quality_figure(panels: Sequence[tuple[str, Mapping[str, Sequence[Point]]]], time: str, path: Path) -> None:
    """Distance against time, one curve a model.

    Args:
        panels: each with the name of its distance, and the points of every model in it.
        time: what the milliseconds are.
        path: the PNG.
    """
    figure = _figure(8, 5.2 * len(panels))
    labels: list[tuple[Any, Point, str]] = []
    for axes, (distance, models) in zip(figure.subplots(len(panels), squeeze=False).flat, panels, strict=True):
        for colour, (model, points) in zip(_colours(len(models)), models.items(), strict=True):
            _curve(axes, model, points, colour)
            labels += [(axes, point, colour) for point in points]
        kinds = {point.kind for points in models.values() for point in points}
        for kind in (kind for kind in _KINDS if kind in kinds):
            axes.plot([], [], label=_KINDS[kind][2], **_marker(kind, "#555555"))
        _logarithmic(axes)
        axes.set_xlabel(time)
        axes.set_ylabel(f"{distance} (lower is better)")
        axes.legend(frameon=False, fontsize=9, loc="lower left", bbox_to_anchor=(0, 1), ncols=4)
    _label(figure, labels)
    figure.savefig(path, dpi=_DPI)


def _curve(axes: Any, model: str, points: Sequence[Point], colour: str) -> None:
    """The students, joined in order of time and ending at the teacher, and the other methods beside them."""
    joined = [point for point in points if point.kind in ("student", "teacher")]
    joined.sort(key=lambda point: (point.kind == "teacher", point.milliseconds))
    xs, ys = [point.milliseconds for point in joined], [point.distance for point in joined]
    axes.plot(xs, ys, color=colour, linewidth=1.5, label=model)
    for point in points:
        place = (point.milliseconds, point.distance)
        axes.errorbar(*place, yerr=point.spread, color=colour, linewidth=1, capsize=2)
        axes.plot(*place, zorder=3, **_marker(point.kind, colour))


def _marker(kind: str, colour: str) -> dict[str, Any]:
    marker, filled, _ = _KINDS[kind]
    # Hollow ones are larger: where a teacher's two ways of sampling meet, both are seen.
    face, size = (colour, 7) if filled else ("none", 10)
    return {"marker": marker, "color": colour, "markerfacecolor": face, "markersize": size, "linestyle": ""}


def _logarithmic(axes: Any) -> None:
    """Both axes logarithmic, with enough numbers for a range that is shorter than a decade."""
    from matplotlib.ticker import LogLocator, NullFormatter

    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.margins(x=0.15, y=0.12)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 5, 7)))
        axis.set_major_formatter(lambda value, _: f"{value:g}")
        axis.set_minor_formatter(NullFormatter())
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)


def _label(figure: "Figure", labels: Sequence[tuple[Any, Point, str]]) -> None:
    """Write the names beside their points, each where it hides the least of curves, points and other names."""
    from matplotlib.patheffects import withStroke
    from matplotlib.transforms import Bbox

    figure.draw_without_rendering()
    lines = [line for axes in figure.axes for line in axes.lines]
    paths: Any = [line.get_transform().transform_path(line.get_path()).interpolated(40) for line in lines]
    taken = [Bbox.from_extents(x - 5, y - 5, x + 5, y + 5) for path in paths for x, y in path.vertices]
    halo = [withStroke(linewidth=2.5, foreground="white")]
    for axes, point, colour in labels:
        place = (point.milliseconds, point.distance)
        text = axes.annotate(point.name, place, (0, 0), textcoords="offset points", fontsize=8.5)
        text.set(color=colour, path_effects=halo)
        boxes: dict[tuple[str, int], tuple[int, Any]] = {}
        for rise, side in product((5, -12, 15, -22, 25, -32), ("left", "right")):
            text.set_ha(side)
            text.xyann = (7 if side == "left" else -7, rise)
            box = text.get_window_extent()
            outside = box.x0 < axes.bbox.x0 or box.x1 > figure.bbox.x1
            boxes[side, rise] = sum(box.overlaps(other) for other in taken) + 1000 * outside, box
        side, rise = min(boxes, key=lambda key: boxes[key][0])
        text.set_ha(side)
        text.xyann = (7 if side == "left" else -7, rise)
        taken.append(boxes[side, rise][1])


def agreement_figure(
    curves: Mapping[str, Sequence[float]], chance: Sequence[float] | None, sizes: Sequence[int], path: Path
) -> None:
    """Share of tokens equal to the teacher's, block by block.

    Args:
        curves: for each method, a share a block.
        chance: the same of two samples of the teacher that share a label or prompt only.
        sizes: tokens of each block.
        path: the PNG.
    """
    figure = _figure(8, 3.8)
    axes = figure.subplots()
    few = len(sizes) <= 16
    for index, (colour, (name, shares)) in enumerate(zip(_colours(len(curves)), curves.items(), strict=True)):
        marker = "os^Dvp*"[index % 7] if few else ""
        percent = [100 * share for share in shares]
        axes.plot(range(len(sizes)), percent, marker=marker, color=colour, linewidth=1.5, label=name)
    if chance is not None:
        label = "chance: two samples of the teacher"
        axes.plot(range(len(sizes)), [100 * share for share in chance], "--", color="#666666", label=label)
    if few:
        plural = [f"{size} token{'s' * (size > 1)}" for size in sizes]
        axes.set_xticks(range(len(sizes)), [f"{block}\n{tokens}" for block, tokens in enumerate(plural)])
    axes.set_xlabel("block, the first is 0")
    axes.set_ylabel("tokens equal to the teacher's (%)")
    axes.set_ylim(0, 102)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=9)
    figure.savefig(path, dpi=_DPI)


def samples_figure(rows: Mapping[str, Tensor], path: Path) -> None:
    """A grid with a named row of uint8 images [N, C, H, W] for each method."""
    canvas_CHW = _canvas(torch.stack(list(rows.values())))
    height = canvas_CHW.shape[1] // len(rows)
    labels = [(0.0, (place + 0.5) * height, name) for place, name in enumerate(rows)]
    _write(canvas_CHW, labels, 20 + max(map(_width, rows)), 0, path)


def neighbours_figure(sample_NCHW: Tensor, nearest_NKCHW: Tensor, path: Path) -> None:
    """Samples, each with its nearest training images to its right, in two columns."""
    row_NKCHW = torch.cat([sample_NCHW[:, None], nearest_NKCHW], 1)
    half = (len(row_NKCHW) + 1) // 2
    parts = [_canvas(part[:, :1]) for part in row_NKCHW.split(half)]
    others = [_canvas(part[:, 1:]) for part in row_NKCHW.split(half)]
    pieces: list[Tensor] = []
    labels: list[tuple[float, float, str]] = []
    x = 0
    for sample_CHW, other_CHW in zip(parts, others, strict=True):
        labels += [(x, -_RIM / 2, "sample"), (x + sample_CHW.shape[2] + 12, -_RIM / 2, "nearest training images")]
        pieces += [F.pad(piece, (0, gap), value=255) for piece, gap in ((sample_CHW, 12), (other_CHW, 40))]
        x += pieces[-1].shape[2] + pieces[-2].shape[2]
    tallest = max(piece.shape[1] for piece in pieces)
    padded = [F.pad(piece, (0, 0, 0, tallest - piece.shape[1]), value=255) for piece in pieces]
    _write(torch.cat(padded, 2), labels, 0, _RIM, path)


def _canvas(image_RNCHW: Tensor) -> Tensor:
    """Rows of images as one, uint8 [C, H, W], each at its own scale of pixels and with white around it."""
    cells = [torch.stack([F.pad(_scaled(i), (0, _GAP, 0, _GAP), value=255) for i in row]) for row in image_RNCHW]
    return torch.cat([torch.cat(list(row), 2) for row in cells], 1)


def _scaled(image_CHW: Tensor) -> Tensor:
    """A small image enlarged by a whole factor, a large one reduced."""
    side = max(image_CHW.shape[1:])
    if side <= _LARGEST:
        factor = max(1, _SMALLEST // side)
        return image_CHW.repeat_interleave(factor, 1).repeat_interleave(factor, 2)
    small_1CHW = F.interpolate(image_CHW[None].float(), scale_factor=_LARGEST / side, mode="bilinear", antialias=True)
    return small_1CHW[0].round().clamp(0, 255).to(torch.uint8)


def _write(canvas_CHW: Tensor, labels: Sequence[tuple[float, float, str]], left: int, top: int, path: Path) -> None:
    """Save a canvas pixel by pixel, with words at (x, y) of it and a margin for them."""
    height, width = canvas_CHW.shape[1:]
    figure = _figure((width + left) / _DPI, (height + top) / _DPI, layout=None)
    image_HWC = canvas_CHW.expand(3, -1, -1).permute(1, 2, 0).numpy()
    figure.figimage(image_HWC, left, 0)
    for x, y, words in labels:
        place = (x + left - (12 if left else 0)) / (width + left), 1 - (y + top) / (height + top)
        figure.text(*place, words, ha="right" if left else "left", va="center", fontsize=_FONT)
    figure.savefig(path, dpi=_DPI)


def _figure(width: float, height: float, layout: Any = "constrained") -> "Figure":
    """A figure in inches that knows nothing of pyplot's global state."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout=layout)


def _width(words: str) -> int:
    """Pixels of a line of text."""
    from matplotlib.textpath import TextPath

    return round(TextPath((0, 0), words, size=_FONT).get_extents().width * _DPI / 72)


def _colours(count: int) -> list[str]:
    return [_COLOURS[index % len(_COLOURS)] for index in range(count)]
