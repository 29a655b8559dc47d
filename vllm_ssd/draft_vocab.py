"""Which tokens the draft's head is computed for: the option ``draft_vocab``.

Most of a language model's text uses few of its tokens, and the cost of a head grows with its rows.
A draft may leave the other tokens out: it never proposes them, and what it proposes is verified.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from vllm_ssd.core.arrays import Int32Array

if TYPE_CHECKING:
    from vllm.config import ModelConfig

    from vllm_ssd.config import SSDConfig

FILE = "draft_vocab.txt"
"""The frequency file of a draft model's folder: a token id a line, the most frequent first."""

_MEND = "give a number (0 for all tokens), or a text file with a token id a line"


def select_draft_vocab(
    config: SSDConfig, target: ModelConfig, draft: ModelConfig
) -> Int32Array | None:
    """The tokens the draft's head is computed for.

    Args:
        config: the options; ``draft_vocab`` and ``model`` matter here.
        target: its end tokens are always among those selected.
        draft: only for the size of its vocabulary.

    Returns:
        ``[N]``, different token ids, the most frequent first; None for all tokens.

    Raises:
        ValueError: the option or its file cannot be used.
    """
    wanted = config.draft_vocab
    own = Path(config.model).expanduser() / FILE
    if wanted == 0 or (wanted is None and not own.is_file()):
        return None
    size = min(target.get_vocab_size(), draft.get_vocab_size())
    said = f"ssd: option 'draft_vocab' = {wanted!r}"
    if isinstance(wanted, str):
        ids = _read(Path(wanted).expanduser(), size, said)
    elif own.is_file():
        ids = _read(own, size, f"{said}, so the draft's own '{own}' is used")
    else:
        ids = list(range(size))
    if isinstance(wanted, int):
        if wanted > len(ids):
            source = f"'{own}' lists only" if own.is_file() else "the vocabulary has only"
            raise ValueError(f"{said}: {source} {len(ids)} tokens; lower it, or use 0 for all")
        ids = ids[:wanted]
    listed = set(ids)
    ids += [i for i in dict.fromkeys(_end_tokens(target)) if i < size and i not in listed]
    return np.array(ids, np.int32)


def _read(file: Path, size: int, said: str) -> list[int]:
    """The token ids of a frequency file; an error message begins with ``said``."""
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        raise ValueError(f"{said}: there is no such file; {_MEND}") from None
    except OSError as error:
        raise ValueError(f"{said}: it cannot be read ({error.strerror}); {_MEND}") from None
    except UnicodeDecodeError:
        raise ValueError(f"{said}: it is not a text file; {_MEND}") from None
    ids: dict[int, None] = {}
    for number, line in enumerate(map(str.strip, lines), 1):
        if not line or line.startswith("#"):
            continue
        if not (line.isascii() and line.isdigit()):
            raise ValueError(f"{said}: line {number} ({line[:40]!r}) is not a token id; {_MEND}")
        token = int(line[:20])  # longer ones are beyond any vocabulary as well
        if token >= size:
            raise ValueError(
                f"{said}: line {number} ({token}) is beyond the vocabulary that target and draft "
                f"share ({size} tokens); leave it out"
            )
        if token in ids:
            raise ValueError(f"{said}: line {number} ({token}) repeats a token; list it once")
        ids[token] = None
    if not ids:
        raise ValueError(f"{said}: it lists no tokens; {_MEND}")
    return list(ids)


def _end_tokens(target: ModelConfig) -> list[int]:
    """The end tokens of the target's generation config and of its own."""
    found: list[int] = []
    configs = (target.try_get_generation_config(), target.hf_text_config.to_dict())
    for value in (config.get("eos_token_id") for config in configs):
        found += value if isinstance(value, list) else [] if value is None else [value]
    return found
