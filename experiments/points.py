"""The points of a study, measured one by one or several at once, their rows in a CSV that grows with each.

A study is a list of points, each a mapping of plain values, and a function that measures one and returns rows. Points
whose rows are in the CSV already are not measured again, so a study that was cut short goes on where it was. Workers
are processes of their own, each with one GPU of those there are, in turn.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
import time
import traceback
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))
from common import (  # noqa: F401 - what studies share with the benchmarks is theirs from here
    BLUE,
    GREEN,
    GREY,
    ORANGE,
    RED,
    SKY,
    Row,
    build,
    provenance,
    read_csv,
    this_device,
    write_csv,
)

from small_doge.artifacts import duration

Point = dict[str, Any]


def parser(description: str | None, output: Path) -> ArgumentParser:
    """The options that all studies have."""
    made = ArgumentParser(description=description, formatter_class=RawDescriptionHelpFormatter)
    made.add_argument("--workers", type=int, default=1, help="processes at once; they share the GPUs there are")
    made.add_argument("--minutes", type=float, help="begin no point that would not end by then (default: do all)")
    made.add_argument("--draw", action="store_true", help="only draw from the CSV, which needs no GPU")
    made.add_argument("--output", type=Path, default=output, help="the CSV; pictures go beside it")
    return made


def run(points: Sequence[Point], measure: Callable[[Point], list[Row]], args: Any) -> list[Row]:
    """Measure what the CSV lacks; returns all its rows, as strings.

    Args:
        points: each becomes the first columns of its rows, and is told by them.
        measure: a function of a module, since a worker imports it; rows get the seconds it took, device, versions and
            commit. An exception is printed, and its point left out.
        args: of :func:`parser`.
    """
    rows: list[Row] = read_csv(args.output) if args.output.is_file() else []
    have = {tuple(row.get(name, "") for name in names) for names in {tuple(p) for p in points} for row in rows}
    left = [p for p in points if tuple(str(v) for v in p.values()) not in have]
    begun = time.perf_counter()
    deadline = time.time() + 60 * args.minutes if args.minutes else None
    print(f"{len(points)} points, {len(points) - len(left)} of them in {args.output} already", flush=True)
    for done, (point, found) in enumerate(_all(left, measure, args.workers, deadline), 1):
        if found:
            rows += [point | row for row in found]
            write_csv(rows, args.output)
            time_left = (time.perf_counter() - begun) / done * (len(left) - done)
            print(f"{done}/{len(left)} {point}  {duration(time_left)} left", flush=True)
    return read_csv(args.output) if rows else []


def study(
    args: Any,
    points_of: Callable[[Any], Sequence[Point]],
    measure: Callable[[Point], list[Row]],
    report: Callable[[list[Row]], None],
    draw: Callable[[list[Row], Path], None],
) -> None:
    """Measure unless only the drawing is asked for, then print the table and draw the picture beside the CSV."""
    rows = run([] if args.draw else points_of(args), measure, args)
    if not rows:
        raise SystemExit(f"{args.output} has no rows to draw")
    report(rows)
    draw(rows, args.output.with_suffix(".png"))


def save(figure: Any, path: Path, title: str) -> None:
    """Write a picture, its axes in the one style of all studies."""
    for axes in figure.axes:
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(color="#E4E4E4")
    figure.suptitle(title, fontsize=10)
    figure.savefig(path, dpi=130)


def _all(
    left: Sequence[Point], measure: Callable[[Point], list[Row]], workers: int, deadline: float | None
) -> Iterator[tuple[Point, list[Row] | None]]:
    """Each point with its rows, as they come; one worker is this process."""
    if workers == 1:
        yield from ((point, _measured(measure, point, deadline)) for point in left)
        return
    context = multiprocessing.get_context("spawn")
    gpus = context.Queue()
    for worker in range(workers):
        gpus.put(worker)
    with ProcessPoolExecutor(workers, mp_context=context, initializer=_take_gpu, initargs=(gpus,)) as pool:
        asked: dict[Future, Point] = {pool.submit(_measured, measure, p, deadline): p for p in left}
        yield from ((asked[future], future.result()) for future in as_completed(asked))


def _take_gpu(gpus: Any) -> None:
    worker, there = gpus.get(), os.environ.get("CUDA_VISIBLE_DEVICES")
    import torch

    count = torch.cuda.device_count()  # asks the driver without a context, so that the choice still counts
    if count:
        names = there.split(",") if there else [str(i) for i in range(count)]
        os.environ["CUDA_VISIBLE_DEVICES"] = names[worker % count]


_slowest = 0.0


def _measured(measure: Callable[[Point], list[Row]], point: Point, deadline: float | None) -> list[Row] | None:
    """What a worker does: the rows, or None if there is no time left or something went wrong."""
    global _slowest
    if deadline is not None and time.time() + _slowest > deadline:
        return None
    begun = time.perf_counter()
    try:
        found = measure(point)
    except Exception:  # whatever it is, the other points still run, and the trace says why
        print(f"{point} failed", flush=True)
        traceback.print_exc()
        return None
    seconds = time.perf_counter() - begun
    _slowest = max(_slowest, seconds)
    return [row | {"seconds": round(seconds, 1)} | provenance(this_device()) for row in found]
