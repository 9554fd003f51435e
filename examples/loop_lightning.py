"""Lightning as the loop, for the dense model and for recovery: the mean of two digits in an image, as a number.

leanort deploy examples/loop_lightning.py:model --data examples/loop_lightning.py:data --name loop-lightning \
    --ratio 0.8 --set baseline.train=examples/loop_lightning.py:fit --set finetune.train=examples/loop_lightning.py:fit
"""

import os

import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader

SAMPLES, EPOCHS = int(os.environ.get("SAMPLES", "3000")), int(os.environ.get("EPOCHS", "12"))


def block(inputs, outputs):
    return nn.Sequential(nn.Conv2d(inputs, outputs, 3, 2, 1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU())


def model():
    return nn.Sequential(block(1, 64), block(64, 128), block(128, 256), nn.Flatten(), nn.Linear(2048, 1))


def data():
    images, numbers = load_digits(return_X_y=True)
    draw = torch.Generator().manual_seed(0)
    left, right = torch.randint(len(numbers), (2, SAMPLES), generator=draw)
    images, numbers = torch.tensor(images).float().view(-1, 1, 8, 8) / 16, torch.tensor(numbers).float()
    strips = F.interpolate(torch.cat([images[left], images[right]], 3), scale_factor=2, mode="bilinear")
    return list(zip(strips, ((numbers[left] + numbers[right]) / 2)[:, None], strict=True))


class Regression(pl.LightningModule):
    def __init__(self, net, report):
        super().__init__()
        self.net, self.report = net, report

    def training_step(self, batch, _):
        images, means = batch
        loss = F.mse_loss(self.net(images), means)
        self.report(self.global_step + 1, self.trainer.estimated_stepping_batches, f"loss {loss:.2f}")
        return loss

    def configure_optimizers(self):
        optimizer = torch.optim.AdamW(self.parameters(), 0.003)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.003, self.trainer.estimated_stepping_batches)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def fit(model, data, report):
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    trainer = pl.Trainer(max_epochs=EPOCHS, accelerator="cpu", gradient_clip_val=1.0, **quiet)
    batches = DataLoader(data.dataset("train"), batch_size=32, shuffle=True, drop_last=True)
    trainer.fit(Regression(model, report), batches)
