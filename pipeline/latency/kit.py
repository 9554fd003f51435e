"""A latency table for a device that has no torch: a kit that needs onnxruntime and numpy, and writes `device.json`."""

from __future__ import annotations

import gzip
import io
import json
import math
import tarfile
import tempfile
from collections.abc import Hashable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import torch
from onnx import numpy_helper
from torch import Tensor

from foundation.files import memory_of, replacing, sha256
from pipeline.channels.coupling.groups import Analysis, Cluster
from pipeline.channels.dead.removable import Branch
from pipeline.channels.removal.recover import with_state
from pipeline.latency import device, probes, profile
from pipeline.latency.probes import Setting
from pipeline.models.source import ModelSource
from pipeline.progress import Progress

SCRIPT = "measure.py"
FOLDER = "latency-kit"
REFERENCE = "dense.onnx"
"""In float32, whatever the others are in."""
PERIOD = 1021
"""Weights repeat after so many values, a prime: no time hangs on them, and a file of them packs to next to nothing."""
SMALLEST = 4096
"""Of a tensor's elements, to be worth it."""


def write(
    analysis: Analysis,
    source: ModelSource,
    setting: Setting,
    clusters: Sequence[Cluster],
    path: Path,
    progress: Progress,
    branches: Sequence[Branch] = (),
) -> int:
    """Write the kit to `path` (.tar.gz), whole or not at all; returns its bytes. Nothing in it is of the model's
    weights. Raises RefusedError, ExportError, StoreError.
    """
    analysis = without_weights(analysis)
    choices = probes.choices(clusters, branches, setting.align)
    with tempfile.TemporaryDirectory() as made, progress.bar("kit", len(choices)) as bar:
        folder = Path(made)
        feed = profile.dense_file(analysis, source, setting, folder / REFERENCE)
        np.savez(folder / device.FEED, **feed)
        models = []
        for number, choice in enumerate(choices):
            name = f"model-{number:02d}.onnx"
            if not probes.write(analysis, choice, branches, source, setting, folder / name, feed, progress):
                branches = ()
                continue
            repeat_weights(folder / name)
            models.append(name)
            bar(number + 1, name)
        repeat_weights(folder / REFERENCE)
        files = {name: sha256(folder / name) for name in (REFERENCE, device.FEED, *models)}
        what = profile.description(analysis, source, setting, clusters, branches)
        described = {**what, "reference": REFERENCE, "models": models, "files": files}
        (folder / device.KIT).write_text(json.dumps(described, indent=1), encoding="utf-8")
        (folder / SCRIPT).write_bytes(Path(device.__file__).read_bytes())
        with replacing(path) as part:
            _pack(folder, [SCRIPT, device.KIT, device.FEED, REFERENCE, *models], part)
    return path.stat().st_size


def without_weights(analysis: Analysis) -> Analysis:
    """The same over other values: no parameter, and no vector of floats, such as a norm's statistics, is the model's.
    No time hangs on them. What is left is what the graph itself knows, such as a table of positions.
    """
    captured = analysis.captured
    parameters = set(captured.program.graph_signature.parameters)
    made: dict[Hashable, Tensor] = {}  # what is tied stays tied

    def other(name: str, value: Tensor) -> Tensor:
        if not value.is_floating_point() or (name not in parameters and value.dim() != 1):
            return value
        return made.setdefault(memory_of(name, value), _pattern(value))

    state = {name: other(name, value) for name, value in captured.state.items()}
    return replace(analysis, captured=replace(captured, program=with_state(captured.program, state), state=state))


def _pattern(value: Tensor) -> Tensor:
    """Values of the same shape, whatever `value` holds: such as a layer begins its training with, in a matrix; near 1
    in a vector, since it may be a variance.
    """
    drawn = torch.from_numpy(np.resize(np.random.default_rng(0).uniform(-1, 1, PERIOD), value.numel()))
    rows = drawn.reshape(value.shape).to(value.dtype)
    return rows / math.sqrt(value[0].numel()) if value.dim() > 1 else 1 + rows / 2


def repeat_weights(path: Path) -> None:
    """Replace the large tensors of a model by a short part of themselves, again and again."""
    model = onnx.load(path)
    for tensor in model.graph.initializer:
        value = numpy_helper.to_array(tensor)
        if value.size >= SMALLEST:
            repeated = np.resize(value.reshape(-1)[:PERIOD], value.shape)
            tensor.CopyFrom(numpy_helper.from_array(repeated, tensor.name))
    onnx.save(model, path)


def _pack(folder: Path, names: Sequence[str], path: Path) -> None:
    """The same files give the same bytes: no times and no users in it."""
    with (
        path.open("wb") as raw,
        gzip.GzipFile(fileobj=raw, mode="wb", mtime=0, filename="") as packed,
        tarfile.open(fileobj=packed, mode="w") as archive,
    ):
        for name in names:
            content = (folder / name).read_bytes()
            entry = tarfile.TarInfo(f"{FOLDER}/{name}")
            entry.size, entry.mode = len(content), 0o644
            archive.addfile(entry, io.BytesIO(content))
