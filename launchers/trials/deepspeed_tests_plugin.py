"""pytest plugin of deepspeed_own_tests.py: gives DeepSpeed's own tests another optimizer, and writes down what happens.

Importing it in a process in which DEEPSPEED_TESTS is set is what changes the optimizer there, so that it also holds in
the ranks: they come from a fork server that imports this module first, or are spawned and import it to unpickle
what they run. Only the optimizer block of the configuration changes. "Adam" becomes torch's, as DeepSpeed would compile
its own, and nothing is compiled here; or it becomes "LoRDO", with the keys that the two share.
"""

from __future__ import annotations

import functools
import inspect
import json
import multiprocessing
import os
import sys
import traceback
from pathlib import Path
from typing import Any

VARIABLE = "DEEPSPEED_TESTS"  # JSON: the optimizer, LoRDO's keys, the folder to write into
ADAM_TYPES = ("adam", "adamw", "fusedadam")
SHARED_KEYS = ("lr", "betas", "eps", "weight_decay")
NOT_COMPILED = "deepspeed_own_tests: DeepSpeed's compiled operators are not built here"


# -- the optimizer -----------------------------------------------------------------------------------


def rewritten(config: Any, settings: dict[str, Any]) -> Any:
    """The configuration with another optimizer where it asks for Adam; else itself. The one given stays as it is."""
    block = config.get("optimizer") if isinstance(config, dict) else None
    if not isinstance(block, dict) or str(block.get("type")).lower() not in ADAM_TYPES:
        return config
    given = block.get("params") or {}
    if settings["optimizer"] == "LoRDO":
        shared = {key: given[key] for key in SHARED_KEYS if key in given}
        changed = {**block, "type": "LoRDO", "params": {**shared, **settings["params"]}}
    else:
        changed = {**block, "params": {**given, "torch_adam": True}}
    _write("replaced.jsonl", {"test": _test()})
    return {**config, "optimizer": changed}


def install(settings: dict[str, Any]) -> None:
    """Change the optimizer in this process."""
    import deepspeed
    from deepspeed import load_ds_config
    from deepspeed.ops.op_builder.builder import OpBuilder

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # built by init_distributed, else
    if not hasattr(deepspeed.DeepSpeedEngine, "sparse_tensor_module_names"):
        # Compared by the checkpoint tests of versions up to 0.19.6; later ones have none.
        deepspeed.DeepSpeedEngine.sparse_tensor_module_names = frozenset()
    OpBuilder.jit_load = _refuse_to_compile
    if settings["optimizer"] == "LoRDO":
        import lordo_ds  # noqa: F401 - registers itself

    def loaded(config: Any) -> Any:
        return rewritten(config if config is None or isinstance(config, dict) else load_ds_config(config), settings)

    deepspeed.initialize = _with_config(deepspeed.initialize, ("config", "config_params"), loaded)
    deepspeed.zero.Init.__init__ = _with_config(deepspeed.zero.Init.__init__, ("config_dict_or_path", "config"), loaded)


def _with_config(original: Any, names: tuple[str, ...], loaded: Any) -> Any:
    signature = inspect.signature(original)

    @functools.wraps(original)
    def call(*args: Any, **kwargs: Any) -> Any:
        given = signature.bind(*args, **kwargs)
        for name in names:
            if given.arguments.get(name) is not None:
                given.arguments[name] = loaded(given.arguments[name])
        command_line = given.arguments.get("args")
        path = getattr(command_line, "deepspeed_config", None)
        if path is not None and given.arguments.get("config") is None:
            given.arguments["config"], command_line.deepspeed_config = loaded(path), None
            try:
                return original(*given.args, **given.kwargs)
            finally:
                command_line.deepspeed_config = path
        return original(*given.args, **given.kwargs)

    return call


def _refuse_to_compile(self: Any, *args: Any, **kwargs: Any) -> Any:
    raise RuntimeError(f"{NOT_COMPILED} ({self.name})")


# -- the ranks of DeepSpeed's DistributedTest --------------------------------------------------------


class Rank:
    """What a rank runs: the test's own `_dist_run`, and an error in it is written down before it is raised."""

    def __init__(self, test: Any, name: str) -> None:
        self.test, self.name = test, name

    def __call__(self, *args: Any) -> Any:
        os.environ["PYTEST_CURRENT_TEST"] = self.name
        _compare_nested_states()
        try:
            return type(self.test)._dist_run(self.test, *args)
        except BaseException as error:
            frames = traceback.format_exception(error)
            _write("errors.jsonl", {"test": _test(), "rank": args[0], "error": _story(error), "trace": frames[-12:]})
            raise


def _compare_nested_states() -> None:
    """DeepSpeed's checkpoint tests compare states of tensors; ours has a dictionary of them for each parameter."""
    common = sys.modules.get("unit.checkpoint.common")
    if common is not None and not hasattr(common.compare_state_dicts, "__wrapped__"):
        common.compare_state_dicts = _of_flat_states(common.compare_state_dicts)


def _of_flat_states(original: Any) -> Any:
    @functools.wraps(original)
    def compare_state_dicts(state0: Any, state1: Any, *args: Any, **kwargs: Any) -> None:
        original(flat(state0), flat(state1), *args, **kwargs)

    return compare_state_dicts


def flat(state: dict[str, Any]) -> dict[str, Any]:
    """The same values with the keys of nested dictionaries joined."""
    found: dict[str, Any] = {}
    for key, value in state.items():
        found |= (
            {f"{key}/{inner}": one for inner, one in flat(value).items()} if isinstance(value, dict) else {key: value}
        )
    return found


def _launch(original: Any) -> Any:
    @functools.wraps(original)
    def launch_procs(self: Any, *args: Any, **kwargs: Any) -> None:
        pools, make_pool = [], multiprocessing.get_context("forkserver").Pool

        def pool_of(*pool_args: Any, **pool_kwargs: Any) -> Any:
            pools.append(make_pool(*pool_args, **pool_kwargs))
            return pools[-1]

        module = sys.modules[original.__module__]
        self._dist_run, theirs = Rank(self, os.environ["PYTEST_CURRENT_TEST"]), module.mp.Pool
        module.mp.Pool = pool_of
        try:
            original(self, *args, **kwargs)
        except BaseException as error:
            if type(error).__name__ != "Skipped":
                for pool in {*pools, *self._pool_cache.values()}:
                    pool.terminate()
                self._pool_cache.clear()
            raise
        finally:
            module.mp.Pool = theirs
            del self._dist_run

    return launch_procs


def _close_if_well(original: Any) -> Any:
    @functools.wraps(original)
    def close_pool(self: Any, *args: Any, **kwargs: Any) -> None:
        # After an error the others may be in a collective: DeepSpeed's barrier would wait for ever.
        if sys.exc_info()[0] is None:
            original(self, *args, **kwargs)

    return close_pool


# -- what happened -----------------------------------------------------------------------------------


def _test() -> str:
    return os.environ.get("PYTEST_CURRENT_TEST", "").rpartition(" (")[0]


def _story(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"


def _settings() -> dict[str, Any]:
    return json.loads(os.environ[VARIABLE])  # type: ignore[no-any-return]


def _write(name: str, row: dict[str, Any]) -> None:
    line = json.dumps(row) + "\n"
    with open(Path(_settings()["folder"]) / name, "a") as file:
        file.write(line)


def pytest_configure() -> None:
    multiprocessing.set_forkserver_preload(["torch._dynamo", "torch._inductor.compile_fx", __name__])


def pytest_collection_finish() -> None:
    """DeepSpeed's test classes are there now, where any of them was collected."""
    common = sys.modules.get("unit.common")
    if common is not None:
        common.DistributedExec._launch_procs = _launch(common.DistributedExec._launch_procs)
        common.DistributedExec._close_pool = _close_if_well(common.DistributedExec._close_pool)


def pytest_runtest_logreport(report: Any) -> None:
    if report.when == "call" or report.outcome != "passed":
        reason = report.longrepr
        if isinstance(reason, tuple):
            reason = reason[2]
        crash = getattr(getattr(reason, "reprcrash", None), "message", None)
        _write(
            "results.jsonl",
            {
                "test": report.nodeid,
                "when": report.when,
                "outcome": report.outcome,
                "commit": _settings()["commit"],
                "reason": crash or str(reason or ""),
            },
        )


def pytest_collectreport(report: Any) -> None:
    if report.failed:
        reason = str(report.longrepr)[-400:]
        row = {"test": report.nodeid, "when": "collect", "outcome": "failed", "commit": _settings()["commit"]}
        _write("results.jsonl", {**row, "reason": reason})


if VARIABLE in os.environ:
    install(_settings())
