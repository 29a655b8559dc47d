"""Whether target and draft have the same tokenizer: compared here, or by a hash where the draft is
a server elsewhere."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vllm.config import ModelConfig

    from vllm_ssd.config import SSDConfig


def hash_vocabulary(vocabulary: dict[str, int]) -> str:
    """The same for the same tokens with the same ids, whatever else two tokenizers do.

    Args:
        vocabulary: the id of each token, added ones included.
    """
    hashed = hashlib.sha256()
    for token, token_id in sorted(vocabulary.items(), key=lambda item: (item[1], item[0])):
        # With its length before it a token may hold any character.
        encoded = token.encode(errors="surrogatepass")
        hashed.update(f"{token_id} {len(encoded)} ".encode() + encoded)
    return hashed.hexdigest()


def tokenizer_hash(name: str, revision: str | None = None, **how: Any) -> str:
    """The hash of a tokenizer's vocabulary.

    Args:
        name: a folder or a hub name.
        revision: of the hub.
        how: further arguments of ``AutoTokenizer.from_pretrained``.

    Raises:
        ValueError: there is no such tokenizer.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(name, revision=revision or "main", **how)
    except Exception as error:  # transformers and its tokenizers each raise their own
        raise ValueError(f"ssd: {name!r} has no tokenizer that can be read: {error}") from error
    return hash_vocabulary(tokenizer.get_vocab())


def check_vocabulary(config: SSDConfig, target: ModelConfig, draft: ModelConfig) -> bool:
    """Refuse a draft with another tokenizer. Padded vocabularies of one tokenizer are fine.

    Returns:
        Whether the tokenizers were compared; else only the sizes of the vocabularies.

    Raises:
        ValueError: names a token on which they differ.
    """
    if _same_tokenizer_file(target.tokenizer, draft.model):
        return True
    from transformers import AutoTokenizer

    try:
        both = {"trust_remote_code": target.trust_remote_code, "token": target.hf_token}
        ours = AutoTokenizer.from_pretrained(
            target.tokenizer, revision=target.tokenizer_revision or "main", **both
        ).get_vocab()
        theirs = AutoTokenizer.from_pretrained(
            draft.model, revision=config.draft_revision or "main", **both
        ).get_vocab()
    except Exception as error:  # transformers and its tokenizers each raise their own
        # A folder of weights alone: nothing to compare but the size.
        if target.get_vocab_size() == draft.get_vocab_size():
            return False
        raise ValueError(
            f"ssd: option 'model' = {draft.model!r}: it has no tokenizer and another vocabulary "
            f"size ({draft.get_vocab_size()}) than the target ({target.get_vocab_size()}); "
            "choose a draft with the target's tokenizer"
        ) from error
    # By id, so that the same pair of tokenizers is refused with the same message every time.
    for token, token_id in sorted(ours.items(), key=lambda item: item[1]):
        if theirs.get(token, token_id) != token_id:
            raise ValueError(
                f"ssd: option 'model' = {draft.model!r}: its tokenizer differs from the target's "
                f"({token!r} is {theirs[token]} there and {token_id} in the target); choose a "
                "draft with the target's tokenizer"
            )
    shared = len(ours.keys() & theirs.keys())
    if shared < 0.9 * max(len(ours), len(theirs)):
        raise ValueError(
            f"ssd: option 'model' = {draft.model!r}: its tokenizer shares only {shared} of "
            f"{len(ours)} tokens with the target's; choose a draft with the target's tokenizer"
        )
    return True


def _same_tokenizer_file(one: str, other: str) -> bool:
    """Whether two local folders hold byte-identical tokenizers: a shortcut."""
    files = [Path(folder) / "tokenizer.json" for folder in (one, other)]
    if not all(file.is_file() for file in files):
        return False
    return files[0].samefile(files[1]) or files[0].read_bytes() == files[1].read_bytes()
