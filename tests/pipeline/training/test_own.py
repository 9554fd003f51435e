"""A loop of the user's own trains what it is given, and cannot leave it broken."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from foundation.errors import ConfigError, LeanortError, TrainingError
from pipeline import data, models
from pipeline.progress import Progress
from pipeline.recipe import config
from pipeline.training import masks as masking
from pipeline.training import own
from tests.pipeline.tiny import TinyNet

LOOPS = Path(__file__).with_name("loops.py")
DIGITS = data.load("digits", input_size=(3, 16, 16)).some("train", 192)


def halved(net: nn.Module) -> dict[str, Tensor]:
    """Masks on two weights, as single weights that no smaller model can leave out."""
    torch.manual_seed(3)
    return {name: torch.rand(net.get_parameter(name).shape) > 0.5 for name in ("stem.0.weight", "head.weight")}


class Noted(Progress):
    def __init__(self) -> None:
        self.notes: list[tuple[int, str]] = []

    def bar(self, label: str, total: int):
        from contextlib import nullcontext

        return nullcontext(lambda done, note="": self.notes.append((done, note)))


@pytest.mark.parametrize("loop", ["plain", "averaged", "by_samples"])
@pytest.mark.parametrize("masked", [False, True])
def test_a_loop_trains_and_what_is_masked_stays(loop: str, masked: bool) -> None:
    net = TinyNet().eval()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    masks = halved(net) if masked else {}
    masking.apply(net, masks)
    progress = Noted()
    own.train(f"{LOOPS}:{loop}", net, DIGITS, teacher=TinyNet(), masks=masks, progress=progress)
    after = masking.originals(net)
    assert not net.training
    assert any(not torch.equal(after[name], before[name]) for name in after)
    for name, mask in masks.items():
        assert torch.equal(after[name][~mask], before[name][~mask])
        assert not torch.equal(after[name][mask], before[name][mask])
    masking.check_held(net, masks)
    assert bool(progress.notes) == (loop == "plain")


def test_what_is_frozen_stays_as_it_was_under_its_mask() -> None:
    net = TinyNet().eval()
    masks = halved(net)
    frozen = next(iter(masks))
    net.get_parameter(frozen).requires_grad_(False)
    before = net.get_parameter(frozen).clone()
    masking.apply(net, masks)
    own.train(f"{LOOPS}:plain", net, DIGITS, teacher=TinyNet(), masks=masks, progress=Progress())
    assert torch.equal(masking.originals(net)[frozen], before)
    masking.check_held(net, masks)


ONE_FILE = """
import pickle
import torch

class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.head = torch.nn.Linear(768, 10)

    def forward(self, x):
        return self.head(x.flatten(1))

def model():
    return Net()

def fit(model, data, report):
    assert isinstance(model, Net), "another class of that name"
    model.head.bias.data += 1
    return pickle.loads(pickle.dumps(model))
"""


def test_model_and_loop_of_one_file_know_one_class(tmp_path: Path) -> None:
    file = tmp_path / "both.py"
    file.write_text(ONE_FILE)
    net = models.load(f"{file}:model", num_classes=10, input_size=(3, 16, 16)).build()
    own.train(f"{file}:fit", net, DIGITS)
    file.write_text(ONE_FILE.replace("+= 1", "+= 2"))
    again = models.load(f"{file}:model", num_classes=10, input_size=(3, 16, 16)).build()
    before = again.head.bias.clone()
    own.train(f"{file}:fit", again, DIGITS)
    torch.testing.assert_close(again.head.bias, before + 2)


def test_the_same_loop_gives_the_same_weights_twice() -> None:
    nets = [copy.deepcopy(TinyNet()) for _ in range(2)]
    nets[1].load_state_dict(nets[0].state_dict())
    for net in nets:
        own.train(f"{LOOPS}:plain", net, DIGITS, seed=5)
    one, other = (net.state_dict() for net in nets)
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize(
    ("loop", "says"),
    [
        ("swaps", "another model"), ("freezes", "trained nothing"), ("forgets_to_go_back", "trained nothing"),
        ("explodes", "not finite"),
        ("forgets_the_masks", "without its masks"), ("leaves", "SystemExit"), ("returns_a_number", "returned int"),
        ("looks_at_the_test_part", "the part 'test'"),
    ],
)  # fmt: skip
def test_a_loop_that_goes_wrong_is_named_in_one_line_and_leaves_the_model(loop: str, says: str) -> None:
    net = TinyNet().eval()
    masks = halved(net)
    masking.apply(net, masks)
    before = {name: value.clone() for name, value in net.state_dict().items()}
    with pytest.raises(LeanortError) as caught:
        own.train(f"{LOOPS}:{loop}", net, DIGITS, masks=masks)
    assert says in caught.value.message and "\n" not in caught.value.message
    assert isinstance(caught.value, ConfigError if loop == "looks_at_the_test_part" else TrainingError)
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


class ByName(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(4, 2)

    def forward(self, *, rows: Tensor) -> dict[str, Tensor]:
        return {"logits": self.head(rows)}


def takes_its_own_form(model: nn.Module, given: own.TrainingData, report: own.Report) -> None:
    assert type(model) is ByName
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    for inputs, labels in given.loader("train", 8):
        assert isinstance(inputs, dict)
        loss = nn.functional.cross_entropy(model(**inputs)["logits"], labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    sample, label = given.dataset("calibration")[0]
    assert sample["rows"].shape == (4,) and label.shape == ()


def test_a_loop_sees_the_users_own_class_and_the_inputs_in_its_own_form(tmp_path: Path) -> None:
    from pipeline.recipe.config import Config
    from pipeline.runner import sources

    rows = [({"rows": torch.randn(4)}, index % 2) for index in range(90)]
    source, dataset, _ = sources(
        ByName(), {"train": rows[:60], "calibration": rows[60:75], "test": rows[75:]}, Config()
    )
    model = source.build()
    assert type(model) is not ByName
    before = copy.deepcopy(model.state_dict())
    own.train(f"{__name__}:takes_its_own_form", model, dataset)
    assert not torch.equal(model.state_dict()["head.weight"], before["head.weight"])


def test_train_in_a_recipe_may_name_a_loop_and_its_file_counts(tmp_path: Path) -> None:
    file = tmp_path / "own.py"
    file.write_text("def fit(model, data, report): ...\n")
    given = config.load(settings={"finetune.train": f"{file}:fit", "baseline.train": f"{file}:fit"})
    assert given.finetune.loop == given.baseline.loop == f"{file}:fit"
    assert given.finetune.train is None
    before = given.finetune.code(), given.baseline.code()
    file.write_text("def fit(model, data, report): pass\n")
    assert (given.finetune.code(), given.baseline.code()) != before
    with pytest.raises(ConfigError, match="no callable named 'fti'"):
        own.check(f"{file}:fti")


def test_processes_of_a_launcher_are_refused_before_anything_is_spent(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match="2 processes were started"):
        own.check(f"{LOOPS}:plain")
