"""How an engine finds its draft: it asks Ray for the actor by name, which creates it if need be."""

from __future__ import annotations

import logging
import secrets
import threading
import time
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from vllm_ssd.draft_resources import DraftResources
from vllm_ssd.on_ray.actor import DraftActor
from vllm_ssd.on_ray.cluster import NAMESPACE, connected, placing
from vllm_ssd.on_ray.order import Order, Whereabouts
from vllm_ssd.wire.address import TCPAddress
from vllm_ssd.wire.keys import Key

if TYPE_CHECKING:
    from vllm_ssd.preflight import Checked
    from vllm_ssd.target.draft_setup import DraftPlan

ASK_SECONDS = 0.25
"""From one question whether the server is up to the next."""
PLACING_SECONDS = 10.0
"""After so long without an answer the log says what Ray is asked for."""
SUCCESSOR_SECONDS = 20.0
"""An actor that is just ending still has its name; so long it is tried to get a new one."""
REMOVAL_SECONDS = 5.0
LINGER_SECONDS = 10.0
"""A shared draft outlives its last engine by this: an engine that lost its line comes back."""

logger = logging.getLogger("vllm.vllm_ssd")


class PlacedByRay:
    """The draft of one engine, as Ray knows it.

    Args:
        name: of the actor.
        shared: whether other engines may use it.
        order: what it serves, if it is new.
        resources: what it is given then, and where.
    """

    def __init__(self, name: str, shared: bool, order: Order, resources: DraftResources) -> None:
        self.name = name
        self._shared = shared
        self._order = order
        self._resources = resources

    def find(self, ended: threading.Event) -> tuple[TCPAddress, Key]:
        """Where its server listens, once it is up, and the key.

        Args:
            ended: set when nobody wants to know any more.

        Raises:
            OSError: a sentence; there is no actor, or its server did not come up.
            ValueError: the options do not suit the cluster.
        """
        from ray.exceptions import RayError

        try:
            with connected():
                found = self._find(ended)
        except (OSError, ValueError):
            raise
        except RayError as error:
            raise OSError(f"Ray: {str(error).strip().splitlines()[0]}") from error
        except Exception as error:  # Ray's own and its parts' raise many kinds
            raise OSError(f"Ray: {type(error).__name__}: {error}") from error
        if found.model != self._order.model:
            raise ValueError(
                f"option 'draft_name': the draft of this name has the model {found.model!r}, not "
                f"{self._order.model!r}; use that one, or another name"
            )
        if found.address is None:
            raise OSError(f"the draft does not come up: {found.failure}")
        return found.address, found.key

    def _find(self, ended: threading.Event) -> Whereabouts:
        from ray.exceptions import RayActorError

        if not self._shared:
            self._remove()
        deadline = time.monotonic() + SUCCESSOR_SECONDS
        while True:
            try:
                found = self._ask(self._actor(), ended)
            except RayActorError:
                # That was one on its way out.
                if time.monotonic() > deadline or ended.wait(ASK_SECONDS):
                    raise
                continue
            if found is not None:
                return found
            if not self._shared:
                self._remove()
            raise OSError("the engine has ended")

    def _actor(self) -> Any:
        """The actor of this name, a new one if there is none."""
        import ray

        # Detached for Ray, since none of its engines owns it: it ends itself with the last one.
        return (
            ray.remote(DraftActor)
            .options(
                name=self.name,
                namespace=NAMESPACE,
                get_if_exists=True,
                lifetime="detached",
                max_restarts=0,  # the engines ask again, each for itself
                **placing(self._resources, self._order.on_cpu),
            )
            .remote(self._order)
        )

    def _ask(self, actor: Any, ended: threading.Event) -> Whereabouts | None:
        """What the actor tells when its server is up or has failed; None if that came first."""
        import ray

        began, told = time.monotonic(), False
        asked = actor.whereabouts.remote()
        while not ended.wait(ASK_SECONDS):
            if not ray.wait([asked], timeout=0.0)[0]:
                if not told and time.monotonic() > began + PLACING_SECONDS:
                    told = True
                    amounts = self._resources.amounts(self._order.on_cpu)
                    logger.warning("ssd: Ray has not placed the draft yet; it asks for %s", amounts)
                continue
            found: Whereabouts = ray.get(asked)
            if found.address is not None or found.failure:
                return found
            asked = actor.whereabouts.remote()
        return None

    def _remove(self) -> None:
        """End the actor that this engine had before: it may hang, and nobody else has it."""
        import ray

        deadline = time.monotonic() + REMOVAL_SECONDS
        with suppress(ValueError):  # as soon as there is none
            while time.monotonic() < deadline:
                ray.kill(ray.get_actor(self.name, namespace=NAMESPACE))
                time.sleep(ASK_SECONDS)


def actor_of(checked: Checked, plan: DraftPlan, vllm_config: Any) -> PlacedByRay:
    """The draft of an engine.

    Args:
        checked: the result of the checks.
        plan: how it is brought up.
        vllm_config: the target's.
    """
    config = checked.config
    resources = config.draft_resources or DraftResources()
    on_cpu = plan.device is None
    cores = tuple(config.draft_cpu_cores or ()) if on_cpu else ()
    threads = len(cores) or max(1, int(resources.amounts(on_cpu).get("CPU", 0))) if on_cpu else 0
    shared = config.draft_name is not None
    linger_s = LINGER_SECONDS if shared else 0.0
    order = Order(
        setup=plan.setup,
        vocabulary=checked.join.vocabulary,
        on_cpu=on_cpu,
        threads=threads,
        cores=cores,
        kv_cache_bytes=plan.kv_cache_memory_bytes,
        useful_kv_bytes=plan.useful_kv_bytes,
        linger_s=None if config.draft_detached else linger_s,
    )
    # vLLM's id of the engine is short: two in one cluster must not be one draft's.
    name = config.draft_name or f"{vllm_config.instance_id}_{secrets.token_hex(4)}"
    return PlacedByRay(f"vllm_ssd_draft_{name}", shared, order, resources)
