"""What torch.onnx or onnxruntime take only in one of several equal forms is brought into that form (see `forms`)."""

from __future__ import annotations

from torch.export import ExportedProgram

from exporters.forms import FORMS
from foundation.editor import Editor


def translatable(program: ExportedProgram) -> ExportedProgram:
    """`program` in forms that torch.onnx translates: the same function of the same tensors.

    The program itself is not changed; without anything to change it is returned as it is.
    """
    _forget_pending(program)
    editor = Editor(program)
    changed = False
    for node in list(editor.graph.nodes):
        for form in FORMS:
            changed |= node.op == "call_function" and form(editor, node)
    return editor.finish() if changed else program


def _forget_pending(program: ExportedProgram) -> None:
    """A translation leaves sizes read off data noted as pending, and the next one in this process stops at them."""
    for node in program.graph.nodes:
        env = getattr(getattr(node.meta.get("val"), "fake_mode", None), "shape_env", None)
        if env is not None:
            env.pending_fresh_unbacked_symbols.clear()
            return
