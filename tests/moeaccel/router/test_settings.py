import numpy as np
import pytest

from moeaccel.router.flavours import FLAVOURS
from moeaccel.router.settings import RouterError, RouterSettings


@pytest.mark.parametrize(("settings", "text"), [
    ({"experts": 0}, "experts must be from 1 to 1024, not 0"),
    ({"experts": 1025}, "experts must be from 1 to 1024, not 1025"),
    ({"top_k": 17}, "top_k must be from 1 to 16, not 17"),
    ({"top_k": 0}, "top_k must be from 1 to 16, not 0"),
    ({"top_k": True}, "top_k must be from 1 to 16, not True"),
    ({"experts": 4}, "top_k must be at most 4, the experts of the groups kept, not 8"),
    ({"score": "tanh"}, "score must be one of softmax, sigmoid, sqrt_softplus, identity, not"),
    ({"renormalize": "l2"}, "renormalize must be one of none, sum, sum_eps, clamp, softmax_top_k"),
    ({"groups": 7}, "groups must be a divisor of experts = 64, not 7"),
    ({"groups": 0}, "groups must be from 1 to 64, not 0"),
    ({"groups": 8, "keep_groups": 9}, "keep_groups must be from 1 to 8, the groups, not 9"),
    ({"groups": 16, "keep_groups": 1}, "top_k must be at most 4, the experts of the groups kept"),
    ({"groups": 64, "keep_groups": 20}, "keep_groups must be at most 16, or all 64, not 20"),
    ({"groups": 64, "keep_groups": 8, "group_score": "top2_sum"},
     "group_score must be max where groups have one expert, not 'top2_sum'"),
    ({"groups": 8, "keep_groups": 4, "group_score": "top2_sum", "bias_logits": True},
     "group_score must be max with bias_logits, not 'top2_sum'"),
    ({"bias_logits": "no"}, "bias_logits must be True or False, not 'no'"),
    ({"scale": 0.0}, "scale must be from 9.53674e-07 to 1.04858e.06, not 0.0"),
    ({"scale": float("nan")}, "scale must be from .*, not nan"),
    ({"epsilon": 1e-6}, "epsilon must be 0 where renormalize is none, not 1e-06"),
    ({"score": "identity", "renormalize": "sum"}, "renormalize must be none or softmax_top_k"),
    ({"threshold": 1.5}, "threshold must be from 0 to 1, not 1.5"),
    ({"top_p": 0.0}, "top_p must be from .* to 1, not 0.0"),
    ({"score": "identity", "top_p": 0.5}, "top_p must be None where weights are logits, not 0.5"),
    ({"prior": -1.0}, "prior must be from 0 to 2048, not -1.0"),
    ({"prior_keep": 2}, "prior_keep must be from 0 to 1, not 2"),
    ({"capacity": 0}, "capacity must be from 1 to 2147483647, not 0"),
    ({"mixer": 0.02}, "top_k must be 2 with mixer, not 8"),
    ({"mixer": 0.02, "top_k": 2, "renormalize": "sum"}, "renormalize must be none with mixer"),
])
def test_bad_settings_are_named(settings, text):
    with pytest.raises(RouterError, match=text):
        RouterSettings(**{"experts": 64, "top_k": 8, **settings})


@pytest.mark.parametrize("key", FLAVOURS)
def test_flavours_are_routers(key):
    router = FLAVOURS[key].router(128, 2)
    assert (router.experts, router.top_k) == (128, 2)


def test_numbers_of_numpy_are_numbers():
    settings = RouterSettings(experts=np.int64(8), top_k=np.uint8(2), scale=np.float32(2.5),
                              threshold=np.float64(0.5))
    assert settings == RouterSettings(experts=8, top_k=2, scale=2.5, threshold=0.5)
    assert [type(getattr(settings, name)) for name in ("experts", "top_k", "scale", "threshold")
            ] == [int, int, float, float]


def test_flavours_change():
    assert FLAVOURS["R5"].router(256, 8, scale=1.0).scale == 1.0
    with pytest.raises(RouterError, match="groups must be a divisor of experts = 60, not 8"):
        FLAVOURS["R5"].router(60, 4)
