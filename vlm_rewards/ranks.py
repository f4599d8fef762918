"""The processes of a torchrun: which share of the work is ours, and who writes."""

import os

import torch


def rank_and_world() -> tuple[int, int]:
    """This process's number and how many there are: 0 and 1 unless started by torchrun."""
    return int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))


def wait_for_all() -> None:
    """Return when every rank has come here; at once where there is only one."""
    if rank_and_world()[1] == 1:
        return
    if not torch.distributed.is_initialized():
        torch.distributed.init_process_group("gloo")
    torch.distributed.barrier()
