"""Any source -> a folder of ArrayRecord shards, shard by shard: in this process, in several, or by Beam.

    O/samples-train.array_record-00000-of-00004, ...   the samples, in TFDS form (data/sources/records.py)
    O/shards/00000.json, ...   of each finished shard: counts, checksum, skipped samples and why
    O/plan.json                what is being prepared; a second call must ask for the same
    O/dataset_info.json, features.json, summary.json, prepared.json   at the end, the last one last

A shard gets its name only when it is complete, so an interrupted job resumes with the missing shards. The
same job writes the same bytes in any process.
"""

from __future__ import annotations

import collections
import concurrent.futures
import contextlib
import dataclasses
import functools
import io
import itertools
import json
import multiprocessing
import os
import pathlib
import sys
import tempfile
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import tensorflow_datasets as tfds
import tqdm
from etils import epath
from PIL import Image

from argenseg_jax import files, locks, processes
from argenseg_jax.data import mixture, prompt, transforms
from argenseg_jax.data.reader import Reading
from argenseg_jax.data.sample import Sample
from argenseg_jax.data.sources import records, templates, tfds_folder
from argenseg_jax.data.sources.prepared import FORMAT, MANIFEST, PLAN, SHARDS, SUMMARY, checksum
from argenseg_jax.data.statistics import Statistics
from argenseg_jax.errors import SampleError, UserError, brief, located

GROUP = 16  # samples whose masks are tokenised together
_SHOWN = 100  # skipped samples that summary.json lists
SPLIT = "train"


class Coder(Protocol):
    """Masks -> their codes; hashable, and sent to worker processes."""

    num_codes: int

    def identity(self) -> dict[str, Any]:
        """What the codes depend on, for JSON."""
        ...

    def __call__(self, masks: Sequence[np.ndarray]) -> np.ndarray:
        """u8[H, W] or u8[H, W, 3] each -> i32[K, N]."""
        ...


@dataclasses.dataclass(frozen=True)
class Job:
    """What is prepared, and where.

    Attributes:
      sources: as of `open_mixture`; none endless.
      out: the folder, local or gs://.
      root, prompt, image_root: as of `open_mixture`.
      draws: 0 reads every sample by its index, as evaluation does; K > 0 draws each one K times if the
        source is random, as training does.
      resize: S: images, masks and the arrays of meta become S x S, so that a model with one tile of this
        side reads bit-identical tiles. 0 = unchanged.
      shard_samples: samples of a shard, including skipped ones.
      coder: its codes of the masks (before any resize) are stored in the records.
      window, max_pixels, allow_outside: as of data/reader.Reading.
    """

    sources: tuple[str, ...]
    out: str
    root: str = ""
    prompt: str = "referring"
    image_root: str = ""
    draws: int = 0
    resize: int = 0
    shard_samples: int = 1000
    coder: Coder | None = None
    window: tuple[float, float] | tuple[()] = ()
    max_pixels: int = 0
    allow_outside: bool = False

    def identity(self) -> dict[str, Any]:
        """Everything that the bytes of the shards depend on, except the samples themselves."""
        settings = {
            f.name: getattr(self, f.name)
            for f in dataclasses.fields(self)
            if f.name not in ("out", "coder", "window", "max_pixels", "allow_outside")
        }
        settings |= {"window": list(self.window)} if self.window else {}
        settings |= {"max_pixels": self.max_pixels} if self.max_pixels else {}
        settings |= {"allow_outside": True} if self.allow_outside else {}
        return {
            **settings,
            "sources": list(self.sources),
            "format": FORMAT,
            "codes": self.coder and self.coder.identity(),
        }


class _Items:
    """The samples of a job by number: component after component of the mixture, draw after draw."""

    def __init__(self, job: Job):
        self.job = job
        self.components = mixture.open_mixture(
            job.sources,
            job.root,
            job.prompt,
            job.image_root,
            Reading(job.window, job.max_pixels, allow_outside=job.allow_outside),
        )
        if job.prompt != templates.DEFAULT and not any(mixture.takes_prompt(c.source) for c in self.components):
            raise UserError(f"prompt {job.prompt!r} changes nothing: these sources contain their own questions")
        self.counts = []
        for component in self.components:
            if component.length >= mixture.ENDLESS:
                raise UserError(
                    "an endless source cannot be prepared: give it a size, such as shapes:full:train:100000"
                )
            is_random = hasattr(component.source, "draw")
            self.counts.append(component.length * (max(job.draws, 1) if is_random else 1))
        self.ends = np.cumsum(self.counts)

    def __len__(self) -> int:
        return int(self.ends[-1])

    def read(self, number: int) -> tuple[int, Sample]:
        """(number of its component, the sample); SampleError where training would raise one."""
        k = int(np.searchsorted(self.ends, number, side="right"))
        component, offset = self.components[k], int(number - (self.ends[k - 1] if k else 0))
        draw, index = divmod(offset, component.length)
        if self.job.draws:
            sample = mixture.draw(component.source, index, np.random.default_rng((index, draw)))
        else:
            sample = component.source[index]
        prompt.check(sample.conversations, len(sample.images), len(sample.masks), sample.name)
        return k, sample


@functools.lru_cache(maxsize=1)
def _items(job: Job) -> _Items:
    """Opened once per process."""
    return _Items(job)


def prepare(job: Job, *, workers: int = 1, runner: str = "", beam_options: Sequence[str] = ()) -> dict[str, Any]:
    """Writes the missing shards, and returns the content of summary.json.

    Args:
      job: what to prepare.
      workers: processes that write shards; 1 = this one.
      runner: of Apache Beam, such as DirectRunner or DataflowRunner, in place of `workers`.
      beam_options: of the runner, each `name=value`.

    Raises:
      UserError: a source cannot be opened or has no readable sample, or `out` has other content.
    """
    _items.cache_clear()  # the files may have changed since this process last looked
    out, items = files.to_path(job.out), _items(job)
    if not job.window and (found := mixture.window(items.components)):
        job = dataclasses.replace(job, window=found)  # for all workers, and for training on the result
        items = _items(job)
    plan = {**job.identity(), "samples": len(items)}
    total = -(-len(items) // job.shard_samples)
    with locks.Lock(out / locks.FILE, f"--out: {out}"):
        _claim(out, plan)
        bar = tqdm.tqdm(
            total=len(items),
            unit=" samples",
            file=sys.stderr,
            dynamic_ncols=True,
            delay=1,
            mininterval=0.5 if sys.stderr.isatty() else 30,
        )
        with bar:
            for number in _run(job, range(total), workers, runner, beam_options):
                bar.update(len(_numbers(job, number, len(items))))
        return _finish(job, items, plan, total)


def write_shard(job: Job, number: int) -> int:
    """Writes a shard, unless it exists and is complete; returns its number.

    Every kind of worker runs this function: it depends only on the job.
    """
    items = _items(job)
    total = -(-len(items) // job.shard_samples)
    out = epath.Path(job.out)
    target, note = out / shard_name(number, total), out / SHARDS / f"{number:05d}.json"
    if _is_complete(target, note):
        return number
    content = _ShardContent()
    serialize = _serializer(job)
    with tempfile.TemporaryDirectory() as remote:
        # Two workers may write the same shard (Beam tries stragglers twice): each has its own file.
        name = f".{target.name}.{uuid.uuid4().hex}.tmp"
        temporary = pathlib.Path(remote if files.is_remote(out) else out) / name
        serialized = ((k, serialize(records.encode(s))) for k, s in content.samples(job, items, number))
        with files.writing(target), contextlib.ExitStack() as undo:
            undo.callback(temporary.unlink, missing_ok=True)  # frees space on a full disk
            tfds.core.ExampleWriter(tfds.core.FileFormat.ARRAY_RECORD).write(temporary, serialized)
            size, digest = temporary.stat().st_size, checksum(temporary)
            if files.is_remote(out):
                epath.Path(temporary).copy(target, overwrite=True)
            else:
                temporary.replace(target)
    files.write(
        note,
        json.dumps(
            {
                "file": target.name,
                "samples": sum(content.parts.values()),
                "bytes": size,
                "sha256": digest,
                "parts": content.parts,
                "broken": content.skipped,
                "statistics": content.statistics.to_json(),
            }
        ),
    )
    return number


class _ShardContent:
    """Counts and statistics of a shard, updated while `samples` is iterated."""

    def __init__(self):
        self.statistics, self.skipped = Statistics(), []
        self.parts: collections.Counter[int] = collections.Counter()

    def samples(self, job: Job, items: _Items, number: int) -> Iterator[tuple[int, Sample]]:
        """(number, sample) of the shard, ready to be written."""
        for group in _batched(_numbers(job, number, len(items)), GROUP if job.coder else 1):
            read = []
            for index in group:
                try:
                    read.append((index, *items.read(index)))
                except SampleError as error:
                    self.skipped.append({"sample": index, "reason": str(error)})
            for index, component, sample in _with_codes(job.coder, read):
                self.statistics.add(sample)
                self.parts[component] += 1
                yield index, resize_sample(sample, job.resize) if job.resize else sample


def _with_codes(coder: Coder | None, read: Sequence[tuple[int, int, Sample]]) -> Iterator[tuple[int, int, Sample]]:
    """The samples with the codes of their masks, computed in one batch."""
    masks = [mask for *_, sample in read for mask in transforms.targets(sample)]
    codes = coder(masks) if coder and masks else np.zeros((0, coder.num_codes if coder else 0), np.int32)
    for index, component, sample in read:
        of_sample, codes = np.split(codes, [len(sample.masks)])
        yield index, component, dataclasses.replace(sample, codes=of_sample) if coder else sample


def resize_sample(sample: Sample, side: int) -> Sample:
    """The sample at side x side: images as by `transforms.image_tiles`, masks by area.

    Masks of 0 and 255 stay binary; soft edges stay grey.
    """

    def resize_image(image: np.ndarray) -> np.ndarray:
        return transforms.resize(image, (side, side))

    def resize_mask(image: np.ndarray) -> np.ndarray:
        if image.ndim == 3 or sample.generated:
            return resize_image(image)
        small = transforms.resize(image, (side, side), Image.Resampling.BOX)
        binary = ((image == 0) | (image == 255)).all()
        return ((small >= 128) * 255).astype(np.uint8) if binary else small

    def resize_meta(value: Any) -> Any:
        if isinstance(value, np.ndarray):
            return resize_mask(value)
        return [resize_meta(v) for v in value] if isinstance(value, list) else value

    return dataclasses.replace(
        sample,
        images=tuple(map(resize_image, sample.images)),
        masks=tuple(map(resize_mask, sample.masks)),
        meta={key: resize_meta(value) for key, value in sample.meta.items()},
    )


def shard_name(number: int, total: int) -> str:
    """The file name of a shard in TFDS."""
    return f"samples-{SPLIT}.array_record-{number:05d}-of-{total:05d}"


# ------------------------------------------------------------------------------------ workers


def _run(job: Job, numbers: Sequence[int], workers: int, runner: str, beam_options: Sequence[str]) -> Iterable[int]:
    """Runs `write_shard` for all numbers; yields the finished ones."""
    write = functools.partial(write_shard, job)
    if runner:
        return _beam(write, numbers, runner, beam_options)
    return _processes(write, numbers, workers) if workers > 1 else map(write, numbers)


def _processes(write: functools.partial, numbers: Sequence[int], workers: int) -> Iterator[int]:
    spawn = multiprocessing.get_context("spawn")  # jax hangs after a fork
    others = set(multiprocessing.active_children())
    pool = concurrent.futures.ProcessPoolExecutor(
        min(workers, len(numbers)), mp_context=spawn, initializer=processes.begin_worker
    )
    try:
        for future in concurrent.futures.as_completed([pool.submit(write, n) for n in numbers]):
            yield future.result()
    except concurrent.futures.process.BrokenProcessPool:
        raise UserError(
            "a worker process was ended from outside (too little memory?); the same "
            "command resumes with the shards that are missing"
        ) from None
    except BaseException:  # an error, or Ctrl-C: do not wait for half-written shards
        pool.shutdown(wait=False, cancel_futures=True)
        for child in set(multiprocessing.active_children()) - others:
            child.terminate()
        raise
    finally:
        pool.shutdown()


def _beam(write: functools.partial, numbers: Sequence[int], runner: str, options: Sequence[str]) -> Sequence[int]:
    try:
        import apache_beam as beam
        from apache_beam.options.pipeline_options import PipelineOptions
    except ImportError:
        raise UserError(
            "--runner needs Apache Beam: pip install 'argenseg_jax[beam]' (here and on the "
            "runner's workers), or use --workers"
        ) from None
    if wrong := [option for option in options if not option.partition("=")[0].isidentifier()]:
        raise UserError(f"--beam_options={brief(wrong[0], 60)}: name=value is expected")
    flags = [f"--runner={runner}", *(f"--{option}" for option in options)]
    stderr = io.StringIO()
    try:
        parsed = PipelineOptions(flags)
        with contextlib.redirect_stderr(stderr):
            parsed.get_all_options()  # now, not when the pipeline runs
        pipeline = beam.Pipeline(options=parsed)
    except (ValueError, TypeError, SystemExit) as fault:  # argparse prints its usage and exits
        reason = stderr.getvalue().strip().rpartition("\n")[2] or str(fault)
        raise UserError(f"--runner={runner}, --beam_options: Apache Beam refuses them ({brief(reason)})") from None
    with pipeline:
        # The content of the shards is recorded in files: nothing is returned through the pipeline.
        _ = pipeline | "Shards" >> beam.Create(list(numbers)) | beam.Reshuffle() | "Write" >> beam.Map(write)
    return numbers


# ------------------------------------------------------------------------------- start and finish


def _claim(out: epath.Path, plan: Mapping[str, Any]) -> None:
    """Writes the plan to the folder; UserError where it has another one, or other content."""
    if (out / PLAN).exists():
        old, new = files.read_json(out / PLAN), json.loads(json.dumps(plan))
        if not isinstance(old, Mapping):
            raise UserError(f"{out / PLAN} is damaged: remove {out}, or name another folder")
        differs = sorted(key for key in {*old, *new} if old.get(key) != new.get(key))
        if differs:
            shown = "; ".join(f"{key}: {old.get(key)!r} -> {new.get(key)!r}" for key in differs)
            raise UserError(
                f"--out: {out} was begun differently ({brief(shown, 500)}); name another folder, or remove it"
            )
    elif any(path.name != locks.FILE for path in (out.iterdir() if out.exists() else ())):
        raise UserError(f"--out: {out} is not empty and holds no {PLAN}; name another folder")
    else:
        files.write(out / PLAN, json.dumps(plan, indent=1) + "\n")


def _finish(job: Job, items: _Items, plan: Mapping[str, Any], total: int) -> dict[str, Any]:
    """Adds up the shards, and writes the files that make the folder a data set."""
    out = epath.Path(job.out)
    notes = [_note(out / SHARDS / f"{number:05d}.json") for number in range(total)]
    skipped = [fault for note in notes for fault in note["broken"]]
    samples = sum(note["samples"] for note in notes)
    if not samples:
        raise UserError(f"all {len(skipped)} samples are broken; the first: {skipped[0]['reason']}")
    for temporary in out.glob(".*.tmp") if not files.is_remote(out) else ():
        temporary.unlink()  # of processes that were killed
    written = collections.Counter()
    for note in notes:
        written.update({int(k): count for k, count in note["parts"].items()})
    parts = [
        {"samples": written[k], "weight": component.weight * written[k] / count}
        for k, (component, count) in enumerate(zip(items.components, items.counts, strict=True))
    ]
    statistics = sum((Statistics.from_json(note["statistics"]) for note in notes), Statistics())
    shards = [{key: note[key] for key in ("file", "samples", "bytes", "sha256")} for note in notes]
    summary = {
        "samples": samples,
        "broken": len(skipped),
        "shards": total,
        "bytes": sum(shard["bytes"] for shard in shards),
        **statistics.summary(),
        "broken_samples": skipped[:_SHOWN],
    }
    _write_info(job, shards)
    files.write(out / SUMMARY, json.dumps(summary, indent=1) + "\n")
    files.write(
        out / MANIFEST,
        json.dumps({**plan, "samples": samples, "broken": len(skipped), "parts": parts, "shards": shards}, indent=1)
        + "\n",
    )
    return summary


def _write_info(job: Job, shards: Sequence[Mapping[str, Any]]) -> None:
    """dataset_info.json and features.json, with which TFDS opens the folder as well."""
    out, samples = epath.Path(job.out), records.Samples
    _features(job).save_config(os.fspath(out))
    files.write(
        out / tfds_folder.INFO,
        json.dumps(
            {
                "description": (records.__doc__ or "").strip(),
                "disableShuffling": True,
                "fileFormat": tfds_folder.FORMAT,
                "moduleName": samples.__module__,
                "name": samples.name,
                "splits": [
                    {
                        "filepathTemplate": "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}",
                        "name": SPLIT,
                        "numBytes": str(sum(shard["bytes"] for shard in shards)),
                        "shardLengths": [str(shard["samples"]) for shard in shards],
                    }
                ],
                "version": str(samples.VERSION),
            },
            indent=2,
        ),
    )


def _features(job: Job) -> tfds.features.FeaturesDict:
    return records.features(job.coder.num_codes if job.coder else 0)


def _serializer(job: Job) -> Any:
    """A record of `records.features` -> the bytes that TFDS reads."""
    features = _features(job)
    specs: Any = features.get_serialized_info()
    example = tfds.core.ExampleSerializer(specs)
    # deterministic: otherwise the order of protobuf maps differs between processes
    return lambda record: example.get_tf_example(features.encode_example(record)).SerializeToString(deterministic=True)


def _is_complete(target: epath.Path, note: epath.Path) -> bool:
    if not (target.exists() and note.exists()):
        return False
    try:
        found = _note(note)
    except UserError:  # damaged: the shard is written again
        return False
    return target.stat().length == found["bytes"] and checksum(target) == found["sha256"]


def _note(path: epath.Path) -> Mapping[str, Any]:
    """The note of a shard; UserError where it is not one that `write_shard` wrote."""
    note = files.read_json(path)
    with located(str(path), "note of a shard", UserError):
        total = sum(note["parts"].values())
        if total != note["samples"] or not {"file", "bytes", "sha256"} <= set(note):
            raise ValueError("inconsistent numbers of samples")
        [(int(k), fault["reason"]) for k in note["parts"] for fault in note["broken"]]
        Statistics.from_json(note["statistics"]).summary()
    return note


def _numbers(job: Job, shard: int, total: int) -> range:
    """The numbers of a shard's samples."""
    begin = shard * job.shard_samples
    return range(begin, min(begin + job.shard_samples, total))


def _batched(numbers: Iterable[int], size: int) -> Iterator[list[int]]:
    numbers = iter(numbers)
    while batch := list(itertools.islice(numbers, size)):
        yield batch
