"""Where the dense model comes from."""

from __future__ import annotations

from pydantic import Field, field_validator, model_validator

from foundation import checkpoints
from pipeline.recipe.section import Seconds, Section, Seed, Threads, file_digests
from pipeline.recipe.train import Loop, Training, own_loop


class BaselineSection(Section):
    """Stage 0: the dense model."""

    weights: str = Field(
        "auto", description="a checkpoint (FILE or FILE#PART), 'pretrained', 'train', or 'auto' = train here"
    )
    train: Training = Field(None, description="how to train here; what is left out is chosen from the model")
    loop: Loop = None
    opset: int = Field(23, ge=18, le=1000, description="ONNX opset of the dense reference file")
    threads: Threads = Field(1, description="onnxruntime threads for the dense latency")
    seconds: Seconds = Field(2.0, description="time for measuring the dense latency")
    seed: Seed = 0

    def code(self) -> dict[str, str]:
        """Each file of the checkpoint, or of an own loop -> its sha256: another file under the same name is another
        dense model.
        """
        if self.weights in ("auto", "train", "pretrained"):
            return file_digests(self.loop)
        return checkpoints.digests(self.weights)

    _own_loop = model_validator(mode="before")(own_loop)

    @field_validator("weights")
    @classmethod
    def _not_empty(cls, value: str) -> str:
        return value or "auto"
