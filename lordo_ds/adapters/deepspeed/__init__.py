"""LoRDO in DeepSpeed: registration, the hook on an engine, its wrappers, its checkpoints."""
