"""How hard the synthetic data set is, without any of this project's models: prints CCC of valence and arousal on
validation.

    python benchmarks/synthetic_difficulty.py [--seeds 0 1 2] [--difficulty 1.0]

Every decoder is the same small causal network (features of now and the mean of the last 8 and 32 frames -> 64 tanh
units; a linear head), trained full-batch on `1 - CCC` of the train split with Adam, its epoch chosen on half of the
validation videos and scored on the other half, and the other way round. `average`: the mean of the single decoders'
outputs over the modalities present; `late, true`: their sum with the true inverse-variance weights. `concat`: one
decoder of both. `early`: one decoder of the sum of the representations with equal or with the true weights.
`oracle`: sage_ext.data.oracle_predictions.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import numpy as np
import torch

from sage_ext.data import AffWild2, clip_tensors, oracle_predictions, write_dataset

SCALES = (1, 8, 32)


def load(root: Path, split: str) -> list[dict]:
    clips = []
    data = AffWild2(root, split)
    for clip in data:
        item = clip_tensors(clip, list(data.modalities))
        with np.load(root / "truth" / f"{clip.name}.npz") as truth:
            precision = truth["present"] / truth["variance"]
            truth_labels = truth["labels"]
        weights = precision / np.maximum(precision.sum(axis=1, keepdims=True), 1e-9)
        present = item["present"].float()
        clips.append(
            {
                "name": clip.name,
                "inputs": [context(rows) for rows in item["features"].values()],
                "true": torch.from_numpy(weights).float(),
                "uniform": present / present.sum(dim=1, keepdim=True).clamp(min=1),
                "present": present,
                "labels": item["labels"],
                "valid": item["valid"],
                "truth": torch.from_numpy(truth_labels),
            }
        )
    return clips


def context(rows: torch.Tensor) -> torch.Tensor:
    """(T, D) -> (T, len(SCALES) * D): causal means."""
    total = torch.cat([torch.zeros(1, rows.shape[1]), rows.double().cumsum(0)])
    t = torch.arange(1, len(rows) + 1)
    parts = []
    for scale in SCALES:
        low = (t - scale).clamp(min=0)
        parts.append(((total[t] - total[low]) / (t - low)[:, None]).float())
    return torch.cat(parts, dim=1)


def ccc(p: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    mp, my = p.mean(0), y.mean(0)
    return 2 * ((p - mp) * (y - my)).mean(0) / (p.var(0, correction=0) + y.var(0, correction=0) + (mp - my) ** 2)


class Decoder(torch.nn.Module):
    """weights None: concatenation of the representations; else their weighted sum."""

    def __init__(self, dims: list[int], weighting: str | None, width: int = 64):
        super().__init__()
        self.weighting = weighting
        self.inward = torch.nn.ModuleList(torch.nn.Linear(dim, width) for dim in dims)
        self.mixed = torch.nn.Linear(width * (1 if weighting else len(dims)), width)
        self.head = torch.nn.Linear(width, 2)

    def forward(self, inputs, weights):
        hidden = [torch.tanh(layer(x)) for layer, x in zip(self.inward, inputs)]
        if self.weighting:
            joint = sum(w[:, None] * h for w, h in zip(weights.unbind(1), hidden))
        else:
            joint = torch.cat([p[:, None] * h for p, h in zip(weights.unbind(1), hidden)], dim=1)
        return self.head(torch.nn.functional.gelu(self.mixed(joint)) + (joint if self.weighting else 0))


def fit(train, heldout, which: list[int], weighting: str | None, seed: int, steps: int = 150):
    """Predictions of the held-out videos, at every 10th step."""
    torch.manual_seed(seed)
    inputs = [torch.cat([clip["inputs"][m] for clip in train]) for m in which]
    mean, std = [x.mean(0) for x in inputs], [x.std(0) + 1e-3 for x in inputs]
    key = weighting or "present"

    def batch(clips):
        xs = [(torch.cat([clip["inputs"][m] for clip in clips]) - a) / b for m, a, b in zip(which, mean, std)]
        return xs, torch.cat([clip[key][:, which] for clip in clips])

    net = Decoder([x.shape[1] for x in inputs], weighting)
    adam = torch.optim.AdamW(net.parameters(), lr=3e-3, weight_decay=1e-2)
    xs, weights = batch(train)
    labels = torch.cat([clip["labels"] for clip in train])
    valid = torch.cat([clip["valid"] for clip in train])
    held = batch(heldout)
    history = []
    for step in range(steps):
        net.train()
        loss = (1 - ccc(net(xs, weights)[valid], labels[valid])).mean()
        adam.zero_grad()
        loss.backward()
        adam.step()
        if step % 10 == 9:
            with torch.no_grad():
                history.append(net(*held))
    return history


def crossed(histories: list[list[torch.Tensor]], heldout, weighting: str = "uniform") -> np.ndarray:
    """CCC of the weighted sum of the histories' predictions, the step chosen on the other half of the videos."""
    half = torch.cat([torch.full((len(clip["labels"]),), k % 2) for k, clip in enumerate(heldout)])
    labels, valid = torch.cat([c["labels"] for c in heldout]), torch.cat([c["valid"] for c in heldout])
    weights = torch.cat([c[weighting] for c in heldout]).unbind(1) if len(histories) > 1 else [torch.ones(len(labels))]
    scores, outputs = [], []
    for steps in zip(*histories):
        outputs.append(sum(w[:, None] * p for w, p in zip(weights, steps)))
        scores.append([ccc(outputs[-1][valid & (half == h)], labels[valid & (half == h)]).mean() for h in (0, 1)])
    best = torch.tensor(scores).argmax(0)
    final = torch.where((half == 0)[:, None], outputs[best[1]], outputs[best[0]])
    return ccc(final[valid], labels[valid]).numpy()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--difficulty", type=float, default=1.0)
    args = parser.parse_args()
    table: dict[str, list[np.ndarray]] = {}
    for seed in args.seeds:
        with tempfile.TemporaryDirectory() as folder:
            root = Path(folder) / "data"
            spec = write_dataset(root, seed=seed, difficulty=args.difficulty)
            train, heldout = load(root, "train"), load(root, "validation")
            oracle = oracle_predictions(root, "validation")
        names = list(spec.modalities)
        every = list(range(len(names)))
        single = [fit(train, heldout, [m], "uniform", seed) for m in every]
        for m in every:
            table.setdefault(names[m], []).append(crossed([single[m]], heldout))
        table.setdefault("average", []).append(crossed(single, heldout))
        table.setdefault("late, true", []).append(crossed(single, heldout, "true"))
        table.setdefault("concat", []).append(crossed([fit(train, heldout, every, None, seed)], heldout))
        for weighting in ("uniform", "true"):
            name = f"early, {weighting}"
            table.setdefault(name, []).append(crossed([fit(train, heldout, every, weighting, seed)], heldout))
        upper = [[torch.cat([torch.from_numpy(oracle[clip["name"]]) for clip in heldout])]]
        table.setdefault("oracle", []).append(crossed(upper, heldout))
    print(f"{'decoder':14}{'CCC_V':>8}{'CCC_A':>8}{'P':>8}   P by seed")
    for name, rows in table.items():
        v, a = np.mean(rows, axis=0)
        print(f"{name:14}{v:8.3f}{a:8.3f}{(v + a) / 2:8.3f}   {' '.join(f'{row.mean():.3f}' for row in rows)}")


if __name__ == "__main__":
    main()
