"""The accelerator as Verilated C++, driven from Python."""
