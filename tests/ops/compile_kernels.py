"""Compile the kernels for a GPU that need not be there; prints what each takes of it, as JSON.

python tests/ops/compile_kernels.py 90          # a compute capability, here 9.0
"""

import importlib
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

os.environ["TRITON_INTERPRET"] = "0"

import triton
from machine_code import stale
from triton.backends import nvidia
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.experimental.gluon import language as gl
from triton.experimental.gluon._runtime import GluonASTSource

from small_doge.ops import heads, triton_heads, triton_residual
from small_doge.ops.dynamic_mask import gluon_packed, triton_attention, triton_packed, triton_window

SPARSE, PACKED = (importlib.import_module(f"small_doge.ops.dynamic_mask.{x}") for x in ("sparse", "packed"))
ATTENTION = {"N": 1, "D": 128, "BLOCK_D": 128, "EXACT": False}  # as for bfloat16 and head size 128
CONSTANTS = {
    "list_keys": {"CHUNK": 1024, "BLOCK_M": 128, "BLOCK": 1024},
    "sort_keys": {"key_mask": None, "documents": None, "SHIFT": 22, "NARROW": True},
    "invert": {},
    "count_at_least": {"C": 128, "NB": 16, "U": 4},
    "thresholds": {"C": 128, "BLOCKS": 256},
    "position": {"C": 128, "KEYS": 32, "BLOCKS": 256},
}
TYPES = dict.fromkeys("q k v out do dq".split(), "*bf16") | {"scale": "fp32", "by_rank": "*i64"}
TYPES |= dict.fromkeys("keys starts ends sizes ranges order e rank at_least threshold".split(), "*i32")
TYPES |= dict.fromkeys("s scores lse delta dk dv db".split(), "*fp32")


def compiled(
    function: Any,
    capability: int,
    constants: dict[str, object],
    warps: int,
    stages: int,
    maxnreg: int | None = None,
    **types: str,
) -> dict[str, object]:
    """What one kernel takes: bytes of shared memory and stack, registers, whether it has Hopper's instructions,
    whether each of these waits for the one before, as ptxas has it where it cannot follow their accumulators, and
    whether they are given :func:`stale` operands."""
    names = [p.name for p in function.params]
    signature = {x: "constexpr" if x in constants else (TYPES | types).get(x, "i32") for x in names}
    values = {(names.index(x),): value for x, value in constants.items()}
    by_16 = {(i,): [["tt.divisibility", 16]] for i, x in enumerate(names) if x not in constants and x != "scale"}
    kernel = triton.compile(
        (GluonASTSource if function.is_gluon() else ASTSource)(function, signature, values, by_16),
        target=GPUTarget("cuda", capability, 32),
        options={"num_warps": warps, "num_stages": stages, "maxnreg": maxnreg},
    )
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(kernel.asm["cubin"])
        tool = Path(nvidia.__file__).parent / "bin" / "cuobjdump"
        usage, code = (
            subprocess.run([tool, option, cubin], capture_output=True, text=True, check=True).stdout
            for option in ("--dump-resource-usage", "--dump-sass")
        )
    registers, stack = (int(re.search(rf"{word}:(\d+)", usage)[1]) for word in ("REG", "STACK"))
    wgmma = "wgmma" in kernel.asm["ptx"]
    one_by_one = wgmma and len(re.findall(r"\bWARPGROUP", code)) > len(re.findall(r"\bHGMMA", code))
    found = {"shared": kernel.metadata.shared, "registers": registers, "stack": stack}
    return found | {"wgmma": wgmma, "one_by_one": one_by_one, "stale": stale(code)}


if __name__ == "__main__":
    capability = int(sys.argv[1])
    found = {}
    tiles = SPARSE.HOPPER if capability == 90 else SPARSE.OTHERS
    for name, (queries, keys, warps, stages) in tiles.items():
        constants = ATTENTION | {"BLOCK_M": queries, "BLOCK_N": keys, "CHUNK": 1024}
        found[name] = compiled(getattr(triton_attention, name), capability, constants, warps, stages)
    for name, (queries, keys, warps, stages) in PACKED.HOPPER.items() if capability == 90 else ():
        constants = ATTENTION | {"N": 2, "BLOCK_M": queries, "BLOCK_N": keys}
        rows = {"q": queries, "do": queries, "k": keys, "v": keys}
        blocks = {x: f"tensordesc<bf16[1, 1, {n}, 128]>" for x, n in rows.items()}
        blocks["s"] = f"tensordesc<fp32[1, {keys}]>"
        if name == "backward_keys":
            blocks |= dict.fromkeys(("lse", "delta"), f"tensordesc<fp32[1, {queries}]>")
        found["packed_" + name] = compiled(getattr(triton_packed, name), capability, constants, warps, stages, **blocks)
    for name in ("forward", "backward_queries") if capability == 90 else ():
        of_heads, of_scores = (gl.NVMMASharedLayout(*x) for x in ((128, 16, 4), (0, 32, 2)))
        blocks = dict.fromkeys("q k v out do dq".split(), f"tensordesc<bf16[1, 1, 64, 128],{of_heads!r}>")
        blocks |= {"s": f"tensordesc<fp32[1, 64],{of_scores!r}>", "counter": "*i32"}
        function, (warps, maxnreg) = getattr(gluon_packed, name), PACKED.PAIRS.values()
        found["pairs_" + name] = compiled(function, capability, {"N": 2}, warps, 3, maxnreg, **blocks)
    for name in ("forward", "backward"):
        constants = {"D": 128, "BLOCK": heads._BLOCK, "HALF": 64}
        constants |= {"M": 4} | ({"SCALED": True} if name == "backward" else {"WIDTH": 128, "SCORES": 16})
        types = dict.fromkeys("qkv dk dv d_scored scorer scored".split(), "*bf16") | {"eps": "fp32"}
        types |= dict.fromkeys("q_norm k_norm cos sin norms rstd dots".split(), "*fp32")
        found["heads_" + name] = compiled(getattr(triton_heads, name), capability, constants, 4, 3, **types)
    constants, types = {"C": 768, "WIDTH": 1024}, dict.fromkeys(("d_normed", "d_carried", "dy"), "*bf16")
    types |= dict.fromkeys("y weight scale sums".split(), "*fp32") | {"eps": "fp32"}
    found["residual_backward"] = compiled(triton_residual.backward, capability, constants, 1, 3, **types)
    for name in CONSTANTS:
        warps = 8 if name in ("list_keys", "count_at_least") else 4
        found[name] = compiled(getattr(triton_window, name), capability, CONSTANTS[name], warps, 3, out="*i32")
    print(json.dumps(found))
