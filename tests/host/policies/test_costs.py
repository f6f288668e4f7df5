import dataclasses

import pytest

from moeaccel.host.policies.costs import Rates, machine
from moeaccel.host.policies.errors import BudgetTooSmall, UnknownPolicy
from moeaccel.zoo import model


def costs(name="olmoe-1b-7b", torch="h100", **options):
    found = model(name)
    return machine(torch).holding(found, "int4_g32").layer(found, **options)


def test_an_olmoe_layer_takes_what_its_bytes_take():
    """Eight experts of 3.5 MB at 460 GB/s are 62 microseconds; 90 % of that rate are sustained."""
    assert 8 * costs().device_read == pytest.approx(62e-6 / 0.9, rel=0.02)
    assert costs().resident_bytes == 3 * 2048 * 1024 * 2


def test_two_small_dmas_are_a_quarter_of_a_call():
    assert 12e-6 <= costs(torch="cpu").device_call - 25e-6 <= 24e-6


def test_as_many_cards_as_hold_the_model():
    for name, cards in (("olmoe-1b-7b", 1), ("deepseek-v2-lite", 1), ("mixtral-8x7b", 2)):
        host = machine().holding(model(name), "int4_g32")
        assert host.cards.count == cards and f"{cards} x u55c" in host.name
    with pytest.raises(BudgetTooSmall, match=r"cards must hold Mixtral-8x7B, 25,.* as int4_g32"):
        machine().layer(model("mixtral-8x7b"))


def test_twice_the_cards_read_an_expert_in_half_the_time():
    found = model("mixtral-8x7b")
    two = machine().holding(found, "int4_g32")
    four = dataclasses.replace(two, cards=dataclasses.replace(two.cards, count=4))
    assert four.layer(found).device_read == two.layer(found).device_read / 2
    assert four.layer(found).device_call == two.layer(found).device_call
    assert four.layer(found).row > two.layer(found).row  # each card has a y of its own


def test_experts_take_a_read_or_their_products():
    c = costs()
    device, torch = c.tables(100)
    assert device[0] == torch[0] == 0 and len(device) > 100
    assert device[1] == c.device_read and device[100] == 100 * c.device_product
    assert torch[1] == torch[100] == c.torch_read
    assert c.single == (device[1], torch[1])
    assert len(c.tables(5000)[0]) > 5000


def test_images_come_from_the_host_unless_theirs_is_the_only_copy():
    both, alone = costs(), costs(single_copy=True)
    assert both.move == pytest.approx(both.image_bytes / 50e9) and both.contend == 0
    assert alone.move == pytest.approx(alone.image_bytes / 12.5e9)
    assert alone.contend == alone.device_read
    assert costs(torch="cpu") == costs(torch="cpu", single_copy=True)


def test_a_fused_kernel_reads_images():
    bf16, fused = costs(), costs(fused=True)
    assert fused.resident_bytes == fused.image_bytes < bf16.resident_bytes / 3.5
    assert fused.torch_read / bf16.torch_read == fused.image_bytes / bf16.resident_bytes
    assert fused.decode == 0 and fused.torch_product == bf16.torch_product


def test_activation_planes_are_products():
    assert costs(activation_bits=8).device_product == costs().device_product / 2


def test_shared_experts_are_torch_work_of_every_token():
    assert costs().shared(4) == 0
    c = costs("deepseek-v2-lite")
    assert c.n_shared == 2
    assert c.shared(1) == pytest.approx(c.torch_call + 2 * c.torch_read)
    assert c.shared(4096) == pytest.approx(c.torch_call + 2 * 4096 * c.torch_product)


def test_other_rates_change_no_call():
    c = costs(single_copy=True)
    changed = c.at(Rates(link=2, device=0.5, torch=4))
    assert changed.move == c.move / 2 and changed.device_read == 2 * c.device_read
    assert changed.contend == 2 * c.contend and changed.torch_product == c.torch_product / 4
    assert (changed.device_call, changed.row, changed.merge) == (c.device_call, c.row, c.merge)
    assert changed.tables(1)[0][1] == 2 * c.tables(1)[0][1]


def test_between_layers_is_attention():
    c = costs()
    assert c.between(1) == c.between_call + c.between_read
    assert c.between(100_000) == c.between_call + 100_000 * c.between_product


def test_what_is_unknown_is_named():
    with pytest.raises(UnknownPolicy, match=r"torch device must be one of h100, rtx4090, cpu, not"):
        machine("h200")
    with pytest.raises(UnknownPolicy, match="cards must be one of u55c, not 'u50'"):
        machine(cards="u50")
    with pytest.raises(ValueError, match=r"n_moe_layers of Qwen4-Exp must be known"):
        machine().holding(model("qwen4-exp"), "int4_g32")
