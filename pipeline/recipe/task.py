"""What the model is for, and which of its outputs count."""

from __future__ import annotations

from pydantic import Field

from pipeline.recipe.section import Section, file_digests


class TaskSection(Section):
    """What the model is for, and which of its outputs count."""

    name: str = Field(
        "auto",
        description="classification, regression, segmentation, ... (docs/tasks.md), path/to/file.py:callable, or "
        "auto: what targets and outputs show",
    )
    output: str | None = Field(None, description="name of the output that is judged, where the model has several")
    keep_outputs: bool = Field(True, description="whether outputs that the task does not read stay in the shipped file")

    def code(self) -> dict[str, str]:
        """The file of the user's own task -> its sha256."""
        return file_digests(self.name)
