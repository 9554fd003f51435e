"""Programs on disk, written by `torch.export.save` and read again without running anything that the file says.

`torch.export.load` trusts its file: it unpickles sample inputs and whatever tensor calls itself pickled, loads compiled
code, looks operators up by any dotted path below `torch`, hands shape expressions to `sympy.sympify` and guards to
`exec`, and writes names into generated source. A version folder may be a copy, a cache or a download, so an archive is
held against what our own writer makes; anything else is refused, and torch gets a fresh archive of the checked members.
"""

from __future__ import annotations

import ast
import contextlib
import io
import json
import logging
import re
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from foundation.errors import StoreError
from foundation.files import TENSOR_NAME, replacing

if TYPE_CHECKING:
    from torch.export import ExportedProgram

_MODEL = "models/model.json"
_SAMPLES = "data/sample_inputs/model.pt"
_CONFIGS = ("data/weights/model_weights_config.json", "data/constants/model_constants_config.json")
_MEMBER = re.compile(
    r"archive_format|archive_version|byteorder|version|\.data/version|\.data/serialization_id|\.format_version"
    r"|\.storage_alignment|models/model\.json|data/sample_inputs/model\.pt|data/weights/model_weights_config\.json"
    r"|data/constants/model_constants_config\.json|data/weights/weight_\d+|data/constants/tensor_\d+"
)
"""Everything that our writer puts into an archive, below its one top folder."""

_OPERATOR = re.compile(
    r"torch\.ops\.(aten|prims|torchvision|higher_order)\.\w+(\.\w+)?"
    r"|_operator\.(getitem|add|sub|mul|floordiv|truediv|mod|pow|neg|pos|abs|eq|ne|lt|le|gt|ge|and_|or_|xor|inv|invert|not_)"
    r"|torch\.(sym_\w+|_sym_\w+)|math\.\w+"
)
_FILE_OPERATOR = re.compile(r"torch\.ops\.aten\.(from_file|_print)\b")
_WORD = TENSOR_NAME
_NAME = re.compile(r"[\w.]*", re.ASCII)
"""Names, which may end up in generated source: nothing that could end an identifier there and begin a call."""
_FUNCTION = re.compile(
    r"Max|Min|Mod|PythonMod|FloorDiv|CeilDiv|CleanDiv|IntTrueDiv|FloatTrueDiv|ModularIndexing|Where|Abs|Pow"
    r"|PowByNatural|FloatPow|TruncToInt|TruncToFloat|RoundToInt|RoundDecimal|CeilToInt|FloorToInt|ToFloat"
    r"|Identity|LShift|RShift|Add|Mul|Symbol|Integer|Float|Rational|Equality|Unequality|StrictLessThan"
    r"|LessThan|StrictGreaterThan|GreaterThan|Eq|Ne|Lt|Le|Gt|Ge|And|Or|Not|ceiling|floor|true|false|oo"
    r"|int_oo"
)
"""What shape expressions are made of: the functions of torch.utils._sympy.functions, and sympy's own."""
_SYMBOL = re.compile(r"[a-z]{1,4}\d+")
_NUMBER = re.compile(r"[\d.]+(e[+-]?\d+)?")
_FREE_TEXT = frozenset({"stack_trace", "nn_module_stack", "torch_fn", "source_fn_stack", "as_string", "as_strings"})
"""Kept as text, never looked up and never source: where a node came from, and texts as arguments (`repr` in source)."""


def faults(path: Path | io.BytesIO) -> list[str]:
    """Why the program in `path` is not read, in plain words; empty where every member is one that our writer makes.

    `path` may also be the file's content. Needs no torch. A file that is no archive at all is a fault, too.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            return _faults(archive)
    except (OSError, zipfile.BadZipFile, ValueError, KeyError, RecursionError, NotImplementedError) as error:
        return [f"it cannot be read as an archive ({type(error).__name__})"]


def write(program: ExportedProgram, path: Path) -> None:
    """Save a program without its sample inputs, which torch could only unpickle. Raises StoreError for one that
    `read` would refuse, so that it shows at once.
    """
    import torch

    buffer = io.BytesIO()
    torch.export.save(program, buffer)
    with zipfile.ZipFile(buffer) as archive:
        content = _rewritten(archive)
    with replacing(path, durable=False) as partial:  # whole or not at all; it is synced when its version is sealed
        partial.write_bytes(content)
    if found := faults(path):
        raise StoreError(f"{path.name} cannot be stored safely: {found[0]}.", "Please report the model.")


def read(path: Path) -> ExportedProgram:
    """The program in `path`, as it was written. Raises StoreError where it holds anything but a program."""
    import torch

    # What is checked and what is loaded are the same bytes, whatever happens to the file in between.
    content = io.BytesIO(path.read_bytes() if path.is_file() else b"")
    if found := faults(content):
        raise StoreError(
            f"{path} is not loaded, since it is not what was written here: {found[0]}.",
            "Remove that version and deploy again; do not load the file by other means.",
        )
    with zipfile.ZipFile(content) as archive, _quiet("torch._export.serde.serialize"):
        return torch.export.load(io.BytesIO(_rewritten(archive)))


@contextlib.contextmanager
def _quiet(name: str) -> Iterator[None]:
    """Without a logger's warnings: torch's reader warns of every size that the data decide."""
    logger = logging.getLogger(name)
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def _faults(archive: zipfile.ZipFile) -> list[str]:
    names = archive.namelist()
    tops = {name.partition("/")[0] for name in names}
    members = [name.partition("/")[2] for name in names]
    if len(tops) != 1 or len(set(names)) != len(names):
        return ["its members are not each there once, below one folder"]
    if strange := [name for name in members if not _MEMBER.fullmatch(name)]:
        return [f"it holds {strange[0][:80]!r}, which no program needs"]
    if packed := [info.filename for info in archive.infolist() if info.compress_type != zipfile.ZIP_STORED]:
        return [f"it holds {packed[0][:80]!r} compressed, which our writer does not do"]
    if missing := [name for name in (_MODEL, *_CONFIGS) if name not in members]:
        return [f"it holds no {missing[0]}"]
    (top,) = tops
    if _SAMPLES in members and archive.getinfo(f"{top}/{_SAMPLES}").file_size:
        return ["it holds pickled sample inputs"]
    found: list[str] = []
    for config in _CONFIGS:
        found += _payload_faults(json.loads(archive.read(f"{top}/{config}")), config)
    model = json.loads(archive.read(f"{top}/{_MODEL}"))
    return found or list(_model_faults(model))


def _payload_faults(config: Any, name: str) -> Iterator[str]:
    for key, payload in config["config"].items():
        if payload["use_pickle"] is not False:
            yield f"{name} asks to unpickle {key[:80]!r}"
        elif not _WORD.fullmatch(key) or not re.fullmatch(r"(weight|tensor)_\d+", payload["path_name"]):
            yield f"{name} names {key[:80]!r} or its file in a way that no program does"


def _model_faults(model: Any) -> Iterator[str]:
    if model.get("guards_code"):
        yield "its graph holds guards, which would be run as code"
    yield from _value_faults(model, "")


def _value_faults(value: Any, key: str) -> Iterator[str]:
    """Walk the graph's JSON; every string must be of the kind that its key calls for."""
    if isinstance(value, dict):
        for name, inner in value.items():
            if not _WORD.fullmatch(name) and key != "range_constraints":
                yield f"its graph names something {name[:80]!r}"
            elif key == "range_constraints" and not _is_expression(name):
                yield f"its graph bounds {name[:80]!r}, which is no size"
            else:
                yield from _value_faults(inner, name)
    elif isinstance(value, list):
        for inner in value:
            yield from _value_faults(inner, key)
    elif isinstance(value, str):
        yield from _text_faults(value, key)


def _text_faults(text: str, key: str) -> Iterator[str]:
    if key in _FREE_TEXT:
        return
    if key in ("target", "as_operator"):
        if not _OPERATOR.fullmatch(text) or _FILE_OPERATOR.match(text):
            yield f"its graph calls {text[:80]!r}, which is no tensor operator"
    elif key == "expr_str":
        if not _is_expression(text):
            yield f"its graph holds {text[:80]!r} where a size should be"
    elif key in ("in_spec", "out_spec"):
        if not _is_tree(text):
            yield f"its graph nests inputs or outputs in {text[:80]!r}"
    elif not (_NAME if key == "name" else _WORD).fullmatch(text):
        yield f"its graph holds the text {text[:80]!r} where a name should be"


def _is_expression(text: str) -> bool:
    """Whether a shape expression is made of sizes, numbers and known functions alone."""
    if len(text) > 10_000:
        return False
    try:
        tree = ast.parse(text, mode="eval")
    except (SyntaxError, ValueError, MemoryError, RecursionError):
        return False
    plain = (ast.Expression, ast.BinOp, ast.UnaryOp, ast.BoolOp, ast.Compare, ast.Load, ast.keyword)
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            if not isinstance(node.func, ast.Name) or not _FUNCTION.fullmatch(node.func.id):
                return False
        elif isinstance(node, ast.Name):
            if not _FUNCTION.fullmatch(node.id) and not _SYMBOL.fullmatch(node.id):
                return False
        elif isinstance(node, ast.Constant):
            # Texts are what Symbol('s77') and Float('0.5') take; True and False are what they assume.
            named = isinstance(node.value, str) and (_SYMBOL.fullmatch(node.value) or _NUMBER.fullmatch(node.value))
            if not isinstance(node.value, int | float) and not named:
                return False
        elif not isinstance(node, (*plain, ast.operator, ast.unaryop, ast.boolop, ast.cmpop)):
            return False
    return True


def _is_tree(text: str) -> bool:
    """Whether inputs and outputs are nested in what needs nothing imported by name.

    torch looks types up among those that are registered already; only defaultdicts and enumerations are imported.
    """
    if not text:
        return True
    _protocol, spec = json.loads(text)
    waiting = [spec]
    while waiting:
        node = waiting.pop()
        if node["type"] == "collections.defaultdict" or not _WORD.fullmatch(node["type"] or ""):
            return False
        context = node["context"]
        if isinstance(context, str) and ("__enum__" in context or not _is_plain(json.loads(context))):
            return False
        waiting += node["children_spec"]
    return True


def _is_plain(context: Any) -> bool:
    keys = context if isinstance(context, list) else [context]
    return all(key is None or isinstance(key, str | int | float | bool) for key in keys)


def _rewritten(archive: zipfile.ZipFile) -> bytes:
    """The same members in a new archive, without sample inputs and guards: whatever else lay in the file, and any other
    way to read its directory, stays behind.
    """
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED) as fresh:
        for info in archive.infolist():
            content = archive.read(info)
            if info.filename.endswith(_SAMPLES):
                content = b""
            elif info.filename.endswith(_MODEL):
                model = json.loads(content)
                model["guards_code"] = []
                content = json.dumps(model).encode()
            fresh.writestr(zipfile.ZipInfo(info.filename), content)  # a fixed date: same program, same bytes
    return buffer.getvalue()
