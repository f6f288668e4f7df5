"""An open near-data accelerator for Mixture-of-Experts inference."""

from moeaccel.config import PRESETS, AcceleratorConfig

__all__ = ["PRESETS", "AcceleratorConfig", "__version__"]

__version__ = "0.1.0"
