"""Answer a folder of files with this bundle: `python serve.py FOLDER`, one line of JSON per sample.

Files are images, recordings (.wav, PCM) where the model listens, or requests.

A request is a .json or .jsonl file, or an .npz of arrays by the inputs' names (`python serve.py FILE` for one alone):
{"input name": nested list, ...}   arrays as the model takes them, of one sample or of several
{"text": ...}                      also with "text_pair", or "tokens" for words; needs the tokenizers library
{"row": {"column": value, ...}}    a row of the table that the model was trained on

Needs onnxruntime, numpy and pillow. The bundle checks itself first, and its fastest variant that passes here serves.
Exits 0 when every sample was served, 1 when the bundle fails its self-test, 2 when a file or the folder is unreadable.
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
import wave
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

HERE = Path(__file__).resolve().parent
FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
PIXELS = 89_478_485
"""Of an image, as it is and as it is resized; what pillow itself warns of, 268 MB in colour."""
REQUEST_BYTES = 1 << 30
"""Of an .npz file of requests, unpacked."""
REQUESTS = (".json", ".jsonl", ".npz")
TOKENIZER, COLUMNS = "tokenizer.json", "columns.json"
TEXT = {"ids": "ids", "mask": "attention_mask", "segments": "type_ids"}
"""What an input holds of a text -> what the tokenizer calls it."""


class UnservedError(Exception):
    """Why this bundle cannot answer here at all; the message is the line that is printed."""


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
    """One image as the model wants it: covered, cropped in the middle, scaled to 0..1, normalised; (1, C, H, W).

    Where the model takes any height and width, with those that it has.
    """
    channels = spec["shape"][1]
    with Image.open(path, formats=FORMATS) as opened:
        if opened.width * opened.height > PIXELS:
            raise ValueError(f"it has {opened.width}×{opened.height} pixels, more than {PIXELS}")
        image = eight_bits(opened).convert("RGB" if channels == 3 and len(spec["mean"]) == 3 else "L")
    width, height = sides(image, *spec["shape"][2:])
    if spec.get("fit") == "stretch":
        image = image.resize((width, height), Image.Resampling.BILINEAR)
    else:
        image = covering(image, width, height)
    pixels = np.asarray(image, np.float32).reshape(height, width, -1).transpose(2, 0, 1) / 255
    pixels = np.broadcast_to(pixels, (channels, height, width))
    mean, std = (np.reshape(np.asarray(spec[key], np.float32), (-1, 1, 1)) for key in ("mean", "std"))
    return np.ascontiguousarray((pixels - mean) / std, np.float32)[None]


def sides(image: Any, height: Any, width: Any) -> tuple[int, int]:
    """Width and height that an image is brought to; a name stands for any, and keeps what the image has."""
    free = isinstance(height, str), isinstance(width, str)
    if free == (True, True):
        return int(image.width), int(image.height)
    if free[0]:
        height = max(1, round(image.height * width / image.width))
    if free[1]:
        width = max(1, round(image.width * height / image.height))
    if width * height > PIXELS:
        raise ValueError(f"it is too narrow: {image.width}×{image.height} pixels")
    return width, height


def covering(image: Any, width: int, height: int) -> Any:
    """An image that covers a frame, its middle cut out. Raises ValueError where it would become too large."""
    factor = max(height / image.height, width / image.width)
    size = max(width, round(image.width * factor)), max(height, round(image.height * factor))
    if size[0] * size[1] > PIXELS:
        raise ValueError(f"it is too narrow: {image.width}×{image.height} pixels")
    left, top = round((size[0] - width) / 2), round((size[1] - height) / 2)
    return image.resize(size, Image.Resampling.BILINEAR).crop((left, top, left + width, top + height))


def listen(path: Path, spec: dict[str, Any]) -> Any:
    """One recording as the model wants it: channels averaged, the first part taken or filled up with silence.

    (1, 1, samples) from -1 to 1. Raises ValueError for another rate than the model's: nothing here resamples.
    """
    length, rate = spec["shape"][2], spec["rate"]
    try:
        with wave.open(str(path), "rb") as opened:
            own, channels, width = opened.getframerate(), opened.getnchannels(), opened.getsampwidth()
            count = min(opened.getnframes(), length)
            raw = opened.readframes(count)
    except (wave.Error, EOFError) as error:
        raise ValueError(f"it is no .wav file of PCM: {error or 'it is cut short'}") from None
    if own != rate:
        raise ValueError(f"it has {own} samples per second, and the model takes {rate}: resample it first")
    if not count or width > 4 or len(raw) < count * channels * width:
        raise ValueError("it holds no sample" if not count else "it is cut short, or no PCM of up to 32 bits")
    if width == 1:  # bytes are centred at 128
        values = (np.frombuffer(raw, np.uint8) - 128.0) / 128
    else:
        upper = np.zeros((count * channels, 4), np.uint8)
        upper[:, 4 - width :] = np.frombuffer(raw, np.uint8).reshape(-1, width)
        values = upper.view("<i4")[:, 0] / float(1 << 31)
    made = np.zeros((1, 1, length), np.float32)
    made[0, 0, :count] = values.reshape(count, channels).mean(1)
    return made


def arrays(given: dict[str, Any], manifest: dict[str, Any]) -> dict[str, Any]:
    """Arrays by the inputs' names as the model takes them, samples first; a mask that is left out is full of ones.

    Raises ValueError for a name that is no input, numbers that the type does not hold, sizes that do not fit.
    """
    specs = {spec["name"]: spec for spec in manifest["inputs"]}
    unknown = [name for name in given if name not in specs]
    if unknown:
        raise ValueError(f"there is no input {unknown[0]!r}; the model takes {', '.join(specs)}")
    feed = {name: sized(np.asarray(value), specs[name]) for name, value in given.items()}
    for name, spec in specs.items():
        ids = next((feed[one] for one in feed if specs[one].get("holds") == "ids"), None)
        if name not in feed and spec.get("holds") == "mask" and ids is not None:
            feed[name] = np.ones(ids.shape, spec["dtype"])
        if name not in feed:
            raise ValueError(f"the input {name!r} is missing; the model takes {', '.join(specs)}")
    counts = {len(value) for value in feed.values() if value.ndim}
    if len(counts) > 1:
        raise ValueError(f"the inputs have {' and '.join(map(str, sorted(counts)))} samples")
    return feed


def sized(value: Any, spec: dict[str, Any]) -> Any:
    """One input of one sample or of several, in its type, samples first. Raises ValueError."""
    name, shape, dtype = spec["name"], spec["shape"], np.dtype(spec["dtype"])
    if value.dtype.kind not in "biuf" or not value.size:
        raise ValueError(f"{name} holds no numbers, or rows of unequal length")
    made = value.astype(dtype) if dtype.kind == "f" else value
    if dtype.kind == "f" and not np.isfinite(made).all():
        raise ValueError(f"{name} holds NaN or infinity")
    if dtype.kind != "f":
        made = value.astype(dtype)
        if (made != value).any():
            raise ValueError(f"{name} holds numbers that are no {dtype}")
    if made.ndim == len(shape) - 1:
        made = made[None]
    if made.ndim != len(shape) or any(isinstance(a, int) and a != b for a, b in zip(shape, made.shape)):  # noqa: B905
        raise ValueError(f"{name} has the shape {list(value.shape)}, and the model takes {shape}")
    return made


def tokenizer(manifest: dict[str, Any]) -> Any:
    """The tokenizer of this bundle. Raises ValueError where it has none, UnservedError without the library."""
    if TOKENIZER not in manifest["files"]:
        raise ValueError("this bundle has no tokenizer, so that it takes no texts")
    try:
        from tokenizers import Tokenizer
    except ImportError:
        raise UnservedError(
            "texts need the tokenizers library, which is not installed: pip install tokenizers"
        ) from None
    return Tokenizer.from_file(str(HERE / TOKENIZER))


def read_text(request: dict[str, Any], manifest: dict[str, Any]) -> tuple[dict[str, Any], Any]:
    """A text, two texts or words as what the model takes, and for words the place of each one's first token."""
    known = {"text", "text_pair", "tokens"}
    if set(request) - known or ("text" in request) == ("tokens" in request):
        raise ValueError("a text is given as text (and text_pair), or as tokens")
    words = "tokens" in request
    text, pair = request["tokens"] if words else request["text"], request.get("text_pair")
    good = (isinstance(text, list) and text and all(isinstance(one, str) for one in text)) if words else None
    if not (good if words else isinstance(text, str)) or not (pair is None or isinstance(pair, str)):
        raise ValueError("tokens are a list of words" if words else "text and text_pair are texts")
    made = tokenizer(manifest).encode(text, pair, is_pretokenized=words)
    feed = {}
    for spec in manifest["inputs"]:
        if spec.get("holds") not in TEXT:
            raise ValueError(f"the model also takes {spec['name']}, which no text gives")
        feed[spec["name"]] = np.asarray([getattr(made, TEXT[spec["holds"]])], spec["dtype"])
    firsts: dict[int, int] = {}
    for place, word in enumerate(made.word_ids):
        if word is not None:
            firsts.setdefault(word, place)
    return feed, [firsts[word] for word in sorted(firsts)] if words else None


def read_row(row: Any, manifest: dict[str, Any]) -> dict[str, Any]:
    """A row of the table as the features that the model takes; a number that is missing is the mean."""
    if COLUMNS not in manifest["files"]:
        raise ValueError("this bundle has no table, so that it takes no rows")
    columns = json.loads((HERE / COLUMNS).read_text(encoding="utf-8"))["inputs"]
    names = [column["name"] for column in columns]
    unknown = [name for name in row if name not in names] if isinstance(row, dict) else ["?"]
    if unknown:
        raise ValueError(f"there is no column {unknown[0]!r}; the table has {', '.join(names)}")
    features: list[float] = []
    for column in columns:
        value = row.get(column["name"])
        if column["kind"] == "category":
            features += [float(str(value) == one) for one in column["values"]]
        else:
            features.append(0.0 if value in (None, "") else (float(value) - column["mean"]) / column["deviation"])
    (spec,) = manifest["inputs"]
    return {spec["name"]: sized(np.asarray([features]), spec)}


def requests(path: Path) -> Any:
    """The requests in a file, one after the other. Raises ValueError or OSError for a file that holds none."""
    if path.suffix == ".npz":
        try:
            with zipfile.ZipFile(path) as opened:
                size = sum(entry.file_size for entry in opened.infolist())
        except zipfile.BadZipFile:
            raise ValueError("it is no .npz file") from None
        if size > REQUEST_BYTES:
            raise ValueError(f"it unpacks to {size} bytes; at most {REQUEST_BYTES} are read at once")
        with np.load(path, allow_pickle=False) as packed:
            yield dict(packed)
        return
    text = path.read_text(encoding="utf-8-sig")
    found = [line for line in text.splitlines() if line.strip()] if path.suffix == ".jsonl" else [text]
    for one in found:
        try:
            request = json.loads(one)
        except (ValueError, RecursionError) as error:
            yield ValueError(f"it is no JSON: {error}")
            continue
        yield from request if isinstance(request, list) and path.suffix == ".json" else [request]


def answers(session: Any, manifest: dict[str, Any], feed: dict[str, Any], words: Any = None) -> list[dict[str, Any]]:
    """What the model says of each sample. Raises whatever running it does."""
    names = manifest["outputs"]
    kinds = manifest.get("answers") or {names[0]: "classes"}
    found = dict(zip(names, session.run(names, feed)))  # noqa: B905  # Python 3.9 has no strict
    judged = [name for name in names if kinds.get(name, "array") != "array"]
    count = max(len(value) if value.ndim else 1 for value in feed.values())
    rows = []
    for row in range(count):
        made = {}
        for name in judged if len(judged) == 1 else names:
            value = np.asarray(found[name])
            one = value[row] if value.ndim and len(value) == count else value
            made[name] = told(one, kinds.get(name, "array"), manifest["labels"], words)
        rows.append(made[judged[0]] if len(judged) == 1 else {"outputs": made})
    return rows


def told(value: Any, kind: str, labels: list[str], words: Any) -> dict[str, Any]:
    """One output of one sample in words. Raises ValueError where it holds no finite numbers of the kind's shape."""
    wide = value.astype(np.float64)
    if not wide.size or not np.isfinite(wide).all() or (kind == "classes" and wide.ndim != 1):
        raise ValueError(f"the model gives no finite {'score per class' if kind == 'classes' else 'numbers'}")

    def name(number: Any) -> str:
        return labels[int(number)] if 0 <= int(number) < len(labels) else str(int(number))

    if kind == "classes":
        shares = np.exp(wide - wide.max()) / np.exp(wide - wide.max()).sum()
        return {"label": name(shares.argmax()), "share": round(float(shares.max()), 4)}
    if kind == "labels":
        shares = 1 / (1 + np.exp(-np.clip(wide, -700, 700)))
        return {"labels": {name(one): round(float(shares[one]), 4) for one in np.flatnonzero(shares > 0.5)}}
    if kind == "tokens" and wide.ndim == 2:  # places x classes; the other way round where that fits the labels
        best = wide.argmax(0 if len(labels) == wide.shape[0] != wide.shape[1] else 1)
        return {"labels": [name(one) for one in (best if words is None else best[words])]}
    if kind == "map" and wide.ndim in (2, 3):
        best = wide.argmax(0) if wide.ndim == 3 else wide
        places: dict[str, int] = {}
        for number, count in zip(*np.unique(best, return_counts=True)):  # noqa: B905
            places[name(number)] = places.get(name(number), 0) + int(count)  # two classes may have one name
        return {"shape": list(best.shape), "counts": places}
    return {"vector" if kind == "embedding" else "values": value.tolist()}


def unservable(manifest: dict[str, Any]) -> str:
    """Why this program cannot feed the model of this bundle; empty where it can."""
    first, *others = manifest["inputs"]
    if others:
        return f"the model takes {len(others) + 1} inputs, and a file gives it one alone"
    shape, given = first["shape"], f"the model takes {first['dtype']} of shape {first['shape']}"
    if first.get("holds") == "sound":
        good = len(shape) == 3 and shape[1] == 1 and isinstance(shape[2], int) and first["dtype"] == "float32"
        return "" if good else f"{given}, which is no recording of a fixed length"
    if len(shape) != 4 or not isinstance(shape[1], int) or first["dtype"] != "float32":
        return f"{given}, which is no image"
    if any(len(first[key]) not in (1, shape[1]) for key in ("mean", "std")):
        return "the manifest has no mean and std for each channel"
    return ""


def served(session: Any, manifest: dict[str, Any], path: Path) -> Any:
    """The lines for one file. Raises whatever reading or running it does."""
    if path.suffix not in REQUESTS:
        spec = manifest["inputs"][0]
        value = listen(path, spec) if spec.get("holds") == "sound" else read(path, spec)
        try:
            yield from answers(session, manifest, {spec["name"]: value})
        except Exception as error:
            if not any(isinstance(size, str) for size in spec["shape"][2:]):
                raise
            proven = ", ".join(f"{name} {' or '.join(map(str, of))}" for name, of in manifest.get("sizes", {}).items())
            at = "×".join(map(str, value.shape[2:][::-1]))
            raise ValueError(f"the model does not take {at} pixels (proven at {proven}): {error}") from None
        return
    for request in requests(path):
        try:
            if isinstance(request, Exception):
                raise request
            if not isinstance(request, dict):
                raise ValueError("a request is an object: the inputs by name, a text, or a row")
            inputs, words = {spec["name"] for spec in manifest["inputs"]}, None
            if not inputs & set(request) and {"text", "tokens"} & set(request):
                feed, words = read_text(request, manifest)
            elif set(request) == {"row"} - inputs:
                feed = read_row(request["row"], manifest)
            else:
                feed = arrays(request, manifest)
            lines = answers(session, manifest, feed, words)
        except UnservedError:
            raise
        except Exception as error:  # those after it are served
            lines = [failed(error)]
        yield from lines


def failed(error: BaseException) -> dict[str, Any]:
    """The line for a sample that could not be served."""
    return {"error": " ".join(str(error).split())[:200] or type(error).__name__}


def main(arguments: list[str]) -> int:
    """Serve every file of the folder, or one file of requests; the exit code."""
    try:
        (given,) = map(Path, arguments)
        one = given.suffix in REQUESTS and given.is_file()
        paths = [given] if one else sorted(path for path in given.iterdir() if path.is_file())
    except (ValueError, OSError):
        print("Give one readable folder: python serve.py FOLDER", file=sys.stderr)
        return 2
    try:
        report, session = selftest().check(HERE)
    except OSError as error:
        report, session = {"reason": str(error)}, None
    if session is None:
        print(report["reason"], file=sys.stderr)
        return 1
    manifest = json.loads((HERE / "manifest.json").read_text(encoding="utf-8"))
    if unservable(manifest) and any(path.suffix not in REQUESTS for path in paths):
        print(f"{unservable(manifest)}; ask it in .json, .jsonl or .npz files", file=sys.stderr)
        return 1
    warnings.simplefilter("ignore")  # pillow's, of images that are refused below or read all the same
    logging.getLogger("PIL").addHandler(logging.NullHandler())
    wrong = False
    for path in paths:
        try:
            for line in served(session, manifest, path):
                wrong = wrong or "error" in line
                print(json.dumps({"file": path.name, **line}), flush=True)
        except UnservedError as error:
            print(error, file=sys.stderr)
            return 1
        except Exception as error:  # whatever is wrong with one file, those after it are served
            print(json.dumps({"file": path.name, **failed(error)}), flush=True)
            wrong = True
    return 2 if wrong else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
