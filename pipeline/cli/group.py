"""The command itself: how errors are said, and the words and options that several commands share."""

from __future__ import annotations

import contextlib
import io
import os
import sys
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

import click
from rich.console import Console

from foundation.errors import ConfigError, LeanortError, UserError
from foundation.words import printable
from pipeline.training import launched

EXIT_CODES = {"pass": 0, "fail": 1, "inconclusive": 4}
INTERRUPTED = 130
STAGE_FAILED = 3
FIRST = 2.0
"""Seconds that the first of several processes has to say what is wrong, before a launcher hears it of another."""
BROKEN_PIPE = 141  # 128 + SIGPIPE, as a shell says it


@contextlib.contextmanager
def _no_way_out() -> Iterator[None]:
    """Let `os._exit` raise SystemExit in this process: it would end the command with a code that no gate has given."""
    here, leave = os.getpid(), os._exit

    def refused(status: int) -> NoReturn:
        if os.getpid() != here:  # a child that multiprocessing forked
            leave(status)
        raise SystemExit(status)

    os._exit = refused
    try:
        yield
    finally:
        os._exit = leave


class _Group(click.Group):
    """Turns errors into one line, the next thing to do, and the right exit code."""

    def main(self, *args: Any, **kwargs: Any) -> Any:  # click's own signature
        """Run the command; a traceback is shown only for a bug of ours."""
        kwargs["standalone_mode"] = False
        for stream in (sys.stdout, sys.stderr):  # a terminal that knows ASCII only gets escapes, and no traceback
            if isinstance(stream, io.TextIOWrapper):
                stream.reconfigure(errors="backslashreplace")
        place = launched.place()
        follows = place is not None and place.rank > 0  # of several processes the first one speaks
        console = Console(stderr=True, quiet=follows)
        try:
            self._run(console, follows, *args, **kwargs)
        except SystemExit as end:
            if follows and end.code:
                time.sleep(FIRST)
            raise

    def _run(self, console: Console, follows: bool, *args: Any, **kwargs: Any) -> NoReturn:
        try:
            if any("\0" in word for word in (args[0] if args else kwargs.get("args")) or sys.argv[1:]):
                raise UserError("A word of the command holds a NUL character.", "Type it again.")
            with _no_way_out():
                code = super().main(*args, **kwargs)
        except SystemExit as stop:  # click raises none here: other people's code did; its code is no verdict of ours
            if isinstance(stop.__context__, BrokenPipeError):  # rich ends so where nobody reads its output any more
                sys.exit(BROKEN_PIPE)
            complain(console, f"Code that was run here called exit({stop.code!r}).", "Let it return or raise.")
            sys.exit(STAGE_FAILED)
        except LeanortError as error:
            complain(console, error.message, error.hint)
            sys.exit(error.exit_code if error.exit_code in (2, 3) else STAGE_FAILED)  # a class of the user's own
        except click.ClickException as error:
            if not follows:
                error.show()
            sys.exit(2)
        except (click.Abort, KeyboardInterrupt):
            complain(console, "Interrupted.", "The same command goes on from the last complete stage.")
            sys.exit(INTERRUPTED)
        except BrokenPipeError:  # whoever read the output has gone, so that it never heard the verdict
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # what is left is flushed there
            sys.exit(BROKEN_PIPE)
        except OSError as error:  # what the file system says about a path is no bug of ours
            named = f"{error.filename}: " if error.filename else ""
            complain(console, f"{named}{error.strerror or error}.", "Check that path, its rights and the free space.")
            sys.exit(STAGE_FAILED)
        except Exception as error:
            from foundation.errors import ExportError, ValidationError

            if isinstance(error, ExportError | ValidationError):
                complain(console, error.message, error.hint)
                sys.exit(STAGE_FAILED)
            traceback.print_exc()
            complain(console, "That is a bug in leanort.", "Please report the lines above.")
            sys.exit(STAGE_FAILED)
        except BaseException:  # of the user's own making: Python's exit code for it, 1, means that a gate failed
            traceback.print_exc()
            complain(console, "An exception of no known kind ended the run.", "Let your code raise an Exception.")
            sys.exit(STAGE_FAILED)
        sys.exit(code if isinstance(code, int) else 0)


def complain(console: Console, message: str, hint: str) -> None:
    """Say what was wrong and, if known, what to do next."""
    console.print(f"[bold red]error:[/] {plain(message)}", highlight=False, soft_wrap=True)
    if hint:
        console.print(f"  [dim]->[/] {plain(hint)}", highlight=False, soft_wrap=True)


def plain(text: str) -> str:
    """Text as it is: square brackets are not markup, and nothing in it commands the terminal."""
    return printable(text).replace("[", r"\[")


@click.group(cls=_Group, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="leanort")
def main() -> None:
    """Ship a pruned, physically smaller, verified ONNX Runtime release of a PyTorch model.

    \b
    leanort plan resnet50                 what would run; which channels can go; what blocks the rest
    leanort sensitivity resnet50          which layers can least do without their channels
    leanort deploy resnet50               the whole chain on the embedded data
    leanort deploy resnet50 --ratio 0.3   the same, gentler
    leanort sweep resnet50 --macs 0.2,0.4 a version for each, and one page of all of them
    leanort show resnet50                 the figures of the newest version
    leanort why resnet50 layer3.1.conv2   which of its channels went, and why
    leanort gate resnet50                 judge it again; also a file made elsewhere
    leanort rollback resnet50             back to the version before
    leanort verify resnet50/v0001         every hash, back to the dense model

    \b
    Exit codes: 0 pass · 1 a gate failed · 2 usage · 3 a stage failed · 4 the measurement could not decide
    """


class NewFile(click.Path):
    """A file to be written, refused before anything is spent where its ending is none of `endings`, if there are any,
    or its folder cannot take it.
    """

    def __init__(self, *endings: str) -> None:
        super().__init__(path_type=Path, dir_okay=False, writable=True)
        self.endings = endings

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Path:
        """The path. Raises ConfigError."""
        path = Path(os.fsdecode(super().convert(value, param, ctx)))
        option = param.opts[0] if param is not None else "the option"
        if self.endings and not path.name.lower().endswith(self.endings):
            raise ConfigError(
                f"{option} {path}: the name must end in {' or '.join(self.endings)}.",
                f"Write it like {option} {path.stem or 'name'}{self.endings[0]}",
            )
        if not os.access(path.parent, os.W_OK | os.X_OK):
            why = "cannot be written to" if path.parent.is_dir() else "is no folder"
            raise ConfigError(f"{path} cannot be written: {path.parent} {why}.", f"Give {option} another place.")
        return path


OUT = click.option("--out", type=click.Path(path_type=Path), default=Path("artifacts"), help="The artifacts folder.")
