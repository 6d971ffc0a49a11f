"""Several processes that train one model: ranks, messages between them, and sharding."""
