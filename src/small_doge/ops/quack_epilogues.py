"""What the products of products.py end in, in QuACK's terms: functions of one number ``acc`` of a product, or of two
side by side, that it compiles into the end of a tile. Operands are a number a row (``ColVecLoad``), a number a column
(``RowVecLoad``) or as large as the product (``c``, ``TileLoad``); a ``…Reduce`` sums over a tile's columns or rows.

A module of its own, as only products.py may import it, and late: QuACK is an extra, and takes seconds.
"""

from cutlass import BFloat16, Float32, Uint32
from cutlass.cutlass_dsl import select_
from cutlass.experimental import primitives
from quack.activation import dswiglu, swiglu
from quack.epilogue.frontend import gemm_epilogue, pack, unpack
from quack.epilogue.ops import ColVecLoad, ColVecReduce, RowVecLoad, RowVecReduce, TileLoad


@gemm_epilogue()
def plain(acc):
    """The product."""
    return {"D": acc}


@gemm_epilogue(ops={"rstd": ColVecLoad("rstd")})
def scaled(acc, rstd):
    """Rows scaled."""
    return {"D": acc * rstd}


@gemm_epilogue(outputs=("hidden",), ops={"rstd": ColVecLoad("rstd")}, mode="acc_pair")
def gated(acc, rstd):
    """Rows scaled, gates and ups in turn, and silu(gate) · up."""
    gate, up = unpack(acc * rstd)
    return {"D": pack(gate, up), "hidden": swiglu(gate, up)}


@gemm_epilogue(ops={"rstd": ColVecLoad("rstd")}, reduces={"dots": ColVecReduce("dots")}, mode="packed_cd_b16x2")
def gated_backward(acc, c, rstd):
    """Of the gradient of silu(gate) · up and c, gates and ups in turn: the gradient of c, whose rows are scaled when it
    has been multiplied by c and summed."""
    gate, up = unpack(c)
    d_gate, d_up, _ = dswiglu(gate, up, acc)
    return {"D": pack(d_gate * rstd, d_up * rstd), "dots": d_gate * gate + d_up * up}


@gemm_epilogue(
    outputs=("low",),
    ops={"rest": TileLoad("rest"), "scale": RowVecLoad("scale")},
    reduces={"squares": ColVecReduce("squares", scaled=True)},
)
def added(acc, c, rest, scale):
    """Added to scale · (c + rest): in bfloat16, what that leaves of it, and squared and summed."""
    z = acc + (c + rest) * scale
    return {"D": z, "low": z - Float32(BFloat16(z)), "squares": (z, z)}


@gemm_epilogue(
    ops={"y": TileLoad("y"), "scale": RowVecLoad("scale"), "correction": ColVecLoad("correction")},
    reduces={"d_scale": RowVecReduce("d_scale", scaled=True)},
)
def carried(acc, c, y, scale, correction):
    """Added to scale · c and correction · y; and c · y summed, which is the gradient of scale."""
    return {"D": _dithered(acc + c * scale + y * correction, acc), "d_scale": (c, y)}


def _dithered(x, seed):
    """x as a number that bfloat16 has, up or down as in triton_residual.py, by the bits of ``seed``, float32 too."""
    noise = (primitives.mov_b32(Float32(seed), target_type=Uint32) * Uint32(0x9E3779B1)) >> Uint32(16)
    bits = (primitives.mov_b32(Float32(x), target_type=Uint32) + noise) & Uint32(0xFFFF0000)
    return select_(x == x, primitives.mov_b32(bits, target_type=Float32), x)
