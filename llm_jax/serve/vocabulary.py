"""Tokens as JSON strings, each made once."""

import codecs
import json
from collections.abc import Sequence

from llm_jax.core.types import Tokenizer


class Vocabulary:
    """How the ids of a tokenizer look in answers. Each method gives JSON text, escaped to ASCII."""

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self.size, self.end = tokenizer.vocab_size, tokenizer.eos_id
        self._texts: dict[int, str] = {}
        self._pieces: dict[int, str] = {}
        self._shown: dict[int, str] = {}
        self.longest = max(len(tokenizer.decode_bytes([i])) for i in range(self.size))

    def text(self, token: int) -> str:
        r"""As OpenAI writes a token: its text, or "bytes:\xe4" for a part of a character."""
        found = self._texts.get(token)
        if found is None:
            found = self._texts[token] = json.dumps(self.plain_text(token))
        return found

    def plain_text(self, token: int) -> str:
        """`text`, not as JSON."""
        content = self._tokenizer.decode_bytes([token])
        try:
            return content.decode("utf-8") or self._tokenizer.id_to_piece(token)
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in content)

    def piece(self, token: int) -> str:
        """As a person is shown it, control characters and bytes made visible."""
        found = self._pieces.get(token)
        if found is None:
            found = self._pieces[token] = json.dumps(self._tokenizer.id_to_piece(token))
        return found

    def shown(self, token: int) -> str:
        """The fields "id", "piece" and "bytes", as the page gets them."""
        found = self._shown.get(token)
        if found is None:
            content = json.dumps(self._tokenizer.decode_bytes([token]).decode("latin-1"))
            found = f'"id":{token},"piece":{self.piece(token)},"bytes":{content}'
            self._shown[token] = found
        return found

    def byte_values(self, token: int) -> str:
        return json.dumps(list(self._tokenizer.decode_bytes([token])), separators=(",", ":"))

    def decode(self, tokens: Sequence[int]) -> str:
        return self._tokenizer.decode(tokens)

    def spelled(self, tokens: Sequence[int]) -> list[str]:
        """What each of these tokens adds to their text, not as JSON: "" inside a character."""
        decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        last = len(tokens) - 1
        return [
            decoder.decode(self._tokenizer.decode_bytes([token]), final=place == last)
            for place, token in enumerate(tokens)
        ]
