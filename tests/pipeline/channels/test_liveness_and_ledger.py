"""What is dead is found from weights alone; what was done is written down and can be done again."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import prune

from foundation.errors import CaptureError, WeightsError
from pipeline.channels import (
    Captured,
    Ledger,
    Liveness,
    Policy,
    Shrunk,
    analyse,
    capture,
    dead_groups,
    liveness,
    prove,
    shrink,
    small,
)


class Net(nn.Module):
    def __init__(self, act: Callable[[Tensor], Tensor] = torch.relu) -> None:
        super().__init__()
        self.a, self.norm, self.b = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 6, 3)
        self.c, self.act = nn.Conv2d(6, 4, 1), act

    def forward(self, x: Tensor) -> Tensor:
        return self.c(self.act(self.b(self.act(self.norm(self.a(x))))))


IMAGE = torch.randn(2, 3, 8, 8)


def test_dead_groups_are_those_that_were_masked(experiment: Callable[..., Any]) -> None:
    found = experiment(Net(), IMAGE)
    dead = dead_groups(found.analysis, found.folded.state)
    assert {n: f.tolist() for n, f in dead.items()} == {n: f.tolist() for n, f in found.removed.items()}
    assert dead_groups(found.analysis, found.captured.state) == {}


def test_a_channel_that_nothing_reads_dies_and_takes_what_fed_it_along(experiment: Callable[..., Any]) -> None:
    found = experiment(Net(), IMAGE)
    state = {n: v.detach().clone() for n, v in found.captured.state.items()}
    state["c.weight"][:, 2] = 0  # nobody reads b[2]
    state["b.weight"][[0, 1, 3, 4, 5], 5] = 0  # only b[2] read a[5]
    dead = dead_groups(found.analysis, state)
    assert dead["b"].tolist() == [False, False, True, False, False, False]
    assert np.flatnonzero(dead["a"]).tolist() == [5]
    folded = found.captured.with_state(state)
    prove(folded, shrink(folded, found.analysis, dead), [small(folded)])


def _shrunk(captured: Captured, state: dict[str, Tensor] | None = None) -> tuple[Liveness, Shrunk]:
    """Liveness of foreign weights, and the removal of what is dead, proven."""
    analysis = analyse(captured)
    folded = captured if state is None else captured.with_state(state)
    found = liveness(analysis, folded.state)
    shrunk = shrink(folded, analysis, found.dead, refused=found.refusals)
    prove(folded, shrunk, [small(folded, seed=k) for k in range(2)])
    assert {n: np.flatnonzero(f).tolist() for n, f in found.dead.items()} == {
        n: list(g) for n, g in shrunk.ledger.groups.items()
    }, "what liveness promises goes"
    return found, shrunk


def _dead(found: Liveness) -> dict[str, list[int]]:
    return {n: np.flatnonzero(f).tolist() for n, f in found.dead.items()}


def _lively(model: nn.Module) -> nn.Module:
    """Norms with scale, shift and statistics that hide nothing."""
    with torch.no_grad():
        for m in model.modules():
            if isinstance(m, nn.BatchNorm2d):
                m.weight.uniform_(0.5, 1.5), m.bias.uniform_(0.2, 1.0)
                m.running_mean.normal_(), m.running_var.uniform_(0.5, 1.5)  # type: ignore[union-attr, operator]
    return model.eval()


@pytest.mark.parametrize("act", [torch.relu, torch.sigmoid, F.gelu, F.hardswish])
def test_a_constant_goes_into_the_bias_of_an_unpadded_reader(act: Callable[[Tensor], Tensor]) -> None:
    """Scale zero with a shift left (network slimming; the rows are not zero), and rows zero under a live norm."""
    net = _lively(Net(act))
    with torch.no_grad():
        net.norm.weight[1] = 0  # type: ignore[index, union-attr, operator]
        net.a.weight[5] = 0  # type: ignore[index, union-attr, operator]
    captured = capture(net, (IMAGE,))
    found, shrunk = _shrunk(captured)
    assert _dead(found) == {"a": [1, 5]}
    assert not shrunk.refused
    (fold,) = shrunk.ledger.folds
    seen = act(captured.state["norm.bias"][1].double())
    assert (fold.parameter, fold.op, fold.created) == ("b.bias", "conv2d", False)
    assert fold.constants["a"][1] == pytest.approx(float(seen.detach()), abs=1e-12)
    assert not (shrink(captured, analyse(captured), found.dead, check_zero=False).ledger.folds)


def test_zero_padding_and_what_joins_keep_a_constant_with_the_reason() -> None:
    class Padded(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.na = nn.Conv2d(3, 6, 1, bias=False), nn.BatchNorm2d(6)
            self.b, self.nb = nn.Conv2d(6, 6, 3, padding=1), nn.BatchNorm2d(6)
            self.deep, self.out = nn.Conv2d(6, 6, 3, padding=1, groups=6, bias=False), nn.Conv2d(6, 2, 1)

        def forward(self, x: Tensor) -> Tensor:
            x = torch.relu(self.na(self.a(x)))
            return self.out(self.deep(torch.relu(self.nb(self.b(x)))) + 0 * x) + self.out(x * x)

    net = _lively(Padded())
    with torch.no_grad():
        for m in (net.na, net.nb):
            m.weight[2:4] = 0  # type: ignore[index, operator]
            m.bias[3] = -1  # type: ignore[index, operator]  # relu makes it zero: padded or not, nothing is left
    found, shrunk = _shrunk(capture(net, (IMAGE,)))
    refused = {(r.cluster, r.groups, r.op) for r in shrunk.refused}
    assert refused and all(r.node and r.reason for r in shrunk.refused)
    assert all(2 in groups for _, groups, _ in refused)
    assert set(map(tuple, _dead(found).values())) == {(3,)}
    assert shrunk.ledger.folds == ()


def test_a_weight_that_never_meets_the_padding_takes_the_constant() -> None:
    net = _lively(nn.Sequential(nn.Conv2d(3, 6, 1), nn.BatchNorm2d(6), nn.Conv2d(6, 4, 3, padding=1)))
    with torch.no_grad():
        net[1].weight[:2] = 0  # type: ignore[index, operator]
        keep = net[2].weight[:, 0, 1, 1].clone()  # type: ignore[index]
        net[2].weight[:, 0] = 0  # type: ignore[index, operator]
        net[2].weight[:, 0, 1, 1] = keep  # type: ignore[index, operator]
    found, shrunk = _shrunk(capture(net, (IMAGE,)))
    assert _dead(found) == {"0": [0]}
    assert [(r.cluster, r.groups, r.op) for r in shrunk.refused] == [("0", (1,), "conv2d")]
    assert "padding" in shrunk.refused[0].reason


class Many(nn.Module):
    """Readers of every kind behind one stream of constants."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.norm = nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8)
        self.same, self.depthwise = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 3, groups=8)
        self.grouped, self.transposed = nn.Conv2d(8, 8, 3, groups=2, bias=False), nn.ConvTranspose2d(8, 4, 1)
        self.read = nn.Sequential(nn.Conv2d(8, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 3, 1))
        self.head, self.matrix = nn.Linear(2 * 8 * 3 * 3, 5), nn.Parameter(torch.randn(8, 4))
        self.tied = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        y = F.hardswish(self.norm(self.a(x))) + self.same(x)
        z = F.avg_pool2d(self.depthwise(y), 2)
        flat = torch.cat([z, F.adaptive_max_pool2d(y, 3)], 1).flatten(1)
        pooled = y.mean((2, 3))
        return (
            self.transposed(y), self.read(y), self.head(flat), pooled @ self.matrix,
            self.tied(pooled), self.tied(pooled.square()),
            self.grouped(F.interpolate(y, scale_factor=2, mode="bilinear")),
        )  # fmt: skip


def test_every_kind_of_reader_takes_a_constant() -> None:
    net = _lively(Many())
    with torch.no_grad():
        net.norm.weight[[0, 4]] = 0  # type: ignore[index, operator]
        net.same.weight[[0, 4]] = 0  # a sum of two constants; places 0 of both groups of `grouped`
        net.read[1].weight[3] = 0  # type: ignore[index, operator]
    captured = capture(net, (IMAGE,))
    found, shrunk = _shrunk(captured)
    assert _dead(found) == {"a": [0], "read.0": [3]}, "grouped ties places of both its groups: 0 with 4"
    folds = {f.parameter: f.created for f in shrunk.ledger.folds}
    assert {n: c for n, c in folds.items() if not n.startswith("leanort_")} == {
        "transposed.bias": False, "head.bias": False, "read.3.bias": False,
    }  # fmt: skip
    assert sum(folds.values()) == 5, "read.0 and grouped have no bias, matmul none, tied serves two readers"


def test_what_only_fed_a_constant_goes_with_it() -> None:
    net = _lively(
        nn.Sequential(nn.Conv2d(3, 5, 1), nn.ReLU(), nn.Conv2d(5, 4, 1), nn.BatchNorm2d(4), nn.Conv2d(4, 2, 1))
    )
    with torch.no_grad():
        net[3].weight[1] = 0  # type: ignore[index, operator]
        net[2].weight[[0, 2, 3], 4] = 0  # type: ignore[index, operator]  # only the constant's rows read this one
    found, _ = _shrunk(capture(net, (IMAGE,)))
    assert _dead(found) == {"0": [4], "2": [1]}


def test_foreign_checkpoints() -> None:
    """Rows pruned by torch's own tool, biases left; and zeros that unstructured pruning happens to align."""
    net = nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 6, bias=False), nn.Tanh(), nn.Linear(6, 2))
    prune.ln_structured(net[0], "weight", amount=3, n=2, dim=0)
    prune.remove(net[0], "weight")
    rows = torch.nonzero((net[0].weight == 0).all(1)).flatten().tolist()
    mask = torch.rand(6, 8) > 0.3
    mask[2] = False
    prune.custom_from_mask(net[2], "weight", mask)
    prune.remove(net[2], "weight")
    found, shrunk = _shrunk(capture(net, (torch.randn(2, 4),)))
    assert _dead(found) == {"0": rows, "2": [2]}
    assert [f.created for f in shrunk.ledger.folds] == [True]


def test_norms_over_channels_and_products_of_activations_refuse_constants() -> None:
    class Attending(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inp, self.norm, self.out = nn.Linear(3, 8), nn.LayerNorm(8), nn.Linear(8, 2)
            self.q, self.k, self.v = nn.Linear(8, 4), nn.Linear(8, 4), nn.Linear(8, 4)
            self.proj = nn.Linear(4, 8)

        def forward(self, x: Tensor) -> Tensor:
            x = self.inp(x)
            y = F.scaled_dot_product_attention(self.q(x), self.k(x), self.v(x))
            return self.out(self.norm(self.proj(y)))

    net = Attending()
    with torch.no_grad():
        for rows in (net.inp, net.q, net.v, net.proj):
            rows.weight[1] = 0
    found, _ = _shrunk(capture(net.eval(), (torch.randn(2, 5, 3),)))
    assert _dead(found) == {"inp": [1], "v": [1]}, "rows of a softmax sum to one: a constant value stays one"
    assert {(r.cluster, r.op) for r in found.refusals} == {
        ("q", "scaled_dot_product_attention"), ("proj", "layer_norm"),
    }  # fmt: skip


def test_recurrent_units_are_dead_only_where_nobody_listens() -> None:
    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inp, self.lstm, self.out = nn.Linear(3, 6), nn.LSTM(6, 5, batch_first=True), nn.Linear(5, 2)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.out(self.lstm(self.inp(x))[0])
            return y

    captured = capture(Recurrent().eval(), (torch.randn(2, 4, 3),))
    assert dead_groups(analyse(captured), captured.state) == {}
    state = {n: v.detach().clone() for n, v in captured.state.items()}
    state["out.weight"][:, 2] = 0
    assert dead_groups(analyse(captured), state) == {}, "the other units still hear it"
    state["lstm.weight_hh_l0"][:, 2] = 0
    state["lstm.weight_ih_l0"][:, 4] = 0
    found, _ = _shrunk(captured, state)
    assert _dead(found) == {"inp": [4], "lstm": [2]}


def test_the_ledger_repeats_folded_constants_and_maps_back() -> None:
    net = _lively(Net())
    with torch.no_grad():
        net.norm.weight[[1, 6]] = 0  # type: ignore[index, operator]
    captured = capture(net, (IMAGE,))
    _, shrunk = _shrunk(captured)
    ledger = Ledger.from_json(shrunk.ledger.to_json())
    assert ledger == shrunk.ledger
    again = ledger.shrink_state(captured.state)
    assert all(torch.equal(again[n], v) for n, v in shrunk.program.state_dict.items())
    dense = ledger.restore_state(again)
    feed = small(captured, seed=5)
    assert torch.allclose(captured.with_state(dense)(*feed), shrunk(*feed), atol=1e-5)
    once = ledger.shrink_state(dense, constants=False)
    assert all(torch.equal(once[n], again[n]) for n in again)
    for layer in ("a", "b"):
        assert [f["parameter"] for f in ledger.why(layer)["folded"]] == ["b.bias"]


def test_the_ledger_repeats_and_reverses_a_removal(experiment: Callable[..., Any]) -> None:
    found = experiment(Net(), IMAGE)
    ledger = Ledger.from_json(found.shrunk.ledger.to_json())
    assert ledger == found.shrunk.ledger
    again = ledger.shrink_state(found.folded.state)
    assert all(torch.equal(again[n], v) for n, v in found.shrunk.program.state_dict.items())
    dense = ledger.restore_state(again)
    assert torch.equal(dense["b.weight"], found.folded.state["b.weight"])
    gone = np.flatnonzero(found.removed["b"]).tolist()
    assert ledger.why("b")["removed"]["b.weight[0]"] == gone
    with pytest.raises(WeightsError):
        ledger.shrink_state({**found.folded.state, "b.weight": torch.zeros(1)})
    with pytest.raises(WeightsError):
        Ledger.from_json("{}")


def test_the_policy_decides_what_may_go(experiment: Callable[..., Any]) -> None:
    layer = nn.TransformerEncoderLayer(12, 3, 16, batch_first=True)
    captured = capture(nn.Sequential(nn.Linear(12, 12), layer, nn.Linear(12, 2)), (torch.randn(2, 5, 12),))
    assert {c.kind for c in analyse(captured).clusters} == {"residual", "head", "neuron"}
    assert {c.kind for c in analyse(captured, Policy(residual=False)).clusters} == {"head", "neuron"}
    positions = analyse(captured, Policy(heads=False, residual=False, neurons=False))
    assert {c.kind for c in positions.clusters} == {"head_position"}
    assert not analyse(captured, Policy(False, False, False, False, False)).clusters


def test_what_cannot_be_captured_is_refused_with_the_reason() -> None:
    class Branches(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x if x.sum() > 0 else -x

    with pytest.raises(CaptureError, match="cannot capture"):
        capture(Branches(), (IMAGE,))
    with pytest.raises(CaptureError, match="TorchScript"):
        capture(torch.jit.script(nn.Linear(2, 2)), (IMAGE,))
    with pytest.raises(CaptureError, match="not a torch.nn.Module"):
        capture(object(), (IMAGE,))  # type: ignore[arg-type]
