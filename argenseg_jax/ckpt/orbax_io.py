"""Checkpoints through Orbax: whole training states to go on from, or parameters alone to use.

Layout: W/checkpoints/STEP/{params, ema, train, meta}. A step counts only when it is complete, so a
kill at any time leaves the last whole one: on a disk it is renamed last, in a bucket (gs://), where
folders cannot be renamed, Orbax marks it by a last file. `ema` is absent where there is none.

Parameters that a phase of training never changes are written once, to W/checkpoints/frozen/N, before
its first step N is; `meta` of each of its steps refers to them ("frozen": N).
"""
from __future__ import annotations

import collections
import contextlib
import json
import os
import re
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
import tensorstore
from absl import logging
from etils import epath

from argenseg_jax import files, hosts, trees
from argenseg_jax.errors import UserError
from argenseg_jax.interop.tensor_files import contiguous

DIRECTORY = "checkpoints"  # within a workdir
CONFIG = "config.json"
_FROZEN = "frozen"  # within DIRECTORY
_IN_FLIGHT_BYTES = 256 << 20  # of ParamsWriter


class Checkpointer:
    """The checkpoints of a run: `params`, `ema` nested dicts, `train` any pytree of arrays."""

    def __init__(self, workdir: str, keep: int | None = None, best: str = "", *,
                 read_only: bool = False):
        """Opens W/checkpoints.

        Args:
          workdir: W, local or gs://.
          keep: so many of the newest steps are kept; None or 0 = all.
          best: 'min:NAME' or 'max:NAME' keeps, besides, the step with the best saved number.
          read_only: nothing is created, saved or cleaned up.
        """
        found = re.fullmatch(r"(min|max):(.+)", best)
        if best and not found:
            raise UserError(f"train.keep_best='{best}': write min:NAME or max:NAME, such as min:loss")
        mode, self.best = found.groups() if found else ("max", None)
        policies = [ocp.checkpoint_managers.LatestN(keep or None)]
        value = (lambda numbers: numbers[self.best]) if best else None
        if best:
            policies.append(ocp.checkpoint_managers.BestN(
                get_metric_fn=value, reverse=mode == "min", n=1,
                keep_checkpoints_without_metrics=False))
        options = ocp.CheckpointManagerOptions(
            preservation_policy=ocp.checkpoint_managers.AnyPreservationPolicy(policies),
            best_fn=value, best_mode=mode, create=not read_only, read_only=read_only,
            cleanup_tmp_directories=not read_only, enable_async_checkpointing=not read_only)
        self._dir = files.absolute(workdir) / DIRECTORY
        self._manager = ocp.CheckpointManager(
            self._dir, options=options, item_names=("params", "ema", "train", "meta"))
        self._frozen: int | None = None  # where this phase's frozen parameters are

    def latest(self) -> int | None:
        """Number of the newest complete step, or None."""
        return self._manager.latest_step()

    def best_step(self) -> int | None:
        """Number of the step with the best number; None without `best`."""
        return self._manager.best_step() if self.best else None

    def begin_phase(self) -> None:
        """The next save writes its frozen parameters anew; after `restore` there is no need to."""
        self._frozen = None

    def save(self, step: int, params: Any, ema: Any, train: Any, meta: Mapping[str, Any],
             data_state: Mapping[str, Any], numbers: Mapping[str, Any] | None = None, *,
             frozen: Mapping[str, Any] | None = None) -> None:
        """Starts writing; the arrays are copied before it returns, the files come later.

        Args:
          params: what may have changed since the phase began.
          meta: JSON-able facts about the run, the same on every process.
          data_state: this process's place in the data, a JSON-able dict. The dicts of all processes
            are united, key by key at every level, and saved as one.
          numbers: what was logged last; the one that `best` names ranks this step.
          frozen: the other parameters; written, and waited for, at the first save of a phase.
        """
        if frozen and self._frozen is None:
            save_params(self._dir / _FROZEN / str(step), frozen, force=True)
            self._frozen = step
        meta = {**meta, "data": _united(hosts.gather(data_state))}
        if frozen:
            meta[_FROZEN] = self._frozen
        items = {"params": ocp.args.StandardSave(params, _by_layer(params)),
                 "train": ocp.args.StandardSave(train), "meta": ocp.args.JsonSave(meta)}
        if ema:
            items["ema"] = ocp.args.StandardSave(ema, _by_layer(ema))
        value = (numbers or {}).get(self.best)
        self._manager.save(step, args=ocp.args.Composite(**items),
                           metrics=None if value is None else {self.best: value})
        if hosts.is_first():
            self._sweep()

    def _sweep(self) -> None:
        """Removes frozen parameters that no step refers to: of earlier phases, or of a killed run."""
        folder = self._dir / _FROZEN
        found = [p for p in folder.iterdir() if p.name != str(self._frozen)] if folder.is_dir() else ()
        if not found:
            return
        steps = [self._dir / str(s) for s in self._manager.all_steps()]
        try:
            used = {str(_read_meta(step).get(_FROZEN)) for step in steps}
        except UserError:  # a step went while it was read: the next save comes back to this
            return
        for path in found:
            if path.name not in used:
                path.rmtree()

    def meta(self, step: int) -> dict[str, Any]:
        """The facts saved with a step."""
        return _read_meta(self._dir / str(step))

    def restore(self, step: int, params: Any, ema: Any, train: Any) -> tuple[Any, Any, Any, Any]:
        """(params, ema, train, data_state) into the shapes and shardings of the arguments' leaves.

        `data_state` is that of all processes, on each of them. Raises UserError if the checkpoint
        is of another model, optimizer or task.
        """
        path = self._dir / str(step)
        check_shapes(path, params)
        own = trees.flatten(_saved_shapes(path / "params"))
        changing, rest = trees.split(params, own.__contains__)
        items = {"params": ocp.args.StandardRestore(changing), "meta": ocp.args.JsonRestore(),
                 "train": ocp.args.StandardRestore(train)}
        if ema:
            items["ema"] = ocp.args.StandardRestore(ema)
        try:
            found = self._manager.restore(step, args=ocp.args.Composite(**items))
        except (ValueError, KeyError) as error:
            raise UserError(f"{path} was written with another optimizer or task: "
                            f"{str(error)[:300]}") from error
        held = _restore_item(_frozen_folder(path), rest) if rest else {}
        self._frozen = found["meta"].get(_FROZEN)
        data = found["meta"]["data"]
        whole = trees.replace(params, {**trees.flatten(found["params"]), **trees.flatten(held)})
        return whole, found["ema"] if ema else {}, found["train"], data

    def __enter__(self) -> Checkpointer:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: Any) -> None:
        """Waits for the files, also when the run ends by an error.

        Not when it ends because another process is gone: that one's files would never come.
        """
        if not (kind and issubclass(kind, jax.errors.JaxRuntimeError) and jax.process_count() > 1):
            self._manager.close()


def find_step(path: epath.PathLike) -> epath.Path:
    """Directory of a checkpoint: of a workdir or W/checkpoints the newest, or the step itself."""
    root = epath.Path(path)
    if (root / "params").exists():
        return root
    for folder in (root / DIRECTORY, root):
        if (step := _newest(folder)) is not None:
            return folder / str(step)
    raise UserError(f"{path}: no checkpoint there (no step in {root / DIRECTORY})")


def newest_step(workdir: epath.PathLike) -> int | None:
    """Number of a workdir's newest complete step, or None; nothing is created."""
    return _newest(epath.Path(workdir) / DIRECTORY)


def _newest(folder: epath.Path) -> int | None:
    steps = [int(p.name) for p in (folder.iterdir() if folder.is_dir() else ())
             if p.name.isdigit() and (p / "params").exists() and ocp.utils.is_checkpoint_finalized(p)]
    return max(steps, default=None)


def find_config(path: epath.PathLike) -> dict[str, Any]:
    """The resolved configuration saved beside a checkpoint, as a nested dict."""
    return files.read_json(find_run(path) / CONFIG)


def find_run(path: epath.PathLike) -> epath.Path:
    """The folder of a checkpoint's config.json: the workdir of a step, or the copied step itself."""
    path, step = epath.Path(path), find_step(path)
    above = list(step.parents)[:2] if step.parent.name == DIRECTORY else [step.parent] if step.name.isdigit() else []
    for folder in (path, step, *above):
        if (folder / CONFIG).exists():
            return folder
    raise UserError(f"{path}: there is no {CONFIG} beside the checkpoint")


def check_shapes(step_dir: epath.Path, want: Any) -> None:
    """UserError that lists the leaves whose names or shapes differ from `want`."""
    trees.check_same(saved_params(step_dir), want, str(step_dir))


def restore_params(path: epath.PathLike, want: Any | None = None, *, ema: bool = True) -> Any:
    """Parameters for use: the averaged weights where the run kept an average.

    Args:
      path: as for find_step.
      want: tree of jax.ShapeDtypeStruct, with shardings to restore into; None gives numpy arrays.
      ema: False takes the raw weights.

    Raises:
      UserError: nothing there, or names or shapes of another model.
    """
    step = find_step(path)
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
    number = _read_meta(step).get(_FROZEN)
    if number is None:
        return None
    folder = step.parent / _FROZEN / str(number) / "params"
    if not folder.exists():
        raise UserError(f"{step} lacks what was frozen in training, {folder}: copy the folder "
                        f"{DIRECTORY}/ as a whole")
    return folder


def _read_meta(step: epath.Path) -> dict[str, Any]:
    """The facts saved with a step; {} where it has parameters alone."""
    file = step / "meta" / "metadata"  # as Orbax's JsonSave names it
    return files.read_json(file) if file.exists() else {}


def read_train(path: epath.PathLike) -> dict[str, Any]:
    """What a step holds beside parameters: step, skipped, opt_state, extra, as numpy arrays."""
    folder = find_step(path) / "train"
    return _restore_item(folder, _abstract(_saved_shapes(folder)))


def save_params(path: epath.PathLike, params: Any, *, force: bool = False) -> None:
    """Writes parameters alone, as a step that find_step and restore_params understand.

    `force` replaces what is there.
    """
    step = files.absolute(path)
    with ocp.StandardCheckpointer() as writer:
        writer.save(step / "params", params, save_args=_by_layer(params), force=force)
    _mark_complete(step)


class ParamsWriter:
    """As save_params, for parameters that do not fit into memory: slice by slice.

    Orbax writes the names, with placeholders; TensorStore then puts each array in its place, one
    chunk a layer, uncompressed (the bits of weights hardly compress).
    """

    def __init__(self, path: epath.PathLike, leaves: Mapping[str, jax.ShapeDtypeStruct]):
        """Creates the arrays {leaf: shape and dtype}; every leaf must be written."""
        self._step = files.absolute(path)
        item = self._step / "params"
        blanks = trees.unflatten({name: np.zeros(1) for name in leaves})
        verbosity = logging.get_verbosity()
        logging.set_verbosity(logging.ERROR)  # Orbax warns that there is no OCDBT to merge
        with ocp.Checkpointer(ocp.PyTreeCheckpointHandler(use_ocdbt=False)) as writer:
            writer.save(item, args=ocp.args.PyTreeSave(blanks))
        logging.set_verbosity(verbosity)
        layout = _read_layout(item)
        self._arrays, self._running, self._held = {}, collections.deque(), 0
        for name, leaf in leaves.items():
            chunks = [1 if is_stacked(name) else leaf.shape[0], *leaf.shape[1:]]
            self._arrays[name] = tensorstore.open(
                {**_spec(item, layout, name), "create": True, "delete_existing": True,
                 "store_data_equal_to_fill_value": True,  # Orbax takes an absent chunk for damage
                 "metadata": {"compressor": None, "shape": leaf.shape, "chunks": chunks}},
                dtype=np.dtype(leaf.dtype)).result()

    def write(self, name: str, where: tuple[int | slice, ...], values: np.ndarray) -> None:
        """Puts values at an index of a leaf, in the leaf's dtype; the files may come later."""
        array = self._arrays[name]
        values = contiguous(values, array.dtype.numpy_dtype)
        self._running.append((array[where].write(values), values.nbytes))
        self._held += values.nbytes
        self._wait(_IN_FLIGHT_BYTES)

    def __enter__(self) -> ParamsWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: Any) -> None:
        """Waits for all files, also when the conversion ends by an error."""
        self._wait(0)
        if not kind:
            _mark_complete(self._step)

    def _wait(self, limit: int) -> None:
        """Until no more than so many bytes are on their way to the disk."""
        while self._running and self._held > limit:
            future, size = self._running.popleft()
            future.result()
            self._held -= size


def _mark_complete(step: epath.Path) -> None:
    """In a bucket, what Orbax asks of a complete step: its CheckpointManager writes this file last."""
    if files.is_remote(step):
        (step / "commit_success.txt").write_text("")


class StoredLeaf:
    """A saved array of which one layer at a time is read, by numpy's indexing of the first axis."""

    def __init__(self, array: tensorstore.TensorStore):
        self.shape, self.dtype = array.shape, array.dtype.numpy_dtype
        self._array = array
        self._rows = array.chunk_layout.read_chunk.shape[:1]  # layers in a chunk
        self._block: tuple[int, np.ndarray] | None = None  # the chunk read last, and its number

    def __getitem__(self, index: int | type(...)) -> np.ndarray:
        if index is ... or self._rows == (1,):
            return self._array[index].read().result()
        block, place = divmod(index, *self._rows)
        if self._block is None or self._block[0] != block:
            self._block = None  # frees it before the next is read
            start, size = block * self._rows[0], self._rows[0]
            self._block = block, self._array[start:min(start + size, self.shape[0])].read().result()
        layer = self._block[1][place]
        if place + 1 == len(self._block[1]):
            self._block = None  # read to its end: the next leaf wants the memory
        return layer


def open_params(path: epath.PathLike, part: str = "") -> dict[str, StoredLeaf]:
    """{leaf: array} as restore_params gives them, but read when asked for; of one part ('vqvae') alone."""
    step = find_step(path)
    leaves = {}
    for folder in param_folders(files.absolute(step), ema=True):
        names, layout = trees.flatten(_saved_shapes(folder)), _read_layout(folder)
        with _readable(folder):
            for name in (n for n in names if not part or n.startswith(f"{part}/")):
                leaves[name] = StoredLeaf(tensorstore.open(_spec(folder, layout, name)).result())
    return leaves


def is_stacked(name: str) -> bool:
    """Whether the first axis of a leaf is the layers'."""
    return "layers" in name.split("/")


def _by_layer(params: Any) -> Any:
    """Orbax's options to save each layer of a stack apart: one can be read without the rest."""
    return trees.map_named(
        lambda name, leaf: ocp.SaveArgs(shard_axes=(0,) if is_stacked(name) else ()), params)


def _read_layout(item: epath.Path) -> Mapping[str, Any]:
    return files.read_json(item / "_METADATA")


def _spec(item: epath.Path, layout: Mapping[str, Any], name: str) -> dict[str, Any]:
    """TensorStore's description of a saved array; Orbax joins the names of a path by dots."""
    key = name.replace("/", ".") + "/"
    text = os.fspath(item)
    if files.is_remote(item):
        def store(path: str) -> Any:
            return f"{text}/{path}"
    else:
        def store(path: str) -> Any:
            return {"driver": "file", "path": f"{text}/{path}"}
    driver = "zarr3" if layout.get("use_zarr3") else "zarr"
    if layout.get("use_ocdbt"):
        return {"driver": driver, "kvstore": {"driver": "ocdbt", "base": store(""), "path": key}}
    return {"driver": driver, "kvstore": store(key)}


def _restore_item(folder: epath.Path, want: Any) -> Any:
    def place(leaf: jax.ShapeDtypeStruct) -> ocp.RestoreArgs:
        if leaf.sharding is None:
            return ocp.RestoreArgs(restore_type=np.ndarray, dtype=leaf.dtype)
        return ocp.ArrayRestoreArgs(sharding=leaf.sharding, global_shape=leaf.shape,
                                    dtype=leaf.dtype)

    with _readable(folder), ocp.PyTreeCheckpointer() as reader:
        return reader.restore(files.absolute(folder), item=want,
                              restore_args=jax.tree.map(place, want))


def _saved_shapes(folder: epath.Path) -> dict[str, Any]:
    with _readable(folder):
        return ocp.PyTreeCheckpointHandler().metadata(files.absolute(folder)).tree


@contextlib.contextmanager
def _readable(folder: epath.Path) -> Iterator[None]:
    """Orbax's errors about a damaged folder, as one line."""
    try:
        yield
    except (ValueError, KeyError, OSError) as error:
        raise UserError(f"{folder} is broken or incomplete: {str(error)[:200]}") from error


def _abstract(saved: Any) -> Any:
    return jax.tree.map(lambda s: jax.ShapeDtypeStruct(s.shape, s.dtype), saved)


def _united(states: list[dict[str, Any]]) -> dict[str, Any]:
    """One dict of what any of them has; what several have is the same in all."""
    if len(states) == 1 or not all(isinstance(state, Mapping) for state in states):
        return states[0]
    keys = dict.fromkeys(key for state in states for key in state)
    return {key: _united([state[key] for state in states if key in state]) for key in keys}
