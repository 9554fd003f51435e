"""Tiny nets and data of the tasks, as own code that the command line loads."""

import torch
import torch.nn.functional as F
from torch import nn


def conv(inputs: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(inputs, outputs, 3, padding=1), nn.BatchNorm2d(outputs), nn.ReLU())


class Maps(nn.Module):
    """Maps of half the image's size, and an auxiliary output as torchvision's nets have one."""

    def __init__(self) -> None:
        super().__init__()
        self.low, self.mid, self.high = conv(1, 16), conv(16, 32), conv(32, 16)
        self.head, self.extra = nn.Conv2d(16, 3, 1), nn.Conv2d(32, 3, 1)

    def forward(self, x):
        mid = self.mid(F.max_pool2d(self.low(x), 2))
        return {"aux": self.extra(mid), "out": self.head(self.high(mid))}


def maps():
    """Bright squares are class 1, dark ones class 2; the first row counts for nothing."""
    draw = torch.Generator().manual_seed(0)
    samples = []
    for number in range(240):
        image, label = 0.3 * torch.randn(1, 16, 16, generator=draw), torch.zeros(16, 16, dtype=torch.uint8)
        top, left = torch.randint(0, 10, (2,), generator=draw).tolist()
        image[0, top : top + 6, left : left + 6] += 2 if number % 2 else -2
        label[top : top + 6, left : left + 6] = 2 - number % 2
        label[0] = 255
        samples.append((image, label.numpy()))
    return samples


def wrong_maps():
    """One of them holds a class that the net does not have."""
    samples = maps()
    samples[100][1][3] = 7
    return samples


def several(width: int = 64):
    return nn.Sequential(nn.Linear(12, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 4))


def flags():
    draw = torch.Generator().manual_seed(0)
    weight = torch.randn(12, 4, generator=draw)
    return [(one, (one @ weight > 1).long()) for one in torch.randn(400, 12, generator=draw)]


def numbers():
    draw = torch.Generator().manual_seed(0)
    weight = torch.randn(12, 4, generator=draw)
    return [(one, one @ weight) for one in torch.randn(400, 12, generator=draw)]


class Tagger(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table, self.hidden, self.head = nn.Embedding(50, 32), nn.Linear(32, 64), nn.Linear(64, 4)

    def forward(self, input_ids, attention_mask):
        return {"logits": self.head(self.hidden(self.table(input_ids) * attention_mask[..., None]).relu())}


def texts():
    draw = torch.Generator().manual_seed(0)
    samples = []
    for number in range(240):
        ids = torch.randint(1, 50, (5 + number % 9,), generator=draw)
        samples.append({"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids % 4})
    return samples


class Cells(nn.Module):
    """For each of 8x8 cells the logits of nothing and of two classes, and the box around its middle."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(conv(1, 16), nn.MaxPool2d(2), conv(16, 32), nn.MaxPool2d(2), conv(32, 32))
        self.head = nn.Conv2d(32, 7, 1)

    def forward(self, x):
        return self.head(self.body(x))


class ColouredCells(Cells):
    def __init__(self) -> None:
        super().__init__()
        self.body[0] = conv(3, 16)


def squares():
    draw = torch.Generator().manual_seed(0)
    samples = []
    for number in range(300):
        image, boxes, labels = 0.2 * torch.randn(1, 32, 32, generator=draw), [], []
        for one in range(1 + number % 2):
            top, left = (torch.randint(0, 3, (2,), generator=draw) * 8).tolist()
            side, label = 6 + 2 * (number % 3), (number + one) % 2
            image[0, top : top + side, left : left + side] += 2 if label else -2
            boxes.append([left, top, left + side, top + side])
            labels.append(label)
        samples.append((image, {"boxes": boxes, "labels": labels}))
    return samples


def corners(outputs):
    """(samples, 4, 8, 8) as x1, y1, x2, y2 in pixels."""
    row, column = torch.meshgrid(torch.arange(8), torch.arange(8), indexing="ij")
    x, y, far = (column + 0.5) * 4, (row + 0.5) * 4, 4 * outputs[:, 3:].exp()
    return torch.stack([x - far[:, 0], y - far[:, 1], x + far[:, 2], y + far[:, 3]], 1)


def detection_loss(outputs, target):
    total = torch.zeros(())
    for row, found in enumerate(corners(outputs)):
        wanted = torch.zeros(8, 8, dtype=torch.long)
        for box, label in zip(target["boxes"][row], target["labels"][row], strict=True):
            x, y = int((box[0] + box[2]) / 8), int((box[1] + box[3]) / 8)
            wanted[y, x] = 1 + label
            total = total + 0.1 * (found[:, y, x] - box).abs().mean()
        total = total + F.cross_entropy(outputs[row : row + 1, :3], wanted[None], torch.tensor([0.1, 1.0, 1.0]))
    return total / len(outputs)


def boxes(outputs):
    found = []
    for chances, places in zip(outputs[:, :3].softmax(1), corners(outputs), strict=True):
        scores, labels = chances[1:].flatten(1).max(0)
        sure = scores > 0.2
        found.append({"boxes": places.flatten(1).T[sure], "scores": scores[sure], "labels": labels[sure]})
    return found


def detection():
    return {"loss": detection_loss, "boxes": boxes}
