"""Workers that share the points of a sweep by a database; what a point is made of plays no part here."""

import multiprocessing
import os
import signal
import time
from pathlib import Path

import optuna
import pytest
from optuna.storages._heartbeat import HeartbeatThread
from sqlalchemy.exc import OperationalError

from foundation.errors import DataError, StoreError
from pipeline.progress import Progress
from pipeline.recipe import config
from pipeline.sweep import points, rows, shared
from pipeline.sweep.rows import Row

VALUES = ("0.8", "0.6", "0.4", "0.2")
FORK = multiprocessing.get_context("fork")


@pytest.fixture(autouse=True)
def short(monkeypatch):
    monkeypatch.setattr(shared, "HEARTBEAT", 1)
    monkeypatch.setattr(shared, "GRACE", 2)
    monkeypatch.setattr(shared, "PAUSE", 0.1)
    monkeypatch.setattr(points.Sweep, "digest", lambda self: "of a sweep")


def sweep() -> points.Sweep:
    return points.sweep(
        "macs", VALUES, lambda value: config.load(None, {"model": "resnet50", "prune.target.macs": value})
    )


def made(number: int, folder: Path) -> Row:
    """A point, and a file for each time that it was made."""
    (folder / f"{number} {os.getpid()} {time.monotonic_ns()}").touch()
    return Row(value=VALUES[number], code=0, outcome="pass", version=f"v000{number + 1}")


def times(folder: Path) -> list[int]:
    """How often each point was made."""
    names = [int(path.name.split()[0]) for path in folder.iterdir()]
    return [names.count(number) for number in range(len(VALUES))]


@pytest.fixture
def storage(tmp_path) -> str:
    return f"sqlite:///{tmp_path / 'sweep.db'}"


@pytest.fixture
def log(tmp_path) -> Path:
    folder = tmp_path / "made"
    folder.mkdir()
    return folder


def work(storage: str, make, seen=None) -> list[Row | None]:
    known: list[Row | None] = []

    def show(now) -> None:
        known[:] = now
        if seen is not None:
            seen.append(sum(row is not None for row in now))

    shared.opened(storage, sweep()).take(make, show, Progress())
    return known


def test_one_worker_makes_every_point_once_and_a_second_command_none(storage, log):
    seen: list[int] = []
    known = work(storage, lambda number: made(number, log), seen)
    assert [row.version for row in known] == ["v0001", "v0002", "v0003", "v0004"]
    assert seen[:4] == [1, 2, 3, 4]
    assert work(storage, lambda number: made(number, log)) == known
    assert times(log) == [1, 1, 1, 1]


def worker(storage: str, folder: Path, name: str) -> None:
    def make(number: int) -> Row:
        time.sleep(0.4)
        return made(number, folder).model_copy(update={"host": name})

    known = work(storage, make)
    (folder.parent / f"ended {name}").write_text(" ".join(row.host for row in known))


def test_two_workers_that_start_together_share_the_points_and_both_know_all_of_them(storage, log):
    both = [FORK.Process(target=worker, args=(storage, log, name), daemon=True) for name in ("a", "b")]
    for one in both:
        one.start()
    for one in both:
        one.join(60)
        assert one.exitcode == 0
    assert times(log) == [1, 1, 1, 1]
    told = {(log.parent / f"ended {name}").read_text() for name in ("a", "b")}
    assert len(told) == 1
    assert set(told.pop().split()) == {"a", "b"}


def test_a_point_that_two_workers_put_into_the_queue_is_made_once(storage, log):
    known = work(storage, lambda number: made(number, log))
    shared.opened(storage, sweep())._put(2)
    assert work(storage, lambda number: made(number, log)) == known
    assert times(log) == [1, 1, 1, 1]


def test_tables_that_another_worker_makes_at_this_moment_are_looked_for_again(storage, log, monkeypatch):
    begin, left = optuna.storages.RDBStorage.__init__, [Exception("table studies already exists")] * 3

    def init(self: optuna.storages.RDBStorage, *args: object, **more: object) -> None:
        if left:
            raise OperationalError("", {}, left.pop())
        begin(self, *args, **more)

    monkeypatch.setattr(optuna.storages.RDBStorage, "__init__", init)
    assert all(work(storage, lambda number: made(number, log)))


def killed(storage: str) -> None:
    work(storage, lambda number: os.kill(os.getpid(), signal.SIGKILL))


def test_what_a_lost_worker_was_at_is_taken_by_another_one(storage, log):
    one = FORK.Process(target=killed, args=(storage,), daemon=True)
    one.start()
    one.join(60)
    assert one.exitcode == -signal.SIGKILL
    known = work(storage, lambda number: made(number, log))
    assert all(known)
    assert times(log) == [1, 1, 1, 1]
    again = [trial.system_attrs.get("retry_history") for trial in shared.opened(storage, sweep()).study.trials]
    assert again.count([0]) == 1  # Optuna put it back


def test_not_even_its_first_heartbeat_may_come_too_late(storage, log, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(HeartbeatThread, "_record_heartbeat", lambda *_: None)
        one = FORK.Process(target=killed, args=(storage,), daemon=True)
        one.start()
        one.join(60)
    assert all(work(storage, lambda number: made(number, log)))
    assert times(log) == [1, 1, 1, 1]


def test_a_worker_that_was_taken_for_lost_goes_on(storage, log):
    def make(number: int) -> Row:
        if number == 1 and times(log)[1] == 0:  # as another one does after having heard nothing for long
            other = shared.opened(storage, sweep())
            other.study.tell(1, state=optuna.trial.TrialState.FAIL)
            other._put(1)
        return made(number, log)

    assert all(work(storage, make))
    assert times(log) == [1, 2, 1, 1]


def test_a_worker_that_was_lost_before_its_first_heartbeat_leaves_its_point_as_well(storage, log):
    study = shared.opened(storage, sweep())
    study._enqueue()
    assert study.study._pop_waiting_trial_id() is not None  # taken, and nothing more
    assert all(work(storage, lambda number: made(number, log)))
    assert times(log) == [1, 1, 1, 1]


def test_a_point_that_kills_its_workers_does_not_go_round_for_ever(storage, log, monkeypatch):
    monkeypatch.setattr(shared, "RETRIES", 1)

    def make(number: int) -> Row:
        return os.kill(os.getpid(), signal.SIGKILL) if number == 0 else made(number, log)

    for _ in range(2):
        one = FORK.Process(target=work, args=(storage, make), daemon=True)
        one.start()
        one.join(60)
        assert one.exitcode == -signal.SIGKILL
    study = shared.opened(storage, sweep())
    time.sleep(3)
    study._recover()
    assert study._left([None] * 4) == [1, 2, 3]


def test_a_point_that_was_broken_off_is_taken_by_who_is_left_and_by_the_next_command(storage, log):
    def make(number: int) -> Row:
        if number == 1:
            raise KeyboardInterrupt
        return made(number, log)

    with pytest.raises(KeyboardInterrupt):
        work(storage, make)
    assert times(log) == [1, 0, 0, 0]
    assert all(work(storage, lambda number: made(number, log)))
    assert times(log) == [1, 1, 1, 1]


def test_a_refusal_is_tried_again_by_the_next_command_only(storage, log):
    def make(number: int) -> Row:
        made(number, log)
        return rows.without(VALUES[number], StoreError("no")) if number == 2 else made(number, log)

    known = work(storage, make)
    assert [row.code for row in known] == [0, 0, 3, 0]
    assert times(log) == [2, 2, 1, 2]
    assert [row.code for row in work(storage, lambda number: made(number, log))] == [0, 0, 0, 0]
    assert times(log) == [2, 2, 2, 2]


def test_what_a_later_command_tries_again_is_left_to_it_by_the_worker_that_failed(storage, log):
    before = shared.opened(storage, sweep())
    before._enqueue()
    for _ in range(2):
        before._next(lambda number: rows.without(VALUES[number], StoreError("no")))
    later = shared.opened(storage, sweep())
    later._enqueue()
    before.take(lambda number: made(number, log), lambda _: None, Progress())
    assert times(log) == [0, 0, 1, 1]
    waiting = later.study.get_trials(states=(optuna.trial.TrialState.WAITING,))
    assert sorted(trial.user_attrs["point"] for trial in waiting) == [0, 1]
    assert all(row.code == 0 for row in work(storage, lambda number: made(number, log)))
    assert times(log) == [1, 1, 1, 1]


def test_what_is_wrong_with_every_point_ends_the_worker(storage):
    def make(number: int) -> Row:
        raise DataError("empty")

    with pytest.raises(DataError):
        work(storage, make)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_storage_that_goes_away_is_one_line(storage, log, tmp_path):
    def make(number: int) -> Row:
        (tmp_path / "sweep.db").write_text("no database")
        return made(number, log)

    with pytest.raises(StoreError, match="The storage of the sweep was lost"):
        work(storage, make)
