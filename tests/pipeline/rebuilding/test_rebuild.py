"""One small net for each way in which a class keeps the numbers that its forward needs: smaller, it is the program."""

from __future__ import annotations

import copy
import pickle
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.channels import Policy, Trainable, analyse, capture, liveness, shrink
from pipeline.rebuilding import restore
from pipeline.rebuilding.numbers import uses
from pipeline.rebuilding.rebuild import rebuild, state_of
from tests.pipeline.channels.conftest import randomise

IMAGES = torch.randn(2, 3, 8, 8)
SEQUENCES = torch.randn(2, 5, 12)


def made(model: nn.Module, *inputs: Tensor, going: Any = None, policy: Policy | None = None) -> Any:
    """(rebuilt module or None, structure, captured, shrunk); `going`: cluster size -> bool array, half by default."""
    randomise(model, 0)
    captured = capture(model.eval(), inputs)
    analysis = analyse(captured, policy)
    removed = {c.name: (going or (lambda n: np.arange(n) < n // 2))(c.size) for c in analysis.clusters}
    folded = captured.fold(analysis.masks(removed))
    shrunk = shrink(folded, analysis, removed)
    return *rebuild(model, folded, analysis, removed, shrunk), folded, shrunk


def check(model: nn.Module, *inputs: Tensor, **options: Any) -> Any:
    """The rebuilt module is of the same class, smaller, gives the program's outputs, and the model stays as it was."""
    parameters = sum(p.numel() for p in model.parameters())
    rebuilt, structure, folded, shrunk = made(model, *inputs, **options)
    assert structure.original, structure.why
    assert type(rebuilt) is type(model)
    assert sum(p.numel() for p in rebuilt.parameters()) < parameters == sum(p.numel() for p in model.parameters())
    torch.testing.assert_close(rebuilt(*inputs), folded(*inputs), rtol=1e-4, atol=1e-5)
    again = restore.restructured(
        copy.deepcopy(model),
        structure,
        state_of(shrunk.program, shrunk.ledger, folded.state, structure.biases, structure.kept),
    )
    assert torch.equal(again(*inputs), rebuilt(*inputs))
    stored = type(structure).model_validate_json(structure.model_dump_json())
    assert stored == structure
    return rebuilt


class Attention(nn.Module):
    """Numbers by name and by product, as timm and transformers keep them."""

    def __init__(self, heads: int = 4, dim: int = 3, product: bool = False) -> None:
        super().__init__()
        self.heads, self.dim, self.product = heads, dim, product
        self.inner = heads * dim
        self.qkv, self.out = nn.Linear(12, 3 * self.inner), nn.Linear(self.inner, 12)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).reshape(len(x), x.shape[1], 3, self.heads, self.dim).permute(2, 0, 3, 1, 4).unbind(0)
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2)
        width = self.heads * self.dim if self.product else self.inner
        return self.out(y.reshape(len(x), x.shape[1], width))


@pytest.mark.parametrize("product", [False, True])
def test_heads_go_and_positions_stay(product: bool) -> None:
    rebuilt = check(Attention(product=product), SEQUENCES, policy=Policy(head_positions=False))
    assert (rebuilt.heads, rebuilt.dim) == (2, 3)
    assert rebuilt.inner == (12 if product else 6)  # a number that nothing reads stays


class TorchsScale(nn.Module):
    """Attention with torch's own scale, and layers beside it that can do with less."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = Attention(heads=2, dim=8)
        self.up, self.down = nn.Linear(12, 96), nn.Linear(96, 12)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(x)
        return x + self.down(self.up(x).relu())


def test_attention_whose_scale_follows_the_width_of_a_head_keeps_it_and_the_rest_is_small() -> None:
    rebuilt, structure, folded, _ = made(TorchsScale(), SEQUENCES, policy=Policy(heads=False, head_positions=True))
    assert rebuilt is not None, structure.why
    assert "Attention keep their pruned channels, as zeros" in structure.why
    assert (rebuilt.attention.dim, rebuilt.up.out_features) == (8, 48)
    torch.testing.assert_close(rebuilt(SEQUENCES), folded(SEQUENCES), rtol=1e-4, atol=1e-5)


class AsManyHeadsAsPositions(nn.Module):
    """Four heads of four positions: what becomes two is told by where it goes, not by its value."""

    def __init__(self) -> None:
        super().__init__()
        self.dim, self.heads = 4, 4
        self.q, self.k, self.v = (nn.Linear(12, 16) for _ in range(3))
        self.out = nn.Linear(16, 12)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (one(x).view(len(x), -1, self.heads, self.dim).transpose(1, 2) for one in (self.q, self.k, self.v))
        return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


def test_two_equal_numbers_are_told_apart() -> None:
    rebuilt = check(AsManyHeadsAsPositions(), SEQUENCES, policy=Policy(head_positions=False))
    assert (rebuilt.heads, rebuilt.dim) == (2, 4)


class Split(nn.Module):
    """Parts of their own sizes, and the same where all were of one."""

    def __init__(self, sizes: Any) -> None:
        super().__init__()
        self.sizes = sizes
        self.first = nn.Conv2d(3, 12, 1)
        self.parts = nn.ModuleList(
            nn.Conv2d(n, 6, 3) for n in ([sizes] * (12 // sizes) if type(sizes) is int else sizes)
        )

    def forward(self, x: Tensor) -> Tensor:
        parts = torch.split(self.first(x).relu(), self.sizes, 1)
        return sum(part(one) for part, one in zip(self.parts, parts, strict=True)).mean((2, 3))


def test_split_sizes() -> None:
    assert sum(check(Split((6, 2, 4)), IMAGES).sizes) == check(Split((6, 2, 4)), IMAGES).first.out_channels == 6


def test_equal_parts_become_unequal_ones() -> None:
    counts = iter((1, 2, 3))
    rebuilt = check(Split(4), IMAGES, going=lambda n: np.arange(n) < (next(counts) if n == 4 else 0))
    assert sorted(rebuilt.sizes) == [1, 2, 3]


class SplitAndCounted(nn.Module):
    """A size that would become a list of sizes, in a product besides."""

    def __init__(self) -> None:
        super().__init__()
        self.size, self.count = 4, 3
        self.first, self.last = nn.Conv2d(3, 12, 1), nn.Conv2d(12, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        parts = torch.split(self.first(x).relu(), self.size, 1)
        x = torch.cat([part.tanh() for part in parts], 1)
        return self.last(x.reshape(len(x), self.size * self.count, *x.shape[2:])).mean((2, 3))


def test_a_list_of_sizes_in_a_product_is_no_crash() -> None:
    counts = iter((1, 2, 3))
    rebuilt, structure, *_ = made(SplitAndCounted(), IMAGES, going=lambda n: np.arange(n) < next(counts))
    assert rebuilt is None
    assert "SplitAndCounted does not compute" in structure.why


class Depthwise(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 3, groups=8)
        self.norm, self.c = nn.BatchNorm2d(8), nn.ConvTranspose2d(8, 4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.c(self.norm(self.b(self.a(x))).relu()).mean((2, 3))


def test_layers_know_their_widths() -> None:
    rebuilt = check(Depthwise(), IMAGES)
    assert (rebuilt.b.groups, rebuilt.b.in_channels, rebuilt.b.out_channels, rebuilt.norm.num_features) == (4, 4, 4, 4)
    assert (rebuilt.c.in_channels, rebuilt.c.out_channels) == (4, 4)
    assert "Conv2d(3, 4," in str(rebuilt)


@dataclass
class Settings:
    heads: int = 4
    dim: int = 3


class Configured(nn.Module):
    """Two layers that read one config object, of which another number of heads goes in each."""

    class Layer(nn.Module):
        def __init__(self, settings: Settings) -> None:
            super().__init__()
            self.settings = settings
            inner = settings.heads * settings.dim
            self.qkv, self.out = nn.Linear(12, 3 * inner), nn.Linear(inner, 12)

        def forward(self, x: Tensor) -> Tensor:
            shape = (len(x), x.shape[1], 3, self.settings.heads, self.settings.dim)
            q, k, v = self.qkv(x).reshape(shape).permute(2, 0, 3, 1, 4).unbind(0)
            return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))

    def __init__(self) -> None:
        super().__init__()
        settings = Settings()
        self.one, self.two = self.Layer(settings), self.Layer(settings)

    def forward(self, x: Tensor) -> Tensor:
        return self.two(x + self.one(x).tanh())


def test_a_config_that_layers_share_differs_afterwards() -> None:
    counts = iter((1, 2))

    def going(size: int) -> Any:
        return np.arange(size) < (next(counts) if size == 4 else 0)

    rebuilt = check(Configured(), SEQUENCES, policy=Policy(head_positions=False), going=going)
    assert sorted((rebuilt.one.settings.heads, rebuilt.two.settings.heads)) == [2, 3]


class Recurrent(nn.Module):
    def __init__(self, kind: type[nn.RNNBase], **options: Any) -> None:
        super().__init__()
        self.rnn, self.head = kind(12, 8, batch_first=True, **options), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.rnn(x)[0][:, -1])


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_recurrent_layers(kind: type[nn.RNNBase]) -> None:
    rebuilt = check(Recurrent(kind), SEQUENCES)
    assert rebuilt.rnn.hidden_size == 4
    rebuilt.train()(SEQUENCES).sum().backward()
    assert all(p.grad is not None for p in rebuilt.parameters())


class Constants(nn.Module):
    """A norm without scale leaves constants, which need a bias that the next layer does not have."""

    def __init__(self, shift_in_a_sum: bool = False) -> None:
        super().__init__()
        self.a, self.norm, self.b = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 4, 3, bias=False)
        self.last = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.b(self.norm(self.a(x)).relu()).relu().mean((2, 3)))


def test_a_bias_is_put_in_where_constants_went() -> None:
    model = Constants()
    randomise(model, 0)
    with torch.no_grad():
        model.norm.weight[:3] = 0.0
        model.norm.bias[:3] = 1.0
    captured = capture(model.eval(), (IMAGES,))
    analysis = analyse(captured)
    live = liveness(analysis, captured.state)
    shrunk = shrink(captured, analysis, live.dead, refused=live.refusals)
    assert any(fold.created for fold in shrunk.ledger.folds)
    rebuilt, structure = rebuild(model, captured, analysis, live.dead, shrunk)
    assert structure.original, structure.why
    assert rebuilt.b.bias is not None and model.b.bias is None
    torch.testing.assert_close(rebuilt(IMAGES), model(IMAGES), rtol=1e-4, atol=1e-5)
    again = restore.restructured(
        copy.deepcopy(model),
        structure,
        state_of(shrunk.program, shrunk.ledger, captured.state, structure.biases, structure.kept),
    )
    assert torch.equal(again(IMAGES), rebuilt(IMAGES))


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table, self.mid = nn.Embedding(11, 12), nn.Linear(12, 12)
        self.head = nn.Linear(12, 11, bias=False)
        self.head.weight = self.table.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.mid(self.table(ids)).relu())


def test_what_was_tied_stays_tied() -> None:
    rebuilt = check(Tied(), torch.randint(0, 11, (2, 5)))
    assert rebuilt.head.weight is rebuilt.table.weight
    assert rebuilt.table.embedding_dim == rebuilt.head.in_features < 12


class FromTheInput(nn.Module):
    """Takes the width of the attention for that of the stream: with fewer heads its own forward fails."""

    def __init__(self) -> None:
        super().__init__()
        self.heads = 4
        self.qkv, self.out = nn.Linear(12, 36), nn.Linear(12, 12)

    def forward(self, x: Tensor) -> Tensor:
        b, n, c = x.shape
        q, k, v = self.qkv(x).reshape(b, n, 3, self.heads, c // self.heads).permute(2, 0, 3, 1, 4).unbind(0)
        return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, n, c))


class Scaled(nn.Module):
    """Computes another function with fewer channels, without failing: a mean over them."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(12, 8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x).relu()
        return self.b(y) + y.mean(-1, keepdim=True)


@pytest.mark.parametrize(("model", "says"), [(FromTheInput(), "FromTheInput"), (Scaled(), "differ by")])
def test_a_class_that_cannot_is_named_and_the_program_stands_in(model: nn.Module, says: str) -> None:
    rebuilt, structure, folded, shrunk = made(model, SEQUENCES, policy=Policy(head_positions=False))
    assert rebuilt is None and not structure.original
    assert says in structure.why
    program = restore.marked(Trainable(shrunk.program), structure)
    assert {name for name, _ in program.named_parameters()} == {name for name, _ in model.named_parameters()}
    torch.testing.assert_close(program(SEQUENCES), folded(SEQUENCES))
    twin = copy.deepcopy(program).train()
    torch.optim.SGD(twin.parameters(), 0.1).step(lambda: twin(SEQUENCES).square().sum().backward())
    assert not torch.equal(twin(SEQUENCES), program(SEQUENCES))
    assert twin.leanort_structure is structure


class Halved(nn.Module):
    """A width that is only ever calculated with, and one that follows the tensor, divided by a number that stays."""

    def __init__(self) -> None:
        super().__init__()
        self.width, self.radix = 8, 2
        self.a, self.b, self.c = nn.Conv2d(3, 8, 1), nn.Conv2d(4, 8, 1), nn.Conv2d(4, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        one, two = self.a(x).relu().split(self.width // 2, dim=1)
        y = self.b(one + two).relu()
        return self.c(y.reshape(len(y), self.radix, y.shape[1] // self.radix, *y.shape[2:]).sum(1)).mean((2, 3))


def test_calculated_numbers() -> None:
    rebuilt = check(Halved(), IMAGES)
    assert (rebuilt.width, rebuilt.radix) == (4, 2)


class Block(nn.Module):
    """A part that cannot do with fewer heads, and one that can do with fewer neurons."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = FromTheInput()
        self.mlp = nn.Sequential(nn.Linear(12, 96), nn.ReLU(), nn.Linear(96, 12))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(x)
        return x + self.mlp(x)


def test_a_module_that_cannot_keeps_its_channels_as_zeros_which_training_leaves() -> None:
    model = nn.Sequential(Block(), Block(), nn.Linear(12, 4))
    rebuilt = check(model, SEQUENCES, policy=Policy(head_positions=False))
    assert rebuilt[0].mlp[0].out_features == 48
    assert rebuilt[0].attention.heads == 4
    zero = {name: value == 0 for name, value in rebuilt.named_parameters()}
    assert sum(int(flags.sum()) for name, flags in zero.items() if "attention" in name) > 100
    optimizer = torch.optim.AdamW(rebuilt.train().parameters(), 0.01, weight_decay=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        rebuilt(SEQUENCES).square().mean().backward()
        optimizer.step()
    for name, value in rebuilt.named_parameters():
        assert torch.equal(value == 0, zero[name]), name


def test_a_class_that_would_be_hardly_smaller_is_not_made() -> None:
    model = nn.Sequential(FromTheInput(), FromTheInput(), nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, 4))
    rebuilt, structure, *_ = made(model, SEQUENCES, policy=Policy(head_positions=False))
    assert rebuilt is None
    assert "invalid for input of size" in structure.why


class Positions(nn.Module):
    """Makes something of a table that it computes from its own widths."""

    def __init__(self) -> None:
        super().__init__()
        self.from_table = nn.Conv2d(6, 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        table = torch.arange(6.0).sin().view(1, 6, 1, 1).expand(1, 6, *x.shape[2:])
        return x + self.from_table(table)


def test_a_layer_that_reads_a_computed_table_keeps_its_columns() -> None:
    rebuilt = check(
        nn.Sequential(nn.Conv2d(3, 8, 1), Positions(), nn.ReLU(), nn.Conv2d(8, 32, 1), nn.ReLU(), nn.Conv2d(32, 4, 1)),
        IMAGES,
    )
    assert rebuilt[1].from_table.in_channels == 6


def test_one_number_cannot_be_two() -> None:
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.parts = 4
            self.a, self.b, self.c = nn.Linear(12, 8), nn.Linear(12, 8), nn.Linear(16, 4)

        def forward(self, x: Tensor) -> Tensor:
            one = self.a(x).unflatten(-1, (2, self.parts)).flatten(-2)
            two = self.b(x).unflatten(-1, (2, self.parts)).flatten(-2)
            return self.c(torch.cat((one, two), -1))

    counts = iter((2, 1, 0, 0))
    rebuilt, structure, *_ = made(Both(), SEQUENCES, going=lambda n: np.arange(n) < next(counts))
    assert rebuilt is None
    assert "parts would have to be" in structure.why


def test_following_numbers_leaves_the_model_as_it_was() -> None:
    model = Attention().eval()
    before = pickle.dumps(model)
    found = uses(model, (SEQUENCES,))
    assert {place for use in found for place in use.number.places} == {("", name) for name in ("heads", "dim", "inner")}
    assert pickle.dumps(model) == before


class ByHand(nn.Module):
    """A norm of one's own over the last dimension, as language models write it."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6))


class OverChannels(nn.LayerNorm):
    """Of images, over their channels."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class Stream(nn.Module):
    """A residual stream under norms; of images where `last` is false."""

    def __init__(self, norm: Any, *, last: bool = True) -> None:
        super().__init__()
        layer = nn.Linear if last else (lambda a, b: nn.Conv2d(a, b, 1))
        self.stem, self.norms = layer(12 if last else 3, 16), nn.ModuleList(norm(16) for _ in range(3))
        self.up, self.down, self.mix = layer(16, 32), layer(32, 16), layer(16, 16)
        self.head, self.dims = layer(16, 4), (1,) if last else (2, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = x + self.mix(self.norms[0](x))
        x = x + self.down(self.up(self.norms[1](x)).relu())
        return self.head(self.norms[2](x)).mean(self.dims)


@pytest.mark.parametrize(
    ("norm", "inputs"),
    [
        (nn.LayerNorm, SEQUENCES),
        (partial(nn.RMSNorm, eps=1e-6), SEQUENCES),
        (ByHand, SEQUENCES),
        (OverChannels, IMAGES),
    ],
)
def test_norms_over_a_stream_that_lost_channels_still_count_them_and_training_leaves_them(norm, inputs) -> None:
    model = Stream(norm, last=inputs.dim() == 3)
    rebuilt = check(model, inputs)
    assert rebuilt.stem.weight.shape[0] == rebuilt.mix.weight.shape[1] == 8
    assert [len(one.weight) for one in rebuilt.norms] == [16, 16, 16]
    twin = pickle.loads(pickle.dumps(copy.deepcopy(rebuilt)))  # as a checkpoint of one's own holds it
    torch.testing.assert_close(twin(inputs), rebuilt(inputs))
    held = [one.weight == 0 for one in twin.norms]
    assert all(int(zeros.sum()) == 8 for zeros in held)
    optimizer = torch.optim.AdamW(twin.train().parameters(), 0.01, weight_decay=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        twin(inputs).square().mean().backward()
        optimizer.step()
    assert all(torch.equal(one.weight == 0, zeros) for one, zeros in zip(twin.norms, held, strict=True))
    exported = torch.export.export(twin.eval(), (inputs,)).module()
    torch.testing.assert_close(exported(inputs), twin(inputs))


class ByName(Stream):
    """The same, its norms called by the name of their argument."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = x + self.mix(self.norms[0](input=x))
        x = x + self.down(self.up(self.norms[1](input=x)).relu())
        return self.head(self.norms[2](input=x)).mean(self.dims)


def test_a_norm_that_is_called_by_the_name_of_its_argument_is_padded_as_well() -> None:
    rebuilt = check(ByName(nn.LayerNorm), SEQUENCES)
    assert [len(one.weight) for one in rebuilt.norms] == [16, 16, 16]


def test_of_a_submodule_the_norms_are_named_from_within() -> None:
    _, structure, *_ = made(nn.Sequential(Stream(nn.LayerNorm)), SEQUENCES)
    assert sorted(structure.padded) == ["0.norms.0", "0.norms.1", "0.norms.2"]
    assert sorted(structure.within("0").padded) == ["norms.0", "norms.1", "norms.2"]
