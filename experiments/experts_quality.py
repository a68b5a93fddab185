"""What experts give at equal active parameters: a dense Doge, CDMoE, a standard top-k MoE; grown or from scratch.

    python experiments/experts_quality.py --data runs/doge-20m/data      # experts_quality.csv, .png; one GPU
    python experiments/experts_quality.py --draw                         # the picture and the table from the CSV

All have the 20m's attention, width and layers, the same rows in the same order, and the rate that the dense one likes
best of those in against_llama.py; none other was tried. ``top-k MoE`` splits the SwiGLU into fine experts, ten of a
quarter of its width, four for a token, with the load balancing of Switch; it has as many active and, to 5 %, as many
parameters as CDMoE with 1,024 experts of one unit, 8 for a token. ``CDMoE, grown`` is dense for the first half of the
steps, in the stable stage, and goes on as what `upcycle` made of it; ``dense, twice`` is stopped and started in the
same way, without growing. Speed is benchmarks/experts.py's.
"""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from points import BLUE, GREY, ORANGE, SKY, Point, Row, parser, save, study
from runs import WARMUP, train

from small_doge.data.packing import PackedTokens, collate
from small_doge.evaluation.expert_use import ExpertUse, evenness
from small_doge.models import DogeForCausalLM, config_for, upcycle
from small_doge.models.moe import DogeCDMoE

DENSE, TWICE, CDMOE, TOPK, GROWN = "dense", "dense, twice", "CDMoE", "top-k MoE", "CDMoE, grown"
COLORS = {DENSE: GREY, TWICE: "#666666", CDMOE: BLUE, TOPK: ORANGE, GROWN: SKY}
SPLIT, EXPERTS, CHOSEN = 4, 10, 4  # an expert is a quarter of the SwiGLU


class TopK(DogeCDMoE):
    """A mixture of E SwiGLUs, k a token by softmax over E, weights divided by their sum; the balance loss of Switch.

    Every expert is computed for every token, and what was not chosen gets weight zero: the same function, in a form
    that compiles, and no measure of speed.
    """

    def __init__(self, config: Any):
        torch.nn.Module.__init__(self)
        C, self.width = config.hidden_size, config.intermediate_size // SPLIT
        self.gate_proj = torch.nn.Linear(C, EXPERTS * self.width, bias=False)
        self.up_proj = torch.nn.Linear(C, EXPERTS * self.width, bias=False)
        self.down_proj = torch.nn.Linear(EXPERTS * self.width, C, bias=False)
        self.router = torch.nn.Linear(C, EXPERTS, bias=False)

    def forward(  # type: ignore[override]
        self, x: torch.Tensor, counted: torch.Tensor | None = None, balanced: bool = False
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """(B, T, C) → (B, T, C), the router's logits (B·T, E), and the balance loss, 1 if even."""
        logits = self.router(x).flatten(0, 1).float()
        p = logits.softmax(-1)
        best, chosen = p.topk(CHOSEN, dim=-1)
        weights = torch.zeros_like(p).scatter(1, chosen, best / best.sum(-1, keepdim=True))
        hidden = F.silu(self.gate_proj(x)) * self.up_proj(x)
        hidden = hidden * weights.to(hidden.dtype).repeat_interleave(self.width, -1).view_as(hidden)
        share = (weights > 0).float().mean(0) / CHOSEN
        loss = EXPERTS * (share * p.mean(0)).sum() if balanced else None
        return self.down_proj(hidden), logits, loss


def model_of(kind: str, manifest: dict[str, Any]) -> DogeForCausalLM:
    """A fresh model; what is grown begins dense."""
    size = "40m-moe" if kind in (CDMOE, TOPK) else "20m"
    config = config_for(size, vocab_size=manifest["vocab_size"], max_position_embeddings=manifest["row_length"])
    model = DogeForCausalLM(config)
    if kind == TOPK:
        for layer in model.model.layers:
            layer.mlp = TopK(config)
            layer.mlp.apply(model._init_weights)
    return model


def active(model: DogeForCausalLM, kind: str) -> int:
    """Parameters that one token meets, the embedding and the head included."""
    total = sum(p.numel() for p in model.parameters())
    config = model.config
    for layer in model.model.layers if config.is_moe else ():
        mlp: Any = layer.mlp
        if kind == TOPK:
            of_experts = 3 * mlp.gate_proj.weight.numel()
            total -= of_experts - of_experts * CHOSEN // EXPERTS
        else:
            total -= 2 * config.hidden_size * (config.num_experts - config.num_experts_per_tok)
    return total


def measure(point: Point) -> list[Row]:
    """The log of one run, a row every few steps, and in the last its held-out loss and use of experts."""
    kind, data = point["kind"], PackedTokens(point["data"], "train", check=False)
    validation = PackedTokens(point["data"], "validation", check=False)
    torch.manual_seed(point["seed"])
    model = model_of(kind, data.manifest)
    settings = {name: point[name] for name in ("rows", "micro_batches", "learning_rate")}
    settings |= {"warmup_steps": point["warmup"]}
    log: list[Row] = []
    steps, seed = point["steps"], point["seed"]
    if kind in (GROWN, TWICE):
        steps //= 2
        first = train(model, data, validation, steps=steps, seed=seed, decay_steps=0, **settings)
        log, seed = first.log, seed + 1000  # another order of rows
        if kind == GROWN:
            model = upcycle(model, num_experts=1024, num_experts_per_tok=8, seed=seed)
    # The decay of all is that of a run in one piece.
    found = train(model, data, validation, steps=steps, seed=seed, decay_steps=point["steps"] // 5, **settings)
    done = log[-1] if log else {"step": 0, "tokens": 0}
    parameters = sum(p.numel() for p in model.parameters())
    same = {"parameters": parameters, "active_parameters": active(model, kind)}
    rows = [same | row for row in log]
    rows += [same | row | {name: row[name] + done[name] for name in ("step", "tokens")} for row in found.log]
    rows[-1] |= found.figures | {"tokens": rows[-1]["tokens"]}
    if model.config.is_moe and kind != TOPK:
        rows[-1] |= use_of(model, validation)
    return rows


@torch.no_grad()
def use_of(model: DogeForCausalLM, validation: PackedTokens) -> Row:
    """Means over layers of the share of experts that are never chosen and of the number in use, on held-out rows."""
    device = next(model.parameters()).device
    use = ExpertUse(model.config.num_experts, model.config.num_experts_per_tok)
    model.eval()
    with torch.compiler.set_stance("force_eager"), torch.autocast(device.type, torch.bfloat16):
        for start in range(0, min(len(validation), 128), 8):
            batch = collate([validation[i] for i in range(start, min(start + 8, len(validation)))])
            ids = batch["input_ids"].to(device)
            logits = model.model(input_ids=ids, use_cache=False, output_router_logits=True).router_logits
            use.add(logits, torch.arange(ids.numel(), device=device))
    layers = evenness(use.counts())
    names = {"dead_share": 4, "effective_experts": 1, "largest": 1}
    return {name: round(statistics.fmean(layer[name] for layer in layers), digits) for name, digits in names.items()}


def points_of(args: Any) -> list[Point]:
    settings = {name: getattr(args, name) for name in ("steps", "warmup", "rows", "micro_batches", "data")}
    return [
        {"kind": kind, "learning_rate": rate, "seed": seed} | settings
        for seed in args.seeds
        for rate in args.learning_rates
        for kind in args.kinds.split(";")
    ]


def last(rows: list[Row]) -> dict[tuple[str, float], list[Row]]:
    """The last row of each run, by kind and rate."""
    found: dict[tuple[str, float], list[Row]] = {}
    for row in rows:
        if row["eval_bits_per_byte"]:
            found.setdefault((row["kind"], float(row["learning_rate"])), []).append(row)
    return found


def report(rows: list[Row]) -> None:
    """Parameters, held-out loss of each seed, use of experts."""
    for (kind, rate), runs in sorted(last(rows).items(), key=lambda item: list(COLORS).index(item[0][0])):
        losses = [float(row["eval_loss"]) for row in runs]
        one = runs[0]
        used = f", {float(one['effective_experts']):.0f} experts in use" if one.get("effective_experts") else ""
        print(
            f"{kind:<14} rate {rate:<6g} {int(one['parameters']) / 1e6:5.1f}M, "
            f"{int(one['active_parameters']) / 1e6:5.1f}M active: held out {statistics.fmean(losses):.4f} "
            f"({', '.join(f'{loss:.4f}' for loss in losses)}){used}"
        )


def draw(rows: list[Row], path: Path) -> None:
    """Training loss, its difference to the dense model's, and the held-out loss of each seed."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rate = float(rows[0]["learning_rate"])
    rows = [row for row in rows if float(row["learning_rate"]) == rate]
    figure, (curves, ends) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    seed = rows[0]["seed"]
    kinds = [kind for kind in COLORS if any(row["kind"] == kind for row in rows)]
    line = {
        kind: {int(r["step"]): float(r["loss"]) for r in rows if r["kind"] == kind and r["seed"] == seed}
        for kind in kinds
    }
    for kind in kinds:
        steps = [step for step in line[kind] if step in line[kinds[0]]]
        difference = [line[kind][step] - line[kinds[0]][step] for step in steps]
        curves.plot(steps, difference, color=COLORS[kind], label=kind)
    curves.set_ylim(-0.5, 0.5)
    curves.set(xlabel="step", ylabel=f"training loss − that of {kinds[0]}, nats", title=f"seed {seed}, the same rows")
    curves.legend(frameon=False, fontsize=8)
    for i, kind in enumerate(kinds):
        losses = [float(row["eval_loss"]) for row in last(rows).get((kind, rate), [])]
        ends.plot(losses, [i] * len(losses), "o", color=COLORS[kind], alpha=0.7)
        if losses:
            ends.plot([statistics.fmean(losses)] * 2, [i - 0.3, i + 0.3], color=COLORS[kind], linewidth=2)
    ends.set_yticks(range(len(kinds)), kinds)
    ends.invert_yaxis()
    ends.set(xlabel="held-out loss, nats a token, a dot a seed", title="at the end")
    save(figure, path, f"Experts at equal active parameters, 20m, {rows[0]['device']}")
    plt.close(figure)


def main() -> None:
    args = parser(__doc__, Path(__file__).with_suffix(".csv"))
    args.add_argument("--data", default="runs/doge-20m/data", help="folder of `doge prepare`")
    args.add_argument("--kinds", default=";".join(COLORS))
    args.add_argument("--steps", type=int, default=480)
    args.add_argument("--warmup", type=int, default=WARMUP, help="steps")
    args.add_argument("--rows", type=int, default=64, help="rows of a micro-batch")
    args.add_argument("--micro_batches", type=int, default=1)
    args.add_argument("--learning_rates", type=float, nargs="+", default=[1e-3])
    args.add_argument("--seeds", type=int, nargs="+", default=[233, 1])
    options = args.parse_args()
    study(options, points_of, measure, report, draw)


if __name__ == "__main__":
    main()
