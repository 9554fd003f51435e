"""What ships: a folder with a model in one or more variants, and the means to check and serve it where it arrives.

    model.*.onnx, *.ort   the variants        golden.npz    inputs, and what the trusted model answers
    manifest.json         what all of it is   selftest.py   checks everything with onnxruntime and numpy alone
    manifest.sha256       of manifest.json    serve.py      images, sounds, texts or arrays in, JSON lines out

The first variant is what ships; the others are chosen where they are right and faster. Whatever comes out of `pack` is
one file, the same bytes for the same folder; `unpack` (unpacking.py) takes nothing on trust.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnxruntime as ort
from pydantic import BaseModel, ConfigDict, Field

from exporters import host, selftest
from exporters.atomic import staged
from exporters.summary import describe
from exporters.unpacking import listed
from foundation.errors import ExportError, first_line

Array = np.ndarray[Any, np.dtype[Any]]

FORMAT = 1
_HERE = Path(__file__).parent
_PROGRAMS = ("selftest.py", "serve.py")
_OWN = (*_PROGRAMS, "golden.npz", "manifest.json", "manifest.sha256")
SELFTEST_SECONDS = 300.0


class Variant(BaseModel):
    """One file of the model: where it runs, what it must be loaded with, how far from the golden outputs it may be.

    `tolerance` bounds |found − golden| / max(1, max|golden|), per output. `latency_ms` is what the builder measured at
    batch 1, which the self-test compares with what it finds; None where nothing was measured.
    """

    model_config = ConfigDict(frozen=True)

    name: str
    path: Path
    portable: bool = True
    isa: str = ""
    session: dict[str, str] = Field(default_factory=dict)
    tolerance: float
    latency_ms: float | None = None


class InputNote(BaseModel):
    """One input as whoever feeds it must know it: `shape` with names for free sizes; floats are (raw − mean) / std.

    `holds`: an image; a sound; ids, mask or segments that the bundle's tokenizer.json makes of a text; or an array as
    it is. `fit`: how an image comes to its size, covering it with the rest cut away, or stretched. `rate`: of a sound,
    its samples per second.
    """

    model_config = ConfigDict(frozen=True)

    name: str
    shape: tuple[int | str, ...]
    dtype: str
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()
    holds: Literal["image", "sound", "ids", "mask", "segments", "array"] = "array"
    fit: Literal["cover", "stretch"] = "cover"
    rate: int = 0


Answer = Literal["classes", "labels", "values", "embedding", "map", "tokens", "array"]
"""What an output is: scores of classes; of several labels at once; numbers; a vector; of classes at every place of an
image; at every token; or whatever the model gives.
"""


class Bundle(BaseModel):
    """A written bundle: its folder, the sha256 of every file but the manifest's two, and what its self-test found."""

    model_config = ConfigDict(frozen=True)

    path: Path
    sha256: dict[str, str]
    report: dict[str, Any]


def bundle(
    variants: Sequence[Variant],
    folder: Path,
    *,
    golden_inputs: Mapping[str, Array],
    golden_outputs: Mapping[str, Array],
    inputs: Sequence[InputNote],
    labels: Sequence[str] = (),
    answers: Mapping[str, Answer] | None = None,
    files: Mapping[str, bytes] | None = None,
    sizes: Mapping[str, Sequence[int]] | None = None,
    threads: int = 1,
    metadata: Mapping[str, str],
) -> Bundle:
    """Make the new `folder` from `variants`, what ships first, whole or not at all, and run its self-test once.

    `golden_outputs` are what a trusted model answers to `golden_inputs` (name -> array, samples first), such as the
    PyTorch model that the files were made from. External weights come along. Files are linked where the disk allows it.
    `answers` says what outputs are, where they are not scores of the classes that `labels` names. `files` come along:
    what raw inputs are read with, such as a tokenizer.json. `sizes` says at which sizes of free dimensions the model
    was proven.

    Raises ExportError when `folder` exists, names do not agree with the model's, a golden array holds NaN, two
    variants need files of one name, or any variant fails the self-test on this machine.
    """
    folder = Path(folder)
    if not variants:
        raise ExportError("A bundle needs at least one variant.", "Give the shipped file.")
    _check_golden(variants, golden_inputs, golden_outputs, inputs)
    if folder.exists():
        raise ExportError(f"{folder} exists.", "A bundle is never overwritten: give a new folder.")
    partial: Path | None = None
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", suffix=".partial", dir=folder.parent))
        for variant in variants:
            for name in (variant.path.name, *_beside(variant.path)):
                if (partial / name).exists():
                    raise ExportError(f"Two variants bring a file {name}.", "Rename one, and make it again.")
                _link(variant.path.parent / name, partial / name)
        for name, content in (files or {}).items():
            if not selftest.plain_name(name) or name in _OWN or (partial / name).exists():
                raise ExportError(f"A bundle cannot take along a file called {name!r}.", "Give it a name of its own.")
            (partial / name).write_bytes(content)
        for program in _PROGRAMS:
            shutil.copyfile(_HERE / program, partial / program)
        arrays = {f"input_{i}": golden_inputs[note.name] for i, note in enumerate(inputs)}
        arrays |= {f"output_{i}": golden_outputs[key] for i, key in enumerate(golden_outputs)}
        np.savez(partial / "golden.npz", **arrays)  # type: ignore[arg-type]  # the names are not savez's own
        sha256 = {file.name: _sha256(file) for file in sorted(partial.iterdir())}
        manifest = {
            "format": FORMAT,
            "onnxruntime": ort.__version__,
            "host": {"isa": host.isa(), "cpu": host.cpu_name()},
            "threads": threads,
            "variants": [
                {**variant.model_dump(mode="json", exclude={"path"}), "file": variant.path.name} for variant in variants
            ],
            "inputs": [note.model_dump(mode="json") for note in inputs],
            "outputs": list(golden_outputs),
            "answers": dict(answers) if answers else {next(iter(golden_outputs)): "classes"},
            "dynamic": all(isinstance(note.shape[0], str) for note in inputs if note.shape),
            "sizes": {name: list(values) for name, values in (sizes or {}).items()},
            "labels": list(labels),
            "metadata": dict(metadata),
            "files": sha256,
        }
        text = json.dumps(manifest, indent=2) + "\n"
        (partial / "manifest.json").write_text(text, encoding="utf-8")
        digest = hashlib.sha256(text.encode()).hexdigest()
        (partial / "manifest.sha256").write_text(f"{digest}  manifest.json\n", encoding="ascii")
        report = check(partial)
        broken = [f"{name}: {row['reason']}" for name, row in report["variants"].items() if row["status"] != "pass"]
        if broken or not report["ok"]:
            reason = "; ".join(broken) or report["reason"]
            raise ExportError(f"The bundle's self-test fails: {reason}.", "Compare the file with the golden model.")
        partial.chmod(0o755)
        partial.rename(folder)
    except OSError as error:
        reason = error.strerror or str(error)
        raise ExportError(f"{folder} cannot be written: {reason}.", "Check its rights and free space.") from error
    finally:
        if partial is not None:
            shutil.rmtree(partial, ignore_errors=True)
    return Bundle(path=folder, sha256=sha256, report=report)


def check(folder: Path) -> dict[str, Any]:
    """What this project's own self-test says about the bundle in `folder`; no code of the bundle is run.

    Raises ExportError when it gives no answer.
    """
    command = [sys.executable, "-B", str(_HERE / "selftest.py"), str(Path(folder).resolve())]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=SELFTEST_SECONDS)
    except subprocess.TimeoutExpired as error:
        raise ExportError(f"The self-test of {folder} gives no answer: {first_line(error)}.") from error
    try:
        report: dict[str, Any] = json.loads(done.stdout)
    except ValueError as error:
        last = (done.stderr.strip().splitlines() or ["nothing was said"])[-1][:200]
        reason = f"it ended with {done.returncode}, {last}"
        raise ExportError(f"The self-test of {folder} gives no answer: {reason}.", "Do not use this bundle.") from error
    return report


def pack(folder: Path, archive: Path, *, ships: tuple[str, str] | None = None) -> None:
    """Write the bundle in `folder` to the new file `archive` (.tar.gz), the same bytes every time.

    `ships` is the name and the file of the variant that must be the one that ships; None takes the bundle's word.

    Raises ExportError when `archive` exists or cannot be written, the bundle fails its self-test, or the variant that
    ships does, whatever the others do.
    """
    archive, folder = Path(archive), Path(folder)
    if archive.exists():
        raise ExportError(f"{archive} exists.", "A bundle is never overwritten: give a new name.")
    report = check(folder)
    if not report["ok"]:
        raise ExportError(f"The bundle in {folder} fails its self-test: {report['reason']}.", "Deploy again.")
    row = report["variants"][report["ships"]]
    if ships not in (None, (report["ships"], row["file"])):
        raise ExportError(f"The bundle in {folder} does not ship {' in '.join(ships or ())}.", "Deploy again.")
    if row["status"] != "pass":
        raise ExportError(
            f"The bundle in {folder} ships {report['ships']}, which fails its self-test: {row['reason']}.",
            "Deploy again, or pack it on a machine that the file is for.",
        )
    name = archive.name.removesuffix(".gz").removesuffix(".tar").removesuffix(".tgz")
    with staged(archive) as scratch:
        # No name and no time of packing in the header; weights hardly compress, so the fast level is enough.
        with (
            (scratch / archive.name).open("wb") as raw,
            gzip.GzipFile("", "wb", compresslevel=1, fileobj=raw, mtime=0) as packed,
            tarfile.open(fileobj=packed, mode="w", format=tarfile.PAX_FORMAT) as tar,
        ):
            for file in sorted(folder.iterdir()):
                entry = tarfile.TarInfo(f"{name}/{file.name}")
                entry.size, entry.mode = file.stat().st_size, 0o644
                with file.open("rb") as content:
                    tar.addfile(entry, content)
        listed(scratch / archive.name)  # whatever is packed can be unpacked


def _check_golden(
    variants: Sequence[Variant],
    golden_inputs: Mapping[str, Array],
    golden_outputs: Mapping[str, Array],
    inputs: Sequence[InputNote],
) -> None:
    names = {"input": {note.name for note in inputs}, "output": set(golden_outputs)}
    for variant in variants:
        if variant.path.suffix == ".onnx":
            summary = describe(variant.path)
            names = {"input": {s.name for s in summary.inputs}, "output": {s.name for s in summary.outputs}}
            break
    given = {"input": golden_inputs, "output": golden_outputs}
    for kind, golden in given.items():
        if names[kind] != set(golden):
            raise ExportError(
                f"The golden {kind}s are {', '.join(golden) or 'none'}; "
                f"the model has {', '.join(sorted(names[kind]))}.",
                f"Give one array per {kind}.",
            )
        for name, array in golden.items():
            if np.issubdtype(array.dtype, np.floating) and not np.isfinite(array).all():
                raise ExportError(f"The golden {kind} {name} holds NaN or infinity.", "It could not be checked.")
    if names["input"] != {note.name for note in inputs}:
        raise ExportError("The notes on the inputs name others than the model has.", "Give one note per input.")


def _beside(model: Path) -> tuple[str, ...]:
    """What a model file needs or brings: external weights, or the operators that a minimal build must have."""
    if model.suffix == ".ort":
        config = model.with_suffix(".required_operators.config")
        return (config.name,) if config.is_file() else ()
    return describe(model).external_files


def _link(src: Path, dst: Path) -> None:
    try:
        os.link(src, dst)
    except OSError:  # another disk, or one without links
        shutil.copyfile(src, dst)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
