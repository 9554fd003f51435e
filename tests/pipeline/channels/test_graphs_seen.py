"""A few graphs as text, before and after a removal, held in golden/.

What a change does to them is seen in the difference. UPDATE_GOLDEN=1 writes the files anew.
"""

from __future__ import annotations

import operator
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.export import ExportedProgram

from pipeline.channels import analyse, capture, centre, count_macs, prove, shrink, small

GOLDEN = Path(__file__).parent / "golden"


class Residual(nn.Module):
    """Two blocks around one stream, squeeze and excitation in the second, a classifier behind a mean over space."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.a, self.b = nn.Conv2d(8, 12, 3, padding=1), nn.Conv2d(12, 8, 1)
        self.squeeze, self.excite = nn.Linear(8, 4), nn.Linear(4, 8)
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.stem(x)))
        x = x + self.b(F.silu(self.a(x)))
        scale = torch.sigmoid(self.excite(F.relu(self.squeeze(x.mean((2, 3))))))
        x = x * scale[:, :, None, None]
        return self.head(x.mean((2, 3)))


class Attention(nn.Module):
    """A pre-norm transformer block, q, k and v from one projection, with a position table and a class token."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(6, 16)
        self.token, self.place = nn.Parameter(torch.zeros(1, 1, 16)), nn.Parameter(torch.zeros(1, 5, 16))
        self.norm1, self.norm2, self.last = nn.LayerNorm(16), nn.LayerNorm(16), nn.LayerNorm(16)
        self.qkv, self.proj = nn.Linear(16, 48), nn.Linear(16, 16)
        self.up, self.down = nn.Linear(16, 24), nn.Linear(24, 16)
        self.head = nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.cat([self.token.expand(x.shape[0], -1, -1), self.embed(x)], 1) + self.place
        q, k, v = self.qkv(self.norm1(x)).view(x.shape[0], 5, 3, 4, 4).permute(2, 0, 3, 1, 4).unbind(0)
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(x.shape[0], 5, 16)
        x = x + self.proj(y)
        x = x + self.down(F.gelu(self.up(self.norm2(x))))
        return self.head(self.last(x)[:, 0])


class Shuffled(nn.Module):
    """Grouped convolutions with a channel shuffle between them, a depthwise one, and a split into halves."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.first = nn.Conv2d(3, 12, 1), nn.Conv2d(12, 12, 1, groups=3)
        self.depthwise, self.second = nn.Conv2d(12, 12, 3, padding=1, groups=12), nn.Conv2d(12, 8, 1)
        self.head = nn.Conv2d(8, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.first(F.relu(self.stem(x))))
        x = x.view(-1, 3, 4, 6, 6).transpose(1, 2).reshape(-1, 12, 6, 6)
        x = self.second(F.relu(self.depthwise(x)))
        one, two = x.chunk(2, 1)
        return self.head(torch.cat([one * torch.tanh(two), two], 1))


NETS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "residual": (Residual, (2, 3, 6, 6)),
    "attention": (Attention, (2, 4, 6)),
    "shuffled": (Shuffled, (2, 3, 6, 6)),
}


def text(program: ExportedProgram) -> list[str]:
    """The program as one line per node: what it is made of, and its shape, `B` where that is dynamic."""
    signature = program.graph_signature
    held = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
    held |= signature.inputs_to_lifted_tensor_constants

    def shape(val: Any) -> str:
        if isinstance(val, (tuple, list)):
            return ", ".join(map(shape, val))
        sizes = getattr(val, "shape", None)
        return "" if sizes is None else str([s if isinstance(s, int) else _batch(s) for s in sizes]).replace("'", "")

    def argument(a: Any) -> str:
        if isinstance(a, fx.Node):
            return held.get(a.name, a.name)
        if isinstance(a, (list, tuple)):
            return f"[{', '.join(map(argument, a))}]"
        return f"{a:.6g}" if isinstance(a, float) else str(a)

    lines = []
    for node in program.graph.nodes:
        if node.op == "placeholder":
            if node.name in held or node.users:
                lines.append(f"{argument(node)}: {shape(node.meta['val'])}")
        elif node.op == "output":
            lines.append(f"return {argument(node.args[0])}")
        else:
            name = "item" if node.target is operator.getitem else str(node.target).removeprefix("aten.")
            given = [*map(argument, node.args), *(f"{k}={argument(v)}" for k, v in node.kwargs.items())]
            lines.append(f"{node.name} = {name}({', '.join(given)})  {shape(node.meta.get('val'))}".rstrip())
    return lines


def _batch(size: Any) -> str:
    """A dynamic size in terms of the batch, whatever the symbol is called."""
    expression = str(size.node.expr)
    for symbol in sorted(map(str, size.node.expr.free_symbols)):
        expression = expression.replace(symbol, "B")
    return expression


def seen(name: str) -> str:
    """Clusters and blocked parameters of a net, and its graph: as captured, with every second group gone, centred."""
    torch.manual_seed(0)
    build, shape = NETS[name]
    model = build().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.rand_like(parameter) * 0.2 + 0.1)
    captured = capture(model, (torch.randn(shape),))
    analysis = analyse(captured)
    lines = [model.__doc__ or "", ""]
    for c in analysis.clusters:
        lines.append(f"cluster {c.name}: {c.size} of kind {c.kind}, {c.unit} in each")
        lines += [f"    writes {p}[{d}]" for p, d in c.producers] + [f"    reads {p}[{d}]" for p, d in c.readers]
    lines += [f"stays: {b.params} by {b.op} at {b.node}: {b.reason}" for b in analysis.blocked]
    removed = {c.name: np.arange(c.size) % 2 == 1 for c in analysis.clusters}
    folded = captured.fold(analysis.masks(removed))
    shrunk = shrink(folded, analysis, removed)
    assert not shrunk.refused
    prove(folded, shrunk, [small(captured)])
    lines += ["", f"-- before: {analysis.params} parameters, {analysis.macs} MACs", *text(captured.program)]
    size = analysis.estimate(removed)
    assert count_macs(shrunk.program) == size.macs
    lines += ["", f"-- every second group gone: {size.params} parameters, {size.macs} MACs", *text(shrunk.program)]
    lines += [f"rewritten {r.node}: {r.argument} {r.before} -> {r.after}" for r in shrunk.ledger.rewrites]
    centred = centre(shrunk.program)
    if centred.norms:
        lines += ["", f"-- centred: {centred.streams} stream, {centred.norms} norms", *text(centred.program)]
    return "\n".join(lines) + "\n"


@pytest.mark.parametrize("name", NETS)
def test_the_graph_is_the_one_that_is_held(name: str) -> None:
    path = GOLDEN / f"{name}.txt"
    now = seen(name)
    if os.environ.get("UPDATE_GOLDEN"):
        path.write_text(now, encoding="utf-8")
    assert now == path.read_text(encoding="utf-8")
