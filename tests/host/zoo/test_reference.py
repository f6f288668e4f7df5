"""Float routers and experts: against another formula, and by hand."""

import numpy as np
import pytest
import torch

from moeaccel.activations import ACTIVATIONS
from moeaccel.config import PRESETS
from moeaccel.golden import experts_float64
from moeaccel.golden.router_reference import route_float
from moeaccel.host.errors import LimitExceeded, UnsupportedExperts
from moeaccel.host.zoo import reference
from moeaccel.host.zoo.cases import case, reduced
from moeaccel.host.zoo.reference import ExpertWeights, RouterWeights
from moeaccel.zoo import model, models
from moeaccel.zoo.schema import Capacity, ExpertKind, RouterKind

SMALL = PRESETS["small"]


@pytest.mark.parametrize("key", sorted({m.router.text: m.key for m in models().values()
                                        if m.router.flavour != "R12d"}.values()))
def test_routers_are_those_of_the_settings(key):
    """By the flavour's own formula, and by general settings: two ways to the same weights."""
    drawn = case(model(key), SMALL, seed=3)
    settings, biases = drawn.settings, drawn.router.selection_bias
    ids, weights = route_float(
        torch.from_numpy(drawn.logits).double(), settings,
        selection_bias=None if biases is None else biases[: settings.experts])
    wanted = drawn.routes.weights
    if drawn.router.expert_scale is not None:
        wanted = wanted / drawn.router.expert_scale[drawn.routes.ids]
    dropped = (drawn.routes.ids < 0).numpy()
    assert (ids.numpy() == drawn.routes.ids.numpy()).all()
    np.testing.assert_allclose(np.where(dropped, 0, weights.numpy()),
                               np.where(dropped, 0, wanted.numpy()), rtol=2e-6)
    assert dropped.any() == (drawn.model.router.capacity is not None)


def kind(flavour, score="softmax", **fields):
    return RouterKind(flavour=flavour, score=score, **fields)


def test_sinks_share_in_the_sum():
    found = reference.route(
        kind("R12i", "sigmoid", scale=8.0, sinks=2), 1, torch.tensor([[0.0, 3.0, 1.0, -1.0]]),
        RouterWeights(torch.zeros(4, 1), selection_bias=torch.tensor([0.9, 0.0, 0.0, 0.0])))
    assert found.ids.tolist() == [[0, 2, 3]]  # chosen with the bias, weighed without
    q = [1 / (1 + np.exp(-s)) for s in (0.0, 1.0, -1.0)]
    np.testing.assert_allclose(found.weights.numpy(), [[8 * v / sum(q) for v in q]], rtol=1e-6)


def test_attention_among_experts():
    rng = np.random.default_rng(0)
    x, w = rng.standard_normal((3, 5)), rng.standard_normal((3, 4, 5))
    found = reference.logits(kind("R10", logits="attention"), torch.from_numpy(x),
                             RouterWeights(torch.from_numpy(w)))
    for token in range(3):
        q, k, v = (w[i] @ x[token] for i in range(3))
        weights = np.exp(np.outer(q, k))
        np.testing.assert_allclose(
            found[token], (weights / weights.sum(1, keepdims=True)) @ v, rtol=1e-10)


def test_deviation_divides_logits():
    x, w = torch.eye(3).double(), torch.tensor([[1.0, 2.0, 3.0], [5.0, 2.0, 2.0]]).double()
    found = reference.logits(kind("R1", logits="over_deviation"), x, RouterWeights(w))
    np.testing.assert_allclose(found[0], np.array([1, 5]) / np.std([1, 5], ddof=1))


def test_a_network_has_no_reference():
    with pytest.raises(UnsupportedExperts, match=r"not from mlp \(router R12z\); give logits"):
        reference.logits(kind("R12z", logits="mlp"), torch.zeros(1, 1),
                         RouterWeights(torch.zeros(1, 1)))


@pytest.mark.parametrize(("order", "ids"), [("rank", [0, 0, -1, -1]), ("priority", [-1, -1, 0, 0])])
def test_who_is_first(order, ids):
    s = torch.tensor([[1.0, 0.0], [2.0, 0.0], [3.0, 0.0], [4.0, 0.0]])
    capacity = Capacity(tokens=2, order=order)
    found = reference.route(kind("R11s", capacity=capacity), 1, s, RouterWeights(torch.zeros(2, 1)))
    assert found.ids[:, 0].tolist() == ids


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_experts_are_those_of_the_activations(name, gated):
    expert = ExpertKind(d_expert=6, form="glu" if gated else "mlp", activation=name,
                        limit=1.0 if gated else None)
    rng = np.random.default_rng(1)
    x, gate_up, down = (rng.standard_normal(shape) * 2 for shape in (
        (3, 5), (12 if gated else 6, 5), (5, 6)))
    try:
        found = reference.expert(expert, torch.from_numpy(x), ExpertWeights(
            torch.from_numpy(gate_up), torch.from_numpy(down)))
    except UnsupportedExperts:
        assert not any(m.expert.form == expert.form and m.act == name for m in models().values())
        return
    every = np.zeros((3, 1), np.int64)
    np.testing.assert_allclose(found.numpy(), experts_float64(
        x, every, np.ones((3, 1)), [gate_up], [down], name, expert.limit), rtol=1e-9)


def test_experts_by_hand():
    def one(expert, rows, **more):
        weights = ExpertWeights(torch.tensor([[r] for r in rows]).double(),
                                torch.eye(1).double(), **more)
        return float(reference.expert(expert, torch.ones(1, 1).double(), weights))

    gpt_oss = model("gpt-oss-20b").expert
    assert one(gpt_oss, [9.0, -8.0]) == pytest.approx(-6 * 7 / (1 + np.exp(-1.702 * 7)))
    assert one(gpt_oss, [1.0, 1.0], gate_up_bias=torch.tensor([1.0, 2.0]).double(),
               down_bias=torch.tensor([0.5]).double()) == pytest.approx(
                   4 * 2 / (1 + np.exp(-1.702 * 2)) + 0.5)
    assert one(model("openmoe-8b").expert, [3.0, 2.0, 5.0]) == pytest.approx(
        2 * 3 / (1 + np.exp(-3)) * 5)
    assert one(model("inkling-2-small").expert, [8.0, 50.0]) == pytest.approx(
        4 * np.tanh(2) / (1 + np.exp(-4 * np.tanh(2))) * 25 * np.tanh(2))
    assert one(model("deepseek-v4-flash").expert, [20.0, -20.0]) == pytest.approx(
        -100 / (1 + np.exp(-10)))
    assert one(model("step-3.7-flash").expert, [9.0, -8.0]) == -7 * 7
    assert one(model("step-3.7-flash").expert, [7.0, 2.0]) == pytest.approx(14 / (1 + np.exp(-7)))
    with pytest.raises(UnsupportedExperts, match="not situ: its constants"):
        one(model("kimi-k3").expert, [1.0, 1.0])


def test_reduced_sizes_keep_what_routers_are():
    sizes = {key: reduced(model(key), SMALL) for key in (
        "deepseek-v2", "deepseek-v3-r1", "qwen1.5-moe-a2.7b", "longcat-flash", "inkling", "aria")}
    assert [(s.experts, s.top_k, s.identities, s.sinks) for s in sizes.values()] == [
        (40, 6, 0, 0), (32, 8, 0, 0), (30, 4, 0, 0), (32, 12, 16, 0), (32, 6, 0, 2), (16, 2, 0, 0)]
    with pytest.raises(LimitExceeded, match="at least 40 experts for DeepSeek-V2 at its smallest"):
        reduced(model("deepseek-v2"), PRESETS["tiny"])
