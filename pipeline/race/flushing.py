"""Denormal numbers set to zero, as far as that leaves the answers alone: they can cost a hundred times the time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from exporters.candidates import Made
from exporters.denormals import count_denormals, flush_denormals
from pipeline.race.context import RaceContext
from validators.feeds import Feed
from validators.latency import race
from validators.parity import compare
from validators.runners import OrtRunner, Runner


def without_denormals(context: RaceContext) -> tuple[RaceContext, str]:
    """The context with an exported file without denormals, unless that changes the answers; and what was done."""
    source = context.source
    found = count_denormals(source.onnx)
    if not found.count:
        return context, ""
    words = f"{found.count:,} of {found.elements:,} weights are denormal numbers"
    before = OrtRunner(source.onnx, threads=1, name="with denormals")
    path, chosen = _flushed(source.onnx, source.folder / ".flushed.onnx", before, context.feeds, context.cfg.parity)
    if path is None:
        return context, f"{words}; they stay, since flushing any of them changes the output."
    effect = race(
        {"with denormals": before, "flushed": OrtRunner(path, threads=1, name="flushed")},
        context.feeds[0],
        reference="with denormals",
        seconds=1.0,
        seed=context.cfg.seed,
    ).runners["flushed"]
    said = (
        f"{words}; {chosen:,} were set to zero, the output stays the same, and the latency is "
        f"{effect.ratio.value:.3f} of before ({effect.ratio.low:.3f} to {effect.ratio.high:.3f})."
    )
    return replace(context, source=replace(source, onnx=path, ranges={})), said


def flush_made(context: RaceContext, made: Made, session: Mapping[str, str]) -> tuple[int, tuple[str, ...]]:
    """Flush what making a candidate left denormal, in its file; how many stay, and what was done."""
    if made.path.suffix != ".onnx":
        return 0, ()
    found = count_denormals(made.path).count
    if not found:
        return 0, ()
    before = OrtRunner(made.path, threads=1, session=session)
    scratch = made.path.with_name(f".{made.spec.name}.flushed.onnx")
    path, chosen = _flushed(made.path, scratch, before, context.feeds, context.cfg.parity, session)
    if path is None:
        return found, (f"{found:,} denormal constants stay, since flushing changes the output",)
    # External weights keep the name that the graph knows them by.
    flush_denormals(made.path, made.path, only=None if chosen == found else _safe_names(made.path, scratch))
    _remove(scratch)
    return found - chosen, (f"{chosen:,} denormal constants were set to zero",)


def _safe_names(before: Path, after: Path) -> frozenset[str]:
    return frozenset(count_denormals(before).tensors.keys() - count_denormals(after).tensors.keys())


def _flushed(
    src: Path,
    dst: Path,
    before: Runner,
    feeds: Sequence[Feed],
    atol: float,
    session: Mapping[str, str] | None = None,
) -> tuple[Path | None, int]:
    """`src` with as many of its denormals flushed as leave the answers alone: all, else tensor by tensor, else None."""

    def harmless(only: frozenset[str] | None) -> int:
        count = flush_denormals(src, dst, only=only).count
        after = OrtRunner(dst, threads=1, session=session)
        return count if compare(before, after, feeds, atol=atol, rtol=0.0).passed else 0

    if count := harmless(None):
        return dst, count
    good = frozenset(name for name in count_denormals(src).tensors if harmless(frozenset({name})))
    if good and (count := harmless(good)):
        return dst, count
    _remove(dst)
    return None, 0


def _remove(path: Path) -> None:
    for part in (path, path.with_name(f"{path.name}.data")):
        part.unlink(missing_ok=True)
