"""The processes of torchrun: the variables that it sets are checked, and a process that is missing is told soon."""

import os
import socket
import time
from datetime import timedelta

import torch.distributed as dist

from common import UserError

TORCHRUN = "RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT", "MASTER_ADDR"
SECONDS = 40  # in which all processes have to be there


def check_environment():
    """Raise UserError for variables of torchrun that are wrong, or there without the others."""
    found = {name: os.environ[name] for name in TORCHRUN if name in os.environ}
    numbers = [found.get(name, "") for name in TORCHRUN[:4]]
    if len(found) == len(TORCHRUN) and all(text.isdecimal() and len(text) < 10 for text in numbers):
        rank, world, local_rank, port = map(int, numbers)
        if max(rank, local_rank) < world and 0 < port < 2**16:
            return
    if found:
        raise UserError(f"expected {', '.join(TORCHRUN)} in the environment, as torchrun sets them, or none, "
                        f"got {found}")


def meet(rank, world):
    """Wait until all processes are there -> their common store. Raises UserError if one is missing."""
    try:
        wait_for_master(rank)
        store, *_ = next(dist.rendezvous("env://", timeout=timedelta(seconds=SECONDS)))
        store.set(f"joined {rank}", "")
        store.wait([f"joined {other}" for other in range(world)], timedelta(seconds=SECONDS))
    except (OSError, RuntimeError, ValueError) as error:
        raise UserError(f"expected {world} processes at MASTER_ADDR and MASTER_PORT, got: {error}") from error
    return store


def wait_for_master(rank):
    """Raise OSError if nothing listens at the address of the first process; torch itself would print a page."""
    address, end = (os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])), time.monotonic() + SECONDS
    socket.getaddrinfo(*address)  # of the first process too
    while rank > 0:
        try:
            return socket.create_connection(address, SECONDS).close()
        except OSError:
            if time.monotonic() > end:
                raise
        time.sleep(0.5)
