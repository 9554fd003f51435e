"""What a card says of its output's dependence, against the operator itself with other numbers put in.

Never too bold: an element that moves is marked. Not too cautious either, where nothing is left to chance.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, fx

from pipeline.channels.operators import CARDS, TAGGED
from pipeline.channels.operators.masks import Masks, NoAnswer, parts
from pipeline.channels.operators.table import find

aten = torch.ops.aten


@dataclass
class Operand:
    """A tensor of which the elements in `depends` depend on the input."""

    value: Tensor
    depends: Tensor


def some(*shape: int, share: float = 0.3) -> Operand:
    """An activation, part of which depends, and part of the rest is zero."""
    depends = torch.rand(shape) < share
    value = torch.randn(shape, dtype=torch.float64)
    return Operand(torch.where(~depends & (torch.rand(shape) < 0.4), 0.0, value), depends)


def weight(*shape: int) -> Operand:
    """Numbers that do not depend, with zeros among them."""
    value = torch.randn(shape, dtype=torch.float64) * (torch.rand(shape) > 0.4)
    return Operand(value, torch.zeros(shape, dtype=torch.bool))


def known(value: Tensor) -> Operand:
    return Operand(value, torch.zeros(value.shape, dtype=torch.bool))


def one_channel(*shape: int) -> Operand:
    """An activation whose first index of dimension 1 depends everywhere, and nothing else."""
    depends = torch.zeros(shape, dtype=torch.bool)
    depends[:, 0] = True
    return Operand(torch.randn(shape, dtype=torch.float64), depends)


EXACT: dict[str, Callable[[], tuple[Any, ...]]] = {
    "linear": lambda: (aten.linear.default, some(2, 3, 4), weight(5, 4), weight(5)),
    "conv2d": lambda: (aten.conv2d.default, some(1, 4, 5, 5, share=0.1), weight(6, 2, 2, 2), weight(6), [1, 1], [1, 1],
                       [1, 1], 2),
    "conv_transpose2d": lambda: (aten.conv_transpose2d.input, some(1, 3, 4, 4, share=0.1), weight(3, 5, 2, 2)),
    "matmul": lambda: (aten.matmul.default, some(2, 3, 4), some(2, 4, 5)),
    "addmm": lambda: (aten.addmm.default, some(3, 5, share=0.1), some(3, 4), weight(4, 5)),
    "baddbmm": lambda: (aten.baddbmm.default, some(2, 3, 5, share=0.1), some(2, 3, 4), some(2, 4, 5)),
    "einsum": lambda: (aten.einsum.default, "bic,oc->bio", [some(2, 3, 4), weight(5, 4)]),
    "bilinear": lambda: (aten.bilinear.default, some(2, 4), some(2, 3), weight(5, 4, 3), weight(5)),
    "cdist": lambda: (aten.cdist.default, some(2, 3, 4, share=0.1), some(2, 5, 4, share=0.1)),
    "mul": lambda: (aten.mul.Tensor, some(2, 3, 4), some(3, 1)),
    "add": lambda: (aten.add.Tensor, some(2, 3, 4), some(3, 1)),
    "batch_norm": lambda: (aten.batch_norm.default, some(2, 4, 3), weight(4), weight(4), known(torch.zeros(4).double()),
                           known(torch.ones(4).double()), False, 0.1, 1e-5, False),
    "batch_norm that measures": lambda: (aten.batch_norm.default, one_channel(3, 4, 3), weight(4), weight(4),
                                         None, None, True, 0.1, 1e-5, False),
    "instance_norm": lambda: (aten.instance_norm.default, one_channel(2, 4, 5), weight(4), weight(4), None, None, True,
                              0.1, 1e-5, False),
    "layer_norm": lambda: (aten.layer_norm.default, one_channel(2, 3, 4), [4], weight(4), weight(4)),
    "rms_norm": lambda: (aten.rms_norm.default, one_channel(2, 3, 4), [4], weight(4)),
    "group_norm": lambda: (aten.group_norm.default, one_channel(2, 4, 5), 2, weight(4), weight(4)),
    "softmax": lambda: (aten.softmax.int, some(2, 3, 4, share=0.1), 1),
    "mean": lambda: (aten.mean.dim, some(2, 3, 4), [1], True),
    "clone": lambda: (aten.clone.default, some(2, 3)),
    "avg_pool2d": lambda: (aten.avg_pool2d.default, some(1, 3, 6, 6, share=0.1), [2, 2]),
    "upsample_bilinear2d": lambda: (aten.upsample_bilinear2d.default, some(1, 2, 3, 3, share=0.1), [6, 6], False),
    "cat": lambda: (aten.cat.default, [some(2, 3), some(2, 4)], 1),
    "slice": lambda: (aten.slice.Tensor, some(2, 6), 1, 1, 5, 2),
    "gather": lambda: (aten.gather.default, some(2, 6, 3), 1, known(torch.randint(0, 6, (2, 4, 3)))),
    "index_select": lambda: (aten.index_select.default, some(2, 6), 1, known(torch.tensor([4, 0, 0]))),
    "pad": lambda: (aten.pad.default, some(2, 3), [1, 2]),
    "channel_shuffle": lambda: (aten.channel_shuffle.default, some(1, 6, 2, 2), 2),
    "permute": lambda: (aten.permute.default, some(2, 3, 4), [2, 0, 1]),
    "view": lambda: (aten.view.default, some(2, 3, 4), [6, 4]),
    "embedding": lambda: (aten.embedding.default, Operand(torch.randn(5, 3).double() * torch.tensor([1.0, 0, 1]),
                          torch.zeros(5, 3, dtype=torch.bool)), Operand(torch.tensor([[0, 4]]), torch.ones(1, 2) > 0)),
}  # fmt: skip
CAUTIOUS: dict[str, Callable[[], tuple[Any, ...]]] = {
    "amax": lambda: (aten.amax.default, some(2, 3, 4), [1]),
    "maximum of two": lambda: (aten.max.other, some(2, 3), some(2, 3)),
    "pad with a number": lambda: (aten.pad.default, some(2, 3), [1, 2], "constant", 7.0),
    "max_pool2d": lambda: (aten.max_pool2d.default, some(1, 3, 6, 6), [2, 2]),
    "scaled_dot_product_attention": lambda: (aten.scaled_dot_product_attention.default, some(1, 2, 3, 4),
                                             some(1, 2, 3, 4), one_channel(1, 2, 3, 4)),
}  # fmt: skip


def asked(target: Any, *args: Any) -> tuple[Tensor, Tensor]:
    """(what the card marks, what moves when the elements that depend take other values)."""
    graph, masks, operands = fx.Graph(), Masks(), {}

    def known_as(a: Any) -> Any:
        if isinstance(a, list):
            return [known_as(v) for v in a]
        if not isinstance(a, Operand):
            return a
        node = graph.placeholder("x")
        node.meta["val"] = a.value
        masks.store(node, a.value, a.depends)
        operands[node] = a
        return node

    node = graph.call_function(target, tuple(map(known_as, args)))

    def run(value: Callable[[fx.Node], Tensor]) -> Tensor:
        first = parts(target(*fx.node.map_arg(node.args, value)))[0]
        assert isinstance(first, Tensor)
        return first

    def other(n: fx.Node) -> Tensor:
        a = operands[n]
        drawn = torch.randint(0, 5, a.value.shape) if not a.value.is_floating_point() else torch.randn(a.value.shape)
        return torch.where(a.depends.contiguous(), drawn.to(a.value.dtype), a.value)

    value = run(lambda n: operands[n].value)
    card = find(target)
    assert card is not None and card.depends is not None
    moves = torch.zeros(value.shape, dtype=torch.bool)
    for _ in range(12):
        moves |= (run(other) - value).abs() > 1e-9
    return parts(card.depends(masks, node, value))[0], moves


@pytest.mark.parametrize("name", [*EXACT, *CAUTIOUS])
def test_what_moves_is_marked(name: str) -> None:
    for seed in range(3):
        torch.manual_seed(seed)
        marked, moves = asked(*{**EXACT, **CAUTIOUS}[name]())
        assert marked.shape == moves.shape and not (moves & ~marked).any()
        if name in EXACT:
            assert torch.equal(marked, moves)
        if moves.any() and not moves.all():
            return
    raise AssertionError("nothing moved, or everything did")


def test_every_answer_is_tried_above() -> None:
    tried = {find(make()[0]).depends for make in (*EXACT.values(), *CAUTIOUS.values())}
    assert {c.depends for c in (*CARDS.values(), *TAGGED.values())} <= tried | {None}


def test_a_mask_in_another_memory_layout_is_viewed_all_the_same() -> None:
    x = some(4, 3, 2)
    x.depends = x.depends.permute(2, 1, 0).contiguous().permute(2, 1, 0)
    x.value = x.value.contiguous()
    marked, moves = asked(aten.view.default, x, [12, 2])
    assert torch.equal(marked, moves)


def test_a_weight_that_depends_has_no_sharp_answer() -> None:
    with pytest.raises(NoAnswer):
        asked(aten.linear.default, some(2, 3, 4), some(5, 4), None)
