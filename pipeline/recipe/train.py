"""How to train and to recover."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, PlainSerializer, model_validator

from pipeline.recipe.section import BatchSize, Seconds, Section, Seed, file_digests


class TrainSettings(BaseModel):
    """How to train; unknown keys are refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    epochs: int = Field(default=8, ge=0, le=1_000_000, description="passes over the training part")
    batch_size: BatchSize = Field(default=64)
    lr: float = Field(default=2e-3, gt=0, description="learning rate at the top of the schedule")
    optimizer: Literal["sgd", "adamw"] = Field(default="adamw", description="sgd has Nesterov momentum")
    momentum: float = Field(default=0.9, ge=0, lt=1, description="of sgd; for adamw the first beta")
    weight_decay: float = Field(
        default=0.05, ge=0, description="of matrices and kernels; never of norms, biases and orthogonal weights"
    )
    schedule: Literal["onecycle", "cosine", "constant"] = Field(default="onecycle", description="of the learning rate")
    warmup: float = Field(default=0.25, ge=0, lt=1, description="share of the steps in which the learning rate rises")
    label_smoothing: float = Field(default=0.1, ge=0, lt=1)
    distill_weight: float = Field(default=0.0, ge=0, le=1, description="share of the loss taught by the dense model")
    distill_temperature: float = Field(default=2.0, gt=0, description="softens teacher and student alike")
    grad_clip: float = Field(default=1.0, ge=0, description="largest norm of the gradient; 0 = no limit")
    augment: bool = Field(default=True, description="change training images a little, where the data set says how")
    seed: Seed = 0
    threads: int = Field(
        default=0, ge=0, le=1024, description="torch threads; 0 leaves them as they are. Results depend on it"
    )
    channels_last: bool = Field(default=False, description="memory layout (batch, height, width, channels)")
    device: str = Field(
        default="auto", pattern=r"^(auto|cpu|mps|cuda|cuda:[0-9]{1,3})$", description="auto: a GPU where there is one"
    )
    precision: Literal["float32", "bf16", "fp16"] = Field(
        default="float32", description="of forward and backward pass; weights, losses and scores are float32 always"
    )
    accumulate: int = Field(
        default=1, ge=1, le=65_536, description="parts that a batch is taken in, gradients added up: less memory"
    )
    tracker: Literal["tensorboard", "mlflow", "wandb", "trackio"] | None = Field(
        default=None, description="where the figures of each epoch are shown, too"
    )


# Only what was set is written out and fingerprinted: the rest is chosen from the model, and another choice.
Training = Annotated[
    TrainSettings | None,
    PlainSerializer(lambda given: given.model_dump(exclude_unset=True) if given else None, return_type=dict | None),
]


Loop = Annotated[
    str | None, Field(description="a training loop of your own in place of ours: file.py:callable (docs/training.md)")
]


def own_loop(values: Any) -> Any:
    """`train = "file.py:fit"` as what it is: the name of a loop, and no settings."""
    if isinstance(values, dict) and isinstance(values.get("train"), str):
        if "loop" in values:
            raise ValueError("train and loop both name a loop")
        return {key: value for key, value in values.items() if key != "train"} | {"loop": values["train"]}
    return values


class FinetuneSection(Section):
    """Stage 2: recovery under the masks."""

    recover: Literal["none", "closed-form", "train"] = Field(
        "train",
        description="none; closed-form: fit the weights, no labels; train: that, then as much training as helps",
    )
    samples: int = Field(
        2000, ge=10, le=1_000_000, description="images of the training part that the closed form is fitted on"
    )
    epochs: int | None = Field(
        None, ge=0, le=1_000_000, description="chosen from the model when left out; 0 trains nothing"
    )
    seconds: Seconds | None = Field(
        None, description="time for training, on this machine: no more epochs than it pays for"
    )
    distill_weight: float | None = Field(
        None, ge=0.0, le=1.0, description="share of the loss taught by the dense model; 0.5, or 1 without labels"
    )
    distill_temperature: float = Field(2.0, gt=0.0)
    train: Training = Field(None, description="any other setting of the training; wins over the three above")
    loop: Loop = None
    seed: Seed = 0

    _own_loop = model_validator(mode="before")(own_loop)

    def code(self) -> dict[str, str]:
        """The file of an own loop -> its sha256."""
        return file_digests(self.loop)
