"""The only training loop: a run is a list of phases (mask tokenizer, then language model).

    run(cfg, workdir, phases, init)
      for each phase: _PhaseRunner, with its Program: jitted `new_state` and `step`, their shardings
      lock the workdir
      saved = newest complete step, or None: params = initial_params (`load`ed, the rest drawn)
      for each runner, from the phase of `saved` on:
        state, data = runner.restore(saved) or runner.start(params)
        runner.train(state, data):
          for each step of the phase:
            batch = next of data, as global arrays
            state, metrics = program.step(state, batch)      # train/step.py: loss, gradients, update
            every log_every: metrics; every sample_every: images; every checkpoint_every: save
            after SIGTERM: save, raise Preempted
        params = averaged(state), with which the next phase starts

The first weights: a checkpoint in the workdir (resume), else `init_from`, else fresh ones.
A resumed run repeats, bit for bit, what an uninterrupted one does: the train state, the iterator state
and every random number follow from the checkpoint, the seed and the step.
"""

from __future__ import annotations

import contextlib
import json
import math
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
from etils import epath
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from argenseg_jax import distributed, files, hardware, locks, sharding, trees
from argenseg_jax.ckpt import orbax_io, steps
from argenseg_jax.ckpt.orbax_io import CONFIG, Checkpointer
from argenseg_jax.ckpt.steps import newest_step
from argenseg_jax.errors import UserError, located
from argenseg_jax.train import metrics_log, program
from argenseg_jax.train.state import Params, Phase, TrainState

# Config keys that may differ from those of the run that is resumed: its end, what it writes, and how
# its work is laid out on machines.
FREE_KEYS = (
    r"train/steps",
    r"train/(log|sample|checkpoint)_every",
    r"train/(keep|keep_best|max_skipped|allow_fresh)",
    r"mesh/.*",
    r"train/(microbatch|remat)",
    r"data/(workers|threads)",
    r"eval/.*",
)
Loader = Callable[[Params], Params]


class Preempted(Exception):
    """SIGTERM or Ctrl-C was received and everything is saved. The same command resumes from there.

    Attributes:
      signal: its number.
    """

    def __init__(self, text: str, signal: int):
        super().__init__(text)
        self.signal = signal


class HostLost(Exception):
    """Another process of the run has ended, and this one cannot continue without it."""


def run(
    cfg: Mapping[str, Any],
    workdir: str,
    phases: Sequence[Phase],
    init: Callable[[jax.Array], Params],
    *,
    load: Loader | None = None,
    extra_files: Mapping[str, Callable[[epath.Path], None]] | None = None,
    devices: Sequence[jax.Device] | None = None,
    rules: Sequence[sharding.Rule] = sharding.PARAM_RULES,
    profile: tuple[int, int] | None = None,
    checksums: bool = True,
) -> dict[str, Any]:
    """Trains all phases, or resumes them.

    Args:
      cfg: the resolved config as nested dicts; `seed`, `mesh` and `train` are read here.
      workdir: receives config.json, metrics.jsonl, tensorboard/, samples/ and checkpoints/.
      phases: in order; one step counter runs over all of them.
      init: rng -> the parameters of the model, all parts.
      load: shapes -> a tree of known weights (numpy) for some or all of them; the rest is drawn.
      extra_files: {name: function that writes it}, further files of the workdir (the tokenizer).
      devices: for the mesh; None = all.
      rules: parameter layouts.
      profile: first and last step of a trace, written to WORKDIR/profile (see `jax.profiler`).
      checksums: written with each checkpoint, and checked on the one that is resumed.

    Returns:
      {step, loss, text_loss, gen_loss, seconds}: the last logged losses, None where there are none.

    Raises:
      UserError: the workdir holds another run, or the config does not fit the mesh or the model.
      Preempted: after SIGTERM.
      HostLost: another process ended; this one should exit too, without waiting for it.
    """
    begin_time = time.perf_counter()
    root = files.to_path(workdir)
    mesh = sharding.make_mesh(cfg["mesh"], devices)
    with jax.set_mesh(mesh):
        shapes = jax.eval_shape(init, jax.random.key(0))
        begins = [sum(phase.steps for phase in phases[:i]) for i in range(len(phases))]
        runners = [_PhaseRunner(cfg, *pair, shapes, mesh, rules) for pair in zip(phases, begins)]
    with _locked(root) as lock:
        saved = _newest_of_all(root)
        _check_disk_space(root, runners)
        check_config(root / CONFIG, cfg, resumed=saved is not None)
        params = None
        if saved is None:
            with jax.set_mesh(mesh):
                params = initial_params(init, cfg["seed"], shapes, mesh, rules, load)
        result = _run_phases(cfg, root, runners, params, saved, extra_files or {}, mesh, lock, profile, checksums)
    return {**result, "seconds": round(time.perf_counter() - begin_time, 2)}


def _run_phases(
    cfg: Mapping[str, Any],
    root: epath.Path,
    runners: Sequence[_PhaseRunner],
    params: Params | None,
    saved: int | None,
    extra_files: Mapping[str, Callable[[epath.Path], None]],
    mesh: Mesh,
    lock: locks.Lock,
    profile: tuple[int, int] | None,
    checksums: bool,
) -> dict[str, Any]:
    """The part of `run` that writes: from `params`, or from step `saved`, to the end; see `run`."""
    if distributed.is_first():  # nothing is written before all checks have passed
        files.remove_leftovers(root)
        files.write(root / CONFIG, json.dumps(cfg, indent=1) + "\n")
        for name, save in extra_files.items():
            save(root / name)
    total = runners[-1].end
    checkpoints = Checkpointer(root, cfg["train"]["keep"], cfg["train"]["keep_best"], checksums=checksums)
    log = metrics_log.MetricsLog(root, saved or 0, total, active=distributed.is_first())
    with _lost_host(root), checkpoints, log, jax.set_mesh(mesh), _stop_signals() as stop:
        names = [runner.phase.task.name for runner in runners]
        first = 0
        if saved is not None:
            first = _index(names, checkpoints.meta(saved)["phase"], root)
        for runner in runners[first:]:
            runner.open(checkpoints, log, root, stop, lock, total, profile)
            if params is None:
                state, data = runner.restore(saved)
            else:
                state, data = runner.start(params)
            try:
                params = averaged(runner.train(state, data))
            finally:  # ends grain's threads and processes
                getattr(data, "close", lambda: None)()
        if checkpoints.best_step() is not None:
            log.message(f"best by {cfg['train']['keep_best']}: step {checkpoints.best_step()}")
    last = log.last()
    return {"step": max(total, saved or 0), **{k: last.get(k) for k in ("loss", "text_loss", "gen_loss")}}


@contextlib.contextmanager
def _locked(root: epath.Path) -> Iterator[locks.Lock]:
    """Holds the workdir's lock in the first process; UserError in all processes if it is not available."""
    lock, acquired = locks.Lock(root / locks.FILE, str(root)), False
    try:
        while not acquired:
            fault = None
            try:
                acquired = not distributed.is_first() or lock.attempt()
            except UserError as error:
                fault = str(error)
            acquired, fault = distributed.gather([acquired, fault])[0]  # the first process decides for all
            if fault:
                raise UserError(fault)
            if not acquired:
                time.sleep(lock.pause)
        yield lock
    finally:
        lock.release()


class _PhaseRunner:
    """One phase: its compiled step, its start or restore, and the loop over its steps."""

    def __init__(
        self,
        cfg: Mapping[str, Any],
        phase: Phase,
        begin: int,
        shapes: Params,
        mesh: Mesh,
        rules: Sequence[sharding.Rule],
    ):
        """Checks the sizes and the optimizer's section (UserError); nothing runs yet."""
        self.cfg, self.phase, self.begin, self.mesh = cfg["train"], phase, begin, mesh
        self.end = begin + phase.steps
        self.program = program.build(cfg, phase, shapes, mesh, rules, begin)

    def open(
        self,
        checkpoints: Checkpointer,
        log: metrics_log.MetricsLog,
        root: epath.Path,
        stop: Callable[[int], int],
        lock: locks.Lock,
        total: int,
        profile: tuple[int, int] | None,
    ) -> None:
        """Sets where the phase writes, what tells it to stop, the run's last step, and which steps are traced."""
        self.checkpoints, self.log, self.root, self.stop = checkpoints, log, root, stop
        self.lock, self.total = lock, total
        self.interval = metrics_log.Interval()
        self.profile = profile or (0, 0)

    def start(self, params: Params) -> tuple[TrainState, Iterator]:
        """The first state of the phase."""
        self.checkpoints.begin_phase()
        return self.program.new_state(params), self.phase.data(self.mesh)

    def restore(self, step: int) -> tuple[TrainState, Iterator]:
        """The train state and the iterator state saved with `step`, and the metrics not logged by then."""
        want = self.program.abstract_state()
        params, ema, rest, data_state = self.checkpoints.restore(step, *_parts(want))
        data = self.phase.data(self.mesh)
        with located(f"step {step} in {self.root}", "state of a run", UserError):
            data.set_state(data_state)
            self.interval.set_state(self.checkpoints.meta(step).get("interval"))
        self.log.message(f"resumed at step {step} ({self.phase.task.name})")
        return want.replace(params=params, ema=ema, **rest), data

    def save(self, step: int, state: TrainState, data: Iterator) -> None:
        """Saves everything that a resumed run needs to write the same numbers as this one."""
        if self.checkpoints.latest() != step:
            self.lock.check()
            # A CPU client with one thread would deadlock while copying an array that is not computed yet.
            jax.block_until_ready(state)
            interval = distributed.gather(self.interval.get_state(jax.device_get))[0]  # the first process logs
            meta = {"phase": self.phase.task.name, "step": step, "interval": interval}
            params, ema, rest = _parts(state)
            params, frozen = trees.split(params, self.program.changes)
            self.checkpoints.save(step, params, ema, rest, meta, data.get_state(), self.log.last(), frozen=frozen)

    def train(self, state: TrainState, data: Iterator) -> TrainState:
        """Runs steps until the end of the phase; saves every checkpoint_every, at the end, and on SIGTERM."""
        interval, tracing = self.interval, False
        interval.begin()
        first = int(state.step) + 1
        for step in range(first, self.end + 1):
            if step == self.profile[0]:
                with files.writing(self.root / "profile"):
                    jax.profiler.start_trace(str(self.root / "profile"))
                tracing = True
            batch = sharding.global_batch(self.mesh, interval.next(data))
            if step == first:
                self.log.message(f"{self.phase.task.name}: trains {self.program.sizes}; the first step compiles")
            state, metrics = self.program.step(state, batch)
            interval.add(metrics)
            self.log.advance()
            last = step == self.end
            if tracing and (last or step == self.profile[1]):
                jax.block_until_ready(metrics)
                with files.writing(self.root / "profile"):
                    jax.profiler.stop_trace()
                tracing = False
                self.log.message(f"trace of steps {self.profile[0]} to {step}: {self.root / 'profile'}")
            if last or step % self.cfg["log_every"] == 0:
                self._log(step, state, interval, sum(getattr(data, "broken", {}).values()))
            if self.phase.samples and self.cfg["sample_every"] and (last or step % self.cfg["sample_every"] == 0):
                self._save_samples(step, state)
            stopped = self.stop(step)
            if last or stopped or step % self.cfg["checkpoint_every"] == 0:
                self.save(step, state, data)
            if stopped and step < self.total:
                raise Preempted(f"stopped at step {step}, all saved; the same command resumes there", stopped)
        return state

    def _log(self, step: int, state: TrainState, interval: metrics_log.Interval, broken: int) -> None:
        self.lock.check()
        numbers = interval.mean(jax.device_get)
        skipped = int(state.skipped)
        # A skipped step leaves the optimizer as it was: the schedule does not advance.
        updates = max(step - self.begin - skipped, 1)
        numbers |= {
            "skipped": skipped,
            "broken": broken,
            "lr": float(self.program.schedule(updates - 1)),
            "rows_per_second": self.phase.global_batch / numbers["seconds_per_step"],
        }
        for name in {"tokens_per_second", "samples_per_second"} & numbers.keys():
            numbers[name] *= jax.process_count()
        device = jax.local_devices()[0]
        if self.program.flops and (peak := hardware.peak(device.device_kind)):
            numbers["mfu"] = self.program.flops / numbers["seconds_per_step"] / (peak * self.mesh.size)
        if memory := device.memory_stats():
            numbers["memory_gib"] = memory["peak_bytes_in_use"] / 2**30
        self.log.write(step, {"phase": self.phase.task.name, **numbers})
        if 0 < self.cfg["max_skipped"] <= numbers["skipped"]:
            raise UserError(
                f"{numbers['skipped']} of the steps up to {step} had a loss or gradient that is not "
                f"finite (train.max_skipped={self.cfg['max_skipped']}); lower optim.lr, or look at "
                f"the data; the newest checkpoint is of step {self.checkpoints.latest()}"
            )

    def _save_samples(self, step: int, state: TrainState) -> None:
        images = self.phase.samples(averaged(state))
        if distributed.is_first():
            metrics_log.save_images(self.root / "samples", images, step)


def averaged(state: TrainState) -> Params:
    """The parameters to use: the moving averages where the state has them."""
    return trees.replace(state.params, trees.flatten(state.ema))


def _parts(state: TrainState) -> tuple[Any, Any, dict[str, Any]]:
    """The items of a checkpoint: (params, ema, the rest of the state)."""
    return (
        state.params,
        state.ema,
        {"step": state.step, "skipped": state.skipped, "opt_state": state.opt_state, "extra": state.extra},
    )


def initial_params(
    init: Callable[[jax.Array], Params],
    seed: int,
    shapes: Params,
    mesh: Mesh,
    rules: Sequence[sharding.Rule],
    load: Loader | None,
) -> Params:
    """Parameters on the mesh: those that `load` returns; the others are drawn directly into their shards."""
    layout = trees.flatten(sharding.shardings(shapes, mesh, rules))
    known = trees.flatten(load(shapes)) if load else {}
    if unexpected := sorted(set(known) - set(layout)):
        raise UserError(f"init_from has parameters that the model lacks: {', '.join(unexpected[:5])}")
    drawn = {name: layout[name] for name in layout if name not in known}
    fresh = jax.jit(lambda key: {n: x for n, x in trees.flatten(init(key)).items() if n in drawn}, out_shardings=drawn)(
        jax.random.fold_in(jax.random.key(seed), 0)
    )
    # Each process places its own shards; device_put would compare the complete arrays across processes.
    loaded = {n: jax.make_array_from_callback(x.shape, layout[n], x.__getitem__) for n, x in known.items()}
    return trees.unflatten({n: fresh[n] if n in fresh else loaded[n] for n in layout})


def check_config(path: epath.Path, cfg: Mapping[str, Any], *, resumed: bool) -> None:
    """UserError that names the keys in which a resumed run's config differs from the saved one."""
    if not resumed or not path.exists():
        return
    old = trees.flatten(orbax_io.read_config(path))
    new = trees.flatten(json.loads(json.dumps(cfg)))  # tuples become lists, as in the file
    missing = object()
    added = {key for key in new if key not in old and not new[key]}  # a later feature, switched off
    changed = [
        key
        for key in sorted({*old, *new})
        if not trees.match(FREE_KEYS, key) and key not in added and old.get(key, missing) != new.get(key, missing)
    ]
    if changed:
        shown = "; ".join(f"{key.replace('/', '.')}: {old.get(key)!r} -> {new.get(key)!r}" for key in changed)
        raise UserError(
            f"{path} is of another run ({shown}); a resumed run may change "
            "train.steps, mesh.*, eval.* and logging only: undo these, or use another "
            "--workdir"
        )


def _newest_of_all(root: epath.Path) -> int | None:
    """Number of the newest complete step; UserError if the processes see different ones."""
    found = distributed.gather(newest_step(root, training=True))
    if len(set(found)) > 1:
        raise UserError(
            f"{root}: the newest checkpoints that the processes see are {found}; "
            "--workdir must be one folder for all hosts"
        )
    if found[0] is None:
        _check_unused(root)
    return found[0]


def _check_disk_space(root: epath.Path, runners: Sequence[_PhaseRunner]) -> None:
    """UserError if the disk has less than half the space of a checkpoint (compression may save some)."""
    if files.is_remote(root) or not distributed.is_first():
        return
    sizes = [
        sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(runner.program.shapes))
        for runner in runners
    ]
    if (free := shutil.disk_usage(root).free) < max(sizes) / 2:
        raise UserError(
            f"{root}: a checkpoint takes about {max(sizes) / 1e6:,.1f} MB, and the disk has "
            f"{free / 1e6:,.1f} MB left; make room, or use another --workdir"
        )


def _check_unused(root: epath.Path) -> None:
    """UserError if a workdir has no step to resume from, but results that a new run would overwrite."""
    if weights := steps.complete_steps(root):
        raise UserError(
            f"{root}: step {weights[-1]} holds weights alone, from which no run can resume; train "
            f"in another --workdir, with init_from={root}"
        )
    lines = metrics_log.read_lines(root / metrics_log.METRICS)
    if lines and steps.has_damaged(root):
        raise UserError(
            f"{root} has metrics up to step {lines[-1]['step']}, but no step in {steps.DIRECTORY}/ is "
            "complete: copy one again, or name another --workdir"
        )


@contextlib.contextmanager
def _lost_host(root: epath.Path) -> Iterator[None]:
    """Turns jax's error when the processes cannot reach each other into HostLost."""
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if jax.process_count() == 1:
            raise
        raise HostLost(
            f"process {jax.process_index()} of {jax.process_count()} stops, most likely because "
            f"another one ended, whose log has the reason ({' '.join(str(error).split())[:200]}); the newest "
            f"checkpoint is of step {newest_step(root)}: the same command on all hosts resumes "
            "from there"
        ) from error


def _index(names: Sequence[str], name: str, workdir: epath.PathLike) -> int:
    if name not in names:
        raise UserError(f"{workdir}: its checkpoint is of phase '{name}'; the config has {names}")
    return names.index(name)


@contextlib.contextmanager
def _stop_signals() -> Iterator[Callable[[int], int]]:
    """A function step -> the signal to stop for (SIGTERM, or a first Ctrl-C), or 0.

    On several hosts all processes stop after the same step, for SIGTERM only.
    """
    if jax.process_count() > 1:
        yield lambda step: signal.SIGTERM if multihost_utils.reached_preemption_sync_point(step) else 0
        return
    asked: list[int] = []

    def ask(number: int, _: Any) -> None:
        if number == signal.SIGINT:
            if number in asked:
                raise KeyboardInterrupt
            print("\nCtrl-C: stops and saves after this step; once more: stops now", file=sys.stderr, flush=True)
        asked.append(number)

    try:
        before = {number: signal.signal(number, ask) for number in (signal.SIGTERM, signal.SIGINT)}
    except ValueError:  # not in the main thread: the caller handles signals
        yield lambda step: 0
        return
    try:
        yield lambda step: asked[0] if asked else 0
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
