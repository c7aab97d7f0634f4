"""Mistral-family language models in JAX and Equinox.

The public names are those of `public.py`. They are imported, and JAX with them, when the first one is used: the command
line answers what needs no model without that second.
"""

import importlib
import importlib.util
from typing import TYPE_CHECKING, Any

# First: from here on ctrl-C is answered, if this package is the program that runs.
from . import interrupts as interrupts


if TYPE_CHECKING:
    from .public import *  # noqa: F403
    from .public import __version__ as __version__
else:

    def __getattr__(name: str) -> Any:
        if name == "__all__":
            return __dir__()
        if importlib.util.find_spec(f"{__name__}.{name}") is not None:
            return importlib.import_module(f"{__name__}.{name}")
        public = vars(importlib.import_module(f"{__name__}.public"))
        if name not in public or (name.startswith("_") and name != "__version__"):
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        return public[name]

    def __dir__() -> list[str]:
        return [name for name in vars(importlib.import_module(f"{__name__}.public")) if not name.startswith("_")]
