"""Running Doge on a CPU, one token after another, at the speed of its memory.

``Engine.open(folder)`` packs a model's weights once and opens them; ``Engine.session()`` begins a text, which takes
tokens in and generates others, in as much memory for a long text as for a short one. Needs Numba
(``pip install "small-doge[cpu]"``) and, once weights are packed, neither torch nor transformers.
"""

from .engine import Engine, Session
from .sampling import GREEDY, Sampling
from .weights import Unsupported

__all__ = ["GREEDY", "Engine", "Sampling", "Session", "Unsupported"]
