"""A part of the recipe."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class Section(BaseModel):
    """A part of the recipe: immutable, unknown keys refused."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    def code(self) -> dict[str, str]:
        """The user's own files that this section names -> their sha256, since they decide the result, too."""
        return {}
