"""A worker that has several settings of SSD, of which one at a time is in use.

Settings that take turns in one engine, at one draft server, differ in nothing else: no process was
started at another time, no memory lies elsewhere. Each keeps what it has learned.
"""

from __future__ import annotations

import copy
from typing import Any, NamedTuple

from vllm_ssd.config import ADDITIONAL_CONFIG_KEY
from vllm_ssd.preflight import check_engine, engine_options
from vllm_ssd.target.draft_life import DraftLife
from vllm_ssd.target.v1.proposer import SSDProposer
from vllm_ssd.target.v1.worker import SSDWorker


class Setting(NamedTuple):
    """The parts of a worker that follow its options."""

    proposer: SSDProposer
    draft: DraftLife | None


class SettingsWorker(SSDWorker):
    """Ours; the engine's own settings are those with the largest K, and not in use."""

    _settings: list[Setting]

    def add_settings(self, settings: list[dict[str, Any]]) -> None:
        """Connect to the draft server once more for each.

        Args:
            settings: options, K among them, in place of the engine's.

        Raises:
            RuntimeError: the draft server does not take one of them.
        """
        self._settings = []
        for options in settings:
            vllm_config = copy.copy(self.vllm_config)
            own = vllm_config.additional_config[ADDITIONAL_CONFIG_KEY]
            vllm_config.additional_config = {ADDITIONAL_CONFIG_KEY: {**own, **options}}
            speculative = vllm_config.speculative_config = copy.copy(self.speculative_config)
            speculative.num_speculative_tokens = options["num_speculative_tokens"]
            self._config = engine_options(vllm_config)
            proposer = self.model_runner.drafter = SSDProposer(vllm_config)
            self._start_draft(check_engine(vllm_config), [])
            proposer.bind(self.model_runner, self._client, self._make_hand_over())
            proposer.warmed_up(vllm_config)
            self._with_draft(DraftLife.target_is_ready)
            if self._client is None or not self._client.up:
                raise RuntimeError(f"the draft server does not take {options}")
            self._settings.append(Setting(proposer, self._draft))
        self._snapshots = None

    def use_setting(self, number: int) -> None:
        """Propose by this one from now on; no request may be running."""
        self.model_runner.drafter, self._draft = self._settings[number]
