"""Defaults that every experiment shares, key by key; a config file starts from `base()`."""

from __future__ import annotations

import ast
from typing import Any

from ml_collections import ConfigDict


def parse_arg(arg: str | None, **defaults: Any) -> ConfigDict:
    """`res=448,fast` -> ConfigDict(res=448, fast=True), typed like the defaults.

    For `--config configs/x.py:res=448,fast`. A bare name switches a bool on; an unknown name or a
    value of another type is a ValueError.
    """
    values = dict(defaults)
    for item in filter(None, (arg or "").split(",")):
        name, eq, text = item.partition("=")
        if name not in defaults:
            raise ValueError(f"unknown config argument '{name}'; there are {sorted(defaults)}")
        want = type(defaults[name])
        if not eq:
            value = True
        elif want is str:
            value = text
        else:
            value = {"true": True, "false": False}.get(text.lower())
            value = ast.literal_eval(text) if value is None else value
        if want is float and type(value) is int:
            value = float(value)
        if type(value) is not want:
            raise ValueError(f"config argument '{item}' should be of type {want.__name__}")
        values[name] = value
    return ConfigDict(values)


def optimizer(**changes: Any) -> dict[str, Any]:
    """The keys that `train.optim` reads: all of `optim`, and part of `vqvae`."""
    return {
        "name": "adamw",  # adamw | adafactor | muon (hidden matrices by it, the rest by AdamW)
        "lr": 4e-5,  # peak learning rate (of Muon, where name is muon)
        "adam_lr": 0.0,  # muon: peak learning rate of the AdamW part; 0 = lr
        "schedule": "cosine",  # cosine | constant | wsd (warm-up, stable, linear decay)
        "warmup": 0.03,  # below 1: share of the steps, otherwise a number of steps
        "decay": 0.2,  # wsd: length of the final decay, like warmup
        "final": 0.0,  # cosine, wsd: last learning rate / lr
        "b1": 0.9,  # AdamW: first moment
        "b2": 0.999,  # AdamW: second moment
        "eps": 1e-8,  # AdamW: added to the root of the second moment
        "momentum": 0.95,  # Muon: Nesterov momentum
        "matrices": (r".*/layers/.*/kernel", r"connector/.*/kernel"),  # params for Muon
        "weight_decay": 0.05,  # decoupled; on kernels and embeddings only
        "clip": 1.0,  # global gradient norm; 0 = no clipping
        "freeze": (),  # path regexes of params that stay as they are
        "groups": ((".*", 1.0),),  # (path regex, learning-rate multiplier), first match wins
        "ema": 0.0,  # decay of the averaged weights that evaluation uses; 0 = none
        **changes,
    }


def base() -> ConfigDict:
    """All sections with their defaults: the paper's recipe where it has one."""
    return ConfigDict(
        {
            "seed": 0,  # of initial weights, data order, dropout and token noise
            "init_from": "",  # checkpoint for the first weights: Orbax, workdir, HF folder, nano
            "model": {
                "variant": "nano",  # a name of models/variants.py; overrides of its fields go beside it
            },
            "vqvae": {  # first phase: the mask tokenizer; 0 steps = take it from init_from
                "steps": 0,  # of this phase
                "batch": 32,  # masks per step, over all devices
                **optimizer(lr=3e-3, weight_decay=0.0, warmup=50.0),
            },
            "data": {
                "sources": (),  # names, `name*weight`, or paths; see data/mixture.py
                "max_tokens": 8192,  # T, length of a row; longer samples are dropped and counted
                "max_labels": 0,  # targets of a row, the places that the head reads; 0 = max_tokens
                "image_last": False,  # move <image> after the human text, in training and use
                "system": None,  # system message; None = the official one, '' = none
                "workers": 0,  # most grain worker processes; 0 reads in the training process
                "threads": 2,  # of the training process that read, where workers is 0
                "root": "",  # directory that relative paths of the sources start from
                "pack": 0,  # samples buffered for packing several into a sequence; 0 = one per sequence
                "max_tiles": 1,  # P, tiles per row
                "sample_tiles": 0,  # most tiles of one sample; 0 = max_tiles
                "max_masks": 1,  # M, masks per row
                "pad_to_square": False,  # keep the aspect ratio of images and masks, and pad them
                "window": (),  # (low, high) of images of more than 8 bits -> 0..255; () = by their values
                "max_pixels": 0,  # most pixels of an image file; 0 = 64 Mi
                "allow_outside": False,  # relative paths in data files may lead out of their folder
                "augment": False,  # disturb photographs: data/augment.py
                "recolour": 0.0,  # share of samples in other colours, where the text names none
                "prompt_drop": 0.0,  # share of text-to-image prompts that ask for nothing (guidance)
                "codes": False,  # read the codes that `prepare --codes` stored, in place of masks
                "max_broken": 0.01,  # largest share of broken samples; more of them end the run
            },
            "optim": optimizer(freeze=(r"vision/.*",)),  # of the lm phase
            "mesh": {  # devices along each axis; -1 = all that are left
                "dcn_data": 1,  # data-parallel slices, joined by the data-centre network
                "data": -1,  # data-parallel replicas inside a slice
                "fsdp": 1,  # shards of every weight, also data-parallel
                "tensor": 1,  # heads, MLP width and vocabulary
            },
            "train": {
                "steps": 1000,  # of the lm phase
                "global_batch": 128,  # rows per step, over all devices
                "microbatch": 0,  # rows per forward pass, over all devices; 0 = global_batch
                "remat": "full",  # none | full | dots: what the backward pass computes again
                "dtype": "bfloat16",  # of the computation; parameters stay float32
                "grad_dtype": "",  # in which gradients of layers are summed over devices; '' = dtype
                "checkpoint_every": 1000,  # steps, at least 1; the end of a phase is saved too
                "keep": 2,  # checkpoints kept, the newest ones; 0 = all
                "keep_best": "",  # min:NAME or max:NAME of a logged number: its best checkpoint is kept too
                "log_every": 50,  # steps per line of metrics.jsonl, at least 1
                "sample_every": 0,  # steps per image in samples/; 0 = none
                "max_skipped": 0,  # so many steps that are not finite end the run; 0 = any number
                "allow_fresh": (),  # path regexes of params that may stay as drawn: not loaded, not trained
                "lora": {  # low-rank adapters of frozen kernels; see models/lora.py
                    "rank": 0,  # of each; 0 = none: everything learns that optim.freeze leaves
                    "alpha": 0.0,  # what they add is multiplied with alpha / rank; 0 = with 1
                    "targets": (),  # path regexes of kernels; () = all of the decoder's layers
                    "also": (),  # path regexes of parameters that are trained in full as well; all others are frozen
                },
                "loss": {  # departures from the paper's plain loss; see train/losses.LMOptions
                    "soft_targets": 0.0,  # temperature that spreads a code's target over near codes
                    "scale_power": 0.0,  # weight of a code ~ (codes of its scale) ** -power
                    "foreground": 1.0,  # weight of codes other than code 0
                    "text": 1.0,  # weight of the text loss beside that of the codes
                    "corrupt": 0.0,  # up to this share of the input codes is replaced by random ones
                    "chunk": 0,  # places whose logits are in memory at a time; 0 = all
                    "scale_accuracy": False,  # log the share of right codes of each scale too
                },
            },
            "decode": {
                "max_text_tokens": 64,  # per answer, codes not counted
            },
            "eval": {
                "prompt": "referring",  # PSALM: referring | semantic | reasoning, or a text with {sent}
                "data": (),  # what `evaluate` scores without --data: DATA or METRIC@DATA each
                "metric": "",  # of eval/metrics/registry.py; "" = what the data asks for, or referring
                "masks": "first",  # first | union: which masks of an answer are scored
            },
        }
    )


def paper(variant: str, arg: str | None = None) -> ConfigDict:
    """The paper's recipe for a released size, every weight sharded over all devices.

    `base` is the recipe (AdamW, 4e-5, cosine, batch 128, bfloat16, frozen vision); here it gets its
    size. One epoch of the paper's 402 K segmentation and 1.25 M chat samples is 12900 steps.

    Args:
      variant: a name of models/variants.py.
      arg: `start=PATH` is the converted checkpoint (default runs/start); `variant=NAME` another size;
        `lora=RANK` trains adapters of the decoder's kernels instead of these, and what is new or
        speaks of what is new: the vocabulary, the connector, the tables of visual tokens.
    """
    arg = parse_arg(arg, start="runs/start", variant=variant, lora=0)
    cfg = base()
    cfg.model.variant = arg.variant
    cfg.model.vision = {"drop_path": 0.1}  # active in the reference's training, frozen or not
    cfg.init_from = arg.start
    cfg.mesh.update(data=1, fsdp=-1)
    cfg.train.update(steps=12900)
    cfg.train.max_skipped = 100
    cfg.train.loss.update(chunk=512, scale_accuracy=True)
    if arg.lora:
        cfg.train.lora.update(
            rank=arg.lora, alpha=2.0 * arg.lora, also=(r"connector/.*", r"visual/.*", r"llm/(embed|lm_head)/.*")
        )
    return cfg
