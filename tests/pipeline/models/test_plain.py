"""Computed weights folded into plain ones on entry; lazy modules; frozen parameters; objects that carry hooks."""

import copy
import warnings

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune

from foundation.errors import ModelError
from pipeline import models
from pipeline.models import plain, weights

SIZE = (3, 8, 8)


def base() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 6, 3, padding=1),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(6, 4),
    )


class Symmetric(nn.Module):
    """A constraint of the user's own."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.triu() + x.triu(1).transpose(-1, -2)


class Noisy(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + torch.randn_like(x)


def old_weight_norm() -> nn.Module:
    model = base()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        nn.utils.weight_norm(model[0])
        nn.utils.weight_norm(model[3], dim=None)
    return model


def new_weight_norm() -> nn.Module:
    model = base()
    parametrizations.weight_norm(model[0])
    parametrizations.weight_norm(model[3], dim=1)
    return model


def old_spectral_norm() -> nn.Module:
    model = base()
    nn.utils.spectral_norm(model[0])
    nn.utils.spectral_norm(model[7])
    return model


def new_spectral_norm() -> nn.Module:
    model = base()
    parametrizations.spectral_norm(model[0])
    parametrizations.spectral_norm(model[7])
    return model


def pruned() -> nn.Module:
    model = base()
    prune.l1_unstructured(model[0], "weight", 0.5)
    prune.random_unstructured(model[0], "bias", 0.25)
    prune.ln_structured(model[3], "weight", 0.5, n=2, dim=0)
    prune.l1_unstructured(model[3], "weight", 0.1)  # a container of two methods
    return model


def orthogonal_over_own() -> nn.Module:
    model = nn.Sequential(nn.Flatten(), nn.Linear(192, 6), nn.ReLU(), nn.Linear(6, 6), nn.Linear(6, 4))
    parametrize.register_parametrization(model[3], "weight", Symmetric())
    parametrizations.orthogonal(model[4])
    parametrizations.spectral_norm(model[3])
    return model


def pruned_under_weight_norm() -> nn.Module:
    model = old_weight_norm()
    prune.l1_unstructured(model[0], "weight_v", 0.5)
    return model


class Recurrent(nn.Module):
    def __init__(self, hook) -> None:
        super().__init__()
        self.rnn = hook(nn.LSTM(24, 8, batch_first=True))
        self.head = nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.rnn(x.flatten(2).reshape(x.shape[0], 8, 24))[0][:, -1])


def recurrent_spectral() -> nn.Module:
    return Recurrent(lambda rnn: nn.utils.spectral_norm(rnn, "weight_hh_l0"))


def recurrent_pruned() -> nn.Module:
    def hook(rnn):
        prune.l1_unstructured(rnn, "weight_ih_l0", 0.5)
        return rnn

    return Recurrent(hook)


COMPUTED = [
    old_weight_norm,
    new_weight_norm,
    old_spectral_norm,
    new_spectral_norm,
    pruned,
    orthogonal_over_own,
    pruned_under_weight_norm,
    recurrent_spectral,
    recurrent_pruned,
]


def plain_names(model: nn.Module) -> bool:
    marks = ("parametrizations", "_orig", "_mask", "_g", "_u")
    return not any(mark in name for name in model.state_dict() for mark in marks)


@pytest.mark.parametrize("make", COMPUTED)
@pytest.mark.parametrize("given", ["callable", "object"])
def test_a_built_model_has_plain_weights_and_computes_the_same(make, given):
    torch.manual_seed(3)
    source = models.load(make if given == "callable" else make(), input_size=SIZE)
    as_given, folded = source.build_as_given(), source.build()
    assert plain.computes(as_given)
    assert not plain.computes(folded)
    assert plain_names(folded)
    x = torch.randn(2, *SIZE)
    with torch.no_grad():
        torch.testing.assert_close(folded(x), as_given(x), rtol=1e-5, atol=1e-6)
    # What a later stage does: fill a new one from the old one's weights, all names matched and no metadata.
    again = source.build()
    again.load_state_dict(dict(folded.state_dict()))
    changed = {name: value * 2 if value.is_floating_point() else value for name, value in folded.state_dict().items()}
    again.load_state_dict(changed)
    folded.load_state_dict(changed)
    with torch.no_grad():
        assert torch.equal(again(x), folded(x))
        assert not torch.equal(again(x), as_given(x))


@pytest.mark.parametrize("make", COMPUTED)
def test_gradients_reach_folded_weights(make):
    model = models.load(make, input_size=SIZE).build().train()
    model(torch.randn(4, *SIZE)).square().sum().backward()
    assert all(value.grad is not None for value in model.parameters())


def test_zeros_of_a_pruning_mask_are_zeros_of_the_weight():
    model = models.load(pruned, input_size=SIZE).build()
    zeros = int((model[0].weight == 0).sum())
    assert zeros == model[0].weight.numel() // 2
    assert int((model[3].weight.flatten(1).abs().sum(1) == 0).sum()) == 3


def test_folding_a_copy_leaves_the_original_alone():
    given = new_weight_norm()
    before = given(torch.ones(1, *SIZE))
    folded = plain.copied(given)
    plain.fold(folded)
    assert parametrize.is_parametrized(given[0], "weight")
    assert torch.equal(given(torch.ones(1, *SIZE)), before)


def test_what_was_folded_is_said_in_one_line():
    said = plain.said(plain.fold(new_spectral_norm()))
    assert said == "folded into plain weights: spectral norm of 0.weight, 7.weight"
    assert plain.said(plain.fold(base())) == ""
    assert "pruning mask of 0.bias, 0.weight, 3.weight" in plain.said(plain.fold(pruned()))
    assert "spectral norm over symmetric of 3.weight; orthogonal of 4.weight" in plain.said(
        plain.fold(orthogonal_over_own())
    )


def test_a_random_parametrization_is_refused():
    model = base()
    parametrize.register_parametrization(model[0], "weight", Noisy())
    with pytest.raises(ModelError, match=r"computes something else.*noisy of 0\.weight"):
        plain.fold_checked(model, (torch.randn(2, *SIZE),))


def test_a_parametrization_that_fails_is_named():
    class Failing(nn.Module):
        broken = False

        def forward(self, x):
            if self.broken:
                raise ValueError("no inverse")
            return x

    model = base()
    parametrize.register_parametrization(model[0], "weight", Failing())
    model[0].parametrizations.weight[0].broken = True
    with pytest.raises(ModelError, match=r"parametrization of 0\.weight failed: ValueError: no inverse"):
        plain.fold(model)


def test_tied_parametrized_weights_stay_tied():
    class Doubled(nn.Module):
        def forward(self, x):
            return 2 * x

    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].weight = model[0].weight
    for layer in model:
        parametrize.register_parametrization(layer, "weight", Doubled())
    model[1].parametrizations.weight.original = model[0].parametrizations.weight.original
    x = torch.randn(2, 4)
    before = model(x)
    plain.fold(model)
    assert model[0].weight is model[1].weight
    assert torch.equal(model(x), before)


def test_frozen_parameters_stay_frozen_unless_all_are():
    model = new_weight_norm()
    for value in model[0].parameters():
        value.requires_grad_(False)
    plain.fold(model)
    assert not model[0].weight.requires_grad
    assert model[3].weight.requires_grad
    frozen = base().requires_grad_(False)
    built = models.load(frozen, input_size=SIZE).build()
    assert all(value.requires_grad for value in built.parameters())
    assert not any(value.requires_grad for value in frozen.parameters())


def test_what_is_frozen_belongs_to_the_fingerprint():
    model = base()
    before = models.load(model, input_size=SIZE).fingerprint
    model[0].requires_grad_(False)
    assert models.load(model, input_size=SIZE).fingerprint != before


def lazy() -> nn.Module:
    return nn.Sequential(
        nn.LazyConv2d(8, 3), nn.LazyBatchNorm2d(), nn.ReLU(), nn.Flatten(), nn.LazyLinear(6), nn.Linear(6, 4)
    )


@pytest.mark.parametrize("given", ["callable", "object"])
def test_lazy_modules_get_their_shapes(given):
    source = models.load(lazy if given == "callable" else lazy(), input_size=SIZE)
    model = source.build()
    assert type(model[0]) is nn.Conv2d
    assert model[4].weight.shape == (6, 288)
    again = source.build().state_dict()
    assert all(torch.equal(value, again[name]) for name, value in model.state_dict().items())
    assert model[1].num_batches_tracked == 0


def test_lazy_modules_that_cannot_have_shapes_say_so():
    with pytest.raises(ModelError, match="cannot be given shapes by input 2x3x2x2"):
        models.load(lazy, input_size=(3, 2, 2))

    class Unused(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.unused = nn.LazyLinear(4), nn.LazyLinear(4)

        def forward(self, x):
            return self.used(x.flatten(1))

    with pytest.raises(ModelError, match=r"without a shape after a forward pass, first unused\.weight"):
        models.load(Unused, input_size=SIZE)


def test_parameters_without_values_are_refused():
    with pytest.raises(ModelError, match="on the meta device and have no values, first 0.weight"):
        models.load(base().to("meta"), input_size=SIZE)


@pytest.mark.parametrize("make", COMPUTED)
def test_a_checkpoint_of_the_parametrized_model_loads_before_and_after_folding(make, tmp_path):
    torch.manual_seed(5)
    trained = make()
    with torch.no_grad():
        for value in trained.parameters():
            value.add_(torch.rand_like(value) / 4)
    trained.eval()
    x = torch.randn(2, *SIZE)
    with torch.no_grad():
        trained(x)  # a mask under weight norm takes effect in the pass after the next
        wanted = trained(x)
    torch.save(dict(trained.state_dict()), tmp_path / "parts.pt")
    simple = plain.copied(trained)
    plain.fold(simple)
    torch.save(simple.state_dict(), tmp_path / "plain.pt")
    torch.manual_seed(6)
    for file in ("parts.pt", "plain.pt"):
        model = make().eval()
        weights.load_weights(model, tmp_path / file)
        plain.fold(model)
        with torch.no_grad():
            torch.testing.assert_close(model(x), wanted, rtol=1e-5, atol=1e-6)
    if make in (orthogonal_over_own, pruned_under_weight_norm):
        return  # only the module knows how its parts make a weight
    model = copy.deepcopy(simple)
    with torch.no_grad():
        for value in model.parameters():
            value.zero_()
    loaded = weights.load_weights(model, tmp_path / "parts.pt")
    assert "computed into plain weights" in str(loaded)
    with torch.no_grad():
        torch.testing.assert_close(model(x), wanted, rtol=1e-5, atol=1e-6)


def test_spectral_norm_of_a_transposed_convolution_is_over_its_second_dimension(tmp_path):
    for hook in (nn.utils.spectral_norm, parametrizations.spectral_norm):
        torch.manual_seed(1)
        trained = nn.Sequential(hook(nn.ConvTranspose2d(4, 4, 3))).eval()
        torch.save(trained.state_dict(), tmp_path / "a.pt")
        model = nn.Sequential(nn.ConvTranspose2d(4, 4, 3))
        weights.load_weights(model, tmp_path / "a.pt")
        x = torch.randn(1, 4, 5, 5)
        torch.testing.assert_close(model(x), trained(x))


def test_parts_that_only_their_module_can_put_together_are_refused_with_the_reason(tmp_path):
    torch.save(orthogonal_over_own().state_dict(), tmp_path / "a.pt")
    simple = orthogonal_over_own()
    plain.fold(simple)
    with pytest.raises(weights.WeightsError, match="build the model with the same parametrizations"):
        weights.load_weights(simple, tmp_path / "a.pt")
