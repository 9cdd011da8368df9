"""Trains the toy task in a workdir, and kills its own process with SIGKILL.

    python -m tests.train.resume_child WORKDIR batch|save|frozen|files N

before it takes batch N, or while step N, or what is frozen from there on, is being written, or as soon
as N files have been seen among the checkpoints, which is wherever the run is by then.
"""

import contextlib
import os
import pathlib
import signal
import sys
import threading
import time

import jax

from argenseg_jax.train import loop
from tests.train import toy


def end():
    os.kill(os.getpid(), signal.SIGKILL)


def watch(folder: pathlib.Path, pattern: str) -> None:
    """Waits for the first files in a folder that has not got its name yet."""
    while not any(any(p.iterdir()) for p in folder.glob(f"{pattern}.orbax-checkpoint-tmp*")):
        time.sleep(0.0005)
    end()


def count(folder: pathlib.Path, number: int) -> None:
    """Waits for so many files, those that were renamed or removed meanwhile among them."""
    seen: set[pathlib.Path] = set()
    while len(seen) < number:
        with contextlib.suppress(OSError):  # a folder was renamed while it was read
            seen.update(folder.rglob("*"))
        time.sleep(0.0005)
    end()


def main(workdir: str, moment: str, number: int) -> None:
    class Deadly(toy.Data):
        def __next__(self):
            if moment == "batch" and self.index == number:
                end()
            return super().__next__()

    folder = pathlib.Path(workdir, "checkpoints")
    if moment == "files":
        threading.Thread(target=count, args=(folder, number), daemon=True).start()
    elif moment != "batch":
        name = {"save": f"{number}", "frozen": f"frozen/{number}/params"}[moment]
        threading.Thread(target=watch, args=(folder, name), daemon=True).start()
    cfg = toy.config(steps=10, checkpoint_every=2, log_every=3, microbatch=4)
    loop.run(cfg, workdir, toy.phases(cfg, 3, Deadly), toy.init, devices=jax.devices()[:1])


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]))
