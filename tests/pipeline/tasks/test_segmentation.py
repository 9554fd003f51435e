import pytest
import torch
import torch.nn.functional as F
from torchmetrics.classification import MulticlassAccuracy, MulticlassJaccardIndex

from foundation.errors import DataError, ModelError
from pipeline.tasks import segmentation
from tests.pipeline.tasks.made import value

TASK = segmentation.task("segmentation", "out")
SCORES = {score.name: score for score in TASK.scores}


def drawn(rows: int = 12, classes: int = 4, size: int = 8, seed: int = 0):
    """Maps in which class 3 never occurs, a tenth of the pixels ignored."""
    torch.manual_seed(seed)
    target = torch.randint(0, classes - 1, (rows, size, size))
    target[0] = 0
    logits = torch.randn(rows, classes, size, size) + 1.5 * F.one_hot(target, classes).permute(0, 3, 1, 2)
    logits[:, 3] = -9
    target[torch.rand(target.shape) < 0.1] = 255
    return {"out": logits}, target


@pytest.mark.parametrize("ignored", [255, -100])
def test_scores_are_those_of_torchmetrics(ignored):
    outputs, target = drawn()
    answers, marked = outputs["out"].argmax(1), torch.where(target == 255, ignored, target)
    iou = float(MulticlassJaccardIndex(4, ignore_index=255)(answers, target))
    accuracy = float(MulticlassAccuracy(4, average="micro", ignore_index=255)(answers, target))
    assert 0.2 < iou < accuracy < 0.95
    assert value(SCORES["mean IoU"], outputs, marked) == pytest.approx(iou, abs=1e-6)
    assert value(SCORES["pixel accuracy"], outputs, marked) == pytest.approx(accuracy, abs=1e-6)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_the_loss_is_the_mean_over_pixels_that_count(smoothing):
    outputs, target = drawn(3)
    target[2] = 255
    found = TASK.losses(outputs, target, smoothing)
    for row in range(2):
        each = [
            F.cross_entropy(outputs["out"][row, :, y, x], target[row, y, x], label_smoothing=smoothing)
            for y in range(8)
            for x in range(8)
            if target[row, y, x] != 255
        ]
        assert float(found[row]) == pytest.approx(float(torch.stack(each).mean()), rel=1e-5)
    assert float(found[2]) == 0


def test_logits_of_another_resolution_are_resized_to_the_map():
    outputs, target = drawn()
    small = {"out": outputs["out"][:, :, ::2, ::2]}
    wide = {"out": F.interpolate(small["out"], (8, 8), mode="bilinear", align_corners=False)}
    assert torch.equal(TASK.losses(small, target, 0.0), TASK.losses(wide, target, 0.0))
    assert value(SCORES["mean IoU"], small, target) == value(SCORES["mean IoU"], wide, target)


def test_one_channel_is_the_logit_of_class_one():
    torch.manual_seed(0)
    logits, target = torch.randn(3, 1, 4, 4), torch.randint(0, 2, (3, 1, 4, 4)).float()
    found = TASK.losses({"out": logits}, target, 0.0)
    wanted = F.binary_cross_entropy_with_logits(logits, target, reduction="none").mean((1, 2, 3))
    assert torch.allclose(found, wanted, rtol=1e-5)
    iou = MulticlassJaccardIndex(2)((logits[:, 0] > 0).long(), target[:, 0].long())
    assert value(SCORES["mean IoU"], {"out": logits}, target) == pytest.approx(float(iou), abs=1e-6)
    with pytest.raises(DataError, match="masks hold 0 and 255"):
        TASK.losses({"out": logits}, 255 * target, 0.0)


def test_255_is_a_class_where_there_are_as_many():
    target = torch.full((1, 2, 2), 255)
    assert float(TASK.losses({"out": torch.zeros(1, 300, 2, 2)}, target, 0.0)) == pytest.approx(5.7038, abs=1e-3)


@pytest.mark.parametrize(
    ("target", "error", "words"),
    [
        (torch.full((1, 4, 4), 3), DataError, "label 3; the model has logits of 3 classes, 0 to 2"),
        (torch.full((1, 4, 4), -1), DataError, "label -1"),
        (torch.full((1, 4, 4), 0.5), DataError, "hold 0.5, which is no label"),
        (torch.zeros(1, 4, dtype=torch.int64), ModelError, "Label maps are"),
        ([torch.zeros(4, 4), torch.zeros(5, 4)], DataError, "differ in shape"),
    ],
)
def test_targets_that_are_no_label_maps(target, error, words):
    with pytest.raises(error) as found:
        TASK.losses({"out": torch.zeros(1, 3, 4, 4)}, target, 0.0)
    assert words in str(found.value)
