"""What makes an original-sized instance of a class the smaller one, as plain JSON with no code in it."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from foundation.errors import StoreError, first_line
from foundation.files import replacing

FILE = "structure.json"

Place = tuple[str | int, ...]
"""(module's name, attribute, index or name within that, ...)."""
Setting = int | tuple[int, ...]
"""What an attribute becomes: a number, or sizes where all were one number before."""


class Padding(BaseModel):
    """Of what a norm is given: `kept`, which of `size` channels in dimension `dim` (counted from the last) are left."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    dim: int
    size: int
    kept: tuple[int, ...]


class Structure(BaseModel):
    """Everything about the smaller module but its weights.

    `original`: whether it is an instance of the model's own class, whose `forward` computes the shrunk program; if not,
    it is the program. `why`: what was measured, or why not. `model`, `classes`, `input_size`, `seed`: how the dense
    model is built, as the recipe names it. `kind`: the class, as a dotted path. `shapes`: tensor -> its shape, where
    that is another one than in the dense model; a bias that was put in is among them. `biases`: the program's name of
    such a bias -> its name here. `kept`: tensor -> dimension -> what it has left, where that is more than in the
    program, since the class cannot do without. `numbers`: attributes that `forward` reads, and what they become.
    `padded`: norms that count channels which are gone.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: Literal["leanort-structure/1"] = "leanort-structure/1"
    original: bool
    why: str
    kind: str
    model: str = ""
    classes: int | None = None
    input_size: tuple[int, ...] | None = None
    seed: int = 0
    shapes: dict[str, tuple[int, ...]] = {}
    biases: dict[str, str] = {}
    kept: dict[str, dict[int, tuple[int, ...]]] = {}
    numbers: tuple[tuple[Place, Setting], ...] = ()
    padded: dict[str, Padding] = {}

    def write(self, folder: Path) -> None:
        """Write it into `folder`. Raises StoreError."""
        with replacing(folder / FILE) as part:
            part.write_text(self.model_dump_json(indent=1) + "\n", encoding="utf-8")

    @staticmethod
    def read(folder: Path) -> Structure:
        """What `write` wrote. Raises StoreError where there is none, or it is damaged."""
        try:
            return Structure.model_validate_json((folder / FILE).read_text(encoding="utf-8"))
        except (OSError, ValidationError, ValueError) as error:
            raise StoreError(
                f"{folder / FILE} does not say how the smaller model is made ({first_line(error)}).",
                "Versions made before there was such a file have none: deploy again.",
            ) from error

    def within(self, prefix: str) -> Structure:
        """The same for the submodule `prefix`, of which every name begins with `prefix.`."""

        def inner(name: str) -> str:
            return name.removeprefix(prefix).removeprefix(".")

        return self.model_copy(
            update={
                "shapes": {inner(name): shape for name, shape in self.shapes.items()},
                "kept": {inner(name): left for name, left in self.kept.items()},
                "biases": {name: inner(there) for name, there in self.biases.items()},
                "numbers": tuple(((inner(str(name)), *rest), value) for (name, *rest), value in self.numbers),
                "padded": {inner(name): one for name, one in self.padded.items()},
            }
        )
