"""Processes that a test starts in order to interrupt them."""

from __future__ import annotations

import signal
import subprocess
from collections.abc import Sequence


def start_interruptible(command: Sequence[str], **options) -> subprocess.Popen:
    """A child that SIGINT interrupts even where the tests themselves run with SIGINT ignored (`make test &` in a script,
    `trap "" INT`): an ignored signal stays ignored in every descendant unless somebody asks for its default again."""
    return subprocess.Popen(command, preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL), **options)
