"""`P2PKVConnector`, as vLLM sees it: hands each call to the scheduler half or the worker half.

vLLM makes two of it for each engine: one beside the scheduler, one in each worker; under `vllm serve` those are different
processes. Where a half can't be made, or the KV cache can't be expressed, both stay out of it: vLLM then serves as without
p2pkv, and its log says once why.
"""

from collections.abc import Mapping
from dataclasses import replace
from threading import Event
from typing import Any

import torch
from vllm.config import get_current_vllm_config_or_none
from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorBase_V1, KVConnectorRole
from vllm.distributed.parallel_state import get_tensor_model_parallel_rank
from vllm.v1.metrics.cache_hit_source import CacheHitSource

from p2pkv.engines.vllm.crew import Crew, log
from p2pkv.engines.vllm.deployment import Refusal, check_deployment
from p2pkv.engines.vllm.detection import detect
from p2pkv.engines.vllm.instance import Instance
from p2pkv.engines.vllm.loading import Loads
from p2pkv.engines.vllm.orders import ConnectorMetadata, WorkerReport
from p2pkv.engines.vllm.scheduling import SchedulerHalf
from p2pkv.engines.vllm.stats import P2PKVPromMetrics, P2PKVStats, take_stats
from p2pkv.engines.vllm.storing import Stores
from p2pkv.engines.vllm.tally import Tally
from p2pkv.engines.vllm.working import WorkerHalf
from p2pkv.errors import P2pkvError, UnsupportedCacheError


class P2PKVConnector(KVConnectorBase_V1):  # type: ignore[misc]
    """Keeps requests' KV in the node of this instance, and gets it from there.

    Of each call, the half that this isn't, or that is disabled, says what a connector says that has nothing.
    """

    _cache_hit_source = CacheHitSource.HOST

    def __init__(self, vllm_config: Any, role: KVConnectorRole, kv_cache_config: Any) -> None:
        super().__init__(vllm_config, role, kv_cache_config)
        self._tally = Tally()
        self._block_size: int = vllm_config.cache_config.block_size
        self._scheduler: SchedulerHalf | None = None
        self._worker = WorkerHalf(None, None, self._block_size)
        self._report: WorkerReport | None = None
        self._refusal: str | None = None
        self._instance: Instance | None = None
        self._was_reset = False
        try:
            check_deployment(vllm_config)
            self._instance = Instance.configured(vllm_config)
        except P2pkvError as error:
            self._refuse(str(error))
            return
        self._recompute_what_fails()
        starter = Crew("start-node")
        starter.submit(self._instance.start_node)
        starter.close()

    def _refuse(self, reason: str) -> None:
        """Stay out of everything from here on."""
        if self._refusal is None and self._role is KVConnectorRole.SCHEDULER:
            log.warning("p2pkv is disabled, vLLM serves as without it: %s", reason)
        self._refusal = reason

    def _recompute_what_fails(self) -> None:
        """A load may fail at any time; a request must not fail by it.

        The scheduler reads the policy after it has made its connector. Inside a `MultiConnector` it reads that one's, which
        only the worker sees.
        """
        own = self._kv_transfer_config
        if own.kv_load_failure_policy != "recompute" and self._role is KVConnectorRole.SCHEDULER:
            log.info("p2pkv sets kv_load_failure_policy to recompute: what can't be loaded is computed")
        own.kv_load_failure_policy = "recompute"
        whole = get_current_vllm_config_or_none()
        outer = None if whole is None else whole.kv_transfer_config
        if self._role is KVConnectorRole.WORKER and outer is not None and outer.kv_load_failure_policy != "recompute":
            self._refuse(
                f'{Refusal.LOAD_FAILURE_POLICY}: give {outer.kv_connector} "kv_load_failure_policy": "recompute", '
                "else a request fails when a load does"
            )

    # --- worker: once -----------------------------------------------------------------------------------------------------

    def register_kv_caches(self, kv_caches: dict[str, torch.Tensor]) -> None:
        """See whether these caches can be expressed, and make the worker half if they can."""
        try:
            if self._instance is None or self._refusal is not None:
                raise UnsupportedCacheError(Refusal.CONFIG, self._refusal or "no instance")
            paged = detect(self._vllm_config, self._kv_cache_config, kv_caches)
        except UnsupportedCacheError as error:
            self._report = WorkerReport(None, self._refusal or str(error))
            return
        instance, settings, rank = self._instance, self._instance.settings, get_tensor_model_parallel_rank()
        own = paged.layout
        layout = replace(own, kv_heads=own.kv_heads * instance.world_size) if own.planes == 2 else own
        self._worker.close()  # vLLM may register anew
        bell = Event()
        loads = Loads(instance.link(layout, rank), paged, settings.load_deadline_s, self._tally, bell)
        stores = Stores(
            instance.link(layout, rank),
            paged,
            settings.store_buffer_mib * 2**20,
            is_only_worker=instance.world_size == 1,
            tally=self._tally,
            bell=bell,
        )
        self._worker = WorkerHalf(loads, stores, self._block_size, bell)
        self._report = WorkerReport(layout, None)

    def get_handshake_metadata(self) -> WorkerReport | None:
        """What the scheduler half has to know before the first request."""
        return self._report

    # --- worker: each step ------------------------------------------------------------------------------------------------

    def handle_preemptions(self, kv_connector_metadata: ConnectorMetadata) -> None:
        """Blocks are overwritten from here on."""
        self._worker.before_step(kv_connector_metadata)

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:  # noqa: ARG002
        """Start this step's loads."""
        self._worker.start_loads(self._orders())

    def wait_for_layer_load(self, layer_name: str) -> None:
        """Loads run between steps; there is nothing to wait for."""

    def save_kv_layer(self, layer_name: str, kv_layer: torch.Tensor, attn_metadata: Any, **kwargs: Any) -> None:
        """Stores read whole requests once the step has been computed."""

    def wait_for_save(self) -> None:
        """Start this step's stores; nothing is waited for."""
        self._worker.start_stores(self._orders())

    def get_finished(self, finished_req_ids: set[str]) -> tuple[set[str] | None, set[str] | None]:  # noqa: ARG002
        """Ended requests whose blocks may be reused, and requests whose loads have ended."""
        self._worker.rest(self._orders())
        read, received = self._worker.ended()
        return read or None, received or None

    def get_block_ids_with_load_errors(self) -> set[int]:
        """Blocks that vLLM has to compute."""
        return self._worker.take_failed_blocks()

    def build_connector_worker_meta(self) -> WorkerReport | None:
        """The report once more, with the first step: inside a `MultiConnector` another's handshake may come instead of ours."""
        report, self._report = self._report, None
        return report

    def _orders(self) -> ConnectorMetadata:
        orders = self._get_connector_metadata()
        assert isinstance(orders, ConnectorMetadata)
        return orders

    # --- scheduler: once --------------------------------------------------------------------------------------------------

    def set_xfer_handshake_metadata(self, metadata: Mapping[int, object]) -> None:
        """Make the scheduler half, if no worker has found anything against it."""
        reports = [report for report in metadata.values() if isinstance(report, WorkerReport)]
        if reports:
            self._learn(next((report for report in reports if report.refusal is not None), reports[0]))

    def set_xfer_handshake_metadata_pp_aware(self, metadata: Mapping[tuple[int, int], object]) -> None:
        """As `set_xfer_handshake_metadata`; the workers know whether stages are too many."""
        self.set_xfer_handshake_metadata(dict(enumerate(metadata.values())))

    def _learn(self, report: WorkerReport) -> None:
        if self._scheduler is not None or self._refusal is not None:
            return
        if report.layout is None or self._instance is None:
            self._refuse(report.refusal or "no layout")
            return
        self._scheduler = SchedulerHalf(
            self._instance.link(report.layout, worker_id=0),
            self._instance.settings.lookup_deadline_s,
            block_size=self._block_size,
            reads=self._kv_transfer_config.is_kv_consumer,
            writes=self._kv_transfer_config.is_kv_producer,
            tally=self._tally,
        )
        if self._was_reset:
            self._scheduler.forget()

    # --- scheduler: each request ------------------------------------------------------------------------------------------

    @property
    def requires_kv_delivery(self) -> bool:
        """A cache's stores may be lost."""
        return False

    def on_new_request(self, request: Any) -> None:
        """A request has come in."""
        if self._scheduler is not None:
            self._scheduler.new_request(request)

    def get_num_new_matched_tokens(self, request: Any, num_computed_tokens: int) -> tuple[int | None, bool]:
        """How many more tokens the node holds; None while that isn't known."""
        return (0, False) if self._scheduler is None else self._scheduler.matched_tokens(request, num_computed_tokens)

    def update_state_after_alloc(self, request: Any, blocks: Any, num_external_tokens: int) -> None:
        """A request has got its blocks."""
        if self._scheduler is not None:
            self._scheduler.allocated(request, blocks.get_block_ids()[0], num_external_tokens)

    def build_connector_meta(self, scheduler_output: Any) -> ConnectorMetadata:
        """This step's orders."""
        if self._scheduler is None:
            return ConnectorMetadata()
        return self._scheduler.orders(
            scheduler_output.num_scheduled_tokens,
            scheduler_output.preempted_req_ids or set(),
            scheduler_output.kv_connector_block_state.get_block_ids,
        )

    def request_finished(self, request: Any, block_ids: list[int]) -> tuple[bool, dict[str, Any] | None]:
        """A request has ended."""
        return (False, None) if self._scheduler is None else self._scheduler.finished(request, block_ids)

    def update_connector_output(self, connector_output: Any) -> None:
        """What the workers have to say after a step."""
        report = connector_output.kv_connector_worker_meta
        if isinstance(report, WorkerReport):
            self._learn(report)
        if self._scheduler is not None and connector_output.invalid_block_ids:
            self._scheduler.load_failed(connector_output.finished_recving or ())

    def reset_cache(self) -> bool:
        """Find nothing again that was stored until now: the weights may have been changed."""
        self._was_reset = True
        if self._scheduler is not None:
            self._scheduler.forget()
        return True

    # --- both -------------------------------------------------------------------------------------------------------------

    def shutdown(self) -> None:
        """End all threads; what has been copied out of the blocks is stored before."""
        self._worker.close()
        if self._scheduler is not None:
            self._scheduler.close()

    def get_kv_connector_stats(self) -> P2PKVStats | None:
        """What was counted since the last step."""
        return take_stats(self._tally)

    @classmethod
    def build_kv_connector_stats(cls, data: dict[str, Any] | None = None) -> P2PKVStats:
        """Stats that came from another process."""
        return P2PKVStats(data=data or {})

    @classmethod
    def build_prom_metrics(
        cls,
        vllm_config: Any,
        metric_types: dict[Any, Any],
        labelnames: list[str],
        per_engine_labelvalues: dict[int, list[object]],
    ) -> P2PKVPromMetrics:
        """What the API server shows at `/metrics`."""
        return P2PKVPromMetrics(vllm_config, metric_types, labelnames, per_engine_labelvalues)
