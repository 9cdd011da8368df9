"""The field's words: private ones do not come back."""

import pathlib
import re

import pytest

ROOT = pathlib.Path(__file__).parent.parent / "argenseg_jax"
# pattern -> packages where it may not stand ("" is the whole package); docs: CONTRIBUTING.md, "Words".
FORBIDDEN = {
    r"goes on|go on with": "",
    r"so many": "",
    r"has no place": "",
    r"\bbehind\b": "",
    r"\binto_[qkvx]\b|\binto_(kernel|head)\b": "",
    r"\bSPEC \d": "",
    r"\bvocab_rows\b|\bby_rows\b|\bin_pieces\b|\b_turned\b": "",
    r"\bturns\b": "models",
    r"\bwithin=|\badvance=": "models decode",
    r"\b(twins|paired|falling)\b": "decode",
    r"\bMaskCoder\b|\bBroken\b|\bstrange\b": "",
    r"\bpictures?\b": "models decode train compile ckpt interop parity",
    r"\bhosts\.[a-z]": "",
}


@pytest.mark.parametrize("pattern", FORBIDDEN)
def test_private_words_do_not_come_back(pattern):
    for package in FORBIDDEN[pattern].split() or [""]:
        for path in sorted((ROOT / package).rglob("*.py")):
            for number, line in enumerate(path.read_text().splitlines(), 1):
                assert not re.search(pattern, line), f"{path.relative_to(ROOT)}:{number}: {line.strip()}"
