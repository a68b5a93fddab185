"""Compile the three attention kernels for a GPU that need not be there; prints what each takes of it, as JSON.

python tests/ops/compile_kernels.py 90          # a compute capability, here 9.0
"""

import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

os.environ["TRITON_INTERPRET"] = "0"

import triton
from triton.backends import nvidia
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from small_doge.ops.dynamic_mask import triton_attention
from small_doge.ops.dynamic_mask.sparse import HOPPER, OTHERS


def compiled(name: str, capability: int, tiles: tuple[int, int, int, int]) -> dict[str, object]:
    """One kernel as for bfloat16, head size 128 and lists of keys: bytes of shared memory and of stack, and its PTX."""
    function = getattr(triton_attention, name)
    constants = {"N": 1, "D": 128, "BLOCK_D": 128, "LISTED": True, "CHUNK": 1024, "EXACT": False}
    constants |= {"BLOCK_M": tiles[0], "BLOCK_N": tiles[1]}
    types = dict.fromkeys(("q", "k", "v", "out", "do", "dq"), "*bf16")
    types |= dict.fromkeys(("keys", "ends", "sizes", "ranges"), "*i32") | {"scale": "fp32"}
    types |= dict.fromkeys(("s", "scores", "lse", "delta", "dk", "dv", "db"), "*fp32")
    names = [p.name for p in function.params]
    signature = {x: "constexpr" if x in constants else types.get(x, "i32") for x in names}
    values = {(names.index(x),): value for x, value in constants.items()}
    by_16 = {(i,): [["tt.divisibility", 16]] for i, x in enumerate(names) if x not in constants and x != "scale"}
    kernel = triton.compile(
        ASTSource(function, signature, values, by_16),
        target=GPUTarget("cuda", capability, 32),
        options={"num_warps": tiles[2], "num_stages": tiles[3]},
    )
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(kernel.asm["cubin"])
        tool = Path(nvidia.__file__).parent / "bin" / "cuobjdump"
        command = [tool, "--dump-resource-usage", cubin]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    registers, stack = (int(re.search(rf"{word}:(\d+)", usage)[1]) for word in ("REG", "STACK"))
    wgmma = "wgmma" in kernel.asm["ptx"]
    return {"shared": kernel.metadata.shared, "registers": registers, "stack": stack, "wgmma": wgmma}


if __name__ == "__main__":
    capability = int(sys.argv[1])
    tiles = HOPPER if capability == 90 else OTHERS
    print(json.dumps({name: compiled(name, capability, tiles[name]) for name in tiles}))
