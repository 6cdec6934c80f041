"""SIGTERM and Ctrl-C: at once outside training, after the step and its checkpoint inside.

Exit statuses are the shell's: 143 (128 + SIGTERM) and 130 (128 + SIGINT).
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
    """A signal ended the work. `status` is what the process exits with; the message says how to go on."""

    def __init__(self, signum: int, message: str = ""):
        super().__init__(message)
        self.status = STATUS[signal.Signals(signum)]


def stop_at_once(signum: int, frame: Any) -> None:
    """A handler: end whatever runs; what has been written stays."""
    raise Interrupted(signum)


class AfterTheStep:
    """While it is entered, a first SIGTERM or Ctrl-C is kept in `received`; a second Ctrl-C stops at once.

    A terminal sends Ctrl-C to every process of the job and torchrun passes it on: what comes within a second of the
    first is the same one. Outside the main thread there are no signals to handle.
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
            again = "; Ctrl-C again stops at once" if signum == signal.SIGINT else ""
            print(f"\n{signal.Signals(signum).name}: finishing the step and saving{again}", file=sys.stderr)
