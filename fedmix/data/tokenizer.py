"""Words to numbers: a small WordPiece vocabulary for radiology reports, or a Hugging Face tokenizer from a local folder.

The vocabulary is shipped and never trained in a federation: a site's words would leave the site with it. ``vocabulary``
builds it, and what that promises: no rare name is in it, no ASCII text is unknown. Text is never read as a special token.

Rebuild the shipped file with
``python -m fedmix.data.tokenizer build --reports reports-only.csv --reports paired.csv --out fedmix/data/tokenizer.json``.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

import tokenizers

from fedmix.errors import ConfigError

SPECIAL_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
_NAMES = {  # role -> what BERT's and RoBERTa's families call it
    "padding": ("[PAD]", "<pad>"),
    "unknown": ("[UNK]", "<unk>"),
    "summary": ("[CLS]", "<s>"),
    "mask": ("[MASK]", "<mask>"),
}


class Tokenizer:
    """Encodes reports as lists of ids that start with the summary token."""

    def __init__(self, definition: bytes) -> None:
        """Read the bytes of a ``tokenizer.json``.

        Raises:
            ConfigError: not a tokenizer, a special token is missing, or padding is not id 0.
        """
        try:
            self._backend = tokenizers.Tokenizer.from_str(definition.decode())
        except Exception as error:  # the library raises bare Exception for every fault in the file
            raise ConfigError(
                "tokenizer.json is not a tokenizer that the tokenizers library can read; export it again"
            ) from error
        self._backend.no_truncation()
        self._backend.no_padding()
        self._backend.encode_special_tokens = True  # "[MASK]" in a report is text, not a hidden word
        self.fingerprint = hashlib.sha256(definition).hexdigest()
        self.vocab_size: int = self._backend.get_vocab_size()
        self.pad_id = self._special("padding")
        self.unknown_id = self._special("unknown")
        self.summary_id = self._special("summary")
        self.mask_id = self._special("mask")
        if self.pad_id != 0:
            # Renumbering would misalign the rows of a warm start's embedding table, silently.
            raise ConfigError(f"tokenizer has padding at id {self.pad_id}, fedmix needs it at 0; use a BERT-style tokenizer")
        added = self._backend.get_added_tokens_decoder()
        named = {self.pad_id, self.unknown_id, self.summary_id, self.mask_id}
        self.special_ids = frozenset(named | {number for number, token in added.items() if token.special})

    @classmethod
    def load(cls, path: Path | None = None) -> Tokenizer:
        """Load the shipped vocabulary, or ``tokenizer.json`` from a Hugging Face folder (or that file itself)."""
        if path is None:
            return cls(resources.files("fedmix.data").joinpath("tokenizer.json").read_bytes())
        file = path / "tokenizer.json" if path.is_dir() else path
        if not file.is_file():
            raise ConfigError("tokenizer folder has no tokenizer.json; save it with a fast tokenizer's save_pretrained(folder)")
        return cls(file.read_bytes())

    @property
    def vocabulary(self) -> dict[str, int]:
        """Every token's id, special tokens included."""
        found: dict[str, int] = self._backend.get_vocab()
        return found

    def _special(self, role: str) -> int:
        for name in _NAMES[role]:
            number: int | None = self._backend.token_to_id(name)
            if number is not None:
                return number
        raise ConfigError(
            f"tokenizer has no {role} token, expected one of {', '.join(_NAMES[role])}; use a BERT-style tokenizer"
        )

    def encode(self, texts: Sequence[str], max_words: int) -> list[list[int]]:
        """Encode each text as the summary token and its pieces, at most ``max_words`` ids in all."""
        if max_words < 1:
            raise ConfigError(f"max_words is {max_words}, expected at least 1: the summary token is always kept")
        encodings = self._backend.encode_batch_fast(list(texts), add_special_tokens=False)
        return [[self.summary_id, *encoding.ids[: max_words - 1]] for encoding in encodings]

    def token(self, number: int) -> str:
        """The vocabulary's entry of an id, "##" and the like left on."""
        entry: str | None = self._backend.id_to_token(number)
        if entry is None:
            raise ConfigError(f"id {number} is not one of the tokenizer's {self.vocab_size}")
        return entry

    def decode(self, ids: Sequence[int]) -> str:
        """Turn ids back into text, lower case and without special tokens."""
        text: str = self._backend.decode(list(ids), skip_special_tokens=True)
        return text


@dataclass(frozen=True)
class TokenizerReport:
    """How well a vocabulary fits some texts; every rate is 0 where there was nothing to count."""

    num_texts: int
    num_tokens: int
    tokens_per_word: float  # words and punctuation marks count as one each; 1 is the least there can be
    unknown_rate: float  # share of tokens
    truncated_rate: float  # share of texts longer than max_words


def fertility(tokenizer: Tokenizer, texts: Sequence[str], max_words: int = 128) -> TokenizerReport:
    """Measure tokens per word, unknown tokens and truncation over ``texts``."""
    encoded = tokenizer.encode(texts, max_words=2**31)
    pieces = [number for ids in encoded for number in ids[1:]]
    num_words = sum(len(re.findall(r"\d|[^\W\d]+|[^\w\s]", text)) for text in texts)
    return TokenizerReport(
        num_texts=len(texts),
        num_tokens=len(pieces),
        tokens_per_word=len(pieces) / max(1, num_words),
        unknown_rate=pieces.count(tokenizer.unknown_id) / max(1, len(pieces)),
        truncated_rate=sum(len(ids) > max_words for ids in encoded) / max(1, len(texts)),
    )


if __name__ == "__main__":
    from fedmix.data.vocabulary import app

    app()
