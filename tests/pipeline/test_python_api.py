"""What docs/python.md shows: objects in, typed results out, nothing printed."""

import runpy
from pathlib import Path

import pytest
import torch
from torch.utils.data import TensorDataset

import pipeline
from pipeline.recipe.train import TrainSettings

TINY = runpy.run_path(str(Path(__file__).with_name("tiny.py")))["TinyNet"]


def stripes(count: int, seed: int) -> TensorDataset:
    """Two classes that a small net tells apart: horizontal and vertical stripes, with noise."""
    draw = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, 2, (count,), generator=draw)
    wave = torch.sin(torch.arange(16) * 1.6)
    pictures = torch.stack([(wave[:, None] if y else wave[None, :]).expand(16, 16) for y in labels])
    return TensorDataset(
        pictures[:, None].repeat(1, 3, 1, 1) + 0.3 * torch.randn(count, 3, 16, 16, generator=draw), labels
    )


@pytest.fixture(scope="module")
def release(tmp_path_factory):
    torch.manual_seed(0)
    model = TINY(num_classes=2)
    given = {name: value.clone() for name, value in model.state_dict().items()}
    config = pipeline.Config(
        name="stripes",
        artifacts=tmp_path_factory.mktemp("artifacts"),
        baseline={"weights": "train", "train": TrainSettings(epochs=3, lr=0.01), "seconds": 0.2},
        finetune={"train": TrainSettings(epochs=2, lr=0.002)},
        optimize={"seconds": 0.2},
        gate={"max_accuracy_drop_points": 20, "max_latency_ratio": 1000, "seconds": 0.3},
    )
    made = pipeline.deploy(model, {"train": stripes(256, 0), "test": stripes(96, 1)}, config)
    assert all(torch.equal(value, given[name]) for name, value in model.state_dict().items()), (
        "the user's model changed"
    )
    return made


def test_objects_go_in_and_typed_figures_come_out(release):
    assert release.passed
    assert release[pipeline.Baseline].score > 0.9
    assert release[pipeline.Shrunk].params_after < 0.4 * release[pipeline.Shrunk].params_before
    assert release[pipeline.Validated].latency_ratio > 0
    assert (release.folder / "report.html").is_file()


def test_a_stored_release_opens_to_the_same_figures(release):
    again = pipeline.open_release(release.folder)
    assert again[pipeline.Validated] == release[pipeline.Validated]
    assert again.manifest == release.manifest


def test_nothing_is_printed(release, capsys, tmp_path):
    dataset = {"train": stripes(64, 2), "test": stripes(32, 3)}
    config = pipeline.Config(
        artifacts=tmp_path,
        name="quiet",
        baseline={"weights": "train", "train": TrainSettings(epochs=1), "seconds": 0.1},
    )
    assert pipeline.deploy(TINY(num_classes=2), dataset, config, until="prune") is None
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == ("", "")


def test_exporters_and_validators_work_on_any_two_models(release):
    from exporters import optimize
    from validators import OrtRunner, compare, random_feeds

    source = release[pipeline.Exported].onnx
    fast = release.folder.parent / "fast.onnx"
    optimize(source, fast, level="extended", threads=1)
    a, b = (OrtRunner(path, threads=1) for path in (source, fast))
    report = compare(a, b, random_feeds(a.inputs, seed=0), atol=1e-5, rtol=0.0)
    assert report.passed
    assert report.max_abs is not None
    wrong = OrtRunner(release[pipeline.Baseline].onnx, threads=1)
    assert not compare(a, wrong, random_feeds(a.inputs, seed=0), atol=1e-5, rtol=0.0).passed
