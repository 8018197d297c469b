"""LocalCPUBackend: the bytes of chunks, in memory that processes share."""
