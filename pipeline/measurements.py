"""What was measured of a model and serves every version of it: kept beside the versions, by all that it depends on."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import filelock

from foundation.files import make_folder, replacing

FOLDER = "measured"
"""In a model's folder."""


@dataclass(frozen=True)
class Measurements:
    """A folder of JSON files, each with the digest of what it says; None: nothing is kept."""

    folder: Path | None = None

    def read(self, name: str, key: object) -> Any:
        """What was written under `name` for `key`; None where nothing was, or the file is not as it was written."""
        path = self._path(name, key)
        if path is None or not path.is_file():
            return None
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            return content["value"] if content["digest"] == _digest(content["value"]) else None
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def write(self, name: str, key: object, value: Any) -> None:
        """Keep `value`, plain JSON, in place of what was there. Raises StoreError."""
        path = self._path(name, key)
        if path is None:
            return
        make_folder(path.parent)
        with replacing(path) as part:
            part.write_text(json.dumps({"value": value, "digest": _digest(value)}), encoding="utf-8")

    @contextmanager
    def alone(self, name: str) -> Iterator[None]:
        """One run at a time measures under `name`, others wait: each would slow what the other one times. Raises
        StoreError where the folder cannot be made.
        """
        if self.folder is None:
            yield
            return
        make_folder(self.folder)
        with filelock.FileLock(self.folder / f".{name}.lock"):  # which the system frees where a run is killed
            yield

    def kept(self, name: str, key: object, make: Callable[[], Any]) -> Any:
        """What was written, else what `make` gives, which is written."""
        found = self.read(name, key)
        if found is None:
            found = make()
            self.write(name, key, found)
        return found

    def _path(self, name: str, key: object) -> Path | None:
        return None if self.folder is None else self.folder / f"{name}-{_digest(key)[:24]}.json"


def _digest(value: object) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
