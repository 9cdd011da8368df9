"""The VQ-VAE against the official one's recordings, and the invariants of the nano options."""
import json
import lzma
import os
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load

from argenseg_jax import trees
from argenseg_jax.models.vqvae import VQVAE

NANO = VQVAE(ch=16, ch_mult=(1,), num_res_blocks=0, z_channels=8, codebook_size=32,
             patch_nums=(1, 2, 4), using_sa=False, using_mid_sa=False, patch_size=4,
             local=True, dead_zone=0.1)


# ---- parity with the official model --------------------------------------------------------------


def from_torch(state: dict[str, np.ndarray]) -> dict:
    """Official state dict -> parameter tree."""
    flat = {}
    for key, value in state.items():
        if "ema_vocab_hit" in key:
            continue
        if value.ndim == 4:
            value = value.transpose(2, 3, 1, 0)
        is_norm = "norm" in key.split(".")[-2]
        key = key.replace("quantize.embedding.weight", "quantizer.codebook")
        key = key.replace("quantize.quant_resi.qresi_ls.", "quantizer.phi.").replace("sample.conv", "sample")
        key = key.replace(".weight", ".scale" if is_norm else ".kernel")
        parts = []
        for part in key.split("."):
            if part.isdigit():
                parts[-1] += "_" + part
            else:
                parts.append(part)
        flat["/".join(parts)] = value
    return trees.unflatten(flat)


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
        self.params = from_torch(load(lzma.open(root / "weights.safetensors.xz").read()))
        self.model = VQVAE(ch=c["ch"], ch_mult=tuple(c["ch_mult"]), num_res_blocks=c["num_res_blocks"],
                           z_channels=c["z_channels"], codebook_size=c["vocab_size"],
                           patch_nums=tuple(c["patch_nums"]), beta=c["beta"],
                           phi_ratio=c["quant_resi"], num_phi=c["share_quant_resi"])
        self.image = jnp.asarray(nhwc(self.io["image"]))

    def __call__(self, method, *args):
        return jax.jit(lambda p, *a: self.model.apply({"params": p}, *a, method=method))(
            self.params, *args)


@pytest.fixture(scope="module", params=["A_vqvae_256", "B_vqvae_512"])
def case(request):
    with jax.default_matmul_precision("highest"):
        yield Case(request.param)


@pytest.mark.golden_full
def test_tree_has_exactly_the_official_leaves(case):
    shape = jax.eval_shape(case.model.init, jax.random.key(0), case.image)["params"]
    trees.check_same(case.params, shape, "golden")


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
    for name, got in {"img_last_s4": image[:, ::4, ::4], "img_last_s8": image[:, ::8, ::8],
                      "img_last_s16": image[:, ::16, ::16], "img_last_0": image[:1]}.items():
        if name in case.io:
            np.testing.assert_allclose(got, nhwc(case.io[name]), atol=1e-3)
            checked += 1
    assert checked


@pytest.mark.golden_full
def test_training_forward_and_gradients(case):
    def loss_fn(params, image):
        recon, vq_loss, _ = case.model.apply({"params": params}, image,
                                             method=VQVAE.forward_train)
        rec = jnp.mean((recon - image) ** 2)
        return rec + vq_loss, (recon, rec, vq_loss)

    grads, (recon, rec, vq_loss) = jax.jit(jax.grad(loss_fn, has_aux=True))(case.params, case.image)
    np.testing.assert_allclose(rec, case.io["train_rec_mse"], rtol=1e-5)
    np.testing.assert_allclose(vq_loss, case.io["train_vq_loss"], rtol=1e-5)
    name = next(n for n in case.io if n.startswith("train_recon_s"))
    stride = int(name.rsplit("s", 1)[1])
    np.testing.assert_allclose(recon[:, ::stride, ::stride], nhwc(case.io[name]), atol=1e-3)
    have = trees.flatten(grads)
    # Whole gradients of some leaves; of all leaves the norms.
    whole = from_torch({n.split("/", 1)[1]: case.io[n] for n in case.io if "train_grad/" in n})
    for leaf, want in trees.flatten(whole).items():
        assert np.linalg.norm(have[leaf] - want) <= 1e-3 * np.linalg.norm(want), leaf
    norms = {n: np.float32(v) * np.ones([1] * 4 if n.endswith("weight") and "norm" not in n else 1)
             for n, v in case.config["train_grad_norms"].items()}
    norms["quantize.embedding.weight"] = norms["quantize.embedding.weight"].reshape(1)
    norms = trees.flatten(from_torch(norms))
    assert set(norms) == set(have)
    for leaf, want in norms.items():
        # A bias before a GroupNorm of one channel a group has no gradient but rounding (< 1e-6).
        got, want = np.linalg.norm(have[leaf]), want.item()
        assert abs(got - want) <= 1e-3 * want + 1e-6, f"{leaf}: {got} not {want}"
