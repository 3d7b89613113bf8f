"""Pictures of a run, as PNG files and as one HTML page that needs nothing beside it.

Each `plot_*` returns a matplotlib figure; `write_report` saves them. Nothing here touches pyplot or its global state,
so it works without a display and leaves the caller's figures alone. Colours are Okabe and Ito's, told apart by
colour-blind readers; where lines mean different modalities they differ in dash as well.
"""

from __future__ import annotations

import base64
import functools
import html
import io
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ParamSpec

import numpy as np

from .data.rates import FPS
from .data.targets import VALENCE_AROUSAL, Targets
from .extras import require
from .files import parsing, write_atomic

P = ParamSpec("P")
BLUE, VERMILLION, GREEN, ORANGE, SKY, PURPLE, YELLOW = (
    "#0072B2", "#D55E00", "#009E73", "#E69F00", "#56B4E9", "#CC79A7", "#F0E442",
)  # fmt: skip
MODALITY = (BLUE, VERMILLION, GREEN, PURPLE, ORANGE, SKY, "#777777", "black")
DASH: tuple[Any, ...] = ("-", (0, (5, 1.5)), (0, (1.5, 1)), (0, (6, 1.5, 1.5, 1.5))) * 2
STAGE = ("#77AADD", "#EE8866", "#EEDD88", "#44BB99", "#FFAABB", "#99DDFF", "#BBCC33", "#AAAA00")  # Tol's light scheme
GREY = "#D0D0D0"
STYLE = {
    "font.size": 9, "axes.titlesize": 10, "axes.titleweight": "bold", "axes.titlelocation": "left", "axes.grid": True,
    "grid.color": "#E4E4E4", "grid.linewidth": 0.6, "axes.axisbelow": True, "axes.spines.top": False,
    "axes.spines.right": False, "legend.frameon": False, "legend.fontsize": 8, "lines.linewidth": 1.3,
    "axes.edgecolor": "#666666", "figure.facecolor": "white", "text.parse_math": False,
}  # fmt: skip
DPI = 120


def printable(text: object, keep: str = "") -> str:
    """`text` for a terminal or a picture: what does not print, escape sequences of terminals among it, is spelt out (`keep`
    aside). Names of files, folders and modalities may hold anything."""
    return "".join(c if c.isprintable() or c in keep else c.encode("unicode_escape").decode() for c in str(text))


def _html(text: str) -> str:
    """The same for a page."""
    return html.escape(printable(text, keep="\n"))


@dataclass(frozen=True)
class Picture:
    """A figure, the name of its PNG file without the ending, and the sentence under it."""

    name: str
    caption: str
    figure: Any


def styled(plot: Callable[P, Any]) -> Callable[P, Any]:
    """Draw under STYLE whatever the caller's settings are."""

    @functools.wraps(plot)
    def inner(*args: P.args, **kwargs: P.kwargs) -> Any:
        with require("matplotlib", "train").rc_context(STYLE):
            return plot(*args, **kwargs)

    return inner


def new_figure(width: float, height: float, rows: int = 1, columns: int = 1, **grid: Any) -> tuple[Any, Any]:
    figure = require("matplotlib.figure", "train").Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False, **grid)


# ---------------------------------------------------------------------------------------------------------- one video
@styled
def plot_clip(
    name: str,
    prediction: np.ndarray,
    labels: np.ndarray | None,
    valid: np.ndarray | None,
    weights: np.ndarray,
    confidence: np.ndarray,
    stage: np.ndarray,
    modalities: Sequence[str],
    *,
    present: np.ndarray | None = None,
    best_weights: np.ndarray | None = None,
    fps: float = FPS,
    targets: Targets = VALENCE_AROUSAL,
) -> Any:
    """One video of T frames over time: each target against the truth, in its own units, then weights, confidence and stage.

    prediction, labels (T, C) on [-1, 1]; valid (T,) bool, invalid frames are shaded; weights, confidence, present (T, M); stage
    (T, S). `best_weights` (T, M): weights that know the true noise, drawn thin beside the model's.
    """
    (frames, count), many = weights.shape, len(targets)
    unit, name_of_unit = _time_unit(frames / fps)
    seconds = np.arange(frames) / fps / unit
    fps *= unit  # frames a unit, from here on
    heights = [*[3 if many <= 2 else 2] * many, 2.2, 2.2, 1.4]
    figure, axes = new_figure(
        11,
        9.2 if many == 2 else 0.8 * sum(heights) + 0.5,
        many + 3,
        1,
        sharex=True,
        gridspec_kw={"height_ratios": heights},
    )
    axes = axes[:, 0]
    weight_axis, confidence_axis, stage_axis = axes[many:]
    bad = np.zeros(frames, bool) if valid is None or labels is None else ~np.asarray(valid, bool)
    for c, (axis, target) in enumerate(zip(axes, targets)):
        if labels is not None:
            truth = target.unscaled(np.where(bad, np.nan, labels[:, c]))
            axis.plot(seconds, truth, color="black", label="annotation", linewidth=1.8)
        axis.plot(seconds, target.unscaled(prediction[:, c]), color=BLUE, label="prediction", linewidth=1.1)
        _shade(axis, bad, fps, GREY, "not annotated")
        ends = target.unscaled(np.array([-1.05, 1.05]))
        axis.set(ylim=ends, ylabel=printable(target.name), yticks=target.unscaled(np.array([-1, -0.5, 0, 0.5, 1])))
        axis.axhline(target.unscaled(0.0), color="#999999", linewidth=0.7, zorder=0)
    for axis, values, title in ((weight_axis, weights, "weight"), (confidence_axis, confidence, "confidence")):
        for m in range(count):
            shown = values[:, m] if present is None else np.where(present[:, m], values[:, m], np.nan)
            axis.plot(seconds, shown, color=MODALITY[m], linestyle=DASH[m], label=printable(modalities[m]))
        if title == "weight" and best_weights is not None:
            for m in range(count):
                label = "with the true noise known" if m == 0 else None
                axis.plot(seconds, best_weights[:, m], color=MODALITY[m], linewidth=0.7, alpha=0.55, label=label)
        if present is not None:
            _missing_ticks(axis, present, seconds, modalities)
        axis.set(ylim=(-0.03, 1.03), ylabel=title, yticks=(0, 0.5, 1))
    _stage_band(stage_axis, stage, seconds, fps)
    for axis in axes[:-1]:
        axis.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), handlelength=2.6)
    axes[0].set_title(printable(name))
    stage_axis.set(xlabel=f"time ({name_of_unit})", xlim=(0, frames / fps))
    figure.align_ylabels(axes)
    return figure


def _time_unit(seconds: float) -> tuple[float, str]:
    """In which a span of so many seconds is best read."""
    for unit, name in ((86400.0, "days"), (3600.0, "h"), (60.0, "min")):
        if seconds >= 20 * unit:
            return unit, name
    return 1.0, "s"


def _runs(flags: np.ndarray) -> list[tuple[int, int]]:
    """[start, stop) of each run of True."""
    edges = np.flatnonzero(np.diff(np.concatenate([[False], flags, [False]]).astype(np.int8)))
    return list(zip(edges[::2].tolist(), edges[1::2].tolist()))


def _shade(axis: Any, flags: np.ndarray, fps: float, color: str, label: str) -> None:
    for i, (start, stop) in enumerate(_runs(flags)):
        axis.axvspan(start / fps, stop / fps, color=color, linewidth=0, zorder=0, label=label if i == 0 else None)


def _missing_ticks(axis: Any, present: np.ndarray, seconds: np.ndarray, modalities: Sequence[str]) -> None:
    """A bar at the panel's foot, in the modality's colour, where it is missing."""
    for m in range(present.shape[1]):
        for i, (start, stop) in enumerate(_runs(~present[:, m])):
            label = f"{printable(modalities[m])} missing" if i == 0 else None
            ends = (seconds[start], seconds[stop - 1])
            axis.plot(ends, (0.0 + 0.05 * m,) * 2, color=MODALITY[m], linewidth=4, solid_capstyle="butt", label=label)


def _stage_band(axis: Any, stage: np.ndarray, seconds: np.ndarray, fps: float) -> None:
    """The posterior as a band: each stage's colour fills as much of the height as its probability."""
    count = stage.shape[1]
    viridis = require("matplotlib", "train").colormaps["viridis"]
    colors = STAGE[:count] if count <= len(STAGE) else [viridis(x) for x in np.linspace(0.05, 0.95, count)]
    edges = np.append(seconds, seconds[-1] + 1 / fps)  # a frame lasts until the next
    axis.stackplot(
        edges, np.append(stage, stage[-1:], 0).T, colors=colors, labels=[f"{s + 1}" for s in range(count)],
        step="post", linewidth=0,
    )  # fmt: skip
    axis.set(ylim=(0, 1), yticks=(0, 1), ylabel="P(stage)")
    axis.grid(False)
    axis.legend(
        loc="center left", bbox_to_anchor=(1.0, 0.5), title="stage", ncols=2 if count > 2 else 1, handlelength=1.0,
        columnspacing=1.0,
    )  # fmt: skip


@styled
def plot_latency(counts: np.ndarray, edges: np.ndarray) -> Any:
    """A histogram of latencies: counts (n,) between edges (n + 1,) in microseconds, both axes logarithmic."""
    figure, axes = new_figure(11, 3.2)
    axis = axes[0, 0]
    axis.bar(edges[:-1], counts, np.diff(edges), align="edge", color=BLUE, edgecolor="white", linewidth=0.5)
    axis.set(xscale="log", yscale="log", xlabel="latency (us)", ylabel="frames", ylim=(0.5, None))
    axis.set_title("Latency of a frame")
    return figure


# --------------------------------------------------------------------------------------------------------- calibration
@styled
def plot_reliability(before: Sequence[Any], after: Sequence[Any], modalities: Sequence[str]) -> Any:
    """Reliability diagrams (`sage_ext.calibration.ReliabilityDiagram`), one a modality, before and after."""
    from .calibration import expected_calibration_error

    count = len(modalities)
    figure, axes = new_figure(min(4.2 * count + 0.6, 13), 4.3 if count < 4 else 3.4, 1, count, sharey=True)
    for m, axis in enumerate(axes[0]):
        axis.plot((0, 1), (0, 1), color="#777777", linewidth=0.9, label="calibrated")
        for diagram, name, color, marker, dash in (
            (before[m], "before", VERMILLION, "s", DASH[1]), (after[m], "after", BLUE, "o", "-"),
        ):  # fmt: skip
            x, y = np.asarray(diagram.predicted), np.asarray(diagram.observed)
            label = f"{printable(name)}, error {expected_calibration_error(diagram):.3f}"
            axis.plot(x, y, color=color, marker=marker, markersize=4, linestyle=dash, label=label)
        axis.set(xlim=(0, 1), ylim=(0, 1), aspect="equal")
        axis.set(xlabel="confidence (stated reliability)", title=printable(modalities[m]))
        axis.legend(loc="upper left")
    axes[0, 0].set_ylabel("observed reliability")
    return figure


# ----------------------------------------------------------------------------------------------------- training curves
@styled
def plot_training(log: Mapping[str, np.ndarray]) -> Any:
    """The columns of log.csv over epochs: loss and its parts, concordance in training and validation, learning rate."""
    figure, axes = new_figure(11, 3.9, 1, 3, gridspec_kw={"width_ratios": [3, 3, 2]})
    loss, concordance, rate = axes[0]
    epochs = log["epoch"] + 1
    marker = "o" if len(epochs) < 2 else None
    parts = (("loss", "total", "black"), ("loss_prediction", "1 - CCC, fused", BLUE),
             ("loss_unimodal", "1 - CCC, unimodal", VERMILLION),
             ("loss_reliability", "confidence score", GREEN))  # fmt: skip
    for (column, label, color), dash in zip(parts, DASH):
        loss.plot(epochs, log[column], color=color, linestyle=dash, label=label, marker=marker)
    loss.set(xlabel="epoch", ylabel="training loss, mean of the epoch", title="Loss, and its parts before weighting")
    single = [name for name in log if name.startswith("val_") and name != "val_P"]
    colors = (VERMILLION, GREEN, PURPLE, ORANGE, SKY)
    for column, label, color, dash in (
        ("train_P", "training P (with failures)", "#777777", DASH[1]),
        *(
            (name, f"validation {printable(name.removeprefix('val_'))}", colors[i], DASH[(i + 2) % 4])
            for i, name in enumerate(single[: len(colors)])
        ),
        ("val_P", "validation P", BLUE, "-"),
    ):
        concordance.plot(epochs, log[column], color=color, linestyle=dash, label=label, marker=marker)
    best = int(np.argmax(log["val_P"]))
    concordance.plot(epochs[best], log["val_P"][best], "o", color=BLUE, markersize=6)
    concordance.annotate(
        f"best {log['val_P'][best]:.3f}", (epochs[best], log["val_P"][best]), xytext=(0, -26),
        textcoords="offset points", ha="center", color=BLUE, fontsize=8,
        bbox={"facecolor": "white", "linewidth": 0, "pad": 1},
    )  # fmt: skip
    concordance.set(xlabel="epoch", ylabel="CCC", title="Concordance")
    rate.plot(epochs, log["lr"], color="black", marker=marker)
    rate.set(xlabel="epoch", ylabel="learning rate at the epoch's end", title="Learning rate", ylim=(0, None))
    for axis in axes[0, :2]:
        axis.legend(loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=2)
    for axis in axes[0]:
        axis.xaxis.set_major_locator(require("matplotlib.ticker", "train").MaxNLocator(integer=True))
    return figure


def read_log(path: str | os.PathLike[str]) -> dict[str, np.ndarray]:
    """The columns of a run's log.csv. ValueError where it has no rows."""
    with parsing(path):
        lines = Path(path).read_text().splitlines()
        rows = [[float(value) for value in line.split(",")] for line in lines[1:]]
        if not rows:
            raise ValueError(f"{path}: expected a row an epoch, got none: no epoch was finished")
        return dict(zip(lines[0].split(","), np.array(rows).T))


# --------------------------------------------------------------------------------------------------------------- page
_CSS = """
body { font: 15px/1.5 system-ui, sans-serif; color: #1a1a1a; background: #fff; max-width: 1100px; margin: 2rem auto;
       padding: 0 1rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin-top: 2.2rem; border-bottom: 1px solid #ddd; }
table { border-collapse: collapse; margin: 1rem 0; } th, td { padding: .3rem .9rem; border-bottom: 1px solid #e4e4e4; }
th { text-align: left; background: #f5f5f5; } td.number { text-align: right; font-variant-numeric: tabular-nums; }
figure { margin: 1.2rem 0; } img { max-width: 100%; height: auto; } figcaption { color: #555; font-size: .9rem; }
"""


@dataclass(frozen=True)
class Table:
    """Rows under a header; numbers are shown with three decimals."""

    title: str
    header: Sequence[str]
    rows: Sequence[Sequence[Any]]
    note: str = ""

    def text(self) -> str:
        """For a terminal: columns aligned, the first one to the left."""
        cells = [[printable(name) for name in self.header], *([_cell(value) for value in row] for row in self.rows)]
        widths = [max(len(row[i]) for row in cells) for i in range(len(self.header))]
        lines = [
            "  ".join([row[0].ljust(widths[0]), *(v.rjust(w) for v, w in zip(row[1:], widths[1:]))]) for row in cells
        ]
        return "\n".join([printable(self.title), *lines, *([printable(self.note, "\n")] if self.note else [])])

    def markdown(self) -> str:
        lines = [self.header, ["---"] * len(self.header), *([_cell(value) for value in row] for row in self.rows)]
        table = "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)
        return f"## {self.title}\n\n{table}\n" + (f"\n{self.note}\n" if self.note else "")

    def html(self) -> str:
        head = "".join(f"<th>{_html(name)}</th>" for name in self.header)
        body = "".join(
            "<tr>" + "".join(f"<td{_numeric(value)}>{_html(_cell(value))}</td>" for value in row) + "</tr>\n"
            for row in self.rows
        )
        note = f"<p>{_html(self.note)}</p>" if self.note else ""
        return f"<h2>{_html(self.title)}</h2>\n<table><tr>{head}</tr>\n{body}</table>\n{note}"


def _cell(value: Any) -> str:
    return f"{value:.3f}" if isinstance(value, float) else printable(value)


def _numeric(value: Any) -> str:
    return ' class="number"' if isinstance(value, (int, float)) else ""


def write_report(
    folder: str | os.PathLike[str], title: str, pictures: Sequence[Picture], tables: Sequence[Table] = ()
) -> Path:
    """Write each picture as `<name>.png` and all of it as `report.html` into `folder`; returns the page's path.

    The page holds its pictures and its style; it loads nothing. ValueError for two pictures of one name."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    if len({picture.name for picture in pictures}) != len(pictures):
        raise ValueError(f"pictures: expected different names, got {[picture.name for picture in pictures]}")
    parts = [table.html() for table in tables]
    for picture in pictures:
        png = _png(picture.figure)
        write_atomic(folder / f"{picture.name}.png", png)
        data, caption = base64.b64encode(png).decode(), _html(picture.caption)
        image = f'<img src="data:image/png;base64,{data}" alt="{caption}">'
        parts.append(f"<figure>{image}<figcaption>{caption}</figcaption></figure>")
    page = (
        f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><title>{_html(title)}</title>'
        f"<style>{_CSS}</style></head>\n<body><h1>{_html(title)}</h1>\n" + "\n".join(parts) + "\n</body></html>\n"
    )
    write_atomic(folder / "report.html", page)
    return folder / "report.html"


def _png(figure: Any) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=DPI)
    return buffer.getvalue()
