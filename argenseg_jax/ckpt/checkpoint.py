"""Any checkpoint seen alike: an Orbax step, a workdir, an HF folder, or the shipped `nano`."""
from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from etils import epath

from argenseg_jax import files, trees
from argenseg_jax.ckpt import orbax_io
from argenseg_jax.data.shapes import corpus
from argenseg_jax.data.tokenizer import VOCABULARIES, Tokenizer, nano_tokenizer
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
      config: the resolved config of the run that wrote it; `model` is always there.
    """

    path: epath.Path
    is_hf: bool
    config: Mapping[str, Any]

    def model(self, **overrides: Any) -> ARGenSeg:
        """The module that the weights belong to; overrides such as dtype='bfloat16'."""
        return variants.build({**self.config["model"], **overrides})

    def step(self) -> int | None:
        """Number of the step whose weights these are; None of an HF folder, or of weights without one."""
        name = "" if self.is_hf else orbax_io.find_step(self.path).name
        return int(name) if name.isdecimal() else None

    def load_params(self, optional: Sequence[str] = ()) -> dict[str, Any]:
        """The whole parameter tree as numpy arrays: averaged weights where the run kept some, and
        adapters merged into their kernels.

        Args:
          optional: regexes of leaves that an HF folder may lack; the result lacks them too.

        Raises:
          UserError: the files are broken, or do not fit the model of the config beside them.
        """
        model = self.model()
        if self.is_hf:
            return hf_folder.load_params(self.path, model, optional=optional)
        self.check_shapes()
        return self.adapters().merged(orbax_io.restore_params(self.path))

    def check_shapes(self) -> None:
        """UserError that lists what a step's arrays, adapters aside, have unlike the model."""
        step = orbax_io.find_step(self.path)
        plain, _ = trees.split(orbax_io.saved_params(step), lambda name: not is_adapter(name))
        trees.check_same(plain, hf_folder.param_shapes(self.model()), str(step))

    def adapters(self) -> Lora:
        """How adapters among the weights are to be merged; `load_params` has done it."""
        return Lora(**self.config.get("train", {}).get("lora", {}))

    def tokenizer(self) -> Tokenizer:
        """The tokenizer saved beside the weights."""
        folder = self._tokenizer_folder()
        return Tokenizer.load(folder, self.model().vocab.num_codes if folder == self.path else None)

    def has_tokenizer(self) -> bool:
        """Whether there is one."""
        return any((self._tokenizer_folder() / name).exists() for name in VOCABULARIES)

    def tokenizer_files(self) -> list[epath.Path]:
        """Its files, and others that belong to it, as they are copied beside the weights."""
        return hf_folder.tokenizer_files(self._tokenizer_folder())

    def _tokenizer_folder(self) -> epath.Path:
        folders = [f / TOKENIZER for f in (self.path, *list(self.path.parents)[:2])]
        return next((f for f in folders if f.is_dir()), self.path)


def open_checkpoint(path: str) -> Checkpoint:
    """Finds out what `path` is by its content; UserError if it is no checkpoint."""
    root = epath.Path(NANO if path == "nano" else path)
    if not root.exists():
        raise UserError(f"{root}: no such checkpoint")
    if root.is_dir() and hf_folder.is_hf(root):
        run = root / RUN_CONFIG
        config = files.read_json(run) if run.exists() else {}
        return Checkpoint(root, True, {**config, "model": hf_folder.model_cfg(root)})
    return Checkpoint(root, False, orbax_io.find_config(str(root)))


def tokenizer_for(model: ARGenSeg, source: Checkpoint | None) -> Tokenizer:
    """The tokenizer to train with: that of the source, or nano's own; it must fit the model."""
    tokenizer = source.tokenizer() if source else nano_tokenizer(model.vocab.num_codes, corpus())
    if tokenizer.vocab != model.vocab:
        raise UserError(f"the tokenizer's vocabulary {tokenizer.vocab} is not the model's "
                        f"{model.vocab}: set model.vocab to it, or init_from to a folder that holds "
                        "the model's own tokenizer")
    return tokenizer
