"""The device, the precision and the processes of a training run: the only file that knows them.

Accelerate is the engine: it finds the device and the process group that a launcher made, casts and scales. (Its own
optimizer looks for a package on the disk twice a step, 0.6 ms, so that the plain one steps.)
The loop asks this file and nothing else, so it is the same on one CPU core and on eight GPUs. What N processes compute
is what one computes, up to the order of summation: each has its rows of every batch, gradients are averaged, and the
statistics of batch norms are those of the whole batch (`norms.py`). What differs is dropout, drawn by each for itself.
"""

from __future__ import annotations

import contextlib
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from itertools import zip_longest
from types import ModuleType
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from foundation.errors import ConfigError, TrainingError
from pipeline.data.parts import Share
from pipeline.recipe.train import TrainSettings
from pipeline.training import launched
from pipeline.training.norms import over_processes

if TYPE_CHECKING:
    from accelerate import Accelerator

T = TypeVar("T")
CPU = torch.device("cpu")
_MIXED = {"float32": "no", "bf16": "bf16", "fp16": "fp16"}


# ── what there is ────────────────────────────────────────────────────────────────────────────────────────────────────


def count() -> int:
    """How many processes train together; 1 where no launcher made more."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Which of them this is; 0 decides, writes and speaks."""
    return dist.get_rank() if count() > 1 else 0


def told(value: T) -> T:
    """What the first process has, on every one."""
    carried = [value]
    if count() > 1:
        dist.broadcast_object_list(carried, src=0, device=CPU)
    return carried[0]


def everybodys(value: T) -> list[T]:
    """What each process has, in the order of their ranks, on every one."""
    every = [value] * count()
    if count() > 1:
        dist.all_gather_object(every, value)
    return every


def resolved(wanted: str) -> torch.device:
    """The device of a recipe's word, of this process among those on this machine: "auto" is a GPU where there is one.

    Raises ConfigError where it is not there.
    """
    if wanted == "auto":
        wanted = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    kind, _, number = wanted.partition(":")
    if kind == "cpu":
        return CPU
    place = launched.place()
    if kind == "mps":
        if not torch.backends.mps.is_available():
            raise ConfigError("device is 'mps', and this machine has no such GPU.", _INSTEAD)
        if place is not None:
            raise ConfigError(f"device is 'mps', which one process has alone; there are {place.count}.", _INSTEAD)
        return torch.device("mps")
    there = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if number and place is not None:
        raise ConfigError(
            f"device is {wanted!r}, and {place.count} processes were started.",
            'Write device = "cuda": each has its own.',
        )
    at = int(number) if number else place.local if place is not None else 0
    if at >= there:
        has = f"{there} CUDA GPUs" if there else "no CUDA GPU that this build of torch can use"
        wants = f"process {place.rank} wants GPU {at}" if place is not None else f"device is {wanted!r}"
        raise ConfigError(f"{wants[0].upper()}{wants[1:]}, and this machine has {has}.", _INSTEAD)
    return torch.device("cuda", at)


_INSTEAD = 'Leave the device out, or write device = "cpu".'


def check(settings: TrainSettings) -> None:
    """Raise ConfigError for a device that is not there, a precision that it has not, or processes of another kind."""
    device = resolved(settings.device)
    if settings.precision == "fp16" and device.type == "cpu":
        raise ConfigError(
            "precision is 'fp16', and a CPU cannot train in it.", 'Write precision = "bf16" or "float32".'
        )
    if settings.precision == "bf16" and not _has_bf16(device):
        raise ConfigError(
            f"precision is 'bf16', and this {'CPU' if device.type == 'cpu' else 'GPU'} has no instructions for it: "
            "it would be slower than float32.",
            'Write precision = "float32".',
        )
    if _asked("ACCELERATE_USE_DEEPSPEED"):
        raise ConfigError("The launcher asks for DeepSpeed, and masks need every weight whole on each process.", _WHOLE)
    if _asked("ACCELERATE_USE_FSDP") and os.environ.get("FSDP_VERSION", "1") != "2":
        raise ConfigError("The launcher asks for FSDP 1.", "Launch with --fsdp_version 2, or without --use_fsdp.")
    if in_pieces() and settings.precision == "fp16":
        raise ConfigError("precision is 'fp16', which FSDP was never tried with.", 'Write precision = "bf16".')


_WHOLE = "Launch without it: each process holds the model, and gradients are averaged (DDP)."


def _asked(variable: str) -> bool:
    return os.environ.get(variable, "false").lower() in ("1", "true")


def in_pieces() -> bool:
    """Whether the launcher asks for weights that lie in pieces, one on each process (FSDP 2)."""
    return count() > 1 and _asked("ACCELERATE_USE_FSDP")


def check_pieces(masked: bool) -> None:
    """Raise ConfigError where weights are to lie in pieces although masks are on them, or may come."""
    if masked and in_pieces():
        raise ConfigError(
            "The launcher asks for FSDP, and masks need every weight whole on each process: this model cannot be "
            "trained at its pruned size.",
            f"{_WHOLE} The stages before this one are kept.",
        )


def check_rows(samples: int, settings: TrainSettings) -> None:
    """Raise ConfigError where a batch out of `samples` has none for a process, or for a part of what a process has."""
    rows, parts = min(settings.batch_size, samples), count() * settings.accumulate
    if rows < parts:
        among = f"{count()} processes" if count() > 1 else ""
        cut = f"accumulate = {settings.accumulate}" if settings.accumulate > 1 else ""
        raise ConfigError(
            f"A batch of {rows} samples cannot feed {' with '.join(filter(None, (among, cut)))}.",
            f"Start fewer, or let a batch have {parts} samples or more.",
        )


def _has_bf16(device: torch.device) -> bool:
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    if device.type == "mps":
        return False
    flags = torch.backends.cpu.get_cpu_capability()
    on_x86 = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return on_x86 or ("SVE" in flags and torch.ops.mkldnn._is_mkldnn_bf16_supported())


def facts(settings: TrainSettings) -> dict[str, str]:
    """What of device and processes decides a result: the kind of device that "auto" found, and how many processes."""
    try:
        device = resolved(settings.device)
    except ConfigError:  # nothing was made on a device that is not there
        return {"device": settings.device, "processes": str(count())}
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    return {"device": name, "processes": str(count())}


# ── samples that each has a part of ──────────────────────────────────────────────────────────────────────────────────


class Elsewhere(ValueError):  # noqa: N818  # no error of this process: its neighbour has one
    """Another process could not do its part; the message is its reason."""


class Together:
    """Sums over the samples of several processes, the same on each; by default one process has all of them.

    All must ask for the same, in the same order, so that whatever they decide is decided by what they get here. One
    that cannot go on says so by `failed`: the others then raise `Elsewhere` where they ask next, `done` at the latest.
    """

    def __init__(self, rank: int = 0, count: int = 1) -> None:
        self.rank, self.count = rank, count

    def mine(self, count: int) -> range:
        """Which of `count` batches this process has: neighbours, those of the first process first."""
        return range(count * self.rank // self.count, count * (self.rank + 1) // self.count)

    def added(self, value: Tensor) -> Tensor:
        """The sum of tensors of one shape; `value` may be changed."""
        return self._reduced(value, dist.ReduceOp.SUM)

    def largest(self, value: Tensor) -> Tensor:
        """The larger of tensors of one shape, number by number; `value` may be changed."""
        return self._reduced(value, dist.ReduceOp.MAX)

    def sum(self, *values: float) -> tuple[float, ...]:
        """Sums of numbers, in float64."""
        return values if self.count == 1 else tuple(self.added(torch.tensor(values, dtype=torch.float64)).tolist())

    def every(self, flag: bool) -> bool:
        """Whether it is so on every process."""
        return flag if self.count == 1 else not any(self.sum(not flag))

    def given(self, value: Tensor, rank: int) -> Tensor:
        """What process `rank` has; `value` may be changed."""
        if self.count > 1:
            value = value.contiguous()
            self._step(value.numel())
            dist.broadcast(value, src=rank)
        return value

    def joined(self, value: Tensor, dim: int) -> Tensor:
        """The parts of all processes as one tensor, in the order of `mine`."""
        if self.count == 1:
            return value
        sizes = torch.zeros(self.count, dtype=torch.long)
        sizes[self.rank] = value.shape[dim]
        sizes = self.added(sizes)
        own = value.movedim(dim, 0).contiguous()
        own = own.to(torch.uint8) if value.dtype == torch.bool else own  # gloo knows no truth values
        given = own.new_zeros(int(sizes.max()), *own.shape[1:])  # each gives as much as the largest part has
        given[: len(own)] = own
        parts = [torch.empty_like(given) for _ in range(self.count)]
        self._step(given.numel())
        dist.all_gather(parts, given)
        whole = torch.cat([part[:size] for part, size in zip(parts, sizes.tolist(), strict=True)])
        return whole.to(value.dtype).movedim(0, dim)

    def failed(self, reason: str) -> None:
        """Tell the others that this process cannot go on."""
        with contextlib.suppress(Elsewhere):
            self._step(0, reason or "it could not go on")

    def done(self) -> None:
        """Wait until all have come to their end. Raises Elsewhere where one has not."""
        self._step(0)

    def _reduced(self, value: Tensor, how: Any) -> Tensor:
        if self.count > 1:
            value = value.contiguous()
            self._step(value.numel())
            dist.all_reduce(value, how)
        return value

    def _step(self, size: int, reason: str = "") -> None:
        """Agree that all go on, with tensors of one size."""
        if self.count == 1:
            return
        seen = torch.tensor([bool(reason), size, -size])
        dist.all_reduce(seen, dist.ReduceOp.MAX)
        lost, most, least = seen.tolist()
        if lost:
            raise Elsewhere(next(filter(None, everybodys(reason))))
        if most != -least:  # what follows would wait for ever, or add up what does not belong together
            raise TrainingError("The processes have come apart in adding up what they saw.", "Run with one process.")


ALONE = Together()
"""One process has all samples."""


def together() -> Together:
    """All processes of the run."""
    return Together(rank(), count())


# ── one run on them ──────────────────────────────────────────────────────────────────────────────────────────────────


class Devices:
    """Where one run trains, and in which precision.

    `device`: of this process. `rank`, `count`: of the processes that train together. `share`: this one's part of every
    batch, as `Data.batches` takes it.
    """

    def __init__(self, settings: TrainSettings) -> None:
        check(settings)
        self.device = resolved(settings.device)
        self.rank, self.count = rank(), count()
        self.share = Share(self.rank, self.count)
        self.in_pieces = in_pieces()
        self._accelerator, self._before = _accelerator(self.device, settings.precision)
        self._lowered = settings.precision != "float32"
        self._scaler: torch.amp.GradScaler | None = self._accelerator.scaler

    @property
    def doubtful(self) -> bool:
        """Whether the precision may be slower than float32 here, so that it has to be measured."""
        return self._lowered and self.device == CPU

    @contextmanager
    def in_float32(self) -> Iterator[None]:
        """Compute in float32 within the context, whatever the precision."""
        before, self._lowered = self._lowered, False
        try:
            yield
        finally:
            self._lowered = before

    @property
    def leads(self) -> bool:
        """Whether this process writes and speaks."""
        return self.rank == 0

    def trained(self, model: nn.Module) -> nn.Module:
        """What is trained in the place of `model`: itself, or a copy in pieces."""
        return _sharding().in_pieces(model, self.device) if self.in_pieces else model

    def in_one(self, tree: T) -> T:
        """Tensors, or a tree of them, that may lie in pieces, as whole ones; then every process has to ask."""
        return _sharding().whole(tree) if self.in_pieces else tree

    def pieces(self, value: Tensor, like: Tensor) -> Tensor:
        """A whole tensor, or this process's piece of it where `like`, of the same shape, lies in pieces."""
        return _sharding().piece(value, like) if self.in_pieces else value

    def place(self, model: nn.Module) -> None:
        """Bring a module to the device, in place: its parameters stay the objects that they are."""
        if self.device != CPU:
            model.to(self.device)

    def prepared(self, objective: nn.Module) -> nn.Module:
        """`objective` as a step calls it: gradients are averaged over processes."""
        if self.count == 1 or self.in_pieces:  # pieces average theirs by themselves
            return objective
        # Which parameters a step reaches may change from step to step (layer drop), so that each step looks; and the
        # statistics of norms agree by themselves.
        with _quiet():
            return nn.parallel.DistributedDataParallel(
                objective,
                device_ids=None if self.device == CPU else [self.device],
                broadcast_buffers=False,
                find_unused_parameters=True,
                gradient_as_bucket_view=True,
            )

    def moved(self, tree: T) -> T:
        """Tensors, or a tree of them, on the device."""
        if self.device == CPU:
            return tree
        moved: T = pytree.tree_map_only(Tensor, lambda one: one.to(self.device, non_blocking=True), tree)
        return moved

    def back(self, outputs: dict[str, Tensor]) -> dict[str, Tensor]:
        """Outputs, without their graph, on the CPU."""
        return {name: value.detach().to(CPU) for name, value in outputs.items()}

    def judging(self, run: Callable[..., dict[str, Tensor]]) -> Callable[..., dict[str, Tensor]]:
        """A function from inputs to outputs by name, both on the CPU, computed on the device."""
        return lambda *inputs: self.back(run(*self.moved(inputs)))

    def computing(self) -> AbstractContextManager[Any]:
        """The precision of a forward pass, losses not included."""
        return self._accelerator.autocast() if self._lowered else nullcontext()

    def whole(self, outputs: dict[str, Tensor]) -> dict[str, Tensor]:
        """Outputs in float32, whatever they were computed in."""
        if not self._lowered:
            return outputs
        return {name: value.float() if value.is_floating_point() else value for name, value in outputs.items()}

    def stepping(self) -> AbstractContextManager[Any]:
        """The context of an epoch's steps: batch norms see the whole batch, new tensors are made on the device."""
        return over_processes() if self.count > 1 else nullcontext()

    def losing(self) -> AbstractContextManager[Any]:
        """The context of a loss: what it makes itself (positions, lengths) is made on the device."""
        return nullcontext() if self.device == CPU else self.device

    def adding(self, module: nn.Module, model: nn.Module, last: bool) -> AbstractContextManager[Any]:
        """The context of one part of a batch: gradients are exchanged with the last one only. `module`: `model` with
        its loss, as `prepared` made it.
        """
        if self.in_pieces:
            _sharding().syncs(model, last)
            return nullcontext()
        return nullcontext() if last or self.count == 1 else self._accelerator.no_sync(module)

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of `loss`; they are averaged over processes."""
        self._accelerator.backward(loss)

    def step(self, optimizer: torch.optim.Optimizer, model: nn.Module, clip: float) -> None:
        """Clip the gradient to norm `clip` (0: not at all), and step; one that fp16 cannot tell is left out."""
        if self._scaler is not None:
            self._scaler.unscale_(optimizer)
        if clip:
            nn.utils.clip_grad_norm_(model.parameters(), clip)
        if self._scaler is None:
            optimizer.step()
        else:
            self._scaler.step(optimizer)
            self._scaler.update()

    # ── between processes ────────────────────────────────────────────────────────────────────────────────────────────

    def summed(self, *values: float) -> tuple[float, ...]:
        """Sums over processes, the same on each."""
        if self.count == 1:
            return values
        found = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(found)
        return tuple(found.tolist())

    def told(self, value: T) -> T:
        """What the first process has, on every one."""
        return told(value)

    def gathered(self, own: list[T]) -> list[T]:
        """Lists of all processes in one: the first entry of each, in order, then the second ones, ..."""
        lists = everybodys(own)
        return [one for row in zip_longest(*lists, fillvalue=_NOTHING) for one in row if one is not _NOTHING]

    def close(self, *modules: nn.Module) -> None:
        """Bring modules back to the CPU, and leave Accelerate's state as it was found."""
        for module in modules if self.device != CPU else ():
            module.to(CPU)
        self._before()


def _sharding() -> ModuleType:
    """Loaded for those who want it: torch's part of it takes a second."""
    from pipeline.training import sharding

    return sharding


class _Nothing:
    """Stands for an entry that is not there."""


_NOTHING: Any = _Nothing()


def _accelerator(device: torch.device, precision: str) -> tuple[Accelerator, Callable[[], None]]:
    """A fresh engine for one run, and what puts back the state that Accelerate keeps once per process.

    That state may be an earlier run's, or that of a user's own loop around ours.
    """
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState, GradientState, PartialState

    shared = [kind._shared_state for kind in (PartialState, AcceleratorState, GradientState)]
    before = [dict(state) for state in shared]

    def put_back() -> None:
        for state, content in zip(shared, before, strict=True):
            state.clear()
            state.update(content)

    for state in shared:
        state.clear()
    # Threads and rendezvous are settled already: what it would say of them is nobody's business.
    # What it would make of FSDP is made in `sharding.py`.
    with _variables({"ACCELERATE_TORCH_DEVICE": str(device), "ACCELERATE_USE_FSDP": "false"}), _quiet():
        made = Accelerator(cpu=device.type == "cpu", mixed_precision=_MIXED[precision])
    assert made.num_processes == count()
    return made, put_back


@contextmanager
def _variables(values: dict[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


@contextmanager
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
