"""Checkpoints as people have them: what is around the weights, which of several, shards, odd tensors."""

import json
import warnings

import pytest
import safetensors.torch
import torch
from torch import nn

from foundation import checkpoints
from foundation.errors import WeightsError
from foundation.files import read_tensors, save_tensors
from pipeline.models import weights
from pipeline.recipe.source import BaselineSection


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
        self.head = nn.Linear(4, 3)


State = dict[str, torch.Tensor]


@pytest.fixture
def good() -> State:
    torch.manual_seed(7)
    return Net().state_dict()


@pytest.fixture
def raw(good) -> State:
    return {name: value + 1 for name, value in good.items()}


def fits(model: nn.Module, state: State) -> bool:
    return all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


def under(prefix: str, state: State) -> State:
    return {prefix + name: value for name, value in state.items()}


def load(content: object, tmp_path, part: str = "") -> tuple[nn.Module, str]:
    torch.save(content, tmp_path / "a.pt")
    model = Net()
    return model, str(weights.load_weights(model, f"{tmp_path / 'a.pt'}{part}"))


# ── around the weights ───────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    "prefix",
    [
        "_fsdp_wrapped_module.",
        "module._fsdp_wrapped_module._orig_mod.",
        "_orig_mod.module.model.net.",
        "network.",
        "my_lightning_field.backbone.",
    ],
)
@pytest.mark.parametrize("wrapper", ["", "state_dict", "ckpt"])
def test_any_beginning_of_the_names_is_taken_off(good, tmp_path, prefix, wrapper):
    content = under(prefix, good)
    model, _ = load({wrapper: content, "epoch": 3, "hyper_parameters": {"lr": 0.1}} if wrapper else content, tmp_path)
    assert fits(model, good)


def test_wrappers_within_names_are_taken_out(good, tmp_path):
    inside = {name.replace("body.", "body._checkpoint_wrapped_module._orig_mod."): v for name, v in good.items()}
    model, _ = load(inside, tmp_path)
    assert fits(model, good)


def test_other_tensors_of_the_same_state_dict_are_left_aside_and_named(good, tmp_path):
    content = under("model.", good) | {"loss.weight": torch.ones(3), "metric.total": torch.tensor(4)}
    model, said = load({"state_dict": content}, tmp_path)
    assert fits(model, good)
    assert "2 tensors left aside (state_dict.loss.weight, state_dict.metric.total)" in said


def test_counters_of_profilers_and_averaging_are_left_aside(good, tmp_path):
    counters = {
        f"{place}total_{what}": torch.zeros(1) for place in ("", "body.0.", "head.") for what in ("ops", "params")
    }
    model, said = load(good | counters, tmp_path)
    assert fits(model, good)
    assert "6 tensors left aside" in said
    average = torch.optim.swa_utils.AveragedModel(Net())
    average.module.load_state_dict(good)
    model, said = load(average.state_dict(), tmp_path)
    assert fits(model, good)
    assert "n_averaged" in said
    with pytest.raises(WeightsError, match="1 unexpected: head.scale"):
        load(good | {"head.scale": torch.zeros(1)}, tmp_path)


def test_the_state_of_an_optimizer_beside_is_not_taken_for_weights(good, tmp_path):
    model = Net()
    optimizer = torch.optim.AdamW(model.parameters())
    sum(value.sum() for value in model.parameters()).backward()
    optimizer.step()
    by_name = {"state": {name: {"exp_avg": value} for name, value in good.items()}}
    content = {
        "net_g": good,
        "optimizer": optimizer.state_dict(),
        "optim_by_name": by_name,
        "exp_avg": good["head.bias"],
    }
    model, said = load(content, tmp_path)
    assert fits(model, good)
    assert "9 tensors" in said


def test_parts_of_one_model_in_several_containers_are_joined(good, tmp_path):
    parts = {
        part: {name.removeprefix(f"{part}."): value for name, value in good.items() if name.startswith(part)}
        for part in ("body", "head")
    }
    model, _ = load(parts, tmp_path)
    assert fits(model, good)


# ── which of several ─────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("plain", "averaged"),
    [
        ("params", "params_ema"),
        ("state_dict", "state_dict_ema"),
        ("model", "model_ema"),
        ("model", "ema"),
        ("model", "ema_model"),
        ("net", "swa_net"),
    ],
)
def test_averaged_weights_are_preferred_to_the_raw_ones_and_said(good, raw, tmp_path, plain, averaged):
    for content in ({plain: raw, averaged: good}, {averaged: under("module.", good), plain: under("module.", raw)}):
        model, said = load(content, tmp_path)
        assert fits(model, good)
        assert "the averaged ones" in said
        assert f"{plain}" in said
    model, said = load({plain: raw, averaged: good}, tmp_path, f"#{plain}")
    assert fits(model, raw)
    assert "the averaged ones" not in said


def test_averaged_weights_within_one_state_dict(good, raw, tmp_path):
    content = under("online_model.", raw) | under("ema_model.", good) | {"initted": torch.tensor(True)}
    model, said = load(content, tmp_path)
    assert fits(model, good)
    assert "the averaged ones, not online_model" in said


def test_a_tie_is_asked_about_and_the_answer_is_taken(good, raw, tmp_path):
    for content, names in (
        ({"student": good, "teacher": raw}, ("student", "teacher")),
        (under("student.", good) | under("teacher.", raw), ("student", "teacher")),
        ({"ema_a": good, "ema_b": raw}, ("ema_a", "ema_b")),
        ({"state_dict": {"best": good, "last": raw}}, ("state_dict.best", "state_dict.last")),
    ):
        with pytest.raises(WeightsError) as caught:
            load(content, tmp_path)
        assert f"2 sets of weights that fit: {', '.join(names)}." in str(caught.value)
        assert f"a.pt#{names[0]} or " in str(caught.value)
        for name, state in zip(names, (good, raw), strict=True):
            assert fits(load(content, tmp_path, f"#{name}")[0], state)


def test_equal_sets_are_no_tie(good, tmp_path):
    model, said = load({"a": good, "b": {name: value.clone() for name, value in good.items()}}, tmp_path)
    assert fits(model, good)
    assert "'a.'" in said


def test_only_the_set_that_fits_counts(good, raw, tmp_path):
    larger = {name: torch.zeros(9, *value.shape) for name, value in raw.items()}
    model, _ = load({"generator_ema": larger, "discriminator": good}, tmp_path)
    assert fits(model, good)


def test_a_part_that_is_not_there_names_those_that_are(good, tmp_path):
    with pytest.raises(WeightsError, match=r"no weights under 'parms'.*Its keys: params, step"):
        load({"params": good, "step": 3}, tmp_path, "#parms")


def test_a_file_whose_name_holds_a_number_sign_is_that_file(good, tmp_path):
    safetensors.torch.save_file(good, tmp_path / "run#3.safetensors")
    model = Net()
    weights.load_weights(model, tmp_path / "run#3.safetensors")
    assert fits(model, good)
    assert checkpoints.split("a.pt#x.y") == (checkpoints.Path("a.pt"), "x.y")


# ── precision ────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_another_precision_is_cast_and_said(good, tmp_path, dtype):
    cast = {name: value.to(dtype) if value.is_floating_point() else value for name, value in good.items()}
    model, said = load(cast, tmp_path)
    assert model.head.weight.dtype == torch.float32
    assert f"{str(dtype).removeprefix('torch.')} cast to float32" in said
    assert torch.equal(model.head.weight, cast["head.weight"].float())


def test_a_value_too_large_for_the_models_precision_is_refused(good, tmp_path):
    with pytest.raises(WeightsError, match=r"NaN or infinity in head\.bias"):
        load(good | {"head.bias": torch.full((3,), 1e300, dtype=torch.float64)}, tmp_path)


# ── shards and folders ───────────────────────────────────────────────────────────────────────────────────────────────


def cut(state: State, folder, kind: str = "safetensors", count: int = 3) -> None:
    base = "model" if kind == "safetensors" else "pytorch_model"
    names = list(state)
    places = {name: f"{base}-{i % count + 1:05}-of-{count:05}.{kind}" for i, name in enumerate(names)}
    folder.mkdir(exist_ok=True)
    for file in set(places.values()):
        part = {name: state[name] for name in names if places[name] == file}
        if kind == "safetensors":
            safetensors.torch.save_file(part, folder / file)
        else:
            torch.save(part, folder / file)
    (folder / f"{base}.{kind}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
@pytest.mark.parametrize("given", ["folder", "index"])
def test_shards_are_put_together(good, tmp_path, kind, given):
    cut(under("model.", good), tmp_path / "m", kind)
    base = "model" if kind == "safetensors" else "pytorch_model"
    path = tmp_path / "m" if given == "folder" else tmp_path / "m" / f"{base}.{kind}.index.json"
    model = Net()
    loaded = weights.load_weights(model, path)
    assert fits(model, good)
    section = BaselineSection(weights=str(path))
    assert len(section.code()) == 4
    before = section.code()
    cut(under("model.", {name: value * 2 for name, value in good.items()}), tmp_path / "m", kind)
    assert section.code() != before
    assert weights.load_weights(model, path).sha256 != loaded.sha256


@pytest.mark.parametrize("file", ["model.safetensors", "pytorch_model.bin"])
def test_a_folder_with_one_file(good, tmp_path, file):
    if file.endswith("bin"):
        torch.save(good, tmp_path / file)
    else:
        safetensors.torch.save_file(good, tmp_path / file)
    model = Net()
    weights.load_weights(model, tmp_path)
    assert fits(model, good)
    assert len(BaselineSection(weights=f"{tmp_path}#x").code()) == 1


@pytest.mark.parametrize("file", ["../out.safetensors", "/etc/passwd", "a/b.safetensors", "..", "a\\b.bin", "", "x\0y"])
def test_an_index_cannot_point_outside_its_folder(good, tmp_path, file):
    safetensors.torch.save_file(good, tmp_path / "out.safetensors")
    inner = tmp_path / "m"
    inner.mkdir()
    index = inner / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": dict.fromkeys(good, file)}))
    with pytest.raises(WeightsError, match="which is no file beside it"):
        weights.load_weights(Net(), index)
    with pytest.raises(WeightsError, match="which is no file beside it"):
        BaselineSection(weights=str(index)).code()


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "3", '{"weight_map": []}', '{"weight_map": {}}', '{"weight_map": {"a": 1}}', "[" * 100_000]
)
def test_a_damaged_index_is_refused(tmp_path, text):
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(text)
    with pytest.raises(WeightsError, match=r"is damaged|no weight_map"):
        weights.load_weights(Net(), index)


def test_a_missing_shard_and_a_missing_tensor_are_named(good, tmp_path):
    cut(good, tmp_path / "m")
    (tmp_path / "m" / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(WeightsError, match=r"1 of its 3 shards are missing, first model-00002"):
        weights.load_weights(Net(), tmp_path / "m")
    safetensors.torch.save_file({"x": torch.ones(1)}, tmp_path / "m" / "model-00002-of-00003.safetensors")
    with pytest.raises(WeightsError, match=r"lacks body\.0\.bias.*promises"):
        weights.load_weights(Net(), tmp_path / "m")


def test_a_folder_without_a_checkpoint(tmp_path):
    with pytest.raises(WeightsError, match="folder without a checkpoint"):
        weights.load_weights(Net(), tmp_path)


# ── odd and damaged ──────────────────────────────────────────────────────────────────────────────────────────────────


def odd_tensors() -> dict[str, torch.Tensor]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        square = torch.eye(3, 4)
        return {
            "sparse": square.to_sparse(),
            "csr": square.to_sparse_csr(),
            "csc": square.to_sparse_csc(),
            "bsr": torch.eye(4).to_sparse_bsr((2, 2)),
            "meta": torch.empty(3, 4, device="meta"),
            "float8": square.to(torch.float8_e4m3fn),
            "float8_e5m2": square.to(torch.float8_e5m2),
            "complex": square.to(torch.complex64),
            "integers": square.to(torch.int64),
            "quantised": torch.quantize_per_tensor(square, 0.1, 0, torch.qint8),
            "nested": torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]),
            "jagged": torch.nested.nested_tensor([torch.ones(2), torch.ones(3)], layout=torch.jagged),
            "uint16": square.to(torch.uint16),
        }


@pytest.mark.parametrize("kind", list(odd_tensors()))
@pytest.mark.parametrize("place", ["state", "beside"])
def test_tensors_that_are_no_plain_weights_are_refused_in_one_line(good, tmp_path, kind, place):
    if place == "beside":
        assert fits(load({"a": good, "b": odd_tensors()[kind]}, tmp_path)[0], good)
        return
    with pytest.raises(WeightsError, match=r"head\.weight") as caught:
        load(good | {"head.weight": odd_tensors()[kind]}, tmp_path)
    assert "\n" not in str(caught.value)


def test_a_dict_that_holds_itself(good, tmp_path):
    content: dict[str, object] = {"epoch": 1}
    content["self"] = content
    with pytest.raises(WeightsError, match="holds no state dict"):
        load(content, tmp_path)
    content["model"] = good
    assert fits(load(content, tmp_path)[0], good)


def test_containers_without_end(good, tmp_path):
    content: object = good
    for _ in range(60):
        content = {"a": content}
    with pytest.raises(WeightsError, match="holds no state dict"):
        load(content, tmp_path)


def test_negative_variances_are_refused_by_name(good, tmp_path):
    good["body.1.running_var"][2] = -1e-3
    with pytest.raises(WeightsError, match=r"negative variances in body\.1\.running_var"):
        load(good, tmp_path)


@pytest.mark.parametrize("aliases", ["[]", "3", '{"a": "nowhere"}', '{"a": ["b"]}', "{", "[" * 100_000, '{"a": null}'])
def test_aliases_that_are_no_map_to_tensors(good, tmp_path, aliases):
    safetensors.torch.save_file(good, tmp_path / "a.safetensors", metadata={"aliases": aliases})
    with pytest.raises(WeightsError, match="metadata 'aliases' is no map"):
        read_tensors(tmp_path / "a.safetensors")
    save_tensors({"x": good["head.bias"], "y": good["head.bias"]}, tmp_path / "b.safetensors")
    assert read_tensors(tmp_path / "b.safetensors").keys() == {"x", "y"}


@pytest.mark.parametrize("name", ["a.npz", "a.npy", "a.h5", "a"])
def test_other_kinds_of_files_are_refused_by_name(tmp_path, name):
    (tmp_path / name).write_bytes(b"\x93NUMPY")
    with pytest.raises(WeightsError, match="not a checkpoint by its name"):
        weights.load_weights(Net(), tmp_path / name)


def test_a_container_of_odd_keys(good, tmp_path):
    model, _ = load({("a", 1): torch.ones(2), 3: {"x": torch.ones(1)}, None: 4, "model": good}, tmp_path)
    assert fits(model, good)


def test_every_damaged_byte_is_an_error_in_words(good, tmp_path):
    torch.save(good, tmp_path / "whole.pt")
    whole = (tmp_path / "whole.pt").read_bytes()
    at = whole.index(b"data.pkl")
    for place in range(at, at + 900, 7):
        broken = bytearray(whole)
        broken[place] ^= 0x55
        (tmp_path / "b.pt").write_bytes(broken)
        try:
            weights.load_weights(Net(), tmp_path / "b.pt")
        except WeightsError as error:
            assert "\n" not in str(error)
