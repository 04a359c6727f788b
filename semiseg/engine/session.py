"""The processes of a run: accelerate's view of devices and ranks, seeds, and an orderly stop on a signal."""

from __future__ import annotations

import signal
from types import FrameType, TracebackType

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, set_seed

from semiseg.config import RuntimeConfig


def start_accelerator(runtime: RuntimeConfig, *, seed: int) -> Accelerator:
    """One process's view of the run; the same call for one CPU, one GPU and `accelerate launch`.

    Threads and seeds are set here, so that whatever is built next is reproducible.
    """
    if runtime.threads:
        torch.set_num_threads(runtime.threads)
    accelerator = Accelerator(
        cpu=not torch.cuda.is_available(),
        mixed_precision=runtime.precision,
        # Gradients are views into the reduction buckets: one copy of them less in memory.
        kwargs_handlers=[DistributedDataParallelKwargs(gradient_as_bucket_view=True)],
    )
    set_seed(seed)
    return accelerator


class StopOnSignal:
    """Turns SIGINT and SIGTERM into a flag, so that the current step is finished and saved before the run ends.

    A second signal acts at once.
    """

    def __init__(self) -> None:
        self.requested = False
        self._previous: dict[int, object] = {}

    def __enter__(self) -> StopOnSignal:
        for number in (signal.SIGINT, signal.SIGTERM):
            try:
                self._previous[number] = signal.signal(number, self._request)
            except ValueError:
                # Not the main thread (a notebook's executor): the caller keeps its own handling.
                break
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def _request(self, number: int, frame: FrameType | None) -> None:
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True
