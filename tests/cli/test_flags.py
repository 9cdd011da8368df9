"""Flags that would destroy, hang or mean nothing: refused in one line before any work; and how commands end."""

import importlib
import os
import pathlib
import signal
import sys

import numpy as np
import pytest
from absl import flags
from PIL import Image

from argenseg_jax.cli import __main__ as cli
from argenseg_jax.cli import common, parsing
from argenseg_jax.errors import UserError
from tests.cli.command import call, config_of, own_flags, refused

NANO = ("train", "--config=configs/nano.py")
COMMANDS = sorted(cli.COMMANDS)


@pytest.fixture
def image(tmp_path, monkeypatch):
    """image.png in the working directory."""
    monkeypatch.chdir(tmp_path)
    Image.fromarray(np.arange(48, dtype=np.uint8).reshape(4, 4, 3)).save("image.png")
    return pathlib.Path("image.png")


@pytest.mark.parametrize("command", COMMANDS)
def test_every_listed_command_is_there(command):
    assert cli.COMMANDS[command][0] == f"argenseg_jax.cli.{command}"
    assert (pathlib.Path(cli.__file__).parent / f"{command}.py").exists()


def test_serve_is_unknown(capfd):
    assert "unknown command 'serve'; there are train, evaluate" in refused(capfd, "serve")


@pytest.mark.parametrize(
    "args, says",
    [
        (["train", "--workdir="], "--workdir is empty"),
        (["train", "--config="], "--config is empty"),
        (["segment", "--checkpoint="], "--checkpoint is empty"),
        (["segment", "--out= "], "--out is empty"),
        (["evaluate", "--data="], "--data is empty"),
        (["evaluate", "--checkpoint=nano", "--out="], "--out is empty"),
        (["prepare", "--source="], "--source is empty"),
        (["convert", "--to="], "--to is empty"),
        (["chat", "--prompt="], "--prompt is empty"),
        (["segment", "--image=a\0b"], "no UTF-8 text"),
        (["train", "--workdir=\udcff"], "no UTF-8 text"),
        (["segment", "--prompt=half \ud83d"], "no UTF-8 text"),
        (["segment", "--temperature=nan"], "--temperature=nan: a finite number"),
        (["segment", "--guidance=inf"], "--guidance=inf: a finite number"),
        (["evaluate", "--save_every=inf"], "--save_every=inf: a finite number"),
        (["segment", "--seed=" + "9" * 4000], "--seed: "),
        (["segment", "--seed=" + "9" * 5000], "seed"),
        (["segment", "--top_k=4294967296"], "--top_k: 4294967296 is beyond"),
        (["segment", "--max_masks=1000000000"], "max_masks"),
        (["train", "--cpu_devices=1000000"], "cpu_devices"),
        (["prepare", "--resize=1000000"], "resize"),
        (["prepare", "--workers=100000"], "workers"),
        (["segment", "--image=s4://bucket/a.png"], "no file system for s4://"),
        (["segment", "--checkpoint=gs://nope/x"], "gs:// needs gcsfs"),
        (["train", "--workdir=what://x"], "no file system for what://"),
        ([*NANO, "--workdir=w", "--profile=" + "9" * 5000 + "..3"], "FIRST..LAST"),
        ([*NANO, "--workdir=w", "--profile=²..3"], "FIRST..LAST"),
        (["x" * 100000], "unknown command"),
        (["train", "x" * 100000], "unexpected argument"),
        (["train", "--" + "x" * 100000], "Unknown command line flag"),
    ],
)
def test_flags_that_mean_nothing(capfd, monkeypatch, args, says):
    monkeypatch.setattr(common, "setup_devices", lambda: None)
    line = refused(capfd, *args)
    assert says in line and len(line) < 600


def test_flags_of_a_file(capfd, tmp_path, monkeypatch):
    """absl's --flagfile: overrides in it count; devices, other encodings and files that are not there are one line."""
    path = tmp_path / "flags"
    path.write_text("--config.train.steps=7\n# a comment\n--workdir=w\n")
    assert config_of("train", "--config=configs/nano.py", f"--flagfile={path}")["train"]["steps"] == 7
    monkeypatch.setattr(common, "setup_devices", lambda: None)
    path.write_bytes(b"--workdir=\xff\n")
    for name in (path, "/dev/zero", tmp_path, tmp_path / "absent"):
        assert str(name) in refused(capfd, "train", f"--flagfile={name}")
    assert "flagfile" in refused(capfd, "train", "--flagfile")


def test_a_name_too_long_for_the_file_system(capfd, image):
    for args in (
        ("segment", "--prompt=x", f"--image={'x' * 300}"),
        ("convert", f"--from={'x' * 300}", "--to=y"),
        ("convert", "--from=nano", f"--to={'x' * 300}"),
        ("prepare", "--source=shapes:simple:test:2", f"--out={'x' * 300}"),
        ("segment", "--prompt=x", f"--image={image}", f"--out={'x' * 300}.png"),
    ):
        code, out, err = call(capfd, *args)
        assert (code, out) == (2, "") and err[-1].startswith("error: ") and "xxx" in err[-1]
    assert os.listdir() == ["image.png"]


def test_a_file_where_a_folder_has_to_be(capfd, image):
    content = image.read_bytes()
    for args in (
        ("convert", "--from=nano", f"--to={image}/x"),
        ("convert", "--from=nano", f"--to={image}"),
        ("prepare", "--source=shapes:simple:test:2", f"--out={image}"),
        ("segment", "--prompt=x", f"--image={image}", f"--out={image}/x.png"),
        ("chat", f"--image={image}", "--prompt=x", f"--out={image}"),
        ("evaluate", "--checkpoint=nano", "--data=shapes:test", f"--out={image}"),
    ):
        assert "image.png" in refused(capfd, *args)
    assert image.read_bytes() == content and os.listdir() == ["image.png"]


@pytest.mark.parametrize(
    "args",
    [
        ["--out=image.png"],
        ["--out=./sub/../image.png"],
        ["--out=link.png"],
        ["--out=a.png", "--overlay=a.png"],
        ["--out=a.png", "--scales=./a.png"],
        ["--overlay=b.png", "--scales=b.png"],
        ["--overlay=image.png"],
        ["--out=mask.png", "--overlay=mask_1.png"],  # the second mask
        ["--image=mask_3.png"],  # the fourth mask would replace it
        ["--out=folder.png"],
    ],
)
def test_no_output_replaces_an_input_or_another_output(capfd, image, args):
    os.mkdir("sub")
    os.mkdir("folder.png")
    os.symlink("image.png", "link.png")
    os.link("image.png", "mask_3.png")
    before = sorted(os.listdir())
    line = refused(capfd, "segment", "--prompt=x", "--image=image.png", *args)
    assert "name another file" in line or "is a folder" in line
    assert sorted(os.listdir()) == before


def test_a_chat_does_not_replace_its_picture(capfd, image):
    os.mkdir("chat")
    os.rename(image, "chat/turn_12_3.png")
    assert "name another file" in refused(capfd, "chat", "--prompt=x", "--image=chat/turn_12_3.png")


@pytest.mark.parametrize("command", COMMANDS)
def test_every_number_has_limits(command):
    """No whole number beyond 32 bits, nothing that is not finite, reaches a command."""
    with own_flags(command):
        module = importlib.import_module(f"argenseg_jax.cli.{command}")
        numbers = [
            flag
            for name in (module.__name__, "argenseg_jax.cli.common")
            for flag in flags.FLAGS.flags_by_module_dict().get(name, [])
            if isinstance(flag.parser, (flags.FloatParser, flags.IntegerParser))
        ]
        for flag in numbers:
            for value in ("nan", "inf", "1e999", *([] if isinstance(flag.parser, flags.FloatParser) else [2**40])):
                with pytest.raises(UserError, match=flag.name):
                    parsing.parse(command, [f"--{flag.name}={value}"])
                flag.unparse()


# ------------------------------------------------------------------------------ how commands end


def ends(monkeypatch, capsys, error, *args):
    """(exit code, lines of stderr) of a command whose work raises."""

    def run():
        raise error

    monkeypatch.setattr(common, "setup_devices", lambda: None)
    monkeypatch.setattr(cli.importlib, "import_module", lambda _: type("M", (), {"run": staticmethod(run)}))
    code = cli.main(["verify", *args])
    out, err = capsys.readouterr()
    assert out == ""
    return code, err.strip().splitlines()


class Strange(Exception):
    """As jaxlib's and TensorStore's: no OSError."""


@pytest.mark.parametrize(
    "error, code, says",
    [
        (UserError("a\nb <X object at 0x7f00>"), 2, "b <X>"),
        (KeyboardInterrupt(), 130, "error: stopped by Ctrl-C"),
        (BrokenPipeError(32, "Broken pipe"), 141, "broken pipe"),
        (MemoryError(), 2, "error: not enough memory"),
        (MemoryError("Unable to allocate 8 TiB"), 2, "Unable to allocate 8 TiB"),
        (OSError(28, "No space left on device", "w/metrics.jsonl"), 2, "error: w/metrics.jsonl: No space left"),
        (PermissionError(13, "Permission denied", "w"), 2, "error: w: Permission denied"),
        (OSError(30, "Read-only file system"), 2, "error: Read-only file system"),
        (Strange("RESOURCE_EXHAUSTED: Out of memory allocating 99 bytes.\nmore"), 2, "allocating 99 bytes. more"),
        (ImportError("Please install gcsfs to access Google Storage"), 2, "gs:// needs gcsfs"),
        (Strange("write: No space left on device"), 2, "No space left on device"),
    ],
)
def test_what_the_machine_or_the_user_causes_is_one_line(monkeypatch, capfd, error, code, says):
    stdout = os.dup(1)
    try:
        got, lines = ends(monkeypatch, capfd, error)
    finally:
        os.dup2(stdout, 1)
    assert got == code and len(lines) == 1 and says in lines[0], lines


def test_a_fault_of_ours_asks_for_a_report(monkeypatch, capsys):
    code, lines = ends(monkeypatch, capsys, ZeroDivisionError("division by zero"), "--cpu_devices=1")
    assert code == 1 and lines[0].startswith("Traceback") and lines[-2] == "ZeroDivisionError: division by zero"
    assert lines[-1].startswith("error: unexpected ZeroDivisionError; please report this")
    assert lines[-1].endswith("argenseg verify --cpu_devices=1")


def test_debug_shows_where(monkeypatch, capsys):
    code, lines = ends(monkeypatch, capsys, OSError(28, "No space left on device"), "--debug")
    assert code == 2 and lines[0].startswith("Traceback") and lines[-1].startswith("error: No space left")


def test_a_real_process_ends_at_ctrl_c(tmp_path):
    """Before any work as well: the prompt of chat waits for a line."""
    import subprocess

    script = (
        "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "from argenseg_jax.cli import __main__ as cli\n"
        "def wait(*_):\n    print('ready', flush=True)\n    signal.pause()\n"
        "cli._run = wait\ncli.entry()\n"
    )
    child = subprocess.Popen(
        [sys.executable, "-c", script, "train"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert child.stdout.readline() == "ready\n"
    child.send_signal(signal.SIGINT)
    _, err = child.communicate(timeout=60)
    assert child.returncode == 130 and err == "error: stopped by Ctrl-C; what is complete is kept\n"


# ------------------------------------------------------------------------------ malloc


@pytest.mark.parametrize(
    "environment, nodes, packages, expected",
    [
        ({"JAX_PLATFORMS": "cpu"}, ["/dev/nvidia0"], ["jax_cuda12_plugin"], True),
        ({"JAX_PLATFORMS": "cuda,cpu"}, [], [], False),
        ({"JAX_PLATFORM_NAME": "tpu"}, [], [], False),
        ({}, ["/dev/nvidia0"], ["jax_cuda12_plugin"], False),
        ({}, ["/dev/nvidia0"], [], True),  # jax without its plugin computes on the CPU
        ({}, [], ["jax_cuda12_plugin", "libtpu"], True),
        ({}, ["/dev/accel0"], ["libtpu"], False),
        ({}, ["/dev/vfio/0"], ["libtpu"], False),
        ({}, [], [], True),
    ],
)
def test_malloc_is_told_to_keep_memory_on_the_cpu_only(monkeypatch, environment, nodes, packages, expected):
    for name in ("JAX_PLATFORMS", "JAX_PLATFORM_NAME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    import fnmatch

    monkeypatch.setattr(common.glob, "glob", lambda pattern: fnmatch.filter(nodes, pattern))
    monkeypatch.setattr(common.importlib.util, "find_spec", lambda name: name in packages or None)
    opened = []
    monkeypatch.setattr(
        common.ctypes,
        "CDLL",
        lambda name: (
            opened.append(name) or 1 / 0
            if not expected
            else type("C", (), {"mallopt": staticmethod(lambda *a: opened.append(a))})
        ),
    )
    common.keep_memory()
    assert common.on_cpu() == expected == bool(opened)
