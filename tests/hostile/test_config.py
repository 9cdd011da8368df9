"""Configs, their texts and files: whatever they hold, there is a config that means something, or one line."""

import json
import math

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from argenseg_jax import config_files, config_keys
from argenseg_jax.errors import UserError
from argenseg_jax.models import variants
from configs import common
from tests.hostile import ODD, mutated

BASE = common.base().to_dict()
KEYS = sorted(config_keys.KEYS)
VALUES = st.one_of(
    st.sampled_from(ODD),
    st.integers(),
    st.floats(),
    st.text(max_size=20),
    st.binary(max_size=3),
    st.lists(st.one_of(st.text(max_size=5), st.integers(), st.none()), max_size=3).map(tuple),
    st.tuples(st.tuples(st.text(max_size=3), st.floats())),
    st.complex_numbers(),
)
TEXTS = st.one_of(
    st.text(max_size=30),
    st.from_regex(r"[-+]?[0-9_.eExX]{1,12}", fullmatch=True),
    st.from_regex(r"[(\[{'\"][^\x00]{0,20}[)\]}'\"]?", fullmatch=True),
    st.sampled_from(
        [
            "None",
            "true",
            "nan",
            "-inf",
            "1e999",
            "0x1f",
            "9" * 5000,
            "(" * 10**4,
            "'" * 99,
            "{'a': 1}",
            "(1, 2",
            "('(',)",
            "lambda: 0",
            "__import__('os')",
            "²",
            "1_0",
        ]
    ),
)


def refused(fault):
    """Whether an error is the one line that users see."""
    text = str(fault.value if hasattr(fault, "value") else fault)
    return "\n" not in text and 0 < len(text) < 700 and " at 0x" not in text


@given(mutated(BASE))
def test_a_config_is_right_or_refused(config):
    try:
        config_keys.check(config)
    except UserError as fault:
        assert refused(fault)
        return
    json.dumps(config, allow_nan=False)
    for key, value in config_keys.flattened(config).items():
        assert config_keys.parse(key, config_keys.spell(value)) == value


@given(mutated(json.loads(json.dumps({**BASE, "model": variants.resolve({"variant": "nano"})}))))
def test_a_saved_config_is_usable_or_refused(config):
    try:
        config_keys.check(config, saved="w/config.json")
    except UserError as fault:
        assert refused(fault) and str(fault).startswith("w/config.json: ")
        return
    for key, value in config.get("decode", {}).items():
        assert key not in ("max_text_tokens",) or 0 < value <= 65536


@given(mutated(variants.resolve({"variant": "nano"})))
def test_a_model_section_is_resolved_or_refused(section):
    try:
        variants.resolve(section)
    except UserError as fault:
        assert refused(fault)


@given(st.sampled_from(KEYS), VALUES)
def test_a_value_is_right_and_has_a_text_or_is_refused(key, value):
    fault = config_keys.fault(key, value)
    if fault:
        assert refused(fault) and fault.startswith(key)
        return
    (got,) = config_keys.flattened({key: value}).values()
    assert got == value or (isinstance(value, list) and list(got) == value)
    assert not isinstance(got, float) or math.isfinite(got)
    assert config_keys.parse(key, config_keys.spell(value)) == got


@given(st.sampled_from(KEYS), TEXTS)
@example("data.system", "None")
@example("data.system", "'None'")
@example("optim.lr", "1" * 10**5)
def test_a_text_is_a_value_or_refused(key, text):
    try:
        value = config_keys.parse(key, text)
    except UserError as fault:
        assert refused(fault) and key in str(fault)
        return
    assert config_keys.fault(key, value) is None
    assert config_keys.parse(key, config_keys.spell(value)) == value


@given(st.text(max_size=60), TEXTS)
def test_an_unknown_key_is_refused(key, text):
    if key not in config_keys.KEYS:
        for attempt in (
            lambda: config_keys.parse(key, text),
            lambda: config_keys.flattened({key: text}),
            lambda: config_keys.check({**BASE, key: text}),
        ):
            with pytest.raises(UserError) as fault:
                attempt()
            assert refused(fault)


STATEMENTS = [
    "x = 1",
    "x = nope",
    "1 / 0",
    "raise SystemExit",
    "def f(): return f()",
    "f()",
    "import nope",
    "  x = 1",
    "from configs import common",
    "def get_config(arg=None): return common.base()",
    "get_config = 3",
    "def get_config(): return {}",
    "raise MemoryError('m')",
    "raise GeneratorExit",
    "x = '\\ud83d'",
    "\0",
    "x = [",
    "raise StopIteration",
    "é = 'ü'",
    "(" * 300,
    "raise Exception('\\ud83d' * 9)",
    "lambda: (yield)",
    "await x",
    "return",
    "# coding: nope",
    "raise UnicodeDecodeError('utf-8', b'a', 0, 1, 'x')",
    "nonlocal x",
    "class get_config: pass",
    "import sys; sys.exit('a\\nb')",
    "assert 0, object()",
    "9" * 5000,
    "\ud83d",
]


@given(st.lists(st.sampled_from(STATEMENTS), max_size=6))
@example(["from configs import common", "def get_config(arg=None): return common.base()"])
def test_a_file_is_a_config_or_refused(tmp_path_factory, lines):
    path = tmp_path_factory.getbasetemp() / "hostile_config.py"
    path.write_bytes("\n".join(lines).encode("utf-8", "surrogatepass"))
    __import__("importlib").invalidate_caches()
    for cache in path.parent.glob("__pycache__/hostile_config.*"):
        cache.unlink()  # a file of the same second and size would be taken for the one before
    try:
        config_files.get_config(str(path))
    except UserError as fault:
        assert refused(fault) and str(path) in str(fault)


@given(st.lists(st.sampled_from(KEYS), min_size=1, max_size=4), st.data())
def test_settings_of_a_sweep_are_their_command_line(keys, data):
    """The text of each flag gives back what the point's config holds."""
    settings_ = {key: data.draw(VALUES, label=key) for key in keys}
    config = common.base()
    try:
        plain = config_keys.flattened(settings_)
    except UserError as fault:
        assert refused(fault)
        return
    config_files.override(config, plain)
    again = common.base()
    texts = {key: config_keys.spell(value) for key, value in plain.items()}
    config_files.override(again, {key: config_keys.parse(key, text) for key, text in texts.items()})
    assert again.to_dict() == config.to_dict()
