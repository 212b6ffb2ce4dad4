"""The exact text of single tokens, as their tokenizer's decoder would write it in the middle of a text."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

from skd_plugin.report.run_record import RunRecord

Piece = str | tuple[int, ...]  # text, or the bytes of a part of a character


class Pieces:
    """Token ids of one run -> pieces."""

    def __init__(self, tokenizer: Any | None) -> None:
        self._tokenizer = tokenizer
        if tokenizer is None:
            return
        self._decoders = _decoder_types(json.loads(tokenizer.backend_tokenizer.to_str()).get("decoder"))
        self._added = {id_: str(token) for id_, token in tokenizer.added_tokens_decoder.items()}
        self._special = set(tokenizer.all_special_ids)
        self._bytes = _byte_of_character() if "ByteLevel" in self._decoders else {}

    @property
    def vocabulary(self) -> dict[str, int] | None:
        return self._tokenizer.get_vocab() if self._tokenizer is not None else None

    def is_special(self, token_id: int) -> bool:
        return self._tokenizer is not None and token_id in self._special

    def __getitem__(self, token_id: int) -> Piece:
        """An id that the tokenizer does not know, and every id where there is none, is shown as <id>."""
        if self._tokenizer is None:
            return f"<{token_id}>"
        if token_id in self._added:
            return self._added[token_id]
        token = self._tokenizer.convert_ids_to_tokens(token_id)
        if token is None:
            return f"<{token_id}>"
        if "ByteLevel" in self._decoders and all(character in self._bytes for character in token):
            return _text_or_bytes(bytes(self._bytes[character] for character in token))
        if "ByteFallback" in self._decoders and (match := re.fullmatch(r"<0x([0-9A-Fa-f]{2})>", token)):
            return _text_or_bytes(bytes([int(match[1], 16)]))
        if "WordPiece" in self._decoders:
            return token[2:] if token.startswith("##") else " " + token
        return token.replace("▁", " ") if self._decoders & {"Metaspace", "Replace"} else token


def same_tokenizer(pieces: list[Pieces]) -> bool:
    """Whether all runs whose tokenizer is known name the same tokens by the same ids."""
    known = [vocabulary for vocabulary in (piece.vocabulary for piece in pieces) if vocabulary is not None]
    return all(vocabulary == known[0] for vocabulary in known)


def load_pieces(run: RunRecord) -> Pieces:
    """From the tokenizer of the run's student: its folder, else the run's own model/, else its Hugging Face name."""
    from transformers import AutoTokenizer

    student = run.text("openrlhf.actor.model_name_or_path")
    places = [place for place in (student, str(run.folder.model)) if place and os.path.isdir(place)]
    if student and not Path(student).is_absolute():
        places.append(student)
    for place in places:
        try:
            return Pieces(AutoTokenizer.from_pretrained(place))
        # No tokenizer there, or a damaged one: for that tokenizers raises Exception itself, and transformers a
        # KeyError, TypeError or AttributeError.
        except Exception:
            continue
    run.notes.append(
        f"The student's tokenizer was found neither at {student or 'a path named in config.yaml'} nor in model/: "
        "tokens are shown as their numbers."
    )
    return Pieces(None)


def _decoder_types(decoder: dict[str, Any] | None) -> set[str]:
    if decoder is None:
        return set()
    return {decoder["type"]}.union(*(_decoder_types(part) for part in decoder.get("decoders", ())))


def _byte_of_character() -> dict[str, int]:
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    return {character: byte for byte, character in bytes_to_unicode().items()}


def _text_or_bytes(raw: bytes) -> Piece:
    try:
        return raw.decode()
    except UnicodeDecodeError:
        return tuple(raw)
