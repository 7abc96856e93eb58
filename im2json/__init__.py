"""im2json: fine-tune a vision-language model to turn pictures of documents into JSON, judged by the JSON.

`train`, `evaluate` and `sweep` are the commands as functions; `Extractor` reads new pictures. `import im2json` alone
loads neither torch nor numpy.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from im2json.api import Run, Sweep, evaluate, sweep, train
    from im2json.errors import UserError
    from im2json.inference.extract import Extractor

__version__ = "0.2.0"
__all__ = ["Extractor", "Run", "Sweep", "UserError", "__version__", "evaluate", "sweep", "train"]

_MODULES = {"Extractor": "im2json.inference.extract", "UserError": "im2json.errors"}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_MODULES.get(name, "im2json.api")), name)
