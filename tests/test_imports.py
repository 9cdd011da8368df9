"""Imports point down only, and the rooms that must run anywhere import little (read from the source)."""

import ast
import pathlib
import sys

import pytest

ROOT = pathlib.Path(__file__).parent.parent
PACKAGE = "argenseg_jax"
# Higher rooms may import lower ones and themselves.
RANKS = {
    "cli": 11,
    "compile": 10,
    "parity": 10,
    "train": 8,
    "eval": 7,
    "decode": 6,
    "ckpt": 5,
    "data": 4,
    "interop": 4,
    "models": 3,
    "sharding": 2,
    "scales": 1,
    "vocab": 1,
    "pixels": 1,
    "trees": 1,
    "config_rules": 0,
    "config_keys": 1,
    "config_files": 2,
    "locks": 2,
    "files": 1,
    "distributed": 1,
    "hardware": 1,
    "shipped": 0,
    "processes": 0,
    "errors": 0,
}
NUMPY_ONLY = ("scales", "vocab", "pixels", "trees", "config_keys", "config_rules", "processes", "errors")
LIGHT = {"jax", "flax", "optax", "numpy", "safetensors", "ml_dtypes"}  # for models/ and decode/


def files():
    return sorted((ROOT / PACKAGE).rglob("*.py"))


def room(path):
    parts = path.relative_to(ROOT / PACKAGE).parts
    return parts[0].removesuffix(".py")


def imports(path):
    """(line, dotted module) of every import, at the top or inside functions."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}:{node.lineno}: relative import"
            yield from ((node.lineno, f"{node.module}.{alias.name}") for alias in node.names)


def external(path):
    """Third-party packages that a file imports."""
    return {name.split(".")[0] for _, name in imports(path)} - {PACKAGE} - sys.stdlib_module_names


@pytest.mark.parametrize("path", files(), ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_point_down(path):
    own = room(path)
    if own in ("__init__", "__main__"):
        return
    for line, name in imports(path):
        if name.startswith(PACKAGE + "."):
            other = name.split(".")[1]
            assert other == own or RANKS[other] < RANKS[own], f"{path}:{line}: {own} imports {other}"


def test_light_rooms():
    for path in files():
        if room(path) in ("models", "decode"):
            assert external(path) <= LIGHT, (path, external(path) - LIGHT)
        if room(path) in NUMPY_ONLY:
            assert external(path) <= {"numpy"}, path
        if room(path) == "data" or "metrics" in path.parts:
            assert not external(path) & {"jax", "flax", "optax"}, path


def test_configs_never_import_the_package():
    for path in (ROOT / "configs").glob("*.py"):
        assert external(path) <= {"ml_collections", "configs"}, path
        assert not any(name.startswith(PACKAGE) for _, name in imports(path)), path


def test_nothing_unpickles():
    for path in files():
        for line, name in imports(path):
            assert name.split(".")[0] not in ("pickle", "dill", "cloudpickle"), f"{path}:{line}"


def test_every_file_says_what_it_is_for():
    for path in files() + list((ROOT / "configs").glob("*.py")) + list((ROOT / "tests").rglob("test_*.py")):
        text = path.read_text()
        assert not text or (ast.get_docstring(ast.parse(text)) and text.startswith('"""')), path
        assert len(text.splitlines()) <= 500, f"{path} is too long"


def test_commands_import_no_jax_to_define_their_flags():
    """Help and mistakes answer at once: a command imports jax, and its rooms, inside run()."""
    for path in (ROOT / PACKAGE / "cli").glob("*.py"):
        for node in ast.parse(path.read_text()).body:
            for name in [a.name for a in node.names] if isinstance(node, ast.Import) else []:
                assert name.split(".")[0] not in LIGHT - {"numpy"}, f"{path}:{node.lineno}"
            if isinstance(node, ast.ImportFrom) and node.module.startswith(PACKAGE):
                below = [f"{node.module}.{a.name}".split(".")[1] for a in node.names]
                assert set(below) <= {"cli", *NUMPY_ONLY}, f"{path}:{node.lineno}"
