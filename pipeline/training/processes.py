"""Several processes that a launcher started: joined, agreed, watched over, and ended together.

The first process runs the stages, is the only one that writes, and speaks. The others build the same model, data and
task and then take their parts of training (`following.py`). A process that fails or is killed ends the run: the others
notice through a connection of their own to the first one, for whoever waits in a sum of gradients may wait for ever.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import secrets
import signal
import socket
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from types import FrameType
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch.distributed import DistError, PrefixStore, Store  # type: ignore[attr-defined]  # documented, not listed
from torch.distributed.rendezvous import rendezvous

from foundation.errors import ConfigError, LeanortError, TrainingError
from pipeline.training import devices, launched
from pipeline.training.launched import Place

T = TypeVar("T")
FAILED = 3
"""Exit code where a process was lost: that of a stage that failed."""
LONG = timedelta(days=30)
"""What others wait while the first process fits, exports and races alone: as long as it takes."""
NEAR, FAR = 15.0, 600.0
"""Seconds in which all processes must have come, on one machine and on several, which may start minutes apart."""
PAUSE = 2.0
"""Seconds in which one process hears of another's end."""
WATCH = "leanort/watch"
"""The key under which the first process says where it listens."""
GRACE = 20.0
"""Seconds in which the first process says what is wrong, before the others leave."""

GROUP_AS_DEFAULT = (
    "torch.distributed.nn.functional",
    "torch.distributed.fsdp.sharded_grad_scaler",
    "torch.distributed.optim.zero_redundancy_optimizer",
)
"""Modules whose functions take the group of all as a default, as it is when they are first imported: with the first
model that is trained by several, say. From then on nothing ends that group. So they are imported before there is one.
"""
SETTLE = 0.5
"""Seconds for the threads of a group that something still holds, as FSDP does, to let go of their last tensors: a
thread that does so while the interpreter ends aborts the process.
"""


class Over(Exception):  # noqa: N818  # no error: this process has nothing more to do
    """The first process has ended the run, or speaks of what was wrong; whoever catches this is quiet."""


class Group:
    """The processes of one run, as each of them sees them."""

    def __init__(self, place: Place, watch: _Watch) -> None:
        self.place, self._watch = place, watch

    @property
    def leads(self) -> bool:
        """Whether this is the first process."""
        return self.place.rank == 0

    def agreed(self, work: Callable[[], T], same: Callable[[T], Mapping[str, str]] | None = None) -> T:
        """What `work` gives on this process, once it has gone well on all of them.

        `same`: what all must agree in, by name. Where it fails anywhere, or they do not agree, the first process raises
        that error, and the others raise `Over`.
        """
        made: T | None = None
        problem: LeanortError | None = None
        told: dict[str, str] = {}
        try:
            made = work()
            told = dict(same(made)) if same is not None else {}
        except LeanortError as error:
            problem = error
        every: list[Any] = devices.everybodys(((problem.message, problem.hint) if problem else None, told))
        wrong = next((rank for rank, (said, _) in enumerate(every) if said is not None), None)
        apart = [
            (name, rank)
            for name, value in every[0][1].items()
            for rank, (_, own) in enumerate(every)
            if own.get(name) != value
        ]
        if wrong is None and not apart:
            return made  # type: ignore[return-value]
        self._watch.over.set()
        if not self.leads:
            raise Over
        if problem is not None:
            raise problem
        if wrong is not None:
            message, hint = every[wrong][0]
            raise ConfigError(f"Process {wrong}: {message}", hint)
        name, rank = apart[0]
        raise ConfigError(
            f"Process {rank} has another {name} than process 0.", "Install the same everywhere, and start all alike."
        )


@contextmanager
def joined(place: Place) -> Iterator[Group]:
    """Join the other processes; at the end they are told, however this one ended, and left.

    On every process but the first, KeyboardInterrupt and a lost first process end the process, quietly.
    """
    store = None if dist.is_initialized() else _store(place)
    watch = _Watch(place, store)  # before anything that may wait for a process that is not there any more
    with _slow_to_terminate():
        try:
            if store is not None:
                _initialise(place, store)
            _meet()
            yield Group(place, watch)
        except Over:
            raise
        except BaseException as error:
            watch.fail(error)
            raise
        watch.end()
    if store is not None:
        _leave()


def _initialise(place: Place, store: Store) -> None:
    for module in GROUP_AS_DEFAULT:
        importlib.import_module(module)
    kinds = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    if torch.cuda.is_available() and place.local < torch.cuda.device_count():
        torch.cuda.set_device(place.local)
    store.set_timeout(LONG)  # from here on the watch tells of who is lost
    dist.init_process_group(
        kinds, store=PrefixStore("leanort", store), rank=place.rank, world_size=place.count, timeout=LONG
    )


def _leave() -> None:
    if not dist.is_initialized():  # code of others has left already
        return
    group = weakref.ref(dist.group.WORLD)
    with contextlib.suppress(RuntimeError):
        dist.destroy_process_group()
    if group() is not None:
        time.sleep(SETTLE)


def _patience(place: Place) -> float:
    return NEAR if place.together else FAR


def _store(place: Place) -> Store:
    """Where the processes leave word for each other until they are joined. Raises TrainingError where others do not
    come.
    """
    limit = _patience(place)
    if place.rank:
        _wait_for_first(place, limit)
    try:
        given = rendezvous("env://", place.rank, place.count, timeout=timedelta(seconds=limit))
        store: Store = next(iter(given))[0]
    except DistError as error:
        if place.rank == 0 and "EADDRINUSE" in str(error):
            raise ConfigError(
                f"Port {place.port} (MASTER_PORT) of this machine is taken.", "Start all processes with another one."
            ) from None
        raise _missing(place) from None
    return store


def _wait_for_first(place: Place, limit: float) -> None:
    """Until somebody listens where the first process should: torch writes pages to stderr of those who wait."""
    began = time.monotonic()
    while not _listens(place, limit):
        if time.monotonic() - began > limit:
            raise _missing(place, "the first one has not")
        time.sleep(0.1)


def _listens(place: Place, limit: float) -> bool:
    """Whether another process listens where the first one should. A connection to a port that nobody has may get that
    very port for its own end, and is then one to itself (a simultaneous open, RFC 9293, 3.5): one of 17,000 tries did.
    """
    try:
        with socket.create_connection((place.address, place.port), timeout=limit) as link:
            return bool(link.getsockname() != link.getpeername())
    except OSError:
        return False


def _missing(place: Place, who: str = "not all others have") -> TrainingError:
    """The first process has this error to raise; of the others the second speaks, and all leave."""
    error = TrainingError(
        f"Process {place.rank} of {place.count}: {who} come within {_patience(place):.0f} s, killed or never started.",
        "Start all of them at the same time, as torchrun does; the same command goes on from what is finished.",
    )
    if place.rank:
        if place.rank == 1:
            _write(error.message, error.hint)
        launched.LEAVE(FAILED)
    return error


@contextmanager
def _slow_to_terminate() -> Iterator[None]:
    """A launcher that has lost one process terminates the rest at once: leave the time to say what happened."""

    def wait(number: int, _frame: FrameType | None) -> None:
        time.sleep(PAUSE)
        launched.LEAVE(128 + number)

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, wait)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


class _Watch:
    """A connection from each process to the first one, in threads of their own: it breaks when either end dies."""

    def __init__(self, place: Place, store: Store | None) -> None:
        self.place = place
        self.over = threading.Event()
        self.links: dict[int, socket.socket] = {}
        if place.rank == 0:
            self._gather(store)
        else:
            port, token = _heard(place, store)
            try:
                link = socket.create_connection((place.address, port), timeout=60)
                link.sendall(json.dumps({"token": token, "rank": place.rank}).encode() + b"\n")
            except OSError:  # it has ended just now
                self._lost(0)
            self.links[0] = link
        for rank, link in self.links.items():
            _keep_alive(link)
            threading.Thread(target=self._listen, args=(rank, link), name=f"watch {rank}", daemon=True).start()

    def _gather(self, store: Store | None) -> None:
        """Wait for the connections of all others, as long as they may take to come."""
        server = _server(self.place.address)
        token = secrets.token_hex(16)
        said = (server.getsockname()[1], token)
        if store is None:
            devices.told(said)
        else:
            store.set(WATCH, json.dumps(said))
        until = time.monotonic() + _patience(self.place)
        with server:
            while len(self.links) < self.place.count - 1:
                server.settimeout(max(0.1, until - time.monotonic()))
                try:
                    self._accept(server, token)
                except TimeoutError:
                    raise _missing(self.place) from None

    def _accept(self, server: socket.socket, token: str) -> None:
        link, _ = server.accept()
        link.settimeout(60)
        try:
            said = json.loads(link.makefile("rb").readline(1000))
            rank = said["rank"] if secrets.compare_digest(said["token"], token) else None
        except (ValueError, KeyError, TypeError, OSError):
            rank = None
        if isinstance(rank, int) and 0 < rank < self.place.count:
            self.links[rank] = link
        else:  # a stranger
            link.close()

    def _listen(self, rank: int, link: socket.socket) -> None:
        link.settimeout(None)
        try:
            said = link.makefile("rb").readline(10_000)
        except OSError:
            said = b""
        if self.over.is_set():
            return
        if said:
            self._told(rank, json.loads(said), link)
        else:
            self._lost(rank)
        if not self.over.is_set():
            launched.LEAVE(FAILED)

    def _lost(self, rank: int) -> None:
        """End this process, where another one has: one of those that are left speaks."""
        if self.place.rank <= 1:
            self._say(rank, "it was killed, or its machine was lost")
        launched.LEAVE(FAILED)

    def _told(self, rank: int, said: dict[str, Any], link: socket.socket) -> None:
        if self.place.rank == 0:
            if self.over.wait(2 * PAUSE):  # what went wrong there went wrong here, too, and is said already
                return
            self._say(rank, said["reason"])
            launched.LEAVE(FAILED)
        # The first one has failed, and says so itself: leave after it.
        link.settimeout(GRACE)
        with contextlib.suppress(OSError):
            link.recv(1)
        launched.LEAVE(int(said["code"]))

    def _say(self, rank: int, reason: str) -> None:
        _write(
            f"Process {rank} of {self.place.count} has ended: {reason}.",
            "The same command goes on from the last whole epoch.",
        )

    def fail(self, error: BaseException) -> None:
        """Tell the others that this process ends with an error: they leave after it, with its code."""
        if not isinstance(error, LeanortError | KeyboardInterrupt):
            time.sleep(PAUSE)  # a sum that fails is what is seen of a lost process first: the watching thread says it
        self.over.set()
        code = getattr(error, "exit_code", 130 if isinstance(error, KeyboardInterrupt) else FAILED)
        reason = f"{type(error).__name__}: {' '.join(str(error).split())}"[:500]
        for link in self.links.values():
            with contextlib.suppress(OSError):
                link.sendall(json.dumps({"code": code, "reason": reason}).encode() + b"\n")
        if self.place.rank:
            time.sleep(PAUSE)
            launched.LEAVE(code)

    def end(self) -> None:
        """All went well: connections may close from here on."""
        _meet()
        self.over.set()
        _meet()  # nobody closes before everybody knows
        for link in self.links.values():
            link.close()


def _heard(place: Place, store: Store | None) -> tuple[int, str]:
    """Where the first process listens, and the word that it wants to hear; by the `store` until all are joined."""
    if store is None:
        told: Any = devices.told(None)
    else:
        try:
            told = json.loads(store.get(WATCH))
        except DistError:
            raise _missing(place) from None
    port, token = told
    return port, token


def _write(message: str, hint: str) -> None:
    """As the command line says it, which speaks on the first process alone."""
    sys.stderr.write(f"error: {message}\n  -> {hint}\n")
    sys.stderr.flush()


def _meet() -> None:
    """Wait for every process; on the CPU, whatever else there is."""
    dist.all_reduce(torch.zeros(1))


def _server(address: str) -> socket.socket:
    """Listen where the launcher says that the first process runs; on every address where that is not one of ours."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    try:
        return socket.create_server((address, 0), family=family)
    except OSError:
        return socket.create_server(("", 0))


def _keep_alive(link: socket.socket) -> None:
    """Notice within 20 s that the other machine is gone, which closes no connection."""
    link.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in (("TCP_KEEPIDLE", 5), ("TCP_KEEPINTVL", 5), ("TCP_KEEPCNT", 3)):
        if hasattr(socket, option):
            link.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)
