"""Classify a folder of images with this bundle: `python -m serve FOLDER` in the bundle, one line of JSON per image.

Needs onnxruntime, numpy and pillow. The bundle checks itself first, and its fastest variant that passes here serves.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, UnidentifiedImageError
from selftest import HERE, check


def read(path: Path, spec: dict[str, Any]) -> Any:
    """One image as the model wants it: covered, cropped in the middle, scaled to 0..1, normalised; (1, C, H, W)."""
    channels, height, width = spec["shape"][1:]
    image = Image.open(path).convert("RGB" if channels == 3 and len(spec["mean"]) == 3 else "L")
    factor = max(height / image.height, width / image.width)
    size = max(width, round(image.width * factor)), max(height, round(image.height * factor))
    left, top = round((size[0] - width) / 2), round((size[1] - height) / 2)
    image = image.resize(size, Image.Resampling.BILINEAR).crop((left, top, left + width, top + height))
    pixels = np.asarray(image, np.float32).reshape(height, width, -1).transpose(2, 0, 1) / 255
    pixels = np.broadcast_to(pixels, (channels, height, width))
    mean, std = (np.reshape(np.asarray(spec[key], np.float32), (-1, 1, 1)) for key in ("mean", "std"))
    return np.ascontiguousarray((pixels - mean) / std, np.float32)[None]


def main(folder: str) -> None:
    """Serve every file of `folder`; the exit code is 1 when the bundle fails its self-test."""
    report, session = check(HERE)
    if session is None:
        sys.exit(report["reason"])
    manifest = json.loads((HERE / "manifest.json").read_text(encoding="utf-8"))
    for path in sorted(path for path in Path(folder).iterdir() if path.is_file()):
        try:
            logits = session.run(None, {manifest["inputs"][0]["name"]: read(path, manifest["inputs"][0])})[0][0]
        except (OSError, UnidentifiedImageError) as error:
            print(json.dumps({"file": path.name, "error": str(error)}), flush=True)
            continue
        shares = np.exp(logits - logits.max()) / np.exp(logits - logits.max()).sum()
        best = int(shares.argmax())
        line = {"file": path.name, "label": manifest["labels"][best], "share": round(float(shares[best]), 4)}
        print(json.dumps(line), flush=True)


if __name__ == "__main__":
    sys.dont_write_bytecode = True
    main(sys.argv[1])
