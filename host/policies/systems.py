"""Whole systems: which placement, residency, prefetch and routing go together.

Every offloading system that is compared with is a row here, made of the parts that it has in this
package; where it has something that is not modelled, ``note`` says so.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from moeaccel.host.policies.placement import placement
from moeaccel.host.policies.prefetch import prefetch
from moeaccel.host.policies.registry import lookup
from moeaccel.host.policies.residency import residency
from moeaccel.host.policies.routing import routing

__all__ = ["SYSTEMS", "Part", "System", "system"]


@dataclass(frozen=True)
class Part:
    """A policy by name, and its options.

    Parameters
    ----------
    name : :class:`str`
    options : :class:`dict`
    """

    name: str
    options: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        """Return the name with the options."""
        options = ", ".join(f"{key} {value}" for key, value in self.options.items())
        return f"{self.name} ({options})" if options else self.name


@dataclass(frozen=True, kw_only=True)
class System:
    """A system of policies.

    Parameters
    ----------
    name, title, source : :class:`str`
        For the command line; in full; where it is from.
    placement : :class:`Part`
    residency, prefetch, routing : :class:`Part`, optional
    second_miss : :class:`dict`, optional
        Options of :class:`~moeaccel.host.policies.residency.SecondMiss`.
    per_step : :class:`int`, optional
        Most experts that are promoted in the background in one forward pass, evenly over the
        layers; when left out as many as the link moves in the time of the pass before, and none
        where nothing moves but in a call.
    near_data : :class:`bool`
        Whether experts are computed where their images are; else the torch device computes all.
    note : :class:`str`
        What of it is not modelled.

    Raises
    ------
    UnknownPolicy
        If there is no policy of such a name.
    """

    name: str
    title: str
    source: str
    placement: Part
    residency: Part | None = None
    prefetch: Part | None = None
    routing: Part | None = None
    second_miss: dict[str, Any] | None = None
    per_step: int | None = None
    near_data: bool = True
    note: str = ""

    def __post_init__(self) -> None:
        placement(self.placement.name)
        for part, find in ((self.residency, residency), (self.prefetch, prefetch),
                           (self.routing, routing)):
            if part is not None:
                find(part.name)

    @property
    def lossless(self) -> bool:
        """Whether routes stay what the model's routers say."""
        return (self.routing is None or routing(self.routing.name).lossless) and (
            self.prefetch is None or prefetch(self.prefetch.name).lossless)


def _offloading(name: str, title: str, source: str, **parts: Any) -> System:
    return System(name=name, title=title, source=source, placement=Part("offload"),
                  near_data=False, **parts)


_OWN = System(
    name="moeaccel", title="moeaccel", source="this project", placement=Part("measured-scan"),
    residency=Part("promoted"))

SYSTEMS = {row.name: row for row in (
    _OWN,
    System(name="all-on-device", title="All on the device", source="", placement=Part(
        "all-on-device")),
    _offloading("all-on-torch", "All on the torch device", "", residency=Part("everything"),
                note="needs memory for all experts, whatever the budget"),
    _offloading("plain-offloading", "Plain offloading", "",
                note="nothing is kept: every expert moves in every call"),
    System(name="static-hot-set", title="Static hot set", source="", placement=Part("in-place"),
           residency=Part("pinned")),
    _offloading("mixtral-offloading", "mixtral-offloading", "arXiv 2312.17238",
                residency=Part("lru"), prefetch=Part("gate-ahead", {"most": 2})),
    _offloading("moe-infinity", "MoE-Infinity", "arXiv 2401.14361",
                residency=Part("activation-aware"), prefetch=Part("activation-match")),
    System(name="fiddler", title="Fiddler", source="arXiv 2402.07033", placement=Part("fiddler"),
           residency=Part("pinned")),
    _offloading("pre-gated", "Pre-gated MoE", "arXiv 2308.12066", prefetch=Part("pre-gated"),
                note="gates are retrained; nothing is kept behind a layer"),
    _offloading("sida", "SiDA", "arXiv 2310.18859", residency=Part("lru"),
                prefetch=Part("hash-routes"), note="its predictor replaces the routers"),
    _offloading("edgemoe", "EdgeMoE", "arXiv 2308.14352", residency=Part("lfu"),
                prefetch=Part("transition-table"),
                note="widths of experts chosen offline: use a mixed image"),
    _offloading("swapmoe", "SwapMoE", "arXiv 2308.15030", residency=Part("mrs", {"rate": 0.02}),
                routing=Part("resident-only"), per_step=8),
    _offloading("hobbit", "HOBBIT", "arXiv 2411.01433", residency=Part("lfu"),
                prefetch=Part("gate-ahead", {"depth": 2}), routing=Part("mixed-precision"),
                note="its cache adds recency and layer distance, weights not published"),
    _offloading("promoe", "ProMoE", "arXiv 2410.22134", residency=Part("lru"),
                prefetch=Part("gate-ahead", {"accuracy": 0.85, "depth": 3}),
                note="learned predictor: stands in by its published accuracy"),
    _offloading("expertflow", "ExpertFlow", "arXiv 2410.17954", residency=Part("lru"),
                prefetch=Part("look-ahead", {"accuracy": 0.9, "depth": 6}),
                note="its tokens are regrouped between batches, here not; its predictor only "
                     "prefetches, and the route is corrected"),
    _offloading("adapmoe", "AdapMoE", "arXiv 2408.10284", residency=Part("lru"),
                prefetch=Part("gate-ahead"), routing=Part("sensitivity-skip"),
                note="its cache sizes differ between layers"),
    System(name="daop", title="DAOP", source="arXiv 2501.10375", placement=Part("in-place"),
           residency=Part("prefill-guided"),
           note="without its pre-calculation on the states of the layer before, which is lossy"),
    _offloading("fmoe", "fMoE / FineMoE", "arXiv 2502.05370", residency=Part("activation-aware"),
                prefetch=Part("activation-match", {"size": 64, "depth": 3}),
                note="matches maps of probabilities; a trace has the chosen experts only"),
    System(name="moe-lightning", title="MoE-Lightning", source="arXiv 2411.11217",
           placement=Part("prefix-scan"), residency=Part("pinned"),
           note="its roofline decides for whole batches; attention on the CPU is not modelled"),
    _offloading("cache-conditional", "Cache-conditional experts", "arXiv 2412.00099",
                residency=Part("lru"), routing=Part("cache-prior")),
    _offloading("read-me", "Read-ME", "arXiv 2410.19123", residency=Part("lru"),
                prefetch=Part("oracle", {"depth": 4}),
                note="its refactored model knows all routes of a token before the first layer"),
    System(name="monde", title="MoNDE", source="arXiv 2405.18832", placement=Part("monde"),
           note="its alpha is tuned for the trace"),
    System(name="monde-ceil", title="MoNDE, alpha 1, rounded up", source="arXiv 2405.18832",
           placement=Part("monde", {"alpha": 1.0, "ceil": True})),
    System(name="duplex", title="Duplex", source="arXiv 2409.01141", placement=Part("duplex"),
           note="there both processors share a memory; here what is not resident moves"),
    System(name="dynande", title="DynaNDE", source="arXiv 2609.00407",
           placement=Part("prefix-scan"), residency=Part("lfu"), per_step=8),
    System(name="hybrimoe", title="HybriMoE", source="arXiv 2504.05897",
           placement=Part("hybrimoe"), residency=Part("mrs"), per_step=16),
    System(name="context-aware", title="Context-aware MoE on CXL GPU-NDP",
           source="arXiv 2512.04476", placement=Part("in-place"),
           residency=Part("prefill-guided", {"margin": 1.0}),
           note="without its bits for each expert"),
    System(name="llama.cpp", title="llama.cpp expert cache", source="pull requests 24524, 27861",
           placement=Part("in-place"), residency=Part("lru"), second_miss={"at_most": 2}),
    System(name="ktransformers", title="KTransformers, deferred", source="SOSP'25",
           placement=Part("in-place"), residency=Part("prefill-guided", {"tokens": 512}),
           routing=Part("deferral")),
    System(name="specmd", title="SpecMD, least stale", source="arXiv 2602.03921",
           placement=Part("offload"), residency=Part("least-stale"), near_data=False),
    System(name="lynx", title="Lynx", source="arXiv 2411.08982", placement=Part("all-on-device"),
           routing=Part("batch-union")),
    System(name="belady", title="Best split on Belady's residents", source="",
           placement=Part("scan"), residency=Part("belady"),
           note="the bound for hits: knows what comes, and moves in the background at no cost"),
)}
"""Every system by name."""


def system(name: str) -> System:
    """Return the system of that name.

    Raises
    ------
    UnknownPolicy
        If there is none.
    """
    return lookup("policy", SYSTEMS, name)
