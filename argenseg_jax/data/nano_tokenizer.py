"""The tokenizer of the nano model: a byte-level BPE trained on a fixed corpus."""

from __future__ import annotations

from collections.abc import Sequence

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from argenseg_jax.data.tokenizer import FastVocabulary, Tokenizer

_TEMPLATE_CORPUS = (
    "user\n",
    "assistant\n",
    "system\n",
    "Segment the",
    "Sure, the segmentation result: .",
    "Please segment the in this image.",
    "Please perform referring segmentation on this image.",
    "results are: .",
    "Given the following instructions: ;",
    "Segment the in the image.",
)
# The classes of CamVid.
_CLASS_CORPUS = " sky building pole road pavement tree sign fence car pedestrian bicyclist"
# "circles" is "circle" and "s": what is learned about one transfers to the other.
_PLURAL = r"(?<=\p{L}{3})s\b"
# Rare enough to be merged last, and enough of them to always fill the vocabulary.
_GLUE_CORPUS = (
    " a about an and are at be by can colour describe do find for from has have here how i image in "
    "is it mask me next no not of on or other person please picture show side smaller that their them "
    "there these they thing this to two under was what where which white who with you your "
    "0 1 2 3 4 5 6 7 8 9"
)


def nano_tokenizer(num_codes: int, corpus: Sequence[str], vocab_size: int = 496) -> Tokenizer:
    """A deterministic byte-level BPE: 256 bytes, merges of a fixed corpus, control tokens, codes.

    Args:
      num_codes: size of the codebook.
      corpus: phrases whose words become single tokens (those of the shapes grammar).
      vocab_size: text entries; rare words are split when they do not suffice. With 496, 15 control tokens
        and 256 codes fit into 3 * PAD_MULTIPLE entries.
    """
    model = tokenizers.Tokenizer(models.BPE())
    model.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(tokenizers.Regex(_PLURAL), "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    model.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        show_progress=False,
        min_frequency=1,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
    )
    phrases = [*_TEMPLATE_CORPUS, *(" " + text for text in corpus)]  # merges see leading spaces
    texts = [_GLUE_CORPUS, *[_CLASS_CORPUS] * 20, *phrases * 100]
    model.train_from_iterator(texts, trainer=trainer)
    return Tokenizer(FastVocabulary(model), num_codes)
