"""Writes into parts of a tensor: through views of every kind, at lists of places, by masks.

What eager code writes through a view is read through the tensor and its other views; a copy in the view's place would
lose it.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from exporters import to_onnx
from foundation.editor import writes
from pipeline.channels import analyse, capture
from pipeline.channels.program.capture import Captured

Body = Callable[[Tensor, Tensor, Tensor], Tensor]
IMAGE = torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(1))


def places(*at: int) -> Tensor:
    return torch.tensor(at)


def over_rows(y: Tensor) -> Tensor:
    return torch.tensor([0, 2])[None, None, :, None].expand(y.shape[0], 16, 2, 6)


class Written(nn.Module):
    """Two convolutions side by side, 8 channels each; the body writes into their 16 channels; two more behind it."""

    def __init__(self, body: Callable[..., Any]) -> None:
        super().__init__()
        self.body = body
        self.a, self.b = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(3, 8, 3, padding=1)
        self.into, self.out = nn.Conv2d(16, 12, 3, padding=1), nn.Conv2d(12, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        a, b = F.relu(self.a(x)), torch.tanh(self.b(x))
        y = torch.cat([a, b], 1)
        y = self.body(y, a, b)
        return self.out(F.relu(self.into(y)))


BODIES: dict[str, Body] = {}


def body(function: Body) -> Body:
    BODIES[function.__name__] = function
    return function


@body
def interleaved(y: Tensor, a: Tensor, b: Tensor) -> Tensor:
    z = y.new_zeros(y.shape)
    z[:, ::2] = a
    z[:, 1::2] = b
    return z


@body
def halves(y: Tensor, a: Tensor, b: Tensor) -> Tensor:
    z = y.new_zeros(y.shape)
    z[:, :8] = b
    z[:, 8:].add_(a)
    return z


@body
def strided_twice(y: Tensor, a: Tensor, b: Tensor) -> Tensor:
    y[:, ::2][:, 1::2].mul_(a[:, ::2])
    return y


@body
def copied_and_scaled(y: Tensor, a: Tensor, b: Tensor) -> Tensor:
    y[:, ::2].copy_(b)
    y[:, 1::4].mul_(0.5)
    return y


@body
def read_through_an_older_view(y: Tensor, a: Tensor, b: Tensor) -> Tensor:
    one, other = y[:, ::2], y[:, 1:9]
    other.mul_(2)
    return torch.cat([one, other], 1)


@body
def whole_written_under_a_view(y: Tensor, a: Tensor, b: Tensor) -> Tensor:
    one = y[:, ::2]
    y.add_(1)
    return torch.cat([one, y[:, ::2]], 1)


@body
def one_chunk(y: Tensor, a: Tensor, b: Tensor) -> Tensor:
    one, other = y.chunk(2, 1)
    one += other
    return y


@body
def one_place(y: Tensor, a: Tensor, b: Tensor) -> Tensor:
    y[:, 3] += y[:, 4]
    y.select(1, 7).zero_()
    return y


@body
def constants(y: Tensor, a: Tensor, b: Tensor) -> Tensor:
    y[:, 1::4] = 1.5
    y[:, ::8].zero_()
    return y


@body
def one_of_a_pair(y: Tensor, a: Tensor, b: Tensor) -> Tensor:
    y.unflatten(1, (8, 2))[:, :, 0].mul_(2)
    return y


@body
def pairs_by_a_view(y: Tensor, a: Tensor, b: Tensor) -> Tensor:
    y.view(y.shape[0], 8, 2, 6, 6)[:, :, 1] = a
    return y


@body
def places_of_space(y: Tensor, a: Tensor, b: Tensor) -> Tensor:
    y[:, :, ::2, 1::2] = y[:, :, 1::2, ::2]
    return y


@body
def dimensions_in_another_order(y: Tensor, a: Tensor, b: Tensor) -> Tensor:
    z = y.permute(0, 2, 3, 1)
    z[..., ::2] = z[..., 1::2]
    y.transpose(1, 2)[:, ::2].mul_(0.5)
    return y


@body
def relu_of_a_slice(y: Tensor, a: Tensor, b: Tensor) -> Tensor:
    F.relu_(y[:, 5:])
    y.unsqueeze(2)[:, ::2, 0].clamp_(max=0.5)
    return y


@body
def operand_of_a_dropout(y: Tensor, a: Tensor, b: Tensor) -> Tensor:
    z = F.dropout(y, 0.5, False)  # in evaluation it gives y itself
    z[:, ::2] = 0
    return y + z


@body
def list_added_to(y: Tensor, a: Tensor, b: Tensor) -> Tensor:
    y[:, [0, 3, 5, 9]] += a[:, :4]
    return y


@body
def list_written(y: Tensor, a: Tensor, b: Tensor) -> Tensor:
    y[:, [1, 2, 9, 4]] = b[:, :4]
    return y


@body
def lists_by_name(y: Tensor, a: Tensor, b: Tensor) -> Tensor:
    y = y.index_add(1, places(0, 2, 4, 6, 8, 10, 12, 14), a, alpha=-1)
    y = y.index_copy(1, places(1, 3, 5, 7, 9, 11, 13, 15), b)
    return y.index_fill(1, places(2, 5), 0.3)


@body
def list_of_places_of_space(y: Tensor, a: Tensor, b: Tensor) -> Tensor:
    y[:, :, [0, 2]] = y[:, :, [1, 4]]
    return y


@body
def scattered_over_rows(y: Tensor, a: Tensor, b: Tensor) -> Tensor:
    y = y.scatter(2, over_rows(y), y[:, :, 3:5])
    return y.scatter_add(2, over_rows(y), y[:, :, 1:3])


@body
def scattered_by_name(y: Tensor, a: Tensor, b: Tensor) -> Tensor:
    return torch.select_scatter(torch.slice_scatter(y, a, 1, 0, 16, 2), b[:, 3], 1, 5)


@body
def filled_by_a_mask(y: Tensor, a: Tensor, b: Tensor) -> Tensor:
    y[y < 0] = 0.0
    y[:, ::2].masked_fill_(y[:, ::2] > 0.5, 0.0)
    return y


@body
def masks_written(y: Tensor, a: Tensor, b: Tensor) -> Tensor:
    mask = y > 0
    mask[:, ::2] &= a > 0.2
    mask[:, 1::2] |= b > 0.1
    return y * mask


@body
def truth_kept_as_a_number(y: Tensor, a: Tensor, b: Tensor) -> Tensor:
    y[:, ::2].gt_(0.1)  # in place the type stays
    return y


@body
def one_for_all_channels(y: Tensor, a: Tensor, b: Tensor) -> Tensor:
    y[:, ::2] = y.mean(1, keepdim=True)
    y[:1].mul_(2)
    return y


@body
def dealt_out(y: Tensor, a: Tensor, b: Tensor) -> Tensor:
    y = y.view(-1, 2, 8, 6, 6).transpose(1, 2).reshape(-1, 16, 6, 6)
    y[:, ::2].mul_(2)
    return y


@pytest.mark.parametrize("name", BODIES)
def test_channels_go_and_the_rest_is_exact(experiment: Any, name: str) -> None:
    torch.manual_seed(0)
    model = Written(BODIES[name]).eval()
    captured = capture(model, (IMAGE,))
    with torch.no_grad():
        assert torch.equal(model(IMAGE[:1]), captured(IMAGE[:1]))
    for seed in range(2):
        e = experiment(Written(BODIES[name]), IMAGE, seed=seed)
        assert not e.analysis.trace.unknown
        assert e.analysis.removable_share > 0.75
        assert not e.shrunk.refused
        assert e.control > 1e-3
        with torch.no_grad():  # the user's own code, masked, not the captured graph
            eager = Written(BODIES[name]).eval()
            eager.load_state_dict(dict(e.folded.state))
            for batch in (1, 4):
                x = torch.randn(batch, 3, 6, 6)
                torch.testing.assert_close(e.shrunk(x), eager(x), rtol=1e-5, atol=1e-5 * e.proof.output_scale)


@pytest.mark.parametrize("name", ["interleaved", "pairs_by_a_view", "list_added_to", "lists_by_name", "masks_written"])
def test_the_file_gives_the_same(experiment: Any, name: str, tmp_path: Path) -> None:
    e = experiment(Written(BODIES[name]), IMAGE)
    to_onnx(e.shrunk.program, tmp_path / "m.onnx", example=(IMAGE,), opset=20, metadata={})
    session = onnxruntime.InferenceSession(str(tmp_path / "m.onnx"), providers=["CPUExecutionProvider"])
    for batch in (1, 3):
        x = torch.randn(batch, 3, 6, 6)
        np.testing.assert_allclose(
            session.run(None, {"input": x.numpy()})[0],
            e.shrunk(x).detach(),
            rtol=1e-4,
            atol=1e-5 * e.proof.output_scale,
        )


def held(captured: Captured) -> list[str]:
    """The names of the writes in place that are left."""
    return [n.name for n in captured.program.graph.nodes if n.op == "call_function" and writes(n)]


def test_a_write_to_a_whole_tensor_stays_in_place() -> None:
    captured = capture(nn.Sequential(nn.Conv2d(3, 8, 1), nn.ReLU(inplace=True), nn.Conv2d(8, 2, 1)), (IMAGE,))
    assert held(captured) == ["relu_"]


def test_a_dropout_in_place_behind_a_view_holds_no_channel(experiment: Any) -> None:
    """As at the end of torchvision's EfficientNets: in evaluation it writes what is there."""
    net = [nn.Conv2d(3, 8, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(0.2, inplace=True), nn.Linear(8, 4)]
    e = experiment(nn.Sequential(*net), IMAGE)
    assert e.analysis.removable_share > 0.9
    assert not e.shrunk.refused and e.control > 1e-3
    assert e.shrunk.program.state_dict["0.weight"].shape[0] < 8


def strided_over_memory(y: Tensor, a: Tensor, b: Tensor) -> Tensor:
    y.as_strided((4,), (7,)).mul_(2)
    return y


def test_a_write_that_is_not_followed_is_named() -> None:
    analysis = analyse(capture(Written(strided_over_memory).eval(), (IMAGE,)))
    assert held(analysis.captured) == ["mul_"]
    assert any(b.node in ("as_strided", "mul_") for b in analysis.blocked)
    assert analysis.trace.unknown or any("written in place" in b.reason for b in analysis.blocked)


class Remembered(nn.Module):
    """It writes into a table of its own, which outlives the call."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("table", torch.ones(1, 8, 6, 6))
        self.a, self.out = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        table: Any = self.table
        table[:, ::2] = 2.0
        return self.out(self.a(x) * table)


def test_a_write_into_the_state_keeps_its_channels() -> None:
    analysis = analyse(capture(Remembered().eval(), (IMAGE,)))
    assert any("written in place through a view" in b.reason for b in analysis.blocked)
    assert not any(c.size for c in analysis.clusters)


class Side(nn.Module):
    def __init__(self, table: nn.Embedding) -> None:
        super().__init__()
        self.table, self.up, self.down = table, nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.down(F.relu(self.up(self.table(tokens))))


class Shifted(nn.Module):
    """One table under three names, and the tokens shifted by writing them into others: encoder-decoders in small."""

    def __init__(self) -> None:
        super().__init__()
        self.shared = nn.Embedding(10, 8)
        self.encoder, self.decoder, self.head = Side(self.shared), Side(self.shared), nn.Linear(8, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        before = tokens.new_zeros(tokens.shape)
        before[:, 1:] = tokens[:, :-1].clone()
        before[:, 0] = 2
        before.masked_fill_(before == 3, 4)
        return self.head((self.encoder(tokens) + self.decoder(before)).mean(1))


def test_a_table_under_several_names_stays_a_parameter_under_each(experiment: Callable[..., Any]) -> None:
    e = experiment(Shifted(), torch.randint(0, 10, (2, 5)))
    assert not e.shrunk.refused and e.proof.max_abs_diff <= e.proof.tolerance < e.control
