"""Every option of the ``ssd`` method: its meaning, its default, what it must satisfy."""

from __future__ import annotations

from difflib import get_close_matches
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from vllm_ssd.core.fanout import geometric_fan_out, uniform_fan_out

ADDITIONAL_CONFIG_KEY = "ssd"
"""Where the options live in vLLM's ``additional_config``, its one free-form field."""

MAX_SPECULATIVE_TOKENS = 32
MAX_FAN_OUT = 64
MAX_BRANCHES = 1024

_NEEDS = {
    "model": "needs a folder or a hub name",
    "fan_out": f"needs integers from 0 to {MAX_FAN_OUT}, not all 0: one, or a list of "
    "num_speculative_tokens + 1",
    "branches": f"needs an integer from 1 to {MAX_BRANCHES}, or 'auto'",
    "draft_device": "needs 'auto', 'cpu', 'cuda' or 'cuda:<index>'",
    "draft_cpu_cores": "needs a list of core numbers",
    "draft_vocab": "needs a number of tokens, 0 for all, or a file of token ids by frequency",
}
"""What an option takes, where pydantic's own words would not say it."""


class SSDConfig(BaseModel):
    """The options of Speculative Speculative Decoding.

    In ``speculative_config={"method": "ssd", ...}`` they stand beside ``method``; with vLLM's plain
    ``custom_class`` spelling they stand in ``additional_config={"ssd": {...}}``.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    model: str = Field(min_length=1)
    """The draft model: a folder or a hub name, with the target's tokenizer."""

    num_speculative_tokens: int = Field(ge=1, le=MAX_SPECULATIVE_TOKENS)
    """K, the most tokens drafted for one verification."""

    fan_out: int | list[int] = 3
    """How many ``t*`` are guessed after each number of accepted tokens; or K + 1 numbers, one for
    each ``k`` from 0 to K."""

    fan_out_policy: Literal["uniform", "geometric"] = "uniform"
    """How an integer ``fan_out`` is spread over ``k``: the same everywhere, or by Theorem 12 of
    arXiv 2603.03251 from ``acceptance`` and ``miss_exponent`` (the sum stays the same)."""

    acceptance: float = Field(default=0.7, gt=0.0, lt=1.0)
    """The chance that one drafted token is accepted, with which outcomes are ordered by likelihood
    until verifications show what it is, by the draft's confidence."""

    miss_exponent: float = Field(default=1.0, gt=0.0, le=10.0)
    """r: where the draft's first choice is wrong, F others are all wrong too with probability
    ``(F + 1)^-r``; likewise."""

    branches: int | Literal["auto"] = "auto"
    """Branches per request and round. ``"auto"``: as many as the measured step time lets reach a
    useful depth before the verification ends, likeliest outcomes first."""

    max_wait_ms: float = Field(default=0.0, ge=0.0, le=10_000.0)
    """How long one proposal (the whole batch) may wait for the branch that came true."""

    draft_device: str = Field(default="auto", pattern=r"^(auto|cpu|cuda(:\d+)?)$")
    """Where the draft runs: ``"cpu"``, ``"cuda:1"``, ...; ``"auto"``: the target's kind of device,
    on CUDA the first one the target does not use, else the target's own."""

    draft_cpu_cores: list[int] | None = Field(default=None, min_length=1)
    """Cores of a draft on CPU. Default: those the target leaves free, else the last one."""

    draft_dtype: Literal["auto", "bfloat16", "float16", "float32"] | None = None
    """Default: the target's."""

    draft_quantization: str | None = None
    """As vLLM's ``quantization``, for the draft model."""

    draft_vocab: int | str | None = None
    """The tokens the draft's head is computed for: a text file of token ids, one a line, most
    frequent first (``#`` starts a comment); or how many, of those the draft's folder lists in
    ``draft_vocab.txt``, else of the lowest ids; 0 for all. The target's end tokens are always
    among them. Default: all that ``draft_vocab.txt`` lists, if there is one, else all tokens."""

    draft_max_model_len: int | None = Field(default=None, ge=2)
    """Longest text the draft follows. Default: the target's, at most what the draft supports."""

    draft_kv_cache_memory_bytes: int | None = Field(default=None, ge=1 << 20)
    """The draft's KV cache. Default: room for as many tokens as the target's holds when both share
    a device, else what vLLM finds on the draft's own."""

    draft_enforce_eager: bool | None = None
    """Do not compile the draft model. Default: as the target."""

    draft_startup_timeout_s: float = Field(default=600.0, gt=0.0, le=86_400.0)
    """How long the draft may take to come up: at start once the target is, and at each restart."""

    pad_misses: bool = False
    """Fill short proposals up to K tokens, so that CUDA graphs of uniform length serve."""

    strict: bool = False
    """Raise errors of the plugin instead of decoding plainly. For tests."""

    @field_validator("fan_out")
    @classmethod
    def _fan_out_in_range(cls, value: int | list[int]) -> int | list[int]:
        numbers = value if isinstance(value, list) else [value]
        if any(not 0 <= number <= MAX_FAN_OUT for number in numbers) or sum(numbers) == 0:
            raise ValueError(_NEEDS["fan_out"])
        return value

    @field_validator("branches")
    @classmethod
    def _branches_in_range(cls, value: int | str) -> int | str:
        if isinstance(value, int) and not 1 <= value <= MAX_BRANCHES:
            raise ValueError(_NEEDS["branches"])
        return value

    @field_validator("draft_vocab")
    @classmethod
    def _draft_vocab_in_range(cls, value: int | str | None) -> int | str | None:
        if value == "" or (isinstance(value, int) and value < 0):
            raise ValueError(_NEEDS["draft_vocab"])
        return value

    @model_validator(mode="after")
    def _fan_out_length(self) -> SSDConfig:
        wanted = self.num_speculative_tokens + 1
        if isinstance(self.fan_out, list) and len(self.fan_out) != wanted:
            raise ValueError(
                f"option 'fan_out' = {self.fan_out}: a list needs num_speculative_tokens + 1 = "
                f"{wanted} numbers, got {len(self.fan_out)}"
            )
        return self

    @classmethod
    def parse(cls, options: dict[str, Any]) -> SSDConfig:
        """Validate a dictionary of options.

        Raises:
            ValueError: one sentence for each wrong option, with its value and what it takes.
        """
        options = {name.replace("-", "_"): value for name, value in options.items()}
        try:
            return cls.model_validate(options)
        except ValidationError as error:
            raise ValueError(_explain(error, options)) from None

    @property
    def fan_out_per_k(self) -> tuple[int, ...]:
        """F_k for k = 0..K."""
        if isinstance(self.fan_out, list):
            return tuple(self.fan_out)
        if self.fan_out_policy == "uniform":
            return uniform_fan_out(self.num_speculative_tokens, self.fan_out)
        return geometric_fan_out(
            self.num_speculative_tokens, self.fan_out, self.acceptance, self.miss_exponent
        )

    @property
    def max_branches(self) -> int:
        """Most branches one request can have in a round."""
        every = sum(self.fan_out_per_k)
        return every if self.branches == "auto" else min(self.branches, every)


def _explain(error: ValidationError, options: dict[str, Any]) -> str:
    """Pydantic's findings as one sentence an option, for the person who wrote them."""
    sentences: dict[str, str] = {}
    for finding in error.errors():
        # A union reports each of its members; the option's name comes first in all of them.
        name = str(finding["loc"][0]) if finding["loc"] else ""
        message = finding["msg"].removeprefix("Value error, ")
        if finding["type"] == "extra_forbidden":
            sentence = _unknown(name)
        elif finding["type"] == "missing":
            sentence = f"option {name!r} is missing; add it to the speculative config"
        elif name:
            message = _NEEDS.get(name, message[0].lower() + message[1:])
            sentence = f"option {name!r} = {options[name]!r}: {message}"
        else:
            sentence = message
        sentences.setdefault(name, sentence)
    return "ssd: " + "; ".join(sentences.values())


def _unknown(name: str) -> str:
    similar = get_close_matches(name, SSDConfig.model_fields, n=1)
    hint = f" (did you mean {similar[0]!r}?)" if similar else ""
    return f"unknown option {name!r}{hint}; the options are {', '.join(SSDConfig.model_fields)}"
