"""What a meter of quality is."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

# What would have been measured of a signal that was altered: (modality, quality (n, Q), features before and after (n, D), their
# standard deviations (D,)) -> (n, Q), of the present rows of a clip in time order.
Meter = Callable[[str, np.ndarray, np.ndarray, np.ndarray, np.ndarray], np.ndarray]
