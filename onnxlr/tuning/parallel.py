"""Several processes that train one model, as `torchrun` starts them; without it, one."""

from __future__ import annotations

import os
from contextlib import contextmanager
from dataclasses import dataclass
from inspect import signature
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

if TYPE_CHECKING:
    from collections.abc import Iterator


@dataclass(frozen=True, slots=True)
class Processes:
    """All processes that train, as one of them sees them: its number, how many there are, and its own device."""

    rank: int
    size: int
    device: torch.device

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        """The sum of a tensor over all processes."""
        if self.size > 1:
            dist.all_reduce(values)
        return values

    def wrap(self, module: Any) -> Any:
        """The module as each process runs it: gradients are averaged over all of them."""
        if self.size == 1:
            return module
        parallel = torch.nn.parallel.DistributedDataParallel
        # buffers are constants; the second is the name that older torch has for it
        named = ("forward_sync_buffers", "broadcast_buffers")
        option = next(name for name in named if name in signature(parallel).parameters)
        return parallel(module, **{option: False})


def leads() -> bool:
    """Whether this process is the first of those that train, which writes what comes of it."""
    return os.environ.get("RANK", "0") == "0"


@contextmanager
def processes() -> Iterator[Processes]:
    """Join the processes that `torchrun` has started, for as long as the block runs.

    Each takes a GPU of its own where there are enough, with NCCL between them; otherwise the CPU, with Gloo.
    """
    size, rank, local = (int(os.environ.get(name, default)) for name, default in _VARIABLES)
    on_gpu = torch.cuda.is_available() and local < torch.cuda.device_count()
    device = torch.device("cuda", local) if on_gpu else torch.device("cpu")
    if size == 1:
        yield Processes(0, 1, device)
        return
    if on_gpu:
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if on_gpu else "gloo")
    try:
        yield Processes(rank, size, device)
    finally:
        dist.destroy_process_group()


_VARIABLES = (("WORLD_SIZE", "1"), ("RANK", "0"), ("LOCAL_RANK", "0"))
