"""The zoo's rows: what their fields mean, and that routers are what their families are."""

import dataclasses
import json
from pathlib import Path

import pytest

from moeaccel import zoo
from moeaccel.router.flavours import FLAVOURS as FAMILIES
from moeaccel.router.settings import RouterError
from moeaccel.zoo import UnknownModel, matching, model, models, of_survey
from moeaccel.zoo.routers import settings_of
from moeaccel.zoo.schema import FLAVOURS, Capacity, ZooError, parse

ROWS = json.loads((Path(zoo.__file__).parent / "models.json").read_text(encoding="utf-8"))


def row(name):
    return json.loads(json.dumps(next(r for r in ROWS if r["name"] == name)))


def test_ninety_models_and_the_survey():
    assert len(ROWS) == len(models()) == 90
    assert len({m.name for m in models().values()}) == 90
    assert len(of_survey(list(models().values()))) == 25
    assert {m.router.flavour for m in models().values()} == set(FLAVOURS)


@pytest.mark.parametrize(("key", "parameters"), [  # all routed experts of published checkpoints
    ("olmoe-1b-7b", 6_442_450_944), ("mixtral-8x7b", 45_097_156_608),
    ("nllb-moe-54b", 51_539_607_552), ("openmoe-8b", 8_589_934_592),
    ("gpt-oss-120b", 114_661_785_600), ("nemotron-3-nano-30b-a3b", 29_374_808_064),
    ("muse-spark-816b-a42b", 798_863_917_056), ("deepseek-v3-r1", 653_908_770_816),
    ("longcat-flash", 541_165_879_296), ("grok-1", 309_237_645_312),
])
def test_parameters_of_routed_experts(key, parameters):
    m = model(key)
    assert m.moe_layers * m.n_experts * m.expert_weights == parameters


def test_flat_names_that_scripts_rely_on():
    m = model("Qwen/Qwen1.5-MoE-A2.7B")
    assert (m.key, m.n_layers, m.n_moe_layers, m.d_model, m.d_expert, m.n_experts, m.top_k,
            m.n_shared, m.router_flavour, m.act, m.ffn, m.expert_bias, m.native_dtype, m.tf_class,
            m.tf_pluggable) == ("qwen1.5-moe-a2.7b", 24, 24, 2048, 1408, 60, 4, 1, "R2", "silu",
                                "glu", False, "bf16", "Qwen2MoeExperts", True)
    assert m.shared.width == 5632 and m.shared.gate == "sigmoid"


def test_rows_of_two_widths_and_of_latent_experts():
    assert model("swin-moe-s-32e").expert_widths == ((384, 1536), (768, 3072))
    assert model("muse-spark-816b-a42b").expert_widths == ((4096, 4096),)
    assert model("aria").expert_widths == ()


def test_capacities():
    openmoe = model("openmoe-34b").router.capacity
    assert [openmoe(tokens, 32, 2) for tokens in (1, 32, 40, 56)] == [4, 4, 6, 8]
    assert model("switch-base-128").router.capacity(1000, 128, 1) == 64
    assert Capacity(factor=1.25)(64, 32, 1) == 2


@pytest.mark.parametrize(("change", "what"), [
    ({"aliases": ["DeepSeek V3"]}, "aliases must be keys, and others than 'deepseek-v3-r1', not"),
    ({"width": 3}, "unexpected keyword argument 'width'"),
    ({"layers": 0}, "layers must be a whole number from 1, or null, not 0"),
    ({"n_experts": 250}, "router.groups must divide 250 experts, not 8"),
    ({"confidence": "sure"}, "confidence must be one of config, paper"),
    ({"router": {"flavour": "R5"}}, "missing 1 required keyword-only argument: 'score'"),
    ({"router": {"flavour": "R13", "score": "softmax"}}, "router.flavour must be one of R1, R1b"),
    ({"router": {"flavour": "R1", "score": "softplus"}}, "router.score must be one of softmax"),
    ({"router": {"flavour": "R5", "score": "sigmoid", "renormalize": "sum_eps"}},
     "router.epsilon must be there for sum_eps"),
    ({"router": {"flavour": "R4", "score": "softmax", "groups": 8, "keep_groups": 9}},
     "router.keep_groups must be from 1 to 8 groups, not 9"),
    ({"expert": {"d_expert": 8, "form": "tree"}}, "expert.form must be one of glu, mlp"),
    ({"shared": {"count": 1, "gate": "tanh"}}, "shared.gate must be one of None, sigmoid"),
])
def test_what_a_row_may_not_say(change, what):
    with pytest.raises(ZooError, match="row of model 'DeepSeek-V3 / R1' must be") as caught:
        parse(row("DeepSeek-V3 / R1") | change)
    assert what in str(caught.value)


def test_names():
    with pytest.raises(UnknownModel, match="did you mean olmoe-1b-7b"):
        model("olmo-1b")
    assert model("deepseek-v3") is model("DeepSeek-R1") is model("deepseek-v3-r1")
    with pytest.raises(UnknownModel, match="did you mean olmoe-1b-7b"):
        matching("olmo-1b")
    assert {m.key for m in matching("deepseek-v3")} == {"deepseek-v3-r1", "deepseek-v3.2"}
    every = [name for m in models().values() for name in (m.key, *m.aliases)]
    assert len(set(every)) == len(every)
    with pytest.raises(UnknownModel, match=r"one of the survey's, .*, not gpt-oss-20b"):
        of_survey([model("gpt-oss-20b")])


def settings(m):
    return settings_of(m, experts=(m.n_experts or 16) + m.router.identity_experts,
                       top_k=m.top_k or 2, tokens=64)


OWN = {"scale", "groups", "keep_groups", "group_score", "epsilon", "capacity", "capacity_order"}
"""What differs within a family."""


@pytest.mark.parametrize("m", [m for m in models().values() if m.router.flavour in FAMILIES],
                         ids=lambda m: m.key)
def test_a_router_is_one_of_its_family(m):
    family, found = FAMILIES[m.router.flavour], settings(m)
    general = family.router(found.experts, found.top_k,
                            **{name: getattr(found, name) for name in OWN})
    if family.settings.get("renormalize") == "sum_eps" and not found.epsilon:
        general = dataclasses.replace(general, renormalize="sum")  # the same with an epsilon of 0
    assert found == general
    assert bool(m.router.selection_bias) is family.selection_bias


def test_routers_that_the_settings_cannot_say():
    refused = {}
    for m in models().values():
        try:
            settings(m)
        except RouterError as error:
            refused[m.key] = str(error)
    assert list(refused) == ["doge"]
    assert "R12d looks experts up by product keys" in refused["doge"]
