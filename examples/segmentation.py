"""Segmentation: a U-Net marks discs and squares among digits, at two resolutions.

leanort deploy examples/segmentation.py:model --data examples/segmentation.py:data --name segmentation \
    --set 'data.dims={input=["batch", 1, "height", "width"]}' --set 'data.sizes={height=[48, 96], width=[48, 96]}' \
    --set baseline.train.batch_size=16 --set finetune.train.batch_size=16 --set finetune.epochs=12
"""

import os

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import Dataset

SAMPLES, SIDE = int(os.environ.get("SAMPLES", "800")), 48
DIGITS = torch.tensor(load_digits().images).float() / 32


def double(inputs: int, outputs: int) -> nn.Sequential:
    convolutions = (nn.Conv2d(wide, outputs, 3, padding=1) for wide in (inputs, outputs))
    return nn.Sequential(*(one for conv in convolutions for one in (conv, nn.BatchNorm2d(outputs), nn.ReLU())))


class UNet(nn.Module):
    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.one, self.two, self.three = double(1, width), double(width, 2 * width), double(2 * width, 4 * width)
        self.up_two, self.back_two = nn.ConvTranspose2d(4 * width, 2 * width, 2, 2), double(4 * width, 2 * width)
        self.up_one, self.back_one = nn.ConvTranspose2d(2 * width, width, 2, 2), double(2 * width, width)
        self.head, self.pool = nn.Conv2d(width, 3, 1), nn.MaxPool2d(2)

    def forward(self, image):
        one = self.one(image)
        two = self.two(self.pool(one))
        deep = self.three(self.pool(two))
        deep = self.back_two(torch.cat([self.up_two(deep), two], 1))
        return self.head(self.back_one(torch.cat([self.up_one(deep), one], 1)))


class Shapes(Dataset):
    """Images (1, 48, 48) and maps (48, 48): 0 background, 1 disc, 2 square; the digits are background."""

    def __len__(self) -> int:
        return SAMPLES

    def __getitem__(self, index: int):
        draw = torch.Generator().manual_seed(index)
        row, column = torch.meshgrid(torch.arange(SIDE), torch.arange(SIDE), indexing="ij")
        image = DIGITS[torch.randint(0, 1797, (6, 6), generator=draw)].transpose(1, 2).reshape(SIDE, SIDE)
        labels = torch.zeros(SIDE, SIDE, dtype=torch.long)
        for label in torch.randint(1, 3, (3,), generator=draw).tolist():
            (y, x), r = torch.randint(8, 40, (2,), generator=draw), int(torch.randint(4, 9, (1,), generator=draw))
            far = torch.stack([row - y, column - x]).abs()
            inside = far.square().sum(0) <= r * r if label == 1 else far.amax(0) <= r
            image[inside], labels[inside] = 0.6 + 0.4 * torch.rand(1, generator=draw), label
        return image[None], labels


model, data = UNet, Shapes
