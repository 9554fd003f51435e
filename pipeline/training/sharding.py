"""FSDP 2: a model whose weights, gradients and optimizer state lie in pieces, one on each process.

What is in pieces is a copy, so that the model itself stays whole and plain on the CPU; it gets the weights at the end.
Outside of a step every number is asked for whole: checkpoints are the same as those of one process.
"""

from __future__ import annotations

import copy
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.utils import _pytree as pytree

T = TypeVar("T")
LEAST = 1 << 16
"""Weights of a block that is gathered by itself, when it runs; smaller ones are gathered with the whole model."""
_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)


def in_pieces(model: nn.Module, device: torch.device) -> nn.Module:
    """A copy of `model` on `device`, each process with a piece of every parameter."""
    made = copy.deepcopy(model)
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    for block in _blocks(made):
        fully_shard(block, mesh=mesh)
    fully_shard(made, mesh=mesh)
    return made


def _blocks(model: nn.Module) -> list[nn.Module]:
    """The outermost entries of containers that are large and share no weight with the rest.

    Containers themselves are none: who takes one apart never calls it, and what is not called is not gathered.
    """
    found: list[nn.Module] = []
    owners: dict[int, int] = {}
    for module in model.modules():
        for value in module._parameters.values():
            if value is not None:
                owners[id(value)] = owners.get(id(value), 0) + 1

    def look(module: nn.Module, *, entry: bool) -> None:
        own = list(module.parameters())
        inside = sum(value is not None for part in module.modules() for value in part._parameters.values())
        alone = sum(owners[id(value)] for value in own) == inside
        if entry and not isinstance(module, _CONTAINERS) and alone and sum(p.numel() for p in own) >= LEAST:
            found.append(module)
            return
        for child in module.children():
            look(child, entry=isinstance(module, _CONTAINERS))

    for child in model.children():
        look(child, entry=isinstance(model, _CONTAINERS))
    return found


def syncs(model: nn.Module, wanted: bool) -> None:
    """Whether the next backward pass exchanges gradients, or only adds them up."""
    assert isinstance(model, FSDPModule)
    model.set_requires_gradient_sync(wanted)


def whole(tree: T) -> T:
    """Tensors, or a tree of them, whole and on the CPU; every process has to ask."""
    made: T = pytree.tree_map_only(DTensor, lambda one: one.full_tensor().cpu(), tree)
    return made


def piece(value: Tensor, like: Tensor) -> Tensor:
    """This process's piece of a whole tensor where `like`, of the same shape, is in pieces."""
    if not isinstance(like, DTensor) or isinstance(value, DTensor) or value.shape != like.shape:
        return value
    mesh = like.device_mesh
    return distribute_tensor(value.to(mesh.device_type), mesh, like.placements, src_data_rank=None)
