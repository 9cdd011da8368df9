"""Checkpoints through Orbax: complete training states to resume from, or only parameters to use.

Layout: W/checkpoints/STEP/{params, ema, train, meta, checksums-*.json}. Only complete steps count
(ckpt/steps.py), so a kill at any time leaves the last complete one: on a disk the folder is renamed last, in
a bucket (gs://), where folders cannot be renamed, Orbax writes a marker file last. `ema` is absent if the run
has no average. The checksums (ckpt/checksums.py) are written after that, and are checked by every reader.

Parameters that a phase of training never changes are written once, to W/checkpoints/frozen/N, before
the phase's first step N; `meta` of each step of the phase refers to them ("frozen": N).
"""

from __future__ import annotations

import contextlib
import itertools
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
import tensorstore
from etils import epath

from argenseg_jax import distributed, files, trees
from argenseg_jax.ckpt import checksums as checksum_files
from argenseg_jax.ckpt import orbax_threads, steps
from argenseg_jax.ckpt.arrays import StoredLeaf, read_layout, spec
from argenseg_jax.ckpt.params_writer import is_stacked, mark_complete
from argenseg_jax.ckpt.steps import DIRECTORY, FROZEN, find_step, newest_step, read_meta
from argenseg_jax.errors import UserError, brief

CONFIG = "config.json"


class Checkpointer:
    """The checkpoints of a run: `params`, `ema` nested dicts, `train` any pytree of arrays."""

    def __init__(
        self,
        workdir: epath.PathLike,
        keep: int | None = None,
        best: str = "",
        *,
        read_only: bool = False,
        checksums: bool = True,
    ):
        """Opens W/checkpoints.

        Args:
          workdir: W, local or gs://.
          keep: number of newest steps to keep; None or 0 = all.
          best: 'min:NAME' or 'max:NAME' also keeps the step with the best saved metric.
          read_only: nothing is created, saved or cleaned up.
          checksums: written with what is saved, and checked on what is restored.
        """
        found = re.fullmatch(r"(min|max):(.+)", best)
        if best and not found:
            raise UserError(f"train.keep_best='{best}': write min:NAME or max:NAME, such as min:loss")
        mode, self.best = found.groups() if found else ("max", None)
        policies: list[Any] = [ocp.checkpoint_managers.LatestN(keep or None)]
        value = (lambda numbers: numbers[self.best]) if best else None
        if best:
            policies.append(
                ocp.checkpoint_managers.BestN(
                    get_metric_fn=value, reverse=mode == "min", n=1, keep_checkpoints_without_metrics=False
                )
            )
        options = ocp.CheckpointManagerOptions(
            preservation_policy=ocp.checkpoint_managers.AnyPreservationPolicy(policies),
            best_fn=value,
            best_mode=mode,
            create=not read_only,
            read_only=read_only,
            step_name_format=steps.CompleteSteps(),
            enable_async_checkpointing=not read_only,
            cleanup_tmp_directories=not read_only and not files.is_remote(workdir),
        )
        self._dir = files.absolute(workdir) / DIRECTORY
        orbax_threads.quiet_disk_faults()
        if not read_only and files.is_remote(workdir) and distributed.is_first():
            _clean_bucket(self._dir)
        with self._writing():
            self._manager = ocp.CheckpointManager(
                self._dir, options=options, item_names=("params", "ema", "train", "meta")
            )
        self._frozen: int | None = None  # the step with which this phase's frozen parameters were written
        self._process = jax.process_index(), jax.process_count()
        self._checked = checksums
        self._checksums = checksum_files.Writer(*self._process) if checksums and not read_only else None

    def latest(self) -> int | None:
        """Number of the newest complete step, or None."""
        return self._manager.latest_step()

    def best_step(self) -> int | None:
        """Number of the step with the best metric; None without `best`."""
        return self._manager.best_step() if self.best else None

    def begin_phase(self) -> None:
        """Makes the next save write the frozen parameters; after `restore` that is not needed."""
        self._frozen = None

    def save(
        self,
        step: int,
        params: Any,
        ema: Any,
        train: Any,
        meta: Mapping[str, Any],
        data_state: Mapping[str, Any],
        numbers: Mapping[str, Any] | None = None,
        *,
        frozen: Mapping[str, Any] | None = None,
    ) -> None:
        """Starts writing; the arrays are copied before it returns, the files are written later.

        Args:
          params: the parameters that may have changed since the phase began.
          meta: JSON-able metadata of the run, the same on every process.
          data_state: this process's iterator state, a JSON-able dict. The dicts of all processes
            are merged, key by key at every level, and saved as one.
          numbers: the last logged metrics; the one that `best` names ranks this step.
          frozen: the other parameters; written synchronously at the first save of a phase.
        """
        with self._writing():
            self._manager.wait_until_finished()
        if self._checksums:
            self._checksums.wait()  # from now on Orbax may remove the folder that they are written into
        if frozen and self._frozen is None:
            with self._writing():
                save_params(self._dir / FROZEN / str(step), frozen, force=True, checksums=False)
            if self._checksums:
                self._checksums.add(self._dir / FROZEN / str(step))
            self._frozen = step
        meta = {**meta, "data": _merged(distributed.gather(data_state))}
        if frozen:
            meta[FROZEN] = self._frozen
        items = {
            "params": ocp.args.StandardSave(params, _by_layer(params)),
            "train": ocp.args.StandardSave(train),
            "meta": ocp.args.JsonSave(meta),
        }
        if ema:
            items["ema"] = ocp.args.StandardSave(ema, _by_layer(ema))
        value = (numbers or {}).get(self.best or "")
        folder = self._dir / str(step)
        if distributed.is_first():
            self._clear(folder)
        with self._writing():
            self._manager.save(
                step, args=ocp.args.Composite(**items), metrics=None if value is None else {self.best: value}
            )
        if self._checksums:
            self._checksums.add(folder, lambda: folder.exists() and steps.is_finished(folder))
        if distributed.is_first():
            self._remove_unused_frozen()

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        """Turns a full or read-only disk into a UserError that names the step from which a run can resume."""
        try:
            with files.writing(self._dir):
                yield
        except UserError as fault:
            orbax_threads.wait()
            newest = newest_step(self._dir.parent, training=True)
            raise UserError(
                f"{fault}; "
                + (
                    "there is no complete step yet"
                    if newest is None
                    else f"the newest complete step is {newest}: the same command resumes there"
                )
            ) from fault

    def _clear(self, folder: epath.Path) -> None:
        """Renames an incomplete folder that has the name of the step to be written."""
        if not folder.exists():
            return
        if files.is_remote(folder):  # buckets cannot rename
            raise UserError(f"{folder} is not a complete step, and has the name of the one to write: move or remove it")
        number = next(k for k in itertools.count() if not _aside(folder, k).exists())
        with self._writing():
            folder.rename(_aside(folder, number))
        print(f"{folder} was not a complete step; it is now {_aside(folder, number)}", file=sys.stderr, flush=True)

    def _remove_unused_frozen(self) -> None:
        """Removes frozen parameters that no step refers to: of earlier phases, or of a killed run."""
        folder = self._dir / FROZEN
        found = [
            p
            for p in (folder.iterdir() if folder.is_dir() else ())
            if steps.number_of(p.name) not in (None, self._frozen)
        ]
        if not found:
            return
        try:  # incomplete steps too: they may be repaired
            used = {
                read_meta(step).get(FROZEN) for step in self._dir.iterdir() if steps.number_of(step.name) is not None
            }
        except UserError:  # a step was removed while it was read, or is damaged
            return
        for path in found:
            if int(path.name) not in used:
                path.rmtree()

    def meta(self, step: int) -> dict[str, Any]:
        """The metadata saved with a step."""
        return read_meta(self._dir / str(step))

    def restore(self, step: int, params: Any, ema: Any, train: Any) -> tuple[Any, Any, Any, Any]:
        """(params, ema, train, data_state) into the shapes and shardings of the arguments' leaves.

        `data_state` is the merged one, on every process. Raises UserError if the checkpoint is of
        another model, optimizer or task.
        """
        path = self._dir / str(step)
        self._check(path)
        check_shapes(path, params)
        own = trees.flatten(_saved_shapes(path / "params"))
        changing, rest = trees.split(params, own.__contains__)
        items = {
            "params": ocp.args.StandardRestore(changing),
            "meta": ocp.args.JsonRestore(),
            "train": ocp.args.StandardRestore(train),
        }
        if ema:
            items["ema"] = ocp.args.StandardRestore(ema)
        try:
            found = self._manager.restore(step, args=ocp.args.Composite(**items))
        except (ValueError, KeyError, TypeError, OSError) as error:
            raise UserError(
                f"{path} is damaged, or was written with another optimizer or task: {brief(error, 300)}"
            ) from error
        frozen = _restore_item(_frozen_folder(path), rest) if rest else {}
        self._frozen = found["meta"].get(FROZEN)
        data = found["meta"]["data"]
        restored = trees.replace(params, {**trees.flatten(found["params"]), **trees.flatten(frozen)})
        return restored, found["ema"] if ema else {}, found["train"], data

    def _check(self, step: epath.Path) -> None:
        """Checks what `restore` reads: every process checks a share of the files, then all compare results."""
        if not self._checked:
            return
        fault = None
        try:
            _check(step, (*steps.READ_FIRST, "params", "ema", "train"), self._process)
        except UserError as error:
            fault = str(error)
        if found := next(filter(None, distributed.gather(fault)), None):
            raise UserError(found)

    def __enter__(self) -> Checkpointer:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: Any) -> None:
        """Waits for the files, also if the run ends with an error.

        Not if it ends because another process is lost, whose files would never be written.
        """
        if not (kind and issubclass(kind, jax.errors.JaxRuntimeError) and jax.process_count() > 1):
            with self._writing():
                self._manager.close()
            if self._checksums:
                self._checksums.close()


def _aside(folder: epath.Path, number: int) -> epath.Path:
    return folder.parent / f"{folder.name}.incomplete-{number}"


def _clean_bucket(folder: epath.Path) -> None:
    """Removes the steps that a killed run had not finished. Orbax's own cleanup would also remove every other
    folder without its marker, such as that of the frozen parameters."""
    for step in folder.iterdir() if folder.is_dir() else ():
        if steps.number_of(step.name) is not None and not steps.is_finished(step):
            step.rmtree()


def find_config(path: epath.PathLike) -> dict[str, Any]:
    """The resolved config saved with a checkpoint, as a nested dict."""
    return read_config(find_run(path) / CONFIG)


def find_run(path: epath.PathLike) -> epath.Path:
    """The folder of a checkpoint's config.json: the workdir of a step, or the copied step itself."""
    path, step = epath.Path(path), find_step(path)
    above = list(step.parents)[:2] if step.parent.name == DIRECTORY else [step.parent] if step.name.isdigit() else []
    for folder in (path, step, *above):
        if (folder / CONFIG).exists():
            return folder
    raise UserError(f"{path}: there is no {CONFIG} beside the checkpoint")


def read_config(file: epath.Path) -> dict[str, Any]:
    """A saved config; UserError if the file holds something else."""
    config = files.read_json(file)
    if not isinstance(config, dict):
        raise UserError(f"{file} is not the config of a run: it holds a {type(config).__name__}")
    return config


def check_shapes(step_dir: epath.Path, want: Any) -> None:
    """UserError that lists the leaves whose names or shapes differ from `want`."""
    trees.check_same(saved_params(step_dir), want, str(step_dir))


def _check(step: epath.Path, items: Sequence[str], share: tuple[int, int] = (0, 1)) -> None:
    """Checks the checksums of a step's items, and of the frozen parameters that it refers to."""
    checksum_files.check(step, items, share)
    frozen = _frozen_folder(step)
    if frozen is not None:
        checksum_files.check(frozen.parent, (frozen.name,), share)


def restore_params(path: epath.PathLike, want: Any | None = None, *, ema: bool = True, checksums: bool = True) -> Any:
    """Parameters for inference: the averaged weights if the run has an average.

    Args:
      path: as for find_step.
      want: tree of jax.ShapeDtypeStruct, with shardings to restore into; None gives numpy arrays.
      ema: False takes the raw weights.
      checksums: checks the files first.

    Raises:
      UserError: no checkpoint, a file that was changed, or names or shapes of another model.
    """
    step = find_step(path)
    if checksums:
        _check(step, (*steps.READ_FIRST, "params", *(["ema"] if ema else [])))
    if want is None:
        want = _abstract(saved_params(step))
    else:
        check_shapes(step, want)
    flat, found = trees.flatten(want), {}
    for folder in param_folders(step, ema=ema):
        names = trees.flatten(_saved_shapes(folder))
        found |= trees.flatten(_restore_item(folder, trees.unflatten({n: flat[n] for n in names})))
    return trees.replace(want, found)


def saved_params(step: epath.Path) -> dict[str, Any]:
    """The tree of a step's parameters, anything with .shape and .dtype: the frozen ones and its own."""
    flat = {}
    for folder in param_folders(step, ema=False):
        flat |= trees.flatten(_saved_shapes(folder))
    return trees.unflatten(flat)


def param_folders(step: epath.Path, *, ema: bool) -> list[epath.Path]:
    """The folders of a step's parameters; for inference a leaf in a later folder replaces one in an earlier."""
    own = [step / item for item in ("params", *(["ema"] if ema else [])) if (step / item).exists()]
    frozen = _frozen_folder(step)
    return own if frozen is None else [frozen, *own]


def _frozen_folder(step: epath.Path) -> epath.Path | None:
    """The folder of the parameters that were frozen when a step was saved, if any were."""
    number = read_meta(step).get(FROZEN)
    if number is None:
        return None
    folder = step.parent / FROZEN / str(number) / "params"
    if not folder.exists():
        raise UserError(f"{step} lacks what was frozen in training, {folder}: copy the complete folder {DIRECTORY}/")
    return folder


def read_train(path: epath.PathLike) -> dict[str, Any]:
    """The rest of a step's train state: step, skipped, opt_state, extra, as numpy arrays."""
    folder = find_step(path) / "train"
    _check(folder.parent, (*steps.READ_FIRST, "train"))
    return _restore_item(folder, _abstract(_saved_shapes(folder)))


def save_params(path: epath.PathLike, params: Any, *, force: bool = False, checksums: bool = True) -> None:
    """Writes only parameters, as a step that find_step and restore_params can read.

    `force` replaces an existing step. `checksums`: are written too.
    """
    step = files.absolute(path)
    if force and distributed.is_first():
        checksum_files.remove(step)
    with ocp.StandardCheckpointer() as writer:
        writer.save(step / "params", params, save_args=_by_layer(params), force=force)
    if checksums:
        checksum_files.write(step, jax.process_index(), jax.process_count())
    mark_complete(step)


def open_params(path: epath.PathLike, part: str = "", *, checksums: bool = True) -> dict[str, StoredLeaf]:
    """{leaf: array} as from restore_params, but read lazily; with `part` ('vqvae') only its leaves.

    `checksums`: the files are checked immediately.
    """
    step = find_step(path)
    if checksums:
        _check(step, (*steps.READ_FIRST, "params", "ema"))
    leaves = {}
    for folder in param_folders(files.absolute(step), ema=True):
        names, layout = trees.flatten(_saved_shapes(folder)), read_layout(folder)
        with _readable(folder):
            for name in (n for n in names if not part or n.startswith(f"{part}/")):
                leaves[name] = StoredLeaf(tensorstore.open(spec(folder, layout, name)).result())
    return leaves


def _by_layer(params: Any) -> Any:
    """Orbax's options to store each layer of a stack as its own chunk, which can be read alone."""
    return trees.map_named(lambda name, leaf: ocp.SaveArgs(shard_axes=(0,) if is_stacked(name) else ()), params)


def _restore_item(folder: epath.Path, want: Any) -> Any:
    def restore_args(leaf: jax.ShapeDtypeStruct) -> ocp.RestoreArgs:
        if leaf.sharding is None:
            return ocp.RestoreArgs(restore_type=np.ndarray, dtype=leaf.dtype)
        return ocp.ArrayRestoreArgs(sharding=leaf.sharding, global_shape=leaf.shape, dtype=leaf.dtype)

    with _readable(folder), ocp.PyTreeCheckpointer() as reader:
        return reader.restore(files.absolute(folder), item=want, restore_args=jax.tree.map(restore_args, want))


def _saved_shapes(folder: epath.Path) -> dict[str, Any]:
    with _readable(folder):
        return ocp.PyTreeCheckpointHandler().metadata(files.absolute(folder)).tree


@contextlib.contextmanager
def _readable(folder: epath.Path) -> Iterator[None]:
    """Turns Orbax's errors about a damaged folder into a UserError of one line."""
    files.check_all_regular(folder)
    try:
        yield
    except (ValueError, KeyError, OSError) as error:
        raise UserError(f"{folder} is broken or incomplete: {brief(error)}") from error


def _abstract(saved: Any) -> Any:
    return jax.tree.map(lambda s: jax.ShapeDtypeStruct(s.shape, s.dtype), saved)


def _merged(states: list[dict[str, Any]]) -> dict[str, Any]:
    """One dict with the keys of all; a key that several have is the same in all."""
    if len(states) == 1 or not all(isinstance(state, Mapping) for state in states):
        return states[0]
    keys = dict.fromkeys(key for state in states for key in state)
    return {key: _merged([state[key] for state in states if key in state]) for key in keys}
