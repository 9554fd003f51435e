"""A training loop of one's own, for the dense model and for recovery: an average of weights, taught in recovery.

leanort deploy examples/loop_plain.py:model --data examples/loop_plain.py:data --name loop-plain --ratio 0.8 \
    --set baseline.train=examples/loop_plain.py:fit --set finetune.train=examples/loop_plain.py:fit
"""

import os

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import TensorDataset

SAMPLES, EPOCHS = int(os.environ.get("SAMPLES", "1797")), int(os.environ.get("EPOCHS", "20"))


def block(inputs, outputs):
    return nn.Sequential(nn.Conv2d(inputs, outputs, 3, 2, 1, bias=False), nn.BatchNorm2d(outputs), nn.SiLU())


def model():
    pool = nn.AdaptiveAvgPool2d(1), nn.Flatten()
    return nn.Sequential(block(1, 48), block(48, 96), block(96, 192), *pool, nn.Linear(192, 10))


def data():
    images, labels = load_digits(return_X_y=True)
    images = torch.tensor(images[:SAMPLES]).float().view(-1, 1, 8, 8) / 16
    images, labels = F.interpolate(images, scale_factor=3, mode="bilinear"), torch.tensor(labels[:SAMPLES])
    cut = len(labels) * 4 // 5
    return TensorDataset(images[:cut], labels[:cut]), TensorDataset(images[cut:], labels[cut:])


def fit(model, data, report):
    optimizer = torch.optim.AdamW(model.parameters(), 0.003, weight_decay=0.05)
    batches = data.loader("train", 32)
    steps = EPOCHS * len(batches)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.003, steps)
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9), use_buffers=True)
    for step, (images, labels) in enumerate((row for _ in range(EPOCHS) for row in batches), 1):
        outputs = model(images)
        loss = F.cross_entropy(outputs, labels, label_smoothing=0.1)
        if data.teacher is not None:  # in recovery: the dense model
            with torch.no_grad():
                soft = data.teacher(images).softmax(1)
            loss = (loss + F.cross_entropy(outputs, soft)) / 2
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        average.update_parameters(model)
        report(step, steps, f"loss {loss:.3f}")
    return average.module
