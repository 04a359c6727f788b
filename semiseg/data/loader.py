"""Which images a step sees, as a pure function of the step; their batches, and the loaders that fetch these.

The stream is the endless row of epochs; epoch e is a permutation drawn from (seed, e). Optimizer step s takes the
stream's positions s*B .. (s+1)*B - 1, whatever the number of processes, accumulation parts or workers, so a resumed run
or one on more processes sees the same batches.
"""

from __future__ import annotations

import atexit
import hashlib
import multiprocessing
import pickle
import signal
import threading
from collections.abc import Iterator
from dataclasses import KW_ONLY, dataclass
from functools import lru_cache
from multiprocessing.reduction import ForkingPickler
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, Sampler, get_worker_info

from semiseg.data.dataset import InstanceDataset, Key
from semiseg.data.workers import (
    START_METHOD,
    StartMethod,
    describe_lack,
    leave_signals_to_the_main_process,
    return_freed_memory,
    workers_lack,
)
from semiseg.errors import UserError
from semiseg.structures.inputs import Batch

IMAGES_PER_RETURN = 32  # after so many a worker gives back the memory that it has freed
SPARE_FILES = 48  # that must still open where a batch is passed on: two for each of its tensors, and sockets
IMAGES_AHEAD = 128  # that may wait in memory, about 4 MB each at COCO's sizes; every worker has one batch in any case


@dataclass(frozen=True)
class StepBatches(Sampler[list[Key]]):
    """Batch sampler of one process: yields the keys of each micro batch, steps in order, accumulation parts inside.

    Part a on rank r takes the slice [(a * processes + r) * m, ... + m) of the step's B positions,
    m = B / (accumulation * processes).
    """

    num_images: int
    _: KW_ONLY
    batch_size: int  # B, images of one optimizer step over all processes and parts
    accumulation: int  # micro batches per process and step
    processes: int
    rank: int
    seed: int  # of the order and of every sample's seed
    start_step: int  # steps already done, 0 for a new run
    steps: int  # of the whole run

    def __post_init__(self) -> None:
        parts = self.accumulation * self.processes
        if self.batch_size % parts:
            given = f"{self.accumulation} x {self.processes} = {parts}"
            raise UserError(f"optim.batch_size = {self.batch_size} must divide by accumulation x processes = {given}")
        if self.num_images < 1:
            raise UserError("the training data set has no images")

    @property
    def images_per_batch(self) -> int:
        """Images of a micro batch."""
        return self.batch_size // (self.accumulation * self.processes)

    def __len__(self) -> int:
        return max(0, self.steps - self.start_step) * self.accumulation

    def __iter__(self) -> Iterator[list[Key]]:
        micro = self.images_per_batch
        for step in range(self.start_step, self.steps):
            for part in range(self.accumulation):
                first = step * self.batch_size + (part * self.processes + self.rank) * micro
                yield [self._key(position) for position in range(first, first + micro)]

    def _key(self, position: int) -> Key:
        """The key at a position of the stream."""
        epoch, index = divmod(position, self.num_images)
        order = epoch_order(self.num_images, seed=self.seed, epoch=epoch)
        return order[index], mixed_seed("sample", self.seed, position)


@lru_cache(maxsize=4)  # a batch takes from one or two epochs
def epoch_order(num_images: int, *, seed: int, epoch: int) -> list[int]:
    """The permutation of the rows in an epoch, from (seed, epoch) alone."""
    generator = torch.Generator().manual_seed(mixed_seed("epoch", seed, epoch))
    return torch.randperm(num_images, generator=generator).tolist()


def mixed_seed(purpose: str, *numbers: int) -> int:
    """A seed in 0..2^63-1 that differs for every purpose and numbers; the same on every machine."""
    text = ":".join([purpose, *map(str, numbers)])
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1


@dataclass(frozen=True)
class _Packed:
    """A batch as it leaves its worker: its tensors in shared memory, the rest and the handles of that as bytes.

    Left to itself, DataLoader does this in a thread of the worker's, where an error is printed, the batch is lost, and
    this process waits for it for ever. Errors travel as values, because DataLoader makes exceptions a traceback's text.
    """

    content: bytes

    def batch(self) -> Batch | UserError:
        """In this process; once."""
        try:
            with workers_lack(SPARE_FILES):
                unpacked: Batch = pickle.loads(self.content)
                return unpacked
        except UserError as error:
            return error

    def pin_memory(self) -> Batch | UserError:
        """Called by the DataLoader when `pin_memory` is on."""
        batch = self.batch()
        return batch.pin_memory() if isinstance(batch, Batch) else batch


@dataclass
class _Batches(Dataset[Batch | _Packed | UserError]):
    """The data set by whole batches; a `UserError` is returned, not raised.

    A worker packs its batches, and gives freed memory back now and then: else it keeps what it needed for its largest
    batch while it waits. After every batch of two images that would cost a fifth of their time.
    """

    dataset: InstanceDataset
    size_divisor: int
    images_since_return: int = 0  # of freed memory

    def __getitem__(self, keys: list[Key]) -> Batch | _Packed | UserError:
        try:
            batch = self.dataset.batch(keys, size_divisor=self.size_divisor)
            if get_worker_info() is None:
                return batch
            with workers_lack(SPARE_FILES):
                packed = _Packed(bytes(ForkingPickler.dumps(batch)))
        except UserError as error:
            return error
        self.images_since_return += len(keys)
        if self.images_since_return >= IMAGES_PER_RETURN:
            self.images_since_return = 0
            return_freed_memory()
        return packed


class BatchLoader(DataLoader[Batch | _Packed | UserError]):
    """A DataLoader that raises a worker's bad input, or its end, as the one sentence it is, in this process."""

    def __iter__(self) -> Iterator[Batch]:  # type: ignore[override]  # a generator closes the workers as well
        batches = self._started()
        while True:
            try:
                item = next(batches)
            except StopIteration:
                return
            except RuntimeError as error:
                if not str(error).startswith("DataLoader worker"):
                    raise
                raise UserError(describe_lack(error)) from None
            if isinstance(item, _Packed):
                item = item.batch()
            if isinstance(item, UserError):
                raise item
            yield item

    def _started(self) -> Iterator[Any]:
        """DataLoader's iterator, without the signal handler that torch sets with its first workers.

        It would raise a worker's end wherever this process is, amid an update or the writing of a checkpoint. Without
        it the end is noticed when a batch of the worker's is waited for.
        """
        ours = hasattr(signal, "SIGCHLD") and threading.current_thread() is threading.main_thread()
        handler = signal.getsignal(signal.SIGCHLD) if ours else None
        try:
            if not self.num_workers:
                return super().__iter__()
            with workers_lack(SPARE_FILES):
                # What torch is about to make. An iterator that could not get it prints a traceback when it is removed.
                spare = [multiprocessing.Event() for _ in range(self.num_workers + 2)]
                del spare
                return super().__iter__()
        finally:
            if handler is not None:
                signal.signal(signal.SIGCHLD, handler)


def eval_batches(num_images: int, *, batch_size: int, processes: int, rank: int) -> list[list[Key]]:
    """Every image once over all processes: rank r takes rows r, r + processes, ...; nothing is padded or repeated."""
    rows = range(rank, num_images, processes)
    return [[(row, 0) for row in rows[first : first + batch_size]] for first in range(0, len(rows), batch_size)]


def build_loader(
    dataset: InstanceDataset,
    *,
    batches: StepBatches | list[list[Key]],
    size_divisor: int,
    workers: int,
    pin_memory: bool = False,
    start_method: StartMethod | None = START_METHOD,
) -> BatchLoader:
    """Fetches the batches, bit for bit the same for any number of workers that read ahead; 0 = in this process."""
    # A generator of its own: DataLoader draws a seed at every start, which would shift the global generator.
    settings: dict[str, Any] = {"generator": torch.Generator().manual_seed(0)}
    if workers:
        images = batches.images_per_batch if isinstance(batches, StepBatches) else max(map(len, batches), default=1)
        settings |= {
            "multiprocessing_context": start_method,
            "persistent_workers": True,
            "prefetch_factor": 2 if 2 * workers * images <= IMAGES_AHEAD else 1,
            "worker_init_fn": leave_signals_to_the_main_process,
        }
    return BatchLoader(
        _Batches(dataset, size_divisor),
        batch_size=None,  # an item of this data set is a batch already
        sampler=batches,
        num_workers=workers,
        pin_memory=pin_memory,
        **settings,
    )


@atexit.register
def _end_workers() -> None:
    """At exit multiprocessing sends SIGTERM to the workers that are left and waits for them, which ignore it."""
    workers = [child for child in multiprocessing.active_children() if child.daemon]
    if workers and hasattr(signal, "SIGCHLD"):
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler would complain of their end
    for worker in workers:
        worker.kill()
