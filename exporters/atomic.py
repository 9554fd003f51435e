"""Files that appear whole or not at all."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from foundation.errors import ExportError
from foundation.files import sync


@contextmanager
def staged(path: Path) -> Iterator[Path]:
    """Write `path` and its side files into the yielded folder; they move beside `path` when the block ends well.

    `path` itself moves last, so whoever sees it sees its side files too. When the block raises, nothing has changed.
    Raises ExportError where the disk or the folder refuses.
    """
    folder: Path | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".partial", dir=path.parent))
        yield folder
        for made in sorted(folder.iterdir(), key=lambda made: made.name == path.name):
            sync(made)
            made.chmod(0o644)
            made.replace(path.parent / made.name)
        sync(path.parent)
    except OSError as error:
        reason = error.strerror or str(error)
        raise ExportError(f"{path} cannot be written: {reason}.", "Check its rights and free space.") from error
    finally:
        if folder is not None:
            shutil.rmtree(folder, ignore_errors=True)
