"""One sweep, several workers: Optuna's storage knows who makes which point, and what became of each.

A study is a sweep: its name says what is asked for, every point is a trial that waits until a worker takes it, which
the database lets one of them do. A worker that lives sends heartbeats; when they end, Optuna puts its point back.
"""

from __future__ import annotations

import contextlib
import os
import platform
import random
import re
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from foundation.errors import ConfigError, StoreError, first_line
from pipeline.models import extras
from pipeline.progress import Progress
from pipeline.sweep import rows
from pipeline.sweep.points import Sweep
from pipeline.sweep.rows import Row

if TYPE_CHECKING:
    import optuna

HEARTBEAT, GRACE = 30, 120
"""Seconds between two heartbeats, and after which a worker without one is lost."""
RETRIES = 2
"""How often a point is begun again whose worker was lost: one that fills the memory would go round for ever."""
PAUSE = 3.0
"""Seconds between two looks while other workers are at work."""
LOCKED = 60
"""Seconds that a worker waits for a file of SQLite that another one is writing."""
ATTEMPTS = 10
"""At the tables of a new storage, which workers that start together all want to make."""
_POINT, _ROW, _WORKER = "point", "row", "worker"


def opened(storage: str, sweep: Sweep) -> Shared:
    """The sweep as workers share it: found in the storage, or begun there.

    Raises ConfigError where Optuna is not installed, or the storage cannot be reached.
    """
    if not extras.installed("optuna"):
        raise ConfigError("--storage needs Optuna, which is not installed.", 'pip install "leanort[sweep]"')
    import optuna

    optuna.logging.set_verbosity(optuna.logging.ERROR)  # what it says of trials is said here, of points
    name = f"{sweep.folder.name} {sweep.axis} {','.join(point.value for point in sweep.points)}"
    try:
        with _quiet():
            database = _database(storage)
            study = optuna.create_study(
                storage=database,
                study_name=f"{name[:400]} {sweep.digest()[:12]}",
                direction="minimize",
                load_if_exists=True,
            )
    except Exception as error:  # of Optuna, SQLAlchemy or any database's driver
        raise ConfigError(
            f"The storage cannot be reached: {_without_password(first_line(error), storage)}.",
            "Write it like --storage sqlite:///sweep.db, or postgresql://HOST/NAME with the driver installed.",
        ) from None
    return Shared(study, database, sweep)


def _database(storage: str) -> optuna.storages.RDBStorage:
    """The storage, with its tables. Raises whatever Optuna, SQLAlchemy or a driver raises."""
    from optuna.storages import RDBStorage, RetryHeartbeatStaleTrialCallback
    from sqlalchemy import event
    from sqlalchemy.exc import SQLAlchemyError

    sqlite = storage.startswith("sqlite")
    for attempt in range(ATTEMPTS):
        try:
            made = RDBStorage(
                storage,
                engine_kwargs={"connect_args": {"timeout": LOCKED}} if sqlite else {},
                heartbeat_interval=HEARTBEAT,
                grace_period=GRACE,
                heartbeat_stale_trial_callback=RetryHeartbeatStaleTrialCallback(max_retry=RETRIES),
            )
            break
        except SQLAlchemyError as error:  # another worker makes the tables at this very moment
            if attempt + 1 == ATTEMPTS or not re.search("exist|duplicate|unique", str(error), re.IGNORECASE):
                raise
            time.sleep(random.uniform(0.1, 0.5))
    if sqlite:
        # Optuna locks the row of a trial that it takes, which SQLite cannot: two workers would read that it waits, and
        # both take it. So every transaction of it has the whole file for itself, from its first look on.
        made.engine.dispose()
        event.listen(made.engine, "connect", _no_implicit_begin)
        event.listen(made.engine, "begin", lambda connection: connection.exec_driver_sql("BEGIN IMMEDIATE"))
    return made


def _no_implicit_begin(connection: Any, _: object) -> None:
    connection.isolation_level = None


@dataclass
class Shared:
    """A study, and what this worker has done of it."""

    study: optuna.Study
    database: optuna.storages.RDBStorage
    sweep: Sweep
    tried: set[int] = field(default_factory=set)
    """The points that this worker has begun: one that failed is not begun twice by one command, and where a later
    command put it into the queue again, it is left to that one.
    """
    silent: dict[int, float] = field(default_factory=dict)
    """Trial that was begun and by nobody -> when that was first seen."""

    def take(
        self, make: Callable[[int], Row], show: Callable[[Sequence[Row | None]], None], progress: Progress
    ) -> None:
        """Make points until every one is made, waiting for those that other workers are at.

        `make`: number of a point -> what became of it. `show` gets what is known of every point, whenever that changes.
        """
        with _reached():
            self._enqueue()
        shown: list[Row | None] | None = None
        waits = False
        while True:
            with _reached():
                self._recover()
                known, waiting, running = self._known(), self._waiting(), self._count("RUNNING")
                again = [] if waiting or running else self._left(known)
                for number in again:
                    self._put(number)
            if known != shown and any(known):
                show(known)
                shown = known
            if again or not self.tried.issuperset(waiting):
                self._next(make)
                waits = False
            elif running:
                if not waits:
                    progress.say(
                        f"Waiting for {running} of {len(known)} points that other workers are at; what a lost one "
                        f"leaves is taken after {GRACE} s. Breaking off here harms nothing."
                    )
                    waits = True
                time.sleep(PAUSE)
            else:
                break
        show([rows.lost(p.value) if row is None else row for p, row in zip(self.sweep.points, known, strict=True)])

    def _next(self, make: Callable[[int], Row]) -> None:
        """Take one point that waits, if no other worker was faster."""
        import optuna

        fault: list[BaseException] = []
        begun: dict[int, int] = {}

        def objective(trial: optuna.Trial) -> float:
            number = trial.user_attrs.get(_POINT)
            if number is None or self._elsewhere(number, trial.number):
                raise optuna.TrialPruned
            if number in self.tried:  # for another worker, behind what waits for this one
                self._put(number)
                raise optuna.TrialPruned
            self._first_heartbeat(trial.number)
            trial.set_user_attr(_WORKER, f"{platform.node()} {os.getpid()}")
            trial.suggest_categorical(self.sweep.axis, [point.value for point in self.sweep.points])
            self.tried.add(number)
            begun[trial.number] = number
            try:
                row = make(number)
            except BaseException as error:
                fault.append(error)
                raise
            trial.set_user_attr(_ROW, row.model_dump(mode="json"))
            found = row.figures.latency if row.figures is not None else None
            return found.value if found is not None else float("inf")

        with _quiet(), _reached(fault):
            try:
                self.study.optimize(objective, n_trials=1)
            except Exception:
                if fault or not self._taken_away(begun):
                    raise
                self.tried -= set(begun.values())  # whoever takes it next may be this worker, which has the version

    def _taken_away(self, begun: Mapping[int, int]) -> bool:
        """Whether this worker was taken for lost, not having been heard for long, so that its trial is over."""
        return any(trial.number in begun and trial.state.is_finished() for trial in self._trials())

    def _first_heartbeat(self, number: int) -> None:
        """Send one now: the thread that sends them may be slower than what kills this worker, and of one that never
        sent any Optuna does not know that it is lost.
        """
        study = self.database.get_study_id_from_name(self.study.study_name)
        self.database.record_heartbeat(self.database.get_trial_id_from_study_id_trial_number(study, number))

    def _elsewhere(self, number: int, mine: int) -> bool:
        """Whether a point is made already, or being made by who began it first: two workers that start at the same
        time may both have put it into the queue.
        """
        from optuna.trial import TrialState

        return any(
            trial.state == TrialState.COMPLETE or (trial.state == TrialState.RUNNING and trial.number < mine)
            for trial in self._trials()
            if trial.user_attrs.get(_POINT) == number and trial.number != mine and _stands(trial)
        )

    def _enqueue(self) -> None:
        """Put every point into the queue that nobody has made well, waits for or is at; so a failed one is tried again
        by whoever starts the command again.
        """
        from optuna.trial import TrialState

        busy = {
            trial.user_attrs.get(_POINT)
            for trial in self._trials()
            if trial.state in (TrialState.WAITING, TrialState.RUNNING) or _stands(trial)
        }
        for number in range(len(self.sweep.points)):
            if number not in busy:
                self._put(number)

    def _put(self, number: int) -> None:
        self.study.enqueue_trial({str(self.sweep.axis): self.sweep.points[number].value}, user_attrs={_POINT: number})

    def _recover(self) -> None:
        """Put back what lost workers were at. Optuna knows of those that ever sent a heartbeat; one that was lost
        between taking a trial and the first of them is known by not having put its name there for as long.
        """
        import optuna
        from optuna.trial import TrialState

        with _quiet():
            optuna.storages.fail_stale_trials(self.study)
        for trial in self._trials():
            if trial.state != TrialState.RUNNING or _WORKER in trial.user_attrs:
                self.silent.pop(trial.number, None)
            elif time.monotonic() - self.silent.setdefault(trial.number, time.monotonic()) > GRACE:
                self.study.tell(trial.number, state=TrialState.FAIL, skip_if_finished=True)
                if (number := trial.user_attrs.get(_POINT)) is not None:
                    self._put(number)

    def _known(self) -> list[Row | None]:
        """What became of each point; of one that was made more than once, the last time."""
        from optuna.trial import TrialState

        known: list[Row | None] = [None] * len(self.sweep.points)
        for trial in self._trials():
            if trial.state == TrialState.COMPLETE:
                known[trial.user_attrs[_POINT]] = Row.model_validate(trial.user_attrs[_ROW])
        return known

    def _left(self, known: Sequence[Row | None]) -> list[int]:
        """The points of which nothing is known: their workers were broken off. This one begins each of them once, and
        all workers together not for ever.
        """
        from optuna.trial import TrialState

        failed = [trial.user_attrs.get(_POINT) for trial in self._trials() if trial.state == TrialState.FAIL]
        return [
            number
            for number, row in enumerate(known)
            if row is None and number not in self.tried and failed.count(number) <= RETRIES
        ]

    def _waiting(self) -> list[int]:
        """The points in the queue."""
        queued = (trial.user_attrs.get(_POINT) for trial in self._trials() if trial.state.name == "WAITING")
        return [number for number in queued if number is not None]

    def _count(self, state: str) -> int:
        """The number of trials in this state."""
        return sum(trial.state.name == state for trial in self._trials())

    def _trials(self) -> list[optuna.trial.FrozenTrial]:
        return self.study.get_trials(deepcopy=False)


def _stands(trial: optuna.trial.FrozenTrial) -> bool:
    """Whether a trial ended with a version, or is not ended."""
    return not trial.state.is_finished() or bool(trial.user_attrs.get(_ROW, {}).get("version"))


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without Optuna's warnings that heartbeats are experimental."""
    from optuna.exceptions import ExperimentalWarning

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ExperimentalWarning)
        yield


@contextlib.contextmanager
def _reached(own: Sequence[BaseException] = ()) -> Iterator[None]:
    """Turn what a database raises that went away meanwhile into one line; `own` errors are none of its."""
    from optuna.exceptions import OptunaError
    from sqlalchemy.exc import SQLAlchemyError

    try:
        yield
    except Exception as error:
        at: BaseException | None = error
        while at is not None and not isinstance(at, OptunaError | SQLAlchemyError):
            at = at.__context__  # Optuna's own cleaning up may fail over it
        if at is None or error in own:
            raise
        raise StoreError(
            f"The storage of the sweep was lost: {first_line(at)}.",
            "What was made is kept; the same command goes on when it is back.",
        ) from error


def _without_password(text: str, storage: str) -> str:
    """`text` without the storage's address, which may hold a password."""
    return text.replace(storage, "its address")
