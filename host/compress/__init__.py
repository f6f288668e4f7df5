"""Compression passes over the experts of a layer, one file each, named after the paper."""
