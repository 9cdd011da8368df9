"""Folders as users bring them: the right weights, or one line that says what they are and what to do."""

import json

import jax
import ml_dtypes
import numpy as np
import pytest

from argenseg_jax import trees
from argenseg_jax.ckpt import checkpoint, orbax_io, transfer
from argenseg_jax.errors import UserError
from argenseg_jax.interop import hf_config, hf_folder, tensor_files
from argenseg_jax.interop import state_dict as convert
from tests import tiny

EMBED, HEAD = "language_model.model.embed_tokens.weight", "language_model.lm_head.weight"


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """{form: an HF folder of the tiny model}."""
    root = tmp_path_factory.mktemp("source")
    return {
        form: tiny.hf(root / form, tiny.workdir(root / f"w-{form}", tiny.made(form)[1], form))
        for form in ("qwen", "qwen, tied")
    }


def folder(path, origin, change=lambda tensors: tensors, config=lambda config: None, files=None):
    """A copy of the folder `origin` with other tensors, config.json and further files of tensors."""
    path.mkdir()
    for file in origin.iterdir():
        if file.suffix == ".json":
            (path / file.name).write_bytes(file.read_bytes())
    tensors = change(dict(hf_folder.open_tensors(origin)))
    for name, content in (files or {"model.safetensors": tensors}).items():
        tensor_files.write_safetensors(path / name, {k: tensor_files.Lazy.of(v) for k, v in content.items()})
    edited = json.loads((path / "config.json").read_text())
    config(edited)
    (path / "config.json").write_text(json.dumps(edited))
    return path


def opened(path):
    source = checkpoint.open_checkpoint(str(path))
    return source.model(), source.load_params()


def refused(path):
    with pytest.raises(UserError) as error:
        opened(path)
    assert "\n" not in str(error.value) and len(str(error.value)) < 900 and str(path) in str(error.value)
    return str(error.value)


def same(a, b):
    jax.tree.map(np.testing.assert_array_equal, dict(a), dict(b))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_tied_model_whose_file_also_holds_the_head(source, tmp_path, dtype):
    """The embedding once more: still tied. Another head: not tied, whatever config.json says."""
    origin, (model, params) = source["qwen, tied"], tiny.made("qwen, tied")
    copied = folder(tmp_path / "equal", origin, lambda t: {**t, HEAD: t[EMBED].copy()})
    got, weights = opened(copied)
    assert got.llm.tied and "lm_head" not in weights["llm"]
    same(weights, params)
    other = folder(tmp_path / "other", origin, lambda t: {**t, HEAD: (2 * t[EMBED]).astype(dtype)})
    got, weights = opened(other)
    assert not got.llm.tied
    np.testing.assert_array_equal(
        weights["llm"]["lm_head"]["kernel"][:, : model.vocab.size],
        (2 * params["llm"]["embed"]["embedding"][: model.vocab.size].T).astype(dtype),
    )
    late = folder(tmp_path / "late", origin, lambda t: {**t, HEAD: np.concatenate([t[EMBED][:-1], t[EMBED][:1]])})
    assert not opened(late)[0].llm.tied  # the first rows agree


def test_tied_in_the_outer_field_alone_and_untied_without_a_head(source, tmp_path):
    outer = folder(
        tmp_path / "outer", source["qwen, tied"], config=lambda c: c["llm_config"].pop("tie_word_embeddings")
    )
    same(opened(outer)[1], tiny.made("qwen, tied")[1])

    def untied(config):
        config["tie_word_embeddings"] = config["llm_config"]["tie_word_embeddings"] = False

    assert "set tie_word_embeddings to true in config.json" in refused(
        folder(tmp_path / "none", source["qwen, tied"], config=untied)
    )


def test_both_16_bit_dtypes_in_the_layers_of_a_leaf(source, tmp_path):
    """float32 holds both, exactly."""

    def mixed(tensors):
        return {k: v.astype(np.float16 if ".1." in k else ml_dtypes.bfloat16) for k, v in tensors.items()}

    path = folder(tmp_path / "mixed", source["qwen"], mixed)
    _model, weights = opened(path)
    made = tmp_path / "w"
    transfer.to_orbax(checkpoint.open_checkpoint(str(path)), path, made)
    back = checkpoint.open_checkpoint(str(made)).load_params()
    same(jax.tree.map(lambda x: x.astype(np.float32), back), weights)
    stored = {name: leaf.dtype for name, leaf in trees.flatten(back).items()}
    assert stored["llm/layers/mlp/up/kernel"] == np.float32
    assert stored["llm/norm/scale"] == ml_dtypes.bfloat16
    tensors = mixed(dict(hf_folder.open_tensors(source["qwen"])))
    for i in (0, 1):
        np.testing.assert_array_equal(
            weights["llm"]["layers"]["mlp"]["up"]["kernel"][i],
            tensors[f"language_model.model.layers.{i}.mlp.up_proj.weight"].T.astype(np.float32),
        )


def test_whole_numbers_where_floats_were(source, tmp_path):
    path = folder(
        tmp_path / "ints", source["qwen"], lambda t: {**t, "mlp1.1.weight": t["mlp1.1.weight"].view(np.int32)}
    )
    assert "'mlp1.1.weight' is int32; weights are float64, float32, float16 or bfloat16" in refused(path)


def lora(tensors):
    out = {}
    for key, tensor in tensors.items():
        if key.startswith("language_model.model.layers.") and key.endswith("proj.weight"):
            base = "language_model.base_model.model" + key.removeprefix("language_model").removesuffix(".weight")
            out |= {
                f"{base}.base_layer.weight": tensor,
                f"{base}.lora_A.default.weight": np.zeros((2, 3), np.float32),
                f"{base}.lora_B.default.weight": np.zeros((3, 2), np.float32),
            }
        else:
            out[key] = tensor
    return out


@pytest.mark.parametrize(
    "change, says",
    [
        (lora, "LoRA adapters that are not merged"),
        (lambda t: {f"base_model.model.{k}": v for k, v in t.items()}, "LoRA adapters"),
        (lambda t: {f"module.{k}": v for k, v in t.items()}, "keys begin with 'module.'"),
        (lambda t: {f"model.{k}": v for k, v in t.items()}, "keys begin with 'model.'"),
        (lambda t: {f"_orig_mod.{k}": v for k, v in t.items()}, "keys begin with '_orig_mod.'"),
        (lambda t: {f"module._orig_mod.{k}": v for k, v in t.items()}, "keys begin with 'module._orig_mod.'"),
        (lambda t: {**t, "language_model.model.layers.0.mlp.up_proj.qweight": np.zeros(3, np.int32)}, "are quantised"),
    ],
)
def test_keys_of_adapters_and_wrappers(source, tmp_path, change, says):
    assert says in refused(folder(tmp_path / "x", source["qwen"], change))


def test_thousands_of_unknown_keys_are_counted(source, tmp_path):
    path = folder(
        tmp_path / "x",
        source["qwen"],
        lambda t: {
            **t,
            **{f"language_model.model.layers.{i}.mlp.upp_proj.weight": np.zeros(1, np.float32) for i in range(3000)},
            "k" * 10000 + ".weight": np.zeros(1, np.float32),
        },
    )
    text = refused(path).replace(str(path), "")
    assert "unexpected key 'language_model.model.layers.0.mlp.upp_proj.weight' (nearest: 'language_model.model" in text
    assert "and 2996 more" in text
    huge = folder(
        tmp_path / "y",
        source["qwen"],
        lambda t: {**t, f"language_model.model.layers.{'9' * 5000}.mlp.up_proj.weight": np.zeros(1, np.float32)},
    )
    assert "unexpected key" in refused(huge)


def test_files_beside_the_weights(source, tmp_path):
    """An optimizer's are none of it, adapters are said, and of numbered files none may be missing."""
    origin, params = source["qwen"], tiny.made("qwen")[1]
    tensors = dict(hf_folder.open_tensors(origin))
    extra = {"x": np.zeros(3, np.float32)}
    same(
        opened(
            folder(
                tmp_path / "a",
                origin,
                files={
                    "model.safetensors": tensors,
                    "optimizer.safetensors": extra,
                    "consolidated.safetensors": tensors,
                },
            )
        )[1],
        params,
    )
    text = refused(
        folder(tmp_path / "b", origin, files={"model.safetensors": tensors, "adapter_model.safetensors": extra})
    )
    assert "b/adapter_model.safetensors: LoRA adapters beside the weights" in text
    half = len(tensors) // 2
    parts = [dict(list(tensors.items())[:half]), dict(list(tensors.items())[half:])]
    names = [f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    same(
        opened(folder(tmp_path / "c", origin, files={**dict(zip(names, parts)), "optimizer.safetensors": extra}))[1],
        params,
    )
    assert f"{names[1]} does not exist" in refused(folder(tmp_path / "d", origin, files={names[0]: parts[0]}))
    same(opened(folder(tmp_path / "e", origin, files={"some_name.safetensors": tensors}))[1], params)
    adapters = folder(tmp_path / "f", origin, files={"adapter_model.safetensors": extra})
    (adapters / "config.json").unlink()
    (adapters / "adapter_config.json").write_text("{}")
    assert "holds LoRA adapters alone" in refused(adapters)


# ------------------------------------------------------------------ vocabularies


def released(path, origin, rows, config=lambda config: None):
    """The folder as InternVL is released: no visual tokens, `rows` of (true or padding) words."""
    model = tiny.made("qwen")[0]
    true = model.vocab.base + 9

    def change(tensors):
        kept = {k: v for k, v in tensors.items() if not k.startswith(hf_folder.OWN_PARTS)}
        for key in (EMBED, HEAD):
            kept[key] = np.concatenate([tensors[key][:true], np.full((rows - true, 32), 100, np.float32)])
        return kept

    def edited(c):
        c["llm_config"]["vocab_size"] = rows
        c["argenseg"].pop("vocab")  # a released file has none
        config(c)

    return folder(path, origin, change, edited)


@pytest.fixture(scope="module")
def vqvae(source, tmp_path_factory):
    path = tmp_path_factory.mktemp("vqvae") / "vq.safetensors"
    tensors = hf_folder.open_tensors(source["qwen"])
    tensor_files.write_safetensors(path, {k: tensors.lazy(k) for k in tensors if k.startswith("image_tokenizer.")})
    return path


@pytest.mark.parametrize("padding", [1, 5, 300])
def test_a_padded_vocabulary_grows_from_its_true_rows(source, vqvae, tmp_path, padding):
    """The tokenizer tells the ids, in the official layout too; padding rows are no words, and no part of the mean."""
    model, params = tiny.made("qwen")
    true = model.vocab.base + 9
    path = released(tmp_path / "in", source["qwen"], true + padding)
    transfer.to_orbax(checkpoint.open_checkpoint(str(path)), path, tmp_path / "w", vqvae=vqvae)
    made = checkpoint.open_checkpoint(str(tmp_path / "w"))
    assert made.model() == model and made.tokenizer().vocab == model.vocab
    got = made.load_params()
    for rows, want in (
        (got["llm"]["embed"]["embedding"], params["llm"]["embed"]["embedding"]),
        (got["llm"]["lm_head"]["kernel"].T, params["llm"]["lm_head"]["kernel"].T),
    ):
        np.testing.assert_array_equal(rows[:true], want[:true])
        mean = want[:true].astype(np.float64).mean(0).astype(np.float32)
        np.testing.assert_array_equal(rows[true : model.vocab.size], np.tile(mean, (model.vocab.size - true, 1)))
        assert not rows[model.vocab.size :].any()


def test_padding_behind_the_visual_tokens(source, tmp_path):
    model, params = tiny.made("qwen")

    def padded(tensors):
        pad = np.full((7, 32), 100, np.float32)
        return {**tensors, **{k: np.concatenate([tensors[k], pad]) for k in (EMBED, HEAD)}}

    def config(c):
        c["llm_config"]["vocab_size"] = model.vocab.size + 7
        c["argenseg"].pop("vocab")

    got, weights = opened(folder(tmp_path / "x", source["qwen"], padded, config))
    assert got == model
    same(weights, params)


def test_an_unknown_vocabulary_without_a_tokenizer(source, tmp_path):
    """No id is guessed from a size that may be padded, and none is negative."""
    path = released(tmp_path / "in", source["qwen"], tiny.made("qwen")[0].vocab.base + 14)
    (path / "tokenizer.json").unlink()
    assert "the tokenizer's files have to be beside it" in refused(path)
    small = released(
        tmp_path / "small",
        source["qwen"],
        tiny.made("qwen")[0].vocab.base + 14,
        lambda c: c["argenseg"]["vqvae"].update(codebook_size=4096),
    )
    (small / "tokenizer.json").unlink()
    assert "-" not in refused(small).replace(str(small), "").replace("tokenizer-", "")


def test_an_image_token_that_the_tokenizer_has_elsewhere(source, tmp_path):
    config = hf_config.model_cfg_to_hf(tiny.config(), layout="hf")
    config["image_token_id"] += 1
    config["argenseg"].pop("vocab")
    path = folder(tmp_path / "x", source["qwen"])
    (path / "config.json").write_text(json.dumps(config))
    base = tiny.made("qwen")[0].vocab.base
    assert f"image_token_id={base + 3}, but the tokenizer beside it has <IMG_CONTEXT> at {base + 2}" in refused(path)


# ------------------------------------------------------------------ what is beside, and what is read


def test_the_tokenizer_of_a_folder_further_up_is_a_strangers(source, tmp_path):
    """tokenizer/ of a parent belongs to HF folders as little as to workdirs below it."""
    stranger = tmp_path / "tokenizer"
    stranger.mkdir()
    (stranger / "tokenizer.json").write_text("{}")
    path = folder(tmp_path / "hf", source["qwen"])
    assert checkpoint.open_checkpoint(str(path)).tokenizer().vocab == tiny.made("qwen")[0].vocab
    (path / "tokenizer.json").unlink()
    assert not checkpoint.open_checkpoint(str(path)).has_tokenizer()
    work = tiny.workdir(tmp_path / "run")
    for place in (work, work / "checkpoints", work / "checkpoints" / "1"):
        assert checkpoint.open_checkpoint(str(place)).tokenizer().vocab == tiny.made("qwen")[0].vocab
    (work / "tokenizer").rename(tmp_path / "away")
    assert not checkpoint.open_checkpoint(str(work)).has_tokenizer()
    assert not checkpoint.open_checkpoint(str(work / "checkpoints" / "1")).has_tokenizer()


def test_a_part_is_loaded_alone(source, tmp_path, monkeypatch):
    """The tensors of the other parts are not read, of an HF folder or of a step."""
    read, want = [], tiny.made("qwen")[1]["vqvae"]
    inner = tensor_files._read
    monkeypatch.setattr(
        tensor_files,
        "_read",
        lambda file, offset, shape, dtype: (
            read.append(int(np.prod(shape)) * dtype.itemsize) or inner(file, offset, shape, dtype)
        ),
    )
    same(checkpoint.open_checkpoint(str(source["qwen"])).load_part("vqvae"), want)
    assert sum(read) == sum(leaf.nbytes for leaf in jax.tree.leaves(want))
    leaves = []
    get = orbax_io.StoredLeaf.__getitem__
    monkeypatch.setattr(
        orbax_io.StoredLeaf, "__getitem__", lambda self, index: leaves.append(self.shape) or get(self, index)
    )
    monkeypatch.setattr(orbax_io, "restore_params", None)
    work = checkpoint.open_checkpoint(str(tiny.workdir(tmp_path / "w")))
    same(work.load_part("vqvae"), want)
    assert sorted(leaves) == sorted(leaf.shape for leaf in jax.tree.leaves(want))


def test_a_leaf_of_the_index_finds_its_key():
    tensors = {"model.embed_tokens.weight": 0, "lm_head.weight": 1}
    assert convert.find_key(tensors, convert.HEAD) == "lm_head.weight"
    assert convert.find_key(tensors, convert.EMBEDDING) == "model.embed_tokens.weight"
    assert convert.find_key(tensors, "vision/class_embed") is None
