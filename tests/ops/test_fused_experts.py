"""The Triton kernels of the experts and their retrieval: interpreted, compiled for several GPUs, and on a GPU.

python tests/ops/test_fused_experts.py 90       # what the kernels take of a GPU of compute capability 9.0, as JSON
"""

import importlib
import json
import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

from small_doge.ops.gpu import power_of_2

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # what a GPU's matrix products need to be deterministic

pytest.importorskip("triton", reason="needs Triton, which is there on Linux only")

fused = importlib.import_module("small_doge.ops.product_key.fused")

GPUS = {80: 163, 90: 227}  # compute capability: KiB of shared memory that a block may have
SIZES = [(1024, 16384, 32)]  # C, E, k: the largest of the published models, which takes most
interpreted = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="the kernels run on the GPU here")


def on_gpu(test):
    return pytest.mark.gpu(pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")(test))


@pytest.fixture(autouse=True)
def poisoned_memory():
    """torch fills what is allocated empty with NaN, so that reading what was never written shows."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def relative_error(got, expected):
    return ((got.double() - expected.double()).norm() / expected.double().norm().clamp(min=1e-30)).item()


def brute_force(x, down, up, indices, weights):
    h = torch.einsum("nc,nkc->nk", x, down[indices])
    return torch.einsum("nk,nkc->nc", weights * F.silu(h), up[indices])


def picks(kind, N, E, k, g):
    """(N, k) indices: "different" a token, as retrieval gives them, "any", or all tokens crowding on the "same"."""
    if kind == "different":
        return torch.rand(N, E, generator=g).argsort(dim=1)[:, :k].contiguous()
    if kind == "any":
        return torch.randint(E, (N, k), generator=g)
    return torch.arange(E - k, E).expand(N, k).contiguous()


def leaves_of(N, C, E, k, kind, dtype=torch.float32, device="cpu"):
    g = torch.Generator().manual_seed(N + C + E + k)
    shapes = [(N, C), (E, C), (E, C), (N, k)]
    x, down, up, weights = (torch.randn(shape, generator=g) for shape in shapes)
    leaves = [x.to(dtype), (down * C**-0.5).to(dtype), up.to(dtype), weights.softmax(-1)]
    leaves = [leaf.to(device).requires_grad_() for leaf in leaves]
    return leaves, picks(kind, N, E, k, g).to(device), torch.randn(N, C, generator=g).to(device, dtype)


def compare(leaves, indices, do, tolerance):
    exact = [leaf.detach().double().requires_grad_() for leaf in leaves]
    expected = brute_force(*exact[:3], indices, exact[3])
    expected_gradients = torch.autograd.grad(expected, exact, do.double())
    got = fused.fused_experts(*leaves[:3], indices, leaves[3])
    gradients = torch.autograd.grad(got, leaves, do)
    assert got.dtype == leaves[0].dtype
    assert relative_error(got, expected) < tolerance
    for name, leaf, a, b in zip(("x", "down", "up", "weights"), leaves, gradients, expected_gradients, strict=True):
        assert a.dtype == leaf.dtype, name
        assert torch.isfinite(a).all(), name
        assert relative_error(a, b) < tolerance, name
    unused = torch.ones(len(exact[1]), dtype=torch.bool, device=indices.device)
    unused[indices.flatten()] = False
    assert not gradients[1][unused].any()
    assert not gradients[2][unused].any()


CASES = [  # N, C, E, k, experts
    (1, 16, 4, 1, "different"),
    (2, 16, 9, 8, "different"),
    (17, 80, 9, 3, "any"),
    (17, 80, 64, 8, "different"),
    (17, 48, 64, 2, "same"),
    (2, 768, 9, 5, "different"),
]


@interpreted
@pytest.mark.parametrize("tiles", [{}, {"tokens": (256, 1, 2), "experts": (4, 64, 1, 3)}], ids=["usual", "small tiles"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_kernels_equal_brute_force(monkeypatch, case, tiles):
    monkeypatch.setattr(fused, "OTHERS", fused.OTHERS._replace(**tiles))
    monkeypatch.setattr(fused, "LENGTH", 4)  # experts of more pairs than that are summed in parts
    compare(*leaves_of(*case), 1e-5)


@interpreted
@pytest.mark.parametrize("case", [(1, 16, 4, 1, "any"), (7, 80, 64, 23, "different"), (3, 768, 64, 9, "any")], ids=str)
@pytest.mark.parametrize("elements", [1, 1024, 4096])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 1e-2)])
def test_slots_that_registers_do_not_hold(monkeypatch, case, elements, dtype, tolerance):
    """Of 23 slots in pieces of 8 the last has 7; a row of 768 is wider than 1 element, and is read whole."""
    monkeypatch.setattr(fused, "OTHERS", fused.OTHERS._replace(tokens=(elements, 1, 2)))
    monkeypatch.setattr(fused, "MANY", 0)
    compare(*leaves_of(*case, dtype), tolerance)


@interpreted
def test_a_token_of_many_experts():
    """More than MANY, without being told."""
    compare(*leaves_of(2, 16, 400, 300, "different"), 1e-5)


@interpreted
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_kernels_in_16_bits(dtype):
    compare(*leaves_of(17, 80, 64, 8, "different", dtype), 1e-2)


@interpreted
@pytest.mark.parametrize("length", [1, 3, 8, 34])
def test_crowded_experts_in_parts_of_any_length(monkeypatch, length):
    monkeypatch.setattr(fused, "LENGTH", length)
    leaves, indices, do = leaves_of(17, 16, 9, 2, "same")
    indices[::3, 0] = 4
    compare(leaves, indices, do, 1e-5)


@interpreted
def test_tables_in_another_dtype_and_inputs_with_strides():
    leaves, indices, do = leaves_of(5, 32, 9, 4, "different")
    leaves[0] = leaves[0].detach().T.contiguous().T.requires_grad_()
    compare(leaves, indices.T.contiguous().T, do[:1].expand(5, -1), 1e-5)
    leaves[0] = leaves[0].detach().bfloat16().requires_grad_()
    compare(leaves, indices, do.bfloat16(), 1e-2)


@interpreted
def test_gradients_that_nobody_asks_for_are_not_computed(monkeypatch):
    (x, down, up, weights), indices, do = leaves_of(5, 16, 9, 2, "different")
    expected = torch.autograd.grad(fused.fused_experts(x, down, up, indices, weights), (x, weights), do)
    monkeypatch.setattr(fused, "sort_pairs", None)
    out = fused.fused_experts(x, down.detach(), up.detach(), indices, weights)
    assert all(torch.equal(a, b) for a, b in zip(torch.autograd.grad(out, (x, weights), do), expected, strict=True))


def brute_force_retrieve(logits, k):
    """On a tie the smaller index first: a stable sort of all the sums."""
    K = logits.shape[1] // 2
    sums = (logits[:, :K, None] + logits[:, None, K:]).flatten(1)
    indices = sums.sort(dim=-1, descending=True, stable=True).indices[:, :k]
    return sums.gather(1, indices), indices


def some_logits(kind, N, K, g):
    if kind == "random":
        return torch.randn(N, 2 * K, generator=g)
    if kind == "tied":
        return torch.randint(-1, 2, (N, 2 * K), generator=g) * torch.tensor(0.5)  # −0 among them
    if kind == "equal":
        return torch.full((N, 2 * K), -3.0)
    if kind == "one half decides":
        return torch.cat([torch.arange(K) * 1.0, torch.zeros(K)]).expand(N, -1).contiguous()
    logits = torch.randn(N, 2 * K, generator=g)  # "minus infinity": all but one of the first half, so that few tie
    logits[:, 1:K] = torch.where(torch.rand(N, K - 1, generator=g) < 0.3, -torch.inf, logits[:, 1:K])
    return logits


@interpreted
@pytest.mark.parametrize("kind", ["random", "tied", "equal", "one half decides", "minus infinity"])
@pytest.mark.parametrize(("N", "K", "k"), [(1, 1, 1), (2, 2, 4), (5, 3, 2), (3, 8, 8), (3, 12, 7), (2, 17, 24)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_retrieval_equals_brute_force(kind, N, K, k, dtype):
    g = torch.Generator().manual_seed(K)
    logits = some_logits(kind, N, K, g).to(dtype).requires_grad_()
    exact = logits.detach().float().requires_grad_()
    scores, indices = fused.fused_retrieve(logits, k)
    expected_scores, expected_indices = brute_force_retrieve(exact, k)
    assert torch.equal(scores, expected_scores)
    finite = expected_scores > -torch.inf  # sums that are −inf are tied whatever their other half
    assert torch.equal(indices[finite], expected_indices[finite])
    d = torch.randn(N, k, generator=g) * finite
    (got,) = torch.autograd.grad(scores, logits, d)
    (expected,) = torch.autograd.grad(expected_scores, exact, d)
    assert got.dtype == dtype
    assert relative_error(got, expected) < (1e-6 if dtype == torch.float32 else 1e-2)


def test_what_retrieval_is_left_to_others(monkeypatch):
    monkeypatch.setattr(fused.gpu, "usable", lambda x: True)
    taken_at = [(128, 64, True), (32, 8, True), (1, 1, True), (32, 1024, True), (128, 300, False), (2000, 2, False)]
    for K, k, taken in taken_at:
        assert fused.retrieves(torch.empty(1, 2 * K), k) == taken
    assert not fused.retrieves(torch.empty(1, 4, dtype=torch.float64), 2)


@interpreted
def test_not_a_number_keeps_the_indices_in_range():
    logits = torch.full((2, 12), float("nan"))
    logits[1] = -logits[1]
    _, indices = fused.fused_retrieve(logits, 5)
    assert indices.min() >= 0
    assert indices.max() < 36


@interpreted
def test_the_operators_keep_what_torch_compile_relies_on():
    """Shapes, strides and dtypes of the fake operators are those of the kernels, and the gradient is registered."""
    (x, down, up, weights), indices, do = leaves_of(3, 16, 9, 2, "different")
    forward = ("test_schema", "test_faketensor", "test_autograd_registration")
    torch.library.opcheck(fused._forward, (x, down, up, indices, weights), test_utils=forward)
    x, down, up, weights = (leaf.detach() for leaf in (x, down, up, weights))
    _, h = fused._forward(x, down, up, indices, weights)
    for tables in (True, False):
        inputs = (do, x, down, up, indices, weights, h, tables)
        torch.library.opcheck(fused._backward, inputs, test_utils=forward[:2])
    logits = torch.randn(3, 6, requires_grad=True)
    torch.library.opcheck(fused._retrieve, (logits, 2), test_utils=forward)
    scores, indices = fused._retrieve(logits.detach(), 2)
    torch.library.opcheck(fused._retrieve_backward, (scores, indices, logits.detach()), test_utils=forward[:2])


def layer(x, router, down, up, k):
    scores, indices = fused.fused_retrieve(x @ router, k)
    return fused.fused_experts(x, down, up, indices, scores.softmax(-1))


@interpreted
def test_torch_compile_takes_the_layer_whole():
    (x, down, up, _), _, do = leaves_of(3, 16, 9, 2, "different")
    router = torch.randn(16, 6, requires_grad=True)
    leaves = (x, router, down, up)
    expected = layer(*leaves, 2)
    got = torch.compile(layer, fullgraph=True, backend="aot_eager")(*leaves, 2)
    assert torch.equal(got, expected)
    gradients = [torch.autograd.grad(out, leaves, do) for out in (got, expected)]
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


@interpreted
def test_kernels_fit_a_gpu_without_spilling_registers():
    """A process of its own: this one's Triton interprets. Registers that were spilled would show as stack."""
    command = [sys.executable, __file__, *map(str, GPUS)]
    environment = os.environ | {"TRITON_INTERPRET": "0"}
    printed = subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout
    for capability, kernels in zip(GPUS, map(json.loads, printed.splitlines()), strict=True):
        assert {name.split()[0] for name in kernels} == set(KERNELS)
        for name, takes in kernels.items():
            assert takes["shared"] <= GPUS[capability] << 10, (capability, name)
            assert takes["stack"] == 0, (capability, name)


@on_gpu
@pytest.mark.parametrize(
    "case",
    [
        *CASES,
        (1000, 256, 1024, 8, "different"),
        (4096, 768, 2304, 24, "any"),
        (3000, 1024, 64, 32, "same"),
        (500, 1024, 1024, 700, "different"),
    ],
    ids=str,
)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 1e-2)])
def test_kernels_on_a_gpu(monkeypatch, case, dtype, tolerance):
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", False)
    compare(*leaves_of(*case, dtype=dtype, device="cuda"), tolerance)


@on_gpu
@pytest.mark.parametrize(
    ("K", "k"), [(1, 1), (2, 4), (32, 8), (64, 16), (96, 24), (100, 7), (128, 32), (128, 64), (256, 1)]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_retrieval_on_a_gpu(K, k, dtype):
    g = torch.Generator().manual_seed(K)
    for kind in ("random", "tied", "equal", "one half decides"):
        logits = some_logits(kind, 333, K, g).to(dtype)
        scores, indices = fused.fused_retrieve(logits.cuda(), k)
        expected_scores, expected_indices = brute_force_retrieve(logits.float(), k)
        assert torch.equal(scores.cpu(), expected_scores), kind
        # Where different sums round to one float, another of those may be taken.
        differ = (indices.cpu() != expected_indices).float().mean()
        assert differ <= (0.01 if kind == "random" else 0), kind


@on_gpu
def test_compiled_on_a_gpu_with_the_same_bits_every_time():
    (x, down, up, _), _, do = leaves_of(2000, 256, 1024, 8, "different", torch.bfloat16, "cuda")
    router = torch.randn(256, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    leaves = (x, router, down, up)
    compiled = torch.compile(layer, fullgraph=True)
    results = []
    for function in (compiled, compiled, layer, layer):
        out = function(*leaves, 8)
        results.append([out, *torch.autograd.grad(out, leaves, do)])
    for first, second in (results[:2], results[2:]):
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert all(relative_error(a, b) < 1e-2 for a, b in zip(results[0], results[2], strict=True))


KERNELS = ("tokens", "tokens_of_many", "starts", "crowded", "experts", "retrieve", "retrieve_backward")


def main(capability):
    from compile_kernels import compiled

    kernels = importlib.import_module("small_doge.ops.product_key.triton_experts")
    tiles = fused.HOPPER if capability == 90 else fused.OTHERS
    types = dict.fromkeys("v first second out do x ddown dup logits dlogits".split(), "*bf16")
    types |= dict.fromkeys("weights h a dh dweights parts scores dscores".split(), "*fp32")
    types |= dict.fromkeys(("indices", "order"), "*i64") | {"keys": "*i16", "starts": "*i32", "pairs": "*i32"}

    def take(name, constants, warps=4, **more):
        return compiled(getattr(kernels, name), capability, constants, warps, 3, **types | more)

    found = {"starts": take("starts", {"BLOCK": 128}, out="*i32")}
    for C, E, k in SIZES:
        K, WIDE = int(E**0.5), power_of_2(k, 2)
        size = f"{C} {E} {k}"
        elements, warps, stages = tiles.tokens
        constants = {"C": C, "SLOTS": k, "WIDE": WIDE, "BLOCK_C": min(power_of_2(C, 2), elements // WIDE)}
        found[f"tokens {size}"] = take("tokens", constants | {"STAGES": stages, "BACKWARD": True}, warps)
        constants = {"C": C, "SLOTS": 1024, "ROWS": elements // C, "WIDE_C": C, "STAGES": stages, "BACKWARD": True}
        found[f"tokens_of_many {size}"] = take("tokens_of_many", constants, warps)
        rows, columns, warps, stages = tiles.experts
        constants = {"C": C, "SLOTS": k, "LENGTH": fused.LENGTH, "ROWS": rows, "BLOCK_C": columns, "STAGES": stages}
        found |= {f"{name} {size}": take(name, constants, warps) for name in ("crowded", "experts")}
        lanes = len(fused._pairs_of_ranks(K, k, torch.device("cpu")))
        constants = {"SLOTS": k, "WIDE": WIDE, "KEYS": power_of_2(K, 2)}
        found[f"retrieve_backward {size}"] = take("retrieve_backward", constants, 1)
        constants |= {"BEST": min(WIDE, constants["KEYS"]), "LANES": lanes, "TOKENS": tiles.retrieve}
        found[f"retrieve {size}"] = take("retrieve", constants, 1)
    print(json.dumps(found))


if __name__ == "__main__":
    for argument in sys.argv[1:]:
        main(int(argument))
