"""What the name of a parameter says of it, for an optimizer that was not given the model."""

from __future__ import annotations

import re

# Whole names of modules that say nothing of embeddings by their parts: GPT-2's, T5's.
_EMBEDDINGS = {"wte", "wpe", "wtte", "tte", "shared", "relative_attention_bias"}
_SAYS_EMBEDDING = re.compile(r"(?:^|[_\d]|(?<=[a-z])(?=E))(?:[Ee]mb|[Ee]mbs|[Ee]mbeds?|[Ee]mbeddings?)(?:$|[_\d])")
# A matrix that belongs to an embedding, and is none.
_SAYS_OTHERWISE = re.compile(r"proj|linear|mapping|norm|dense|mlp", re.IGNORECASE)


def embedding_in(name: str) -> str:
    """The part of a parameter's name that calls it an embedding or a position table, "" where none does.

    That is the name of its module (`transformer.wte.weight`: wte), or its own (`encoder.pos_embed`: pos_embed).
    """
    parts = name.split(".")
    last = parts[-2] if parts[-1] == "weight" and len(parts) > 1 else parts[-1]
    if last in _EMBEDDINGS or (_SAYS_EMBEDDING.search(last) and not _SAYS_OTHERWISE.search(last)):
        return last
    return ""
