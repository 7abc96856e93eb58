"""Measure what --trim keeps of the scans in a folder, how much higher squeezing makes print, and how long it takes.

python benchmarks/trim.py FOLDER
"""

from __future__ import annotations

import time
from pathlib import Path

import click
import numpy as np
from PIL import Image

from im2json.data.pictures import list_pictures
from im2json.data.trim import trimmed


@click.command()
@click.argument("folder", type=click.Path(exists=True, path_type=Path))
def main(folder: Path) -> None:
    kept, gain, started = [], [], time.process_time()
    names = list_pictures([str(folder)])
    for name in names:
        picture = Image.open(name).convert("RGB")
        cut, squeezed = trimmed(picture, "crop"), trimmed(picture, "squeeze")
        kept.append(cut.width * cut.height / (picture.width * picture.height))
        gain.append(cut.height / squeezed.height)
    seconds = (time.process_time() - started) / len(names)
    print(f"{len(names)} scans, {seconds:.2f} s each (both ways, and decoding)")
    for what, values in (("kept by crop", kept), ("higher by squeeze", gain)):
        low, median, high = np.percentile(values, [5, 50, 95])
        print(f"{what:<18} {median:.2f} (median), 5 to 95 %: {low:.2f} to {high:.2f}")


if __name__ == "__main__":
    main()
