"""Every special token id, derived from one base id: text ids, 13 special tokens, then the codes.

The official order is `<img> </img> <IMG_CONTEXT> <quad> </quad> <ref> </ref> <box> </box> <mask>
<ge_start> <ge_end> <MASK_CONTEXT>`, followed by `<visual token 000000>` ... (4096 of them).
"""

from __future__ import annotations

import dataclasses

IMG_START, IMG_END, IMG_CONTEXT = "<img>", "</img>", "<IMG_CONTEXT>"
MASK, GE_START, GE_END, MASK_CONTEXT = "<mask>", "<ge_start>", "<ge_end>", "<MASK_CONTEXT>"
IM_START, IM_END = "<|im_start|>", "<|im_end|>"
SPECIAL_TOKENS = (
    IMG_START,
    IMG_END,
    IMG_CONTEXT,
    "<quad>",
    "</quad>",
    "<ref>",
    "</ref>",
    "<box>",
    "</box>",
    MASK,
    GE_START,
    GE_END,
    MASK_CONTEXT,
)
IGNORE = -100  # label of a place that is no target
PAD_MULTIPLE = 256  # the vocabulary in memory; divisible by any tensor-parallel degree in use


def visual_token(code: int) -> str:
    """The word of a code, as the official tokenizer spells it."""
    return f"<visual token {code:06d}>"


@dataclasses.dataclass(frozen=True)
class Vocab:
    """Ids of the extended vocabulary.

    Attributes:
      base: id of `<img>`, the first special token.
      num_codes: size of the VQ-VAE codebook.
      eos: id of `<|im_end|>`, which ends an answer.
      pad: id written at padded places.
    """

    base: int
    num_codes: int
    eos: int
    pad: int = 0

    def id(self, special: str) -> int:
        """Id of one of the 13 special tokens."""
        return self.base + SPECIAL_TOKENS.index(special)

    @property
    def img_context(self) -> int:
        return self.id(IMG_CONTEXT)

    @property
    def ge_start(self) -> int:
        return self.id(GE_START)

    @property
    def ge_end(self) -> int:
        return self.id(GE_END)

    @property
    def mask_context(self) -> int:
        return self.id(MASK_CONTEXT)

    @property
    def first_code(self) -> int:
        """Id of code 0."""
        return self.base + len(SPECIAL_TOKENS)

    @property
    def size(self) -> int:
        """Number of words: text, special tokens and codes."""
        return self.first_code + self.num_codes

    @property
    def padded_size(self) -> int:
        """Rows of the embedding and columns of the head in memory."""
        return -(-self.size // PAD_MULTIPLE) * PAD_MULTIPLE
