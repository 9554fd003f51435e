"""One folder of .wav recordings per class, or recordings without labels; train/ and test/ above them if there are."""

from __future__ import annotations

import math
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from foundation.errors import DataError, first_line
from pipeline.data.assemble import Raw
from pipeline.data.folders import Classed, classed_parts, digests_of, parts_of, readers
from pipeline.data.objects import from_samples
from pipeline.data.parts import UNKNOWN, Array, Part
from pipeline.data.prepared import Prepared
from pipeline.data.samples import Reading

SUFFIXES = frozenset((".wav", ".wave"))
HIGHEST = 1_000_000
"""Samples per second that a recording may claim."""


def from_audiofolder(path: Path, seed: int, reading: Reading) -> Raw:
    """A folder of recordings, read when asked for. Raises DataError where it is none, or a file holds no sound."""
    name = f"audiofolder:{path}"
    if not path.is_dir():
        raise DataError(f"{path}: no such folder.", "Give audiofolder:PATH with one folder of .wav files per class.")
    found = classed_parts(name, parts_of(path), SUFFIXES, "recordings (.wav)", reading.ordered)
    digests = digests_of([one.files for one in found.values()], "recording")
    given: dict[Part, Recordings] = {
        part: Recordings(one, hashed, reading) for (part, one), hashed in zip(found.items(), digests, strict=True)
    }
    return replace(from_samples(given, name, seed, reading), sample_rate=reading.sample_rate)


class Recordings(Prepared):
    """Files of sound as (1, samples) float32 from -1 to 1: channels averaged, brought to one rate and length."""

    scanned = 2_000

    def __init__(self, found: Classed, digests: list[bytes], reading: Reading) -> None:
        self.files, self.digests = found.files, digests
        self.rate, self.length = reading.sample_rate, max(1, round(reading.seconds * reading.sample_rate))
        self.labels = found.labels
        self.targets = torch.tensor(self.labels)
        self.classes = found.classes or None
        self.workers = readers(len(self.files))

    def place(self, index: int) -> str:
        """The file."""
        return self.files[index]

    def __getitem__(self, index: int) -> Any:
        sound = recording(self.files[index], self.rate, self.length)
        return sound if self.labels[index] == UNKNOWN else (sound, self.labels[index])


def recording(file: str, rate: int, length: int) -> Tensor:
    """A .wav file as (1, `length`) at `rate` samples per second: cut, or filled up with silence.

    Raises DataError, naming it, for a file that is no recording, is cut short, or holds NaN.
    """
    from scipy.io import wavfile  # a moment to import, for those who have no recordings

    try:
        own, samples = _read(wavfile, file)
        if not 0 < own <= HIGHEST:
            raise ValueError(f"it claims {own} samples per second")
        if not samples.size:
            raise ValueError("it holds no sample")
        samples = samples[: math.ceil(length * own / rate) + own // 10 + 1]  # what follows would be cut off
        sound = _scaled(samples)
        if not np.isfinite(sound).all():
            raise ValueError("it holds NaN or infinity")
    except Exception as error:  # scipy's reader raises half a dozen classes, given any bytes
        reason = first_line(error).rstrip(".")
        raise DataError(
            f"{file} is not a readable recording: {reason}.", "Give .wav files of PCM or floats."
        ) from error
    mono = sound.mean(1) if sound.ndim == 2 else sound
    if own != rate:
        from scipy.signal import resample_poly

        common = math.gcd(own, rate)
        mono = resample_poly(mono, rate // common, own // common)
    made = np.zeros((1, length), np.float32)
    made[0, : len(mono)] = mono[:length]
    return torch.from_numpy(made)


def _read(wavfile: Any, file: str) -> tuple[int, Array]:
    """Samples per second and (samples[, channels]) as they are stored; mapped where the format allows it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", wavfile.WavFileWarning)  # of chunks that hold no sound
        warnings.filterwarnings("error", message=".*[Ii]ncomplete|.*EOF.*", category=wavfile.WavFileWarning)
        try:
            return wavfile.read(file, mmap=True)  # type: ignore[no-any-return]
        except ValueError as error:
            if "mmap" not in str(error):
                raise
            return wavfile.read(file)  # type: ignore[no-any-return]


def _scaled(samples: Array) -> Array:
    """From -1 to 1, float64; bytes are centred at 128, and 24 bits lie in the upper ones of 32."""
    if samples.dtype.kind == "f":
        return samples.astype(np.float64)
    if samples.dtype == np.uint8:
        return (samples.astype(np.float64) - 128) / 128
    return samples.astype(np.float64) / -float(np.iinfo(samples.dtype).min)
