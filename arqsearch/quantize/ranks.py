"""Training on several processes started by ``torchrun``: each takes its share of every batch.

Gradients are averaged after every step, so all ranks hold the same weights; running statistics of batch norm are
averaged when they are frozen, saved or used. One process is rank 0 of 1 and pays nothing.
"""

from __future__ import annotations

import atexit
import os
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Ranks:
    """This process among those of one training.

    :param rank: 0 .. size − 1; rank 0 writes files.
    :param size: number of processes.
    """

    rank: int = 0
    size: int = 1

    @staticmethod
    def described() -> Ranks:
        """What ``torchrun`` says in the environment, without joining."""
        return Ranks(int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1")))

    @staticmethod
    def current() -> Ranks:
        """Join the group that ``torchrun`` describes in the environment, once; a lone process is a group of its own."""
        found = Ranks.described()
        if found.size == 1:
            return Ranks()
        if not torch.distributed.is_initialized():
            if torch.cuda.is_available():
                torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
            torch.distributed.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
            # Left to the interpreter's end, gloo's threads may outlive what they use, and the process aborts.
            atexit.register(leave)
        return found

    @property
    def first(self) -> bool:
        """Whether this process writes files and shows progress."""
        return self.rank == 0

    def share(self, batch: Tensor) -> Tensor:
        """This process's part of a batch; parts differ by one image at most."""
        return batch if self.size == 1 else batch.tensor_split(self.size)[self.rank]

    def average(self, tensors: list[Tensor]) -> None:
        """Replace each floating-point tensor by its mean over all processes."""
        if self.size == 1 or not tensors:
            return
        flat = torch.cat([tensor.flatten().float() for tensor in tensors])
        torch.distributed.all_reduce(flat)
        flat /= self.size
        for tensor, part in zip(tensors, torch.split(flat, [t.numel() for t in tensors]), strict=True):
            tensor.copy_(part.view_as(tensor))

    def average_gradients(self, net: nn.Module) -> None:
        """Average the gradients of all parameters that have one."""
        if self.size > 1:
            self.average([p.grad for p in net.parameters() if p.grad is not None])

    def average_statistics(self, net: nn.Module) -> None:
        """Average running statistics, so that every process ends with the same network."""
        if self.size > 1:
            with torch.no_grad():
                self.average([b for b in net.buffers() if b.is_floating_point()])

    def copy_first(self, net: nn.Module) -> None:
        """Give every process the parameters and buffers of rank 0."""
        if self.size > 1:
            with torch.no_grad():
                for tensor in (*net.parameters(), *net.buffers()):
                    torch.distributed.broadcast(tensor, 0)

    def wait(self) -> None:
        """Wait until every process is here."""
        if self.size > 1:
            torch.distributed.barrier()


def leave() -> None:
    """Leave the group, once all processes are done with it; nothing happens where there is none."""
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
