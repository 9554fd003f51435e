"""The table of cards: complete, true to PyTorch, and the only place that names operators."""

from __future__ import annotations

import ast
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import fx

import pipeline.channels
from foundation.editor import asserts
from pipeline.channels.operators import CARDS, TAGGED, Card
from pipeline.channels.operators.table import base_name, draws, find, kind_of, register

aten = torch.ops.aten


def overloads(name: str) -> list[Any]:
    """The operators that the table calls `name`, those that write in place included."""
    packets = [getattr(aten, n, None) for n in (name, f"{name}_")]
    return [getattr(p, o) for p in packets if p is not None and hasattr(p, "overloads") for o in p.overloads()]


def call(target: Any, *args: Any) -> fx.Node:
    """A node of `target`; tensors among `args` become placeholders that know their values."""
    graph = fx.Graph()

    def operand(k: int, a: Any) -> Any:
        if not isinstance(a, torch.Tensor):
            return a
        node = graph.placeholder(f"x{k}")
        node.meta["val"] = a
        return node

    node = graph.call_function(target, tuple(operand(k, a) for k, a in enumerate(args)))
    node.meta["val"] = target(*args)
    return node


@pytest.mark.parametrize("name", CARDS)
def test_every_name_is_an_operator_of_pytorch(name: str) -> None:
    assert overloads(name)
    assert all(find(o) is CARDS[name] for o in overloads(name) if base_name(o) == name)


def test_a_name_has_one_card() -> None:
    with pytest.raises(ValueError, match="two cards for linear"):
        register(Card("pointwise"), "linear")


# Contractions whose weight is not always one and the same argument, or not one that a bias could stand beside.
NO_FIXED_WEIGHT = {"convolution", "bilinear", "einsum", "bmm", "mv", "dot", "addbmm", "baddbmm", "addmv", "cdist"}


@pytest.mark.parametrize("name", [n for n, c in CARDS.items() if c.kind == "contraction"])
def test_a_contraction_has_all_its_facts(name: str) -> None:
    card = CARDS[name]
    assert card.relate and card.depends and card.macs
    assert (card.weighted is None and card.matrices is None) == (name in NO_FIXED_WEIGHT)
    if card.weighted is not None and card.weighted.windows:
        assert card.edit, "groups are written in a constant"


IMAGES = {"conv1d": (2, 4, 7), "conv2d": (2, 4, 7, 6), "conv3d": (2, 4, 5, 6, 4)}


def operands(name: str) -> tuple[torch.Tensor, torch.Tensor]:
    """An activation with 4 channels and a weight with 5 outputs."""
    if name == "linear":
        return torch.randn(2, 3, 4), torch.randn(5, 4)
    if name == "embedding":
        return torch.randint(0, 4, (2, 3)), torch.randn(4, 5)
    x = torch.randn(IMAGES[name.replace("_transpose", "")])
    lead = (4, 5) if "transpose" in name else (5, 4)
    return x, torch.randn(*lead, *[2] * (x.dim() - 2))


@pytest.mark.parametrize("name", [n for n, c in CARDS.items() if c.weighted is not None])
def test_channels_are_in_the_dimensions_that_the_card_names(name: str) -> None:
    weighted = CARDS[name].weighted
    assert weighted is not None
    x, w = operands(name)
    by_name = {weighted.input: x, weighted.weight: w}
    target = next(o for o in overloads(name) if {a.name for a in o._schema.arguments} >= set(by_name))
    y = target(**by_name)
    silent = w.clone()
    silent.select(weighted.weight_out, 2).zero_()
    changed = (target(**{**by_name, weighted.weight: silent}) != y).movedim(weighted.output_dim, 0).flatten(1).any(1)
    assert changed.tolist() == [k == 2 for k in range(5)]
    if weighted.input_dim is not None:
        deaf = w.clone()
        deaf.select(weighted.weight_in, 1).zero_()
        loud = x.clone()
        loud.select(weighted.input_dim, 1).fill_(1e3)
        one, other = (target(**{weighted.input: v, weighted.weight: deaf}) for v in (x, loud))
        assert torch.equal(one, other) and not torch.equal(target(**{**by_name, weighted.input: loud}), y)


PERMUTED = {
    "permute": ([2, 0, 1],), "permute_copy": ([1, 2, 0],), "transpose": (0, -1), "swapaxes": (-2, 0),
    "swapdims": (1, 2), "movedim": (0, -1), "moveaxis": ([0, 1], [2, 0]), "mT": (), "matrix_H": (), "adjoint": (),
    "mH": (), "t": (), "numpy_T": (),
}  # fmt: skip


@pytest.mark.parametrize("name", [n for n, c in CARDS.items() if c.order is not None])
def test_the_order_of_a_permutation_is_what_the_operator_does(name: str) -> None:
    order = CARDS[name].order
    assert order is not None
    x = torch.randn(2, 3) if name in ("t", "numpy_T", "matrix_H") else torch.randn(2, 3, 4)
    y = None
    for target in overloads(name):
        if target._schema.is_mutable:
            continue
        try:
            y = target(x, *PERMUTED[name])
        except (RuntimeError, TypeError):
            continue  # an overload with other arguments
        got = order(call(target, x, *PERMUTED[name]), x.dim())
        assert torch.equal(y, aten.permute.default(x, got))
    assert y is not None


@pytest.mark.parametrize("name", [n for n, c in CARDS.items() if c.training is not None])
def test_the_training_switch_is_an_argument(name: str) -> None:
    assert all(CARDS[name].training in {a.name for a in o._schema.arguments} for o in overloads(name))


def test_what_draws_random_numbers() -> None:
    x = torch.rand(3)
    for target, args in [
        (aten.rand_like.default, (x,)), (aten.rand.default, ([3],)), (aten.bernoulli.default, (x,)),
        (aten.multinomial.default, (x, 2)), (aten.normal_.default, (x.clone(),)), (aten.randperm.default, (3,)),
        (aten.uniform_.default, (x.clone(),)), (aten.dropout.default, (x, 0.5, True)),
    ]:  # fmt: skip
        assert draws(call(target, *args)), target
    for target, args in [
        (aten.dropout.default, (x, 0.5, False)), (aten.zeros_like.default, (x,)), (aten.relu.default, (x,)),
        (aten.scaled_dot_product_attention.default, (x.view(1, 1, 3),) * 3), (aten.empty_like.default, (x,)),
    ]:  # fmt: skip
        assert not draws(call(target, *args)), target


def test_an_operator_without_a_card_of_its_own_has_that_of_its_tag() -> None:
    assert "gelu" not in CARDS
    assert find(aten.gelu.default) is TAGGED[torch.Tag.pointwise] is find(aten.relu_.default)
    assert (
        find(aten.cross.default) is None and kind_of(call(aten.cross.default, torch.ones(2, 3), torch.ones(2, 3))) == ""
    )


def test_the_editor_knows_the_same_assertions() -> None:
    """It stands below the cards, and so has a list of its own."""
    graph = fx.Graph()
    for name in torch._C._dispatch_get_all_op_names():
        if name.startswith("aten::"):
            packet, _, overload = name.removeprefix("aten::").partition(".")
            node = graph.call_function(getattr(getattr(aten, packet), overload or "default"))
            assert asserts(node) == (kind_of(node) == "assertion"), name


def named(node: ast.AST) -> int:
    """How many operators an expression names: in a list, or by what their names begin with."""
    if isinstance(node, (ast.Tuple, ast.List, ast.Set)):
        entries: list[Any] = node.elts
    elif isinstance(node, ast.Dict):
        entries = node.keys
    else:
        part: Any = None
        if isinstance(node, ast.Compare) and isinstance(node.ops[0], (ast.In, ast.NotIn)):
            part = node.left
        elif isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "startswith":
            part = node.args[0]
        text = getattr(part, "value", None)
        return sum(n.startswith(text) for n in CARDS) if isinstance(text, str) and len(text) > 2 else 0
    return sum(isinstance(e, ast.Constant) and e.value in CARDS for e in entries)


@pytest.mark.parametrize(
    ("code", "count"),
    [
        ("x in ('linear', 'embedding')", 2), ("{'view': 1, 'reshape': 2}", 2), ("'bias' in bind(node)", 0),
        ("'conv' in name", 7), ("name.startswith('sym_size')", 1), ("name == 'linear'", 0),
    ],
)  # fmt: skip
def test_names_of_operators_are_seen(code: str, count: int) -> None:
    assert max(map(named, ast.walk(ast.parse(code)))) == count


def test_no_pass_holds_a_list_of_operators() -> None:
    root = Path(pipeline.channels.__file__).parent
    found = set()
    for path in root.rglob("*.py"):
        name = path.relative_to(root).as_posix()
        if not name.startswith("operators/"):
            found.update(name for node in ast.walk(ast.parse(path.read_text())) if named(node) > 1)
    assert not found
