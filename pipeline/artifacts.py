"""What each stage hands to the next: one type per stage, each with exactly one producer, so the types are the wires.

An artifact is a folder of files plus `artifact.json`, the typed figures below. A stage writes it once; afterwards it is
only read. Accuracies are shares in 0..1, latencies milliseconds, sizes bytes, MACs multiply-accumulates per sample.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor
from torch.export import ExportedProgram

from pipeline.models import weights
from pipeline.recipe.config import GroupSwitches
from pipeline.training import masks
from pipeline.training.masks import Sparsity
from validators.gates import Measured, Verdict

FIGURES = "artifact.json"


class Artifact(BaseModel):
    """Base: the folder that holds the files, and typed figures about them."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    folder: Path = Field(exclude=True)

    def save(self) -> Self:
        """Write the figures beside the files."""
        (self.folder / FIGURES).write_text(self.model_dump_json(indent=2) + "\n", encoding="utf-8")
        return self

    @classmethod
    def load(cls, folder: Path) -> Self:
        """Read the figures that `save` wrote into `folder`."""
        figures: dict[str, Any] = json.loads((folder / FIGURES).read_text(encoding="utf-8"))
        return cls.model_validate({**figures, "folder": folder})

    def scalars(self) -> dict[str, int | float | str | bool]:
        """The scalar figures, for the manifest and for tables."""
        return {k: v for k, v in self.model_dump(mode="json").items() if isinstance(v, int | float | str | bool)}


class Weighted(Artifact):
    """An artifact with one set of eager weights, named as in the model's own state dict."""

    WEIGHTS: ClassVar[str] = "weights.safetensors"

    def weights(self) -> dict[str, Tensor]:
        """The state dict, name -> tensor."""
        return weights.read(self.folder / self.WEIGHTS)


class Baseline(Weighted):
    """The dense model, kept for ever: pruning is a one-way street."""

    trained_here: bool
    weights_origin: str
    accuracy: float
    calibration_accuracy: float
    params: int
    macs: int
    onnx_bytes: int
    latency_ms: float
    threads: int
    isa: str
    training_seconds: float

    @property
    def onnx(self) -> Path:
        """The dense model as exported, before any onnxruntime optimisation."""
        return self.folder / "dense.onnx"


class WidthChange(BaseModel):
    """One channel cluster: how many of its groups there were and how many stay."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    cluster: str
    kind: str
    before: int
    after: int
    unit: int


class Pruned(Weighted):
    """Masks, and the original weights under them (never lost before fold)."""

    MASKS: ClassVar[str] = "masks.safetensors"

    method: Literal["structured", "unstructured", "2:4", "none"]
    kinds: GroupSwitches
    sparsity: float
    zeros: int
    params: int
    expected_params: int
    expected_macs: int
    macs: int
    groups_cut: int
    groups: int
    accuracy_after: float
    layers: tuple[Sparsity, ...]
    widths: tuple[WidthChange, ...]

    def masks(self) -> dict[str, Tensor]:
        """Parameter name -> bool tensor of its shape, True = kept."""
        return masks.load(self.folder / self.MASKS)


class Finetuned(Weighted):
    """The weights after recovery, still the originals under the masks."""

    epochs: int
    best_epoch: int
    accuracy: float
    calibration_accuracy: float
    training_seconds: float


class Folded(Weighted):
    """Masks turned into weights: plain parameters, zeros written out."""

    sparsity: float
    zeros: int
    params: int
    accuracy: float
    max_abs_diff_to_masked: float


class Shrunk(Artifact):
    """The physically smaller program, proven equal to the folded model."""

    removed: bool
    statement: str
    params_before: int
    params_after: int
    macs_before: int
    macs_after: int
    max_abs_diff: float
    max_abs_diff_float64: float | None
    output_scale: float
    tolerance: float
    widths: tuple[WidthChange, ...]
    kept_back: tuple[str, ...]

    def program(self) -> ExportedProgram:
        """The shrunk program, batch-dynamic."""
        return torch.export.load(self.folder / "shrunk.pt2")


class Exported(Artifact):
    """The shrunk model as ONNX."""

    opset: int
    onnx_bytes: int
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    external_data: bool
    nodes: int
    centred_norms: int

    @property
    def onnx(self) -> Path:
        """The file; external data, if any, lies beside it."""
        return self.folder / "model.onnx"


class CandidateLatency(BaseModel):
    """One candidate's median in one race, and its ratio to the reference candidate with the 95 % interval."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    threads: int
    batch_size: int
    median_ms: float
    ratio: float
    low: float
    high: float


class Candidate(BaseModel):
    """One way to ship the model: how it was made, how it was proven, what it costs.

    `outcome`: "passed" = proven, and timed; "failed" = could not be made or is not the same function; "skipped" = this
    model or installation has none. `reason` says why it failed or was skipped, or why one that passed and is faster
    than the one that ships does not. `budget` is what it was proven by, at most `allowed` of it: float32 rounding
    (`max_scaled`, the largest error over max(1, max|reference|)), or the accuracy on the calibration part
    (`accuracy_drop_points` against the shrunk model, `accuracy_drop_points_dense` against the dense one; the larger
    counts), with the mean `cross_entropy` there in nats. `session` holds the session configuration entries that it must
    be loaded with. `file` is "" where it was not kept. Sizes in bytes, `zstd_bytes` only where the zeros stayed.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    technique: str = ""
    outcome: Literal["passed", "failed", "skipped"]
    reason: str = ""
    file: str = ""
    portable: bool = True
    isa: str = ""
    budget: Literal["rounding", "accuracy"] = "rounding"
    allowed: float = 0.0
    session: dict[str, str] = Field(default_factory=dict)
    max_scaled: float | None = None
    top1_agreement: float | None = None
    accuracy_drop_points: float | None = None
    accuracy_drop_points_dense: float | None = None
    cross_entropy: float | None = None
    bytes: int = 0
    zstd_bytes: int | None = None
    load_ms: float | None = None
    peak_rss: int | None = None
    latencies: tuple[CandidateLatency, ...] = ()
    denormals: int = 0
    operators: dict[str, int] = Field(default_factory=dict)
    seconds: float = 0.0
    notes: tuple[str, ...] = ()

    @property
    def reduced_precision(self) -> bool:
        """Whether it is another function on purpose, so that its accuracy is judged and not float rounding."""
        return self.budget == "accuracy"


class Optimized(Artifact):
    """The candidates that raced, and which of them ships, and why. `statements` are what the user must know."""

    onnxruntime: str
    ships: str
    shipped: str
    proven: bool
    why: str
    operators_before: dict[str, int]
    candidates: tuple[Candidate, ...]
    statements: tuple[str, ...]

    @property
    def onnx(self) -> Path:
        """The file that ships."""
        return self.folder / self.ships

    @property
    def winner(self) -> Candidate:
        """The candidate that ships."""
        return next(candidate for candidate in self.candidates if candidate.name == self.shipped)


class Hop(BaseModel):
    """Parity of two neighbours in the chain, each figure that of its worst output and input.

    `judged` is False where reduced precision has a budget of its own.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    reference: str
    candidate: str
    passed: bool
    judged: bool = True
    max_abs: float | None
    mean_abs: float | None
    max_rel: float | None
    mean_rel: float | None
    top1_agreement: float | None
    top5_agreement: float | None = None
    ulp_p50: float | None = None
    ulp_p99: float | None = None
    cosine: float | None = None
    worst_feed: str
    feeds: int
    reasons: tuple[str, ...]


class Validated(Artifact):
    """The verdict on the shipped file, with every figure that it rests on; None is what could not be measured.

    `crashed` names the validators that broke off, and why. Such a stage is run again rather than reused.
    """

    verdict: Verdict
    hops: tuple[Hop, ...]
    dense_accuracy: float | None
    accuracy: float | None
    accuracy_drop_points: float | None
    accuracy_drop_low: float | None
    accuracy_drop_high: float | None
    dense_latency_ms: float | None
    latency_ms: float | None
    latency_p95_ms: float | None
    latency_p99_ms: float | None
    latency_ratio: float | None
    latency_ratio_low: float | None
    latency_ratio_high: float | None
    threads: int
    dense_bytes: int | None
    bytes: int | None
    dense_load_ms: float | None
    load_ms: float | None
    measurements: dict[str, Measured | None] = Field({}, description="all that a policy can limit, by key")
    notes: tuple[str, ...] = Field((), description="limits that were not judged, and disturbances of the measurement")
    complete: bool = Field(True, description="whether no validator broke off")
    crashed: dict[str, str] = Field({}, description="validators that broke off, and why")
    promoted: str = Field("", description="the version that was current when this one was measured")


@dataclass(frozen=True)
class Promoted:
    """The version that is current while another one is measured; without one, `version` is empty and `onnx` None."""

    version: str = ""
    onnx: Path | None = None
    sha256: str = ""
    macs: int | None = None
    params: int | None = None
