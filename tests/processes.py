"""Starts a command as several processes of one jax job on this machine."""

import os
import pathlib
import socket
import subprocess
import sys

ROOT = pathlib.Path(__file__).parent.parent


def start(count, *args, devices=1):
    """`python -m ARGS` in so many processes of so many CPU devices each: their Popen objects."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    flags = f"--xla_backend_optimization_level=0 --xla_force_host_platform_device_count={devices}"
    env = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": flags,
        "OMP_NUM_THREADS": "1",
        "JAX_DEFAULT_MATMUL_PRECISION": "highest",
        "JAX_ENABLE_COMPILATION_CACHE": "false",
    }
    if count > 1:
        env |= {"JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}", "JAX_NUM_PROCESSES": str(count)}
    return [
        subprocess.Popen(
            [sys.executable, "-m", *map(str, args)],
            cwd=ROOT,
            text=True,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=env | ({"JAX_PROCESS_ID": str(i)} if count > 1 else {}),
        )
        for i in range(count)
    ]


def finish(processes, timeout=120):
    """[(exit code, stdout, stderr)] of all of them; whoever is left after the time is killed."""
    try:
        outputs = [p.communicate(timeout=timeout) for p in processes]
    finally:
        for p in processes:
            p.kill()
    return [(p.returncode, *texts) for p, texts in zip(processes, outputs)]


def run(count, *args, devices=1, timeout=120):
    """start, then finish."""
    return finish(start(count, *args, devices=devices), timeout)
