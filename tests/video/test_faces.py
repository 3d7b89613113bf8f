"""Faces in pictures: found, followed, told apart, chosen, and cut out upright."""

from __future__ import annotations

import math
import time
from pathlib import Path

import numpy as np
import pytest

cv2 = pytest.importorskip("cv2")

from sage_ext.video.faces import (  # noqa: E402
    EYES,
    Face,
    Found,
    HaarDetector,
    OpenCVTracker,
    ToldTracker,
    aligned,
)

GRID = sorted((Path(__file__).parents[2] / ".." / "shared" / "data" / "grid").glob("*.mpg"))
real = pytest.mark.skipif(not GRID, reason="no clips of the GRID corpus beside the project")
HIGH, WIDE = 240, 320
FPS = 30


def clip(path: Path, most: int = 75) -> list[np.ndarray]:
    av = pytest.importorskip("av")
    with av.open(str(path)) as file:
        return [frame.to_ndarray(format="rgb24") for _, frame in zip(range(most), file.decode(video=0))]


# ----------------------------------------------------------------------------------------------- pictures drawn for a test
def texture(seed: int, size: int) -> np.ndarray:
    """A square with a pattern of its own, as a face has."""
    noise = np.random.default_rng(seed).integers(0, 256, (12, 12, 3), dtype=np.uint8)
    return cv2.resize(noise, (size, size), interpolation=cv2.INTER_CUBIC)


class Scene:
    """Squares on a dim background; what it shows, a detector is told, and how often it is asked is counted."""

    def __init__(self) -> None:
        self.background = texture(99, WIDE)[:HIGH] // 4
        self.boxes: dict[int, tuple[float, float, float]] = {}  # who -> left, top, size
        self.blind = False  # the detector sees nothing
        self.jitter = 0.0
        self.with_eyes = True
        self.asked = 0
        self._random = np.random.default_rng(0)

    def picture(self) -> np.ndarray:
        picture = self.background.copy()
        for who, (left, top, size) in self.boxes.items():
            side = round(size)
            matrix = np.array([[size / 64, 0, left], [0, size / 64, top]])
            warped = cv2.warpAffine(texture(who, 64), matrix, (WIDE, HIGH), flags=cv2.INTER_LINEAR)
            inside = cv2.warpAffine(np.full((64, 64), 255, np.uint8), matrix, (WIDE, HIGH)) > 127
            assert side
            picture[inside] = warped[inside]
        return picture

    def detect(self, picture: np.ndarray) -> list[Found]:
        self.asked += 1
        found = []
        for left, top, size in [] if self.blind else self.boxes.values():
            dx, dy = self._random.normal(0, 1, 2) * self.jitter * size
            eyes = ((left + 0.3 * size, top + 0.4 * size), (left + 0.7 * size, top + 0.4 * size))
            found.append(Found((left + dx, top + dy, size, size), eyes if self.with_eyes else None, 7.0))
        return found


class Run:
    """A tracker on a scene, picture by picture."""

    def __init__(self, person: str | int = "largest") -> None:
        self.scene = Scene()
        self.tracker = OpenCVTracker(person, detector=self.scene.detect)
        self.frame = -1

    def step(self) -> Face | None:
        self.frame += 1
        return self.tracker.track(self.scene.picture(), self.frame / FPS)

    def steps(self, number: int) -> list[Face | None]:
        return [self.step() for _ in range(number)]


def middle(face: Face | None) -> np.ndarray:
    assert face is not None
    left, top, width, height = face.box
    return np.array([left + width / 2, top + height / 2])


def off(face: Face | None, box: tuple[float, float, float]) -> float:
    """How far the middle is from that of the box, in its sizes."""
    left, top, size = box
    return float(np.abs(middle(face) - [left + size / 2, top + size / 2]).max()) / size


# --------------------------------------------------------------------------------------------------------------- following
def test_a_face_is_followed_between_detections():
    run = Run()
    for i in range(60):
        box = run.scene.boxes[1] = (40 + 2.3 * i, 60 + 25 * math.sin(i / 8), 60)
        face = run.step()
        assert off(face, box) < 0.03
        assert face is not None
        assert face.eyes is not None
        np.testing.assert_allclose(face.eyes[0], (box[0] + 18, box[1] + 24), atol=2.5)
        assert face.age == pytest.approx(i / FPS)
        assert face.since < 1 / 3 + 0.001
        assert face.score == 7
    assert 6 <= run.scene.asked <= 8  # of 60 pictures


def test_it_is_followed_where_the_detector_is_blind_for_a_while():
    run = Run()
    run.scene.boxes[1] = (40, 60, 60)
    run.steps(15)
    run.scene.blind = True
    for i in range(45):
        box = run.scene.boxes[1] = (40 + 2 * i, 60, 60)
        face = run.step()
        assert off(face, box) < 0.05
    assert face is not None
    assert 1.4 < face.since < 2
    assert run.steps(90)[-1] is None  # nobody confirms it for too long


def test_a_sighting_that_is_never_confirmed_ends_soon():
    run = Run()
    run.scene.boxes[1] = (40, 60, 60)
    assert run.step() is not None
    run.scene.blind = True
    shown = [face is not None for face in run.steps(45)]
    assert shown[10]
    assert not any(shown[25:])


def test_a_lost_face_stays_for_half_a_second_and_is_the_same_when_it_is_back():
    run = Run()
    run.scene.boxes[1] = (40, 60, 60)
    run.steps(20)
    box = run.scene.boxes.pop(1)
    asked = run.scene.asked
    held = run.steps(10)
    assert run.scene.asked == asked + 10  # looked for in each picture
    assert all(off(face, box) < 0.02 for face in held)
    run.scene.boxes[1] = box
    face = run.step()
    assert face is not None
    assert face.age == pytest.approx(30 / FPS)
    assert off(face, box) < 0.02
    assert min(face.since for face in run.steps(12) if face is not None) == 0

    del run.scene.boxes[1]
    shown = [face is not None for face in run.steps(30)]
    assert shown == [True] * 15 + [False] * 15
    run.scene.boxes[1] = box
    face = next(face for face in run.steps(4) if face is not None)  # looked for every 0.1 s
    assert face.age < 0.001


def test_a_jump_is_found_at_once():
    run = Run()
    run.scene.boxes[1] = (40, 60, 60)
    run.steps(14)
    box = run.scene.boxes[1] = (110, 90, 60)
    face = run.step()
    assert off(face, box) < 0.01
    assert face is not None
    assert face.age == pytest.approx(14 / FPS)


def test_what_the_detector_says_does_not_shake_the_box():
    run = Run()
    run.scene.boxes[1] = (100, 60, 80)
    run.scene.jitter = 0.04
    middles = np.array([middle(face) for face in run.steps(120)])[20:]
    eyes = np.array([face.eyes for face in run.steps(30) if face is not None])
    assert np.abs(np.diff(middles, axis=0)).max() < 0.008 * 80  # a detection shakes by 0.04
    assert np.ptp(eyes, axis=0).max() < 0.5


def test_a_face_that_comes_nearer_grows():
    run = Run()
    for i in range(90):
        size = 40 * 1.01**i
        box = run.scene.boxes[1] = (160 - size / 2, 120 - size / 2, size)
        face = run.step()
        assert off(face, box) < 0.08
        assert face is not None
        assert 0.8 < face.box[2] / size < 1.1


def test_eyes_that_are_not_seen_for_long_are_given_up():
    run = Run()
    run.scene.boxes[1] = (100, 60, 80)
    run.steps(10)
    run.scene.with_eyes = False
    faces = run.steps(120)
    assert faces[60] is not None
    assert faces[60].eyes is not None  # a blink is no reason
    assert faces[-1] is not None
    assert faces[-1].eyes is None


def test_runs_repeat_and_the_future_does_not_matter():
    def run(number: int) -> list[Face | None]:
        run = Run()
        run.scene.jitter = 0.02
        found = []
        for i in range(number):
            run.scene.boxes[1] = (40 + 1.7 * i, 60, 60)
            found.append(run.step())
        return found

    assert run(40) == run(40)
    assert run(40)[:20] == run(20)


def test_another_size_of_picture_begins_anew():
    run = Run()
    run.scene.boxes[1] = (40, 60, 60)
    run.steps(8)
    run.tracker._detect = lambda picture: [Found((10.0, 10.0, 50.0, 50.0), None, 1.0)]
    face = run.tracker.track(np.zeros((120, 160, 3), np.uint8), 8 / FPS)
    assert face == Face((10.0, 10.0, 50.0, 50.0), None, 1.0, 0.0, 0.0)


# ------------------------------------------------------------------------------------------------------------------ people
TWO = {1: (30, 80, 60), 2: (200, 70, 80)}


@pytest.mark.parametrize(
    ("person", "who"), [("largest", 2), ("left", 1), ("right", 2), (1, 1), (2, 2), ("2", 2), (3, None)]
)
def test_the_person_that_is_shown(person, who):
    run = Run(person)
    run.scene.boxes |= TWO
    for face in run.steps(15):
        if who is None:
            assert face is None
        else:
            assert off(face, TWO[who]) < 0.02


def test_the_largest_does_not_flip():
    run = Run()
    for i in range(90):
        run.scene.boxes = {1: (30, 80, 64 + 4 * math.sin(i / 3)), 2: (200, 70, 64 - 4 * math.sin(i / 3))}
        face = run.step()
        if i == 0:
            first = middle(face)[0]
        assert abs(middle(face)[0] - first) < 10


def test_who_is_clearly_larger_for_a_second_is_shown():
    run = Run()
    run.scene.boxes = {1: (30, 80, 60), 2: (200, 70, 55)}
    assert all(off(face, run.scene.boxes[1]) < 0.05 for face in run.steps(30))
    begin = run.frame
    run.scene.boxes[2] = (180, 60, 100)
    while off(run.step(), run.scene.boxes[1]) < 0.05:
        assert run.frame < begin + 90
    assert 1 <= (run.frame - begin) / FPS < 2
    assert all(off(face, run.scene.boxes[2]) < 0.05 for face in run.steps(30))


def test_a_second_face_counts_once_it_was_seen_twice():
    run = Run("left")
    run.scene.boxes[2] = TWO[2]
    run.steps(15)
    run.scene.boxes[1] = TWO[1]
    begin = run.frame
    while off(run.step(), TWO[2]) < 0.05:
        assert run.frame < begin + 40
    assert (run.frame - begin) / FPS > 1 / 3
    del run.scene.boxes[1]
    faces = run.steps(25)
    assert off(faces[0], TWO[1]) < 0.05  # only hidden, perhaps
    assert off(faces[-1], TWO[2]) < 0.05


def test_two_who_pass_each_other_keep_their_tracks():
    run = Run()
    for i in range(80):
        run.scene.boxes = {1: (20 + 2.5 * i, 20, 70), 2: (230 - 2.5 * i, 130, 60)}
        face = run.step()
        assert off(face, run.scene.boxes[1]) < 0.05


# ------------------------------------------------------------------------------------------------------------------- errors
@pytest.mark.parametrize("person", ["x", "0", 0, -1, 1.0, True, "", None])
def test_a_wrong_person(person):
    with pytest.raises(ValueError, match="person: expected largest, left, right or a number from 1, got"):
        OpenCVTracker(person)


def test_wrong_pictures_and_times():
    tracker = OpenCVTracker()
    picture = np.zeros((60, 80, 3), np.uint8)
    assert tracker.track(picture, 1.0) is None
    with pytest.raises(ValueError, match=r"time: expected a time after that of the last picture, 1, got 1.0"):
        tracker.track(picture, 1.0)
    with pytest.raises(ValueError, match=r"picture: expected RGB, uint8 of shape .*, got float64 of shape"):
        tracker.track(picture / 255, 2.0)
    with pytest.raises(ValueError, match=r"got uint8 of shape \(60, 80\)"):
        tracker.track(picture[..., 0], 2.0)


def test_a_yunet_file_that_is_none(tmp_path):
    with pytest.raises(ValueError, match=r"yunet: expected the ONNX file of a YuNet model, got .*, which is no file"):
        OpenCVTracker(yunet=tmp_path / "none.onnx")
    (tmp_path / "bad.onnx").write_bytes(b"nothing")
    with pytest.raises(ValueError, match=r"yunet: expected the ONNX file of a YuNet model, got .*bad.onnx"):
        OpenCVTracker(yunet=tmp_path / "bad.onnx")
    red_dot_model(tmp_path / "other.onnx", skip="kps")
    with pytest.raises(ValueError, match=r"yunet: expected the ONNX file of a YuNet model, got .*other.onnx"):
        OpenCVTracker(yunet=tmp_path / "other.onnx")


def red_dot_model(path: Path, skip: str = "") -> Path:
    """A network with the outputs of YuNet that takes what is red for a face of 64 pixels, its eyes 16 to either side.

    Without the outputs of the head `skip`.
    """
    onnx = pytest.importorskip("onnx")
    from onnx import helper, numpy_helper

    nodes, constants, outputs = [], [], []

    def constant(name: str, value: np.ndarray) -> str:
        constants.append(numpy_helper.from_array(value, name))
        return name

    eyes = np.array([16, -8, -16, -8, 0, 0, 0, 0, 0, 0])  # the right one first; the order must not matter
    for stride in (8, 16, 32):
        red = np.array([[-1.0, -1.0, 1.0]]) if stride == 8 else np.zeros((1, 3))  # BGR
        none = np.zeros
        heads = {
            "cls": (red, [-100.0]),
            "obj": (none((1, 3)), [9.0]),
            "bbox": (none((4, 3)), [0.5, 0.5, math.log(64 / stride), math.log(64 / stride)]),
            "kps": (none((10, 3)), 0.5 + eyes / stride),
        }
        pool = [stride, stride]
        nodes.append(helper.make_node("AveragePool", ["input"], [f"pool_{stride}"], kernel_shape=pool, strides=pool))
        heads.pop(skip, None)
        for head, (weights, bias) in heads.items():
            name, size = f"{head}_{stride}", len(weights)
            w = constant(f"w_{name}", weights.reshape(size, 3, 1, 1).astype(np.float32))
            b = constant(f"b_{name}", np.asarray(bias, np.float32))
            shape = constant(f"s_{name}", np.array([1, -1, size]))
            nodes.append(helper.make_node("Conv", [f"pool_{stride}", w, b], [f"c_{name}"], kernel_shape=[1, 1]))
            nodes.append(helper.make_node("Transpose", [f"c_{name}"], [f"t_{name}"], perm=[0, 2, 3, 1]))
            last = f"r_{name}" if head in ("cls", "obj") else name
            nodes.append(helper.make_node("Reshape", [f"t_{name}", shape], [last]))
            if last != name:
                nodes.append(helper.make_node("Sigmoid", [last], [name]))
            outputs.append(helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [1, (320 // stride) ** 2, size]))
    picture = helper.make_tensor_value_info("input", onnx.TensorProto.FLOAT, [1, 3, 320, 320])
    graph = helper.make_graph(nodes, "test", [picture], outputs, constants)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 11)], ir_version=8), str(path))
    return path


@pytest.mark.parametrize("scale", [0.75, 1, 2])
def test_a_yunet_model_is_the_detector(tmp_path, scale):
    tracker = OpenCVTracker(yunet=red_dot_model(tmp_path / "yunet.onnx"))
    picture = np.zeros((round(240 * scale), round(320 * scale), 3), np.uint8)
    assert tracker.track(picture, 0.0) is None
    at = np.array([100, 84]) * scale  # the middle of a step of 8
    dot(picture, (float(at[0]), float(at[1])), (255, 0, 0), 7 * scale)
    face = tracker.track(picture, 1.0)
    assert face is not None
    np.testing.assert_allclose(middle(face), at, atol=5 * scale)
    np.testing.assert_allclose(face.box[2:], 64 * scale, rtol=1e-4)
    assert face.eyes is not None
    np.testing.assert_allclose(np.array(face.eyes) - middle(face), np.array([[-16, -8], [16, -8]]) * scale, atol=0.1)
    assert 0.6 < face.score <= 1


# --------------------------------------------------------------------------------------------------------------------- told
def table(folder: Path, *rows: str, header: str = "time,left,top,width,height") -> Path:
    path = folder / "boxes.csv"
    path.write_text("\n".join((header, *rows)) + "\n")
    return path


def test_told_boxes(tmp_path):
    tracker = ToldTracker(
        table(tmp_path, "0.0,1,2,30,40", "0.1,2,3,30,40", "0.2,,,,", "0.3,5,6,30,40", "0.4,6,7,30,40")
    )
    picture = np.zeros((9, 9, 3), np.uint8)

    def left(at: float) -> float | None:
        face = tracker.track(picture, at)
        return None if face is None else face.box[0]

    asked = (-0.06, -0.04, 0.0, 0.04, 0.06, 0.16, 0.24, 0.26, 0.4, 0.44, 0.46)
    assert [left(at) for at in asked] == [None, 1, 1, 1, 2, None, None, 5, 6, 6, None]
    face = tracker.track(picture, 0.39)
    assert face is not None
    assert (face.box, face.eyes, face.since) == ((6, 7, 30, 40), None, 0)
    assert face.age == pytest.approx(0.09)  # since 0.3
    assert math.isnan(face.score)


def test_told_boxes_with_a_gap_between_rows(tmp_path):
    tracker = ToldTracker(
        table(tmp_path, "0.0,1,2,30,40", "0.1,1,2,30,40", "0.2,1,2,30,40", "5.0,1,2,30,40", "5.1,1,2,30,40")
    )
    picture = np.zeros((9, 9, 3), np.uint8)
    assert tracker.track(picture, 3.0) is None
    face = tracker.track(picture, 5.1)
    assert face is not None
    assert face.age == pytest.approx(0.1)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (["0,1,2,30,40", "0,1,2,30,40"], ":3: expected a time after that of the row before, got 0, 1, 2, 30, 40"),
        (["0,1,,30,40"], ":2: expected left, top, width and height, or none of them, got"),
        (["0,1,2,0,40"], ":2: expected a width and a height above 0"),
        ([",1,2,3,40"], ":2: expected a time, got nan"),
        (["0,1,x,3,40"], ":2: top: expected a number"),
        ([], "expected rows below the header, got none"),
    ],
)
def test_told_boxes_that_are_wrong(tmp_path, rows, message):
    with pytest.raises(ValueError, match=message):
        ToldTracker(table(tmp_path, *rows))


def test_told_boxes_without_a_column(tmp_path):
    with pytest.raises(ValueError, match=r"expected the columns time, .* got time, left, top, width: no height"):
        ToldTracker(table(tmp_path, "0,1,2,3", header="time,left,top,width"))


# ----------------------------------------------------------------------------------------------------------------- the crop
def dot(picture: np.ndarray, at: tuple[float, float], colour: tuple[int, int, int], radius: float) -> None:
    fine = 16
    centre = (round(at[0] * fine), round(at[1] * fine))
    cv2.circle(picture, centre, round(radius * fine), colour, -1, cv2.LINE_AA, 4)


def centre_of(crop: np.ndarray, channel: int) -> np.ndarray:
    """Of what is bright in a channel, 0..1 of the crop."""
    weight = crop[..., channel].astype(float)
    y, x = np.mgrid[: len(crop), : len(crop)] + 0.5
    return np.array([(weight * x).sum(), (weight * y).sum()]) / weight.sum() / len(crop)


@pytest.mark.parametrize("apart", [14, 40, 150, 400])
@pytest.mark.parametrize("angle", [-0.5, 0, 0.3])
@pytest.mark.parametrize("size", [112, 64])
def test_aligned_puts_the_eyes_in_their_places(apart, angle, size):
    picture = np.zeros((720, 960, 3), np.uint8)
    middle, half = np.array([500.3, 340.6]), apart / 2 * np.array([math.cos(angle), math.sin(angle)])
    left, right = (tuple(map(float, middle + sign * half)) for sign in (-1, 1))
    dot(picture, left, (255, 0, 0), max(apart / 8, 3))
    dot(picture, right, (0, 255, 0), max(apart / 8, 3))
    face = Face((0, 0, 1, 1), (left, right), 1.0, 1.0, 0.0)
    crop = aligned(picture, face, size)
    assert crop.shape == (size, size, 3)
    assert crop.dtype == np.uint8
    # a dot's coordinates name the middle of a pixel, half a pixel more than its edge
    shift = 0.5 * 0.315 / apart
    np.testing.assert_allclose(centre_of(crop, 0) - shift, EYES[0], atol=0.012)
    np.testing.assert_allclose(centre_of(crop, 1) - shift, EYES[1], atol=0.012)


def test_aligned_without_eyes_takes_the_square_around_the_box():
    picture = np.zeros((200, 300, 3), np.uint8)
    picture[60:140, 110:190, 0] = 255  # a box of 80
    crop = aligned(picture, Face((110, 60, 80, 80), None, 1.0, 1.0, 0.0))
    columns = np.flatnonzero((crop[..., 0] > 127).any(axis=0))
    assert 90 < len(columns) < 110  # of 112
    assert abs((columns[0] + columns[-1] + 1) / 2 - 56) < 2
    assert crop[:8].max() == 0
    assert crop[20:, 56, 0].min() == 255
    # where a frontal face has its eyes
    eyes = ((110 + 0.325 * 80, 60 + 0.385 * 80), (110 + 0.665 * 80, 60 + 0.385 * 80))
    np.testing.assert_array_equal(aligned(picture, Face((0, 0, 1, 1), eyes, 1.0, 1.0, 0.0)), crop)
    # a flat box gets the square of its width
    np.testing.assert_array_equal(aligned(picture, Face((110, 80, 80, 40), None, 1.0, 1.0, 0.0)), crop)


def test_aligned_repeats_the_border():
    picture = np.full((60, 60, 3), 200, np.uint8)
    for box in ((-30, -30, 60, 60), (40, 40, 300, 300), (500, 500, 40, 40), (-900, -900, 400, 400)):
        crop = aligned(picture, Face(box, None, 1.0, 1.0, 0.0))
        assert (crop == 200).all()


def test_aligned_averages_what_it_makes_smaller():
    rows = (np.arange(600) % 2 * 255).astype(np.uint8)
    stripes = np.broadcast_to(rows[:, None, None], (600, 600, 3)).copy()
    crop = aligned(stripes, Face((100, 100, 400, 400), None, 1.0, 1.0, 0.0))
    assert crop.std() < 30  # single pixels of it would be 0 or 255


def test_aligned_needs_a_size():
    picture = np.zeros((60, 60, 3), np.uint8)
    with pytest.raises(ValueError, match="face: expected eyes apart, or a box with a size, got"):
        aligned(picture, Face((1, 1, 0, 0), None, 1.0, 1.0, 0.0))
    with pytest.raises(ValueError, match="picture: expected RGB"):
        aligned(picture[0], Face((1, 1, 9, 9), None, 1.0, 1.0, 0.0))


# ------------------------------------------------------------------------------------------------------------- real pictures
@real
@pytest.mark.parametrize("path", GRID[:3], ids=lambda path: path.stem)
def test_a_real_face(path):
    pictures = clip(path)
    tracker = OpenCVTracker()
    faces = [tracker.track(picture, i / 25) for i, picture in enumerate(pictures)]
    there = [face for face in faces if face is not None]
    assert len(there) >= 0.95 * len(pictures)
    boxes = np.array([face.box for face in there])
    size = boxes[:, 2].mean()
    assert 0.3 * 288 < size < 0.7 * 288
    assert np.abs(np.diff(boxes, axis=0)).max() < 0.02 * size  # from picture to picture
    assert boxes[:, :2].std(axis=0).max() < 0.05 * size
    with_eyes = [face for face in there if face.eyes is not None]
    assert len(with_eyes) >= 0.9 * len(there)
    for face in with_eyes:
        assert face.eyes is not None
        places = (np.array(face.eyes) - face.box[:2]) / face.box[2]
        np.testing.assert_allclose(places, [(0.325, 0.385), (0.665, 0.385)], atol=0.08)
    assert all(face.score > 2 for face in there)


@real
def test_a_real_face_moves_as_it_is_moved():
    """One picture that is shifted by known steps: the box goes along, to a part of a pixel."""
    still = clip(GRID[0], 1)[0]
    tracker = OpenCVTracker()
    for i in range(20):
        shift = np.array([2.5 * i, 1.2 * i])
        matrix = np.float32([[1, 0, shift[0]], [0, 1, shift[1]]])
        picture = cv2.warpAffine(still, matrix, (360, 288), borderMode=cv2.BORDER_REPLICATE)
        at = middle(tracker.track(picture, i / 30))
        if i == 0:
            first = at
        np.testing.assert_allclose(at - first, shift, atol=2.0)


@real
def test_a_dark_or_grainy_picture_is_no_hindrance():
    still = clip(GRID[0], 1)[0]
    noise = np.random.default_rng(0).normal(0, 20, still.shape)
    for picture in ((still * 0.15).astype(np.uint8), np.clip(still + noise, 0, 255).astype(np.uint8)):
        assert OpenCVTracker().track(picture, 0.0) is not None


@real
def test_blur_lowers_the_score():
    still = clip(GRID[0], 1)[0]
    blurred = cv2.GaussianBlur(still, (0, 0), 7)
    detector = HaarDetector()
    sharp, soft = (max(one.score for one in detector(picture)) for picture in (still, blurred))
    assert soft < sharp - 1


@real
@pytest.mark.slow
def test_a_picture_takes_milliseconds():
    """The aim is 3 ms of one core at 640 x 360; twice that is the bound, for a busy machine."""
    pictures = [cv2.resize(picture, (640, 360)) for picture in clip(GRID[0])]
    threads = cv2.getNumThreads()
    cv2.setNumThreads(1)
    try:
        tracker = OpenCVTracker()
        begin = time.process_time()
        for i, picture in enumerate(pictures):
            tracker.track(picture, i / 30)
        each = (time.process_time() - begin) / len(pictures)
    finally:
        cv2.setNumThreads(threads)
    assert each < 0.006


def test_no_face_in_noise():
    noise = np.random.default_rng(0).integers(0, 256, (HIGH, WIDE, 3), dtype=np.uint8)
    tracker = OpenCVTracker()
    assert all(tracker.track(noise, i / 10) is None for i in range(3))
