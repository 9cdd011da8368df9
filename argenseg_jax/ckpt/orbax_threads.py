"""Silences what Orbax's threads print on a full disk, in favour of one error line."""

from __future__ import annotations

import functools
import logging
import sys
import threading
from typing import Any

from absl import logging as absl_logging

from argenseg_jax import files


@functools.cache
def quiet_disk_faults() -> None:
    """Drops, for the rest of the process, the tracebacks that Orbax's threads log on a full disk.

    Each thread logs one, and TensorStore prints one for each array that it reports to an event loop that is
    closed by then. The exception itself is raised by the call that waits for the save.
    """
    for logger in (absl_logging.get_absl_logger(), logging.getLogger("asyncio")):
        logger.addFilter(
            lambda record: not (record.exc_info and record.exc_info[1] and files.disk_fault(record.exc_info[1]))
        )
    before = sys.unraisablehook

    def hook(raised: Any) -> None:
        if not (raised.exc_type is RuntimeError and str(raised.exc_value) == "Event loop is closed"):
            before(raised)

    sys.unraisablehook = hook


def wait() -> None:
    """Waits for the threads of a failed save: they would fail again when the process exits."""
    for thread in threading.enumerate():
        if type(thread).__module__.startswith("orbax."):
            threading.Thread.join(thread, 10)  # Orbax's own raises what the thread has raised
