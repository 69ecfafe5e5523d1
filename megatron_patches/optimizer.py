"""LoRDO inside Megatron's own optimizer wrappers, for Megatron's own training loop.

    optimizer = lordo_optimizer([model], {"rank": 128, "sync_interval": 32}, OptimizerConfig(lr=1e-3, bf16=True), mine)

What happens to gradients before the inner step stays Megatron's: main_grad to grad, unscaling, the overflow check,
the norm and clipping, all inside the replica. After every *attempted* step, also one that an overflow skipped, the
wrapper runs the sync if it is due and refreshes the low-precision weights.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch.distributed as dist
from megatron.core import optimizer as megatron_optimizer
from megatron.core import parallel_state
from megatron.core.distributed import finalize_model_grads
from megatron.core.optimizer.grad_scaler import ConstantGradScaler, DynamicGradScaler
from megatron.core.optimizer.optimizer_config import OptimizerConfig
from megatron.core.utils import get_model_config
from torch import Tensor, nn

from lordo_ds.comm.connect import connect
from lordo_ds.comm.equalise import equalise_untrained
from lordo_ds.comm.groups import groups_for, make_groups, own_purpose
from lordo_ds.comm.inside import InsideComm
from lordo_ds.comm.slow_link import SlowLink
from lordo_ds.core.fragments import FlatTensor
from lordo_ds.core.grouping import ParameterFacts, model_facts
from lordo_ds.errors import ConfigError
from lordo_ds.optimizer import LoRDO
from lordo_ds.replica.copies import TiedWeight
from lordo_ds.replica.model_copy import checked_model, whole_copy
from lordo_ds.sync.background import BackgroundGroups
from megatron_patches.ddp import Replicas
from megatron_patches.handle import TrainingHandle
from megatron_patches.samples import SampleCheck
from megatron_patches.sharded import refuse_between_syncs
from megatron_patches.start import agree_on_groups, agree_on_start
from megatron_patches.support import check_support
from megatron_patches.versions import require_parameters
from megatron_patches.wrappers import LordoFloat16Optimizer, LordoFP32Optimizer

# These have a place in Megatron's OptimizerConfig, which its schedulers and checkpoints go by.
_MEGATRONS = {"lr": "lr", "betas": "adam_beta1 and adam_beta2", "eps": "adam_eps", "weight_decay": "weight_decay"}


def lordo_optimizer(
    model_chunks: Sequence[Any],
    settings: dict[str, Any],
    config: OptimizerConfig,
    replicas: Replicas,
    config_overrides: dict[Any, Any] | None = None,
) -> LordoFP32Optimizer | LordoFloat16Optimizer:
    """LoRDO for a model that Megatron's DistributedDataParallel wraps, in place of `get_megatron_optimizer`.

    Collective over all ranks: the ranks of a replica take the weights of its first one, and the replicas those of
    replica 0. The parameter groups are the ones that Megatron would make.

    Args:
        model_chunks: one DistributedDataParallel, built inside `replicas`.
        settings: the keys of LoRDO's JSON block but those that Megatron has too (lr, betas, eps, weight_decay).
        config: Megatron's; `optimizer` is not read.
        replicas: what `with replicas(...) as mine` gave.
        config_overrides: as `get_megatron_optimizer` takes them.

    Raises:
        ConfigError: one line naming what is not supported or wrong, and the way out.
        MegatronMismatchError: this megatron-core is not one this was written for.
    """
    lordo_settings: dict[str, Any] = {}
    refusal = ""
    try:
        check_support(model_chunks, config)
        replicas.check(model_chunks)
        lordo_settings = _settings(settings, config, replicas)
    except ConfigError as error:
        refusal = str(error)
    agree_on_start(model_chunks, lordo_settings, config, refusal)
    chunk = model_chunks[0]
    chunk.broadcast_params()
    groups = _parameter_groups(model_chunks, config, config_overrides)
    agree_on_groups(groups, chunk)
    lordo = LoRDO(groups, **lordo_settings)
    lordo.managed = True
    stepped = [parameter for group in groups for parameter in group["params"]]
    wrapper = _wrap(lordo, config)
    tensors = [tensor for group in lordo.param_groups for tensor in group["params"]]
    _attach(lordo, unwrapped(chunk), dict(zip(stepped, tensors, strict=True)), replicas)
    wrapper.refresh_model()
    _watch(lordo, unwrapped(chunk), dict(zip(stepped, tensors, strict=True)), replicas)
    wrapper.handle = TrainingHandle(
        lordo, replicas, _gradient_bytes(chunk), chunk.buffers[0].grad_dtype, wrapper.take_over
    )
    wrapper.samples = SampleCheck(chunk, first_stage=parallel_state.is_pipeline_first_stage())
    refuse_between_syncs(lordo)
    wrapper.check_loop = _keep_tokens_inside(get_model_config(chunk), replicas)
    return wrapper


def unwrapped(chunk: nn.Module) -> nn.Module:
    """The model inside Megatron's wrappers, whose parameters have the names that users know."""
    while isinstance(inner := getattr(chunk, "module", None), nn.Module):
        chunk = inner
    return chunk


def _settings(settings: dict[str, Any], config: OptimizerConfig, replicas: Replicas) -> dict[str, Any]:
    for key, place in _MEGATRONS.items():
        if key in settings:
            raise ConfigError(f"LoRDO: give {key} in Megatron's OptimizerConfig ({place}), not in LoRDO's settings")
    if config.lr is None:
        raise ConfigError("LoRDO: OptimizerConfig.lr is None: set it")
    size = replicas.groups.layout.replica_size
    if settings.get("replica_size", size) != size:
        raise ConfigError(
            f"LoRDO: replica_size = {settings['replica_size']!r}, but the model was built in replicas of {size}: "
            "give it to `with megatron_patches.ddp.replicas(...)` only"
        )
    return {
        **settings,
        "replica_size": size,
        "lr": config.lr,
        "betas": [config.adam_beta1, config.adam_beta2],
        "eps": config.adam_eps,
        "weight_decay": config.weight_decay,
    }


def _parameter_groups(
    model_chunks: Sequence[Any], config: OptimizerConfig, config_overrides: dict[Any, Any] | None
) -> list[dict[str, Any]]:
    """Megatron's groups, each with the learning rate and decay that its scheduler would start it with."""
    make = require_parameters(megatron_optimizer, "_get_param_groups", ("model_chunks", "config", "config_overrides"))
    groups: list[dict[str, Any]] = make(list(model_chunks), config, config_overrides)
    if not any(group["params"] for group in groups):
        raise ConfigError("LoRDO: this rank has no parameters to train: give every pipeline stage some")
    for group in groups:
        group["lr"] = config.lr if group.get("max_lr") is None else group["max_lr"]
        group["weight_decay"] = config.weight_decay * group["wd_mult"]
    return groups


def _wrap(lordo: LoRDO, config: OptimizerConfig) -> LordoFP32Optimizer | LordoFloat16Optimizer:
    def no_state(*_: Any) -> None:
        return None  # LoRDO allocates its own

    wrapper: LordoFP32Optimizer | LordoFloat16Optimizer
    if config.bf16 or config.fp16:
        wrapper = LordoFloat16Optimizer(lordo, config, _grad_scaler(config), no_state)
    else:
        wrapper = LordoFP32Optimizer(lordo, config, no_state)
    # The stages and slices of this rank's copy of the model; every data-parallel rank of the replica has the same.
    wrapper.grad_stats_parallel_group = parallel_state.get_model_parallel_group()
    wrapper.tp_group = parallel_state.get_tensor_model_parallel_group()
    return wrapper


def _grad_scaler(config: OptimizerConfig) -> ConstantGradScaler | DynamicGradScaler | None:
    if config.loss_scale:
        return ConstantGradScaler(config.loss_scale)
    if not config.fp16:
        return None
    return DynamicGradScaler(
        initial_scale=config.initial_loss_scale,
        min_scale=config.min_loss_scale,
        growth_factor=2.0,
        backoff_factor=0.5,
        growth_interval=config.loss_scale_window,
        hysteresis=config.hysteresis,
    )


def _attach(lordo: LoRDO, model: nn.Module, tensors: dict[Tensor, Tensor], replicas: Replicas) -> None:
    """Give LoRDO the tensors that it steps, in the order of the model's parameters, and its groups."""
    groups = replicas.groups
    facts = named_facts(model, groups.tensor_size)
    flats = [FlatTensor.of_one(tensors[parameter], fact) for parameter, fact in facts.items() if parameter in tensors]
    device = flats[0].tensor.device
    link = SlowLink.of(lordo.config.wire_throttle)
    wire, inside = connect(groups, device, link, sharded=False)
    equalise_untrained(model, tensors.keys(), wire, device)
    tied, background = _tied(model, facts), None
    if lordo.config.streaming.delay_steps:
        purpose = own_purpose()
        beside = connect(groups_for(purpose, groups), device, link, sharded=False)
        # A copy's group once more; ranks that hold none ask for one of their own.
        ranks = [dist.get_process_group_ranks(weight.comm.group) for weight in tied]
        again = make_groups(ranks or [(dist.get_rank(),)], purpose)
        pairs = zip(tied, again, strict=bool(tied))
        background = BackgroundGroups(*beside, [replace(one, comm=InsideComm(group)) for one, group in pairs])
    lordo.attach(flats, wire, inside, tied, background=background)


def _watch(lordo: LoRDO, model: nn.Module, tensors: dict[Tensor, Tensor], replicas: Replicas) -> None:
    """Have changes of the model's weights between steps seen, also where masters are stepped."""
    parameters = {
        fact.name: parameter
        for parameter, fact in named_facts(model, replicas.groups.tensor_size).items()
        if parameter in tensors
    }
    copies = {
        name: whole_copy(parameter, (0, parameter.numel()))
        for name, parameter in parameters.items()
        if tensors[parameter] is not parameter
    }
    assert lordo.sync is not None
    lordo.sync.outside.watch(copies, checked_model(model, parameters), None)
    lordo.sync.outside.record()


def named_facts(model: nn.Module, tensor_size: int) -> dict[nn.Parameter, ParameterFacts]:
    """`model_facts`, with layers numbered through the whole model: a pipeline stage counts its own from 0."""
    renamed = {}
    for name, module in model.named_modules():
        parent, _, place = name.rpartition(".")
        if place.isdigit() and isinstance(getattr(module, "layer_number", None), int):
            renamed[name + "."] = f"{parent}.{module.layer_number - 1}."
    facts = {}
    for parameter, fact in model_facts(model, tensor_size).items():
        prefix = next((old for old in renamed if fact.name.startswith(old)), None)
        name = fact.name if prefix is None else renamed[prefix] + fact.name[len(prefix) :]
        facts[parameter] = ParameterFacts(**{**vars(fact), "name": name})
    return facts


def _tied(model: Any, facts: dict[nn.Parameter, ParameterFacts]) -> list[TiedWeight]:
    """The embedding, where the last stage has a copy of it as output weight."""
    group = parallel_state.get_embedding_group(check_initialized=False)
    if not getattr(model, "share_embeddings_and_output_weights", False) or group is None:
        return []
    ranks = dist.get_process_group_ranks(group)
    if len(ranks) == 1 or dist.get_rank() not in ranks:
        return []
    weight = model.shared_embedding_or_output_weight()
    if not weight.requires_grad:
        return []
    return [TiedWeight(facts[weight].name, InsideComm(group), ranks.index(dist.get_rank()), len(ranks))]


def _gradient_bytes(chunk: Any) -> int:
    return sum(buffer.grad_data.numel() * buffer.grad_data.element_size() for buffer in chunk.buffers)


def _keep_tokens_inside(model_config: Any, replicas: Replicas) -> Callable[[], None]:
    """With per-token losses gradients are divided by the tokens of the data-parallel group: make it the replica's."""
    if model_config.finalize_model_grads_func is finalize_model_grads:
        model_config.finalize_model_grads_func = replicas.finalize()

    def refuse() -> None:
        if not model_config.calculate_per_token_loss:
            return
        if getattr(model_config.finalize_model_grads_func, "lordo_replicas", None) is not replicas:
            raise ConfigError(
                "LoRDO: with calculate_per_token_loss the gradients would be divided by the tokens of all replicas: "
                "set finalize_model_grads_func of the model's config to replicas.finalize()"
            )

    return refuse
