"""What a release must come to: a latency, multiply-accumulates, parameters, a file size."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal, get_args

from pydantic import BeforeValidator, Field, model_validator

from foundation.files import sha256
from pipeline.recipe.section import BatchSize, Section, Threads

Quantity = Literal["latency", "macs", "params", "size"]
QUANTITIES: tuple[Quantity, ...] = get_args(Quantity)

UNITS: dict[Quantity, dict[str, float]] = {
    "latency": {"us": 1e-3, "ms": 1.0, "s": 1e3},
    "macs": {"k": 1e3, "m": 1e6, "g": 1e9, "t": 1e12},
    "params": {"k": 1e3, "m": 1e6, "g": 1e9, "b": 1e9},
    "size": {"b": 1.0, "kb": 1e3, "mb": 1e6, "gb": 1e9},
}
"""Of an absolute amount: its unit, in lower case, as milliseconds, multiply-accumulates, parameters, bytes."""

OFF_TARGET = 0.03
"""Of a target: what is further from it misses. A latency that ships above it gets a warning in the verdict; widths that
leave less of what is counted are tried finer.
"""


@dataclass(frozen=True)
class Amount:
    """A `share` of the dense model's, in (0, 1), or an `absolute` one: milliseconds, counts, bytes."""

    share: float | None = None
    absolute: float | None = None

    def of(self, dense: float) -> float:
        """The share of `dense` that this is."""
        return self.share if self.share is not None else (self.absolute or 0.0) / dense


def amount(quantity: Quantity, value: float | str) -> Amount:
    """0.4 or "3.5ms" as an amount. Raises ValueError, saying what is wrong with it."""
    text = str(value).strip().lower().replace("µ", "u")
    found = re.fullmatch(r"([0-9]*\.?[0-9]+(?:e[+-]?[0-9]+)?)\s*([a-z]*)", text)
    units = UNITS[quantity]
    example = f"3{list(units)[1]}"
    if found is None or (found[2] and found[2] not in units):
        raise ValueError(f"must be a share of dense such as 0.4, or a number of {', '.join(units)} such as {example}")
    number = float(found[1])
    if not 0 < number < float("inf"):
        raise ValueError("must be above 0")
    if found[2]:
        return Amount(absolute=number * units[found[2]])
    if number >= 1:
        raise ValueError(f"is not below dense; give a share below 1, or a number with its unit such as {example}")
    return Amount(share=number)


def _checked(quantity: Quantity) -> BeforeValidator:
    def check(value: object) -> object:
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, (int, float, str)):
            raise ValueError("must be a number or text")
        amount(quantity, value)
        return value

    return BeforeValidator(check)


Latency = Annotated[float | str | None, _checked("latency")]
Macs = Annotated[float | str | None, _checked("macs")]
Params = Annotated[float | str | None, _checked("params")]
Size = Annotated[float | str | None, _checked("size")]


class TargetSection(Section):
    """What the shipped model must come to, all of it together; widths are chosen so that it does, at the least loss."""

    latency: Latency = Field(None, description="of dense (0.4), or in us, ms, s (3.5ms), measured by onnxruntime")
    macs: Macs = Field(None, description="multiply-accumulates: of dense, or in K, M, G")
    params: Params = Field(None, description="parameters: of dense, or in K, M, G")
    size: Size = Field(None, description="of the file: of dense, or in KB, MB, GB")
    threads: tuple[Threads, ...] = Field((), description="for the latency; gate.threads when left out")
    batch_sizes: tuple[BatchSize, ...] = Field((), description="for the latency; gate.batch_size when left out")
    device: str | None = Field(None, description="device.json, measured elsewhere: the latency is that device's")
    int8: bool | None = Field(None, description="latency and size of the int8 file; optimize.int8 when left out")
    opset: int = Field(0, ge=0, le=1000, description="of the files that are measured; export.opset when left out")

    @property
    def amounts(self) -> dict[Quantity, Amount]:
        """What was asked for."""
        given = {quantity: getattr(self, quantity) for quantity in QUANTITIES}
        return {quantity: amount(quantity, value) for quantity, value in given.items() if value is not None}

    def code(self) -> dict[str, str]:
        """The device file -> its sha256."""
        path = Path(self.device) if self.device is not None else None
        return {str(path): sha256(path)} if path is not None and path.is_file() else {}

    @model_validator(mode="after")
    def _asked(self) -> TargetSection:
        if self.device is not None and max(len(self.threads), len(self.batch_sizes)) > 1:
            raise ValueError("device holds one number of threads and one batch size: give one of each")
        return self
