"""MOE: one command gives the bits of three, and says what is wrong with any of its parts."""

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import moeaccel.host.transformers_plugin as plugin
from moeaccel.formats import whole_blocks
from moeaccel.host import Router, errors
from moeaccel.host.demo import CHECKPOINT
from moeaccel.host.demo.run import demo_prompts, generate
from moeaccel.host.rings import Command
from moeaccel.interface.commands import (
    ENTRY_BYTES,
    LAYER,
    MOE_BLOCK,
    ROUTER,
    SUBMISSION,
    NonFinite,
    Opcode,
    Overflow,
    Status,
    decode,
    encode,
    field_of,
)
from moeaccel.sim import MemoryModel, StallModel
from tests.support.pair import assert_same_bits, execute
from tests.system.test_routing import CONFIG

pytestmark = pytest.mark.timeout(900)  # the first test builds a model

SIZE = 1 << 22
SLOW = MemoryModel(size=SIZE, read_latency=150, write_latency=230, reorder=True, interleave=True,
                   stalls=StallModel.uniform(0.2, length=3), seed=7)
SIGMOID = {"score": "sigmoid", "renormalize": "sum", "groups": 4, "keep_groups": 2,
           "group_score": "top2_sum"}
OPTIONS = ("x", "ids", "weights", "y", "workspace")


def draw(rng, *shape):
    return (rng.standard_normal(shape) / 8).astype(np.float32)


def load(device, *, experts=16, d_model=64, shared=0, seed=1, **settings):
    """Return a layer, the same on every device."""
    rng = np.random.default_rng(seed)
    settings = {"top_k": 2} | settings
    apart, rows = settings.get("gates") == "sigmoid", experts
    if apart:  # load_moe makes a router with them
        del settings["gates"]
    elif "gates" in settings:
        settings["shared"], rows = shared, experts + shared
    router = Router(draw(rng, rows, d_model) * 8, **settings,
                    selection_bias=draw(rng, experts) if "score" in settings else None)
    more = [(draw(rng, 128, d_model), draw(rng, d_model, 64),
             *([draw(rng, d_model) * 8] if apart else [])) for _ in range(shared)]
    return device.load_moe(router, draw(rng, experts, 64, d_model), draw(rng, experts, d_model, 32),
                           shared=more or None)


class Call:
    """Memory of one raw command, full of ones where nothing was written."""

    def __init__(self, device, moe, x, opcode=Opcode.MOE):
        self.device, self.moe, self.x, self.opcode = device, moe, x, opcode
        tokens, d_model = x.shape
        self.slots = moe.router.settings.top_k + moe._shared
        widest = max(whole_blocks(d_model), whole_blocks(moe.router.settings.outputs))
        pairs = 4 * tokens * self.slots
        sizes = [x.nbytes, pairs, pairs, x.nbytes, 8 * tokens * widest]
        self.sizes = dict(zip(OPTIONS, (-(-size // 64) * 64 for size in sizes), strict=True))
        self.memory = device.memory.allocate(sum(self.sizes.values()))
        self.addresses, at = {}, self.memory.address
        for name, size in self.sizes.items():
            self.addresses[name] = at
            at += size
        ones = np.full(self.memory.size, 0xFF, np.uint8)
        device.transport.memory_write(self.memory.address, ones)
        device.transport.memory_write(self.addresses["x"], x.view(np.uint8).reshape(-1))

    def fields(self, **changes):
        return {"opcode": int(self.opcode), "tokens": len(self.x), "top_k": self.slots,
                "layer_address": self.moe._tasks[0].block.address,
                **{f"{name}_address": at for name, at in self.addresses.items()}, **changes}

    def results(self):
        """Return ids, weights and y, as bits."""
        begin = self.addresses["ids"]
        return self.device.transport.memory_read(begin, self.addresses["workspace"] - begin)

    def close(self):
        self.memory.free()


def three_commands(call):
    """Run a layer's parts as commands of their own."""
    device, moe, tokens = call.device, call.moe, len(call.x)
    room = -(-8 * tokens // 64) * 64
    planes = device.memory.allocate(2 * room)
    for at, values in ((0, np.tile(np.arange(2, dtype="<i4"), tokens)),
                       (room, np.ones(2 * tokens, "<f4"))):
        device.transport.memory_write(planes.address + at, values.view(np.uint8))
    block, logits = moe._tasks[0].block.address, call.addresses["workspace"]
    sums = device.memory.allocate(8 * tokens * 64)
    for changes in (
            {"opcode": Opcode.EXPERTS, "top_k": 2, "layer_address": block, "y_address": logits,
             "ids_address": planes.address, "weights_address": planes.address + room,
             "workspace_address": sums.address},
            {"opcode": Opcode.ROUTE, "layer_address": block + 64, "x_address": logits},
            {"opcode": Opcode.EXPERTS, "layer_address": block + 128,
             "workspace_address": sums.address}):
        assert execute(device, call.fields(**changes)).error() is None
    planes.free()
    sums.free()
    return call.results()


@pytest.fixture(scope="module")
def pair(pair_of):
    with pair_of(CONFIG) as pair:
        yield pair


@pytest.fixture(scope="module")
def slow(pair_of):
    with pair_of(CONFIG, memory=SLOW) as pair:
        yield pair


GATED = [
    {"shared": 1, "gates": "sigmoid"}, {"shared": 2, "gates": "sum", **SIGMOID}]
SHAPES = [
    {}, *GATED, {"shared": 2, **SIGMOID}, {"experts": 40, "d_model": 32, "top_k": 8},
    {"experts": 7, "top_k": 1, "d_model": 96}]


@pytest.mark.parametrize("memory", ["pair", "slow"])
@pytest.mark.parametrize("settings", SHAPES, ids=str)
def test_bits_are_those_of_three_commands(request, memory, settings):
    """Also where partial sums of logits are in memory, and logits take their place."""
    both = request.getfixturevalue(memory)
    for tokens in (1, 3, 20):
        def script(device, tokens=tokens):
            with load(device, **settings) as moe:
                d_model = moe.experts.shape.d_model
                x = draw(np.random.default_rng(tokens), tokens, d_model) * 8
                found = []
                for run in (three_commands, lambda call: (
                        execute(device, call.fields()), call.results())[1]):
                    call = Call(device, moe, x)
                    found.append(run(call))
                    call.close()
                assert (found[0] == found[1]).all()
                ids, weights = moe.route(x)
                return np.concatenate([moe(x), ids.astype(np.float32), weights], axis=1)

        both.reset()
        assert both.same(script).any()
        both.check()


@pytest.mark.parametrize("settings", [{"shared": 2, **SIGMOID}, {"d_model": 96}], ids=str)
def test_bfloat16(slow, settings):
    """Half the bytes of x and y; routes are those of the rounded x."""
    def script(device):
        with load(device, **settings) as moe:
            d_model = moe.experts.shape.d_model
            x = torch.from_numpy(draw(np.random.default_rng(5), 20, d_model) * 8).bfloat16()
            ids, weights = moe.route(x)
            wide = moe.route(x.float())
            assert (ids == wide[0]).all() and (weights == wide[1]).all()
            y, single = moe(x), moe(x.float())
            # Rounded once: not as float32 is, where that lies midway.
            midway = single.view(torch.int32) & 0xFFFF == 0x8000
            assert ((y == single.bfloat16()) | midway).all()
            return y

    slow.reset()
    assert slow.same(script).any()
    slow.check()


def test_one_submission_a_call(pair):
    def script(device):
        with load(device) as moe:
            before = device.counters()
            moe(draw(np.random.default_rng(0), 20, 64))
            after = device.counters()
            return np.array([after[name] - before[name] for name in ("commands", "tokens")])

    assert pair.same(script).tolist() == [1, 20]


def test_cycles(pair, pair_of):
    """The golden device's cycle model is the RTL's."""
    from moeaccel.host import open_device

    with open_device("golden", config=CONFIG, memory_bytes=SIZE, timing=True) as golden:
        for settings in SHAPES:
            for tokens in (1, 7):
                x = draw(np.random.default_rng(tokens), tokens, settings.get("d_model", 64)) * 8
                found = []
                for device in (pair.rtl, golden):
                    with load(device, **settings) as moe:
                        for call in (moe, moe.route):
                            call(x)
                            found.append(device.last_cycles)
                for rtl, model in zip(found[:2], found[2:], strict=True):
                    assert abs(rtl - model) <= max(16, 0.01 * rtl), (settings, tokens, rtl, model)


PRODUCT, ROUTES, EXPERTS = range(3)
BEYOND = (1 << 40) - 64


@pytest.mark.parametrize(("part", "changes", "status", "word"), [
    (None, {"tokens": 0}, Status.BAD_FIELD, "tokens"),
    (None, {"layer_address": 64}, Status.BAD_FIELD, "layer_address"),
    (None, {"x_type": 2}, Status.BAD_FIELD, "x_type"),
    (None, {"top_k": 9}, Status.BAD_FIELD, "top_k"),
    (None, {"x_address": BEYOND}, Status.BAD_FIELD, "x_address"),
    (None, {"y_address": BEYOND}, Status.BAD_FIELD, "y_address"),
    (None, {"ids_address": BEYOND, "tokens": 9}, Status.BAD_FIELD, "ids_address"),
    (None, {"workspace_address": BEYOND}, Status.BAD_FIELD, "workspace_address"),
    (PRODUCT, {"planes": 3}, Status.BAD_LAYER, "planes"),
    (PRODUCT, {"table_address": BEYOND}, Status.BAD_LAYER, "table_address"),
    (PRODUCT, {"d_out": 64}, Status.BAD_ROUTER, "num_experts"),
    (PRODUCT, {"d_in": 32}, Status.BAD_LAYER, "d_in"),
    (ROUTES, {"score": 9}, Status.BAD_ROUTER, "score"),
    (ROUTES, {"groups": 3}, Status.BAD_ROUTER, "groups"),
    (ROUTES, {"num_experts": 33, "group_size": 33}, Status.BAD_ROUTER, "num_experts"),
    (ROUTES, {"tables": 1, "table_address": BEYOND}, Status.BAD_ROUTER, "table_address"),
    (ROUTES, {"shared": 2}, Status.BAD_FIELD, "top_k"),
    (EXPERTS, {"d_in": 33}, Status.BAD_LAYER, "d_in"),
    (EXPERTS, {"d_in": 96}, Status.BAD_LAYER, "d_in"),
    (EXPERTS, {"table_address": 32}, Status.BAD_LAYER, "table_address"),
    (EXPERTS, {"table_address": BEYOND}, Status.BAD_LAYER, "table_address"),
    (EXPERTS, {"num_experts": 0}, Status.BAD_LAYER, "num_experts"),
])
@pytest.mark.parametrize("opcode", [Opcode.MOE, Opcode.MOE_ROUTE])
def test_bad_fields_are_named(pair, opcode, part, changes, status, word):
    """Before anything starts; the address is that of the descriptor."""
    where, blamed = [], {Status.BAD_ROUTER: ROUTES, Status.BAD_LAYER: part}.get(status)
    if (part, word) == (PRODUCT, "d_in"):
        blamed = EXPERTS  # they must be for the product's x

    def script(device):
        with load(device) as moe:
            call = Call(device, moe, draw(np.random.default_rng(0), 4, 64), opcode)
            block = moe._tasks[0].block.address
            raw = device.transport.memory_read(block, ENTRY_BYTES * len(MOE_BLOCK)).tobytes()
            parts = [raw[at : at + ENTRY_BYTES] for at in range(0, len(raw), ENTRY_BYTES)]
            if part is not None:
                fields = decode(MOE_BLOCK[part], parts[part]) | changes
                parts[part] = encode(MOE_BLOCK[part], fields)
            device.transport.memory_write(block, b"".join(parts))
            before = call.results()
            command = execute(device, call.fields(**({} if part is not None else changes)))
            assert (call.results() == before).all()
            call.close()
            where.append(0 if blamed is None else block + ENTRY_BYTES * blamed)
            return command

    done = pair.same_completion(script)
    structure = {Status.BAD_FIELD: SUBMISSION, Status.BAD_LAYER: LAYER}.get(status, ROUTER)
    assert (done.status, done.detail) == (status, field_of(structure, word).word)
    assert where == [done.address] * 2


@pytest.mark.parametrize("more", [{}, SIGMOID, {"top_k": 8}], ids=str)
def test_a_router_without_experts(pair, more):
    """The command is MOE_ROUTE of a layer, whose last descriptor is that of the router's matrix."""
    rng = np.random.default_rng(2)
    router = Router(draw(rng, 40, 64) * 8, **{"top_k": 2} | more)
    x = draw(rng, 9, 64)

    def script(device):
        with device.load_router(router) as alone:
            ids, weights = alone.route(x)
        with device.load_moe(router, draw(rng, 40, 64, 64), draw(rng, 40, 64, 32)) as moe:
            expected = moe.route(x)
        assert np.array_equal(ids, expected[0]) and np.array_equal(weights, expected[1])
        return np.concatenate([ids.view(np.uint8).reshape(-1), weights.view(np.uint8).reshape(-1)])

    assert_same_bits(*(script(device) for device in pair.devices))


def test_a_block_at_the_end_of_the_address_space(pair):
    """It is whole there; nothing but the window forbids it."""
    def script(device):
        with load(device) as moe:
            call = Call(device, moe, draw(np.random.default_rng(0), 4, 64))
            command = execute(device, call.fields(layer_address=(1 << 40) - 256))
            call.close()
            return command

    assert pair.same_completion(script).status == Status.WINDOW


@pytest.mark.parametrize("what", ["x", "ids", "weights", "y", "workspace"])
def test_outside_the_window(slow, what):
    def script(device):
        with load(device) as moe:
            call = Call(device, moe, draw(np.random.default_rng(0), 9, 64))
            before = device.counters()
            command = execute(device, call.fields(**{f"{what}_address": 1 << 39}))
            call.close()
            after = device.counters()  # what it computed with is not what memory holds
            assert all(after[name] == before[name]
                       for name in ("tokens", "overflows", "underflows"))
            return command

    assert slow.same_completion(script).status == Status.WINDOW
    slow.same(lambda device: load(device)(draw(np.random.default_rng(1), 5, 64)))


def test_what_is_wrong_with_numbers(pair):
    """The first part that finds something names it; counts are those of all of them."""
    def outcome(scale_weight, x, grid=None):
        def script(device):
            router = Router(np.full((16, 64), scale_weight, np.float32), top_k=2)
            rng = np.random.default_rng(3)
            with device.load_moe(router, draw(rng, 16, 64, 64), draw(rng, 16, 64, 32),
                                 grid_exponent=grid) as moe:
                call = Call(device, moe, x)
                command = execute(device, call.fields())
                results = call.results()
                call.close()
                counters = device.counters()
                done.append((command.completion.underflows, counters["overflows"],
                             counters["underflows"], results.tobytes()))
                return command
        pair.reset()
        done = []
        completion = pair.same_completion(script)
        assert done[0] == done[1]
        return completion

    x = draw(np.random.default_rng(4), 9, 64)
    found = outcome(0.1, x)
    assert found.status == Status.OK
    broken = x.copy()
    broken[5, 3], broken[7, 1] = np.nan, np.inf
    found = outcome(0.1, broken)
    assert (found.status, found.detail, found.address) == (Status.NONFINITE, 5, NonFinite.X)
    found = outcome(1000.0, np.abs(x))  # logits, 9 of each of 16 experts
    assert (found.status, found.detail, found.address) == (
        Status.OVERFLOW, 16 * 9, Overflow.LOGIT)
    found = outcome(0.1, x, -100)
    assert (found.status, found.address) == (Status.OVERFLOW, Overflow.OUTPUT)
    assert found.detail > 500
    found = outcome(1000.0, np.abs(x), -100)
    assert found.address == Overflow.LOGIT
    assert found.detail > 500 + 16 * 9
    assert outcome(0.1, x, 20).underflows == 9 * 64 * 2


@pytest.mark.parametrize("tokens", [1, 9])
@pytest.mark.parametrize(("part", "expert", "word"), [(0, 0, 16), (0, 1, 16), (2, 1, 0)])
def test_a_bad_expert_of_either_table(pair, part, expert, word, tokens):
    """Without a product the router, which is ready for its logits, does nothing."""
    def script(device):
        with load(device, experts=8, top_k=8) as moe:
            call = Call(device, moe, draw(np.random.default_rng(0), tokens, 64))
            at = moe._tasks[0].block.address + ENTRY_BYTES * part
            table = decode(LAYER, device.transport.memory_read(at, 64).tobytes())["table_address"]
            entry = device.transport.memory_read(table + 64 * expert, 64)
            entry[2] = 1  # flags
            device.transport.memory_write(table + 64 * expert, entry)
            command = execute(device, call.fields())
            call.close()
            return command

    done = pair.same_completion(script)
    assert (done.status, done.detail, done.address) == (Status.BAD_EXPERT, expert, word)

    def again(device):
        with load(device) as moe:
            return moe(draw(np.random.default_rng(3), tokens, 64))

    assert pair.same(again).any()


def test_abort_and_reset_at_any_time(slow):
    """Whichever part runs: the next command is right."""
    device, rng = slow.rtl, np.random.default_rng(8)
    moes = {one: load(one, shared=1) for one in slow.devices}
    x = draw(rng, 20, 64) * 8
    expected = moes[slow.golden](x)
    assert_same_bits(moes[device](x), expected)
    length = device.last_cycles
    ended = set()
    for i, moment in enumerate([*range(1, 400, 53), *rng.integers(400, length, 12)]):
        call = Call(device, moes[device], x)
        command = device.submit(call.fields(), Command("MOE"))
        slow.simulation.run(int(moment), until_irq=False)
        if i % 2:
            slow.simulation.reset(cycles=2)
            device.reset()
        else:
            device.abort()
            device.wait(command)
        ended.add(type(command.error()))
        call.close()
        assert_same_bits(moes[device](x), expected)
    assert ended == {errors.CommandAborted}
    for moe in moes.values():
        moe.close()


def test_without_a_router(tiny):
    def script(device):
        command = Command("MOE")
        device.submit({"opcode": int(Opcode.MOE), "tokens": 1, "top_k": 1}, command)
        device.wait(command)
        return command

    done = tiny.same_completion(script)
    assert (done.status, done.detail) == (Status.BAD_OPCODE, Opcode.MOE)


@torch.no_grad()
def test_the_demo_model_generates_by_the_routes_of_the_device(pair):
    """x goes in, y comes out: the tokens of the host's routes, and the same bits on both."""
    prompts, right = demo_prompts(1)
    tokenizer = AutoTokenizer.from_pretrained(CHECKPOINT)
    model = AutoModelForCausalLM.from_pretrained(CHECKPOINT, experts_implementation="moeaccel")
    found = []
    for device in pair.devices:
        device.reset()
        plugin.use_device(device, route=True)
        assert all(block.on_device for block in plugin.routing(model))
        found.append(generate(model, tokenizer, prompts))
        assert device.counters()["commands"] == 3 * len(found[-1][1])
        plugin.release()
        plugin.use_device(None)
    (rtl, rtl_logits), (golden, golden_logits) = found
    assert rtl == golden == right
    assert torch.equal(rtl_logits, golden_logits)
