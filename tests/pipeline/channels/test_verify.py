"""The final comparison: float64 decides, float32 has to agree within its own rounding."""

import pytest
import torch

from foundation.errors import RefusedError
from pipeline.channels import prove


class Model:
    """x, off by `loss` in float32 and by `fault` in both."""

    program = None

    def __init__(self, loss=0.0, fault=0.0):
        self.loss, self.fault = loss, fault

    def __call__(self, x, dtype=None):
        return x.to(dtype or x.dtype) + (self.fault if dtype == torch.float64 else self.loss + self.fault)


FEEDS = [(torch.linspace(-1, 1, 6),)]


def test_float32_may_differ_by_the_rounding_that_is_measured():
    proof = prove(Model(loss=1e-4), Model(loss=-2e-4), FEEDS)
    assert proof.max_abs_diff == pytest.approx(3e-4, rel=1e-2)
    assert proof.tolerance == pytest.approx(4e-4, rel=1e-2)


@pytest.mark.parametrize(
    "shrunk", [Model(loss=-4e-4), Model(fault=1e-6), Model(fault=float("nan"))], ids=["float32", "float64", "nan"]
)
def test_more_than_that_is_refused(shrunk, monkeypatch):
    monkeypatch.setattr(
        "pipeline.channels.removal.verify.first_difference", lambda *_: None
    )  # these have no graph to look at
    with pytest.raises(RefusedError):
        prove(Model(loss=1e-4), shrunk, FEEDS)


def test_without_rounding_the_fixed_tolerance_holds(monkeypatch):
    monkeypatch.setattr("pipeline.channels.removal.verify.first_difference", lambda *_: None)
    assert prove(Model(), Model(loss=0.9e-5), FEEDS).tolerance == pytest.approx(1e-5)
    with pytest.raises(RefusedError):
        prove(Model(), Model(loss=1.1e-5), FEEDS)
