"""Queries and keys of which positions inside the heads are gone: the scores come back, in every form they are built."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from pipeline.channels.coupling.analyse import analyse
from pipeline.channels.operators.trace import Policy
from pipeline.channels.program.capture import capture
from pipeline.recovery import shelf
from pipeline.recovery.closed_form import recover
from pipeline.recovery.walk import Walk

WIDTH, HEADS, SIZE = 24, 3, 8


class Block(nn.Module):
    """Attention over the tokens of a sequence; the subclasses form it each in their own way."""

    def __init__(self, bias=True):
        super().__init__()
        self.embed, self.head = nn.Linear(6, WIDTH), nn.Linear(WIDTH, 5)
        self.q, self.k, self.v = (nn.Linear(WIDTH, WIDTH, bias=bias) for _ in range(3))

    def forward(self, x):
        x = self.embed(x)
        return self.head(self.attend(x))

    def split(self, x):
        return x.unflatten(-1, (-1, SIZE)).transpose(1, 2)

    def attend(self, x):
        y = F.scaled_dot_product_attention(self.split(self.q(x)), self.split(self.k(x)), self.split(self.v(x)))
        return y.transpose(1, 2).flatten(2)


class Spelled(Block):
    def attend(self, x):
        q, k, v = self.split(self.q(x)), self.split(self.k(x)), self.split(self.v(x))
        return ((q @ k.transpose(-1, -2) * SIZE**-0.5).softmax(-1) @ v).transpose(1, 2).flatten(2)


class Batched(Block):
    """Samples and heads in one dimension, queries scaled before."""

    def attend(self, x):
        b, t, _ = x.shape
        q, k, v = (self.split(f).reshape(b * HEADS, t, SIZE) for f in (self.q(x) * SIZE**-0.5, self.k(x), self.v(x)))
        y = torch.bmm(torch.bmm(q, k.transpose(1, 2)).softmax(2), v)
        return y.reshape(b, HEADS, t, SIZE).transpose(1, 2).flatten(2)


class Packed(Block):
    def __init__(self):
        super().__init__()
        del self.q, self.k, self.v
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)

    def attend(self, x):
        b, t, _ = x.shape
        q, k, v = self.qkv(x).reshape(b, t, 3, HEADS, SIZE).permute(2, 0, 3, 1, 4).unbind(0)
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, t, WIDTH)


class Module(Block):
    """torch's own module, samples second."""

    def __init__(self):
        super().__init__()
        del self.q, self.k, self.v
        self.attention = nn.MultiheadAttention(WIDTH, HEADS)

    def attend(self, x):
        x = x.transpose(0, 1)
        return self.attention(x, x, x, need_weights=False)[0].transpose(0, 1)


class Turned(nn.Module):
    """A layer with its weight the other way round, over the tokens of all samples in one dimension, as in GPT-2."""

    def __init__(self):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(WIDTH, WIDTH) * 0.1), nn.Parameter(torch.zeros(WIDTH))

    def forward(self, x):
        return torch.addmm(self.bias, x.reshape(-1, WIDTH), self.weight).view(x.shape)


class Flattened(Block):
    def __init__(self):
        super().__init__()
        self.q, self.k = Turned(), Turned()

    def attend(self, x):
        q, k, v = self.split(self.q(x)), self.split(self.k(x)), self.split(self.v(x))
        return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)


class Grouped(Block):
    """Several heads of queries for one of keys."""

    def __init__(self, inside=True):
        super().__init__()
        self.k, self.v, self.inside = nn.Linear(WIDTH, SIZE), nn.Linear(WIDTH, SIZE), inside

    def attend(self, x):
        q, k, v = self.split(self.q(x)), self.split(self.k(x)), self.split(self.v(x))
        if not self.inside:
            k, v = (y.expand(-1, HEADS, -1, -1) for y in (k, v))
        return F.scaled_dot_product_attention(q, k, v, enable_gqa=self.inside).transpose(1, 2).flatten(2)


class Crossed(Block):
    """Queries of one sequence, keys of another, of another length."""

    def attend(self, x):
        first, second = x[:, :5], x[:, 2:].relu()
        q, k, v = self.split(self.q(first)), self.split(self.k(second)), self.split(self.v(second))
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


FORMS = {
    "operator": Block,
    "operator, no biases": lambda: Block(bias=False),
    "spelled out": Spelled,
    "batched": Batched,
    "packed": Packed,
    "module": Module,
    "flattened": Flattened,
    "grouped inside": Grouped,
    "grouped outside": lambda: Grouped(inside=False),
    "crossed": Crossed,
}


def sequences(count, seed=0):
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(count, 9, 6, generator=draw)


def layers(model):
    """(layer, first row, rows) of the queries and of the keys."""
    if hasattr(model, "q"):
        return [
            (layer, 0, len(layer.bias if isinstance(layer, Turned) else layer.weight)) for layer in (model.q, model.k)
        ]
    packed = model.qkv if hasattr(model, "qkv") else model.attention
    return [(packed, 0, WIDTH), (packed, WIDTH, WIDTH)]


def values_of(layer):
    """Weight and bias with their names inside the layer."""
    prefix = "in_proj_" if isinstance(layer, nn.MultiheadAttention) else ""
    return [
        (prefix + n, getattr(layer, prefix + n)) for n in ("weight", "bias") if getattr(layer, prefix + n) is not None
    ]


def rows_of(layer, value):
    """A weight, a bias or a mask of it with the outputs first; what is written to it is written to `value`."""
    return value.mT if isinstance(layer, Turned) and value.dim() == 2 else value


def built(name, sharp=3.0):
    """Random weights, and scores that are far from equal."""
    torch.manual_seed(0)
    model = FORMS[name]().eval()
    with torch.no_grad():
        for layer, start, rows in layers(model):
            for _, value in values_of(layer):
                rows_of(layer, value)[start : start + rows] *= sharp
    return model


def masks_of(model, kept):
    """Rows of queries and keys that are kept: `kept` says of each position of a head (SIZE,)."""
    masks = {}
    for layer, start, rows in layers(model):
        name = next(n for n, m in model.named_modules() if m is layer)
        for key, value in values_of(layer):
            mask = masks.setdefault(f"{name}.{key}", torch.ones_like(value, dtype=torch.bool))
            flags = kept.repeat(rows // SIZE)
            rows_of(layer, mask)[start : start + rows] &= flags if value.dim() == 1 else flags.unsqueeze(1)
    return masks


def distance(captured, state, masks, x):
    want, got = captured(x), captured.with_state(state).fold(masks)(x)
    return float((got - want).square().sum() / (want - want.mean(0)).square().sum())


@pytest.mark.parametrize("name", FORMS)
def test_repeated_positions_cost_nothing(name):
    """The second half of every head is the first half again: the scores are twice what is left gives."""
    model, half = built(name), SIZE // 2
    with torch.no_grad():
        for layer, start, rows in layers(model):
            for _, value in values_of(layer):
                by_head = rows_of(layer, value)[start : start + rows].unflatten(0, (-1, SIZE))
                by_head[:, half:] = by_head[:, :half]
    x, fresh = sequences(160), sequences(60, seed=1)
    captured = capture(model, (x[:3],))
    masks = masks_of(model, torch.arange(SIZE) < half)
    made = recover(captured, masks, (x,))
    assert distance(captured, captured.state, masks, fresh) > 0.02
    assert distance(captured, made.state, masks, fresh) < 1e-4
    told = {f.name: f for f in made.fitted}
    for n in masks:
        if "weight" in n:
            assert told[n].error_before > 0.2 and told[n].error_after < 1e-4
    assert len(told) == len(made.fitted), "one record for one weight"
    for n, mask in masks.items():
        assert torch.equal(made.state[n][~mask], captured.state[n][~mask]), "an original under the mask moved"
    packed = [n for n in masks if "qkv" in n or "in_proj" in n]
    for n in packed:  # the values are none of this
        assert torch.equal(made.state[n][2 * WIDTH :], captured.state[n][2 * WIDTH :])


@pytest.mark.parametrize("name", FORMS)
def test_positions_chosen_by_the_engine_the_fit_comes_nearer_than_layer_by_layer(name, monkeypatch):
    model = built(name)
    x, fresh = sequences(160), sequences(60, seed=1)
    captured = capture(model, (x[:3],))
    analysis = analyse(captured, Policy(heads=False, residual=True, head_positions=True))
    draw = np.random.default_rng(0)
    removed = {c.name: draw.permutation(c.size) < 0.4 * c.size for c in analysis.clusters}
    parameters = set(captured.program.graph_signature.inputs_to_parameters.values())
    masks = {n: torch.from_numpy(m) for n, m in analysis.masks(removed).items() if n in parameters}
    made = recover(captured, masks, (x,))
    again = recover(captured, masks, (x,))
    assert made.fitted == again.fitted and all(torch.equal(v, again.state[n]) for n, v in made.state.items())
    monkeypatch.setattr("pipeline.recovery.attention.scores", lambda node: None)
    apart = recover(captured, masks, (x,))
    after, before = (distance(captured, one.state, masks, fresh) for one in (made, apart))
    assert after < 0.9 * before


class Rotated(Block):
    """Positions of queries and keys are turned by where the token stands: no moves alone."""

    def attend(self, x):
        angle = torch.arange(x.shape[1], dtype=x.dtype)[:, None] * torch.tensor([1.0, 0.3, 0.1, 0.03])

        def turn(v):
            a, b = v.chunk(2, -1)
            return torch.cat([a * angle.cos() - b * angle.sin(), a * angle.sin() + b * angle.cos()], -1)

        q, k, v = turn(self.split(self.q(x))), turn(self.split(self.k(x))), self.split(self.v(x))
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


class NoSoftmax(Block):
    """A product without a softmax: what all scores of a query have in common counts."""

    def attend(self, x):
        q, k, v = self.split(self.q(x)), self.split(self.k(x)), self.split(self.v(x))
        return ((q @ k.transpose(-1, -2)).relu() @ v).transpose(1, 2).flatten(2)


class ReadTwice(Block):
    """The keys are given out as well."""

    def attend(self, x):
        k = self.k(x)
        y = F.scaled_dot_product_attention(self.split(self.q(x)), self.split(k), self.split(self.v(x)))
        return y.transpose(1, 2).flatten(2) + k


class OneForBoth(Block):
    """Queries are the keys."""

    def attend(self, x):
        q = self.split(self.q(x))
        return F.scaled_dot_product_attention(q, q, self.split(self.v(x))).transpose(1, 2).flatten(2)


class Overwritten(Block):
    """What the layers read is another thing when the scores are formed."""

    def forward(self, x):
        x = self.embed(x)
        q, k, v = self.split(self.q(x)), self.split(self.k(x)), self.split(self.v(x))
        x.mul_(3.0)
        return self.head(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2) + x)


class OneSetOfKeys(Block):
    """Keys and values of the first sequence, for all."""

    def attend(self, x):
        q, k, v = self.split(self.q(x)), self.split(self.k(x[:1])), self.split(self.v(x[:1]))
        return (q.matmul(k.transpose(-1, -2)).softmax(-1) @ v).transpose(1, 2).flatten(2)


class NoDimensionForHeads(Block):
    """Samples are the tokens."""

    def attend(self, x):
        y = x.mean(1)
        y = (self.q(y) @ self.k(y).t()).softmax(-1) @ self.v(y)
        return y.unsqueeze(1).expand(-1, x.shape[1], -1)


FORMS_APART = [Rotated, NoSoftmax, ReadTwice, OneForBoth, Overwritten, OneSetOfKeys, NoDimensionForHeads]


@pytest.mark.parametrize("make", FORMS_APART)
def test_other_forms_are_fitted_layer_by_layer_as_ever(make, monkeypatch):
    torch.manual_seed(0)
    model = make().eval()
    x = sequences(100)
    captured = capture(model, (x[:3],))
    kept = torch.arange(WIDTH) < 16
    masks = masks_of(model, torch.arange(SIZE) % 4 < 3) | {"embed.weight": kept.unsqueeze(1).expand(WIDTH, 6)}
    masks |= {"embed.bias": kept}
    masks = {n: m for n, m in masks.items() if n in captured.state}
    made = recover(captured, masks, (x,))
    monkeypatch.setattr("pipeline.recovery.attention.scores", lambda node: None)
    apart = recover(captured, masks, (x,))
    assert made.fitted == apart.fitted
    assert all(torch.equal(v, apart.state[n]) for n, v in made.state.items())


def test_where_the_scores_come_no_nearer_the_layers_stay_as_they_were_fitted(monkeypatch):
    model, x = built("operator"), sequences(100)
    captured = capture(model, (x[:3],))
    kept = torch.arange(WIDTH) < 16
    masks = masks_of(model, torch.arange(SIZE) < 6) | {
        "embed.weight": kept.unsqueeze(1).expand(WIDTH, 6),
        "embed.bias": kept,
    }
    with monkeypatch.context() as patch:
        patch.setattr("pipeline.recovery.attention.scores", lambda node: None)
        apart = recover(captured, masks, (x,))
    monkeypatch.setattr("pipeline.recovery.attention.wanted", lambda own, *rest, **more: [-v for v in own])
    made = recover(captured, masks, (x,))
    assert made.fitted == apart.fitted
    assert all(torch.equal(v, apart.state[n]) for n, v in made.state.items())


@pytest.mark.parametrize("name", ["operator", "packed", "grouped inside"])
def test_in_memory_and_on_disk_the_same_and_what_is_counted_is_what_is_held(name, monkeypatch, tmp_path):
    monkeypatch.setattr(shelf, "LARGE", 1)
    original, held = Walk.visit, []

    def watched(walk, node):
        original(walk, node)
        values, counts = walk.networks.values, walk.networks.shelf
        alive = {id(v): v for sides in values.values() for side in sides for v in side if isinstance(v, torch.Tensor)}
        counted = sum(v.numel() * v.element_size() for key, v in alive.items() if key in counts.counted)
        held.append((counts.held, counted))

    monkeypatch.setattr(Walk, "visit", watched)
    model, x = built(name), sequences(65)
    captured = capture(model, (x[:3],))
    masks = masks_of(model, torch.arange(SIZE) < 6)
    runs = [recover(captured, masks, (x,)), recover(captured, masks, (x,), on_disk=0, folder=tmp_path)]
    assert runs[0].on_disk == 0 < runs[1].on_disk and list(tmp_path.iterdir()) == []
    assert runs[0].fitted == runs[1].fitted
    assert all(torch.equal(v, runs[1].state[n]) for n, v in runs[0].state.items())
    assert all(a == b for a, b in held)


def test_whole_heads_alone_are_no_matter_of_scores(monkeypatch):
    model, x = built("operator"), sequences(100)
    captured = capture(model, (x[:3],))
    masks = {}
    for n in ("q", "k"):
        rows = torch.arange(WIDTH) >= SIZE
        masks |= {f"{n}.weight": rows.unsqueeze(1).expand(WIDTH, WIDTH), f"{n}.bias": rows}
    made = recover(captured, masks, (x,))
    assert not {f.name for f in made.fitted} & {"q.weight", "k.weight"}
    assert torch.equal(made.state["q.weight"], captured.state["q.weight"])
