"""How a design becomes Verilog, and the files around it."""
