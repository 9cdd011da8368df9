"""Pickled annotations are read as plain values; anything more is refused."""

import os
import pickle

import numpy as np
import pytest

from argenseg_jax.data.sources import plain_pickle
from argenseg_jax.errors import UserError

DATA = [{"a": 1, "b": [1.5, "text", "Ünï", None, True, (1, 2, 3, 4), (), (5,)], "c": -(2**70)}] * 2


@pytest.mark.parametrize("protocol", range(6))
def test_plain_pickles(protocol):
    assert plain_pickle.loads(pickle.dumps(DATA, protocol)) == DATA


def test_pickles_of_python_2():
    old = b"(lp0\n(dp1\nS'sent'\np2\nS'the man'\np3\nsS'id'\nL12L\nsa."
    assert plain_pickle.loads(old) == [{"sent": "the man", "id": 12}]


class Evil:
    def __reduce__(self):
        return os.system, ("touch /tmp/pwned",)


@pytest.mark.parametrize(
    "content",
    [
        pickle.dumps(Evil(), 0),
        pickle.dumps([Evil()], 2),
        pickle.dumps({"a": Evil()}, 4),
        pickle.dumps(np.zeros(2)),
        pickle.dumps(len),
        pickle.dumps({1, 2}, 4),
    ],
)
def test_pickles_of_more_than_plain_data_are_refused(content):
    with pytest.raises(UserError, match="more than plain data.*refused"):
        plain_pickle.loads(content)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"not a pickle",
        pickle.dumps(DATA)[:-1],
        b"a.",
        b"s.",
        b"t.",
        pickle.dumps([1])[:4],
        b"h\x05.",
        b"}(K\x01u.",
        b"](((((e",
    ],
)
def test_broken_pickles_are_one_error(content):
    with pytest.raises(UserError, match="not a readable pickle"):
        plain_pickle.loads(content)
