"""Whatever can be run: names, shapes and types of its inputs, and one method that infers."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, Self, runtime_checkable

import numpy as np
import onnx
import onnxruntime as ort
import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.utils import _pytree as pytree

from foundation.errors import ValidationError, first_line
from foundation.links import plain_files
from validators.turns import session_options

Array = np.ndarray[Any, np.dtype[Any]]

# onnxruntime writes element types as in "tensor(float)"; those that numpy calls otherwise.
_NUMPY_NAMES = {"float": "float32", "double": "float64"}


def run_unoptimized(
    model: onnx.ModelProto, names: Sequence[str], arrays: Mapping[str, Array], *, folder: Path | None = None
) -> list[Any]:
    """The outputs `names` of a model in memory, run as it is; `folder` is where its external weights are, if any.

    Raises whatever onnxruntime raises: its exception classes share no base of their own.
    """
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 3
    if folder is not None:
        options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(folder.resolve()))
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    found: list[Any] = session.run(list(names), dict(arrays))
    return found


class InputSpec(BaseModel):
    """An input: its name, its shape (a dynamic dimension is a name, such as "batch"), and its numpy type name."""

    model_config = ConfigDict(frozen=True)

    name: str
    shape: tuple[int | str, ...]
    dtype: str


class Runner(Protocol):
    """A model that can be run: `OrtRunner`, `TorchRunner`, or anything of the same form."""

    @property
    def name(self) -> str:
        """How reports call it."""

    @property
    def inputs(self) -> tuple[InputSpec, ...]:
        """What it takes."""

    @property
    def threads(self) -> int:
        """How many threads one inference uses."""

    def infer(self, feed: Mapping[str, Array]) -> dict[str, Array]:
        """Run once: input name -> array in, output name -> array out."""


@runtime_checkable
class Reopening(Runner, Protocol):
    """A runner whose place in memory is drawn anew when it is opened again."""

    def reopened(self) -> Runner:
        """The same model, in a new session."""


class OrtRunner:
    """An ONNX file on onnxruntime's CPU provider.

    `threads` run inside an operator, one operator at a time. With more than one, the threads spin while a run lasts, as
    onnxruntime does by default, and stop when it ends (`session.force_spinning_stop`), so that one session's idle
    threads do not burn the cores that another one is being timed on. `optimize=False` runs the graph as it is in the
    file. `session` holds further session configuration entries. Raises ValidationError when onnxruntime cannot load the
    file.
    """

    def __init__(
        self,
        path: Path,
        *,
        threads: int,
        optimize: bool = True,
        name: str | None = None,
        session: Mapping[str, str] | None = None,
    ) -> None:
        self.path = Path(path)
        self.name = name or self.path.name
        self.threads = threads
        self.optimize = optimize
        self.entries = dict(session or {})
        self._session = self._opened()
        self.inputs = tuple(_ort_spec(value) for value in self._session.get_inputs())
        self._outputs = [value.name for value in self._session.get_outputs()]

    def _opened(self) -> ort.InferenceSession:
        try:
            return _session(self.path, session_options(self.threads, self.optimize, self.entries))
        except Exception as error:  # onnxruntime's exception classes share no base of their own
            raise ValidationError(
                f"onnxruntime {ort.__version__} cannot load {self.path}: {first_line(error)}",
                "Give an .onnx file that this version supports.",
            ) from error

    def infer(self, feed: Mapping[str, Array]) -> dict[str, Array]:
        """Run once. Raises ValidationError when the feed does not fit or onnxruntime fails."""
        check_names(self, feed)
        try:
            return dict(zip(self._outputs, self._session.run(self._outputs, dict(feed)), strict=True))
        except Exception as error:  # see __init__
            told = RuntimeError(" ".join(str(error).split()))  # which sizes it got and expected is on further lines
            raise ValidationError(f"{self.name} cannot run: {first_line(told)}") from error

    def reopened(self) -> Self:
        """The same file in a new session. Raises ValidationError where it is gone."""
        new = copy.copy(self)
        new._session = self._opened()
        return new


class TorchRunner:
    """A PyTorch module in eval mode, or an exported program, on the CPU.

    The inputs' shapes and types are those of `example` (one tensor per input), with the first dimension free,
    and those that `free` names per input. Outputs
    are flattened in PyTorch's order and named `output_names`. While it runs, PyTorch uses `threads` threads inside an
    operator; the process's setting is restored afterwards.
    """

    def __init__(
        self,
        model: nn.Module | ExportedProgram,
        *,
        example: tuple[Tensor, ...],
        threads: int,
        input_names: Sequence[str] = ("input",),
        output_names: Sequence[str] = ("output",),
        free: Sequence[Mapping[int, str]] = (),
        name: str = "torch",
    ) -> None:
        if isinstance(model, nn.Module) and model.training:
            raise ValidationError("The model is in training mode.", "Call model.eval() first.")
        if len(example) != len(input_names):
            raise ValidationError(f"{len(example)} example tensors for {len(input_names)} input names.")
        self.name = name
        self.threads = threads
        named = free or [{} for _ in example]
        self.inputs = tuple(
            InputSpec(name=key, shape=_shape_of(tensor, names), dtype=str(tensor.dtype)[6:])
            for key, tensor, names in zip(input_names, example, named, strict=True)
        )
        self._outputs = tuple(output_names)
        # Guards would repeat the checks of the input at every call, for a little time that is not the model's.
        self._call = model.module(check_guards=False) if isinstance(model, ExportedProgram) else model

    def infer(self, feed: Mapping[str, Array]) -> dict[str, Array]:
        """Run once. Raises ValidationError when the feed or the number of outputs does not fit, or PyTorch fails."""
        check_names(self, feed)
        before = torch.get_num_threads()
        torch.set_num_threads(self.threads)
        try:
            with torch.inference_mode():
                leaves = pytree.tree_leaves(self._call(*(_tensor(feed[spec.name]) for spec in self.inputs)))
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # the model's own code may raise anything, and call sys.exit
            raise ValidationError(f"{self.name} cannot run: {first_line(error)}") from error
        finally:
            torch.set_num_threads(before)
        outputs = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        if len(outputs) != len(self._outputs):
            raise ValidationError(
                f"{self.name} has {len(outputs)} outputs, the given names are {', '.join(self._outputs)}.",
                f"Pass {len(outputs)} output names.",
            )
        return {key: tensor.numpy(force=True) for key, tensor in zip(self._outputs, outputs, strict=True)}


def _session(path: Path, options: ort.SessionOptions) -> ort.InferenceSession:
    """A session of the file at `path`; its weights may be links. Raises whatever onnxruntime raises."""
    try:
        return ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    except Exception:  # looked at only now: the time of a load is measured, and this reads the graph once more
        with plain_files(path) as plain:
            if plain == path:
                raise
            return ort.InferenceSession(plain, options, providers=["CPUExecutionProvider"])


def _shape_of(tensor: Tensor, free: Mapping[int, str]) -> tuple[int | str, ...]:
    names = {0: "batch", **free}
    return tuple(names.get(place, size) for place, size in enumerate(tensor.shape))


def _tensor(array: Array) -> Tensor:
    """The array as a tensor; copied only where PyTorch cannot share it."""
    return torch.from_numpy(np.require(array, requirements=["C", "W"]))


def check_names(runner: Runner, feed: Mapping[str, Array]) -> None:
    """Raises ValidationError where the feed is not of the inputs that the model takes."""
    names = [spec.name for spec in runner.inputs]
    if set(feed) != set(names):
        raise ValidationError(f"{runner.name} takes {', '.join(names)}; the feed holds {', '.join(feed) or 'nothing'}.")


def same_inputs(one: Sequence[InputSpec], other: Sequence[InputSpec]) -> bool:
    """Whether a feed of the one fits the other: the same names and types, and the same sizes where both are fixed."""
    theirs = {spec.name: spec for spec in other}
    return {spec.name for spec in one} == theirs.keys() and all(
        spec.dtype == theirs[spec.name].dtype
        and len(spec.shape) == len(theirs[spec.name].shape)
        and all(
            a == b or isinstance(a, str) or isinstance(b, str)
            for a, b in zip(spec.shape, theirs[spec.name].shape, strict=True)
        )
        for spec in one
    )


def _ort_spec(value: Any) -> InputSpec:
    element = value.type.removeprefix("tensor(").removesuffix(")")
    shape = tuple(size if isinstance(size, int) else str(size or f"dim_{i}") for i, size in enumerate(value.shape))
    return InputSpec(name=value.name, shape=shape, dtype=_NUMPY_NAMES.get(element, element))
