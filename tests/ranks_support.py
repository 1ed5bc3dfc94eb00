"""Ranks as processes of their own, over gloo or NCCL, each of which runs one function."""

import contextlib
import datetime
import gc
import importlib
import os
import signal
import subprocess
import sys

import torch
import torch.distributed as dist

from merge_attn_states import _direct

SHARED = "shared"  # of devices: GPUs, each of several ranks

# What hangs is an error that says where: of a group, and of a direct merge.
LIMIT, DIRECT_LIMIT = datetime.timedelta(seconds=120), datetime.timedelta(seconds=40)


def run(program, ranks, tmp_path, environment, device="cpu", killed=()):
    """Call program(rank, ranks, device) on all; each must end in order, but who is to be killed."""
    where = program.__module__, program.__name__
    command = [sys.executable, __file__, *where, str(ranks), str(tmp_path / "store"), device]
    logs = [tmp_path / f"{rank}.log" for rank in range(ranks)]
    due = [-signal.SIGKILL if rank in killed else 0 for rank in range(ranks)]
    with contextlib.ExitStack() as stack:
        processes = []
        for rank, log in enumerate(logs):
            process = subprocess.Popen(
                [*command, str(rank)],
                env=environment | {"OMP_NUM_THREADS": "1"},
                stdout=stack.enter_context(log.open("w")),
                stderr=subprocess.STDOUT,
            )
            stack.callback(process.kill)
            processes.append(process)
        ended = [process.wait(timeout=300) for process in processes]
    assert ended == due, "\n".join(log.read_text() for log in logs)


def main(module, program, ranks, store, device, rank):
    ranks, rank = int(ranks), int(rank)
    programs = importlib.import_module(module)  # first: from here on ranks are in step
    backend = "nccl" if device == "cuda" else "gloo"  # NCCL has a GPU for each rank
    if device in ("cuda", SHARED):
        device = torch.device("cuda", rank % torch.cuda.device_count())
    else:
        device = torch.device(device)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group(
        backend,
        init_method=f"file://{store}",
        rank=rank,
        world_size=ranks,
        timeout=LIMIT,
    )
    _direct._LIMIT = DIRECT_LIMIT
    getattr(programs, program)(rank, ranks, device)
    # A thread of gloo that still holds a tensor when the interpreter ends aborts the process. The
    # threads end with their group, which errors that a test has caught may hold.
    gc.collect()
    dist.destroy_process_group()
    if getattr(programs, "LEAVES_THREADS", False):
        leave()  # somebody else keeps the group: PyTorch (2.13), vLLM


def leave():
    """End this rank in order, but without what the interpreter does at its end."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


if __name__ == "__main__":
    main(*sys.argv[1:])
