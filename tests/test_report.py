"""Pictures and the page: self-contained, labelled, and showing the data they were given."""

import base64
import re
import subprocess
import sys
from html.parser import HTMLParser

import numpy as np
import pytest
import torch

from sage_ext import report
from sage_ext.calibration import expected_calibration_error, reliability_diagram
from sage_ext.report import (
    Picture,
    Table,
    plot_clip,
    plot_reliability,
    plot_training,
    printable,
    read_log,
    write_report,
)
from sage_ext.training.trainer import COLUMNS

pytest.importorskip("matplotlib")
FRAMES = 240


@pytest.fixture
def clip():
    rng = np.random.default_rng(0)
    t = np.arange(FRAMES) / 30
    labels = np.stack([0.8 * np.sin(t), 0.5 * np.cos(2 * t)], 1).astype(np.float32)
    valid = np.ones(FRAMES, bool)
    valid[60:90] = valid[200:] = False
    labels[~valid] = np.nan
    weights = rng.dirichlet((3, 2), FRAMES)
    present = np.ones((FRAMES, 2), bool)
    present[100:130, 1] = False
    return {
        "name": "video_left", "prediction": 0.7 * np.nan_to_num(labels), "labels": labels, "valid": valid,
        "weights": weights, "confidence": rng.uniform(0, 1, (FRAMES, 2)), "stage": rng.dirichlet((1, 1, 1), FRAMES),
        "modalities": ["audio", "visual"], "present": present,
    }  # fmt: skip


def test_clip_picture_shows_its_data(clip):
    figure = plot_clip(**clip)
    valence, arousal, weight, confidence, stage = figure.axes
    assert [axis.get_ylabel() for axis in figure.axes] == ["valence", "arousal", "weight", "confidence", "P(stage)"]
    assert stage.get_xlabel() == "time (s)"
    lines = {line.get_label(): line for line in valence.lines}
    np.testing.assert_allclose(lines["prediction"].get_ydata(), clip["prediction"][:, 0])
    np.testing.assert_allclose(lines["prediction"].get_xdata(), np.arange(FRAMES) / 30)
    shown = lines["annotation"].get_ydata()
    assert np.isnan(shown[~clip["valid"]]).all()
    np.testing.assert_allclose(shown[clip["valid"]], clip["labels"][clip["valid"], 0])
    shaded = sorted((patch.get_x(), patch.get_x() + patch.get_width()) for patch in arousal.patches)
    np.testing.assert_allclose(shaded, [(60 / 30, 90 / 30), (200 / 30, 240 / 30)])
    visual = {line.get_label(): line for line in weight.lines}["visual"].get_ydata()
    assert np.isnan(visual[100:130]).all()  # a missing modality has no weight to show
    np.testing.assert_allclose(visual[:100], clip["weights"][:100, 1])
    assert any("visual missing" in str(line.get_label()) for line in confidence.lines)
    band = stage.collections
    assert len(band) == 3
    middle = band[1].get_paths()[0].vertices  # second stage: from p1 to p1 + p2
    top = (clip["stage"][:, 0] + clip["stage"][:, 1]).max()
    assert middle[:, 1].max() == pytest.approx(top, abs=1e-6)


def test_clip_without_annotation_and_many_stages(clip):
    figure = plot_clip(**{**clip, "labels": None, "valid": None, "stage": np.full((FRAMES, 16), 1 / 16)})
    assert not figure.axes[0].patches
    assert "annotation" not in [line.get_label() for line in figure.axes[0].lines]
    assert len(figure.axes[4].collections) == 16


def test_reliability_picture():
    g = torch.Generator().manual_seed(0)
    r = torch.rand(3000, generator=g)
    error = 0.0625 * (1 - r) / r * torch.randn(3000, generator=g) ** 2
    good = reliability_diagram(r, error, kappa=0.25)
    bad = reliability_diagram(r.sqrt(), error, kappa=0.25)
    figure = plot_reliability([bad], [good], ["audio"])
    (axis,) = figure.axes
    lines = {line.get_label(): line for line in axis.lines}
    after = f"after, error {expected_calibration_error(good):.3f}"
    assert f"before, error {expected_calibration_error(bad):.3f}" in lines
    np.testing.assert_allclose(lines[after].get_xdata(), good.predicted)
    np.testing.assert_allclose(lines[after].get_ydata(), good.observed)
    np.testing.assert_allclose(lines["calibrated"].get_xydata(), [(0, 0), (1, 1)])


LOG = ",".join(COLUMNS) + "\n"


def test_training_picture(tmp_path):
    path = tmp_path / "log.csv"
    rows = [
        [i, 10 * (i + 1), 1e-3, 2 - i / 5, 1, 1, 1, 0.1, 0.2, 0.15, 0.3, 0.5, 0.4 + 0.1 * (i == 2), 0.5]
        for i in range(4)
    ]
    path.write_text(LOG + "".join(",".join(map(str, row)) + "\n" for row in rows))
    log = read_log(path)
    np.testing.assert_allclose(log["val_P"], [0.4, 0.4, 0.5, 0.4])
    figure = plot_training(log)
    concordance = {line.get_label(): line for line in figure.axes[1].lines}
    np.testing.assert_allclose(concordance["validation P"].get_xdata(), [1, 2, 3, 4])
    np.testing.assert_allclose(concordance["validation P"].get_ydata(), log["val_P"])
    assert [text.get_text() for text in figure.axes[1].texts] == ["best 0.500"]
    path.write_text(LOG)
    with pytest.raises(ValueError, match="no epoch"):
        read_log(path)


class Reader(HTMLParser):
    def __init__(self):
        super().__init__()
        self.open, self.images, self.cells, self.links = [], [], [], []

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.links += [value for name, value in attributes.items() if name in ("href", "src", "srcset", "data")]
        if tag == "img":
            self.images.append(attributes)
        if tag not in ("img", "meta"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] == "td":
            self.cells.append(data)


def test_page_is_self_contained(tmp_path, clip):
    pictures = [Picture("video", "A video <with> a & in it", plot_clip(**clip))]
    tables = [Table("Scores & <more>", ("", "P"), [("audio <b>", 0.12345), ("n", 7)], "A note.")]
    page = write_report(tmp_path / "out", "Run <1>", pictures, tables)
    text = page.read_text()
    reader = Reader()
    reader.feed(text)
    assert reader.open == []
    assert all(link.startswith("data:image/png;base64,") for link in reader.links)
    assert not re.search("https?:", text)
    assert "url(" not in text
    assert "<script" not in text
    (image,) = reader.images
    assert image["alt"] == "A video <with> a & in it"
    png = base64.b64decode(image["src"].split(",")[1])
    assert png == (tmp_path / "out" / "video.png").read_bytes()
    from matplotlib import image as image_reader

    pixels = image_reader.imread(tmp_path / "out" / "video.png")
    assert pixels.shape[0] > 800
    assert pixels.shape[1] > 1000
    assert len(np.unique(pixels[..., :3].reshape(-1, 3), axis=0)) > 50  # something is drawn
    assert reader.cells == ["audio <b>", "0.123", "n", "7"]
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["report.html", "video.png"]


def test_pictures_need_different_names(tmp_path, clip):
    picture = Picture("video", "", plot_clip(**clip))
    with pytest.raises(ValueError, match="pictures: expected different names"):
        write_report(tmp_path, "t", [picture, picture])


def test_table_text_is_aligned():
    text = Table("T", ("", "CCC_V", "P"), [("SAGE", 0.5, 0.25), ("a longer name", -0.125, 1.0)], "note").text()
    title, head, one, two, note = text.split("\n")
    assert (title, note) == ("T", "note")
    assert len(head) == len(one) == len(two)
    assert re.split(r"\s{2,}", two) == ["a longer name", "-0.125", "1.000"]


@pytest.mark.slow
def test_callers_matplotlib_is_left_alone(clip):
    import matplotlib

    before = dict(matplotlib.rcParams)
    report._png(plot_clip(**clip))
    assert dict(matplotlib.rcParams) == before
    code = (
        "import sage_ext.report, sys; assert 'matplotlib' not in sys.modules; assert 'safetensors' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_missing_extra_says_what_to_install(monkeypatch, clip):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match=r"pip install sage-ext\[train\]"):
        plot_clip(**clip)


NASTY = "a $\\frac{$ \x1b[2J\x1b]0;title\x07 <b>&\nnext\r\u202e"


def test_names_of_any_kind(tmp_path, clip):
    """Mathematics of TeX, escape sequences of terminals, new lines, HTML: shown as they are or spelt out."""
    names = [NASTY, "$x$"]
    figure = plot_clip(**{**clip, "name": NASTY, "modalities": names})
    table = Table(NASTY, ("", NASTY), [(NASTY, 1.0)], "note")
    page = write_report(tmp_path, NASTY, [Picture("picture", NASTY, figure)], [table])
    shown = "".join(text.get_text() for text in figure.findobj(lambda x: hasattr(x, "get_text")))
    assert r"a $\frac{$ \x1b[2J" in shown
    assert table.text().count("\n") == 3
    assert set(table.text()) <= {"\n", *map(chr, range(32, 127))}
    reader = Reader()
    reader.feed(page.read_text())
    assert reader.open == []
    assert "<b>&" not in page.read_text()


def test_printable():
    assert printable(NASTY) == r"a $\frac{$ \x1b[2J\x1b]0;title\x07 <b>&\nnext\r\u202e"
    assert printable("a\nb\tc é", "\n") == "a\nb\\tc é"
