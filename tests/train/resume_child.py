"""Trains the toy task in a workdir; kills its own process with SIGKILL before batch `kill`."""
import os
import signal
import sys

import jax

from argenseg_jax.train import loop
from tests.train import toy


def main(workdir: str, kill: int) -> None:
    class Deadly(toy.Data):
        def __next__(self):
            if self.index == kill:
                os.kill(os.getpid(), signal.SIGKILL)
            return super().__next__()

    cfg = toy.config(steps=10, checkpoint_every=2, microbatch=4)
    loop.run(cfg, workdir, toy.phases(cfg, 3, Deadly), toy.init, devices=jax.devices()[:1])


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
