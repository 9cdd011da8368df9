"""Conversations -> token ids and labels: the `internvl2_5` template and the official label rules.

A turn is one piece: `<|im_start|>role\\n` text `<|im_end|>\\n`. Pieces are tokenised one by one,
and so are the texts between control tokens in a piece (official preprocess_internvl2_5).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

import numpy as np

from argenseg_jax.data.tokenizer import Tokenizer, TokenPiece
from argenseg_jax.errors import SampleError, brief
from argenseg_jax.vocab import IGNORE, IMG_END, IMG_START, MASK

OFFICIAL_SYSTEM = (
    "你是书生·万象，英文名是InternVL，是由上海人工智能实验室、清华大学及多家合作单位联合开发的多模态大语言模型。"
)
IMAGE = "<image>"  # a place in a text, not a token
ROLES = {"system": "system", "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant"}
LONE_SURROGATE = re.compile("[\ud800-\udfff]")  # one of the two units of an emoji: scraped texts are cut so
UNCONDITIONAL = "Please generate a picture about nothing."  # the unconditional prompt of guidance

Conversations = Sequence[Mapping[str, str]]


def encode_training(
    conversations: Conversations,
    tokenizer: Tokenizer,
    tiles_per_image: Sequence[int] = (),
    *,
    image_tokens: int,
    code_tokens: int,
    num_masks: int | None = None,
    system: str | None = None,
    image_last: bool = False,
    name: str = "sample",
) -> tuple[np.ndarray, np.ndarray]:
    """Ids and labels of one training sample.

    Args:
      conversations: [{'from': 'system'|'human'|'gpt', 'value': text}] with `<image>` in human and
        `<mask>` in gpt turns.
      tokenizer: vocabulary in use.
      tiles_per_image: tiles of each image, in the order of the `<image>` places.
      image_tokens: `<IMG_CONTEXT>` tokens of one tile.
      code_tokens: N, codes of one mask.
      num_masks: masks that the sample has; None skips the check.
      system: system message; '' for none, None for the official one. The conversation's own wins.
      image_last: puts the images behind the text of their turn.
      name: names the sample in messages.

    Returns:
      tokens i32[T] and labels i32[T], unshifted: IGNORE, a text id, or `<MASK_CONTEXT>` at each of
      the N places of a code (the N-1 `<MASK_CONTEXT>` inputs and `<ge_end>`).

    Raises:
      SampleError: unknown roles, or places that do not match the images and masks.
    """
    turns = _turns(conversations, len(tiles_per_image), system, image_last, name)
    if num_masks is not None:
        _check_masks(turns, num_masks, name)
    header = len(tokenizer.encode([tokenizer.im_start, "assistant\n"]))
    vocab = tokenizer.vocab
    tokens, labels = _start(tokenizer)
    images = [_image(tokenizer, n * image_tokens) for n in tiles_per_image]
    mask = [vocab.ge_start, *[vocab.mask_context] * (code_tokens - 1), vocab.ge_end]
    for role, text in turns:
        ids = tokenizer.encode(_piece(tokenizer, role, _parts(role, text, images, mask)))
        tokens += ids
        if role == "assistant":
            labels += [IGNORE] * header + ids[header:-1] + [IGNORE]
        else:
            labels += [IGNORE] * len(ids)
    labels = np.asarray(labels, np.int32)
    labels[labels == vocab.ge_end] = vocab.mask_context
    return np.asarray(tokens, np.int32), labels


def encode_query(
    conversations: Conversations | str,
    tokenizer: Tokenizer,
    tiles_per_image: Sequence[int] = (),
    *,
    image_tokens: int,
    system: str | None = None,
    image_last: bool = False,
    name: str = "query",
) -> np.ndarray:
    """Ids i32[T] of a question, up to and including `<|im_start|>assistant\\n`.

    A text is a single human turn. Of earlier answers only the text remains, as officially.
    """
    if isinstance(conversations, str):
        conversations = [{"from": "human", "value": conversations}]
    turns = _turns(conversations, len(tiles_per_image), system, image_last, name)
    if not turns or turns[-1][0] != "user":
        raise SampleError(f"{name}: a query ends with a human turn")
    images = [_image(tokenizer, n * image_tokens) for n in tiles_per_image]
    tokens, _ = _start(tokenizer)
    for role, text in turns:
        tokens += tokenizer.encode(_piece(tokenizer, role, _parts(role, text, images, [])))
    return np.asarray(tokens + tokenizer.encode([tokenizer.im_start, "assistant\n"]), np.int32)


def check(conversations: Conversations, num_images: int, num_masks: int, name: str = "sample") -> None:
    """SampleError where the roles or the number of places would make `encode_training` refuse it."""
    _check_masks(_turns(conversations, num_images, "", False, name), num_masks, name)


def check_turns(conversations: Conversations, name: str = "sample") -> None:
    """SampleError unless every turn has a known role and a text."""
    _roles(conversations, name)


def is_human(turn: Mapping[str, str]) -> bool:
    """Whether a turn is the user's, by either of its names ("human" officially, "user" elsewhere)."""
    who = turn.get("from") if isinstance(turn, Mapping) else None
    return isinstance(who, str) and ROLES.get(who) == "user"


def query_turns(conversations: Conversations, name: str = "sample") -> list[Mapping[str, str]]:
    """The turns before the first answer with a mask (before the last answer where none has one)."""
    roles = _roles(conversations, name)
    answers = [k for k, (role, _) in enumerate(roles) if role == "assistant"]
    masked = [k for k in answers if MASK in roles[k][1]]
    if not answers:
        return list(conversations)
    turns = list(conversations[: (masked or answers[-1:])[0]])
    if not turns:
        raise SampleError(f"{name}: the answer comes before any question")
    return turns


def _turns(conversations, num_images, system, image_last, name) -> list[tuple[str, str]]:
    """[(role, text)] with the system turn in front and every `<image>` where it belongs."""
    turns = _roles(conversations, name)
    if turns and turns[0][0] == "system":
        system = turns.pop(0)[1]
    elif system is None:
        system = OFFICIAL_SYSTEM
    users = [k for k, (role, _) in enumerate(turns) if role == "user"]
    places = sum(turns[k][1].count(IMAGE) for k in users)
    if users and num_images and not places:
        turns[users[0]] = ("user", f"{IMAGE}\n" * num_images + turns[users[0]][1])
    elif places != num_images:
        raise SampleError(f"{name}: {places} {IMAGE} placeholders in the questions for {num_images} images")
    if image_last:
        turns = [(role, _image_last(text) if role == "user" else text) for role, text in turns]
    return ([("system", system)] if system else []) + turns


def _check_masks(turns: Sequence[tuple[str, str]], num_masks: int, name: str) -> None:
    places = sum(text.count(MASK) for role, text in turns if role == "assistant")
    if places != num_masks:
        raise SampleError(f"{name}: {places} {MASK} placeholders in the answers for {num_masks} masks")


def _roles(conversations: Conversations, name: str) -> list[tuple[str, str]]:
    """[(role, text)], checked."""
    turns = []
    for turn in conversations:
        try:
            turns.append((ROLES[turn["from"]], turn["value"]))
        except (KeyError, TypeError):
            turns.append((None, None))
        if not isinstance(turns[-1][1], str):
            raise SampleError(
                f"{name}: a turn must be {{'from': system|human|gpt, 'value': text}}, not {brief(turn, 80)}"
            )
        if half := LONE_SURROGATE.search(turns[-1][1]):
            raise SampleError(
                f"{name}: the text holds half a character (the lone surrogate "
                f"U+{ord(half[0]):04X}), which no tokenizer encodes"
            )
    return turns


def _image_last(text: str) -> str:
    """'<image>\\nSegment it.' -> 'Segment it.\\n<image>'; images inside a sentence stay there."""
    leading = re.match(rf"(?:{IMAGE}\s*)+", text)
    if leading is None:
        return text
    images = leading[0].count(IMAGE)
    return "\n".join([text[leading.end() :].rstrip(), *[IMAGE] * images])


def _start(tokenizer: Tokenizer) -> tuple[list[int], list[int]]:
    return ([], []) if tokenizer.bos is None else ([tokenizer.bos], [IGNORE])


def _image(tokenizer: Tokenizer, slots: int) -> list[int]:
    vocab = tokenizer.vocab
    return [vocab.id(IMG_START), *[vocab.img_context] * slots, vocab.id(IMG_END)]


def _piece(tokenizer: Tokenizer, role: str, parts: Sequence[TokenPiece]) -> list[TokenPiece]:
    return [tokenizer.im_start, f"{role}\n", *parts, tokenizer.vocab.eos, "\n"]


def _parts(role: str, text: str, images: list[list[int]], mask: Sequence[int]) -> list[TokenPiece]:
    """Cuts a text at its places; takes the images it uses off the list."""
    if role == "user":
        first, *rest = text.split(IMAGE)
        return [first, *(part for after in rest for part in (*images.pop(0), after))]
    if role == "assistant":
        first, *rest = text.split(MASK)
        return [first, *(part for after in rest for part in (*mask, after))]
    return [text]
