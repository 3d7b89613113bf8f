"""What each corruption and severity of the robustness protocol costs a plain estimator, with none of this project's
models: prints P of the validation clips as a Markdown table, the mean over data seeds and over the modalities that fail.

    python benchmarks/robustness_severities.py [--seeds 0 1 2]

The estimator is a ridge regression of valence and arousal on the causal means, over 25 frames, of all features, an
absent frame counting as the training mean; it knows the presence mask and nothing else. Corruption seed 0, true stages.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from sage_ext.data import AffWild2, Clip, write_dataset
from sage_ext.study.corruptions import CORRUPTIONS, PROTOCOL, SEVERITIES, conditions, corrupted

WINDOW, RIDGE = 25, 30.0


def rows_of(clip: Clip, name: str) -> tuple[np.ndarray, np.ndarray]:
    """(T, D) features and (T,) presence of one modality."""
    given, present = np.asarray(clip.features[name][: clip.num_frames], np.float64), np.array(clip.present[name])
    rows = np.zeros((clip.num_frames, given.shape[1]))
    rows[: len(given)] = given
    present[len(given) :] = False
    return rows, present


class Ridge:
    def __init__(self, clips: Iterable[Clip]):
        clips = list(clips)
        self.mean = {}
        for name in clips[0].features:
            seen = [rows[present] for rows, present in (rows_of(clip, name) for clip in clips)]
            self.mean[name] = np.concatenate(seen).mean(axis=0)
        inputs = np.concatenate([self.inputs(clip)[clip.valid] for clip in clips])
        labels = np.concatenate([clip.labels[clip.valid] for clip in clips if clip.labels is not None])
        self.weights = np.linalg.solve(inputs.T @ inputs + RIDGE * np.eye(inputs.shape[1]), inputs.T @ labels)

    def inputs(self, clip: Clip) -> np.ndarray:
        parts = [np.ones((clip.num_frames, 1))]
        for name, mean in self.mean.items():
            rows, present = rows_of(clip, name)
            total = np.cumsum(np.where(present[:, None], rows - mean, 0), axis=0)
            total[WINDOW:] -= total[:-WINDOW].copy()
            parts.append(total / np.minimum(np.arange(1, len(total) + 1), WINDOW)[:, None])
        return np.concatenate(parts, axis=1)

    def score(self, clips: Iterable[Clip]) -> float:
        """P: the mean CCC of valence and arousal over all valid frames."""
        predicted, labels = [], []
        for clip in clips:
            assert clip.labels is not None
            predicted.append((self.inputs(clip) @ self.weights)[clip.valid])
            labels.append(clip.labels[clip.valid])
        p, y = np.concatenate(predicted), np.concatenate(labels).astype(np.float64)
        covariance = np.mean((p - p.mean(0)) * (y - y.mean(0)), axis=0)
        return float(np.mean(2 * covariance / (p.var(0) + y.var(0) + (p.mean(0) - y.mean(0)) ** 2)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    seeds = parser.parse_args().seeds
    clean, found = [], np.zeros((len(seeds), len(PROTOCOL), len(SEVERITIES)))
    for s, seed in enumerate(seeds):
        with tempfile.TemporaryDirectory() as folder:
            root = Path(folder) / "data"
            write_dataset(root, seed=seed, test=0)
            model, clips = Ridge(AffWild2(root, "train")), AffWild2(root, "validation")
            clean.append(model.score(clips))
            stages = {name: np.load(root / "truth" / f"{name}.npz")["stage"] for name in clips.names}
            for k, name in enumerate(PROTOCOL):
                for severity in SEVERITIES:
                    scores = [
                        model.score(corrupted(clips, condition, 0, stages=stages))
                        for condition in conditions(list(clips.modalities), [name], (severity,))
                    ]
                    found[s, k, severity - 1] = np.mean(scores)
    print(f"P of a ridge regression, mean of data seeds {', '.join(map(str, seeds))}; clean {np.mean(clean):.2f}\n")
    print("| corruption | " + " | ".join(map(str, SEVERITIES)) + " | unit of the severities |")
    print("| --- |" + " --- |" * (len(SEVERITIES) + 1))
    for name, row in zip(PROTOCOL, found.mean(axis=0)):
        print(f"| {name} | " + " | ".join(f"{p:.2f}" for p in row) + f" | {CORRUPTIONS[name].unit} |")


if __name__ == "__main__":
    main()
