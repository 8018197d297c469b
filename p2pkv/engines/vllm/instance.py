"""Which instance a vLLM engine belongs to, and how its halves attach to that instance's node."""

import os
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Self

from p2pkv.config import NodeConfig
from p2pkv.engines.autostart import connect_or_start
from p2pkv.engines.cache import EngineCache
from p2pkv.engines.layout import KVLayout
from p2pkv.engines.vllm.deployment import Refusal, model_name
from p2pkv.engines.vllm.link import KnownNode, NodeLink
from p2pkv.engines.vllm.settings import Settings
from p2pkv.errors import ConfigError, NodeUnreachableError, UnsupportedCacheError
from p2pkv.rendezvous import Place, place_of, read_card, runtime_directory

CONFIG_VARIABLES = ("P2PKV_CONFIG_FILE", "LMCACHE_CONFIG_FILE")
CARD_WAIT_S = 2.0
"""A node shows its card within 50 ms of opening its engine socket."""
_POLL_S = 0.02


@dataclass(frozen=True, slots=True)
class Instance:
    """What both halves know before they attach; `configured` makes it.

    Attributes:
        path: The instance's yaml.
        place: Where its node is.
        shows_card: Whether the node shows a card there.
        model: The name under which this engine's chunks are kept.
        world_size: Tensor-parallel workers.
        settings: What the user has set.
    """

    path: Path
    place: Place
    shows_card: bool
    model: str
    world_size: int
    settings: Settings

    @classmethod
    def configured(cls, config: Any, environ: Mapping[str, str] = os.environ) -> Self:
        """As vLLM's configuration and the environment say.

        Args:
            config: A `VllmConfig`.
            environ: The environment.

        Raises:
            UnsupportedCacheError: Something is wrong with it, or missing.
        """
        path = next((environ[name] for name in CONFIG_VARIABLES if environ.get(name)), None)
        if path is None:
            detail = f"set {CONFIG_VARIABLES[0]} or {CONFIG_VARIABLES[1]} to this instance's yaml; neither is set"
            raise UnsupportedCacheError(Refusal.CONFIG, detail)
        try:
            node = NodeConfig.from_yaml(path, environ)
            place = place_of(runtime_directory(environ), node.cluster, node.lmcache_instance_id)
            settings = Settings.from_extra_config(config.kv_transfer_config.kv_connector_extra_config)
        except ConfigError as error:
            raise UnsupportedCacheError(Refusal.CONFIG, str(error)) from error
        world_size = config.parallel_config.tensor_parallel_size
        return cls(
            path=Path(path).absolute(),
            place=place,
            shows_card=node.enable_controller,
            model=model_name(config, settings.model),
            world_size=world_size,
            settings=settings,
        )

    def start_node(self) -> None:
        """Start the node if none runs, so that it is there by the time that vLLM is ready; returns once it is."""
        with suppress(NodeUnreachableError):  # the links will say so
            connect_or_start(self.place, self.path).close()

    def link(self, layout: KVLayout, worker_id: int) -> NodeLink:
        """A way to the node, on which nothing has been sent yet; it starts the node if it must.

        Args:
            layout: Of the whole model.
            worker_id: Tensor-parallel rank.
        """
        attach = partial(
            EngineCache.attach,
            self.path,
            model=self.model,
            layout=layout,
            world_size=self.world_size,
            worker_id=worker_id,
            prefill_tokens_per_s=self.settings.prefill_tokens_per_s,
            reply_s=self.settings.load_deadline_s,
        )
        return NodeLink(attach, self._know)

    def _know(self, cache: EngineCache) -> KnownNode:
        """What the node that `cache` is attached to says of itself.

        Raises:
            NodeUnreachableError: It shows no card.
        """
        generation = None
        if self.shows_card:
            deadline = time.monotonic() + CARD_WAIT_S
            while (card := read_card(self.place)) is None:
                if time.monotonic() >= deadline:
                    raise NodeUnreachableError(f"the node of {self.place.instance} shows no card")
                time.sleep(_POLL_S)
            generation = card.generation
        return KnownNode(self.place.instance, generation, cache.namespace.chunk_size)
