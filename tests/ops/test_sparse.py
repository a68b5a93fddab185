"""The Triton kernels without a GPU: in Triton's interpreter against the reference, and compiled for several GPUs."""

import importlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from machine_code import stale
from tiny import tiny_doge

from small_doge.ops.dynamic_mask import eviction_times, packed, reference, sparse, visible_keys

pytest.importorskip("triton", reason="needs Triton, which is there on Linux only")

attending = importlib.import_module("small_doge.ops.dynamic_mask")
launcher = importlib.import_module("small_doge.ops.dynamic_mask.sparse")
packing = importlib.import_module("small_doge.ops.dynamic_mask.packed")
folding = importlib.import_module("small_doge.ops.dynamic_mask.folded")
window_module = importlib.import_module("small_doge.ops.dynamic_mask.window")


pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") != "1", reason="the kernels run on the GPU here: see test_on_gpu.py"
)


@pytest.fixture(autouse=True)
def short_chunks(monkeypatch):
    monkeypatch.setattr(launcher, "CHUNK", 128)  # several of them in a short text


def relative_error(got, expected):
    return ((got.double() - expected.double()).norm() / expected.double().norm().clamp(min=1e-30)).item()


def scores(kind, shape, g):
    return {
        "random": lambda: torch.randn(shape, generator=g).abs() * 3,
        "tied": lambda: torch.ones(shape),
        "rising": lambda: torch.linspace(0, 3, shape[-1]).expand(shape).contiguous(),
        "falling": lambda: torch.linspace(3, 0, shape[-1]).expand(shape).contiguous(),
        "one huge key": lambda: torch.rand(shape, generator=g).index_fill(-1, torch.tensor([shape[-1] // 3]), 300.0),
        "minus infinity": lambda: torch.where(torch.rand(shape, generator=g) < 0.3, -torch.inf, 1.0).index_fill(
            -1, torch.tensor([0]), 2.0
        ),
    }[kind]()


CASES = [  # B, H, M, T, D, w, local window, scores
    (1, 2, 2, 150, 16, 40, 0, "random"),
    (1, 2, 1, 257, 80, 129, 3, "random"),
    (1, 4, 2, 131, 16, 1, 0, "random"),
    (1, 1, 1, 260, 16, 64, 0, "tied"),
    (1, 1, 1, 260, 16, 64, 0, "rising"),
    (1, 1, 1, 260, 16, 64, 0, "falling"),
    (1, 1, 1, 200, 16, 17, 0, "one huge key"),
    (1, 1, 1, 200, 16, 17, 0, "minus infinity"),
    (1, 2, 2, 129, 16, 500, 0, "random"),
    (1, 1, 1, 2, 16, 1, 0, "random"),
]


def compare(leaves, e, most, window, mask, local_window, rows):
    """``sparse`` with eviction times e, or, without ``most``, ``packed`` with documents e, against the reference."""
    B, H, T, D = leaves[0].shape
    exact = [x.detach().double().requires_grad_() for x in leaves]
    cotangent = torch.randn(B, H, T, D, generator=torch.Generator().manual_seed(1)) * rows
    expected = reference(*exact, window, mask=mask, local_window=local_window)[0]
    expected_gradients = torch.autograd.grad((expected * cotangent).sum(), exact)
    got = packed(*leaves, e) if most is None else sparse(*leaves, e, most)
    gradients = torch.autograd.grad((got * cotangent).sum(), leaves)
    assert relative_error(got * rows, expected * rows) < 1e-6
    largest = max(x.abs().max() for x in expected_gradients)
    for name, a, b in zip("qkvs", gradients, expected_gradients, strict=True):
        # with one visible key the softmax is constant: nothing flows to q, k and s
        assert relative_error(a, b) < 1e-5 or (a - b).abs().max() < 1e-6 * largest, name


def leaves_of(B, H, M, T, D, kind, seed=0):
    g = torch.Generator().manual_seed(seed)
    # as the model has them: heads next to each other in memory
    q = torch.randn(B, T, H, D, generator=g).transpose(1, 2)
    k, v = (torch.randn(B, T, M, D, generator=g).transpose(1, 2) for _ in range(2))
    return [x.requires_grad_() for x in (q, k, v, scores(kind, (B, M, T), g))]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_kernels_equal_the_reference(case):
    B, H, M, T, D, window, local_window, kind = case
    leaves = leaves_of(B, H, M, T, D, kind)
    e = eviction_times(leaves[3], window, local_window=local_window)
    compare(leaves, e, min(window + local_window, T), window, None, local_window, 1.0)


def test_kernels_with_documents_and_padding():
    B, H, M, T = 2, 4, 2, 300
    leaves = leaves_of(B, H, M, T, 16, "random")
    key_mask = torch.arange(T).expand(B, T) >= torch.tensor([[5], [0]])
    documents = torch.tensor([0] * 100 + [1] * 3 + [2] * 197).expand(B, T).contiguous()
    e = eviction_times(leaves[3], 70, key_mask=key_mask, documents=documents)
    mask = visible_keys(T, T, e.device, key_mask, documents)
    compare(leaves, e, 71, 70, mask, 0, key_mask[:, None, :, None])


LENGTHS = [[1], [33], [130], [1, 2, 60, 68], [33, 31, 33], [1] * 40, [64, 64, 72], [95, 3, 32, 1]]


@pytest.mark.parametrize("lengths", LENGTHS, ids=lambda x: str(x)[:20])
@pytest.mark.parametrize(("H", "M", "D"), [(2, 2, 16), (4, 2, 80), (2, 1, 24)])
def test_kernels_of_packed_documents(lengths, H, M, D):
    T = sum(lengths)
    leaves = leaves_of(2, H, M, T, D, "minus infinity" if T == 97 else "random")
    names = torch.randperm(500, generator=torch.Generator().manual_seed(T))[: len(lengths)].sort().values - 250
    other = torch.arange(T) >= T // 2  # the second row's documents are cut elsewhere
    documents = torch.stack([names.repeat_interleave(torch.tensor(lengths)), other.long()])
    mask = visible_keys(T, T, documents.device, None, documents)
    if T == 97:  # every query must see one key
        leaves[3] = torch.where(mask.any(-2)[:, 0, None] & leaves[3].isinf(), 0.5, leaves[3]).detach().requires_grad_()
    compare(leaves, documents, None, T, mask, 0, 1.0)


def test_an_earlier_document_does_not_matter_at_all():
    q, k, v, s = (x.detach() for x in leaves_of(1, 2, 1, 100, 16, "random"))
    documents = (torch.arange(100) >= 37).long()[None]
    plain = packed(q, k, v, s, documents)
    k, v, s = k.clone(), v.clone(), s.clone()
    k[:, :, :37], v[:, :, :37], s[:, :, :37] = -1e30, 1e30, torch.inf
    assert torch.equal(packed(q, k, v, s, documents)[:, :, 37:], plain[:, :, 37:])


def test_packed_reads_any_layout():
    """Blocks are copied from addresses that are multiples of 16 bytes: other layouts are made one first."""
    leaves = leaves_of(1, 2, 2, 50, 16, "random")
    documents = torch.zeros(1, 50, dtype=torch.int32)
    expected = packed(*leaves, documents)
    wide = [torch.cat([x, x.new_zeros(*x.shape[:3], 1)], -1)[..., :16] for x in leaves[:3]]  # rows of 17 numbers
    same = [x[:, :, :1, :1].expand(-1, -1, 50, 16) for x in leaves[:3]]
    assert torch.equal(packed(*wide, leaves[3], documents), expected)
    assert torch.equal(
        packed(*same, leaves[3], documents), packed(*(x.contiguous() for x in same), leaves[3], documents)
    )
    for T in (48, 50):  # scores as the model has them, heads side by side, rows of a multiple of four and not
        q, k, v, s = (x[:, :, :T] for x in leaves)
        expected = packed(q, k, v, s.contiguous(), documents[:, :T])
        assert torch.equal(packed(q, k, v, s.mT.contiguous().mT, documents[:, :T]), expected)


def test_a_model_on_packed_documents_is_that_of_the_reference(monkeypatch):
    """Its loss and all its gradients, with scores as it makes them."""
    model, ids, positions = tiny_doge()
    monkeypatch.setattr(attending, "usable", lambda x: True)
    monkeypatch.setattr(attending, "takes_heads", lambda q: True)
    found = []
    for path in ("reference", "packed"):
        monkeypatch.setenv(attending.FORCE, path)
        loss = model(ids, position_ids=positions, labels=ids, use_cache=False).loss
        found.append([loss, *torch.autograd.grad(loss, list(model.parameters()))])
    for expected, got in zip(*found, strict=True):
        assert (got - expected).norm() <= 1e-4 * expected.norm()


def test_scores_of_their_own_for_every_query_head():
    q, k, v, _ = leaves_of(1, 4, 2, 150, 16, "random")
    s = torch.rand(1, 4, 150).requires_grad_()
    compare([q, k, v, s], eviction_times(s, 40), 40, 40, None, 0, 1.0)


@pytest.mark.parametrize(("T", "window"), [(2, 1), (64, 7), (300, 1), (300, 65), (1030, 200)])
@pytest.mark.parametrize("described", [False, True])
def test_eviction_times_in_kernels(monkeypatch, T, window, described):
    s = torch.randn(2, 3, T, generator=torch.Generator().manual_seed(T))
    s[:, 1] = 1
    s[1, 2] = (s[1, 2] * 2).round()  # ties, and −0
    options = {}
    if described:
        options["key_mask"] = torch.arange(T).expand(2, T) >= torch.tensor([[T // 9], [0]])
        options["documents"] = (torch.arange(T) // 50).expand(2, T).contiguous()
    expected = eviction_times(s, window, **options)
    monkeypatch.setattr(window_module, "usable", lambda x: True)
    monkeypatch.setattr(window_module, "_rank_and_evict", None)
    assert torch.equal(eviction_times(s, window, **options), expected)


def test_eviction_times_keep_what_torch_compile_relies_on():
    torch.library.opcheck(window_module.window_gpu.evictions, (torch.rand(2, 2, 100), 7, None, None))


@pytest.mark.parametrize(("shape", "width"), [((2, 3, 37, 16), 32), ((1, 2, 5, 80), 88), ((1, 1, 1, 128), 144)])
@pytest.mark.parametrize("heads_first", [True, False])
@pytest.mark.parametrize("keys", [True, False])
def test_columns_that_the_folded_path_appends(shape, width, heads_first, keys):
    g = torch.Generator().manual_seed(0)
    x = torch.randn(shape, generator=g).bfloat16()
    x = (x if heads_first else x.transpose(1, 2).contiguous().transpose(1, 2)).requires_grad_()
    s = (torch.rand(shape[:3], generator=g) * 9).requires_grad_() if keys else None
    leaves = [y for y in (x, s) if y is not None]
    expected, got = folding._append(x, s, width), folding._widen(x, s, width)
    parts = slice(shape[3], shape[3] + 2)  # the interpreter cuts off where a GPU rounds: their sum is what counts
    assert relative_error(*(y[..., parts].double().sum(-1) for y in (got, expected))) < 2**-15
    for y in (got, expected):
        y.data[..., parts] = 0
    assert torch.equal(got, expected)
    assert (got.stride(1) < got.stride(2)) == (x.stride(1) < x.stride(2))
    cotangent = torch.randn(expected.shape, generator=g).bfloat16()
    if s is not None:
        cotangent[..., shape[3] + 1] = cotangent[..., shape[3]]  # as attention gives it: both meet a one in q
    for a, b in zip(*(torch.autograd.grad(y, leaves, cotangent) for y in (got, expected)), strict=True):
        assert relative_error(a, b) < 1e-6
    torch.library.opcheck(folding._widen, (x, s, width))


GPUS = {80: 163, 89: 99, 90: 227}  # compute capability: KiB of shared memory that a block may have


@pytest.mark.parametrize("capability", GPUS)
def test_kernels_fit_a_gpu_without_spilling_registers(capability):
    """A process of its own: this one's Triton interprets. Registers that were spilled would show as stack."""
    command = [sys.executable, Path(__file__).with_name("compile_kernels.py"), str(capability)]
    kernels = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    assert len(kernels) == (17 if capability == 90 else 12)
    for name, takes in kernels.items():
        assert takes["shared"] <= GPUS[capability] << 10, name
        # The fastest backward_keys on Hopper (benchmarks/tiles.py) spills a little, and outside its loop what two heads
        # at a time keep of a row of queries.
        spilled = {"backward_keys": 192, "packed_backward_keys": 192, "pairs_backward_queries": 16}
        assert takes["stack"] <= (spilled.get(name, 0) if capability == 90 else 0), name
        attention = re.sub("^(packed|pairs)_", "", name) in launcher.HOPPER
        assert takes["wgmma"] == (attention and capability == 90), name
        assert not takes["one_by_one"], name
        assert not takes["stale"], name


@pytest.mark.parametrize(("between", "found"), [("MOV R9, R9", True), ("F2FP.BF16.F32.PACK_AB R120, R8, R9", False)])
def test_a_product_that_multiplies_what_is_another_ones_is_found(between, found):
    """Two products of a loop with R120 to R123 on their left, and what stands between them; as cuobjdump prints it."""
    code = ["HGMMA.64x64x16.F32.BF16 R24, R120, gdesc[UR20], R24", *(4 * [between]), "NOP"]
    code += ["HGMMA.64x128x16.F32.BF16 R88, R120, gdesc[UR24], R88", "MOV.64 R120, R4", "MOV.64 R122, R6"]
    code = [x.replace("R120,", f"R{120 + n - 1},", 1) if 1 <= n <= 4 else x for n, x in enumerate(code)]
    lines = [f"        /*{0x10 * n:04x}*/                   {x} ;" for n, x in enumerate([*code, "@!P0 BRA 0x0"])]
    assert stale("\n".join(lines)) is found


CHECKS = ("test_schema", "test_faketensor")  # not the values: what lies past the end of a list is never read


def test_the_operators_keep_what_torch_compile_relies_on():
    """Shapes, strides and dtypes of the fake operators are those of the kernels, and the gradient is registered."""
    q, k, v, s = leaves_of(1, 2, 2, 150, 16, "random")
    e = eviction_times(s, 40)
    forward = (*CHECKS, "test_autograd_registration")
    torch.library.opcheck(launcher._forward, (q, k, v, s, e, 40), test_utils=forward)
    out, lse, *lists = launcher._forward(q, k, v, s, e, 40)
    inputs = [x.detach() for x in (out, q, k, v, s)]
    torch.library.opcheck(launcher._backward, (*inputs, e, out.detach(), lse, *lists), test_utils=CHECKS)

    s = torch.nn.functional.pad(s.detach(), (0, 2)).requires_grad_()  # as `packed` gives them
    inputs[-1] = s.detach()
    starts, ends = torch.zeros(1, 150, dtype=torch.int32), torch.full((1, 150), 150, dtype=torch.int32)
    torch.library.opcheck(packing._forward, (q, k, v, s, starts, ends), test_utils=forward)
    out, lse = (x.detach() for x in packing._forward(q, k, v, s, starts, ends))
    torch.library.opcheck(packing._backward, (*inputs, starts, ends, out, lse), test_utils=CHECKS)
