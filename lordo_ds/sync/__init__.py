"""What crosses replicas at the end of a step, and what becomes of replicas that cannot take part."""
