"""Operators that give no tensor: sizes, numbers read off a tensor, assertions. They relate nothing."""

from __future__ import annotations

from pipeline.channels.operators.card import Card
from pipeline.channels.operators.table import register

register(Card("size"), "sym_size")
register(
    Card("number"),
    "sym_stride", "sym_numel", "sym_storage_offset", "sym_is_contiguous", "_local_scalar_dense", "item",
)  # fmt: skip
register(
    Card("assertion"),
    "_assert_async", "_assert_scalar", "_assert_tensor_metadata", "sym_constrain_range",
    "sym_constrain_range_for_size",
)  # fmt: skip
