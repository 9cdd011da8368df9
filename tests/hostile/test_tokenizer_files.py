"""Tokenizer files of strangers: a tokenizer that encodes, or one line with the file."""

import json
import pathlib

import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import decoders, models, normalizers, pre_tokenizers

from argenseg_jax.data.tokenizer import Tokenizer
from argenseg_jax.errors import UserError
from tests.hostile import mutated

PROTO = (pathlib.Path(__file__).parent.parent / "golden" / "G_preprocess" / "spm_prefix.model").read_bytes()
LONG = 1000000000000000019884624838656  # what transformers writes for "no limit"


def fast():
    words = {word: i for i, word in enumerate(["a", "b", "c", "Ġ", "ab", "abc", "S", "e"])}
    model = tokenizers.Tokenizer(models.BPE(vocab=words, merges=[("a", "b"), ("ab", "c")]))
    model.normalizer, model.decoder = normalizers.NFC(), decoders.ByteLevel()
    model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.add_special_tokens(["<|endoftext|>", "<|im_end|>"])
    return json.loads(model.to_str())


def load(folder, files):
    """Whether the files are a tokenizer, which encodes and can be saved; one line with the folder if not."""
    for name in (
        "tokenizer.json",
        "tokenizer_config.json",
        "tokenizer.model",
        "vocab.json",
        "merges.txt",
        "added_tokens.json",
    ):
        content = files.get(name)
        path = folder / name
        path.unlink(missing_ok=True)
        if content is not None:
            path.write_bytes(
                content if isinstance(content, bytes) else json.dumps(content).encode("utf-8", "surrogatepass")
            )
    try:
        made = Tokenizer.load(folder, 24)
    except UserError as error:
        assert "\n" not in str(error) and str(folder) in str(error) and len(str(error)) < 700
        return False
    made.decode(made.encode_text("abc b"))
    made.save(folder / "saved")
    return True


FAST = fast()
SLOW = {
    "vocab.json": FAST["model"]["vocab"],
    "merges.txt": b"#version: 0.2\na b\nab c\n",
    "added_tokens.json": {"<|endoftext|>": 8, "<|im_end|>": 9},
}
CONFIG = {"model_max_length": LONG, "added_tokens_decoder": {"520": {"content": "<|im_end|>", "special": True}}}
ADDED = {"<|im_end|>": 520, "<|im_start|>": 521}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("tokenizers")


def test_the_whole_ones_load(folder):
    assert load(folder, {"tokenizer.json": FAST, "tokenizer_config.json": CONFIG})
    assert load(folder, SLOW) and load(
        folder, {"tokenizer.model": PROTO, "tokenizer_config.json": CONFIG, "added_tokens.json": ADDED}
    )


@given(mutated(FAST))
def test_tokenizer_json(folder, document):
    load(folder, {"tokenizer.json": document})


@given(mutated({name: value for name, value in SLOW.items() if name != "merges.txt"}))
def test_the_slow_files(folder, document):
    load(folder, {**SLOW, **document} if isinstance(document, dict) else {**SLOW, "vocab.json": document})


@given(mutated(CONFIG), mutated(ADDED))
def test_the_files_beside_a_sentencepiece_model(folder, config, added):
    load(folder, {"tokenizer.model": PROTO, "tokenizer_config.json": config, "added_tokens.json": added})


@given(st.data())
def test_bytes_changed_anywhere(folder, data):
    name = data.draw(st.sampled_from(["tokenizer.model", "tokenizer.json", "merges.txt", "vocab.json"]))
    files = {"tokenizer.model": {"tokenizer.model": PROTO}, "tokenizer.json": {"tokenizer.json": FAST}}.get(name, SLOW)
    content = files[name] if isinstance(files[name], bytes) else json.dumps(files[name]).encode()
    at = data.draw(st.integers(0, len(content) - 1))
    content = content[:at] + data.draw(st.binary(max_size=4)) + content[at + data.draw(st.integers(0, 9)) :]
    load(folder, {**files, name: content})


@pytest.mark.parametrize(
    "files, says",
    [
        ({"tokenizer.json": b"[" * 10**5}, "tokenizer.json"),
        ({"tokenizer.json": b"\xff\xfe\xff"}, "no UTF-16"),
        ({"tokenizer.model": b""}, "tokenizer.model"),
        ({"tokenizer.model": bytes(1000)}, "tokenizer.model"),
        ({**SLOW, "added_tokens.json": b"[]"}, "added_tokens.json is no object"),
        ({**SLOW, "added_tokens.json": {"x": -1}}, "added_tokens.json: 'x' has the id -1"),
        ({**SLOW, "added_tokens.json": {"x": 2**40}}, "has the id 1099511627776"),
        ({**SLOW, "merges.txt": b"a b c\n"}, "'a b c' is no pair"),
        ({**SLOW, "merges.txt": b"\xff\n"}, "no UTF-8"),
        ({**SLOW, "merges.txt": None}, "merges.txt"),
        ({"tokenizer.model": PROTO, "added_tokens.json": {"<img>": "520"}}, "'<img>' has the id '520'"),
        ({"tokenizer.json": FAST, "tokenizer_config.json": b'{"a": NaN}'}, "tokenizer_config.json is no valid JSON"),
        (
            {"tokenizer.json": {**FAST, "model": {**FAST["model"], "vocab": {**FAST["model"]["vocab"], "abc": 2**31}}}},
            "'abc' has the id 2147483648",
        ),
        ({"tokenizer.json": {**FAST, "model": {**FAST["model"], "continuing_subword_prefix": "##"}}}, "with a prefix"),
    ],
)
def test_damaged_files_are_named(folder, files, says):
    assert not load(folder, files)
    with pytest.raises(UserError, match=says):
        Tokenizer.load(folder, 24)


def test_half_an_emoji_is_saved_as_it_came(folder):
    config = {**CONFIG, "added_tokens_decoder": {"520": {"content": "\ud83d"}}}
    assert load(folder, {"tokenizer.model": PROTO, "tokenizer_config.json": json.dumps(config).encode()})
    saved = json.loads((folder / "saved" / "added_tokens.json").read_text())
    assert saved["\ud83d"] == 520 and saved["<visual token 000000>"] == 520 + 1 + 2 + 13


def test_merges_that_begin_with_a_hash_are_merges(folder):
    """Only the first line, `#version`, is none."""
    words = {word: i for i, word in enumerate(["#", "##", "a", "b", "ab"])}
    files = {"vocab.json": words, "merges.txt": b"#version: 0.2\n# #\na b\n", "added_tokens.json": {}}
    load(folder, files)
    assert Tokenizer.load(folder, 24).encode_text("##ab") == [1, 4]
