"""`compile`: the very step that the loop runs, decoding's phases, topologies, what does not fit, search."""

import json
import sys

import jax
import pytest

from argenseg_jax import hardware, sharding
from argenseg_jax.compile import advice, aot, candidates, roofline
from argenseg_jax.errors import UserError
from argenseg_jax.models import variants
from argenseg_jax.train import loop, run
from configs import argenseg_8b
from tests.cli import tiny_config
from tests.cli.command import refused
from tests.cli.test_cli import argenseg

ONE = dict(dcn_data=1, data=1, fsdp=1, tensor=1)
OOM = (
    "RESOURCE_EXHAUSTED: E1000: CompileTimeHbmOom: Ran out of memory on HBM, the total memory required for "
    "HLO temporaries (27.16G) exceeds available HBM (15.75G). HLO module: jit_step.\nSee https://openxla.org"
)


def tiny(**mesh):
    cfg = tiny_config.get_config().to_dict()
    return cfg | {"mesh": ONE | mesh}


def made(cfg):
    return sharding.make_mesh(cfg["mesh"], jax.devices()[:2])


def test_what_is_compiled_is_what_the_loop_runs(monkeypatch, tmp_path):
    """The loop on its way to the first step, stopped there: both lower to the same program."""

    class Here(Exception):
        pass

    seen = []

    def train(runner, state, data):
        seen.extend([runner, next(data)])
        data.close()
        raise Here

    monkeypatch.setattr(loop, "initial_params", lambda *args: {})
    monkeypatch.setattr(loop._PhaseRunner, "start", lambda self, params: (None, self.phase.data(self.mesh)))
    monkeypatch.setattr(loop._PhaseRunner, "train", train)
    monkeypatch.setattr(jax, "devices", lambda *args, devices=jax.devices()[:2]: devices)
    cfg = tiny(fsdp=2)
    with pytest.raises(Here):
        run.train(cfg, str(tmp_path))
    runner, rows = seen
    with jax.set_mesh(runner.mesh):
        batch = sharding.global_batch(runner.mesh, rows)
        step = runner.program.step.lower(runner.program.abstract_state(), batch)
    cfg["model"] = variants.resolve(cfg["model"])  # as run.train does
    lowered, program = aot.train_step(cfg, made(cfg))
    assert lowered.stage.as_text() == step.as_text()
    assert lowered.flops == runner.program.flops == program.flops == lowered.executed  # no remat here
    assert "stablehlo.convolution" in step.as_text()  # the VQ-VAE's encoder


def test_the_platform_is_that_of_the_mesh():
    device = jax.sharding.AbstractDevice(device_kind="TPU v5 lite", num_cores=1, platform="tpu")
    mesh = jax.sharding.AbstractMesh((1,), ("data",), abstract_device=device)
    assert sharding.platform() == "cpu"
    with jax.sharding.use_abstract_mesh(mesh):
        assert sharding.platform() == "tpu"


def test_phases_of_decoding_lower_on_a_tensor_axis():
    cfg = tiny(tensor=2)
    phases = aot.decode_phases(cfg, made(cfg), batch=2, prompt=64)
    assert list(phases) == ["prefill", "text", "mask"] and all(p.flops > 0 for p in phases.values())
    assert "all_reduce" in phases["mask"].stage.compile().as_text().replace("-", "_")


def test_topologies():
    assert hardware.topology("v5e:16x16") == ("v5e", "16x16")
    for cloud, shape in (
        ("v5p-128", "4x4x4"),
        ("v5p-8", "1x2x2"),
        ("v4-512", "4x8x8"),
        ("v6e-256", "16x16"),
        ("v5e-8", "2x4"),
    ):
        assert hardware.topology(cloud) == (cloud.split("-")[0], shape)
    for wrong in ("v5e", "v5e:", "v9:2x2", "v5e:16", "v5e:axb", "v5p-100", "16x16"):
        with pytest.raises(UserError, match="v5e:16x16"):
            hardware.topology(wrong)


def test_without_the_compiler(monkeypatch):
    monkeypatch.setitem(sys.modules, "libtpu", None)
    with pytest.raises(UserError, match=r"pip install libtpu==[\d.]+$"):
        aot.devices("v5e:2x2")


def test_a_step_that_does_not_fit():
    class Stage:
        def compile(self, compiler_options):
            raise jax.errors.JaxRuntimeError(OOM)

    lowered = aot.Lowered(Stage(), 1.0, 1.0, 1.0, arguments=0.5 * hardware.GIB)
    assert aot.compile_for("v5e", lowered, made(tiny(fsdp=2))) == {
        "fits": False,
        "hbm_gib": 27.66,
        "hbm_limit_gib": 15.75,
    }


def test_advice_names_what_is_enough_first():
    cfg = argenseg_8b.get_config().to_dict()
    cfg["train"].update(global_batch=2048)
    cfg["data"]["max_tokens"] = 2048
    model = variants.build(cfg["model"])
    device = jax.sharding.AbstractDevice(device_kind="TPU v5 lite", num_cores=1, platform="tpu")
    mesh = jax.sharding.AbstractMesh((1, 1, 256, 1), sharding.AXES, abstract_device=device)
    gib = hardware.GIB
    told = advice.advise(cfg, model, mesh, need=20 * gib, limit=16 * gib, state=0.4 * gib, moments=0.25 * gib)
    first = told[0]
    assert first["change"] == "--config.train.microbatch=1024" and first["enough"] and first["saves_gib"] > 4
    assert [t["enough"] for t in told] == sorted((t["enough"] for t in told), reverse=True)
    assert any("tensor=2" in t["change"] for t in told) and any("adafactor" in t["change"] for t in told)
    assert not any("remat" in t["change"] for t in told)  # it is full already
    cfg["train"]["remat"] = "none"
    told = advice.advise(cfg, model, mesh, need=90 * gib, limit=16 * gib, state=0.4 * gib, moments=0.25 * gib)
    assert any("remat=full" in t["change"] and t["saves_gib"] > 30 for t in told)


def test_search_leaves_out_what_cannot_fit():
    cfg = argenseg_8b.get_config().to_dict()
    cfg["train"]["global_batch"] = 256
    listed = candidates.expand(cfg, "v5e:16x16")
    assert {(c.fsdp, c.tensor) for c in listed} == {(256, 1), (128, 2), (64, 4)}
    assert {c.batch for c in listed} == {256, 512, 1024} and len(listed) == 27
    full = candidates.Candidate(256, 1, 512, "full")
    tried = [(full, {"fits": False, "hbm_gib": 20.0})]
    assert candidates.hopeless(candidates.Candidate(256, 1, 1024, "full"), tried)
    assert candidates.hopeless(candidates.Candidate(256, 1, 512, "none"), tried)
    assert not candidates.hopeless(candidates.Candidate(128, 2, 512, "full"), tried)
    assert not candidates.hopeless(candidates.Candidate(256, 1, 256, "none"), tried)
    good = {"fits": True, "hbm_gib": 5.0, "mfu": 0.5, "bound": "compute", "step_seconds": 2.0}
    ranked = candidates.ranked([*tried, (full, good), (full, {**good, "mfu": 0.6})])
    assert [report["mfu"] for _, report in ranked] == [0.6, 0.5]
    assert "256 sequences per second" in candidates.line(*ranked[0])


def test_bounds():
    work = roofline.Work(model_flops=197e12, executed_flops=2 * 197e12, hbm_bytes=819e9, ici_bytes=0.0)
    told = roofline.bound("v5e", work)
    assert (told["bound"], told["step_seconds"], told["mfu"]) == ("compute", 2.0, 0.5)
    told = roofline.bound("v5e", roofline.Work(197e12, 197e12, 819e9, 180e9, 4 * 3.125e9))
    assert (told["bound"], told["step_seconds"], told["mfu"]) == ("interconnect", 5.0, 0.2)


@pytest.mark.parametrize(
    "args, says",
    [
        ([], "--topology is missing"),
        (["--topology=v5e:4by4"], "--topology v5e:4by4 is unknown"),
        (["--topology=v5e:2x2", "--xla=fast"], "--xla fast: NAME=VALUE is expected"),
    ],
)
def test_mistakes(capfd, monkeypatch, args, says):
    monkeypatch.setattr("os.environ", {})  # the command sets where jax looks for TPUs
    assert says in refused(capfd, "compile", "--config=tests/cli/tiny_config.py", *args)


@pytest.mark.slow
@pytest.mark.libtpu
def test_a_real_compilation():
    flags = ["--config=tests/cli/tiny_config.py", "--config.mesh.data=4", "--config.train.global_batch=4"]
    done = argenseg("compile", *flags, "--topology=v5e:2x2")
    report = json.loads(done.stdout)
    assert done.returncode == 0 and report["fits"] and 0 < report["hbm_gib"] < 1
    assert {"flops", "bound", "mfu", "collective_bytes"} <= report.keys()
    assert len(done.stderr.strip().splitlines()) == 2  # nothing of libtpu's own
