"""Reading with CTC: three to five digits side by side as a sequence of symbols, however wide each is.

leanort deploy examples/reader.py:model --data examples/reader.py:data --name reader --set task.name=ctc
"""

import os

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import Dataset

SAMPLES, WIDTH = int(os.environ.get("SAMPLES", "3000")), 64


class Lines(Dataset):
    """Images (1, 16, 64) and symbols: a digit plus one, since 0 is CTC's blank."""

    def __init__(self, samples: int, first: int, last: int, seed: int) -> None:
        images, numbers = load_digits(return_X_y=True)
        self.images = torch.tensor(images[first:last]).float().view(-1, 1, 8, 8) / 16
        self.numbers = torch.tensor(numbers[first:last])
        self.samples, self.seed = samples, seed

    def __len__(self) -> int:
        return self.samples

    def __getitem__(self, index: int):
        draw = torch.Generator().manual_seed(self.seed + index)
        chosen = torch.randint(0, len(self.images), (int(torch.randint(3, 6, (1,), generator=draw)),), generator=draw)
        line = torch.zeros(1, 16, 0)
        for digit in self.images[chosen]:
            width = int(torch.randint(9, 13, (1,), generator=draw))
            line = torch.cat([line, F.interpolate(digit[None], (16, width), mode="bilinear")[0]], 2)
        return F.pad(line, (0, WIDTH - line.shape[2])), 1 + self.numbers[chosen]


class Reader(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        layers = []
        for inputs, outputs, pool in ((1, 32, 2), (32, 64, 2), (64, 128, (2, 1)), (128, 128, (2, 1))):
            layers += [nn.Conv2d(inputs, outputs, 3, padding=1), nn.BatchNorm2d(outputs), nn.ReLU(), nn.MaxPool2d(pool)]
        self.look = nn.Sequential(*layers)
        self.read = nn.LSTM(128, 96, batch_first=True, bidirectional=True)
        self.head = nn.Linear(192, 11)

    def forward(self, line):
        frames, _ = self.read(self.look(line).squeeze(2).transpose(1, 2))
        return self.head(frames)  # (samples, 16 frames, 11 symbols)


def model():
    return Reader()


def data():
    return Lines(SAMPLES, 0, 1400, seed=0), Lines(SAMPLES // 4, 1400, 1797, seed=1_000_000)
