"""Makes `import torchvision` work beside a CPU build of torch, for whoever imports it after this module.

The wheel on the package index is compiled against CUDA. Beside a CPU torch its operator library cannot be loaded, and
`import torchvision` dies with "operator torchvision::nms does not exist", because two fake kernels are registered for
operators that were never declared. Declaring those two schemas is all that is missing. It is done when torchvision is
being imported and not before. Where the library does load (a matching torchvision, CPU or CUDA), nothing is declared.
The operators themselves stay away: who calls one is told by torchvision that its build does not fit torch's.

Run as a script, it puts a copy of itself into the virtual environment, which every Python there reads as it starts, so
that users' own scripts get the same; `make setup` does so. For that it imports nothing but `sys` until it is needed.
"""

import sys

TYPE_CHECKING = False  # as typing has it, whose import would cost every start of Python some milliseconds
if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from importlib.machinery import ModuleSpec
    from types import ModuleType
    from typing import Any

    import torch

COPY = "leanort_torchvision_operators"
"""Name of the copy in an environment, of the module and of the file that has it read."""
_SCHEMA = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
_declared: "list[torch.library.Library]" = []
"""Operators stay declared as long as their library is held."""


class BeforeTorchvision:
    """A finder of modules that finds nothing itself: it lets the others find torchvision, and declares its missing
    operators just before the module is run. To ask whether torchvision is there, as many libraries do, runs nothing.
    """

    def find_spec(
        self, name: str, path: "Sequence[str] | None" = None, target: "ModuleType | None" = None
    ) -> "ModuleSpec | None":
        """What the other finders say of torchvision; None for any other module."""
        if name != "torchvision":
            return None
        for finder in sys.meta_path:
            find = None if finder is self else getattr(finder, "find_spec", None)
            spec: ModuleSpec | None = find(name, path, target) if find is not None else None
            if spec is not None:
                _declare_before_it_runs(spec)
                return spec
        return None


def _declare_before_it_runs(spec: "ModuleSpec") -> None:
    loader: Any = spec.loader
    run = getattr(loader, "exec_module", None)
    if run is None:
        return

    def declare_and_run(module: "ModuleType") -> None:
        declare_missing_operators(spec.submodule_search_locations or ())
        run(module)

    # Of this loader alone, which stays of its kind for all who look at it. One that takes no attributes is left as it
    # is: torchvision is imported as it would be without us.
    if hasattr(loader, "__dict__"):
        loader.exec_module = declare_and_run


def declare_missing_operators(folders: "Iterable[str]") -> bool:
    """Declare `nms` and `qnms` if the operator library in `folders` (torchvision's own) cannot; whether that was so."""
    from importlib.machinery import EXTENSION_SUFFIXES
    from pathlib import Path

    import torch

    if hasattr(torch.ops.torchvision, "nms"):
        return False
    files = (Path(folder) / f"_C{suffix}" for folder in folders for suffix in EXTENSION_SUFFIXES)
    path = next((file for file in files if file.exists()), None)
    if path is not None:
        try:
            # torchvision loads the same file again, which is harmless.
            torch.ops.load_library(path)  # type: ignore[no-untyped-call]
        except OSError:
            pass  # built against another torch
        else:
            return False
    library = torch.library.Library("torchvision", "DEF")  # type: ignore[no-untyped-call]
    for operator in ("nms", "qnms"):
        library.define(f"{operator}{_SCHEMA}")  # type: ignore[no-untyped-call]
    _declared.append(library)
    return True


def put_into_environment() -> None:
    """Copy this file to where this Python keeps its libraries, and have it read at every start; once is enough.

    Raises SystemExit outside a virtual environment, which is not ours to change.
    """
    import py_compile
    import sysconfig
    from pathlib import Path

    if sys.prefix == sys.base_prefix:
        raise SystemExit(f"error: {sys.executable} is of no virtual environment.\n  -> run it by one's own python")
    libraries = Path(sysconfig.get_path("purelib"))
    # The module first, so that no Python that starts in between looks for it in vain.
    for suffix, text in ((".py", Path(__file__).read_text(encoding="utf-8")), (".pth", f"import {COPY}\n")):
        file = libraries / f"{COPY}{suffix}"
        if not file.exists() or file.read_text(encoding="utf-8") != text:
            file.write_text(text, encoding="utf-8")
            if suffix == ".py":  # an environment that may not be written to would compile it at every start
                py_compile.compile(str(file), doraise=True)


if __name__ == "__main__":
    put_into_environment()
# The copy in the environment may have been first; two would ask each other for ever.
elif not any(type(finder).__name__ == BeforeTorchvision.__name__ for finder in sys.meta_path):
    sys.meta_path.insert(0, BeforeTorchvision())
