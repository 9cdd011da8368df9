"""What commands share: flags, the choice of devices, progress on stderr, the result on stdout."""

from __future__ import annotations

import contextlib
import ctypes
import glob
import importlib.util
import json
import os
import re
import sys
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, NoReturn

from absl import flags

from argenseg_jax.cli import parsing
from argenseg_jax.errors import UserError, brief

FLAGS = flags.FLAGS
MAX_CPU_DEVICES = 1024
# (device files, packages of which one is needed to use them); jax comes with CPU alone.
_ACCELERATORS = (
    (("/dev/nvidia[0-9]*", "/dev/dxg"), ("jax_cuda12_plugin", "jax_cuda13_plugin")),
    (("/dev/kfd",), ("jax_rocm60_plugin", "jax_rocm7_plugin")),
    (("/dev/accel[0-9]*", "/dev/vfio/[0-9]*"), ("libtpu",)),
)
flags.DEFINE_integer(
    "cpu_devices",
    0,
    "Number of devices that the CPU is split into; 0 takes the product of the config's mesh.",
    lower_bound=0,
    upper_bound=MAX_CPU_DEVICES,
)
flags.DEFINE_bool(
    "distributed",
    False,
    "Join the other hosts: the same command runs on each. jax "
    "finds them on TPU pods and under Slurm, Open MPI and Kubernetes; elsewhere set "
    "JAX_COORDINATOR_ADDRESS=HOST:PORT, JAX_NUM_PROCESSES and JAX_PROCESS_ID.",
)
flags.DEFINE_bool("debug", False, "Print the traceback of a user error too.")


def define_config() -> None:
    """--config FILE.py[:arg], and --config.a.b=value for each key of config_keys.py."""
    flags.DEFINE_flag(
        parsing.ConfigFlag("Experiment file, e.g. configs/nano.py; --config.KEY=VALUE changes a key of it.")
    )


def define_workdir(text: str = "Directory of the run.") -> None:
    """--workdir, local or gs://."""
    flags.DEFINE_string("workdir", None, text)


def define_checkpoint(default: str | None = None) -> None:
    """--checkpoint: an Orbax step, a workdir, an HF folder, or `nano` for the shipped model."""
    flags.DEFINE_string("checkpoint", default, "Orbax step, workdir, HF folder, or 'nano'.")


def chosen_checkpoint() -> str:
    """--checkpoint, or --workdir, or else the shipped model; UserError where both were given."""
    if FLAGS.checkpoint and FLAGS.workdir:
        raise UserError("give one of --workdir and --checkpoint")
    return FLAGS.checkpoint or FLAGS.workdir or "nano"


def define_checksums() -> None:
    """--checksums, of the commands that read or write checkpoints."""
    flags.DEFINE_bool(
        "checksums",
        True,
        "Check the files of a step against their checksums before they are "
        "read, and write checksums of new ones; false skips both.",
    )


def define_answering(max_masks: int = 8) -> None:
    """Flags about how answers are written; `answering` reads them."""
    flags.DEFINE_integer("max_masks", max_masks, "The answer ends after N masks.", lower_bound=1, upper_bound=1024)
    flags.DEFINE_enum(
        "dtype",
        "float32",
        ["float32", "bfloat16", "int8"],
        "Of weights and computation; int8: the language model's matrices, the rest is bfloat16.",
    )
    flags.DEFINE_float("guidance", 0.0, "Strength of classifier-free guidance; 0 = off.", lower_bound=0)
    flags.DEFINE_float("temperature", 0.0, "Of sampled tokens and codes; 0 = greedy.", lower_bound=0)
    flags.DEFINE_integer("top_k", 0, "Sample among the N likeliest; 0 = all.", lower_bound=0)
    flags.DEFINE_float(
        "top_p", 1.0, "Sample among the likeliest with this probability together.", lower_bound=1e-6, upper_bound=1.0
    )
    flags.DEFINE_integer("seed", 0, "Of the sampling.")


def answering() -> dict[str, Any]:
    """The options of Predictor.segment that the flags of `define_answering` stand for."""
    from argenseg_jax.decode.sampling import Sampling

    sampling = Sampling(FLAGS.temperature, FLAGS.top_k, FLAGS.top_p, FLAGS.seed)
    return {"max_masks": FLAGS.max_masks, "guidance": FLAGS.guidance, "sampling": sampling, "code_sampling": sampling}


def define_reading() -> None:
    """Defines --window and --max_pixels."""
    flags.DEFINE_string(
        "window",
        None,
        "LOW,HIGH: values of images of more than 8 bits that become 0..255; default: "
        "data.window of the saved config, or by the values of the data.",
    )
    flags.DEFINE_integer(
        "max_pixels", 0, "Most pixels of an image; 0 = data.max_pixels of the saved config, or 64 Mi.", lower_bound=0
    )


def define_outside() -> None:
    """Defines --allow_outside, for commands that read data."""
    flags.DEFINE_bool(
        "allow_outside",
        False,
        "Relative paths in data files may lead out of the folder that they start from, by .. or a symbolic link.",
    )


def reading(config: Mapping[str, Any] = MappingProxyType({})) -> Any:
    """How images are read (data/reader.Reading): by the flags, and else by the saved config of a run."""
    from argenseg_jax import config_keys
    from argenseg_jax.data.reader import Reading

    saved = Reading.from_config(config.get("data", {}))
    window = saved.window
    if FLAGS.window is not None:
        try:
            window = tuple(config_keys.parse("data.window", FLAGS.window))
        except UserError as error:
            raise UserError(f"--window: {error}") from None
    return saved._replace(
        window=window,
        max_pixels=FLAGS.max_pixels or saved.max_pixels,
        allow_outside="allow_outside" in FLAGS and FLAGS.allow_outside,
    )


def write_image(target: str, number: int, image: Any) -> str:
    """Writes a PNG as `target`, or with a number > 0 beside it as name_1.png, ...; returns the path."""
    from etils import epath

    from argenseg_jax import files
    from argenseg_jax.eval import visualize

    path = epath.Path(numbered(target, number))
    files.write(path, visualize.encode_png(image))
    return str(path)


def numbered(target: str, number: int) -> str:
    """name.png -> name_NUMBER.png; the first, 0, is as it is."""
    stem, suffix = os.path.splitext(target)
    return f"{stem}_{number}{suffix}" if number else target


def check_outputs(inputs: Mapping[str, str | None], outputs: Mapping[str, Sequence[str]]) -> None:
    """UserError before the work where a file to write is an input or is written twice, or cannot be written.

    Args:
      inputs: {flag: path} of files that are read; None is not given.
      outputs: {flag: paths} of files that may be written.
    """
    from etils import epath

    from argenseg_jax import files

    same = lambda path: path if files.is_remote(path) else os.path.realpath(path)
    taken = {same(path): flag for flag, path in inputs.items() if path}
    for flag, paths in outputs.items():
        for path in paths:
            other = taken.setdefault(same(path), flag)
            if other != flag:
                raise UserError(f"--{flag} would write {path}, a file of --{other}; name another file")
            if files.is_remote(path):
                continue
            with contextlib.suppress(FileNotFoundError, NotADirectoryError):
                os.lstat(path)  # an OSError: a name too long for the file system
            if os.path.isdir(path):
                raise UserError(f"--{flag}: {path} is a folder")
        for folder in dict.fromkeys(epath.Path(path).parent for path in paths):
            files.check_writable(folder)


def require(*names: str) -> None:
    """Raises a UserError unless each of these flags was given."""
    for name in names:
        if FLAGS[name].value is None:
            raise UserError(f"--{name} is missing")


def on_cpu() -> bool:
    """Whether jax will compute on the CPU, told without starting it: by JAX_PLATFORMS, or else by what is here.

    An accelerator is used where its device files are and the package that drives it is installed.
    """
    named = os.environ.get("JAX_PLATFORMS") or os.environ.get("JAX_PLATFORM_NAME")
    if named:
        return named.split(",")[0].strip().lower() == "cpu"
    return not any(
        any(map(glob.glob, nodes)) and any(map(importlib.util.find_spec, packages)) for nodes, packages in _ACCELERATORS
    )


def keep_memory() -> None:
    """Tells glibc's malloc to keep freed memory instead of handing it back to the system; on the CPU only.

    XLA's CPU backend allocates its work space anew at every step; faulting those pages in again takes
    a quarter of the time of a training step. Where an accelerator computes, there is nothing to gain,
    and the many threads that read data would share one arena.
    """
    if not on_cpu():
        return
    trim_threshold, top_pad, mmap_max, arena_max = -1, -2, -4, -8  # of malloc.h
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):  # another C library
        return
    mallopt(mmap_max, 0)
    mallopt(trim_threshold, -1)  # never; any number would be a limit of 2 GiB at most
    mallopt(top_pad, 2**28)
    mallopt(arena_max, 1)


def setup_devices() -> None:
    """Splits the CPU into devices and joins the cluster; comes before the first use of jax."""
    keep_memory()
    import jax  # here, so that --help and mistyped flags answer at once

    count = FLAGS.cpu_devices
    if not count and "config" in FLAGS and FLAGS.config is not None:
        count = 1
        for size in FLAGS.config.mesh.values():
            count *= max(size, 1)
        if FLAGS.distributed:  # the mesh is that of all processes
            count //= _number("JAX_NUM_PROCESSES") or count
    if 1 < count <= MAX_CPU_DEVICES:  # beyond, the mesh refuses the devices that there are
        # On a busy machine one device may wait for another longer than the 40 s after which XLA
        # gives the process up.
        if "collective_call_terminate" not in (given := os.environ.get("XLA_FLAGS", "")):
            os.environ["XLA_FLAGS"] = f"{given} --xla_cpu_collective_call_terminate_timeout_seconds=3600"
        try:
            jax.config.update("jax_num_cpu_devices", count)
        except RuntimeError:  # jax already runs in this process (tests); the mesh checks the number
            pass
    if FLAGS.distributed:
        try:
            jax.distributed.initialize(num_processes=_number("JAX_NUM_PROCESSES"), process_id=_number("JAX_PROCESS_ID"))
        except (ValueError, RuntimeError) as error:
            raise UserError(f"--distributed: {error} (see --distributed in --help)") from error


def _number(name: str) -> int | None:
    """An environment variable as a number; None where it is not set."""
    text = os.environ.get(name)
    if text is not None and not re.fullmatch(r"[0-9]{1,9}", text):
        raise UserError(f"{name}='{brief(text, 60)}' is no number")
    return None if text is None else int(text)


def is_distributed() -> bool:
    """Whether this process has joined others."""
    return FLAGS.is_parsed() and FLAGS.distributed


def leave(code: int) -> NoReturn:
    """Ends this process at once.

    A normal exit of one of several processes waits for the others, and they for its work: minutes.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def log(text: str) -> None:
    """One line of progress for people, on stderr."""
    print(text, file=sys.stderr, flush=True)


def print_result(result: Mapping[str, Any]) -> None:
    """The command's result: one JSON line, the last one on stdout (of the first process)."""
    if is_distributed():
        from argenseg_jax import distributed

        if not distributed.is_first():
            return
    print(json.dumps(result, allow_nan=False), flush=True)
