"""The hub, and what it answers where something is missing or not allowed: one clear line. No torch."""

from __future__ import annotations

import contextlib
import os
import re
from pathlib import Path

from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, GatedRepoError, HfHubHTTPError, RepositoryNotFoundError

from im2json.cli import first_line
from im2json.runs import ADAPTER_CONFIG, ASKED, WEIGHTS

NAME = r"(?!\.)[\w.-]+/[\w.-]+"
"""How the hub names a model: owner/name."""


def fetch(model: str, file: str, what: str) -> Path:
    """A file of a model on the hub, from the cache where it is there; `what` begins the error.

    Raises:
        ValueError: if there is no such model, access to it was not granted, or the hub cannot be reached.
    """
    try:
        return Path(hf_hub_download(model, file))
    except GatedRepoError as error:
        raise ValueError(
            f"{what}: access to it was not granted: accept its licence at https://huggingface.co/{model}, "
            "then run `hf auth login`"
        ) from error
    except RepositoryNotFoundError as error:
        raise ValueError(
            f"{what}: no such folder, and the hub has no model of this name (or it is private: run `hf auth login`)"
        ) from error
    except (HfHubHTTPError, OSError, EntryNotFoundError) as error:
        raise ValueError(f"{what}: no such folder, and the hub could not be reached: {first_line(error)}") from error


def adapter_path(path: str | os.PathLike[str]) -> Path:
    """A folder as it is; that of an adapter on the hub once it is here.

    Raises:
        ValueError: as `fetch`, or if the hub's model holds no adapter in safetensors.
    """
    model = os.fspath(path)
    if os.path.lexists(model) or not re.fullmatch(NAME, model):
        return Path(model)
    try:
        for file in (ADAPTER_CONFIG, WEIGHTS):
            folder = fetch(model, file, model).parent
    except ValueError as error:
        if isinstance(error.__cause__, EntryNotFoundError):
            raise ValueError(f"{model}: on the hub, but without {file}: it holds no adapter to read with") from error
        raise
    with contextlib.suppress(EntryNotFoundError):  # one that was made elsewhere has none
        hf_hub_download(model, ASKED)
    return folder
