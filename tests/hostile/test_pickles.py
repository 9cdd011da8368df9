"""Pickles of strangers: plain data or one line; nothing runs, hangs, or grows without end."""

import pickle
import pickletools
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from argenseg_jax.data.sources import plain_pickle
from argenseg_jax.errors import UserError

REFS = [
    {
        "ref_id": 1,
        "split": "val",
        "ann_id": 7,
        "image_id": 3,
        "sent_ids": [0, 1],
        "area": 0.5,
        "x": None,
        "sentences": [{"sent": "the man", "tokens": ["the", "man"]}, {"sent": "左边", "raw": ""}],
        "y": (1, True),
    }
]


def doubled(times: int) -> bytes:
    """t = (t, t), so many times, by the memo: some bytes for 2**times values."""
    return b"\x80\x02)" + b"".join(b"q" + bytes([k]) + b"h" + bytes([k]) + b"\x86" for k in range(times))


def refused(content: bytes, why: str) -> None:
    with pytest.raises(UserError, match=why) as caught:
        plain_pickle.loads(content)
    assert len(str(caught.value)) < 300 and "\n" not in str(caught.value)


@pytest.mark.parametrize("protocol", range(6))
def test_plain_data_is_read(protocol):
    assert plain_pickle.loads(pickle.dumps(REFS, protocol)) == REFS
    if protocol > 2:  # older ones call a function for bytes
        assert plain_pickle.loads(pickle.dumps(b"x", protocol)) == b"x"


def test_keys_that_would_be_hashed_forever():
    """F5: hash() of a tuple follows every reference, 2**40 of them, or recurses a million deep."""
    refused(b"\x80\x02}" + doubled(40)[2:] + b"K\x01s.", "a key of type tuple")
    refused(b"\x80\x02})" + b"\x85" * 10**5 + b"K\x01s.", "a key of type tuple")
    refused(b"\x80\x02}]K\x01s.", "a key of type list")


def test_values_that_would_be_walked_forever():
    refused(doubled(40) + b".", "more than 10000000 values")
    refused(b"\x80\x02]" + doubled(40)[2:] + b"a.", "more than 10000000 values")
    refused(b"\x80\x02}(" + pickle.dumps("split", 2)[2:-1] + doubled(60)[2:] + b"u.", "more than 10000000 values")
    assert len(plain_pickle.loads(doubled(10) + b".")) == 2


def test_long_texts_that_are_referred_to_often():
    text = pickle.dumps("a" * 10**6, 2)[:-1]
    assert text.endswith(b"q\x00")
    refused(text + b"0](" + b"h\x00" * 10**5 + b"e.", "more than 10000000 values")


def test_nesting_and_circles():
    refused(b"\x80\x02" + b"]" * 101 + b"a" * 100 + b".", "nested more than 100 deep")
    refused(b"\x80\x02]" + b"\x85" * 10**5 + b".", "nested more than 100 deep")
    assert plain_pickle.loads(b"\x80\x02" + b"]" * 100 + b"a" * 99 + b".")
    refused(b"\x80\x02]q\x00h\x00a.", "a value that contains itself")
    refused(b"\x80\x02}q\x00K\x01h\x00s.", "a value that contains itself")


@pytest.mark.parametrize(
    "content",
    (
        pickle.dumps(2**128),
        pickle.dumps(-(2**200)),
        pickle.dumps(1 << 100000),
        b"I" + b"9" * 5000 + b"\n.",
        b"(.",
        b"](a.",
        b"\x80\x02\x86.",
        b"\x80\x02K\x01\x87.",
        b"](" + b"K\x01" * 3 + b"d.",
        b"",
        b".",
        b"\x80\x02",
        b"0.",
        b"\x80\x02K\x01K\x02a.",
        b"\x80\x02]K\x01K\x02s.",
        b"h\x05.",
        b"F" + b"1" * 9 + b"x\n.",
    ),
)
def test_odd_pickles(content):
    refused(content, "not a readable pickle")


class Runs:
    def __reduce__(self):
        return print, ("ran",)


@pytest.mark.parametrize("protocol", range(6))
def test_what_could_run_code_is_refused(protocol, capsys):
    refused(pickle.dumps([1, Runs()], protocol), "more than plain data.*refused, because such files can run code")
    refused(pickle.dumps({1, 2}, 4), "more than plain data")
    refused(b"\x80\x05\x96" + (10**6).to_bytes(8, "little") + b"a" * 10**6 + b".", "opcode BYTEARRAY8")
    assert "ran" not in capsys.readouterr().out


@given(st.integers(0, 2**32 - 1), st.integers(0, 5))
def test_mutated_pickles(seed, protocol):
    rng, content = random.Random(seed), bytearray(pickle.dumps(REFS, protocol))
    for _ in range(rng.choice((1, 2, 8))):
        place, opcode = rng.randrange(len(content)), ord(rng.choice(pickletools.opcodes).code)
        content[place : place + rng.randrange(3)] = bytes([rng.choice((rng.randrange(256), opcode))]) * rng.randrange(3)
    try:
        plain_pickle.loads(bytes(content))
    except UserError as error:
        assert len(str(error)) < 300 and "\n" not in str(error)


def test_a_file_is_named(tmp_path):
    (tmp_path / "refs(unc).p").write_bytes(b"\x80\x02}" + doubled(40)[2:] + b"K\x01s.")
    with pytest.raises(UserError, match=r"refs\(unc\).p: not a readable pickle \(ValueError: a key of type tuple\)"):
        plain_pickle.read(tmp_path / "refs(unc).p")
    with pytest.raises(UserError, match="a device, pipe or socket"):
        plain_pickle.read("/dev/zero")
