"""What a user gets wrong: one clear line, what to do next, the right exit code, and nothing written."""

import os
import pickle
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import save_file

from pipeline import models
from pipeline.cli import main
from tests.pipeline.chain import forked

TINY = f"{Path(__file__).with_name('tiny.py')}:build"
SMALL = ["--input-size", "3,16,16"]


def refused(tmp_path: Path, *words: str, code: int = 2) -> str:
    """Run deploy; it must refuse with `code`, in one line and one hint, and leave no trace. Returns what it said."""
    out = tmp_path / "artifacts"
    result = CliRunner().invoke(main, ["deploy", *words, "--out", str(out)])
    said = result.output
    assert result.exit_code == code, said
    lines = [line for line in said.splitlines() if line.startswith("error:")]
    assert len(lines) == 1, said
    assert "Traceback" not in said
    assert not list(out.rglob("*")) if out.exists() else True, sorted(out.rglob("*"))
    return said


def state() -> dict[str, torch.Tensor]:
    return dict(models.load(TINY, num_classes=10, input_size=(3, 16, 16)).build().state_dict())


def test_an_unknown_model_names_the_near_ones(tmp_path):
    assert "resnet50" in refused(tmp_path, "resnet5O")
    assert "resnet18d" in refused(tmp_path, "timm:resnet18x")


def test_a_model_file_that_is_missing_or_lacks_the_callable(tmp_path):
    assert "nowhere.py" in refused(tmp_path, str(tmp_path / "nowhere.py:build"))
    assert "biuld" in refused(tmp_path, TINY.replace(":build", ":biuld"))


def test_no_model_at_all(tmp_path):
    assert "resnet50" in refused(tmp_path)


@pytest.mark.parametrize("ratio", ["-0.1", "1", "nan", "2.5"])
def test_a_ratio_outside_0_1(tmp_path, ratio):
    assert "prune.ratio" in refused(tmp_path, TINY, *SMALL, f"--ratio={ratio}")


def test_a_ratio_over_a_recipe_whose_target_decides_it(tmp_path):
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(f'model = "{TINY}"\n[prune.target]\nmacs = 0.4\n')
    said = refused(tmp_path, str(recipe), *SMALL, "--ratio", "0.3")
    assert "prune.target.macs" in said and "--macs" in said


@pytest.mark.parametrize("name", ["2024-05-01", "1000", "100#ema", "true"])
def test_a_checkpoint_whose_name_looks_like_a_value(tmp_path, name):
    words = ["shrink", name, "--model", TINY, *SMALL, "--out", str(tmp_path / "artifacts")]
    done = CliRunner().invoke(main, words)
    assert done.exit_code == 2
    assert name.partition("#")[0] in done.output
    assert "valid string" not in done.output


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["plan", TINY, "--svg", "{folder}/no/widths.svg"], "is no folder"),
        (["sensitivity", TINY, "--picture", "{folder}/no/curves.svg"], "is no folder"),
        (["sensitivity", TINY, "--picture", "{folder}/curves.pdf"], "must end in .svg or .png"),
        (["profile", TINY, "--picture", "{folder}/table"], "must end in .svg or .png"),
        (["profile", TINY, "--kit", "{folder}/kit.zip"], "must end in .tar.gz or .tgz"),
        (["profile", TINY, "--kit", "{folder}/no/kit.tar.gz"], "is no folder"),
    ],
)
def test_a_file_that_cannot_be_written_is_refused_before_the_model_is_built(tmp_path, monkeypatch, words, told):
    monkeypatch.setattr("pipeline.runner.sources", lambda *_: pytest.fail("the model was looked at"))
    done = CliRunner().invoke(main, [word.format(folder=tmp_path) for word in words] + SMALL)
    assert done.exit_code == 2, done.output
    assert told in done.output.replace("\n", " ")


def test_an_unknown_recipe_key_names_the_nearest(tmp_path):
    recipe = tmp_path / "r.toml"
    recipe.write_text('model = "resnet50"\n[prune]\nratoi = 0.5\n')
    assert "ratio" in refused(tmp_path, str(recipe))


def test_an_override_that_matches_no_layer(tmp_path):
    weights = tmp_path / "w.safetensors"
    save_file(state(), weights)
    words = [TINY, *SMALL, "--weights", str(weights), "--set", 'prune.overrides={"stem.9" = 0.1}']
    out = tmp_path / "artifacts"
    result = CliRunner().invoke(main, ["deploy", *words, "--out", str(out)])
    assert result.exit_code == 2
    assert "stem.0" in result.output


@pytest.mark.parametrize("size", ["3,16", "a,b,c", "3,0,16"])
def test_an_input_size_that_is_not_one(tmp_path, size):
    assert "C,H,W" in refused(tmp_path, TINY, "--input-size", size)


def test_an_input_shape_that_the_model_does_not_take(tmp_path):
    said = refused(tmp_path, TINY, "--input-size", "5,16,16")
    assert "5" in said


def test_a_checkpoint_that_does_not_exist(tmp_path):
    assert "none.safetensors" in refused(tmp_path, TINY, *SMALL, "--weights", str(tmp_path / "none.safetensors"))


def test_a_checkpoint_that_is_garbage(tmp_path):
    for name in ("w.safetensors", "w.pt"):
        (tmp_path / name).write_bytes(b"not a checkpoint")
        assert name in refused(tmp_path, TINY, *SMALL, "--weights", str(tmp_path / name))


class _Bomb:
    def __reduce__(self):
        return (os.system, (f"touch {Path(sys.prefix) / 'owned-by-a-pickle'}",))


def test_a_pickle_that_wants_to_run_code_is_not_run(tmp_path):
    path, mark = tmp_path / "w.pt", Path(sys.prefix) / "owned-by-a-pickle"
    torch.save({"stem.0.weight": _Bomb()}, path)
    said = refused(tmp_path, TINY, *SMALL, "--weights", str(path))
    assert not mark.exists()
    assert "code" in said
    with path.open("wb") as file:
        pickle.dump(_Bomb(), file)
    refused(tmp_path, TINY, *SMALL, "--weights", str(path))
    assert not mark.exists()


def test_a_checkpoint_of_another_model_names_the_keys(tmp_path):
    wrong = state()
    wrong["head.weight"] = torch.zeros(7, 16)
    wrong["extra.bias"] = wrong.pop("head.bias")
    save_file(wrong, tmp_path / "w.safetensors")
    said = refused(tmp_path, TINY, *SMALL, "--weights", str(tmp_path / "w.safetensors"))
    assert "head" in said


def test_nan_in_the_weights(tmp_path):
    broken = state()
    broken["stem.0.weight"][0, 0, 0, 0] = float("nan")
    save_file(broken, tmp_path / "w.safetensors")
    said = refused(tmp_path, TINY, *SMALL, "--weights", str(tmp_path / "w.safetensors"))
    assert "stem.0.weight" in said


def npz(tmp_path: Path, x: np.ndarray, y: np.ndarray) -> str:
    np.savez(tmp_path / "data.npz", x=x, y=y)
    return f"npz:{tmp_path / 'data.npz'}"


def images(count: int = 64) -> np.ndarray:
    return np.random.default_rng(0).random((count, 3, 16, 16), dtype=np.float32)


def test_an_empty_data_set(tmp_path):
    refused(tmp_path, TINY, "--data", npz(tmp_path, images(0), np.zeros(0, int)))


def test_a_single_class_data_set(tmp_path):
    assert "class" in refused(tmp_path, TINY, "--data", npz(tmp_path, images(), np.zeros(64, int)))


def test_nan_in_the_data(tmp_path):
    x = images()
    x[3, 0, 0, 0] = np.nan
    refused(tmp_path, TINY, "--data", npz(tmp_path, x, np.arange(64) % 4))


def test_labels_outside_the_models_classes(tmp_path):
    own = tmp_path / "two.py"
    own.write_text("from torch import nn\ndef net(): return nn.Sequential(nn.Flatten(), nn.Linear(768, 2))\n")
    said = refused(tmp_path, f"{own}:net", "--data", npz(tmp_path, images(), np.arange(64) % 4))
    assert "4 classes" in said


def test_a_model_that_torch_export_cannot_follow_is_refused_before_training_with_its_line(tmp_path):
    own = tmp_path / "branchy.py"
    own.write_text(
        "import torch\nfrom torch import nn\n"
        "class Net(nn.Module):\n"
        "    def __init__(self):\n        super().__init__()\n        self.fc = nn.Linear(768, 10)\n"
        "    def forward(self, x):\n"
        "        y = self.fc(x.flatten(1))\n"
        "        if y.sum().item() > 0:\n            y = -y\n"
        "        return y\n"
    )
    said = refused(tmp_path, f"{own}:Net", *SMALL, code=3)
    assert "branchy.py:9" in said


def test_an_artifacts_folder_that_is_no_folder(tmp_path):
    (tmp_path / "file").write_text("")
    result = CliRunner().invoke(main, ["deploy", TINY, *SMALL, "--out", str(tmp_path / "file")])
    assert result.exit_code == 3
    assert "not a folder" in result.output


def test_a_read_only_artifacts_folder(tmp_path):
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "ro", "tmpfs", str(tmp_path)], capture_output=True)
    if mounted.returncode:
        tmp_path.chmod(0o555)
        if os.geteuid() == 0:
            pytest.skip("root that may not mount cannot be refused a write")
    try:
        result = CliRunner().invoke(main, ["deploy", TINY, *SMALL, "--out", str(tmp_path / "a")])
        assert result.exit_code == 3
        assert "read-only" in result.output or "may not be written" in result.output
    finally:
        subprocess.run(["umount", str(tmp_path)], capture_output=True)


def test_a_disk_that_fills_up_in_the_middle_is_said_and_the_run_can_go_on(tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=200k", "tmpfs", str(disk)], capture_output=True)
    if mounted.returncode:
        pytest.skip("this machine lets nobody mount")
    words = [
        TINY,
        *SMALL,
        "--set",
        "baseline.train={epochs=1}",
        "--set",
        "finetune.train={epochs=1}",
        "--set",
        "baseline.seconds=0.1",
        "--set",
        "gate.seconds=0.2",
        "--set",
        'optimize={candidates=["portable"], seconds=0.1}',
    ]
    words += [
        "--name",
        "tiny",
        "--out",
        str(disk / "a"),
        "--set",
        "gate.max_accuracy_drop_points=100",
        "--set",
        "gate.max_latency_ratio=1000",
    ]
    try:
        result = CliRunner().invoke(main, ["deploy", *words])
        assert result.exit_code == 3, result.output
        assert "full" in result.output
        assert "Traceback" not in result.output
        assert not list((disk / "a").glob("tiny/v*"))
        subprocess.run(["mount", "-o", "remount,size=200m", str(disk)], check=True)
        again = CliRunner().invoke(main, ["deploy", *words])
        assert again.exit_code == 0, again.output
        assert (disk / "a" / "tiny" / "current" / "report.html").is_file()
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)  # lazily: a session may still map a file


def test_ctrl_c_ends_with_one_line_and_keeps_what_is_complete(tmp_path):
    words = ["deploy", TINY, *SMALL, "--name", "tiny", "--set", "baseline.train={epochs=1}"]
    with forked(tmp_path, *words, "--set", "finetune.train={epochs=500}") as (process, _, err):
        building = tmp_path / "tiny" / ".partial" / "2-finetune.building"
        deadline = time.monotonic() + 120
        while not building.exists():
            assert process.is_alive()
            assert time.monotonic() < deadline
            time.sleep(0.02)
        time.sleep(0.5)
        os.kill(process.pid, signal.SIGINT)
        process.join(60)
        said = err.read_text()
    assert process.exitcode == 130
    assert "Interrupted" in said
    assert "Traceback" not in said
    assert (tmp_path / "tiny" / ".partial" / "0-baseline" / "stage.json").is_file()


def test_an_unknown_stage_and_an_unknown_version(tmp_path):
    assert "finetune" in refused(tmp_path, TINY, *SMALL, "--until", "finetun")
    result = CliRunner().invoke(main, ["show", "resnet50", "--out", str(tmp_path)])
    assert result.exit_code == 2


def test_an_opset_that_the_exporter_cannot_write_is_a_failed_stage_in_one_line(tmp_path):
    words = [TINY, *SMALL, "--name", "tiny", "--out", str(tmp_path), "--set", "export.opset=99", "--until", "export"]
    words += ["--set", "baseline.train.epochs=1", "--set", "baseline.seconds=0.1", "--set", "finetune.epochs=0"]
    result = CliRunner().invoke(main, ["deploy", *words])
    assert result.exit_code == 3
    assert "opset 99" in result.output
    assert "Traceback" not in result.output


# A loop of one's own: a good one, and each way of going wrong that the command line has to tell of.
LOOPS = """
import os
import torch


def good(model, data, report):
    optimizer = torch.optim.SGD(model.parameters(), 0.02, momentum=0.9)
    for images, labels in data.loader("train", 128):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(images), labels).backward()
        optimizer.step()


def nan(model, data, report):
    with torch.no_grad():
        next(model.parameters()).fill_(float("nan"))


def swaps(model, data, report):
    return torch.nn.Linear(2, 2)


def raises(model, data, report):
    for step, _ in enumerate(data.loader("train", 128)):
        report(step, 9)
        if step == 2:
            raise KeyError("learning_rate")


def leaves(model, data, report):
    raise SystemExit(0)
"""


@pytest.fixture
def loops(tmp_path):
    path = tmp_path / "loops.py"
    path.write_text(LOOPS)
    return path


@pytest.mark.parametrize("section", ["baseline", "finetune"])
def test_a_loop_that_is_not_there_is_refused_before_anything_is_written(tmp_path, loops, section):
    for named, says in ((f"{tmp_path / 'missing.py'}:fit", "missing.py"), (f"{loops}:nope", "nope"), ("loops.py", "")):
        assert says in refused(tmp_path, TINY, *SMALL, "--set", f"{section}.train={named}")
    odd = tmp_path / "odd.py"
    odd.write_text("fit = 3\n")
    assert "fit" in refused(tmp_path, TINY, *SMALL, "--set", f"{section}.train={odd}:fit")


def run_with_loop(tmp_path: Path, words: list[str], code: int) -> str:
    quick = ["--set", "baseline.seconds=0.1", "--set", "finetune.epochs=1", "--set", "finetune.samples=64"]
    given = ["deploy", TINY, *SMALL, *quick, "--name", "tiny", "--out", str(tmp_path / "a"), "--until", "finetune"]
    result = CliRunner().invoke(main, [*given, *words])
    assert result.exit_code == code, result.output
    assert len([line for line in result.output.splitlines() if line.startswith("error:")]) == (code != 0)
    assert "Traceback" not in result.output
    return result.output


@pytest.mark.parametrize(
    ("loop", "says"),
    [("nan", "not finite"), ("swaps", "another model"), ("raises", "learning_rate"), ("leaves", "SystemExit")],
)
def test_a_loop_that_fails_is_a_failed_stage_in_one_line_and_the_next_run_goes_on(tmp_path, loops, loop, says):
    sections = ["--set", f"baseline.train={loops}:good"]
    said = run_with_loop(tmp_path, ["--set", f"baseline.train={loops}:{loop}"], 3)
    assert says in said
    assert not list((tmp_path / "a" / "tiny").glob("v*"))
    said = run_with_loop(tmp_path, [*sections, "--set", f"finetune.train={loops}:{loop}"], 3)
    assert says in said
    assert f"{loops}:{loop}" in said
    done = {path.parent.name for path in (tmp_path / "a" / "tiny" / ".partial").glob("*/stage.json")}
    assert done == {"0-baseline", "1-prune"}
    said = run_with_loop(tmp_path, [*sections, "--set", f"finetune.train={loops}:good"], 0)
    assert "0-baseline: reused" in said or "baseline: reused" in said
    assert f"training: by {loops}:good" in said
