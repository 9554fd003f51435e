"""Device, precision, accumulation and trackers of one process; and that Accelerate's own state is left alone."""

import sys
import time
import types

import pytest
import torch
from torch import nn

from foundation.errors import ConfigError
from pipeline import data
from pipeline.data.parts import Share
from pipeline.progress import Progress
from pipeline.recipe.train import TrainSettings
from pipeline.seeding import seeded
from pipeline.tasks import classification
from pipeline.training import devices, launched, loop, trackers
from tests.pipeline.training.two import environment

DIGITS = data.load("digits", input_size=(1, 8, 8))
TASK = classification.task("classification", "output")
SHORT = TrainSettings(epochs=3, batch_size=64, lr=0.05, optimizer="sgd", weight_decay=0.0)


class Told(Progress):
    def __init__(self) -> None:
        self.lines: list[str] = []

    def say(self, text: str) -> None:
        self.lines.append(text)


def net(normed: bool = False) -> nn.Module:
    torch.manual_seed(0)
    norm = nn.BatchNorm2d(8) if normed else nn.Identity()
    return nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), norm, nn.ReLU(), nn.Flatten(), nn.Linear(512, 10))


# ── what is refused ──────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"device": "cuda"}, "Device is 'cuda', and this machine has no CUDA GPU"),
        ({"device": "cuda:3"}, "Device is 'cuda:3', and this machine has no CUDA GPU"),
        ({"device": "mps"}, "device is 'mps', and this machine has no such GPU"),
        ({"precision": "fp16"}, "precision is 'fp16', and a CPU cannot train in it"),
    ],
)
def test_a_device_or_precision_that_is_not_there_is_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        devices.check(TrainSettings(**settings))


def test_a_device_of_another_spelling_is_refused():
    with pytest.raises(ValueError, match="device"):
        TrainSettings(device="gpu")


def test_bf16_is_refused_where_the_processor_has_no_instructions_for_it(monkeypatch):
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    with pytest.raises(ConfigError, match="no instructions for it: it would be slower than float32"):
        devices.check(TrainSettings(precision="bf16"))


@pytest.mark.parametrize(
    ("variables", "settings", "message"),
    [
        ({"ACCELERATE_USE_DEEPSPEED": "true"}, {}, "masks need every weight whole"),
        ({"ACCELERATE_USE_FSDP": "true"}, {}, "asks for FSDP 1"),
        ({"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "1"}, {}, "asks for FSDP 1"),
        ({"ACCELERATE_USE_FSDP": "1", "FSDP_VERSION": "2"}, {"precision": "fp16", "device": "cuda"}, "never tried"),
    ],
)
def test_what_a_launcher_cannot_have_is_refused(monkeypatch, variables, settings, message):
    monkeypatch.setattr(devices, "count", lambda: 2)
    monkeypatch.setattr(devices, "resolved", lambda name: torch.device("cuda" if name == "cuda" else "cpu"))
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=message):
        devices.check(TrainSettings(**settings))


def test_fsdp_2_is_refused_where_masks_are_held_and_only_there(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_VERSION", "2")
    devices.check(TrainSettings())
    devices.check_pieces(masked=True)  # one process has them whole
    monkeypatch.setattr(devices, "count", lambda: 2)
    devices.check(TrainSettings())
    devices.check_pieces(masked=False)
    with pytest.raises(ConfigError, match="masks need every weight whole"):
        devices.check_pieces(masked=True)


@pytest.mark.parametrize("kept", ["RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"])
def test_variables_of_somebody_else_make_no_process_of_many(monkeypatch, kept):
    for name, value in environment(1, 1234).items():
        monkeypatch.setenv(name, value)
    assert launched.place() == launched.Place(1, 2, 1, "127.0.0.1", 1234, together=True)
    monkeypatch.delenv(kept)
    assert launched.place() is None


@pytest.mark.parametrize(
    ("changes", "together"),
    [
        ({"MASTER_ADDR": "10.0.0.1", "LOCAL_WORLD_SIZE": "1"}, False),
        ({"MASTER_ADDR": "node0", "LOCAL_WORLD_SIZE": "2"}, True),
        ({"MASTER_ADDR": "localhost"}, True),
    ],
)
def test_whether_all_processes_run_on_this_machine(monkeypatch, changes, together):
    for name, value in {**environment(1, 1234), **changes}.items():
        monkeypatch.setenv(name, value)
    place = launched.place()
    assert place is not None
    assert place.together is together


# ── what is the same ─────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_batch_taken_in_parts_is_the_same_step():
    whole, parts = net(), net()
    first = loop.train(whole, DIGITS, TASK, SHORT)
    second = loop.train(parts, DIGITS, TASK, SHORT.model_copy(update={"accumulate": 5}))
    for name, value in first.state.items():
        torch.testing.assert_close(second.state[name], value, rtol=1e-3, atol=1e-4)
    assert first.history[0].loss == pytest.approx(second.history[0].loss, rel=1e-5)


def test_more_parts_than_a_batch_has_samples_are_refused():
    with pytest.raises(ConfigError, match="A batch of 64 samples cannot feed accumulate = 65"):
        loop.train(net(), DIGITS, TASK, SHORT.model_copy(update={"accumulate": 65}))


@pytest.mark.parametrize("augment", [False, True])
@pytest.mark.parametrize("cuts", [1, 3])
def test_shares_of_a_batch_together_are_the_batch(augment, cuts):
    asked = {"batch_size": 50, "shuffle": True, "seed": 3, "augment": augment}
    whole = list(DIGITS.batches("train", **asked))
    shares = [list(DIGITS.batches("train", share=Share(which, 4, cuts), **asked)) for which in range(4)]
    for number, ((images,), labels) in enumerate(whole):
        rows = torch.tensor([row for which in range(4) for row in Share(which, 4, cuts).rows(len(labels))])
        assert sorted(rows.tolist()) == list(range(len(labels)))
        assert torch.equal(torch.cat([share[number][1] for share in shares]), labels[rows])
        assert torch.equal(torch.cat([share[number][0][0] for share in shares]), images[rows])


def test_a_share_without_a_sample_of_the_last_batch_leaves_it_out():
    count = len(DIGITS.some("test", 9).test)
    assert count == 9
    ends = [[len(y) for _, y in DIGITS.some("test", 9).batches("test", 4, share=Share(which, 2))] for which in range(2)]
    assert ends == [[2, 2], [2, 2, 1]]


@pytest.mark.parametrize("precision", ["float32", "bf16"])
def test_state_that_accelerate_keeps_per_process_is_as_it_was(monkeypatch, precision):
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    if precision == "bf16" and not devices._has_bf16(devices.CPU):
        pytest.skip("this processor has no bf16")
    monkeypatch.setattr(loop._Run, "check_faster", lambda run: None)
    users = Accelerator(cpu=True, gradient_accumulation_steps=7)
    loop.train(net(), DIGITS, TASK, SHORT.model_copy(update={"epochs": 1, "precision": precision}))
    assert users.state.mixed_precision == "no"
    assert users.gradient_state.num_steps == 7
    AcceleratorState._reset_state(reset_partial_state=True)


needs_bf16 = pytest.mark.skipif(not devices._has_bf16(devices.CPU), reason="this processor has no bf16")


@needs_bf16
def test_bf16_learns_and_leaves_weights_and_outputs_in_float32(monkeypatch):
    monkeypatch.setattr(loop._Run, "check_faster", lambda run: None)
    model = net(normed=True)
    result = loop.train(model, DIGITS, TASK, SHORT.model_copy(update={"precision": "bf16"}))
    plain = loop.train(net(normed=True), DIGITS, TASK, SHORT)
    assert result.best_score > 0.85
    assert all(value.dtype == torch.float32 for value in result.state.values() if value.is_floating_point())
    assert model(torch.zeros(1, 1, 8, 8)).dtype == torch.float32
    assert any(not torch.equal(result.state[name], value) for name, value in plain.state.items())


def clock(monkeypatch, lowered: float, plain: float) -> None:
    """Let a step take so many processor seconds in the lower precision, and in float32."""
    at, calls = [0.0], [0]

    def process_time() -> float:
        if calls[0] % 2:
            at[0] += lowered if calls[0] // 2 % 2 == 0 else plain
        calls[0] += 1
        return at[0]

    monkeypatch.setattr(loop, "time", types.SimpleNamespace(process_time=process_time, perf_counter=time.perf_counter))


@needs_bf16
def test_bf16_is_refused_where_a_step_takes_longer_in_it(monkeypatch):
    clock(monkeypatch, 1.41, 1.0)
    with pytest.raises(ConfigError, match="a step of this model takes 1.41 times as long in it as in float32"):
        loop.train(net(), DIGITS, TASK, SHORT.model_copy(update={"precision": "bf16"}))


@needs_bf16
def test_measuring_bf16_changes_nothing(monkeypatch):
    bf16 = SHORT.model_copy(update={"precision": "bf16"})
    clock(monkeypatch, 0.5, 1.0)
    measured = loop.train(net(normed=True), DIGITS, TASK, bf16)
    monkeypatch.setattr(loop._Run, "check_faster", lambda run: None)
    plain = loop.train(net(normed=True), DIGITS, TASK, bf16)
    assert all(torch.equal(plain.state[name], value) for name, value in measured.state.items())


def test_what_a_run_is_on_is_part_of_what_its_checkpoint_must_agree_in(tmp_path, monkeypatch):
    checkpoint, told = tmp_path / "training.pt", Told()
    loop.train(net(), DIGITS, TASK, SHORT, checkpoint=checkpoint)
    monkeypatch.setattr(loop, "facts", lambda settings: {"device": "cpu", "processes": "2"})
    loop.train(net(), DIGITS, TASK, SHORT, checkpoint=checkpoint, progress=told)
    assert told.lines == ["  The checkpoint belongs to another run; training starts anew."]


def test_a_generator_of_a_device_is_seeded_and_put_back(monkeypatch):
    states: list[object] = []
    fake = types.SimpleNamespace(get_rng_state=lambda: "before", manual_seed=states.append, set_rng_state=states.append)
    monkeypatch.setattr(torch, "get_device_module", lambda device: fake)
    with seeded(5, torch.device("cuda", 0)):
        assert states == [5]
    assert states == [5, "before"]


# ── trackers ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_tracker_that_is_not_installed_is_said_once_and_training_goes_on(monkeypatch):
    told = Told()
    monkeypatch.setattr(trackers.importlib.util, "find_spec", lambda name: None)
    result = loop.train(net(), DIGITS, TASK, SHORT.model_copy(update={"tracker": "wandb"}), progress=told)
    assert len(result.history) == 3
    assert told.lines == ["  wandb is not installed: nothing is shown there. pip install wandb"]


class Book:
    """A tracker of Accelerate's kind that remembers."""

    def __init__(self, fails: str = "") -> None:
        self.fails, self.settings, self.logged, self.finished = fails, {}, [], False

    def start(self) -> None:
        if self.fails:
            raise ConnectionError(self.fails)

    def store_init_configuration(self, values: dict) -> None:
        self.settings = values

    def log(self, values: dict, step: int) -> None:
        self.logged.append((step, values["calibration_score"]))

    def finish(self) -> None:
        self.finished = True


def tracked(monkeypatch, book: Book) -> tuple[loop.TrainResult, list[str]]:
    told = Told()
    monkeypatch.setattr(trackers.importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(trackers, "_opened", lambda name, run: book)
    return loop.train(net(), DIGITS, TASK, SHORT.model_copy(update={"tracker": "mlflow"}), progress=told), told.lines


def test_a_tracker_sees_the_settings_and_every_epoch(monkeypatch):
    book = Book()
    result, lines = tracked(monkeypatch, book)
    assert book.logged == [(one.epoch, one.calibration_score) for one in result.history]
    assert (book.settings["lr"], book.finished, lines) == (0.05, True, [])


def test_a_tracker_that_cannot_be_reached_is_said_once_and_training_goes_on(monkeypatch):
    result, lines = tracked(monkeypatch, Book("connection refused\nby all"))
    assert len(result.history) == 3
    assert lines == ["  mlflow is not kept up to date: ConnectionError: connection refused. Training goes on."]


def test_a_tracker_that_does_not_answer_holds_nobody_up(monkeypatch):
    book = Book()
    monkeypatch.setattr(book, "start", lambda: time.sleep(60))
    monkeypatch.setattr(trackers, "PATIENCE", 0.2)
    result, lines = tracked(monkeypatch, book)
    assert len(result.history) == 3
    assert lines == ["  mlflow is not kept up to date: it has not answered for 0.2 s. Training goes on."]


def test_tensorboard_writes_where_it_always_does(monkeypatch, tmp_path):
    written: list[tuple] = []

    class Writer:
        def __init__(self, folder: str, **_) -> None:
            written.append(("folder", folder))

        def add_hparams(self, *_, **__) -> None:
            pass

        def add_scalar(self, name: str, value: float, global_step: int | None = None, **_) -> None:
            written.append((name, global_step))

        def flush(self) -> None:
            pass

        def close(self) -> None:
            written.append(("closed", None))

    module = types.ModuleType("torch.utils.tensorboard")
    module.SummaryWriter = Writer  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    monkeypatch.setitem(sys.modules, "tensorboard", types.ModuleType("tensorboard"))
    monkeypatch.setattr(trackers.importlib.util, "find_spec", lambda name: object())
    monkeypatch.chdir(tmp_path)
    told = Told()
    settings = SHORT.model_copy(update={"tracker": "tensorboard"})
    checkpoint = tmp_path / "artifacts" / "mynet" / ".partial" / "0-baseline.building" / "training.pt"
    checkpoint.parent.mkdir(parents=True)
    loop.train(net(), DIGITS, TASK, settings, checkpoint=checkpoint, progress=told)
    assert told.lines == []
    assert written[0] == ("folder", "runs/leanort/mynet 0-baseline")
    assert [step for name, step in written if name == "calibration_score"] == [1, 2, 3]
    assert written[-1] == ("closed", None)
