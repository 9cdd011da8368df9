"""Trains the toy task in a workdir, and kills its own process with SIGKILL.

    python -m tests.train.resume_child WORKDIR batch|save N

before it takes batch N, or while step N is being written.
"""
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


def watch(folder: pathlib.Path, step: int) -> None:
    """Waits for the first files of a step that has not got its name yet."""
    while not any(any(p.iterdir()) for p in folder.glob(f"{step}.orbax-checkpoint-tmp*")):
        time.sleep(0.0005)
    end()


def main(workdir: str, moment: str, number: int) -> None:
    class Deadly(toy.Data):
        def __next__(self):
            if moment == "batch" and self.index == number:
                end()
            return super().__next__()

    if moment == "save":
        folder = pathlib.Path(workdir, "checkpoints")
        threading.Thread(target=watch, args=(folder, number), daemon=True).start()
    cfg = toy.config(steps=10, checkpoint_every=2, microbatch=4)
    loop.run(cfg, workdir, toy.phases(cfg, 3, Deadly), toy.init, devices=jax.devices()[:1])


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]))
