"""A sequence of symbols that is shorter than the frames it is read from: speech, handwriting (Graves 2006)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from foundation.errors import DataError, ModelError
from pipeline.data.parts import Target
from pipeline.models.calling import Outputs
from pipeline.tasks.places import is_whole, whole
from pipeline.tasks.task import Task, softened
from validators.runners import Array
from validators.scores import Score, per_sample

BLANK = 0
PADDING = -1
"""What fills targets up to one length."""


def task(name: str, main: str) -> Task:
    """Symbols by the logits, or logarithms of probabilities, (samples, frames, symbols) in the output `main`, symbol 0
    the blank: CTC loss per symbol; share of symbols that need no edit after greedy decoding, share of exact sequences.

    Targets are (samples, symbols) filled up with -1, or a mapping of `targets` and, of each sample, `lengths` (symbols
    in it) or `frames` (outputs that belong to it; what follows was read from filling, and counts for nothing) or both.
    """

    def pair(outputs: Outputs, target: Target) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        symbols, lengths = sequences(target)
        logits = outputs[main].float()
        given = f"The model gives {main} of shape {tuple(logits.shape)} for {len(symbols)} samples"
        if logits.dim() == 3 and len(logits) != len(symbols) and logits.shape[1] == len(symbols):
            raise ModelError(
                f"{given}: that is (frames, samples, symbols).",
                "Return (samples, frames, symbols): .transpose(0, 1) at the end of forward.",
            )
        if logits.dim() != 3 or len(logits) != len(symbols):
            raise ModelError(f"{given}.", "Return logits (samples, frames, symbols).")
        if symbols.numel() and int(symbols.max()) >= logits.shape[2]:
            raise DataError(
                f"The targets hold the symbol {int(symbols.max())}; the model knows 0 to {logits.shape[2] - 1}.",
                "Use a model with one output per symbol, and one for the blank.",
            )
        frames = counted(target, len(symbols), logits.shape[1])
        if bool((lengths > frames).all()):
            raise DataError(
                f"The targets have {int(lengths.min())} symbols or more, the model gives {int(frames.max())} frames.",
                "Use a model that gives more frames than a target has symbols.",
            )
        return logits.log_softmax(2), symbols, lengths, frames

    def losses(outputs: Outputs, target: Target, smoothing: float) -> Tensor:
        logs, symbols, lengths, frames = pair(outputs, target)
        each = F.ctc_loss(
            logs.transpose(0, 1), symbols.clamp_min(0), frames, lengths, BLANK, reduction="none", zero_infinity=True
        )
        return each / lengths.clamp_min(1)

    def divergence(student: Outputs, teacher: Outputs, temperature: float) -> Tensor:
        return softened(student[main].transpose(1, 2), teacher[main].transpose(1, 2), temperature)

    def edits(outputs: Outputs, target: Target) -> Tensor:
        logs, symbols, lengths, frames = pair(outputs, target)
        counts = [
            (distance(found, wanted), len(wanted))
            for found, wanted in zip(decoded(logs, frames), _lists(symbols, lengths), strict=True)
        ]
        return torch.tensor(counts).double()

    def exact(outputs: Outputs, target: Target) -> Tensor:
        logs, symbols, lengths, frames = pair(outputs, target)
        return torch.tensor([a == b for a, b in zip(decoded(logs, frames), _lists(symbols, lengths), strict=True)])

    scores = (Score("1 - CER", edits, correct), per_sample("exact sequences", exact))
    return Task(name, scores, losses, divergence, (main,))


def sequences(target: Any) -> tuple[Tensor, Tensor]:
    """Symbols (samples, longest) int64, -1 behind the end of each, and their lengths.

    Raises DataError where there is a blank within a sequence, or filling before its end.
    """
    lengths: Tensor | None = None
    if isinstance(target, Mapping):
        wanted = ("targets",) if "frames" in target else ("targets", "lengths")
        missing = [key for key in wanted if key not in target]
        if missing:
            raise DataError(
                f"The targets are a mapping without {missing[0]}.",
                "Give targets and lengths, or targets filled with -1.",
            )
        lengths = whole(target["lengths"], "The lengths").reshape(-1) if "lengths" in target else None
        target = target["targets"]
    symbols = whole(target, "The targets")
    if symbols.dim() != 2 or (lengths is not None and len(lengths) != len(symbols)):
        shown = "" if lengths is None else f" and lengths {tuple(lengths.shape)}"
        raise DataError(
            f"The targets are {tuple(symbols.shape)}{shown}.", "Give (samples, symbols), filled with -1 to one length."
        )
    if lengths is not None:
        if bool(((lengths < 0) | (lengths > symbols.shape[1])).any()):
            raise DataError(
                f"The lengths go to {int(lengths.max())}, the targets to {symbols.shape[1]}.", "Give whole lengths."
            )
        symbols = torch.where(torch.arange(symbols.shape[1]) < lengths[:, None], symbols, PADDING)
    found = (symbols >= 0).sum(1)
    inside = torch.arange(symbols.shape[1]) < (found if lengths is None else lengths)[:, None]
    if bool((symbols[inside] < 0).any()):
        raise DataError(
            "The targets hold a negative number before the end.", "Fill with -1 behind the last symbol only."
        )
    if bool((symbols[inside] == BLANK).any()):
        raise DataError("The targets hold 0, which is the blank.", "Number the symbols from 1.")
    return symbols, found


def counted(target: Any, samples: int, most: int) -> Tensor:
    """How many of the `most` frames that the model gives belong to each sample; all, where the target does not say.

    Raises DataError where it says more than there are, or none.
    """
    if not isinstance(target, Mapping) or "frames" not in target:
        return torch.full((samples,), most)
    frames = whole(target["frames"], "The frames").reshape(-1)
    if len(frames) != samples or bool(((frames < 1) | (frames > most)).any()):
        raise DataError(
            f"The targets have {len(frames)} counts of frames, {int(frames.min())} to {int(frames.max())}; the model "
            f"gives {most} frames of {samples} samples.",
            "Count a sample's frames as the model gives them, after its strides: 1 or more, one number per sample.",
        )
    return frames


def _lists(symbols: Tensor, lengths: Tensor) -> list[list[int]]:
    return [row[:length] for row, length in zip(symbols.tolist(), lengths.tolist(), strict=True)]


def decoded(logs: Tensor, frames: Tensor) -> list[list[int]]:
    """The likeliest symbol of a sample's frames, so many as belong to it, repetitions joined and blanks taken out."""
    return [
        [one for one in torch.unique_consecutive(row[:count]).tolist() if one != BLANK]
        for row, count in zip(logs.argmax(2), frames.tolist(), strict=True)
    ]


def distance(found: Sequence[int], wanted: Sequence[int]) -> int:
    """How many symbols must be put in, taken out or replaced to get from one to the other (Levenshtein)."""
    row = np.arange(len(wanted) + 1)
    other = np.asarray(wanted)
    for number, symbol in enumerate(found):
        best = np.minimum(row[1:] + 1, row[:-1] + (other != symbol))
        # Putting in costs one a place: the running minimum of (cost - place) is what comes from the left.
        full = np.concatenate([[number + 1], best]) - np.arange(len(row))
        row = np.minimum.accumulate(full) + np.arange(len(row))
    return int(row[-1])


def correct(sums: Array) -> Array:
    """1 - edits over symbols; 0 of no symbols."""
    found: Array = np.where(sums[..., 1] > 0, 1 - sums[..., 0] / np.maximum(sums[..., 1], 1), 0.0)
    return found


def fits(value: Tensor, target: Any) -> bool:
    """Whether `value` can be the frames that the symbols `target` are read from."""
    if not value.is_floating_point() or value.dim() != 3:
        return False
    try:
        symbols, lengths = sequences(target) if isinstance(target, Mapping) or is_whole(target) else (None, None)
    except DataError:
        return False
    return (
        symbols is not None
        and lengths is not None
        and len(value) == len(symbols)
        and value.shape[1] > int(lengths.max())
        and value.shape[2] > int(symbols.max())
    )
