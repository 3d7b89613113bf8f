"""Your own table with your own targets: import it, train a few steps, and predict from new rows.

    python examples/own_targets.py

The table holds two people's stress (0 to 100) and calm, a row a second, with features of voice and face; some rows have no face.
The commands `sage-ext import`, `train` and `predict` do the same (docs/data.md). Needs `pip install "sage-ext[train]"`.
"""

import csv
import math
import random
import tempfile
from pathlib import Path

from sage_ext.data.table import import_table
from sage_ext.training import Run, TrainConfig, calibrate_run, predict_run, train

COLUMNS = ["video", "time", "person", "voice_loudness", "voice_pitch", "face_smile", "face_frown", "stress", "calm"]


def write_table(path: Path, videos: int, seconds: int = 120) -> None:
    with open(path, "w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(COLUMNS)
        for video in range(videos):
            for t in range(seconds):
                stress = 50 + 30 * math.sin(t / 15 + video) + random.gauss(0, 3)
                voice = [-60 + stress / 3 + random.gauss(0, 3), 100 + stress + random.gauss(0, 9)]
                face = [1 - stress / 100 + random.gauss(0, 0.1), stress / 100 + random.gauss(0, 0.1)]
                if 40 <= t < 50:  # turned away: empty cells are missing frames
                    face = ["", ""]
                rows.writerow([f"talk{video}", t, f"person{video // 2}", *voice, *face, stress, 90 - stress])


def main(steps: int = 30):
    """The report of the import, and each new video's predictions, (frames, 2), in the targets' own units."""
    random.seed(0)
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        write_table(root / "table.csv", videos=10)
        report = import_table(
            root / "table.csv", root / "data", targets=["stress", "calm"], ranges={"stress": (0, 100)},
            modalities=["voice", "face"], group="person",
        )  # fmt: skip
        print(report.text())

        config = TrainConfig(str(root / "data"), dim=16, blocks=2, max_steps=steps, warmup=5, lr=3e-3, threads=1)
        best = train(config, root / "run", progress=False)
        calibrate_run(root / "run")  # confidence, on the validation people
        print("best validation CCC:", {name: round(value, 2) for name, value in best["scores"]["fused"].items()})

        write_table(root / "new.csv", videos=1, seconds=60)  # rows that nobody annotated would do
        targets = Run.load(root / "run").targets
        import_table(root / "new.csv", root / "new", modalities=["voice", "face"], unlabelled=targets)
        predictions = predict_run(root / "run", root / "new", root / "predictions.csv")
        print(*(root / "predictions.csv").read_text().split("\n")[:3], sep="\n")
        return report, predictions


if __name__ == "__main__":
    main()
