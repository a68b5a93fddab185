"""Would an optimiser that visits only the rows of `down_embed` and `up_embed` that a step touched save time?

    OMP_NUM_THREADS=1 python experiments/rows_touched.py [--model FOLDER --data FOLDER]      # rows_touched.csv

Three tables: the share of rows that a step touches with balanced experts, 1 − (1 − k/N)^tokens, at the four published
sizes; with --model, the share that a trained model's router touches on real text; and on this device the time of
forward and backward of a layer against AdamW on its tables, fused over all rows, or over the touched rows alone
(gathered, updated, put back; finding them is not counted).
"""

from __future__ import annotations

import argparse
import csv
import time
from collections.abc import Callable
from pathlib import Path

import torch

from small_doge.data.packing import PackedTokens, collate
from small_doge.models import DogeConfig, load_model
from small_doge.models.moe import DogeCDMoE
from small_doge.models.sizes import SIZES
from small_doge.ops.product_key import retrieve

STEPS = (512, 2048, 8192, 32768, 524288)  # tokens


def expected(N: int, k: int, tokens: int) -> float:
    """Share of rows touched where every expert is as likely as any other."""
    return 1 - (1 - k / N) ** tokens


@torch.no_grad()
def measured(model_folder: str, data_folder: str, most: int) -> list[dict[str, object]]:
    """Share of rows touched by the first so many tokens of the training rows, the mean over layers."""
    model, data = load_model(model_folder), PackedTokens(data_folder, "train")
    config, seen, rows = model.config, 0, []
    assert config.is_moe
    touched = torch.zeros(config.num_hidden_layers, config.num_experts, dtype=torch.bool)
    for i in range(0, len(data), 2):
        if seen >= most:
            break
        batch = collate([data[i], data[i + 1]])
        ids, positions = batch["input_ids"], batch.get("position_ids")
        out = model(ids, position_ids=positions, output_router_logits=True, use_cache=False, logits_to_keep=1)
        for layer, logits in enumerate(out.router_logits):
            touched[layer, retrieve(logits, config.num_experts_per_tok)[1].flatten()] = True
        seen += ids.numel()
        if seen in STEPS:
            rows.append({"tokens": seen, "N": config.num_experts, "k": config.num_experts_per_tok, "what": "measured"})
            rows[-1]["share"] = round(touched.float().mean().item(), 4)
    return rows


def milliseconds(work: Callable[[], object], repeats: int = 7) -> float:
    """The least time of several: what else the machine does only adds."""
    work()
    taken = []
    for _ in range(repeats):
        start = time.perf_counter()
        work()
        taken.append(time.perf_counter() - start)
    return 1e3 * min(taken)


def adamw_rows(p: torch.Tensor, m: torch.Tensor, v: torch.Tensor, rows: torch.Tensor) -> None:
    """AdamW of the given rows: gathered, updated with PyTorch's fused step, put back."""
    w, g, m1, v1 = (x.index_select(0, rows) for x in (p, p.grad, m, v))  # type: ignore[arg-type]
    torch._fused_adamw_(
        [w], [g], [m1], [v1], [], [torch.ones(())], lr=1e-3, beta1=0.9, beta2=0.95, weight_decay=0.01, eps=1e-8,
        amsgrad=False, maximize=False,
    )  # fmt: skip
    for x, new in ((p, w), (m, m1), (v, v1)):
        x.index_copy_(0, rows, new)


def timed(C: int, N: int, k: int, tokens: int) -> dict[str, object]:
    """One layer: forward and backward, the step over its tables, and the step over touched rows."""
    config = DogeConfig(
        hidden_size=C, intermediate_size=2 * C, num_attention_heads=2, is_moe=True, num_experts=N, num_experts_per_tok=k
    )
    layer = DogeCDMoE(config)
    with torch.no_grad():
        for p in layer.parameters():
            p.normal_(std=0.02)
    x = torch.randn(1, tokens, C, requires_grad=True)
    out, logits, _ = layer(x, balanced=True)
    do = torch.randn_like(out)

    def both() -> None:
        out, _, loss = layer(x, balanced=True)
        torch.autograd.backward([out, loss], [do, None])

    rows = retrieve(logits, k)[1].unique()
    tables = [layer.down_embed.weight, layer.up_embed.weight]
    compute = milliseconds(both)
    optimizer = torch.optim.AdamW(tables, fused=True)
    whole = milliseconds(optimizer.step)
    state = [(p, optimizer.state[p]["exp_avg"], optimizer.state[p]["exp_avg_sq"]) for p in tables]
    with torch.no_grad():
        some = milliseconds(lambda: [adamw_rows(*tensors, rows) for tensors in state])
    row: dict[str, object] = {"tokens": tokens, "C": C, "N": N, "k": k, "what": "timed"}
    row |= {"share": round(rows.numel() / N, 4), "layer_ms": round(compute, 2), "adamw_ms": round(whole, 2)}
    return row | {"touched_rows_ms": round(some, 2), "adamw_share": round(whole / (whole + compute), 4)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="folder of a trained model with experts")
    parser.add_argument("--data", help="folder of `doge prepare`")
    parser.add_argument("--most", type=int, default=32768, help="tokens that the trained model reads")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "rows_touched.csv")
    args = parser.parse_args()
    rows: list[dict[str, object]] = []
    for size in SIZES.values():
        if size.get("is_moe"):
            N, k = size["num_experts"], size["num_experts_per_tok"]
            common = {"N": N, "k": k, "what": "balanced"}
            rows += [common | {"tokens": tokens, "share": round(expected(N, k, tokens), 4)} for tokens in STEPS]
    if args.model:
        rows += measured(args.model, args.data, args.most)
    rows += [timed(C, N, k, T) for C, N, k in ((256, 1024, 8), (512, 4096, 16)) for T in (64, *STEPS[:3])]
    for row in rows:
        print("  ".join(f"{name} {value}" for name, value in row.items()))
    with open(args.output, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[-1]))
        writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    main()
