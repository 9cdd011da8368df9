"""Orbax's threads on a full disk: what they print is left to the one line that tells of it."""

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
    """Drops, for the rest of the process, tracebacks of full disks that nobody asked for.

    Each of Orbax's threads logs one, and TensorStore prints one for each array that it reports to an event
    loop that was closed meanwhile. The exception itself is raised where a save is waited for.
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
    """Until the threads of a save that has failed have ended: at the exit of the process they would fail anew."""
    for thread in threading.enumerate():
        if type(thread).__module__.startswith("orbax."):
            threading.Thread.join(thread, 10)  # Orbax's own raises what the thread has raised
