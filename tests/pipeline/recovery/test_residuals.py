"""The last layer of a residual branch makes up for what the other side of its addition has lost."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from pipeline.channels.coupling.analyse import analyse
from pipeline.channels.program.capture import capture
from pipeline.channels.program.execute import execute, feeds_of
from pipeline.recovery import residuals
from pipeline.recovery.closed_form import recover


class Net(nn.Module):
    """A narrow first layer whose channels go, so that the stream behind it lacks something, and two branches."""

    def __init__(self, end):
        super().__init__()
        self.first, self.stream = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 8, 1)
        self.a = nn.ModuleList(nn.Conv2d(8, 24, 3, padding=1) for _ in range(2))
        self.b = nn.ModuleList(nn.Conv2d(24, 8, 1, bias=False) for _ in range(2))
        self.norm = nn.ModuleList(nn.BatchNorm2d(8) for _ in range(2))
        self.wide = nn.ModuleList(nn.Linear(24, 8) for _ in range(2))
        self.scale = nn.ParameterList(
            nn.Parameter(torch.tensor([1.0, -2.0, 0.5, 3.0, 1.5, -1.0, 0.7, 2.0])) for _ in "ab"
        )
        self.head = nn.Linear(8, 5)
        self.end = end

    def branch(self, x, i):
        x = self.a[i](x).relu()
        if self.end == "norm":
            return self.norm[i](self.b[i](x))
        if self.end == "scaled":  # as in ConvNeXt
            return (self.wide[i](x.permute(0, 2, 3, 1)) * self.scale[i]).permute(0, 3, 1, 2)
        if self.end == "windows":  # as in Swin: rolled, cut into windows and put together again
            y = self.wide[i](x.roll((-1, -1), (2, 3)).permute(0, 2, 3, 1).unflatten(2, (2, 4)).transpose(1, 2))
            y = y.transpose(1, 2).reshape(-1, 8, 8, 8).roll((1, 1), (1, 2))[:, :8, :8]
            return y.contiguous().permute(0, 3, 1, 2)
        if self.end in ("dropped", "noisy", "dropped in place"):
            return F.dropout(self.b[i](x), 0.5, training=self.end == "noisy", inplace=self.end == "dropped in place")
        return self.b[i](x)

    def forward(self, x):
        x = self.stream(self.first(x).relu())
        for i in range(2):
            if self.end == "in place":
                y = self.branch(x, i)
                y += x
                x = y
            elif self.end in ("written", "written in part"):  # the stream is another one by the time of the addition
                y = self.branch(x, i)
                (x if self.end == "written" else x[:, :4]).mul_(0.5)
                x = x + y
            elif self.end == "other later":  # the branch is known before the other side is
                y = self.branch(x, i)
                x = self.head.weight.sum() * x + y
            else:
                x = x + self.branch(x, i)
        return self.head(x.mean((2, 3)))


ENDS = ["plain", "norm", "scaled", "dropped", "dropped in place", "in place", "windows"]


def made_of(end):
    torch.manual_seed(0)
    model = Net(end).eval()
    with torch.no_grad():
        for norm in model.norm:
            norm.weight.copy_(torch.tensor([1.0, -2.0, 0.5, 3.0, 1.5, -1.0, 0.7, 2.0]))
            norm.running_var.uniform_(0.5, 1.5)
            norm.running_mean.normal_()
    # Images of one colour each, so that what is left of a position tells what is lost there.
    x = torch.randn(200, 3, 1, 1, generator=torch.Generator().manual_seed(1)).repeat(1, 1, 8, 8)
    captured = capture(model, (x[:2],))
    analysis = analyse(captured)
    (cluster,) = (c for c in analysis.clusters if c.size == 16)
    removed = {c.name: torch.zeros(c.size, dtype=torch.bool).numpy() for c in analysis.clusters}
    removed[cluster.name][:6] = True
    return captured, {n: torch.from_numpy(m) for n, m in analysis.masks(removed).items()}, x


def values(captured, x):
    """Node name -> value."""
    found = {}
    execute(
        captured.program.graph,
        feeds_of(captured.program, (x,), captured.state),
        watch=lambda node, value: found.update({node.name: value.clone()}) if isinstance(value, torch.Tensor) else None,
    )
    return found


@pytest.mark.parametrize("end", ENDS)
def test_what_a_branch_is_fitted_to_makes_the_sum_that_of_the_dense_network(end, monkeypatch):
    captured, masks, x = made_of(end)
    seen, wanted = {}, residuals.wanted

    def watched(node, dense, networks):
        found = wanted(node, dense, networks)
        if found is not dense:
            seen[node.name] = torch.cat(list(found))
        return found

    monkeypatch.setattr(residuals, "wanted", watched)
    made = recover(captured, masks, (x,))
    dense = values(captured, x)
    pruned = values(captured.with_state(made.state).fold(masks), x)
    nodes = {node.name: node for node in captured.program.graph.nodes}
    checked = 0
    for name, target in seen.items():
        node = nodes[name]
        held = {n.name: pruned[n.name] for n in captured.program.graph.nodes if n.op == "placeholder"}
        value = target
        while len(node.users) == 1:
            (user,) = node.users
            if user.target in residuals.ADDITIONS:
                (other,) = (a for a in user.args if a is not node)
                off = value + pruned[other.name] - dense[user.name]
                if end == "norm":  # its shift has been mended since, by a constant for each channel
                    off -= off.mean((0, 2, 3), keepdim=True)
                assert off.abs().max() < 1e-3
                checked += 1
                break
            read = held | {node.name: value}
            value, node = user.target(*torch.fx.node.map_arg(user.args, lambda a, read=read: read[a.name])), user
    assert checked >= 2 and checked == len(seen)


@pytest.mark.parametrize("end", ENDS)
def test_what_arrives_at_the_head_is_nearer_for_it_on_the_samples_held_back(end, monkeypatch):
    captured, masks, x = made_of(end)

    def left():
        """Of what the head gives by its old weights."""
        return next(one.error_before for one in recover(captured, masks, (x,)).fitted if one.name == "head.weight")

    with_it = left()
    monkeypatch.setattr(residuals, "wanted", lambda node, dense, networks: dense)
    assert with_it < 0.8 * left()


@pytest.mark.parametrize("end", ["other later", "written", "written in part", "noisy"])
def test_a_side_that_comes_later_or_is_written_to_is_not_made_up_for_nor_through_noise(end, monkeypatch):
    captured, masks, x = made_of(end)
    seen, wanted = [], residuals.wanted
    monkeypatch.setattr(
        residuals, "wanted", lambda node, dense, networks: seen.append(wanted(node, dense, networks) is dense) or dense
    )
    recover(captured, masks, (x,))
    assert seen and all(seen)


def test_nothing_is_given_through_a_scale_that_is_next_to_nothing():
    assert residuals._inverse(torch.tensor([2.0, 1e-9, -0.5, 0.0])).tolist() == [0.5, 0.0, -2.0, 0.0]
