"""transformers as a peer: its own InternVL comes in, answers alike here, and goes back unchanged."""

import json

import jax
import numpy as np
import pytest
import tokenizers

from argenseg_jax import trees
from argenseg_jax.ckpt import checkpoint, transfer
from argenseg_jax.data.tokenizer import Tokenizer
from argenseg_jax.interop import hf_folder, tensor_files
from argenseg_jax.interop import state_dict as convert
from argenseg_jax.models import variants
from argenseg_jax.vocab import SPECIAL_TOKENS

pytestmark = pytest.mark.torch
BASE = 90  # id of <img>
WORDS = BASE + SPECIAL_TOKENS.index("<mask>")  # before ARGenSeg's own
VAE = dict(
    ch=32,
    ch_mult=[1],
    num_res_blocks=0,
    z_channels=8,
    codebook_size=24,
    patch_nums=[1, 2, 4],
    using_sa=False,
    using_mid_sa=False,
    patch_size=4,
)
VISION = dict(
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=4,
    intermediate_size=48,
    image_size=[56, 56],
    patch_size=[14, 14],
)
TEXT = dict(
    hidden_size=32,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    intermediate_size=48,
    vocab_size=WORDS,
    max_position_embeddings=512,
    rope_theta=1e5,
    eos_token_id=3,
    pad_token_id=3,
    bos_token_id=None,
)
FORMS = {
    "qwen2": ({**VISION, "attention_bias": True}, {**TEXT, "model_type": "qwen2"}, False),
    "qwen2, tied, rms": (
        {**VISION, "norm_type": "rms_norm", "use_qk_norm": True},
        {**TEXT, "model_type": "qwen2"},
        True,
    ),
    "llama": ({**VISION, "attention_bias": True}, {**TEXT, "model_type": "llama"}, False),
}


@pytest.fixture(scope="module", params=FORMS)
def peer(request, tmp_path_factory):
    """(transformers' model, its folder, the workdir that `convert` makes of it)."""
    import torch
    from transformers import InternVLConfig, InternVLForConditionalGeneration

    vision, text, tied = FORMS[request.param]
    torch.manual_seed(0)
    model = InternVLForConditionalGeneration(
        InternVLConfig(
            vision_config=vision,
            text_config={**text, "tie_word_embeddings": tied},
            image_token_id=BASE + 2,
            image_seq_length=4,
            tie_word_embeddings=tied,
        )
    ).eval()
    with torch.no_grad():  # zeros and ones would hide a mix-up
        for name, leaf in model.named_parameters():
            leaf.copy_(torch.randn_like(leaf) * 0.2 + ("norm" in name and name.endswith("weight")))
    root = tmp_path_factory.mktemp("peer")
    model.save_pretrained(root / "hf")
    config = json.loads((root / "hf" / "config.json").read_text())
    (root / "hf" / "config.json").write_text(json.dumps({**config, "argenseg": {"vqvae": VAE}}))

    own = {"vqvae": hf_folder.param_shapes(variants.build(hf_folder.model_cfg(root / "hf")))["vqvae"]}
    rng = np.random.default_rng(0)
    drawn = trees.map_named(lambda name, s: rng.standard_normal(s.shape, np.float32), own)
    tensors = {
        key.removeprefix("image_tokenizer."): tensor_files.Lazy.of(array) for key, array in convert.to_torch(drawn)
    }
    tensor_files.write_safetensors(root / "vae.safetensors", tensors)
    transfer.to_orbax(
        checkpoint.open_checkpoint(str(root / "hf")), root / "hf", root / "work", vqvae=root / "vae.safetensors"
    )
    return model, root


def test_logits_of_image_and_text(peer):
    import torch

    theirs, root = peer
    opened = checkpoint.open_checkpoint(str(root / "work"))
    model, params = opened.model(), opened.load_params()
    rng = np.random.default_rng(1)
    pixels = rng.standard_normal((2, 3, 56, 56)).astype(np.float32)
    tokens = rng.integers(4, BASE, (1, 24))
    tokens[0, 3:11] = BASE + 2  # two tiles of four places
    with torch.no_grad():
        want = theirs(input_ids=torch.tensor(tokens), pixel_values=torch.tensor(pixels)).logits.numpy()

    @jax.jit
    def ours(params, tiles, tokens):
        def run(m):
            places = np.arange(tokens.shape[1])[None]
            h = m.hidden(tokens, places, np.ones_like(places), m.encode_images(tiles))
            return m.logits(h)

        return model.apply({"params": params}, method=run)

    got = ours(params, pixels.transpose(0, 2, 3, 1)[None], tokens)
    limit = 2e-4 * max(1, np.abs(want).max())
    np.testing.assert_allclose(np.asarray(got)[..., :WORDS], want, rtol=0, atol=limit)


def test_back_to_transformers(peer):
    import torch
    from transformers import InternVLForConditionalGeneration

    theirs, root = peer
    transfer.to_hf(checkpoint.open_checkpoint(str(root / "work")), root / "back", layout="hf")
    again, info = InternVLForConditionalGeneration.from_pretrained(root / "back", output_loading_info=True)
    assert not any(info.values())  # nothing missing, unexpected or misshapen
    for (name, a), (_, b) in zip(theirs.state_dict().items(), again.state_dict().items(), strict=True):
        assert torch.equal(a, b[:WORDS] if "embed_tokens" in name or "lm_head" in name else b), name
    stored = hf_folder.open_tensors(root / "hf")
    back = hf_folder.open_tensors(root / "back")
    assert stored.keys() <= back.keys()  # the same names in the files, too
    built = [variants.build(hf_folder.model_cfg(root / name)) for name in ("hf", "back")]
    assert built[0] == built[1]


def test_names_in_memory_and_a_wrong_flag(peer):
    """A state dict saved as it is in memory, and a config that says `tied` though there is a head."""
    theirs, root = peer
    shapes = hf_folder.param_shapes(checkpoint.open_checkpoint(str(root / "work")).model())
    parts = {name: shapes[name] for name in ("vision", "connector", "llm")}
    state = {key: leaf.numpy() for key, leaf in theirs.state_dict().items()}
    if theirs.config.tie_word_embeddings:
        state.pop("lm_head.weight", None)
    got, want = convert.to_jax(state, parts), checkpoint.open_checkpoint(str(root / "work")).load_params()
    for name, leaf in trees.flatten({p: got[p] for p in ("vision", "connector")}).items():
        assert np.array_equal(leaf, trees.flatten(want)[name])
    config = json.loads((root / "hf" / "config.json").read_text())
    folder = root / "flag"
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": True}))
    (folder / "model.safetensors").write_bytes((root / "hf" / "model.safetensors").read_bytes())
    assert hf_folder.model_cfg(folder)["llm"]["tied"] == theirs.config.tie_word_embeddings


def test_saved_tokenizers(tmp_path):
    """The files of a Qwen2-based release, slow and fast, with the added words and their own config."""
    import transformers

    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    words = {c: i for i, c in enumerate([*alphabet, "Ġt", "he", "Ġthe"])}
    added = {
        w: len(words) + i for i, w in enumerate(["<|endoftext|>", "<|im_start|>", "<|im_end|>", *SPECIAL_TOKENS[:9]])
    }
    config = {
        "tokenizer_class": "Qwen2Tokenizer",
        "eos_token": "<|im_end|>",
        "chat_template": "{{ x }}",
        "pad_token": "<|endoftext|>",
        "added_tokens_decoder": {str(i): {"content": w, "special": True} for w, i in added.items()},
    }
    for name, content in (("vocab.json", words), ("added_tokens.json", added), ("tokenizer_config.json", config)):
        (tmp_path / name).write_text(json.dumps(content))
    (tmp_path / "merges.txt").write_text("#version: 0.2\nĠ t\nh e\nĠt he\n")
    ours = Tokenizer.load(tmp_path, num_codes=8)
    ours.save(tmp_path / "out")
    assert {f.name for f in tmp_path.iterdir()} < {"out", *(f.name for f in (tmp_path / "out").iterdir())}
    (tmp_path / "slow").mkdir()
    for name in ("vocab.json", "merges.txt", "added_tokens.json", "tokenizer_config.json"):
        (tmp_path / "slow" / name).write_bytes((tmp_path / "out" / name).read_bytes())
    for folder in ("out", "slow"):
        theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / folder)
        assert len(theirs) == ours.vocab.size and theirs.chat_template == "{{ x }}"
        text = " the<ge_start><MASK_CONTEXT><visual token 000007><ge_end> été"
        assert theirs(text)["input_ids"] == [
            words["Ġthe"],
            ours.vocab.ge_start,
            ours.vocab.mask_context,
            ours.vocab.first_code + 7,
            ours.vocab.ge_end,
            *ours.encode_text(" été"),
        ]
        assert Tokenizer.load(tmp_path / folder).vocab == ours.vocab
