"""THE table of the config's keys: type, range, choices, and what 0 and None mean; checked before any work.

Defaults and the keys' meaning are in configs/common.py; a test compares the two. For users of the
table:

  check(config)                    a resolved config, or a UserError that names key, value and rule
  check(config, saved=PATH)        a config.json that is read back: keys of other versions pass
  check_model(section, where)      a `model` section (variants.build, config.json of an HF folder)
  fault(key, value)                what is wrong with one value, or None
  parse(key, text), spell(value)   a value <-> its text after --config.KEY=; each undoes the other
  flattened(settings)              {'optim.lr': value}, checked, of what a sweep or a script sets
  plain(value)                     numpy numbers and arrays -> those of Python
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from argenseg_jax.config_rules import (
    Key,
    choice,
    flag,
    is_group,
    match,
    read_literal,
    real,
    regexes,
    several,
    text,
    texts,
    whole,
    wholes,
    window,
)
from argenseg_jax.errors import UserError, brief

STEPS = 10**9  # two phases of STEPS steps still count in int32
METRICS = (
    "referring",
    "grefcoco",
    "semantic",
    "boxes",
    "instances",
    "interactive",
    "anomaly",
    "fidelity",
    "pope",
    "vqav2",
    "textvqa",
    "mmmu",
    "exact",
)  # of eval/metrics/registry.py
PROMPTS = ("referring", "semantic", "reasoning")  # of data/sources/templates.py
DTYPES = ("float32", "bfloat16")
REMAT = ("none", "full", "dots")


# ---------------------------------------------------------------------------------- the table


def _optimizer() -> dict[str, Key]:
    return {
        "name": choice("adamw", "adafactor", "muon"),
        "lr": real(0, 1e3),
        "adam_lr": real(0, 1e3, "lr"),
        "schedule": choice("cosine", "constant", "wsd"),
        "warmup": real(0, STEPS),
        "decay": real(0, STEPS),
        "final": real(0, 1),
        "b1": real(0, 1, below=True),
        "b2": real(0, 1, below=True),
        "eps": real(0, 1, above=True),
        "momentum": real(0, 1, below=True),
        "matrices": regexes(),
        "weight_decay": real(0, 1e3),
        "clip": real(0, 1e9, "no clipping"),
        "freeze": regexes(),
        "groups": several(is_group, "(regular expression, multiplier >= 0) pairs, such as (('.*', 1.0),)", least=1),
        "ema": real(0, 1, "none", below=True),
    }


def _named(prefix: str, keys: Mapping[str, Key]) -> dict[str, Key]:
    return {f"{prefix}.{name}": key for name, key in keys.items()}


MODEL: dict[str, Key] = {  # fields of models/*.py that a config sets
    "variant": text(),
    "image_size": whole(1, 8192),
    "block_causal": flag(),
    "unroll": flag(),
    "dtype": choice(*DTYPES),
    "remat": choice(*REMAT),
    **_named(
        "vision",
        {
            "image_size": whole(1, 8192),
            "patch": whole(1, 1024),
            "width": whole(1, 65536),
            "depth": whole(1, 1024),
            "heads": whole(1, 1024),
            "mlp": whole(1, 2**20),
            "norm": choice("layer_norm", "rms_norm"),
            "eps": real(0, 1, above=True),
            "qk_norm": flag(),
            "qkv_bias": flag(),
            "ls_init": real(-1e3, 1e3),
            "drop_path": real(0, 1, below=True),
        },
    ),
    **_named("connector", {"ratio": real(0, 1, above=True), "version": choice("v1", "v2")}),
    **_named(
        "llm",
        {
            "width": whole(1, 65536),
            "depth": whole(1, 1024),
            "heads": whole(1, 1024),
            "kv_heads": whole(1, 1024),
            "head_dim": whole(2, 1024),
            "mlp": whole(1, 2**20),
            "eps": real(0, 1, above=True),
            "rope_theta": real(1, 1e12, above=True),
            "ntk_factor": real(1, 1e4),
            "max_positions": whole(1, 2**24),
            "qkv_bias": flag(),
            "tied": flag(),
            "qk_norm": flag(),
            "rope_2d": flag(),
        },
    ),
    **_named(
        "vqvae",
        {
            "ch": whole(1, 16384),
            "ch_mult": wholes(1, 64),
            "num_res_blocks": whole(0, 64),
            "z_channels": whole(1, 16384),
            "codebook_size": whole(2, 2**20),
            "patch_nums": wholes(1, 512),
            "num_phi": whole(1, 512),
            "phi_ratio": real(-1, 1),
            "beta": real(0, 1e6),
            "using_sa": flag(),
            "using_mid_sa": flag(),
            "patch_size": whole(1, 512),
            "local": flag(),
            "dead_zone": real(0, 1e6),
        },
    ),
    **_named("vocab", {"base": whole(1, 2**24), "eos": whole(0, 2**24), "pad": whole(0, 2**24)}),
}
KEYS: dict[str, Key] = {
    "seed": whole(0, 2**31 - 1),
    "init_from": text(),
    **_named("model", MODEL),
    "vqvae.steps": whole(0, STEPS, "take it from init_from"),
    "vqvae.batch": whole(1, 2**20),
    **_named("vqvae", _optimizer()),
    **_named(
        "data",
        {
            "sources": texts(),
            "max_tokens": whole(1, 2**20),
            "max_labels": whole(0, 2**20, "max_tokens"),
            "image_last": flag(),
            "system": text(none="the official message"),
            "workers": whole(0, 1024, "the training process"),
            "threads": whole(0, 1024),
            "root": text(),
            "pack": whole(0, 65536, "one sample per sequence"),
            "max_tiles": whole(1, 1024),
            "sample_tiles": whole(0, 1024, "max_tiles"),
            "max_masks": whole(0, 4096),
            "pad_to_square": flag(),
            "window": window(),
            "max_pixels": whole(0, 2**31 - 1, "64 Mi"),
            "allow_outside": flag(),
            "augment": flag(),
            "recolour": real(0, 1),
            "prompt_drop": real(0, 1),
            "codes": flag(),
            "max_broken": real(0, 1),
        },
    ),
    **_named("optim", _optimizer()),
    **_named("mesh", {axis: whole(1, 65536, rest=True) for axis in ("dcn_data", "data", "fsdp", "tensor")}),
    **_named(
        "train",
        {
            "steps": whole(0, STEPS),
            "global_batch": whole(1, 2**20),
            "microbatch": whole(0, 2**20, "global_batch"),
            "remat": choice(*REMAT),
            "dtype": choice(*DTYPES),
            "grad_dtype": choice("", *DTYPES),
            "checkpoint_every": whole(1, STEPS),
            "keep": whole(0, STEPS, "all"),
            "log_every": whole(1, STEPS),
            "keep_best": match(r"|(min|max):.+", "min:NAME or max:NAME, such as min:loss, or ''"),
            "sample_every": whole(0, STEPS, "never"),
            "max_skipped": whole(0, STEPS, "any number"),
            "allow_fresh": regexes(),
        },
    ),
    **_named(
        "train.lora",
        {"rank": whole(0, 65536, "none"), "alpha": real(0, 1e6, "rank"), "targets": regexes(), "also": regexes()},
    ),
    **_named(
        "train.loss",
        {
            "soft_targets": real(0, 1e6),
            "scale_power": real(0, 100),
            "foreground": real(0, 1e6),
            "text": real(0, 1e6),
            "corrupt": real(0, 1),
            "chunk": whole(0, 2**20, "all"),
            "scale_accuracy": flag(),
        },
    ),
    "decode.max_text_tokens": whole(1, 65536),
    "eval.prompt": match(
        rf"{'|'.join(PROMPTS)}|.*{{sents?}}.*", f"one of {', '.join(PROMPTS)}, or a text with {{sent}}"
    ),
    "eval.data": texts(),
    "eval.metric": choice("", *METRICS),
    "eval.masks": choice("first", "union"),
}
SECTIONS = {key.rpartition(".")[0] for key in KEYS} - {""} | {"model"}  # 'train', 'train.lora', ...
# What every user of a saved config.json reads; the rest tells how the run was trained, or is checked by
# `evaluate` alone.
_READ_BACK = re.compile(
    r"(model|decode|train\.lora)(\.|$)|train\.dtype$|(train|data|eval)$|data\.(sources|root|"
    r"system|image_last|max_tiles|sample_tiles|pad_to_square|window|max_pixels)$"
)


# ---------------------------------------------------------------------------------- checks


def fault(key: str, value: Any) -> str | None:
    """What is wrong with the value of a known key, as one line without its end; None where nothing is."""
    known = KEYS[key]
    if value is None:
        return None if known.none else f"{key}=None: None is not allowed; write {known.rule}"
    try:
        if known.good(value):
            return None
    except (TypeError, ValueError, ArithmeticError):  # numbers of unexpected types
        pass
    if known.rule.startswith("one of"):
        return f"{key} {shown(value)} is unknown; there are {known.rule.removeprefix('one of ')}"
    return f"{key}={shown(value)}: write {known.rule}"


def check(config: Mapping[str, Any], *, saved: str | None = None) -> None:
    """Every section and key of a resolved config; UserError with the key, the value and the rule.

    Args:
      config: nested dicts (or a ConfigDict) with plain values; tuples may be lists, as JSON has them.
      saved: the file, where it is a config.json that some version wrote: keys may be missing, unknown
        ones are ignored, and only what is used of it must be right.
    """
    try:
        known = dict(_given(config, "", strict=not saved))
        for key, value in known.items():
            if saved and not _READ_BACK.match(key):
                continue
            if key in SECTIONS:
                if not _is_section(value):
                    raise UserError(f"{key}={shown(value)}: a section of keys is expected")
            elif problem := fault(key, value):
                raise UserError(problem)
        if not saved:
            for key in KEYS:
                if key not in known and not key.startswith("model."):
                    raise UserError(f"the config has no {key}; start from common.base() of configs/common.py")
            if "model" not in known:
                raise UserError("the config has no section `model`; start from common.base()")
    except UserError as error:
        raise UserError(f"{saved}: {error}" if saved else str(error)) from None


def check_model(section: Any, where: str = "model") -> None:
    """Types and ranges of a `model` section, unknown fields refused; sizes are not compared here.

    `where` is what messages name: 'config.json' gives "config.json: llm.width='x': write ...".
    """
    if not _is_section(section):
        raise UserError(f"{where}={shown(section)}: a section of keys is expected")
    try:
        for key, value in _given({"model": section}, "", strict=True):
            if key in SECTIONS:
                if not _is_section(value):
                    raise UserError(f"{key}={shown(value)}: a dict of fields is expected")
            elif problem := fault(key, value):
                raise UserError(problem)
    except UserError as error:
        text = str(error)
        raise UserError(text if where == "model" else f"{where}: {text.removeprefix('model.')}") from None


def _given(values: Any, prefix: str, strict: bool) -> Iterator[tuple[str, Any]]:
    """(key, value) of the sections and known keys; an unknown one is a UserError where `strict`."""
    if not _is_section(values):
        if not prefix:
            raise UserError(f"{shown(values)} is no config: sections of keys are expected")
        return
    for name, value in values.items():
        key = f"{prefix}{name}"
        if key in SECTIONS:
            yield key, value
            yield from _given(value, f"{key}.", strict)
        elif key in KEYS:
            yield key, value
        elif strict:
            raise UserError(unknown(key))


def _is_section(value: Any) -> bool:
    return isinstance(value, Mapping) or callable(getattr(value, "items", None))  # ConfigDict is no Mapping


def unknown(key: str) -> str:
    """What to say of a key that is not in the table, with the nearest that is."""
    section, _, name = key[:200].rpartition(".")
    beside = {k.rpartition(".")[2]: k for k in (*KEYS, *SECTIONS) if k.rpartition(".")[0] == section}
    near = (
        difflib.get_close_matches(name, beside, 1)
        or [k for k in KEYS if k.rpartition(".")[2] == name]
        or difflib.get_close_matches(key[:200], KEYS, 1)
    )
    return f"no such config key: {brief(key, 100)}" + (
        f"; did you mean {beside.get(near[0], near[0])}?" if near else ""
    )


def shown(value: Any) -> str:
    """A value within a message: one short line, whatever it is."""
    try:
        return brief(repr(value), 80)
    except Exception:  # repr of strangers' classes, of numbers with thousands of digits, of deep tuples
        return f"({type(value).__name__})"


# ---------------------------------------------------------------------------------- values and texts


def plain(value: Any) -> Any:
    """Numpy numbers -> Python's, arrays -> tuples, in nested mappings and tuples alike."""
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, np.ndarray):
        return plain(tuple(value)) if value.ndim else value.item()
    if isinstance(value, Mapping):
        return {name: plain(v) for name, v in value.items()}
    if isinstance(value, (tuple, list)):
        return type(value)(plain(v) for v in value) if type(value) in (tuple, list) else tuple(map(plain, value))
    return value


def parse(key: str, text: str) -> Any:
    """The value of a flag --config.KEY=TEXT; UserError where the key or the value is wrong."""
    if key not in KEYS:
        raise UserError(unknown(key))
    known = KEYS[key]
    if text == "None":
        value = None
    else:
        try:
            value = known.read(text)
        except (ValueError, OverflowError):
            raise UserError(f"{key}={brief(text, 80)}: write {known.rule}") from None
    if problem := fault(key, value):
        raise UserError(problem)
    return value


def spell(value: Any) -> str:
    """A value as text that `parse` reads back; numpy numbers and lists as the plain values they stand for."""
    value = plain(value)
    if isinstance(value, str):
        quoted = value == "None" or (value[:1] in ("'", '"') and read_literal(value) != value)
        return repr(value) if quoted else value
    return repr(tuple(value) if isinstance(value, list) else value)


def assign(config: Any, key: str, value: Any) -> None:
    """Sets a known key in nested mappings; the value must be right already. Sections are made where missing."""
    *sections, name = key.split(".")
    for section in sections:
        if section not in config:
            config[section] = {}
        config = config[section]
    config[name] = value


def lookup(config: Any, key: str) -> Any:
    """The value of a key that is there."""
    for name in key.split("."):
        config = config[name]
    return config


def flattened(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """{'optim.lr': value} of nested or dotted settings, as `parse` gives them; UserError for a wrong one."""
    found: dict[str, Any] = {}
    for name, value in settings.items():
        key = f"{prefix}{name}"
        if key in SECTIONS:
            if not _is_section(value):
                raise UserError(f"{key}={shown(value)}: a section of keys is expected")
            found |= flattened(value, f"{key}.")
            continue
        if key not in KEYS:
            raise UserError(unknown(key))
        if problem := fault(key, value := plain(value)):
            raise UserError(problem)
        if isinstance(value, list):
            value = tuple(value)
        found[key] = float(value) if KEYS[key].read is float else value
    return found
