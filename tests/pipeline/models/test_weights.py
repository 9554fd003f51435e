"""Checkpoints read without running their code, and our own files written whole or not at all."""

import argparse
import os
import urllib.error
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import nn

from foundation.errors import StoreError, WeightsError
from foundation.files import read_tensors, replacing, save_tensors
from pipeline import models
from pipeline.models import from_timm, weights


class Net(nn.Module):
    def __init__(self, classes: int = 3) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.bn = nn.BatchNorm2d(4)
        self.fc = nn.Linear(4, classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(self.bn(self.conv(x)).mean((2, 3)))


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(5, 4)
        self.head = nn.Linear(4, 5, bias=False)
        self.head.weight = self.embed.weight


@pytest.fixture
def trained() -> dict[str, torch.Tensor]:
    torch.manual_seed(7)
    return Net().state_dict()


def fits(model: nn.Module, state: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("suffix", [".pt", ".pth", ".bin", ".ckpt", ".safetensors"])
def test_a_plain_checkpoint_is_loaded_exactly(trained, tmp_path, suffix):
    path = tmp_path / f"best{suffix}"
    if suffix == ".safetensors":
        safetensors.torch.save_file(trained, path)
    else:
        torch.save(trained, path)
    model = Net()
    loaded = weights.load_weights(model, path)
    assert fits(model, trained)
    assert (loaded.tensors, loaded.stripped, loaded.fresh) == (len(trained), "", ())
    assert len(loaded.sha256) == 64


@pytest.mark.parametrize("wrapper", ["state_dict", "model", "model_state_dict"])
def test_training_scripts_wrappers_are_seen_through(trained, tmp_path, wrapper):
    torch.save({wrapper: trained, "epoch": 3, "args": argparse.Namespace(lr=0.1)}, tmp_path / "a.pt")
    model = Net()
    weights.load_weights(model, tmp_path / "a.pt")
    assert fits(model, trained)


@pytest.mark.parametrize("prefix", ["module.", "model.", "_orig_mod.", "module._orig_mod.", "model.module."])
def test_prefixes_are_taken_off(trained, tmp_path, prefix):
    torch.save({prefix + name: value for name, value in trained.items()}, tmp_path / "a.pt")
    model = Net()
    weights.load_weights(model, tmp_path / "a.pt")
    assert fits(model, trained)


def test_a_model_whose_own_names_begin_with_a_prefix_keeps_them(trained, tmp_path):
    class Wrapped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = Net()

    safetensors.torch.save_file({f"model.{name}": value for name, value in trained.items()}, tmp_path / "a.safetensors")
    safetensors.torch.save_file(trained, tmp_path / "b.safetensors")
    for file in ("a", "b"):
        model = Wrapped()
        assert weights.load_weights(model, tmp_path / f"{file}.safetensors").stripped == ""
        assert fits(model.model, trained)


def test_every_mismatch_is_named(trained, tmp_path):
    del trained["conv.bias"]
    trained["extra"] = torch.zeros(1)
    trained["fc.weight"] = torch.zeros(9, 4)
    torch.save(trained, tmp_path / "a.pt")
    model = Net()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(WeightsError) as caught:
        weights.load_weights(model, tmp_path / "a.pt")
    text = str(caught.value)
    assert "1 missing: conv.bias" in text
    assert "1 unexpected: extra" in text
    assert "fc.weight 9x4 float32 instead of 3x4 float32" in text
    assert "\n" not in text
    assert fits(model, before)


def test_many_mismatches_are_counted_after_the_first_ten(tmp_path):
    torch.save({f"x{i:02}": torch.zeros(1) for i in range(25)}, tmp_path / "a.pt")
    with pytest.raises(WeightsError, match=r"25 unexpected: x00.* x09 and 15 more"):
        weights.load_weights(Net(), tmp_path / "a.pt")


def test_an_old_checkpoint_without_batch_counts_fits(trained, tmp_path):
    del trained["bn.num_batches_tracked"]
    safetensors.torch.save_file(trained, tmp_path / "a.safetensors")
    weights.load_weights(Net(), tmp_path / "a.safetensors")


def test_half_precision_checkpoints_load_and_integers_in_place_of_floats_do_not(trained, tmp_path):
    torch.save({k: v.half() if v.is_floating_point() else v for k, v in trained.items()}, tmp_path / "a.pt")
    model = Net()
    weights.load_weights(model, tmp_path / "a.pt")
    assert model.fc.weight.dtype == torch.float32
    torch.save(trained | {"fc.weight": torch.zeros(3, 4, dtype=torch.int8)}, tmp_path / "b.pt")
    with pytest.raises(WeightsError, match="int8 instead of 3x4 float32"):
        weights.load_weights(model, tmp_path / "b.pt")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_and_infinity_are_refused_by_name(trained, tmp_path, value):
    trained["fc.bias"][1] = value
    torch.save(trained, tmp_path / "a.pt")
    with pytest.raises(WeightsError, match=r"NaN or infinity in fc\.bias"):
        weights.load_weights(Net(), tmp_path / "a.pt")


class Bomb:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, (f"touch {self.path}",)


def test_a_pickle_that_wants_to_run_code_is_refused_and_does_not_run(trained, tmp_path):
    torch.save({"state_dict": trained, "bomb": Bomb(tmp_path / "ran")}, tmp_path / "a.pt")
    with pytest.raises(WeightsError, match=r"wants to run code \(posix\.system\)"):
        weights.load_weights(Net(), tmp_path / "a.pt")
    assert not (tmp_path / "ran").exists()


def test_a_whole_pickled_module_is_refused(tmp_path):
    torch.save(nn.Linear(2, 2), tmp_path / "a.pt")
    with pytest.raises(WeightsError, match="wants to run code"):
        weights.load_weights(nn.Linear(2, 2), tmp_path / "a.pt")


def test_unreadable_files_say_so(tmp_path, trained):
    torch.save(trained, tmp_path / "whole.pt")
    for name, content, says in [
        ("cut.pt", (tmp_path / "whole.pt").read_bytes()[:500], "damaged"),
        ("text.pt", b"hello", "damaged"),
        ("empty.pt", b"", "damaged"),
        ("text.safetensors", b"hello", "cannot be read"),
        ("best.onnx", b"", "not a checkpoint"),
    ]:
        (tmp_path / name).write_bytes(content)
        with pytest.raises(WeightsError, match=says):
            weights.load_weights(Net(), tmp_path / name)
    with pytest.raises(WeightsError, match="no such file"):
        weights.load_weights(Net(), tmp_path / "nowhere.pt")
    torch.save({"epoch": 3}, tmp_path / "none.pt")
    with pytest.raises(WeightsError, match="no state dict"):
        weights.load_weights(Net(), tmp_path / "none.pt")


def test_a_torchscript_archive_is_named_as_such(tmp_path):
    archive = torch.jit.trace(nn.Linear(2, 2), torch.zeros(1, 2))
    archive.save(tmp_path / "a.pt")
    with pytest.raises(WeightsError, match="TorchScript"):
        weights.load_weights(nn.Linear(2, 2), tmp_path / "a.pt")


def test_saved_weights_come_back_equal_in_every_memory_layout(tmp_path):
    base = torch.randn(4, 6)
    state = {
        "plain": torch.randn(3),
        "whole": base,
        "transposed": base.t(),
        "slice": base[:, 2:4],
        "overlap": base[1:],
        "channels_last": torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
        "mask": torch.tensor([True, False]),
        "count": torch.tensor(5),
        "empty": torch.zeros(0, 3),
    }
    save_tensors(state, tmp_path / "a.safetensors")
    back = read_tensors(tmp_path / "a.safetensors")
    assert back.keys() == state.keys()
    assert all(torch.equal(back[name], value) and back[name].dtype == value.dtype for name, value in state.items())


def test_tied_weights_are_stored_once_and_come_back_tied(tmp_path):
    model = Tied()
    save_tensors(model.state_dict(), tmp_path / "a.safetensors")
    with safetensors.safe_open(tmp_path / "a.safetensors", "pt") as file:
        assert len(list(file.keys())) == 1
    back = read_tensors(tmp_path / "a.safetensors")
    assert back["head.weight"].data_ptr() == back["embed.weight"].data_ptr()
    fresh = Tied()
    weights.load_weights(fresh, tmp_path / "a.safetensors")
    assert torch.equal(fresh.head.weight, model.head.weight)


def test_a_checkpoint_that_stores_tied_weights_once_fits(tmp_path):
    model = Tied()
    safetensors.torch.save_file({"embed.weight": model.embed.weight.detach()}, tmp_path / "a.safetensors")
    fresh = Tied()
    weights.load_weights(fresh, tmp_path / "a.safetensors")
    assert torch.equal(fresh.head.weight, model.embed.weight)


def test_a_checkpoint_with_two_values_for_what_the_model_ties_is_refused(tmp_path):
    model = Tied()
    two = {"embed.weight": model.embed.weight.detach(), "head.weight": model.embed.weight.detach() + 1}
    safetensors.torch.save_file(two, tmp_path / "a.safetensors")
    fresh = Tied()
    before = fresh.head.weight.clone()
    with pytest.raises(WeightsError, match=r"different under one weight of the model: \w+\.weight and \w+\.weight"):
        weights.load_weights(fresh, tmp_path / "a.safetensors")
    assert torch.equal(fresh.head.weight, before)


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    path = tmp_path / "a.safetensors"
    save_tensors({"x": torch.ones(2)}, path)

    def full(file: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StoreError, match="No space left on device"):
        save_tensors({"x": torch.zeros(2)}, path)
    assert torch.equal(read_tensors(path)["x"], torch.ones(2))
    assert [file.name for file in tmp_path.iterdir()] == ["a.safetensors"]


def test_a_folder_that_is_not_there_is_a_store_error(tmp_path):
    with pytest.raises(StoreError, match="cannot be written"):
        save_tensors({"x": torch.ones(2)}, tmp_path / "nowhere" / "a.safetensors")


def test_a_device_without_space_is_a_store_error():
    if not Path("/dev/full").exists():
        pytest.fail("this test needs /dev/full, which every Linux has")
    with pytest.raises(StoreError, match="No space left"), replacing(Path("/dev/shm/leanort-test")) as partial:
        partial.unlink(missing_ok=True)
        with Path("/dev/full").open("wb", buffering=0) as file:
            file.write(b"x")
    assert not list(Path("/dev/shm").glob(".leanort-test*"))


def test_torchvision_weights_need_a_network_or_its_cache(monkeypatch):
    source = models.load("resnet18", num_classes=10)
    enum = type(models.from_torchvision.torchvision.models.get_model_weights("resnet18").DEFAULT)

    def offline(self, **options):
        raise urllib.error.URLError("Name or service not known")

    monkeypatch.setattr(enum, "get_state_dict", offline)
    with pytest.raises(WeightsError, match=r"could not be downloaded.*Without a network"):
        weights.load_pretrained(source.build(), source)


@pytest.mark.parametrize("spec", ["resnet18", "vit_b_32"])
def test_torchvision_weights_fill_all_but_a_new_classifier(monkeypatch, spec):
    published = models.load(spec, seed=9).build().state_dict()
    enum = type(models.from_torchvision.torchvision.models.get_model_weights(spec).DEFAULT)
    asked = {}

    def download(self, **options):
        asked.update(options)
        return dict(published)

    monkeypatch.setattr(enum, "get_state_dict", download)
    source = models.load(spec, num_classes=10, input_size=(3, 64, 64))
    model = source.build()
    loaded = weights.load_pretrained(model, source)
    head = {"resnet18": "fc", "vit_b_32": "heads.head"}[spec]
    assert set(loaded.fresh) == {f"{head}.weight", f"{head}.bias"}
    assert str(loaded).endswith(f"untrained: {head}.weight, {head}.bias")
    assert asked["weights_only"] is True
    same = [name for name, value in model.state_dict().items() if torch.equal(value, published[name])]
    assert len(same) >= loaded.tensors - 1  # the position embedding is resampled to the smaller image


def test_timm_weights_without_a_network_fail_at_once(monkeypatch):
    monkeypatch.setattr(from_timm, "reachable", lambda host: False)
    source = models.load("timm:resnet18", num_classes=10)
    with pytest.raises(WeightsError, match=r"could not be downloaded: huggingface\.co cannot be reached"):
        weights.load_pretrained(source.build(), source)
