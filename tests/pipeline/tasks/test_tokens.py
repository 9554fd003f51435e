import pytest
import torch
import torch.nn.functional as F
from torchmetrics.classification import MulticlassAccuracy, MulticlassF1Score

from foundation.errors import DataError, ModelError
from pipeline.tasks import tokens
from tests.pipeline.tasks.made import data_of, value

TASK = tokens.task("token-classification", "logits")
SCORES = {score.name: score for score in TASK.scores}


def drawn(rows: int = 20, length: int = 7, labels: int = 5):
    torch.manual_seed(0)
    target = torch.randint(0, labels, (rows, length))
    logits = torch.randn(rows, length, labels) + 1.5 * F.one_hot(target, labels)
    for row in range(rows):
        target[row, length - row % 4 :] = -100
    return {"logits": logits}, target


def test_scores_are_those_of_torchmetrics():
    outputs, target = drawn()
    answers = outputs["logits"].argmax(2)
    accuracy = float(MulticlassAccuracy(5, average="micro", ignore_index=-100)(answers, target))
    f1 = float(MulticlassF1Score(5, average="macro", ignore_index=-100)(answers, target))
    assert 0.3 < f1 < 0.95
    assert value(SCORES["token accuracy"], outputs, target) == pytest.approx(accuracy, abs=1e-6)
    assert value(SCORES["macro F1"], outputs, target) == pytest.approx(f1, abs=1e-6)


def test_the_loss_is_the_mean_over_tokens_that_count():
    outputs, target = drawn(4)
    target[2] = -100
    found = TASK.losses(outputs, target, 0.0)
    for row in (0, 1, 3):
        each = [
            F.cross_entropy(outputs["logits"][row, place], target[row, place])
            for place in range(7)
            if target[row, place] != -100
        ]
        assert float(found[row]) == pytest.approx(float(torch.stack(each).mean()), rel=1e-5)
    assert float(found[2]) == 0


def test_divergence_is_the_mean_kl_over_tokens():
    student, teacher = torch.randn(3, 4, 5), torch.randn(3, 4, 5)
    found = TASK.divergence({"logits": student}, {"logits": teacher}, 1.0)
    wanted = F.kl_div(student.log_softmax(2), teacher.log_softmax(2), reduction="none", log_target=True).sum(2).mean(1)
    assert torch.allclose(found, wanted, rtol=1e-4)


@pytest.mark.parametrize("name", ["token-classification", "auto"])
def test_labels_of_texts_of_unequal_length_are_filled_up_like_the_texts(name):
    samples = []
    for number in range(40):
        ids = torch.arange(number, number + 3 + number % 5) + 1
        samples.append({"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": (ids % 3).tolist()})
    for (ids, mask), target in data_of(samples, name).batches("train", 7):
        assert target.shape == ids.shape
        assert torch.equal(target == -100, mask == 0)
        assert torch.equal(target[mask == 1], (ids % 3)[mask == 1])


@pytest.mark.parametrize(
    ("target", "error", "words"),
    [
        (torch.full((1, 4), 3), DataError, "label 3; the model has logits of 3 classes"),
        (torch.full((1, 4), -1), DataError, "label -1"),
        (torch.zeros(1, 5, dtype=torch.int64), ModelError, "(1, 5)"),
        (torch.zeros(1, dtype=torch.int64), ModelError, "Token labels are"),
    ],
)
def test_targets_that_are_no_token_labels(target, error, words):
    with pytest.raises(error) as found:
        TASK.losses({"logits": torch.zeros(1, 4, 3)}, target, 0.0)
    assert words in str(found.value)
