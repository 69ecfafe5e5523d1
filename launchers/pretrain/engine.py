"""The engine of `pretrain_gpt.py`, plain or in pipeline stages, and how each steps and evaluates."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from pretrain.gpt import GptConfig, build_gpt, loss_sums
from pretrain.parallel import use_right_norms
from pretrain.run_log import EveryStepHook, Hook

if TYPE_CHECKING:
    from torch import Tensor

    from pretrain.text import Batch


def half_precision(engine: Any) -> bool:
    return bool(engine.bfloat16_enabled() or engine.fp16_enabled())


class PlainTrainer:
    """Steps the whole model, or this rank's tensor-parallel part of it."""

    def __init__(self, engine: Any, tensor_parallel: int) -> None:
        self.engine = engine
        # DeepSpeed does not keep the norm in fp32 at stage 0; `use_right_norms` does.
        self._norm_is_kept = engine.zero_optimization() or half_precision(engine) or tensor_parallel > 1

    def step(self, batches: Iterator[Batch]) -> tuple[float, float | None]:
        """One step on these micro-batches: this rank's mean loss, and the gradient norm before clipping."""
        engine = self.engine
        losses: list[float] = []
        norm = None
        for batch in batches:
            total, count = loss_sums(engine, batch)
            loss = total / count
            engine.backward(loss)
            if engine.is_gradient_accumulation_boundary() and not self._norm_is_kept:
                norm = self._norm()
            engine.step()
            losses.append(float(loss.detach()))
        return sum(losses) / len(losses), engine.get_global_grad_norm() if norm is None else norm

    def _norm(self) -> float:
        import torch

        gradients = [p.grad for p in self.engine.module.parameters() if p.grad is not None]
        return float(torch.nn.utils.get_total_norm(gradients))

    def loss_sums(self, batches: Iterator[Batch], count: int) -> Tensor:
        """Losses and tokens of these micro-batches, summed, float64."""
        import torch

        sums = torch.zeros(2, dtype=torch.float64, device=self.engine.device)
        self.engine.eval()
        with torch.no_grad():
            for batch in batches:
                sums += torch.stack(loss_sums(self.engine, batch)).double()
        self.engine.train()
        return sums


class PipelineTrainer:
    """Steps one stage. Only the first and the last stage read the batches."""

    def __init__(self, engine: Any) -> None:
        self.engine = engine

    def step(self, batches: Iterator[Batch]) -> tuple[float, float | None]:
        """As `PlainTrainer.step`, but the loss is the mean over the ranks that DeepSpeed averages gradients over."""
        loss = float(self.engine.train_batch(_for_stages(batches)))
        return loss, self.engine.get_global_grad_norm()

    def loss_sums(self, batches: Iterator[Batch], count: int) -> Tensor:
        """As `PlainTrainer.loss_sums`; `count` is the number of micro-batches. The same on all stages."""
        import torch
        import torch.distributed as dist

        self.engine.eval_batch(_for_stages(batches), num_micro_batches=count)
        sums = torch.zeros(2, dtype=torch.float64, device=self.engine.device)
        for micro_batch in self.engine.module.evaluated:
            sums += micro_batch.double()
        self.engine.module.evaluated.clear()
        dist.all_reduce(sums, group=self.engine.grid.get_pipe_parallel_group())
        return sums


def _for_stages(batches: Iterator[Batch]) -> Iterator[Any]:
    for batch in batches:
        yield batch["tokens"], (batch["labels"], batch["loss_mask"])


def build_trainer(
    model_config: GptConfig, config: dict[str, Any], seed: int
) -> tuple[PlainTrainer | PipelineTrainer, Hook, Any]:
    """The engine with its trainer, its hook, and the group of all data-parallel ranks."""
    import deepspeed
    import torch
    from megatron.core import parallel_state

    import lordo_ds
    from megatron_patches.gradients import sum_partial_gradients
    from megatron_patches.mpu import MegatronMPU

    tensor = parallel_state.get_tensor_model_parallel_world_size()
    pipe = parallel_state.get_pipeline_model_parallel_world_size()
    enabled = {name: config.get(name, {}).get("enabled", False) for name in ("bf16", "fp16")}
    dtype = torch.bfloat16 if enabled["bf16"] else torch.float16 if enabled["fp16"] else torch.float32
    model = _build_stage(model_config, dtype, seed) if pipe > 1 else build_gpt(model_config, dtype)
    sum_partial_gradients(model)
    unit = {"mpu": MegatronMPU()} if tensor > 1 and pipe == 1 else {}  # the pipeline engine has its own
    try:
        engine, *_ = deepspeed.initialize(model=model, model_parameters=list(model.parameters()), config=config, **unit)
    except AssertionError as error:  # how DeepSpeed refuses settings
        raise ValueError(f"DeepSpeed refuses the settings: {error}") from error
    group = parallel_state.get_data_parallel_group()
    hook = lordo_ds.hook(engine)
    if hook is None and tensor * pipe > 1:
        use_right_norms(engine)
    trainer = PipelineTrainer(engine) if pipe > 1 else PlainTrainer(engine, tensor)
    return trainer, EveryStepHook(group, hook) if hook is None or hook.replicas == 1 else hook, group


def _build_stage(model_config: GptConfig, dtype: Any, seed: int) -> Any:
    from megatron.core import parallel_state, tensor_parallel

    from pretrain.gpt_pipe import GPTModelPipe

    model = GPTModelPipe(model_config, dtype)
    stage = parallel_state.get_pipeline_model_parallel_rank()
    if stage:  # as Megatron's scripts do, lest the stages drop the same units
        tensor_parallel.model_parallel_cuda_manual_seed(seed + 100 * stage, force_reset_rng=True)
    return model
