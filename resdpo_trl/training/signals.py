"""Handling of SIGTERM and Ctrl-C: they stop training after the step and its checkpoint, and other work immediately.

The exit statuses follow the shell's convention: 143 (128 + SIGTERM) and 130 (128 + SIGINT).
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from typing import Any

STATUS = {signal.SIGINT: 130, signal.SIGTERM: 143}


class Interrupted(KeyboardInterrupt):
    """A signal stopped the work. `status` is the exit status. The message explains how to continue."""

    def __init__(self, signum: int, message: str = ""):
        super().__init__(message)
        self.status = STATUS[signal.Signals(signum)]


def stop_at_once(signum: int, frame: Any) -> None:
    """Signal handler that stops immediately. Files that have been written remain."""
    raise Interrupted(signum)


class AfterTheStep:
    """Context manager that stores the first SIGTERM or Ctrl-C in `received`. A second Ctrl-C stops immediately.

    A terminal sends Ctrl-C to every process of the job, and torchrun forwards it. A signal within a second of the first
    therefore counts as the same one. Outside the main thread it does nothing, because Python handles no signals there.
    """

    def __init__(self) -> None:
        self.received = 0
        self._when = 0.0
        self._earlier: dict[int, Any] = {}

    def __enter__(self) -> AfterTheStep:
        if threading.current_thread() is threading.main_thread():
            self._earlier = {number: signal.signal(number, self._keep) for number in STATUS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._earlier.items():
            signal.signal(number, handler)

    def _keep(self, signum: int, frame: Any) -> None:
        if self.received:
            if signum == signal.SIGINT and time.monotonic() - self._when > 1:
                raise Interrupted(signum)
            return
        self.received, self._when = signum, time.monotonic()
        if os.environ.get("RANK", "0") == "0":
            again = "; press Ctrl-C again to stop immediately" if signum == signal.SIGINT else ""
            print(f"\n{signal.Signals(signum).name}: finishing the step and saving{again}", file=sys.stderr)
