"""Unlabelled photographs from two Debian packages: objects on a transparent ground, laid on wallpapers or white.

`apt-get download tuxpaint-stamps-default gnome-backgrounds`, unpacked with `dpkg -x`, then

    python -m benchmarks.compare.photographs usr/share/tuxpaint/stamps usr/share/backgrounds photographs/
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

KINDS = (
    "animals", "clothes", "food", "hobbies", "household", "medical", "military", "people", "plants", "seasonal",
    "sports", "town", "vehicles",
)  # fmt: skip
"""Folders of things; the rest are signs and drawings."""
SIDE = 256
TEST = 3
"""One object in so many is for the test."""
LEAST_SIDE, LEAST_COLOURS = 100, 1000
"""Of a stamp that is a photograph: drawings are small, have few colours, or say that they are cartoons."""


def photographs(stamps: Path, wallpapers: Path, copies: int, seed: int = 0) -> Iterator[tuple[str, list[Image.Image]]]:
    """(name, so many images of 256 by 256 pixels) for each photograph among the stamps."""
    draw = np.random.default_rng(seed)
    grounds = [Image.open(path).convert("RGB") for path in sorted(wallpapers.rglob("*.webp"))]
    for path in sorted(path for kind in KINDS for path in (stamps / kind).rglob("*.png")):
        with Image.open(path) as opened:
            stamp = opened.convert("RGBA")
        box = stamp.getbbox()
        if box is None or "cartoon" in str(path):
            continue
        stamp = stamp.crop(box)
        colours = stamp.resize((128, 128)).getcolors(1 << 16)
        if min(stamp.size) < LEAST_SIDE or colours is None or len(colours) < LEAST_COLOURS:
            continue
        yield (
            "-".join(path.relative_to(stamps).with_suffix("").parts),
            [_laid(stamp, grounds, draw) for _ in range(copies)],
        )


def _laid(stamp: Image.Image, grounds: Sequence[Image.Image], draw: np.random.Generator) -> Image.Image:
    """A stamp at a random place and size on a random ground."""
    factor = draw.uniform(0.7, 0.95) * SIDE / max(stamp.size)
    stamp = stamp.resize((max(1, round(stamp.width * factor)), max(1, round(stamp.height * factor))))
    ground = Image.new("RGB", (SIDE, SIDE), "white")
    if grounds and draw.random() < 0.7:
        whole = grounds[draw.integers(len(grounds))]
        side = min(whole.size) // 2
        left, top = (int(draw.integers(length - side)) for length in whole.size)
        ground = whole.crop((left, top, left + side, top + side)).resize((SIDE, SIDE))
    place = tuple(int(draw.integers(SIDE - length + 1)) for length in stamp.size)
    ground.paste(stamp, (place[0], place[1]), stamp)
    return ground


def main() -> None:
    """Write the photographs as files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stamps", type=Path)
    parser.add_argument("wallpapers", type=Path)
    parser.add_argument("out", type=Path, help="a new folder; train/ and test/ in it share no object")
    parser.add_argument("--copies", type=int, default=2, help="images of each object")
    options = parser.parse_args()
    count = 0
    for number, (name, images) in enumerate(photographs(options.stamps, options.wallpapers, options.copies)):
        part = options.out / ("test" if number % TEST == 0 else "train")
        part.mkdir(parents=True, exist_ok=True)
        for copy, image in enumerate(images):
            image.save(part / f"{name}-{copy}.jpg", quality=92)
            count += 1
    print(f"{count} photographs in {options.out}")


if __name__ == "__main__":
    main()
