"""Keyword spotting: which of six sounds half a second holds, from a folder of recordings.

python examples/keywords.py made/keywords
leanort deploy examples/keywords.py:model --data audiofolder:made/keywords --name keywords \
    --set data.sample_rate=8000 --set data.seconds=0.5
"""

import os
import sys
import wave
from pathlib import Path

import numpy as np
from torch import nn

SAMPLES, RATE = int(os.environ.get("SAMPLES", "1200")), 8000
SOUNDS = ("buzz", "fall", "low", "high", "rise", "warble")


def sound(name: str, draw: np.random.Generator) -> np.ndarray:
    time, pitch = np.arange(RATE // 2) / RATE, draw.uniform(300, 500)
    sweep = np.cumsum(np.linspace(1, 3, len(time))) / RATE
    phase = {
        "low": time,
        "high": 3 * time,
        "rise": sweep,
        "fall": 4 * time - sweep,
        "warble": time + 0.003 * np.sin(2 * np.pi * 12 * time),
        "buzz": time,
    }[name]
    heard = np.sin(2 * np.pi * (pitch * phase + draw.uniform()))
    heard = np.sign(heard) if name == "buzz" else heard
    return draw.uniform(0.3, 0.8) * heard + 0.1 * draw.standard_normal(len(time))


def write(folder: Path) -> None:
    draw = np.random.default_rng(0)
    for name in SOUNDS:
        (folder / name).mkdir(parents=True, exist_ok=True)
        for number in range(SAMPLES // len(SOUNDS)):
            with wave.open(str(folder / name / f"{number}.wav"), "wb") as file:
                file.setparams((1, 2, RATE, 0, "NONE", ""))
                file.writeframes((np.clip(sound(name, draw), -1, 1) * 32767).astype("<i2").tobytes())


def model():
    layers = []
    for inputs, outputs, width, stride in ((1, 64, 40, 8), (64, 64, 9, 4), (64, 128, 9, 4), (128, 128, 9, 2)):
        layers += [nn.Conv1d(inputs, outputs, width, stride, width // 2), nn.BatchNorm1d(outputs), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(128, len(SOUNDS)))


if __name__ == "__main__":
    write(Path(sys.argv[1]))
