"""The gate for files: lines one at a time, parts written as one file, a folder tried before the work."""

import codecs
import os

import pytest

from argenseg_jax import files
from argenseg_jax.data.mixture import open_source
from argenseg_jax.errors import UserError


@pytest.mark.parametrize(
    "content, lines",
    [
        (b"a\r\n\n \t\r\nb", [(1, "a\r\n"), (4, "b")]),
        (codecs.BOM_UTF8 + "ä\nb\n".encode(), [(1, "ä\n"), (2, "b\n")]),
        ("ä\nb".encode("utf-16"), [(1, "ä\n"), (2, "b")]),
        (b"", []),
    ],
)
def test_lines_of_every_encoding(tmp_path, content, lines):
    (tmp_path / "f").write_bytes(content)
    assert list(files.read_lines(tmp_path / "f")) == lines


def test_what_is_no_text_is_named_by_its_line(tmp_path, monkeypatch):
    path = tmp_path / "f"
    path.write_bytes(b"a\nb\n\xff\n")
    with pytest.raises(UserError, match="f:3: no UTF-8 text"):
        list(files.read_lines(path))
    monkeypatch.setattr(files, "MAX_LINE", 3)
    path.write_bytes(b"a\nbbbbb\n")
    with pytest.raises(UserError, match="f:2: longer than 3"):
        list(files.read_lines(path))
    for other in ("/dev/zero", tmp_path, tmp_path / "none", f"{tmp_path}\0"):
        with pytest.raises(UserError):
            list(files.read_lines(other))


def test_text_without_a_byte_order_mark_is_utf_8(tmp_path):
    (tmp_path / "f").write_bytes("wall\n".encode("utf-16-le"))  # all bytes of it are UTF-8, too
    with pytest.raises(UserError, match="f: byte 1 is 0, as in UTF-16 without a byte order mark"):
        files.read_text(tmp_path / "f")


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="needs Linux's /proc")
def test_files_of_no_size_are_empty_whatever_reading_them_would_give():
    # As /proc/kmsg, a regular file that never ends: this one would give text.
    assert os.stat("/proc/self/status").st_size == 0
    assert files.read_bytes("/proc/self/status") == b""
    assert not list(files.read_lines("/proc/self/status"))
    with pytest.raises(UserError, match="no samples"):
        open_source("jsonl:/proc/self/status")


def test_a_file_of_parts_is_whole_or_not_there(tmp_path):
    files.write(tmp_path / "f", (f"{k}\n" for k in range(3)))
    assert (tmp_path / "f").read_text() == "0\n1\n2\n"
    with pytest.raises(ZeroDivisionError):
        files.write(tmp_path / "f", (str(1 // (2 - k)) for k in range(3)))
    assert (tmp_path / "f").read_text() == "0\n1\n2\n"


def test_a_folder_is_tried_and_left_as_it_was(tmp_path):
    files.check_writable(tmp_path / "a" / "b")
    assert not list(tmp_path.iterdir())
    (tmp_path / "f").write_text("")
    for bad in (tmp_path / "f" / "x", tmp_path / ("x" * 300), f"{tmp_path}/a\0b", "/proc/none/x"):
        with pytest.raises(UserError, match="cannot be written|is no name of a file"):
            files.check_writable(bad)
    assert os.listdir(tmp_path) == ["f"]
