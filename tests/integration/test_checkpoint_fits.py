"""Checkpoints in which the trained parameters fit and something else does not: refused before anything changes.

One replica's files are forged, and all ranks must refuse them, at every stage and precision, native and reshaped.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import deepspeed
import pytest
import torch
import torch.distributed as dist
from deepspeed.pipe import LayerSpec, PipelineModule
from torch import Tensor, nn

import lordo_ds
from lordo_ds.checkpoint.files import COMPLETE, file_sum, write_complete
from lordo_ds.errors import CheckpointError
from tests.engines import GivenGradients, make_engine, settings, train_step, weights
from tests.ranks import run_ranks

pytestmark = [pytest.mark.deepspeed, pytest.mark.distributed]

TAG = "global_step4"
LAYOUTS = [(0, "fp32"), (0, "bf16"), (1, "fp32"), (2, "bf16"), (3, "bf16")]


class Partly(GivenGradients):
    """Two frozen parameters and two buffers, one of them not persistent, beside the trained parameters."""

    def __init__(self, value: float = 2.0, **other: tuple[int, ...]) -> None:
        super().__init__(value)
        shapes = {"frozen": (5, 3), "still": (4,), "count": (2,), "cache": (3,), **other}
        for name in ("frozen", "still", *other):
            if shapes[name] and name != "count":
                frozen = nn.Parameter(torch.full(shapes[name], value), requires_grad=False)
                self.register_parameter(name, frozen)
        self.register_buffer("count", torch.full(shapes["count"], value))
        self.register_buffer("cache", torch.full(shapes["cache"], value), persistent=False)

    def forward(self, gradients: dict[str, Tensor]) -> Tensor:
        named = dict(self.named_parameters())
        return sum((named[name].float() * gradients[name].float()).sum() for name in gradients)  # type: ignore[return-value]


def engine_of(stage: int, dtype: str, model: nn.Module | None = None) -> Any:
    return make_engine(settings(dtype, zero_optimization={"stage": stage}), model or Partly())


def folder_of(folder: str | Path, stage: int, dtype: str) -> str:
    return os.path.join(folder, f"{stage}{dtype}")


def save(folder: str) -> None:
    for stage, dtype in LAYOUTS:
        engine = engine_of(stage, dtype)
        for step in range(1, 5):
            train_step(engine, step)
        engine.save_checkpoint(os.path.join(folder_of(folder, stage, dtype), "intact"), TAG)
        options = {"exclude_frozen_parameters": True}
        engine.save_checkpoint(os.path.join(folder_of(folder, stage, dtype), "excluded"), TAG, **options)
        engine.destroy()


# -- what may not fit --------------------------------------------------------------------------------


def edit(tag: Path, kind: str, change: Callable[[Any], None], replicas: tuple[int, ...] = (1,)) -> bool:
    """Change the model's or the optimizer's files of some replicas, and list their sums anew."""
    files = [file for m in replicas for file in (tag / f"replica_{m}").glob(f"*_{kind}_states.pt")]
    for file in files:
        saved = torch.load(file, weights_only=False)
        change(saved)
        torch.save(saved, file)
    write_complete(
        tag,
        {str(f.relative_to(tag)): file_sum(f) for f in tag.rglob("*") if f.is_file() and f.name != COMPLETE},
    )
    return bool(files)


def state_file(
    tag: Path, change: Callable[[dict[str, Any], dict[str, Any]], None], replicas: tuple[int, ...] = (1,)
) -> None:
    """Change (the wrapper's dictionary, the base optimizer's) of some replicas, wherever the stage keeps them."""

    def in_optimizer(saved: Any) -> None:
        wrapper = saved["optimizer_state_dict"]
        change(wrapper, wrapper.get("base_optimizer_state", wrapper.get("optimizer_state_dict")))

    def in_model(saved: Any) -> None:
        change(saved, saved["optimizer"].get("optimizer_state_dict", saved["optimizer"]))

    if not edit(tag, "optim", in_optimizer, replicas):
        edit(tag, "model", in_model, replicas)


def of_model(name: str, change: Callable[[Tensor], Tensor | None]) -> Callable[[Path], None]:
    def in_part(part: dict[str, Any]) -> None:
        if name in part and part[name].numel():
            part[name] = change(part[name])
            if part[name] is None:
                del part[name]

    def in_file(saved: Any) -> None:
        in_part(saved["module"])
        if saved.get("frozen_param_fragments"):
            in_part(saved["frozen_param_fragments"])

    return lambda tag: edit(tag, "model", in_file)  # type: ignore[return-value]


def masters_of(wrapper: dict[str, Any]) -> tuple[dict[Any, Any] | list[Any], Any]:
    """Where the full-precision weights are, and the key of the first."""
    for key in ("single_partition_of_fp32_groups", "fp32_flat_groups"):
        if key in wrapper:
            return wrapper[key], 0
    if "fp32_groups" in wrapper["optimizer"]:
        return wrapper["optimizer"]["fp32_groups"][0], 1
    return wrapper["module"], "tall"


def of_masters(change: Callable[[Tensor], Tensor]) -> Callable[..., None]:
    def in_file(wrapper: dict[str, Any], base: dict[str, Any]) -> None:
        holder, key = masters_of(wrapper)
        holder[key] = change(holder[key])

    return lambda tag, **options: state_file(tag, in_file, **options)


def of_state(entry: str, change: Callable[[Tensor], Tensor]) -> Callable[..., None]:
    def in_file(wrapper: dict[str, Any], base: dict[str, Any]) -> None:
        for parameters in base["state"].values():
            if "tall" in parameters:
                parameters["tall"][entry] = change(parameters["tall"][entry])

    return lambda tag, **options: state_file(tag, in_file, **options)


def spoil(tensor: Tensor) -> Tensor:
    tensor = tensor.clone()
    tensor.view(-1)[0] = float("nan")
    return tensor


def shorter(tensor: Tensor) -> Tensor:
    return tensor.reshape(-1)[:1].clone()  # what `copy_` would broadcast


def turned(tensor: Tensor) -> Tensor:
    return tensor.t().contiguous() if tensor.dim() == 2 else tensor[:-1].clone()


everywhere = {"replicas": (0, 1)}
MISFITS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "frozen, one element": (of_model("frozen", shorter), r"frozen"),
    "frozen, turned": (of_model("frozen", turned), r"frozen"),
    "frozen, missing": (of_model("frozen", lambda _: None), r"frozen"),
    "buffer, one element": (of_model("count", shorter), r"count is \(1,\).*\(2,\)"),
    "buffer, whole numbers": (of_model("count", lambda t: t.long()), r"count is .*int64"),
    "buffer, missing": (of_model("count", lambda _: None), r"no 'count'"),
    "masters, turned": (of_masters(turned), r"tall|master|elements"),
    "masters, whole numbers": (of_masters(lambda t: t.to(torch.int32)), r"int32"),
    "moment, whole numbers": (of_state("exp_avg", lambda t: t.to(torch.int32)), r"exp_avg.*tall.*int32"),
    "moment, turned": (of_state("exp_avg", lambda t: t.t().contiguous()), r"exp_avg.*tall"),
    "states, missing": (
        lambda tag: state_file(tag, lambda _, base: base.pop("state")), r"no states|not a file of this kind"
    ),
    "model, missing": (
        lambda tag: edit(tag, "model", lambda saved: saved.update(module=[1])), "not a (model's )?file"
    ),
    "anchor, not finite": (of_state("anchor", spoil), r"'anchor' of tall is not finite in replica 1"),
    "weights, not finite anywhere": (
        functools.partial(of_masters(spoil), **everywhere), r"not finite in replica 0, and no other replica's"
    ),
    "moments, not finite anywhere": (
        functools.partial(of_state("exp_avg_sq", spoil), **everywhere), r"'exp_avg_sq' of tall is not finite"
    ),
}  # fmt: skip


def everything(engine: Any) -> dict[str, Tensor]:
    """Copies of all that a load may change."""
    parameters = list(engine.module.parameters())
    with deepspeed.zero.GatheredParameters(parameters, enabled=hasattr(parameters[0], "ds_id")):
        found = {name: p.detach().clone() for name, p in engine.module.named_parameters()}
    found |= {name: buffer.clone() for name, buffer in engine.module.named_buffers()}
    optimizer = engine.basic_optimizer
    for item in optimizer.sync.items:
        found[f"master of {item.plan.name}"] = item.weight.clone()
        found |= {f"{k} of {item.plan.name}": v.clone() for k, v in item.state.items() if isinstance(v, Tensor)}
    return found


def refusal(engine: Any, load: Callable[[], Any]) -> str:
    """What a load that is refused says, with what it changed."""
    before, step = everything(engine), engine.global_steps
    with pytest.raises(ValueError) as caught:
        load()
    assert type(caught.value) is CheckpointError, repr(caught.value)
    now = everything(engine)
    changed = [name for name in now if not torch.equal(now[name], before[name])]
    assert not changed and engine.global_steps == step, (changed, str(caught.value))
    assert "\n" not in str(caught.value)
    return str(caught.value)


def ways(engine: Any, folder: str, stage: int) -> dict[str, Callable[[], Any]]:
    found = {
        "native": lambda: lordo_ds.load_checkpoint(engine, folder, TAG),
        "reshaped": lambda: lordo_ds.load_checkpoint(engine, folder, TAG, reshape=True),
    }
    if stage < 3:
        found["weights only"] = lambda: engine.load_checkpoint(folder, TAG, load_optimizer_states=False)
    return found


def load_misfits(folder: str) -> dict[str, str]:
    found = {}
    for stage, dtype in LAYOUTS:
        engine, at = engine_of(stage, dtype, Partly(3.0)), folder_of(folder, stage, dtype)
        train_step(engine, 1)
        for name in MISFITS:
            for way, load in ways(engine, os.path.join(at, name), stage).items():
                if way == "weights only" and not name.startswith(("frozen", "buffer")):
                    continue
                found[f"{stage} {dtype}, {way}: {name}"] = refusal(engine, load)
        lordo_ds.load_checkpoint(engine, os.path.join(at, "intact"), TAG)
        assert engine.global_steps == 4
        assert float(everything(engine)["frozen"][0, 0]) == 2.0
        train_step(engine, 5)
        engine.destroy()
    return found


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("fits")
    run_ranks(save, 2, str(folder))
    return folder


def test_what_does_not_fit_is_refused_on_all_ranks_before_anything_changes(saved: Path) -> None:
    for stage, dtype in LAYOUTS:
        at = Path(folder_of(saved, stage, dtype))
        for name, (forge, _) in MISFITS.items():
            shutil.copytree(at / "intact", at / name)
            forge(at / name / TAG)
    first, second = run_ranks(load_misfits, 2, str(saved))
    assert first == second
    for case, message in first.items():
        assert re.search(MISFITS[case.partition(": ")[2]][1], message), (case, message)


# -- another model -----------------------------------------------------------------------------------


@contextlib.contextmanager
def warnings_of_ours() -> Iterator[list[str]]:
    said: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("lordo_ds").addHandler(handler)
    try:
        yield said
    finally:
        logging.getLogger("lordo_ds").removeHandler(handler)


def other_models(folder: str) -> dict[str, list[str]]:
    """Per layout: how a model with another frozen parameter is refused, then loaded because the user said so."""
    found = {}
    for stage, dtype in LAYOUTS:
        engine = engine_of(stage, dtype, Partly(3.0, more=(2, 2), still=()))
        at = os.path.join(folder_of(folder, stage, dtype), "intact")
        messages = [refusal(engine, load) for load in ways(engine, at, stage).values()]
        for reshape in (False, True):
            with warnings_of_ours() as said:
                lordo_ds.load_checkpoint(engine, at, TAG, reshape=reshape, strict=False)
            assert dist.get_rank() or "has no 'more', which this model has, and 1 more: left as it is" in said[0], said
            now = everything(engine)
            assert float(now["frozen"][0, 0]) == 2.0 and float(now["more"][0, 0]) == 3.0 and engine.global_steps == 4
        engine.destroy()
        found[f"{stage} {dtype}"] = messages
    return found


def test_another_model_is_refused_unless_the_user_allows_it(saved: Path) -> None:
    for found in run_ranks(other_models, 2, str(saved)):
        for case, messages in found.items():
            assert all(re.search("'more'|'still'", message) for message in messages), (case, messages)
            assert "load_module_strict=False" in messages[0] and "strict=False" in messages[1], messages


def without_frozen(folder: str) -> dict[str, list[str]]:
    """Saved with exclude_frozen_parameters: the model's own stay."""
    found = {}
    for stage, dtype in LAYOUTS:
        engine = engine_of(stage, dtype, Partly(3.0))
        at = os.path.join(folder_of(folder, stage, dtype), "excluded")
        message = refusal(engine, functools.partial(engine.load_checkpoint, at, TAG))
        for options in ({"load_module_strict": False}, {"reshape": True}):
            lordo_ds.load_checkpoint(engine, at, TAG, **options)
            now = everything(engine)
            assert float(now["frozen"][0, 0]) == 3.0 and float(now["count"][0]) == 2.0 and engine.global_steps == 4
        engine.destroy()
        found[f"{stage} {dtype}"] = message
    return found


def test_a_save_without_frozen_parameters_loads_as_deepspeed_documents_it(saved: Path) -> None:
    for found in run_ranks(without_frozen, 2, str(saved)):
        assert all("has no 'frozen'" in message and "load_module_strict=False" in message for message in found.values())


# -- pipelines -----------------------------------------------------------------------------------------


class Shifted(nn.Module):
    """A layer of a pipeline with a frozen parameter and a buffer."""

    def __init__(self, value: float) -> None:
        super().__init__()
        self.inner = nn.Linear(8, 8, bias=False)
        self.frozen = nn.Parameter(torch.full((8,), value), requires_grad=False)
        self.register_buffer("count", torch.full((2,), value))

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x) + self.frozen


def pipeline_of(value: float, stage: int, dtype: str) -> Any:
    module = PipelineModule(
        layers=[LayerSpec(Shifted, value) for _ in range(4)],
        num_stages=2,
        loss_fn=lambda output, target: (output.float() - target.float()).square().mean(),
        partition_method="uniform",
    )
    return make_engine(settings(dtype, zero_optimization={"stage": stage}), module)


def train_pipeline(engine: Any, dtype: str) -> None:
    x = torch.ones(1, 8, dtype=torch.bfloat16 if dtype == "bf16" else torch.float32)
    engine.train_batch(iter([(x, x)] * 4))


def pipeline_misfits(folder: str) -> dict[str, str]:
    """Files of the second stage's layers are forged."""
    said = {}
    deepspeed.init_distributed("gloo", auto_mpi_discovery=False, verbose=False)
    for stage, dtype in ((0, "fp32"), (1, "bf16")):
        engine, at = pipeline_of(2.0, stage, dtype), folder_of(folder, stage, dtype)
        train_pipeline(engine, dtype)
        engine.save_checkpoint(os.path.join(at, "intact"), TAG)
        engine.destroy()
        forges: dict[str, Callable[[dict[str, Any]], Any]] = {
            "frozen": lambda layer: layer.update(frozen=torch.ones(1)),
            "missing": lambda layer: layer.pop("count"),
            "surplus": lambda layer: layer.update(ghost=torch.ones(1)),
        }
        if dist.get_rank() == 0:
            for name, forge in forges.items():
                tag = shutil.copytree(os.path.join(at, "intact"), os.path.join(at, name)) + f"/{TAG}"
                file = sorted(Path(tag, "replica_0").glob("layer_*"))[-1]
                layer = torch.load(file)
                forge(layer)
                torch.save(layer, file)
                edit(Path(tag), "none", lambda _: None)
        dist.barrier()
        engine = pipeline_of(3.0, stage, dtype)
        train_pipeline(engine, dtype)
        for name in forges:
            for way, load in ways(engine, os.path.join(at, name), stage).items():
                if way != "reshaped" or name != "surplus":  # which the header does not know
                    said[f"{stage} {dtype}, {way}: {name}"] = refusal(engine, load)
        lordo_ds.load_checkpoint(engine, os.path.join(at, "surplus"), TAG, strict=False)
        lordo_ds.load_checkpoint(engine, os.path.join(at, "intact"), TAG)
        assert all(float(layer.frozen[0]) == 2.0 for layer in engine.module.forward_funcs)
        train_pipeline(engine, dtype)
        engine.destroy()
    return said


def test_a_layer_that_does_not_fit_one_stage_is_refused_on_all(tmp_path: Path) -> None:
    first, second = run_ranks(pipeline_misfits, 2, str(tmp_path))
    assert first == second
    words = {"frozen": r"frozen.* is \(1,\)", "missing": "count", "surplus": "ghost"}
    for case, message in first.items():
        assert re.search(words[case.partition(": ")[2]], message), (case, message)


# -- what is honestly not finite ---------------------------------------------------------------------


def spoilt_between_syncs(folder: str, dtype: str, stage: int) -> dict[str, bool]:
    """Replica 1 meets a NaN in step 4 of syncs every 3; saved there, loaded, and trained past the next sync."""
    engine = engine_of(stage, dtype, Partly())
    for step in range(1, 5):
        train_step(engine, step, spoil=float("nan") if step == 4 and dist.get_rank() == 1 else None)
    engine.save_checkpoint(folder, TAG)
    honest = not all(bool(torch.isfinite(w).all()) for w in weights(engine).values())
    for step in (5, 6):
        train_step(engine, step)
    expected = everything(engine)
    engine.destroy()
    same = {}
    for reshape in (False, True):
        engine = engine_of(stage, dtype, Partly(3.0))
        lordo_ds.load_checkpoint(engine, folder, TAG, reshape=reshape)
        for step in (5, 6):
            train_step(engine, step)
        now = everything(engine)
        same[f"reshape {reshape}"] = all(torch.equal(now[name], expected[name]) for name in now if name != "cache")
        same["reseeded"] = all(bool(torch.isfinite(w).all()) for w in weights(engine).values())
        engine.destroy()
    same["replica 1 was not finite"] = honest == (dist.get_rank() == 1)
    return same


def test_a_replica_that_was_not_finite_when_it_was_saved_is_reseeded_by_the_next_sync(tmp_path: Path) -> None:
    for found in run_ranks(spoilt_between_syncs, 2, str(tmp_path), "fp32", 0):
        assert all(found.values()), found
