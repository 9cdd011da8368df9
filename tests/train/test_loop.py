"""The loop: files it leaves, phases, starting points, what a resumed run may change."""

import contextlib
import dataclasses
import json
import os
import signal
import time

import jax
import numpy as np
import pytest
from etils import epath

from argenseg_jax import files, locks, processes, sharding, trees
from argenseg_jax.ckpt import orbax_io
from argenseg_jax.errors import UserError
from argenseg_jax.train import loop, metrics_log, program
from tests.train import toy

ONE = jax.devices()[:1]


def run(cfg, workdir, first=0, data=toy.Data, **kwargs):
    return loop.run(cfg, str(workdir), toy.phases(cfg, first, data), toy.init, devices=ONE, **kwargs)


def lines(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def test_a_run_leaves_its_files_and_numbers(tmp_path):
    cfg = toy.config(steps=60, log_every=20, checkpoint_every=30)
    result = run(cfg, tmp_path)
    assert result["step"] == 60 and result["text_loss"] is None
    assert result["loss"] == result["gen_loss"] == lines(tmp_path)[-1]["loss"]
    assert [line["step"] for line in lines(tmp_path)] == [20, 40, 60]
    assert lines(tmp_path)[0]["loss"] > lines(tmp_path)[-1]["loss"]
    saved = json.loads((tmp_path / "config.json").read_text())
    assert saved == json.loads(json.dumps(cfg))
    assert all(0 <= line["data_wait"] < 1 for line in lines(tmp_path))
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["30", "60", "frozen"]
    assert any((tmp_path / "tensorboard").iterdir())


def test_phases_share_one_counter_and_pass_their_weights_on(tmp_path):
    cfg = toy.config()
    result = run(cfg, tmp_path, first=3)
    assert result["step"] == 9
    assert [(line["step"], line["phase"]) for line in lines(tmp_path)] == [
        (2, "vqvae"),
        (3, "vqvae"),
        (4, "lm"),
        (6, "lm"),
        (8, "lm"),
        (9, "lm"),
    ]
    fresh = trees.flatten(toy.init(jax.random.fold_in(jax.random.key(cfg["seed"]), 0)))
    final = trees.flatten(orbax_io.restore_params(str(tmp_path)))
    np.testing.assert_array_equal(final["visual/lvl_embed"], fresh["visual/lvl_embed"])
    assert np.any(final["connector/fc1/kernel"] != fresh["connector/fc1/kernel"])


def test_weights_that_are_known_replace_fresh_ones(tmp_path):
    known = {"visual": {"lvl_embed": np.full((2, toy.WIDTH), 7.0, np.float32)}}
    run(toy.config(), tmp_path, load=lambda shapes: known)
    np.testing.assert_array_equal(
        orbax_io.restore_params(str(tmp_path))["visual"]["lvl_embed"], known["visual"]["lvl_embed"]
    )
    with pytest.raises(UserError, match="other/leaf"):
        run(toy.config(), tmp_path / "b", load=lambda shapes: {"other": {"leaf": np.zeros(1)}})


def test_resume_refuses_another_config_and_names_the_key(tmp_path):
    run(toy.config(), tmp_path)
    cfg = toy.config()
    cfg["optim"]["lr"] = 1.0
    with pytest.raises(UserError, match=r"optim\.lr: 0\.01 -> 1\.0"):
        run(cfg, tmp_path)
    cfg = toy.config()
    cfg["train"]["steps"], cfg["train"]["log_every"], cfg["eval"]["masks"] = 8, 1, "union"
    assert run(cfg, tmp_path)["step"] == 8
    assert [line["step"] for line in lines(tmp_path)] == [2, 4, 6, 7, 8]


def test_a_run_of_before_a_feature_goes_on_with_it_switched_off(tmp_path):
    cfg = toy.config()
    del cfg["optim"]["ema"], cfg["train"]["loss"]["chunk"]
    loop.check_config(epath.Path(tmp_path), cfg, resumed=False)
    (tmp_path / "config.json").write_text(json.dumps(cfg))
    cfg["train"]["loss"]["chunk"] = 0
    loop.check_config(epath.Path(tmp_path / "config.json"), cfg, resumed=True)
    cfg["optim"]["ema"] = 0.9
    with pytest.raises(UserError, match=r"optim\.ema: None -> 0\.9"):
        loop.check_config(epath.Path(tmp_path / "config.json"), cfg, resumed=True)


class Broken(toy.Data):
    """Every second batch has a target that is no number."""

    def __next__(self):
        batch = super().__next__()
        return batch if self.index % 2 else batch | {"y": np.full_like(batch["y"], np.nan)}


def test_steps_that_are_not_finite_end_the_run(tmp_path):
    with pytest.raises(UserError, match=r"2 of the steps up to 4 .*newest checkpoint is of step 3"):
        run(toy.config(max_skipped=2), tmp_path, data=Broken)
    assert run(toy.config(max_skipped=4), tmp_path, data=Broken)["step"] == 6
    assert lines(tmp_path)[-1]["skipped"] == 3


@pytest.mark.slow
def test_a_trace_of_some_steps(tmp_path):
    run(toy.config(), tmp_path, profile=(2, 3))
    assert list((tmp_path / "profile").rglob("*.xplane.pb"))


def test_large_trained_parameters_must_be_sharded(monkeypatch):
    shapes = jax.eval_shape(toy.init, jax.random.key(0))
    cfg = toy.config()["mesh"] | {"fsdp": 2}
    mesh = sharding.make_mesh(cfg, jax.devices()[:2])
    whole = program.check_replicated(shapes, lambda path: True, mesh, sharding.PARAM_RULES)
    kernels = 4 * (8 * 16 + 16 * 4 + 8 * 8)  # all that the table splits
    assert whole == 4 * sum(x.size for x in jax.tree.leaves(shapes)) - kernels
    monkeypatch.setattr(program, "_LARGE", 0)
    with pytest.raises(UserError, match="more than 2% of them: visual/pos_embed"):
        program.check_replicated(
            shapes, lambda path: path.startswith(("visual", "connector")), mesh, sharding.PARAM_RULES
        )
    only = lambda path: path.endswith("kernel")  # what is frozen may be whole
    assert program.check_replicated(shapes, only, mesh, sharding.PARAM_RULES) == whole


def test_a_finished_run_answers_at_once(tmp_path):
    first = run(toy.config(), tmp_path)
    again = run(toy.config(), tmp_path)
    assert {k: again[k] for k in ("step", "loss")} == {k: first[k] for k in ("step", "loss")}


@pytest.mark.parametrize("number", [pytest.param(signal.SIGTERM, marks=pytest.mark.slow), signal.SIGINT])
def test_a_signal_saves_and_the_run_resumes(tmp_path, number):
    class Interrupted(toy.Data):
        def __next__(self):
            if self.index == 3:
                os.kill(os.getpid(), number)
            return super().__next__()

    cfg = toy.config(checkpoint_every=100)
    with pytest.raises(loop.Preempted, match="step 4") as caught:
        run(cfg, tmp_path, data=Interrupted)
    assert caught.value.signal == number and orbax_io.newest_step(tmp_path) == 4
    assert not (tmp_path / locks.FILE).exists()
    result = run(cfg, tmp_path)
    whole = run(cfg, tmp_path / "whole")
    assert result["loss"] == whole["loss"]


def test_a_notice_at_the_last_step_of_a_phase_is_not_forgotten(tmp_path, monkeypatch):
    """Several hosts learn of it at one step only, which they have agreed on."""

    @contextlib.contextmanager
    def told_once():
        yield lambda step: signal.SIGTERM if step in (3, 9) else 0

    monkeypatch.setattr(loop, "_stop_signals", told_once)
    with pytest.raises(loop.Preempted, match="stopped at step 3, all saved"):
        run(toy.config(), tmp_path, first=3)
    assert orbax_io.newest_step(tmp_path) == 3
    assert run(toy.config(), tmp_path, first=3)["step"] == 9  # at the run's last step there is nothing to stop


def test_a_second_ctrl_c_ends_at_once(tmp_path, capfd):
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where a shell runs it in the background

    class Impatient(toy.Data):
        def __next__(self):
            if self.index == 1:
                os.kill(os.getpid(), signal.SIGINT)
                os.kill(os.getpid(), signal.SIGINT)
            return super().__next__()

    with pytest.raises(KeyboardInterrupt):
        run(toy.config(), tmp_path, data=Impatient)
    assert "once more: stops now" in capfd.readouterr().err
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert run(toy.config(), tmp_path)["step"] == 6
    signal.signal(signal.SIGINT, before)


def test_the_logged_rate_is_the_one_that_was_used(tmp_path):
    """A skipped step leaves the schedule where it was."""
    cfg = toy.config(log_every=1, max_skipped=0)
    cfg["optim"].update(warmup=50)
    run(cfg, tmp_path, data=Broken)  # steps 1, 3 and 5 are skipped
    skipped = [line["skipped"] for line in lines(tmp_path)]
    assert skipped == [0, 1, 1, 2, 2, 3]
    used = [0.01 * (count + 1) / 51 for count in (0, 0, 1, 1, 2, 2)]  # of the update before each line
    np.testing.assert_allclose([line["lr"] for line in lines(tmp_path)], used, rtol=1e-6)


def test_a_workdir_in_use_is_left_alone(tmp_path):
    """Whoever comes second ends with one line; the files are as they were."""
    run(toy.config(), tmp_path)
    before = sorted((p, p.stat().st_mtime_ns) for p in tmp_path.rglob("*") if p.is_file())
    with locks.Lock(tmp_path / locks.FILE, str(tmp_path)):
        with pytest.raises(UserError, match=f"{tmp_path} is in use by process {os.getpid()} on "):
            run(toy.config(steps=9), tmp_path)
    assert sorted((p, p.stat().st_mtime_ns) for p in tmp_path.rglob("*") if p.is_file()) == before


def test_a_run_that_was_taken_over_writes_no_more(tmp_path, monkeypatch):
    monkeypatch.setattr(locks, "HEARTBEAT_SECONDS", 0.01)

    class Suspended(toy.Data):
        def __next__(self):
            if self.index == 4:
                other = locks.Holder("other", dataclasses.replace(processes.this(), host="node7", pid=5), 1e10)
                files.write(tmp_path / locks.FILE, other.content())
                time.sleep(0.3)
            return super().__next__()

    with pytest.raises(UserError, match="was taken over by process 5 on node7"):
        run(toy.config(checkpoint_every=2), tmp_path, data=Suspended)
    assert orbax_io.newest_step(tmp_path) == 4 and [line["step"] for line in lines(tmp_path)] == [2, 4]
    assert json.loads((tmp_path / locks.FILE).read_bytes())["host"] == "node7"


FULL = OSError(28, "No space left on device")


@pytest.mark.parametrize("where", ["step", "metrics", "frozen"])
def test_a_full_disk_is_one_line_and_the_run_resumes(tmp_path, monkeypatch, where):
    """The same command with room again goes to the end."""

    def fail(*_, **__):
        raise FULL if where != "step" else ValueError(f"RESOURCE_EXHAUSTED: Error writing x: {FULL.strerror}")

    with monkeypatch.context() as patch:
        if where == "step":
            patch.setattr(orbax_io.ocp.CheckpointManager, "save", fail)
        elif where == "frozen":
            patch.setattr(orbax_io, "save_params", fail)
        else:
            patch.setattr(metrics_log.json, "dumps", fail)
        with pytest.raises(UserError, match="cannot be written .No space left on device.") as caught:
            run(toy.config(), tmp_path)
    if where != "metrics":
        assert str(caught.value).endswith("there is no complete step yet")
    assert not (tmp_path / locks.FILE).exists()
    assert run(toy.config(), tmp_path)["step"] == 6


@pytest.mark.parametrize(
    "name, content, line",
    [
        ("config.json", "[]", "config.json is not the config of a run"),
        ("config.json", "{", "config.json is no valid JSON"),
        ("metrics.jsonl", '{"step": 2}\n{\n{"step": 3}\n', "metrics.jsonl:2"),
        (
            "checkpoints/6/meta/metadata",
            '{"phase": "lm", "data": {"index": 1}, "interval": 3, "frozen": 3}',
            "step 6 .* state of a run",
        ),
        ("checkpoints/6/meta/metadata", '{"phase": "lm", "data": {}, "frozen": 3}', "step 6 .* state of a run"),
        ("checkpoints/6/meta/metadata", '{"phase": "x", "data": {}}', "its checkpoint is of phase 'x'"),
    ],
)
def test_damaged_files_of_a_workdir_are_one_line(tmp_path, name, content, line):
    run(toy.config(), tmp_path, checksums=False)
    (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=line):
        run(toy.config(steps=8), tmp_path)


def test_samples_are_drawn(tmp_path):
    cfg = toy.config(sample_every=4)
    phase = toy.phases(cfg)[0]
    draw = lambda params: {"grey": np.full((2, 2, 3), 9, np.uint8)}
    loop.run(cfg, str(tmp_path), [type(phase)(**{**vars(phase), "samples": draw})], toy.init, devices=ONE)
    assert sorted(p.name for p in (tmp_path / "samples").iterdir()) == ["0000004_grey.png", "0000006_grey.png"]


def test_batches_that_do_not_split_are_named(tmp_path):
    with pytest.raises(UserError, match="microbatch 3 does not divide"):
        run(toy.config(microbatch=3), tmp_path)
    cfg = toy.config(microbatch=2)
    cfg["mesh"]["data"] = 4
    with pytest.raises(UserError, match="not a multiple of the 4"):
        loop.run(cfg, str(tmp_path), toy.phases(cfg), toy.init, devices=jax.devices()[:4])
