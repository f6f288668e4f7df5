"""Frameworks that run their experts on a device."""
