"""No PRNG key is used twice: steps of both phases, fresh weights and sampled answers under jax's own check.

The check looks at programs as they are traced; nothing has to be compiled.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from argenseg_jax import trees
from argenseg_jax.decode.engine import Phases
from argenseg_jax.decode.inference_weights import for_inference
from argenseg_jax.decode.sampling import DecodeConfig, Sampling
from argenseg_jax.models.argenseg import init_params
from argenseg_jax.train import losses, optim
from argenseg_jax.train import step as step_lib
from configs import common
from tests import tiny


def check(run, *args, **kwargs):
    """Traces run(*args); a key that is used twice is a KeyReuseError. Returns the shapes of the result."""
    with jax.debug_key_reuse(True):
        return (run if hasattr(run, "trace") else jax.jit(run)).trace(*args, **kwargs).out_info


def test_the_check_sees_a_key_that_is_used_twice():
    with pytest.raises(jax.errors.KeyReuseError):
        check(lambda key: jax.random.uniform(key) + jax.random.normal(key), jax.random.key(0))


@pytest.mark.parametrize("phase", ["lm", "vqvae"])
def test_a_step(phase):
    """Drop path, corrupted codes and microbatches; crossed masks and restarted codes."""
    model, params = tiny.made("qwen")
    params = jax.tree.map(jnp.asarray, params)
    batch = tiny.batch(model, [tiny.sample(0), tiny.sample(1)])
    task = losses.lm_task(model, losses.LMOptions(corrupt=0.3, max_labels=48, chunk=16))
    if phase == "vqvae":
        task, batch = losses.vqvae_task(model), {"masks": batch["masks"][:, 0]}
    select = optim.trainable(params, (), task.frozen)
    tx = optim.build(common.optimizer(), 4, trees.split(params, select)[0])
    state = step_lib.init_state(params, tx, select, extra=task.init_extra(params))
    check(step_lib.make_train_step(task, tx, select, seed=0, microbatches=2), state, batch)


def test_fresh_weights():
    check(functools.partial(init_params, tiny.made("nano")[0]), jax.random.key(0))


def test_a_sampled_answer():
    """Prompt, text, and a mask with its codes, words and codes drawn alike."""
    model, params = tiny.made("qwen")
    phases = Phases(model)
    weights = {"params": for_inference(phases.model, params, int8=False, split=phases.split)}
    draw = Sampling(temperature=0.7, top_k=5, top_p=0.9)
    rules = DecodeConfig(draw.on_device(2), draw.on_device(2, "codes"))
    answer = check(phases.prefill, weights, np.ones((2, 8), np.int32), np.full(2, 8), None, rules, 128, 4)
    answer = check(phases.text, weights, answer)
    check(phases.mask, weights, answer, False)
