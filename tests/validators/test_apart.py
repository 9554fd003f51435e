"""Files take their turns in a process of their own, which ends with the race."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import psutil
import pytest

from validators import Feed, OrtRunner, ValidationError, apart, race, turns
from validators.apart import taking_turns

FEED = Feed("f", {"input": np.zeros((1, 3), np.float32)})


def children() -> list[psutil.Process]:
    return [one for one in psutil.Process().children() if one.status() != psutil.STATUS_ZOMBIE]


@pytest.fixture
def runners(linear_onnx):
    return {"one": OrtRunner(linear_onnx(), threads=1), "two": OrtRunner(linear_onnx("two.onnx"), threads=1)}


def test_it_holds_onnxruntime_alone(runners):
    """No training library, and none of this project's modules."""
    loaded = "import turns, sys; print(*sys.modules)"
    folder = Path(turns.__file__).parent
    done = subprocess.run([sys.executable, "-c", loaded], capture_output=True, text=True, cwd=folder)
    names = {name.partition(".")[0] for name in done.stdout.split()}
    assert {"numpy", "onnxruntime"} <= names
    assert not names & {"torch", "onnx", "pydantic", "foundation", "validators", "pipeline"}


def test_files_run_in_another_process_that_is_gone_after_the_race(runners):
    before = children()
    with taking_turns(runners, FEED) as there:
        (process,) = set(children()) - set(before)
        warm = there.open()
        assert list(warm) == ["one", "two"] and all(count >= 6 and seconds > 0 for count, seconds in warm.values())
        times = there.take(["two", "one", "two"], 4)
        assert [len(one) for one in times] == [4, 4, 4]
        assert all(wall > 0 and cpu >= 0 for one in times for wall, cpu in one)
        assert "turns.py" in " ".join(process.cmdline())
        assert not any("torch" in one.path for one in process.memory_maps())
    assert children() == before
    with pytest.raises(KeyboardInterrupt), taking_turns(runners, FEED):
        raise KeyboardInterrupt
    assert children() == before


def test_anything_else_runs_here(runners, function_runner):
    runners["three"] = function_runner(np.copy)
    before = children()
    with taking_turns(runners, FEED) as there:
        assert children() == before
        assert list(there.open()) == ["one", "two", "three"]
        assert list(there.open()) == ["one", "two"]  # what can be opened again
        assert runners["three"].calls > 0 and there.reopens


def test_a_file_runs_there_as_it_would_here(linear_onnx, tmp_path, monkeypatch):
    """With its threads, its optimisation and its entries, and with weights that are links."""
    asked = []
    real = subprocess.Popen
    monkeypatch.setattr(apart.subprocess, "Popen", lambda words, **how: asked.append(words[2]) or real(words, **how))
    path = linear_onnx("linked.onnx", external=True)
    weights, blob = path.with_name(f"{path.name}.data"), tmp_path / "elsewhere" / "blob"
    blob.parent.mkdir()
    weights.rename(blob)
    weights.symlink_to(blob)
    runner = OrtRunner(path, threads=2, optimize=False, session={"session.set_denormal_as_zero": "1"})
    monkeypatch.chdir(tmp_path)
    assert race({"a": runner}, FEED, reference="a", seconds=0, seed=0).runners["a"].threads == 2
    assert '"threads": 2, "optimize": false, "entries": {"session.set_denormal_as_zero": "1"}' in asked[0]


def test_inputs_come_in_their_own_types(tmp_path):
    model = onnx.parser.parse_model(
        """<ir_version: 9, opset_import: ["" : 18]>
        g (int64[batch] ids, bool[batch] keep, float16[batch] half) => (float16[batch] y)
        { numbers = Cast <to = 10> (ids)  kept = Where (keep, numbers, half)  y = Add (kept, half) }"""
    )
    onnx.save(model, tmp_path / "m.onnx")
    feed = Feed("f", {"ids": np.arange(3), "keep": np.ones(3, bool), "half": np.ones(3, np.float16)})
    report = race({"a": OrtRunner(tmp_path / "m.onnx", threads=1)}, feed, reference="a", seconds=0, seed=0)
    assert report.runners["a"].min_ms > 0


def test_what_goes_wrong_there_is_told_here(runners, tmp_path, monkeypatch):
    wrong = Feed("f", {"input": np.zeros((1, 5), np.float32)})
    with pytest.raises(ValidationError, match=r"one cannot run: .*INVALID_ARGUMENT.*input"):
        race(runners, wrong, reference="one", seconds=0, seed=0)
    with pytest.raises(ValidationError, match="linear.onnx takes input; the feed holds nothing"):
        race(runners, Feed("f", {}), reference="one", seconds=0, seed=0)
    with taking_turns(runners, FEED) as there:
        there.open()
        runners["two"].path.unlink()
        with pytest.raises(ValidationError, match=r"two cannot run: .*two\.onnx"):
            there.open()
    broken = tmp_path / "broken.py"
    broken.write_text("import sys\nsys.stdin.readline()\nprint('no room', file=sys.stderr)\nsys.exit(7)\n")
    monkeypatch.setattr(turns, "__file__", str(broken))
    with pytest.raises(ValidationError, match=r"The process that times one, two ended \(exit code 7\): no room"):
        race({**runners, "two": runners["one"]}, FEED, reference="one", seconds=0, seed=0)
