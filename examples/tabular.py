"""Tabular regression: how far diabetes progresses within a year, from ten measurements.

leanort deploy examples/tabular.py:model --data examples/tabular.py:data --name tabular
"""

import os

import torch
from sklearn.datasets import load_diabetes
from torch import nn
from torch.utils.data import TensorDataset, random_split

SAMPLES = int(os.environ.get("SAMPLES", "442"))
WIDTH = 512


def model():
    return nn.Sequential(
        nn.Linear(10, WIDTH),
        nn.ReLU(),
        nn.Dropout(0.3),
        nn.Linear(WIDTH, WIDTH),
        nn.ReLU(),
        nn.Dropout(0.3),
        nn.Linear(WIDTH, 1),
    )


def data():
    features, target = load_diabetes(return_X_y=True, scaled=False)
    features, target = torch.tensor(features).float(), torch.tensor(target).float()
    features = (features - features.mean(0)) / features.std(0)
    target = (target - target.mean()) / target.std()
    table = TensorDataset(features[:SAMPLES], target[:SAMPLES, None])
    return random_split(table, [0.8, 0.2], torch.Generator().manual_seed(0))
