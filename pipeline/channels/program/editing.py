"""An edit that does not fit together, in the engine's words: refused."""

from __future__ import annotations

from torch.export import ExportedProgram

from foundation.editor import Editor, ShapeError
from foundation.errors import RefusedError


def finished(editor: Editor) -> ExportedProgram:
    """The edited program. Raises RefusedError where the new shapes do not fit together."""
    try:
        return editor.finish()
    except ShapeError as error:
        raise RefusedError(
            f"The shrunk graph does not fit together at '{error.node}' ({error.reason}).",
            "Report the model; nothing was removed.",
        ) from error
