"""``moeaccel bench``: cycles, bytes and bits of layers of real size."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated, Any

import typer

from moeaccel.cli import calls, expert_buffer, policies, quality
from moeaccel.cli.output import Status, print_json
from moeaccel.config import MEMORY_LATENCY_CYCLES
from moeaccel.formats import ALL_FORMATS

if TYPE_CHECKING:
    from moeaccel.config import AcceleratorConfig
    from moeaccel.host.benchmark import Bench

app = typer.Typer(no_args_is_help=True, help="Measure layers of real size on the RTL or its model.")

app.command("policies")(policies.compare)
app.command("call")(calls.call)
app.command("expert-buffer")(expert_buffer.expert_buffer)
app.command("quality")(quality.quality)


class DeviceKind(StrEnum):
    """What is measured."""

    RTL = "rtl"
    GOLDEN = "golden"


class MemoryKind(StrEnum):
    """Memories of the co-simulation."""

    IDEAL = "ideal"
    DRAM = "dram"


class ActivationBits(StrEnum):
    """Bits of x and h."""

    A16 = "16"
    A8 = "8"


class IoKind(StrEnum):
    """Elements of x and y in device memory."""

    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"


def _known_format(name: str) -> str:
    """Refuse what is no format at once, and not after minutes of building."""
    from moeaccel.formats import weight_format

    return weight_format(name).name


Format = Annotated[str, typer.Option(
    callback=_known_format, help=f"Weight format: {', '.join(ALL_FORMATS)}.")]
Device = Annotated[DeviceKind, typer.Option(
    help="The RTL (Verilated, exact cycles), or the golden model (cycles of the cycle model).")]
Config = Annotated[str, typer.Option(help="Preset of the accelerator.")]
Channels = Annotated[
    int, typer.Option(min=0, help="Memory channels; 0: as many as the preset has.")]
Bits = Annotated[ActivationBits, typer.Option(help="Activation bits.")]
Io = Annotated[IoKind, typer.Option(help="Elements of x and y in device memory.")]
Latency = Annotated[int, typer.Option(
    min=1, max=100_000, help="Read and write latency of the memory, cycles.")]
Memory = Annotated[MemoryKind, typer.Option(
    help="Fixed latency, or rows, refresh and turnaround (rtl only).")]
Seed = Annotated[int, typer.Option(min=0, help="Of weights, x and routing.")]
Tokens = Annotated[int, typer.Option(min=1, help="Tokens of the call.")]
Layers = Annotated[int, typer.Option(min=1, help="Layers to run, one after the other.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]


@app.command()
def decode(
    model: Annotated[
        str, typer.Option(help="Model of the zoo, see `moeaccel models`.")
    ] = "olmoe-1b-7b",
    layers: Layers = 1,
    tokens: Tokens = 1,
    weight_format: Format = "int4_g32",
    device: Device = DeviceKind.RTL,
    config: Config = "wide512",
    channels: Channels = 0,
    activation_bits: Bits = ActivationBits.A16,
    io: Io = IoKind.FLOAT32,
    latency: Latency = MEMORY_LATENCY_CYCLES,
    memory: Memory = MemoryKind.IDEAL,
    router: Annotated[bool, typer.Option(
        "--router", help="With the model's router and shared experts on the device, from x to y; "
                         "a preset without them gets the model's score and modes.")] = False,
    seed: Seed = 0,
    as_json: Json = False,
) -> None:
    """Run MoE layers for a few tokens: memory is the limit."""
    chosen = _config(config, channels)
    if router:
        from moeaccel.host.benchmark_checks import routed_config
        from moeaccel.zoo import model as find_model

        chosen = routed_config(find_model(model), chosen, tokens=tokens)
    setting = _Setting(
        weight_format=weight_format, device=device, config=chosen,
        activation_bits=int(activation_bits), io=io, latency=latency, memory=memory, seed=seed)
    _experts("moe" if router else "decode", model, setting, layers=layers, tokens=tokens,
             routing="uniform", as_json=as_json)


@app.command()
def prefill(
    model: Annotated[
        str, typer.Option(help="Model of the zoo, see `moeaccel models`.")
    ] = "olmoe-1b-7b",
    layers: Layers = 1,
    tokens: Tokens = 64,
    routing: Annotated[str, typer.Option(help="uniform, or zipf:S.")] = "uniform",
    weight_format: Format = "int4_g32",
    device: Device = DeviceKind.RTL,
    config: Config = "wide512",
    channels: Channels = 0,
    activation_bits: Bits = ActivationBits.A16,
    io: Io = IoKind.FLOAT32,
    latency: Latency = MEMORY_LATENCY_CYCLES,
    memory: Memory = MemoryKind.IDEAL,
    seed: Seed = 0,
    as_json: Json = False,
) -> None:
    """Run MoE layers for many tokens: the array is the limit."""
    setting = _Setting(
        weight_format=weight_format, device=device, config=_config(config, channels),
        activation_bits=int(activation_bits), io=io, latency=latency, memory=memory, seed=seed)
    _experts("prefill", model, setting, layers=layers, tokens=tokens, routing=routing,
             as_json=as_json)


@app.command()
def gemm(
    m: Annotated[int, typer.Option(min=1, help="Rows of x (tokens).")],
    k: Annotated[int, typer.Option(min=1, help="Columns of x.")],
    n: Annotated[int, typer.Option(min=1, help="Rows of the weights.")],
    weight_format: Format = "mxint8",
    device: Device = DeviceKind.RTL,
    config: Config = "peer256",
    channels: Channels = 0,
    activation_bits: Bits = ActivationBits.A8,
    io: Io = IoKind.FLOAT32,
    latency: Latency = MEMORY_LATENCY_CYCLES,
    memory: Memory = MemoryKind.IDEAL,
    seed: Seed = 0,
    as_json: Json = False,
) -> None:
    """Run one matrix product, for comparison with other accelerators."""
    from moeaccel.host.benchmark import bench_gemm
    from moeaccel.host.benchmark_checks import check_product

    setting = _Setting(
        weight_format=weight_format, device=device, config=_config(config, channels),
        activation_bits=int(activation_bits), io=io, latency=latency, memory=memory, seed=seed)
    check_product(setting.config, weight_format_name=weight_format, m=m, k=k, n=n)
    with Status(as_json) as status, setting.opened(status) as bench:
        result = bench_gemm(bench, m=m, k=k, n=n)
    _print([result.as_dict()], as_json)


@app.command(name="edge-moe")
def edge_moe(
    results_per_cycle: Annotated[int, typer.Option(
        min=1, max=2, help="Outputs that are rounded in a cycle.")] = 2,
    device: Device = DeviceKind.RTL,
    io: Io = IoKind.BFLOAT16,
    latency: Latency = MEMORY_LATENCY_CYCLES,
    memory: Memory = MemoryKind.IDEAL,
    router: Annotated[bool, typer.Option(
        "--router", help="With its router on the device, from x to y.")] = False,
    tasks: Annotated[int, typer.Option(
        min=1, max=16, help="Routers for the same experts, of which each call names one (M3ViT); "
                            "more than one with --router.")] = 1,
    seed: Seed = 0,
    as_json: Json = False,
) -> None:
    """Run a layer of small experts, Edge-MoE's: the rounding of results is the limit.

    129 tokens, d 192, 16 experts with 384 hidden elements, top-2, GELU, biases, in mxint8 and a8 on
    256 multipliers behind 32 bytes a cycle. With several tasks, `task_cycles` are those of a call
    behind one of the same task, and behind one of another.
    """
    from moeaccel.host.benchmark import BenchmarkError
    from moeaccel.host.benchmark_moe import EDGE_MOE, bench_edge_moe

    config = EDGE_MOE.replace(results_per_cycle=results_per_cycle)
    if router:
        config = config.replace(name=f"{config.name}, softmax router", router=("softmax",))
    elif tasks > 1:
        raise BenchmarkError(f"tasks must be 1 without --router, not {tasks}: each has a router of "
                             "its own")
    setting = _Setting(
        weight_format="mxint8", device=device, config=config, activation_bits=8, io=io,
        latency=latency, memory=memory, seed=seed)
    with Status(as_json) as status, setting.opened(status) as bench:
        result = bench_edge_moe(bench, tasks=tasks if router else 0)
    _print([result.as_dict()], as_json)


@app.command()
def simulators(
    config: Config = "small",
    weight_format: Format = "int4_g32",
    tokens: Tokens = 4,
    activation_bits: Bits = ActivationBits.A16,
    seed: Seed = 0,
    as_json: Json = False,
) -> None:
    """Run one expert layer in both simulators of the RTL, and compare their speed.

    First on buses that never pause, then with random pauses of every channel, as tests have them.
    """
    from moeaccel.config import preset
    from moeaccel.sim.cosim.memory import StallModel
    from moeaccel.sim.speed import compare

    results = []
    with Status(as_json) as status:
        for stalls in (StallModel(), StallModel.uniform(0.1, length=2)):
            status(f"building and running both simulators, {len(results) + 1} of 2")
            results.append(compare(
                preset(config),
                tokens=tokens,
                weight_format=weight_format,
                planes=int(activation_bits) // 8,
                stalls=stalls,
                seed=seed,
            ))
    if as_json:
        print_json([result.as_dict() for result in results])
        return
    from rich.console import Console
    from rich.table import Table

    console = Console()
    for result in results:
        table = Table("simulator", "runs", "cycles", "seconds", "CPU seconds", "cycles/s",
                      title=result.command, caption="the fastest run of each")
        for one in result.simulators:
            table.add_row(one.simulator, str(one.runs), f"{one.cycles:,}", f"{one.seconds:.3f}",
                          f"{one.cpu_seconds:.3f}", f"{one.cycles_per_second:,.0f}")
        console.print(table)
        console.print(f"config {result.config}: {result.ratio:.1f} times as fast")


@app.command()
def board(
    tokens: Annotated[
        list[int] | None, typer.Option(min=1, help="Tokens of a command behind that with one, "
                                                   "repeatable; 4, 16, 64, 128.")
    ] = None,
    token_groups: Annotated[
        int | None, typer.Option(min=1, help="Groups over which weights are replayed, instead of "
                                             "the preset's.")
    ] = None,
    d_model: Annotated[int, typer.Option(min=1, help="Width of x.")] = 1024,
    d_expert: Annotated[int, typer.Option(min=1, help="Width of h.")] = 512,
    weight_format: Format = "int4_g32",
    config: Config = "ulx3s",
    activation_bits: Bits = ActivationBits.A8,
    seed: Seed = 0,
    as_json: Json = False,
) -> None:
    """Run one expert on the simulated board: where its memory and where its array is the limit."""
    from moeaccel.config import preset
    from moeaccel.sim.board.bench import measure_board

    chosen = preset(config)
    if token_groups is not None:
        chosen = chosen.replace(token_groups=token_groups)
    with Status(as_json) as status:
        ridge = measure_board(chosen, tokens=tokens or (4, 16, 64, 128), d_model=d_model,
                              d_expert=d_expert, weight_format_name=weight_format,
                              activation_bits=int(activation_bits), seed=seed, progress=status)
    if as_json:
        print_json(ridge.as_dict())
        return
    from rich.console import Console
    from rich.table import Table

    table = Table("tokens", "cycles", "passes", "of the bus", "weights/cycle", "of the array",
                  "equal to golden")
    for point in ridge.points:
        table.add_row(str(point.tokens), f"{point.cycles:,}", str(point.passes),
                      f"{point.bus_share:.1%}", f"{point.weights_per_cycle:.2f}",
                      f"{point.array_share:.1%}", "yes" if point.equal else "NO")
    console = Console()
    console.print(table)
    console.print(
        f"{ridge.config}, {ridge.weight_format}, a{ridge.activation_bits}, d_model "
        f"{ridge.d_model}, d_expert {ridge.d_expert}: array and memory balance at "
        f"{ridge.tokens:.1f} tokens an expert; a pass holds {ridge.resident_tokens}",
        highlight=False)


_COMMAND_S = 24 * 3600.0
"""Limit of a command: a layer's prefill is simulated for minutes, or for hours."""


@dataclass(frozen=True, kw_only=True)
class _Setting:
    """What all measurements on layers have in common."""

    weight_format: str
    device: DeviceKind
    config: "AcceleratorConfig"
    activation_bits: int
    io: IoKind
    latency: int
    memory: MemoryKind
    seed: int

    @contextmanager
    def opened(self, progress: Callable[[str], None]) -> "Iterator[Bench]":
        """Open the device."""
        from moeaccel.host.benchmark import Bench
        from moeaccel.interface.commands import ElementType

        with self._device() as opened:
            yield Bench(device=opened, device_name=self.device,
                        memory=f"{self.memory}, latency {self.latency}", latency=self.latency,
                        weight_format=self.weight_format, activation_bits=self.activation_bits,
                        io=ElementType[self.io.name], seed=self.seed, progress=progress)

    def _device(self) -> Any:
        from moeaccel.host import open_device
        from moeaccel.host.benchmark import BenchmarkError

        size = min(1 << 32, 1 << self.config.address_bits)
        if self.device is DeviceKind.GOLDEN:
            if self.memory is not MemoryKind.IDEAL:
                raise BenchmarkError(
                    f"memory must be 'ideal' on 'golden', not {self.memory.value!r}: its cycles "
                    "are the cycle model's, which knows no other; measure it with --device rtl")
            return open_device("golden", config=self.config, memory_bytes=size,
                               timing=True, latency=self.latency)
        from moeaccel.sim.cosim.memory import MemoryModel

        kind = MemoryModel.ideal if self.memory is MemoryKind.IDEAL else MemoryModel.dram
        return open_device("rtl", config=self.config, memory=kind(latency=self.latency, size=size),
                           timeout_s=_COMMAND_S)


def _experts(what: str, model: str, setting: _Setting, *, layers: int, tokens: int, routing: str,
             as_json: bool) -> None:
    from moeaccel.host.benchmark import bench_experts
    from moeaccel.host.benchmark_checks import check_experts, check_routed
    from moeaccel.host.benchmark_moe import bench_moe
    from moeaccel.zoo import model as find_model

    found = find_model(model)
    check_experts(found, setting.config, weight_format_name=setting.weight_format, tokens=tokens,
                  kind=routing)
    if what == "moe":
        check_routed(found, setting.config, weight_format_name=setting.weight_format, tokens=tokens)
    results = []
    with Status(as_json) as status, setting.opened(status) as bench:
        for layer in range(layers):
            of_layer = replace(
                bench, seed=setting.seed + layer,
                progress=lambda text, layer=layer: status(f"layer {layer + 1} of {layers}: {text}"))
            result = (bench_moe(of_layer, found, tokens=tokens) if what == "moe" else
                      bench_experts(of_layer, found, tokens=tokens, kind=routing, what=what))
            results.append(result.as_dict())
    _print(results, as_json)


def _config(name: str, channels: int) -> "AcceleratorConfig":
    from moeaccel.config import preset

    config = preset(name)
    if channels:
        config = config.replace(name=f"{name}, {channels} channels", channels=channels)
    return config


def _print(results: list[dict[str, Any]], as_json: bool) -> None:
    if as_json:
        print_json(results[0] if len(results) == 1 else results)
        return
    from rich.console import Console
    from rich.table import Table

    table = Table(show_header=False)
    for name in results[0]:
        if name != "counters":
            table.add_row(
                name,
                *(f"{r[name]:,}" if isinstance(r[name], int) else str(r[name]) for r in results),
            )
    for name in results[0]["counters"]:
        table.add_row(f"  {name}", *(f"{r['counters'][name]:,}" for r in results))
    Console().print(table)
