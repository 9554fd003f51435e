"""Recurrent layers: what the gates are fed is fitted, in every form of the operator, and the states come back."""

import numpy as np
import pytest
import torch
from torch import nn

from pipeline.channels.coupling.analyse import analyse
from pipeline.channels.program.capture import capture
from pipeline.recovery import recurrent
from pipeline.recovery.closed_form import recover


class Reader(nn.Module):
    """A recurrent layer between two linear ones; `last`: whether the head reads the last state alone."""

    def __init__(self, kind="LSTM", last=True, **options):
        super().__init__()
        options = {"batch_first": True, **options}
        self.first, self.last = options["batch_first"], last
        self.embed, self.layer = nn.Linear(6, 12), getattr(nn, kind)(12, 16, **options)
        size = options.get("proj_size") or 16
        self.head = nn.Linear(size * (2 if options.get("bidirectional") else 1), 5)

    def forward(self, x):
        x = self.embed(x).tanh()
        y = self.layer(x if self.first else x.transpose(0, 1))[0]
        y = y if self.first else y.transpose(0, 1)
        return self.head(y[:, -1] if self.last else y)


class Translator(nn.Module):
    """The states that one layer ends with are those that the other starts from."""

    def __init__(self):
        super().__init__()
        self.read, self.write, self.head = (
            nn.GRU(6, 12, batch_first=True),
            nn.GRU(6, 12, batch_first=True),
            nn.Linear(12, 5),
        )
        self.embed = nn.Linear(6, 6)

    def forward(self, x):
        return self.head(self.write(self.embed(x), self.read(x)[1])[0])


FORMS = {
    "lstm": {},
    "lstm, every step": {"last": False},
    "lstm, no biases": {"bias": False},
    "lstm, steps first": {"batch_first": False},
    "lstm, two layers in both directions": {"num_layers": 2, "bidirectional": True, "last": False},
    "lstm, projected": {"proj_size": 8},
    "lstm, projected, both directions": {"proj_size": 8, "bidirectional": True, "last": False},
    "gru": {"kind": "GRU"},
    "gru, no biases": {"kind": "GRU", "bias": False},
    "gru, three layers": {"kind": "GRU", "num_layers": 3},
    "gru, both directions": {"kind": "GRU", "bidirectional": True, "last": False},
    "tanh": {"kind": "RNN"},
    "relu": {"kind": "RNN", "nonlinearity": "relu", "last": False},
}


def sequences(count, seed=0):
    """(count, 9, 6): noise that changes slowly, as series do."""
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(count, 9, 6, generator=draw).cumsum(1) * 0.5


def built(name):
    torch.manual_seed(0)
    model = Reader(**FORMS[name]).eval()
    return model, sequences(160)


def cut(captured, share, seed=0):
    analysis = analyse(captured)
    draw = np.random.default_rng(seed)
    removed = {c.name: draw.permutation(c.size) < share * c.size for c in analysis.clusters}
    return {n: torch.from_numpy(m) for n, m in analysis.masks(removed).items()}


def distance(captured, state, masks, x):
    """Squared error of the masked network on `state` over the centred squares of the dense one's outputs."""
    want, got = captured(x), captured.with_state(state).fold(masks)(x)
    return float((got - want).square().sum() / (want - want.mean(0)).square().sum())


def recurrent_matrices(captured):
    return {n for n, v in captured.state.items() if v.dim() == 2 and "layer." in n}


@pytest.mark.parametrize("name", FORMS)
def test_half_of_the_units_cut_the_fit_comes_nearer_than_the_readers_alone(name):
    model, x = built(name)
    captured = capture(model, (x[:3],))
    masks = cut(captured, 0.5)
    before = {n: v.clone() for n, v in captured.state.items()}
    made = recover(captured, masks, (x,))
    told = {f.name: f for f in made.fitted}
    names = recurrent_matrices(captured)
    assert names <= set(told) and not any(told[n].reason for n in names)
    for n in names:
        assert told[n].strength > 0 and told[n].error_after < 0.9 * told[n].error_before
        assert not torch.equal(made.state[n], before[n])
    for n, mask in masks.items():
        assert torch.equal(made.state[n][~mask], before[n][~mask]), "an original under the mask moved"
    assert all(torch.equal(v, before[n]) for n, v in captured.state.items())
    # What the head alone brings back is what it was before recurrent layers had a rule.
    alone = {n: before[n] if "layer." in n else v for n, v in made.state.items()}
    fresh = sequences(80, seed=1)
    start, head, whole = (distance(captured, s, masks, fresh) for s in (before, alone, made.state))
    assert whole < 0.6 * start
    assert whole < head


@pytest.mark.parametrize("name", FORMS)
def test_repeated_units_cost_nothing(name):
    """The second half of the units of each layer is the first half again, and it is what goes."""
    model, x = built(name)
    layer, gates = model.layer, {"LSTM": 4, "GRU": 3, "RNN": 1}[type(model.layer).__name__]
    with torch.no_grad():
        model.embed.weight[6:], model.embed.bias[6:] = model.embed.weight[:6].clone(), model.embed.bias[:6].clone()
        for key, value in layer.named_parameters():
            parts = value if "weight_hr" in key else value.unflatten(0, (gates, -1))
            axis = 0 if "weight_hr" in key else 1
            first, second = parts.chunk(2, axis)
            second.copy_(first)
    captured = capture(model, (x[:3],))
    masks = {"embed.weight": (torch.arange(12) < 6).unsqueeze(1).expand(12, 6), "embed.bias": torch.arange(12) < 6}
    sides = 2 if layer.bidirectional else 1
    for key, value in layer.named_parameters():
        unit = torch.arange(16) < 8
        state = torch.arange(layer.proj_size) < layer.proj_size // 2 if layer.proj_size else unit
        rows = state if "weight_hr" in key else unit.repeat(gates)
        inputs = torch.arange(12) < 6 if "_l0" in key else state.repeat(sides)
        columns = unit if "weight_hr" in key else inputs if "weight_ih" in key else state
        masks[f"layer.{key}"] = rows.unsqueeze(1) & columns if value.dim() == 2 else rows
    masks["head.weight"] = (state.repeat(sides)).expand(5, -1)
    made = recover(captured, masks, (x,))
    fresh = sequences(80, seed=1)
    assert distance(captured, captured.state, masks, fresh) > 0.05
    assert distance(captured, made.state, masks, fresh) < 1e-4


def test_states_that_are_handed_over_are_followed():
    torch.manual_seed(0)
    x = sequences(120)
    captured = capture(Translator().eval(), (x[:3],))
    # By hand: the analysis leaves such states alone, but what comes before them may still change.
    kept = torch.arange(6) < 4
    masks = {
        "embed.weight": kept.unsqueeze(1).expand(6, 6),
        "embed.bias": kept,
        "write.weight_ih_l0": kept.expand(36, 6),
    }
    units = torch.arange(12) < 8
    masks |= {"read.weight_ih_l0": units.repeat(3).unsqueeze(1).expand(36, 6),
              "read.weight_hh_l0": units.repeat(3).unsqueeze(1) & units,
              "read.bias_ih_l0": units.repeat(3), "read.bias_hh_l0": units.repeat(3)}  # fmt: skip
    made = recover(captured, masks, (x,))
    fresh = sequences(80, seed=1)
    alone = {n: v if n.startswith("head") else captured.state[n] for n, v in made.state.items()}
    assert distance(captured, made.state, masks, fresh) < 0.8 * distance(captured, alone, masks, fresh)


def test_single_masked_weights_are_made_up_for_by_those_that_are_left():
    model, x = built("lstm")
    captured = capture(model, (x[:3],))
    draw = torch.Generator().manual_seed(0)
    masks = {n: torch.rand(captured.state[n].shape, generator=draw) > 0.5 for n in recurrent_matrices(captured)}
    made = recover(captured, masks, (x,))
    told = {f.name: f for f in made.fitted}
    assert all(told[n].strength > 0 for n in masks)
    for n, mask in masks.items():
        assert torch.equal(made.state[n][~mask], captured.state[n][~mask])
    alone = {n: captured.state[n] if n in masks else v for n, v in made.state.items()}
    fresh = sequences(80, seed=1)
    assert distance(captured, made.state, masks, fresh) < 0.6 * distance(captured, alone, masks, fresh)


class Shared(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.layer, self.head = nn.Linear(6, 12), nn.LSTM(12, 16, batch_first=True), nn.Linear(16, 5)

    def forward(self, x):
        x = self.embed(x)
        return self.head(self.layer(x)[0][:, -1] + self.layer(x.flip(1))[0][:, -1])


class Dropping(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.layer, self.head = nn.Linear(6, 12), nn.LSTM(12, 16, 2, batch_first=True), nn.Linear(16, 5)

    def forward(self, x):
        weights, start = list(self.layer.parameters()), x.new_zeros(2, x.shape[0], 16)
        y = torch.lstm(self.embed(x), (start, start), weights, True, 2, 0.3, True, False, True)[0]
        return self.head(y[:, -1])


class Overflowing(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.layer, self.head = nn.Linear(6, 12), nn.LSTM(12, 16, batch_first=True), nn.Linear(16, 5)

    def forward(self, x):
        return self.head(self.layer(self.embed(x).exp().exp().exp())[0][:, -1])


@pytest.mark.parametrize(
    ("model", "said"),
    [
        (Shared, "2 operators read it"),
        (Dropping, "lstm drops some of what its layers give at random"),
        (Overflowing, "it reads or gave values that are not finite"),
    ],
)
def test_what_stays_says_why(model, said):
    torch.manual_seed(0)
    x = sequences(40) * 4
    captured = capture(model().eval(), (x[:3],))
    kept = torch.arange(12) < 6
    masks = {"embed.weight": kept.unsqueeze(1).expand(12, 6), "embed.bias": kept}
    made = recover(captured, masks, (x,))
    told = {f.name: f.reason for f in made.fitted}
    assert recurrent_matrices(captured) <= set(told)
    assert {told[n] for n in recurrent_matrices(captured)} == {said}
    assert all(torch.equal(made.state[n], captured.state[n]) for n in recurrent_matrices(captured))


def test_where_the_states_come_no_nearer_the_weights_stay(monkeypatch):
    model, x = built("lstm")
    captured = capture(model, (x[:3],))
    masks = cut(captured, 0.5)

    def worse(cell, pruned, old, *rest):
        return tuple(-w for w in old), 0.1, 100

    monkeypatch.setattr(recurrent, "_refitted", worse)
    made = recover(captured, masks, (x,))
    told = {f.name: f for f in made.fitted}
    for n in recurrent_matrices(captured):
        assert told[n].strength == 0 and told[n].error_after == told[n].error_before and not told[n].reason
    assert all(torch.equal(made.state[n], v) for n, v in captured.state.items() if "layer." in n)


class Held(nn.Module):
    """Units that grow threefold in a step but for a copy of them, which takes away what they add."""

    def __init__(self):
        super().__init__()
        self.layer, self.head = nn.RNN(6, 16, nonlinearity="relu", batch_first=True), nn.Linear(16, 5)
        with torch.no_grad():
            first, copy = self.layer.weight_hh_l0[:, :8], self.layer.weight_hh_l0[:, 8:]
            first[:8], copy[:8] = 3.3 * torch.eye(8), -3.0 * torch.eye(8)
            self.layer.weight_hh_l0[8:] = self.layer.weight_hh_l0[:8]
            self.layer.weight_ih_l0[8:] = self.layer.weight_ih_l0[:8]
            self.layer.bias_ih_l0[8:], self.layer.bias_hh_l0[8:] = self.layer.bias_ih_l0[:8], self.layer.bias_hh_l0[:8]

    def forward(self, x):
        return self.head(self.layer(x)[0][:, -1])


def test_states_that_grow_beyond_all_numbers_once_units_go_are_brought_back():
    torch.manual_seed(0)
    x = torch.randn(60, 90, 6)
    captured = capture(Held().eval(), (x[:3],))
    unit = torch.arange(16) < 8
    masks = dict.fromkeys(("layer.bias_ih_l0", "layer.bias_hh_l0"), unit)
    masks |= {"layer.weight_ih_l0": unit.unsqueeze(1).expand(16, 6), "layer.weight_hh_l0": unit.unsqueeze(1) & unit,
              "head.weight": unit.expand(5, 16)}  # fmt: skip
    assert not captured.fold(masks)(x).isfinite().all()
    made = recover(captured, masks, (x,))
    assert distance(captured, made.state, masks, torch.randn(30, 90, 6)) < 1e-3
