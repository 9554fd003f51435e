"""A runner that keeps its answers: every candidate is compared with the same ones."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from validators.runners import Runner

Array = np.ndarray[Any, np.dtype[Any]]


class CachedRunner:
    """A runner that answers each feed once."""

    def __init__(self, runner: Runner) -> None:
        self.name, self.inputs, self.threads = runner.name, runner.inputs, runner.threads
        self.runner = runner
        self._answers: dict[int, tuple[Mapping[str, Array], dict[str, Array]]] = {}

    def infer(self, feed: Mapping[str, Array]) -> dict[str, Array]:
        """The answer to this very feed object; holding on to it keeps its id from being used again."""
        if id(feed) not in self._answers:
            self._answers[id(feed)] = (feed, self.runner.infer(feed))
        return self._answers[id(feed)][1]
