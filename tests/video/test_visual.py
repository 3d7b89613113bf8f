"""Rows of features and quality from aligned crops."""

from __future__ import annotations

import itertools
import math
import sys
from pathlib import Path

import numpy as np
import pytest

cv2 = pytest.importorskip("cv2")

from sage_ext.video.faces import Face, OpenCVTracker, aligned  # noqa: E402
from sage_ext.video.visual import VisualFeatures, make_visual  # noqa: E402

GRID = sorted((Path(__file__).parents[2] / ".." / "shared" / "data" / "grid").glob("*.mpg"))
real = pytest.mark.skipif(not GRID, reason="no clips of the GRID corpus beside the project")
FACE = Face((100.0, 80.0, 128.0, 128.0), ((140.0, 130.0), (185.0, 130.0)), 9.0, 5.0, 0.0)
MOTION, GEOMETRY = 16, 7


def drawn(open_by: int = 2, turn: int = 0, shade: float = 0.0) -> np.ndarray:
    """A face where an aligned crop has it: mouth open by so many pixels, all but the outline moved to a side, lit from one."""
    crop = np.full((112, 112, 3), 60, np.uint8)
    cv2.ellipse(crop, (56, 60), (42, 54), 0, 0, 360, (190, 150, 130), -1, cv2.LINE_AA)
    for x in (38, 73):
        cv2.ellipse(crop, (x + turn, 52), (7, 4), 0, 0, 360, (40, 30, 30), -1, cv2.LINE_AA)
        cv2.ellipse(crop, (x + turn, 40), (10, 2), 0, 0, 360, (60, 40, 30), -1, cv2.LINE_AA)
    cv2.line(crop, (56 + 2 * turn, 55), (56 + 2 * turn, 74), (150, 110, 100), 3, cv2.LINE_AA)
    cv2.ellipse(crop, (56 + turn, 95), (14, open_by), 0, 0, 360, (50, 10, 20), -1, cv2.LINE_AA)
    light = 1 - shade * np.linspace(0, 1, 112)[None, :, None]
    return np.clip(crop * light, 0, 255).astype(np.uint8)


def named(features: VisualFeatures, row: np.ndarray) -> dict[str, float]:
    return dict(zip(features.columns, row.tolist()))


def quality_of(crop: np.ndarray | None, face: Face | None = FACE) -> dict[str, float]:
    features = make_visual()
    return dict(zip(features.quality, features.row(crop, face, 0.0)[1].tolist()))


def moved(face: Face, right: float, down: float, by: float = 1.0, age: float = 0.1) -> Face:
    left, top, width, height = face.box
    return Face((left + right, top + down, width * by, height * by), face.eyes, face.score, face.age + age, 0.0)


# ------------------------------------------------------------------------------------------------------------------- a row
def test_rows_are_finite_named_and_repeat():
    rows = []
    for _ in range(2):
        features = make_visual("hog")
        found = [features.row(drawn(open_by), moved(FACE, i, 0, age=i), i / 30) for i, open_by in enumerate((2, 9))]
        rows.append(found)
        for row, quality in found:
            assert row.shape == (len(features.columns),) == (576 + MOTION + GEOMETRY,)
            assert quality.shape == (len(features.quality),) == (8,)
            assert row.dtype == quality.dtype == np.float32
            assert np.isfinite(row).all()
        assert np.isfinite(found[1][1]).all()
        assert np.isnan(found[0][1]).tolist() == [name == "blur" for name in features.quality]
    assert len(set(features.columns)) == len(features.columns)
    np.testing.assert_equal(rows[0], rows[1])


def test_no_crop_no_features():
    features = make_visual()
    features.row(drawn(2), FACE, 0.0)
    row, quality = features.row(None, None, 0.1)
    assert np.isnan(row).all()
    assert np.isnan(quality).all()
    assert math.isnan(features.mouth)
    assert row.dtype == quality.dtype == np.float32
    row, _ = features.row(drawn(9), FACE, 0.2)  # nothing to compare with
    assert np.isfinite(row).all()
    assert not row[576 : 576 + MOTION].any()
    assert math.isnan(features.mouth)


def test_a_crop_without_a_face_that_is_known():
    features = make_visual()
    features.row(drawn(2), None, 0.0)
    row, quality = features.row(drawn(9), None, 0.1)
    assert np.isfinite(row).all()
    assert row[576 : 576 + MOTION].any()
    known = dict(zip(features.quality, np.isfinite(quality).tolist()))
    assert [name for name, there in known.items() if not there] == ["score", "size", "age", "blur"]


@pytest.mark.parametrize(("y", "x"), [(0, 0), (2, 5), (7, 4), (3, 6)])
@pytest.mark.parametrize("degrees", [10, 50, 130])
def test_hog_columns_name_the_cell_and_the_direction(y, x, degrees):
    crop = np.full((112, 112, 3), 128, np.uint8)
    steps, angle = np.arange(14), math.radians(degrees)
    wave = np.sin(np.add.outer(steps * math.sin(angle), steps * math.cos(angle)) * 2 * math.pi / 6)
    window = np.hanning(14)[:, None] * np.hanning(14)  # no edge around the cell
    crop[14 * y : 14 * (y + 1), 14 * x : 14 * (x + 1)] = (128 + 100 * wave * window)[..., None]
    features = make_visual()
    found = named(features, features.row(crop, FACE, 0.0)[0])
    cells = {(i, j): sum(found[f"hog_{i}_{j}_{b}"] for b in range(9)) for i in range(8) for j in range(8)}
    assert max(cells, key=cells.__getitem__) == (y, x)
    assert found[f"hog_{y}_{x}_{degrees // 20}"] == max(found[f"hog_{y}_{x}_{b}"] for b in range(9))


def test_motion_is_where_something_moved():
    features = make_visual()
    crop = drawn()
    features.row(crop, FACE, 0.0)
    assert math.isnan(features.mouth)
    other = crop.copy()
    other[28:56, 84:112] = 255 - other[28:56, 84:112]
    row, _ = features.row(other, FACE, 0.1)
    motion = {name: value for name, value in named(features, row).items() if name.startswith("motion")}
    assert len(motion) == MOTION
    assert motion.pop("motion_1_3") > 0.05
    assert not any(motion.values())
    assert features.mouth == 0
    row, _ = features.row(other, FACE, 0.2)
    assert not any(value for name, value in named(features, row).items() if name.startswith("motion"))


def test_the_mouth_moves_and_opens():
    features = make_visual()
    shut, _ = features.row(drawn(1), FACE, 0.0)
    features.row(drawn(1), FACE, 0.1)
    assert features.mouth == 0
    opened, _ = features.row(drawn(10), FACE, 0.2)
    assert features.mouth > 0.05
    assert named(features, opened)["mouth_darkness"] > named(features, shut)["mouth_darkness"] + 0.2
    assert named(features, opened)["mouth_edges"] > named(features, shut)["mouth_edges"]
    assert named(features, opened)["brow_edges"] == named(features, shut)["brow_edges"]


def test_brows():
    plain = drawn()
    plain[34:46, 20:92] = (190, 150, 130)
    features = make_visual()
    without, _ = features.row(plain, FACE, 0.0)
    along, _ = features.row(drawn(), FACE, 0.1)
    assert named(features, along)["brow_edges"] > named(features, without)["brow_edges"] + 0.01


def test_geometry_is_in_sizes_a_second():
    features = make_visual()
    features.row(drawn(), FACE, 0.0)
    row, quality = features.row(drawn(), moved(FACE, 12.8, 6.4), 0.1)
    found = named(features, row)
    assert found["velocity_x"] == pytest.approx(1.0)
    assert found["velocity_y"] == pytest.approx(0.5)
    assert found["growth"] == pytest.approx(0.0, abs=1e-6)
    assert found["tilt"] == 0
    assert dict(zip(features.quality, quality))["blur"] == pytest.approx(math.hypot(1, 0.5))
    grown = moved(moved(FACE, 12.8, 6.4), 0, 0, by=1.1)
    row, _ = features.row(drawn(), grown, 0.2)
    assert named(features, row)["growth"] == pytest.approx(math.log(1.1) / 0.1, rel=1e-5)
    tilted = Face(grown.box, ((140, 130), (180, 150)), 9.0, 5.3, 0.0)
    row, _ = features.row(drawn(), tilted, 0.3)
    assert named(features, row)["tilt"] == pytest.approx(math.atan2(20, 40))
    row, _ = features.row(drawn(), Face(grown.box, None, 9.0, 5.4, 0.0), 0.4)
    assert named(features, row)["tilt"] == 0


def test_a_cut_is_no_wild_value():
    features = make_visual()
    features.row(drawn(), FACE, 0.0)
    row, quality = features.row(drawn(), moved(FACE, -500, 900, by=4, age=0.01), 0.01)
    found = named(features, row)
    assert (found["velocity_x"], found["velocity_y"], found["growth"]) == (-5, 5, 5)
    assert dict(zip(features.quality, quality))["blur"] == pytest.approx(5 * math.sqrt(2))


def test_another_face_is_not_compared_with_the_one_before():
    features = make_visual()
    features.row(drawn(1), FACE, 0.0)
    other = Face((300.0, 80.0, 128.0, 128.0), None, 9.0, 0.0, 0.0)
    row, quality = features.row(drawn(10), other, 0.1)
    found = named(features, row)
    assert not any(value for name, value in found.items() if name.startswith(("motion", "velocity", "growth")))
    assert math.isnan(features.mouth)
    assert math.isnan(dict(zip(features.quality, quality))["blur"])


# ----------------------------------------------------------------------------------------------------------------- quality
def test_quality_of_the_face():
    found = quality_of(drawn())
    assert found["score"] == 9
    assert found["size"] == 7  # 128 pixels
    assert found["age"] == pytest.approx(math.log10(5.1))
    assert math.isnan(found["blur"])
    without = quality_of(None)
    assert without["score"] == 9
    assert math.isnan(without["sharpness"])


def test_sharpness_falls_under_blur():
    sharp = [quality_of(cv2.GaussianBlur(drawn(), (0, 0), sigma))["sharpness"] for sigma in (0.3, 1, 2, 4)]
    assert all(a > b + 0.2 for a, b in itertools.pairwise(sharp))


def test_brightness_and_contrast():
    for level in (0, 51, 255):
        found = quality_of(np.full((112, 112, 3), level, np.uint8))
        assert found["brightness"] == pytest.approx(level / 255)
        assert found["contrast"] == pytest.approx(0, abs=1e-6)
        assert math.isnan(found["symmetry"])  # nothing to compare
        assert found["sharpness"] == pytest.approx(-2)
    halves = np.zeros((112, 112, 3), np.uint8)
    halves[:, 56:] = 255
    found = quality_of(halves)
    assert found["brightness"] == pytest.approx(0.5)
    assert found["contrast"] == pytest.approx(0.5)


def test_a_frontal_face_is_more_symmetric_than_a_turned_one():
    frontal, little, much = (quality_of(drawn(turn=turn))["symmetry"] for turn in (0, 4, 9))
    assert frontal > 0.9
    assert frontal > little + 0.1
    assert little > much + 0.1
    assert quality_of(drawn(turn=-9))["symmetry"] == pytest.approx(much, abs=0.1)
    assert quality_of(drawn(shade=0.6))["symmetry"] > frontal - 0.2  # light from one side is no turn
    noise = np.random.default_rng(0).integers(0, 256, (112, 112, 3), dtype=np.uint8)
    assert abs(quality_of(noise)["symmetry"]) < 0.25


@real
def test_real_rows():
    """Of a speaker: finite, the mouth moves more than the forehead, blur and turn lower what they should."""
    av = pytest.importorskip("av")
    tracker, features = OpenCVTracker(), make_visual()
    rows, mouths, crops = [], [], []
    with av.open(str(GRID[0])) as file:
        for i, frame in enumerate(file.decode(video=0)):
            picture = frame.to_ndarray(format="rgb24")
            face = tracker.track(picture, i / 25)
            assert face is not None
            crops.append(aligned(picture, face))
            rows.append(features.row(crops[-1], face, i / 25))
            mouths.append(features.mouth)
    table = np.array([row for row, _ in rows])
    quality = dict(zip(features.quality, np.array([quality for _, quality in rows]).T))
    assert np.isfinite(table).all()
    assert quality["symmetry"].min() > 0.4
    assert 6 < quality["size"].min() < quality["size"].max() < 8
    assert np.nanmax(quality["blur"]) < 1
    motion = {name: table[:, i].mean() for i, name in enumerate(features.columns) if name.startswith("motion")}
    assert motion["motion_3_1"] + motion["motion_3_2"] > 1.2 * (motion["motion_0_1"] + motion["motion_0_2"])
    assert np.nanmax(mouths) > 2 * np.nanmedian(mouths)  # it speaks and it rests
    soft = quality_of(cv2.GaussianBlur(crops[0], (0, 0), 3))
    assert soft["sharpness"] < quality["sharpness"].min() - 0.5
    turned = cv2.warpPerspective(
        crops[0],
        cv2.getPerspectiveTransform(
            np.float32([[0, 0], [112, 0], [112, 112], [0, 112]]), np.float32([[0, 0], [75, 20], [75, 92], [0, 112]])
        ),
        (112, 112),
        borderMode=cv2.BORDER_REPLICATE,
    )
    assert quality_of(turned)["symmetry"] < quality["symmetry"][0] - 0.2


# ----------------------------------------------------------------------------------------------------------------- plug-ins
def network(path: Path, shape: list, kind: str = "GlobalAveragePool", inputs: int = 1, dtype: str = "FLOAT") -> Path:
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    from onnx import helper

    element = getattr(onnx.TensorProto, dtype)
    given = [helper.make_tensor_value_info(f"picture{i}", element, shape) for i in range(inputs)]
    output = helper.make_tensor_value_info("features", element, None)
    node = helper.make_node(kind, ["picture0"], ["features"])
    model = helper.make_model(
        helper.make_graph([node], "test", given, [output]), opset_imports=[helper.make_opsetid("", 17)], ir_version=8
    )
    onnx.save(model, str(path))
    return path


COLOURED = np.broadcast_to(np.array([51, 102, 255], np.uint8), (112, 112, 3)).copy()


def test_an_onnx_network(tmp_path):
    features = make_visual(f"onnx:{network(tmp_path / 'net.onnx', [1, 3, 'h', 'w'])}")
    assert features.columns[:3] == ("onnx_0", "onnx_1", "onnx_2")
    assert features.columns[3:] == make_visual().columns[576:]
    assert features.quality == make_visual().quality
    row, quality = features.row(COLOURED, FACE, 0.0)
    assert row.dtype == np.float32
    np.testing.assert_allclose(row[:3], [0.2, 0.4, 1.0], rtol=1e-4)  # RGB in 0..1
    np.testing.assert_array_equal(quality, make_visual().row(COLOURED, FACE, 0.0)[1])
    assert np.isnan(features.row(None, None, 0.1)[0]).all()


def test_an_onnx_network_with_a_size_of_its_own(tmp_path):
    features = make_visual(f"onnx:{network(tmp_path / 'net.onnx', ['n', 3, 4, 6], 'Identity')}")
    assert len(features.columns) == 3 * 4 * 6 + MOTION + GEOMETRY
    crop = COLOURED.copy()
    crop[:56] = 0
    row, _ = features.row(crop, FACE, 0.0)
    planes = row[:72].reshape(3, 4, 6)
    np.testing.assert_allclose(planes[:, 3], np.broadcast_to([[0.2], [0.4], [1.0]], (3, 6)), rtol=1e-5)
    assert not planes[:, 0].any()


def test_onnx_files_that_do_not_fit(tmp_path):
    pytest.importorskip("onnxruntime")
    (tmp_path / "bad.onnx").write_bytes(b"nothing")
    one = r"spec: expected a network with one float input of shape \(1, 3, H, W\), got .*"
    for path, message in (
        (tmp_path / "none.onnx", "spec: expected onnx:FILE with an ONNX network, got .*none.onnx.*, which is no file"),
        (tmp_path / "bad.onnx", "spec: expected onnx:FILE with an ONNX network, got .*bad.onnx"),
        (network(tmp_path / "grey.onnx", [1, 1, 64, 64]), one + r"\[1, 1, 64, 64\]"),
        (network(tmp_path / "flat.onnx", [1, 300], "Identity"), one + r"\[1, 300\]"),
        (network(tmp_path / "two.onnx", [1, 3, 64, 64], inputs=2), one + "picture1"),
        (network(tmp_path / "double.onnx", [1, 3, 64, 64], "Identity", dtype="DOUBLE"), one + "double"),
    ):
        with pytest.raises(ValueError, match=message):
            make_visual(f"onnx:{path}")


@pytest.fixture
def module(tmp_path, monkeypatch):
    """Writes a module that can be imported, and takes it away again."""

    def write(text: str) -> str:
        (tmp_path / "plug_in_of_a_test.py").write_text(text)
        return "plug_in_of_a_test"

    monkeypatch.syspath_prepend(str(tmp_path))
    yield write
    sys.modules.pop("plug_in_of_a_test", None)


def test_a_function(module):
    name = module("def means(crop):\n    assert crop.shape == (112, 112, 3)\n    return crop.mean(axis=(0, 1)) / 255\n")
    features = make_visual(f"{name}:means")
    assert features.columns[:3] == ("means_0", "means_1", "means_2")
    assert features.columns[3:] == make_visual().columns[576:]
    row, _ = features.row(COLOURED, FACE, 0.0)
    np.testing.assert_allclose(row[:3], [0.2, 0.4, 1.0], rtol=1e-5)


def test_a_function_that_names_its_columns(module):
    name = module("def f(crop):\n    return [1.0, 2.0]\n\nf.columns = ['one', 'two']\n")
    features = make_visual(f"{name}:f")
    assert features.columns[:2] == ("one", "two")
    assert features.row(COLOURED, FACE, 0.0)[0][:2].tolist() == [1, 2]


def test_a_function_that_finds_nothing_makes_a_row_without_features(module):
    name = module("def f(crop):\n    return [1.0, float('nan') if crop.mean() < 9 else 2.0]\n")
    features = make_visual(f"{name}:f")
    assert np.isfinite(features.row(COLOURED, FACE, 0.0)[0]).all()
    assert np.isnan(features.row(COLOURED // 99, FACE, 0.1)[0]).all()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("def f(crop):\n    return [1.0]\nf.columns = ('a', 'b')", r"test:f.columns: expected 1 names, .* got 2"),
        ("def f(crop):\n    return crop", r"test:f: expected numbers of shape \(D,\), got shape \(112, 112, 3\)"),
        ("def f(crop):\n    return 'text'", r"test:f: expected numbers, \(D,\), of a crop, got ValueError"),
        ("def f(crop):\n    return []", "test:f: expected at least one feature of a crop, got none"),
        ("f = 3", "spec: expected module:function with a function in it, got .*: f is int"),
        ("", "spec: expected module:function with a function in it, got .*: plug_in_of_a_test has no f"),
    ],
)
def test_functions_that_do_not_fit(module, text, message):
    name = module(text + "\n")
    with pytest.raises(ValueError, match=message):
        make_visual(f"{name}:f")


def test_a_function_that_changes_its_mind(module):
    features = make_visual(module("def f(crop):\n    return [1.0] * (2 if crop.mean() == 128 else 3)\n") + ":f")
    with pytest.raises(ValueError, match=r"spec: expected features of shape \(2,\) of each crop, got \(3,\)"):
        features.row(COLOURED, FACE, 0.0)


def test_a_module_that_misses_another_says_so(module):
    with pytest.raises(ModuleNotFoundError, match="no_such_module_at_all"):
        make_visual(module("import no_such_module_at_all\n") + ":f")


@pytest.mark.parametrize(
    "spec", ["", "hogs", "onnx", "onnx:", ":f", "module:", "a b:c", "module:f()", "a:b:c", "hog:1"]
)
def test_specs_that_are_none(spec):
    with pytest.raises(ValueError, match="spec: expected "):
        make_visual(spec)


def test_a_module_that_is_not_there():
    with pytest.raises(ValueError, match="got 'no_such_module_at_all:f': no module no_such_module_at_all"):
        make_visual("no_such_module_at_all:f")


def test_mediapipe_that_is_not_there(monkeypatch):
    monkeypatch.setitem(sys.modules, "mediapipe", None)
    with pytest.raises(ImportError, match="mediapipe is not installed; it comes with: pip install mediapipe"):
        make_visual("mediapipe")


def test_wrong_crops_and_times():
    features = make_visual()
    features.row(drawn(), FACE, 1.0)
    with pytest.raises(ValueError, match=r"time: expected a time after that of the last row, 1, got 1\.0"):
        features.row(drawn(), FACE, 1.0)
    with pytest.raises(ValueError, match=r"crop: expected shape \(112, 112, 3\), got \(64, 64, 3\)"):
        features.row(np.zeros((64, 64, 3), np.uint8), FACE, 2.0)
    with pytest.raises(ValueError, match="crop: expected RGB, uint8"):
        features.row(np.zeros((112, 112, 3)), FACE, 3.0)
