"""Classify a folder of images with this bundle: `python serve.py FOLDER` in the bundle, one line of JSON per image.

Needs onnxruntime, numpy and pillow. The bundle checks itself first, and its fastest variant that passes here serves.
Exits 0 when every image was served, 1 when the bundle fails its self-test, 2 when an image or the folder is unreadable.
"""
# ruff: noqa: PTH120, PTH107, PTH106  # nothing may be imported before the path is safe, pathlib included

# No `from __future__` here: it would be the first module that is looked for in this folder.
import sys

if __name__ == "__main__":
    # Python looks for modules beside the program first, and a file there that is called json.py would run unchecked.
    sys.dont_write_bytecode = True
    _paths = sys.path[:]
    del sys.path[:1]
    import os

    _folder = os.path.dirname(os.path.realpath(__file__))
    sys.path[:] = [entry for entry in _paths if os.path.realpath(entry) != _folder]
    if __spec__ is not None and __spec__.cached:  # `python -m` has just compiled this file into __pycache__
        try:
            os.remove(__spec__.cached)
            os.rmdir(os.path.dirname(__spec__.cached))
        except OSError:
            pass

import hashlib
import json
import logging
import types
import warnings
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

HERE = Path(__file__).resolve().parent
FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
PIXELS = 89_478_485
"""Of an image, as it is and as it is resized; what pillow itself warns of, 268 MB in colour."""


def selftest() -> Any:
    """The self-test of this folder, from its source: an import would run what lies in __pycache__."""
    source = (HERE / "selftest.py").read_bytes()
    if hashlib.sha256(source).hexdigest().encode() not in (HERE / "manifest.json").read_bytes():
        raise OSError("selftest.py was changed: its sha256 is not the recorded one")
    module = types.ModuleType("selftest")
    module.__file__ = str(HERE / "selftest.py")
    exec(compile(source, module.__file__, "exec"), module.__dict__)
    return module


def eight_bits(image: Any) -> Any:
    """An image of 16 bits per pixel with 8 (pillow would clip it to white); any other as it is."""
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM")):
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    return image


def read(path: Path, spec: dict[str, Any]) -> Any:
    """One image as the model wants it: covered, cropped in the middle, scaled to 0..1, normalised; (1, C, H, W)."""
    channels, height, width = spec["shape"][1:]
    with Image.open(path, formats=FORMATS) as opened:
        if opened.width * opened.height > PIXELS:
            raise ValueError(f"it has {opened.width}×{opened.height} pixels, more than {PIXELS}")
        image = eight_bits(opened).convert("RGB" if channels == 3 and len(spec["mean"]) == 3 else "L")
    factor = max(height / image.height, width / image.width)
    size = max(width, round(image.width * factor)), max(height, round(image.height * factor))
    if size[0] * size[1] > PIXELS:
        raise ValueError(f"it is too narrow: {image.width}×{image.height} pixels")
    left, top = round((size[0] - width) / 2), round((size[1] - height) / 2)
    image = image.resize(size, Image.Resampling.BILINEAR).crop((left, top, left + width, top + height))
    pixels = np.asarray(image, np.float32).reshape(height, width, -1).transpose(2, 0, 1) / 255
    pixels = np.broadcast_to(pixels, (channels, height, width))
    mean, std = (np.reshape(np.asarray(spec[key], np.float32), (-1, 1, 1)) for key in ("mean", "std"))
    return np.ascontiguousarray((pixels - mean) / std, np.float32)[None]


def classify(session: Any, manifest: dict[str, Any], path: Path) -> dict[str, Any]:
    """The line for one image. Raises whatever reading or running it does."""
    spec = manifest["inputs"][0]
    logits = np.asarray(session.run([manifest["outputs"][0]], {spec["name"]: read(path, spec)})[0][0], np.float64)
    if logits.ndim != 1 or not logits.size or not np.isfinite(logits).all():
        raise ValueError("the model gives no finite score per class")
    shares = np.exp(logits - logits.max()) / np.exp(logits - logits.max()).sum()
    best = int(shares.argmax())
    label = manifest["labels"][best] if best < len(manifest["labels"]) else str(best)
    return {"file": path.name, "label": label, "share": round(float(shares[best]), 4)}


def unservable(manifest: dict[str, Any]) -> str:
    """Why this program cannot feed the model of this bundle; empty where it can."""
    first, *others = manifest["inputs"]
    if others:
        return f"the model takes {len(others) + 1} inputs, and serve.py gives it an image alone"
    shape = first["shape"]
    if len(shape) != 4 or not all(isinstance(size, int) for size in shape[1:]) or first["dtype"] != "float32":
        return f"the model takes {first['dtype']} of shape {shape}, which is no image of a fixed size"
    if any(len(first[key]) not in (1, shape[1]) for key in ("mean", "std")):
        return "the manifest has no mean and std for each channel"
    return ""


def main(arguments: list[str]) -> int:
    """Serve every file of the folder; the exit code."""
    try:
        (folder,) = arguments
        paths = sorted(path for path in Path(folder).iterdir() if path.is_file())
    except (ValueError, OSError):
        print("Give one readable folder of images: python serve.py FOLDER", file=sys.stderr)
        return 2
    try:
        report, session = selftest().check(HERE)
    except OSError as error:
        report, session = {"reason": str(error)}, None
    if session is None:
        print(report["reason"], file=sys.stderr)
        return 1
    manifest = json.loads((HERE / "manifest.json").read_text(encoding="utf-8"))
    if unservable(manifest):
        print(unservable(manifest), file=sys.stderr)
        return 1
    warnings.simplefilter("ignore")  # pillow's, of images that are refused below or read all the same
    logging.getLogger("PIL").addHandler(logging.NullHandler())
    failed = False
    for path in paths:
        try:
            line = classify(session, manifest, path)
        except Exception as error:  # whatever is wrong with one image, those after it are served
            line = {"file": path.name, "error": " ".join(str(error).split())[:200] or type(error).__name__}
            failed = True
        print(json.dumps(line), flush=True)
    return 2 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
