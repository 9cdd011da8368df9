"""A folder that `prepare` has written, as a source: verified, with random access, a mixture if it was one."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from typing import Any

from etils import epath

from argenseg_jax import files
from argenseg_jax.data import images
from argenseg_jax.data.sample import Sample
from argenseg_jax.data.sources import base
from argenseg_jax.data.sources.records import TfdsSource
from argenseg_jax.errors import SampleError, UserError, brief, located

MANIFEST, PLAN, SUMMARY, SHARDS = "prepared.json", "plan.json", "summary.json", "shards"
FORMAT = 1
_AT_ONCE = 1 << 30  # bytes; a folder up to this size is checked byte by byte whenever it is opened


class PreparedSource:
    """Random access to the samples of a prepared folder.

    Opening it checks that every shard is there with its size, and of up to 1 GiB the checksums too (a
    second or two); `prepare --verify` checks larger ones.

    Attributes:
      manifest: the content of prepared.json.

    Raises:
      UserError: preparation not finished, a shard missing, or bytes other than those written.
    """

    def __init__(self, folder: epath.PathLike, max_pixels: int = images.MAX_PIXELS):
        self.path = epath.Path(folder)
        self.manifest = read_manifest(self.path)
        small = sum(shard["bytes"] for shard in self.manifest["shards"]) <= _AT_ONCE
        for fault in faults(self.path, self.manifest, checksums=small):
            raise UserError(fault)
        self._samples = TfdsSource(self.path, max_pixels=max_pixels)
        if len(self._samples) != sum(shard["samples"] for shard in self.manifest["shards"]):
            raise UserError(
                f"{self.path}: {MANIFEST} and dataset_info.json count other samples; prepare the "
                "data again, or copy the folder again"
            )

    def __len__(self) -> int:
        return len(self._samples)

    def __getitem__(self, index: int) -> Sample:
        base.check_index(index, len(self))
        try:
            return self._samples[index]
        except SampleError as error:
            raise SampleError(
                f"{self.path / self._shard(index)}: sample {index} cannot be read "
                f"({brief(error)}); see `prepare --verify`"
            ) from None

    @property
    def codes(self) -> Mapping[str, Any] | None:
        """What the stored codes depend on (decode/mask_tokenizer.py); None if none are stored."""
        return self.manifest["codes"]

    @property
    def window(self) -> tuple[float, float] | None:
        """The window of levels with which images were converted; None where none was needed."""
        window = self.manifest.get("window")
        return tuple(window) if window else None

    def spans(self) -> Iterator[tuple[Span, float]]:
        """(samples, weight) of each component of the mixture that was prepared."""
        first = 0
        for part in self.manifest["parts"]:
            if part["samples"]:
                yield Span(self, first, part["samples"]), part["weight"]
            first += part["samples"]

    def _shard(self, index: int) -> str:
        for shard in self.manifest["shards"]:
            if index < shard["samples"]:
                return shard["file"]
            index -= shard["samples"]
        raise IndexError(index)


class Span:
    """Some consecutive samples of a source."""

    def __init__(self, source: PreparedSource, first: int, length: int):
        self.source, self.first, self.length = source, first, length

    @property
    def path(self) -> epath.Path:
        return self.source.path

    @property
    def codes(self) -> Mapping[str, Any] | None:
        return self.source.codes

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> Sample:
        base.check_index(index, self.length)
        return self.source[self.first + index]


def is_prepared(folder: epath.Path) -> bool:
    """Whether `prepare` has begun or finished this folder."""
    return (folder / MANIFEST).exists() or (folder / PLAN).exists()


def read_manifest(folder: epath.Path) -> dict[str, Any]:
    """The content of prepared.json; UserError where there is none, or a key of it is missing."""
    if not (folder / MANIFEST).exists():
        done = len(list((folder / SHARDS).glob("*.json"))) if (folder / SHARDS).exists() else 0
        begun = (
            f"`prepare` has not finished it ({done} shards so far): run the same command again"
            if (folder / PLAN).exists()
            else f"looked for {MANIFEST}, which `prepare` writes"
        )
        raise UserError(f"{folder}: no prepared data set; {begun}")
    manifest = files.read_json(folder / MANIFEST)
    with located(str(folder / MANIFEST), "manifest as `prepare` writes it", UserError):
        if manifest["format"] != FORMAT:
            raise UserError(
                f"format {brief(manifest['format'], 40)}, this version reads {FORMAT}: prepare the data again"
            )
        shards, parts = manifest["shards"], manifest["parts"]
        _check(
            all(
                isinstance(s["file"], str)
                and "/" not in s["file"]
                and isinstance(s["sha256"], str)
                and _is_count(s["samples"])
                and _is_count(s["bytes"])
                for s in shards
            ),
            "shards",
        )
        _check(
            all(
                _is_count(p["samples"])
                and isinstance(p["weight"], (int, float))
                and p["weight"] >= 0
                and (p["weight"] > 0 or not p["samples"])
                for p in parts
            )
            and sum(p["samples"] for p in parts) == sum(s["samples"] for s in shards) > 0,
            "parts",
        )
        _check(manifest["codes"] is None or isinstance(manifest["codes"], Mapping), "codes")
        for key in ("resize", "samples", "broken"):
            _check(_is_count(manifest[key]), key)
    return manifest


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _check(valid: bool, key: str) -> None:
    if not valid:
        raise UserError(f"key `{key}` is not as `prepare` writes it")


def faults(folder: epath.Path, manifest: Mapping[str, Any], *, checksums: bool) -> Iterator[str]:
    """The problems of the shards, one line each."""
    for shard in manifest["shards"]:
        path = folder / shard["file"]
        if not path.exists():
            yield f"{path}: missing shard; prepare the data again, or copy the folder again"
            continue
        try:
            size = files.check_regular(path)
        except UserError as error:
            yield str(error)
            continue
        if size != shard["bytes"]:
            yield f"{path}: {size} bytes, {shard['bytes']} were written"
        elif checksums and checksum(path) != shard["sha256"]:
            yield f"{path}: checksum mismatch: the bytes are not those that were written"


def checksum(path: epath.PathLike) -> str:
    """SHA-256 of a file, in hex."""
    digest = hashlib.sha256()
    with epath.Path(path).open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
