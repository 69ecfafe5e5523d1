"""Wire formats: what a vector of numbers becomes in a message, and what is read out of it.

    setting                           a scale for     bits of an element
    "fp32"                                                  32
    "bf16"                                                  16
    "int8"                            256                    8.0625
    "int4"                             64                    4.25
    {"top_k": 64, "block": 4096}       16 of 4096            0.21875

Encoding leaves behind what the message does not say, so that it can be added to the next vector (error feedback). All
but "fp32" carry finite numbers below 2^127, at the precision of float32. Decoding is integer arithmetic and at most one
float32 multiplication of an element, never of denormals: every IEEE machine reads the same numbers out of a message.
Numbers are little-endian. Nothing waits for the device.
"""

from __future__ import annotations

from lordo_ds.config import TopK, WireFormat
from lordo_ds.core.codec.base import Codec
from lordo_ds.core.codec.plain import Bf16, Plain
from lordo_ds.core.codec.quantized import BlockQuantized
from lordo_ds.core.codec.top_k import TopKSparse

__all__ = ["Codec", "codec_of"]

_CODECS: dict[str, Codec] = {
    codec.name: codec for codec in (Plain(), Bf16(), BlockQuantized("int8", 256, 8), BlockQuantized("int4", 64, 4))
}


def codec_of(setting: WireFormat) -> Codec:
    """The codec of a `pseudo_gradient_dtype`."""
    return TopKSparse(setting.top_k, setting.block) if isinstance(setting, TopK) else _CODECS[setting]
