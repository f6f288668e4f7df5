"""``experts_implementation="moeaccel"`` in Hugging Face transformers.

Importing it registers the name with transformers' own registries; nothing is patched. (With
``route=True`` blocks have a forward of their own.) The documented name is
:mod:`moeaccel.host.transformers_plugin`.

``choice`` picks a configuration and memory; ``session`` knows the device; ``modules`` what an
experts module holds and whether the device does that; ``gates`` what it computes between its
products; ``watch`` whether weights are what they were; ``uploads`` what is in device memory;
``routes`` what takes the place of routers' choices; ``blocks`` what whole blocks compute, and
``routers`` how they route; ``routed`` computes them; ``operator`` is the call of experts;
``probing`` lets others see calls; ``model`` looks at whole models.
"""

from moeaccel.host.plugins.transformers.choice import Choice
from moeaccel.host.plugins.transformers.model import (
    check_model,
    choose_config,
    refresh,
    release,
    routing,
)
from moeaccel.host.plugins.transformers.operator import NAME, experts_forward, register
from moeaccel.host.plugins.transformers.session import Session, current_session, use_device

__all__ = ["NAME", "Choice", "Session", "check_model", "choose_config", "current_session",
           "experts_forward", "refresh", "register", "release", "routing", "use_device"]

register()
