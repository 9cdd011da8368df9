"""The one record that every data source yields."""
from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np


@dataclasses.dataclass(frozen=True)
class Sample:
    """A conversation with its pictures, decoded but not yet resized.

    Attributes:
      conversations: [{'from': 'system'|'human'|'gpt', 'value': text with <image> and <mask>}].
      images: u8[H, W, 3] each, in the order of the `<image>` places.
      masks: u8[H, W] with values 0 and 255, or u8[H, W, 3] for a picture to be generated, in the
        order of the `<mask>` places of the answers.
      meta: where the sample came from (source, file, line, id, kind, ...), for messages and reports.
      codes: i32[M, N], the masks as the VQ-VAE writes them, where `prepare --codes` has kept them.
    """

    conversations: Sequence[Mapping[str, str]]
    images: Sequence[np.ndarray] = ()
    masks: Sequence[np.ndarray] = ()
    meta: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    codes: np.ndarray | None = None
