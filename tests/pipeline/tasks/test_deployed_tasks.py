"""Tasks of the command line: from own code to a bundle, in the task's own scores."""

import base64
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

from tests.pipeline.chain import figures, said
from tests.pipeline.tasks import nets

NETS = Path(__file__).with_name("nets.py")
QUICK = [
    "--set", "finetune.train={epochs=2, lr=0.02}",
    "--set", "baseline.seconds=0.2",
    "--set", "gate.seconds=0.3",
    "--set", 'optimize={candidates=["portable", "host"], seconds=0.2}',
    "--set", "gate.max_latency_ratio=1000.0",
    "--set", "gate.max_score_lost=20.0",
]  # fmt: skip


def deployed(folder: Path, net: str, data: str, *words: str, epochs: int = 6, code: int = 0) -> str:
    train = ("--set", f"baseline.train={{epochs={epochs}, lr=0.05}}")
    source = data if ":" in data else f"{NETS}:{data}"
    return said(folder, "deploy", f"{NETS}:{net}", "--data", source, "--name", "net", *train, *QUICK, *words, code=code)


def scores(folder: Path) -> dict:
    found = figures(folder / "net" / "v0001", "7-validate")
    return {"task": found["task"]} | {one["name"]: (one["dense"], one["shipped"]) for one in found["scores"]}


def shown(folder: Path) -> list[dict]:
    """The samples that got worse, each with its picture in the report."""
    version = folder / "net" / "v0001"
    told = json.loads((version / "7-validate" / "worse.json").read_text())
    report = (version / "report.html").read_text()
    assert "Test samples that got worse" in report
    assert told["panels"] in report
    for one in told["samples"]:
        picture = (version / "7-validate" / "worse" / f"{one['sample']}.png").read_bytes()
        assert base64.b64encode(picture).decode() in report
        assert one["shipped"] < one["dense"]
    assert 0 < len(told["samples"]) <= 24
    return told["samples"]


@pytest.mark.slow
@pytest.mark.examples
def test_segmentation(tmp_path):
    text = deployed(tmp_path, "Maps", "maps", "--set", "prune.ratio=0.25", epochs=8)
    assert "mean IoU, pixel accuracy on 48 test samples" in text
    found = scores(tmp_path)
    assert found.pop("task") == "segmentation"
    assert list(found) == ["mean IoU", "pixel accuracy"]
    assert all(0.3 < value <= 1 for value in found["mean IoU"])
    assert found["pixel accuracy"][1] > found["mean IoU"][1]
    shown(tmp_path)


@pytest.mark.slow
@pytest.mark.examples
def test_multilabel(tmp_path):
    deployed(tmp_path, "several", "flags")
    found = scores(tmp_path)
    assert found.pop("task") == "multilabel"
    assert list(found) == ["macro F1", "micro F1", "exact match"]
    assert all(value > 0.7 for value in found["macro F1"])


@pytest.mark.slow
@pytest.mark.examples
def test_regression(tmp_path):
    deployed(tmp_path, "several", "numbers")
    found = scores(tmp_path)
    assert found.pop("task") == "regression"
    assert list(found) == ["R2", "RMSE"]
    assert all(value > 0.5 for value in found["R2"])
    version = tmp_path / "net" / "v0001"
    picture = (version / "7-validate" / "predicted.png").read_bytes()
    assert base64.b64encode(picture).decode() in (version / "report.html").read_text()


@pytest.mark.slow
@pytest.mark.examples
def test_detection_with_a_loss_of_ones_own(tmp_path):
    deployed(tmp_path, "Cells", "squares", "--set", f"task.name={NETS}:detection", epochs=8)
    found = scores(tmp_path)
    assert found.pop("task") == "detection"
    assert list(found) == ["mAP", "mAP at 0.5"]
    assert all(0.1 < value < 1 for value in found["mAP"])
    assert found["mAP at 0.5"][1] > found["mAP"][1]
    shown(tmp_path)


def noted(folder: Path) -> Path:
    """The squares as a folder of images with boxes, twice as large as the net takes them; one image has none."""
    (folder / "images").mkdir(parents=True)
    images, boxes = [], []
    for number, (image, target) in enumerate([*nets.squares(), (torch.zeros(1, 32, 32), {"boxes": [], "labels": []})]):
        pixels = (128 + 40 * image[0]).clamp(0, 255).to(torch.uint8).numpy()
        Image.fromarray(pixels).resize((64, 64), Image.Resampling.NEAREST).save(folder / "images" / f"{number}.png")
        images.append({"id": 1000 + number, "file_name": f"{number}.png"})
        for (left, top, right, bottom), label in zip(target["boxes"], target["labels"], strict=True):
            box = [2 * left, 2 * top, 2 * (right - left), 2 * (bottom - top)]
            boxes.append({"id": len(boxes), "image_id": 1000 + number, "category_id": 5 + 4 * label, "bbox": box})
    kinds = [{"id": 9, "name": "bright"}, {"id": 5, "name": "dark"}]
    content = {"images": images, "annotations": boxes, "categories": kinds}
    (folder / "annotations.json").write_text(json.dumps(content))
    return folder


@pytest.mark.slow
@pytest.mark.examples
def test_a_folder_of_images_with_boxes_the_whole_way(tmp_path):
    data = noted(tmp_path / "traffic")
    deployed(tmp_path, "ColouredCells", f"coco:{data}", "--set", f"task.name={NETS}:detection",
             "--input-size", "3,32,32", epochs=10)  # fmt: skip
    found = scores(tmp_path)
    assert found.pop("task") == "detection"
    assert all(0.1 < value < 1 for value in found["mAP"])
    bundle = tmp_path / "net" / "v0001" / "bundle"
    manifest = json.loads((bundle / "manifest.json").read_text())
    assert manifest["labels"] == ["dark", "bright"]
    assert (manifest["inputs"][0]["holds"], manifest["inputs"][0]["fit"]) == ("image", "stretch")
    done = subprocess.run(
        [sys.executable, "serve.py", data / "images"], cwd=bundle, capture_output=True, text=True, timeout=100
    )
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == 301


def test_labels_of_tokens_as_far_as_the_pruned_net(tmp_path):
    text = deployed(tmp_path, "Tagger", "texts", "--until", "prune", epochs=2)
    assert "token accuracy" in text


def test_a_label_that_the_net_does_not_have_ends_the_run_in_one_line(tmp_path):
    text = deployed(tmp_path, "Maps", "wrong_maps", epochs=1, code=2)
    assert "error: The label maps hold the label 7; the model has logits of 3 classes, 0 to 2." in text
    assert "Traceback" not in text
