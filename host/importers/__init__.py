"""Weights of published checkpoints as float matrices."""
