"""LMCache's configuration keys, and what they mean here."""

SHARED_KEYS = frozenset(
    {
        "chunk_size",
        "local_cpu",
        "max_local_cpu_size",
        "local_disk",
        "max_local_disk_size",
        "cache_policy",
        "enable_controller",
        "lmcache_instance_id",
        "controller_url",
        "lmcache_worker_port",
        "distributed_url",
    }
)
"""Keys that mean the same in LMCache and here."""

ALIASES = {"lmcache_worker_ports": "lmcache_worker_port", "controller_pull_url": "controller_url"}
"""LMCache's newer names of keys."""

MEANINGLESS_KEYS = {
    key: reason
    for reason, keys in {
        "there is no remote store": "remote_url remote_serde remote_storage_plugins audit_actual_remote_url",
        "there is no central controller to answer to": "controller_reply_url",
        "nodes find and watch each other by themselves": "enable_p2p p2p_host p2p_init_ports p2p_lookup_ports mp_host mp_port"
        " lmcache_worker_ids lmcache_worker_heartbeat_delay_time lmcache_worker_heartbeat_time transfer_channel",
        "moves replace prefill-decode channels": "enable_pd enable_xpyd pd_role pd_buffer_size pd_buffer_device pd_peer_host"
        " pd_peer_init_port pd_peer_alloc_port pd_peer_query_port pd_proxy_host pd_proxy_port pd_allocation_timeout_sec"
        " pd_shutdown_timeout_sec pd_condition_poll_interval_sec pd_max_prefill_len pd_backend_mode"
        " pd_skip_proxy_notification pd_bidirectional enable_nixl nixl_role nixl_peer_host nixl_peer_port nixl_receiver_host"
        " nixl_receiver_port nixl_peer_init_port nixl_peer_alloc_port nixl_proxy_host nixl_proxy_port nixl_backends"
        " nixl_buffer_size nixl_buffer_device nixl_enable_gc",
        "chunks are kept in host memory": "gds_path gds_path_sharding gds_buffer_size gds_backend use_gds cufile_buffer_size"
        " weka_path maru_path maru_pool_size local_disk_path_sharding store_location retrieve_locations storage_plugins"
        " external_backends",
        "its memory is made chunk by chunk": "local_cpu_use_hugepages reserve_local_cpu_size numa_mode pin_timeout_sec"
        " pin_check_interval_sec enable_lazy_memory_allocator lazy_memory_initial_ratio lazy_memory_expand_trigger_ratio"
        " lazy_memory_step_ratio lazy_memory_safe_size cost_aware_half_life_seconds cost_aware_ewma_alpha",
        "chunk keys have one digest, the same everywhere": "pre_caching_hash_algorithm",
        "the partly filled last chunk of a prompt is always stored": "save_unfull_chunk",
        "the engine's adapter decides what it stores and loads": "use_layerwise save_decode_cache enable_async_loading"
        " priority_limit min_retrieve_tokens hit_miss_ratio blocking_timeout_secs use_gpu_connector_v3"
        " enable_hidden_state_cache max_hidden_state_cpu_size hidden_state_layers hidden_states_retrieve_mode",
        "prefixes aren't blended": "enable_blending blend_recompute_ratios blend_thresholds blend_check_layers"
        " blend_min_tokens blend_special_str",
        "every node answers lookups itself": "external_lookup_client lookup_timeout_ms lookup_server_worker_ids"
        " enable_scheduler_bypass_lookup",
        "every node has its own HTTP door": "internal_api_server_enabled internal_api_server_host"
        " internal_api_server_port_start internal_api_server_include_index_list internal_api_server_socket_path_prefix",
        "p2pkv has nothing like it": "extra_config py_enable_gc runtime_plugin_locations plugin_locations"
        " script_allowed_imports enable_chunk_statistics chunk_statistics_auto_start_statistics"
        " chunk_statistics_auto_exit_timeout_hours chunk_statistics_auto_exit_target_unique_chunks"
        " chunk_statistics_strategy enable_kv_events remote_config_url app_id",
    }.items()
    for key in keys.split()
}
"""LMCache's other keys, and why they have no meaning here."""

LMCACHE_KEYS = SHARED_KEYS | set(ALIASES) | set(MEANINGLESS_KEYS)
"""All of LMCache's keys."""
