"""What a report shows of samples that got worse."""

from types import SimpleNamespace

import numpy as np
import torch

from pipeline.gate import measuring
from pipeline.tasks import detection, pictures, regression, segmentation
from pipeline.tasks.pictures import PANEL, Compared
from tests.pipeline.tasks.made import data_of
from validators.scores import ScoreReport, Worse, per_sample, worst

BLACK, WHITE = [0, 0, 0], [255, 255, 255]


def test_the_worst_samples_are_those_that_lost_most():
    def report(values):
        return ScoreReport(name="s", value=0.0, statistics=np.stack([values, np.ones(5)], 1))

    dense, shipped = np.array([0.9, 0.5, 0.8, 0.1, 0.7]), np.array([0.8, 0.5, 0.1, 0.6, 0.4])
    score = per_sample("s", lambda outputs, target: target)
    assert worst(score, report(dense), report(shipped), 2) == [Worse(2, 0.8, 0.1), Worse(4, 0.7, 0.4)]
    assert [one.sample for one in worst(score, report(dense), report(shipped), 9)] == [2, 4, 0]
    error = per_sample("s", lambda outputs, target: target, higher_is_better=False)
    assert worst(error, report(dense), report(shipped), 9) == [Worse(3, 0.1, 0.6)]


def test_each_model_is_asked_about_the_sample_that_is_shown():
    samples = [(torch.full((1, 4, 4), number / 40), torch.full((4, 4), number)) for number in range(40)]
    data = data_of(samples)
    seen = []

    def drawn(one: Compared):
        seen.append(one)
        return pictures.beside([pictures.rgb(one.image)])

    found = pictures.compared(data, [5, 2], lambda x: {"output": x + 1}, lambda x: {"output": x + 2}, drawn)
    assert list(found) == [5, 2]
    inputs, targets = next(data.batches("test", 8))
    for one, sample in zip(seen, (5, 2), strict=True):
        assert torch.equal(one.target[0], targets[sample])
        assert torch.equal(one.dense["output"][0], inputs[0][sample] + 1)
        assert torch.equal(one.shipped["output"][0], inputs[0][sample] + 2)
        assert torch.allclose(one.image, inputs[0][sample] * 1.0)
    assert pictures.compared(data, [], None, None, drawn) == {}


def panels(picture, count: int) -> list[np.ndarray]:
    width = (picture.width + pictures.GAP) // count
    pixels = np.asarray(picture)
    return [pixels[:, place * width : (place + 1) * width - pictures.GAP] for place in range(count)]


def test_label_maps_stand_beside_the_image():
    truth = torch.zeros(1, 8, 8, dtype=torch.int64)
    truth[0, :4], truth[0, 7] = 1, 255
    right = torch.nn.functional.one_hot(truth.clamp_max(1), 3).permute(0, 3, 1, 2).float()
    wrong = torch.zeros(1, 3, 4, 4)
    wrong[:, 2] = 1
    task = segmentation.task("segmentation", "output")
    picture = task.drawn(Compared(torch.full((1, 8, 8), 0.5), truth, {"output": right}, {"output": wrong}))
    image, wanted, dense, shipped = panels(picture, 4)
    assert len(task.panels.split(", ")) == 4
    assert image.shape == wanted.shape == (PANEL, PANEL, 3)
    assert (image == 128).all()
    one, two = wanted[0, 0].tolist(), shipped[0, 0].tolist()
    assert wanted[50, 0].tolist() == BLACK
    assert wanted[95, 0].tolist() == WHITE
    assert one not in (BLACK, WHITE, two)
    assert (dense[:84] == wanted[:84]).all()
    assert (shipped == shipped[0, 0]).all()
    bare = task.drawn(Compared(None, truth, {"output": right}, {"output": wrong}))
    assert bare.width < picture.width


def test_boxes_are_drawn_where_they_are():
    given = {"boxes": torch.tensor([[8.0, 8, 40, 40], [0.0, 0, 4, 4]]), "scores": [0.9, 0.2], "labels": [1, 1]}
    found = {"dense": given, "shipped": {"boxes": [], "scores": [], "labels": []}}
    target = {"boxes": torch.tensor([[[8.0, 8, 40, 40]]]), "labels": torch.tensor([[1]])}
    one = Compared(torch.zeros(1, 64, 64), target, {"name": "dense"}, {"name": "shipped"})
    picture = detection.drawn(lambda outputs: [found[outputs["name"]]], one)
    wanted, dense, shipped = panels(picture, 3)
    assert wanted[12, 30].tolist() != BLACK
    assert wanted[30, 30].tolist() == BLACK
    assert (dense == wanted).all()  # the surer of the two, as many as there are
    assert (shipped == 0).all()
    bare = detection.drawn(lambda outputs: [found["dense"]], Compared(None, target, {}, {}))
    assert bare.height == PANEL


def test_numbers_are_shown_over_the_true_ones():
    samples = [(torch.full((2,), float(number)), torch.tensor([number, -number]).float()) for number in range(40)]
    data = data_of(samples)

    class Runner:
        def __init__(self, shift):
            self.inputs, self.shift = [SimpleNamespace(name="x")], shift

        def infer(self, feed):
            return {"output": feed["x"] + self.shift}

    task = regression.task("regression", "output")
    found = measuring._predicted({"dense": Runner(1), "shipped": Runner(2)}, data, task)
    inputs, target = next(data.batches("test", 8))
    assert found["truth"].tolist() == target.ravel().tolist()
    assert found["dense"].tolist() == (inputs[0] + 1).ravel().tolist()
    assert found["shipped"].tolist() == (inputs[0] + 2).ravel().tolist()
