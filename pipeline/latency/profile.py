"""What was measured of one model at one setting: made here, kept from before, or read from a device's file."""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

from exporters import host
from foundation.errors import ConfigError, first_line
from pipeline.channels.coupling.groups import Analysis, Cluster
from pipeline.channels.dead.removable import Branch
from pipeline.latency import device, fitting, probes
from pipeline.latency.fitting import Sample
from pipeline.latency.matching import Operator
from pipeline.latency.prediction import Fit
from pipeline.latency.probes import Setting
from pipeline.latency.sizes import sizes_of
from pipeline.measurements import Measurements
from pipeline.models.source import ModelSource
from pipeline.progress import Progress
from validators.feeds import random_feeds
from validators.runners import OrtRunner

SECONDS = 2.4
"""For each model, at least; the median of its turns is within a per cent then on an idle machine."""
SEED = 0
MOST_BYTES = 64 << 20
"""Of a device's file."""
ALIKE = {"FusedConv": "Conv"}
"""Operators that count as another one: the widths decide which of both a convolution with its activation becomes."""


@dataclass(frozen=True)
class Profile:
    """Measured times of models of one structure, `what` they are of (a kit's description without its files), on which
    `machine`; the first is the dense one.
    """

    what: Mapping[str, Any]
    machine: Mapping[str, str]
    samples: tuple[Sample, ...]
    dense_ms: float

    def fit(self, analysis: Analysis) -> Fit:
        """What predicts any other choice of widths of `analysis`, the structure that was measured."""
        align = int(self.what["setting"]["align"])
        blocks = sorted({1, align, 2 * align, 4 * align})
        return fitting.fit(self.samples, sizes_of(analysis), blocks, self.what["branches"])


def description(
    analysis: Analysis,
    source: ModelSource,
    setting: Setting,
    clusters: Sequence[Cluster],
    branches: Sequence[Branch] = (),
) -> dict[str, Any]:
    """What a measurement is of: the structure, the setting, how many groups each measured model keeps, and the clusters
    inside each of `branches`, which the last of them is without.
    """
    choices = probes.choices(clusters, branches, setting.align)
    return {
        "format": device.FORMAT,
        "model": source.spec,
        "structure": structure(analysis, source),
        "setting": {**vars(setting)},
        "threads": setting.threads,
        "seconds": SECONDS,
        "kept": [{name: int((~gone).sum()) for name, gone in choice.items()} for choice in choices],
        "branches": [list(one.inside) for one in branches],
    }


def structure(analysis: Analysis, source: ModelSource) -> str:
    """Digest of the graph, of every tensor's shape and of the inputs: two models of one digest take the same time."""
    captured = analysis.captured
    shapes = sorted((name, tuple(value.shape), str(value.dtype)) for name, value in captured.state.items())
    told = [str(captured.program.graph), repr(shapes), repr([(i.name, i.shape, i.kind) for i in source.inputs])]
    return hashlib.sha256("\n".join([*told, repr(sorted(source.usual.items()))]).encode()).hexdigest()[:16]


def feed_of(path: Path, source: ModelSource, batch: int) -> dict[str, Any]:
    """Random inputs for the model at `path`."""
    inputs = OrtRunner(path, threads=1).inputs
    made = random_feeds(inputs, seed=SEED, batches=(batch,), sizes=source.usual, ranges=source.ranges)
    return dict(made[0].arrays)


def dense_file(analysis: Analysis, source: ModelSource, setting: Setting, path: Path) -> dict[str, Any]:
    """Write the dense model in float32, which all times are shares of; returns inputs for it and all others."""
    plain = Setting(setting.threads, setting.batch, int8=False, opset=setting.opset, align=setting.align)
    probes.export(analysis.captured.program, source, plain, path, {})
    return feed_of(path, source, setting.batch)


def measure(
    analysis: Analysis,
    source: ModelSource,
    setting: Setting,
    clusters: Sequence[Cluster],
    kept: Measurements,
    progress: Progress,
    branches: Sequence[Branch] = (),
    *,
    dense_known: Callable[[float], None] = lambda ms: None,
) -> Profile:
    """The profile at `setting`: as it was `kept` where it was measured before, on this machine, with these tools. What
    a broken run had measured is not measured again. `branches`: those that may go as a whole, with clusters of
    `clusters` inside. `dense_known` hears after each model how many milliseconds the dense one takes, as far as is
    known, and may raise what ends it. Raises RefusedError, ExportError.
    """
    what = description(analysis, source, setting, clusters, branches)
    machine = device.facts()
    key = {"what": what, "machine": machine, "isa": host.isa(), "code": _code(), "tools": _tools()}
    choices = probes.choices(clusters, branches, setting.align)
    with kept.alone(NAME):
        measured: list[dict[str, Any]] = kept.read(NAME, key) or []
        for one in _rest(analysis, source, setting, choices, branches, len(measured), progress):
            measured.append(one)
            kept.write(NAME, key, measured)
            if one:
                dense_known(_dense_ms(measured))
    return _profile(what, machine, measured)


def _rest(
    analysis: Analysis,
    source: ModelSource,
    setting: Setting,
    choices: Sequence[probes.Removed],
    branches: Sequence[Branch],
    done: int,
    progress: Progress,
) -> Iterator[dict[str, Any]]:
    """What is measured of each of `choices` that is not `done` yet."""
    if done >= len(choices):
        return
    with tempfile.TemporaryDirectory() as folder, progress.bar("latency table", len(choices)) as bar:
        bar(done, "dense model")
        dense = Path(folder) / "dense.onnx"
        feed = dense_file(analysis, source, setting, dense)
        reference = device.fastest(dense, feed, setting.threads)
        for number, choice in enumerate(choices[done:], start=done):
            path = Path(folder) / "probe.onnx"
            if number == 0 and not setting.int8:
                path = dense  # the first choice keeps all, and is that very file
            elif not probes.write(analysis, choice, branches, source, setting, path, feed, progress):
                yield {}
                continue
            one = device.measure(reference, path, feed, setting.threads, SECONDS)
            bar(number + 1, f"{one['ratio']:.2g} of dense")
            yield one


_NAMED = {
    "threads": "gate.threads",
    "batch": "gate.batch_size",
    "int8": "optimize.int8",
    "opset": "export.opset",
    "align": "prune.align",
}
"""What of a setting the recipe calls how."""
NAME = "latency"
"""Of the files that tables are kept in."""


def _code() -> str:
    """Digest of how models are made and measured: another way gives other times."""
    files = [Path(device.__file__), Path(probes.__file__)]
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()


def _tools() -> dict[str, str]:
    """The versions of what makes the files."""
    return {name: metadata.version(name) for name in ("torch", "onnxscript", "onnx")}


def _profile(what: Mapping[str, Any], machine: Mapping[str, str], measured: Sequence[Mapping[str, Any]]) -> Profile:
    luck = _luck_of_reference(what, measured)
    samples = tuple(
        Sample(
            kept=kept,
            ratio=float(one["ratio"]) / luck,
            operators=tuple(
                Operator(str(name), ALIKE.get(kind, str(kind)), _shapes(inputs), _shapes(outputs), float(share) / luck)
                for name, kind, inputs, outputs, share in one["operators"]
            ),
        )
        for kept, one in zip(what["kept"], measured, strict=True)
        if one  # else there is no such model
    )
    return Profile(what, machine, samples, luck * _dense_ms(measured))


def _dense_ms(measured: Sequence[Mapping[str, Any]]) -> float:
    """Of the session that took turns with every model, the middle of them."""
    return float(np.median([one["dense_ms"] for one in measured if one]))


def _luck_of_reference(what: Mapping[str, Any], measured: Sequence[Mapping[str, Any]]) -> float:
    """The dense model's time over that of the one session that every model took turns with, which lay better or worse
    in memory than others, as all ratios say alike. The first model is that very file in sessions of its own, and the
    mean of both is nearer than either: a DistilBERT's models, where the first one took 1.034, were told 3.2 % too slow
    in the mean and so are 1.5 %, those of a LeViT, where it took 0.926, 4 % too fast and so are 2.1 %. In int8 the
    first model is another file.
    """
    first = 1.0 if what["setting"]["int8"] else float(measured[0]["ratio"])
    return float(np.sqrt(max(first, 1e-9)))


def _shapes(given: Sequence[Sequence[int]]) -> tuple[tuple[int, ...], ...]:
    return tuple(tuple(int(n) for n in shape) for shape in given)


def read(
    path: Path,
    analysis: Analysis,
    source: ModelSource,
    setting: Setting,
    clusters: Sequence[Cluster],
    branches: Sequence[Branch] = (),
) -> Profile:
    """The profile in a file that a kit wrote on another device.

    Raises ConfigError for a file that is none, was edited, is not complete, or is of another model or setting.
    """
    again = f"Write a kit for it: leanort profile {source.spec} --kit kit.tar.gz, and run it on the device."
    content = checked(path, again)
    kit = content["kit"]
    what = description(analysis, source, setting, clusters, branches if kit.get("branches") else ())
    if kit.get("structure") != what["structure"]:
        raise ConfigError(f"{path} was measured for another model ({kit.get('model')}), not for {source.spec}.", again)
    for key, value in what["setting"].items():
        other = kit["setting"].get(key)
        if other != value:
            named = f"{_NAMED[key]}={json.dumps(other)}"
            raise ConfigError(
                f"{path} was measured with {key} = {other}, and {key} = {value} is asked for.",
                f"Ask for what was measured, --set {named}, or write another kit: leanort profile {source.spec} "
                f"--set {_NAMED[key]}={json.dumps(value)} --kit kit.tar.gz",
            )
    if any(kit.get(key) != what[key] for key in ("kept", "branches")):
        raise ConfigError(
            f"{path} was measured for other widths: by another version of leanort, or with other layers kept whole.",
            again,
        )
    if len(content["measured"]) < len(what["kept"]):
        done, all_ = len(content["measured"]), len(what["kept"])
        raise ConfigError(
            f"{path} is not complete: {done} of {all_} models were measured.",
            "Run the kit again: it goes on from there.",
        )
    return _profile(kit, content["device"], content["measured"])


def checked(path: Path, hint: str) -> dict[str, Any]:
    """The content of a device's file, whole and unedited. Raises ConfigError."""
    try:
        if path.stat().st_size > MOST_BYTES:
            raise ConfigError(f"{path} is no file of a device: it is larger than {MOST_BYTES >> 20} MB.", hint)
        content = json.loads(path.read_text(encoding="utf-8"))
        stated = content.pop("digest")
        measured = content["measured"]
        kit, machine = content["kit"], content["device"]
        known = content["format"] == device.FORMAT and isinstance(kit["setting"], dict) and isinstance(measured, list)
        known &= isinstance(machine, dict) and isinstance(kit["kept"], list)
    except OSError as error:
        raise ConfigError(f"{path} cannot be read ({error.strerror}).", hint) from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ConfigError(f"{path} is no file of a device ({first_line(error)}).", hint) from None
    if not known:
        raise ConfigError(f"{path} is no file of a device, or of another version of leanort.", hint)
    if stated != device.digest(content):
        raise ConfigError(f"{path} was edited after it was measured: its digest does not fit.", hint)
    found: dict[str, Any] = content
    return found
