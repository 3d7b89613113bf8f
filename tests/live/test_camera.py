"""A file through the live path gives the frames of the file that was extracted; late sound, lost devices, real time."""

from __future__ import annotations

import json
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

for package in ("av", "cv2", "librosa", "safetensors"):
    pytest.importorskip(package)

sys.path.append(str(Path(__file__).parents[1] / "video"))
from conftest import make  # noqa: E402
