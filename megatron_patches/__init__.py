"""Everything that touches Megatron-core's own code: nothing else in this project patches it."""
