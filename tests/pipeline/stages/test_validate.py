"""Stage 7 where the two runtimes differ by more than the limit, as data: the dense model is the yardstick."""

import pytest
import torch
from torch import nn

from exporters import to_onnx
from foundation.files import save_tensors
from pipeline import data, models
from pipeline.artifacts import Baseline, Candidate, Exported, Folded, Optimized, Promoted, Shrunk, archive
from pipeline.gate.policy import GUESSED
from pipeline.progress import Progress
from pipeline.recipe.policy import GateSection, Rule
from pipeline.stages import s7_validate
from pipeline.tasks import classification
from validators import OrtRunner

TASK = classification.task("classification", "output")

SIZE = (3, 8, 8)
X = torch.randn(2, *SIZE, generator=torch.Generator().manual_seed(1))


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 10)).eval()


@pytest.fixture
def stages(tmp_path):
    """What stage 7 is given, for a net that nothing was removed from."""
    model = net()
    program = torch.export.export(model, (X,), dynamic_shapes=({0: torch.export.Dim("n")},))
    folders = {name: tmp_path / name for name in ("0-baseline", "3-fold", "4-shrink", "5-export", "6-optimize")}
    for folder in folders.values():
        folder.mkdir()
    for name in ("0-baseline", "3-fold"):
        save_tensors(model.state_dict(), folders[name] / Baseline.WEIGHTS)
    archive.write(program, folders["4-shrink"] / "shrunk.pt2")
    for folder, name in (("0-baseline", "dense"), ("5-export", "model"), ("6-optimize", "model.portable")):
        to_onnx(program, folders[folder] / f"{name}.onnx", example=(X,), opset=20, metadata={})
    winner = Candidate(name="portable", outcome="passed", file="model.portable.onnx", allowed=1e-5)
    return (
        models.load(model, num_classes=10, input_size=SIZE),
        data.load("digits", input_size=SIZE),
        Baseline.model_construct(folder=folders["0-baseline"], macs=1, params=1),
        Folded.model_construct(folder=folders["3-fold"]),
        Shrunk.model_construct(folder=folders["4-shrink"], macs_after=1, params_after=1),
        Exported.model_construct(folder=folders["5-export"]),
        Optimized.model_construct(
            folder=folders["6-optimize"], ships=winner.file, shipped=winner.name, proven=True, candidates=(winner,)
        ),
        Promoted(),
        TASK,
        Progress(),
    )


@pytest.mark.parametrize(("dense", "passed"), [(2e-5, True), (1e-7, False)])
def test_a_hop_into_onnxruntime_may_differ_as_the_dense_model_does_and_says_so(
    stages, tmp_path, monkeypatch, dense, passed
):
    """Every file is off by 3e-5 in onnxruntime, and the dense one by `dense`."""
    infer = OrtRunner.infer

    def off(self, feed):
        error = dense if self.path.name == "dense.onnx" else 3e-5
        return {name: value * (1 + error) + error for name, value in infer(self, feed).items()}

    monkeypatch.setattr(OrtRunner, "infer", off)
    out = tmp_path / "7-validate"
    out.mkdir()
    cfg = GateSection(parity=1e-5, seconds=0.1, max_latency_ratio=1000.0, max_size_ratio=1000.0)
    made = s7_validate.run(cfg, out, *stages)
    assert made.crashed == {}
    into_torch, into_runtime, optimised = made.hops
    assert into_torch.passed
    assert into_torch.reasons == ()
    assert optimised.passed
    assert into_runtime.passed is passed
    assert ("the dense model itself differs by" in " ".join(into_runtime.reasons)) is passed
    failed = {check.limit.metric for check in made.verdict.checks if check.outcome != "pass"}
    assert (failed == {GUESSED}) is passed  # the net is untrained, so that its accuracy proves nothing


@pytest.mark.parametrize("asked", [False, True])
def test_a_promoted_version_of_another_input_size_is_left_out_and_said_to_be(stages, tmp_path, asked):
    """It cannot run what this one does. A limit against it is not met by that; the others are judged as always."""
    larger = torch.randn(2, 3, 12, 12)
    program = torch.export.export(net(), (larger,), dynamic_shapes=({0: torch.export.Dim("n")},))
    before = tmp_path / "before.onnx"
    to_onnx(program, before, example=(larger,), opset=20, metadata={})
    out = tmp_path / "7-validate"
    out.mkdir()
    cfg = GateSection(seconds=0.1, max_latency_ratio=1000.0, max_size_ratio=1000.0)
    if asked:
        cfg = cfg.model_copy(update={"limits": (Rule(metric="latency", against="promoted", max=1000.0),)})
    promoted = Promoted("v0001", before, "0" * 64, macs=1, params=1)
    made = s7_validate.run(cfg, out, *(promoted if isinstance(one, Promoted) else one for one in stages))
    assert made.crashed == {}
    assert made.latency_ratio is not None
    assert made.accuracy is not None
    said = "the promoted version takes input (batch, 3, 12, 12) float32, this one input (batch, 3, 8, 8) float32"
    assert any(said in note for note in made.notes), made.notes
    failed = {check.limit.metric for check in made.verdict.checks if check.outcome != "pass"}
    assert failed - {GUESSED} == ({"latency (of promoted)"} if asked else set())
