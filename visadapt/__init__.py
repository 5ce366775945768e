"""visadapt adapts vision foundation models to new domains with small adapters.

Importing this package imports no torch; the public names load what they need when they are first used.
"""

from __future__ import annotations

import importlib

__version__ = "0.1.0"

_LAZY = {
    "Adapted": "core.adapted",
    "InputError": "errors",
    "Predictor": "predict.image",
    "ADAPTERS": "registry",
    "BACKBONES": "registry",
}
__all__ = ["__version__", *_LAZY]


def __getattr__(name: str):
    if name in _LAZY:
        return getattr(importlib.import_module(f".{_LAZY[name]}", __name__), name)
    raise AttributeError(f"module 'visadapt' has no attribute '{name}'")
