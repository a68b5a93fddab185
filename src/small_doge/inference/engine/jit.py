"""How functions of the engine are compiled, and when a compiled one that was kept on disk still holds."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numba.extending
from numba import njit

intrinsic: Any = numba.extending.intrinsic  # its own type leaves no room for the context it adds

# Numba keeps machine code beside a source file, or in the user's cache, until that very file changes. But what it
# calls is compiled into it: here any change of any file of the engine counts.
_SOURCES = tuple((path.name, *path.stat()[6:9:2]) for path in sorted(Path(__file__).parent.glob("*.py")))


def _keep(dispatcher: Any) -> Any:
    kept = getattr(getattr(dispatcher, "_cache", None), "_cache_file", None)
    if kept is not None:
        kept._source_stamp = (kept._source_stamp, _SOURCES)
    return dispatcher


def compiled(function: Callable[..., Any]) -> Any:
    """Compile a function for this processor when it is first called, and keep it for the next time."""
    # Without `fastmath=False` a function takes over the option of whoever calls it first.
    return _keep(njit(nogil=True, cache=True, fastmath=False)(function))


def compiled_in_any_order(function: Callable[..., Any]) -> Any:
    """The same, with sums in any order, which lets them run in vectors. Infinities keep their meaning."""
    return _keep(njit(nogil=True, cache=True, fastmath={"reassoc", "contract", "nsz", "arcp"})(function))


def is_compiled(function: Any) -> bool:
    """Whether a compiled function has machine code, in this process or kept on disk: else calling it takes long."""
    kept = getattr(getattr(function, "_cache", None), "_cache_file", None)
    return bool(function.signatures or (kept is not None and kept._load_index()))
