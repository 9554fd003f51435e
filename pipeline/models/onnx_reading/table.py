"""Every operator that is read, and why others are not."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from pipeline.models.onnx_reading import arithmetic, indexing, linear, normalization, pooling, shaping

READINGS: Mapping[str, Callable[..., Any]] = {
    **arithmetic.TABLE,
    **shaping.TABLE,
    **indexing.TABLE,
    **linear.TABLE,
    **normalization.TABLE,
    **pooling.TABLE,
}
"""Operator -> a function of its node and the values of its inputs (None: left out) that gives its outputs."""

BEFORE_WEIGHTS = frozenset({"BatchNormalization", "GRU", "LSTM", "RNN"})
"""Operators that are read once their weights are laid out, or by the module itself."""

_QUANTISED = (
    "QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear", "QLinearConv", "QLinearMatMul", "ConvInteger",
    "MatMulInteger",
)  # fmt: skip
_BY_DATA = ("NonZero", "NonMaxSuppression", "Compress", "Unique")
_RANDOM = ("Bernoulli", "Multinomial", "RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike")

REASONS: Mapping[str, tuple[str, str]] = {
    **dict.fromkeys(
        ("If", "Loop", "Scan", "SequenceMap"),
        ("is control flow", "Export the model with a fixed path, by torch.onnx.export(dynamo=True)."),
    ),
    **dict.fromkeys(_QUANTISED, ("is quantised", "Give the float model that it was made from.")),
    **dict.fromkeys(_BY_DATA, ("gives as many elements as the data says", "Cut it off, and give the part before it.")),
    **dict.fromkeys(_RANDOM, ("draws random numbers", "Export the model in eval mode.")),
}
"""Operator -> why it is not read, and what to do."""
