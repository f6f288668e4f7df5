"""What the vendors' blocks do, in the one mode that we use them in, for simulators."""

from collections.abc import Mapping

__all__ = ["DSP_MODELS"]

_REQUIRE = '  if ({name} != {value}) $error("{module} is modelled with {name} = {text} only");'


def _requirements(module: str, parameters: Mapping[str, str | int]) -> str:
    """Return declarations of a module's parameters, and that each must have its value."""
    lines = []
    for name, value in parameters.items():
        text = str(value)
        lines.append(_REQUIRE.format(name=name, module=module, text=text,
                                     value=f'"{text}"' if isinstance(value, str) else text))
    return "\n".join(lines)


def _parameters(parameters: Mapping[str, str | int]) -> str:
    """Return a parameter list whose defaults are the vendor's business: always wrong here."""
    return ", ".join(f'parameter {name} = {chr(34) * 2 if isinstance(value, str) else -1}'
                     for name, value in parameters.items())


_MULT18X18D_PARAMETERS: Mapping[str, str | int] = {"GSR": "DISABLED"} | {
    f"REG_{stage}_{what}": value
    for stage, enable in (("INPUTA", 0), ("INPUTB", 0), ("PIPELINE", 1), ("OUTPUT", 2))
    for what, value in (("CLK", "CLK0"), ("CE", f"CE{enable}"), ("RST", "RST0"))
}
_DSP48E2_PARAMETERS: Mapping[str, str | int] = {
    "A_INPUT": "DIRECT", "B_INPUT": "DIRECT", "AMULTSEL": "A", "BMULTSEL": "B",
    "USE_MULT": "MULTIPLY", "USE_SIMD": "ONE48", "AREG": 1, "BREG": 1, "MREG": 1, "PREG": 1,
    "ACASCREG": 1, "BCASCREG": 1, "CREG": 1, "DREG": 1, "ADREG": 1, "OPMODEREG": 0,
    "ALUMODEREG": 0, "INMODEREG": 0, "CARRYINREG": 0, "CARRYINSELREG": 0,
}


def _bits(name: str, width: int) -> list[str]:
    return [f"{name}{i}" for i in range(width)]


def _vector(name: str, width: int) -> str:
    return "{" + ", ".join(reversed(_bits(name, width))) + "}"


_MULT18X18D = f"""
module MULT18X18D #({_parameters(_MULT18X18D_PARAMETERS)}) (
  input CLK0, CE0, CE1, CE2, RST0, SIGNEDA, SIGNEDB, SOURCEA, SOURCEB,
  input {", ".join(_bits("A", 18) + _bits("B", 18))},
  output {", ".join(_bits("P", 36))}
);
{_requirements("MULT18X18D", _MULT18X18D_PARAMETERS)}
  reg signed [17:0] a, b;
  reg signed [35:0] pipeline, product;
  assign {_vector("P", 36)} = product;
  always @(posedge CLK0) begin
    if (CE0) begin
      a <= {_vector("A", 18)};
      b <= {_vector("B", 18)};
    end
    if (CE1) pipeline <= a * b;
    if (CE2) product <= pipeline;
    if (RST0) begin
      a <= 0;
      b <= 0;
      pipeline <= 0;
      product <= 0;
    end
    assert (SIGNEDA && SIGNEDB && !SOURCEA && !SOURCEB);
  end
endmodule
"""

_DSP48E2 = f"""
module DSP48E2 #({_parameters(_DSP48E2_PARAMETERS)}) (
  input CLK,
  input [29:0] A, input [17:0] B, input [47:0] C, input [26:0] D,
  input [8:0] OPMODE, input [3:0] ALUMODE, input [4:0] INMODE,
  input [2:0] CARRYINSEL, input CARRYIN,
  input CEA1, CEA2, CEB1, CEB2, CEC, CED, CEAD, CEM, CEP, CECTRL, CEALUMODE, CECARRYIN, CEINMODE,
  input RSTA, RSTB, RSTC, RSTD, RSTM, RSTP, RSTCTRL, RSTALUMODE, RSTALLCARRYIN, RSTINMODE,
  output [47:0] P
);
{_requirements("DSP48E2", _DSP48E2_PARAMETERS)}
  reg signed [26:0] a;
  reg signed [17:0] b;
  reg signed [44:0] m;
  reg signed [47:0] p;
  assign P = p;
  always @(posedge CLK) begin
    if (CEA2) a <= A[26:0];
    if (CEB2) b <= B;
    if (CEM) m <= a * b;
    if (CEP) p <= m;
    assert (OPMODE == 9'b000000101 && ALUMODE == 0 && INMODE == 0 && CARRYINSEL == 0 && !CARRYIN);
    assert (&C && &D && A[29:27] == {{3{{A[26]}}}});
    assert (!CEA1 && !CEB1 && !CEC && !CED && !CEAD);
    assert (!CECTRL && !CEALUMODE && !CECARRYIN && !CEINMODE);
    assert (!RSTA && !RSTB && !RSTC && !RSTD && !RSTM && !RSTP);
    assert (!RSTCTRL && !RSTALUMODE && !RSTALLCARRYIN && !RSTINMODE);
  end
endmodule
"""

_DCCA = """
module DCCA (input CLKI, CE, output CLKO);
  assign CLKO = CLKI;
endmodule
"""

DSP_MODELS = {"generic": "", "ecp5": _MULT18X18D + _DCCA, "xilinx": _DSP48E2}
"""Verilog by family: the modules that :class:`~moeaccel.hdl.array.multiplier.Multiplier` and
:class:`~moeaccel.hdl.boards.global_buffer.GlobalBuffer` instantiate.

Not for synthesis: there the vendor's own block is meant. A parameter other than the multiplier's,
or an input that must be constant and is not, is an error.
"""
