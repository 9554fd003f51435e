"""The tokenizer that lies beside a model: texts to ids by its tokenizer.json alone; no code of a folder is run."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from foundation.errors import DataError, first_line
from pipeline.models import published
from pipeline.models.extras import installed

FILE = "tokenizer.json"
DEFAULT_MAX = 512
"""Tokens of a text where neither the recipe nor the model's folder says how many."""
LEAST = 8
"""Fewer tokens leave hardly room for more than those that mark beginning and end."""
_OFFSET_BY_PADDING = ("roberta", "xlm-roberta", "xlm-roberta-xl", "camembert", "longformer", "mpnet")
"""Model types whose positions begin behind the padding id, so that they bear fewer tokens than they have positions."""


@dataclass(frozen=True)
class Encoded:
    """One text: ids, 1 for each of them, which segment each belongs to, and which word (None: of no word)."""

    ids: list[int]
    mask: list[int]
    segments: list[int]
    words: list[int | None]


class Tokenizer:
    """A tokenizer.json, cutting texts at the length that the model bears."""

    def __init__(self, given: Path, max_tokens: int | None) -> None:
        if not installed("tokenizers"):
            raise DataError("tokenizers is not installed, which texts need.", 'pip install "leanort[transformers]"')
        import tokenizers

        file = given / FILE if given.is_dir() else given
        if not file.is_file():
            raise DataError(
                f"{given} holds no {FILE}.",
                "Save one there with tokenizer.save_pretrained(FOLDER) of a fast tokenizer, or name it: "
                "--set data.tokenizer=FILE",
            )
        try:
            self.tokenizer: Any = tokenizers.Tokenizer.from_file(str(file))
        except Exception as error:  # the library raises bare Exception
            raise DataError(f"{file} is no readable tokenizer: {first_line(error)}", "Save it again.") from error
        self.file, folder = file, file.parent
        self.config = _json(folder / "config.json")
        self.settings = _json(folder / "tokenizer_config.json")
        longest = self._longest()
        if max_tokens is not None and longest is not None and max_tokens > longest:
            raise DataError(
                f"data.max_tokens is {max_tokens}, and the model in {folder} bears {longest} tokens.",
                f"Set it to {longest} or less.",
            )
        self.max_tokens = max_tokens or longest or DEFAULT_MAX
        self.tokenizer.no_padding()
        self.tokenizer.enable_truncation(max_length=self.max_tokens)
        self.padding = self._padding()
        self.vocabulary: int | None = self._number("vocab_size")

    @property
    def content(self) -> bytes:
        """The tokenizer as a bundle takes it along: it cuts texts as it does here."""
        return str(self.tokenizer.to_str()).encode()

    def segments(self) -> bool | None:
        """Whether the model is told which text a token belongs to; None where the folder does not say."""
        names = self.settings.get("model_input_names")
        return "token_type_ids" in names if isinstance(names, list) else None

    def __call__(self, text: str | Sequence[str], pair: str | None = None) -> Encoded:
        """One text, or two, or the words of one. Raises ValueError for what the tokenizer does not take."""
        try:
            made = self.tokenizer.encode(text, pair, is_pretokenized=not isinstance(text, str))
        except BaseException as error:  # a panic of the library derives from BaseException
            if isinstance(error, KeyboardInterrupt):
                raise
            raise ValueError(f"the tokenizer fails: {first_line(error)}") from error
        return Encoded(made.ids, made.attention_mask, made.type_ids, made.word_ids)

    def _number(self, key: str) -> int | None:
        value = self.config.get(key)
        return value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else None

    def _longest(self) -> int | None:
        """Tokens that the model bears, by its config and by the tokenizer's own; None where neither says."""
        positions = self._number("max_position_embeddings") or self._number("n_positions")
        if positions is not None and self.config.get("model_type") in _OFFSET_BY_PADDING:
            positions -= 1 + (self._number("pad_token_id") or 1)
        own = self.settings.get("model_max_length")
        given = [one for one in (positions, own) if isinstance(one, int) and LEAST <= one < 1 << 30]
        return min(given, default=None)

    def _padding(self) -> int:
        """The id that fills texts up; the mask says where."""
        return published.padding(self.settings, self.config, self.tokenizer.token_to_id)


def _json(file: Path) -> dict[str, Any]:
    """A JSON object in a file; empty where there is none."""
    if not file.is_file():
        return {}
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{file} is no JSON: {first_line(error)}", "Save it again.") from error
    return found if isinstance(found, dict) else {}
