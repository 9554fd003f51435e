"""Make the points of a sweep one after the other, each by `deploy`, and write the page after every one."""

from __future__ import annotations

import traceback
from collections.abc import Sequence

from foundation.errors import (
    ConfigError,
    DataError,
    Explained,
    ExportError,
    LeanortError,
    ModelError,
    StoreError,
    TargetError,
    ValidationError,
    WeightsError,
    first_line,
)
from pipeline import deployment
from pipeline.progress import Progress
from pipeline.sweep import pages, rows
from pipeline.sweep.points import Point, Sweep
from pipeline.sweep.rows import Row
from pipeline.training import launched

_OF_EVERY_POINT = (ConfigError, ModelError, DataError, WeightsError, StoreError, OSError)
"""What is wrong with the recipe, the model, the data or the folder is wrong for every point: the sweep ends with it,
and the page of an earlier one stays. Recipes differ in the target alone, of which `TargetError` tells.
"""


def run(sweep: Sweep, progress: Progress, storage: str | None = None) -> list[Row | None]:
    """Make every point, or those that no other worker takes, and return what became of each; None: it was not made.

    A point that was made before is answered from the store, and one that fails is a row, and the others go on.
    `storage`: where workers share the points, as a URL that Optuna takes. Raises ConfigError for one that cannot be
    reached, or a bad recipe; ModelError, DataError, WeightsError, StoreError and OSError, which no other point would
    escape either.
    """
    if launched.place() is not None:
        raise ConfigError(
            "A sweep is started once, not by a launcher of several processes.",
            "Give --print, and launch the commands that it prints.",
        )
    made: list[Row | None] = [None] * len(sweep.points)

    def show(known: Sequence[Row | None]) -> None:
        made[:] = known
        pages.write(sweep, made)

    def make(number: int) -> Row:
        progress.say(f"Point {number + 1} of {len(made)}: {sweep.words(sweep.points[number])}")
        row = one(sweep, sweep.points[number], progress)
        progress.say(f"  {sweep.words(sweep.points[number])}: {' '.join((row.outcome, row.version)).strip()}")
        return row

    if storage is None:
        for number in range(len(made)):
            made[number] = make(number)
            show(made)
        return made
    from pipeline.sweep import shared

    shared.opened(storage, sweep).take(make, show, progress)
    return made


def one(sweep: Sweep, point: Point, progress: Progress) -> Row:
    """What becomes of one point. Raises what no other point would escape."""
    try:
        release = deployment.deploy(point.config.model, None, point.config, promote=False, progress=progress)
    except TargetError as error:
        return _told(point, error, progress)
    except _OF_EVERY_POINT:
        raise
    except (LeanortError, ExportError, ValidationError) as error:
        return _told(point, error, progress)
    except Exception as error:  # of ours: the other points may get past it, and none of this one may get lost
        traceback.print_exc()
        return rows.unexpected(point.value, f"A bug in leanort: {type(error).__name__}: {first_line(error)}")
    assert release is not None, "nothing stopped it before its end"
    return rows.of(sweep.axis, point.value, release)


def _told(point: Point, error: Explained, progress: Progress) -> Row:
    progress.say(f"  {error.message} {error.hint}".rstrip())
    return rows.without(point.value, error)
