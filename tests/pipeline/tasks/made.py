"""What the tests of tasks share: data as the front door sees it, resamples as repeated samples."""

from typing import Any

import numpy as np
import torch

from pipeline.data import find
from pipeline.data.parts import Data
from pipeline.data.samples import Reading
from pipeline.recipe.task import TaskSection
from pipeline.tasks import find as tasks
from pipeline.tasks.task import Task
from validators.scores import Score


class Listed(torch.utils.data.Dataset):
    """Samples as they are."""

    def __init__(self, samples: list[Any]) -> None:
        self.samples = samples

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> Any:
        return self.samples[index]


def data_of(samples: list[Any], name: str = "auto", **reading: Any) -> Data:
    cfg = TaskSection(name=name)
    given = Reading(targets=tasks.targets_of(cfg), pad=tasks.pad_of(cfg), **reading)
    return find.load(Listed(samples), reading=given)


def chosen(data: Data, outputs: Any, name: str = "auto", output: str | None = None) -> Task:
    """The task for a batch of two samples, as many as the outputs have rows."""
    outputs = outputs if isinstance(outputs, dict) else {"output": outputs}
    target = next(data.some("train", 2).batches("train", 2))[1]
    cfg = TaskSection(name=name, output=output)
    tasks.check(cfg)
    rows = len(next(iter(outputs.values())))
    return tasks.choose(cfg, data, outputs, target, "the net", rows, image=False)


def value(score: Score, outputs: Any, target: Any, batches: int = 3) -> float:
    """The score of all samples, added up over batches."""
    rows = len(next(iter(outputs.values())))
    parts = []
    for rows_of in torch.arange(rows).chunk(batches):
        some = {name: one[rows_of] for name, one in outputs.items()}
        parts.append(score.statistics(some, target[rows_of]).double().numpy())
    return score.of(np.concatenate(parts))
