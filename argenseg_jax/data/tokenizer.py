"""Text <-> ids for sentencepiece (InternLM2) and `tokenizers` (Qwen2.5, nano) vocabularies.

Control tokens are passed as ids. One that is spelled out in a text is encoded as plain characters, so no
text can open a turn, an image or a mask.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import sentencepiece
import tokenizers
from etils import epath
from tokenizers import decoders, models, normalizers, pre_tokenizers

from argenseg_jax import files
from argenseg_jax import vocab as vocab_lib
from argenseg_jax.errors import UserError, brief, located

TokenPiece = str | int  # a text to be encoded, or the id of a control token
# Markup that may be written in a text: it has no effect by itself.
MARKUP = tuple(t for t in vocab_lib.SPECIAL_TOKENS if re.fullmatch(r"</?(quad|ref|box|mask)>", t))
VOCABULARIES = ("tokenizer.model", "tokenizer.json", "vocab.json")  # of a folder, in order of preference
_MAX_IDS = 2**24
_PROBE = "Segment the 1st café, 中文 \U0001f600\n"  # some vocabularies load and fail on the first text
_CODE_TOKEN = r"<visual token \d{6}>"
_QWEN_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


class SentencePieceVocabulary:
    """A sentencepiece model with added tokens, as the official slow tokenizer reads it."""

    def __init__(self, proto: bytes, added: dict[str, int], config: dict):
        self.proto, self.added, self.config = proto, dict(added), config
        self.model = sentencepiece.SentencePieceProcessor(model_proto=proto)
        self.bos = self.model.bos_id() if self.model.bos_id() >= 0 else None
        self.pad = self.model.eos_id() if self.model.eos_id() >= 0 else None

    def id(self, token: str) -> int | None:
        return self.added.get(token)

    def add(self, tokens: Sequence[str]) -> None:
        start = max([self.model.get_piece_size() - 1, *self.added.values()]) + 1
        self.added.update({token: start + k for k, token in enumerate(tokens)})

    def control(self) -> dict[str, int]:
        # An added token may share its id with a piece of another spelling ([UNUSED_TOKEN_145]).
        aliases = {self.model.id_to_piece(i): i for i in self.added.values() if i < self.model.get_piece_size()}
        ends = {self.model.id_to_piece(i): i for i in (self.bos, self.pad) if i is not None}
        return {**ends, **aliases, **self.added}

    def encode(self, text: str) -> list[int]:
        return self.model.encode(text)

    def decode(self, ids: list[int]) -> str:
        return self.model.decode([i for i in ids if i < self.model.get_piece_size()])

    def files(self) -> dict[str, bytes]:
        config = self.config or {
            "tokenizer_class": "InternLM2Tokenizer",
            "bos_token": "<s>",
            "eos_token": "</s>",
            "pad_token": "</s>",
        }
        return {
            "tokenizer.model": self.proto,
            "added_tokens.json": _json(self.added),
            "tokenizer_config.json": _json(_with_added(config, self.added)),
        }


class FastVocabulary:
    """A `tokenizers` vocabulary (byte-level BPE)."""

    bos = None

    def __init__(self, model: tokenizers.Tokenizer, config: dict | None = None, slow: bool = False):
        """slow: `files` also returns those of the slow Qwen2 tokenizer."""
        self.model, self.config, self.slow = model, config or {}, slow
        self.model.no_truncation()
        self.model.no_padding()
        self.pad = model.token_to_id("<|endoftext|>")

    def id(self, token: str) -> int | None:
        return self.model.token_to_id(token)

    def add(self, tokens: Sequence[str]) -> None:
        self.model.add_special_tokens(list(tokens))

    def control(self) -> dict[str, int]:
        return {t.content: i for i, t in self.model.get_added_tokens_decoder().items() if t.special}

    def encode(self, text: str) -> list[int]:
        return self.model.encode(text, add_special_tokens=False).ids

    def decode(self, ids: list[int]) -> str:
        return self.model.decode(ids, skip_special_tokens=False)

    def files(self) -> dict[str, bytes]:
        out = {"tokenizer.json": self.model.to_str(pretty=True).encode()}
        if not self.config:
            config = {
                "tokenizer_class": "PreTrainedTokenizerFast",
                "eos_token": vocab_lib.IM_END,
                "pad_token": vocab_lib.IM_END,
                "clean_up_tokenization_spaces": False,
            }
            return {**out, "tokenizer_config.json": _json(config)}
        added = {t.content: i for i, t in self.model.get_added_tokens_decoder().items()}
        out["tokenizer_config.json"] = _json(_with_added(self.config, added))
        if self.slow:
            bpe = json.loads(self.model.to_str())["model"]
            pairs = (pair if isinstance(pair, str) else " ".join(pair) for pair in bpe["merges"])
            out |= {
                "vocab.json": _json(bpe["vocab"]),
                "added_tokens.json": _json(added),
                "merges.txt": ("#version: 0.2\n" + "".join(f"{p}\n" for p in pairs)).encode(),
            }
        return out


class Tokenizer:
    """The extended vocabulary of one model: text, control tokens and code tokens.

    Attributes:
      vocab: ids of the special tokens and codes.
      bos: id at the start of every sequence (InternLM2: 1), or None.
      im_start: id of `<|im_start|>`.
    """

    def __init__(self, backend: SentencePieceVocabulary | FastVocabulary, num_codes: int | None = None):
        """Adds the missing tokens in the official order: turn marks, special tokens, codes.

        Args:
          backend: the wrapped vocabulary; it is extended in place.
          num_codes: size of the codebook; None reads it from the vocabulary.

        Raises:
          UserError: there are no codes and num_codes is None, or the ids are out of order.
        """
        known = sum(re.fullmatch(_CODE_TOKEN, token) is not None for token in backend.control())
        if num_codes is None and not known:
            raise UserError("the tokenizer has no <visual token ...>: give the number of codes to add")
        if known and num_codes not in (None, known):
            raise UserError(f"the tokenizer has {known} code tokens, the model needs {num_codes}")
        num_codes = num_codes or known
        tokens = [
            vocab_lib.IM_END,
            vocab_lib.IM_START,
            *vocab_lib.SPECIAL_TOKENS,
            *map(vocab_lib.visual_token, range(num_codes)),
        ]
        missing = [token for token in tokens if backend.id(token) is None]
        if missing:
            backend.add(missing)
        ids = [_known_id(backend, token) for token in tokens[2:]]
        if ids != list(range(ids[0], ids[0] + len(ids))):
            order = " ".join(vocab_lib.SPECIAL_TOKENS)
            wrong = next(i for i, found in enumerate(ids) if found != ids[0] + i)
            raise UserError(
                "the tokenizer's special tokens and codes are not consecutive in the "
                f"official order {order} <visual token ...>: {tokens[2 + wrong]} has the id {ids[wrong]}, "
                f"not {ids[0] + wrong}"
            )
        eos = _known_id(backend, vocab_lib.IM_END)
        self.vocab = vocab_lib.Vocab(
            base=ids[0], num_codes=num_codes, eos=eos, pad=eos if backend.pad is None else backend.pad
        )
        self.bos, self.im_start = backend.bos, _known_id(backend, vocab_lib.IM_START)
        self._backend = backend
        control = {**backend.control(), **{token: _known_id(backend, token) for token in tokens}}
        self._skipped = frozenset(control.values())
        spellings = [re.escape(token) for token in control if not re.fullmatch(_CODE_TOKEN, token)]
        self._control = re.compile("|".join([_CODE_TOKEN, *spellings]))
        self._markup = re.compile("(" + "|".join(map(re.escape, MARKUP)) + ")")

    @classmethod
    def load(cls, path, num_codes: int | None = None) -> Tokenizer:
        """Reads a HF folder, `tokenizer.model` or `tokenizer.json`; num_codes as in __init__."""
        path = files.to_path(path)
        folder = path if path.is_dir() else path.parent
        if path.is_dir():
            found = [name for name in VOCABULARIES if (folder / name).exists()]
            if not found:
                raise UserError(f"{path}: no {', '.join(VOCABULARIES[:-1])} or {VOCABULARIES[-1]} in it")
            path = folder / found[0]
        elif not path.exists():
            raise UserError(f"{path}: no such tokenizer file")
        try:
            tokenizer = cls(_open(path, folder), num_codes)
            tokenizer.decode(tokenizer.encode_text(_PROBE))
            return tokenizer
        except UserError as error:
            raise UserError(str(error) if str(folder) in str(error) else f"{path}: {error}") from error
        except BaseException as error:  # the libraries raise bare Exception, RuntimeError and Rust's panics
            if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
                raise
            raise UserError(f"{path}: not a tokenizer ({type(error).__name__}: {brief(error, 120)})") from error

    def save(self, folder) -> None:
        """Writes the files that `load` reads, each in one step."""
        for name, content in self._backend.files().items():
            files.write(epath.Path(folder) / name, content)

    def encode_text(self, text: str) -> list[int]:
        """Ids of a text, without bos. Control tokens spelled out in it stay plain characters.

        Raises:
          UserError: a lone surrogate (half an emoji).
        """
        try:
            return [i for chunk in self._split_control(text) for i in self._backend.encode(chunk)]
        except (TypeError, UnicodeError):  # each library raises its own
            raise UserError(
                f"the text {text[:60]!a} cannot be encoded: it holds half a character (a lone surrogate)"
            ) from None

    def encode(self, pieces: Iterable[TokenPiece]) -> list[int]:
        """Ids of a turn: control ids pass unchanged, the text between two of them is encoded as one.

        `<ref>`, `<box>`, `<quad>` and `<mask>` written in a text become their own (inert) tokens,
        as in the official tokenizer.
        """
        ids: list[int] = []
        text = ""
        for piece in [*pieces, None]:
            if isinstance(piece, str):
                text += piece  # joined first: a byte pair may span two pieces
                continue
            if text:  # most pieces are consecutive ids of images and masks
                for k, chunk in enumerate(self._markup.split(text)):
                    ids += [_known_id(self._backend, chunk)] if k % 2 else self.encode_text(chunk)
                text = ""
            if piece is not None:
                ids.append(piece)
        return ids

    def decode(self, ids: Iterable[int], mask: str = "") -> str:
        """Text of ids without control tokens and codes; each `<ge_start>` becomes `mask`."""
        ids, runs = [int(i) for i in ids], [[]]
        for i in ids:
            if i == self.vocab.ge_start and mask:
                runs.append([])
            elif i not in self._skipped and 0 <= i < self.vocab.size:
                runs[-1].append(i)
        return mask.join(self._backend.decode(run) for run in runs)

    def _split_control(self, text: str) -> Iterator[str]:
        """Splits every spelled-out control token after its first character."""
        start = 0
        for found in self._control.finditer(text):
            yield text[start : found.start() + 1]
            start = found.start() + 1
        if text[start:]:
            yield text[start:]


def _open(path: epath.Path, folder: epath.Path) -> SentencePieceVocabulary | FastVocabulary:
    """Chooses the library by the file's name; `folder` has the lists of added tokens, if any."""

    def read(name: str) -> dict[str, Any]:
        file = folder / name
        content = files.read_json(file, large=True) if file.exists() else {}
        if not isinstance(content, dict):
            raise UserError(f"{file} is no object of fields")
        return content

    def ids(name: str) -> dict[str, int]:
        return _checked_ids(read(name), folder / name)

    config = read("tokenizer_config.json")
    if path.name == "vocab.json":
        return _qwen(ids("vocab.json"), files.read_text(folder / "merges.txt"), ids("added_tokens.json"), config)
    if path.suffix == ".json":
        slow = all((folder / name).exists() for name in ("vocab.json", "merges.txt"))
        content = files.read_text(path)
        if re.search(r'"continuing_subword_prefix"\s*:\s*"[^"]', content):  # the library panics where merges lack it
            raise UserError(f"{path}: pieces with a prefix; a byte-level BPE is expected")
        model = tokenizers.Tokenizer.from_str(content)
        _checked_ids(model.get_vocab(), path)  # saving takes a step for each id up to the largest
        return FastVocabulary(model, config, slow)
    listed = config.get("added_tokens_decoder") or {}
    with located(str(folder / "tokenizer_config.json"), "list of added tokens", UserError):
        added = {token["content"]: int(i) for i, token in listed.items()}
    added = _checked_ids(added, folder / "tokenizer_config.json") | ids("added_tokens.json")
    proto = files.read_bytes(path)
    plain = sentencepiece.SentencePieceProcessor(model_proto=proto)
    own = (plain.unk_id(), plain.bos_id(), plain.eos_id())
    ends = {plain.id_to_piece(i) for i in own if i >= 0}
    return SentencePieceVocabulary(proto, {token: i for token, i in added.items() if token not in ends}, config)


def _checked_ids(ids: dict[str, Any], file: epath.Path) -> dict[str, int]:
    """{token: id}, unchanged; UserError where it is something else."""
    for token, i in ids.items():
        if not isinstance(token, str) or type(i) is not int or not 0 <= i < _MAX_IDS:
            raise UserError(
                f"{file}: {brief(repr(token), 60)} has the id {brief(repr(i), 60)}; whole numbers below "
                f"{_MAX_IDS} are expected"
            )
    return ids


def _known_id(backend: SentencePieceVocabulary | FastVocabulary, token: str) -> int:
    """The id of a token that the vocabulary has."""
    found = backend.id(token)
    if found is None:
        raise KeyError(token)
    return found


def _qwen(vocabulary: dict[str, int], merges: str, added: dict[str, int], config: dict) -> FastVocabulary:
    """The slow Qwen2 files (vocab.json, merges.txt, added_tokens.json) as one fast tokenizer."""
    lines = merges.splitlines()
    pairs = [tuple(line.split(" ")) for line in lines[lines[:1] != [] and lines[0].startswith("#version:") :] if line]
    if wrong := next((pair for pair in pairs if len(pair) != 2), None):
        raise UserError(f"merges.txt: {brief(repr(' '.join(wrong)), 60)} is no pair of pieces")
    model = tokenizers.Tokenizer(models.BPE(vocab=vocabulary, merges=[(pair[0], pair[1]) for pair in pairs]))
    model.normalizer = normalizers.NFC()
    model.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(tokenizers.Regex(_QWEN_SPLIT), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    model.decoder = decoders.ByteLevel()
    backend = FastVocabulary(model, config, slow=True)
    backend.add(sorted(added, key=lambda token: added[token]))
    wrong = [token for token, i in added.items() if backend.id(token) != i]
    if wrong:
        raise UserError(f"added_tokens.json leaves gaps: {wrong[0]} cannot be {added[wrong[0]]}")
    backend.pad = model.token_to_id("<|endoftext|>")
    return backend


def _with_added(config: dict, added: dict[str, int]) -> dict:
    """A tokenizer_config.json that lists the added tokens as well."""
    flags = dict.fromkeys(("lstrip", "normalized", "rstrip", "single_word"), False)
    listed = {str(i): {"content": token, **flags, "special": True} for token, i in added.items()}
    return {**config, "added_tokens_decoder": {**listed, **(config.get("added_tokens_decoder") or {})}}


def _json(value) -> bytes:
    readable = json.dumps(value, ensure_ascii=False, indent=2) + "\n"
    try:
        return readable.encode()
    except UnicodeEncodeError:  # half an emoji, which UTF-8 cannot hold
        return (json.dumps(value, indent=2) + "\n").encode()
