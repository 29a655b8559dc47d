"""Random Llama models, made in a second, with a tokenizer whose words are ``w3 w4 ... w511``."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vllm_ssd.cli.downloads import cache_folder

VOCABULARY = 512
HIDDEN = 64
MAX_POSITIONS = 1024
BOS, EOS = 1, 2

NOISE = 0.02
"""The noise on ``near``, in standard deviations of each weight."""

VERSION = 1
"""Part of the folder's name: raise it when the models below change."""


@dataclass(frozen=True)
class TinyModels:
    """The folders of a target and of drafts that guess it never, sometimes and always."""

    target: Path
    draft: Path
    """A smaller random model, unrelated to the target."""
    near: Path
    """The target with noise on its weights: about two of three greedy tokens are the target's."""

    @property
    def itself(self) -> Path:
        """The target as its own draft."""
        return self.target

    def drafts(self) -> dict[str, Path]:
        """All drafts by name."""
        return {"random": self.draft, "near": self.near, "itself": self.itself}


def tiny_models() -> TinyModels:
    """The models' folders; made on the first call, in float32."""
    folder = cache_folder() / "tests" / f"tiny-v{VERSION}"
    if not folder.is_dir():
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
            _make(Path(scratch, "tiny"))
            try:
                Path(scratch, "tiny").rename(folder)
            except OSError:  # another test run was faster: its models are the same
                assert folder.is_dir()
    return TinyModels(folder / "target", folder / "draft", folder / "near")


def words(*token_ids: int) -> str:
    """The text prompt of these tokens."""
    return " ".join(f"w{token_id}" for token_id in token_ids)


def _make(folder: Path) -> None:
    import torch

    target = random_llama(layers=4, seed=0)
    target.save_pretrained(folder / "target")
    random_llama(layers=2, seed=1).save_pretrained(folder / "draft")

    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for weight in target.parameters():
            noise = torch.randn(weight.shape, generator=generator)
            weight.add_(noise * weight.std() * NOISE)
    target.save_pretrained(folder / "near")

    tokenizer = _word_tokenizer()
    for name in ("target", "draft", "near"):
        tokenizer.save_pretrained(folder / name)


def random_llama(
    layers: int, seed: int, vocab_size: int = VOCABULARY, max_positions: int = MAX_POSITIONS
) -> Any:
    """A Llama with random weights, float32."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=HIDDEN,
        intermediate_size=2 * HIDDEN,
        num_hidden_layers=layers,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=HIDDEN // 2,
        max_position_embeddings=max_positions,
        bos_token_id=BOS,
        eos_token_id=EOS,
        pad_token_id=0,
        tie_word_embeddings=False,
        initializer_range=0.2,  # wide enough for outputs that vary instead of repeating one token
    )
    return LlamaForCausalLM(config).to(torch.float32)


def _word_tokenizer() -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {"<unk>": 0, "<s>": BOS, "</s>": EOS}
    vocabulary |= {f"w{token_id}": token_id for token_id in range(len(vocabulary), VOCABULARY)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        pad_token="<unk>",
        model_max_length=MAX_POSITIONS,
        clean_up_tokenization_spaces=False,
    )
