"""A whole board in simulation: serial line, accelerator, SDRAM."""
