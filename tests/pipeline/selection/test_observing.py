"""Criteria that observe, each against a slow, direct computation: one group at a time, loops, whole unfoldings."""

import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from foundation.errors import ConfigError, DataError, ModelError
from pipeline.channels.coupling.analyse import analyse
from pipeline.channels.program.capture import capture
from pipeline.data.parts import Data, image_split
from pipeline.models.source import Input
from pipeline.recovery import sampling
from pipeline.selection import activations, criteria
from pipeline.selection.allocation import lowest
from pipeline.selection.criteria import CRITERIA, Evidence, rank
from pipeline.selection.observe import observe
from pipeline.tasks import classification
from pipeline.training import masks

TASK = classification.task("classification", "output")


class Net(nn.Module):
    """A residual stream, a depthwise and a grouped convolution, attention, feed-forward neurons."""

    def __init__(self):
        super().__init__()
        self.stem, self.bn = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.a, self.dw = nn.Conv2d(8, 12, 3, padding=1), nn.Conv2d(12, 12, 3, padding=1, groups=12)
        self.b = nn.Conv2d(12, 8, 1)
        self.into, self.grouped = nn.Conv2d(8, 12, 1), nn.Conv2d(12, 12, 3, 2, padding=1, groups=3)
        self.out = nn.ConvTranspose2d(12, 8, 2, 2)
        self.norm, self.attention = nn.LayerNorm(8), nn.MultiheadAttention(8, 4, batch_first=True)
        self.up, self.down, self.head = nn.Linear(8, 16, bias=False), nn.Linear(16, 8, bias=False), nn.Linear(8, 5)

    def forward(self, x):
        x = F.relu(self.bn(self.stem(x)))
        x = x + self.b(F.relu(self.dw(F.relu(self.a(x)))))
        x = x + self.out(F.relu(self.grouped(F.relu(self.into(x)))))
        x = x.flatten(2).transpose(1, 2)
        y = self.norm(x)
        x = x + self.attention(y, y, y, need_weights=False)[0]
        x = x + self.down(F.gelu(self.up(x)))
        return self.head(x.mean(1))


def split(count, seed):
    draw = torch.Generator().manual_seed(seed)
    images = torch.randn(count, 3, 6, 6, generator=draw) + 0.3
    labels = torch.randint(0, 5, (count,), generator=draw)
    return image_split(labels, lambda chunks: (images[chunk] for chunk in chunks))


@pytest.fixture(scope="module")
def net():
    torch.manual_seed(1)
    model = Net().eval()
    with torch.no_grad():
        model.bn.weight.uniform_(0.2, 2.0)
        model.bn.running_mean.uniform_(-0.1, 0.1)
        model.norm.weight.uniform_(0.2, 2.0)
    parts = split(4, 0), split(21, 1), split(4, 2)
    data = Data("noise", *parts, (Input("input", (3, 6, 6)),), "", tuple("abcde"))
    analysis = analyse(capture(model, (torch.randn(2, 3, 6, 6),)))
    return model, data, analysis


def scores(net, name, **kwargs):
    model, data, analysis = net
    seen = observe(model, data, TASK, CRITERIA[name].observes, analysis, **kwargs)
    return {c.name: rank(name, c, seen) for c in analysis.clusters}


def slices(cluster, group):
    """(parameter, dimension, indices) of all that a group couples."""
    return [(n, d, np.flatnonzero(labels == group)) for (n, d), labels in cluster.labels.items()]


def part(value, dim, indices):
    return value.index_select(dim, torch.from_numpy(indices))


def images_and_labels(net):
    _, data, _ = net
    (images,), labels = next(data.batches("calibration", 100))
    return images, labels


# ── gradients ────────────────────────────────────────────────────────────────────────────────────────────────────────


def gradients(model, images, labels):
    model.zero_grad()
    F.cross_entropy(model(images), labels).backward()
    found = {name: value.grad.clone() for name, value in model.named_parameters() if value.grad is not None}
    model.zero_grad(set_to_none=True)
    return found


def test_elements_are_squared_one_by_one(net):
    model, _, analysis = net
    got, grads, weights = scores(net, "taylor-elements"), gradients(model, *images_and_labels(net)), model.state_dict()
    for cluster in analysis.clusters:
        for group in range(cluster.size):
            want = sum(
                float((part(grads[n], d, i) * part(weights[n], d, i)).double().square().sum())
                for n, d, i in slices(cluster, group)
            )
            assert got[cluster.name].scores[group] == pytest.approx(want, rel=1e-3, abs=1e-12)


@pytest.mark.parametrize("name", ["fisher", "fisher-sampled"])
def test_fisher_is_the_mean_over_samples_of_the_squared_sum_over_the_group(net, name):
    model, _, analysis = net
    got, weights = scores(net, name, seed=3), model.state_dict()
    images, labels = images_and_labels(net)
    if name == "fisher-sampled":
        draw = torch.Generator().manual_seed(3)
        with torch.no_grad():
            shares = [model(x[None]).double().softmax(1) for x in images]
        labels = torch.cat([torch.multinomial(p, 1, generator=draw).flatten() for p in shares])
    singles = [gradients(model, images[at : at + 1], labels[at : at + 1]) for at in range(len(images))]
    for cluster in analysis.clusters:
        for group in range(cluster.size):
            mine = slices(cluster, group)
            effects = [
                sum(float((part(g[n], d, i) * part(weights[n], d, i)).double().sum()) for n, d, i in mine)
                for g in singles
            ]
            assert got[cluster.name].scores[group] == pytest.approx(np.square(effects).mean() / 2, rel=1e-3, abs=1e-12)
    batch = {c: np.square(r.scores) for c, r in scores(net, "taylor").items()}
    assert any(not np.allclose(batch[c], got[c].scores * 2, rtol=0.1) for c in got)  # one gradient would not do


def test_labels_that_are_drawn_need_none_and_follow_the_seed(net):
    model, data, analysis = net
    wanted = CRITERIA["fisher-sampled"].observes
    seen = [observe(model, data, TASK, wanted, analysis, seed=seed).effects["up"] for seed in (3, 3, 4)]
    assert (seen[0] == seen[1]).all()
    assert (seen[0] != seen[2]).any()
    flipped = Data(**{**vars(data), "calibration": replace(data.calibration, labels=4 - data.calibration.labels)})
    assert (observe(model, flipped, TASK, wanted, analysis, seed=3).effects["up"] == seen[0]).all()


# ── what readers see ─────────────────────────────────────────────────────────────────────────────────────────────────

READERS = {
    "stem": ["a", "into", "attention.in_proj", "up", "head"], "a": ["b"], "into": ["grouped"], "grouped": ["out"],
    "attention": ["attention.out_proj"], "up": ["down"],
}  # fmt: skip


def seen_by(model, images):
    """Reader -> (rows, channels, taps) of what each channel of its input gives, all positions of all samples."""
    caught = {}
    hooks = [
        module.register_forward_pre_hook(lambda m, args, name=name: caught.__setitem__(name, args[0].detach()))
        for name, module in model.named_modules()
    ]
    with torch.no_grad():
        model(images)
        h = caught["attention"]
        w, bias, own = model.attention.in_proj_weight, model.attention.in_proj_bias, model.attention
        q, k, v = ((h @ w.T + bias).unflatten(-1, (3, 4, 2))).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        assert torch.allclose(own.out_proj(mixed), own(h, h, h, need_weights=False)[0], atol=1e-5)
    for hook in hooks:
        hook.remove()
    caught["attention.in_proj"], caught["attention.out_proj"] = h, mixed
    found = {}
    for name, (kernel, stride, pad) in {
        "a": (3, 1, 1),
        "into": (1, 1, 0),
        "b": (1, 1, 0),
        "grouped": (3, 2, 1),
    }.items():
        x = caught[name]
        taps = F.unfold(x, kernel, padding=pad, stride=stride).unflatten(1, (x.shape[1], kernel**2))
        found[name] = taps.permute(0, 3, 1, 2).flatten(0, 1)
    x = caught["out"]  # stride and kernel 2: each output position reads one input position through one of four taps
    spread = x.new_zeros(len(x), 12, 2, 2, *x.shape[2:], 4)
    for tap in range(4):
        spread[:, :, tap // 2, tap % 2, :, :, tap] = x
    found["out"] = spread.permute(0, 2, 3, 4, 5, 1, 6).flatten(0, 4)
    for name in ("up", "down", "head", "attention.in_proj", "attention.out_proj"):
        found[name] = caught[name].reshape(-1, caught[name].shape[-1], 1)
    return {name: value.double() for name, value in found.items()}


def weight_by(model, reader):
    """(outputs, channels, taps); channels that an output does not read have zeros."""
    if reader == "attention.in_proj":
        return model.attention.in_proj_weight.detach().unsqueeze(2).double()
    weight = model.get_submodule(reader).weight.detach().double()
    if reader == "grouped":
        whole = weight.new_zeros(12, 12, 9)
        for o in range(12):
            whole[o, o // 4 * 4 : o // 4 * 4 + 4] = weight[o].flatten(1)
        return whole
    if reader == "out":
        return weight.transpose(0, 1).flatten(2)
    return weight.flatten(2) if weight.dim() > 2 else weight.unsqueeze(2)


def channels(net, cluster, reader, group):
    """Channels of the reader's input that belong to a group, by the channel's own producer."""
    if cluster.name in ("into", "grouped"):
        return [group, group + 4, group + 8]
    return [2 * group, 2 * group + 1] if cluster.name == "attention" else [group]


@pytest.mark.parametrize("name", ["wanda", "flap"])
def test_activations_weigh_the_columns_of_all_readers(net, name):
    model, _, analysis = net
    got, seen = scores(net, name), seen_by(model, images_and_labels(net)[0])
    assert set(got) == set(READERS)
    for cluster in analysis.clusters:
        assert got[cluster.name].by == name
        for group in range(cluster.size):
            want = 0.0
            for reader in READERS[cluster.name]:
                weight, x = weight_by(model, reader), seen[reader]
                for channel in channels(net, cluster, reader, group):
                    for tap in range(x.shape[2]):
                        column, values = weight[:, channel, tap], x[:, channel, tap]
                        if name == "wanda":
                            want += float(column.abs().sum() * values.square().mean().sqrt())
                        else:
                            want += float(column.square().sum() * values.var(unbiased=False))
            assert got[cluster.name].scores[group] == pytest.approx(want, rel=1e-4)


def test_reconstruction_is_what_the_best_refit_of_the_rest_leaves(net):
    """Solved anew for each group, over the whole unfolding, by least squares with the ridge as further rows."""
    model, _, analysis = net
    got, seen = scores(net, "reconstruction"), seen_by(model, images_and_labels(net)[0])
    for cluster in analysis.clusters:
        for group in range(cluster.size):
            want = 0.0
            for reader in READERS[cluster.name]:
                want += least_loss(net, cluster, reader, group, weight_by(model, reader), seen[reader])
            assert got[cluster.name].scores[group] == pytest.approx(want, rel=1e-3)


def least_loss(net, cluster, reader, group, weight, x):
    sections = [range(0, 4), range(4, 8), range(8, 12)] if reader == "grouped" else [range(weight.shape[1])]
    lost, given = 0.0, 0.0
    for section in sections:  # of a grouped convolution, each by itself
        own = list(section)
        outputs = own if reader == "grouped" else list(range(weight.shape[0]))
        w = weight[outputs][:, own].flatten(1)
        rows = x[:, own].flatten(1)
        if reader not in ("up", "down"):  # the others have a bias
            rows = rows - rows.mean(0)
        rows = rows / len(rows) ** 0.5
        ridge = criteria.RIDGE * float(rows.square().sum(0).mean())
        moving = rows.square().sum(0) > 0  # what is always zero, behind a ReLU, is no loss
        rows_and_ridge = torch.cat([rows, ridge**0.5 * torch.diag(moving.double())])
        gone = torch.zeros(len(own), x.shape[2], dtype=torch.bool)
        for channel in channels(net, cluster, reader, group):
            if channel in own:
                gone[own.index(channel)] = True
        gone = gone.flatten()
        wanted = rows_and_ridge[:, gone] @ w[:, gone].T
        refit = torch.linalg.lstsq(rows_and_ridge[:, ~gone], wanted, driver="gelsd").solution
        lost += float((wanted - rows_and_ridge[:, ~gone] @ refit).square().sum())
        given += float((rows @ w.T).square().sum())
    return lost / given


def test_what_never_changes_is_worth_nothing_to_a_reader_with_a_bias():
    class Constant(nn.Module):
        def __init__(self, bias):
            super().__init__()
            self.a, self.b, self.head = nn.Conv2d(3, 6, 1), nn.Conv2d(6, 4, 1, bias=bias), nn.Linear(4, 5)
            with torch.no_grad():
                self.a.weight[2] = 0
                self.a.bias[2] = 7.3

        def forward(self, x):
            return self.head(self.b(self.a(x)).relu().mean((2, 3)))

    for bias in (True, False):
        model = Constant(bias).eval()
        analysis = analyse(capture(model, (torch.randn(2, 3, 6, 6),)))
        parts = split(4, 0), split(20, 1), split(4, 2)
        data = Data("noise", *parts, (Input("input", (3, 6, 6)),), "", tuple("abcde"))
        for name in ("flap", "reconstruction"):
            found = scores((model, data, analysis), name)["a"].scores
            constant, rest = found[2], np.delete(found, 2)
            assert (rest > 1e-9).all()
            assert constant < 1e-12 * rest.max() or (name == "reconstruction" and not bias and constant > 1e-3)


def test_a_gram_matrix_that_is_too_large_is_its_diagonal_and_says_so(net, monkeypatch):
    model, data, analysis = net
    monkeypatch.setattr(activations, "LARGEST_GRAM", 20 * 20)  # `a` and `grouped` have more columns
    seen = observe(model, data, TASK, frozenset({"grams"}), analysis)
    (read,) = seen.readers["a.weight"]
    assert read.gram is None and "72 columns" in read.reason
    assert seen.readers["up.weight"][0].gram is not None and not seen.readers["up.weight"][0].reason
    monkeypatch.setattr(activations, "ALL_GRAMS", 8 * 8)
    room = [
        r.gram for reads in observe(model, data, TASK, frozenset({"grams"}), analysis).readers.values() for r in reads
    ]
    assert sum(g.numel() for g in room if g is not None) <= 64


@pytest.mark.parametrize("count", [21, 20, 4, 1])
def test_batches_add_up_to_what_one_gives(net, monkeypatch, count):
    _, data, analysis = net
    samples = data.sample("calibration", count)
    whole = activations.observe_readers(analysis.captured, analysis.clusters, samples, grams=True)
    monkeypatch.setattr(sampling, "CHUNK", 4)  # 21 = 5 * 4 + 1: the last one joins a batch, none is of one
    monkeypatch.setattr(activations, "WAITING", 100)
    parts = activations.observe_readers(analysis.captured, analysis.clusters, samples, grams=True)
    assert set(parts) == set(whole)
    for name, (one, *_) in whole.items():
        (other, *_) = parts[name]
        assert one.rows == other.rows
        assert torch.allclose(one.mean, other.mean, atol=1e-6) and torch.allclose(one.square, other.square, atol=1e-6)
        assert torch.allclose(one.second(), other.second(), atol=1e-5)


@pytest.mark.parametrize(("asked", "judges"), [(64, 10), (2, 2)])
def test_curves_are_judged_on_samples_that_no_reader_was_observed_on(net, monkeypatch, asked, judges):
    model, data, analysis = net
    seen = []
    monkeypatch.setattr(
        "pipeline.selection.observe.observe_readers", lambda c, k, samples, **how: seen.append(samples[0]) or {}
    )

    def observed(data, wanted):
        seen.clear()
        return observe(model, data, TASK, frozenset(wanted), analysis, asked).samples

    (judging,) = observed(data, {"samples", "grams"})
    assert (len(judging), len(seen[0])) == (judges, 21 - judges)
    assert len(torch.cat([judging, seen[0]]).flatten(1).unique(dim=0)) == 21
    # Where nothing is fitted, or nobody would be left, all of them serve.
    assert len(observed(data, {"samples"})[0]) == min(asked, 21)
    assert observed(data, {"grams"}) is None and len(seen[0]) == 21
    one = data.some("calibration", 1)
    assert len(observed(one, {"samples", "grams"})[0]) == 1 and len(seen[0]) == 1


def test_positions_are_drawn_where_there_are_more_than_it_takes(net, monkeypatch):
    model, data, analysis = net
    whole = observe(model, data, TASK, frozenset({"activations"}), analysis).readers["a.weight"][0]
    assert whole.rows == 21 * 36
    monkeypatch.setattr(sampling, "ROWS", 100)
    monkeypatch.setattr(sampling, "PER_COLUMN", 1)
    few = [
        observe(model, data, TASK, frozenset({"activations"}), analysis, seed=s).readers["a.weight"][0]
        for s in (0, 0, 1)
    ]
    assert few[0].rows == 21 * 5
    assert torch.equal(few[0].mean, few[1].mean)
    assert not torch.equal(few[0].mean, few[2].mean)
    assert float(few[0].square.mean()) == pytest.approx(float(whole.square.mean()), rel=0.3)


def test_a_weight_that_two_operators_read_counts_both():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(6, 4), nn.Linear(4, 4)
            self.head = nn.Linear(4, 5)

        def forward(self, x):
            x = self.a(x.flatten(1)[:, :6])
            return self.head(self.b(self.b(x).relu()))

    torch.manual_seed(0)
    captured = capture(Twice().eval(), (torch.randn(2, 3, 6, 6),))
    analysis = analyse(captured)
    read = activations.observe_readers(captured, analysis.clusters, (torch.randn(9, 3, 6, 6),), grams=False)
    assert len(read["b.weight"]) == 2


# ── what no criterion can tell, and what is refused ──────────────────────────────────────────────────────────────────


def test_norm_scales_are_summed_over_the_group_and_clusters_without_one_go_by_l2(net):
    model = net[0]
    got, norms = scores(net, "batch-norm"), scores(net, "l2")
    want = model.bn.weight.abs() + model.norm.weight.abs()
    assert got["stem"].scores == pytest.approx(want.detach().double().numpy())
    for name in ("a", "grouped", "attention", "up"):
        assert got[name].by == "l2" and got[name].reason == "no norm scales it"
        assert (got[name].scores == norms[name].scores).all()


def test_a_cluster_whose_readers_have_no_rule_goes_by_l2():
    class Recurrent(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.lstm, self.head = nn.Linear(18, 8), nn.LSTM(8, 6, batch_first=True), nn.Linear(6, 5)

        def forward(self, x):
            return self.head(self.lstm(self.a(x.transpose(1, 2).flatten(2)))[0][:, -1])

    model = Recurrent().eval()
    analysis = analyse(capture(model, (torch.randn(2, 3, 6, 6),)))
    data = Data("noise", split(4, 0), split(8, 1), split(4, 2), (Input("input", (3, 6, 6)),), "", tuple("abcde"))
    ranked = scores((model, data, analysis), "wanda")
    assert ranked["a"].by == "l2" and "contraction" in ranked["a"].reason


def test_a_group_that_no_reader_with_a_rule_reads_is_not_taken_for_worthless():
    class Halves(nn.Module):
        """A recurrent layer reads half of the channels, a linear one the others."""

        def __init__(self):
            super().__init__()
            self.a, self.lstm, self.b = nn.Linear(18, 8), nn.LSTM(4, 6, batch_first=True), nn.Linear(4, 5)
            self.head = nn.Linear(6, 5)

        def forward(self, x):
            x = self.a(x.transpose(1, 2).flatten(2))
            return self.head(self.lstm(x[..., :4])[0][:, -1]) + self.b(x[..., 4:]).mean(1)

    model = Halves().eval()
    analysis = analyse(capture(model, (torch.randn(2, 3, 6, 6),)))
    data = Data("noise", split(4, 0), split(8, 1), split(4, 2), (Input("input", (3, 6, 6)),), "", tuple("abcde"))
    for name in ("wanda", "flap", "reconstruction", "elimination"):
        for ranked in scores((model, data, analysis), name).values():
            assert ranked.by == "l2" or (ranked.scores > 0).all()
    read = {("a.weight", 0): np.array([0, 1, 2, 3, -1, -1, -1, -1]), ("b.weight", 1): np.array([0, 1, -1, -1])}
    cluster = SimpleNamespace(name="a", size=4, unit=1, labels=read, readers=(("b.weight", 1),))
    seen = observe(model, data, TASK, frozenset({"activations", "grams"}), analysis)
    seen = replace(seen, readers=observe_b(model))
    for name in ("wanda", "flap", "reconstruction", "elimination"):
        assert rank(name, cluster, seen).by == "l2"


def observe_b(model):
    captured = capture(model, (torch.randn(2, 3, 6, 6),))
    cluster = SimpleNamespace(readers=(("b.weight", 1),))
    return activations.observe_readers(captured, [cluster], (torch.randn(8, 3, 6, 6),), grams=True)


def test_a_model_that_takes_no_batch_of_one_has_its_gradients_one_by_one_all_the_same(net):
    class Squeezing(nn.Module):
        def __init__(self, how):
            super().__init__()
            self.how, self.a, self.head = how, nn.Conv2d(3, 6, 1), nn.Linear(6, 5)

        def forward(self, x):
            x = self.a(x).relu().mean((2, 3), keepdim=True)
            if self.how == "strict" and len(x) == 1 and not torch.compiler.is_exporting():
                raise ValueError("more than one value per channel is expected")
            return self.head(x.squeeze() if self.how == "squeeze" else x.flatten(1))

    _, data, _ = net
    found = []
    for how in ("plain", "squeeze", "strict"):
        torch.manual_seed(5)
        model = Squeezing(how).eval()
        analysis = analyse(capture(model, (torch.randn(2, 3, 6, 6),)))
        found.append(observe(model, data, TASK, CRITERIA["fisher"].observes, analysis).effects["a"])
    assert found[1] == pytest.approx(found[0], rel=1e-4)
    assert found[2] == pytest.approx(found[0], rel=1e-4)


@pytest.mark.parametrize("name", ["wanda", "flap", "reconstruction", "elimination"])
def test_samples_that_are_all_alike_are_refused(net, name):
    model, data, analysis = net
    image = torch.randn(3, 6, 6)
    same = image_split(torch.zeros(9, dtype=torch.long), lambda chunks: (image.expand(len(c), 3, 6, 6) for c in chunks))
    with pytest.raises(DataError, match="all alike"):
        observe(model, replace(data, calibration=same), TASK, CRITERIA[name].observes, analysis)


def test_complex_weights_count_by_their_size():
    value = torch.tensor([[3 + 4j, 0], [0, 1j]])
    cluster = SimpleNamespace(name="a", size=2, labels={("a.weight", 0): np.arange(2)})
    seen = Evidence({"a.weight": value}, gradients={"a.weight": torch.tensor([[1j, 0], [0, 2 + 1j]])})
    assert CRITERIA["l1"].score(cluster, seen) == pytest.approx([5.0, 1.0])
    assert CRITERIA["l2"].score(cluster, seen) == pytest.approx([5.0, 1.0])
    assert CRITERIA["taylor"].score(cluster, seen) == pytest.approx([4.0, 1.0])
    assert CRITERIA["taylor-elements"].score(cluster, seen) == pytest.approx([16.0, 1.0])


def test_random_follows_the_seed_and_the_cluster(net):
    first, again, other = (scores(net, "random", seed=seed) for seed in (0, 0, 1))
    assert (first["into"].scores == again["into"].scores).all()
    assert (first["into"].scores != other["into"].scores).all()
    assert (first["into"].scores != first["grouped"].scores).all()


@pytest.mark.parametrize("name", CRITERIA)
def test_what_is_masked_goes_first_and_each_criterion_gives_finite_scores(net, name):
    model, data, analysis = net
    cluster = analysis.cluster("into")
    gone = np.arange(4) == 2
    model = Net().eval()
    model.load_state_dict(net[0].state_dict())
    held = analysis.masks({"into": gone})
    masks.apply(model, {n: torch.from_numpy(m) for n, m in held.items() if n in dict(model.named_parameters())})
    seen = observe(model, data, TASK, CRITERIA[name].observes, analysis)
    found = rank(name, cluster, seen).scores
    assert np.isfinite(found).all() and found[2] < np.delete(found, 2).min()


def test_what_is_masked_goes_before_what_is_merely_dead_on_the_samples(net):
    model, data, analysis = net
    model = Net().eval()
    model.load_state_dict(net[0].state_dict())
    with torch.no_grad():
        model.into.weight[[0, 4, 8]] = 0
        model.into.bias[[0, 4, 8]] = -1.0
    held = analysis.masks({"into": np.arange(4) == 2})
    masks.apply(model, {n: torch.from_numpy(m) for n, m in held.items() if n in dict(model.named_parameters())})
    for name in CRITERIA:
        found = rank(
            name, analysis.cluster("into"), observe(model, data, TASK, CRITERIA[name].observes, analysis)
        ).scores
        assert lowest(found, 1).tolist() == [False, False, True, False], name


def test_labels_are_asked_for_before_anything_is_spent():
    needing = {name for name, row in CRITERIA.items() if row.labels}
    assert needing == {"taylor", "taylor-elements", "fisher"}
    for name in CRITERIA:
        criteria.require_labels(name, labelled=True)
        if name not in needing:
            criteria.require_labels(name, labelled=False)
    with pytest.raises(ConfigError, match="'fisher' needs the labels") as caught:
        criteria.require_labels("fisher", labelled=False)
    assert "fisher-sampled" in caught.value.hint and "wanda" in caught.value.hint


@pytest.mark.parametrize(
    ("name", "broken", "said"),
    [("wanda", "a", "b reads"), ("reconstruction", "stem", "a reads"), ("taylor", "stem", "gradients of"),
     ("fisher", "a", "gradients of"), ("fisher-sampled", "stem", "outputs")],
)  # fmt: skip
def test_numbers_that_are_not_finite_name_the_layer(net, name, broken, said):
    model = Net().eval()
    model.load_state_dict(net[0].state_dict())
    with torch.no_grad():
        model.get_submodule(broken).weight.fill_(1e38)
    _, data, analysis = net
    with pytest.raises(ModelError, match=said):
        observe(model, data, TASK, CRITERIA[name].observes, analysis)


def test_every_row_says_where_it_is_from_and_what_it_looks_at():
    sees = {name: row.sees for name, row in CRITERIA.items()}
    assert {n for n, s in sees.items() if s == "nothing"} == {"l1", "l2", "batch-norm", "random"}
    assert {n for n, s in sees.items() if s == "activations"} == {"wanda", "flap", "reconstruction", "elimination"}
    assert all(row.source and row.words and row.cost for row in CRITERIA.values())


def test_the_page_about_choice_has_the_table():
    page = (Path(__file__).parents[3] / "docs" / "choice.md").read_text()
    for name, row in CRITERIA.items():
        cells = (f"`{name}`", row.words, row.sees, "yes" if row.labels else "no", row.cost, row.source)
        assert f"| {' | '.join(cells)} |" in page, name
    assert set(re.findall(r"^\| `([\w-]+)` \|", page, re.MULTILINE)) == set(CRITERIA)
