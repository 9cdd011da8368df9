"""Checkpoints through Orbax: whole training states to resume from, or parameters alone to use.

Layout: W/checkpoints/STEP/{params, ema, train, meta, checksums-*.json}. A step counts only when it is whole
(ckpt/steps.py), so a kill at any time leaves the last whole one: on a disk it is renamed last, in a bucket
(gs://), where folders cannot be renamed, Orbax marks it by a last file. `ema` is absent where there is none.
The checksums (ckpt/checksums.py) come after that, and are checked by whoever reads.

Parameters that a phase of training never changes are written once, to W/checkpoints/frozen/N, before
its first step N is; `meta` of each of its steps refers to them ("frozen": N).
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
_STEP_FILES = ("meta", "metrics", steps.NOTES)  # what every reader of a step looks at


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
          keep: so many of the newest steps are kept; None or 0 = all.
          best: 'min:NAME' or 'max:NAME' keeps, besides, the step with the best saved number.
          read_only: nothing is created, saved or cleaned up.
          checksums: writes those of what is saved, and checks those of what is restored.
        """
        found = re.fullmatch(r"(min|max):(.+)", best)
        if best and not found:
            raise UserError(f"train.keep_best='{best}': write min:NAME or max:NAME, such as min:loss")
        mode, self.best = found.groups() if found else ("max", None)
        policies = [ocp.checkpoint_managers.LatestN(keep or None)]
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
        self._frozen: int | None = None  # where this phase's frozen parameters are
        self._process = jax.process_index(), jax.process_count()
        self._checked = checksums
        self._checksums = checksum_files.Writer(*self._process) if checksums and not read_only else None

    def latest(self) -> int | None:
        """Number of the newest complete step, or None."""
        return self._manager.latest_step()

    def best_step(self) -> int | None:
        """Number of the step with the best number; None without `best`."""
        return self._manager.best_step() if self.best else None

    def begin_phase(self) -> None:
        """The next save writes its frozen parameters anew; after `restore` there is no need to."""
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
        """Starts writing; the arrays are copied before it returns, the files come later.

        Args:
          params: what may have changed since the phase began.
          meta: JSON-able facts about the run, the same on every process.
          data_state: this process's place in the data, a JSON-able dict. The dicts of all processes
            are united, key by key at every level, and saved as one.
          numbers: what was logged last; the one that `best` names ranks this step.
          frozen: the other parameters; written, and waited for, at the first save of a phase.
        """
        with self._writing():
            self._manager.wait_until_finished()
        if self._checksums:
            self._checksums.wait()  # Orbax may now remove the folder that they are written into
        if frozen and self._frozen is None:
            with self._writing():
                save_params(self._dir / FROZEN / str(step), frozen, force=True, checksums=False)
            if self._checksums:
                self._checksums.add(self._dir / FROZEN / str(step))
            self._frozen = step
        meta = {**meta, "data": _united(distributed.gather(data_state))}
        if frozen:
            meta[FROZEN] = self._frozen
        items = {
            "params": ocp.args.StandardSave(params, _by_layer(params)),
            "train": ocp.args.StandardSave(train),
            "meta": ocp.args.JsonSave(meta),
        }
        if ema:
            items["ema"] = ocp.args.StandardSave(ema, _by_layer(ema))
        value = (numbers or {}).get(self.best)
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
            self._sweep()

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        """A full or read-only disk as one line that says where a run can resume."""
        try:
            with files.writing(self._dir):
                yield
        except UserError as fault:
            orbax_threads.wait()
            newest = newest_step(self._dir.parent, training=True)
            raise UserError(
                f"{fault}; "
                + (
                    "there is no whole step yet"
                    if newest is None
                    else f"the newest whole step is {newest}: the same command resumes there"
                )
            ) from fault

    def _clear(self, folder: epath.Path) -> None:
        """Makes way for a step where a folder of its name is that is not whole; it stays under another name."""
        if not folder.exists():
            return
        if files.is_remote(folder):  # where nothing can be renamed
            raise UserError(f"{folder} is no whole step, and is where this one belongs: move or remove it")
        number = next(k for k in itertools.count() if not _aside(folder, k).exists())
        with self._writing():
            folder.rename(_aside(folder, number))
        print(f"{folder} was no whole step; it is now {_aside(folder, number)}", file=sys.stderr, flush=True)

    def _sweep(self) -> None:
        """Removes frozen parameters that no step refers to: of earlier phases, or of a killed run."""
        folder = self._dir / FROZEN
        found = [
            p
            for p in (folder.iterdir() if folder.is_dir() else ())
            if steps.number_of(p.name) not in (None, self._frozen)
        ]
        if not found:
            return
        try:  # also of steps that are not whole: they may be mended
            used = {
                read_meta(step).get(FROZEN) for step in self._dir.iterdir() if steps.number_of(step.name) is not None
            }
        except UserError:  # a step went while it was read, or is damaged
            return
        for path in found:
            if int(path.name) not in used:
                path.rmtree()

    def meta(self, step: int) -> dict[str, Any]:
        """The facts saved with a step."""
        return read_meta(self._dir / str(step))

    def restore(self, step: int, params: Any, ema: Any, train: Any) -> tuple[Any, Any, Any, Any]:
        """(params, ema, train, data_state) into the shapes and shardings of the arguments' leaves.

        `data_state` is that of all processes, on each of them. Raises UserError if the checkpoint
        is of another model, optimizer or task.
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
        held = _restore_item(_frozen_folder(path), rest) if rest else {}
        self._frozen = found["meta"].get(FROZEN)
        data = found["meta"]["data"]
        whole = trees.replace(params, {**trees.flatten(found["params"]), **trees.flatten(held)})
        return whole, found["ema"] if ema else {}, found["train"], data

    def _check(self, step: epath.Path) -> None:
        """Checks what `restore` reads: every process a share of the files, and all of them the result."""
        if not self._checked:
            return
        fault = None
        try:
            _check(step, (*_STEP_FILES, "params", "ema", "train"), self._process)
        except UserError as error:
            fault = str(error)
        if found := next(filter(None, distributed.gather(fault)), None):
            raise UserError(found)

    def __enter__(self) -> Checkpointer:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: Any) -> None:
        """Waits for the files, also when the run ends by an error.

        Not when it ends because another process is gone: that one's files would never come.
        """
        if not (kind and issubclass(kind, jax.errors.JaxRuntimeError) and jax.process_count() > 1):
            with self._writing():
                self._manager.close()
            if self._checksums:
                self._checksums.close()


def _aside(folder: epath.Path, number: int) -> epath.Path:
    return folder.parent / f"{folder.name}.incomplete-{number}"


def _clean_bucket(folder: epath.Path) -> None:
    """Removes the steps that a killed run had not finished. Orbax's own cleaning would take every folder
    without its mark for one, that of the frozen parameters too."""
    for step in folder.iterdir() if folder.is_dir() else ():
        if steps.number_of(step.name) is not None and not steps.is_finished(step):
            step.rmtree()


def find_config(path: epath.PathLike) -> dict[str, Any]:
    """The resolved configuration saved beside a checkpoint, as a nested dict."""
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
    """A saved configuration; UserError where the file holds something else."""
    config = files.read_json(file)
    if not isinstance(config, dict):
        raise UserError(f"{file} is no configuration of a run: it holds a {type(config).__name__}")
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
    """Parameters for use: the averaged weights where the run kept an average.

    Args:
      path: as for find_step.
      want: tree of jax.ShapeDtypeStruct, with shardings to restore into; None gives numpy arrays.
      ema: False takes the raw weights.
      checksums: checks the files first.

    Raises:
      UserError: nothing there, a file that is not as it was written, or names or shapes of another model.
    """
    step = find_step(path)
    if checksums:
        _check(step, (*_STEP_FILES, "params", *(["ema"] if ema else [])))
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
    """Where a step's parameters are; what a later folder has as well counts for use."""
    own = [step / item for item in ("params", *(["ema"] if ema else [])) if (step / item).exists()]
    frozen = _frozen_folder(step)
    return own if frozen is None else [frozen, *own]


def _frozen_folder(step: epath.Path) -> epath.Path | None:
    """Where the parameters are that were frozen when a step was saved, if any were."""
    number = read_meta(step).get(FROZEN)
    if number is None:
        return None
    folder = step.parent / FROZEN / str(number) / "params"
    if not folder.exists():
        raise UserError(f"{step} lacks what was frozen in training, {folder}: copy the folder {DIRECTORY}/ as a whole")
    return folder


def read_train(path: epath.PathLike) -> dict[str, Any]:
    """What a step holds beside parameters: step, skipped, opt_state, extra, as numpy arrays."""
    folder = find_step(path) / "train"
    _check(folder.parent, (*_STEP_FILES, "train"))
    return _restore_item(folder, _abstract(_saved_shapes(folder)))


def save_params(path: epath.PathLike, params: Any, *, force: bool = False, checksums: bool = True) -> None:
    """Writes parameters alone, as a step that find_step and restore_params understand.

    `force` replaces what is there. `checksums`: writes them too.
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
    """{leaf: array} as restore_params gives them, but read when asked for; of one part ('vqvae') alone.

    `checksums`: the files are checked now.
    """
    step = find_step(path)
    if checksums:
        _check(step, (*_STEP_FILES, "params", "ema"))
    leaves = {}
    for folder in param_folders(files.absolute(step), ema=True):
        names, layout = trees.flatten(_saved_shapes(folder)), read_layout(folder)
        with _readable(folder):
            for name in (n for n in names if not part or n.startswith(f"{part}/")):
                leaves[name] = StoredLeaf(tensorstore.open(spec(folder, layout, name)).result())
    return leaves


def _by_layer(params: Any) -> Any:
    """Orbax's options to save each layer of a stack apart: one can be read without the rest."""
    return trees.map_named(lambda name, leaf: ocp.SaveArgs(shard_axes=(0,) if is_stacked(name) else ()), params)


def _restore_item(folder: epath.Path, want: Any) -> Any:
    def place(leaf: jax.ShapeDtypeStruct) -> ocp.RestoreArgs:
        if leaf.sharding is None:
            return ocp.RestoreArgs(restore_type=np.ndarray, dtype=leaf.dtype)
        return ocp.ArrayRestoreArgs(sharding=leaf.sharding, global_shape=leaf.shape, dtype=leaf.dtype)

    with _readable(folder), ocp.PyTreeCheckpointer() as reader:
        return reader.restore(files.absolute(folder), item=want, restore_args=jax.tree.map(place, want))


def _saved_shapes(folder: epath.Path) -> dict[str, Any]:
    with _readable(folder):
        return ocp.PyTreeCheckpointHandler().metadata(files.absolute(folder)).tree


@contextlib.contextmanager
def _readable(folder: epath.Path) -> Iterator[None]:
    """Orbax's errors about a damaged folder, as one line."""
    files.check_all_regular(folder)
    try:
        yield
    except (ValueError, KeyError, OSError) as error:
        raise UserError(f"{folder} is broken or incomplete: {brief(error)}") from error


def _abstract(saved: Any) -> Any:
    return jax.tree.map(lambda s: jax.ShapeDtypeStruct(s.shape, s.dtype), saved)


def _united(states: list[dict[str, Any]]) -> dict[str, Any]:
    """One dict of what any of them has; what several have is the same in all."""
    if len(states) == 1 or not all(isinstance(state, Mapping) for state in states):
        return states[0]
    keys = dict.fromkeys(key for state in states for key in state)
    return {key: _united([state[key] for state in states if key in state]) for key in keys}
