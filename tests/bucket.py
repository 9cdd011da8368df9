"""gs:// in memory: what etils asks gcsfs for goes to fsspec's memory file system."""

import contextlib

import fsspec
from etils.epath import backend
from fsspec.implementations.memory import MemoryFileSystem
from fsspec.registry import _registry


class _Bucket(MemoryFileSystem):
    protocol = ("gcs", "gs")
    store: dict = {}
    pseudo_dirs: list = [""]
    cachable = False

    @classmethod
    def _strip_protocol(cls, path):
        return super()._strip_protocol(path.removeprefix("gs://"))


@contextlib.contextmanager
def in_memory():
    """Within the block gs://... is an empty file system of this process; yields its files as a dict."""
    _Bucket.store.clear()
    _Bucket.pseudo_dirs[:] = [""]
    known = {name: _registry.get(name) for name in _Bucket.protocol}
    for name in _Bucket.protocol:
        fsspec.register_implementation(name, _Bucket, clobber=True)
    type(backend.fsspec_backend)._get_filesystem.cache_clear()
    try:
        yield _Bucket.store
    finally:
        for name, implementation in known.items():
            if implementation is None:
                _registry.pop(name, None)
            else:
                fsspec.register_implementation(name, implementation, clobber=True)
        type(backend.fsspec_backend)._get_filesystem.cache_clear()
