"""Videos to a data set: a row of features and quality a frame of picture and a hundredth of a second of sound, in the layout that
`AffWild2` reads (docs/data.md), for videos of any length in bounded memory.

    OUT/features/{visual,audio}/<video>.npy, .quality.npy, meta.json    see VisualFeatures and SoundFeatures
    OUT/faces/<video>.npy      (T, 5) float32: left, top, width, height in pixels, the detector's score; NaN without a face
    OUT/fps.json, index.json   the frames a second; what was extracted from what, and how

A video counts once it stands in index.json, which is written after its files are whole: a run that is killed goes on where
it was.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import math
import os
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from .. import __version__
from .._arguments import check_int
from ..data.affwild2 import INDEX
from ..extras import require
from ..files import alone, naming, one_line, write_atomic
from ..jobs import Job, Outcome, Workers
from .decode import RATE, Media, Picture, duration, jpeg
from .faces import FaceTracker, OpenCVTracker, ToldTracker
from .sound import ROWS, SoundFeatures, make_sound
from .tracks import MATCH, CroppedRows, PictureRows, Row, VoiceMatch
from .visual import VisualFeatures, make_visual

TOOL = "sage-ext extract"
ENDINGS = frozenset(
    ".3gp .aac .avi .flac .flv .m2ts .m4a .m4v .mkv .mov .mp3 .mp4 .mpeg .mpg .mts .ogg .ogv .opus .ts .wav .webm .wmv".split()  # noqa: SIM905
)
TAIL = 0.5  # seconds of sound after the last picture that make no frames: an encoder's padding
EARLY = 0.9  # of the length that a file states: one that ends before is said to be cut short
NOT_IN_NAMES = ('"', ",")  # of videos, for they are names in tables
TAKEN = (".mask", ".quality")  # endings that the layout gives a meaning


@dataclass(frozen=True)
class Parameters:
    """How features are made; all videos of a data set are made alike.

    fps      frames a second of the grid; None: each video's own rate, a frame a picture whatever their times, as in Aff-Wild2
    visual   "hog", "onnx:FILE", "module:function" or "mediapipe" (`make_visual`); None: no picture
    audio    "prosody", "opensmile", "onnx:FILE", "module:function" or "hf:DIR" (`make_sound`); None: no sound
    yunet    a model file of OpenCV's YuNet detector, in place of the Haar cascades
    silero   a model file of Silero's voice activity detector, in place of the one by energy
    told     whether the faces' boxes stand in <video>.faces.csv beside each video
    cropped  a folder of face crops that were made before, <video>/00001.jpg; with fps None
    """

    fps: float | None = 30.0
    visual: str | None = "hog"
    audio: str | None = "prosody"
    yunet: str | None = None
    silero: str | None = None
    told: bool = False
    cropped: str | None = None

    def __post_init__(self) -> None:
        if self.fps is not None and not 1 <= self.fps <= 240:
            raise ValueError(f"fps: expected 1 to 240 frames a second, or None for each video's own, got {self.fps!r}")
        if self.visual is None and self.audio is None:
            raise ValueError("visual, audio: expected at least one of the two, got neither")
        if self.cropped is not None and self.fps is not None:
            raise ValueError(
                f"cropped: expected fps None with it (crops are numbered by picture), got fps {self.fps:g}"
            )

    def tracker(self, video: Path, person: str) -> FaceTracker:
        if self.told:
            return ToldTracker(video.with_suffix(".faces.csv"))
        return OpenCVTracker(person, self.yunet)

    def features(self) -> tuple[VisualFeatures | None, SoundFeatures | None]:
        """Fresh ones, for one video."""
        return (
            None if self.visual is None else make_visual(self.visual),
            None if self.audio is None else make_sound(self.audio, self.silero),
        )


class RowsFile:
    """A .npy file of float32 rows (N, columns) that grows; `close` gives it its name, and without it nothing is left."""

    def __init__(self, path: Path, columns: int) -> None:
        self.path, self.columns, self.rows = path, columns, 0
        self._part = path.with_name(f".{path.name}.{os.getpid()}.part")
        self._file = open(self._part, "wb")  # noqa: SIM115  (closed in close and drop)
        self._header()

    def _header(self) -> None:
        """NumPy leaves room in it for more rows."""
        self._file.seek(0)
        form = {"descr": "<f4", "fortran_order": False, "shape": (self.rows, self.columns)}
        np.lib.format.write_array_header_1_0(self._file, form)

    def append(self, rows: np.ndarray) -> None:
        with naming(self.path, self._part):
            self._file.write(np.ascontiguousarray(rows, "<f4").tobytes())
        self.rows += len(rows)

    def truncate(self, rows: int) -> None:
        """Forget the rows from this one on."""
        self.rows = min(rows, self.rows)

    def close(self) -> None:
        with naming(self.path, self._part):
            self._header()
            self._file.truncate(self._file.tell() + 4 * self.rows * self.columns)
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()
            os.replace(self._part, self.path)

    def drop(self) -> None:
        """Leave nothing."""
        if self._file.closed:
            self.path.unlink(missing_ok=True)
        self._file.close()
        self._part.unlink(missing_ok=True)


def end_of(picture: float, sound: float) -> float:
    """Seconds at which a video's frames end, by the ends of its tracks."""
    return sound if sound >= picture + TAIL else picture


# ---------------------------------------------------------------------------------------------------------- one video
class _One:
    """One video on its way into the files."""

    def __init__(
        self, video: Path, name: str, out: Path, parameters: Parameters, person: str, crops: Path | None
    ) -> None:
        self.video, self.name, self.out, self.parameters, self.person = video, name, out, parameters, person
        self.crops = None if crops is None else crops / name
        self.files: list[RowsFile] = []
        self.mouths: list[float] = []
        self.faces: list[tuple[float, ...]] = []
        self.quality: dict[str, list[np.ndarray]] = {"visual": [], "audio": []}

    def file(self, folder: str) -> Path:
        path = self.out / folder / f"{self.name}.npy"
        path.parent.mkdir(parents=True, exist_ok=True)
        return path

    def rows_file(self, modality: str, columns: Sequence[str]) -> RowsFile:
        self.files.append(RowsFile(self.file(f"features/{modality}"), len(columns)))
        return self.files[-1]

    def take(self, file: RowsFile, rows: Iterator[Row]) -> None:
        for row in rows:
            file.append(row.features[None])
            self.quality["visual"].append(row.quality)
            self.mouths.append(row.mouth)
            face = row.face
            self.faces.append((*face.box, face.score) if face is not None else (math.nan,) * 5)
            if self.crops is not None and row.crop is not None:
                self.crops.mkdir(parents=True, exist_ok=True)
                write_atomic(self.crops / f"{len(self.mouths):05d}.jpg", jpeg(row.crop, 95))

    def run(self, progress: Callable[[float], None]) -> dict[str, Any]:
        parameters = self.parameters
        visual, sound = parameters.features()
        with Media(self.video) as media:
            fps = parameters.fps or media.rate or 30.0
            rows: PictureRows | CroppedRows | None = None
            if parameters.cropped is not None and visual is not None:
                rows = CroppedRows(fps, Path(parameters.cropped) / self.name, visual)
            elif visual is not None and media.picture:
                rows = PictureRows(fps, parameters.tracker(self.video, self.person), visual)
            pictures = self.rows_file("visual", visual.columns) if visual is not None and rows is not None else None
            heard = self.rows_file("audio", sound.columns) if sound is not None and media.sound else None
            if pictures is None and heard is None:
                raise ValueError(f"path: expected a video with {self.wanted()}, got {self.video}, which has none")
            picture_end = sound_end = 0.0
            count, size = 0, (0, 0)
            samples: list[np.ndarray] = []
            for item in media.play():
                if isinstance(item, Picture):
                    at = item.time if parameters.fps is not None else count / fps
                    count += 1
                    picture_end = at + (item.duration if parameters.fps is not None else 1 / fps)
                    if rows is not None and pictures is not None:
                        size = size if count > 1 else item.rgb.shape[1::-1]
                        self.take(pictures, rows.push(at, functools.partial(getattr, item, "rgb"), item.duration))
                else:
                    sound_end = item.time + len(item.samples) / RATE
                    if heard is not None and sound is not None:
                        samples.append(item.samples)
                        if sum(map(len, samples)) >= RATE:  # few long pushes cost less than many short ones
                            self.hear(heard, *sound.push(np.concatenate(samples)))
                            samples.clear()
                progress(item.time)
            end = end_of(picture_end, sound_end)
            frames = max(math.ceil(end * fps - 0.5 - 1e-6), 0)
            if not frames:
                raise ValueError(
                    f"path: expected a video of at least a frame, got {self.video}, of which nothing can be decoded"
                )
            if pictures is not None and rows is not None:
                self.take(pictures, rows.end(frames / fps))
            if heard is not None and sound is not None:
                self.hear(heard, *sound.push(np.concatenate([*samples, np.zeros(0, np.float32)])))
                self.pad(heard, sound, math.ceil(frames * ROWS / fps - 1e-6))
            notes = list(media.damage)
            if end < EARLY * media.duration:
                notes.append(f"{self.video}: ends after {end:.1f} of the {media.duration:.1f} s that it states")
            if not media.sound and sound is not None:
                notes.append(f"{self.video}: has no sound")
            if not media.picture and visual is not None:
                notes.append(f"{self.video}: has no pictures")
        self.match(frames, fps)
        known = np.array(self.faces or [(math.nan,) * 5], np.float32)
        if pictures is not None:
            faces = RowsFile(self.file("faces"), 5)
            self.files.append(faces)
            faces.append(known[:frames])
        for modality, file in (("visual", pictures), ("audio", heard)):
            if file is not None:
                quality = RowsFile(file.path.with_suffix(".quality.npy"), len(self.quality[modality][0]))
                self.files.append(quality)
                quality.append(np.array(self.quality[modality], np.float32))
        for made in self.files:
            made.close()
        stat = self.video.stat()
        return {
            "source": self.video.name, "bytes": stat.st_size, "modified": int(stat.st_mtime), "frames": frames, "fps": fps,
            "seconds": round(end, 3), "size": size, "person": self.person,
            "face": None if pictures is None else round(float((~np.isnan(known[:frames, 0])).mean()), 4),
            "sound": heard is not None, "notes": notes,
        }  # fmt: skip

    def wanted(self) -> str:
        kinds = (("pictures", self.parameters.visual), ("sound", self.parameters.audio))
        return " or ".join(name for name, spec in kinds if spec is not None)

    def hear(self, file: RowsFile, features: np.ndarray, quality: np.ndarray) -> None:
        file.append(features)
        self.quality["audio"].extend(quality)

    def pad(self, file: RowsFile, sound: SoundFeatures, rows: int) -> None:
        """To so many rows, without sound where there is none; rows beyond are dropped."""
        while file.rows < rows:
            self.hear(file, *sound.push(np.full((rows - file.rows) * (RATE // ROWS), np.nan, np.float32)))
        file.truncate(rows)
        del self.quality["audio"][rows:]

    def match(self, frames: int, fps: float) -> None:
        """The last column of both modalities' quality."""
        heard, seen = self.quality["audio"], self.quality["visual"]
        matches = np.full(frames, np.nan, np.float32)
        if heard and seen:
            voice = VoiceMatch(fps)
            middle = np.minimum(((np.arange(frames) + 0.5) * ROWS / fps).astype(int), len(heard) - 1)
            for t in range(frames):
                matches[t] = voice.push(self.mouths[t], float(heard[middle[t]][0]))
        if seen:
            self.quality["visual"] = [np.append(row, r) for row, r in zip(seen, matches)]
        if heard:
            at = np.minimum(((np.arange(len(heard)) + 0.5) * fps / ROWS).astype(int), frames - 1)
            self.quality["audio"] = [np.append(row, matches[t]) for row, t in zip(heard, at)]


def extract_one(
    video: str, name: str, out: str, parameters: Parameters, person: str, crops: str | None, board: str, place: int
) -> dict[str, Any]:
    """One video's files in `out`, whole, and what index.json says of it. `board`, `place`: where to write the seconds done."""
    seconds = np.memmap(board, np.float64, "r+")
    one = _One(Path(video), name, Path(out), parameters, person, None if crops is None else Path(crops))

    def progress(at: float) -> None:
        seconds[place] = at

    cv2 = None if parameters.visual is None else require("cv2", "video")
    threads = 0 if cv2 is None else cv2.getNumThreads()
    if cv2 is not None:
        cv2.setNumThreads(1)
    try:
        return one.run(progress)
    except BaseException:
        for file in one.files:
            file.drop()
        raise
    finally:
        if cv2 is not None:
            cv2.setNumThreads(threads)


# --------------------------------------------------------------------------------------------------------- all videos
@dataclass
class Extraction:
    """What `extract` did.

    out      the data set
    videos   name -> what index.json says of it: those that stand in it now
    failed   path -> what was wrong with the file
    skipped  names that had been extracted before
    seconds  of video that were extracted now
    took     seconds of the clock
    """

    out: Path
    videos: dict[str, dict[str, Any]] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)
    skipped: list[str] = field(default_factory=list)
    seconds: float = 0.0
    took: float = 0.0

    def text(self) -> str:
        """For people."""
        lines = []
        for name, video in self.videos.items():
            face = "no picture" if video["face"] is None else f"face in {100 * video['face']:.0f} % of the frames"
            sound = "sound" if video["sound"] else "no sound"
            again = ", extracted before" if name in self.skipped else ""
            lines.append(f"{name}: {video['seconds']:.1f} s, {video['frames']:,} frames, {face}, {sound}{again}")
            lines += [f"  note: {note}" for note in video["notes"]]
        lines += [f"{path}: FAILED: {why}" for path, why in self.failed.items()]
        speed = f" ({self.seconds / self.took:.1f} times real time)" if self.seconds and self.took else ""
        lines.append(
            f"{self.out}: {len(self.videos)} videos; {self.seconds:.1f} s of video in {self.took:.1f} s{speed}"
            + (f"; {len(self.failed)} failed" if self.failed else "")
        )
        return "\n".join(lines)


def find_videos(paths: Sequence[str | os.PathLike[str]]) -> list[Path]:
    """Files as they are given; of folders all that have a media file's ending, below them too, sorted by name."""
    found: list[Path] = []
    for path in map(Path, paths):
        if path.is_dir():
            inside = sorted(p for p in path.rglob("*") if p.suffix.lower() in ENDINGS and p.is_file())
            if not inside:
                raise FileNotFoundError(
                    f"videos: expected media files in {path}, got none ({', '.join(sorted(ENDINGS))})"
                )
            found += inside
        elif path.is_file():
            found.append(path)
        else:
            raise FileNotFoundError(
                f"videos: expected a media file or a folder of them, got {path}, which is not there"
            )
    if not found:
        raise ValueError("videos: expected at least one, got none")
    return found


def names_of(videos: Sequence[Path], person: str) -> dict[str, Path]:
    """name of the data set's video -> file. `_left`, `_right` and `_person2` name persons of a file apart."""
    suffix = "" if person == "largest" else f"_{person}" if person in ("left", "right") else f"_person{person}"
    found: dict[str, Path] = {}
    for path in videos:
        name = path.stem + suffix
        if name in found:
            raise ValueError(f"videos: expected files of different names, got {found[name]} and {path}")
        bad = (
            not name.isprintable()
            or any(c in name for c in NOT_IN_NAMES)
            or path.stem.endswith(TAKEN)
            or name[0] == "."
        )
        if bad:
            raise ValueError(
                "videos: expected printable names without comma and double quote, no dot before and neither "
                f"{' nor '.join(TAKEN)} at the end, got {path.name!r}"
            )
        found[name] = path
    return found


def extract(
    videos: Sequence[str | os.PathLike[str]] | str | os.PathLike[str],
    out: str | os.PathLike[str],
    parameters: Parameters | None = None,
    *,
    person: str = "largest",
    crops: str | os.PathLike[str] | None = None,
    processes: int | None = None,
    overwrite: bool = False,
    progress: Callable[[str], None] | None = None,
) -> Extraction:
    """Extracts features of videos into the data set `out`, which may exist: videos that stand in its index.json, and whose
    files have not changed, are not read again.

    videos      media files, and folders of them
    parameters  how; they must be those of the videos that are in `out` already
    person      of several in the picture: "largest" (and longest seen), "left", "right", or "1", "2" ... from the left. Other
                than "largest" it is added to the video's name (`_left`, `_right`, `_person2`)
    crops       a folder for the aligned faces, <video>/00001.jpg, as Aff-Wild2 has them
    processes   at once, a video each (default: one a core)
    overwrite   forget what an extraction wrote there before
    progress    called with a line of text now and then

    A file that cannot be read is in the result's `failed` and stops no other. Raises ValueError for arguments that cannot be
    right, for a data set with other parameters or with features that no extraction wrote, and BusyError while another process
    extracts.
    """
    parameters = parameters or Parameters()
    files = names_of(find_videos([videos] if isinstance(videos, (str, os.PathLike)) else videos), person)
    if person not in ("largest", "left", "right") and not (person.isdigit() and int(person) >= 1):
        raise ValueError(f"person: expected largest, left, right or a number from 1, got {person!r}")
    if processes is not None:
        check_int("processes", processes, 1)
    visual, sound = parameters.features()  # what is wrong with them should be said now
    root = Path(out)
    with alone(root, "extracting"):
        index = _begin(root, parameters, visual, sound, overwrite)
        return _extract(root, index, files, parameters, person, crops, processes or _cores(), progress)


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _begin(
    root: Path, parameters: Parameters, visual: VisualFeatures | None, sound: SoundFeatures | None, overwrite: bool
) -> dict[str, Any]:
    """index.json as it is, or a new one, and the files that describe the features."""
    path = root / INDEX
    for folder in ("features/visual", "features/audio", "faces"):
        for part in (root / folder).glob(".*.part"):  # of a process that was killed
            part.unlink()
    said = asdict(parameters)
    index: dict[str, Any] = {"what": TOOL, "version": __version__, "parameters": said, "videos": {}}
    folders = {"visual": visual, "audio": sound}
    if path.exists() and not overwrite:
        index = read_index(path)
        if index["parameters"] != said:
            differ = ", ".join(
                f"{key} {index['parameters'].get(key)!r} there and {value!r} here"
                for key, value in said.items()
                if index["parameters"].get(key) != value
            )
            raise ValueError(
                f"out: expected the parameters that {root} was extracted with, got others ({differ}); --overwrite begins anew"
            )
    elif not path.exists():
        foreign = [
            name
            for name in folders
            if (root / "features" / name).exists() and any((root / "features" / name).iterdir())
        ]
        if foreign and not overwrite:
            raise ValueError(
                f"out: expected a folder without features, or one that an extraction wrote, got {root} with features/{foreign[0]}"
            )
        if foreign:
            raise ValueError(f"overwrite: expected what an extraction wrote, got {root} without {INDEX}")
    else:
        for name in read_index(path)["videos"]:
            for folder in ("features/visual", "features/audio", "faces"):
                for ending in (".npy", ".quality.npy"):
                    (root / folder / f"{name}{ending}").unlink(missing_ok=True)
    for modality, made in folders.items():
        if made is not None:
            (root / "features" / modality).mkdir(parents=True, exist_ok=True)
            meta: dict[str, Any] = {"columns": list(made.columns), "quality": [*made.quality, MATCH]}
            if modality == "audio":
                meta["rate"] = ROWS
            meta["about"] = {"tool": TOOL, "version": index["version"], "parameters": said}
            write_atomic(root / "features" / modality / "meta.json", json.dumps(meta, indent=1) + "\n")
    return index


def read_index(path: Path) -> dict[str, Any]:
    """index.json. ValueError where it is not one."""
    try:
        index = json.loads(path.read_text("utf-8"))
        if index["what"] != TOOL or not isinstance(index["videos"], dict) or not isinstance(index["parameters"], dict):
            raise KeyError("what")
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: expected what {TOOL} writes there, got something else ({one_line(error)})") from None
    return index


def _extract(
    root: Path,
    index: dict[str, Any],
    files: Mapping[str, Path],
    parameters: Parameters,
    person: str,
    crops: str | os.PathLike[str] | None,
    processes: int,
    progress: Callable[[str], None] | None,
) -> Extraction:
    done = Extraction(root)
    begun = time.monotonic()
    waiting: dict[str, Path] = {}
    for name, path in files.items():
        known, stat = index["videos"].get(name), path.stat()
        if known is None:
            waiting[name] = path
        elif known["source"] != path.name:
            raise ValueError(
                f"videos: expected other names than those in {root}, got {path}, and {name} is {known['source']} there"
            )
        elif (known["bytes"], known["modified"]) != (stat.st_size, int(stat.st_mtime)):
            del index["videos"][name]
            waiting[name] = path
        else:
            done.skipped.append(name)
    with tempfile.TemporaryDirectory(prefix="sage-ext-") as scratch:
        board = Path(scratch) / "seconds"
        np.zeros(max(len(waiting), 1)).tofile(board)
        where = None if crops is None else str(crops)
        jobs = [
            Job(str(path), extract_one, (str(path), name, str(root), parameters, person, where, str(board), place))
            for place, (name, path) in enumerate(waiting.items())
        ]
        names = {str(path): name for name, path in waiting.items()}
        with _Said(board, list(waiting.values()), progress), Workers(processes) as workers:
            for outcome in workers.run(jobs) if min(processes, len(jobs)) > 1 else map(_here, jobs):
                if outcome.error is not None:
                    done.failed[outcome.job.name] = outcome.error.strip().split("\n")[-1]
                    continue
                index["videos"][names[outcome.job.name]] = outcome.value
                done.seconds += outcome.value["seconds"]
                _write_index(root, index, parameters)
    if not waiting:
        _write_index(root, index, parameters)
    done.videos.update({name: index["videos"][name] for name in files if name in index["videos"]})
    done.took = time.monotonic() - begun
    return done


def _here(job: Job) -> Outcome:
    """Done in this process: a new one takes seconds to begin."""
    try:
        return Outcome(job, job.function(*job.arguments))
    except (ValueError, OSError, ImportError) as error:
        return Outcome(job, error=str(error) or type(error).__name__)


def _write_index(root: Path, index: dict[str, Any], parameters: Parameters) -> None:
    index["videos"] = dict(sorted(index["videos"].items()))
    rates = {name: video["fps"] for name, video in index["videos"].items()}
    write_atomic(root / "fps.json", json.dumps(rates if parameters.fps is None else parameters.fps, indent=1) + "\n")
    write_atomic(root / INDEX, json.dumps(index, indent=1) + "\n")


class _Said:
    """Says now and then, from a thread of its own, how far the videos are. A context manager."""

    EVERY = 1.0  # seconds

    def __init__(self, board: Path, videos: Sequence[Path], say: Callable[[str], None] | None) -> None:
        self.board, self.videos, self.say = board, videos, say
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> None:
        if self.say is not None and self.videos:
            self._thread.start()

    def __exit__(self, *error: object) -> None:
        self._over.set()
        if self._thread.is_alive():
            self._thread.join()

    def _run(self) -> None:
        assert self.say is not None
        total = 0.0
        for video in self.videos:
            with contextlib.suppress(ValueError, OSError):
                total += duration(video)
        seconds, begun = np.memmap(self.board, np.float64, "r"), time.monotonic()
        while not self._over.wait(self.EVERY):
            done, took = float(seconds.sum()), time.monotonic() - begun
            left = (total - done) * took / done if done > 0 else math.nan
            tail = f", {int(left) // 60}:{int(left) % 60:02d} left" if left >= 0 else ""
            self.say(
                f"{done:,.0f} of {total:,.0f} s of {len(self.videos)} videos, {done / took:.1f} times real time{tail}"
            )


# ------------------------------------------------------------------------------------------------------- command line
def _rate(text: str) -> float | None:
    return None if text == "own" else float(text)


def _spec(text: str) -> str | None:
    return None if text == "none" else text


def add_parameters(parser: argparse.ArgumentParser) -> None:
    """The flags of `Parameters`; one that is not given is absent."""
    none: Any = argparse.SUPPRESS
    parser.add_argument("--fps", type=_rate, default=none, metavar="N|own",
                        help="frames a second; own: each video's, a frame a picture (default: 30)")  # fmt: skip
    parser.add_argument("--visual", type=_spec, default=none, metavar="SPEC",
                        help="hog, onnx:FILE, module:function, mediapipe or none (default: hog)")  # fmt: skip
    parser.add_argument("--audio", type=_spec, default=none, metavar="SPEC",
                        help="prosody, opensmile, onnx:FILE, module:function, hf:DIR or none (default: prosody)")  # fmt: skip
    parser.add_argument(
        "--yunet", default=none, metavar="FILE", help="OpenCV's YuNet model, in place of the Haar cascades"
    )
    parser.add_argument("--silero", default=none, metavar="FILE", help="Silero's voice activity model (ONNX)")
    parser.add_argument("--told", action="store_true", default=none,
                        help="the faces' boxes stand in VIDEO.faces.csv beside each video (synth-video's)")  # fmt: skip


def given_parameters(args: argparse.Namespace) -> dict[str, Any]:
    names = ("fps", "visual", "audio", "yunet", "silero", "told", "cropped")
    return {name: getattr(args, name) for name in names if hasattr(args, name)}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("videos", nargs="+", metavar="VIDEO", help="media files, or folders of them")
    parser.add_argument("--out", required=True, metavar="DATA", help="data set to write, or to add to")
    add_parameters(parser)
    parser.add_argument("--cropped", default=argparse.SUPPRESS, metavar="DIR",
                        help="face crops that were made before, DIR/VIDEO/00001.jpg ...; with --fps own")  # fmt: skip
    parser.add_argument(
        "--person", default="largest", help="of several: largest, left, right, or 1, 2 ... from the left"
    )
    parser.add_argument("--faces", metavar="DIR", help="write the aligned faces there, DIR/VIDEO/00001.jpg ...")
    parser.add_argument("--processes", type=int, help="at once, a video each (default: one a core)")
    parser.add_argument("--overwrite", action="store_true", help="forget what an extraction wrote there before")
    parser.add_argument("--quiet", action="store_true", help="no progress display")


def said_on_stderr(command: str) -> Callable[[str], None]:
    """A live line on a terminal; elsewhere a line every so often."""
    live, last = sys.stderr.isatty(), [0.0]

    def say(text: str) -> None:
        if live:
            print(f"\r{text.ljust(shutil.get_terminal_size().columns - 1)}", end="", file=sys.stderr, flush=True)
        elif time.monotonic() - last[0] > 10:
            last[0] = time.monotonic()
            print(f"sage-ext {command}: {text}", file=sys.stderr, flush=True)

    return say


def run(args: argparse.Namespace) -> Extraction:
    """The command."""
    progress = None if args.quiet else said_on_stderr("extract")
    return extract(
        args.videos, args.out, Parameters(**given_parameters(args)), person=args.person, crops=args.faces,
        processes=args.processes, overwrite=args.overwrite, progress=progress,
    )  # fmt: skip
