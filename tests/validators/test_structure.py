import numpy as np
import onnxruntime as ort
import pytest

from validators import Feed, StructureReport, ValidationError, cold_start, measure

FEED = Feed("f", {"input": np.zeros((1, 3), np.float32)})


def test_costs_are_measured_and_external_weights_counted(linear_onnx):
    inside = measure(linear_onnx("in.onnx"), FEED, threads=1, loads=2)
    outside = measure(linear_onnx("out.onnx", external=True), FEED, threads=1, loads=1)
    assert inside.bytes == inside.path.stat().st_size
    assert outside.bytes == outside.path.stat().st_size + 3 * 4 * 4
    assert inside.load_ms > 0
    assert inside.cold_load_ms > 0
    assert inside.cold_first_ms > 0
    assert StructureReport.model_validate_json(inside.model_dump_json()) == inside


def test_a_file_in_onnxruntimes_own_format_is_measured_too(linear_onnx, tmp_path):
    options = ort.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "m.ort")
    options.add_session_config_entry("session.save_model_format", "ORT")
    ort.InferenceSession(linear_onnx(), options, providers=["CPUExecutionProvider"])
    assert measure(tmp_path / "m.ort", FEED, threads=1, loads=1).bytes == (tmp_path / "m.ort").stat().st_size


def test_memory_is_that_of_a_fresh_process_and_grows_with_the_model(linear_onnx):
    ballast = np.ones(300 * 2**20, np.uint8)  # this process's own size must not show in the child's
    large = np.ones((3, 4 * 2**20), np.float32)  # 48 MiB of weights
    report = measure(linear_onnx("large.onnx", large), FEED, threads=1, loads=1)
    assert report.idle_rss < ballast.size
    assert report.peak_rss - report.idle_rss > large.nbytes


def test_session_entries_reach_both_processes(linear_onnx):
    """An entry that onnxruntime refuses: when the file is loaded here, and in the fresh process too."""
    refused = {"session.intra_op_thread_affinities": "nonsense"}
    with pytest.raises(ValidationError, match="cannot load"):
        measure(linear_onnx(), FEED, threads=2, loads=1, session=refused)
    with pytest.raises(ValidationError, match="cannot run in a fresh process"):
        measure(linear_onnx(), FEED, threads=2, loads=0, session=refused)


def test_a_model_that_cannot_run_is_one_line(linear_onnx):
    with pytest.raises(ValidationError, match="cannot run in a fresh process") as caught:
        measure(linear_onnx(), Feed("f", {"input": np.zeros((1, 5), np.float32)}), threads=1, loads=1)
    assert "\n" not in str(caught.value)
    with pytest.raises(ValidationError, match="cannot load"):
        measure(linear_onnx().parent / "missing.onnx", FEED, threads=1)


@pytest.mark.parametrize(
    "child",
    ["raise SystemExit(0)", "import os; os._exit(0)", "import os; os.kill(os.getpid(), 9)",
     "import time; time.sleep(60)",
     "print('{')", "print('[]')", "raise SystemExit(7)"],
)  # fmt: skip
def test_a_child_that_ends_or_hangs_is_no_measurement(linear_onnx, tmp_path, monkeypatch, child):
    program = tmp_path / "child.py"
    program.write_text(child)
    monkeypatch.setattr(cold_start, "__file__", str(program))
    with pytest.raises(ValidationError):
        measure(linear_onnx(), FEED, threads=1, loads=1, timeout=2.0)
