"""The fit on whole networks: exact where it can be, silent where nothing is masked, honest about what stays."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from pipeline.channels.coupling.analyse import analyse
from pipeline.channels.program.capture import capture
from pipeline.recovery import fitted, shelf, tied
from pipeline.recovery.closed_form import LEAST, recover
from pipeline.recovery.walk import Walk


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.a, self.b = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 16, 3, padding=1), nn.Conv2d(16, 8, 1)
        self.head = nn.Linear(8, 5)

    def forward(self, x):
        x = self.stem(x).relu()
        x = x + self.b(self.a(x).relu())
        return self.head(x.mean((2, 3)))


class InPlace(nn.Module):
    """Every write in place: into the input, into activations, through a view, behind a dropout."""

    def __init__(self):
        super().__init__()
        self.stem, self.a, self.b = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 1)
        self.dropout = nn.Dropout(0.5)
        self.head = nn.Linear(8, 5)

    def forward(self, x):
        x = self.dropout(x.sub_(0.25))
        x = F.relu_(self.stem(x))
        y = self.dropout(x)
        y = y.add_(self.b(F.relu_(self.a(x))))
        y[:, :4].mul_(2.0)
        return self.head(y.mean((2, 3)) + x.mean((2, 3)))


class Attention(nn.Module):
    def __init__(self, batch_first=True):
        super().__init__()
        self.embed = nn.Linear(6, 16)
        self.norm = nn.LayerNorm(16)
        self.attention = nn.MultiheadAttention(16, 4, batch_first=batch_first)
        self.up, self.down, self.head = nn.Linear(16, 32), nn.Linear(32, 16), nn.Linear(16, 5)
        self.batch_first = batch_first

    def forward(self, x):
        x = self.embed(x if self.batch_first else x.transpose(0, 1))
        y = self.norm(x)
        x = x + self.attention(y, y, y, need_weights=False)[0]
        x = x + self.down(F.gelu(self.up(self.norm(x))))
        return self.head(x.mean(1 if self.batch_first else 0))


class Tied(nn.Module):
    """One weight for an embedding and for the head behind it, one layer that runs twice."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(20, 16)
        self.up, self.down = nn.Linear(16, 24), nn.Linear(24, 16)
        self.own = nn.Linear(16, 16)
        self.head = nn.Linear(16, 20, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, x):
        x = self.embedding(x)
        for _ in range(2):
            x = x + self.down(self.up(x).relu())
        return self.head(x + self.own(x))


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.lstm, self.head = nn.Linear(6, 12), nn.LSTM(12, 10, batch_first=True), nn.Linear(10, 5)

    def forward(self, x):
        return self.head(self.lstm(self.embed(x))[0][:, -1])


class ProductOfTwo(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.pair, self.head = nn.Linear(6, 12), nn.Bilinear(12, 12, 10), nn.Linear(10, 5)

    def forward(self, x):
        x = self.a(x).relu()
        return self.head(self.pair(x, x).relu())


class TwoInputs(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.c, self.head = nn.Linear(6, 12), nn.Linear(4, 12), nn.Linear(24, 16), nn.Linear(16, 5)

    def forward(self, x, y):
        return self.head(self.c(torch.cat([self.a(x).relu(), self.b(y).relu()], 1)).relu())


class Noisy(nn.Module):
    """Dropout that is on in eval mode as well."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(6, 16), nn.Linear(16, 5)

    def forward(self, x):
        return self.b(F.dropout(self.a(x).relu(), 0.3, training=True))


class Odd(nn.Module):
    """A frozen blur, a computed weight, complex values, a counter in a buffer, values that become integers."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Conv1d(3, 8, 3, padding=1), nn.Conv1d(8, 8, 1), nn.Conv1d(8, 8, 3, padding=1)
        self.register_buffer("blur", torch.tensor([0.25, 0.5, 0.25]).expand(8, 1, 3).clone())
        self.register_buffer("calls", torch.zeros(()))
        self.head = nn.Linear(8, 5)

    def forward(self, x):
        self.calls.add_(1)
        x = self.b(self.a(x).relu())
        x = F.conv1d(x, self.blur, padding=1, groups=8)
        x = F.conv1d(x, self.c.weight / self.c.weight.norm(), padding=1)
        x = torch.fft.irfft(torch.fft.rfft(x), n=x.shape[-1])
        return self.head((x * 8).round().to(torch.int64).float().mean(2))


def plain():
    return nn.Sequential(
        nn.Conv2d(3, 12, 3, padding=1, bias=False), nn.BatchNorm2d(12), nn.ReLU(),
        nn.Conv2d(12, 16, 3, stride=2, bias=False), nn.BatchNorm2d(16), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 5),
    )  # fmt: skip


def grouped():
    return nn.Sequential(
        nn.Conv2d(3, 12, 3, padding=1), nn.ReLU(), nn.Conv2d(12, 12, 3, groups=3), nn.ReLU(), nn.Conv2d(12, 8, 1),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5),
    )  # fmt: skip


def separable():
    return nn.Sequential(
        nn.Conv2d(3, 12, 1), nn.ReLU6(), nn.Conv2d(12, 12, 3, padding=1, groups=12, bias=False), nn.BatchNorm2d(12),
        nn.ReLU6(), nn.Conv2d(12, 8, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5),
    )  # fmt: skip


def decoder():
    return nn.Sequential(
        nn.Conv2d(3, 12, 3, stride=2), nn.ReLU(), nn.ConvTranspose2d(12, 8, 3, stride=2), nn.ReLU(), nn.Conv2d(8, 3, 1)
    )


def mlp():
    return nn.Sequential(nn.Linear(6, 24), nn.ReLU(), nn.Linear(24, 16), nn.GELU(), nn.Linear(16, 5))


class Buckets(nn.Module):
    """Distances are sorted into buckets by writing into them, which no sample changes, and into a weight's square."""

    def __init__(self):
        super().__init__()
        self.embed, self.bias = nn.Linear(6, 16), nn.Embedding(6, 4)
        self.scale = nn.Parameter(torch.rand(16))
        self.up, self.down, self.head = nn.Linear(16, 32), nn.Linear(32, 16), nn.Linear(16, 5)

    def forward(self, x):
        at = torch.arange(7)
        distance = at[None] - at[:, None]
        bucket = (distance > 0).to(torch.int64) * 3
        bucket += distance.abs().clamp(max=2)
        x = self.embed(x)
        factor = torch.zeros(16)
        factor += self.scale.square()
        weights = self.bias(bucket).mean(-1).softmax(-1)
        x = x * factor + weights @ x
        return self.head((x + self.down(self.up(x).relu())).mean(1))


IMAGE, TEXT = (3, 8, 8), (7, 6)
NETS = {
    "plain": (plain, (IMAGE,)),
    "residual": (Residual, (IMAGE,)),
    "grouped": (grouped, (IMAGE,)),
    "separable": (separable, (IMAGE,)),
    "decoder": (decoder, (IMAGE,)),
    "mlp": (mlp, ((6,),)),
    "attention": (Attention, (TEXT,)),
    "attention, samples second": (lambda: Attention(batch_first=False), (TEXT,)),
    "tied": (Tied, None),
    "recurrent": (Recurrent, (TEXT,)),
    "product of two": (ProductOfTwo, ((6,),)),
    "two inputs": (TwoInputs, ((6,), (4,))),
    "in place": (InPlace, (IMAGE,)),
    "buckets": (Buckets, (TEXT,)),
    "noisy": (Noisy, ((6,),)),
    "odd": (Odd, ((3, 9),)),
}


def built(name, samples=65, batch=3):
    """(captured, inputs): random weights, batch norms included; 65 samples are two chunks and one sample more."""
    torch.manual_seed(0)
    make, sizes = NETS[name]
    model = make().eval()
    with torch.no_grad():
        for key, value in model.state_dict().items():
            if "running_var" in key:
                value.copy_(torch.rand_like(value) + 0.5)
            elif "running_mean" in key or "norm" in key:
                value.copy_(torch.randn_like(value) * 0.3 + (1.0 if "weight" in key else 0.0))
    inputs = tuple(torch.randn(samples, *s) for s in sizes) if sizes else (torch.randint(20, (samples, 7)),)
    return capture(model, tuple(x[:batch].clone() for x in inputs)), inputs


def cut(captured, share=0.4, seed=0):
    analysis = analyse(captured)
    draw = np.random.default_rng(seed)
    removed = {c.name: draw.permutation(c.size) < share * c.size for c in analysis.clusters}
    parameters = set(captured.program.graph_signature.inputs_to_parameters.values())
    return {n: torch.from_numpy(m) for n, m in analysis.masks(removed).items() if n in parameters}


def distance(captured, state, masks, inputs):
    """Squared error of the masked network on `state` relative to the dense one's outputs."""
    torch.manual_seed(1)
    want = captured(*(x.clone() for x in inputs))
    torch.manual_seed(1)
    got = captured.with_state(state).fold(masks)(*(x.clone() for x in inputs))
    return float((got - want).square().sum() / (want - want.mean(0)).square().sum())


@pytest.mark.parametrize("name", NETS)
def test_nothing_masked_changes_nothing(name):
    captured, inputs = built(name)
    whole = {n: torch.ones_like(v, dtype=torch.bool) for n, v in captured.state.items() if v.dim()}
    for masks in ({}, whole):
        made = recover(captured, masks, inputs)
        assert made.fitted == ()
        assert all(torch.equal(made.state[n], v) for n, v in captured.state.items())


@pytest.mark.parametrize("name", NETS)
def test_it_comes_nearer_and_touches_nothing_else(name):
    captured, inputs = built(name)
    before = {n: v.clone() for n, v in captured.state.items()}
    given = [x.clone() for x in inputs]
    masks = cut(captured)
    assert masks
    made = recover(captured, masks, inputs)
    assert all(torch.equal(v, before[n]) for n, v in captured.state.items()), "the dense weights were written to"
    assert all(torch.equal(a, b) for a, b in zip(given, inputs, strict=True)), "the caller's samples were written to"
    assert set(made.state) == set(captured.state)
    for n, mask in masks.items():
        assert torch.equal(made.state[n][~mask], before[n][~mask]), "an original under the mask moved"
    assert all(bool(v.isfinite().all()) for v in made.state.values())
    assert any(not f.reason for f in made.fitted)
    changed = {n for n, v in made.state.items() if not torch.equal(v, before[n])}
    assert changed <= set(captured.program.graph_signature.inputs_to_parameters.values())
    assert distance(captured, made.state, masks, inputs) < distance(captured, before, masks, inputs)


@pytest.mark.parametrize("name", NETS)
def test_two_runs_agree_bit_for_bit_in_memory_and_on_disk(name, monkeypatch, tmp_path):
    monkeypatch.setattr(shelf, "LARGE", 1)
    captured, inputs = built(name)
    masks = cut(captured)
    runs = [
        recover(captured, masks, inputs),
        recover(captured, masks, inputs, on_disk=0, folder=tmp_path),
        recover(captured, masks, inputs, on_disk=20_000, folder=tmp_path),
    ]
    assert runs[0].on_disk == 0 < runs[1].on_disk
    for run in runs[1:]:
        assert run.fitted == runs[0].fitted
        assert all(torch.equal(v, runs[0].state[n]) for n, v in run.state.items())
    assert list(tmp_path.iterdir()) == []


def test_no_file_is_left_behind_by_an_exception(monkeypatch, tmp_path):
    monkeypatch.setattr(shelf, "LARGE", 1)
    captured, inputs = built("plain")

    def stop(done, note):
        if "batch_norm_1" in note:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        recover(captured, cut(captured), inputs, on_disk=0, folder=tmp_path, tick=stop)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["in place", "plain", "odd", "attention"])
def test_what_is_counted_is_what_is_held(name, monkeypatch):
    """At every node the bytes counted are those of the tensors alive, whoever writes in place; at the end, none."""
    monkeypatch.setattr(shelf, "LARGE", 1)
    shelves = []
    original = Walk.visit

    def watched(walk, node):
        original(walk, node)
        values, counts = walk.networks.values, walk.networks.shelf
        alive = {
            id(v): v for sides in values.values() for column in sides for v in column if isinstance(v, torch.Tensor)
        }
        held = sum(v.numel() * v.element_size() for key, v in alive.items() if key in counts.counted)
        assert counts.held == held
        assert (
            not {k for k, v in alive.items() if not v._is_view()}
            - set(counts.counted)
            - {id(x) for chunk in walk.samples.chunks for x in chunk}
        )
        shelves.append(counts)

    monkeypatch.setattr(Walk, "visit", watched)
    captured, inputs = built(name)
    recover(captured, cut(captured), inputs)
    assert shelves[-1].held <= 2 * 4 * 5 * 65 + 16  # the outputs of both networks, which nothing reads


def redundant(model, layer, norm=None):
    """The second half of a layer's channels repeats the first, scaled where no nonlinearity forbids it."""
    with torch.no_grad():
        half = layer.weight.shape[0] // 2
        for module in (layer, *([norm] if norm is not None else [])):
            for value in [*module.parameters(), *module.buffers()]:
                if value.dim():
                    value[half:] = value[:half]
    return half


@pytest.mark.parametrize("name", ["plain", "residual", "grouped", "separable", "decoder", "mlp"])
def test_redundant_channels_cost_nothing(name):
    torch.manual_seed(0)
    make, sizes = NETS[name]
    model = make().eval()
    layers = {"plain": ("0", "1"), "residual": ("a", None), "grouped": ("2", None), "separable": ("0", None),
              "decoder": ("0", None), "mlp": ("0", None)}  # fmt: skip
    layer, norm = layers[name]
    inside = dict(model.named_modules())
    if name == "grouped":  # inside each group
        with torch.no_grad():
            for g in range(3):
                inside["2"].weight[4 * g + 2 : 4 * g + 4] = inside["2"].weight[4 * g : 4 * g + 2]
                inside["2"].bias[4 * g + 2 : 4 * g + 4] = inside["2"].bias[4 * g : 4 * g + 2]
    else:
        redundant(model, inside[layer], inside.get(norm))
    if name == "separable":
        redundant(model, inside["2"], inside["3"])
    inputs = tuple(torch.randn(400, *s) for s in sizes)
    captured = capture(model, tuple(x[:3] for x in inputs))
    analysis = analyse(captured)
    cluster = next(c for c in analysis.clusters if any(n == f"{layer}.weight" for n, _ in c.producers))
    flags = np.zeros(cluster.size, bool)
    labels = cluster.labels[(f"{layer}.weight", 0)]
    channels = labels.shape[0]
    gone = [i for i in range(channels) if (i % 4 >= 2 if name == "grouped" else i >= channels // 2)]
    flags[np.unique(labels[gone])] = True
    assert flags.sum() * 2 == cluster.size, "groups are coupled across the halves"
    masks = {n: torch.from_numpy(m) for n, m in analysis.masks({cluster.name: flags}).items() if "running" not in n}
    made = recover(captured, masks, inputs)
    fresh = tuple(torch.randn(100, *s) for s in sizes)
    assert distance(captured, captured.state, masks, fresh) > 1e-2
    assert distance(captured, made.state, masks, fresh) ** 0.5 < 2e-3


def reasons(name):
    captured, inputs = built(name)
    return {f.name: f.reason for f in recover(captured, cut(captured), inputs).fitted}


def test_weights_without_a_rule_say_why():
    product = reasons("product of two")
    assert "no rule for aten.bilinear" in product["pair.weight"] and product["head.weight"] == ""
    odd = reasons("odd")
    assert odd["b.weight"] == odd["head.weight"] == ""
    assert "is no parameter" in odd["blur"]
    assert any("is computed from others" in r for r in odd.values())


class Turned(nn.Module):
    """A tied autoencoder: the weight reads, and its transpose gives back; a head whose own transpose multiplies."""

    def __init__(self):
        super().__init__()
        self.first, self.code = nn.Linear(6, 24), nn.Linear(24, 12)
        self.back = nn.Parameter(torch.zeros(24))
        self.out = nn.Parameter(torch.randn(5, 24) * 0.2)

    def forward(self, x):
        x = F.linear(self.code(self.first(x).relu()).relu(), self.code.weight.t(), self.back)
        return x.relu() @ self.out.T


class Twice(nn.Module):
    """One convolution at two scales, as in the head of a detector; its bias is shared as well."""

    def __init__(self, groups=1):
        super().__init__()
        self.stem, self.shared = nn.Conv2d(3, 12, 3, padding=1), nn.Conv2d(12, 12, 3, padding=1, groups=groups)
        self.head = nn.Linear(12, 5)

    def forward(self, x):
        x = self.stem(x).relu()
        return self.head(sum(self.shared(v).relu().mean((2, 3)) for v in (x, F.avg_pool2d(x, 2))))


class Mixed(nn.Module):
    """A weight of which one reader has no rule."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(6, 16), nn.Linear(16, 16), nn.Linear(16, 5)

    def forward(self, x):
        x = self.a(x).relu()
        return self.c(self.b(x) + torch.einsum("bi,oi->bo", x, self.b.weight.tanh()))


SHARED = {
    "embedding and head": (Tied, None, {"embedding.weight", "up.weight", "down.weight"}),
    "turned": (Turned, (6,), {"code.weight", "out"}),
    "two scales": (Twice, IMAGE, {"shared.weight"}),
    "two scales, grouped": (lambda: Twice(3), IMAGE, {"shared.weight"}),
}


def shared(name, samples=200):
    torch.manual_seed(0)
    make, size, names = SHARED[name]
    x = torch.randn(samples, *size) if size else torch.randint(20, (samples, 7))
    return capture(make().eval(), (x[:3],)), x, names


@pytest.mark.parametrize("name", SHARED)
def test_a_weight_of_several_readers_is_fitted_to_all_of_them(name, monkeypatch):
    captured, x, names = shared(name)
    masks = cut(captured, seed=3 if "grouped" in name else 0)
    before = {n: v.clone() for n, v in captured.state.items()}
    made = recover(captured, masks, (x,))
    assert names <= {f.name for f in made.fitted if not f.reason}
    assert len({f.name for f in made.fitted}) == len(made.fitted), "one record for one weight"
    for n in names:
        assert not torch.equal(made.state[n], before[n])
    for n, mask in masks.items():
        assert torch.equal(made.state[n][~mask], before[n][~mask]), "an original under the mask moved"
    assert all(torch.equal(v, before[n]) for n, v in captured.state.items())
    again = recover(captured, masks, (x,))
    assert all(torch.equal(v, again.state[n]) for n, v in made.state.items())
    monkeypatch.setattr(tied, "uses", lambda nodes, weight: ((), torch.empty(0), "left out"))
    without = recover(captured, masks, (x,))
    # Every row of the embedding is looked up, so that the head cannot have it all its way.
    enough = 1.0 if name == "embedding and head" else 0.9
    fresh = torch.randn_like(x) if x.is_floating_point() else torch.randint(20, x.shape)
    assert distance(captured, made.state, masks, (fresh,)) < enough * distance(captured, without.state, masks, (fresh,))


def test_a_shared_bias_takes_the_mean_of_all_readers_and_stays_zero_where_it_is_masked():
    captured, x, _ = shared("two scales")
    masks = cut(captured)
    made = recover(captured, masks, (x,))
    kept = masks["shared.bias"]
    assert not torch.equal(made.state["shared.bias"][kept], captured.state["shared.bias"][kept])
    assert torch.equal(made.state["shared.bias"][~kept], captured.state["shared.bias"][~kept])


def test_a_reader_without_a_rule_leaves_the_weight_with_the_reason():
    torch.manual_seed(0)
    x = torch.randn(60, 6)
    captured = capture(Mixed().eval(), (x[:3],))
    masks = {"a.weight": torch.arange(16).lt(8).unsqueeze(1).expand(16, 6), "a.bias": torch.arange(16).lt(8)}
    made = recover(captured, masks, (x,))
    told = [f.reason for f in made.fitted if f.name == "b.weight"]
    assert any("2 operators read it, of which there is no rule for aten.tanh" in reason for reason in told)
    assert torch.equal(made.state["b.weight"], captured.state["b.weight"])
    assert {f.name: f.reason for f in made.fitted}["c.weight"] == ""


def test_single_masked_weights_of_several_readers_stay_and_say_why():
    captured, x, _ = shared("two scales")
    draw = torch.Generator().manual_seed(0)
    masks = {"shared.weight": torch.rand(captured.state["shared.weight"].shape, generator=draw) > 0.4}
    masks["stem.weight"] = torch.arange(12).lt(6).reshape(12, 1, 1, 1).expand(12, 3, 3, 3)
    made = {f.name: f.reason for f in recover(captured, masks, (x,)).fitted}
    assert made["shared.weight"] == "2 operators read it, and single weights of it are masked"


def test_tied_names_get_one_value():
    model = mlp()
    model.register_parameter("again", model[2].weight)
    x = torch.randn(40, 6)
    captured = capture(model, (x[:3],))
    masks = {"0.weight": torch.arange(24).lt(12).unsqueeze(1).expand(24, 6), "0.bias": torch.arange(24).lt(12)}
    made = recover(captured, masks, (x,))
    assert not torch.equal(made.state["2.weight"], model[2].weight)
    assert "again" not in made.state or torch.equal(made.state["again"], made.state["2.weight"])


@pytest.mark.parametrize("name", ["mlp", "plain", "grouped", "separable", "decoder"])
def test_what_is_left_of_single_masked_weights_makes_up_for_them(name):
    captured, inputs = built(name)
    draw = torch.Generator().manual_seed(0)
    masks = {n: torch.rand(v.shape, generator=draw) > 0.4 for n, v in captured.state.items() if v.dim() > 1}
    made = recover(captured, masks, inputs)
    assert {f.name: f.reason for f in made.fitted} == dict.fromkeys(masks, "")
    for weight, mask in masks.items():
        assert torch.equal(made.state[weight][~mask], captured.state[weight][~mask])
    before, after = (distance(captured, state, masks, inputs) for state in (captured.state, made.state))
    assert after < 0.5 * before


def test_single_masked_weights_of_too_large_a_layer_stay_and_say_why(monkeypatch):
    monkeypatch.setattr(fitted, "LARGEST_SPARSE", 24 * 6 * 6)
    captured, inputs = built("mlp")
    draw = torch.Generator().manual_seed(0)
    masks = {n: torch.rand(captured.state[n].shape, generator=draw) > 0.5 for n in ("0.weight", "2.weight")}
    made = {f.name: f.reason for f in recover(captured, masks, inputs).fitted}
    assert made["0.weight"] == made["4.weight"] == ""
    assert "too many" in made["2.weight"]


def test_masks_in_other_words_are_taken():
    captured, inputs = built("mlp")
    masks = cut(captured)
    as_arrays = recover(captured, {n: m.numpy() for n, m in masks.items()}, inputs)
    assert all(torch.equal(v, as_arrays.state[n]) for n, v in recover(captured, masks, inputs).state.items())


def test_a_fixed_batch_is_run_in_batches_of_that_size():
    torch.manual_seed(0)
    model = plain().eval()
    captured = capture(model, (torch.randn(4, *IMAGE),), dynamic_batch=False)
    assert not captured.dynamic_batch
    size = len(captured.example[0])
    made = recover(captured, cut(captured), (torch.randn(5 * size + 1, *IMAGE),))
    assert any(not f.reason for f in made.fitted)
    large = capture(model, (torch.randn(16, *IMAGE),), dynamic_batch=False)
    if len(large.example[0]) > 10:
        with pytest.raises(ValueError, match="fill the batch"):
            recover(large, cut(large), (torch.randn(10, *IMAGE),))


@pytest.mark.parametrize("samples", [10, 11, 31, 32, 33, 64])
def test_any_number_of_samples_from_the_least(samples):
    captured, inputs = built("residual", samples=samples)
    made = recover(captured, cut(captured), inputs)
    assert all(bool(v.isfinite().all()) for v in made.state.values())


def test_samples_that_are_no_good_are_refused_in_one_line():
    captured, (x,) = built("plain")
    masks = cut(captured)
    with pytest.raises(ValueError, match="too few"):
        recover(captured, masks, (x[: LEAST - 1],))
    for bad in (float("nan"), float("inf")):
        spoilt = x.clone()
        spoilt[7, 0, 0, 0] = bad
        with pytest.raises(ValueError, match="not finite"):
            recover(captured, masks, (spoilt,))
    captured, (x, y) = built("two inputs")
    with pytest.raises(ValueError, match="different numbers"):
        recover(captured, cut(captured), (x, y[:-1]))


class Scaled(nn.Module):
    """Two halves that are alike, by a factor that a weight's square is written into."""

    def __init__(self):
        super().__init__()
        self.a, self.scale, self.head = nn.Linear(6, 8), nn.Parameter(torch.rand(8) + 0.5), nn.Linear(8, 3)
        with torch.no_grad():
            for weight in (self.a.weight, self.a.bias, self.scale):
                weight[4:] = weight[:4]

    def forward(self, x):
        factor = torch.zeros(8)
        factor += self.scale.square()
        return self.head(self.a(x) * factor)


def test_what_is_written_into_without_a_sample_is_each_networks_own():
    torch.manual_seed(0)
    captured = capture(Scaled().eval(), (torch.randn(2, 6),))
    (cluster,) = (one for one in analyse(captured).clusters if one.size == 8)
    masks = {
        name: torch.from_numpy(mask)
        for name, mask in analyse(captured).masks({cluster.name: np.arange(8) >= 4}).items()
    }
    assert not masks["scale"][4:].any()
    x = torch.randn(200, 6)
    made = recover(captured, masks, (x,))
    assert distance(captured, made.state, masks, (x,)) < 1e-4 * distance(captured, captured.state, masks, (x,))


class Marked(nn.Module):
    """Classifies by the last token that is a 1, as encoder-decoders of transformers do by the end of a sentence."""

    def __init__(self):
        super().__init__()
        self.embed, self.a, self.b = nn.Embedding(10, 8), nn.Linear(8, 16), nn.Linear(16, 8)
        self.head = nn.Linear(8, 3)

    def forward(self, tokens):
        x = self.b(self.a(self.embed(tokens)).relu())
        return self.head(x[tokens.eq(1)].view(len(tokens), -1, 8)[:, -1])


def test_samples_that_the_network_itself_cannot_take_are_refused_in_one_line():
    torch.manual_seed(0)
    tokens = torch.randint(2, 10, (32, 6))
    with_mark = tokens.clone()
    with_mark[:, 3] = 1
    captured = capture(Marked().eval(), (with_mark[:2],))
    masks = cut(captured)
    assert any(not f.reason for f in recover(captured, masks, (with_mark,)).fitted)
    with pytest.raises(ValueError, match="cannot be run by itself: .*out of range"):
        recover(captured, masks, (tokens,))


@pytest.mark.parametrize(
    "x",
    [torch.zeros(40, *IMAGE), torch.full((40, *IMAGE), 3.7), torch.randn(1, *IMAGE).expand(40, -1, -1, -1)],
    ids=["zero", "constant", "repeated"],
)
@pytest.mark.parametrize("name", ["plain", "residual", "separable", "grouped"])
def test_samples_that_say_nothing_do_no_harm(name, x):
    captured, _ = built(name)
    masks = cut(captured)
    made = recover(captured, masks, (x,))
    assert all(bool(v.isfinite().all()) for v in made.state.values())
    other = torch.randn(40, *IMAGE)
    assert distance(captured, made.state, masks, (other,)) < 20 * distance(captured, captured.state, masks, (other,))


class Overflowing(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 4)

    def forward(self, x):
        x = self.b(self.a(x)).exp().exp().exp()
        return self.c(x)


def test_activations_that_are_not_finite_leave_the_weight_with_a_reason():
    torch.manual_seed(0)
    captured = capture(Overflowing(), (torch.randn(2, 6),))
    masks = {"a.weight": torch.arange(8).lt(4).unsqueeze(1).expand(8, 6), "a.bias": torch.arange(8).lt(4)}
    made = recover(captured, masks, (20 * torch.randn(40, 6),))
    assert {f.name: f.reason for f in made.fitted}["c.weight"] == "it reads or gave values that are not finite"
    assert torch.equal(made.state["c.weight"], captured.state["c.weight"])
    assert all(bool(v.isfinite().all()) for v in made.state.values())


class Unreached(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.never, self.b = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 4)

    def forward(self, x):
        return self.b(self.a(x).relu())


def test_a_layer_that_is_never_reached_stays_and_says_so():
    torch.manual_seed(0)
    captured = capture(Unreached(), (torch.randn(2, 6),))
    kept = torch.arange(8).lt(4)
    masks = {"a.weight": kept.unsqueeze(1).expand(8, 6), "a.bias": kept, "never.weight": kept.expand(8, 8)}
    made = recover(captured, masks, (torch.randn(40, 6),))
    assert {f.name: f.reason for f in made.fitted} == {"b.weight": "", "never.weight": "no operator reads it"}
    assert torch.equal(made.state["never.weight"], captured.state["never.weight"])


class Windows(nn.Module):
    """A batch of windows, four to a sample."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.head = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3), nn.Linear(8, 5)

    def forward(self, x):
        x = x.reshape(-1, 3, 2, 4, 2, 4).permute(0, 2, 4, 1, 3, 5).reshape(-1, 3, 4, 4)
        x = self.b(self.a(x).relu()).relu().mean((2, 3))
        return self.head(x.reshape(-1, 4, 8)).mean(1)


def test_windows_in_the_batch_are_fitted():
    torch.manual_seed(0)
    x = torch.randn(40, *IMAGE)
    captured = capture(Windows(), (x[:3],))
    masks = cut(captured)
    made = recover(captured, masks, (x,))
    assert {f.name: f.reason for f in made.fitted} == {"b.weight": "", "head.weight": ""}
    assert distance(captured, made.state, masks, (x,)) < distance(captured, captured.state, masks, (x,))


class FirstOnly(nn.Module):
    """A layer, and one that reads twice, that see the first sample of each batch alone."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c, self.head = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 4)
        self.recurrent = nn.GRU(8, 8, batch_first=True)

    def forward(self, x):
        x = self.a(x).relu()
        first = self.b(x[:1]) + self.c(x[:1]) + self.c(x[:1].relu()) + self.recurrent(x[:1].unsqueeze(1))[0][:, 0]
        return self.head(x + first)


def test_where_no_row_can_be_held_back_the_weight_stays_and_says_so():
    torch.manual_seed(0)
    captured = capture(FirstOnly().eval(), (torch.randn(3, 6),))
    kept = torch.arange(8).lt(4)
    masks = {"a.weight": kept.unsqueeze(1).expand(8, 6), "a.bias": kept}
    made = recover(captured, masks, (torch.randn(20, 6),))
    told = {f.name: f.reason for f in made.fitted}
    said = "too few of its rows can be held back"
    assert told.pop("head.weight") == "" and set(told.values()) == {said}
    assert {"b.weight", "c.weight", "recurrent.weight_ih_l0", "recurrent.weight_hh_l0"} == set(told)


class Tokens(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(40, 12)
        self.up, self.down = nn.Linear(12, 24), nn.Linear(24, 6)

    def forward(self, ids, mask):
        x = self.up(self.embedding(ids)).tanh()
        return self.down(x) * (mask.unsqueeze(-1) + 1)  # what fills up has outputs, too


def test_places_that_only_fill_samples_up_weigh_nothing():
    torch.manual_seed(0)
    net = Tokens().eval()
    net.embedding.weight.data[20:] *= 3
    counted = torch.arange(30) < torch.randint(2, 8, (64, 1))
    ids = torch.where(counted, torch.randint(0, 20, (64, 30)), torch.randint(20, 40, (64, 30)))
    inputs = (ids, counted.long())
    captured = capture(net, inputs, dynamic_batch=True)
    masks = {"up.weight": torch.ones(24, 12, dtype=torch.bool), "down.weight": torch.ones(6, 24, dtype=torch.bool)}
    masks["up.weight"][:12], masks["down.weight"][:, :12] = False, False
    masks["up.bias"] = masks["up.weight"].any(1)

    def left(places):
        made = recover(captured, masks, inputs, counted=places)
        (told,) = (one for one in made.fitted if one.name == "down.weight")
        other = Tokens().eval()
        other.load_state_dict({k: v * masks[k] if k in masks else v for k, v in made.state.items()})
        with torch.no_grad():
            return told.rows, float((other(*inputs) - net(*inputs))[counted].square().mean())

    (rows, best), (more, worse) = left(counted), left(None)
    assert rows == int(counted.sum()) < more
    assert best < 0.9 * worse
    assert left(torch.ones_like(counted)) == (more, worse)
