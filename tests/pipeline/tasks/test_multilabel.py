import pytest
import torch
from torchmetrics.classification import MultilabelExactMatch, MultilabelF1Score

from foundation.errors import DataError, ModelError
from pipeline.tasks import multilabel
from tests.pipeline.tasks.made import value


def drawn(rows: int = 90, labels: int = 5, seed: int = 0):
    torch.manual_seed(seed)
    target = (torch.rand(rows, labels) < torch.linspace(0.1, 0.7, labels)).long()
    return {"output": torch.randn(rows, labels) + 2 * target - 1}, target


TASK = multilabel.task("multilabel", "output")
SCORES = {score.name: score for score in TASK.scores}


@pytest.mark.parametrize(
    ("name", "reference"),
    [
        ("macro F1", MultilabelF1Score(5, average="macro")),
        ("micro F1", MultilabelF1Score(5, average="micro")),
        ("exact match", MultilabelExactMatch(5)),
    ],
)
@pytest.mark.parametrize("kind", [torch.int64, torch.float32])
def test_scores_are_those_of_torchmetrics(name, reference, kind):
    outputs, target = drawn()
    wanted = float(reference(outputs["output"].sigmoid(), target))
    assert 0.1 < wanted < 0.95
    assert value(SCORES[name], outputs, target.to(kind)) == pytest.approx(wanted, abs=1e-6)


def test_a_label_that_nobody_has_or_answers_is_left_out():
    outputs, target = drawn()
    wide = {"output": torch.cat([outputs["output"], torch.full((90, 1), -3.0)], 1)}
    more = torch.cat([target, torch.zeros(90, 1, dtype=torch.int64)], 1)
    assert value(SCORES["macro F1"], wide, more) == pytest.approx(value(SCORES["macro F1"], outputs, target))


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_the_loss_is_binary_cross_entropy_per_sample(smoothing):
    outputs, target = drawn(4)
    for row, loss in enumerate(TASK.losses(outputs, target, smoothing)):
        each = []
        for logit, label in zip(outputs["output"][row], target[row], strict=True):
            soft = float(label) * (1 - smoothing) + smoothing / 2
            p = float(logit.sigmoid())
            each.append(-soft * torch.tensor(p).log() - (1 - soft) * torch.tensor(1 - p).log())
        assert float(loss) == pytest.approx(float(sum(each)) / 5, rel=1e-4)


def test_divergence_is_the_kl_of_bernoullis_and_nothing_between_equals():
    student, teacher = torch.randn(6, 3), torch.randn(6, 3)
    found = TASK.divergence({"output": student}, {"output": teacher}, 2.0)
    p, q = (teacher / 2).sigmoid(), (student / 2).sigmoid()
    both = [torch.distributions.Bernoulli(one) for one in (p, q)]
    assert torch.allclose(found, 4 * torch.distributions.kl_divergence(*both).mean(1), rtol=1e-4)
    assert TASK.divergence({"output": teacher}, {"output": teacher}, 2.0).abs().max() < 1e-6
    far = torch.tensor([[300.0, -300.0]])
    assert bool(TASK.divergence({"output": -far}, {"output": far}, 1.0).isfinite().all())


def test_one_logit_is_yes_or_no():
    outputs, target = {"output": torch.tensor([2.0, -1.0, 3.0])}, torch.tensor([1, 0, 0])
    assert TASK.losses(outputs, target, 0.0).shape == (3,)
    assert value(SCORES["micro F1"], outputs, target, 1) == pytest.approx(2 / 3)


@pytest.mark.parametrize(
    ("target", "error", "words"),
    [
        (torch.tensor([[0.0, 0.5]]), DataError, "hold 0.5"),
        (torch.tensor([[0, -1]]), DataError, "hold -1"),
        (torch.tensor([[0, 1, 1]]), ModelError, "one logit for each label"),
        ([torch.tensor([0])], ModelError, "targets are list"),
    ],
)
def test_targets_that_are_no_labels(target, error, words):
    with pytest.raises(error, match=words):
        TASK.losses({"output": torch.zeros(1, 2)}, target, 0.0)
