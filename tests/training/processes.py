"""Several processes that train together on a CPU, through gloo."""

import multiprocessing
import os
import socket

import torch
import torch.distributed as dist

PRELOADED = ["small_doge.training.pretrain", "accelerate.commands.launch"]


def together(run, *args, environment=None, processes=2):
    """Call ``run(rank, *args)`` in each of some processes, a function that can be imported there.

    They are forked from a process that has imported what training needs, once for all tests: importing takes each
    longer than most runs.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    multiprocessing.set_forkserver_preload(PRELOADED)
    everything = {"WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    everything |= {"ACCELERATE_USE_CPU": "true", **(environment or {})}
    torch.multiprocessing.start_processes(_one, (everything, run, args), processes, start_method="forkserver")


def _one(rank, environment, run, args):
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), **environment}
    dist.init_process_group("gloo")
    run(rank, *args)
    dist.destroy_process_group()
