"""Image classes: which digit an image shows, from a DataLoader of one's own.

leanort deploy examples/image_classes.py:model --data examples/image_classes.py:data --name image-classes
"""

import os

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

SAMPLES = int(os.environ.get("SAMPLES", "1797"))


class Residual(nn.Module):
    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(inputs, outputs, 3, 2, 1, bias=False)
        self.first_norm = nn.BatchNorm2d(outputs)
        self.second = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.second_norm = nn.BatchNorm2d(outputs)
        self.short = nn.Conv2d(inputs, outputs, 1, 2)

    def forward(self, x):
        deep = F.relu(self.first_norm(self.first(x)))
        return F.relu(self.second_norm(self.second(deep)) + self.short(x))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 32, 3, padding=1)
        self.body = nn.Sequential(Residual(32, 64), Residual(64, 128), Residual(128, 256))
        self.head = nn.Linear(256, 10)

    def forward(self, x):
        return self.head(self.body(F.relu(self.stem(x))).mean((2, 3)))


def model():
    return Net()


def data():
    images, labels = load_digits(return_X_y=True)
    images = torch.tensor(images[:SAMPLES]).float().view(-1, 1, 8, 8) / 16
    images = F.interpolate(images, scale_factor=3, mode="bilinear")
    labels = torch.tensor(labels[:SAMPLES])
    cut = len(labels) * 4 // 5
    train, test = (TensorDataset(images[part], labels[part]) for part in (slice(cut), slice(cut, None)))
    return DataLoader(train, batch_size=64, shuffle=True), DataLoader(test, batch_size=256)
