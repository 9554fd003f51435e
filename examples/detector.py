"""Detection without anchors: digits on a canvas, with one's own loss for the raw outputs.

leanort deploy examples/detector.py:model --data examples/detector.py:data --name detector \
    --set task.name=examples/detector.py:task --set 'baseline.train={epochs=12, batch_size=16}' \
    --set 'finetune.train={epochs=12, batch_size=16}'
"""

import os
import random

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn

SAMPLES, SIDE, STRIDE = int(os.environ.get("SAMPLES", "1200")), 48, 4
IMAGES, NUMBERS = torch.tensor(load_digits().images).float().view(-1, 1, 1, 8, 8) / 16, load_digits().target


def model():  # of each cell the logits of nothing and of ten digits; how far it is to the four sides of the box
    sizes = (1, 32, 1), (32, 64, 2), (64, 128, 2), (128, 128, 1)
    layers = (nn.Sequential(nn.Conv2d(a, b, 3, by, 1), nn.BatchNorm2d(b), nn.ReLU()) for a, b, by in sizes)
    return nn.Sequential(*layers, nn.Conv2d(128, 11 + 4, 1))


def data():
    draw = random.Random(0)
    for _ in range(SAMPLES):
        image, boxes, labels = torch.zeros(1, SIDE, SIDE), [], []
        for quarter in draw.sample(range(4), draw.randint(1, 3)):
            side, number = draw.randint(10, 20), draw.randrange(len(IMAGES))
            x, y = (24 * part + draw.randint(0, 24 - side) for part in divmod(quarter, 2))
            image[:, y : y + side, x : x + side] = F.interpolate(IMAGES[number], (side, side), mode="bilinear")[0]
            boxes, labels = [*boxes, [x, y, x + side, y + side]], [*labels, NUMBERS[number]]
        yield image, {"boxes": torch.tensor(boxes).float(), "labels": torch.tensor(labels)}


def corners(outputs):  # (samples, cells, 4): x1, y1, x2, y2 in pixels
    left, top, right, bottom = (STRIDE * F.softplus(outputs[:, 11:])).unbind(1)
    x, y = torch.meshgrid(2 * [torch.arange(STRIDE / 2, SIDE, STRIDE)], indexing="xy")
    return torch.stack([x - left, y - top, x + right, y + bottom], -1).flatten(1, 2)


def loss(outputs, target):
    total = 0.0
    for cells, found, boxes, labels in zip(outputs, corners(outputs), target["boxes"], target["labels"], strict=True):
        place = ((boxes[:, :2] + boxes[:, 2:]) / 2 // STRIDE).long() @ torch.tensor([1, SIDE // STRIDE])
        wanted = torch.zeros(len(found), dtype=torch.long).index_copy(0, place, 1 + labels)
        total += 40 * F.cross_entropy(cells[:11].flatten(1).T, wanted) + 0.2 * F.l1_loss(found[place], boxes)
    return total / len(outputs)


def boxes(outputs):  # of each image, those of the cells that are surer than their neighbours
    scores, labels = outputs[:, :11].softmax(1)[:, 1:].max(1)
    maps = corners(outputs), *(x.flatten(1) for x in (scores, labels, scores == F.max_pool2d(scores, 3, 1, 1)))
    return [{"boxes": box[s], "scores": score[s], "labels": kind[s]} for box, score, kind, s in zip(*maps, strict=True)]


def task():
    return {"name": "detection", "loss": loss, "boxes": boxes}
