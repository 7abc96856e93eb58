"""Tables of rows: Parquet files, what save_to_disk wrote, and the columns of both that hold pictures and targets."""

from __future__ import annotations

import glob
import hashlib
import json
import os
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path, PurePosixPath
from typing import Any

from im2json.data.kinds import LFS_POINTER, NO_CONTENT
from im2json.data.splitnames import folders_of, group_by_split, note_unnamed, split_named, split_of
from im2json.data.stored import ALIASES, SPLIT_COLUMN, ArrowRows, Columns, Rows, find_target, inside
from im2json.errors import UserError, first_line

_CARDS = ("README.md", ".huggingface.yaml")
"""Files in which a data set from the hub names its configurations."""

_SHARD = re.compile(r"(.*?)[-.]?(\d{5})-of-(\d{5})(?:-[0-9a-f]+)?")


def links_to(files: Mapping[str, Path]) -> Path:
    """Return a folder in the cache of `datasets` that has links to files by plain names.

    `datasets` takes the names of files and folders for patterns and addresses: of receipts[1] it would read receipts1.

    Args:
        files: by their names in the folder, which hold no characters of patterns.
    """
    import datasets

    real = {name: os.path.realpath(path) for name, path in files.items()}
    stamps = [(name, path, os.stat(path).st_mtime_ns, os.stat(path).st_size) for name, path in sorted(real.items())]
    digest = hashlib.sha256(ascii(stamps).encode()).hexdigest()[:16]
    folder = Path(datasets.config.HF_DATASETS_CACHE) / "im2json" / digest
    for name, path in real.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        with suppress(FileExistsError):  # another process was first
            (folder / name).symlink_to(path)
    return folder


def load_saved(root: Path) -> Mapping[str, Any]:
    """Load what `save_to_disk` wrote. A data set without splits is train.

    The folder names its splits and Arrow files itself: none may lie elsewhere.
    """
    import datasets

    saved = root / "dataset_dict.json"
    try:
        names = json.loads(saved.read_text("utf-8"))["splits"] if saved.is_file() else ["."]
        files = {saved.name: saved} if saved.is_file() else {}
        for name in names:
            folder = inside(root, name, str(saved))
            state = folder / "state.json"
            arrows = [each["filename"] for each in json.loads(state.read_text("utf-8"))["_data_files"]]
            for file in ("state.json", "dataset_info.json", *arrows):
                files[os.path.join(name, file)] = inside(folder, file, str(state))
        loaded = datasets.load_from_disk(str(links_to(files)))
    except (datasets.exceptions.DatasetsError, LookupError, AttributeError, TypeError, ValueError, OSError) as error:
        raise UserError(f"{root}: cannot be loaded as what save_to_disk writes ({first_line(error, 2)})") from error
    return loaded if isinstance(loaded, datasets.DatasetDict) else {"train": loaded}


def load_parquet(root: Path, names: Sequence[str], config: str | None, used: set[str]) -> Mapping[str, Any]:
    """Load Parquet files below a folder by split: as its README.md says for `config`, or else by their names.

    Args:
        names: of the files within the folder.
        used: receives the names of those that were read.
    """
    import datasets

    cards = {name: root / name for name in _CARDS if (root / name).is_file()}
    try:
        if any(b"configs:" in path.read_bytes() for path in cards.values()):
            folder = links_to(cards | {name: root / name for name in names})
            builder = datasets.load_dataset_builder(str(folder), name=config)
            paths = [path for files in (builder.config.data_files or {}).values() for path in files]
            used |= {os.path.relpath(path, folder) for path in paths}
            builder.download_and_prepare()
            return builder.as_dataset()
        if config not in (None, "default"):
            raise UserError(f"--dataset-config {config}: no README.md of {root} names it; leave the option out")
        splits = _by_name(root, names)
        used |= set(names)
        links = {
            split: {f"{split}/{i:05}.parquet": root / name for i, name in enumerate(files)}
            for split, files in splits.items()
        }
        folder = links_to({link: path for group in links.values() for link, path in group.items()})
        data_files = {split: [glob.escape(str(folder / link)) for link in group] for split, group in links.items()}
        return datasets.load_dataset("parquet", data_files=data_files)
    except (datasets.exceptions.DatasetsError, ValueError, OSError) as error:
        if isinstance(error, UserError):
            raise
        damaged = _first_damaged(root, names) or root
        if damaged.is_file() and damaged.read_bytes().startswith(LFS_POINTER):
            raise UserError(f"{damaged}: is a {NO_CONTENT}") from None
        raise UserError(f"{damaged}: cannot be loaded ({first_line(error, 2)})") from error


def _first_damaged(root: Path, names: Iterable[str]) -> Path | None:
    import pyarrow
    from pyarrow import parquet

    for name in names:
        try:
            with (root / name).open("rb") as file:
                parquet.read_schema(file)
        except (pyarrow.ArrowInvalid, OSError):
            return root / name
    return None


def _by_name(root: Path, names: Iterable[str]) -> dict[str, list[str]]:
    """Sort Parquet files into splits by their folders and names: test/0.parquet, data/test-00000-of-00001.parquet.

    Files whose names say no split are train if none says one. Otherwise they are splits of their own.

    Raises:
        UserError: where a file of several is missing, or names leave the split open.
    """
    splits: dict[str, list[str]] = defaultdict(list)
    parts: dict[tuple[str, str], set[str]] = defaultdict(set)
    unnamed: list[tuple[str, str]] = []  # with the name of a split of its own
    for name in sorted(names):
        folder, stem = os.path.dirname(name), PurePosixPath(name).stem
        shard = _SHARD.fullmatch(stem)
        if shard is not None:
            stem = shard[1]
            parts[os.path.join(folder, stem), shard[3]].add(shard[2])
        own, (role, doubt) = split_named(stem), split_of(folders_of(name))
        roles = {each for each in (role, own and own.role) if each is not None}
        if len(roles) > 1 or not roles <= set(ALIASES) or (not roles and doubt is not None):
            raise UserError(
                f"{root / name}: leaves open which split it is of; rename it or its folder to train, validation or test"
            )
        if roles:
            splits[roles.pop()].append(name)
        else:
            unnamed.append((stem if shard is not None else folder or stem, name))
    for (prefix, total), numbers in parts.items():
        if len(numbers) < int(total):
            found = f"{len(numbers)} of the {int(total)} files {prefix}-*-of-{total}.parquet are there"
            raise UserError(f"{root}: only {found}; copy the rest")
    named = bool(splits)
    for split, name in unnamed:
        sharded = _SHARD.fullmatch(PurePosixPath(name).stem) is not None
        splits[re.sub(r"\W+", "_", split).strip("_") or "other" if named or sharded else "train"].append(name)
    return splits


def open_tables(
    loaded: Mapping[str, Any], name: str, columns: Columns, folders: Sequence[Path], notes: list[str]
) -> dict[str, Rows]:
    """Return the rows of each split of tables that `datasets` has loaded.

    Args:
        name: of the data set.
        folders: those that rows without bytes may point into.
        notes: receives what a reader of the results should know.

    Raises:
        UserError: where a split lacks a column of pictures or targets.
    """
    import datasets

    splits: dict[str, Rows] = {}
    for split, rows in _by_column(loaded, name, notes).items():
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


def _by_column(loaded: Mapping[str, Any], name: str, notes: list[str]) -> Mapping[str, Any]:
    """Return tables by split. A single table is divided as its column `split` says.

    Raises:
        UserError: where values of the column leave it open.
    """
    if len(loaded) != 1:
        for split, rows in loaded.items():
            named = {role for value in _values(rows) if (role := split_of([value])[0]) is not None}
            if others := named - {split_of([split])[0]}:
                notes.append(
                    f"split {split} of {name}: its column {SPLIT_COLUMN} says {', '.join(sorted(others))}, too; "
                    "all its rows are used as they are laid out"
                )
        return loaded
    (split, rows), *_ = loaded.items()
    values = _values(rows)
    note_unnamed(f"split {split} of {name}", values, notes)
    if not any(split_of([value]) != (None, None) for value in values):
        return loaded
    items = ((row, None, f"{value.replace('/', '-')}/row") for row, value in enumerate(values))
    return {role: rows.select(chosen) for role, chosen in group_by_split(name, items, notes).items()}


def _values(rows: Any) -> list[str]:
    """Return the column `split` of a table as text, "" where it has none."""
    feature = rows.features.get(SPLIT_COLUMN)
    if feature is None:
        return []
    names = getattr(feature, "names", None)  # of a ClassLabel
    values = rows.with_format(None)[SPLIT_COLUMN]
    texts = (names[value] if names and isinstance(value, int) and value >= 0 else value for value in values)
    return [text if isinstance(text, str) else "" for text in texts]


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
