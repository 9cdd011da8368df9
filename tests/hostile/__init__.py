"""Files of strangers: every gate gives a value or one line, whatever it is fed. ARGENSEG_HOSTILE=long runs more.

`mutated(document)` changes a JSON document in one place or two, key by key, with the values of ODD.
"""

import copy
import os

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

settings.register_profile(
    "ci", max_examples=60, derandomize=True, deadline=None, database=None, suppress_health_check=list(HealthCheck)
)
settings.register_profile("long", settings.get_profile("ci"), max_examples=5000, derandomize=False)
settings.load_profile(os.environ.get("ARGENSEG_HOSTILE", "ci"))


def nested(depth: int) -> list:
    value: list = []
    for _ in range(depth):
        value = [value]
    return value


ODD = (
    None,
    True,
    False,
    0,
    -1,
    1,
    2,
    0.5,
    float("nan"),
    float("inf"),
    -float("inf"),
    2**31,
    2**63,
    -(2**63),
    10**400,
    1e308,
    "",
    "x",
    "\0",
    "\ud83d",
    "a" * 300,
    "..",
    "/",
    "../x",
    "../../../../etc/passwd",
    "/dev/zero",
    "😀",
    [],
    [[]],
    {},
    {"a": 1},
    [1, 2],
    [None],
    ["x", 1],
    nested(50),
)


def places(document, path=()):
    """The path of every value in a document, its own first."""
    yield path
    entries = (
        document.items() if isinstance(document, dict) else (enumerate(document) if isinstance(document, list) else ())
    )
    for key, value in entries:
        yield from places(value, (*path, key))


def changed(document, path, value):
    """A copy with the value at a path replaced; `DELETED` takes it out."""
    if not path:
        return value
    document = copy.deepcopy(document)
    parent = document
    for key in path[:-1]:
        parent = parent[key]
    if value is DELETED:
        del parent[path[-1]]
    else:
        parent[path[-1]] = value
    return document


DELETED = object()


@st.composite
def mutated(draw, document):
    """A document with one place changed, or two."""
    for _ in range(draw(st.integers(1, 2))):
        path = draw(st.sampled_from(list(places(document))))
        value = draw(st.sampled_from((*ODD, *([DELETED] if path else []))))
        document = changed(document, path, value)
    return document
