"""Megatron's process groups in the words that DeepSpeed uses for an `mpu`."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist

from megatron_patches.versions import require_supported_version


class MegatronMPU:
    """`deepspeed.initialize(..., mpu=MegatronMPU())`, for any optimizer, once Megatron's groups exist.

    `megatron.core.parallel_state` itself will not do: DeepSpeed also asks for the size and the rank inside the
    model-parallel group and for the ranks of the data-parallel group. It is a view: nothing is created, and what
    Megatron says is asked anew at each call. It says nothing of sequence-parallel groups, which to DeepSpeed mean
    Ulysses, not Megatron's kind.

    Raises:
        ValueError: Megatron's groups do not exist yet, or there is context or expert parallelism, whose gradients
            DeepSpeed would reduce over too few ranks.
    """

    def __init__(self) -> None:
        from megatron.core import parallel_state

        require_supported_version()
        if not parallel_state.model_parallel_is_initialized():
            raise ValueError("MegatronMPU: call megatron.core.parallel_state.initialize_model_parallel() first")
        self._state: Any = parallel_state
        for kind, size in (
            ("context_parallel_size", parallel_state.get_context_parallel_world_size()),
            ("expert_model_parallel_size", parallel_state.get_expert_model_parallel_world_size()),
        ):
            if size > 1:
                raise ValueError(f"MegatronMPU: {kind} = {size} is not supported: use 1")

    def _group(self, kind: str) -> dist.ProcessGroup:
        group: dist.ProcessGroup = getattr(self._state, f"get_{kind}_group")()
        return group

    # -- data parallel -------------------------------------------------------------------------------

    def get_data_parallel_group(self) -> dist.ProcessGroup:
        return self._group("data_parallel")

    def get_data_parallel_group_ranks(self) -> list[int]:
        return dist.get_process_group_ranks(self.get_data_parallel_group())

    def get_data_parallel_src_rank(self) -> int:
        return self.get_data_parallel_group_ranks()[0]

    def get_data_parallel_world_size(self) -> int:
        return dist.get_world_size(self.get_data_parallel_group())

    def get_data_parallel_rank(self) -> int:
        return dist.get_rank(self.get_data_parallel_group())

    # -- tensor and pipeline parallel together -------------------------------------------------------

    def get_model_parallel_group(self) -> dist.ProcessGroup:
        return self._group("model_parallel")

    def get_model_parallel_src_rank(self) -> int:
        return dist.get_process_group_ranks(self.get_model_parallel_group())[0]

    def get_model_parallel_world_size(self) -> int:
        return dist.get_world_size(self.get_model_parallel_group())

    def get_model_parallel_rank(self) -> int:
        return dist.get_rank(self.get_model_parallel_group())

    # -- tensor parallel -----------------------------------------------------------------------------

    def get_tensor_model_parallel_group(self) -> dist.ProcessGroup:
        return self._group("tensor_model_parallel")

    def get_tensor_model_parallel_src_rank(self) -> int:
        return dist.get_process_group_ranks(self.get_tensor_model_parallel_group())[0]

    def get_tensor_model_parallel_world_size(self) -> int:
        return dist.get_world_size(self.get_tensor_model_parallel_group())

    def get_tensor_model_parallel_rank(self) -> int:
        return dist.get_rank(self.get_tensor_model_parallel_group())

    # -- pipeline parallel ---------------------------------------------------------------------------

    def get_pipeline_model_parallel_group(self) -> dist.ProcessGroup:
        return self._group("pipeline_model_parallel")

    def get_pipeline_model_parallel_world_size(self) -> int:
        return dist.get_world_size(self.get_pipeline_model_parallel_group())

    def get_pipeline_model_parallel_rank(self) -> int:
        return dist.get_rank(self.get_pipeline_model_parallel_group())
