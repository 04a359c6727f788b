"""How processes of one's own are started that load or draw: their method, and what signals mean to them."""

from __future__ import annotations

import signal
import sys
from typing import Literal

StartMethod = Literal["fork", "forkserver", "spawn"]
# Forked workers share what this process has imported. Others import torch again, 0.5 GB each, and Python's own choice
# differs between its versions. Elsewhere than on Linux forking is unsafe: None leaves the choice to the platform.
START_METHOD: StartMethod | None = "fork" if sys.platform == "linux" else None


def leave_signals_to_the_main_process(worker: int = 0) -> None:
    """Ctrl-C and a batch system's SIGTERM reach workers too, which must outlive the step that is being finished."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
