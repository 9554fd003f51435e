"""A residual branch that adds nothing goes as a whole: the addition, and all that led to its zero side."""

import copy

import pytest
import torch
from torch import nn

from pipeline.channels import analyse, capture, count_macs, liveness, prove, shrink
from pipeline.channels.dead.branches import without_zero_branches
from pipeline.channels.ledger import Ledger
from pipeline.channels.operators.trace import Policy


class Block(nn.Module):
    """One residual block; `form` says how the branch ends and how it is added."""

    def __init__(self, form):
        super().__init__()
        self.form = form
        self.a, self.b = nn.Conv2d(8, 12, 3, padding=1), nn.Conv2d(12, 8, 3, padding=1, bias="bias" in form)
        self.norm = nn.BatchNorm2d(8) if "norm" in form else nn.Identity()
        self.scale = nn.Parameter(torch.ones(8, 1, 1)) if "scale" in form else None

    def forward(self, x):
        y = self.norm(self.b(self.a(x).relu_()))
        if self.scale is not None:
            y = y * self.scale
        if "written" in self.form:
            y += x
            return torch.relu_(y)
        return (x + y if "left" in self.form else y + x).relu()

    def last(self):
        """The tensors that make the branch zero."""
        if self.scale is not None:
            return [self.scale]
        if isinstance(self.norm, nn.BatchNorm2d):
            return [self.norm.weight, self.norm.bias]
        return [self.b.weight] + ([self.b.bias] if self.b.bias is not None else [])


class Net(nn.Module):
    def __init__(self, form, count=3):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.blocks = nn.Sequential(*(Block(form) for _ in range(count)))
        self.head = nn.Linear(8, 5)

    def forward(self, x):
        return self.head(self.blocks(self.stem(x).relu_()).mean((2, 3)))


FORMS = ["norm", "norm left", "norm written", "plain", "bias", "bias written", "scale", "scale norm written"]


def made(form, zero):
    torch.manual_seed(0)
    model = Net(form).eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_mean), nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.uniform_(module.bias)
    with torch.no_grad():
        for at in zero:
            for tensor in model.blocks[at].last():
                tensor.zero_()
    return model


def cut(model):
    captured = capture(model, (torch.randn(2, 3, 8, 8),))
    left, branches = without_zero_branches(captured, Policy())
    analysis = analyse(left)
    return captured, branches, shrink(left, analysis, liveness(analysis, left.state).dead)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("zero", [(1,), (0, 1), (0, 1, 2)])
def test_branches_that_add_nothing_are_gone_and_the_outputs_are_the_same(form, zero):
    model = made(form, zero)
    captured, branches, small = cut(model)
    assert len(branches) == len(zero)
    for at, branch in zip(zero, branches, strict=True):
        assert all(name.startswith(f"blocks.{at}.") for name in branch.tensors)
        assert {f"blocks.{at}.a.weight", f"blocks.{at}.b.weight"} <= set(branch.tensors)
    block = 2 * 8 * 12 * 9 * 64
    assert count_macs(captured.program) - count_macs(small.program) == len(zero) * block
    x = torch.randn(3, 3, 8, 8)
    assert torch.equal(model(x), small(x)) or (model(x) - small(x)).abs().max() < 1e-6
    prove(captured, small, [(x,)])


@pytest.mark.parametrize("form", FORMS)
def test_a_branch_that_adds_anything_stays(form):
    model = made(form, ())
    with torch.no_grad():
        for tensor in model.blocks[1].last():
            tensor.zero_()
        model.blocks[1].last()[0].view(-1)[3] = 1e-30
    _, branches, _ = cut(model)
    assert branches == ()


class Twice(nn.Module):
    """What goes on is written to behind the addition, and read before that by another layer."""

    def __init__(self):
        super().__init__()
        self.stem, self.branch, self.skip = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x):
        x = self.stem(x)
        y = torch.relu_(x + self.branch(x))
        return y, self.skip(x)


def test_what_goes_on_is_not_written_to_where_another_layer_reads_it():
    torch.manual_seed(0)
    model = Twice().eval()
    with torch.no_grad():
        model.branch.weight.zero_(), model.branch.bias.zero_()
    captured = capture(model, (torch.randn(2, 6),))
    left, branches = without_zero_branches(captured, Policy())
    assert len(branches) == 1
    x = torch.randn(4, 6)
    for mine, theirs in zip(left(x), model(x), strict=True):
        assert torch.equal(mine, theirs)


class Sums(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 1)

    def forward(self, x):
        a, b = self.a(x), self.b(x)
        return torch.add(b, a, alpha=3), self.c(x) + a


@pytest.mark.parametrize(("zero", "count"), [("a", 1), ("b", 0)])
def test_a_side_that_is_not_the_sum_itself_does_not_stand_for_it(zero, count):
    """Three times a is what is left without b, and c has another shape than the sum."""
    torch.manual_seed(0)
    model = Sums().eval()
    with torch.no_grad():
        layer = model.get_submodule(zero)
        layer.weight.zero_(), layer.bias.zero_()
    x = torch.randn(4, 6)
    left, branches = without_zero_branches(capture(model, (x,)), Policy())
    assert len(branches) == count
    for mine, theirs in zip(left(x), model(x), strict=True):
        assert torch.equal(mine, theirs)


def test_the_ledger_tells_of_branches_and_cuts_a_dense_checkpoint_the_same_way():
    model = made("plain", (1,))
    captured = capture(model, (torch.randn(2, 3, 8, 8),))
    analysis = analyse(captured)
    whole = shrink(captured, analysis, liveness(analysis, captured.state).dead)
    left, branches = without_zero_branches(captured, Policy())
    analysis = analyse(left)
    small = shrink(left, analysis, liveness(analysis, left.state).dead)
    ledger = small.ledger.with_branches(whole.ledger, branches, {"blocks.1.a": 12})
    assert Ledger.from_json(ledger.to_json()) == ledger
    state = ledger.shrink_state(model.state_dict())
    assert {name: tuple(v.shape) for name, v in state.items()} == {
        name: tuple(v.shape) for name, v in small.program.state_dict.items()
    }
    again = copy.deepcopy(model)
    again.load_state_dict({**model.state_dict(), **ledger.restore_state(state)})
    x = torch.randn(2, 3, 8, 8)
    assert torch.allclose(again.eval()(x), model(x), atol=1e-6)
    assert "blocks.1.a" in ledger.groups and len(ledger.groups["blocks.1.a"]) == 12
