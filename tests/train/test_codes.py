"""Stored codes: `prepare --codes`, then data.codes=true, gives the losses of masks, to the bit."""

import json

import jax
import numpy as np
import pytest

from argenseg_jax.ckpt import checkpoint
from argenseg_jax.data import pipeline, prepare
from argenseg_jax.decode import mask_tokenizer
from argenseg_jax.decode.mask_tokenizer import MaskTokenizer, fingerprint
from argenseg_jax.errors import UserError
from argenseg_jax.interop import hf_folder
from argenseg_jax.train import losses, run
from configs import common
from tests import tiny
from tests.cli.command import call, refused


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A workdir of the tiny model, scenes and a chat sample, and both prepared with and without codes."""
    root = tmp_path_factory.mktemp("codes")
    tiny.workdir(root / "run", train={"dtype": "float32"})
    (root / "c.jsonl").write_text(
        json.dumps({"conversations": [{"from": "human", "value": "?"}, {"from": "gpt", "value": "red"}]}) + "\n"
    )
    names = ("shapes:simple:train:21", f"{root}/c.jsonl*3")
    coder = MaskTokenizer.from_checkpoint(str(root / "run"))
    for out, used in (("with", coder), ("without", None)):
        prepare.prepare(prepare.Job(names, str(root / out), coder=used))
    return root


def section(source, **changes):
    return {"sources": (str(source),), "max_tokens": 96, "system": "", **changes}


def test_the_coder_loads_the_vqvae_alone(folder, monkeypatch):
    """Here and in each worker: the language model has no business in `prepare --codes`."""
    parts, load = [], checkpoint.Checkpoint.load_part
    monkeypatch.setattr(checkpoint.Checkpoint, "load_params", None)
    monkeypatch.setattr(checkpoint.Checkpoint, "load_part", lambda self, part: parts.append(part) or load(self, part))
    mask_tokenizer._tokenizer.cache_clear()
    coder = MaskTokenizer.from_checkpoint(str(folder / "run"))
    assert coder.vqvae == fingerprint(tiny.made()[1]["vqvae"])
    assert coder([np.zeros((9, 9), np.uint8)]).shape == (1, coder.num_codes) and parts == ["vqvae", "vqvae"]


def test_losses_are_bit_equal(folder):
    model, params = tiny.made()
    opts, value = losses.LMOptions(), {}
    for name, data in (("codes", section(folder / "with", codes=True)), ("masks", section(folder / "without"))):
        iterator = pipeline.train_iterator(data, tiny.tokenizer(), run.geometry(model), seed=0, batch_size=8)
        task, total = losses.lm_task(model, opts), []
        step = jax.jit(lambda p, b, k: task.loss(p, None, b, k, task.normalizer(b)))
        for number in range(3):
            batch = next(iterator)
            loss, aux = step(params, batch, jax.random.key(number))
            total.append({"loss": np.asarray(loss), **jax.tree.map(np.asarray, aux.metrics)})
        iterator.close()
        value[name] = total
        shapes = pipeline.batch_shapes(data, run.geometry(model), 8)
        assert {k: (x.shape, x.dtype) for k, x in batch.items()} == shapes
    assert value["codes"] == value["masks"]
    assert any(m["gen_loss"] > 0 for m in value["codes"])


def config(folder, data, **changes):
    cfg = common.base().to_dict() | {"model": tiny.config(), "init_from": str(folder / "run")}
    cfg["data"] |= data
    cfg["train"] |= {"steps": 1, "global_batch": 8, "dtype": "float32", "remat": "none", **changes}
    return cfg


def test_training_compares_the_codes_when_it_loads_the_weights(folder, monkeypatch):
    monkeypatch.setattr(run.loop, "run", lambda *args, load, **kw: load(hf_folder.param_shapes(tiny.made()[0])))
    good = config(folder, section(folder / "with", codes=True))
    assert "vqvae" in run.train(good, "unused")
    good["train"]["dtype"] = "bfloat16"
    with pytest.raises(UserError, match="codes of another mask tokenizer"):
        run.train(good, "unused")


def test_codes_of_another_tokenizer_are_refused(folder, tmp_path):
    good, model = section(folder / "with", codes=True), tiny.made()[0]
    params = tiny.made()[1]["vqvae"]
    run.check_codes(config(folder, good), model, params)
    run.check_codes(config(folder, section(folder / "with", pad_to_square=True)), model, params)
    other = jax.tree.map(lambda x: x + 1, params)
    for cfg, vqvae, says in (
        (config(folder, good), other, "with holds codes of another mask tokenizer .vqvae: "),
        (config(folder, good, dtype="bfloat16"), params, "dtype: 'float32', here 'bfloat16'"),
        (config(folder, good | {"pad_to_square": True}), params, "pad_to_square: False"),
        (config(folder, good), None, "has no VQ-VAE"),
    ):
        with pytest.raises(UserError, match=says):
            run.check_codes(cfg, model, vqvae)
    moving = config(folder, good)
    moving["vqvae"]["steps"] = 1
    for cfg in (moving, config(folder, good) | {"init_from": ""}):
        with pytest.raises(UserError, match="codes belong to a fixed VQ-VAE"):
            run.train(cfg, str(tmp_path / "x"))
    assert fingerprint(params) != fingerprint(other) == fingerprint(dict(reversed(other.items())))


def test_the_command(folder, tmp_path, capfd):
    out = tmp_path / "out"
    args = [
        "--source",
        "shapes:simple:train:6",
        "--source",
        f"{folder}/c.jsonl*3",
        "--out",
        out,
        "--codes",
        folder / "run",
        "--shard_samples",
        4,
    ]
    code, stdout, err = call(capfd, "prepare", *args)
    result = json.loads(stdout.splitlines()[-1])
    assert (code, result["samples"], result["broken"], result["shards"]) == (0, 7, 0, 2)
    assert any("6 images, 6 masks" in line for line in err)
    manifest = json.loads((out / "prepared.json").read_text())
    assert manifest["codes"] == MaskTokenizer.from_checkpoint(str(folder / "run")).identity()
    assert [s["samples"] for s in manifest["shards"]] == [4, 3]
    assert [p["weight"] for p in manifest["parts"]] == [6, 3]
    assert json.loads(call(capfd, "prepare", "--verify", out)[1]) == {
        "ok": True,
        "samples": 7,
        "broken": 0,
        "shards": 2,
        "faults": [],
    }
    shard = next(out.glob("*.array_record-*"))
    shard.write_bytes(shard.read_bytes()[:-1] + b"x")
    code, stdout, err = call(capfd, "prepare", "--verify", out)
    assert code == 1 and "checksum mismatch" in err[0] and not json.loads(stdout)["ok"]
    assert "--out is missing" in refused(capfd, "prepare", "--source", "shapes:test")
    assert "--codes_dtype goes with --codes" in refused(
        capfd, "prepare", "--source", "shapes:test", "--out", tmp_path / "b", "--codes_dtype", "float32"
    )
    assert "--beam_options goes with --runner" in refused(
        capfd, "prepare", "--source", "shapes:test", "--out", tmp_path / "b", "--beam_options", "a=b"
    )
    assert "was begun differently (samples: 7 -> 3; sources: " in refused(
        capfd,
        "prepare",
        "--source",
        "shapes:simple:test:3",
        "--out",
        out,
        "--codes",
        folder / "run",
        "--shard_samples",
        4,
    )
