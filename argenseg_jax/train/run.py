"""From a config to a run: builds model, tokenizer, tasks and data, and hands them to the loop."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from etils import epath
from jax.sharding import Mesh

from argenseg_jax import config_keys, sharding, trees
from argenseg_jax.ckpt import checkpoint, orbax_io
from argenseg_jax.ckpt.steps import newest_step
from argenseg_jax.data import mixture, pipeline
from argenseg_jax.data.batches import BatchIterator
from argenseg_jax.data.tokenizer import Tokenizer
from argenseg_jax.decode import mask_tokenizer
from argenseg_jax.decode.predictor import Predictor
from argenseg_jax.errors import UserError
from argenseg_jax.eval import evaluator, visualize
from argenseg_jax.models import variants
from argenseg_jax.models.argenseg import ARGenSeg, init_params
from argenseg_jax.models.lora import Lora, is_adapter
from argenseg_jax.train import flops, loop, losses, optim
from argenseg_jax.train.state import Params, Phase

SAMPLES = 4  # samples decoded every train.sample_every steps


def train(
    cfg: Mapping[str, Any], workdir: str, *, profile: tuple[int, int] | None = None, checksums: bool = True
) -> dict[str, Any]:
    """Trains the config's phases in the workdir, or resumes them; returns the loop's result.

    `profile`: the first and last step of a trace in WORKDIR/profile. `checksums`: of checkpoints, are written
    and checked.
    """
    cfg = config_keys.plain(cfg)
    config_keys.check(cfg)
    # Resolved, so that the saved config keeps its meaning when a variant changes.
    cfg = {**cfg, "model": variants.resolve(cfg["model"])}
    parts = open_data(cfg)
    cfg["data"] = {**cfg["data"], "window": cfg["data"].get("window") or mixture.window(parts)}
    model = build_model(cfg)
    source, tokenizer = begin(cfg, model, workdir, checksums)
    if cfg["data"].get("codes") and (not cfg["init_from"] or cfg["vqvae"]["steps"]):
        raise UserError(
            "data.codes=true: stored codes belong to a fixed VQ-VAE: set init_from to the "
            "checkpoint that wrote them, and vqvae.steps=0"
        )
    listed = phases(cfg, model, tokenizer, parts)

    def load(shapes: Params) -> Params:
        known = known_weights(source, shapes) if source else {}
        check_fresh(cfg, listed, shapes, known)
        check_codes(cfg, model, known.get("vqvae"))
        return known

    return loop.run(
        cfg,
        workdir,
        listed,
        init_fn(model, adapters(cfg)),
        load=load,
        extra_files={checkpoint.TOKENIZER: tokenizer.save},
        profile=profile,
        checksums=checksums,
    )


def open_data(cfg: Mapping[str, Any]) -> list[mixture.MixtureComponent]:
    """The data sets of the section `data`; UserError if one cannot be opened."""
    data = pipeline.DataConfig.from_config(cfg["data"])
    return mixture.open_mixture(data.sources, data.root, reading=data.reading())


def begin(
    cfg: Mapping[str, Any], model: ARGenSeg, workdir: str, checksums: bool = True
) -> tuple[checkpoint.Checkpoint | None, Tokenizer]:
    """(the checkpoint of the first weights, if any, the tokenizer).

    A workdir with a complete step has both: `init_from` may have been removed since.
    """
    if newest_step(workdir, training=True) is not None:
        loop.check_config(epath.Path(workdir) / orbax_io.CONFIG, cfg, resumed=True)
        saved = checkpoint.open_checkpoint(workdir, checksums=checksums)
        if saved.has_tokenizer():
            return None, checkpoint.tokenizer_for(model, saved)
    source = checkpoint.open_checkpoint(cfg["init_from"], checksums=checksums) if cfg["init_from"] else None
    return source, checkpoint.tokenizer_for(model, source)


def build_model(cfg: Mapping[str, Any]) -> ARGenSeg:
    """The module for training: train.dtype, train.remat."""
    return variants.build({**cfg["model"], "dtype": cfg["train"]["dtype"], "remat": cfg["train"]["remat"]})


def adapters(cfg: Mapping[str, Any]) -> Lora:
    """The low-rank adapters of a config."""
    return Lora(**cfg["train"]["lora"])


def init_fn(model: ARGenSeg, lora: Lora = Lora()) -> Callable[[jax.Array], Params]:
    """rng -> fresh parameters of the model, adapters included."""
    return lambda rng: lora.add(init_params(model, rng), jax.random.fold_in(rng, 1))


def known_weights(source: checkpoint.Checkpoint, shapes: Params) -> Params:
    """Weights of another model for the parameters that have the same path and shape here.

    The rest starts fresh and is listed on stderr. A released InternVL folder may lack what ARGenSeg adds.
    """
    have = source.load_params(optional=("vqvae/.*", "visual/.*"))
    flat, want = trees.flatten(have), trees.flatten(shapes)
    known = {
        n: np.asarray(x, want[n].dtype)
        for n, x in flat.items()  # a converted one may be bfloat16
        if n in want and x.shape == want[n].shape
    }
    if not known:
        raise UserError(f"init_from={source.path}: none of its parameters fits this model")
    if fresh := {name for name in want if name not in known and not is_adapter(name)}:
        print(
            f"init_from={source.path}: {len(known)} of {len(known) + len(fresh)} arrays fit; these start fresh: "
            + summary(fresh, known),
            file=sys.stderr,
        )
    return trees.unflatten(known)


def check_fresh(cfg: Mapping[str, Any], listed: Sequence[Phase], shapes: Params, known: Params) -> None:
    """UserError that names the parameters that would stay random: neither loaded nor changed by any phase.

    `train.allow_fresh` has regexes of parameters that may.
    """
    changed = [optim.trainable(shapes, phase.optim["freeze"], phase.task.frozen) for phase in listed]
    overridden = [pattern for phase in listed for pattern in phase.task.overridden]
    loaded, names = trees.flatten(known), list(trees.flatten(shapes))
    left = [
        name
        for name in names
        if name not in loaded
        and not any(is_changed(name) for is_changed in changed)
        and not trees.match((*overridden, *cfg["train"]["allow_fresh"]), name)
    ]
    if left:
        raise UserError(
            f"nothing loads or trains {summary(left, set(names) - set(left))}: it would stay random. "
            + (f"init_from={cfg['init_from']} lacks it" if cfg["init_from"] else "There is no init_from")
            + "; set init_from to a checkpoint that has it (an InternVL folder as released: `convert --vqvae` "
            "completes it), or train it (vqvae.steps for vqvae/*, optim.freeze for the rest); "
            "train.allow_fresh lists what may stay random"
        )


def summary(names: Iterable[str], others: Iterable[str]) -> str:
    """A short list of parameter names: 'vqvae/*' for a part of the model that `others` do not have."""
    parts = {name.split("/")[0] for name in names} - {name.split("/")[0] for name in others}
    return ", ".join(sorted({f"{n.split('/')[0]}/*" if n.split("/")[0] in parts else n for n in names}))


def check_codes(cfg: Mapping[str, Any], model: ARGenSeg, vqvae: Params | None) -> None:
    """UserError if data.codes is set and the stored codes are not those that this run would compute."""
    data = cfg["data"]
    if not data.get("codes"):
        return
    if vqvae is None:
        raise UserError(f"init_from={cfg['init_from']} has no VQ-VAE, which data.codes needs")
    mine = mask_tokenizer.identity(
        mask_tokenizer.fingerprint(vqvae),
        cfg["train"]["dtype"],
        data["pad_to_square"],
        model.mask_size,
        model.scales.num_codes,
    )
    for part in open_data(cfg):
        stored = getattr(part.source, "codes", None)
        if differs := sorted(k for k in mine if stored and stored.get(k) != mine[k]):
            shown = "; ".join(f"{k}: {stored.get(k)!r}, here {mine[k]!r}" for k in differs)
            raise UserError(
                f"data.codes=true: {part.source.path} holds codes of another mask tokenizer "
                f"({shown}); prepare it again with --codes of this run's init_from, or set "
                "data.codes=false"
            )


def sampler(
    cfg: Mapping[str, Any], model: ARGenSeg, tokenizer: Tokenizer, part: mixture.MixtureComponent
) -> Callable[[Params], dict[str, np.ndarray]]:
    """params -> images of a few training samples: input | target mask | predicted mask."""
    predictor, lora = Predictor(model, {}, tokenizer, cfg), adapters(cfg)
    samples = [part.source[i] for i in range(min(SAMPLES, part.length))]
    samples = [s for s in samples if s.images and s.masks]

    def draw(params: Params) -> dict[str, np.ndarray]:
        predictor.engine.params = lora.merged(params)
        results = predictor.segment_batch([evaluator.request(s) for s in samples])
        drawn = {}
        for i, (sample, result) in enumerate(zip(samples, results)):
            empty = np.zeros(sample.images[0].shape[:2], bool)
            mask = result.masks[0] if result.masks else empty
            image = visualize.comparison(sample.images[0], sample.masks[0] > 127, mask)
            drawn[f"{i}"] = np.asarray(image.convert("RGB"))
        return drawn

    return draw


def geometry(model: ARGenSeg) -> pipeline.Geometry:
    """The sizes of the model that the data pipeline needs."""
    return pipeline.Geometry(model.image_size, model.image_tokens, model.mask_size, model.scales.num_codes)


def lm_flops(
    cfg: Mapping[str, Any],
    model: ARGenSeg,
    shapes: Params,
    trainable: Callable[[str], bool],
    *,
    with_remat: bool = False,
) -> dict[str, float]:
    """{part: operations} of one step of the lm phase, over all devices; see flops.lm_step."""
    data = cfg["data"]
    parts = flops.lm_step(
        model,
        shapes,
        trainable,
        batch=cfg["train"]["global_batch"],
        length=data["max_tokens"],
        tiles=data["max_tiles"],
        masks=data["max_masks"],
        with_remat=with_remat,
    )
    return {**parts, "vqvae": 0.0} if data.get("codes") else parts


def phases(
    cfg: Mapping[str, Any], model: ARGenSeg, tokenizer: Tokenizer | None, parts: Sequence[mixture.MixtureComponent] = ()
) -> list[Phase]:
    """First the VQ-VAE (vqvae.steps > 0), then the language model (train.steps > 0).

    Without a tokenizer no data is read: such phases can be compiled, not run. `parts`: of `open_data`;
    samples of the first one are decoded during training.
    """

    def batches(task: str, batch_size: int, seed: int) -> Callable[[Mesh], BatchIterator] | None:
        return tokenizer and (
            lambda mesh: pipeline.train_iterator(
                cfg["data"],
                tokenizer,
                geometry(model),
                seed=seed,
                batch_size=batch_size,
                slots=sharding.local_rows(mesh, batch_size),
                task=task,
            )
        )

    vq, lm, data = cfg["vqvae"], cfg["train"], cfg["data"]
    key = "max_labels" if data["max_labels"] else "max_tokens"
    if lm["loss"]["chunk"] and data[key] % lm["loss"]["chunk"]:
        raise UserError(f"train.loss.chunk={lm['loss']['chunk']} does not divide data.{key}={data[key]}")
    llm = model.llm
    if data["pack"] and llm.ntk_factor > 1 and data["max_tokens"] > llm.max_positions:
        raise UserError(
            f"data.pack: beyond {llm.max_positions} tokens this model's RoPE depends on the "
            "length of the sequence, so samples cannot be packed; lower data.max_tokens"
        )
    listed = []
    if vq["steps"]:
        listed.append(
            Phase(
                losses.vqvae_task(model),
                vq["steps"],
                vq["batch"],
                0,
                vq,
                batches("vqvae", vq["batch"], cfg["seed"] + 1),
            )
        )
    if lm["steps"]:
        if lm["grad_dtype"] not in ("", "float32", "bfloat16"):
            raise UserError(f"train.grad_dtype='{lm['grad_dtype']}'; choose float32, bfloat16 or ''")
        options = losses.LMOptions(
            **lm["loss"], max_labels=data["max_labels"], grad_dtype=lm["grad_dtype"], packed=bool(data["pack"])
        )
        task = losses.lm_task(model, options, adapters(cfg))
        draws = sampler(cfg, model, tokenizer, parts[0]) if parts and lm["sample_every"] else None
        listed.append(
            Phase(
                task,
                lm["steps"],
                lm["global_batch"],
                lm["microbatch"],
                cfg["optim"],
                batches("lm", lm["global_batch"], cfg["seed"]),
                draws,
                lambda shapes, select: sum(lm_flops(cfg, model, shapes, select).values()),
            )
        )
    if not listed:
        raise UserError("nothing to train: both vqvae.steps and train.steps are 0")
    return listed
