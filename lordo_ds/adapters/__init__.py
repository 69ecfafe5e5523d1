"""The seam to DeepSpeed; nothing else in the package imports it."""
