"""Transformer blocks as the fused operators of onnxruntime, and an audit of how much of the attention was fused.

`onnxruntime.transformers` takes one number of heads for a whole model, which pruning makes wrong for most layers; given
none, it reads the number from each layer's own reshape. It works on patterns, so a graph from another exporter can be
missed without a word: the audit counts what is there instead.
"""

from __future__ import annotations

import io
from collections.abc import Mapping
from contextlib import redirect_stdout
from pathlib import Path

import onnx
from pydantic import BaseModel, ConfigDict
from torch.export import ExportedProgram

from exporters.atomic import staged
from exporters.quiet import quiet
from exporters.summary import OnnxSummary, describe, domains
from exporters.to_ort import load, session_options
from foundation.errors import ExportError, first_line

# Operators that compute a whole attention: the standard's (opset 23) and onnxruntime's own.
ATTENTION = (
    "Attention",
    "com.microsoft:Attention",
    "com.microsoft:MultiHeadAttention",
    "com.microsoft:PackedAttention",
)


class FusedFile(BaseModel):
    """A fused model: where it lies, and how many of which operators `onnxruntime.transformers` made."""

    model_config = ConfigDict(frozen=True)

    path: Path
    fused: dict[str, int]
    notes: tuple[str, ...]
    summary: OnnxSummary


def fuse(src: Path, dst: Path) -> FusedFile:
    """Write the ONNX model `src` to `dst` with its transformer blocks fused, whole or not at all. Metadata is kept.

    Raises ExportError when `src` is no ONNX model, the tool fails, or onnxruntime cannot load the result.
    """
    from onnxruntime.transformers.optimizer import optimize_model  # slow to import, and raced only where asked for

    src, dst = Path(src), Path(dst)
    before = describe(src)
    images = any(len(spec.shape) == 4 for spec in before.inputs)
    printed = io.StringIO()  # its shape inference prints where it gives up
    with staged(dst) as folder, quiet("onnxruntime", "fusion_base", "") as said, redirect_stdout(printed):
        part = folder / dst.name
        try:
            # num_heads=0: each layer's own, read from its reshape. opt_level=0: nothing but these fusions.
            made = optimize_model(
                str(src), model_type="vit" if images else "bert", num_heads=0, hidden_size=0, opt_level=0
            ).model
        except Exception as error:  # the tool matches patterns in whatever graph it is given
            raise ExportError(f"onnxruntime.transformers cannot optimise {src.name}: {first_line(error)}") from error
        used = domains(made) | {""}
        kept = [entry for entry in made.opset_import if entry.domain in used]
        del made.opset_import[:]
        made.opset_import.extend(kept)
        onnx.helper.set_model_props(made, before.metadata)
        if before.external_files:
            onnx.save(made, part, save_as_external_data=True, location=f"{dst.name}.data")
        else:
            part.write_bytes(made.SerializeToString(deterministic=True))
        load(part, session_options(1))
    after = describe(dst)
    fused = {
        name.removeprefix("com.microsoft:"): count - before.operators.get(name, 0)
        for name, count in after.operators.items()
        if name not in before.operators and name.startswith("com.microsoft:")
    }
    said += [line for line in printed.getvalue().splitlines() if line.strip()]
    return FusedFile(path=dst, fused=fused, notes=tuple(dict.fromkeys(said)), summary=after)


def expected_attention(program: ExportedProgram) -> int:
    """How many attentions the program computes by PyTorch's fused function; hand-written ones are not counted."""
    return sum(
        node.op == "call_function" and "scaled_dot_product" in str(node.target)
        for module in program.graph_module.modules()
        for node in getattr(getattr(module, "graph", None), "nodes", ())
    )


def fused_attention(operators: Mapping[str, int]) -> int:
    """How many attentions are one operator in a file with these operators."""
    return sum(operators.get(name, 0) for name in ATTENTION)
