"""The import rules that keep the code legible, read off the sources with ast (nothing is imported here)."""

from __future__ import annotations

import ast
from collections.abc import Mapping
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

# The rooms from the ground up, and what each may import besides itself: only what stands before it in this table, so
# that there is no circle of rooms. A package is one room, but DeepSpeed's adapter is a room of its own.
ROOMS = {
    "errors": (),
    "version": (),
    "disk": (),
    "progress": (),
    "config_errors": ("errors",),
    "config": ("errors", "config_errors"),
    "watch": ("errors",),
    "core": ("errors", "config"),
    "checkpoint": ("errors", "disk", "config", "core"),
    "comm": ("errors", "watch", "config", "core"),
    "costs": ("errors", "config", "core", "comm"),
    "link_time": (),
    "replica": ("errors", "config", "core", "comm", "costs"),
    "sync": ("errors", "version", "config", "core", "comm", "costs", "replica"),
    "start_table": ("config", "core", "costs", "replica"),
    "ranks": ("config", "checkpoint", "comm", "core", "replica"),
    "alone": ("errors", "watch", "config", "core", "comm", "replica", "sync", "start_table", "ranks"),
    "adapters.fsdp2": ("errors", "config", "checkpoint", "core", "comm", "replica", "ranks"),
    "saved_state": ("errors", "watch", "config", "core", "checkpoint", "comm", "replica", "sync", "ranks"),
    "crossings": ("watch", "config", "core", "replica", "sync"),
    "optimizer": (
        "errors", "watch", "config", "core", "checkpoint", "comm", "replica", "sync", "start_table", "ranks", "alone",
        "adapters.fsdp2", "saved_state", "crossings",
    ),
    "handle": ("comm", "start_table", "optimizer"),
    "status": ("comm", "costs", "sync", "start_table", "alone", "optimizer", "handle"),
    "adapters": ("errors", "config", "core", "checkpoint", "comm", "sync", "saved_state", "optimizer", "handle"),
    "adapters.deepspeed": (
        "errors", "disk", "watch", "config", "core", "checkpoint", "comm", "costs", "replica", "sync", "start_table",
        "saved_state", "optimizer", "handle", "status", "adapters",
    ),
    "data": ("errors", "disk", "progress"),
    "cli": ("errors", "progress", "config", "checkpoint", "costs", "data"),
}  # fmt: skip
# Where every user comes in: the package itself, whose names are all that it has.
PUBLIC = "lordo_ds"

# Outside module -> the parts of this repository that may import it, at any depth and in any function.
ALLOWED: dict[str, tuple[str, ...]] = {
    "deepspeed": ("lordo_ds.adapters.deepspeed", "launchers", "tests"),
    "megatron": ("megatron_patches", "lordo_ds.data", "launchers", "tests"),
    "torch.distributed": (
        "lordo_ds.comm",
        "lordo_ds.sync.alike",
        "lordo_ds.watch",
        "lordo_ds.ranks",
        "lordo_ds.alone",
        "lordo_ds.optimizer",
        "lordo_ds.adapters",
        "megatron_patches",
        "launchers",
        "tests",
    ),
}
# Our own part that only some may import, for the same reason.
ALLOWED["megatron_patches"] = ("megatron_patches", "launchers", "tests")


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imported_modules(source: str, module: str, is_package: bool = False) -> set[str]:
    """Every dotted name a source imports, function bodies included, TYPE_CHECKING blocks not.

    `from a import b` yields `a` and `a.b`: b may be a module. `torch.distributed` also counts when it is
    reached as an attribute of an imported `torch`, under whatever name.
    """
    tree = ast.parse(source)
    typing_only = {
        id(node)
        for block in ast.walk(tree)
        if isinstance(block, ast.If) and ast.unparse(block.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING")
        for statement in block.body
        for node in ast.walk(statement)
    }
    found: set[str] = set()
    torch_names: set[str] = set()
    for node in ast.walk(tree):
        if id(node) in typing_only:
            continue
        if isinstance(node, ast.Import):
            for alias in node.names:
                found.add(alias.name)
                if alias.name == "torch" or (alias.name.startswith("torch.") and alias.asname is None):
                    torch_names.add(alias.asname or "torch")
        elif isinstance(node, ast.ImportFrom):
            base = _absolute(node, module, is_package)
            if base != PUBLIC:  # `from lordo_ds import optimizer` asks for that module only
                found.add(base)
            found.update(f"{base}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[-1] in (
            "import_module",
            "__import__",
        ):
            found.update(a.value for a in node.args if isinstance(a, ast.Constant) and isinstance(a.value, str))
    for node in ast.walk(tree):
        if (
            isinstance(node, ast.Attribute)
            and node.attr == "distributed"
            and isinstance(node.value, ast.Name)
            and node.value.id in torch_names
        ):
            found.add("torch.distributed")
    return found


def _absolute(node: ast.ImportFrom, module: str, is_package: bool) -> str:
    if node.level == 0:
        return node.module or ""
    package = module.split(".") if is_package else module.split(".")[:-1]
    base = package[: len(package) - (node.level - 1)]
    return ".".join([*base, node.module] if node.module else base)


def is_in(module: str, part: str) -> bool:
    return module == part or module.startswith(part + ".")


def room_of(name: str) -> str | None:
    """The room that a dotted name leads into; None outside the package, and for the package itself."""
    inside = name.removeprefix(PUBLIC + ".") if is_in(name, PUBLIC) else name
    return max((room for room in ROOMS if inside != name and is_in(inside, room)), key=len, default=None)


def violations(module: str, imported: set[str]) -> list[str]:
    """What a module imports against the rules; [] if it keeps them."""
    wrong = []
    for outside, allowed in ALLOWED.items():
        if any(is_in(name, outside) for name in imported) and not any(is_in(module, part) for part in allowed):
            wrong.append(f"{module} imports {outside}; only {', '.join(allowed)} may")
    if not is_in(module, PUBLIC) or module == PUBLIC:
        return wrong
    room = room_of(module)
    if room is None:
        return [*wrong, f"{module} is in no room: give it a row in ROOMS"]
    ours = {name: room_of(name) for name in imported if is_in(name, PUBLIC)}
    wrong += [f"{module} imports {name}, and the package imports everything" for name in ours if ours[name] is None]
    wrong += [
        f"{module} imports {name}; {room} may import {', '.join(ROOMS[room]) or 'nothing of ours'}"
        for name, other in sorted(ours.items())
        if other is not None and other != room and other not in ROOMS[room]
    ]
    return wrong


def circles(imports: Mapping[str, set[str]]) -> list[list[str]]:
    """Modules that import each other, directly or through others: each list is one round."""
    found: list[list[str]] = []
    done: set[str] = set()

    def walk(module: str, way: list[str]) -> None:
        if module in way:
            found.append([*way[way.index(module) :], module])
        elif module not in done:
            for name in sorted(imports[module]):
                walk(name, [*way, module])
            done.add(module)

    for module in sorted(imports):
        walk(module, [])
    return found


def sources(folder: str) -> list[Path]:
    return sorted((ROOT / folder).rglob("*.py"))


ALL_SOURCES = [path for folder in ("lordo_ds", "megatron_patches", "launchers") for path in sources(folder)]


@pytest.mark.parametrize("room", sorted(ROOMS))
def test_every_room_named_here_exists(room: str) -> None:
    """A room that is moved or renamed must move in ROOMS too, or its rule checks nothing."""
    assert any(is_in(module_name(path), f"lordo_ds.{room}") for path in ALL_SOURCES)


def test_every_room_imports_only_what_stands_before_it() -> None:
    names = list(ROOMS)
    for room, allowed in ROOMS.items():
        assert set(allowed) <= set(names[: names.index(room)]), room


def test_no_module_is_in_a_circle() -> None:
    """Not through imports inside function bodies either: whatever is read first then has what it needs."""
    modules = {module_name(path): path for path in ALL_SOURCES}
    names = {name: name for name in modules} | {name.removeprefix("launchers."): name for name in modules}
    imports = {
        module: {
            names[name]
            for name in imported_modules(path.read_text(), module, path.name == "__init__.py")
            if name in names
        }
        for module, path in modules.items()
    }
    assert "launchers.lab.replicas" in set().union(*imports.values()) and len(imports["lordo_ds.optimizer"]) > 10
    assert not circles(imports)


def test_a_circle_through_a_function_body_is_found() -> None:
    sources = {"a": "import b", "b": "def f():\n    from c import x", "c": "import a", "d": "import a"}
    assert circles({name: imported_modules(text, name) & set(sources) for name, text in sources.items()}) == [
        ["a", "b", "c", "a"]
    ]


@pytest.mark.parametrize("path", ALL_SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_one_way(path: Path) -> None:
    module = module_name(path)
    wrong = violations(module, imported_modules(path.read_text(), module, path.name == "__init__.py"))
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("lordo_ds.core.basis", "import torch.distributed as dist"),
        ("lordo_ds.core.basis", "from torch import distributed"),
        ("lordo_ds.core.basis", "import torch\ndef f(): torch.distributed.barrier()"),
        ("lordo_ds.core.basis", "import torch as t\nt.distributed.barrier()"),
        ("lordo_ds.core.basis", "from torch.distributed import all_reduce"),
        ("lordo_ds.core.basis", "def f():\n    import deepspeed"),
        ("lordo_ds.core.basis", "from ..comm import wire"),
        ("lordo_ds.core.basis", "from lordo_ds import optimizer"),
        ("lordo_ds.core.basis", "from lordo_ds import LordoConfig"),
        ("lordo_ds.core.basis", "from lordo_ds.disk import write"),
        ("lordo_ds.config", "from lordo_ds.core import schedule"),
        ("lordo_ds.config", "import torch.distributed"),
        ("lordo_ds.watch.watchdog", "from lordo_ds.comm.wire import ReplicaWire"),
        ("lordo_ds.checkpoint.files", "from lordo_ds.comm.groups import of_all_ranks"),
        ("lordo_ds.replica.bases", "from lordo_ds.sync.moments import common_moments_"),
        ("lordo_ds.replica.bases", "def f():\n    from ..sync import moments"),
        ("lordo_ds.replica.bases", "import torch.distributed as dist"),
        ("lordo_ds.sync.outer_sync", "import torch.distributed as dist"),
        ("lordo_ds.sync.outer_sync", "from lordo_ds.optimizer import LoRDO"),
        ("lordo_ds.sync.alike", "def f():\n    import lordo_ds"),
        ("lordo_ds.sync.outer_sync", "import deepspeed.comm"),
        ("lordo_ds.sync.outer_sync", "from importlib import import_module\nimport_module('deepspeed')"),
        ("lordo_ds.optimizer", "from deepspeed import comm"),
        ("lordo_ds.optimizer", "from .adapters import torchft"),
        ("lordo_ds.optimizer", "from megatron.core import parallel_state"),
        ("lordo_ds.adapters.torchft", "import deepspeed"),
        ("lordo_ds.adapters.torchft", "from lordo_ds.adapters.deepspeed import api"),
        ("lordo_ds.adapters.deepspeed.api", "import megatron.core"),
        ("lordo_ds.adapters.deepspeed.api", "import megatron_patches.mpu"),
        ("lordo_ds.status", "import deepspeed"),
        ("lordo_ds.cli.ckpt", "from lordo_ds.optimizer import LoRDO"),
        ("lordo_ds.of_nobody", "import torch"),
        ("megatron_patches.mpu", "import deepspeed"),
    ],
)
def test_each_rule_catches_what_it_forbids(module: str, source: str) -> None:
    assert violations(module, imported_modules(source, module))


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("lordo_ds.core.basis", "import torch\nfrom torch import Tensor\nfrom .schedule import due"),
        ("lordo_ds.core.grouping", "from lordo_ds.config import LordoConfig"),
        ("lordo_ds.core.basis", "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import deepspeed"),
        ("lordo_ds.comm.comm", "import torch.distributed as dist\nfrom ..core import mesh"),
        ("lordo_ds.optimizer", "from .sync.outer_sync import OuterSync\nfrom lordo_ds import alone"),
        ("lordo_ds.adapters.deepspeed.api", "import deepspeed\nfrom ..optimizer import LoRDO"),
        ("lordo_ds.data.tokens", "from megatron.core.datasets import indexed_dataset"),
        ("megatron_patches.mpu", "import megatron.core\nimport lordo_ds"),
        ("launchers.pretrain_gpt", "import deepspeed\nimport megatron.core\nimport megatron_patches.mpu"),
    ],
)
def test_no_rule_forbids_what_the_design_allows(module: str, source: str) -> None:
    assert not violations(module, imported_modules(source, module))
