"""The command line: whatever the arguments are, the work begins with flags that mean something, or one line ends it."""

import importlib
import math

import pytest
from absl import flags
from hypothesis import given
from hypothesis import strategies as st

from argenseg_jax.cli import __main__ as cli
from argenseg_jax.cli import common, parsing
from argenseg_jax.errors import UserError
from tests.cli.command import own_flags

COMMANDS = sorted(cli.COMMANDS)
VALUES = st.one_of(
    st.text(max_size=20),
    st.integers().map(str),
    st.floats().map(str),
    st.sampled_from(
        [
            "",
            " ",
            "\0",
            "\udcff",
            "\ud83d",
            "None",
            "nan",
            "inf",
            "-1",
            "0",
            "9" * 5000,
            "x" * 300,
            "..",
            "/",
            "/dev/zero",
            "gs://",
            "://",
            "s4://a",
            "a://b://c",
            "true",
            "()",
            "-",
            "--",
            "=",
            "é",
            "²",
        ]
    ),
)


@pytest.fixture(params=COMMANDS)
def command(request):
    """The name of a command whose flags are defined; they are gone afterwards."""
    with own_flags(request.param):
        importlib.import_module(f"argenseg_jax.cli.{request.param}")
        yield request.param


def own(command):
    """Names of the command's flags and of those that all commands share."""
    modules = (f"argenseg_jax.cli.{command}", "argenseg_jax.cli.common", "argenseg_jax.cli.parsing")
    return sorted(
        {flag.name for module in modules for flag in flags.FLAGS.flags_by_module_dict().get(module, [])} - {"config"}
    )


@given(st.data())
def test_flags_mean_something_or_are_refused(command, data):
    names = own(command)
    words = st.one_of(
        st.tuples(st.sampled_from(names), VALUES).map(lambda pair: f"--{pair[0]}={pair[1]}"),
        st.tuples(st.sampled_from(names), VALUES).map(lambda pair: f"-{pair[0]}={pair[1]}"),
        st.sampled_from(names).map(lambda name: f"--no{name}"),
        VALUES,
        VALUES.map(lambda text: f"--{text}"),
        VALUES.map(lambda text: f"--config.{text}"),
        VALUES.map(lambda text: f"--config.seed={text}"),
        VALUES.map(lambda text: f"--config={text}"),
    )
    args = data.draw(st.lists(words, max_size=4))
    if any(arg.lstrip("-").startswith(("flagfile", "undefok")) for arg in args):
        return  # absl's own
    flags.FLAGS.unparse_flags()
    for name in names:
        flags.FLAGS[name].present = 0
    try:
        parsing.parse(command, args)
    except UserError as fault:
        text = str(fault)
        assert "\n" not in text and 0 < len(text) < 700
        return
    for name in names:
        given_ = flags.FLAGS[name].value
        for value in given_ if isinstance(given_, list) else [given_]:
            assert not isinstance(value, (int, float)) or math.isfinite(value)
            assert not isinstance(value, int) or abs(value) < 2**31
            assert not isinstance(value, str) or ("\0" not in value and value.isascii()) or value.encode()


ERRORS = (
    ValueError,
    OSError,
    KeyError,
    RecursionError,
    MemoryError,
    UnicodeError,
    ArithmeticError,
    UserError,
    BrokenPipeError,
    KeyboardInterrupt,
    TimeoutError,
    StopIteration,
    EOFError,
)


@given(st.sampled_from(ERRORS), st.lists(st.one_of(st.text(max_size=30), st.integers(-1, 40)), max_size=3))
def test_any_end_is_told_in_the_last_line(kind, arguments):
    """Exit code 2 and one line for what the user or the machine causes; 1, a traceback and a request otherwise."""
    try:
        error = kind(*arguments)
    except TypeError:  # UnicodeError's arguments
        return
    line = cli._cause(error)
    assert line is None or isinstance(line, str)
    assert (line is None) <= (not isinstance(error, (UserError, KeyboardInterrupt, MemoryError, BrokenPipeError)))


@given(st.text(max_size=20), st.lists(VALUES, max_size=3))
def test_what_is_no_command(name, args):
    if name not in cli.COMMANDS and name not in ("-h", "--help", "help") and not {"-h", "--help"} & set(args):
        with pytest.raises(UserError, match="unknown command"):
            cli._run(name, args)


def test_the_environment_of_several_hosts(monkeypatch):
    for text in ("x", "²", "-1", "1.5", "9" * 5000, " 1", ""):
        monkeypatch.setenv("JAX_NUM_PROCESSES", text)
        with pytest.raises(UserError, match="JAX_NUM_PROCESSES"):
            common._number("JAX_NUM_PROCESSES")
