"""What ptxas made of a kernel, as cuobjdump prints it."""

import re


def stale(code: str) -> bool:
    """Whether two products of an inner loop have the same left operand in registers though the source has two.

    Each of our products has its own. Where the queries of a tile stay in registers for the whole loop, ptxas can give
    their place to the softmax (seen with Triton 3.6 and 3.7: attention to heads of 64 whose tiles of the softmax are
    as wide as those of queries), and all turns but the first multiply the wrong thing.
    """
    lines = re.findall(r"^\s+/\*([0-9a-f]{4,})\*/\s+(@!?U?P\d+ )?\s*(\S+)(.*?);", code, re.MULTILINE)
    # A loop ends with a branch under a condition: without one the code comes back from where it waited for a barrier.
    branches = [(re.search(r"0x([0-9a-f]+)", x[3]), int(x[0], 16)) for x in lines if x[1] and x[2] == "BRA"]
    loops = [(int(back[1], 16), end) for back, end in branches if back and int(back[1], 16) <= end]
    products = [int(at, 16) for at, _, operation, _ in lines if operation.startswith("HGMMA")]
    loops = [(a, b) for a, b in loops if any(a <= at <= b for at in products)]
    for begin, end in loops:
        if any((begin, end) != (a, b) and begin <= a and b <= end for a, b in loops):
            continue  # what stands before an inner loop and in it may well have the same operand
        loop = [(at, *x) for at, _, *x in lines if begin <= int(at, 16) <= end]
        reader: dict[int, str] = {}  # of a register, since it was last written: which product
        for at, operation, rest in loop * 2:
            registers = [int(x) for x in re.findall(r"\bR(\d+)\b", rest)]
            if operation.startswith("HGMMA"):
                left = registers[1:2] if re.match(r"\s*R\d+, R\d+,", rest) else []  # the first of four
                if any(reader.setdefault(x + i, at) != at for x in left for i in range(4)):
                    return True
            elif re.match(r"\s*R\d", rest) and not operation.startswith(("ST", "RED", "ATOM")):
                wide = 4 if operation.endswith((".128", ".4")) else 2 if re.search(r"\.64|WIDE", operation) else 1
                for i in range(wide):
                    reader.pop(registers[0] + i, None)
    return False
