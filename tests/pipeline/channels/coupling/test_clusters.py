"""What one calls a layer's width: which classes make a cluster, its name, its kind, and who writes and reads it."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.channels import Policy, analyse, capture

IMAGE = torch.randn(2, 3, 6, 6)


class Net(nn.Module):
    """A stem whose channels are read twice, one half of them by a branch of its own, and two linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8)
        self.part, self.whole = nn.Conv2d(4, 6, 1), nn.Conv2d(8, 6, 1)
        self.fc1, self.fc2 = nn.Linear(6, 5), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.stem(x)))
        x = self.part(x[:, :4]) + self.whole(x)
        return self.fc2(F.relu(self.fc1(F.relu(x.mean((2, 3))))))


def test_indices_with_the_same_readers_make_one_cluster() -> None:
    found = {c.name: c for c in analyse(capture(Net(), (IMAGE,))).clusters}
    assert {n: (c.size, c.kind) for n, c in found.items()} == {
        "stem": (4, "channel"), "stem@2": (4, "channel"), "part": (6, "channel"), "fc1": (5, "neuron"),
    }  # fmt: skip
    first, second = found["stem"], found["stem@2"]
    assert first.readers == (("part.weight", 1), ("whole.weight", 1)) and second.readers == (("whole.weight", 1),)
    assert set(first.producers) == {("stem.weight", 0), ("stem.bias", 0), ("norm.weight", 0), ("norm.bias", 0)}
    assert first.labels["whole.weight", 1].tolist() == [0, 1, 2, 3, -1, -1, -1, -1]
    assert second.labels["whole.weight", 1].tolist() == [-1, -1, -1, -1, 0, 1, 2, 3]
    assert found["part"].producers[0][0] == "part.weight", "the first matrix that writes it names a cluster"


def test_every_parameter_is_removable_or_blocked_for_a_reason() -> None:
    analysis = analyse(capture(Net(), (IMAGE,)))
    kept = {(b.op, b.reason): b.params for b in analysis.blocked}
    assert analysis.params - round(analysis.removable_share * analysis.params) == sum(kept.values()) == 3
    assert kept == {("output", "an output of the model"): 3}, "the last bias alone lies in no removable slice"


def test_the_policy_keeps_kinds_and_says_so() -> None:
    analysis = analyse(capture(Net(), (IMAGE,)), Policy(neurons=False))
    assert "fc1" not in {c.name for c in analysis.clusters}
    reasons = {b.reason for b in analysis.blocked}
    assert "the recipe keeps this kind of group, or it is the only one of its kind" in reasons


class Parallel(nn.Module):
    """Heads of one channel each: a head is the unit, and its indices in the leading tensor are counted."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(8, 24), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).view(x.shape[0], -1, 3, 2, 4).permute(2, 0, 3, 1, 4).unbind(0)
        return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


def test_a_head_is_a_unit_of_as_many_indices_as_its_leading_tensor_holds() -> None:
    (cluster,) = analyse(capture(Parallel(), (torch.randn(2, 5, 8),))).clusters
    assert (cluster.name, cluster.kind, cluster.size, cluster.unit) == ("qkv", "head", 2, 12)
    assert cluster.labels["out.weight", 1].tolist() == [0] * 4 + [1] * 4


class Backwards(nn.Module):
    """What reads the channels, in reverse, is named before what writes them."""

    def __init__(self) -> None:
        super().__init__()
        self.head, self.stem = nn.Conv2d(4, 2, 1), nn.Conv2d(3, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.stem(x).flip(1))


def test_groups_are_numbered_as_the_leading_tensor_holds_them() -> None:
    (cluster,) = analyse(capture(Backwards(), (IMAGE,))).clusters
    assert cluster.name == "stem" and cluster.labels["stem.weight", 0].tolist() == [0, 1, 2, 3]
    assert cluster.labels["head.weight", 1].tolist() == [3, 2, 1, 0]
