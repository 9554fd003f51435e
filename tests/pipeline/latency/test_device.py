"""The script that runs where nothing but onnxruntime and numpy is: what it measures, refuses, and goes on from."""

import json
import shutil
import subprocess
import sys
import tarfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from torch import nn

from foundation.errors import ConfigError, RefusedError
from foundation.files import sha256
from pipeline.channels import analyse
from pipeline.channels.dead.removable import removable
from pipeline.latency import device, kit, probes, profile
from pipeline.latency.probes import Setting
from pipeline.latency.work import work
from pipeline.measurements import Measurements
from pipeline.models.find import load
from pipeline.models.graph import graph_of
from pipeline.progress import Progress
from validators import turns

SETTING = Setting(threads=1, batch=1, int8=False, opset=23, align=8)


class Small(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.head = nn.Conv2d(3, 32, 3, padding=1), nn.Conv2d(32, 64, 3, padding=1), nn.Linear(64, 10)

    def forward(self, x):
        return self.head(self.b(self.a(x).relu()).relu().mean((2, 3)))


class OffTheBlock(Small):
    """30 channels: no kernel takes so many together, and the runtime has another operator for that."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 30, 3, padding=1), nn.Conv2d(30, 64, 3, padding=1)


class Other(Small):
    def __init__(self):
        super().__init__()
        self.b = nn.Conv2d(32, 64, 5, padding=2)


class Residual(Small):
    """A branch whose norm starts at zero, as training often has it."""

    def __init__(self):
        super().__init__()
        self.c, self.d, self.norm = nn.Conv2d(64, 48, 1), nn.Conv2d(48, 64, 1), nn.BatchNorm2d(64)
        nn.init.zeros_(self.norm.weight)

    def forward(self, x):
        x = self.b(self.a(x).relu()).relu()
        return self.head((x + self.norm(self.d(self.c(x).relu()))).relu().mean((2, 3)))


def subject(build):
    torch.manual_seed(0)
    source = load(build(), input_size=(3, 16, 16), seed=0)
    return analyse(graph_of(source.build(), source)), source


@pytest.fixture(scope="module")
def small():
    return subject(Small)


@pytest.fixture(scope="module")
def few():
    """Three models and short turns are enough to see the ways that a measurement goes."""
    patch = pytest.MonkeyPatch()
    patch.setattr(probes, "PROBES", 3)
    patch.setattr(profile, "SECONDS", 0.05)
    yield
    patch.undo()


@pytest.fixture(scope="module")
def packed(few, small, tmp_path_factory):
    analysis, source = small
    path = tmp_path_factory.mktemp("kit") / "kit.tar.gz"
    kit.write(analysis, source, SETTING, analysis.clusters, path, Progress())
    return path


@pytest.fixture(scope="module")
def measured(packed, tmp_path_factory):
    folder = tmp_path_factory.mktemp("device")
    with tarfile.open(packed) as archive:
        archive.extractall(folder, filter="data")
    done = run(folder / kit.FOLDER)
    assert done.returncode == 0, done.stderr
    return folder / kit.FOLDER


def run(folder: Path) -> subprocess.CompletedProcess[str]:
    """The kit in a process that sees none of this project."""
    return subprocess.run(
        [sys.executable, "-P", folder / kit.SCRIPT],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def test_a_kit_is_the_same_each_time(packed, small, few, tmp_path):
    analysis, source = small
    again = tmp_path / "again.tar.gz"
    kit.write(analysis, source, SETTING, analysis.clusters, again, Progress())
    assert again.read_bytes() == packed.read_bytes()
    with tarfile.open(packed) as archive:
        names = archive.getnames()
    assert len(names) == len(set(names)) == 8


class Trained(Residual):
    """Every value is its own, as after training; one weight is tied to another."""

    def __init__(self):
        super().__init__()
        self.again = nn.Linear(64, 10)
        for value in self.state_dict().values():
            if value.is_floating_point():
                nn.init.uniform_(value, 0.5, 1.5)
        self.again.weight = self.head.weight

    def forward(self, x):
        x = self.b(self.a(x).relu()).relu()
        x = (x + self.norm(self.d(self.c(x).relu()))).relu().mean((2, 3))
        return self.head(x) + self.again(x)


@pytest.mark.parametrize("int8", [False, True])
def test_a_kit_holds_nothing_of_any_weight_or_statistic(few, tmp_path, int8):
    analysis, source = subject(Trained)
    branches = removable(analysis, frozenset(analysis.parameter_names))
    path = tmp_path / "kit.tar.gz"
    setting = replace(SETTING, int8=int8)
    kit.write(analysis, source, setting, analysis.clusters, path, Progress(), branches)
    with tarfile.open(path) as archive:
        models = [archive.extractfile(name).read() for name in archive.getnames() if name.endswith(".onnx")]
    assert len(models) >= 5
    held = {name: value.detach().numpy() for name, value in analysis.captured.state.items()}
    floats = {name: value for name, value in held.items() if value.dtype == np.float32 and value.size >= 8}
    assert {"a.weight", "head.bias", "norm.running_var", "norm.running_mean"} <= floats.keys()
    for name, value in floats.items():
        flat = value.reshape(-1)
        parts = [flat[at : at + 8].tobytes() for at in range(0, flat.size - 7, 8)]
        assert not any(part in model for part in parts for model in models), name
    dense = onnx.load_from_string(models[0])
    assert sum(sorted(one.dims) == [10, 64] for one in dense.graph.initializer) == 1  # tied weights stay tied


def test_a_device_whose_setting_is_another_is_told_what_the_recipe_calls_it(measured, small, few):
    analysis, source = small
    for setting, words in (
        (replace(SETTING, opset=20), "export.opset=23"),
        (replace(SETTING, batch=4), "batch_size=1"),
    ):
        with pytest.raises(ConfigError) as caught:
            profile.read(measured / device.RESULT, analysis, source, setting, analysis.clusters)
        assert f"--set {words}" in caught.value.hint.replace("gate.batch_size", "batch_size")
        assert "--kit kit.tar.gz" in caught.value.hint


def test_time_is_the_processors_where_its_clock_is_fine_enough(monkeypatch):
    assert device.clock_of(1) is device.time.thread_time
    assert device.clock_of(2) is device.time.perf_counter
    monkeypatch.setattr(device.sys, "platform", "win32")
    assert device.clock_of(1) is device.time.perf_counter


def test_a_kit_imports_nothing_but_onnxruntime_and_numpy():
    source = Path(device.__file__).read_text()
    imported = {
        line.split()[1].partition(".")[0] for line in source.splitlines() if line.startswith(("import ", "from "))
    }
    assert imported - set(sys.stdlib_module_names) == {"numpy", "onnxruntime"}


def test_what_a_device_measured_is_read_as_what_this_machine_measures(measured, small, few):
    analysis, source = small
    there = profile.read(measured / device.RESULT, analysis, source, SETTING, analysis.clusters)
    here = profile.measure(analysis, source, SETTING, analysis.clusters, Measurements(), Progress())
    assert [s.kept for s in there.samples] == [s.kept for s in here.samples]
    assert [[o.kind for o in s.operators] for s in there.samples] == [
        [o.kind for o in s.operators] for s in here.samples
    ]
    assert there.samples[0].ratio == pytest.approx(1, abs=0.5)
    fit = there.fit(analysis)
    narrow, whole = fit.sizes.kept({"a": 8, "b": 8}), fit.sizes.kept({})
    assert fit.ratio(np.stack([narrow, whole])).argmin() == 0


@pytest.mark.parametrize("int8", [False, True])
def test_the_dense_time_is_the_mean_of_the_reference_and_of_the_same_file_in_other_sessions(int8):
    """By a reference that lay badly in memory all others are told too fast; in int8 the first model is another one."""
    what = {"setting": {"int8": int8}, "kept": [{"a": 8}, {"a": 4}]}
    shapes = [[1, 8]], [[1, 8]]
    measured = [
        {"ratio": ratio, "dense_ms": 2.0, "operators": [["relu", "Relu", *shapes, ratio]]} for ratio in (0.81, 0.45)
    ]
    found = profile._profile(what, {}, measured)
    scale = 1.0 if int8 else 0.9
    assert [one.ratio for one in found.samples] == pytest.approx([0.81 / scale, 0.45 / scale])
    assert found.samples[1].operators[0].share == pytest.approx(0.45 / scale)
    assert found.dense_ms == pytest.approx(2.0 * scale)


def test_convolutions_of_8_bit_integers_are_read_in_the_layout_that_they_run_in(small, few):
    analysis, source = small
    made = profile.measure(analysis, source, replace(SETTING, int8=True), analysis.clusters, Measurements(), Progress())
    for sample in made.samples:
        first, second = (o for o in sample.operators if "Conv" in o.kind)
        a, b = sample.kept["a"], sample.kept["b"]
        assert work(first.kind, first.inputs, first.outputs, 1).terms[1] == a * 3
        assert work(second.kind, second.inputs, second.outputs, 1).terms[1] == b * a


def test_a_convolution_is_the_same_operator_on_the_kernels_block_and_off_it(few, tmp_path):
    analysis, source = subject(OffTheBlock)
    feed = profile.dense_file(analysis, source, SETTING, tmp_path / "dense.onnx")
    dense = device.fastest(tmp_path / "dense.onnx", feed, 1)
    raw = device.measure(dense, tmp_path / "dense.onnx", feed, 1, profile.SECONDS)["operators"]
    assert "FusedConv" in {kind for _, kind, *_ in raw}
    made = profile.measure(analysis, source, SETTING, analysis.clusters, Measurements(), Progress())
    for sample in made.samples:
        assert [o.kind for o in sample.operators if "Conv" in o.kind] == ["Conv", "Conv"]


def test_the_last_model_that_is_measured_is_without_any_branch(few, tmp_path):
    analysis, source = subject(Residual)
    branches = removable(analysis, frozenset(analysis.parameter_names))
    given = analysis, source, SETTING, analysis.clusters
    here = profile.measure(*given, Measurements(), Progress(), branches)
    assert [len([o for o in s.operators if "Conv" in o.kind]) for s in here.samples] == [4, 4, 4, 4, 2]
    assert [s.kept["c"] > 0 for s in here.samples] == [True] * 4 + [False]
    gone, whole = (here.fit(analysis).of(here.fit(analysis).sizes.kept(kept)) for kept in ({"c": 0}, {}))
    assert gone < whole
    kit.write(*given, tmp_path / "kit.tar.gz", Progress(), branches)
    with tarfile.open(tmp_path / "kit.tar.gz") as archive:
        archive.extractall(tmp_path, filter="data")
    assert run(tmp_path / kit.FOLDER).returncode == 0
    there = profile.read(tmp_path / kit.FOLDER / device.RESULT, *given, branches)
    assert [len(s.operators) for s in there.samples] == [len(s.operators) for s in here.samples]
    with pytest.raises(ConfigError, match="other layers kept whole"):
        profile.read(tmp_path / kit.FOLDER / device.RESULT, *given)


def test_where_the_model_without_branches_cannot_be_made_the_table_is_of_the_others(few, tmp_path, monkeypatch):
    analysis, source = subject(Residual)
    branches = removable(analysis, frozenset(analysis.parameter_names))
    given = analysis, source, SETTING, analysis.clusters

    def refused(*_):
        raise RefusedError("That graph cannot be edited.", "")

    monkeypatch.setattr(probes, "cut", refused)
    here = profile.measure(*given, Measurements(), Progress(), branches)
    assert len(here.samples) == 4
    assert here.fit(analysis).of(here.fit(analysis).sizes.kept({})) == pytest.approx(1, abs=0.5)
    kit.write(*given, tmp_path / "kit.tar.gz", Progress(), branches)
    with tarfile.open(tmp_path / "kit.tar.gz") as archive:
        archive.extractall(tmp_path, filter="data")
    assert run(tmp_path / kit.FOLDER).returncode == 0
    assert len(profile.read(tmp_path / kit.FOLDER / device.RESULT, *given, branches).samples) == 4
    monkeypatch.setattr(probes, "shrink", refused)
    with pytest.raises(RefusedError):
        profile.measure(*given, Measurements(), Progress(), branches)


def test_a_kit_that_was_broken_off_goes_on(measured, tmp_path):
    folder = tmp_path / "again"
    shutil.copytree(measured, folder)
    before = json.loads((folder / device.RESULT).read_text())
    content = {**before, "measured": before["measured"][:2]}
    del content["digest"]
    (folder / device.RESULT).write_text(json.dumps({**content, "digest": device.digest(content)}))
    done = run(folder)
    assert done.returncode == 0 and "3/4" in done.stdout and "2/4" not in done.stdout
    after = json.loads((folder / device.RESULT).read_text())
    assert after["measured"][:2] == before["measured"][:2] and len(after["measured"]) == 4


def test_a_kit_with_another_file_in_it_measures_nothing(measured, tmp_path):
    folder = tmp_path / "changed"
    shutil.copytree(measured, folder)
    (folder / device.RESULT).unlink()
    shutil.copyfile(folder / "model-01.onnx", folder / "model-02.onnx")
    done = run(folder)
    assert done.returncode == 1 and "model-02.onnx was changed" in done.stderr
    assert not (folder / device.RESULT).exists()


def test_where_the_runtime_is_too_old_for_a_kit_it_says_how_to_get_one_that_it_can_read(measured, tmp_path):
    folder = tmp_path / "old"
    shutil.copytree(measured, folder)
    (folder / device.RESULT).unlink()
    model = onnx.load(folder / kit.REFERENCE)
    model.opset_import[0].version = 999
    onnx.save(model, folder / kit.REFERENCE)
    told = json.loads((folder / device.KIT).read_text())
    told["files"][kit.REFERENCE] = sha256(folder / kit.REFERENCE)
    (folder / device.KIT).write_text(json.dumps(told))
    done = run(folder)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert f"onnxruntime {device.ort.__version__}" in done.stderr and "opset 23" in done.stderr
    assert "--set export.opset=20 --kit" in done.stderr
    assert not (folder / device.RESULT).exists()


def refused(path, analysis, source, setting=SETTING):
    with pytest.raises(ConfigError) as caught:
        profile.read(path, analysis, source, setting, analysis.clusters)
    assert "kit" in caught.value.hint
    return caught.value.message


def written(path, content, *, sealed=True):
    content = {key: value for key, value in content.items() if key != "digest"}
    path.write_text(json.dumps({**content, "digest": device.digest(content) if sealed else "0"}))
    return path


def test_files_that_are_not_this_models_measurement_are_refused_in_a_line(measured, small, few, tmp_path):
    analysis, source = small
    good = json.loads((measured / device.RESULT).read_text())
    path = tmp_path / "device.json"
    other, other_source = subject(Other)
    assert "another model" in refused(measured / device.RESULT, other, other_source)
    assert "threads = 1" in refused(measured / device.RESULT, analysis, source, Setting(2, 1, False, 23, 8))
    assert "int8 = False" in refused(measured / device.RESULT, analysis, source, Setting(1, 1, True, 23, 8))
    faster = json.loads(json.dumps(good))
    faster["measured"][1]["ratio"] *= 0.5
    path.write_text(json.dumps(faster))
    assert "edited" in refused(path, analysis, source)
    assert "not complete" in refused(written(path, {**good, "measured": good["measured"][:2]}), analysis, source)
    assert "another version" in refused(written(path, {**good, "format": 99}), analysis, source)
    for text in ("", "[]", "{}", '{"digest": 1}', "[" * 100_000, "null"):
        path.write_text(text)
        assert "no file of a device" in refused(path, analysis, source)
    assert "cannot be read" in refused(tmp_path / "missing.json", analysis, source)


def test_what_was_measured_is_kept_and_a_broken_run_goes_on(small, few, tmp_path, monkeypatch):
    analysis, source = small
    kept, real, calls = Measurements(tmp_path / "measured"), device.measure, []

    def counting(*given):
        calls.append(given)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(*given)

    monkeypatch.setattr(device, "measure", counting)
    with pytest.raises(KeyboardInterrupt):
        profile.measure(analysis, source, SETTING, analysis.clusters, kept, Progress())
    first = profile.measure(analysis, source, SETTING, analysis.clusters, kept, Progress())
    assert len(calls) == 3 + 2
    again = profile.measure(analysis, source, SETTING, analysis.clusters, kept, Progress())
    assert again == first and len(calls) == 5
    profile.measure(analysis, source, Setting(1, 2, False, 23, 8), analysis.clusters, kept, Progress())
    assert len(calls) == 9  # of another batch size


def test_of_two_runs_at_once_one_measures_and_the_other_waits_for_it(small, few, tmp_path, monkeypatch):
    analysis, source = small
    kept, real, calls = Measurements(tmp_path / "measured"), device.measure, []

    def counting(*given):
        calls.append(given)
        return real(*given)

    monkeypatch.setattr(device, "measure", counting)
    with ThreadPoolExecutor(2) as both:
        one, other = both.map(
            lambda _: profile.measure(analysis, source, SETTING, analysis.clusters, kept, Progress()), range(2)
        )
    assert one == other
    assert len(calls) == len(one.samples)


def test_operators_of_a_profile_count_once_a_run_the_first_of_a_turn_left_out():
    shapes = {"input_type_shape": [{"float": [1, 3]}], "output_type_shape": [{"float": [1, 5]}]}

    def event(name, dur):
        return {"cat": "Node", "name": f"{name}_kernel_time", "dur": dur, "args": {"op_name": "Conv", **shapes}}

    spent = [900] * device.WARM + [500, 100, 500, 400, 200, 500, 300]  # of each turn the last one counts
    events = [event("conv", dur) for dur in spent] + [{"cat": "Session", "name": "x"}]
    given = np.array([1e-3, 1e-3, 1e-3]), [2, 3, 2]
    (row,) = device.operators(events, *given)
    assert row == ["conv", "Conv", [[1, 3]], [[1, 5]], pytest.approx(0.2)]
    looped = [event("conv", dur) for dur in spent for _ in range(4)]
    assert device.operators(looped, *given)[0][-1] == pytest.approx(0.8)


def test_a_turn_leaves_out_as_many_inferences_as_a_race_of_releases(monkeypatch):
    """Else a table tells other times than those that its predictions are held against."""
    assert (device.SETTLED, device.SETTLED_SECONDS) == (turns.SETTLED, turns.SETTLED_SECONDS)

    class Model:
        """As slow as a model whose weights another one pushed out of the caches, until it ran often enough."""

        def __init__(self, seconds):
            self.waits = iter(seconds)

        def run(self, *_):
            clock[0] += next(self.waits)

    clock = [0.0]
    monkeypatch.setattr(device.time, "perf_counter", lambda: clock[0])
    spent = [9e-3, 5e-3, 4e-3, 3e-3, 2e-3, 2e-3, 1e-3, 1e-3] + [1e-3] * device.TIMED
    assert device.turn(Model(spent), {}, lambda: clock[0]) == pytest.approx(1e-3)
    assert device.settle(Model([0.02] * 8), {}) == 3  # a slow one shows it less


def test_of_several_sessions_of_one_model_the_fastest_counts(monkeypatch):
    """Where one lies in memory may slow it by two fifths."""
    opened = iter(["slow", "fast", "slow"])
    monkeypatch.setattr(device, "session", lambda path, threads: next(opened))
    monkeypatch.setattr(device, "turn", lambda one, feed, clock: {"slow": 1.4, "fast": 1.0}[one])
    assert device.fastest("model.onnx", {}, 1) == "fast"
    given = iter([0.25, 0.17, 0.24])
    monkeypatch.setattr(device, "in_turns", lambda *rest: {"ratio": next(given), "operators": rest[-1]})
    assert device.measure("dense", "model.onnx", {}, 1, 3.0) == {"ratio": 0.17, "operators": 1.0}
