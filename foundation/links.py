"""Model files whose weights are links, as Hugging Face's cache keeps them: given as plain files.

`snapshots/COMMIT/model.onnx` and `model.onnx_data` are links into a folder of blobs that are named by their hashes.
onnx refuses external weights that are links, and onnxruntime those whose target is in another folder than the model.
Whoever made the links chose their targets; a name inside of a model file must stay in the model's folder all the same.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import onnx
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]


def leaves(folder: Path, name: str) -> bool:
    """Whether the name of a file that a model in `folder` gives points outside of that folder."""
    parts = Path(name).parts
    if Path(name).is_absolute() or ".." in parts or not parts or "\0" in name:
        return True
    # A folder on the way that is a link could lead anywhere; the file itself may be one.
    return any((folder / Path(*parts[:depth])).is_symlink() for depth in range(1, len(parts)))


@contextmanager
def plain_files(model: Path) -> Iterator[Path]:
    """A path of the ONNX file `model` at which the files that hold its weights are no links.

    That is `model` itself where none is one; else a file of a temporary folder that is gone afterwards, with hard
    links where the file system allows, and copies where it does not. It is `model` as well where it cannot be read,
    or names a file that leaves its folder or is missing: whoever opens it says so.
    """
    names = beside(model)
    linked = any((model.parent / name).is_symlink() for name in names if not leaves(model.parent, name))
    sound = all(not leaves(model.parent, name) and (model.parent / name).is_file() for name in names)
    if not (linked and sound):
        yield model
        return
    with tempfile.TemporaryDirectory(prefix="leanort-") as folder:
        for name in (model.name, *names):
            source, made = (model.parent / name).resolve(), Path(folder) / name
            made.parent.mkdir(parents=True, exist_ok=True)
            try:
                os.link(source, made)
            except OSError:  # another file system, or somebody else's file
                shutil.copyfile(source, made)
        yield Path(folder) / model.name


def load_whole(path: Path) -> onnx.ModelProto:
    """The ONNX model at `path` with all weights in memory, whether their files are links or not.

    onnx itself refuses symbolic links, and hard ones too. Raises ValueError for a name that leaves the model's folder
    or weights that are cut off, OSError and protobuf's DecodeError for what cannot be read.
    """
    model = onnx.load(path, load_external_data=False)
    for tensor in _tensors(model.graph):
        if tensor.data_location != onnx.TensorProto.EXTERNAL:
            continue
        entries = {entry.key: entry.value for entry in tensor.external_data}
        name = entries.get("location", "")
        if leaves(path.parent, name):
            raise ValueError(f"{path} points to weights outside its folder ({name})")
        with (path.parent / name).open("rb") as file:
            file.seek(int(entries.get("offset", 0)))
            wanted = int(entries["length"]) if "length" in entries else -1
            tensor.raw_data = file.read(wanted)
        if len(tensor.raw_data) < wanted:
            raise ValueError(f"{path} needs {wanted} bytes of {name}, which has fewer")
        tensor.data_location = onnx.TensorProto.DEFAULT
        del tensor.external_data[:]
    return model


def beside(model: Path) -> list[str]:
    """The names of the files that hold weights of `model`; none where it cannot be read."""
    if model.suffix == ".ort":
        return []
    try:
        graph = onnx.load(model, load_external_data=False).graph
    except (OSError, ValueError, DecodeError):
        return []
    return sorted({entry.value for held in _tensors(graph) for entry in held.external_data if entry.key == "location"})


def _tensors(graph: onnx.GraphProto) -> Iterator[onnx.TensorProto]:
    """Every tensor of a graph that may lie in another file, subgraphs included."""
    yield from graph.initializer
    for node in graph.node:
        for attribute in node.attribute:
            yield from (attribute.t, *attribute.tensors)
            for inner in (attribute.g, *attribute.graphs):
                yield from _tensors(inner)
