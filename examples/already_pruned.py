"""Pruned elsewhere: channels zeroed by torch.nn.utils.prune, its masks still on; leanort takes them out.

python examples/already_pruned.py made/already_pruned
leanort shrink made/already_pruned/pruned.pt --dense made/already_pruned/dense.pt \
    --model examples/already_pruned.py:model --data examples/already_pruned.py:data --name already-pruned
"""

import os
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.utils import prune
from torch.utils.data import TensorDataset

SAMPLES = int(os.environ.get("SAMPLES", "1797"))


def model():
    layers = []
    for inputs, outputs in ((1, 64), (64, 128), (128, 128)):
        layers += [nn.Conv2d(inputs, outputs, 3, 2, 1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()]
    layers += [nn.Flatten(), nn.Linear(512, 256), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(256, 10))


def data():
    images, labels = map(torch.tensor, load_digits(return_X_y=True))
    images = F.interpolate(images[:SAMPLES].float().view(-1, 1, 8, 8) / 16, (16, 16), mode="bilinear")
    labels, cut = labels[:SAMPLES], SAMPLES * 4 // 5
    return TensorDataset(images[:cut], labels[:cut]), TensorDataset(images[cut:], labels[cut:])


def train(net: nn.Module, epochs: int) -> None:
    optimizer = torch.optim.AdamW(net.parameters(), lr=2e-3)
    for epoch in range(epochs):
        torch.manual_seed(epoch)
        for images, labels in torch.utils.data.DataLoader(data()[0], 64, shuffle=True):
            F.cross_entropy(net(images), labels).backward()
            optimizer.step()
            optimizer.zero_grad()


def write(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    net = model()
    train(net, 10)
    torch.save(net.state_dict(), folder / "dense.pt")
    for layer in (net[0], net[3], net[6], net[10]):
        prune.ln_structured(layer, "weight", 0.5, 2, 0)
    train(net, 10)
    torch.save(net.state_dict(), folder / "pruned.pt")


if __name__ == "__main__":
    write(Path(sys.argv[1]))
