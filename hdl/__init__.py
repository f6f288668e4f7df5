"""RTL of the accelerator in Amaranth, one public component per file."""
