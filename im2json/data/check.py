"""Look at every row before the first step."""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from im2json.data.example import Split
from im2json.data.stored import bad_rows


def check_split(*splits: Split, on_row: Callable[[], object] | None = None) -> None:
    """Open every row of these splits: its target must be a JSON object, its picture must decode to the end.

    Raises one ValueError that lists the bad rows, 20 at most and a count of the rest. `on_row` is called
    after each row, for a progress bar. The embedded receipts are drawn by ourselves and passed over.
    """
    from im2json.data.receipts import Receipts

    def problem(split: Split, i: int) -> str | None:
        try:
            split[i]
        except ValueError as error:
            return str(error)
        return None

    places = [(split, i) for split in splits if not isinstance(split, Receipts) for i in range(len(split))]
    problems = []
    # Pillow lets go of the interpreter while it decodes, so threads are enough.
    with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as pool:
        for found in pool.map(problem, *zip(*places)) if places else ():
            if found is not None:
                problems.append(found)
            if on_row is not None:
                on_row()
    if problems:
        raise bad_rows(problems, len(places))
