"""Where the models of a race run: files in a process of their own, as they would be deployed; others in this one.

What else a process holds says where there is room for a session, and that how fast it is: see `validators/turns.py`.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from foundation.errors import ValidationError, first_line
from foundation.links import plain_files
from validators import turns
from validators.feeds import Feed
from validators.runners import OrtRunner, Reopening, Runner, check_names
from validators.turns import Inference, Times


class Turns(Protocol):
    """The models of a race, ready to run on its inputs."""

    @property
    def reopens(self) -> bool:
        """Whether any of them is in another place in memory when it is opened again."""

    def open(self) -> dict[str, tuple[int, float]]:
        """Open all, anew from the second time on, and run each until its times are steady: the number of inferences and
        the seconds of one, by name.
        """

    def take(self, names: Sequence[str], timed: int) -> list[list[Times]]:
        """A turn of each, in this order: `timed` inferences, after some that are not counted."""


@contextmanager
def taking_turns(runners: Mapping[str, Runner], feed: Feed) -> Iterator[Turns]:
    """The models on this feed; in a process of their own where all of them are files. It ends with this context.

    What they do raises ValidationError where one cannot be opened or run, or the process dies.
    """
    files = {name: runner for name, runner in runners.items() if type(runner) is OrtRunner}
    if len(files) < len(runners):
        yield Here(runners, feed)
        return
    for runner in files.values():
        check_names(runner, feed.arrays)
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="leanort-")))
        np.savez(folder / "feed.npz", *feed.arrays.values())
        models = {
            name: {
                "path": str(stack.enter_context(plain_files(runner.path)).absolute()),
                "threads": runner.threads,
                "optimize": runner.optimize,
                "entries": dict(runner.entries),
            }
            for name, runner in files.items()
        }
        given = {"feed": str(folder / "feed.npz"), "inputs": list(feed.arrays), "models": models}
        errors = stack.enter_context((folder / "stderr").open("wb"))
        process = subprocess.Popen(
            [sys.executable, turns.__file__, json.dumps(given)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
        )
        try:
            yield Apart(process, list(models), folder / "stderr")
        finally:
            process.kill()  # it holds nothing but what it read
            process.communicate()


class Here:
    """In this process, whatever the models are."""

    def __init__(self, runners: Mapping[str, Runner], feed: Feed) -> None:
        self._runners, self._feed, self._opened = dict(runners), feed, False
        self.reopens = any(isinstance(runner, Reopening) for runner in runners.values())

    def open(self) -> dict[str, tuple[int, float]]:
        """What was given is open already, the first time."""
        warm = {}
        for name, runner in self._runners.items():
            if not self._opened or isinstance(runner, Reopening):
                self._runners[name] = runner.reopened() if self._opened and isinstance(runner, Reopening) else runner
                warm[name] = turns.warm_up(self._inference(name))
        self._opened = True
        return warm

    def take(self, names: Sequence[str], timed: int) -> list[list[Times]]:
        """One after the other."""
        return [turns.turn(self._inference(name), timed) for name in names]

    def _inference(self, name: str) -> Inference:
        runner = self._runners[name]
        return lambda: runner.infer(self._feed.arrays)


class Apart:
    """In a process that runs `validators/turns.py`."""

    reopens = True

    def __init__(self, process: subprocess.Popen[str], names: Sequence[str], errors: Path) -> None:
        self._process, self._names, self._errors = process, names, errors

    def open(self) -> dict[str, tuple[int, float]]:
        """Each file in a new session."""
        answers = self._asked({"open": True})
        return {name: (int(count), float(last)) for name, (count, last) in zip(self._names, answers, strict=True)}

    def take(self, names: Sequence[str], timed: int) -> list[list[Times]]:
        """One after the other."""
        return [[(wall, cpu) for wall, cpu in times] for times in self._asked({"turns": list(names), "timed": timed})]

    def _asked(self, order: Mapping[str, Any]) -> list[Any]:
        out, into = self._process.stdout, self._process.stdin
        assert out is not None and into is not None
        try:
            into.write(json.dumps(order) + "\n")
            into.flush()
            line = out.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            code = self._process.wait()
            lines = self._errors.read_text(errors="replace").strip().splitlines()
            said = f": {first_line(RuntimeError(lines[-1]))}" if lines else ""
            raise ValidationError(f"The process that times {', '.join(self._names)} ended (exit code {code}){said}")
        answer = json.loads(line)
        if isinstance(answer, dict):
            raise ValidationError(f"{answer['failed']} cannot run: {first_line(RuntimeError(answer['reason']))}")
        return list(answer)
