"""How a long run tells where it is. From Python nothing is printed unless a `Progress` that prints is passed in."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress

from foundation.words import printable


class Bar(Protocol):
    """One running bar."""

    def __call__(self, done: int, note: str = "") -> None:
        """Move to `done`; `note` shows the figures of the moment."""


class Progress:
    """Silent; the base of those that show something."""

    def say(self, text: str) -> None:
        """One line for the user."""

    @contextmanager
    def bar(self, label: str, total: int) -> Iterator[Bar]:
        """A bar that runs to `total` while the context is open."""
        yield lambda done, note="": None


class TerminalProgress(Progress):
    """Lines and bars on a terminal (stderr, so that stdout stays for results); plain lines where there is none."""

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or Console(stderr=True)

    def say(self, text: str) -> None:
        """One line for the user."""
        self.console.print(printable(text), highlight=False, soft_wrap=True, markup=False)

    @contextmanager
    def bar(self, label: str, total: int) -> Iterator[Bar]:
        """A live bar on a terminal; elsewhere one line when it ends."""
        columns = [
            TextColumn("  {task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("{task.fields[note]}"),
            TimeRemainingColumn(),
        ]
        last = ""
        with RichProgress(*columns, console=self.console, transient=True) as live:
            task = live.add_task(label, total=total, note="")

            def move(done: int, note: str = "") -> None:
                nonlocal last
                last = note
                live.update(task, completed=done, note=note)

            yield move
        if last:
            self.say(f"  {label}: {last}")
