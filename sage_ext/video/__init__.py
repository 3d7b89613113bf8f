"""From raw video to features and to a curve: needs the extra `video` (`pip install "sage-ext[video]"`); docs/video.md.

extract   videos -> a data set of features and quality, which `train`, `predict` and the rest read
analyze   one video -> `Result`: the estimates, who was trusted when, and what was measured of picture and sound
"""

from .analysis import analyze
from .extraction import Extraction, Parameters, extract
from .result import Result

__all__ = ["Extraction", "Parameters", "Result", "analyze", "extract"]
