"""The whole chain from an ONNX file: its weights are kept, and what ships takes what the file takes."""

from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from torch.export import Dim

from pipeline.release import store
from pipeline.tasks import classification
from tests.pipeline.chain import QUICK, figures, said

SIZE = (3, 16, 16)


TASK = classification.task("classification", "output")


@pytest.fixture(scope="module")
def file(tmp_path_factory, knows_digits) -> Path:
    """A tiny net that knows the digits, as an ONNX file."""
    path = tmp_path_factory.mktemp("onnx") / "digits.onnx"
    shapes = ({0: Dim.DYNAMIC},)
    torch.onnx.export(
        knows_digits, (torch.randn(2, *SIZE),), path, dynamo=True, opset_version=18, dynamic_shapes=shapes,
        input_names=["picture"], output_names=["digit"], verbose=False,
    )  # fmt: skip
    return path


def shipped(folder: Path) -> tuple[Path, onnxruntime.InferenceSession]:
    version = store.current(folder / "tiny")
    assert version is not None
    made = version / "6-optimize"
    return version, onnxruntime.InferenceSession(made / figures(version, "6-optimize")["ships"])


@pytest.mark.examples
def test_an_onnx_file_is_pruned_and_shipped(tmp_path, file):
    text = said(tmp_path, "deploy", f"onnx:{file}", *QUICK, "--set", "prune.ratio=0.3")
    assert "weights: those of digits.onnx; the net read from it gives what onnxruntime gives on the file" in text
    version, session = shipped(tmp_path)
    dense, shrunk = figures(version, "0-baseline"), figures(version, "4-shrink")
    assert dense["weights_origin"].startswith("as given")
    assert not dense["trained_here"]
    assert dense["score"] > 0.85  # the file's weights, not fresh ones
    assert shrunk["params_after"] < 0.8 * shrunk["params_before"]
    assert [one.name for one in session.get_inputs()] == ["picture"]
    for batch in (1, 5):
        assert session.run(None, {"picture": np.zeros((batch, *SIZE), np.float32)})[0].shape == (batch, 10)


@pytest.mark.examples
def test_an_onnx_file_is_recovered_on_images_without_labels(tmp_path, file, unlabelled_digits):
    words = ["--data", f"npz:{unlabelled_digits}", "--set", "finetune.recover=closed-form"]
    words += ["--set", "gate.min_agreement=0.6", "--set", "prune.ratio=0.25"]
    said(tmp_path, "deploy", f"onnx:{file}", *QUICK, *words)
    version, _ = shipped(tmp_path)
    assert not figures(version, "0-baseline")["labelled"]
    assert figures(version, "4-shrink")["removed"]
