"""Imported by the fork server of tests/ranks.py, so that every rank starts with these modules in memory.

A module that cannot be imported is left to the test that wants it, which then says why.
"""

import contextlib
import gc
import importlib

MODULES = (
    "torch.distributed",
    # Most of a fresh rank's start-up: a collective pulls in the first, DeepSpeed's engine the others.
    "torch.fx.experimental.symbolic_shapes",
    "torch._dynamo",
    "torch._inductor.compile_fx",
    "numpy",
    "pytest",
    "hypothesis",
    "tests.ranks",
    "deepspeed",
    "deepspeed.runtime.zero.muon.muon_optimizer",
    "megatron.core",
    "lordo_ds",
    "lordo_ds.optimizer",
)

for name in MODULES:
    with contextlib.suppress(Exception):
        importlib.import_module(name)
# Children share the pages of what is frozen here instead of copying them at their first collection.
gc.collect()
gc.freeze()
