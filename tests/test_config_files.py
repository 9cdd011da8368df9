"""Config files and overrides: what raises names file and line; a command line means what a config says."""

import copy
import os
import re
import shlex

import pytest

from argenseg_jax import config_files
from argenseg_jax.cli import common
from argenseg_jax.train import sweep
from configs import common as defaults
from configs import nano
from tests.cli.command import call, config_of, refused

HEAD = "from configs import common\n"
NANO = "configs/nano.py"


def changes(text):
    """A file that changes the defaults, in its fourth line."""
    return f"{HEAD}def get_config():\n    c = common.base()\n    {text}\n    return c\n"


@pytest.fixture
def config(tmp_path):
    """Writes configs/x.py of a text; returns its path."""

    def write(text, name="x"):
        path = tmp_path / "mine" / f"{name}.py"
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
        return str(path)

    return write


@pytest.mark.parametrize(
    "text, says",
    [
        ("x = nope\n", ":1: NameError: name 'nope' is not defined"),
        ("\nimport nothing_of_this_name\n", ":2: ModuleNotFoundError: No module named 'nothing_of_this_name'"),
        ("from configs import nope\n", ":1: ImportError: cannot import name 'nope'"),
        ("def get_config(arg=None)\n    return 1\n", ":1: SyntaxError: expected ':'"),
        ("def get_config():\n\tx = 1\n        y = 2\n", ":3: TabError: inconsistent use of tabs"),
        ("def f():\nreturn\n", ":2: IndentationError: expected an indented block"),
        (HEAD + "def get_config():\n    return 1 / 0\n", ":3: ZeroDivisionError: division by zero"),
        (
            HEAD + "def get_config():\n    return common.parse_arg('a=1')\n",
            ":3: ValueError: unknown config argument 'a'",
        ),
        ("def f():\n    f()\nf()\n", ":2: RecursionError: maximum recursion depth exceeded"),
        ("raise SystemExit('enough')\n", ":1: SystemExit: enough"),
        ("import sys\nsys.exit(3)\n", ":2: SystemExit: 3"),
        ("raise KeyError\n", ":1: KeyError"),
        ("assert False, 'no'\n", ":1: AssertionError: no"),
        ("class E(Exception):\n    def __str__(self):\n        raise E\nraise E\n", ":4: E"),
        ("raise ValueError(object())\n", ":1: ValueError: <object>"),
        ("def get_config(arg):\n    return None\n", ": TypeError: get_config() missing 1 required positional"),
        ("x = 1\n", " has no get_config()"),
        ("get_config = 5\n", " has no get_config()"),
        ("def get_config():\n    return None\n", "get_config() returns NoneType"),
        ("def get_config():\n    return {'train': {}}\n", "get_config() returns dict"),
        (changes("del c.train"), "the config has no train.steps"),
        (changes("del c.optim.ema"), "the config has no optim.ema"),
        (changes("c.train.nope = 1"), "no such config key: train.nope"),
        (changes("c.trian = {}"), "no such config key: trian; did you"),
        (changes("c.train.steps = 'x'"), ":4: TypeError: Could not override field 'steps'"),
        (changes("c.optim.lr = float('nan')"), "optim.lr=nan: write"),
        (changes("c.model.llm = dict(remat='full')"), "no such config key: model.llm.remat"),
        (changes("c.train.loss = c"), "no such config key: train.loss."),
        (changes("c.data.lock = __import__('threading').Lock()"), ": TypeError: cannot pickle"),
        (changes("c.unlock(); c.train = 5"), "TypeError"),
        (changes("del c.train; c.train = 5"), "train=5: a section"),
        (changes("c.data.sources = (c,)"), "data.sources="),
    ],
)
def test_a_file_that_raises_is_one_line(config, capfd, monkeypatch, text, says):
    monkeypatch.setattr(common, "setup_devices", lambda: pytest.fail("went on"))
    path = config(text)
    line = refused(capfd, "train", f"--config={path}", "--workdir=w")
    assert line.startswith(f"error: {path}") and says in line and " at 0x" not in line, line


def test_ctrl_c_in_a_file_passes(config):
    with pytest.raises(KeyboardInterrupt):
        config_files.load_module(config("raise KeyboardInterrupt\n"))


def test_a_fault_in_a_neighbour_names_the_line_that_asked_for_it(config, capfd):
    neighbour = config("\n\nx = = 1\n", "broken_neighbour")
    path = config("\nfrom mine import broken_neighbour\n")
    line = refused(capfd, "train", f"--config={path}", "--workdir=w")
    assert f"{path}:2: SyntaxError: invalid syntax ({neighbour}, line 3)" in line


def test_an_argument_for_a_file_without_one(config, capfd):
    path = config(HEAD + "def get_config():\n    return common.base()\n")
    line = refused(capfd, "train", f"--config={path}:fast", "--workdir=w")
    assert f"{path}: TypeError: get_config() takes 0 positional arguments but 1 was given" in line


@pytest.mark.parametrize(
    "path, says",
    [
        ("absent.py", "there is no file 'absent.py'"),
        (".", "there is no file '.'"),
        ("/dev/zero", "no file '/dev/zero'"),
        ("README.md", "no Python file"),
        ("x" * 300, "there is no file"),
    ],
)
def test_what_is_no_config_file(capfd, path, says):
    assert says in refused(capfd, "train", f"--config={path}", "--workdir=w")


def test_numpy_numbers_in_a_file_become_plain(config):
    path = config(
        HEAD + "import numpy as np\ndef get_config():\n    c = common.base()\n"
        "    c.optim.lr = np.float64(0.5)\n    c.model.llm = dict(width=np.int64(32))\n"
        "    c.data.sources = [np.str_('a')]\n    return c\n"
    )
    got = config_of("train", f"--config={path}")
    assert type(got["optim"]["lr"]) is float and type(got["model"]["llm"]["width"]) is int
    assert got["data"]["sources"] == ("a",) and type(got["data"]["sources"][0]) is str


# ------------------------------------------------------------------------------ overrides


@pytest.mark.parametrize(
    "flags, key, value",
    [
        (["--config.data.system=None"], "data.system", None),
        (["--config.data.system='None'"], "data.system", "None"),
        (["--config.data.system="], "data.system", ""),
        (["--config.data.system", "None"], "data.system", None),
        (["--config.optim.lr=1"], "optim.lr", 1.0),
        (["--config.vqvae.warmup=0.5"], "vqvae.warmup", 0.5),
        (["--config.data.augment"], "data.augment", True),
        (["--noconfig.data.image_last"], "data.image_last", False),
        (["--config.data.augment=true"], "data.augment", True),
        (["--config.data.sources=a b.jsonl"], "data.sources", ("a b.jsonl",)),
        (["--config.data.sources=a", "--config.data.sources=b"], "data.sources", ("a", "b")),
        (["--config.data.sources=('a', 'b*2')"], "data.sources", ("a", "b*2")),
        (["--config.data.sources=()"], "data.sources", ()),
        (["--config.optim.groups=(('.*', 2),)"], "optim.groups", ((".*", 2),)),
        (["--config.train.steps=2", "--config.train.steps=3"], "train.steps", 3),
        (["-config.mesh.fsdp=-1"], "mesh.fsdp", -1),
        (["--config.model.llm.depth=3"], "model.llm.depth", 3),  # not in the file, but a key of the table
    ],
)
def test_a_command_line_means_what_a_config_says(flags, key, value):
    want = nano.get_config()
    with want.unlocked(), want.ignore_type():
        if key.startswith("model.llm"):
            want.model.llm = {}
        holder = want
        *sections, name = key.split(".")
        for section in sections:
            holder = holder[section]
        holder[name] = value
    got = config_of("train", f"--config={NANO}", *flags)
    assert got == want.to_dict()
    assert type(config_files.config_keys.lookup(got, key)) is type(value)


@pytest.mark.parametrize(
    "flag, says",
    [
        ("--config.init_from=None", "--config.init_from=None: None is not allowed; write a text"),
        ("--config.train.steps=None", "None is not allowed"),
        ("--config.train.steps=-1", "write a whole number from 0"),
        ("--config.train.keep=-1", "from 0 (= all)"),
        ("--config.train.log_every=0", "from 1"),
        ("--config.train.checkpoint_every=0", "from 1"),
        ("--config.train.global_batch=0", "from 1"),
        ("--config.train.global_batch=-1", "from 1"),
        ("--config.seed=-1", "from 0"),
        ("--config.data.workers=-1", "from 0"),
        ("--config.data.threads=-1", "from 0"),
        ("--config.data.sources=(5,)", "texts"),
        ("--config.optim.warmup=nan", "a number"),
        ("--config.optim.freeze=('(',)", "regular expressions"),
        ("--config.optim.groups=(1, 2)", "pairs"),
        ("--config.train.lora.targets=(5,)", "regular expressions"),
        ("--config.train.lora.rank=-1", "from 0"),
        ("--config.data.max_tokens=1099511627776", "to 1048576"),
        ("--config.data.max_masks=1099511627776", "to 4096"),
        ("--config.data.max_tiles=1099511627776", "to 1024"),
        ("--config.optim.clip=-1", "no clipping"),
        ("--config.optim.lr=inf", "a number"),
        ("--config.data.max_broken=nan", "from 0 to 1"),
        ("--config.train.steps", "its value is missing"),
        ("--noconfig.train.steps", "true or false"),
        ("--config.train=5", "no such config key: train"),
        ("--config.=1", "no such config key"),
        ("--config.train.steps.x=1", "no such config key: train.steps.x"),
        ("--config.a[0]=1", "no such config key"),
        ("--config.__class__=1", "no such config key"),
        ("--config.train.steps=" + "9" * 5000, "write a whole number"),
    ],
)
def test_an_override_that_means_nothing_ends_before_any_work(capfd, monkeypatch, flag, says, tmp_path):
    """What the numbers of every key may be: tests/test_config_keys.py."""
    monkeypatch.setattr(common, "setup_devices", lambda: pytest.fail("went on"))
    line = refused(capfd, "train", f"--config={NANO}", f"--workdir={tmp_path / 'w'}", flag)
    assert says in line and flag.partition("=")[0].lstrip("-")[:20] in line and len(line) < 400
    assert not os.listdir(tmp_path)


def test_overrides_without_a_config(capfd):
    assert "--config is missing" in refused(capfd, "train", "--config.seed=1", "--workdir=w")


def test_a_reference_follows_what_an_override_sets(config):
    path = config(
        HEAD + "def get_config():\n    c = common.base()\n    c.vqvae.steps = c.train.get_ref('steps')\n    return c\n"
    )
    got = config_of("train", f"--config={path}", "--config.train.steps=7")
    assert got["train"]["steps"] == got["vqvae"]["steps"] == 7
    module, base = config_files.get_config(path)
    module.sweep = lambda add: add(**{"train.steps": 5})
    assert sweep.expand(module, base)[0].steps == 10


# ------------------------------------------------------------------------------ sweeps


SWEEP = """
import numpy as np
from configs import nano
def get_config(arg=None):
    return nano.get_config(arg)
def sweep(add):
    for lr in np.logspace(-4, -2, 3):
        add(**{"optim.lr": lr, "optim.weight_decay": np.float32(0.25)})
    for seed in np.arange(2):
        add(seed=seed)
    for system in (None, "", "None", "'quoted'", 'a "b" \\'c\\' $HOME `d`', "\u65e5\u672c \\\\ \\n x"):
        add(**{"data.system": system})
    add(**{"data.sources": ["a b*2", "c'd", 'e"f']})
    add(**{"data.sources": ("shapes:simple:train",), "data.augment": np.bool_(True)})
    add(**{"optim.groups": ((r"llm/\\d.*", 0.5), (".*", 1)), "optim.freeze": ()})
    add(**{"model.llm": {"depth": 2}, "train": {"steps": 3, "loss": {"text": 2}}})
    add(**{"model.vqvae.patch_nums": np.array([1, 4, 8])})
    add(**{"optim.lr": 1})
"""


def test_every_command_line_of_a_sweep_means_its_point(config, capfd, tmp_path):
    """As a shell splits the lines: numpy numbers, None, tuples, quotes, blanks and line ends come back."""
    path = config(SWEEP)
    code, out, _ = call(
        capfd,
        "sweep",
        f"--config={path}:devices=1",
        f"--workdir={tmp_path / 's'}",
        "--launch=commands",
        "--config.train.steps=5",
        "--config.data.root=a 'b'",
    )
    commands = shlex.split(out.rstrip("\n").rpartition("\n")[0])  # the last line is the command's own result
    module, base = config_files.get_config(f"{path}:devices=1")
    config_files.override(base, {"train.steps": 5, "data.root": "a 'b'"})
    points = sweep.expand(module, base)
    assert code == 0 and len(points) == 17
    lines = [[]]
    for word in commands:
        if word == "python" and lines[-1]:
            lines.append([])
        lines[-1].append(word)
    assert len(lines) == 17 and [line[:3] for line in lines] == [["python", "-m", "argenseg_jax"]] * 17
    for point, line in zip(points, lines):
        assert config_of(*line[3:]) == point.config
        assert not re.search("float64|array", " ".join(line)) and line[-1] == f"--workdir={tmp_path / 's'}/{point.name}"
    assert [p.config["optim"]["lr"] for p in points[:3]] == [1e-4, 1e-3, 1e-2]
    assert [p.config["data"]["system"] for p in points[5:8]] == [None, "", "None"]
    assert points[0].name == "optim.lr=0.0001,optim.weight_decay=0.25"
    assert len({point.name for point in points}) == 17


@pytest.mark.parametrize(
    "text, says",
    [
        ("def sweep(add):\n    add(**{'optim.lr': float('nan')})", "sweep adds {'optim.lr': nan}: optim.lr=nan"),
        ("def sweep(add):\n    add(**{'train.stepz': 1})", "did you mean train.steps?"),
        ("def sweep(add):\n    add({'seed': 1})", ":4: TypeError: "),
        ("def sweep(add):\n    1 / 0", ":4: ZeroDivisionError"),
        ("sweep = 5", "has no sweep()"),
        ("def sweep(add):\n    add(init_from=None)", "None is not allowed"),
        ("def sweep(add):\n    add(seed=1)\ndef metrics():\n    return 'loss'", "a tuple of names"),
        ("def sweep(add):\n    add(seed=1)\ndef metrics():\n    return ()", "a tuple of names"),
        ("def sweep(add):\n    add(seed=1)\ndef metrics():\n    return 1 / 0", ":6: ZeroDivisionError"),
    ],
)
def test_a_sweep_that_raises_is_one_line(config, capfd, tmp_path, text, says):
    path = config(f"from configs import nano\nget_config = nano.get_config\n{text}\n")
    line = refused(capfd, "sweep", f"--config={path}", f"--workdir={tmp_path / 's'}", "--launch=nothing")
    assert path in line and says in line, line
    assert not (tmp_path / "s").exists()


def test_a_point_of_other_settings_is_not_trained_already(tmp_path, monkeypatch):
    """A sweep repeated with another override asks `train`, which names what differs."""
    import json
    import types

    from argenseg_jax.models import variants

    monkeypatch.setattr(sweep, "newest_step", lambda folder: 1000)
    module = types.SimpleNamespace(__file__="x.py", sweep=lambda add: add(seed=1))
    (point,) = sweep.expand(module, defaults.base())
    saved = copy.deepcopy({**point.config, "model": variants.resolve(point.config["model"])})
    (tmp_path / "config.json").write_text(json.dumps(saved))
    assert sweep.is_trained(tmp_path, point)
    saved["train"] |= {"log_every": 7}  # may differ
    (tmp_path / "config.json").write_text(json.dumps(saved))
    assert sweep.is_trained(tmp_path, point)
    saved["optim"] |= {"lr": 7.0}
    (tmp_path / "config.json").write_text(json.dumps(saved))
    assert not sweep.is_trained(tmp_path, point)


# ------------------------------------------------------------------------------ compile --search


@pytest.mark.parametrize(
    "code, out, err, says",
    [
        (-9, "", "", "killed by signal 9; is there enough memory?"),
        (1, "", "", "ended with exit code 1, without a word"),
        (2, "", "a\nerror: no\n", "error: no"),
        (0, "", "", "ended with exit code 0"),
        (0, "no JSON\n", "", "ended with exit code 0"),
    ],
)
def test_a_search_survives_a_child_that_dies(monkeypatch, capfd, code, out, err, says):
    import json
    import subprocess

    from argenseg_jax.cli import __main__ as cli  # noqa: F401

    monkeypatch.setattr(subprocess, "run", lambda *a, **k: subprocess.CompletedProcess(a, code, out, err))
    got, text, lines = call(capfd, "compile", f"--config={NANO}", "--topology=v5e:2x2", "--search")
    assert got == 0 and json.loads(text)["fits"] is False and any(says in line for line in lines), lines
