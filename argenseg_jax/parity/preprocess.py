"""Recordings of kind G: tokenizers, prompts and labels, tiling, and pixels of images and masks."""

from __future__ import annotations

import re
from typing import Any

import numpy as np

from argenseg_jax import files, pixels
from argenseg_jax.data import prompt, transforms
from argenseg_jax.data.tokenizer import Tokenizer
from argenseg_jax.parity.recording import EQUAL, Recording
from argenseg_jax.vocab import IGNORE, MASK, SPECIAL_TOKENS, visual_token


def compare_preprocessing(record: Recording) -> None:
    """Everything between files on disk and the model's inputs, and masks on the way back."""
    cases = files.read_json(record.folder / "conversations.json")
    for name in record.config:
        found = re.fullmatch(r"tokens_(\w+)", name)
        if found:
            _compare_tokenizer(record, found[1], cases)
    _compare_geometry(record)
    _compare_images(record)
    _compare_masks(record)


def _compare_tokenizer(record: Recording, variant: str, cases: dict[str, Any]) -> None:
    """One sentencepiece model: ids of words, texts, training samples and queries."""
    words, size = record.config[f"tokens_{variant}"], record.config[f"len_{variant}"]
    tokenizer = Tokenizer.load(record.folder / f"spm_{variant}.model", num_codes=size - words[visual_token(0)])
    vocab = tokenizer.vocab
    ours = {word: vocab.id(word) for word in SPECIAL_TOKENS}
    ours |= {visual_token(i): vocab.first_code + i for i in range(vocab.num_codes)}
    ours |= {
        "<unk>": 0,
        "<s>": tokenizer.bos,
        "</s>": vocab.pad,
        "<|im_end|>": vocab.eos,
        "<|im_start|>": tokenizer.im_start,
    }
    record.same(f"ids of {variant}", [{word: ours[word] for word in words}, vocab.size], [words, size])
    for case in record.config.get(f"tokenize_{variant}", ()):
        parts = [ours.get(part, part) for part in re.split(r"(<\|?\w+\|?>)", case["text"])]
        ids = [tokenizer.bos, *tokenizer.encode(parts)]
        record.same(
            f"{variant} of {case['text']!r}", [ids, tokenizer.decode(case["ids"])], [case["ids"], case["decoded"]]
        )

    for name, case in cases.items():
        if f"{variant}/{name}/input_ids" not in record:
            continue
        if "query" in case:
            ids = prompt.encode_query(
                _turns(case["query"]),
                tokenizer,
                case.get("num_patches_list") or (),
                image_tokens=case["num_image_token"],
                system="",
            )  # it spells its own out
            record.check(f"{variant}/{name}/input_ids", ids)
        else:
            _check_sample(record, f"{variant}/{name}", *_sample(record, case, tokenizer), vocab.pad)
    for m in record.names(rf"{variant}/padded(\d+)/input_ids"):
        first = next(iter(cases.values()))
        _check_sample(
            record, m[0].removesuffix("/input_ids"), *_sample(record, first, tokenizer), vocab.pad, length=int(m[1])
        )
    if f"{variant}/batch_chat/attention_mask" in record:
        _compare_batch_chat(record, f"{variant}/batch_chat/", tokenizer)


def _sample(record: Recording, case: dict[str, Any], tokenizer: Tokenizer) -> tuple[np.ndarray, np.ndarray]:
    answers = [turn["value"] for turn in case["conversations"] if turn["from"] == "gpt"]
    return prompt.encode_training(
        case["conversations"],
        tokenizer,
        case.get("tiles_per_image") or (),
        system=record.config.get("system_message"),
        image_tokens=case["num_image_tokens_per_tile"],
        code_tokens=case["num_mask_token"],
        num_masks=sum(text.count(MASK) for text in answers),
    )


def _check_sample(
    record: Recording, name: str, tokens: np.ndarray, labels: np.ndarray, pad: int, length: int | None = None
) -> None:
    """A sample as it is, or cut or padded to a length."""
    n = len(tokens) if length is None else length
    more = max(n - len(tokens), 0)
    record.check(f"{name}/input_ids", np.pad(tokens[:n], (0, more), constant_values=pad))
    record.check(f"{name}/labels", np.pad(labels[:n], (0, more), constant_values=IGNORE))
    record.check(f"{name}/attention_mask", np.arange(n) < len(tokens))
    record.check(f"{name}/position_ids", np.pad(np.arange(n - more), (0, more), constant_values=1))


def _turns(query: str) -> list[dict[str, str]]:
    """The conversation that a recorded query string spells out."""
    query = re.sub(r"<img>.*?</img>", prompt.IMAGE, query)
    turns = re.findall(r"<\|im_start\|>(\w+)\n(.*?)<\|im_end\|>\n", query, re.DOTALL)
    return [{"from": role, "value": text} for role, text in turns]


def _compare_batch_chat(record: Recording, name: str, tokenizer: Tokenizer) -> None:
    """Left padded queries; their texts are read back from the recorded ids."""
    rows, real = (record.ints(f"{name}{x}", 2) for x in ("input_ids", "attention_mask"))
    header = tokenizer.encode([tokenizer.im_start, "user\n"])
    ours = np.full_like(rows, tokenizer.vocab.pad)
    for out, ids in zip(ours, (row[keep == 1].tolist() for row, keep in zip(rows, real))):
        start = next(i for i in range(len(ids)) if ids[i : i + len(header)] == header) + len(header)
        text = tokenizer.decode(ids[start : ids.index(tokenizer.vocab.eos, start)])
        query = prompt.encode_query(text, tokenizer, image_tokens=0, system=record.config.get("system_message"))
        out[-len(query) :] = query
    record.compare(f"{name}input_ids", ours, rows, EQUAL)


def _compare_geometry(record: Recording) -> None:
    """Grids of tiles, and where a padded mask is in its square."""
    cfg = record.config
    for name in cfg:
        found = re.fullmatch(r"target_ratios_max(\d+)", name)
        if found:
            record.compare(name, transforms.target_ratios(int(found[1])), cfg[name], EQUAL)
    if cfg.get("system_message"):  # '' is a template without one
        record.same("system_message", prompt.OFFICIAL_SYSTEM, cfg["system_message"])
    for case in cfg.get("tiling_cols_rows", ()):
        for most in (m for m in (re.fullmatch(r"max(\d+)", key) for key in case) if m):
            cols, rows = transforms.tile_grid(tuple(case["size"]), 448, int(most[1]))
            n = cols * rows
            record.compare(
                f"tiles of {case['size']}, {most[0]}",
                [cols, rows, n, n + (n > 1)],
                [*case[most[0]], case[f"ntiles_{most[0]}_thumb0"], case[f"ntiles_{most[0]}_thumb1"]],
                EQUAL,
            )
    for case in cfg.get("smart_resize_with_padding", ()):
        (w, h), side = case["size"], case["target"]
        x, y, *shrunk = transforms.pad_box((w, h), side)
        white = np.full((h, w), 255, np.uint8)
        rows, cols = transforms.resize_mask(white, side, pad=True)[..., 0].nonzero()
        box = [cols.min(), rows.min(), cols.max() + 1, rows.max() + 1]
        record.compare(
            f"padding of {case['size']} to {side}",
            [*shrunk, x, y, *box],
            [*case["new_wh"], *case["pad_xy"], *case["nonzero_bbox_xyxy"]],
            EQUAL,
        )


def _compare_images(record: Recording) -> None:
    """Tiles, and single images as the vision tower takes them."""
    cfg = record.config.get("tile_pixels")
    if cfg and "tile/tiles_u8" in record:
        tiles = transforms.image_tiles(
            record.input("tile/input_u8"), cfg["image_size"], cfg["max_num"], thumbnail=cfg["use_thumbnail"]
        )
        record.check("tile/tiles_u8", tiles)
    for m in record.names(r"tf/out(\d*)_?(\d+)(_\w+)?"):
        # 'out448_s4' is of input_u8, 'out2_56' of input2_u8.
        number, side = ("2", m[2]) if m[0].startswith("tf/out2_") else ("", m[1] + m[2])
        kind = m[3] or ""
        tile = transforms.image_tiles(record.input(f"tf/input{number}_u8"), int(side), pad=kind == "_pad2square")[0]
        mean, std = (np.asarray(x) for x in (pixels.IMAGENET_MEAN, pixels.IMAGENET_STD))
        x = ((tile.astype(np.float32) / 255 - mean) / std).transpose(2, 0, 1)
        step, want = re.fullmatch(r"_s(\d+)", kind), record.input(m[0])
        if step:
            x = x[:, :: int(step[1]), :: int(step[1])]
        elif kind == "_crop":
            x = _find_crop(x, want)
        elif kind == "_mean_std":
            x = np.asarray([x.mean(), x.std()])
        record.check(m[0], x)


def _find_crop(x: np.ndarray, want: np.ndarray) -> np.ndarray:
    """The part of x [c, H, W] nearest to `want` [c, h, w]: recordings do not say where it lay."""
    h, w = want.shape[1:]
    corner = np.abs(x - want[:, :1, :1]).max(0)[: x.shape[1] - h + 1, : x.shape[2] - w + 1]
    crops = [x[:, i : i + h, j : j + w] for i, j in np.argwhere(corner <= corner.min() + 1e-6)]
    return min(crops, key=lambda crop: np.abs(crop - want).max())


def _compare_masks(record: Recording) -> None:
    """Masks for the VQ-VAE, and decoded images back at the size of the image."""
    if "mask/input01_u8" in record:
        mask = record.input("mask/input01_u8")
        side = 256
        for m in record.names(r"mask/train_path_\d+_then_([1-9]\d*)"):
            side = int(m[1])
            record.check(m[0], transforms.resize_mask(mask, side)[..., 0])
        for m in record.names(r"mask/pad_proc_([1-9]\d*)"):
            record.check(m[0], transforms.resize_mask(mask, int(m[1]), pad=True)[..., 0])
        for m in record.names(r"mask/train_path_float_row(\d+)"):
            if int(m[1]) < side:
                record.check(m[0], transforms.resize_mask(mask, side)[int(m[1]), :, 0] / 255 * 2 - 1)
    for m in record.names(r"eval/(plain|unpad)_(L|bin)_(\d+)x(\d+)"):
        back = transforms.grey_at if m[2] == "L" else transforms.binarize
        record.check(m[0], back(record.input("eval/pred_u8"), (int(m[3]), int(m[4])), pad=m[1] == "unpad"))
