"""What every process but the first does: wait for a job, take its part, wait again."""

from __future__ import annotations

from pipeline.data.parts import Data
from pipeline.models.source import ModelSource
from pipeline.tasks.task import Task
from pipeline.training import jobs, loop


def follow(source: ModelSource, data: Data, task: Task) -> None:
    """Take part in whatever the first process trains, until it says that there is no more.

    An error of a job (a loss that became NaN, a batch too small for the processes) ends this process, quietly: it is
    everybody's, and the first process says it.
    """
    while True:
        job = jobs.received(source, data)
        if job is None:
            return
        if job.kind == "train":
            loop.take_part(job.model, job.data, task, job.settings, job.teacher, guided=job.guided)
        else:
            loop.time_steps(job.model, job.data, task, job.settings, job.teacher)
