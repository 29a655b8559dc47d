"""What a draft that Ray places asks Ray for: the option ``draft_resources``."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field


class DraftResources(BaseModel):
    """Resources of the draft's actor, and where it is to be; what is left out is Ray's choice.

    Any other name is a custom resource of the cluster, with how much of it.
    """

    model_config = ConfigDict(extra="allow", frozen=True, strict=True)
    __pydantic_extra__: dict[str, Annotated[float, Field(ge=0.0)]] = Field(init=False)

    num_cpus: float | None = Field(default=None, ge=0.0)
    """Default: 1 on CPU, none on CUDA. On CPU the draft has as many threads (at least 1)."""
    num_gpus: float | None = Field(default=None, ge=0.0)
    """Default: 1 on CUDA, none on CPU."""
    node: str | None = Field(default=None, min_length=1)
    """A node's IP or id. While it is dead the draft is placed elsewhere."""
    bundle: int | None = Field(default=None, ge=0)
    """The bundle of the engine's placement group. Default: the first that has these resources
    free, else outside the group."""

    @property
    def custom(self) -> dict[str, float]:
        """Custom resources."""
        return dict(self.__pydantic_extra__)

    def amounts(self, on_cpu: bool) -> dict[str, float]:
        """What is asked for, by Ray's names.

        Args:
            on_cpu: whether the draft runs on CPU.
        """
        cpus = float(on_cpu) if self.num_cpus is None else self.num_cpus
        gpus = float(not on_cpu) if self.num_gpus is None else self.num_gpus
        wanted = {"CPU": cpus, "GPU": gpus, **self.custom}
        return {name: amount for name, amount in wanted.items() if amount}
