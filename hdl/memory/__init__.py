"""The way to memory: AXI4 port, arbiter, SDRAM controller."""
