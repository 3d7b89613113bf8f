"""What a run shows while it trains: a live line on a terminal, one line an epoch elsewhere, TensorBoard if asked."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..data.targets import scores
from ..extras import require
from ..functional import ccc_from_moments
from ..report import printable

_EVERY = 0.2  # seconds between updates of the live line


class Progress:
    """Reports to stderr. `quiet`: nothing is printed (TensorBoard is still written)."""

    def __init__(self, run: Path, *, tensorboard: bool = False, quiet: bool = False, live: bool | None = None) -> None:
        self.run, self.quiet, self.tensorboard = run, quiet, tensorboard
        self.live = not quiet and (sys.stderr.isatty() if live is None else live)
        self.writer: Any = None
        self.width = 0
        self.shown = 0.0
        if tensorboard:
            require("tensorboard", "train")

    def start(self, training: Any) -> None:
        if self.tensorboard:
            writer = require("torch.utils.tensorboard", "train").SummaryWriter
            self.writer = writer(str(self.run / "tensorboard"), purge_step=training.step + 1)
        self.began, self.first = time.monotonic(), training.step
        self.epochs, self.total = training.config.epochs, training.total
        parameters = sum(p.numel() for p in training.model.parameters())
        kind = "continues at" if training.step else "starts at"
        self._line(
            f"{self.run}: {', '.join(training.names)}; {parameters:,} parameters; {len(training.windows)} windows, "
            f"{training.per_epoch} steps an epoch; {kind} step {training.step} of {training.total}"
        )

    def step(self, training: Any) -> None:
        """The running concordance of this epoch's training batches, at most every 0.2 s."""
        if not self.live or time.monotonic() - self.shown < _EVERY:
            return
        self.shown = time.monotonic()
        found = scores(ccc_from_moments(training.moments).tolist(), training.targets)
        loss = float(training.loss_sum[0]) / training.position
        text = (
            f"epoch {training.epoch + 1}/{self.epochs}  step {training.step}/{self.total}  loss {loss:.3f}  "
            f"{_said(found)}  {self._pace(training.step)}"
        )
        sys.stderr.write("\r" + text.ljust(self.width))
        sys.stderr.flush()
        self.width = len(text)

    def epoch(self, row: Mapping[str, float], better: bool) -> None:
        if self.live:
            sys.stderr.write("\r" + " " * self.width + "\r")
            self.width = 0
        self._line(
            f"epoch {int(row['epoch']) + 1:3d}/{self.epochs}  loss {row['loss']:.3f}  train P {row['train_P']:.3f}  "
            f"validation {_said({name.removeprefix('val_'): x for name, x in row.items() if name.startswith('val_')})}"
            f"{' *' if better else '  '}  {self._pace(int(row['step']))}"
        )
        if self.writer is not None:
            for name, value in row.items():
                if name not in ("epoch", "step"):
                    group, _, rest = name.partition("_")
                    self.writer.add_scalar(f"{group}/{rest}" if rest else name, value, int(row["step"]))
            self.writer.flush()

    def note(self, text: str) -> None:
        """Something that the user should look at."""
        self._line(text)

    def close(self) -> None:
        if self.live and self.width:
            sys.stderr.write("\n")
        if self.writer is not None:
            self.writer.close()

    def _pace(self, step: int) -> str:
        rate = (step - self.first) / max(time.monotonic() - self.began, 1e-9)
        left = (self.total - step) / max(rate, 1e-9)
        return f"{rate:.1f} steps/s, {int(left) // 60}:{int(left) % 60:02d} left"

    def _line(self, text: str) -> None:
        if not self.quiet:
            print(printable(text), file=sys.stderr, flush=True)


def _said(scores: Mapping[str, float]) -> str:
    """ "CCC_V 0.123  CCC_A 0.456  P 0.289"; of many targets the mean alone."""
    shown = scores if len(scores) <= 4 else {"P": scores["P"]}
    return "  ".join(f"{name} {value:.3f}" for name, value in shown.items())
