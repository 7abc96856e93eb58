"""Where examples come from: the embedded receipts, files in one of several forms, or the Hugging Face Hub."""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Iterable, Mapping
from pathlib import Path

from im2json.data.example import Split
from im2json.data.folders import COLUMN_OPTIONS, open_folder, open_lines, refuse_all_but
from im2json.data.splitnames import ROLES
from im2json.data.splits import cut
from im2json.data.stored import ALIASES, Columns, Rows, StoredSplit, listed
from im2json.data.tables import open_tables
from im2json.errors import UserError, first_line
from im2json.files import did_you_mean
from im2json.options import DataOptions

RECEIPTS = "receipts"
_FORMS = "Name a folder of pictures with their JSON, a .jsonl file, or a data set on the hub."
FORM_OPTIONS = ("dataset_config", "revision", *COLUMN_OPTIONS)

_log = logging.getLogger(__name__)


def load_splits(
    dataset: str,
    *,
    train_split: str = "train",
    seed: int = 0,
    config: str | None = None,
    revision: str | None = None,
    image_column: str | None = None,
    target_column: str | None = None,
    notes: list[str] | None = None,
) -> dict[str, Split]:
    """Return the splits train, validation and test of a data set, as a run that begins has them if no row is bad.

    A split that is missing is cut from train, see `cut`; open_splits says what `dataset` may be and what is raised.
    Rows are not checked here, check_split does that.
    """
    said: list[str] = [] if notes is None else notes
    options = DataOptions(dataset, config, revision, train_split, image_column, target_column)
    splits = open_splits(options, said, seed)
    train = splits["train"]
    if isinstance(train, StoredSplit) and len(splits) < len(ALIASES):
        digests = [_picture_digest(train.rows, row) for row in train.chosen]
        for name, chosen in cut(digests, splits, dataset, said).items():
            splits[name] = StoredSplit(name, train.rows, chosen)
    if notes is None:
        for note in said:
            _log.info(note)
    return {role: splits[role] for role in ALIASES}


def open_splits(options: DataOptions, notes: list[str], seed: int = 0) -> dict[str, Split]:
    """Return train, and those of validation and test that the data set of a run's options has; none of them is empty.

    --dataset is one of
    - receipts: the embedded synthetic ones, drawn from `seed` (./receipts is a folder of that name);
    - a folder in imagefolder form: metadata.jsonl files, such as one in each split's folder, with file_name and target;
    - a JSON-lines file, each line with a picture's path from the file's folder on, and the target;
    - a folder of pictures with a .json of the same name each, which is the target (see read_pairs);
    - a folder of Parquet files as the hub lays them out, with --dataset-config where it has several;
    - a folder that `save_to_disk` of `datasets` wrote;
    - a hub id such as naver-clova-ix/cord-v2, with --dataset-config and --revision where it has several.

    Rows belong to the split that a folder on the way to their files names below the data set, whatever its depth, case
    and slash (see splitnames); others to train. Names are taken literally, and linked folders are followed.

    Pictures are in the column image or file_name (or the only picture column), targets in ground_truth, target or
    json, unless --image-column and --target-column say otherwise. A target is a JSON object or the text of one;
    gt_parse is unwrapped, and of gt_parses the first is taken. Nothing in it is changed, but for struct
    columns (see ArrowRows).

    What a reader of the results should know is appended to `notes`, a line each.

    Rows are not checked here. Raises UserError, in one line that says what would be right, where the data set, a split
    or a column is not there, a split is empty, or something was given for that this form of data does not have.
    """
    dataset, columns = options.dataset, (options.image_column, options.target_column)
    given = {name: getattr(options, name) for name in FORM_OPTIONS}
    if dataset == RECEIPTS:
        refuse_all_but((), given, RECEIPTS)
        return _receipts(options.train_split, seed, notes)
    path = Path(os.path.expanduser(dataset))
    if path.is_dir():
        available = open_folder(path, given, columns, notes)
    elif path.suffix.lower() == ".jsonl" and path.is_file():
        refuse_all_but(COLUMN_OPTIONS, given, dataset)
        available = open_lines(path, columns, notes)
    elif path.exists() and path.suffix.lower() in (".parquet", ".arrow"):
        raise UserError(f"--dataset {dataset}: is one file of a data set; pass its folder, --dataset {path.parent}")
    elif path.exists():
        raise UserError(f"--dataset {dataset}: is not a file of JSON lines. {_FORMS}")
    elif _looks_like_path(dataset):
        raise UserError(f"--dataset {dataset}: there is no such folder or file{did_you_mean(path)}. {_FORMS}")
    else:
        available = _open_hub(dataset, options.dataset_config, options.revision, columns, notes)
    return _by_role(available, dataset, options.train_split, notes)


def _receipts(train_split: str, seed: int, notes: list[str]) -> dict[str, Split]:
    from im2json.data.receipts import DESCRIPTION, Receipts

    if train_split != "train":
        raise UserError(f"--train-split {train_split}: {RECEIPTS} has the splits train, validation, test")
    notes.append(DESCRIPTION)
    if os.path.lexists(RECEIPTS):
        notes.append(
            f"--dataset {RECEIPTS} is the embedded data set, and not the {RECEIPTS} that lies here; "
            f"to read that, pass --dataset ./{RECEIPTS}"
        )
    return {name: Receipts(name, seed=seed) for name in ALIASES}


def _looks_like_path(dataset: str) -> bool:
    return (
        dataset.startswith(("/", ".", "~"))
        or dataset.lower().endswith(".jsonl")
        or "\\" in dataset
        or dataset.count("/") > 1
        or not dataset
    )


# --- the hub


def _open_hub(
    dataset: str,
    config: str | None,
    revision: str | None,
    columns: Columns,
    notes: list[str],
) -> dict[str, Rows]:
    import datasets
    import huggingface_hub

    # of the HTTP client that this version of the hub's library uses
    from huggingface_hub.errors import HTTPError

    nowhere = f"--dataset {dataset}: is neither a folder here{did_you_mean(Path(dataset))} nor"
    try:
        loaded = datasets.load_dataset(dataset, name=config, revision=revision)
    except FileNotFoundError as error:
        if "gated" in str(error):
            raise UserError(
                f"--dataset {dataset}: is gated; accept its terms at "
                f"https://huggingface.co/datasets/{dataset}, then log in with `hf auth login`"
            ) from error
        raise UserError(
            f"{nowhere} a data set on the Hugging Face Hub that can be read ({first_line(error, 2)}); "
            f"check the name, and for a private one log in with `hf auth login`"
        ) from error
    except (OSError, HTTPError) as error:
        raise UserError(
            f"{nowhere} in reach on the Hugging Face Hub ({first_line(error, 2)}); check the network, "
            f"HF_HUB_OFFLINE and the name, or give a folder"
        ) from error
    except (datasets.exceptions.DatasetsError, ValueError) as error:
        raise UserError(f"--dataset {dataset}: cannot be loaded ({first_line(error, 2)})") from error
    caches = [Path(datasets.config.HF_CACHE_HOME), Path(huggingface_hub.constants.HF_HUB_CACHE)]
    caches += [Path(datasets.config.HF_DATASETS_CACHE), Path(datasets.config.DOWNLOADED_DATASETS_PATH)]
    return open_tables(loaded, dataset, columns, caches, notes)


# --- train, validation and test among the splits that are there


def _by_role(available: Mapping[str, Rows], dataset: str, train_split: str, notes: list[str]) -> dict[str, Split]:
    train = train_split if train_split in available else _of_role(available, ROLES.get(train_split.lower()))
    if train is None:
        found = f"{dataset} has no such split; it has {', '.join(available)}"
        title = f"--train-split {train_split}: {found}; pass --train-split NAME, or rename one of them to train"
        raise UserError(listed(title, notes, 5))
    splits: dict[str, Split] = {"train": StoredSplit("train", _not_empty(available[train], dataset, train))}
    used = {train}
    for role in ("validation", "test"):
        # what is trained on must not be what is tested on, whatever it is called
        there = _of_role([name for name in available if name != train], role)
        if there is not None:
            used.add(there)
            splits[role] = StoredSplit(role, _not_empty(available[there], dataset, there))
    if unused := [f"{name} ({len(rows)} rows)" for name, rows in available.items() if name not in used]:
        notes.append(f"{dataset}: splits not used: {', '.join(unused)}; --train-split NAME trains on one of them")
    return splits


def _of_role(names: Iterable[str], role: str | None) -> str | None:
    """Return the first name, in the order of ALIASES, that stands for train, validation or test, whatever its case."""
    known = {name.lower(): name for name in names}
    return next((known[alias] for alias in ALIASES.get(role or "", ()) if alias in known), None)


def _not_empty(rows: Rows, dataset: str, split: str) -> Rows:
    if len(rows) == 0:
        raise UserError(f"--dataset {dataset}: its split {split} is empty; put rows into it or remove it")
    return rows


def _picture_digest(rows: Rows, row: int) -> str:
    try:
        data, _ = rows.picture(row)
    except UserError:
        data = rows.id(row).encode("utf-8", "surrogatepass")  # a bad row, which check_split will name
    return hashlib.sha256(data).hexdigest()
