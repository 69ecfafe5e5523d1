"""Megatron-core on the CPU: the patches come off again, refuse what they were not written for, and work."""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import Any

import pytest
import torch

from megatron_patches import cpu, versions
from megatron_patches.versions import MegatronMismatchError
from pretrain.gpt import GptConfig, build_gpt, loss_sums
from tests.ranks import run_ranks

pytestmark = [
    pytest.mark.megatron,
    pytest.mark.skipif(torch.cuda.is_available(), reason="the patches are for machines without CUDA"),
]

TINY = GptConfig(
    num_layers=2,
    hidden_size=32,
    num_attention_heads=4,
    ffn_hidden_size=48,
    seq_length=16,
    vocab_size=128,
)
VARIANTS = {
    "llama-like": TINY,
    "gpt2-like": replace(TINY, activation="gelu", normalization="LayerNorm", position_embedding="learned", bias=True),
    "grouped queries, own head": replace(TINY, num_query_groups=2, qk_layernorm=True, tie_embeddings=False),
    "dropout": replace(TINY, dropout=0.2),
    "dropout, recomputed": replace(TINY, dropout=0.2, recompute=True),
}


def patched_functions() -> list[Any]:
    return [getattr(patch.find_owner(), patch.name) for patch in cpu._PATCHES]


def test_patches_come_off_without_a_trace() -> None:
    before = patched_functions()
    assert cpu.install()
    assert not cpu.install(), "a second install has nothing to do"
    assert all(new is not old for new, old in zip(patched_functions(), before, strict=True))
    cpu.uninstall()
    cpu.uninstall()
    assert all(new is old for new, old in zip(patched_functions(), before, strict=True))
    with cpu.installed():
        assert torch.cuda.current_device() == torch.device("cpu")
        with cpu.installed():
            pass
        assert torch.cuda.current_device() == torch.device("cpu"), "the inner block installed nothing"
    assert all(new is old for new, old in zip(patched_functions(), before, strict=True))


def test_nothing_is_patched_where_cuda_is_available(monkeypatch: pytest.MonkeyPatch) -> None:
    before = patched_functions()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert not cpu.install()
    assert patched_functions() == before


def test_a_changed_function_is_refused_and_then_nothing_is_patched(monkeypatch: pytest.MonkeyPatch) -> None:
    import megatron.core.fusions.fused_softmax as fused_softmax

    monkeypatch.setattr(fused_softmax, "get_default_causal_mask", lambda sq, device: None)
    before = patched_functions()
    with pytest.raises(MegatronMismatchError, match=r"get_default_causal_mask takes \(sq, device\), .* \(sq\)"):
        cpu.install()
    assert patched_functions() == before
    monkeypatch.delattr(fused_softmax, "get_default_causal_mask")
    with pytest.raises(MegatronMismatchError, match="get_default_causal_mask does not exist"):
        cpu.install()


@pytest.mark.parametrize("version", ["0.15.3", "0.20.0rc1", "1.0.0"])
def test_an_unknown_megatron_is_refused_by_version(monkeypatch: pytest.MonkeyPatch, version: str) -> None:
    import megatron.core

    monkeypatch.setattr(megatron.core, "__version__", version)
    with pytest.raises(MegatronMismatchError, match=r"install one from 0\.16 to"):
        cpu.install()
    assert versions.OLDEST == (0, 16)


def test_patches_do_not_come_off_from_under_another_patch(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu.install()
    try:
        with monkeypatch.context() as other:
            other.setattr(torch.cuda, "synchronize", lambda: None)
            with pytest.raises(MegatronMismatchError, match="synchronize was patched again"):
                cpu.uninstall()
    finally:
        cpu.uninstall()


def test_masks_forbid_exactly_what_megatrons_do() -> None:
    assert cpu._causal_mask(3).tolist() == [[False, True, True], [False, False, True], [False, False, False]]
    for queries, keys, window in ((5, 5, (2, 0)), (4, 7, (3, 0)), (6, 6, (1, 2))):
        seen = torch.ones(queries, keys, dtype=torch.bool)
        seen = seen.triu(keys - queries - window[0]).tril(keys - queries + window[1])
        assert torch.equal(cpu._sliding_window_causal_mask(queries, keys, window), ~seen)


def test_cuda_means_the_cpu_in_the_mode_and_nowhere_else() -> None:
    on_cpu = torch.device("cpu")
    with cpu._CudaIsTheCpu():
        made = torch.zeros(3, dtype=torch.int, device="cuda")
        assert made.device == torch.ones(2, device=torch.device("cuda:0")).device == on_cpu
        assert made.cuda(0, non_blocking=True) is made
        assert made.to("cuda:0", torch.float64).dtype == made.to(device="cuda", dtype=torch.float64).dtype
        assert made.float().type() == "torch.cuda.FloatTensor" and made.bfloat16().type() == "torch.cuda.BFloat16Tensor"
        assert made.type(torch.float64).dtype == torch.float64
        assert torch.zeros(1, device="meta").device.type == "meta"
    assert made.type() == "torch.IntTensor"
    with pytest.raises((AssertionError, RuntimeError)):
        torch.zeros(3, device="cuda")


def test_megatrons_scaler_is_made_on_the_cpu_while_the_patches_are_on() -> None:
    from megatron.core.optimizer.grad_scaler import DynamicGradScaler

    numbers = {"growth_factor": 2.0, "backoff_factor": 0.5, "growth_interval": 2, "hysteresis": 1}
    with cpu.installed():
        scaler = DynamicGradScaler(initial_scale=8.0, min_scale=1.0, **numbers)
        scaler.load_state_dict(scaler.state_dict())
        scaler.update(found_inf=True)
        assert scaler.scale.device == torch.device("cpu") and float(scaler.scale) == 4.0
    with pytest.raises((AssertionError, RuntimeError)):
        DynamicGradScaler(initial_scale=8.0, min_scale=1.0, **numbers)


def broadcast_of_a_batch() -> list[int]:
    from megatron.core import tensor_parallel as tp

    start(tensor_parallel=2)
    rank = torch.distributed.get_rank()
    data = {"text": torch.arange(4) + 7} if rank == 0 else None
    return tp.broadcast_data(["text"], data, torch.int64)["text"].tolist()


def test_megatron_broadcasts_batches_over_tensor_parallel_ranks() -> None:
    assert run_ranks(broadcast_of_a_batch, 2) == [[7, 8, 9, 10]] * 2


def start(tensor_parallel: int = 1, seed: int = 7) -> None:
    from megatron.core import parallel_state
    from megatron.core import tensor_parallel as tp

    cpu.install()
    if not parallel_state.is_initialized():
        parallel_state.initialize_model_parallel(tensor_parallel)
    tp.model_parallel_cuda_manual_seed(seed, force_reset_rng=True)
    torch.manual_seed(seed)


def batch() -> dict[str, torch.Tensor]:
    ids = torch.randint(0, TINY.vocab_size, (3, TINY.seq_length + 1), generator=torch.Generator().manual_seed(1))
    return {
        "tokens": ids[:, :-1],
        "labels": ids[:, 1:].contiguous(),
        "loss_mask": torch.ones(3, TINY.seq_length),
    }


def losses_and_gradients() -> dict[str, tuple[float, bool, dict[str, torch.Tensor]]]:
    found = {}
    for name, config in VARIANTS.items():
        start()
        model = build_gpt(config, torch.float32)
        torch.manual_seed(11)
        total, count = loss_sums(model, batch())
        (total / count).backward()
        gradients = {name: p.grad for name, p in model.named_parameters()}
        found[name] = (
            float(total.detach() / count),
            all(g is not None for g in gradients.values()),
            gradients,
        )
    return found


def test_every_kind_of_model_trains_and_recomputation_repeats_the_dropout() -> None:
    found = run_ranks(losses_and_gradients, 1)[0]
    for name, (loss, complete, _) in found.items():
        assert complete and abs(loss - 4.85) < 0.5, f"{name}: {loss}"  # log 128 = 4.85
    assert found["dropout"][0] != found["llama-like"][0]
    assert found["dropout"][0] == found["dropout, recomputed"][0]
    for name, gradient in found["dropout"][2].items():
        torch.testing.assert_close(found["dropout, recomputed"][2][name], gradient)


def forked_streams() -> tuple[list[float], list[float], list[str]]:
    from megatron.core.tensor_parallel import get_cuda_rng_tracker

    start()
    warned: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: warned.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("megatron.core.tensor_parallel.random").addHandler(handler)
    torch.manual_seed(3)
    plain = torch.rand(4).tolist()
    torch.manual_seed(3)
    outside, inside = [], []
    for _ in range(4):
        outside.append(torch.rand(()).item())
        with get_cuda_rng_tracker().fork():
            inside.append(torch.rand(()).item())
    assert outside == plain, "a fork moved the stream around it"
    assert len(set(inside)) == 4, "a fork does not go on where the last one stopped"
    return outside, inside, warned


def test_a_forked_random_stream_leaves_the_other_alone_and_does_not_warn() -> None:
    outside, inside, warned = run_ranks(forked_streams, 1)[0]
    assert not set(outside) & set(inside)
    assert not warned


def loss_and_a_matrix(tensor_parallel: int, seed: int) -> tuple[float, torch.Tensor]:
    start(tensor_parallel, seed)
    model = build_gpt(TINY, torch.float32)
    total, count = loss_sums(model, batch())
    proj = dict(model.named_parameters())["decoder.layers.1.self_attention.linear_proj.weight"]
    return float(total.detach() / count), proj.detach().clone()


def test_the_weights_depend_on_the_seed_alone_and_not_on_the_tensor_parallel_size() -> None:
    (loss, matrix), (loss_of_another, _) = (
        run_ranks(loss_and_a_matrix, 1, 1, 7)[0],
        run_ranks(loss_and_a_matrix, 1, 1, 8)[0],
    )
    halves = run_ranks(loss_and_a_matrix, 2, 2, 7)
    assert torch.equal(torch.cat([half for _, half in halves], dim=1), matrix)  # row-parallel: cut along columns
    assert halves[0][0] == halves[1][0] == pytest.approx(loss, abs=1e-6)
    assert loss_of_another != loss
