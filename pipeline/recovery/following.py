"""What every process but the first does: wait for a job, take its part, wait again."""

from __future__ import annotations

import contextlib

from pipeline.data.parts import Data
from pipeline.models.graph import graph_of
from pipeline.models.source import ModelSource
from pipeline.recovery import closed_form
from pipeline.tasks.task import Task
from pipeline.training import jobs, loop, masks


def follow(source: ModelSource, data: Data, task: Task) -> None:
    """Take part in whatever the first process trains or fits, until it says that there is no more.

    An error of a job (a loss that became NaN, a batch too small for the processes) ends this process, quietly: it is
    everybody's, and the first process says it.
    """
    while True:
        job = jobs.received(source, data)
        if job is None:
            return
        work = job.work
        if isinstance(work, jobs.Fit):
            _fit(job, work, source)
        elif work.timed:
            loop.time_steps(job.model, job.data, task, work.settings, job.teacher)
        else:
            loop.take_part(job.model, job.data, task, work.settings, job.teacher, guided=work.guided)


def _fit(job: jobs.Job, work: jobs.Fit, source: ModelSource) -> None:
    """This process's part of the closed form; the weights that come out are those of the first one."""
    assert job.teacher is not None
    inputs = job.data.sample("train", work.samples)
    captured = graph_of(job.teacher, source)
    together = closed_form.sharing(captured, inputs)
    if together.count == 1:  # the first process does it by itself
        return
    with contextlib.suppress(ValueError):  # said by the first process, which goes on without
        closed_form.recover(
            captured,
            masks.masks_of(job.model),
            inputs,
            start=masks.originals(job.model),
            counted=job.data.counted(inputs),
            seed=work.seed,
            together=together,
        )
