"""A layer in front of an activation is fitted to what shows behind it: behind a ReLU, to nothing beyond the cut."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from pipeline.channels.coupling.analyse import analyse
from pipeline.channels.program.capture import capture
from pipeline.channels.program.execute import execute, feeds_of
from pipeline.recovery import behind, one_reader, regression, shifts
from pipeline.recovery.closed_form import recover
from pipeline.recovery.shown import Curved, Cut

CUTS = {
    "relu": F.relu,
    "relu in place": lambda x: F.relu(x, inplace=True),
    "relu6": F.relu6,
    "hardtanh": lambda x: F.hardtanh(x, -0.5, 0.4),
    "clamp": lambda x: x.clamp(-0.3, 0.6),
    "clamp from above": lambda x: x.clamp(max=0.2),
    "clamp by name": lambda x: torch.clamp(x, max=0.5, min=-0.1),
    "clamp_min": lambda x: x.clamp_min(0.1),
}
CURVES = {
    "silu": F.silu,
    "silu in place": lambda x: F.silu(x, inplace=True),
    "mish": F.mish,
    "hardswish": F.hardswish,
    "hardswish in place": lambda x: F.hardswish(x, inplace=True),
    "elu": lambda x: F.elu(x, 0.7),
    "leaky relu": lambda x: F.leaky_relu(x, 0.1),
    "softplus": F.softplus,
    "sigmoid": torch.sigmoid,
    "hardsigmoid": F.hardsigmoid,
    "tanh": torch.tanh,
}
STEP = 1e-2
LAST = (torch.ops.aten.relu.default, torch.ops.aten.sigmoid.default)
PATHS = ["bare", "norm", "sum", "rows", "turned", "scaled"]


class Net(nn.Module):
    """Six of the first sixteen channels go; the layer behind them ends in a cut, by way of `path`."""

    def __init__(self, path, cut):
        super().__init__()
        self.path, self.cut = path, cut
        self.first, self.norm = nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(12)
        self.beside, self.rows = nn.Conv2d(3, 12, 1), nn.BatchNorm1d(12)
        self.bare, self.flat = nn.Conv2d(16, 12, 3, padding=1, groups=2), nn.Linear(16, 12)
        self.scale = nn.Parameter(torch.tensor([1.0, -2.0, 0.5, 3.0, 1.5, -1.0] * 2))
        self.head = nn.Linear(12, 5)

    def forward(self, x):
        y = self.first(x).relu()
        if self.path == "rows":
            return self.head(self.cut(self.rows(self.flat(y.mean((2, 3))))))
        if self.path in ("turned", "scaled"):
            z = self.flat(y.permute(0, 2, 3, 1))
            z = z.permute(0, 3, 1, 2) if self.path == "turned" else (z * self.scale).permute(0, 3, 1, 2)
            return self.head(self.cut(z).mean((2, 3)))
        beside = self.beside(x)
        z = self.bare(y)
        if self.path != "bare":
            z = self.norm(z)
        if self.path == "sum":
            z = beside + z
        return self.head(self.cut(z).mean((2, 3)))


def images(seed, count=200, side=8, size=1.0):
    """Smooth ones, of which what is left of a layer tells most of what is lost."""
    small = size * torch.randn(count, 3, 2, 2, generator=torch.Generator().manual_seed(seed))
    return F.interpolate(small, side, mode="bilinear")


def made_of(path, cut="relu", count=200, side=8, size=1.0):
    torch.manual_seed(0)
    model = Net(path, {**CUTS, **CURVES}[cut]).eval()
    with torch.no_grad():
        for norm in (model.norm, model.rows):
            norm.weight.copy_(torch.tensor([1.0, -2.0, 0.5, 3.0, 1.5, -1.0] * 2))
            norm.bias.normal_(std=0.3)
            norm.running_var.uniform_(0.1, 0.5)
            norm.running_mean.normal_(std=0.3)
    x = images(1, count, side, size)
    captured = capture(model, (x[:2],))
    analysis = analyse(captured)
    removed = {c.name: torch.zeros(c.size, dtype=torch.bool).numpy() for c in analysis.clusters}
    (cluster,) = (c for c in analysis.clusters if c.size in (8, 16))  # in two groups, a channel of each goes at a time
    removed[cluster.name][: 6 * cluster.size // 16] = True
    return captured, {n: torch.from_numpy(m) for n, m in analysis.masks(removed).items()}, x


@pytest.mark.parametrize(
    ("path", "cut"), [*((path, "relu") for path in PATHS), *(("norm", cut) for cut in CUTS), ("sum", "relu in place")]
)
def test_a_value_that_moves_by_its_room_is_about_to_get_through(path, cut, monkeypatch):
    captured, masks, x = made_of(path, cut)
    seen, found = [], behind.behind

    def watched(node, dense, networks):
        made = found(node, dense, networks)
        if made is not None and node.target is not torch.ops.aten.batch_norm.default:
            last = dense[0].shape[-1] == 12
            rows = (lambda value: value) if last else lambda value: value.movedim(1, -1)
            moves = []
            for at, value in enumerate(dense):
                facts = made.facts(at, lambda value: rows(value).flatten(0, -2))
                room = facts[..., 0].reshape(rows(value).shape)
                moves.append(room if last else room.movedim(-1, 1))
            gates = []
            for by in (0.0, 0.99, 1.01):
                shifted = [value + by * room for value, room in zip(dense, moves, strict=True)]
                gates.append(through(made, node, shifted, networks))
            seen.append((torch.cat(moves), gates))
        return made

    watch(monkeypatch, watched)
    recover(captured, masks, (x,))
    assert seen
    for room, (dense, nearly, beyond) in seen:
        assert (room != 0).float().mean() > 0.1
        assert torch.equal(dense, nearly)
        # Next to the cut, rounding hides the hundredth.
        assert (room.abs() > 1e-4).sum() <= (dense != beyond).sum() <= (room != 0).sum()


def through(made, node, values, networks):
    """What the activation gives in the dense network for other values of `node`."""
    while True:
        (user,) = node.users
        given = []
        for at, value in enumerate(values):
            args = {
                s: networks.values[s][0][at].clone() if s in networks.values else networks.fixed[s][0]
                for s in user.all_input_nodes
                if s is not node
            }
            given.append(networks.call(user, {**args, node: value.clone()}))
        node, values = user, given
        if node is made.activation:
            return torch.cat(values)


def watch(monkeypatch, found):
    for reader in (one_reader, shifts):
        monkeypatch.setattr(reader, "behind", found)


@pytest.mark.parametrize(
    ("path", "curve"),
    [*((path, "silu") for path in PATHS), *(("norm", curve) for curve in CURVES), ("sum", "silu in place")],
)
def test_the_gap_is_what_differs_behind_a_smooth_activation(path, curve, monkeypatch):
    captured, masks, x = made_of(path, curve)
    seen, found = [], behind.behind
    draw = torch.Generator().manual_seed(5)

    def watched(node, dense, networks):
        made = found(node, dense, networks)
        if made is None or made.limits is not None:
            return made
        last = dense[0].shape[-1] == 12
        off = torch.randn(dense[0].shape, generator=draw)

        def rows(value):
            return (value if last else value.movedim(1, -1)).flatten(0, -2)

        shown = made.shown(made.facts(0, rows))
        gap, slope = shown.gap_and_slope(rows(off))
        there, moved, nearby = (
            through(made, node, [value, *dense[1:]], networks)[: len(off)]
            for value in (dense[0], dense[0] + off, dense[0] + off + STEP)
        )
        unit = torch.ones_like(gap) if shown.unit is None else shown.unit
        differs, changes = (unit * one.movedim(1, -1).reshape(gap.shape) for one in (moved - there, nearby - moved))
        seen.append((gap, differs, slope, changes / STEP))
        return made

    watch(monkeypatch, watched)
    recover(captured, masks, (x,))
    assert seen
    for gap, differs, slope, changes in seen:
        assert gap.abs().mean() > 0.01
        torch.testing.assert_close(gap, differs, atol=1e-4, rtol=1e-4)
        assert float((slope - changes).abs().median()) < 5e-3


@pytest.mark.parametrize(("activation", "size"), [("relu", 1.0), ("sigmoid", 6.0)])  # flat far from 0 only
@pytest.mark.parametrize("path", PATHS)
def test_less_is_lost_behind_an_activation_than_by_a_fit_that_does_not_know_it(path, activation, size, monkeypatch):
    captured, masks, x = made_of(path, activation, size=size)
    other, lost = images(2, size=size), []
    for known in (True, False):
        if not known:
            watch(monkeypatch, lambda *_: None)
        pruned = captured.with_state(recover(captured, masks, (x,)).state).fold(masks)
        with torch.no_grad():
            lost.append(float((shown_of(captured, other) - shown_of(pruned, other)).square().sum()))
    assert lost[0] < 0.995 * lost[1], lost


def shown_of(captured, x):
    """What the last activation gives."""
    found = []
    execute(
        captured.program.graph,
        feeds_of(captured.program, (x,), captured.state),
        watch=lambda node, value: found.append(value) if node.target in LAST else None,
    )
    return found[-1]


@pytest.mark.parametrize(("activation", "far"), [("relu", 0.05), ("gelu", 0.1)])
@pytest.mark.parametrize("intercept", [True, False])
def test_the_fit_is_the_best_of_all_weights_by_what_shows(intercept, activation, far, monkeypatch):
    monkeypatch.setattr(regression, "STRENGTHS", (1e-3,))
    rows, columns = 400, 10
    draw = torch.Generator().manual_seed(3)
    x = torch.randn(rows, 1, columns, generator=draw)
    y = torch.einsum("rgc,goc->rgo", x, torch.randn(1, 4, columns, generator=draw)) - 0.5
    y = y + torch.randn(rows, 1, 4, generator=draw)
    if activation == "gelu":  # noise where it does not show
        y = torch.where(y < -2, 2 * y * torch.rand(y.shape, generator=draw), y)
    old = 0.3 * torch.randn(1, 4, columns, generator=draw)
    held = torch.arange(rows) % 5 == 0
    room = (-y).clamp_min(0.0)
    shown = Cut.of(room) if activation == "relu" else Curved.of(F.gelu, y)
    made = regression.fit(x, y, old, held, intercept=intercept, shown=shown)
    assert made.error_after < made.error_before
    # The same by a general method, on the loss itself.
    moments = (x - x.mean(0)) if intercept else x
    load = made.strength * float(moments.square().sum()) / columns
    weight, bias = old.double().clone().requires_grad_(), torch.zeros(1, 4, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=400, tolerance_grad=1e-9, line_search_fn="strong_wolfe")

    def loss(weight, bias):
        off = torch.einsum("rgc,goc->rgo", x.double(), weight) + (bias if intercept else 0.0) - y
        if activation == "relu":
            off = off - torch.minimum(off, room) * (room > 0)
        else:
            off = F.gelu(y + off) - F.gelu(y.double())
        return off.square().sum() + load * (weight - old).square().sum()

    def closure():
        optimizer.zero_grad()
        value = loss(weight, bias)
        value.backward()
        return value

    optimizer.step(closure)
    plain = regression.fit(x, y, old, held, intercept=intercept)
    best, ours, linear = (
        float(loss(w.double(), b if b is not None else torch.zeros(1, 4)))
        for w, b in ((weight, bias), (made.weight, made.bias), (plain.weight, plain.bias))
    )
    assert best <= ours
    assert ours - best < far * (linear - best)


def test_old_weights_that_are_better_than_any_linear_fit_are_still_fitted_to_what_gets_through(monkeypatch):
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(300, 1, 12, generator=draw)
    weight = torch.randn(1, 4, 12, generator=draw)
    y = torch.einsum("rgc,goc->rgo", x, weight) + 0.01 * torch.randn(300, 1, 4, generator=draw)
    old = weight + 0.1 * torch.randn(weight.shape, generator=draw)
    y = torch.where(y < 0, 20 * y * torch.rand(y.shape, generator=draw), y)  # behind a ReLU, noise that nobody sees
    held, shown = torch.arange(300) % 5 == 0, Cut.of((-y).clamp_min(0.0))
    made = regression.fit(x, y, old, held, intercept=False, shown=shown)
    assert made.error_after < 0.6 * made.error_before
    monkeypatch.setattr(regression, "TURNS", 0)  # the linear fits alone
    assert regression.fit(x, y, old, held, intercept=False, shown=shown).strength == 0


def test_a_cut_that_leaves_nothing_free_changes_nothing():
    draw = torch.Generator().manual_seed(3)
    x, y, old = (torch.randn(size, generator=draw) for size in ((100, 1, 6), (100, 1, 3), (1, 3, 6)))
    held = torch.arange(100) % 5 == 0
    plain, free = (
        regression.fit(x, y, old, held, intercept=True, shown=shown) for shown in (None, Cut.of(torch.zeros_like(y)))
    )
    torch.testing.assert_close(free.weight, plain.weight)
    torch.testing.assert_close(free.bias, plain.bias)


def test_the_shift_of_a_norm_is_the_best_by_what_gets_through(monkeypatch):
    captured, masks, x = made_of("norm")
    monkeypatch.setattr(one_reader, "fit", lambda *_: [])  # the norm alone has to mend it
    found, shift = [], shifts._by_what_shows

    def lost(wanted, pruned, by):
        """By the loss that fits take: what gets through in the dense network counts on both sides of the cut."""
        off = [b + by.reshape(-1, 1, 1) - a for a, b in zip(wanted, pruned, strict=True)]
        free = [torch.minimum(o, -a) * (a < 0) for a, o in zip(wanted, off, strict=True)]
        return torch.stack([(o - f).square().sum((0, 2, 3)) for o, f in zip(off, free, strict=True)]).sum(0)

    def watched(name, lack, after, wanted, pruned, networks):
        made = shift(name, lack, after, wanted, pruned, networks)
        found.append([lost(wanted, pruned, by) for by in (made, lack, made + 0.05, made - 0.05)])
        return made

    monkeypatch.setattr(shifts, "_by_what_shows", watched)
    recover(captured, masks, (x,))
    ((best, plain, more, less),) = found
    assert float(best.sum()) < 0.9 * float(plain.sum())
    assert bool((best <= torch.minimum(more, less)).all())


def test_another_side_that_is_not_finite_leaves_the_fit_as_it_would_be_without_a_cut(monkeypatch):
    captured, masks, x = made_of("sum")
    found = behind.Behind.facts
    monkeypatch.setattr(behind.Behind, "facts", lambda *given: found(*given) * float("nan"))
    monkeypatch.setattr(shifts, "_by_what_shows", lambda name, lack, *_: lack)
    broken = recover(captured, masks, (x,))
    watch(monkeypatch, lambda *_: None)
    plain = recover(captured, masks, (x,))
    assert all(torch.equal(broken.state[name], value) for name, value in plain.state.items())
