"""Which parameters are projected, on which side, at which rank; what makes no sense is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from lordo_ds.config import LordoConfig
from lordo_ds.core.grouping import ParameterFacts, ParameterPlan, model_facts, plan_parameters
from lordo_ds.core.names import embedding_in
from lordo_ds.errors import ConfigError


def plan_of(shape: tuple[int, ...], params: dict[str, Any] | None = None, **facts: Any) -> ParameterPlan:
    """The plan of one parameter beside an ordinary matrix."""
    name = facts.pop("name", "decoder.weight")
    others = [ParameterFacts("other.weight", (4, 4))]
    config = LordoConfig.parse({"rank": 2, **(params or {})})
    return plan_parameters(config, [ParameterFacts(name, shape, **facts), *others])[0]


def plans_of(model: nn.Module, **low_rank: Any) -> dict[str, ParameterPlan]:
    config = LordoConfig.parse({"rank": 2, "low_rank": low_rank})
    return {plan.name: plan for plan in plan_parameters(config, model_facts(model).values())}


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(8, 24)
        self.head = nn.Linear(8, 8, bias=False)  # a module called head inside a block
        self.norm = nn.LayerNorm(8)


class Language(nn.Module):
    """A language model in miniature; `tie` shares the embedding with the output."""

    def __init__(self, output_name: str = "lm_head", tie: bool = False) -> None:
        super().__init__()
        self.embed = nn.Embedding(32, 8)
        self.blocks = nn.ModuleList([Block(), Block()])
        self.conv = nn.Conv1d(8, 8, 3)
        output = nn.Linear(8, 32, bias=False)
        if tie:
            output.weight = self.embed.weight
        setattr(self, output_name, output)


# -- low-rank or dense ---------------------------------------------------------------------------------


def test_matrices_are_projected_and_embeddings_biases_norms_and_convolutions_are_not() -> None:
    plans = plans_of(Language())
    low_rank = {name for name, plan in plans.items() if plan.low_rank}
    assert low_rank == {"blocks.0.qkv.weight", "blocks.1.qkv.weight"}
    assert plans["embed.weight"].reason == "embedding"
    assert plans["blocks.0.qkv.bias"].reason == plans["blocks.0.norm.weight"].reason == "1-D"
    assert plans["conv.weight"].reason == "3-D"


@pytest.mark.parametrize("name", ["lm_head", "output_layer", "embed_out", "head"])
def test_an_output_head_is_known_by_the_name_of_its_last_module(name: str) -> None:
    assert not plans_of(Language(name))[f"{name}.weight"].low_rank
    assert not plan_of((32, 8), name=f"model.{name}.weight").low_rank
    assert name in plan_of((32, 8), name=f"model.{name}.weight").reason


@pytest.mark.parametrize(
    "name",
    [
        "head.dense.weight",
        "lm_head.inner.weight",
        "head_proj.weight",
        "my_lm_head.weight",
        "classifier.weight",
        "head",
    ],
)
def test_other_names_that_mention_a_head_are_projected(name: str) -> None:
    assert plan_of((32, 8), name=name).low_rank


def test_the_last_matrix_of_a_model_is_projected_whatever_its_position_and_shape() -> None:
    plans = plans_of(Language("classifier"))
    assert plans["classifier.weight"].low_rank


def test_a_weight_tied_to_an_embedding_is_dense_and_listed_once() -> None:
    plans = plans_of(Language(output_name="classifier", tie=True))
    assert plans["embed.weight"].reason == "tied to an embedding"
    assert "classifier.weight" not in plans


def test_a_weight_tied_to_an_embedding_that_is_registered_first_is_dense_too() -> None:
    class OutputFirst(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.projection = nn.Linear(8, 32, bias=False)
            self.embed = nn.Embedding(32, 8)
            self.embed.weight = self.projection.weight
            self.body = nn.Linear(8, 8)

    plans = plans_of(OutputFirst())
    assert not plans["projection.weight"].low_rank and plans["body.weight"].low_rank


@pytest.mark.parametrize("mark", ["is_embedding_or_output_parameter", "shared_embedding"])
def test_what_megatron_marks_as_embedding_or_output_is_dense(mark: str) -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    setattr(model[1].weight, mark, True)
    plans = plans_of(model)
    assert plans["0.weight"].low_rank and not plans["1.weight"].low_rank


def test_an_embedding_class_of_another_library_is_known_by_its_name() -> None:
    class VocabParallelEmbedding(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(32, 8))

    model = nn.ModuleDict({"words": VocabParallelEmbedding(), "body": nn.Linear(8, 8)})
    assert plans_of(model)["words.weight"].reason == "embedding"


def test_a_bare_matrix_without_a_name_is_projected_even_if_it_is_called_head_by_accident() -> None:
    assert plan_of((8, 6), name="x.head.weight", named=False).low_rank


# -- include and exclude -------------------------------------------------------------------------------


def test_exclude_leaves_out_what_matches_anywhere_in_the_name() -> None:
    plans = plans_of(Language(), exclude=[r"blocks\.1\."])
    assert plans["blocks.0.qkv.weight"].low_rank and not plans["blocks.1.qkv.weight"].low_rank
    assert r"'blocks\\.1\\.'" in plans["blocks.1.qkv.weight"].reason


def test_include_projects_exactly_the_matrices_it_matches_heads_and_embeddings_too() -> None:
    plans = plans_of(Language(), include=["lm_head", r"blocks\.0", "embed"])
    low_rank = {name for name, plan in plans.items() if plan.low_rank}
    assert low_rank == {"lm_head.weight", "embed.weight", "blocks.0.qkv.weight", "blocks.0.head.weight"}
    assert plans["blocks.1.qkv.weight"].reason == "not included"


def test_exclude_wins_over_include() -> None:
    plans = plans_of(Language(), include=["qkv"], exclude=[r"\.1\."])
    assert {name for name, plan in plans.items() if plan.low_rank} == {"blocks.0.qkv.weight"}


@pytest.mark.parametrize("key", ["include", "exclude"])
def test_a_pattern_that_matches_nothing_is_refused_with_an_example_of_a_name(key: str) -> None:
    with pytest.raises(ConfigError) as caught:
        plans_of(Language(), **{key: ["qkv", "attention"]})
    message = str(caught.value)
    assert f"low_rank.{key}" in message and "'attention'" in message and "'embed.weight'" in message
    assert "\n" not in message


def test_everything_can_be_excluded_on_purpose() -> None:
    assert not any(plan.low_rank for plan in plans_of(Language(), exclude=[".*"]).values())
    unnamed = [ParameterFacts("parameter_0", (4, 4), named=False)]
    config = LordoConfig.parse({"low_rank": {"exclude": [".*"]}})
    assert not plan_parameters(config, unnamed)[0].low_rank


def test_a_model_with_nothing_to_project_is_refused_with_the_way_out() -> None:
    with pytest.raises(ConfigError, match=r'"exclude": \["\.\*"\]'):
        plans_of(nn.Sequential(nn.Embedding(4, 4), nn.LayerNorm(4)))


def test_no_parameters_at_all_make_an_empty_plan() -> None:
    assert plan_parameters(LordoConfig.parse({}), []) == []


# -- side and rank -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "side", "basis_side", "other_side"),
    [
        ((6, 20), "rows", 6, 20),
        ((20, 6), "columns", 6, 20),
        ((8, 8), "columns", 8, 8),
        ((1, 5), "rows", 1, 5),
    ],
)
def test_the_basis_is_on_the_smaller_side_and_on_the_columns_of_a_square(
    shape: tuple[int, int], side: str, basis_side: int, other_side: int
) -> None:
    plan = plan_of(shape)
    assert (plan.side, plan.basis_side, plan.other_side) == (side, basis_side, other_side)
    assert not plan.on_larger_side
    assert plan.orient(torch.zeros(shape)).shape == (basis_side, other_side)


def test_orienting_is_a_view() -> None:
    matrix = torch.zeros(20, 6)
    plan_of((20, 6)).orient(matrix)[2, 7] = 5
    assert matrix[7, 2] == 5


@pytest.mark.parametrize(
    ("shape", "partition_dim", "side", "larger"),
    [
        ((24, 8), 0, "columns", False),  # column-parallel: rows are sharded
        ((8, 24), 1, "rows", False),  # row-parallel
        ((8, 8), 0, "columns", False),
        ((8, 8), 1, "rows", False),
        ((6, 20), 0, "columns", True),
        ((20, 6), 1, "rows", True),
    ],
)
def test_the_basis_is_on_the_side_that_tensor_parallelism_does_not_shard(
    shape: tuple[int, int], partition_dim: int, side: str, larger: bool
) -> None:
    plan = plan_of(shape, partition_dim=partition_dim)
    assert (plan.side, plan.on_larger_side) == (side, larger)
    assert plan.rank <= min(shape)


def test_partition_dim_is_read_from_the_parameter_and_minus_one_means_none() -> None:
    names = ("row", "column", "none", "unset")
    model = nn.ModuleDict({name: nn.Linear(6, 8, bias=False) for name in names})  # smaller side: columns
    for name, dim in (("row", 1), ("column", 0), ("none", -1)):
        model[name].weight.partition_dim = dim
    sides = [plans_of(model)[f"{name}.weight"].side for name in names]
    assert sides == ["rows", "columns", "columns", "columns"]


@pytest.mark.parametrize(
    ("rank", "shape", "expected", "clipped"),
    [
        (4, (20, 6), 4, False),
        (6, (20, 6), 6, False),
        (7, (20, 6), 6, True),
        (128, (20, 6), 6, True),
        ("1/2", (20, 6), 3, False),
        ("1/8", (20, 6), 1, False),
        ("1/8", (20, 64), 2, False),
        ("1/1", (20, 6), 6, False),
        ("2/3", (9, 9), 6, False),
    ],
)
def test_the_rank_is_clipped_to_the_smaller_side_and_a_fraction_is_of_that_side(
    rank: int | str, shape: tuple[int, int], expected: int, clipped: bool
) -> None:
    plan = plan_of(shape, {"rank": rank})
    assert (plan.rank, plan.rank_clipped) == (expected, clipped)


def test_plans_keep_the_order_and_the_names_of_the_parameters() -> None:
    facts = [ParameterFacts(name, (4, 4)) for name in ("b.w", "a.w", "c.w")]
    plans = plan_parameters(LordoConfig.parse({"rank": 1}), facts)
    assert [plan.name for plan in plans] == ["b.w", "a.w", "c.w"]
    assert [plan.numel for plan in plans] == [16, 16, 16]
    assert all("smaller side" in plan.reason for plan in plans)


@pytest.mark.parametrize("rank", [4, "1/4", 1000])
@pytest.mark.parametrize(("shape", "dim"), [((24, 8), 0), ((8, 24), 1), ((8, 64), 0), ((64, 8), 1), ((16, 16), 1)])
def test_side_rank_and_whole_sizes_do_not_change_with_the_tensor_parallel_size(
    shape: tuple[int, int], dim: int, rank: int | str
) -> None:
    """No plan has its basis on the side that is sliced: a step would not be exact without communication."""
    whole = plan_of(shape, {"rank": rank}, partition_dim=dim)
    for size in (1, 2, 4, 8):
        sliced = tuple(n // size if i == dim else n for i, n in enumerate(shape))
        plan = plan_of(sliced, {"rank": rank}, partition_dim=dim, partitions=size)
        assert plan.side == ("columns" if dim == 0 else "rows")
        assert (plan.side, plan.rank, plan.on_larger_side) == (whole.side, whole.rank, whole.on_larger_side)
        assert (plan.basis_side, plan.whole_other_side) == (whole.basis_side, whole.other_side)


def test_slices_are_read_from_megatrons_attributes() -> None:
    model = nn.ModuleDict({name: nn.Linear(6, 8, bias=False) for name in ("sliced", "whole")})
    weight = model["sliced"].weight
    weight.tensor_model_parallel, weight.partition_dim, weight.partition_stride = True, 0, 2
    facts = {fact.name: fact for fact in model_facts(model, 4).values()}
    assert (facts["sliced.weight"].partitions, facts["sliced.weight"].partition_stride) == (4, 2)
    assert (facts["whole.weight"].partitions, facts["whole.weight"].partition_stride) == (1, 1)


def test_a_slice_that_does_not_say_its_dimension_is_refused_under_tensor_parallelism() -> None:
    model = nn.Sequential(nn.Linear(6, 8, bias=False))
    model[0].weight.tensor_model_parallel = True  # type: ignore[assignment]
    assert model_facts(model)
    with pytest.raises(ConfigError, match=r"0\.weight is marked tensor_model_parallel without a partition_dim"):
        model_facts(model, 2)


def test_a_stage_without_a_matrix_is_planned_by_what_the_whole_model_holds() -> None:
    stage, matrix = [ParameterFacts("norm.weight", (8,))], ParameterFacts("layers.0.weight", (8, 8))
    config = LordoConfig.parse({"rank": 2, "low_rank": {"include": ["layers"]}})
    assert not plan_parameters(config, stage, [*stage, matrix])[0].low_rank
    with pytest.raises(ConfigError, match="matches no parameter name"):
        plan_parameters(config, stage)
    with pytest.raises(ConfigError, match="no parameter can be projected"):
        plan_parameters(LordoConfig.parse({"rank": 2}), stage)


def test_a_model_in_stages_says_what_its_parameters_are_called_in_one_piece() -> None:
    class Stage(nn.Sequential):
        def name_in_one_piece(self, name: str) -> str:
            return f"decoder.{name}"

    assert [fact.name for fact in model_facts(Stage(nn.Linear(3, 3))).values()] == [
        "decoder.0.weight",
        "decoder.0.bias",
    ]


# -- where names are all that is known -----------------------------------------------------------------

EMBEDDINGS = (
    "wte.weight transformer.wpe.weight wpe model.embed_tokens.weight embeddings.word_embeddings.weight "
    "embeddings.token_type_embeddings.weight decoder.embed_positions.weight tok_embeddings.weight pos_embed "
    "gpt_neox.embed_in.weight tok_emb.weight emb_2.weight tokenEmbedding.weight Embedding.weight shared.weight "
    "relative_attention_bias.weight"
)
OTHERS = (
    "blocks.0.attn.qkv.weight embed.0.weight patch_embed.proj.weight embedding_projection.weight embed_norm.weight "
    "embedding_hidden_mapping_in.weight embeddings.LayerNorm.weight assembler.weight remember.weight weight "
    "head.weight shared_experts.weight embedder.fc1.weight"
)


@pytest.mark.parametrize("name", EMBEDDINGS.split())
def test_a_name_that_says_embedding_is_taken_at_its_word(name: str) -> None:
    plan = plan_of((8, 6), name=name, embedding_name=embedding_in(name))
    assert not plan.low_rank and plan.reason.startswith("embedding, by its name (")
    assert plan_of((8, 6), {"low_rank": {"include": [".*"]}}, name=name, embedding_name=embedding_in(name)).low_rank


@pytest.mark.parametrize("name", OTHERS.split())
def test_other_names_say_nothing_of_embeddings(name: str) -> None:
    assert not embedding_in(name)
