"""PyTorch's own weight files (.pth, .pt, .bin), by torch.load with weights_only=True.

That runs nothing of a stranger's, but hashes, prints and allocates what he likes: a nested tuple of
one megabyte ends the process. So the pickles of a file are gone through first, without being run:
no more passes than state dicts consist of.
"""

from __future__ import annotations

import dataclasses
import functools
import os
import pickletools
import tarfile
import warnings
import zipfile
from collections.abc import Callable, Mapping, Sequence
from typing import IO, Any

import ml_dtypes
import numpy as np
from etils import epath

from argenseg_jax import files
from argenseg_jax.errors import UserError, brief

Found = tuple[tuple[int, ...], np.dtype, Callable[[], np.ndarray]]
# So much of a file may be mapped into memory before it is mapped anew.
_MAPPED_BYTES = 1 << 30
_MAX_PICKLE = 64 << 20  # bytes; a state dict has some 200 a tensor
_MAX_NESTING = 32
_MAX_SHARED = 10_000_000  # items of containers that a pickle refers to again
_LEGACY_PICKLES = 5  # magic number, protocol, system, content, keys of the storages


def open_tensors(file: epath.Path, size: int) -> dict[str, Found]:
    """{key: (shape, dtype, how to read it)} of a file of `size` bytes.

    Raises:
      UserError: no file of tensors under their names, or torch is absent.
    """
    opened = _TorchFile(file)
    return {key: opened.describe(key, size) for key in opened.state}


class _TorchFile:
    """A PyTorch state dict, mapped into memory anew whenever much of it has been read."""

    def __init__(self, file: epath.Path):
        self._file, self._touched = file, 0
        self.state = self._load()

    def describe(self, key: str, size: int) -> Found:
        """Shape, dtype, and how to read it; ValueError for what is no plain array within the file."""
        import torch  # pylint: disable=g-import-not-at-top

        tensor = self.state[key]
        if tensor.layout != torch.strided or tensor.is_quantized or tensor.device.type != "cpu":
            raise ValueError(f"'{key}' is no plain tensor ({brief(tensor.layout)}, {tensor.dtype})")
        if tensor.numel() * tensor.element_size() > size:
            raise ValueError(f"'{key}' {tuple(tensor.shape)} is larger than the file")
        name = str(tensor.dtype).removeprefix("torch.")
        dtype = np.dtype(getattr(ml_dtypes, name, None) or name)
        return tuple(tensor.shape), dtype, functools.partial(self.read, key)

    def read(self, key: str) -> np.ndarray:
        """A copy as a numpy array, bit for bit (bfloat16 included)."""
        import torch

        if self._touched > _MAPPED_BYTES:
            self.state, self._touched = self._load(), 0
        tensor = self.state[key].detach().resolve_conj().resolve_neg().contiguous()
        self._touched += tensor.nbytes
        if tensor.dtype == torch.bfloat16:
            return tensor.view(torch.int16).numpy().view(ml_dtypes.bfloat16).copy()
        return tensor.numpy().copy()

    def _load(self) -> dict[str, Any]:
        try:
            import torch
        except ImportError:
            raise UserError(
                f"{self._file} needs PyTorch to be read: `pip install torch`, or convert it to .safetensors elsewhere"
            ) from None
        try:
            with warnings.catch_warnings(), self._file.open("rb") as stream:
                warnings.simplefilter("ignore")
                as_zip = zipfile.is_zipfile(stream)
                (_check_zip if as_zip else _check_legacy)(stream)
                load = functools.partial(torch.load, map_location="cpu", weights_only=True)
                if as_zip and not files.is_remote(self._file):
                    state = load(os.fspath(self._file), mmap=True)
                else:  # a remote file, or the format of torch before 1.6
                    stream.seek(0)
                    state = load(stream)
        except Exception as error:  # torch raises many kinds; all mean that the file is not usable
            reason = brief(str(error).partition("\n")[0]) or type(error).__name__
            raise UserError(f"{self._file} cannot be read as PyTorch weights (weights_only): {reason}") from None
        return self._tensors(state, torch.is_tensor)

    def _tensors(self, state: Any, is_tensor: Callable[[Any], bool]) -> dict[str, Any]:
        """The tensors of what was loaded, which may stand below a name of their own."""
        for _ in range(4):
            if isinstance(state, Mapping) and any(map(is_tensor, state.values())):
                break
            inner = state if isinstance(state, Mapping) else {}
            state = next((inner[k] for k in ("state_dict", "model", "module") if k in inner), None)
        if not isinstance(state, Mapping):
            raise UserError(f"{self._file} holds no tensors under their names")
        found = {key: value for key, value in state.items() if is_tensor(value)}
        if unexpected := [key for key in found if not isinstance(key, str)]:
            raise UserError(f"{self._file} has a tensor under {brief(repr(unexpected[0]), 60)}, which is no name")
        return found


# ------------------------------------------------------------------ what is in a file


def _check_zip(stream: IO[bytes]) -> None:
    """ValueError where the parts are compressed or overlap, or the pickle is not plain or does not match the file."""
    with zipfile.ZipFile(stream) as parts:
        infos = {info.filename: info for info in parts.infolist()}
        if any(info.compress_type != zipfile.ZIP_STORED for info in infos.values()):
            raise ValueError("its parts are compressed, as torch never writes them")
        if sum(info.file_size for info in infos.values()) > stream.seek(0, os.SEEK_END):
            raise ValueError("its parts are larger than the file")
        found = [name for name in infos if name.rpartition("/")[2] == "data.pkl"]
        if len(found) != 1:
            raise ValueError("it is a zip, but not of torch's: there is no data.pkl")
        with parts.open(found[0]) as part:
            storages = check_pickle(part)
    folder = found[0].removesuffix("data.pkl")
    for key, size in storages.items():
        part = infos.get(f"{folder}data/{key}")
        if part is None or part.file_size != size:
            raise ValueError(
                f"the array data/{brief(key, 40)} of {size} bytes "
                + ("is not there" if part is None else f"has {part.file_size}")
            )


def _check_legacy(stream: IO[bytes]) -> None:
    """ValueError where one of the pickles that torch would read before the arrays is not plain."""
    stream.seek(0)
    if tarfile.is_tarfile(stream):
        raise ValueError("a tar archive, which torch wrote before 0.1.10; save it anew with torch")
    stream.seek(0)
    if (first := stream.read(2)) != b"\x80\x02":
        raise ValueError("a zip that is cut off" if first == b"PK" else "it does not begin as torch's files do")
    stream.seek(0)
    for _ in range(_LEGACY_PICKLES):
        check_pickle(stream)


@dataclasses.dataclass(slots=True, eq=False)
class _Node:
    """What a pickle would put on the stack.

    Attributes:
      value: of a leaf: the number or text; of a GLOBAL: 'module name'; of an array's memory: its
        number of elements.
      children: of a tuple.
      depth: how deeply containers are nested in it; 0 = no container.
      items: of a container.
      shared: whether it is referred to a second time.
    """

    value: Any = None
    children: tuple[_Node, ...] = ()
    depth: int = 0
    items: int = 0
    shared: bool = False

    def take(self, children: Sequence[_Node]) -> None:
        """More items of a container."""
        if self.shared:
            raise ValueError("it changes what it refers to")
        self.depth = max([self.depth, 1, *(child.depth + 1 for child in children)])
        self.items += len(children)
        if self.depth > _MAX_NESTING:
            raise ValueError(f"it is nested more than {_MAX_NESTING} deep")


_MARK = _Node()
_LEAVES = {
    "NONE",
    "NEWTRUE",
    "NEWFALSE",
    "BININT",
    "BININT1",
    "BININT2",
    "LONG1",
    "BINFLOAT",
    "BINUNICODE",
    "SHORT_BINSTRING",
    "GLOBAL",
}
_CONTAINERS = {"EMPTY_LIST", "EMPTY_DICT", "EMPTY_SET", "EMPTY_TUPLE"}
_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
_TAKEN = {"APPEND": 1, "SETITEM": 2, "BUILD": 1}  # these join the container below them
_MARKED = {"APPENDS", "SETITEMS"}
# The functions that may be called, and whether their result is a container.
_REBUILD = {f"torch._utils _rebuild_{name}" for name in ("tensor", "tensor_v2", "tensor_v3")}
_CALLED = {
    **dict.fromkeys(_REBUILD, False),
    "torch._utils _rebuild_parameter": False,
    "torch._utils _rebuild_parameter_with_state": False,
    "torch device": False,
    "collections OrderedDict": True,
    "builtins set": True,
    "__builtin__ set": True,
}
_ELEMENT = {
    name: size
    for size, names in {
        1: "Untyped Byte Char Bool QUInt8 QInt8",
        2: "Half BFloat16 Short",
        4: "Float Int QInt32",
        8: "Double Long ComplexFloat",
        16: "ComplexDouble",
    }.items()
    for name in names.split()
}


def check_pickle(stream: IO[bytes]) -> dict[str, int]:
    """Goes through one pickle up to its STOP; nothing of it is built.

    A container of containers may be referred to once only: what hashes or prints the result takes no
    longer then than the file is.

    Returns:
      {key: bytes} of the arrays' memory.

    Raises:
      ValueError: a call or an opcode that no state dict needs, an array beyond its memory, or what
        torch would choke on.
    """
    stack: list[_Node] = []
    memo: dict[int, _Node] = {}
    storages: dict[str, int] = {}
    total, begin = 0, None
    for code, argument, position in pickletools.genops(stream):
        name = code.name
        begin = position if begin is None else begin
        if position - begin > _MAX_PICKLE:
            raise ValueError("its pickle is too long")
        if name == "STOP":
            return storages
        if name == "PROTO":
            pass
        elif name == "MARK":
            stack.append(_MARK)
        elif name in _LEAVES:
            stack.append(_Node(argument))
        elif name in _CONTAINERS:
            stack.append(_Node(depth=1))
        elif name in _TUPLES or name == "TUPLE":
            children = _pop(stack, _TUPLES[name]) if name in _TUPLES else _since_mark(stack)
            stack.append(_Node(children=tuple(children)))
            stack[-1].take(children)
        elif name in _TAKEN or name in _MARKED:
            children = _pop(stack, _TAKEN[name]) if name in _TAKEN else _since_mark(stack)
            stack[-1].take(children)
        elif name == "REDUCE":
            stack.append(_call(*_pop(stack, 2)))
        elif name == "BINPERSID":
            key, size, node = _storage(stack.pop())
            if storages.setdefault(key, size) != size:
                raise ValueError(f"the array '{brief(key, 40)}' has two sizes")
            stack.append(node)
        elif name in ("BINPUT", "LONG_BINPUT"):
            memo[argument] = stack[-1]
        elif name in ("BINGET", "LONG_BINGET"):
            stack.append(node := memo[argument])
            if node.depth:
                node.shared = True
                total += 1 + node.items
            if node.depth > 1 or total > _MAX_SHARED:
                raise ValueError("it refers to containers again and again")
        else:
            raise ValueError(f"its pickle holds more than weights (opcode {name})")
    raise EOFError("it ends too early")


def _call(function: _Node, arguments: _Node) -> _Node:
    """The result of a call, which is checked where it makes a tensor."""
    if function.value not in _CALLED:
        raise ValueError(f"its pickle calls {brief(str(function.value), 60)}, as weights never do")
    if function.value in _REBUILD:
        storage, offset, size, stride = arguments.children[:4]
        sides, steps = ([child.value for child in node.children] for node in (size, stride))
        if not all(type(n) is int and n >= 0 for n in [offset.value, *sides, *steps]):
            raise ValueError(f"it has a tensor of the shape {brief(repr(sides), 60)}")
        last = offset.value + sum((n - 1) * step for n, step in zip(sides, steps, strict=True))
        if 0 not in sides and last >= storage.value:
            raise ValueError(f"a tensor {sides} is larger than its array of {storage.value}")
    node = _Node()
    if _CALLED[function.value]:
        node.take([arguments])
    return node


def _storage(reference: _Node) -> tuple[str, int, _Node]:
    """(key, bytes, node that has the number of elements) of what a persistent id refers to."""
    kind, dtype, key, _, count = (child.value for child in reference.children[:5])
    element = str(dtype).removeprefix("torch ").removeprefix("torch.storage ").removesuffix("Storage")
    if kind != "storage" or element not in _ELEMENT or type(count) is not int or count < 0:
        raise ValueError(f"it refers to {brief(repr([kind, dtype, key, count]), 80)}")
    return str(key), count * _ELEMENT[element], _Node(count)


def _pop(stack: list[_Node], count: int) -> list[_Node]:
    if len(stack) < count or _MARK in stack[-count:]:
        raise ValueError("it takes from an empty stack")
    items = stack[-count:]
    del stack[-count:]
    return items


def _since_mark(stack: list[_Node]) -> list[_Node]:
    items = []
    while (node := stack.pop()) is not _MARK:
        items.append(node)
    return items[::-1]
