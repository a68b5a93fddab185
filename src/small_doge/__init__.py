"""Small Doge: train, evaluate and run small language models with Dynamic Mask Attention.

``import small_doge`` registers the model with transformers, so that ``AutoModelForCausalLM.from_pretrained(folder)``
gives ours.
"""

import os as _os
import sys as _sys

from .errors import UserError

_EXPORTS = (
    "DogeConfig",
    "DogeForCausalLM",
    "DogeForSequenceClassification",
    "DogeModel",
    "DynamicMaskCache",
    "upcycle",
)
__all__ = [*_EXPORTS, "UserError"]

# Registering takes torch and transformers, seconds of import. Our own command answers --help without them and imports
# small_doge.models itself where it opens a model; every other program gets the registration at once.
_is_our_command = _sys.argv[:1] == ["-m"] or _os.path.basename(_sys.argv[0] if _sys.argv else "") in (
    "doge",
    "doge.exe",
)
if not _is_our_command:
    from . import models as models


def __getattr__(name: str):
    if name in _EXPORTS:
        from . import models

        return getattr(models, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
