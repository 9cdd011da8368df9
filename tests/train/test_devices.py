"""N devices == 1 device for the real model: losses of a few steps over data, fsdp and tensor axes."""

import jax
import numpy as np
import pytest

from argenseg_jax import sharding, trees
from argenseg_jax.ckpt import checkpoint
from argenseg_jax.models import variants
from argenseg_jax.train import program, run
from tests.cli import tiny_config

STEPS = 3


def trajectory(sizes):
    """([loss of each step], parameters after them) on a mesh of these sizes."""
    cfg = tiny_config.get_config().to_dict()
    cfg["train"].update(global_batch=4, microbatch=0, steps=STEPS)
    cfg["train"]["loss"].update(chunk=cfg["data"]["max_labels"] // 3)  # the head is used three times
    model = variants.build({**cfg["model"], "dtype": "float32"})
    phase = run.phases(cfg, model, checkpoint.tokenizer_for(model, None))[-1]
    mesh = sharding.make_mesh(
        dict(dcn_data=1, data=1, fsdp=1, tensor=1) | sizes, jax.devices()[: int(np.prod(list(sizes.values())))]
    )
    with jax.set_mesh(mesh):
        params = jax.jit(run.init_fn(model))(jax.random.key(0))
        made = program.build(cfg, phase, jax.eval_shape(lambda: params), mesh)
        state, data, losses = made.new_state(params), phase.data(mesh), []
        for _ in range(STEPS):
            state, metrics = made.step(state, sharding.global_batch(mesh, next(data)))
            losses.append(float(metrics["loss"]))
        data.close()
    return losses, state.params


@pytest.mark.slow
def test_eight_devices_equal_one():
    one, params = trajectory(dict(data=1))
    many, sharded = trajectory(dict(data=2, fsdp=2, tensor=2))
    np.testing.assert_allclose(many, one, rtol=1e-4)
    assert one[-1] < one[0]
    q = sharded["llm"]["layers"]["attn"]["q"]["kernel"]
    assert q.addressable_shards[0].data.size * 4 == q.size  # fsdp x tensor
    frozen = trees.flatten(params["vqvae"])
    for path, leaf in trees.flatten(sharded["vqvae"]).items():
        np.testing.assert_array_equal(leaf, frozen[path])
