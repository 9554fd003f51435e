"""The closed form: both networks advance together, node by node, over all samples at once, and each weight that reads
something changed is fitted so that the pruned network gives what the dense one gave.

No labels, no gradients: about two forward passes and one system of normal equations per weight. After a trial of ours
this gives back more accuracy than an epoch of training with labels (docs/recovery.md); the idea is layer-wise
reconstruction (He et al. 2017, arXiv:1707.06168), here for every contraction of a graph and with both sides cut.

`walk` goes over the graph. What it meets is fitted by `one_reader`, `several_readers`, `cells` (of recurrent layers),
`scores` (queries and keys) and `shifts` (of norms); the systems that these solve are in `regression`, `tied`,
`recurrent` and `attention`.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pipeline.channels.program.capture import Captured
from pipeline.recovery.fitted import Fitted
from pipeline.recovery.rows import Samples
from pipeline.recovery.sampling import chunked
from pipeline.recovery.shelf import ON_DISK, Shelf
from pipeline.recovery.walk import Tick, Walk, Walked
from pipeline.recovery.weights import Weights
from pipeline.training.devices import ALONE, Elsewhere, Together
from pipeline.training.devices import together as everybody

WALKS = 3
"""Where a weight has several readers; else one is all there is to do."""
LEAST = 10
"""Samples, at the least: some of them are held back."""


@dataclass(frozen=True)
class ClosedForm:
    """`state`: every parameter by name, fitted where it could be, the originals under the masks untouched."""

    state: Mapping[str, Tensor]
    fitted: tuple[Fitted, ...]
    seconds: float
    on_disk: int = 0
    """Bytes of activations that went to disk."""


def recover(
    captured: Captured,
    masks: Mapping[str, Tensor],
    inputs: Sequence[Tensor],
    *,
    start: Mapping[str, Tensor] | None = None,
    counted: Tensor | None = None,
    seed: int = 0,
    on_disk: int = ON_DISK,
    folder: Path | None = None,
    together: Together = ALONE,
    tick: Tick = lambda done, note: None,
) -> ClosedForm:
    """Fit the kept weights under `masks` to what `captured` computes, which is the dense network.

    `masks`: parameter name -> bool tensor, True = kept. `inputs`: the model's inputs, all samples in dimension 0 of
    each. `start`: the weights that the pruned network has by now, where they are not the dense ones; the fit is pulled
    to them. `counted`: which places (samples, places) hold something; a matrix over places is fitted to no others.
    `tick(nodes done, name)` is called as it goes. Activations beyond `on_disk` bytes lie in files that have no
    name (in `folder`, by default where the system keeps temporary ones), so that nothing is left behind. Deterministic:
    the same inputs and seed give the same weights. A weight that reads activations which are not finite stays, and its
    `Fitted.reason` says so. Raises ValueError for fewer than `LEAST` samples, inputs of different lengths or that are
    not finite, a fixed batch larger than the samples, and a graph that cannot be run node by node.

    A weight that several operators read is fitted to all of them at once (`tied`): on what they read in one walk, for
    the next, up to `WALKS` of them, as long as the outputs of the samples held back come nearer.

    `together`: the processes that all fit the same, each on its part of the samples; every one gets all weights. What
    one of them cannot do is a ValueError on all.
    """
    try:
        made = _recover(
            captured, masks, inputs, start, counted, seed, on_disk // together.count, folder, together, tick
        )
        together.done()
    except Elsewhere:
        raise
    except ValueError as error:
        together.failed(str(error))
        raise
    return made


def sharing(captured: Captured, inputs: Sequence[Tensor]) -> Together:
    """All processes of the run where there is a batch of samples for each of them; else this one alone."""
    every = everybody()
    return every if len(chunked(captured, inputs)) >= every.count else ALONE


def _recover(
    captured: Captured,
    masks: Mapping[str, Tensor],
    inputs: Sequence[Tensor],
    start: Mapping[str, Tensor] | None,
    counted: Tensor | None,
    seed: int,
    on_disk: int,
    folder: Path | None,
    together: Together,
    tick: Tick,
) -> ClosedForm:
    began = time.perf_counter()
    _check(captured, inputs)
    # What counts is in `captured.state`; the program may hold older values of it.
    known: Mapping[str, Tensor] = {**captured.state, **(start or {})}
    spilt = 0
    samples = Samples(captured, inputs, counted, seed, together)
    best: Walked | None = None
    fitted: list[Fitted] = []
    settled: Mapping[Any, Fitted] = {}
    with torch.random.fork_rng(devices=[]):
        for _ in range(WALKS):
            shelf = Shelf(on_disk, folder)
            walked = Walk(Weights(captured, masks, known), samples, shelf).run(tick)
            spilt += shelf.on_disk
            if best is not None and not walked.left < best.left:
                break
            best, fitted, settled = walked, [*walked.fitted, *settled.values()], walked.settled
            if walked.following is None:
                break
            known = walked.following
    assert best is not None
    told = {one.name for one in fitted}
    fitted.extend(
        Fitted(one.name, reason=one.reason or "several operators read it, and fitted to all of them it comes no nearer")
        for one in settled.values()
        if one.name not in told
    )
    return ClosedForm(best.state, tuple(fitted), time.perf_counter() - began, spilt)


def _check(captured: Captured, inputs: Sequence[Tensor]) -> None:
    """Raise ValueError where the samples cannot be used."""
    counts = {len(x) for x in inputs}
    if len(counts) != 1:
        raise ValueError(f"the inputs hold different numbers of samples: {sorted(counts)}")
    count = counts.pop()
    if count < LEAST:
        raise ValueError(f"{count} samples are too few to fit weights to; it takes {LEAST}")
    if not captured.dynamic_batch and count < len(captured.example[0]):
        raise ValueError(f"{count} samples do not fill the batch of {len(captured.example[0])} that the model fixes")
    for at, x in enumerate(inputs):
        if (x.is_floating_point() or x.is_complex()) and not bool(x.isfinite().all()):
            raise ValueError(f"input {at} holds values that are not finite")
