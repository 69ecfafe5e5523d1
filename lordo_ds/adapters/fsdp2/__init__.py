"""PyTorch's `fully_shard` (FSDP2) without an engine: replicas on a DeviceMesh, parameters that are DTensors."""
