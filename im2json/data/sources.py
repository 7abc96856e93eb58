"""Where examples come from: the embedded receipts, files in one of several forms, or the Hugging Face Hub."""

from __future__ import annotations

import hashlib
import json
import logging
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from im2json.data.example import Split
from im2json.data.stored import (
    ALIASES,
    ArrowRows,
    Columns,
    FolderRows,
    Line,
    Rows,
    StoredSplit,
    find_target,
    inside,
    read_lines,
    read_pairs,
)
from im2json.errors import UserError, first_line
from im2json.options import DataOptions, flag_name

RECEIPTS = "receipts"
COLUMN_OPTIONS = ("image_column", "target_column")
METADATA_EXAMPLE = '{"file_name": "001.jpg", "ground_truth": "{\\"gt_parse\\": {\\"total\\": \\"9.30\\"}}"}'
FOLDER_HELP = (
    "a folder must hold train/metadata.jsonl (and validation/, test/ where there are such splits), "
    f"a line a picture: {METADATA_EXAMPLE}; "
    "or pictures with a .json of the same name each, train/001.jpg and train/001.json, or train/img/ and train/key/; "
    "or Parquet files named by split, such as data/train-00000-of-00001.parquet; or what save_to_disk wrote"
)

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
    """Return the splits train, validation and test of a data set, none of them empty.

    `dataset` is one of
    - receipts: the embedded synthetic ones, drawn from `seed` (./receipts is a folder of that name);
    - a folder in imagefolder form: a metadata.jsonl in each split's folder, with file_name and the target;
    - a JSON-lines file, each line with a picture's path from the file's folder on, and the target;
    - a folder of pictures with a .json of the same name each, which is the target (see read_pairs);
    - a folder of Parquet files as the hub lays them out, with `config` where it has several;
    - a folder that `save_to_disk` of `datasets` wrote;
    - a hub id such as naver-clova-ix/cord-v2, with `config` and `revision` where it has several.

    Where files are not told apart by split, those in a folder of a split's name belong to it, others to train.

    Pictures are in the column image or file_name (or the only picture column), targets in ground_truth, target or
    json, unless `image_column` and `target_column` say otherwise. A target is a JSON object or the text of one;
    gt_parse is unwrapped, and of gt_parses the first is taken. Nothing in it is changed, but for struct
    columns (see ArrowRows).

    A validation or test split that is missing is cut from train, a tenth each, by a hash of the picture's
    bytes: the same rows whatever the seed and the order, and equal pictures on the same side.

    What a reader of the results should know is appended to `notes`, a line each, or logged if that is None.

    Rows are not checked here, `check_split` does that. Raises UserError, in one line that says what would be
    right, where the data set, a split or a column is not there, a split is empty, or something was given for that
    this form of data does not have.
    """
    said: list[str] = [] if notes is None else notes
    given = dict(dataset_config=config, revision=revision, image_column=image_column, target_column=target_column)
    columns = (image_column, target_column)
    if dataset == RECEIPTS:
        _refuse_all_but((), given, RECEIPTS)
        splits = _receipts(train_split, seed, said)
    else:
        path = Path(dataset).expanduser()
        if path.is_dir():
            available = _open_folder(path, given, columns, said)
        elif path.suffix == ".jsonl" and path.is_file():
            _refuse_all_but(COLUMN_OPTIONS, given, dataset)
            available = _split_by_folder(path.parent, read_lines(path, columns))
        elif path.exists():
            raise UserError(f"--dataset {dataset}: is a file, but not one of JSON lines (NAME.jsonl); {FOLDER_HELP}")
        elif _looks_like_path(dataset):
            raise UserError(f"--dataset {dataset}: there is no such folder or file; {FOLDER_HELP}")
        else:
            available = _open_hub(dataset, config, revision, columns, said)
        splits = _three_splits(available, dataset, train_split, said)
    if notes is None:
        for note in said:
            _log.info(note)
    return splits


def open_splits(options: DataOptions, notes: list[str]) -> dict[str, Split]:
    """Return the splits that a run's options ask for, as `load_splits` does."""
    return load_splits(
        options.dataset,
        train_split=options.train_split,
        config=options.dataset_config,
        revision=options.revision,
        image_column=options.image_column,
        target_column=options.target_column,
        notes=notes,
    )


def _receipts(train_split: str, seed: int, notes: list[str]) -> dict[str, Split]:
    from im2json.data.receipts import DESCRIPTION, Receipts

    if train_split != "train":
        raise UserError(f"--train-split {train_split}: {RECEIPTS} has the splits train, validation, test")
    notes.append(DESCRIPTION)
    return {name: Receipts(name, seed=seed) for name in ALIASES}


def _looks_like_path(dataset: str) -> bool:
    return (
        dataset.startswith(("/", ".", "~"))
        or dataset.endswith(".jsonl")
        or "\\" in dataset
        or dataset.count("/") > 1
        or not dataset
    )


# --- folders


def _open_folder(root: Path, given: Mapping[str, str | None], columns: Columns, notes: list[str]) -> dict[str, Rows]:
    found = sorted(path.parent for path in root.glob("*/metadata.jsonl"))
    if found or (root / "metadata.jsonl").is_file():
        _refuse_all_but(COLUMN_OPTIONS, given, str(root))
        return _open_imagefolder(root, found, columns)
    whole = root.resolve()
    if (root / "dataset_dict.json").is_file() or (root / "state.json").is_file():
        _refuse_all_but(COLUMN_OPTIONS, given, str(root))
        return _arrow_splits(_load_saved(root), whole.name, columns, [whole], notes)
    if next(root.rglob("*.parquet"), None) is not None:
        _refuse_all_but(("dataset_config", *COLUMN_OPTIONS), given, str(root))
        return _arrow_splits(_load_parquet(root, given["dataset_config"]), whole.name, columns, [whole], notes)
    pairs = read_pairs(root)
    if all(pair.problem for pair in pairs):
        raise UserError(f"{root}: holds neither metadata.jsonl nor Parquet files; {FOLDER_HELP}")
    _refuse_all_but((), given, str(root))
    return _split_by_folder(root, pairs)


def _refuse_all_but(known: Sequence[str], given: Mapping[str, str | None], where: str) -> None:
    for name, value in given.items():
        if value is not None and name not in known:
            raise UserError(f"{flag_name(name)} {value}: {where} is of a form that has none; leave the option out")


def _open_imagefolder(root: Path, found: Sequence[Path], columns: Columns) -> dict[str, Rows]:
    if not found:
        return _split_by_folder(root, read_lines(root / "metadata.jsonl", columns))
    known = {name for names in ALIASES.values() for name in names}
    for sub in sorted(root.iterdir()):
        if sub.is_dir() and sub.name in known and sub not in found:
            raise UserError(f"{sub}: has no metadata.jsonl; {FOLDER_HELP}")
    return {sub.name: FolderRows(sub, root, read_lines(sub / "metadata.jsonl", columns)) for sub in found}


def _load_parquet(root: Path, config: str | None) -> Any:
    import datasets

    try:
        return datasets.load_dataset(str(root), name=config)
    except (datasets.exceptions.DatasetsError, ValueError, OSError) as error:
        raise UserError(f"{root}: cannot be loaded ({first_line(error, 2)})") from error


def _load_saved(root: Path) -> Any:
    """Load what `save_to_disk` wrote. A data set without splits is train.

    The folder names its splits and Arrow files itself: none may lie elsewhere.
    """
    import datasets

    saved = root / "dataset_dict.json"
    try:
        names = json.loads(saved.read_text("utf-8"))["splits"] if saved.is_file() else ["."]
        for name in names:
            state = inside(root, name, str(saved)) / "state.json"
            for file in json.loads(state.read_text("utf-8"))["_data_files"]:
                inside(state.parent, file["filename"], str(state))
        loaded = datasets.load_from_disk(str(root))
    except (datasets.exceptions.DatasetsError, LookupError, AttributeError, TypeError, ValueError, OSError) as error:
        raise UserError(f"{root}: cannot be loaded as what save_to_disk writes ({first_line(error, 2)})") from error
    return loaded if isinstance(loaded, datasets.DatasetDict) else {"train": loaded}


def _split_by_folder(root: Path, lines: Sequence[Line]) -> dict[str, Rows]:
    """Sort lines into splits by their folders: test/001.jpg belongs to test, 001.jpg to train."""
    known = {name for names in ALIASES.values() for name in names}
    groups: dict[str, list[Line]] = defaultdict(list)
    for line in lines:
        parts = PurePosixPath(line.file_name).parts
        groups[parts[0] if len(parts) > 1 and parts[0] in known else "train"].append(line)
    return {name: FolderRows(root, root, group) for name, group in (groups or {"train": []}).items()}


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
    from huggingface_hub.errors import (
        HTTPError,
    )  # of the HTTP client that this version of the hub's library uses

    nowhere = f"--dataset {dataset}: is neither a folder here nor"
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
    return _arrow_splits(loaded, dataset, columns, caches, notes)


def _arrow_splits(
    loaded: Mapping[str, Any], name: str, columns: Columns, folders: Sequence[Path], notes: list[str]
) -> dict[str, Rows]:
    import datasets

    splits: dict[str, Rows] = {}
    for split, rows in loaded.items():
        where = f"split {split} of {name}"
        image = _find_image(rows.features, columns[0], where)
        target = find_target(rows.column_names, columns[1], where)
        try:
            rows = rows.cast_column(image, datasets.Image(decode=False))
        except (NotImplementedError, TypeError, ValueError) as error:
            raise UserError(f"{where}: its column {image!r} holds no pictures ({first_line(error, 2)})") from error
        splits[split] = ArrowRows(rows, name, split, image, target, folders)
        if isinstance(rows.features[target], dict):
            notes.append(f"{where}: {target} is a struct: keys that are null are left out; JSON text keeps them")
    return splits


def _find_image(features: Mapping[str, Any], given: str | None, where: str) -> str:
    import datasets

    if given is not None and given not in features:
        raise UserError(f"{where}: has no column {given!r}; it has {', '.join(features)}")
    pictures = [name for name, feature in features.items() if isinstance(feature, datasets.Image)]
    if given is not None or "image" in features:
        return given or "image"
    if len(pictures) != 1:
        raise UserError(f"{where}: has no picture column (image); it has {', '.join(features)}")
    return pictures[0]


# --- three splits out of those that are there


def _three_splits(available: Mapping[str, Rows], dataset: str, train_split: str, notes: list[str]) -> dict[str, Split]:
    wanted = ALIASES["train"] if train_split == "train" else (train_split,)
    train = next((name for name in wanted if name in available), None)
    if train is None:
        raise UserError(f"--train-split {train_split}: {dataset} has no such split; it has {', '.join(available)}")
    splits: dict[str, Split] = {}
    for role in ("validation", "test"):
        # what is trained on must not be what is tested on, whatever it is called
        there = next((name for name in ALIASES[role] if name in available and name != train), None)
        if there is not None:
            splits[role] = StoredSplit(role, _not_empty(available[there], dataset, there))
    missing = [role for role in ("validation", "test") if role not in splits]
    splits |= _cut(_not_empty(available[train], dataset, train), missing, dataset, train, notes)
    return {role: splits[role] for role in ALIASES}


def _not_empty(rows: Rows, dataset: str, split: str) -> Rows:
    if len(rows) == 0:
        raise UserError(f"--dataset {dataset}: its split {split} is empty; put rows into it or remove it")
    return rows


def _cut(rows: Rows, missing: Sequence[str], dataset: str, train: str, notes: list[str]) -> dict[str, Split]:
    """Train, and the missing splits cut from it.

    Of the pictures in the order of their hashes, test is the first tenth and validation the last, so that one
    cut does not depend on the other, and a few new rows move few old ones.
    """
    if not missing:
        return {"train": StoredSplit("train", rows)}
    groups: dict[str, list[int]] = defaultdict(list)
    for row in range(len(rows)):
        groups[_content(rows, row)].append(row)
    order = sorted(groups)
    tenth = max(1, round(len(order) / 10))
    if len(order) < len(missing) + 1:
        raise UserError(
            f"--dataset {dataset}: has no {' and no '.join(missing)} split, and the {len(order)} different "
            f"pictures of {train} are too few to cut it from; at least {len(missing) + 1} are needed"
        )
    cuts = {"test": order[:tenth], "validation": order[-tenth:]}
    parts: dict[str, Split] = {}
    taken: set[int] = set()
    for role in missing:
        chosen = sorted(row for key in cuts[role] for row in groups[key])
        taken.update(chosen)
        parts[role] = StoredSplit(role, rows, chosen)
        notes.append(
            f"{dataset} has no {role} split: {len(chosen)} of the {len(rows)} rows of {train} "
            f"are kept for it, chosen by a hash of the picture"
        )
    parts["train"] = StoredSplit("train", rows, [row for row in range(len(rows)) if row not in taken])
    return parts


def _content(rows: Rows, row: int) -> str:
    try:
        data, _ = rows.picture(row)
    except UserError:
        data = rows.id(row).encode("utf-8", "surrogatepass")  # a bad row, which check_split will name
    return hashlib.sha256(data).hexdigest()
