"""Stage 2: the ladder of recovery, each rung kept only where the calibration part says that it helps."""

import csv
import itertools
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from torch import nn

from foundation.files import save_tensors
from pipeline import data, models
from pipeline.artifacts.eager import Baseline, Pruned
from pipeline.data.parts import image_split
from pipeline.progress import Progress
from pipeline.recipe.removal import GroupSwitches
from pipeline.recipe.train import FinetuneSection, TrainSettings
from pipeline.recovery import ladder
from pipeline.stages import s2_finetune
from pipeline.tasks import classification
from pipeline.tasks.task import apart
from pipeline.training import loop, masks
from pipeline.training.defaults import default_settings

TASK = classification.task("classification", "output")

SIZE = (3, 16, 16)
LOOPS = Path(__file__).parents[1] / "training" / "loops.py"


def net():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 24, 3, padding=1), nn.BatchNorm2d(24), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(24, 24, 3, padding=1),
        nn.BatchNorm2d(24), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(96, 10),
    )  # fmt: skip


@pytest.fixture(scope="module")
def digits():
    return data.load("digits", input_size=SIZE)


@pytest.fixture(scope="module")
def trained(digits):
    model = net()
    loop.train(model, digits, TASK, TrainSettings(epochs=6, lr=5e-3))
    return {name: value.clone() for name, value in model.state_dict().items()}


def halved(every=2):
    """Every other channel of both convolutions, or fewer, and what reads it."""
    kept = torch.arange(24) % every == 0
    first, second = torch.ones(24, 3, 3, 3, dtype=torch.bool), torch.ones(24, 24, 3, 3, dtype=torch.bool)
    first[~kept], second[~kept], second[:, ~kept] = False, False, False
    head = torch.ones(10, 96, dtype=torch.bool)
    head[:, ~kept.repeat_interleave(4)] = False
    return {"0.weight": first, "0.bias": kept, "1.weight": kept, "1.bias": kept, "4.weight": second, "4.bias": kept,
            "5.weight": kept, "5.bias": kept, "9.weight": head}  # fmt: skip


@pytest.fixture
def stage(tmp_path, trained, digits):
    """What stage 2 is given, and a way to run it."""
    for name in ("0-baseline", "1-prune", "2-finetune"):
        (tmp_path / name).mkdir()
    save_tensors(trained, tmp_path / "0-baseline" / Baseline.WEIGHTS)
    save_tensors(trained, tmp_path / "1-prune" / Pruned.WEIGHTS)
    source = models.load(net(), num_classes=10, input_size=SIZE)
    pruned = Pruned.model_construct(folder=tmp_path / "1-prune", kinds=GroupSwitches())

    def run(chosen, own=digits, trained_here=False, **settings):
        baseline = Baseline.model_construct(folder=tmp_path / "0-baseline", trained_here=trained_here)
        masks.save(chosen, tmp_path / "1-prune" / Pruned.MASKS)
        cfg = FinetuneSection(**settings)
        return s2_finetune.run(cfg, tmp_path / "2-finetune", source, own, baseline, pruned, TASK, Progress())

    return run


def test_the_closed_form_gives_back_most_of_what_pruning_took_and_originals_stay(stage, trained):
    made = stage(halved(), recover="closed-form")
    pruned, fitted = made.rungs[0], made.rungs[1]
    assert (fitted.name, fitted.kept) == ("closed form", True)
    assert fitted.score > pruned.score + 0.3
    assert fitted.score > 0.85
    assert made.epochs == 0
    for name, mask in halved().items():
        assert torch.equal(made.weights()[name][~mask], trained[name][~mask]), name
    lines = (made.folder / "fitted.csv").read_text().splitlines()
    assert len(lines) == 3  # the first convolution reads the images themselves: nothing to fit there
    assert "not asked for" in made.rungs[-1].why


def test_two_runs_give_the_same_weights(stage):
    first = {name: value.clone() for name, value in stage(halved(), recover="closed-form").weights().items()}
    second = stage(halved(), recover="closed-form").weights()
    assert all(torch.equal(value, second[name]) for name, value in first.items())


def test_what_is_within_noise_of_dense_is_not_climbed(stage):
    nothing = {"0.bias": torch.ones(24, dtype=torch.bool)}
    made = stage(nothing)
    assert [(rung.name, rung.kept) for rung in made.rungs] == [("pruned", True), ("training", False)]
    assert made.rungs[-1].why == (
        "not needed: within noise of the dense model on the calibration part, whose 144 samples do not rule out a loss "
        "of 1.1 points (--set finetune.epochs=6 asks for it all the same)"
    )
    assert made.epochs == 0


def without(channels):
    """The masks that take channels of the first convolution away, and what reads them."""
    kept = torch.ones(24, dtype=torch.bool)
    kept[list(channels)] = False
    first, second = torch.ones(24, 3, 3, 3, dtype=torch.bool), torch.ones(24, 24, 3, 3, dtype=torch.bool)
    first[~kept], second[:, ~kept] = False, False
    return {"0.weight": first, "0.bias": kept, "1.weight": kept, "1.bias": kept, "4.weight": second}


def standing_without(channels, trained, digits):
    model = net()
    model.load_state_dict(trained)
    masks.apply(model, without(channels))
    return ladder.standing(model.eval(), digits, TASK)


def test_what_is_as_often_right_but_less_sure_is_fitted(stage, trained, digits):
    """A loss tells what too few samples do not: of those that are still right, others will be wrong."""
    dense = standing_without((), trained, digits)
    few = (chosen for count in (1, 2) for chosen in itertools.combinations(range(24), count))
    for channels in few:  # which of them it is hangs on the machine's rounding in training
        less = standing_without(channels, trained, digits)
        if ladder.near(less, dense) and ladder.lower(dense, less) < 0.001:
            break
    assert not ladder.level(less, dense)
    rung = stage(without(channels), recover="closed-form").rungs[1]
    assert (rung.name, rung.kept) == ("closed form", True)
    assert "and a lower loss" in rung.why


def test_an_own_loop_that_is_not_called_is_named_and_the_recipe_can_ask_for_it(stage, monkeypatch):
    said = []
    monkeypatch.setattr(Progress, "say", lambda self, text: said.append(text))
    nothing, spec = {"0.bias": torch.ones(24, dtype=torch.bool)}, f"{LOOPS}:plain"
    made = stage(nothing, train=spec)
    why = made.rungs[-1].why
    assert why.startswith("not needed: within noise of the dense model") and why.endswith(f"; {spec} was not called")
    assert said == [f"  training: {why}"]
    assert "finetune.epochs=1" in why
    assert stage(nothing, train=spec, epochs=1).rungs[-1].why.startswith(f"by {spec}")
    assert stage(nothing, train=spec, recover="none").rungs[-1].why.endswith(f"; {spec} was not called")


def test_none_leaves_the_masked_model(stage, trained):
    made = stage(halved(), recover="none")
    assert all(torch.equal(value, trained[name]) for name, value in made.weights().items())
    assert [rung.name for rung in made.rungs] == ["pruned", "training"]


def test_a_rung_that_makes_it_worse_is_taken_back(stage, monkeypatch):
    real = loop.train

    def careless(model, *args, **options):
        result = real(model, *args, **options)
        with torch.no_grad():
            for value in masks.parameters(model).values():
                value.zero_()
        return replace(result, state={name: torch.zeros_like(value) for name, value in result.state.items()})

    monkeypatch.setattr(loop, "train", careless)
    fitted = {name: value.clone() for name, value in stage(halved(), recover="closed-form").weights().items()}
    made = stage(halved(), recover="train", epochs=1)
    assert (made.rungs[-1].name, made.rungs[-1].kept, made.best_epoch) == ("training", False, 0)
    assert all(torch.equal(value, fitted[name]) for name, value in made.weights().items())
    assert made.calibration_score > 0.85


@pytest.fixture
def seen(monkeypatch):
    """Settings of each training, as it begins."""
    found = []
    real = loop.train
    monkeypatch.setattr(
        loop,
        "train",
        lambda model, own, task, settings, **o: found.append(settings) or real(model, own, task, settings, **o),
    )
    return found


def test_training_learns_from_the_fit_gently_and_its_samples_decide_nothing(stage, seen):
    stage(halved(), epochs=1)
    stage(halved(), recover="train", epochs=1, train={"lr": 0.5})
    assert seen[0].lr == pytest.approx(5e-4)
    assert seen[1].lr == 0.5


def test_training_is_not_gentle_with_a_fit_that_is_far_from_the_dense_model(stage, seen):
    made = stage(halved(every=12), epochs=1)
    assert [rung.kept for rung in made.rungs[:2]] == [True, True]
    assert made.rungs[1].score < 0.85
    assert seen[0].lr == pytest.approx(1e-3)


def test_too_few_images_are_said_and_leave_the_model(stage, digits):
    few = replace(digits, train=data.parts.picked(digits.train, torch.arange(4)))
    made = stage(halved(), few, recover="closed-form")
    assert (made.rungs[1].name, made.rungs[1].kept) == ("closed form", False)
    assert "4 samples are too few" in made.rungs[1].why


def test_fewer_rows_than_columns_are_told_and_do_no_harm(stage, digits):
    few = replace(digits, train=data.parts.picked(digits.train, torch.arange(12)))
    made = stage(halved(), few, recover="closed-form")
    assert made.calibration_score >= made.rungs[0].score
    assert made.rungs[1].kept
    with (made.folder / "fitted.csv").open() as file:
        head = next(line for line in csv.DictReader(file) if line["name"] == "9.weight")
    assert (int(head["rows"]), int(head["columns"])) == (12, 48)


@pytest.mark.parametrize(("count", "said"), [(24, True), (None, False)])
def test_a_fit_that_lacks_samples_says_so(stage, digits, count, said):
    own = replace(digits, train=data.parts.picked(digits.train, torch.arange(count))) if count else digits
    why = stage(halved(), own, recover="closed-form").rungs[1].why
    assert ("samples that it did not learn from: more would help" in why) is said


def test_nothing_is_said_where_outputs_cannot_be_compared(digits):
    def outputs(boxes):
        return lambda x: {"boxes": torch.zeros(len(x), boxes, 4)}

    task = replace(TASK, reads=("boxes",), divergence=lambda *pair: apart(*pair))
    inputs = digits.sample("calibration", 8)
    assert ladder.few_samples(outputs(3), outputs(2), task, inputs, inputs) == ""


def test_of_a_model_that_was_trained_on_the_samples_nothing_is_said(stage, digits):
    few = replace(digits, train=data.parts.picked(digits.train, torch.arange(24)))
    assert "did not learn from" not in stage(halved(), few, True, recover="closed-form").rungs[1].why


def given(digits, change):
    """The training part with `change` made to every batch of its images."""
    real = digits.train
    split = image_split(real.labels, lambda chunks: (change(images) for (images,), _ in real.stream(chunks)))
    return replace(digits, train=split)


@pytest.mark.parametrize(
    "change",
    [torch.zeros_like, lambda images: images[:1].expand_as(images).clone()],
    ids=["constant", "repeated"],
)
def test_images_that_say_nothing_do_no_harm(stage, digits, change):
    made = stage(halved(), given(digits, change), recover="closed-form")
    assert made.calibration_score >= made.rungs[0].score - 0.02
    assert all(bool(value.isfinite().all()) for value in made.weights().values())


def test_images_that_are_not_finite_are_told_in_one_line_and_leave_the_model(stage, digits, trained):
    made = stage(halved(), given(digits, lambda images: images * float("nan")), recover="closed-form")
    assert not made.rungs[1].kept
    assert "nothing fitted: input 0 holds values that are not finite" in made.rungs[1].why
    assert all(torch.equal(value, trained[name]) for name, value in made.weights().items())


@pytest.mark.parametrize("samples", [0, 9, -1])
def test_no_images_to_fit_on_are_refused_before_anything_is_spent(samples):
    with pytest.raises(ValidationError, match="greater than or equal to 10"):
        FinetuneSection(samples=samples)


def of(correct, loss):
    statistics = np.array([[float(one), 1.0] for one in correct])
    return ladder.Standing(TASK, statistics, torch.tensor(loss, dtype=torch.float64))


def test_the_paired_tests_decide():
    base = of([True] * 60 + [False] * 40, [0.5] * 100)
    better = of([True] * 80 + [False] * 20, [0.4 + 0.001 * i for i in range(100)])
    same = of([True] * 60 + [False] * 40, [0.5] * 100)
    worse = of([True] * 30 + [False] * 70, [0.1 + 0.001 * i for i in range(100)])
    broken = of([True] * 100, [float("nan")] * 100)
    assert ladder.helps(better, base)[0]
    assert not ladder.helps(same, base)[0]
    assert not ladder.helps(worse, base)[0]  # a lower loss does not make up for fewer right
    assert not ladder.helps(broken, base)[0]
    assert ladder.near(same, base)
    assert not ladder.near(worse, base)
    assert ladder.far(worse, base)
    assert not ladder.far(of([True] * 51 + [False] * 49, [0.5] * 100), base)


def test_a_loss_that_is_higher_although_as_many_are_right_is_not_level():
    base = of([True] * 60 + [False] * 40, [0.5] * 100)
    assert ladder.level(of([True] * 60 + [False] * 40, [0.5] * 100), base)
    assert ladder.level(of([True] * 60 + [False] * 40, [0.4 + 0.001 * i for i in range(100)]), base)  # lower
    less_sure = of([True] * 60 + [False] * 40, [0.501 + 0.001 * i for i in range(100)])
    assert ladder.near(less_sure, base) and not ladder.level(less_sure, base)
    assert not ladder.level(of([True] * 30 + [False] * 70, [0.1] * 100), base)


@pytest.mark.parametrize(
    ("lost", "won", "samples", "points"),
    # By hand from the article's formula: the change of n + 2 pairs, and 1.6449 of its standard errors.
    [
        (0, 0, 144, 1.127),
        (3, 3, 144, 2.981),
        (3, 1, 144, 1.370 + 2.512),
        (0, 4, 144, -2.740 + 2.4915),
        (0, 0, 998, 0.164),
    ],
)
def test_how_much_may_be_lost_by_so_few_samples(lost, won, samples, points):
    dense, new = np.ones(samples, bool), np.ones(samples, bool)
    new[:lost], dense[lost : lost + won] = False, False
    found = ladder.may_have_lost(of(new, [0.5] * samples), of(dense, [0.5] * samples))
    assert found == pytest.approx(points, abs=0.002)


def test_samples_that_tell_enough_are_not_counted_out():
    few, many = (of([True] * n, [0.5] * n) for n in (144, 998))
    assert ladder.within_noise(few, few).endswith("whose 144 samples do not rule out a loss of 1.1 points")
    assert ladder.within_noise(many, many).endswith("on the calibration part")


def test_a_run_that_was_killed_goes_on_to_as_many_epochs_as_it_had_time_for(stage, digits, monkeypatch, tmp_path):
    """An epoch is timed anew otherwise, and another number of them is another run, which starts from the beginning."""
    kept = tmp_path / s2_finetune.EPOCHS
    assert s2_finetune._within(29.0, lambda: 10.0, kept) == 2
    assert s2_finetune._within(29.0, lambda: 7.0, kept) == 2
    kept.write_text("no number")
    assert s2_finetune._within(29.0, lambda: 7.0, kept) == 4
    assert kept.suffix in loop.RESUMED
    monkeypatch.setattr(loop, "seconds_per_epoch", lambda *args: 10.0)
    made = stage(halved(), epochs=5, seconds=29.0)
    assert not (made.folder / s2_finetune.EPOCHS).exists()


def test_seconds_pay_for_whole_epochs(stage, digits, monkeypatch):
    monkeypatch.setattr(loop, "seconds_per_epoch", lambda *args: 10.0)
    asked = []
    real = loop.train
    monkeypatch.setattr(
        loop,
        "train",
        lambda model, own, task, settings, **o: (asked.append(settings.epochs), real(model, own, task, settings, **o))[
            1
        ],
    )
    made = stage(halved(), epochs=5, seconds=29.0)
    assert asked == [2]
    assert made.epochs == 2
    made = stage(halved(), epochs=1, seconds=1000.0)
    assert asked == [2, 1]
    made = stage(halved(), epochs=5, seconds=9.0)
    assert made.rungs[-1].why == "9 s do not pay for an epoch"
    assert asked == [2, 1]


def test_an_epoch_is_timed_without_changing_the_model(digits, monkeypatch):
    model = net().train()
    masks.apply(model, halved())
    before = {name: value.clone() for name, value in model.state_dict().items()}
    settings = default_settings(model, recovery=True, seed=0)
    found = loop.seconds_per_epoch(model, digits, TASK, settings, net().eval())
    assert 0 < found < 600
    assert model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
