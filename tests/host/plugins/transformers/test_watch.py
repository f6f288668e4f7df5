import gc
import weakref

import pytest
import torch

from moeaccel.host.plugins.transformers import watch
from moeaccel.host.plugins.transformers.watch import PARTS, Watch

SMALL, LARGE = 70_000, 3 << 20  # of float32: blocks of 64 bytes, and of 4 KiB

ALL = range(PARTS)


@pytest.fixture(params=["host", "elsewhere"])
def place(request, monkeypatch):
    """Digests as on the host, and as on other devices."""
    if request.param == "elsewhere":
        monkeypatch.setattr(watch, "_HostBytes", watch._TorchBytes)


def tensor_of(count):
    return torch.rand(count, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("count", [0, 1, 1000, SMALL, LARGE])
def test_what_did_not_change_is_the_same(place, count):
    tensor = tensor_of(count)
    watched = Watch(tensor)
    assert watched.same(tensor, ALL)
    assert watched.same(tensor.detach(), ALL)


@pytest.mark.parametrize("count", [1, 1000, SMALL, LARGE])
def test_any_bit_is_seen_when_every_part_was_looked_at(place, count):
    tensor = tensor_of(count)
    watched = Watch(tensor)
    raw = tensor.view(torch.uint8)
    for at in (0, count // 2 * 4, 4 * count - 1):
        raw.numpy()[at] ^= 1
        assert sum(not watched.same(tensor, [part]) for part in ALL) in (1, PARTS)
        raw.numpy()[at] ^= 1
    assert watched.same(tensor, ALL)


@pytest.mark.parametrize(("count", "span"), [(SMALL, 16 << 10), (LARGE, 1 << 20)])
def test_a_large_write_is_seen_by_every_part(place, count, span):
    tensor = tensor_of(count)
    watched = Watch(tensor)
    tensor.data[100 : 100 + span // 4 + 1024].neg_()
    assert not any(watched.same(tensor, [part]) for part in ALL)


@pytest.mark.parametrize("change", [
    lambda t: t.neg_(), lambda t: t[1::2].neg_(), lambda t: t.copy_(t.flip(0)), lambda t: t.zero_(),
])
def test_sums_that_cancel_are_seen(place, change):
    tensor = tensor_of(SMALL).bfloat16()
    watched = Watch(tensor)
    change(tensor.data)
    assert not watched.same(tensor, [0])


def test_writes_that_pytorch_counts_are_seen_without_looking():
    tensor = tensor_of(SMALL)
    watched = Watch(tensor)
    tensor[5] = tensor[5]
    assert not watched.same(tensor, ())


def test_another_tensor_is_seen_without_looking():
    tensor = tensor_of(SMALL)
    watched = Watch(tensor)
    for other in (tensor.clone(), tensor[1:], tensor.view(2, -1), tensor.view(torch.int32)):
        assert not watched.same(other, ())


def test_views_are_watched_where_they_are():
    base = tensor_of(SMALL)
    view = base[1000:3000].view(40, 50).T
    watched = Watch(view)
    base.numpy()[:1000] = 0
    base.numpy()[3000:] = 0
    assert watched.same(view, ALL)
    base.numpy()[2999] = 0
    assert not watched.same(view, ALL)


def test_nothing_is_kept_alive_and_an_address_may_be_used_again(place):
    tensor = tensor_of(SMALL)
    alive = weakref.ref(tensor.untyped_storage())
    watched = Watch(tensor)
    del tensor
    gc.collect()
    assert alive() is None
    # Some of them may lie where it lay, and hold the same.
    others = [tensor_of(SMALL) for _ in range(10)]
    assert not any(watched.same(other, ()) for other in others)
