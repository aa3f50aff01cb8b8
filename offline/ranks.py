"""Processes ("ranks") that share one discovery: each takes its part of the documents, and what they sum is added up.

    shared                fine-tune, factors, eigenvalues, rows, whitening, dictionary
    first rank alone      eigenvectors, selection, calibration, drift matrix, package; the others wait

All ranks read the same documents and the same working directory, which several machines need a shared file system for. No
stage's result depends on the number of ranks beyond rounding, so a run may be resumed with another number of them.

One rank is the usual case: nothing is sent then. `run_ranks` starts several on this machine, torchrun on any.
"""

from __future__ import annotations

import multiprocessing.connection
import os
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from atoms.errors import AtomsteerError, ConfigError, RankError

T = TypeVar("T")

_PATIENCE = timedelta(days=30)
"""The others wait as long as the first rank calibrates; a rank that dies closes its connections and is noticed at once."""
_GRACE_SECONDS = 5.0
_EXIT_ERROR, _EXIT_LOST = 2, 3


@dataclass(frozen=True)
class Ranks:
    """This process's number among `count`, and what ranks do together. Every rank must make the same calls in order."""

    rank: int = 0
    count: int = 1

    @property
    def first(self) -> bool:
        return self.rank == 0

    def share(self, items: Sequence[T]) -> Sequence[T]:
        """Every `count`-th item: lists sorted by size are split into parts of like size."""
        return items[self.rank :: self.count]

    def add(self, *tensors: Tensor) -> None:
        """Replaces each tensor by its sum over ranks."""
        for tensor in tensors if self.count > 1 else ():
            on_cpu = tensor.cpu()  # gloo's own ground; the same memory if the tensor is there already
            with _others_alive():
                dist.all_reduce(on_cpu)
            if on_cpu is not tensor:
                tensor.copy_(on_cpu)

    def gather(self, tensor: Tensor) -> Tensor:
        """The ranks' tensors (n, …), of one shape, joined to (count · n, …) in order of rank."""
        if self.count == 1:
            return tensor
        parts = [torch.empty_like(tensor) for _ in range(self.count)]
        with _others_alive():
            dist.all_gather(parts, tensor.contiguous())
        return torch.cat(parts)

    def wait(self) -> None:
        """Returns when every rank has come here: what one wrote before, all can read after."""
        if self.count > 1:
            with _others_alive():
                dist.barrier()

    def agree(self, flag: bool) -> bool:
        """The first rank's `flag`, for decisions that depend on files which ranks write meanwhile."""
        value = torch.tensor([int(flag and self.first)])
        self.add(value)
        return bool(value)

    def check_same(self, digest: str, what: str) -> None:
        """Raises ConfigError if the hexadecimal `digest` is not the same on every rank."""
        mine = torch.tensor(list(bytes.fromhex(digest)), dtype=torch.uint8)[None]
        if not bool((self.gather(mine) == mine).all()):
            raise ConfigError(
                f"the {self.count} ranks do not agree on {what}; give every rank the same model, documents and options"
            )


ALONE = Ranks()


@contextmanager
def torchrun_ranks() -> Iterator[Ranks]:
    """The rank that torchrun made of this process, for the length of the block; `ALONE` if it did not."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield ALONE
        return
    with _joined("env://", Ranks(int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])),
                 int(os.environ["LOCAL_RANK"]), int(os.environ["LOCAL_WORLD_SIZE"])) as ranks:  # fmt: skip
        yield ranks


def run_ranks(work: Callable[..., object], count: int, *arguments: object) -> None:
    """Runs ``work(*arguments, ranks)`` in `count` processes of this machine; `work` must be importable.

    As soon as one of them fails all are ended, and RankError names it. Raises ConfigError inside of torchrun.
    """
    if "WORLD_SIZE" in os.environ:
        raise ConfigError(f"{count} ranks were asked for in a process of torchrun; leave --ranks out there")
    with tempfile.TemporaryDirectory(prefix="atomsteer-ranks-") as folder:
        context = torch.multiprocessing.spawn(
            _run_rank, (count, f"file://{folder}/meeting", work, arguments), count, join=False
        )
        assert context is not None
        try:
            _watch(context.processes)
        finally:
            for process in context.processes:
                process.kill()
            for process in context.processes:
                process.join()


def _watch(processes: Sequence[multiprocessing.process.BaseProcess]) -> None:
    """Returns when all have ended well. Raises RankError for the one that failed on its own account."""
    running = list(processes)
    while running and not any(process.exitcode for process in processes):
        multiprocessing.connection.wait([process.sentinel for process in running])
        running = [process for process in running if process.exitcode is None]
    until = time.monotonic() + _GRACE_SECONDS  # the others notice within moments: wait for the one that died first
    while any(p.exitcode for p in processes) and all(p.exitcode in (None, 0, _EXIT_LOST) for p in processes):
        if time.monotonic() > until or all(p.exitcode is not None for p in processes):
            break
        time.sleep(0.05)
    failed = [(n, code) for n, process in enumerate(processes) if (code := process.exitcode)]
    if failed:
        rank, code = next(((n, code) for n, code in failed if code != _EXIT_LOST), failed[0])
        how = f"was ended by signal {-code}" if code < 0 else f"failed with status {code} (see above)"
        raise RankError(
            f"rank {rank} of {len(processes)} {how}; all were ended. Run the same command again: finished work is kept"
        )


def _run_rank(rank: int, count: int, meeting: str, work: Callable[..., object], arguments: Sequence[object]) -> None:
    """A rank's whole life. Its error is printed here, since only the exit status reaches the parent."""
    try:
        with _joined(meeting, Ranks(rank, count), rank, count) as ranks:
            work(*arguments, ranks)
    except RankError:
        sys.exit(_EXIT_LOST)
    except AtomsteerError as error:
        print(f"rank {rank}: error: {error}", file=sys.stderr, flush=True)
        os._exit(_EXIT_ERROR)  # at once: the others wait for this one
    except Exception:
        traceback.print_exc()
        os._exit(1)


@contextmanager
def _joined(meeting: str, ranks: Ranks, local_rank: int, local_count: int) -> Iterator[Ranks]:
    torch.set_num_threads(max(1, torch.get_num_threads() // local_count))
    if torch.cuda.is_available():
        torch.cuda.set_device(local_rank % torch.cuda.device_count())
    dist.init_process_group("gloo", init_method=meeting, rank=ranks.rank, world_size=ranks.count, timeout=_PATIENCE)
    try:
        yield ranks
    finally:
        dist.destroy_process_group()


@contextmanager
def _others_alive() -> Iterator[None]:
    """Raises RankError where gloo reports a lost connection."""
    try:
        yield
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
        raise RankError(
            f"another rank has ended: {reason}. Run the same command again: finished work is kept"
        ) from error
