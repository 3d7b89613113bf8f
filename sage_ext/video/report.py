"""One page of a video: what was estimated, who was trusted when, and why. It needs nothing beside it."""

from __future__ import annotations

import base64
import html
import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..data.targets import VALENCE_AROUSAL, Target, described
from ..files import write_atomic
from ..report import GREEN, MODALITY, ORANGE, PURPLE, SKY, STAGE, printable
from .result import Result

POINTS = 1500  # at most, of a curve
TARGET = (GREEN, PURPLE, ORANGE, SKY)  # colours of the targets' curves, in turn
DASHES = ("", "7 3", "2 2.5", "9 3 2 3")  # of the modalities' lines, in turn
DARK = 62  # percent of a colour that is left where it is lightened for a dark page
SPEECH = 0.5  # probability of speech from which on somebody speaks
GAP = 0.25  # seconds: spans of one reason that are nearer than this are shown as one


@dataclass(frozen=True)
class Reason:
    """Why a modality may be trusted less: it is absent, or a column of its quality is beyond a threshold.

    name          what is said of the span
    modality      the one that suffers
    column        of its quality, see `measured`; None: the modality is absent
    threshold     in the column's unit
    above         whether it is the values above the threshold that are meant, not those below
    spoken        whether it counts only where somebody speaks
    """

    name: str
    modality: str
    column: str | None = None
    threshold: float = 0.0
    above: bool = False
    spoken: bool = False

    def holds(self, result: Result) -> np.ndarray | None:
        """(T,) bool; None where the video has no such modality or column. What is unknown does not count."""
        if self.modality not in result.modalities:
            return None
        present = result.present[:, result.modalities.index(self.modality)].astype(bool)
        if self.column is None:
            return ~present
        values = measured(result, self.modality, self.column)
        speech = measured(result, "audio", "speech") if self.spoken else None
        if values is None or (self.spoken and speech is None):
            return None
        flags = present & (values > self.threshold if self.above else values < self.threshold)
        return flags if speech is None else flags & (speech >= SPEECH)


REASONS = (
    Reason("face lost", "visual"),  # no picture, or nobody in it
    Reason("small face", "visual", "size", 5.3),  # under 40 pixels high: the crop is enlarged almost threefold
    Reason(
        "blurred", "visual", "sharpness", 1.7
    ),  # variance of the Laplacian under 50; a sharp face of VHS quality has 200
    Reason(
        "fast motion", "visual", "blur", 2.0, above=True
    ),  # two face widths a second; who sits and talks has under 0.2
    Reason("dark", "visual", "brightness", 0.2),  # mean of the face, 1 is white; well lit ones have about 0.5
    Reason("overexposed", "visual", "brightness", 0.85, above=True),  # the same: skin near white has no shades
    Reason("low contrast", "visual", "contrast", 0.06),  # deviation under 15 of 255: fog, or a face against the light
    Reason("turned away", "visual", "symmetry", 0.3),  # of the halves; faces seen from the front have 0.55 to 0.9
    Reason("no sound", "audio"),  # no sound track, or none at that time
    # dB of full scale, of what stays between the words. Speech is at about -20: noise above -32 is less than 12 dB below it.
    # The ratio itself is of a moment, and as low in a pause as in noise.
    Reason("noise", "audio", "noise_floor", -32.0, above=True),
    Reason("no speech", "audio", "speech", SPEECH),  # probability: silence, or sounds that are no speech
    Reason(
        "clipping", "audio", "clipping", 0.01, above=True
    ),  # share of samples at full scale; a hundredth can be heard
    Reason(
        "other voice", "audio", "voice_match", 0.2, spoken=True
    ),  # 0.35 to 0.8 where the face speaks, about 0 where not
)

UNITS = {
    ("visual", "score"): "of the detection",
    ("visual", "size"): "log₂ of pixels",
    ("visual", "sharpness"): "log₁₀ of variance",
    ("visual", "brightness"): "0 black, 1 white",
    ("visual", "contrast"): "deviation, 1: white",
    ("visual", "symmetry"): "halves, 1: alike",
    ("visual", "age"): "log₁₀ seconds",
    ("visual", "blur"): "face widths/s",
    ("visual", "voice_match"): "mouth and voice",
    ("audio", "level"): "dB of full scale",
    ("audio", "snr"): "dB",
    ("audio", "noise_floor"): "level less snr, dB",
    ("audio", "speech"): "probability",
    ("audio", "clipping"): "of all samples",
    ("audio", "pitch_confidence"): "0 to 1",
    ("audio", "voice_match"): "mouth and voice",
}


def write_report(result: Result, path: str | Path) -> Path:
    """Write the page to `path`, whole or not at all, and return it. It loads nothing and works from a file."""
    if not len(result.present):
        raise ValueError("result: expected at least one frame, got none")
    path = Path(path)
    write_atomic(path, _page(result))
    return path


def quality_of(result: Result, modality: str) -> tuple[str, ...]:
    """Names of what is known of a modality's quality: its columns, and the noise floor where level and snr are among them."""
    names = tuple(result.quality_columns.get(modality, ()))
    return (*names, "noise_floor") if modality == "audio" and {"level", "snr"} <= set(names) else names


def measured(result: Result, modality: str, column: str) -> np.ndarray | None:
    """(T,) of a modality's quality, NaN where unknown; None without that column."""
    names = result.quality_columns.get(modality, ())
    if column in names:
        return np.asarray(result.quality[modality][:, names.index(column)], np.float64)
    if column == "noise_floor" and column in quality_of(result, modality):
        level, snr = (result.quality[modality][:, names.index(name)].astype(np.float64) for name in ("level", "snr"))
        return level - snr
    return None


def spans(flags: np.ndarray, fps: float, gap: float) -> list[tuple[float, float]]:
    """(from, to) in seconds of each run of True; runs that are less than `gap` seconds apart are one."""
    edges = np.flatnonzero(np.diff(np.concatenate([[False], flags, [False]]).astype(np.int8)))
    starts, stops = edges[::2] / fps, edges[1::2] / fps
    if not len(starts):
        return []
    apart = starts[1:] - stops[:-1] >= gap
    return list(zip(starts[np.append(True, apart)].tolist(), stops[np.append(apart, True)].tolist()))


def binned(values: np.ndarray, points: int = POINTS) -> np.ndarray:
    """(T,) -> the means of at most `points` bins of equally many frames, the last with what is left; NaN where all are."""
    size = -(-len(values) // points)
    known = ~np.isnan(values)
    starts = np.arange(0, len(values), size)
    count = np.add.reduceat(known.astype(int), starts)
    total = np.add.reduceat(np.where(known, values, 0).astype(np.float64), starts)
    return np.where(count > 0, total / np.maximum(count, 1), np.nan)


# --------------------------------------------------------------------------------------------------------------- words
def _text(value: object) -> str:
    return html.escape(printable(value))


def _clock(seconds: float) -> str:
    """1:02:03, 2:03, or 2:03.4 under a minute and a half."""
    if seconds < 90:
        tenths = round(seconds * 10)
        return f"{tenths // 600}:{tenths // 10 % 60:02d}.{tenths % 10}"
    whole = round(seconds)
    hours, minutes = whole // 3600, whole // 60 % 60
    return f"{hours}:{minutes:02d}:{whole % 60:02d}" if hours else f"{minutes}:{whole % 60:02d}"


def _percent(share: float) -> str:
    return "–" if np.isnan(share) else f"{100 * share:.0f} %"


def _number(value: float, digits: int) -> str:
    return "–" if np.isnan(value) else f"{value:.{digits}f}".replace("-", "−")


def _digits(low: float, high: float) -> int:
    """Decimals that tell a hundredth of half the range."""
    return int(np.clip(2 - np.floor(np.log10((high - low) / 2)), 0, 6)) if high > low else 2


def _mean(values: np.ndarray) -> float:
    known = values[~np.isnan(values)]
    return float(known.mean()) if len(known) else np.nan


# ---------------------------------------------------------------------------------------------------------------- page
class _Plots:
    """The curves of the page: what its script draws, and the rows that they are drawn in."""

    def __init__(self, result: Result) -> None:
        self.result = result
        self.size = -(-len(result.present) // POINTS)  # frames a bin
        self.series: list[list[float | None]] = []
        self.plots: list[dict[str, Any]] = []

    def add(self, values: np.ndarray) -> int:
        """The number of a curve (T,)."""
        self.series.append([None if np.isnan(x) else float(f"{x:.4g}") for x in binned(np.asarray(values, np.float64))])
        return len(self.series) - 1

    def row(
        self, title: str, unit: str, height: str, plot: dict[str, Any], keys: Iterable[str], *, axis: Sequence[str] = ()
    ) -> str:
        """Words on the left, the plot, and what its axis says from top to bottom."""
        self.plots.append(plot)
        unit = f" <span>{_text(unit)}</span>" if unit else ""
        label = f"{_text(title)} over time"
        places = [
            f'<b style="top:{100 * i / max(len(axis) - 1, 1):g}%">{_text(text)}</b>' for i, text in enumerate(axis)
        ]
        return (
            f'<div class="row"><div class="words"><h3>{_text(title)}{unit}</h3>{"".join(keys)}</div>'
            f'<div class="plot {height}" role="img" aria-label="{label}" data-plot="{len(self.plots) - 1}"></div>'
            f'<div class="axis {height}" aria-hidden="true">{"".join(places)}</div></div>\n'
        )

    @staticmethod
    def key(name: str, color: str, values: int, digits: int, mark: str = "<i></i>", shown: str | None = None) -> str:
        """A name beside its colour, and the value under the cursor."""
        output = f'<output data-values="{values}" data-digits="{digits}" aria-label="{_text(name)}"></output>'
        return f'<div class="key" style="--c:{color}">{mark}<span>{_text(name if shown is None else shown)}</span>{output}</div>'


def _colors(dark: bool) -> str:
    """The style's variables m0 .., t0 .., s0 .. of modalities, targets and stages."""

    def shade(color: str) -> str:
        if color == "black":
            return "var(--ink)"
        return f"color-mix(in srgb, {color} {DARK}%, white)" if dark else color

    groups = {"m": [shade(color) for color in MODALITY], "t": [shade(color) for color in TARGET], "s": list(STAGE)}
    lines = [
        "    " + " ".join(f"--{name}{i}: {color};" for i, color in enumerate(group)) for name, group in groups.items()
    ]
    return "\n".join(lines)


def _modality_color(m: int) -> str:
    return f"var(--m{m % len(MODALITY)})"


def _target_color(c: int) -> str:
    return f"var(--t{c % len(TARGET)})"


def _stage_color(s: int, count: int) -> str:
    return f"var(--s{s})" if count <= len(STAGE) else f"hsl({360 * s / count:.0f} 55% 65%)"


def _line_mark(m: int) -> str:
    stroke = f'stroke="{_modality_color(m)}" stroke-width="2" stroke-dasharray="{DASHES[m % len(DASHES)] or "none"}"'
    return f'<svg aria-hidden="true"><line x1="0" y1="50%" x2="100%" y2="50%" {stroke}/></svg>'


def _page(result: Result) -> str:
    plots = _Plots(result)
    panels = [_film(result)]
    if result.prediction is not None:
        panels.append(_targets(plots))
    panels.append(_trust(plots))
    if result.confidence is not None:
        panels.append(_confidence(plots))
    if result.stage is not None and result.stage.shape[1]:
        panels.append(_stages(plots))
    if result.prediction is None:
        panels.append(_measured(plots))
    panels.append(_quality(plots))
    data = {
        "bins": -(-len(result.present) // plots.size),
        "span": len(result.present) / plots.size,
        "seconds": len(result.present) / result.fps,
        "series": plots.series,
        "plots": plots.plots,
        "aspect": _aspect(result),
        "thumbnails": [
            [round(float(t), 3), base64.b64encode(jpeg).decode(), _face_place(result, t)]
            for t, jpeg in result.thumbnails
        ],
    }
    parts = {
        "title": _text(result.name),
        "colors": _colors(False),
        "dark_colors": _colors(True),
        "header": _header(result),
        "seconds": f"{len(result.present) / result.fps:.3f}",
        "panels": "".join(panels),
        "summary": _summary(result),
        "footer": _footer(result),
        "data": json.dumps(data, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c"),
    }
    template = Path(__file__).with_name("report.html").read_text("utf-8")
    return re.sub(r"\{\{(\w+)\}\}", lambda match: parts[match[1]], template)


def _aspect(result: Result) -> float:
    width, height = result.size
    return width / height if width and height else 1.5


def _face_place(result: Result, time: float) -> float:
    """Where the middle of the face is across the picture, 0 to 1; 0.5 where unknown."""
    frame = min(int(time * result.fps + 0.5), len(result.faces) - 1)
    left, _, width, _ = result.faces[frame]
    if np.isnan(left) or not result.size[0]:
        return 0.5
    return round(float(np.clip((left + width / 2) / result.size[0], 0, 1)), 3)


def _share_of_speech(result: Result) -> float:
    speech = measured(result, "audio", "speech")
    return np.nan if speech is None else float((speech >= SPEECH).mean())


def _present(result: Result, modality: str) -> float:
    return (
        float(result.present[:, result.modalities.index(modality)].mean()) if modality in result.modalities else np.nan
    )


def _mean_weights(result: Result) -> np.ndarray | None:
    """(M,) over the frames in which something is present."""
    if result.weights is None:
        return None
    some = result.weights.sum(1) > 0
    return result.weights[some].mean(0) if some.any() else np.full(len(result.modalities), np.nan)


def _target_range(result: Result, c: int) -> tuple[float, float, float]:
    """Mean, least and greatest estimate."""
    assert result.prediction is not None
    values = result.prediction[:, c]
    known = values[~np.isnan(values)]
    return (float(known.mean()), float(known.min()), float(known.max())) if len(known) else (np.nan,) * 3


def _header(result: Result) -> str:
    about = [f"{_clock(len(result.present) / result.fps)}", f"{len(result.present)} frames, {result.fps:g} a second"]
    if all(result.size):
        about.append(f"{result.size[0]} × {result.size[1]} pixels")
    about.append(
        "no run: nothing is estimated" if result.prediction is None else f"estimated by {result.run or 'a run'}"
    )
    cards: list[tuple[str, str, str, str]] = []
    for c, target in enumerate(result.targets if result.prediction is not None else ()):
        mean, low, high = _target_range(result, c)
        digits = _digits(target.low, target.high)
        between = f"mean; {_number(low, digits)} to {_number(high, digits)}"
        cards.append((target.name, _number(mean, digits), between, _target_color(c)))
    weights = _mean_weights(result)
    for m, name in enumerate(result.modalities):
        if weights is not None:
            cards.append((f"trust in {name}", _percent(float(weights[m])), "mean weight", _modality_color(m)))
    for modality, title, share in (
        ("visual", "face", _present(result, "visual")),
        ("audio", "speech", _share_of_speech(result)),
    ):
        if modality in result.modalities and not np.isnan(share):
            color = _modality_color(result.modalities.index(modality))
            cards.append((title, _percent(share), "of the time", "" if weights is not None else color))
    body = "".join(
        f'<div style="--c:{color or "var(--line)"}"><dt>{_text(name)}</dt>'
        f"<dd>{_text(value)} <small>{_text(note)}</small></dd></div>"
        for name, value, note, color in cards
    )
    lead = _lead(result)
    return (
        f"<h1>{_text(result.name)}</h1>\n<p>{_text(' · '.join(about))}</p>\n"
        + (f'<p class="lead">{_text(lead)}</p>\n' if lead else "")
        + (f'<dl class="cards">{body}</dl>' if body else "")
    )


def _lead(result: Result) -> str:
    """Who was trusted most for how long; without a run, that nothing is estimated and how it would be."""
    if result.prediction is None:
        return (
            "No emotion is estimated here, because that takes a trained model: extract the features of annotated videos, train "
            "on them with sage-ext train, and name the run directory with --run."
        )
    if result.weights is None or not len(result.modalities):
        return ""
    some = result.weights.sum(1) > 0
    most = result.weights[some].argmax(1)
    shares = [(float((most == m).sum()) / len(some), name) for m, name in enumerate(result.modalities)]
    told = [
        f"{name} for {_percent(share)} of the time"
        for share, name in sorted(shares, key=lambda pair: -pair[0])
        if share > 0
    ]
    if not told:
        return "There was nothing to rely on."
    nothing = float((~some).mean())
    return (
        "Trusted most: " + ", ".join(told) + (f"; nothing to rely on for {_percent(nothing)}." if nothing > 0 else ".")
    )


def _section(title: str, note: str, *rows: str) -> str:
    """A card: its heading, the sentence under it, its rows and the time axis."""
    said = f'<p class="note">{_text(note)}</p>\n' if note else ""
    return f"<section><h2>{_text(title)}</h2>{said}{''.join(rows)}</section>\n"


TICKS = '<div class="row"><div class="words bare"></div><div class="ticks" aria-hidden="true"></div></div>\n'


def _film(result: Result) -> str:
    """The pictures along the time axis, or the axis alone; beside them, what the numbers on the page mean just now."""
    film = (
        '<div class="film" role="group" aria-label="pictures along the video"></div>'
        if result.thumbnails
        else "<div></div>"
    )
    hint = (
        '<p class="hint"><span id="hint">means of the whole video</span> Point at a moment, or use the arrow keys.</p>'
    )
    return f'<section><div class="row"><div class="words">{hint}</div>{film}</div>\n{TICKS}</section>\n'


def _targets(plots: _Plots) -> str:
    result = plots.result
    assert result.prediction is not None
    rows = []
    for c, target in enumerate(result.targets):
        values, color = result.prediction[:, c], _target_color(c)
        line: dict[str, Any] = {"values": plots.add(values), "color": color}
        digits = _digits(target.low, target.high)
        keys = [plots.key("estimate", color, line["values"], digits)]
        if result.deviation is not None:
            deviation = result.deviation[:, c]
            line["band"] = [plots.add(np.clip(values + sign * deviation, target.low, target.high)) for sign in (-1, 1)]
            keys.append(
                plots.key(
                    "deviation",
                    f"color-mix(in srgb, {color} 30%, transparent)",
                    plots.add(deviation),
                    digits,
                    shown="±",
                )
            )
        middle = (target.low + target.high) / 2
        plot = {
            "low": target.low, "high": target.high, "zero": middle, "lines": [line],
            "grid": [(target.low + middle) / 2, (middle + target.high) / 2],
        }  # fmt: skip
        axis = [f"{x:.4g}".replace("-", "−") for x in (target.high, middle, target.low)]
        rows.append(plots.row(target.name, "", "tall" if len(result.targets) <= 2 else "middle", plot, keys, axis=axis))
    band = " The band is the estimate ± one deviation, clipped to the range." if result.deviation is not None else ""
    note = f"In the units of the run's annotations: {described(result.targets)}.{band}"
    return _section("Estimates", note, *rows, TICKS)


def _trust(plots: _Plots) -> str:
    """The weights, stacked, and below them what may be the reason."""
    result = plots.result
    rows = []
    if result.weights is not None:
        nothing = result.weights.sum(1) <= 0
        lines, keys = [], []
        for m, name in enumerate(result.modalities):
            number = plots.add(np.where(nothing, np.nan, result.weights[:, m]))
            lines.append({"values": number, "color": _modality_color(m)})
            keys.append(plots.key(name, _modality_color(m), number, 2))
        plot = {"kind": "stack", "low": 0, "high": 1, "lines": lines}
        rows.append(plots.row("Weight", "", "tall stripe", plot, keys, axis=("1", "0.5", "0")))
        title = "Who was trusted"
        note = "The share of each modality in the estimate, stacked; below, what was wrong with the signal when."
    else:
        title = "What was seen and heard"
        note = "Where there was a face, sound and speech; below, what was wrong with the signal when."
        for m, name in enumerate(result.modalities):
            said = {"visual": "face", "audio": "sound"}.get(name, name)
            rows.append(_lane(result, said, m, result.present[:, m].astype(bool)))
        speech = measured(result, "audio", "speech")
        if speech is not None:
            rows.append(_lane(result, "speech", result.modalities.index("audio"), speech >= SPEECH))
    lanes, fine = [], []
    for reason in REASONS:
        flags = reason.holds(result)
        told = result.weights is None and (reason.column is None or reason.column == "speech")  # by the lanes above
        if flags is None or told:
            continue
        if flags.any():
            lanes.append(_lane(result, reason.name, result.modalities.index(reason.modality), flags))
        else:
            fine.append(reason.name)
    if not lanes:
        fine = []
        lanes.append('<p class="note">Nothing was found to be wrong with the signal.</p>' if result.modalities else "")
    also = f'<p class="note">Not found: {_text(", ".join(fine))}.</p>' if fine else ""
    return _section(title, note, *rows, '<div class="lanes">\n', *lanes, "</div>", TICKS, also)


def _lane(result: Result, name: str, m: int, flags: np.ndarray) -> str:
    """Spans of time under a name, with their share of the whole."""
    seconds = len(flags) / result.fps
    found = spans(flags, result.fps, max(GAP, 2 * seconds / POINTS))
    bars = "".join(
        f'<i style="left:{100 * start / seconds:.3f}%;width:{100 * (stop - start) / seconds:.3f}%" '
        f'title="{_text(name)} {_clock(start)} to {_clock(stop)}"></i>'
        for start, stop in found
    )
    first = "; ".join(f"{_clock(start)} to {_clock(stop)}" for start, stop in found[:20])
    more = f"; and {len(found) - 20} more" if len(found) > 20 else ""
    share = float(flags.mean())
    total = f"{flags.sum() / result.fps:.1f} s" if flags.sum() / result.fps < 90 else _clock(flags.sum() / result.fps)
    return (
        f'<div class="row lane" style="--c:{_modality_color(m)}"><div class="words"><div class="key"><i></i>'
        f"<span>{_text(name)}</span><small>{total} · {'&lt; 1 %' if 0 < share < 0.005 else _percent(share)}</small></div></div>"
        f'<div class="plot" role="img" aria-label="{_text(f"{name}: {first}{more}")}">{bars}</div></div>\n'
    )


def _confidence(plots: _Plots) -> str:
    result = plots.result
    assert result.confidence is not None
    lines, keys = [], []
    for m, name in enumerate(result.modalities):
        number = plots.add(np.where(result.present[:, m].astype(bool), result.confidence[:, m], np.nan))
        lines.append({"values": number, "color": _modality_color(m), "dash": DASHES[m % len(DASHES)]})
        keys.append(plots.key(name, _modality_color(m), number, 2, _line_mark(m)))
    plot = {"low": 0, "high": 1, "lines": lines, "grid": [0.25, 0.5, 0.75]}
    row = plots.row("Confidence", "", "tall", plot, keys, axis=("1", "0.5", "0"))
    note = "How much of what the targets vary each modality is believed to explain at that moment; a gap is where it is absent."
    return _section("How sure each modality is", note, row, TICKS)


def _stages(plots: _Plots) -> str:
    result = plots.result
    assert result.stage is not None
    count = result.stage.shape[1]
    lines, keys = [], []
    for s in range(count):
        number = plots.add(result.stage[:, s])
        lines.append({"values": number, "color": _stage_color(s, count)})
        keys.append(plots.key(f"stage {s + 1}", _stage_color(s, count), number, 2))
    plot = {"kind": "stack", "low": 0, "high": 1, "lines": lines}
    row = plots.row("Stage", "", "middle", plot, keys, axis=("1", "0"))
    note = "The probability of each stage of the interaction. The stages are learnt; they have no names."
    return _section("Stages", note, row, TICKS)


def _measured(plots: _Plots) -> str:
    """Without a run: speech and the size of the face."""
    rows = [
        _quality_row(plots, modality, column, "middle")
        for modality, column in (("audio", "speech"), ("audio", "level"), ("visual", "size"), ("visual", "sharpness"))
        if measured(plots.result, modality, column) is not None
    ]
    return _section("Speech and face", "", *rows, TICKS) if rows else ""


def _quality_row(plots: _Plots, modality: str, column: str, height: str = "low") -> str:
    values = measured(plots.result, modality, column)
    assert values is not None
    shown = binned(values)
    known = shown[~np.isnan(shown)]
    reasons = [r.threshold for r in REASONS if (r.modality, r.column) == (modality, column)]
    low, high = (float(known.min()), float(known.max())) if len(known) else (0.0, 1.0)
    if high - low < 1e-6 * max(abs(low), abs(high), 1.0):
        low, high = low - 0.5, high + 0.5
    ends, margin = (high, low), 0.06 * (high - low)
    low, high = low - margin, high + margin
    color = _modality_color(plots.result.modalities.index(modality))
    number, digits = plots.add(values), max(_digits(low, high) - 1, 0)
    plot = {
        "low": low,
        "high": high,
        "lines": [{"values": number, "color": color}],
        "thresholds": [x for x in reasons if low < x < high],
    }
    axis = [_number(x, digits) for x in ends]
    key = plots.key(f"{modality}: {column}", color, number, digits, shown=UNITS.get((modality, column), ""))
    return plots.row(column.replace("_", " "), modality, height, plot, [key], axis=axis)


def _quality(plots: _Plots) -> str:
    rows = [
        _quality_row(plots, modality, column)
        for modality in plots.result.modalities
        for column in quality_of(plots.result, modality)
    ]
    if not rows:
        return ""
    note = "What was measured of picture and sound, of each a curve; a dashed line is the threshold of one of the reasons above."
    return (
        f"<details><summary>Quality of the signals: {len(rows)} curves</summary>\n"
        f'<div class="quality"><p class="note">{note}</p>\n{"".join(rows)}{TICKS}</div></details>\n'
    )


def _table(header: Sequence[str], rows: Iterable[Sequence[str]], caption: str) -> str:
    head = "".join(f'<th scope="col">{_text(cell)}</th>' for cell in header)
    body = "".join(
        f'<tr><th scope="row">{_text(row[0])}</th>' + "".join(f"<td>{_text(cell)}</td>" for cell in row[1:]) + "</tr>\n"
        for row in rows
    )
    return f"<table><caption>{_text(caption)}</caption><thead><tr>{head}</tr></thead>\n<tbody>{body}</tbody></table>\n"


def _summary(result: Result) -> str:
    tables = []
    if result.prediction is not None:
        rows = []
        for c, target in enumerate(result.targets):
            digits = _digits(target.low, target.high)
            deviation = np.nan if result.deviation is None else _mean(result.deviation[:, c])
            numbers = [_number(x, digits) for x in (*_target_range(result, c), deviation)]
            rows.append([target.name, *numbers])
        tables.append(_table(("Target", "Mean", "Least", "Greatest", "Mean deviation"), rows, "What was estimated"))
    weights = _mean_weights(result)
    if weights is not None:
        rows = []
        for m, name in enumerate(result.modalities):
            present = result.present[:, m].astype(bool)
            sure = np.nan if result.confidence is None else _mean(np.where(present, result.confidence[:, m], np.nan))
            rows.append([name, _percent(float(present.mean())), _number(float(weights[m]), 2), _number(sure, 2)])
        tables.append(_table(("Modality", "Present", "Mean weight", "Mean confidence"), rows, "What it relied on"))
    signals = [("Length", _clock(len(result.present) / result.fps))]
    for title, known, share in (
        ("Time with a face", "visual" in result.modalities, _present(result, "visual")),
        ("Time with sound", "audio" in result.modalities, _present(result, "audio")),
        ("Time with speech", "speech" in result.quality_columns.get("audio", ()), _share_of_speech(result)),
    ):
        if known:
            signals.append((title, _percent(share)))
    tables.append(_table(("Signal", "Value"), signals, "What was seen and heard"))
    return _section("Summary", "", '<div class="scroll">', *tables, "</div>")


def _meaning(targets: Sequence[Target]) -> str:
    usual = set(targets) == set(VALENCE_AROUSAL)
    what = "Valence and arousal in [−1, 1] are" if usual else "The targets, in their ranges, are"
    return (
        f"{what} what the annotators of the run's training videos meant by them: an impression of the person, no measurement "
        "of a feeling."
    )


def _footer(result: Result) -> str:
    said = [] if result.prediction is None else [_meaning(result.targets)]
    if result.deviation is not None:
        said.append("The deviation is that of the error the model's confidence stands for, at most.")
    said.append(
        "The parts used, such as the face detector and the model's training data, have licences of their own: see docs/video.md."
    )
    return f"<p>{_text(' '.join(said))}</p>\n<p>From {_text(result.source.name)}.</p>"
