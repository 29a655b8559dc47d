"""Every option of the ``ssd`` method: its meaning, its default, what it must satisfy."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from vllm_ssd.core.forks import geometric_fan_out
from vllm_ssd.draft_resources import DraftResources
from vllm_ssd.option_errors import (
    MAX_BRANCHES,
    MAX_FAN_OUT,
    MAX_SPECULATIVE_TOKENS,
    NEEDS,
    explain,
)

ADDITIONAL_CONFIG_KEY = "ssd"
"""The options' key in vLLM's ``additional_config``, its one free-form field."""

AUTO_BRANCHES = 32
"""The most branches of a request if no option sets a number: twice as many would hit 0.03 more
often (docs/profiling.md), and each is a row of the draft's batch."""

_OF_RAY = ("draft_resources", "draft_name", "draft_detached")
"""Options that only a draft placed by Ray has."""

_OF_THE_SERVER = (
    "model",
    "draft_placement",
    "draft_device",
    "draft_cpu_cores",
    "draft_dtype",
    "draft_quantization",
    "draft_vocab",
    "draft_revision",
    "draft_code_revision",
    "draft_hf_overrides",
    "draft_load_format",
    "draft_max_model_len",
    "draft_kv_cache_memory_bytes",
    "draft_enforce_eager",
    "draft_startup_timeout_s",
)
"""Options that a draft server has in place of its targets."""


class GeometricFanOut(BaseModel):
    """``fan_out`` guesses after each k on average, spread by Theorem 12 of arXiv 2603.03251."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    geometric: int = Field(ge=1, le=MAX_FAN_OUT)
    acceptance: float = Field(default=0.7, gt=0.0, lt=1.0)
    """a, the chance that one drafted token is accepted."""
    miss_exponent: float = Field(default=1.0, gt=0.0, le=10.0)
    """r: of F guesses of ``t*`` none is right with chance ``F^-r`` (Def. 11)."""


class SSDConfig(BaseModel):
    """The options of Speculative Speculative Decoding.

    In ``speculative_config={"method": "ssd", ...}`` they stand beside ``method``; with vLLM's plain
    ``custom_class`` spelling they stand in ``additional_config={"ssd": {...}}``.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    model: str = Field(default="", min_length=1)
    """The draft model: a folder or a hub name, with the target's tokenizer."""

    draft_address: str | None = Field(default=None, min_length=1)
    """In place of ``model``: where a draft server listens (``vllm-ssd draft-server``),
    ``"unix:/PATH"`` or ``"tcp://HOST:PORT"``. It has its own model, device and memory, and may
    draft for several targets."""

    draft_key_file: str | None = Field(default=None, min_length=1)
    """The file with the key of that server, which TCP needs."""

    draft_placement: Literal["process", "ray"] = "process"
    """Who places the draft. ``"process"``: it is a process beside the target. ``"ray"``: it is an
    actor that Ray places on any node, and that several engines may share (docs/ray.md)."""

    draft_resources: DraftResources | None = None
    """What that actor asks Ray for."""

    draft_name: str | None = Field(default=None, pattern=r"^[A-Za-z0-9._-]{1,64}$")
    """Its name, if it is shared: the engines of one Ray cluster that name the same one have one
    draft. The first describes it, the others must suit it."""

    draft_detached: bool = False
    """A shared actor stays when its last engine has gone, until ``ray.kill``."""

    num_speculative_tokens: int = Field(ge=1, le=MAX_SPECULATIVE_TOKENS)
    """K, the most tokens drafted for one verification."""

    fan_out: Literal["auto"] | int | list[int] | GeometricFanOut = "auto"
    """The most ``t*`` guessed after each number k of accepted tokens. ``"auto"``: no such cap, the
    likeliest outcomes are guessed, whatever their k. To compare with, the fan-outs of
    arXiv 2603.03251: a number (uniform), K + 1 numbers for k from 0 to K (hand-made), or
    ``{"geometric": F}``."""

    branches: int | Literal["auto"] = "auto"
    """Branches per request and round. ``"auto"``: as many as the measured times let reach a useful
    depth before the verification ends, likeliest outcomes first."""

    backup: Literal["auto", "draft", "ngram", "none"] = "auto"
    """What is proposed where a look-up finds nothing, or fewer than K tokens. ``"draft"``: the
    target waits for the draft, token by token, as long as that pays. ``"ngram"``: what followed the
    same tokens earlier in the text, by vLLM's n-gram proposer. ``"none"``: what was found.
    ``"auto"``: the draft while waiting pays, else the n-gram."""

    max_wait_ms: float | Literal["auto"] = "auto"
    """How long one proposal (the whole batch) may wait for the draft. ``"auto"``: as long as that
    pays by the measured times."""

    draft_sampling: Literal["auto", "greedy", "probabilistic"] = "auto"
    """How tokens are drafted for requests with a temperature. ``"greedy"``: the draft's first
    choices, verified as certain. ``"probabilistic"``: sampled, verified by the probabilities they
    were sampled with. ``"auto"``: what yields more tokens per second, learned while it runs."""

    draft_top_n: int = Field(default=64, ge=2, le=256)
    """Sampled tokens come from so many of the draft's best."""

    saguaro_c: float | Literal["auto"] = 1.0
    """C of Saguaro sampling (arXiv 2603.03251, Definition 14), from 0 to 1: the weight, when
    tokens are sampled, of those that have a fork. Less than 1: rejections lead to a fork more
    often, but there are more of them. ``"auto"``: learned while it runs."""

    draft_device: str = Field(default="auto", pattern=r"^(auto|cpu|cuda(:\d+)?)$")
    """Where the draft runs: ``"auto"``, ``"cpu"``, ``"cuda"`` (as auto) or ``"cuda:<index>"``, the
    index counting the devices that the engine's process sees (``CUDA_VISIBLE_DEVICES``). Auto: the
    target's kind of device; on CUDA the first one that the target does not use, of
    ``--device-ids`` if that is given, else the target's own."""

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

    draft_revision: str | None = Field(default=None, min_length=1)
    """Branch, tag or commit of a draft from the hub. Default: its main branch."""

    draft_code_revision: str | None = Field(default=None, min_length=1)
    """The same for the code of a draft that needs ``--trust-remote-code``."""

    draft_hf_overrides: dict[str, Any] | None = None
    """As vLLM's ``hf_overrides``, a dictionary, for the draft model."""

    draft_load_format: str = Field(default="auto", min_length=1)
    """As vLLM's ``load_format``, for the draft model. It does not follow the target's, which may
    suit the target's files alone."""

    draft_max_model_len: int | None = Field(default=None, ge=2)
    """Longest text the draft follows. Default: the target's, at most what the draft supports."""

    draft_kv_cache_memory_bytes: int | None = Field(default=None, ge=1 << 20)
    """The draft's KV cache. Default: room for as many tokens as the target's holds when both share
    a device, else what vLLM finds on the draft's own."""

    draft_enforce_eager: bool | None = None
    """Do not compile the draft model. Default: as the target."""

    draft_startup_timeout_s: float = Field(default=600.0, gt=0.0, le=86_400.0)
    """How long the draft may take to load: at start once the target has, or at once where it has a
    device of its own; and at each restart."""

    pad_misses: bool | Literal["auto"] = "auto"
    """Fill short proposals up to K tokens. ``"auto"``: where the target has FULL CUDA graphs for
    decoding alone, which serve only batches in which every request verifies K tokens."""

    strict: bool = False
    """Raise errors of the plugin instead of decoding plainly. For tests."""

    @field_validator("fan_out")
    @classmethod
    def _fan_out_in_range(
        cls, value: str | int | list[int] | GeometricFanOut
    ) -> str | int | list[int] | GeometricFanOut:
        if isinstance(value, (str, GeometricFanOut)):
            return value
        numbers = value if isinstance(value, list) else [value]
        if any(not 0 <= number <= MAX_FAN_OUT for number in numbers) or sum(numbers) == 0:
            raise ValueError(NEEDS["fan_out"])
        return value

    @field_validator("branches")
    @classmethod
    def _branches_in_range(cls, value: int | str) -> int | str:
        if isinstance(value, int) and not 1 <= value <= MAX_BRANCHES:
            raise ValueError(NEEDS["branches"])
        return value

    @field_validator("max_wait_ms")
    @classmethod
    def _max_wait_in_range(cls, value: float | str) -> float | str:
        if not isinstance(value, str) and not 0.0 <= value <= 10_000.0:
            raise ValueError(NEEDS["max_wait_ms"])
        return value

    @field_validator("saguaro_c")
    @classmethod
    def _saguaro_c_in_range(cls, value: float | str) -> float | str:
        if not isinstance(value, str) and not 0.0 <= value <= 1.0:
            raise ValueError(NEEDS["saguaro_c"])
        return value

    @field_validator("draft_vocab")
    @classmethod
    def _draft_vocab_in_range(cls, value: int | str | None) -> int | str | None:
        if value == "" or (isinstance(value, int) and value < 0):
            raise ValueError(NEEDS["draft_vocab"])
        return value

    @model_validator(mode="after")
    def _one_draft(self) -> SSDConfig:
        if self.draft_address is None:
            if not self.model:
                raise ValueError(
                    "option 'model' is missing; add it to the speculative config (or "
                    "'draft_address', where a draft server listens)"
                )
            if self.draft_key_file is not None:
                raise ValueError(
                    f"option 'draft_key_file' = {self.draft_key_file!r}: it is the key of a draft "
                    "server; set 'draft_address', or leave it out"
                )
            self._check_ray()
            return self
        given = self.model_fields_set
        of_the_server = [name for name in (*_OF_THE_SERVER, *_OF_RAY) if name in given]
        if of_the_server:
            raise ValueError(
                f"option {of_the_server[0]!r} = {getattr(self, of_the_server[0])!r}: with "
                "'draft_address' that is the draft server's own; leave it out"
            )
        return self

    def _check_ray(self) -> None:
        """Refuse what does not go with the placement."""
        if self.draft_placement != "ray":
            of_ray = [name for name in _OF_RAY if name in self.model_fields_set]
            if of_ray:
                raise ValueError(
                    f"option {of_ray[0]!r} = {getattr(self, of_ray[0])!r}: only a draft that Ray "
                    "places has it; set 'draft_placement' to 'ray', or leave it out"
                )
            return
        if self.draft_device != "auto":
            raise ValueError(
                f"option 'draft_device' = {self.draft_device!r}: Ray chooses the device; set "
                "'draft_resources', or leave it out"
            )
        if self.draft_detached and self.draft_name is None:
            raise ValueError(
                "option 'draft_detached' = True: only a draft with a name can be found again; set "
                "'draft_name', or leave it out"
            )

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
            raise ValueError(explain(error, options, cls.model_fields)) from None

    @property
    def has_process(self) -> bool:
        """Whether the draft is a process beside the target."""
        return self.draft_address is None and self.draft_placement == "process"

    @property
    def fan_out_per_k(self) -> tuple[int, ...] | None:
        """F_k for k = 0..K; None where there is no cap for each k."""
        match self.fan_out:
            case "auto":
                return None
            case list():
                return tuple(self.fan_out)
            case GeometricFanOut(geometric=fan_out, acceptance=a, miss_exponent=r):
                return geometric_fan_out(self.num_speculative_tokens, fan_out, a, r)
            case fan_out:
                return (fan_out,) * (self.num_speculative_tokens + 1)

    @property
    def max_branches(self) -> int:
        """Most branches one request can have in a round."""
        caps = self.fan_out_per_k
        wanted = self.branches if isinstance(self.branches, int) else None
        if caps is None:
            return wanted or AUTO_BRANCHES
        return min(wanted or sum(caps), sum(caps))
