"""An LSTM with projections of which as many units as outputs are left: PyTorch tells the two kinds by these numbers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from torch import Tensor, nn

from exporters import to_onnx
from foundation.errors import LeanortError
from pipeline.channels import Shrunk, analyse, capture, prove, shrink, small
from pipeline.channels.operators import CARDS

TOKENS = torch.randn(2, 6, 12, generator=torch.Generator().manual_seed(0))


class Projected(nn.Module):
    """What comes out at every step, and the cells at the end."""

    def __init__(self, layers: int, both_ways: bool, biases: bool) -> None:
        super().__init__()
        self.rnn = nn.LSTM(12, 7, layers, biases, batch_first=True, bidirectional=both_ways, proj_size=4)
        self.head, self.read = nn.Linear(8 if both_ways else 4, 3), nn.Linear(7, 2)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        every, (_, cells) = self.rnn(x)
        return self.head(every), self.read(cells.transpose(0, 1))


def with_four_units(model: nn.Module) -> tuple[Any, Shrunk]:
    """The folded model, and the shrunk one with four units and four outputs."""
    captured = capture(model.eval(), (TOKENS,))
    analysis = analyse(captured)
    units = [c for c in analysis.clusters if c.size == 7]
    assert units
    removed = {c.name: np.arange(7) < 3 for c in units}
    folded = captured.fold(analysis.masks(removed))
    return folded, shrink(folded, analysis, removed)


@pytest.mark.parametrize(("layers", "both_ways", "biases"), [(1, False, True), (2, True, True), (2, False, False)])
def test_as_many_units_as_outputs(layers: int, both_ways: bool, biases: bool, tmp_path: Path) -> None:
    torch.manual_seed(0)
    folded, shrunk = with_four_units(Projected(layers, both_ways, biases))
    assert shrunk.program.state_dict["rnn.weight_hr_l0"].shape == (4, 4)
    for batch in (1, 3):
        prove(folded, shrunk, [small(folded, batch=batch)])
    to_onnx(
        shrunk.program, tmp_path / "m.onnx", example=(), opset=20, metadata={}, input_names=("x",),
        output_names=("y", "cells"),
    )  # fmt: skip
    session = onnxruntime.InferenceSession(str(tmp_path / "m.onnx"), providers=["CPUExecutionProvider"])
    for batch in (1, 3):
        (x,) = small(folded, batch=batch)
        for got, want in zip(session.run(None, {"x": x.numpy()}), folded(x), strict=True):
            np.testing.assert_allclose(got, want.detach(), atol=1e-5)


def test_without_one_more_unit_it_is_refused(
    monkeypatch: pytest.MonkeyPatch, lenient: None, experiment: Callable[..., Any]
) -> None:
    monkeypatch.setitem(CARDS, "lstm", replace(CARDS["lstm"], edit=None))
    with pytest.raises((LeanortError, RuntimeError)):
        folded, shrunk = with_four_units(Projected(1, False, True))
        prove(folded, shrunk, [small(folded)])
