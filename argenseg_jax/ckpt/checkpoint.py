"""One interface to every kind of checkpoint: an Orbax step, a workdir, an HF folder, or the shipped `nano`."""

from __future__ import annotations

import dataclasses
import functools
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from etils import epath

from argenseg_jax import config_keys, files, trees
from argenseg_jax.ckpt import orbax_io
from argenseg_jax.data.nano_tokenizer import nano_tokenizer
from argenseg_jax.data.synthetic.shapes import corpus
from argenseg_jax.data.tokenizer import VOCABULARIES, Tokenizer
from argenseg_jax.errors import UserError
from argenseg_jax.interop import hf_folder
from argenseg_jax.models import variants
from argenseg_jax.models.argenseg import ARGenSeg
from argenseg_jax.models.lora import Lora, is_adapter

NANO = pathlib.Path(__file__).parent.parent / "assets" / "nano"
RUN_CONFIG = "run_config.json"  # in an HF folder: the config of the run that trained it
TOKENIZER = "tokenizer"  # folder within a workdir


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """Where weights are, and the config to use them with.

    Attributes:
      path: the folder.
      is_hf: official key names in safetensors, otherwise Orbax.
      config: the resolved config of the run that wrote it; it always has `model`.
      checksums: whether those of an Orbax step are checked before its weights are read.
    """

    path: epath.Path
    is_hf: bool
    config: Mapping[str, Any]
    checksums: bool = True

    def model(self, **overrides: Any) -> ARGenSeg:
        """The module of the weights; overrides such as dtype='bfloat16'."""
        return variants.build({**self.config["model"], **overrides})

    def step(self) -> int | None:
        """Number of the step of the weights; None for an HF folder, or for weights without one."""
        name = "" if self.is_hf else orbax_io.find_step(self.path).name
        return int(name) if name.isdecimal() else None

    def load_params(self, optional: Sequence[str] = ()) -> dict[str, Any]:
        """The complete parameter tree as numpy arrays: the averaged weights if the run has an average, and
        adapters merged into their kernels.

        Args:
          optional: regexes of leaves that an HF folder may lack; the result lacks them too.

        Raises:
          UserError: the files are damaged, or do not match the model of their config.
        """
        model = self.model()
        if self.is_hf:
            return hf_folder.load_params(self.path, model, optional=optional)
        self.check_shapes()
        return self.adapters().merged(orbax_io.restore_params(self.path, checksums=self.checksums))

    def load_part(self, part: str) -> dict[str, Any]:
        """One part ('vqvae') of what `load_params` returns; reads only this part."""
        if self.is_hf:
            return hf_folder.load_part(self.path, self.model(), part)
        self.check_shapes()
        leaves = self.adapters().merged_lazily(orbax_io.open_params(self.path, part, checksums=self.checksums))
        return trees.unflatten({name: leaf[...] for name, leaf in leaves.items()})[part]

    def check_shapes(self) -> None:
        """UserError that lists how a step's arrays, except adapters, differ from the model's."""
        step = orbax_io.find_step(self.path)
        plain, _ = trees.split(orbax_io.saved_params(step), lambda name: not is_adapter(name))
        trees.check_same(plain, hf_folder.param_shapes(self.model()), str(step))

    def adapters(self) -> Lora:
        """How to merge the adapters among the weights; `load_params` does it."""
        return Lora(**self.config.get("train", {}).get("lora", {}))

    def tokenizer(self) -> Tokenizer:
        """The tokenizer saved with the weights."""
        folder = self._tokenizer_folder()
        return Tokenizer.load(folder, self.model().vocab.num_codes if folder == self.path else None)

    def has_tokenizer(self) -> bool:
        """Whether there is one."""
        return any((self._tokenizer_folder() / name).exists() for name in VOCABULARIES)

    def tokenizer_files(self) -> list[epath.Path]:
        """Its files, and others that belong to it, to be copied with the weights."""
        return hf_folder.tokenizer_files(self._tokenizer_folder())

    def _tokenizer_folder(self) -> epath.Path:
        """An HF folder itself; for a step, the one in its workdir. Folders further up are not searched."""
        if self.is_hf:
            return self.path
        folder = orbax_io.find_run(self.path) / TOKENIZER
        return folder if folder.is_dir() else self.path


def open_checkpoint(path: str, *, checksums: bool = True) -> Checkpoint:
    """Detects by its content what kind of checkpoint `path` is.

    Raises:
      UserError: no checkpoint, or a config.json with an invalid value.
    """
    root = files.to_path(NANO if path == "nano" else path)
    if not root.exists():
        raise UserError(f"{root}: no such checkpoint")
    if root.is_dir() and hf_folder.is_hf(root):
        run = root / RUN_CONFIG
        config = files.read_json(run) if run.exists() else {}
        config_keys.check(config, saved=str(run))
        config = {**config, "model": hf_folder.model_cfg(root, functools.partial(_ids, root))}
        return Checkpoint(root, True, config, checksums)
    file = orbax_io.find_run(root) / orbax_io.CONFIG
    config = files.read_json(file)
    config_keys.check(config, saved=str(file))
    if "model" not in config:
        raise UserError(f"{file} has no section `model`")
    try:
        variants.resolve(config["model"])
    except UserError as error:
        raise UserError(f"{file}: {error}") from None
    return Checkpoint(root, False, config, checksums)


def _ids(folder: epath.Path, num_codes: int) -> dict[str, int] | None:
    """The ids of the tokenizer of a folder."""
    if not any((folder / name).exists() for name in VOCABULARIES):
        return None
    vocab = Tokenizer.load(folder, num_codes).vocab
    return {"base": vocab.base, "eos": vocab.eos, "pad": vocab.pad}


def tokenizer_for(model: ARGenSeg, source: Checkpoint | None) -> Tokenizer:
    """The tokenizer to train with: that of the source, or nano's; it must match the model."""
    tokenizer = source.tokenizer() if source else nano_tokenizer(model.vocab.num_codes, corpus())
    if tokenizer.vocab != model.vocab:
        raise UserError(
            f"the tokenizer's vocabulary {tokenizer.vocab} is not the model's "
            f"{model.vocab}: set model.vocab to it, or init_from to a folder that holds "
            "the model's own tokenizer"
        )
    return tokenizer
