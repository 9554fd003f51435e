"""Masks hold through anything an optimizer does, fold into exactly the same function, and keep the originals."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize

from foundation.errors import ConfigError, MaskError
from pipeline import models
from pipeline.artifacts.eager import read_masks
from pipeline.selection.schedules import cubic_ratio
from pipeline.selection.weights import prunable, two_four, unstructured_l1
from pipeline.training import masks


class Conv(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3)
        self.bn = nn.BatchNorm2d(8)
        self.fc = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(torch.relu(self.bn(self.conv(x))).mean((2, 3)))


class Attention(nn.Module):
    """A parent that reads its child's weight without calling the child."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(16, 4, batch_first=True)
        self.fc = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(2).transpose(1, 2)[:, :4].repeat(1, 1, 6)[..., :16]
        return self.fc(self.attention(tokens, tokens, tokens, need_weights=False)[0].mean(1))


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 6)
        self.second = nn.Linear(6, 6)
        self.second.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.relu(self.first(x.flatten(1)[:, :6])))


NETS = [Conv, Attention, Tied]
IMAGES = torch.randn(8, 3, 6, 6, generator=torch.Generator().manual_seed(0))


def half(model: nn.Module) -> dict[str, Tensor]:
    return unstructured_l1(prunable(model), 0.5)


@pytest.fixture(params=NETS, ids=lambda net: net.__name__)
def model(request) -> nn.Module:
    torch.manual_seed(0)
    return request.param()


OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.1, nesterov=True),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.1, weight_decay=0.5),
}


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("warm", [False, True], ids=["from the start", "after some steps"])
def test_masked_weights_stay_zero_through_momentum_and_weight_decay(model, optimizer, warm):
    chosen = half(model)
    if not warm:
        masks.apply(model, chosen)
    stepper = OPTIMIZERS[optimizer](model.parameters())
    for step in range(6):
        if warm and step == 3:  # momentum has gathered in the weights that are masked now
            masks.apply(model, chosen)
        stepper.zero_grad()
        model.train()(IMAGES).square().mean().backward()
        stepper.step()
        if step >= 3 or not warm:
            masks.check_held(model, chosen)
    before = model.eval()(IMAGES)
    masks.fold(model)
    masks.check_held(model, chosen)
    assert torch.equal(model(IMAGES), before)


def test_folding_leaves_the_plain_model_and_exactly_its_output(model):
    names, kinds = list(model.state_dict()), [type(module) for module in model.modules()]
    original = copy.deepcopy(model)
    masks.apply(model, half(model))
    masked = model.eval()(IMAGES)
    assert not torch.equal(masked, original.eval()(IMAGES))
    masks.fold(model)
    assert torch.equal(model(IMAGES), masked)
    assert list(model.state_dict()) == names
    assert [type(module) for module in model.modules()] == kinds
    assert not any(parametrize.is_parametrized(module) for module in model.modules())
    assert masks.masks_of(model) == {}
    assert all(isinstance(p, nn.Parameter) and p.requires_grad and p.is_leaf for p in model.parameters())


def test_originals_are_never_lost_before_the_fold(model):
    before = {name: value.clone() for name, value in model.state_dict().items()}
    chosen = half(model)
    masks.apply(model, chosen)
    kept = masks.originals(model)
    assert kept.keys() == before.keys()
    assert all(torch.equal(kept[name], before[name]) for name in before)
    masks.apply(model, {name: torch.ones_like(mask) for name, mask in chosen.items()})
    masks.fold(model)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_originals_go_into_another_masked_model_whose_masks_stay(model):
    chosen = half(model)
    masks.apply(model, chosen)
    other = type(model)()
    masks.apply(other, chosen)
    masks.load_originals(other, masks.originals(model))
    assert torch.equal(other.eval()(IMAGES), model.eval()(IMAGES))
    masks.check_held(other, chosen)


def test_masks_are_read_back_as_given(model, tmp_path):
    chosen = half(model)
    masks.apply(model, chosen)
    found = masks.masks_of(model)
    assert list(found) == list(chosen)
    assert all(torch.equal(found[name], mask) for name, mask in chosen.items())
    masks.save(found, tmp_path / "masks.safetensors")
    back = read_masks(tmp_path / "masks.safetensors")
    assert back.keys() == chosen.keys()
    assert all(torch.equal(back[name], mask) and back[name].dtype == torch.bool for name, mask in chosen.items())


def test_a_copy_of_a_masked_model_is_independent(model):
    chosen = half(model)
    masks.apply(model, chosen)
    before = model.eval()(IMAGES)
    twin = copy.deepcopy(model)
    masks.fold(twin)
    assert torch.equal(model(IMAGES), before)
    assert torch.equal(twin(IMAGES), before)
    second = copy.deepcopy(model)
    masks.apply(second, {name: torch.zeros_like(mask) for name, mask in chosen.items()})
    masks.check_held(model, chosen)
    assert torch.equal(model(IMAGES), before)


def test_a_mask_on_a_copy_does_not_touch_the_original():
    model = Conv()
    masks.apply(model, {"conv.weight": torch.zeros(8, 3, 3, 3, dtype=torch.bool)})
    twin = copy.deepcopy(model)
    masks.apply(twin, {"conv.bias": torch.zeros(8, dtype=torch.bool)})
    assert not isinstance(model.conv.bias, property)
    assert torch.equal(twin.conv.bias, torch.zeros(8))
    assert not torch.equal(model.conv.bias, torch.zeros(8))
    masks.fold(twin)
    assert list(twin.state_dict()) == list(Conv().state_dict())


def test_a_masked_model_exports_to_the_same_function(model):
    masks.apply(model, half(model))
    model.eval()
    batch = torch.export.Dim.DYNAMIC
    program = torch.export.export(model, (IMAGES,), dynamic_shapes=({0: batch},))
    assert torch.equal(program.module()(IMAGES[:3]), model(IMAGES[:3]))


def test_tied_parameters_are_masked_once_and_stay_tied():
    model = Tied()
    chosen = half(model)
    assert list(chosen) == ["first.weight"]
    masks.apply(model, chosen)
    masks.check_held(model, {"second.weight": chosen["first.weight"]})
    assert list(masks.masks_of(model)) == ["first.weight"]
    masks.fold(model)
    assert model.first.weight is model.second.weight
    other = {"first.weight": chosen["first.weight"], "second.weight": ~chosen["first.weight"]}
    with pytest.raises(MaskError, match=r"second\.weight is tied"):
        masks.apply(Tied(), other)


def test_nan_under_a_mask_is_zero():
    model = Conv()
    with torch.no_grad():
        model.fc.weight[0, 0] = float("nan")
    mask = torch.ones(4, 8, dtype=torch.bool)
    mask[0, 0] = False
    masks.apply(model, {"fc.weight": mask})
    masks.check_held(model, {"fc.weight": mask})
    masks.fold(model)
    assert model.fc.weight.isfinite().all()


def test_a_weight_that_came_back_is_an_error_that_names_the_parameter():
    model = Conv()
    chosen = half(model)
    with pytest.raises(MaskError, match=r"conv\.weight: 108 of 108 weights"):
        masks.check_held(model, chosen)
    masks.apply(model, chosen)
    masks.fold(model)
    gone = (~chosen["fc.weight"]).nonzero()[0].tolist()
    with torch.no_grad():
        model.fc.weight[gone[0], gone[1]] = 1e-30
    with pytest.raises(MaskError, match=r"fc\.weight: 1 of 16 weights"):
        masks.check_held(model, chosen)


@pytest.mark.parametrize(
    ("name", "mask", "says"),
    [
        ("fc.wait", torch.ones(4, 8, dtype=torch.bool), "no parameter 'fc.wait'"),
        ("fc.weight", torch.ones(4, 9, dtype=torch.bool), r"\(4, 9\)"),
        ("fc.weight", torch.ones(4, 8), "float32"),
    ],
)
def test_masks_of_another_model_are_refused(name, mask, says):
    with pytest.raises(MaskError, match=says):
        masks.apply(Conv(), {name: mask})
    with pytest.raises(MaskError, match=says):
        masks.check_held(Conv(), {name: mask})


def test_what_cannot_be_masked_says_so():
    assert prunable(nn.Sequential(nn.LSTM(4, 4))) == {}  # its single weights, that is; whole neurons are masked
    normed = nn.Sequential(parametrizations.weight_norm(nn.Linear(3, 3)))
    name = "0.parametrizations.weight.original1"
    with pytest.raises(MaskError, match="parametrized already"):
        masks.apply(normed, {name: torch.zeros(3, 3, dtype=torch.bool)})


@pytest.mark.parametrize(
    "make",
    [
        lambda: nn.LSTM(4, 6, batch_first=True),
        lambda: nn.LSTM(4, 6, proj_size=3, num_layers=2, bidirectional=True),
        lambda: nn.GRU(4, 6, num_layers=2, bias=False),
        lambda: nn.RNN(4, 6, bidirectional=True),
    ],
)
def test_recurrent_layers_are_masked_in_use_in_training_and_after_folding(make):
    torch.manual_seed(0)
    model = make()
    chosen = {name: torch.rand_like(value) > 0.4 for name, value in model.named_parameters()}
    masks.apply(model, chosen)
    x = torch.randn(5, 3, 4)

    def zeroed() -> nn.Module:
        other = make()
        state = masks.originals(model)
        other.load_state_dict({name: value * chosen[name] for name, value in state.items()})
        return other

    optimizer = torch.optim.AdamW(masks.parameters(model).values(), lr=0.1, weight_decay=0.1)
    for _ in range(3):
        given = model(x)[0]
        assert torch.equal(given, zeroed()(x)[0])
        optimizer.zero_grad()
        given.square().sum().backward()
        for name, value in masks.parameters(model).items():
            assert value.grad is not None
            assert not value.grad[~chosen[name]].any()
            assert value.grad[chosen[name]].any()
        before = given.detach()
        optimizer.step()
        assert not torch.equal(model(x)[0], before)
        masks.check_held(model, chosen)
    wanted = model(x)[0].detach()
    masks.fold(model)
    assert torch.equal(model(x)[0], wanted)
    again = make()
    again.load_state_dict(model.state_dict())
    assert torch.equal(again(x)[0], wanted)
    assert list(dict(model.named_parameters())) == list(dict(again.named_parameters()))


def test_a_file_that_holds_no_masks_is_refused(tmp_path):
    with pytest.raises(MaskError, match="cannot be read"):
        read_masks(tmp_path / "nowhere.safetensors")
    masks.save({"x": torch.ones(2)}, tmp_path / "a.safetensors")
    with pytest.raises(MaskError, match=r"float32 for x, not a mask"):
        read_masks(tmp_path / "a.safetensors")


# ── choosing ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_weights_worth_pruning_leave_out_norms_biases_and_embeddings():
    assert list(prunable(Conv())) == ["conv.weight", "fc.weight"]
    assert list(prunable(Attention())) == ["attention.in_proj_weight", "attention.out_proj.weight", "fc.weight"]
    embedding = nn.Embedding(5, 4)
    head = nn.Linear(4, 5)
    head.weight = embedding.weight
    assert prunable(nn.ModuleList([embedding, nn.Linear(4, 4), head])).keys() == {"1.weight"}
    names = prunable(models.load("vit_b_32", num_classes=2, input_size=(3, 32, 32)).build())
    assert not any("pos_embedding" in name or "class_token" in name or ".ln" in name for name in names)


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 10_000), st.floats(0, 0.99), st.booleans())
def test_exactly_the_smallest_share_goes(seed, ratio, ties):
    values = torch.randn(7, 9, generator=torch.Generator().manual_seed(seed))
    values = (values * 2).round() if ties else values
    mask = unstructured_l1({"w": values}, ratio)["w"]
    gone = int((~mask).sum())
    assert gone == min(round(ratio * 63), 62)
    if gone:
        assert float(values[~mask].abs().max()) <= float(values[mask].abs().min())


def test_layers_are_ranked_alone_or_together():
    weights = {"small": torch.full((10,), 0.1) + torch.arange(10) * 0.001, "large": torch.arange(10) + 1.0}
    alone = unstructured_l1(weights, 0.5)
    assert [int((~alone[name]).sum()) for name in weights] == [5, 5]
    together = unstructured_l1(weights, 0.5, scope="global")
    assert [int((~together[name]).sum()) for name in weights] == [10, 0]


def test_overrides_go_by_glob_and_the_last_one_wins():
    weights = {f"layer{i}.conv.weight": torch.randn(4, 5) for i in (1, 2, 3)}
    for scope in ("layer", "global"):
        found = unstructured_l1(
            weights, 0.5, scope=scope, overrides={"layer*": 0.2, "layer3.conv": 0.0, "layer2.*": 0.9}
        )
        assert [int((~mask).sum()) for mask in found.values()] == [4, 18, 0]


def test_rounds_only_ever_take_more():
    weights = {"w": torch.randn(20, 20)}
    first = unstructured_l1(weights, 0.3)
    moved = {"w": torch.randn(20, 20)}
    second = unstructured_l1(moved, 0.6, held=first)
    assert not (second["w"] & ~first["w"]).any()
    assert int((~second["w"]).sum()) == 240


@pytest.mark.parametrize("ratio", [1.0, -0.1, 2.0, float("nan")])
def test_a_ratio_outside_its_range_is_refused(ratio):
    with pytest.raises(ConfigError, match=r"in \[0, 1\)"):
        unstructured_l1({"w": torch.randn(4, 4)}, ratio)
    with pytest.raises(ConfigError, match=r"in \[0, 1\)"):
        unstructured_l1({"w": torch.randn(4, 4)}, 0.5, overrides={"w": ratio})


@pytest.mark.parametrize("shape", [(5, 8), (6, 12, 3, 3), (4, 8, 1)])
def test_two_of_every_four_inputs_stay_the_largest(shape):
    value = torch.randn(shape)
    mask = two_four({"w": value})["w"]
    kept = mask.movedim(1, -1).reshape(-1, 4)
    assert (kept.sum(1) == 2).all()
    rows = value.abs().movedim(1, -1).reshape(-1, 4)
    assert (rows.masked_fill(~kept, float("inf")).amin(1) >= rows.masked_fill(kept, 0).amax(1)).all()


def test_two_four_keeps_whole_what_does_not_divide():
    found = two_four({"stem": torch.randn(8, 3, 3, 3), "bias": torch.randn(8)})
    assert all(mask.all() for mask in found.values())


def test_the_cubic_schedule_runs_from_start_to_ratio():
    ratios = [cubic_ratio(0.8, step, 100) for step in range(101)]
    assert ratios[0] == 0.0
    assert ratios == sorted(ratios)
    assert ratios[75:] == [0.8] * 26
    assert cubic_ratio(0.8, 50, 100, end=1.0) == pytest.approx(0.8 * (1 - 0.5**3))
    assert cubic_ratio(0.8, 10, 100, start=0.3, begin=0.2) == pytest.approx(0.3)


def test_zeros_and_cut_channels_are_counted():
    state = {"w": torch.ones(4, 3, 2, 2), "b": torch.ones(4), "n": torch.tensor(3)}
    state["w"][1] = 0
    state["w"][2, 0] = 0
    mask = torch.ones(4, 3, 2, 2, dtype=torch.bool)
    mask[3] = False
    whole, bias = masks.sparsity(state, {"w": mask})
    assert (whole.parameter, whole.shape, whole.weights, whole.zeros) == ("w", (4, 3, 2, 2), 48, 12 + 4 + 12)
    assert (whole.channels, whole.channels_cut, whole.ratio) == (4, 2, 28 / 48)
    assert (bias.zeros, bias.channels_cut) == (0, 0)
