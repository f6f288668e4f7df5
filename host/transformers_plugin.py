"""``experts_implementation="moeaccel"`` in Hugging Face transformers.

Importing this module registers the name with transformers' own registries; nothing is patched::

    import moeaccel.host.transformers_plugin
    model = AutoModelForCausalLM.from_pretrained(path, experts_implementation="moeaccel")

The experts of each layer are quantised and uploaded on their first call and again whenever their
parameters change. Which device they go to, and how they are stored there, says :func:`use_device`,
else the environment: ``MOEACCEL_DEVICE`` (golden), ``MOEACCEL_CONFIG`` and ``MOEACCEL_MEMORY`` (for
golden and rtl what fits the model), ``MOEACCEL_WEIGHT_FORMAT`` (int4_g32),
``MOEACCEL_ACTIVATION_BITS`` (16).

transformers accepts the name for every model, but a class that does not go through its experts
interface ignores it without a word: :func:`check_model` finds out.
"""

from moeaccel.host.plugins.transformers import (
    NAME,
    Choice,
    Session,
    check_model,
    choose_config,
    current_session,
    experts_forward,
    refresh,
    register,
    release,
    routing,
    use_device,
)

__all__ = ["NAME", "Choice", "Session", "check_model", "choose_config", "current_session",
           "experts_forward", "refresh", "register", "release", "routing", "use_device"]
