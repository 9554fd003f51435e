"""Training: the same twice, the same after a kill, masks held through every step, originals kept."""

import copy
import csv
import math
import signal
import subprocess
import sys
import textwrap
import time
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor, nn

from foundation.errors import MaskError, ModelError, StoreError, TrainingError
from pipeline import data, models
from pipeline.drawing.plots import history_plot
from pipeline.progress import Progress
from pipeline.recipe.train import TrainSettings
from pipeline.selection.schedules import cubic_ratio
from pipeline.selection.weights import prunable, unstructured_l1
from pipeline.tasks import classification
from pipeline.tasks.evaluation import evaluate
from pipeline.training import loop as training
from pipeline.training import masks
from pipeline.training.defaults import default_settings, has_batch_norm
from pipeline.training.history import Epoch, history_csv

DIGITS = data.load("digits", input_size=(1, 8, 8))
TASK = classification.task("classification", "output")
SHORT = TrainSettings(epochs=3, batch_size=128, lr=0.05, optimizer="sgd", weight_decay=5e-4)


def net(seed: int = 0, classes: int = 10) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(
        OrderedDict(
            conv=nn.Conv2d(1, 8, 3, padding=1),
            bn=nn.BatchNorm2d(8),
            act=nn.ReLU(),
            flat=nn.Flatten(),
            drop=nn.Dropout(0.2),
            fc=nn.Linear(512, classes),
        )
    )


def equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def figures(result: training.TrainResult) -> list[tuple[float, ...]]:
    return [(one.loss, one.train_score, one.calibration_score, one.lr) for one in result.history]


# ── learning ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_small_net_learns_and_is_left_with_its_best_epoch():
    model = net()
    result = training.train(model, DIGITS, TASK, SHORT.model_copy(update={"epochs": 6}))
    assert evaluate(TASK, model, DIGITS, "test").score > 0.85
    assert not model.training
    assert len(result.history) == 6
    best = max(result.history, key=lambda one: (one.calibration_score, -one.calibration_loss))
    assert (result.best_epoch, result.best_score) == (best.epoch, best.calibration_score)
    assert evaluate(TASK, model, DIGITS, "calibration").score == result.best_score
    assert equal(result.state, model.state_dict())
    assert result.seconds == pytest.approx(sum(one.seconds for one in result.history))


def test_the_best_epoch_is_kept_though_later_ones_are_worse():
    model = net()
    snapshots: list[dict[str, Tensor]] = []

    def spoil_after_two_epochs(step: int, total: int) -> None:
        if step >= 20:
            nn.init.normal_(model.fc.weight)

    def keep(epoch: Epoch) -> None:
        snapshots.append({name: value.clone() for name, value in model.state_dict().items()})

    settings = SHORT.model_copy(update={"epochs": 4, "schedule": "constant", "lr": 0.02, "warmup": 0.0})
    result = training.train(model, DIGITS, TASK, settings, on_step=spoil_after_two_epochs, on_epoch=keep)
    assert result.best_epoch == 2
    assert result.best_score > result.history[3].calibration_score
    assert equal(model.state_dict(), snapshots[1])


def test_the_same_seed_gives_the_same_weights_and_another_one_does_not():
    runs = [training.train(net(), DIGITS, TASK, SHORT.model_copy(update={"seed": seed})) for seed in (4, 4, 5)]
    assert equal(runs[0].state, runs[1].state)
    assert figures(runs[0]) == figures(runs[1])
    assert not equal(runs[0].state, runs[2].state)


def test_the_global_generator_and_the_threads_are_left_as_they_were():
    torch.manual_seed(1)
    expected, threads = torch.rand(1), torch.get_num_threads()
    model = net()
    torch.manual_seed(1)
    training.train(model, DIGITS, TASK, SHORT.model_copy(update={"epochs": 1, "threads": 2}))
    assert torch.equal(torch.rand(1), expected)
    assert torch.get_num_threads() == threads


def test_no_epochs_change_nothing():
    model = net()
    before = copy.deepcopy(model.state_dict())
    result = training.train(model, DIGITS, TASK, SHORT.model_copy(update={"epochs": 0}))
    assert equal(model.state_dict(), before)
    assert (result.best_epoch, result.history, result.seconds) == (0, (), 0)
    assert result.best_score == evaluate(TASK, model, DIGITS, "calibration").score


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("schedule", ["onecycle", "cosine", "constant"])
def test_every_optimizer_and_schedule_learns(optimizer, schedule):
    rate = {"sgd": 0.05, "adamw": 0.005}[optimizer]
    settings = SHORT.model_copy(update={"optimizer": optimizer, "schedule": schedule, "lr": rate})
    result = training.train(net(), DIGITS, TASK, settings)
    assert result.best_score > 0.7


def test_weight_decay_spares_norms_and_biases():
    model = net()
    optimizer = training._optimizer(model, SHORT)
    decayed = {id(one) for group in optimizer.param_groups if group["weight_decay"] for one in group["params"]}
    assert decayed == {id(model.conv.weight), id(model.fc.weight)}
    assert sum(len(group["params"]) for group in optimizer.param_groups) == 6


@pytest.mark.parametrize("size", [(512, 10), (10, 10)], ids=["reflections", "an exponential"])
def test_weight_decay_leaves_orthogonal_weights_orthogonal(size):
    """Torch keeps the signs of reflections in the parameter, and decay would make them, and with them the layer, 0."""
    model = nn.Sequential(net(), nn.Linear(10, 10)) if size == (10, 10) else net()
    layer = model[1] if size == (10, 10) else model.fc
    nn.init.orthogonal_(layer.weight)
    nn.utils.parametrizations.orthogonal(layer)
    before = layer.weight.detach().clone()
    training.train(model, DIGITS, TASK, TrainSettings(epochs=1, weight_decay=0.05))
    rows = layer.weight.detach()
    torch.testing.assert_close(rows @ rows.mT, torch.eye(10), atol=1e-4, rtol=0)
    assert not torch.equal(rows, before)


def test_frozen_parameters_stay_as_they_are():
    model = net()
    model.conv.requires_grad_(False)
    before = model.conv.weight.clone()
    training.train(model, DIGITS, TASK, SHORT.model_copy(update={"epochs": 1}))
    assert torch.equal(model.conv.weight, before)


def test_the_gradient_is_clipped():
    model, moved = net(), {}
    before = {name: value.detach().clone() for name, value in model.named_parameters()}
    settings = SHORT.model_copy(
        update={"epochs": 1, "lr": 1.0, "schedule": "constant", "warmup": 0.0, "momentum": 0.0, "weight_decay": 0.0}
    )
    for clip in (0.0, 1e-3):
        model.load_state_dict(before, strict=False)
        training.train(model, DIGITS, TASK, settings.model_copy(update={"grad_clip": clip}))
        moved[clip] = math.sqrt(
            sum(float((value.detach() - before[name]).square().sum()) for name, value in model.named_parameters())
        )
    assert moved[1e-3] <= 10 * 1e-3 * 1.001  # ten steps of at most that length
    assert moved[0.0] > 10 * moved[1e-3]


def test_channels_last_learns_the_same_function():
    plain = training.train(net(), DIGITS, TASK, SHORT)
    other = training.train(model := net(), DIGITS, TASK, SHORT.model_copy(update={"channels_last": True}))
    assert model.conv.weight.is_contiguous(memory_format=torch.channels_last)
    assert other.history[0].loss == pytest.approx(plain.history[0].loss, rel=1e-3)


# ── schedules and settings ───────────────────────────────────────────────────────────────────────────────────────────


def test_one_cycle_is_torchs_own():
    settings = TrainSettings(lr=0.3, warmup=0.25)
    parameter = nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=0.3)
    theirs = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.3, total_steps=80, pct_start=0.25, cycle_momentum=False)
    for step in range(80):
        assert training.learning_rate(settings, step, 80) == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-9)
        optimizer.step()
        theirs.step() if step < 79 else None


@pytest.mark.parametrize(("schedule", "last"), [("cosine", 0.0), ("constant", 0.3)])
def test_other_schedules_rise_linearly_to_the_top(schedule, last):
    settings = TrainSettings(lr=0.3, warmup=0.1, schedule=schedule)
    rates = [training.learning_rate(settings, step, 100) for step in range(101)]
    assert rates[:10] == pytest.approx([0.03 * (i + 1) for i in range(10)])
    assert max(rates) == pytest.approx(0.3)
    assert rates[100] == pytest.approx(last)
    if schedule == "cosine":
        assert rates[55] == pytest.approx(0.15)


@pytest.mark.parametrize("total", [1, 2, 3])
@pytest.mark.parametrize("schedule", ["onecycle", "cosine", "constant"])
def test_the_shortest_runs_have_a_rate(schedule, total):
    settings = TrainSettings(lr=0.3, schedule=schedule)
    assert all(0 <= training.learning_rate(settings, step, total) <= 0.3 for step in range(total))


@pytest.mark.parametrize("wrong", [{"epochs": -1}, {"lr": 0}, {"optimizer": "sdg"}, {"rate": 1}, {"momentum": 1.0}])
def test_wrong_settings_are_refused(wrong):
    with pytest.raises(ValidationError):
        TrainSettings(**wrong)


@pytest.mark.parametrize(
    ("spec", "normed", "epochs", "again"),
    [
        ("resnet18", True, 8, 6),
        ("mobilenet_v2", True, 16, 16),
        ("timm:resnet18", True, 8, 6),
        ("timm:vit_tiny_patch16_224", False, 20, 6),
    ],
)
def test_settings_follow_the_models_structure(spec, normed, epochs, again):
    model = models.load(spec, num_classes=10, input_size=(3, 32, 32)).build()
    assert has_batch_norm(model) == normed
    baseline = default_settings(model, seed=3)
    recovery = default_settings(model, recovery=True)
    assert (baseline.seed, baseline.epochs) == (3, epochs)
    assert baseline.lr == (2e-3 if normed else 5e-4)
    assert recovery.lr < baseline.lr
    assert recovery.epochs == again


# ── after a kill ─────────────────────────────────────────────────────────────────────────────────────────────────────


class KilledError(Exception):
    pass


def killed_after(epochs: int):
    def stop(epoch: Epoch) -> None:
        if epoch.epoch == epochs:
            raise KilledError

    return stop


@pytest.mark.parametrize(
    "changes",
    [{}, {"optimizer": "adamw", "lr": 0.01}, {"channels_last": True}, {"distill_weight": 0.5}],
    ids=["sgd", "adamw", "channels last", "taught"],
)
@pytest.mark.parametrize("masked", [False, True], ids=["plain", "masked"])
def test_a_killed_run_goes_on_bit_for_bit(tmp_path, changes, masked):
    settings = SHORT.model_copy(update={"epochs": 4, **changes})
    teacher = net(seed=9)
    chosen = unstructured_l1(prunable(net()), 0.5) if masked else None
    whole = training.train(net(), DIGITS, TASK, settings, teacher=teacher, masks=chosen)
    path = tmp_path / "training.pt"
    for epochs in (1, 3):
        with pytest.raises(KilledError):
            training.train(
                net(),
                DIGITS,
                TASK,
                settings,
                teacher=teacher,
                masks=chosen,
                checkpoint=path,
                on_epoch=killed_after(epochs),
            )
        torch.rand(17)  # a new process has other global generators
    model = net()
    resumed = training.train(model, DIGITS, TASK, settings, teacher=teacher, masks=chosen, checkpoint=path)
    assert resumed.resumed_from == 3
    assert equal(resumed.state, whole.state)
    assert equal(resumed.masks, whole.masks)
    assert figures(resumed) == figures(whole)
    assert resumed.best_epoch == whole.best_epoch
    assert equal(masks.originals(model), whole.state)
    again = training.train(net(), DIGITS, TASK, settings, teacher=teacher, masks=chosen, checkpoint=path)
    assert again.resumed_from == 4
    assert equal(again.state, whole.state)


def test_a_process_killed_in_the_middle_of_an_epoch_resumes_to_the_same_weights(tmp_path):
    settings = SHORT.model_copy(update={"epochs": 4, "threads": 1})
    script = textwrap.dedent(f"""
        import sys, time
        sys.path.insert(0, {str(Path(__file__).parent)!r})
        from pathlib import Path
        from pipeline.training import loop as training
        from test_training import DIGITS, SHORT, TASK, net
        settings = SHORT.model_copy(update={{"epochs": 4, "threads": 1}})
        slow = lambda step, total: time.sleep(0.15)
        training.train(net(), DIGITS, TASK, settings, on_step=slow, checkpoint=Path("training.pt"))
    """)
    path = tmp_path / "training.pt"
    killed = subprocess.Popen([sys.executable, "-c", script], cwd=tmp_path)
    waited = time.monotonic() + 200
    while not path.exists() and killed.poll() is None and time.monotonic() < waited:
        time.sleep(0.02)
    time.sleep(0.4)  # into the next epoch
    killed.send_signal(signal.SIGKILL)
    assert killed.wait() == -signal.SIGKILL
    resumed = training.train(net(), DIGITS, TASK, settings, checkpoint=path)
    whole = training.train(net(), DIGITS, TASK, settings)
    assert 1 <= resumed.resumed_from < 4
    assert equal(resumed.state, whole.state)
    assert figures(resumed) == figures(whole)


def test_a_gradual_run_killed_half_way_ends_the_same(tmp_path):
    settings = SHORT.model_copy(update={"epochs": 4})

    def tighten(step: int, total: int) -> dict[str, Tensor] | None:
        if step % 5:
            return None
        ratio = cubic_ratio(0.8, step, total)
        return unstructured_l1(prunable(current), ratio, held=masks.masks_of(current))

    current = net()
    whole = training.train(current, DIGITS, TASK, settings, on_step=tighten)
    current = net()
    with pytest.raises(KilledError):
        training.train(
            current, DIGITS, TASK, settings, on_step=tighten, checkpoint=tmp_path / "a.pt", on_epoch=killed_after(2)
        )
    current = net()
    resumed = training.train(current, DIGITS, TASK, settings, on_step=tighten, checkpoint=tmp_path / "a.pt")
    assert resumed.resumed_from == 2
    assert equal(resumed.state, whole.state)
    assert equal(resumed.masks, whole.masks)
    assert figures(resumed) == figures(whole)


@pytest.mark.parametrize("change", ["settings", "data", "weights", "masks"])
def test_a_checkpoint_of_another_run_is_not_resumed(tmp_path, change):
    path = tmp_path / "training.pt"
    chosen = unstructured_l1(prunable(net()), 0.5)
    training.train(net(), DIGITS, TASK, SHORT, masks=chosen, checkpoint=path)
    changed = {
        "settings": (net(), DIGITS, SHORT.model_copy(update={"lr": 0.04}), chosen),
        "data": (net(), data.load("digits", input_size=(1, 8, 9)), SHORT, chosen),
        "weights": (net(seed=1), DIGITS, SHORT, chosen),
        "masks": (net(), DIGITS, SHORT, unstructured_l1(prunable(net()), 0.6)),
    }[change]
    if change == "data":
        changed[0].fc = nn.Linear(8 * 72, 10)
    result = training.train(
        *changed[:2], TASK, changed[2], masks=None if change == "data" else changed[3], checkpoint=path
    )
    assert result.resumed_from == 0
    assert len(result.history) == 3


@pytest.mark.parametrize("content", [b"", b"no checkpoint", None])
def test_a_damaged_checkpoint_is_replaced(tmp_path, content):
    path = tmp_path / "training.pt"
    whole = training.train(net(), DIGITS, TASK, SHORT, checkpoint=path)
    path.write_bytes(path.read_bytes()[:2000] if content is None else content)
    heard: list[str] = []

    class Ear(Progress):
        def say(self, text: str) -> None:
            heard.append(text)

    again = training.train(net(), DIGITS, TASK, SHORT, checkpoint=path, progress=Ear())
    assert again.resumed_from == 0
    assert equal(again.state, whole.state)
    assert "damaged" in heard[0]
    assert torch.load(path, weights_only=True)["best_epoch"] == whole.best_epoch


def test_a_checkpoint_that_cannot_be_written_is_a_store_error(tmp_path):
    with pytest.raises(StoreError, match="cannot be written"):
        training.train(net(), DIGITS, TASK, SHORT, checkpoint=tmp_path / "nowhere" / "training.pt")


# ── masks ────────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_masks_hold_and_originals_stay_through_training(optimizer):
    model = net()
    chosen = unstructured_l1(prunable(model), 0.7)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    settings = SHORT.model_copy(update={"optimizer": optimizer, "weight_decay": 0.3, "lr": 0.02})
    result = training.train(model, DIGITS, TASK, settings, masks=chosen)
    masks.check_held(model, chosen)
    assert equal(result.masks, chosen)
    for name, mask in chosen.items():
        assert torch.equal(result.state[name][~mask], before[name][~mask])
        assert not torch.equal(result.state[name][mask], before[name][mask])
    accuracy = evaluate(TASK, model, DIGITS).score
    masks.fold(model)
    assert evaluate(TASK, model, DIGITS).score == accuracy > 0.5


def test_masks_that_are_taken_off_during_training_are_noticed():
    model = net()
    chosen = unstructured_l1(prunable(model), 0.5)

    def steal(step: int, total: int) -> None:
        if step == 2:
            module = masks._parametrization(model.fc, "weight")
            module.mask.fill_(True)

    with pytest.raises(MaskError, match=r"fc\.weight"):
        training.train(model, DIGITS, TASK, SHORT, masks=chosen, on_step=steal)


def test_gradual_masks_end_at_their_ratio_and_only_epochs_under_them_count():
    model = net()
    seen: list[float] = []

    def tighten(step: int, total: int) -> None:
        ratio = cubic_ratio(0.98, step, total, end=0.6)  # so sparse that earlier epochs did better
        chosen = unstructured_l1(prunable(model), ratio, held=masks.masks_of(model))
        masks.apply(model, chosen)
        seen.append(float((~chosen["fc.weight"]).float().mean()))

    result = training.train(model, DIGITS, TASK, SHORT.model_copy(update={"epochs": 5}), on_step=tighten)
    assert seen == sorted(seen)
    assert seen[0] == 0
    assert float((~result.masks["fc.weight"]).float().mean()) == pytest.approx(0.98, abs=1e-3)
    assert result.best_epoch >= 3 + 1  # the masks last changed in the third of five epochs
    masks.check_held(model, result.masks)
    assert evaluate(TASK, model, DIGITS, "calibration").score == result.best_score


# ── the teacher ──────────────────────────────────────────────────────────────────────────────────────────────────────


def test_the_divergence_is_hintons():
    generator = torch.Generator().manual_seed(0)
    student, teacher = torch.randn(2, 5, 4, generator=generator).unbind()
    p, q = (teacher / 3).softmax(1), (student / 3).softmax(1)
    expected = 9 * (p * (p / q).log()).sum(1).mean()
    assert float(TASK.divergence({"output": student}, {"output": teacher}, 3.0).mean()) == pytest.approx(
        float(expected), rel=1e-5
    )
    assert float(TASK.divergence({"output": teacher}, {"output": teacher}, 3.0).mean()) == pytest.approx(0, abs=1e-6)


def test_a_model_taught_only_by_a_teacher_comes_to_agree_with_it():
    teacher = net(seed=1)
    training.train(teacher, DIGITS, TASK, SHORT)
    settings = SHORT.model_copy(update={"distill_weight": 1.0, "epochs": 5})
    before = {name: value.clone() for name, value in teacher.state_dict().items()}
    pupil = net(seed=2)
    training.train(pupil, DIGITS, TASK, settings, teacher=teacher)
    one, two = (
        torch.cat([model.eval()(x).argmax(1) for (x,), _ in DIGITS.batches("test")]) for model in (teacher, pupil)
    )
    assert float((one == two).float().mean()) > 0.8
    assert equal(teacher.state_dict(), before)


def test_a_teacher_of_other_classes_is_refused():
    with pytest.raises(ModelError, match=r"teacher gives outputs of shape \(128, 12\)"):
        training.train(net(), DIGITS, TASK, SHORT.model_copy(update={"distill_weight": 0.5}), teacher=net(classes=12))


# ── trouble ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_loss_that_diverges_stops_the_run_and_says_where():
    settings = SHORT.model_copy(update={"lr": 1e30, "schedule": "constant", "warmup": 0.0, "grad_clip": 0.0})
    with pytest.raises(TrainingError, match=r"The loss became (nan|inf) in epoch 1, step \d+\.") as caught:
        training.train(net(), DIGITS, TASK, settings)
    assert "learning rate" in caught.value.hint


def test_a_data_set_smaller_than_a_batch_is_one_batch():
    x, y = torch.rand(30, 1, 8, 8), torch.arange(30) % 3
    small = data.load((x, y))
    result = training.train(net(classes=3), small, TASK, SHORT)
    assert len(result.history) == 3


# ── judging ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_anything_callable_can_be_judged():
    model = net().eval()
    expected = evaluate(TASK, model, DIGITS, "test")
    program = torch.export.export(model, (torch.zeros(2, 1, 8, 8),), dynamic_shapes=({0: torch.export.Dim.DYNAMIC},))
    others = [program.module(), lambda x: {"output": model(x), "more": x}, lambda x: [model(x)]]
    for other in others:
        found = evaluate(TASK, other, DIGITS, "test")
        assert (found.statistics == expected.statistics).all()
        assert torch.equal(found.losses, expected.losses)
    answers = torch.cat([model(x).argmax(1) for (x,), _ in DIGITS.batches("test")])
    assert expected.score == float((answers == DIGITS.test.labels).double().mean())
    with pytest.raises(ModelError, match="NoneType without a tensor"):
        evaluate(TASK, lambda x: None, DIGITS)


def test_judging_uses_eval_mode_and_puts_the_mode_back():
    model = net().train()
    first, second = (evaluate(TASK, model, DIGITS, "calibration") for _ in range(2))
    assert torch.equal(first.losses, second.losses)
    assert first.loss == second.loss
    assert model.training


# ── what a user sees ─────────────────────────────────────────────────────────────────────────────────────────────────


def test_nothing_is_printed_unless_asked(capfd):
    training.train(net(), DIGITS, TASK, SHORT.model_copy(update={"epochs": 1}))
    assert capfd.readouterr() == ("", "")


def test_progress_counts_every_step_and_shows_the_figures():
    moves: list[tuple[int, str]] = []

    class Watcher(Progress):
        def bar(self, label: str, total: int):
            assert (label, total) == ("training", 30)
            return _Bar()

    class _Bar:
        def __enter__(self):
            return lambda done, note="": moves.append((done, note))

        def __exit__(self, *error: object) -> None:
            return None

    training.train(net(), DIGITS, TASK, SHORT, progress=Watcher())
    assert sorted({done for done, _ in moves}) == list(range(1, 31))
    assert moves[0][1].startswith("epoch 1/3  loss ")
    assert "accuracy" in moves[0][1]
    assert moves[-1][1].startswith("epoch 3/3  calibration accuracy")


def test_the_history_is_written_as_table_and_plot(tmp_path):
    result = training.train(net(), DIGITS, TASK, SHORT)
    history_csv(result.history, tmp_path / "history.csv")
    with (tmp_path / "history.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [int(row["epoch"]) for row in rows] == [1, 2, 3]
    assert float(rows[1]["calibration_score"]) == result.history[1].calibration_score
    for name in ("one.svg", "two.svg", "one.png"):
        history_plot(result.history, result.best_epoch, tmp_path / name)
    assert (tmp_path / "one.svg").read_bytes() == (tmp_path / "two.svg").read_bytes()
    assert b"</svg>" in (tmp_path / "one.svg").read_bytes()
    assert (tmp_path / "one.png").read_bytes().startswith(b"\x89PNG")
