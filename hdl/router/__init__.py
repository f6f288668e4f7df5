"""The router: logits become ids and weights."""
