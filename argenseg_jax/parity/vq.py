"""Recordings A and B (the whole VQ-VAE) and C (its resampling operators) against our modules."""

from __future__ import annotations

import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from argenseg_jax import trees
from argenseg_jax.interop import state_dict as torch_convert
from argenseg_jax.models import quantizer, resize, vqvae
from argenseg_jax.parity.recording import FEATURE, IMAGE, LOSS, Recording, check_gradients
from argenseg_jax.scales import Scales

PREFIX = "image_tokenizer."


def nchw(x) -> np.ndarray:
    """[..., H, W, C] -> [..., C, H, W]."""
    return np.moveaxis(np.asarray(x), -1, -3)


def nhwc(x) -> np.ndarray:
    """[..., C, H, W] -> [..., H, W, C]."""
    return np.moveaxis(np.asarray(x), -3, -1)


def compare_vqvae(record: Recording) -> None:
    """Encoder, codes, every scale, decoder, training losses and gradients."""
    cfg = record.config
    model = vqvae.VQVAE(
        ch=cfg["ch"],
        ch_mult=tuple(cfg["ch_mult"]),
        beta=cfg.get("beta", 0.25),
        num_res_blocks=cfg["num_res_blocks"],
        z_channels=cfg["z_channels"],
        codebook_size=cfg["vocab_size"],
        patch_nums=tuple(cfg["patch_nums"]),
        num_phi=cfg.get("share_quant_resi", 4),
        phi_ratio=cfg.get("quant_resi", 0.5),
    )
    side = model.bind({}).image_size
    image = jnp.asarray(nhwc(record.floats("image", (None, 3, side, side))))
    shapes = jax.eval_shape(model.init, jax.random.key(0), image)
    params = torch_convert.to_jax(record.weights(), {"vqvae": shapes["params"]}, source=str(record.folder))["vqvae"]
    params = jax.tree.map(jnp.asarray, params)

    codes = _encoder(record, model, params, image)
    f_hats = model.apply({"params": params}, codes, method=lambda m, c: m.quantizer.f_hats(c))
    _scales(record, model, params, codes, f_hats)
    _images(record, model, params, f_hats, codes)
    _training(record, model, params, image)
    index = cfg.get("phi_index_per_scale")
    if index is not None:
        got = Scales(tuple(cfg["patch_nums"])).phi_index(cfg.get("share_quant_resi", 4))
        record.compare("phi_index_per_scale", got, index, FEATURE)


def _captured(model: nn.Module, params, method, *args):
    """(result, {torch name: output of the first call of that module})."""

    def run(p, *a):
        return model.apply({"params": p}, *a, method=method, capture_intermediates=True, mutable=["intermediates"])

    result, state = jax.jit(run)(params, *args)
    outputs = {}
    for path, calls in trees.flatten(state["intermediates"]).items():
        outputs[_torch_name(path.removesuffix("/__call__"))] = calls[0]
    return result, outputs


def _torch_name(path: str) -> str:
    """'encoder/down_0/block_1' -> 'encoder.down.0.block.1'; the middle keeps its underscores."""
    name = re.sub(r"(down|up)_(\d+)/(block|attn)_(\d+)", r"\1.\2.\3.\4", path)
    return re.sub(r"(down|up)_(\d+)", r"\1.\2", name).replace("/", ".")


def _probes(record: Recording, outputs) -> None:
    """A corner of each module's output, and its statistics over the complete batch."""
    stats = record.config.get("module_stats", {})
    for name, value in outputs.items():
        value = nchw(value)
        record.check(f"probe/{name}", value[0, :4, :4, :4])
        if name in stats:
            record.compare(f"shape of {name}", value.shape, stats[name]["shape"], FEATURE)
            record.compare(
                f"mean, std of {name}", [value.mean(), value.std()], [stats[name]["mean"], stats[name]["std"]], FEATURE
            )


def _encoder(record: Recording, model, params, image) -> jax.Array:
    """Compares the way from the image to the codes; returns the codes."""
    f, outputs = _captured(model, params, model.encode, image)
    _probes(record, outputs)
    record.check("enc_out", nchw(outputs["encoder.conv_out"]))
    record.check("f", nchw(f))
    codes, f_hat = jax.jit(lambda p, x: model.apply({"params": p}, x, method=lambda m, y: m.quantizer.quantize(y)))(
        params, f
    )
    record.check("idx_all", codes)
    for k, (begin, end) in enumerate(model.bind({}).quantizer.scales.bounds):
        record.check(f"idx_{k}", codes[:, begin:end])
    record.check("fhat_last", nchw(f_hat))
    return codes


def _scales(record: Recording, model, params, codes, f_hats) -> None:
    """Compares f_hat after each scale and the next scale's inputs, both ways of computing them."""
    stacked = nchw(jnp.stack(f_hats))[:, :1]
    record.check("fhat_scales", stacked)
    for m in record.names(r"fhat_scales_s(\d+)"):
        record.check(m[0], stacked[..., :: int(m[1]), :: int(m[1])])

    def both(m, c):
        f_hat, steps = jnp.zeros_like(f_hats[0]), []
        for k, (begin, end) in enumerate(m.quantizer.scales.bounds):
            if k:
                steps.append(m.quantizer.scale_input(f_hat, k))
            f_hat = m.quantizer.accumulate(f_hat, c[:, begin:end], k)
        teacher = m.quantizer.teacher_inputs(c)
        return teacher, jnp.concatenate([teacher[:, :0], *steps], axis=1), f_hat

    teacher, stepwise, last = model.apply({"params": params}, codes, method=both)
    record.check("var_input", teacher)
    record.check("next_ar_input", stepwise)
    record.check("next_ar_fhat_last", nchw(last))


def _images(record: Recording, model, params, f_hats, codes) -> None:
    """Compares the decoded image of each scale."""
    first, outputs = _captured(model, params, model.decode, f_hats[0])
    _probes(record, outputs)
    decode = jax.jit(lambda f: model.apply({"params": params}, f, method=model.decode))
    images = [nchw(x) for x in (first, *map(decode, f_hats[1:]))]
    for m in record.names(r"img_scales_s(\d+)"):
        n = int(m[1])
        record.check(m[0], np.stack([x[..., ::n, ::n] for x in images]), IMAGE)
    record.check("img_scales_mean", [x.mean() for x in images], IMAGE)
    record.check("img_scales_std", [x.std() for x in images], IMAGE)
    last = images[-1]
    for m in record.names(r"img_last_s(\d+)"):
        record.check(m[0], last[..., :: int(m[1]), :: int(m[1])], IMAGE)
    side = last.shape[-1]
    if "img_last_crop" in record:
        crop = record.input("img_last_crop").shape[-1]
        at = slice((side - crop) // 2, (side + crop) // 2)
        record.check("img_last_crop", last[:1, :, at, at], IMAGE)
    record.check("img_last_0", last[:1], IMAGE)
    again = nchw(jax.jit(lambda c: model.apply({"params": params}, c, method=model.decode_codes))(codes))
    for m in record.names(r"img_to_reconstructed_last_s(\d+)"):
        record.check(m[0], again[..., :: int(m[1]), :: int(m[1])], IMAGE)


def _training(record: Recording, model, params, image) -> None:
    """Compares the training forward and the gradient of (reconstruction mse + VQ loss), if recorded."""
    if not any(record.names("train_.*")) and "train_grad_norms" not in record.config:
        return

    def loss(p):
        recon, vq_loss, q = model.apply({"params": p}, image, method=model.forward_train)
        mse = jnp.mean((recon - image) ** 2)
        return mse + vq_loss, (recon, vq_loss, mse, q.f_hats[-1])

    (_, (recon, vq_loss, mse, f_hat)), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(params)
    record.check("train_f_hat", nchw(f_hat))
    for m in record.names(r"train_recon_s(\d+)"):
        record.check(m[0], nchw(recon)[..., :: int(m[1]), :: int(m[1])], IMAGE)
    record.check("train_vq_loss", vq_loss, LOSS)
    record.check("train_rec_mse", mse, LOSS)
    named = {k.removeprefix(PREFIX): v for k, v in torch_convert.to_torch({"vqvae": grads})}
    check_gradients(record, "train_grad/", named, record.config.get("train_grad_norms", {}))


def compare_operators(record: Recording) -> None:
    """Area and bicubic resampling, nearest up-sampling, phi, and which phi serves which scale."""
    for m in record.names(r"areaM_([1-9]\d*)_to_([1-9]\d*)"):
        record.check(m[0], resize.area_matrix(int(m[1]), int(m[2])))
    for m in record.names(r"bicubicM_([1-9]\d*)_to_([1-9]\d*)"):
        record.check(m[0], resize.bicubic_matrix(int(m[1]), int(m[2])))
    for m in record.names(r"area_(\d+)_to_(\d+)"):
        x = nhwc(record.floats(f"x_{m[1]}", (None, None, int(m[1]), int(m[1]))))
        record.check(m[0], nchw(quantizer.resample(resize.area_matrix(int(m[1]), int(m[2])), x)))
    for m in record.names(r"bicubic_(\d+)_to_(\d+)"):
        x = nhwc(record.floats(f"small_{m[2]}_{m[1]}", (None, None, int(m[1]), int(m[1]))))
        record.check(m[0], nchw(quantizer.resample(resize.bicubic_matrix(int(m[1]), int(m[2])), x)))
    if "nearest2x_in" in record:
        x = jnp.asarray(nhwc(record.input("nearest2x_in")))
        record.check("nearest2x_out", nchw(vqvae.nearest2x(x)))
    if "phi_in" in record:
        record.check(
            "phi_out", nchw(_phi(nhwc(record.input("phi_in")), record.input("phi_weight"), record.input("phi_bias")))
        )
    for share, facts in record.config.get("phi", {}).items():
        want = facts["index_per_scale"]
        record.compare(f"phi index, share {share}", _phi_index(len(want), int(share)), want, FEATURE)
    for m in record.names(r"phi_index_share([1-9]\d*)_([1-9]\d?)scales"):
        record.check(m[0], _phi_index(int(m[2]), int(m[1])))


def _phi_index(scales: int, share: int) -> tuple[int, ...]:
    """Which of `share` phi convolutions serves each of the given number of scales; their sides do not matter."""
    return Scales(tuple(range(1, scales + 1))).phi_index(share)


def _phi(x: np.ndarray, weight: np.ndarray, bias: np.ndarray) -> jax.Array:
    """phi(x) as the quantizer has it: each place of x [B, S, S, C] becomes a code of its own."""
    b, side, _, channels = x.shape
    model = quantizer.MultiScaleQuantizer(
        codebook_size=b * side * side, channels=channels, patch_nums=(side,), num_phi=1
    )
    params = {"codebook": x.reshape(-1, channels), "phi_0": {"kernel": weight.transpose(2, 3, 1, 0), "bias": bias}}
    codes = jnp.arange(b * side * side).reshape(b, -1)
    return model.apply({"params": params}, codes, method=model.lookup)
