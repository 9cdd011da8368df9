"""The VQ-VAE against the official one's recordings, and the invariants of the nano options."""

import json
import lzma
import os
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from safetensors.numpy import load

from argenseg_jax import trees
from argenseg_jax.interop import state_dict as interop
from argenseg_jax.models.vqvae import VQVAE, _depth_to_space, _space_to_depth
from argenseg_jax.train.vqvae_loss import VqvaeLossOptions, init_state, mix_masks, vqvae_loss

NANO = VQVAE(
    ch=16,
    ch_mult=(1,),
    num_res_blocks=0,
    z_channels=8,
    codebook_size=32,
    patch_nums=(1, 2, 4),
    using_sa=False,
    using_mid_sa=False,
    patch_size=4,
    local=True,
    dead_zone=0.1,
)


# ---- parity with the official model --------------------------------------------------------------


def nhwc(x):
    return np.moveaxis(x, -3, -1)


def assert_features(got, want):
    got, want = np.asarray(got), np.asarray(want)
    assert got.shape == want.shape
    assert np.abs(got - want).max() <= 2e-4 * max(1, np.abs(want).max())


class Case:
    def __init__(self, name):
        root = pathlib.Path(os.environ["ARGENSEG_GOLDEN"]) / name
        self.config = c = json.loads((root / "config.json").read_text())
        self.io = np.load(root / "io.npz")
        self.model = VQVAE(
            ch=c["ch"],
            ch_mult=tuple(c["ch_mult"]),
            num_res_blocks=c["num_res_blocks"],
            z_channels=c["z_channels"],
            codebook_size=c["vocab_size"],
            patch_nums=tuple(c["patch_nums"]),
            beta=c["beta"],
            phi_ratio=c["quant_resi"],
            num_phi=c["share_quant_resi"],
        )
        self.image = jnp.asarray(nhwc(self.io["image"]))
        self.shapes = jax.eval_shape(self.model.init, jax.random.key(0), self.image)["params"]
        self.params = self.from_torch(load(lzma.open(root / "weights.safetensors.xz").read()))

    def from_torch(self, state, **options):
        """Official names and layouts -> parameter tree."""
        return interop.to_jax(state, {"vqvae": self.shapes}, **options)["vqvae"]

    def __call__(self, method, *args):
        return jax.jit(lambda p, *a: self.model.apply({"params": p}, *a, method=method))(self.params, *args)


@pytest.fixture(scope="module", params=["A_vqvae_256", "B_vqvae_512"])
def case(request):
    with jax.default_matmul_precision("highest"):
        yield Case(request.param)


@pytest.mark.golden_full
def test_encode_and_tokenize(case):
    assert_features(case(VQVAE.encode, case.image), nhwc(case.io["f"]))
    np.testing.assert_array_equal(case(VQVAE.tokenize, case.image), case.io["idx_all"])


@pytest.mark.golden_full
def test_lookup_and_inputs(case):
    codes = jnp.asarray(case.io["idx_all"])
    f_hats = case(lambda m, c: m.quantizer.f_hats(c), codes)
    assert_features(f_hats[-1], nhwc(case.io["fhat_last"]))
    stride = 1 if "fhat_scales" in case.io else 2
    want = case.io["fhat_scales" if stride == 1 else "fhat_scales_s2"]
    assert_features(np.stack(f_hats)[:, :1, ::stride, ::stride], nhwc(want))
    inputs = case(lambda m, c: m.quantizer.teacher_inputs(c), codes)
    assert_features(inputs, case.io["var_input"])


@pytest.mark.golden_full
def test_decode(case):
    image = np.asarray(case(VQVAE.decode_codes, jnp.asarray(case.io["idx_all"])))
    checked = 0
    for name, got in {
        "img_last_s4": image[:, ::4, ::4],
        "img_last_s8": image[:, ::8, ::8],
        "img_last_s16": image[:, ::16, ::16],
        "img_last_0": image[:1],
    }.items():
        if name in case.io:
            np.testing.assert_allclose(got, nhwc(case.io[name]), atol=1e-3)
            checked += 1
    assert checked


@pytest.mark.golden_full
def test_training_forward_and_gradients(case):
    def loss_fn(params, image):
        recon, vq_loss, _ = case.model.apply({"params": params}, image, method=VQVAE.forward_train)
        rec = jnp.mean((recon - image) ** 2)
        return rec + vq_loss, (recon, rec, vq_loss)

    grads, (recon, rec, vq_loss) = jax.jit(jax.grad(loss_fn, has_aux=True))(case.params, case.image)
    np.testing.assert_allclose(rec, case.io["train_rec_mse"], rtol=1e-5)
    np.testing.assert_allclose(vq_loss, case.io["train_vq_loss"], rtol=1e-5)
    name = next(n for n in case.io if n.startswith("train_recon_s"))
    stride = int(name.rsplit("s", 1)[1])
    np.testing.assert_allclose(recon[:, ::stride, ::stride], nhwc(case.io[name]), atol=1e-3)
    have = trees.flatten(grads)
    whole = {n.split("/", 1)[1]: case.io[n] for n in case.io if n.startswith("train_grad/")}
    for leaf, want in trees.flatten(case.from_torch(whole, optional=[".*"])).items():
        assert np.linalg.norm(have[leaf] - want) <= 1e-3 * np.linalg.norm(want), leaf
    norms = case.config["train_grad_norms"]
    assert len(norms) == len(have)
    for leaf, grad in have.items():
        (key,) = interop.torch_keys(f"vqvae/{leaf}")
        want = norms[key.removeprefix("image_tokenizer.")]
        # A bias before a GroupNorm of one channel a group has no gradient but rounding (< 1e-6).
        assert abs(np.linalg.norm(grad) - want) <= 1e-3 * want + 1e-6, leaf


# ---- the nano options ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def nano():
    """Random parameters, and the nano model's methods compiled over them."""
    params = jax.jit(NANO.init)(jax.random.key(0), jnp.zeros((1, 16, 16, 3)))["params"]
    params["quantizer"]["codebook"] = jax.random.normal(jax.random.key(1), (32, 8))

    def call(method, *args):
        return jax.jit(lambda *a: NANO.apply({"params": params}, *a, method=method))(*args)

    return call


@pytest.fixture(scope="module")
def masks():
    grey = np.random.default_rng(0).integers(0, 2, (3, 16, 16, 1)) * 2.0 - 1
    return jnp.asarray(np.repeat(grey, 3, -1), jnp.float32)


def test_shapes_and_ranges(nano, masks):
    codes = nano(VQVAE.tokenize, masks)
    assert codes.shape == (3, 21) and codes.dtype == jnp.int32
    image = nano(VQVAE.decode_codes, codes)
    assert image.shape == masks.shape and image.dtype == jnp.float32
    assert np.abs(image).max() <= 1
    with pytest.raises(ValueError, match=r"\[B,16,16,3\]"):
        jax.eval_shape(NANO.init, jax.random.key(0), jnp.zeros((1, 8, 8, 3)))


def test_the_empty_mask_is_all_zero_codes(nano, masks):
    """Its latent is zero but for rounding: the black image that is subtracted is computed apart."""
    np.testing.assert_allclose(nano(VQVAE.encode, jnp.full_like(masks, -1)), 0, atol=1e-6)
    assert not nano(VQVAE.tokenize, jnp.full_like(masks, -1)).any()


def test_a_latent_cell_sees_only_its_neighbours(nano, masks):
    far = masks.at[:, :4, :4].multiply(-1)  # another content of cell (0, 0) alone
    moved = np.any(np.asarray(nano(VQVAE.encode, far) != nano(VQVAE.encode, masks)), axis=(0, 3))
    assert moved[:2, :2].all() and moved.sum() == 4


def test_patches_unfold_where_they_were_folded():
    x = jnp.arange(2 * 8 * 8 * 3).reshape(2, 8, 8, 3)
    folded = _space_to_depth(x, 4)
    assert folded.shape == (2, 2, 2, 48)
    np.testing.assert_array_equal(folded[0, 1, 0].reshape(4, 4, 3), x[0, 4:, :4])
    np.testing.assert_array_equal(_depth_to_space(folded, 4), x)


# ---- the training loss ---------------------------------------------------------------------------


def test_training_learns_masks_and_keeps_code_zero():
    """A few steps on two masks: the loss falls, all overrides fit, the empty mask stays empty."""
    model = VQVAE(
        **{
            f: getattr(NANO, f)
            for f in (
                "ch",
                "ch_mult",
                "num_res_blocks",
                "z_channels",
                "codebook_size",
                "patch_nums",
                "using_sa",
                "using_mid_sa",
                "patch_size",
                "local",
            )
        },
        dead_zone=0.02,
    )
    grey = -np.ones((2, 16, 16, 3), np.float32)
    grey[0, 3:9, 5:14], grey[1, 8:, :7] = 1, 1
    params = jax.jit(model.init)(jax.random.key(0), jnp.asarray(grey))["params"]
    optimizer = optax.adam(1e-2)

    @jax.jit
    def step(params, opt, state, key):
        def loss_fn(p):
            loss, *rest = vqvae_loss(model, p, grey, key, state, VqvaeLossOptions(mix=0.0))
            return loss, rest

        (loss, aux), grads = jax.value_and_grad(loss_fn, has_aux=True)(params)
        metrics, overrides, state = aux
        updates, opt = optimizer.update(grads, opt)
        params = trees.replace(optax.apply_updates(params, updates), overrides)
        return params, opt, state, loss, metrics

    opt, state, losses = optimizer.init(params), init_state(model), []
    for i in range(60):
        params, opt, state, loss, metrics = step(params, opt, state, jax.random.key(i))
        losses.append(float(loss))
    assert losses[-1] < 0.3 * losses[0]
    assert metrics["iou"] > 0.9
    assert not params["quantizer"]["codebook"][0].any()
    assert state["hits"].shape == (32,) and (np.asarray(state["hits"]) > 0).all()


def test_mixed_masks_are_exclusive_ors(masks):
    mixed = jax.jit(lambda m: mix_masks(jax.random.key(3), m, 1.0))(masks)
    assert set(np.unique(mixed)) == {-1.0, 1.0} and (mixed != masks).any()
    np.testing.assert_array_equal(mix_masks(jax.random.key(3), masks, 0.0), masks)
    # Crossing with empty masks changes nothing, an exclusive or with nothing.
    empty = jnp.full_like(masks, -1)
    np.testing.assert_array_equal(jax.jit(lambda m: mix_masks(jax.random.key(3), m, 1.0))(empty), empty)
