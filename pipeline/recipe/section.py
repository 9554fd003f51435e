"""A part of the recipe."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator

from foundation.files import sha256

# Far more than any machine has or any run takes: what is beyond is a slip, and would break something deep inside.
Seed = Annotated[int, Field(ge=0, lt=2**63)]
Threads = Annotated[int, Field(ge=1, le=1024)]
BatchSize = Annotated[int, Field(ge=1, le=65_536)]
Seconds = Annotated[float, Field(gt=0, le=86_400, allow_inf_nan=False)]
Pixels = Annotated[int, Field(ge=1, le=65_536)]


class Section(BaseModel):
    """A part of the recipe: immutable, unknown keys refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _readable(cls, value: Any, info: ValidationInfo) -> Any:
        """No control characters in names and paths, which no file system and no terminal takes; and no true for 1."""
        kind = cls.model_fields[info.field_name].annotation if info.field_name else None
        if isinstance(value, bool) and bool not in (kind, *get_args(kind)):
            raise ValueError("must not be true or false")
        return readable(value)

    def code(self) -> dict[str, str]:
        """The user's own files that this section names -> their sha256, since they decide the result, too."""
        return {}


def file_digests(*specs: str | None) -> dict[str, str]:
    """Of each `file.py:callable` that is a file: the file -> its sha256."""
    files = (Path(spec.rpartition(":")[0]) for spec in specs if spec is not None and ":" in spec)
    return {str(file): sha256(file) for file in files if file.is_file()}


def readable(value: Any) -> Any:
    """`value`; ValueError for text with a control character in it."""
    if isinstance(value, str) and any(ord(letter) < 32 or ord(letter) == 127 for letter in value):
        raise ValueError("must hold no control characters")
    return value
