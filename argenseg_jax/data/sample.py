"""The one record that every data source yields."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np


def is_generated(images: Sequence[np.ndarray], meta: Mapping[str, Any]) -> bool:
    """Whether a sample's targets are images to be generated, which are not changed as masks are.

    True for a sample without an input image (text-to-image) and for the metric `fidelity`.
    """
    return not len(images) or meta.get("metric") == "fidelity"


@dataclasses.dataclass(frozen=True)
class Sample:
    """A conversation with its images and masks, decoded but not yet resized.

    Attributes:
      conversations: [{'from': 'system'|'human'|'gpt', 'value': text with <image> and <mask>}].
      images: u8[H, W, 3] each, in the order of the `<image>` placeholders.
      masks: u8[H, W] with values 0 and 255, or u8[H, W, 3] for an image to be generated, in the
        order of the `<mask>` placeholders of the answers.
      meta: where the sample came from (source, file, line, id, kind, ...), for messages and reports.
      codes: i32[M, N], the codes of the masks, where `prepare --codes` stored them.
    """

    conversations: Sequence[Mapping[str, str]]
    images: Sequence[np.ndarray] = ()
    masks: Sequence[np.ndarray] = ()
    meta: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    codes: np.ndarray | None = None

    @property
    def generated(self) -> bool:
        """Whether the masks are images to be generated."""
        return is_generated(self.images, self.meta)

    @property
    def name(self) -> str:
        """What messages call the sample: its file and line, or its source and id."""
        return str(self.meta.get("line") or f"{self.meta.get('source', 'sample')}:{self.meta.get('id', '?')}")
