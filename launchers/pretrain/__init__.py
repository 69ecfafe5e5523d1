"""The reference training behind `pretrain_gpt.py`."""
