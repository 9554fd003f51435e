"""Time-series regression: an LSTM tells the next 8 values of a noisy series from the last 48.

leanort deploy examples/forecast.py:model --data examples/forecast.py:data --name forecast
"""

import os

import torch
from torch import nn
from torch.utils.data import Dataset

SAMPLES = int(os.environ.get("SAMPLES", "3000"))
PAST, AHEAD = 48, 8


class Forecaster(nn.Module):
    def __init__(self, hidden: int = 128) -> None:
        super().__init__()
        self.lstm = nn.LSTM(1, hidden, batch_first=True)
        self.head = nn.Linear(hidden, AHEAD)

    def forward(self, past):
        states, _ = self.lstm(past)
        return self.head(states[:, -1])


class Series(Dataset):
    """Two waves of any phase and length, and some noise."""

    def __init__(self, samples: int, seed: int) -> None:
        self.samples, self.seed = samples, seed

    def __len__(self) -> int:
        return self.samples

    def __getitem__(self, index: int):
        draw = torch.Generator().manual_seed(self.seed + index)
        phases, periods = torch.rand(2, generator=draw) * 6.28, torch.rand(2, generator=draw)
        time = torch.arange(PAST + AHEAD).float()
        slow = torch.sin(time * 6.28 / (20 + 10 * periods[0]) + phases[0])
        fast = 0.5 * torch.sin(time * 6.28 / (6 + 3 * periods[1]) + phases[1])
        values = slow + fast + 0.05 * torch.randn(len(time), generator=draw)
        return values[:PAST, None], values[PAST:]


def model():
    return Forecaster()


def data():
    return Series(SAMPLES, seed=0), Series(SAMPLES // 4, seed=1_000_000)
