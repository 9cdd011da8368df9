"""Reads a TFDS folder of ArrayRecord shards without TFDS's loader, which imports what the folder names.

    features.json        names a Python class per column; TFDS would import its module
    dataset_info.json    splits, and how their shards are called
    NAME-SPLIT.array_record-00000-of-00004, ...   the records

Nothing is imported for a folder here: the two files are read as JSON, the classes are compared with
KNOWN, and the records are decoded by features that the caller passes.
"""

from __future__ import annotations

import bisect
import itertools
import os
import re
import tempfile
import threading
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import tensorflow_datasets as tfds
from etils import epath

from argenseg_jax import files
from argenseg_jax.data.sources import base
from argenseg_jax.errors import UserError, brief, located

FEATURES, INFO, FORMAT = "features.json", "dataset_info.json", "array_record"
_CLASSES = (
    tfds.features.FeaturesDict,
    tfds.features.Sequence,
    tfds.features.Image,
    tfds.features.Text,
    tfds.features.Tensor,
    tfds.features.Scalar,
    tfds.features.BBoxFeature,
    tfds.features.ClassLabel,
)
KNOWN = frozenset(name for c in _CLASSES for name in (f"{c.__module__}.{c.__name__}", *vars(c).get("ALIASES", ())))
_CLASS_KEYS = ("pythonClassName", "python_class_name", "type", "protoCls", "proto_cls")
_TEMPLATE = re.compile(r"(?:[\w.-]|\{(?:DATASET|SPLIT|FILEFORMAT|SHARD_INDEX|NUM_SHARDS|SHARD_X_OF_Y)\})*")
_NAME = re.compile(r"[\w.+-]+")


def columns(folder: epath.PathLike) -> dict[str, Any]:
    """{column: its description} of features.json, which may name only classes of KNOWN.

    Raises:
      UserError: another class (nothing is imported for a data set), or no features of TFDS's form.
    """
    path = epath.Path(folder) / FEATURES
    tree = files.read_json(path)
    for name in _class_names(tree):
        if not isinstance(name, str) or name not in KNOWN:
            raise UserError(
                f"{path}: names the class {brief(name, 80)!r}, which is none of the features "
                "of TFDS that are read here; nothing is imported for a data set"
            )
    with located(str(path), "description of features by TFDS", UserError):
        return {str(name): entry for name, entry in dict(tree["featuresDict"]["features"]).items()}


def _class_names(tree: Any) -> Iterator[Any]:
    """The values of all keys that name a class."""
    entries = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for key, value in entries:
        if key in _CLASS_KEYS and not isinstance(value, dict):  # a column may be called `type`
            yield value
        yield from _class_names(value)


def open_split(folder: epath.PathLike, split: str) -> Records:
    """Random access to the records of a split, or of a slice of it such as 'train[:10%]'.

    Raises:
      UserError: no such folder or split, no ArrayRecord shards, or an invalid description.
    """
    folder = epath.Path(folder)
    path = folder / INFO
    if not path.exists():
        raise UserError(
            f"{folder}: no data set; looked for {INFO} (the version folder of a TFDS data set) "
            "and prepared.json (of `prepare`); other layouts need their prefix, such as "
            "own:FOLDER"
        )
    info = files.read_json(path)
    with located(str(path), "description of a data set by TFDS", UserError):
        formats = [info.get("fileFormat"), *info.get("alternativeFileFormats", [])]
        if FORMAT not in formats:
            raise UserError(
                f"no random access to files of format {brief(formats[0], 40)}; build the data "
                f"set with file_format='{FORMAT}'"
            )
        splits = tfds.core.SplitDict([_split(entry, _named(info["name"], "name"), folder) for entry in info["splits"]])
        if split.partition("[")[0] not in splits:
            raise UserError(f"no split {split!r}; it has {', '.join(splits)}")
        try:
            spans = [(os.fspath(f.filename), f.skip, f.take) for f in splits[split].file_instructions]
        except (ValueError, AssertionError) as error:
            raise UserError(f"no split {split!r} ({brief(error)})") from None
    return Records(spans)


def _split(entry: Mapping[str, Any], data_set: str, folder: epath.Path) -> tfds.core.SplitInfo:
    name, template = _named(entry["name"], "split"), entry.get("filepathTemplate") or ""
    if not isinstance(template, str) or not _TEMPLATE.fullmatch(template):
        raise UserError(
            f"filepathTemplate {brief(template, 80)!r} of split {name!r}: a file name in this folder is expected"
        )
    lengths = [int(length) for length in entry["shardLengths"]]
    if not lengths or not all(0 <= length < 2**40 for length in lengths):
        raise UserError(f"shardLengths of split {name!r}: the number of records of each shard is expected")
    return tfds.core.SplitInfo(
        name=name,
        shard_lengths=lengths,
        num_bytes=0,
        filename_template=tfds.core.ShardedFileTemplate(
            data_dir=folder, dataset_name=data_set, split=name, filetype_suffix=FORMAT, template=template
        ),
    )


def _named(name: Any, what: str) -> str:
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise UserError(f"{what} {brief(name, 80)!r}: letters, digits and .+-_ are expected")
    return name


class _ShardPrefix(NamedTuple):
    """A shard up to the last record in use, in the form that ArrayRecord expects."""

    filename: str
    skip: int
    take: int
    examples_in_shard: int


class Records(Sequence):
    """Random access to the bytes of records in ArrayRecord shards, each shard opened when first needed.

    ArrayRecord's reader opens local files, and buckets of Google with its own client. A shard in any
    other file system is copied to a temporary folder first, which is deleted when the process ends.

    Args:
      spans: (shard, records to skip, records to take) each.
    """

    def __init__(self, spans: Sequence[tuple[str, int, int]]):
        self.spans = list(spans)
        self._ends = list(itertools.accumulate(take for *_, take in self.spans))
        self._lock, self._opened, self._copies = threading.Lock(), {}, None

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def __getitem__(self, index: int) -> bytes:
        """UserError where the shard cannot be read there."""
        base.check_index(index, len(self))
        k = bisect.bisect_right(self._ends, index)
        path, skip, take = self.spans[k]
        try:
            return self._reader(k)[skip + index - (self._ends[k] - take)]
        except UserError:
            raise
        except Exception as error:  # the reader's own: RuntimeError, ValueError, IndexError
            raise UserError(f"{path}: record {index} cannot be read ({brief(error)})") from None

    def _reader(self, k: int) -> Any:
        with self._lock:
            if k not in self._opened:
                from array_record.python import array_record_data_source as shards  # compiled code

                path, skip, take = self.spans[k]
                prefix: Any = _ShardPrefix(self._local(path), 0, skip + take, skip + take)
                self._opened[k] = shards.ArrayRecordDataSource([prefix])
            return self._opened[k]

    def _local(self, path: str) -> str:
        """The name by which ArrayRecord opens a shard."""
        files.check_regular(path)
        if not files.is_remote(path) or _has_own_client(path):
            return path
        if self._copies is None:
            self._copies = tempfile.TemporaryDirectory(prefix="argenseg_shards_")
        target = epath.Path(self._copies.name) / f"{len(self._opened)}_{epath.Path(path).name}"
        epath.Path(path).copy(target)
        return os.fspath(target)

    def __getstate__(self) -> dict[str, Any]:
        return {"spans": self.spans}  # another process opens the shards again

    def __setstate__(self, state: Mapping[str, Any]) -> None:
        self.__init__(state["spans"])


def _has_own_client(path: str) -> bool:
    """Whether ArrayRecord reads this bucket itself, as it does where gs:// is Google's."""
    if not path.startswith("gs://"):
        return False
    import fsspec

    try:
        return fsspec.get_filesystem_class("gcs").__module__.startswith("gcsfs")  # as etils asks for it
    except (ImportError, ValueError):
        return False
