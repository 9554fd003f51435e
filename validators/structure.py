"""What an ONNX file costs before it computes anything: disk, load time, memory, the first inference."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnx
from pydantic import BaseModel, ConfigDict

from foundation.errors import ValidationError
from foundation.links import plain_files
from validators import cold_start
from validators.feeds import Feed
from validators.runners import OrtRunner


class StructureReport(BaseModel):
    """Costs of one ONNX file.

    `bytes` includes external weights. `load_ms` is the median over `loads` session loads in this process. The rest
    comes from a fresh process that loads the model and runs it once: `idle_rss` and `peak_rss` are its largest resident
    size in bytes before and after, `cold_load_ms` and `cold_first_ms` the times of its load and its first inference.
    """

    model_config = ConfigDict(frozen=True)

    path: Path
    threads: int
    bytes: int
    loads: int
    load_ms: float
    idle_rss: int
    peak_rss: int
    cold_load_ms: float
    cold_first_ms: float


def measure(
    path: Path,
    feed: Feed,
    *,
    threads: int,
    loads: int = 5,
    timeout: float = 300.0,
    session: Mapping[str, str] | None = None,
) -> StructureReport:
    """Measure the ONNX file at `path` with `feed` as its first input; at most `timeout` seconds in the fresh process.

    `session` holds session configuration entries, where the file is to be loaded with some. Raises ValidationError when
    the file cannot be loaded or run.
    """
    path = Path(path)
    times = []
    with plain_files(path) as plain:
        for _ in range(loads):
            start = time.perf_counter()
            OrtRunner(plain, threads=threads, session=session)
            times.append(time.perf_counter() - start)
        fresh = _fresh_process(plain, feed, threads, timeout, session or {})
    return StructureReport(
        path=path,
        threads=threads,
        bytes=file_bytes(path),
        loads=loads,
        load_ms=1e3 * statistics.median(times),
        idle_rss=int(fresh["idle_rss"]),
        peak_rss=int(fresh["peak_rss"]),
        cold_load_ms=fresh["cold_load_ms"],
        cold_first_ms=fresh["cold_first_ms"],
    )


def file_bytes(path: Path) -> int:
    """The size of a model file and, for ONNX, of the weight files beside it that it names."""
    if path.suffix == ".ort":
        return path.stat().st_size
    graph = onnx.load(path, load_external_data=False).graph
    beside = {
        entry.value
        for tensor in graph.initializer
        if tensor.data_location == onnx.TensorProto.EXTERNAL
        for entry in tensor.external_data
        if entry.key == "location"
    }
    return path.stat().st_size + sum((path.parent / str(name)).stat().st_size for name in beside)


def _fresh_process(
    path: Path, feed: Feed, threads: int, timeout: float, session: Mapping[str, str]
) -> dict[str, float]:
    with tempfile.TemporaryDirectory() as folder:
        arrays = Path(folder) / "feed.npz"
        np.savez(arrays, *feed.arrays.values())
        fixed = [str(path.absolute()), str(threads), json.dumps(dict(session)), str(arrays)]
        command = [sys.executable, cold_start.__file__, *fixed, *feed.arrays]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=timeout, check=True)
        except subprocess.TimeoutExpired as error:
            raise ValidationError(f"{path} did not load and run within {timeout:g} s.") from error
        except subprocess.CalledProcessError as error:
            last = (error.stderr.strip().splitlines() or [f"exit code {error.returncode}"])[-1]
            raise ValidationError(f"{path} cannot run in a fresh process: {last}") from error
        try:
            fresh: dict[str, float] = {**json.loads(done.stdout)}
        except (ValueError, TypeError) as error:  # it ended early, with whatever code
            raise ValidationError(f"{path} ended its fresh process without an answer.") from error
    return fresh
