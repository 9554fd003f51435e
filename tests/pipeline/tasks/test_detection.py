from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torchmetrics.detection import MeanAveragePrecision

from foundation.errors import ConfigError, DataError
from pipeline.recipe.task import TaskSection
from pipeline.tasks import detection, own
from validators import scores
from validators.scores import ScoreReport, measured


def images(count: int = 12, classes: int = 3, seed: int = 0, shift: float = 4.0):
    """What is there, and what a model finds: shifted, some twice, some of another class, some out of nothing."""
    draw = np.random.default_rng(seed)
    wanted, found = [], []
    for number in range(count):
        there = 0 if number == 3 else int(draw.integers(1, 6))
        corner = draw.uniform(0, 80, (there, 2))
        boxes = np.concatenate([corner, corner + draw.uniform(10, 40, (there, 2))], 1)
        labels = draw.integers(0, classes, there)
        some = np.concatenate([boxes + draw.normal(0, shift, boxes.shape), boxes[: there // 2] + 1, [[1, 1, 20, 20]]])
        given = np.concatenate([np.where(draw.random(there) < 0.8, labels, 0), labels[: there // 2], [1]])
        if number == 5:
            some, given = some[:0], given[:0]
        wanted.append({"boxes": torch.tensor(boxes).float(), "labels": torch.tensor(labels)})
        found.append(
            {
                "boxes": torch.tensor(some).float(),
                "labels": torch.tensor(given),
                "scores": torch.tensor(draw.random(len(some))).float(),
            }
        )
    return found, wanted


def records(found, wanted):
    """Of the built-in score, images in two batches."""
    score = detection.scores(lambda outputs: [found[int(row)] for row in outputs["output"]])[0]
    made = []
    for rows in torch.arange(len(found)).chunk(2):
        target = {key: [wanted[int(row)][key] for row in rows] for key in ("boxes", "labels")}
        made.append(measured(score, {"output": rows}, target, len(rows)))
    return score, np.concatenate(made)


def reference(found, wanted, overlaps=detection.OVERLAPS) -> float:
    """At COCO's own thresholds: those that torchmetrics makes are rounded to float32, so that 3 of 5 is below 0.6."""
    metric = MeanAveragePrecision(iou_thresholds=overlaps.tolist(), rec_thresholds=np.linspace(0, 1, 101).tolist())
    metric.update(found, wanted)
    return float(metric.compute()["map"])


@pytest.mark.parametrize("seed", range(4))
def test_it_is_the_map_of_torchmetrics(seed):
    found, wanted = images(seed=seed)
    score, made = records(found, wanted)
    value = reference(found, wanted)
    assert 0.1 < value < 0.9
    assert score.of(made) == pytest.approx(value, abs=1e-6)
    half = detection.scores(lambda outputs: None)[1]
    assert half.of(made) == pytest.approx(reference(found, wanted, np.array([0.5])), abs=1e-6)


def test_a_resample_is_the_map_of_images_repeated_so_often():
    found, wanted = images()
    score, made = records(found, wanted)
    weights = np.array([0, 2, 1, 1, 0, 3, 1, 0, 1, 1, 2, 0])
    often = [row for row, times in enumerate(weights) for _ in range(times)]
    value = reference([found[row] for row in often], [wanted[row] for row in often])
    assert score.drawn(made, weights[None])[0] == pytest.approx(value, abs=1e-6)
    assert abs(value - score.of(made)) > 0.005


def test_more_boxes_than_count():
    torch.manual_seed(0)
    there = torch.tensor([[0.0, 0, 10, 10]])
    far = torch.tensor([50.0, 50, 60, 60]).repeat(120, 1)
    found = [
        {"boxes": torch.cat([far, there]), "labels": torch.zeros(121).long(), "scores": torch.linspace(1, 0.1, 121)}
    ]
    wanted = [{"boxes": there, "labels": torch.zeros(1).long()}]
    score, made = records(found, wanted)
    assert score.of(made) == reference(found, wanted) == 0.0


def test_two_models_are_compared_image_by_image():
    found, wanted = images(40)
    worse, _ = images(40, shift=9.0)
    (score, dense), (_, shipped) = records(found, wanted), records(worse, wanted)
    reports = [ScoreReport(name="mAP", value=score.of(one), statistics=one) for one in (dense, shipped)]
    lost = scores.compared(score, *reports, seed=0)
    assert lost.drop.value == pytest.approx(100 * (reports[0].value - reports[1].value))
    assert 0 < lost.drop.low < lost.drop.value < lost.drop.high
    assert lost.p_value < 0.02
    same = scores.compared(score, reports[0], reports[0], seed=0)
    assert (same.drop.low, same.drop.high, same.p_value) == (0.0, 0.0, 1.0)
    assert len(scores.differences(score, dense, shipped, 0)) == detection.RESAMPLES
    assert score.gathered(dense[:10], dense[10:]).shape == (40, 1)


def test_boxes_that_have_nothing_to_do_with_the_image_are_told_from_found_ones():
    found, wanted = images(40)
    score = detection.scores(lambda outputs: [found[int(row)] for row in outputs["row"]])[0]
    runner = SimpleNamespace(infer=lambda feed: {"row": feed["row"]})

    def batches():
        for rows in np.array_split(np.arange(40), 3):
            yield {"row": rows}, {key: [wanted[row][key] for row in rows] for key in ("boxes", "labels")}

    def chance(score):
        report = scores.run(runner, batches(), (score,), deal=True)[score.name]
        return scores.chance_of_dealing(score, report, seed=0)

    assert chance(score) < 0.01
    blind = detection.scores(lambda outputs: [found[0] for _ in outputs["row"]])[0]
    assert chance(blind) > 0.5


CODE = """
def task():
    return {"loss": lambda outputs, target: outputs.mean(), "boxes": %s}
"""


def own_task(tmp_path, boxes: str):
    (tmp_path / "mine.py").write_text(CODE % boxes)
    return own.task(TaskSection(name=f"{tmp_path / 'mine.py'}:task"), ("output",))


def test_an_own_task_with_boxes_has_the_score(tmp_path):
    code = 'lambda out: [{"boxes": one[:, :4], "scores": one[:, 4], "labels": one[:, 5]} for one in out]'
    task = own_task(tmp_path, code)
    assert [score.name for score in task.scores] == ["mAP", "mAP at 0.5"]
    outputs = {"output": torch.tensor([[[0.0, 0, 10, 10, 0.9, 1]], [[0.0, 0, 10, 10, 0.9, 1]]])}
    target = {
        "boxes": [torch.tensor([[0.0, 0, 10, 10]]), torch.zeros(0)],
        "labels": [torch.tensor([1]), torch.zeros(0)],
    }
    made = measured(task.score, outputs, target, 2)
    assert task.score.of(made) == pytest.approx(1.0)
    assert task.losses(outputs, target, 0.0).shape == (2,)


@pytest.mark.parametrize(
    ("boxes", "words"),
    [
        ("3", "boxes is int"),
        ("lambda out: out", "boxes returned Tensor for 2 images"),
        ("lambda out: [{}]", "boxes returned 1 entries for 2 images"),
        ("lambda out: [{}, {}]", "lacks one of boxes, scores, labels"),
        ('lambda out: [{"boxes": out, "scores": out, "labels": out}] * 2', "Give boxes (n, 4)"),
        ('lambda out: [dict(boxes=[[0, 0, 1, 1]], scores=[float("nan")], labels=[1])] * 2', "NaN"),
        ("lambda out: out.nothing", "boxes failed"),
    ],
)
def test_boxes_that_are_none(tmp_path, boxes, words):
    target = {"boxes": [torch.zeros(0)] * 2, "labels": [torch.zeros(0)] * 2}
    with pytest.raises(ConfigError) as found:
        measured(own_task(tmp_path, boxes).score, {"output": torch.zeros(2, 3)}, target, 2)
    assert words in str(found.value)


def test_targets_that_are_no_boxes(tmp_path):
    task = own_task(tmp_path, "lambda out: [dict(boxes=[], scores=[], labels=[])] * 2")
    with pytest.raises(DataError, match="no mapping of boxes and labels"):
        measured(task.score, {"output": torch.zeros(2, 3)}, torch.zeros(2), 2)
