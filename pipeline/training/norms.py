"""Batch norms whose statistics are those of the whole batch, of which each process has a part.

One process and several then compute the same. torch's own `SyncBatchNorm` does it on GPUs alone, and by another class
in the model's place. Here nothing of the model changes: while training runs, calls of `batch_norm` in training mode,
whoever makes them (a layer, a captured program, a function of the user's), are computed by `_GlobalNorm`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode


def over_processes() -> AbstractContextManager[object]:
    """The context in which batch norms in training mode see the batches of all processes."""
    return _Global()


class _Global(TorchFunctionMode):
    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        names = _CALLS.get(func)
        if names is not None:
            given = dict(zip(names, args, strict=False)) | dict(kwargs or {})
            if given.get("training"):
                return _GlobalNorm.apply(  # type: ignore[no-untyped-call]
                    given["input"],
                    given.get("weight"),
                    given.get("bias"),
                    given.get("running_mean"),
                    given.get("running_var"),
                    given.get("momentum", 0.1),
                    given.get("eps", 1e-5),
                )
        return func(*args, **(kwargs or {}))


_AS_TORCH = ("input", "weight", "bias", "running_mean", "running_var", "training", "momentum", "eps", "cudnn_enabled")
_CALLS: dict[Any, tuple[str, ...]] = {
    F.batch_norm: ("input", "running_mean", "running_var", "weight", "bias", "training", "momentum", "eps"),
    torch.batch_norm: _AS_TORCH,
    torch.ops.aten.batch_norm: _AS_TORCH,
    torch.ops.aten.batch_norm.default: _AS_TORCH,
}


class _GlobalNorm(torch.autograd.Function):
    """(input - mean) / std * weight + bias, per channel (dimension 1), by the moments of all processes' inputs.

    torch's own kernels do the passes over the data, as in evaluation with given statistics; what is added are the two
    sums per channel that training's gradient has beside it.
    """

    @staticmethod
    def forward(
        ctx: Any,
        given: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        momentum: float,
        eps: float,
    ) -> Tensor:
        wide = given if given.dtype in (torch.float32, torch.float64) else given.float()
        mean, var = torch.batch_norm_update_stats(wide, None, None, 0.0)  # a fifth of the time of `var_mean`
        rows = given.numel() // given.shape[1]
        own = torch.stack([mean, var, torch.full_like(mean, rows)]).double()
        all_own = [torch.empty_like(own) for _ in range(dist.get_world_size())]
        dist.all_gather(all_own, own)
        means, variances, counts = torch.stack(all_own).unbind(1)
        total = counts.sum(0)
        mean64 = (means * counts).sum(0) / total
        var64 = ((variances + (means - mean64) ** 2) * counts).sum(0) / total
        count = float(total[0])
        if running_mean is not None and running_var is not None:
            running_mean.lerp_(mean64.to(running_mean), momentum)
            running_var.lerp_((var64 * (count / max(count - 1, 1))).to(running_var), momentum)
        mean, var = mean64.to(mean), var64.to(var)
        scale = torch.ones_like(mean) if weight is None else weight
        ctx.save_for_backward(given, scale, mean, var)
        ctx.eps, ctx.count, ctx.learnt = eps, count, (weight is not None, bias is not None)
        return torch.native_batch_norm(given, scale, bias, mean, var, False, 0.0, eps)[0]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        given, scale, mean, var = ctx.saved_tensors
        found, by_scale, by_bias = torch.ops.aten.native_batch_norm_backward(
            grad.contiguous(memory_format=_format(given)),
            given,
            scale,
            mean,
            var,
            None,
            None,
            False,
            ctx.eps,
            [True] * 3,
        )
        sums = torch.stack([by_scale, by_bias])
        dist.all_reduce(sums)
        along, across = sums / ctx.count
        inverse = (var + ctx.eps).rsqrt()
        shape = [1, -1] + [1] * (given.dim() - 2)
        drift = given - mean.view(shape)
        drift.mul_((inverse * along).view(shape)).add_(across.view(shape)).mul_((scale * inverse).view(shape))
        has_scale, has_bias = ctx.learnt
        return found.sub_(drift), by_scale if has_scale else None, by_bias if has_bias else None, None, None, None, None


def _format(like: Tensor) -> torch.memory_format:
    channels_last = like.dim() == 4 and like.is_contiguous(memory_format=torch.channels_last)
    return torch.channels_last if channels_last and not like.is_contiguous() else torch.contiguous_format
