"""im2json: fine-tune PaliGemma with QLoRA to turn pictures of documents into JSON, judged by the JSON.

`Extractor` loads torch when it is first asked for; `import im2json` alone does not.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from im2json.inference.extract import Extractor

__version__ = "0.1.0"
__all__ = ["Extractor", "__version__"]


def __getattr__(name: str) -> Any:
    if name != "Extractor":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return import_module("im2json.inference.extract").Extractor
