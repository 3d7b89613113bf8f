"""From video to features: how fast, where the time goes, how much memory; and how soon after it is seen a frame is estimated.

    python benchmarks/video.py speed [--video FILE] [--seconds 30]   extract with defaults: times real time, and by part
    python benchmarks/video.py memory [--hours 1]                    the greatest resident memory while a long video is read
    python benchmarks/video.py live --run RUN [--video FILE]         stream --video --serve: from a frame's beginning to its
                                                                     estimate at a client of the page

Without --video a drawn one of 640x360 at 30 a second is made (synth-video's); the tracker is not told where the face is.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import numpy as np

from sage_ext.video.decode import RATE, Media, Picture
from sage_ext.video.extraction import extract
from sage_ext.video.synth import write_videos


def drawn(folder: Path, seconds: float) -> Path:
    write_videos(folder / "world", train=1, validation=0, test=0, seconds=(seconds, seconds), size=(640, 360))
    return next((folder / "world" / "videos").glob("*.mp4"))


class Parts:
    """Seconds spent in methods, those inside them left out."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self._inside: list[float] = []

    def time(self, owner: Any, name: str, part: str) -> None:
        method = getattr(owner, name)

        def timed(*args: Any, **kwargs: Any) -> Any:
            self._inside.append(0.0)
            began = time.perf_counter()
            try:
                return method(*args, **kwargs)
            finally:
                took = time.perf_counter() - began
                self.seconds[part] += took - self._inside.pop()
                if self._inside:
                    self._inside[-1] += took

        setattr(owner, name, timed)


def speed(video: Path) -> None:
    from sage_ext.video import extraction as module
    from sage_ext.video import faces, sound, tracks, visual

    with tempfile.TemporaryDirectory() as folder:  # once to load what is loaded once
        extract(video, Path(folder) / "warm", processes=1)
        parts = Parts()
        parts.time(Media, "_frames", "decode")
        parts.time(Media, "_packets", "decode")
        parts.time(faces.OpenCVTracker, "track", "face: detect and follow")
        parts.time(tracks, "aligned", "face: align")
        parts.time(visual.VisualFeatures, "row", "face: features and quality")
        parts.time(sound.SoundFeatures, "push", "sound: features and quality")
        parts.time(tracks.VoiceMatch, "push", "voice and face")
        parts.time(module.RowsFile, "append", "files")
        began = time.perf_counter()
        done = extract(video, Path(folder) / "data", processes=1)
        took = time.perf_counter() - began
    ((name, found),) = done.videos.items()
    print(
        f"{name}: {found['size'][0]}x{found['size'][1]}, {found['seconds']:.1f} s, "
        f"face in {100 * found['face']:.0f} % of the frames"
    )
    print("\n| part | ms a second of video | share |\n| --- | ---: | ---: |")
    rest = took - sum(parts.seconds.values())
    for part, seconds in sorted({**parts.seconds, "the rest (colours, Python)": rest}.items(), key=lambda x: -x[1]):
        print(f"| {part} | {1e3 * seconds / found['seconds']:.1f} | {100 * seconds / took:.0f} % |")
    print(f"\none process, one core: {found['seconds'] / took:.1f} times real time")
    with tempfile.TemporaryDirectory() as folder:
        copies = [Path(folder) / f"copy{k}{video.suffix}" for k in range(4)]
        for copy in copies:
            os.symlink(video.resolve(), copy)
        began = time.perf_counter()
        done = extract(copies, Path(folder) / "data", processes=2)
        took = time.perf_counter() - began
    print(f"four such videos, two processes, their start included: {done.seconds / took:.1f} times real time")


def memory(clip: Path, hours: float) -> None:
    """The clip again and again in one file, its packets copied."""
    import av

    with tempfile.TemporaryDirectory() as folder:
        long = Path(folder) / "long.mp4"
        with Media(clip) as media:
            ends = (x.time + (x.duration if isinstance(x, Picture) else len(x.samples) / RATE) for x in media.play())
            length = max(ends) + 0.2  # room for what an encoder puts before its first sample
        with av.open(str(long), "w") as out, av.open(str(clip)) as first:
            streams = {s.index: out.add_stream_from_template(s) for s in first.streams}
            for k in range(round(3600 * hours / length)):
                with av.open(str(clip)) as source:
                    for packet in source.demux():
                        if packet.dts is None:
                            continue
                        shift = round(k * length / packet.time_base)
                        packet.pts, packet.dts = packet.pts + shift, packet.dts + shift
                        packet.stream = streams[packet.stream.index]
                        out.mux(packet)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        began = time.perf_counter()
        done = extract(long, Path(folder) / "data", processes=1)
        took = time.perf_counter() - began
        after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        (found,) = done.videos.values()
        print(
            f"{found['seconds'] / 3600:.2f} hours of video, {long.stat().st_size / 1e6:.0f} MB: greatest resident memory "
            f"{after / 1e6:.2f} GB (before: {before / 1e6:.2f}), {found['seconds'] / took:.1f} times real time"
        )


def live(run: str, video: Path) -> None:
    command = [sys.executable, "-m", "sage_ext", "stream", "--run", run, "--video", str(video), "--serve", "0"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    url = ""
    said = []
    for line in process.stderr:
        said.append(line)
        if "live at " in line:
            url = line.split("live at ")[1].split()[0]
            break
    delays = []
    if url:
        with urlopen(url.rstrip("/") + "/events", timeout=30) as events:
            kind = ""
            for raw in events:
                line = raw.decode()
                if line.startswith("event: "):
                    kind = line[7:].strip()
                elif line.startswith("data: ") and kind == "frame":
                    now = time.monotonic()
                    record = json.loads(line[6:])
                    delays.append((record["t"], record["delay_ms"] + 1e3 * (now - record["clock"])))
                elif kind == "end":
                    break
    said.append(process.stderr.read())
    process.wait()
    print("".join(said))
    ms = np.array([d for t, d in delays if t > 2])  # the first seconds load what is loaded once
    if len(ms):
        print(
            f"{len(ms)} estimates on the page's socket: from the beginning of their frame, which lasts 33 ms, "
            f"p50 {np.median(ms):.0f} ms, p90 {np.quantile(ms, 0.9):.0f}, p99 {np.quantile(ms, 0.99):.0f}, max {ms.max():.0f}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("speed", "memory", "live"))
    parser.add_argument("--video", type=Path)
    parser.add_argument("--seconds", type=float, default=30.0)
    parser.add_argument("--hours", type=float, default=1.0)
    parser.add_argument("--run")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        video = args.video or drawn(Path(folder), args.seconds)
        if args.what == "speed":
            speed(video)
        elif args.what == "memory":
            memory(video, args.hours)
        else:
            live(args.run, video)


if __name__ == "__main__":
    main()
