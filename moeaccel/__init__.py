"""An open near-data accelerator for Mixture-of-Experts inference."""

__version__ = "0.1.0.dev0"
