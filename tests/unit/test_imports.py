"""The import rules that keep the code legible, read off the sources with ast (nothing is imported here)."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

# Layers from the ground up: each may import itself and what stands before it, never what stands after.
LAYERS = (
    "lordo_ds.disk",
    "lordo_ds.config",
    "lordo_ds.core",
    "lordo_ds.checkpoint",
    "lordo_ds.dist",
    "lordo_ds.optimizer",
    "lordo_ds.handle",
    "lordo_ds.status",
    "lordo_ds.adapters",
    "lordo_ds.cli",
)

# Outside module -> the parts of this repository that may import it, at any depth and in any function.
ALLOWED = {
    "deepspeed": ("lordo_ds.adapters", "launchers", "tests"),
    "megatron": ("megatron_patches", "lordo_ds.data", "launchers", "tests"),
    "torch.distributed": (
        "lordo_ds.dist",
        "lordo_ds.optimizer",
        "lordo_ds.adapters",
        "lordo_ds.checkpoint",
        "lordo_ds.data",
        "lordo_ds.status",
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


def violations(module: str, imported: set[str]) -> list[str]:
    """What a module imports against the rules; [] if it keeps them."""
    wrong = []
    for outside, allowed in ALLOWED.items():
        if any(is_in(name, outside) for name in imported) and not any(is_in(module, part) for part in allowed):
            wrong.append(f"{module} imports {outside}; only {', '.join(allowed)} may")
    layer = next((i for i, part in enumerate(LAYERS) if is_in(module, part)), None)
    if layer is not None:
        wrong += [
            f"{module} imports {name}, which stands above it ({' -> '.join(LAYERS)})"
            for name in sorted(imported)
            if any(is_in(name, above) for above in LAYERS[layer + 1 :])
        ]
    return wrong


def sources(folder: str) -> list[Path]:
    return sorted((ROOT / folder).rglob("*.py"))


ALL_SOURCES = [path for folder in ("lordo_ds", "megatron_patches", "launchers") for path in sources(folder)]


@pytest.mark.parametrize("layer", LAYERS)
def test_every_layer_named_here_exists(layer: str) -> None:
    """A layer that is moved or renamed must move in LAYERS too, or its rule checks nothing."""
    assert any(is_in(module_name(path), layer) for path in ALL_SOURCES)


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
        ("lordo_ds.core.basis", "from ..dist import sync"),
        ("lordo_ds.core.basis", "from lordo_ds import optimizer"),
        ("lordo_ds.config", "from lordo_ds.core import schedule"),
        ("lordo_ds.config", "import torch.distributed"),
        ("lordo_ds.sync.outer_sync", "from lordo_ds.optimizer import LoRDO"),
        ("lordo_ds.sync.outer_sync", "import deepspeed.comm"),
        ("lordo_ds.sync.outer_sync", "from importlib import import_module\nimport_module('deepspeed')"),
        ("lordo_ds.optimizer", "from deepspeed import comm"),
        ("lordo_ds.optimizer", "from .adapters import engine"),
        ("lordo_ds.optimizer", "from megatron.core import parallel_state"),
        ("lordo_ds.adapters.deepspeed.api", "import megatron.core"),
        ("lordo_ds.adapters.deepspeed.api", "import megatron_patches.mpu"),
        ("lordo_ds.status", "import deepspeed"),
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
        ("lordo_ds.sync.outer_sync", "import torch.distributed as dist\nfrom ..core import outer"),
        ("lordo_ds.optimizer", "from .dist.sync import OuterSync\nfrom .core import inner"),
        ("lordo_ds.adapters.deepspeed.api", "import deepspeed\nfrom ..optimizer import LoRDO"),
        ("lordo_ds.data.tokens", "from megatron.core.datasets import indexed_dataset"),
        ("megatron_patches.mpu", "import megatron.core\nimport lordo_ds"),
        ("launchers.pretrain_gpt", "import deepspeed\nimport megatron.core\nimport megatron_patches.mpu"),
    ],
)
def test_no_rule_forbids_what_the_design_allows(module: str, source: str) -> None:
    assert not violations(module, imported_modules(source, module))
