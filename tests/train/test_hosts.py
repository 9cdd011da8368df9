"""Several processes of one run: the same losses as one, a lost one, a notice, other numbers of them."""

import json
import signal

import jax
import numpy as np
import pytest
from PIL import Image

from argenseg_jax import trees
from argenseg_jax.ckpt import orbax_io
from tests import processes
from tests.train import hosts_child, toy

pytestmark = pytest.mark.slow
CHILD = "tests.train.hosts_child"


def losses(workdir):
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, len(lines) + 1))
    return [line["loss"] for line in lines]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The losses and the last parameters of a run in one process on one device."""
    workdir = tmp_path_factory.mktemp("whole")
    hosts_child.train(workdir, devices=jax.devices()[:1])
    return losses(workdir), trees.flatten(orbax_io.restore_params(workdir))


def test_a_killed_process_ends_the_others_and_one_goes_on(whole, tmp_path):
    ended = processes.run(4, CHILD, tmp_path, int(signal.SIGKILL), 7, 2)
    assert [code for code, *_ in ended] == [75, 75, -signal.SIGKILL, 75], ended
    for index, (_, _out, err) in enumerate(ended):
        if index != 2:
            last = err.strip().split("\n")[-1]
            assert last.startswith(f"error: process {index} of 4 stops, most likely because another")
            assert "the same command on all hosts resumes" in last and "Traceback" not in err
    assert 2 <= orbax_io.newest_step(tmp_path) <= 6  # of step 6 it may not have been told yet
    hosts_child.train(tmp_path, devices=jax.devices()[:2])
    np.testing.assert_allclose(losses(tmp_path), whole[0], rtol=1e-5)
    for name, leaf in trees.flatten(orbax_io.restore_params(tmp_path)).items():
        np.testing.assert_allclose(leaf, whole[1][name], rtol=1e-4, atol=1e-5, err_msg=name)


def test_a_notice_to_one_process_stops_both_when_all_is_saved(whole, tmp_path):
    """The weights are then put whole, or onto another mesh, for whoever evaluates them."""
    ended = processes.run(2, CHILD, tmp_path, int(signal.SIGTERM), 3, 1, devices=2)
    assert [code for code, *_ in ended] == [143, 143], ended
    step = orbax_io.newest_step(tmp_path)
    assert all(f"stopped at step {step}, all saved" in err for _, _, err in ended)
    assert 4 <= step <= 8
    params = orbax_io.restore_params(tmp_path)
    layout = jax.sharding.NamedSharding(
        jax.make_mesh((4,), ("x",), devices=jax.devices()[:4]), jax.sharding.PartitionSpec("x")
    )
    sharded = {"connector": {"fc1": {"kernel": jax.ShapeDtypeStruct((toy.WIDTH, 16), np.float32, sharding=layout)}}}
    flat = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), params)
    kernel = orbax_io.restore_params(tmp_path, trees.replace(flat, trees.flatten(sharded)))
    kernel = kernel["connector"]["fc1"]["kernel"]
    assert kernel.sharding == layout
    np.testing.assert_array_equal(kernel, params["connector"]["fc1"]["kernel"])
    hosts_child.train(tmp_path, devices=jax.devices()[:1])
    np.testing.assert_allclose(losses(tmp_path), whole[0], rtol=1e-5)


def test_pictures_and_checksums_of_two_processes(whole, tmp_path):
    """Each holds a part of the weights; the pictures show all of them, and each lists the files that it wrote."""
    ended = processes.run(2, CHILD, tmp_path, devices=2)
    assert [code for code, *_ in ended] == [0, 0], ended
    np.testing.assert_allclose(losses(tmp_path), whole[0], rtol=1e-5)
    drawn = np.asarray(Image.open(tmp_path / "samples" / "0000012_kernel.png"), int)
    want = hosts_child.draw(trees.unflatten(whole[1]))["kernel"].astype(int)
    assert drawn.shape == want.shape and np.abs(drawn - want).max() <= 1
    step = tmp_path / "checkpoints" / "12"
    parts = [json.loads((step / f"checksums-0000{k}.json").read_text())["files"] for k in range(2)]
    assert all(any("process_1/" in name for name in part) == bool(k) for k, part in enumerate(parts))
    stored = {str(p.relative_to(step)) for p in step.rglob("*") if p.is_file()}
    assert parts[0].keys() | parts[1].keys() == stored - {"checksums-00000.json", "checksums-00001.json"}
    damaged = next((step / "params" / "ocdbt.process_1" / "d").iterdir())
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"x")
    ended = processes.run(2, CHILD, tmp_path, devices=2)
    assert [code for code, *_ in ended] == [2, 2], ended
    assert all(f"{damaged} is damaged" in err and "Traceback" not in err for *_, err in ended)
