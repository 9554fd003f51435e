"""Artifacts that hold weights under the model's own names: baseline, pruned, fine-tuned, folded."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import AliasChoices, BaseModel, ConfigDict, Field

from foundation.errors import MaskError, WeightsError
from foundation.files import read_tensors
from pipeline.artifacts.base import Artifact, WidthChange
from pipeline.recipe.removal import GroupSwitches

if TYPE_CHECKING:
    from torch import Tensor


def read_masks(path: Path | str) -> dict[str, Tensor]:
    """Read masks; raises MaskError if the file is unreadable or holds anything but bool tensors."""
    import torch

    try:
        found = read_tensors(path)
    except WeightsError as error:
        raise MaskError(error.message, error.hint) from error
    wrong = [name for name, mask in found.items() if mask.dtype != torch.bool]
    if wrong:
        raise MaskError(f"{path} holds {found[wrong[0]].dtype} for {wrong[0]}, not a mask.", "Give a file of masks.")
    return found


class Weighted(Artifact):
    """An artifact with one set of eager weights, named as in the model's own state dict."""

    WEIGHTS: ClassVar[str] = "weights.safetensors"

    def weights(self) -> dict[str, Tensor]:
        """The state dict, name -> tensor."""
        return read_tensors(self.folder / self.WEIGHTS)


@dataclass(frozen=True)
class Sparsity:
    """Zeros in one parameter."""

    parameter: str
    shape: tuple[int, ...]
    weights: int
    zeros: int
    channels: int
    """Length of dim 0: output channels."""
    channels_cut: int
    """Output channels that are wholly zero."""

    @property
    def ratio(self) -> float:
        """Share of zero weights."""
        return self.zeros / self.weights if self.weights else 0.0


class Baseline(Weighted):
    """The dense model, kept for ever: pruning is a one-way street."""

    STAGE: ClassVar[str] = "0-baseline"

    ANSWERS: ClassVar[str] = "answers.safetensors"
    CLASSES: ClassVar[str] = "classes"
    """Beside the answers: of how many classes they are."""

    trained_here: bool
    weights_origin: str
    score: float = Field(validation_alias=AliasChoices("score", "accuracy"))
    score_name: str = "accuracy"
    """Of the task's score that decides: on the test part, and on the calibration part."""
    calibration_score: float = Field(validation_alias=AliasChoices("calibration_score", "calibration_accuracy"))
    params: int
    macs: int
    onnx_bytes: int
    latency_ms: float
    threads: int
    isa: str
    training_seconds: float
    zero_channels: float = 0.0
    """Share of the output channels that are wholly zero in these weights: of a checkpoint that was pruned before."""

    labelled: bool = True
    """Whether the data has labels; without them, every score is agreement with this model."""

    def answers(self) -> tuple[dict[str, Tensor], int]:
        """What this model answers where the data has no labels: part -> class number per sample; and of how many.

        Raises WeightsError where they cannot be read.
        """
        found = read_tensors(self.folder / self.ANSWERS)
        classes = int(found.pop(self.CLASSES))
        return found, classes

    @property
    def onnx(self) -> Path:
        """The dense model as exported, before any onnxruntime optimisation."""
        return self.folder / "dense.onnx"


SCORES, CURVES, PRICES, LATENCY = "scores.csv", "curves.csv", "prices.csv", "latency.csv"
"""In the folder of stage 1 where whole groups went: how they rank; where curves decided, these and prices of widths;
where a latency was asked for, what its table predicts and what was measured.
"""


class CurveFacts(BaseModel):
    """How curves were measured: at which shares of a cluster, on how many samples, with readers fitted anew or not."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    shares: tuple[float, ...]
    samples: int
    refit: bool
    seconds: float


class Aim(BaseModel):
    """A target, and how the choice of widths stands to it before anything is trained.

    `quantity`: the recipe's word for it, such as "latency". `goal`, `predicted` (by the table, first), `expected`:
    shares of what the `dense` model has, in `unit`. `measured`: whether the last is of a whole model that was timed,
    after so many `attempts`. `error`: a standard deviation of the table's predictions, relative, from models left out
    of it; 0 where nothing is predicted. `threads`, `batch`: the setting of a latency; None of what is counted, and in
    versions that do not say.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    quantity: str
    name: str
    unit: str
    dense: float
    goal: float
    predicted: float
    expected: float
    measured: bool
    attempts: int
    error: float
    threads: int | None = None
    batch: int | None = None

    @property
    def words(self) -> str:
        """One line for people."""
        how = "timed as a whole model" if self.measured else "counted" if not self.error else "by the table"
        return (
            f"target {self.name}: {self.goal:.3f} of dense ({self.goal * self.dense:.3g} {self.unit}), chosen widths "
            f"have {self.expected:.3f} ({self.expected * self.dense:.3g} {self.unit}), {how}"
        )


class Pruned(Weighted):
    """Masks, and the original weights under them (never lost before fold)."""

    STAGE: ClassVar[str] = "1-prune"

    MASKS: ClassVar[str] = "masks.safetensors"

    method: Literal["structured", "unstructured", "2:4", "given", "none"]
    chosen_by: str = ""
    """What pruning took, in words; "" in versions made before this was written down."""
    kinds: GroupSwitches
    sparsity: float
    zeros: int
    params: int
    expected_params: int
    expected_macs: int
    macs: int
    groups_cut: int
    groups: int
    score_after: float = Field(validation_alias=AliasChoices("score_after", "accuracy_after"))
    layers: tuple[Sparsity, ...]
    widths: tuple[WidthChange, ...]
    curves: CurveFacts | None = None
    """None where no curves were measured."""
    aims: tuple[Aim, ...] = ()
    """What the recipe asked the widths to come to."""
    align: int = 1
    """What counts of channels are multiples of, by the recipe; 1 where no widths were chosen."""

    def masks(self) -> dict[str, Tensor]:
        """Parameter name -> bool tensor of its shape, True = kept."""
        return read_masks(self.folder / self.MASKS)


FITTED = "fitted.csv"
"""In the folder of stage 2: what the closed form made of each weight, one row each."""


class Rung(BaseModel):
    """One way of recovery that was tried, or not, and whether what it gave was kept.

    `score`: on the calibration part; None where it was not climbed. `why`: in words.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    score: float | None = Field(validation_alias=AliasChoices("score", "accuracy"))
    seconds: float
    kept: bool
    why: str


class Finetuned(Weighted):
    """The weights after recovery, still the originals under the masks.

    `rungs`: what was tried, in order, from the pruned model on. `epochs`: of training, 0 where none was needed.
    """

    STAGE: ClassVar[str] = "2-finetune"

    rungs: tuple[Rung, ...] = ()
    epochs: int
    best_epoch: int
    score: float = Field(validation_alias=AliasChoices("score", "accuracy"))
    calibration_score: float = Field(validation_alias=AliasChoices("calibration_score", "calibration_accuracy"))
    training_seconds: float


class Folded(Weighted):
    """Masks turned into weights: plain parameters, zeros written out."""

    STAGE: ClassVar[str] = "3-fold"

    sparsity: float
    zeros: int
    params: int
    score: float = Field(validation_alias=AliasChoices("score", "accuracy"))
    max_abs_diff_to_masked: float
