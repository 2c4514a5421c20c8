"""A SentencePiece BPE file (tokenizer.model) as a `tokenizers` tokenizer, without the sentencepiece library.

File format: sentencepiece_model.proto of github.com/google/sentencepiece, version 0.2.
"""

import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

from tokenizers import AddedToken, Tokenizer, decoders, normalizers, processors
from tokenizers.models import BPE

SPACE = "▁"
_BPE = 2
_MODEL_PIECES, _MODEL_TRAINER, _MODEL_NORMALIZER = 1, 2, 3
_PIECE_TEXT, _PIECE_SCORE = 1, 2
_TRAINER_TYPE, _NORMALIZER_PREFIX = 3, 3
_VARINT, _EIGHT_BYTES, _BYTES, _FOUR_BYTES = 0, 1, 2, 5


class SentencePieceModel(NamedTuple):
    """What of the file decides token ids. `pieces`: text and score by token id.

    Example: SentencePieceModel(pieces=[("<unk>", 0.0), ("<s>", 0.0), ("</s>", 0.0), ("▁the", -3.0)], add_prefix=True)
    """

    pieces: list[tuple[str, float]]
    add_prefix: bool  # a space before the text


def read_sentencepiece(file: Path) -> SentencePieceModel:
    """Read a tokenizer.model. ValueError where it is not a BPE model in SentencePiece's format."""
    pieces: list[tuple[str, float]] = []
    kind, add_prefix = 1, True  # the format's defaults: Unigram, with a prefix
    try:
        for number, value in _fields(file.read_bytes()):
            if number == _MODEL_PIECES:
                fields = dict(_fields(_message(value)))
                score = struct.unpack("<f", _message(fields.get(_PIECE_SCORE, bytes(4))))[0]
                pieces.append((_message(fields[_PIECE_TEXT]).decode("utf-8"), score))
            elif number == _MODEL_TRAINER:
                kind = int(dict(_fields(_message(value))).get(_TRAINER_TYPE, kind))
            elif number == _MODEL_NORMALIZER:
                add_prefix = bool(dict(_fields(_message(value))).get(_NORMALIZER_PREFIX, add_prefix))
    except (IndexError, KeyError, TypeError, ValueError, struct.error) as error:
        raise ValueError(f"{file} is not a SentencePiece model ({error}): download it again") from error
    if kind != _BPE or not pieces:
        raise ValueError(f"{file}: a SentencePiece model of type {kind} with {len(pieces)} pieces; expected BPE (2)")
    return SentencePieceModel(pieces, add_prefix)


def fast_tokenizer(model: SentencePieceModel, added: Mapping[int, AddedToken], *, bos: str) -> Tokenizer:
    """The tokenizer as InternLM2's published fast class builds it.

    BPE with byte fallback; merges ordered by the score of the piece they make; an added token takes the place of the
    piece that has its id; `bos` before every text. ValueError for an added token beyond the last piece: it would get an
    id that the model has no embedding for.
    """
    pieces = list(model.pieces)
    for token_id, token in sorted(added.items()):
        if not 0 <= token_id < len(pieces):
            raise ValueError(f"added token {token.content!r} has id {token_id}; the model has {len(pieces)} pieces")
        pieces[token_id] = (token.content, pieces[token_id][1])
    vocabulary = {text: token_id for token_id, (text, _) in enumerate(pieces)}
    if len(vocabulary) != len(pieces):
        raise ValueError(f"{len(pieces) - len(vocabulary)} token texts stand for more than one id")
    tokenizer = Tokenizer(
        BPE(vocabulary, merges(dict(pieces)), unk_token=pieces[0][0], fuse_unk=True, byte_fallback=True)
    )
    tokenizer.add_special_tokens([token for _, token in sorted(added.items())])
    prefix = [normalizers.Prepend(SPACE)] if model.add_prefix else []
    tokenizer.normalizer = normalizers.Sequence([*prefix, normalizers.Replace(" ", SPACE)])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", pair=f"{bos} $A {bos} $B:1", special_tokens=[(bos, vocabulary[bos])]
    )
    return tokenizer


def merges(scores: Mapping[str, float]) -> list[tuple[str, str]]:
    """Every way to make a piece of two others, the piece of the highest score first."""
    ids = {text: token_id for token_id, text in enumerate(scores)}
    found = []
    for text, score in scores.items():
        halves = [(text[:cut], text[cut:]) for cut in range(1, len(text))]
        pairs = [pair for pair in halves if pair[0] in ids and pair[1] in ids]
        found += [(score, *pair) for pair in sorted(pairs, key=lambda pair: (ids[pair[0]], ids[pair[1]]))]
    found.sort(key=lambda merge: (merge[0], len(merge[1]), len(merge[2])), reverse=True)
    return [(left, right) for _, left, right in found]


def _fields(data: bytes) -> Iterator[tuple[int, int | bytes]]:
    """Number and value of each field of a protobuf message; fixed-width values as bytes."""
    place = 0
    while place < len(data):
        tag, place = _varint(data, place)
        kind = tag & 7
        if kind == _VARINT:
            value, place = _varint(data, place)
            yield tag >> 3, value
            continue
        size = {_EIGHT_BYTES: 8, _FOUR_BYTES: 4}.get(kind)
        if size is None:
            if kind != _BYTES:
                raise ValueError(f"wire type {kind} at byte {place}")
            size, place = _varint(data, place)
        if place + size > len(data):
            raise ValueError(f"a field of {size} bytes at byte {place} of {len(data)}")
        yield tag >> 3, data[place : place + size]
        place += size


def _varint(data: bytes, place: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[place]
        value |= (byte & 0x7F) << shift
        place, shift = place + 1, shift + 7
        if not byte & 0x80:
            return value, place


def _message(value: int | bytes) -> bytes:
    if isinstance(value, int):
        raise ValueError(f"the number {value} where bytes were expected")
    return value
