"""p2pkv as a KV connector of vLLM; vLLM finds it through its plugin entry point."""

CONNECTOR = "P2PKVConnector"
"""What a user names in `--kv-transfer-config`."""


def register() -> None:
    """Make the connector known by its name alone; vLLM calls this once in each of its processes."""
    from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory

    if CONNECTOR not in KVConnectorFactory._registry:  # noqa: SLF001 - registering twice raises, and nothing public asks
        KVConnectorFactory.register_connector(CONNECTOR, f"{__name__}.connector", CONNECTOR)
