"""Several labels per image: which of the ten digits occur among the four on a strip.

leanort deploy examples/multilabel.py:model --data examples/multilabel.py:data --name multilabel
"""

import os

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import Dataset

SAMPLES = int(os.environ.get("SAMPLES", "2000"))
DIGITS = 4


class Strips(Dataset):
    def __init__(self, samples: int, first: int, last: int, seed: int) -> None:
        images, numbers = load_digits(return_X_y=True)
        self.images = torch.tensor(images[first:last]).float().view(-1, 8, 8) / 16
        self.numbers = torch.tensor(numbers[first:last])
        draw = torch.Generator().manual_seed(seed)
        self.chosen = torch.randint(0, last - first, (samples, DIGITS), generator=draw)

    def __len__(self) -> int:
        return len(self.chosen)

    def __getitem__(self, index: int):
        chosen = self.chosen[index]
        strip = torch.cat(list(self.images[chosen]), dim=1)[None]
        return strip, torch.zeros(10).index_fill(0, self.numbers[chosen], 1.0)


def block(inputs: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(inputs, outputs, 3, padding=1), nn.BatchNorm2d(outputs), nn.ReLU())


class Net(nn.Module):
    """Logits (samples, 10): of each digit, the surest place."""

    def __init__(self) -> None:
        super().__init__()
        self.low = nn.Sequential(block(1, 64), block(64, 64), nn.MaxPool2d(2), block(64, 128), block(128, 128))
        self.high = nn.Sequential(nn.Conv2d(128, 256, (4, 4)), nn.ReLU(), nn.Conv2d(256, 10, 1))

    def forward(self, strip):
        return self.high(self.low(strip)).amax((2, 3))


def model():
    return Net()


def data():
    return Strips(SAMPLES, 0, 1400, seed=0), Strips(SAMPLES // 4, 1400, 1797, seed=1)
