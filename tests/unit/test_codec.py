"""Wire formats: how long a message is, what is read out of it, and that what it leaves out is kept."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from lordo_ds.config import TopK
from lordo_ds.core.codec import Codec, base, bits, codec_of

SPARSE = TopK(top_k=64, block=4096)
SETTINGS: list[Any] = ["fp32", "bf16", "int8", "int4", SPARSE, TopK(top_k=3, block=10), TopK(top_k=5, block=5)]
QUANTIZED = {"int8": 127, "int4": 7}
SIZES = (0, 1, 2, 3, 63, 64, 65, 127, 129, 255, 256, 257, 4095, 4097, 9001)
SMALLEST = 2.0**-126


def title(setting: Any) -> str:
    return setting if isinstance(setting, str) else f"{setting.top_k} of {setting.block}"


each_setting = pytest.mark.parametrize("setting", SETTINGS, ids=title)
each_quantized = pytest.mark.parametrize("setting", list(QUANTIZED))


def gaussian(numel: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(numel, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def sent(codec: Codec, values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The message of some values, what is read out of it, and the error."""
    error = values.clone()
    message = codec.encode_(error)
    return message, codec.decode(message, values.numel(), values), error


def scales_of(codec: Codec, message: Tensor, numel: int) -> Tensor:
    """The scale of each element, (numel,) float32."""
    scales = message[: 2 * -(-numel // codec.block)].view(torch.bfloat16).float()
    return scales.repeat_interleave(codec.block)[:numel]


# -- of every format ---------------------------------------------------------------------------------


@each_setting
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_message_has_the_bytes_that_were_said_and_leaves_exactly_what_it_does_not_say(
    setting: Any, dtype: torch.dtype
) -> None:
    codec = codec_of(setting)
    for numel in SIZES:
        values = gaussian(numel, seed=numel, dtype=dtype)
        message, decoded, error = sent(codec, values)
        assert message.dtype == torch.uint8
        assert message.shape == (codec.message_bytes(numel, values.element_size()),)
        assert decoded.dtype == dtype and decoded.shape == (numel,)
        assert torch.equal(error, values - decoded)
        assert codec.lossy or torch.equal(decoded, values)
        assert numel < 64 or codec.lossy == bool(error.any())


def test_the_bytes_are_those_of_the_table() -> None:
    numel = 1 << 20
    per_element = {title(setting): 8 * codec_of(setting).message_bytes(numel) / numel for setting in SETTINGS[:5]}
    assert per_element == {"fp32": 32, "bf16": 16, "int8": 8.0625, "int4": 4.25, "64 of 4096": 0.21875}
    assert codec_of("fp32").message_bytes(7, width=8) == 56 and codec_of("bf16").message_bytes(7, width=8) == 14
    assert codec_of("int4").message_bytes(67) == 2 * 2 + 34
    # Of 10, 3 are sent with 4 + 1 bits and 3 magnitudes; of the last 4, ceil(1.2) with 2 magnitudes.
    assert codec_of(TopK(top_k=3, block=10)).message_bytes(14) == 2 * (3 + 2) + 4


@each_setting
def test_equal_vectors_give_equal_messages_wherever_the_message_lies(setting: Any) -> None:
    codec, values = codec_of(setting), torch.cat([gaussian(9000), torch.ones(5000), -torch.ones(400)])
    message, decoded, _ = sent(codec, values)
    again, _, _ = sent(codec, values)
    assert torch.equal(message, again)
    inside = torch.zeros(message.numel() + 7, dtype=torch.uint8)
    for offset in (1, 2, 7):
        inside[offset : offset + message.numel()] = message
        assert torch.equal(codec.decode(inside[offset : offset + message.numel()], values.numel(), values), decoded)


@each_setting
def test_a_message_does_not_depend_on_how_much_is_worked_on_at_once(
    setting: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    codec, values = codec_of(setting), gaussian(20_001)
    whole = sent(codec, values)
    monkeypatch.setattr(base, "_CHUNK", 4096)
    assert all(map(torch.equal, sent(codec, values), whole))


@each_setting
def test_the_errors_of_one_vector_sent_over_and_over_do_not_add_up(setting: Any) -> None:
    codec, values, times = codec_of(setting), gaussian(5000, seed=2), 200
    error, total = torch.zeros_like(values), torch.zeros(5000, dtype=torch.float64)
    for _ in range(times):
        error += values
        message = codec.encode_(error)
        total += codec.decode(message, 5000, values)
    assert (total + error - times * values.double()).abs().max() < times * 1e-5 * values.abs().max()


@each_setting
def test_zeros_stay_zeros(setting: Any) -> None:
    values = torch.zeros(700)
    values[3:600:7] = -0.0
    message, decoded, error = sent(codec_of(setting), values)
    assert not decoded.any() and not error.any()
    assert setting not in QUANTIZED or not message.any()  # no scale either


@each_setting
@pytest.mark.parametrize("size", [1e-45, 1e-40, 3e-38, 1e-30, 1e30, 1.7e38])
def test_tiny_and_huge_numbers_are_neither_lost_nor_infinite(setting: Any, size: float) -> None:
    codec = codec_of(setting)
    for values in (gaussian(600).clamp(-1, 1) * size, torch.eye(1, 600)[0] * -size, torch.full((600,), size)):
        _, decoded, error = sent(codec, values)
        assert torch.equal(error, values - decoded) and torch.isfinite(decoded).all()
        assert error.double().norm() <= values.double().norm()


@pytest.mark.parametrize("setting", ["int8", "int4", SPARSE, TopK(top_k=3, block=10)], ids=title)
def test_no_denormal_is_on_the_wire_nor_read_from_it(setting: Any) -> None:
    """Some devices flush them to zero: they would read another number out of the same message."""
    codec = codec_of(setting)
    for size in (1e-45, 1e-40, 1e-38, 1e-37, 1e-36):
        message, decoded, _ = sent(codec, gaussian(600) * size)
        assert (decoded[decoded != 0].abs() >= SMALLEST).all()
        if setting in QUANTIZED:
            scales = scales_of(codec, message, 600)
            assert (scales >= SMALLEST).all()


@each_setting
def test_what_is_not_finite_does_not_stop_a_rank(setting: Any) -> None:
    values = gaussian(600)
    values[5], values[80], values[300] = float("nan"), float("inf"), -float("inf")
    message, decoded, _ = sent(codec_of(setting), values)
    assert message.numel() and decoded.numel() == 600


@each_setting
def test_a_vector_or_message_of_another_form_is_refused(setting: Any) -> None:
    codec = codec_of(setting)
    for values in (torch.zeros(4, 4), torch.zeros(8)[::2], torch.zeros(4, dtype=torch.bfloat16), torch.zeros(4).int()):
        with pytest.raises(ValueError, match="must be a contiguous vector in float32 or float64"):
            codec.encode_(values)
    message = codec.encode_(gaussian(100))
    for wrong in (message[:-1], message.view(1, -1), message.view(torch.int8)):
        with pytest.raises(ValueError, match=f"must be {message.numel()} bytes"):
            codec.decode(wrong, 100, torch.zeros(1))


@each_setting
def test_an_accelerator_is_never_waited_for(setting: Any) -> None:
    """A tensor without data fails on every number that the host reads, and where one decides a shape."""
    codec = codec_of(setting)
    values = torch.empty(9001, device="meta")
    message = codec.encode_(values)
    here = torch.empty(message.shape, dtype=torch.uint8)
    assert message.device == codec.decode(message, 9001, values).device == codec.decode(here, 9001, values).device


# -- levels ------------------------------------------------------------------------------------------


@each_quantized
def test_an_error_is_at_most_half_a_scale_and_the_largest_is_never_clipped(setting: str) -> None:
    codec, levels = codec_of(setting), QUANTIZED[setting]
    for seed in range(20):
        values = gaussian(3000, seed) * torch.logspace(-30, 30, 3000)
        message, decoded, error = sent(codec, values)
        scales = scales_of(codec, message, 3000)
        assert (error.abs() <= scales * (0.5 + 1e-5)).all()
        assert (decoded.abs() <= levels * scales).all()
        for first in range(0, 3000, codec.block):
            block, scale = values[first : first + codec.block].abs().max().double(), scales[first].double()
            assert block <= levels * scale * (1 + 1e-6) and levels * scale <= block * (1 + 2**-7 + 1e-6)


@each_quantized
def test_one_huge_element_costs_its_own_block_only(setting: str) -> None:
    codec = codec_of(setting)
    values = gaussian(4 * codec.block)
    _, alone, _ = sent(codec, values)
    values[codec.block + 3] = 1e30
    _, decoded, _ = sent(codec, values)
    assert torch.equal(decoded[: codec.block], alone[: codec.block])
    assert torch.equal(decoded[2 * codec.block :], alone[2 * codec.block :])
    assert decoded[codec.block + 3] == pytest.approx(1e30, rel=0.01)
    assert decoded[codec.block : 2 * codec.block].count_nonzero() == 1


def test_messages_of_levels_by_hand() -> None:
    """Scale 1 (0x3F80), then the levels as two's complement; of 4 bits the first in the lower half of a byte."""
    message, decoded, _ = sent(codec_of("int8"), torch.tensor([127.0, -1.4, 0.5, -127.0, 2.5]))
    assert message.tolist() == [0x80, 0x3F, 127, 255, 0, 129, 2]
    assert decoded.tolist() == [127, -1, 0, -127, 2]
    message, decoded, _ = sent(codec_of("int4"), torch.tensor([7.0, -1.4, -7.0, 3.0, -2.0]))
    assert message.tolist() == [0x80, 0x3F, 0xF7, 0x39, 0x0E]
    assert decoded.tolist() == [7, -1, -7, 3, -2]


@each_quantized
def test_every_level_survives(setting: str) -> None:
    levels = torch.arange(-QUANTIZED[setting], QUANTIZED[setting] + 1).float()
    _, decoded, error = sent(codec_of(setting), 0.25 * levels)
    assert torch.equal(decoded, 0.25 * levels) and not error.any()


def test_a_message_of_bf16_is_torchs_rounding() -> None:
    values = gaussian(1000)
    message, decoded, _ = sent(codec_of("bf16"), values)
    assert torch.equal(message.view(torch.bfloat16), values.bfloat16())
    assert torch.equal(decoded, values.bfloat16().float())


# -- top k -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("top_k", "block"), [(64, 4096), (3, 48), (3, 10), (1, 7), (6, 33), (5, 5)])
def test_the_largest_of_each_block_are_sent_and_no_others(top_k: int, block: int) -> None:
    codec = codec_of(TopK(top_k=top_k, block=block))
    for numel in (1, 3 * block, 20 * block + block // 2 + 1):
        values = gaussian(numel, seed=top_k)
        _, decoded, error = sent(codec, values)
        for a, b, is_sent in zip(values.split(block), error.split(block), decoded.split(block), strict=True):
            k = -(-top_k * a.numel() // block)
            largest = torch.zeros_like(a, dtype=torch.bool)
            largest[a.abs().topk(k).indices] = True
            assert torch.equal(is_sent != 0, largest)
            assert torch.equal(b[~largest], a[~largest])
            assert torch.equal(is_sent.sign()[largest], a.sign()[largest])


@pytest.mark.parametrize(("top_k", "block"), [(64, 4096), (3, 48), (3, 10)])
def test_of_equal_elements_as_many_are_sent_as_of_others(top_k: int, block: int) -> None:
    codec = codec_of(TopK(top_k=top_k, block=block))
    for few in (1, 2, 4):
        values = torch.randint(1, 1 + few, (20 * block,), generator=torch.Generator().manual_seed(few)).float()
        _, decoded, _ = sent(codec, values)
        assert (decoded.view(-1, block).count_nonzero(1) == top_k).all()
        assert torch.equal(decoded[decoded != 0], values[decoded != 0])


def test_a_group_has_the_mean_of_its_magnitudes() -> None:
    values = torch.zeros(10)
    values[[7, 0, 3, 9, 4]] = torch.tensor([-16.0, 8.0, 4.0, -2.0, 1.0])
    _, decoded, error = sent(codec_of(TopK(top_k=5, block=10)), values)
    assert decoded[[7, 0, 3, 9, 4]].tolist() == [-16, 8, 4, -1.5, 1.5]
    assert error[[7, 0, 3, 9, 4]].tolist() == [0, 0, 0, -0.5, -0.5]


def test_a_message_of_the_largest_by_hand() -> None:
    """Magnitudes 4 and 2, then position 5 with the sign set and position 2: 1101 and 0010 from the lowest bit."""
    message, decoded, _ = sent(codec_of(TopK(top_k=2, block=8)), torch.tensor([0, 1, 2, 0, 0, -4, 1, 1]).float())
    assert message.tolist() == [0x80, 0x40, 0x00, 0x40, 0b0010_1101]
    assert decoded.tolist() == [0, 0, 2, 0, 0, -4, 0, 0]


@pytest.mark.parametrize(("top_k", "block"), [(64, 4096), (8, 256), (1, 16), (3, 10)])
def test_sending_the_largest_is_a_contraction(top_k: int, block: int) -> None:
    codec = codec_of(TopK(top_k=top_k, block=block))
    for seed in range(5):
        values = gaussian(3 * block, seed)
        _, _, error = sent(codec, values)
        before, after = values.double().square().sum(), error.double().square().sum()
        assert after <= (1 - top_k / block) * before


# -- bits --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("width", range(1, 14))
@pytest.mark.parametrize("at_once", [16, 1 << 20])
def test_codes_are_one_number_of_their_bits_and_come_back_from_it(
    width: int, at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bits, "_AT_ONCE", at_once)
    for numel in (0, 1, 7, 8, 9, 100):
        codes = torch.randint(0, 1 << width, (numel,), generator=torch.Generator().manual_seed(numel))
        stream = torch.full((bits.stream_bytes(numel, width),), 0xAA, dtype=torch.uint8)
        bits.pack_(stream, codes.to(torch.int16), width)
        number = sum(code << width * at for at, code in enumerate(codes.tolist()))
        assert bytes(stream.tolist()) == number.to_bytes(len(stream), "little")
        assert torch.equal(bits.unpack(stream, numel, width), codes)
