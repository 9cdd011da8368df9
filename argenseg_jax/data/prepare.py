"""Any source -> a folder of ArrayRecord shards, shard by shard: in this process, in several, or by Beam.

    O/samples-train.array_record-00000-of-00004, ...   the samples, in TFDS form (data/sources/records.py)
    O/shards/00000.json, ...   of each finished shard: counts, checksum, what was broken and why
    O/plan.json                what is being prepared; a second call must ask for the same
    O/dataset_info.json, features.json, summary.json, prepared.json   at the end, the last one last

A shard has its name only when it is whole, so whatever is interrupted goes on with the shards that
are missing. The same job writes the same bytes, whoever runs it.
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
_SHOWN = 100  # broken samples that summary.json names
SPLIT = "train"


class Coder(Protocol):
    """Masks -> their codes; hashable, and goes to worker processes as it is."""

    num_codes: int

    def identity(self) -> dict[str, Any]:
        """What the codes depend on, for JSON."""

    def __call__(self, masks: Sequence[np.ndarray]) -> np.ndarray:
        """u8[H, W] or u8[H, W, 3] each -> i32[K, N]."""


@dataclasses.dataclass(frozen=True)
class Job:
    """What is prepared, and where.

    Attributes:
      sources: as of `open_mixture`; each with an end.
      out: the folder, local or gs://.
      root, prompt, image_root: as of `open_mixture`.
      draws: 0 reads every sample by its index, as evaluation does; K > 0 draws each one K times where
        the source leaves something to chance, as training does.
      resize: S: pictures, masks and the arrays of meta become S x S, so that a model with one tile of
        this side reads the same tiles, to the bit. 0 = as they are.
      shard_samples: samples of a shard, broken ones counted.
      coder: keeps the codes of the masks (before any resize) in the records.
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
        """All that the bytes of the shards depend on, but for the samples themselves."""
        asked = {
            f.name: getattr(self, f.name)
            for f in dataclasses.fields(self)
            if f.name not in ("out", "coder", "window", "max_pixels", "allow_outside")
        }
        asked |= {"window": list(self.window)} if self.window else {}
        asked |= {"max_pixels": self.max_pixels} if self.max_pixels else {}
        asked |= {"allow_outside": True} if self.allow_outside else {}
        return {**asked, "sources": list(self.sources), "format": FORMAT, "codes": self.coder and self.coder.identity()}


class _Items:
    """The samples of a job by number: one part of the mixture after another, each draw of it in turn."""

    def __init__(self, job: Job):
        self.job = job
        self.parts = mixture.open_mixture(
            job.sources,
            job.root,
            job.prompt,
            job.image_root,
            Reading(job.window, job.max_pixels, allow_outside=job.allow_outside),
        )
        if job.prompt != templates.DEFAULT and not any(mixture.takes_prompt(part.source) for part in self.parts):
            raise UserError(f"prompt {job.prompt!r} changes nothing: these sources hold their own questions")
        self.counts = []
        for part in self.parts:
            if part.length >= mixture.ENDLESS:
                raise UserError(
                    "a source without an end cannot be prepared: give it a size, such as shapes:full:train:100000"
                )
            chance = hasattr(part.source, "draw")
            self.counts.append(part.length * (max(job.draws, 1) if chance else 1))
        self.ends = np.cumsum(self.counts)

    def __len__(self) -> int:
        return int(self.ends[-1])

    def read(self, number: int) -> tuple[int, Sample]:
        """(place of its part, the sample), checked for what training would refuse."""
        k = int(np.searchsorted(self.ends, number, side="right"))
        part, at = self.parts[k], int(number - (self.ends[k - 1] if k else 0))
        draw, index = divmod(at, part.length)
        if self.job.draws:
            sample = mixture.draw(part.source, index, np.random.default_rng((index, draw)))
        else:
            sample = part.source[index]
        prompt.check(sample.conversations, len(sample.images), len(sample.masks), sample.name)
        return k, sample


@functools.lru_cache(maxsize=1)
def _items(job: Job) -> _Items:
    """Opened once a process."""
    return _Items(job)


def prepare(job: Job, *, workers: int = 1, runner: str = "", beam_options: Sequence[str] = ()) -> dict[str, Any]:
    """Prepares what is not prepared yet, and returns the content of summary.json.

    Args:
      job: what to do.
      workers: processes that write shards; 1 = this one.
      runner: of Apache Beam, such as DirectRunner or DataflowRunner, in place of `workers`.
      beam_options: of the runner, `name=value` each.

    Raises:
      UserError: a source cannot be opened or has no readable sample, or `out` holds something else.
    """
    _items.cache_clear()  # the files may have changed since this process last looked
    out, items = files.to_path(job.out), _items(job)
    if not job.window and (found := mixture.window(items.parts)):
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
    """Writes a shard, unless it is there and whole; returns its number.

    What every worker of every kind runs: it needs nothing but the job.
    """
    items = _items(job)
    total = -(-len(items) // job.shard_samples)
    out = epath.Path(job.out)
    target, note = out / shard_name(number, total), out / SHARDS / f"{number:05d}.json"
    if _is_whole(target, note):
        return number
    done = _Done()
    serialize = _serializer(job)
    with tempfile.TemporaryDirectory() as remote:
        # Two workers may write the same shard (Beam tries stragglers twice): each has its own file.
        name = f".{target.name}.{uuid.uuid4().hex}.tmp"
        temporary = pathlib.Path(remote if files.is_remote(out) else out) / name
        rows = ((k, serialize(records.encode(s))) for k, s in done.samples(job, items, number))
        with files.writing(target), contextlib.ExitStack() as undo:
            undo.callback(temporary.unlink, missing_ok=True)  # on a full disk its room is wanted
            tfds.core.ExampleWriter(tfds.core.FileFormat.ARRAY_RECORD).write(temporary, rows)
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
                "samples": sum(done.parts.values()),
                "bytes": size,
                "sha256": digest,
                "parts": done.parts,
                "broken": done.broken,
                "statistics": done.statistics.to_json(),
            }
        ),
    )
    return number


class _Done:
    """What a shard has come to hold, filled while `samples` is read."""

    def __init__(self):
        self.statistics, self.broken = Statistics(), []
        self.parts: collections.Counter[int] = collections.Counter()

    def samples(self, job: Job, items: _Items, number: int) -> Iterator[tuple[int, Sample]]:
        """(number, sample) of the shard as they are to be written."""
        for group in _grouped(_numbers(job, number, len(items)), GROUP if job.coder else 1):
            read = []
            for at in group:
                try:
                    read.append((at, *items.read(at)))
                except SampleError as error:
                    self.broken.append({"sample": at, "reason": str(error)})
            for at, part, sample in _coded(job.coder, read):
                self.statistics.add(sample)
                self.parts[part] += 1
                yield at, resized(sample, job.resize) if job.resize else sample


def _coded(coder: Coder | None, read: Sequence[tuple[int, int, Sample]]) -> Iterator[tuple[int, int, Sample]]:
    """The samples with the codes of their masks, made in one go."""
    masks = [mask for *_, sample in read for mask in transforms.targets(sample)]
    codes = coder(masks) if coder and masks else np.zeros((0, coder.num_codes if coder else 0), np.int32)
    for at, part, sample in read:
        mine, codes = np.split(codes, [len(sample.masks)])
        yield at, part, dataclasses.replace(sample, codes=mine) if coder else sample


def resized(sample: Sample, side: int) -> Sample:
    """The sample at side x side: images as `transforms.image_tiles` does it, masks by area.

    Masks of 0 and 255 stay so; soft edges stay grey.
    """

    def picture(image: np.ndarray) -> np.ndarray:
        return transforms.resize(image, (side, side))

    def mask(image: np.ndarray) -> np.ndarray:
        if image.ndim == 3 or sample.generated:
            return picture(image)
        small = transforms.resize(image, (side, side), Image.Resampling.BOX)
        hard = ((image == 0) | (image == 255)).all()
        return ((small >= 128) * 255).astype(np.uint8) if hard else small

    def entry(value: Any) -> Any:
        if isinstance(value, np.ndarray):
            return mask(value)
        return [entry(v) for v in value] if isinstance(value, list) else value

    return dataclasses.replace(
        sample,
        images=tuple(map(picture, sample.images)),
        masks=tuple(map(mask, sample.masks)),
        meta={key: entry(value) for key, value in sample.meta.items()},
    )


def shard_name(number: int, total: int) -> str:
    """The file of a shard, as TFDS names it."""
    return f"samples-{SPLIT}.array_record-{number:05d}-of-{total:05d}"


# ------------------------------------------------------------------------------------ who runs it


def _run(job: Job, numbers: Sequence[int], workers: int, runner: str, beam_options: Sequence[str]) -> Iterable[int]:
    """Runs `write_shard` for all numbers; yields those that are done."""
    write = functools.partial(write_shard, job)
    if runner:
        return _beam(write, numbers, runner, beam_options)
    return _processes(write, numbers, workers) if workers > 1 else map(write, numbers)


def _processes(write: functools.partial, numbers: Sequence[int], workers: int) -> Iterator[int]:
    spawn = multiprocessing.get_context("spawn")  # a forked jax hangs
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
    except BaseException:  # an error, or Ctrl-C: nobody waits for shards that are half-written
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
    said = io.StringIO()
    try:
        parsed = PipelineOptions(flags)
        with contextlib.redirect_stderr(said):
            parsed.get_all_options()  # now; a pipeline asks for them when it runs
        pipeline = beam.Pipeline(options=parsed)
    except (ValueError, TypeError, SystemExit) as fault:  # argparse ends the process with a page of usage
        reason = said.getvalue().strip().rpartition("\n")[2] or str(fault)
        raise UserError(f"--runner={runner}, --beam_options: Apache Beam refuses them ({brief(reason)})") from None
    with pipeline:
        # What the shards hold is noted in files: nothing has to come back through the pipeline.
        _ = pipeline | "Shards" >> beam.Create(list(numbers)) | beam.Reshuffle() | "Write" >> beam.Map(write)
    return numbers


# ------------------------------------------------------------------------------- start and finish


def _claim(out: epath.Path, plan: Mapping[str, Any]) -> None:
    """Notes the plan in the folder; UserError where it holds another one, or something else."""
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
    """Adds up the notes of the shards, and writes what makes the folder a data set."""
    out = epath.Path(job.out)
    notes = [_note(out / SHARDS / f"{number:05d}.json") for number in range(total)]
    broken = [fault for note in notes for fault in note["broken"]]
    samples = sum(note["samples"] for note in notes)
    if not samples:
        raise UserError(f"all {len(broken)} samples are broken; the first: {broken[0]['reason']}")
    for left in out.glob(".*.tmp") if not files.is_remote(out) else ():
        left.unlink()  # of processes that were killed
    written = collections.Counter()
    for note in notes:
        written.update({int(k): count for k, count in note["parts"].items()})
    parts = [
        {"samples": written[k], "weight": part.weight * written[k] / count}
        for k, (part, count) in enumerate(zip(items.parts, items.counts))
    ]
    statistics = sum((Statistics.from_json(note["statistics"]) for note in notes), Statistics())
    shards = [{key: note[key] for key in ("file", "samples", "bytes", "sha256")} for note in notes]
    summary = {
        "samples": samples,
        "broken": len(broken),
        "shards": total,
        "bytes": sum(shard["bytes"] for shard in shards),
        **statistics.summary(),
        "broken_samples": broken[:_SHOWN],
    }
    _write_info(job, shards)
    files.write(out / SUMMARY, json.dumps(summary, indent=1) + "\n")
    files.write(
        out / MANIFEST,
        json.dumps({**plan, "samples": samples, "broken": len(broken), "parts": parts, "shards": shards}, indent=1)
        + "\n",
    )
    return summary


def _write_info(job: Job, shards: Sequence[Mapping[str, Any]]) -> None:
    """dataset_info.json and features.json, with which TFDS opens the folder too."""
    out, samples = epath.Path(job.out), records.Samples
    _features(job).save_config(out)
    files.write(
        out / tfds_folder.INFO,
        json.dumps(
            {
                "description": records.__doc__.strip(),
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
    example = tfds.core.ExampleSerializer(features.get_serialized_info())
    # deterministic: protobuf orders maps anew in every process otherwise
    return lambda record: example.get_tf_example(features.encode_example(record)).SerializeToString(deterministic=True)


def _is_whole(target: epath.Path, note: epath.Path) -> bool:
    if not (target.exists() and note.exists()):
        return False
    try:
        said = _note(note)
    except UserError:  # damaged: the shard is written again
        return False
    return target.stat().length == said["bytes"] and checksum(target) == said["sha256"]


def _note(path: epath.Path) -> Mapping[str, Any]:
    """What was noted of a shard; UserError where it is not as `write_shard` notes it."""
    said = files.read_json(path)
    with located(str(path), "note of a shard", UserError):
        total = sum(said["parts"].values())
        if total != said["samples"] or not {"file", "bytes", "sha256"} <= set(said):
            raise ValueError("numbers of samples that do not add up")
        [(int(k), fault["reason"]) for k in said["parts"] for fault in said["broken"]]
        Statistics.from_json(said["statistics"]).summary()
    return said


def _numbers(job: Job, shard: int, total: int) -> range:
    """The numbers of a shard's samples."""
    begin = shard * job.shard_samples
    return range(begin, min(begin + job.shard_samples, total))


def _grouped(numbers: Iterable[int], size: int) -> Iterator[list[int]]:
    numbers = iter(numbers)
    while group := list(itertools.islice(numbers, size)):
        yield group
