"""`train --distributed` with the toy task in place of the model; may end its own process on the way.

    python -m tests.train.hosts_child WORKDIR [SIGNAL BATCH PROCESS]

sends itself SIGNAL before batch BATCH if it is that process (see tests/train/test_hosts.py).
"""

import dataclasses
import os
import sys
import time

import jax
import numpy as np

from argenseg_jax import distributed
from argenseg_jax.cli import __main__ as cli
from argenseg_jax.train import loop
from argenseg_jax.train import run as train_run
from tests.train import toy


def config():
    """12 steps, weights sharded over all devices there are."""
    cfg = toy.config(steps=12, checkpoint_every=2, log_every=1, keep_best="min:loss", sample_every=12)
    cfg["mesh"].update(data=1, fsdp=-1)
    return cfg


def train(workdir, data=toy.Data, devices=None):
    cfg = config()
    phases = [dataclasses.replace(phase, samples=draw) for phase in toy.phases(cfg, data=data)]
    return loop.run(cfg, str(workdir), phases, toy.init, devices=devices)


def draw(params):
    """An image of a kernel of which every process has a part."""
    kernel = distributed.fetch(params["connector"]["fc1"]["kernel"])
    return {"kernel": np.repeat(((kernel + 4) * 31).astype(np.uint8)[..., None], 3, -1)}


def main(workdir, number=0, batch=0, process=0):
    class Ending(toy.Data):
        def __next__(self):
            if number and self.index == batch and jax.process_index() == process:
                os.kill(os.getpid(), number)
            if number and self.index > batch:
                time.sleep(1)  # jax looks for a signal once a second, a toy step takes no time
            return super().__next__()

    train_run.train = lambda cfg, workdir, **kwargs: train(workdir, Ending)
    joined = ["--distributed"] if "JAX_NUM_PROCESSES" in os.environ else []
    return cli.main(["train", "--config", "configs/nano.py", "--workdir", workdir, *joined])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], *map(int, sys.argv[2:])))
