"""A transformers model behind positional tensors."""

from __future__ import annotations

from torch import Tensor, nn

from pipeline.models.calling import named


class NamedInputs(nn.Module):
    """Runs a transformers model on positional tensors, handed on by name; returns the logits, or else its output
    tensors by name.
    """

    def __init__(self, net: nn.Module, names: tuple[str, ...]) -> None:
        super().__init__()
        self.net = net
        self.names = names

    def forward(self, *values: Tensor) -> Tensor | dict[str, Tensor]:
        """Return logits (batch, classes), or the model's output tensors."""
        out = self.net(**dict(zip(self.names, values, strict=True)), return_dict=True)
        if isinstance(getattr(out, "logits", None), Tensor):
            return out.logits  # type: ignore[no-any-return]
        return named(out)
