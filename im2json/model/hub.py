"""The hub, and what it answers where something is missing or not allowed: one clear line. No torch."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator
from pathlib import Path

from huggingface_hub import HfApi, hf_hub_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    HTTPError,  # of the client beneath, which changes with the hub's version
    LocalEntryNotFoundError,
    LocalTokenNotFoundError,
    RepositoryNotFoundError,
)

from im2json.errors import UserError, first_line
from im2json.files import did_you_mean
from im2json.runs import ADAPTER_COMPANIONS, ADAPTER_CONFIG, HUB_NAME, USAGE, WEIGHTS, RunFolder


def fetch(model: str, file: str, what: str) -> Path:
    """Return a file of a model on the hub, from the cache if it is there. `what` begins the error.

    Raises:
        UserError: if there is no such model, access to it was not granted, or the hub cannot be reached.
    """
    absent = f"{what}: no such folder{did_you_mean(Path(model))}"
    try:
        return Path(hf_hub_download(model, file))
    except GatedRepoError as error:
        raise UserError(
            f"{what}: access to it was not granted: accept its licence at https://huggingface.co/{model}, "
            "then run `hf auth login`"
        ) from error
    except RepositoryNotFoundError as error:
        raise UserError(
            f"{absent}, and the hub has no model of this name (or it is private: run `hf auth login`)"
        ) from error
    except HFValidationError as error:
        raise UserError(f"{absent}, and not a name on the hub: {first_line(error)}") from error
    except (HfHubHTTPError, OSError, EntryNotFoundError) as error:
        raise UserError(f"{absent}, and the hub could not be reached: {first_line(error)}") from error


def adapter_path(path: str | os.PathLike[str]) -> Path:
    """Return a local folder unchanged; download an adapter from the hub and return its folder.

    Raises:
        UserError: as `fetch`, or if the hub's model holds no adapter in safetensors.
    """
    model = os.fspath(path)
    if os.path.lexists(model) or not re.fullmatch(HUB_NAME, model) or _beside_runs(Path(model)):
        return Path(model)
    for file in (USAGE, *ADAPTER_COMPANIONS):
        with contextlib.suppress(_MissingError):  # an adapter that was made elsewhere has none
            _fetch_part(model, file)
    try:
        _fetch_part(model, ADAPTER_CONFIG)
        return _fetch_part(model, WEIGHTS).parent
    except _MissingError as error:
        raise UserError(f"{model}: is on the hub, but has no {error}: there is no adapter to read with") from error


def _beside_runs(path: Path) -> bool:
    """Return whether other runs lie where this one is said to be, so that it is not on the hub but mistyped."""
    return any(RunFolder(folder).config.is_file() for folder in path.parent.glob("*"))


class _MissingError(Exception):
    pass


def _fetch_part(model: str, file: str) -> Path:
    try:
        return fetch(model, file, model)
    except UserError as error:
        cause = error.__cause__
        if isinstance(cause, EntryNotFoundError) and not isinstance(cause, LocalEntryNotFoundError):
            raise _MissingError(file) from error
        raise


def check_push(model: str) -> None:
    """Find out before anything is written whether a new model of this name could be made.

    Raises:
        UserError: if nobody is logged in, or the name is taken.
    """
    with _one_line(model):
        api = HfApi()
        api.whoami()
        if api.repo_exists(model):
            raise UserError(f"--push-to-hub {model}: the name is taken: choose another")


def push(folder: Path, model: str, private: bool) -> str:
    """Upload a folder as a new model; its address.

    Raises:
        UserError: if the hub refuses or cannot be reached, with how to send the folder later.
    """
    with _one_line(model, f"; {folder} is whole, and `hf upload {model} {folder}` sends it"):
        api = HfApi()
        address = api.create_repo(model, private=private)
        api.upload_folder(repo_id=model, folder_path=folder, commit_message="Upload the model and its card")
        return str(address)


@contextlib.contextmanager
def _one_line(model: str, advice: str = "") -> Iterator[None]:
    try:
        yield
    except KeyboardInterrupt:
        raise KeyboardInterrupt(advice.removeprefix("; ")) from None
    except LocalTokenNotFoundError as error:
        raise UserError(f"--push-to-hub {model}: nobody is logged in: run `hf auth login`{advice}") from error
    except HfHubHTTPError as error:
        status = error.response.status_code if error.response is not None else None
        why = {
            401: "the token is not valid: run `hf auth login`",
            403: "the token does not allow to write there: it needs the right to write, and the name to be yours",
            409: "the name is taken: choose another",
        }.get(status, first_line(error))
        raise UserError(f"--push-to-hub {model}: {why}{advice}") from error
    except (OSError, HTTPError) as error:
        raise UserError(f"--push-to-hub {model}: the hub could not be reached: {first_line(error)}{advice}") from error
