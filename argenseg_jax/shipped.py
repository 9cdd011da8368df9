"""Where the configs and launchers are: beside the package in a clone, within it in an installed wheel."""

from __future__ import annotations

import pathlib

_PACKAGE = pathlib.Path(__file__).parent


def folder(name: str) -> pathlib.Path:
    """The folder `configs` or `launch`."""
    within = _PACKAGE / "_shipped" / name
    return within if within.is_dir() else _PACKAGE.parent / name
