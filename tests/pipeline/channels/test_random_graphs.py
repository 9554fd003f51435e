"""Random networks from all rule families: random groups die, folded = shrunk.

One example holds several independent networks, since capturing costs far more than checking.
`LEANORT_RANDOM_GRAPHS=2000` runs that many networks (200 by default).
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, fx, nn

from pipeline.channels import liveness, shrink, small
from pipeline.channels.dead.dependence import follow
from pipeline.channels.program.execute import execute, feeds_of
from pipeline.channels.removal.verify import difference

NETWORKS_PER_EXAMPLE = 8
EXAMPLES = -(-int(os.environ.get("LEANORT_RANDOM_GRAPHS", "200")) // NETWORKS_PER_EXAMPLE)
SIZE = 4  # pixels on a side

Step = Callable[[Tensor, list[Tensor]], Tensor]


class Built:
    """A network under construction: widths are known while steps are added."""

    def __init__(self, width: int) -> None:
        self.width = width
        self.saved: list[int] = []
        self.modules: list[nn.Module] = []
        self.steps: list[Step] = []

    def add(self, step: Step, module: nn.Module | None = None, width: int | None = None) -> None:
        if module is not None:
            self.modules.append(module)
        self.steps.append(step)
        self.width = width if width is not None else self.width


def conv(b: Built, k: int) -> None:
    out = 4 * (1 + k % 3)
    m = nn.Conv2d(b.width, out, 3, padding=1, bias=k % 2 == 0)
    b.add(lambda x, _: m(x), m, out)


def transposed(b: Built, k: int) -> None:
    m = nn.ConvTranspose2d(b.width, 8, 1, groups=4 if k % 2 else 1)
    b.add(lambda x, _: m(x), m, 8)


def grouped(b: Built, k: int) -> None:
    groups = [4, b.width, 2][k % 3]
    m = nn.Conv2d(b.width, b.width, 3, padding=1, groups=groups)
    b.add(lambda x, _: m(x), m)


def norm(b: Built, k: int) -> None:
    m = [
        nn.BatchNorm2d(b.width),
        nn.GroupNorm(1, b.width),
        nn.GroupNorm(4, b.width),
        nn.InstanceNorm2d(b.width, affine=True),
        nn.InstanceNorm2d(b.width),
    ][k % 5]
    b.add(lambda x, _: m(x), m)


def over_channels(b: Built, k: int) -> None:
    m = [nn.LayerNorm(b.width), nn.RMSNorm(b.width), nn.Linear(b.width, b.width), nn.LayerNorm(b.width, bias=False)][
        k % 4
    ]
    b.add(lambda x, _: m(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2), m)


def activation(b: Built, k: int) -> None:
    f = [
        F.relu,
        F.gelu,
        torch.tanh,
        torch.sigmoid,
        F.hardswish,
        lambda x: F.leaky_relu(x, 0.1),
        lambda x: 1 - x,
        F.silu,
    ][k % 8]
    b.add(lambda x, _: f(x))


def save(b: Built, k: int) -> None:
    b.saved.append(b.width)

    def step(x: Tensor, kept: list[Tensor]) -> Tensor:
        kept.append(x)
        return x

    b.add(step)


def use(b: Built, k: int) -> None:
    """Add, multiply or concatenate with something saved."""
    if not b.saved:
        return
    at = k % len(b.saved)
    width = b.saved[at]
    if width == b.width and k % 3:
        b.add((lambda x, s: x + s[at]) if k % 3 == 1 else (lambda x, s: x * s[at]))
    elif width + b.width <= 32:
        b.add(lambda x, s: torch.cat([x, s[at]], 1), width=width + b.width)


def excite(b: Built, k: int) -> None:
    m = nn.Conv2d(b.width, b.width, 1)
    b.add(lambda x, _: x * torch.sigmoid(m(F.adaptive_avg_pool2d(x, 1))), m)


def gate(b: Built, k: int) -> None:
    def step(x: Tensor, _: list[Tensor]) -> Tensor:
        p, q = x.chunk(2, 1)
        return p * F.silu(q) if k % 2 else F.glu(x, 1)

    if b.width >= 8:
        b.add(step, width=b.width // 2)


def rearrange(b: Built, k: int) -> None:
    order = torch.randperm(b.width, generator=torch.Generator().manual_seed(k))
    step: Step = [
        lambda x, _: torch.cat([x[:, 3:], x[:, :3]], 1),
        lambda x, _: torch.cat([x[:, ::2], x[:, 1::2]], 1),
        lambda x, _: x.flip(1),
        lambda x, _: x.view(x.shape[0], 2, -1, SIZE, SIZE).transpose(1, 2).reshape(x.shape),
        lambda x, _: x[:, order],
        lambda x, _: F.pixel_unshuffle(F.pixel_shuffle(x, 2), 2),
        lambda x, _: torch.stack(x.split(2, 1), 2).flatten(1, 2),
        lambda x, _: x.unflatten(1, (4, -1)).flatten(1, 2).roll(1, 3),
    ][k % 8]
    b.add(step)


def space(b: Built, k: int) -> None:
    step: Step = [
        lambda x, _: F.interpolate(F.max_pool2d(x, 2), scale_factor=2, mode="nearest"),
        lambda x, _: F.avg_pool2d(F.pad(x, (1, 1, 1, 1)), 3, stride=1),
        lambda x, _: F.interpolate(F.adaptive_avg_pool2d(x, 2), size=(SIZE, SIZE), mode="bilinear"),
        lambda x, _: x - x.mean((2, 3), keepdim=True),
    ][k % 4]
    b.add(step)


def reduce(b: Built, k: int) -> None:
    step: Step = [
        lambda x, _: x / (1 + x.square().sum(1, keepdim=True)),
        lambda x, _: x * torch.rsqrt(x.square().mean(1, keepdim=True) + 1e-3),
        lambda x, _: x * x.softmax(1),
        lambda x, _: x + x.mean(1, keepdim=True),
        lambda x, _: x / (1 + x.var(1, keepdim=True)),
        lambda x, _: x - x.amax(1, keepdim=True),
        lambda x, _: F.normalize(x, dim=1),
    ][k % 7]
    b.add(step)


def attention(b: Built, k: int) -> None:
    heads = 2
    qkv, proj = nn.Linear(b.width, 3 * b.width), nn.Linear(b.width, b.width)
    b.modules.append(qkv)

    def step(x: Tensor, _: list[Tensor]) -> Tensor:
        n, c = SIZE * SIZE, x.shape[1]
        y = qkv(x.flatten(2).transpose(1, 2))
        if k % 2:
            q, key, v = y.reshape(-1, n, 3, heads, c // heads).permute(2, 0, 3, 1, 4).unbind(0)
        else:
            q, key, v = (z.view(-1, n, heads, c // heads).transpose(1, 2) for z in y.chunk(3, -1))
        if k % 3:
            y = F.scaled_dot_product_attention(q, key, v)
        else:
            y = ((q @ key.transpose(-2, -1)) * 0.3).softmax(-1) @ v
        y = proj(y.transpose(1, 2).reshape(-1, n, c)).transpose(1, 2).view(-1, c, SIZE, SIZE)
        return x + y if k % 5 else y

    b.add(step, proj)


def mix(b: Built, k: int) -> None:
    """A product written as einsum, matmul or addmm."""
    m = nn.Linear(b.width, b.width)
    step: Step = [
        lambda x, _: torch.einsum("bchw,dc->bdhw", x, m.weight),
        lambda x, _: torch.matmul(m.weight, x.flatten(2)).view(-1, m.weight.shape[0], SIZE, SIZE),
        lambda x, _: (x.permute(0, 2, 3, 1) @ m.weight.t() + m.bias).permute(0, 3, 1, 2),
    ][k % 3]
    b.add(step, m)


STEPS = (
    conv, transposed, grouped, norm, over_channels, activation, save, use, excite, gate, rearrange, space, reduce,
    attention, mix,
)  # fmt: skip
recipes = st.lists(st.tuples(st.sampled_from(STEPS), st.integers(0, 119)), min_size=2, max_size=8)


class Network(nn.Module):
    def __init__(self, recipe: list[tuple[Callable[[Built, int], None], int]]) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 1)
        built = Built(8)
        for add, k in recipe:
            if built.width % 4 == 0:
                add(built, k)
        self.parts = nn.ModuleList(built.modules)
        self.steps = built.steps
        self.head = nn.Conv2d(built.width, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        saved: list[Tensor] = []
        for step in self.steps:
            x = step(x, saved)
        return self.head(x)


class Several(nn.Module):
    def __init__(self, networks: list[nn.Module]) -> None:
        super().__init__()
        self.networks = nn.ModuleList(networks)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return tuple(net(x) for net in self.networks)


@settings(
    max_examples=EXAMPLES,
    deadline=None,
    derandomize="LEANORT_RANDOM_GRAPHS" not in os.environ,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large],
)
@given(
    st.lists(recipes, min_size=NETWORKS_PER_EXAMPLE, max_size=NETWORKS_PER_EXAMPLE),
    st.integers(0, 9),
    st.sampled_from([0.2, 0.5, 0.9]),
)
def test_folded_equals_shrunk(experiment: Callable[..., Any], many: list[Any], seed: int, ratio: float) -> None:
    torch.manual_seed(seed)
    model = Several([Network(recipe) for recipe in many])
    found = experiment(model, torch.randn(2, 3, SIZE, SIZE), seed=seed, ratio=ratio, dynamic_batch=seed == 0)
    assert found.proof.outputs == NETWORKS_PER_EXAMPLE
    if seed == 1:
        constants_are_constant_and_go_exactly(found, seed)


def constants_are_constant_and_go_exactly(found: Any, seed: int) -> None:
    """Zero scales and rows under live shifts: nothing that is called constant moves with the input, and what is
    folded is exact.
    """
    draw = torch.Generator().manual_seed(seed)
    state = {n: v.detach().clone() for n, v in found.captured.state.items()}
    for name, value in state.items():
        if name.endswith("weight"):
            value[torch.rand(len(value), generator=draw) < 0.4] = 0
    folded = found.captured.with_state(state)
    other: dict[fx.Node, Any] = {}
    program = folded.program
    execute(program.graph, feeds_of(program, small(folded, seed=seed + 1), state), dtype=torch.float64,
            watch=lambda node, value: other.__setitem__(node, value))  # fmt: skip
    writes = any("_(" in str(node.format_node()) for node in program.graph.nodes)
    assert not writes, "a later write would change what is compared here"

    def seen(node: fx.Node, value: Tensor, depends: Tensor) -> None:
        if isinstance(other[node], Tensor):
            same = torch.isclose(value, other[node], rtol=1e-9, atol=1e-9, equal_nan=True)
            assert bool((same | depends).all()), f"{node} moves with the input"

    follow(folded, seen)
    live = liveness(found.analysis, state)
    shrunk = shrink(folded, found.analysis, live.dead, refused=live.refusals)
    worst, scale, _ = difference(folded, shrunk, [small(folded, batch=3, seed=seed)], torch.float64)
    assert worst <= 1e-5 * max(1.0, scale), "float64; the biases themselves are kept in float32"
    ledger = shrunk.ledger
    refused = [refusal for refusal in ledger.refusals if refusal not in live.refusals]
    # A channel that is spared still sends its constant on, so that what was dead because of it may have to stay.
    assert ledger.spared or not refused
    for name, flags in live.dead.items():
        stayed = [group for refusal in refused if refusal.cluster == name for group in refusal.groups]
        accounted = {*ledger.groups.get(name, ()), *ledger.spared.get(name, ()), *stayed}
        assert accounted == set(flags.nonzero()[0].tolist()), "what is dead goes, or it is said why it stays"
    assert set(ledger.groups) <= set(live.dead)
