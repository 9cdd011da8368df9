"""The multi-scale quantizer: recorded operators, and what must hold between its methods."""

import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from argenseg_jax.models.quantizer import MultiScaleQuantizer, resample
from argenseg_jax.models.resize import area_matrix, bicubic_matrix

GOLDEN = pathlib.Path(__file__).parents[1] / "golden" / "C_quant_ops"
PATCH_NUMS = (1, 2, 3, 6)
B, S, C, V, N = 2, 6, 5, 40, 50


def make(**fields):
    return MultiScaleQuantizer(codebook_size=V, channels=C, patch_nums=PATCH_NUMS, **fields)


@pytest.fixture(scope="module")
def params():
    """A codebook of unit normals, so that codes differ, and random phi convolutions."""
    rng = np.random.default_rng(0)
    phi = {
        f"phi_{i}": {
            "kernel": rng.normal(size=(3, 3, C, C), scale=0.15).astype(np.float32),
            "bias": np.full(C, 0.1, np.float32),
        }
        for i in range(4)
    }
    return {"codebook": rng.normal(size=(V, C)).astype(np.float32), **phi}


@pytest.fixture(scope="module")
def f():
    return 2 * jax.random.normal(jax.random.key(2), (B, S, S, C))


def call(params, method, *args, k=None, **fields):
    def run(params, *args):
        more = () if k is None else (k,)
        return make(**fields).apply({"params": params}, *args, *more, method=method)

    return jax.jit(run)(params, *args)


# ---- recordings ----------------------------------------------------------------------------------


def test_resample_equals_torch():
    io = np.load(GOLDEN / "io.npz")
    for pn in json.loads((GOLDEN / "config.json").read_text())["sets"]["16"]:
        x, small = io["x_16"].transpose(0, 2, 3, 1), io[f"small_16_{pn}"].transpose(0, 2, 3, 1)
        both = jax.jit(
            lambda x, small, pn=pn: (resample(area_matrix(16, pn), x), resample(bicubic_matrix(pn, 16), small))
        )
        down, up = both(x, small)
        down, up = (np.transpose(y, (0, 3, 1, 2)) for y in (down, up))
        np.testing.assert_allclose(down, io[f"area_16_to_{pn}"], atol=2e-6)
        np.testing.assert_allclose(up, io[f"bicubic_{pn}_to_16"], atol=1e-5)


def test_phi_equals_torch():
    io = np.load(GOLDEN / "io.npz")
    x = io["phi_in"].transpose(0, 2, 3, 1)
    b, s, _, c = x.shape
    # A codebook that is the input itself makes one full-size scale a bare phi.
    model = MultiScaleQuantizer(codebook_size=b * s * s, channels=c, patch_nums=(s,), num_phi=1)
    params = {
        "codebook": x.reshape(-1, c),
        "phi_0": {"kernel": io["phi_weight"].transpose(2, 3, 1, 0), "bias": io["phi_bias"]},
    }
    codes = jnp.arange(b * s * s).reshape(b, s * s)
    got = model.apply({"params": params}, codes, method="lookup")
    np.testing.assert_allclose(got.transpose(0, 3, 1, 2), io["phi_out"], atol=1e-5)


# ---- invariants ----------------------------------------------------------------------------------


def test_quantize_agrees_with_lookup_and_with_scale_by_scale_decoding(params, f):
    codes, f_hat = call(params, "quantize", f)
    assert codes.shape == (B, N) and codes.dtype == jnp.int32
    np.testing.assert_allclose(call(params, "lookup", codes), f_hat, atol=1e-6)
    teacher = call(params, "teacher_inputs", codes)
    assert teacher.shape == (B, N - 1, C)
    grown, seen = jnp.zeros_like(f), []
    for k, (begin, end) in enumerate(make().scales.bounds):
        if k:
            seen.append(call(params, "scale_input", grown, k=k))
        grown = call(params, "accumulate", grown, codes[:, begin:end], k=k)
    np.testing.assert_array_equal(jnp.concatenate(seen, 1), teacher)
    np.testing.assert_allclose(grown, f_hat, atol=1e-6)


def test_teacher_inputs_never_see_their_own_scale_or_later(params, f):
    codes, _ = call(params, "quantize", f)
    inputs = jax.jit(lambda c: make().apply({"params": params}, c, method="teacher_inputs"))
    for begin, end in make().scales.bounds:
        before, after = inputs(codes), inputs(codes.at[:, begin:end].add(1) % V)
        same = np.all(np.asarray(before == after), axis=(0, 2))
        assert same[: end - 1].all() and not same[end - 1 :].any()  # place i is fed by code i+1's row


def test_nearest_is_the_nearest(params):
    z = jax.random.normal(jax.random.key(3), (7, C))
    brute = np.linalg.norm(z[:, None] - params["codebook"], axis=-1).argmin(1)
    np.testing.assert_array_equal(call(params, "nearest", z), brute)
    np.testing.assert_array_equal(call(params, "nearest", params["codebook"]), np.arange(V))


def test_targets_are_what_the_codes_stand_for(params, f):
    q = call(params, "residual_quantize", f)
    assert q.targets.shape == (B, N, C) and len(q.f_hats) == len(PATCH_NUMS)
    np.testing.assert_array_equal(call(params, "nearest", q.targets), q.codes)
    np.testing.assert_allclose(q.targets[:, 0], f.mean((1, 2)), atol=1e-6)
    np.testing.assert_allclose(q.targets[:, -S * S :].reshape(f.shape), f - q.f_hats[-2], atol=1e-5)


def test_straight_through_passes_the_gradient_and_bf16_is_lifted(params, f):
    weight = jax.random.normal(jax.random.key(4), f.shape)
    grad = jax.grad(lambda x: jnp.vdot(weight, call(params, "straight_through", x)[0]))(f)
    np.testing.assert_allclose(grad, weight, atol=1e-6)
    f_hat, loss, q = call(params, "straight_through", f.astype(jnp.bfloat16))
    assert f_hat.dtype == loss.dtype == jnp.float32
    np.testing.assert_allclose(f_hat, q.f_hats[-1], atol=1e-5)
    half = f.astype(jnp.bfloat16).astype(jnp.float32)
    want = np.mean([1.25 * np.mean((h - half) ** 2) for h in q.f_hats])
    np.testing.assert_allclose(loss, want, rtol=1e-5)


def test_dead_zone_codes_nothing_as_zero(params):
    quiet = {
        name: leaf if name == "codebook" else {**leaf, "bias": np.zeros(C, np.float32)} for name, leaf in params.items()
    }
    small = 0.05 * jax.random.normal(jax.random.key(5), (B, S, S, C))
    codes, f_hat = call(quiet, "quantize", small, dead_zone=0.5)
    assert not codes.any() and not f_hat.any()
    loud, _ = call(quiet, "quantize", 100 * small, dead_zone=0.5)
    assert (loud > 0).mean() > 0.9
