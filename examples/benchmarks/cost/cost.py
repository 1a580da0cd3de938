"""What protection costs: time and memory of a training step, and of the surgery alone, as ratios.

    cd examples; python -m benchmarks.cost.cost

Arms take their steps in turns, so that a slow minute of the machine hits all of them. Peak memory is
that of a process of its own for each arm. A public port of the paper is measured as well if its package
is importable (`pip install --no-deps --ignore-requires-python --target peer safetune`, `--peer peer`).
"""

import argparse
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import warnings
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from benchmarks.cost import surgery, training_steps
from benchmarks.cost.reference_kinds import Kind, compare_kinds
from common.meter import Meter
from common.style import plt, save

CASES = {
    "SmolLM2-135M, all parameters": surgery.smollm2_shapes(),
    "Llama-3-8B, LoRA r=8 on q, k, v": surgery.llama_lora_shapes(),
}
MEMORY_STEPS = 3
# A step of the port takes several times as long, and its ratio needs fewer to be clear.
PEER_EVERY = 5


def main() -> int:
    args = parse()
    # What transformers and peft will rename is for their callers to know, not for readers of the table.
    warnings.filterwarnings("ignore", category=FutureWarning)
    sys.path.extend([str(args.peer)] if args.peer else [])
    if args.child is not None:
        print(peak_bytes(args))
        return 0
    args.output_dir.mkdir(parents=True, exist_ok=True)
    results: dict[str, Any] = {"machine": machine(args.device)}
    for mode in args.modes:
        results[mode] = training(mode, args)
        print(training_table(mode, results[mode]))
    if args.kinds:
        rows = compare_kinds(training_steps.prepare("lora", args.device, torch.bfloat16))
        results["kinds"] = [row._asdict() for row in rows]
        print(kinds_table(rows))
    if args.surgery:
        results["surgery"] = surgery_alone(args)
        print(surgery_table(results["surgery"]))
        results["scaling"] = scaling(args)
        save_scaling(results["scaling"], args.output_dir / "scaling.svg")
    save_bars(results, args.output_dir / "cost.svg")
    (args.output_dir / "cost.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    print(f"\nFigures and numbers: {args.output_dir}")
    return 0


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--modes", nargs="*", default=["lora", "full"], choices=["lora", "full"])
    parser.add_argument("--steps", type=int, default=20, help="of each arm and repetition; a multiple of 20")
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--kinds", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--surgery", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--largest", type=float, default=1e9, help="elements of the largest gradient list")
    parser.add_argument("--peer", type=Path, help="folder that the package safetune is installed in")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--output-dir", type=Path, default=Path("outputs/cost"))
    parser.add_argument("--child", type=json.loads, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.steps % 20:
        parser.error(f"--steps {args.steps} is not a multiple of 20, so that k = 4 and k = 10 end a round.")
    return args


def training(mode: str, args: argparse.Namespace) -> dict[str, Any]:
    """Seconds a step and peak memory of all arms, the former in turns on one batch after the other."""
    memory = {}
    names = training_steps.arms(peer=training_steps.peer_is_installed())
    # From k = 2 on an alignment gradient is kept over steps, however many; one such arm is enough.
    for arm in tqdm([name for name in names if name != "k = 10"], desc=f"{mode}: memory"):
        memory[arm] = in_own_process([mode, arm], args)
    memory["k = 10"] = memory["k = 4"]

    work = training_steps.prepare(mode, args.device, dtype=torch.bfloat16)
    steps = {arm: training_steps.build(arm, work, args.output_dir) for arm in names}
    repetitions: dict[str, list[float]] = {arm: [] for arm in names}
    for repetition in range(args.repetitions + 1):
        # The first warms up, and takes the alignment gradient at the reference, which is zero.
        count = args.steps if repetition > 0 else 1
        spent: dict[str, list[float]] = {arm: [] for arm in names}
        for index in tqdm(range(count), desc=f"{mode}: time {repetition} of {args.repetitions}"):
            batch = work.user[index % len(work.user)]
            for arm, step in steps.items():
                if arm != training_steps.PEER or index % PEER_EVERY == 0:
                    spent[arm].append(surgery.seconds(partial(step, batch), args.device))
        if repetition > 0:
            for arm, values in spent.items():
                repetitions[arm].append(statistics.mean(values))
    return {"token_ratio": work.token_ratio, "seconds": repetitions, "peak_bytes": memory}


def kinds_table(rows: list[Kind]) -> str:
    """Markdown table of the kinds of cached reference."""
    lines = [
        "\nCached reference, after the model has left it",
        "",
        "| kind | bytes a token | KL | KL over exact | cosine of the gradients |",
        "|---|---:|---:|---:|---:|",
    ]
    for row in rows:
        cells = (
            f"{row.bytes_per_token:.0f} | {row.kl:.4f} | {row.kl_over_exact:.4f} | {row.gradient_cosine:.5f}"
        )
        lines.append(f"| {row.name} | {cells} |")
    return "\n".join(lines)


def in_own_process(child: list[str], args: argparse.Namespace) -> int:
    """`peak_bytes` in a fresh process, where nothing else has raised the peak before."""
    command = [sys.executable, "-m", "benchmarks.cost.cost", "--child", json.dumps(child)]
    command += ["--device", args.device, "--output-dir", str(args.output_dir)]
    command += ["--peer", str(args.peer)] if args.peer else []
    # glibc keeps some freed memory, how much depends on the order of requests; this makes it give it back.
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": str(1 << 16), "MALLOC_ARENA_MAX": "1"}
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment).stdout
    return int(output.splitlines()[-1])


def peak_bytes(args: argparse.Namespace) -> int:
    """Of some training steps of one arm, or, beyond the gradients, of one way to do the surgery."""
    case, *options = args.child
    if case in CASES:
        dtype, way = options
        return surgery.extra_memory(way, CASES[case], getattr(torch, dtype), args.device)
    work = training_steps.prepare(case, args.device, dtype=torch.bfloat16)
    step = training_steps.build(options[0], work, args.output_dir)
    meter = Meter(args.device)
    for index in range(MEMORY_STEPS):
        with meter:
            step(work.user[index])
    return meter.peak_bytes


def ratios(result: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """For each arm its time, memory and GB h over those of plain fine-tuning, with the spread of time."""
    plain_seconds, plain_bytes = result["seconds"]["plain"], result["peak_bytes"]["plain"]
    found = {}
    for arm, values in result["seconds"].items():
        each = [value / plain for value, plain in zip(values, plain_seconds, strict=True)]
        memory = result["peak_bytes"][arm] / plain_bytes
        found[arm] = {
            "time": statistics.median(each),
            "low": min(each),
            "high": max(each),
            "memory": memory,
            "gb_hours": statistics.median(each) * memory,
        }
    return found


def training_table(mode: str, result: dict[str, Any]) -> str:
    """Markdown table of a training step's ratios."""
    lines = [
        f"\n{mode}: {result['token_ratio']:.2f} safety tokens a user token; all over plain fine-tuning",
        "",
        "| arm | time | spread | peak memory | GB h |",
        "|---|---:|---:|---:|---:|",
    ]
    for arm, row in ratios(result).items():
        cells = f"{row['time']:.2f} | {row['low']:.2f}-{row['high']:.2f} | {row['memory']:.2f}"
        lines.append(f"| {arm} | {cells} | {row['gb_hours']:.2f} |")
    return "\n".join(lines)


def surgery_alone(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Time and extra memory of each way to do the surgery, over the floor and the size of a gradient."""
    rows = []
    cases = {**CASES, f"{args.largest:.0e} elements": surgery.of_size(int(args.largest), 10)}
    for case, dtype in product(cases, (torch.float32, torch.bfloat16)):
        shapes = cases[case]
        names = ["safegrad", "upcast"] + ["loop"] * (dtype == torch.float32)
        # On the largest list its copies would not fit beside what is measured.
        names += ["flatten"] * (case in CASES)
        for name, timing in surgery.compare(names, shapes, dtype, args.device, args.repetitions + 2).items():
            rows.append(
                {"case": case, "dtype": str(dtype).removeprefix("torch."), "way": name, **timing._asdict()}
            )
            if name != "floor" and case in CASES:
                rows[-1]["extra_bytes"] = in_own_process([case, rows[-1]["dtype"], name], args)
                rows[-1]["gradient_bytes"] = dtype.itemsize * sum(map(math.prod, shapes))
    return rows


def surgery_table(rows: list[dict[str, Any]]) -> str:
    """Markdown table of the surgery alone: time over the floor, memory over one gradient."""
    lines = [
        "\nSurgery alone: time over the floor of memory traffic, extra memory over one gradient",
        "",
        "| gradients | dtype | way | ms | over the floor | spread | extra memory |",
        "|---|---|---|---:|---:|---:|---:|",
    ]
    # The fastest copy of the run: whatever slowed the others down is not what memory allows.
    floors = {(row["case"], row["dtype"]): row["low"] for row in rows if row["way"] == "floor"}
    for row in rows:
        floor = floors[row["case"], row["dtype"]]
        extra = f"{row['extra_bytes'] / row['gradient_bytes']:.2f}" if "extra_bytes" in row else "-"
        spread = f"{row['low'] / floor:.2f}-{row['high'] / floor:.2f}"
        cells = f"{1e3 * row['median']:.1f} | {row['median'] / floor:.2f} | {spread} | {extra}"
        lines.append(f"| {row['case']} | {row['dtype']} | {row['way']} | {cells} |")
    return "\n".join(lines)


def scaling(args: argparse.Namespace) -> dict[str, list[dict[str, Any]]]:
    """Time of the surgery against the number of elements and against the number of tensors."""
    elements = [int(10**power) for power in range(6, 10) if 10**power <= args.largest]
    by_elements = [(count, surgery.of_size(count, 10)) for count in elements]
    by_tensors = [(count, surgery.of_size(10**7, count)) for count in (10, 50, 200, 500, 2000)]
    found: dict[str, list[dict[str, Any]]] = {"elements": [], "tensors": []}
    for axis, points in (("elements", by_elements), ("tensors", by_tensors)):
        for (count, shapes), dtype in tqdm(list(product(points, (torch.float32, torch.bfloat16))), desc=axis):
            timings = surgery.compare(["safegrad"], shapes, dtype, args.device, args.repetitions)
            label = str(dtype).removeprefix("torch.")
            seconds = {name: timing.median for name, timing in timings.items()}
            found[axis].append({"count": count, "dtype": label, **seconds})
    return found


def save_scaling(points: dict[str, list[dict[str, Any]]], path: Path) -> None:
    """Log-log plots of the time of the surgery and of the floor."""
    figure, axes = plt.subplots(1, 2, figsize=(10, 4))
    for axis, (name, rows) in zip(axes, points.items(), strict=True):
        for dtype in sorted({row["dtype"] for row in rows}):
            own = [row for row in rows if row["dtype"] == dtype]
            counts = [row["count"] for row in own]
            (line,) = axis.loglog(counts, [row["safegrad"] for row in own], marker="o", label=dtype)
            floor = [row["floor"] for row in own]
            axis.loglog(counts, floor, linestyle=":", color=line.get_color(), label=f"{dtype}, floor")
        axis.set_xlabel(
            "elements, in 10 tensors" if name == "elements" else "tensors, of 1e7 elements together"
        )
        axis.set_ylabel("seconds")
        axis.legend()
    save(figure, path)


def save_bars(results: dict[str, Any], path: Path) -> None:
    """Bars of time, memory and GB h over plain fine-tuning."""
    modes = [mode for mode in ("lora", "full") if mode in results]
    count = max(1, len(modes))
    figure, axes = plt.subplots(1, count, figsize=(6 * count, 4), squeeze=False)
    for axis, mode in zip(axes[0], modes, strict=False):
        found = ratios(results[mode])
        for offset, quantity in enumerate(("time", "memory", "gb_hours")):
            places = [index + 0.27 * (offset - 1) for index in range(len(found))]
            label = quantity.replace("gb_hours", "GB h")
            axis.bar(places, [row[quantity] for row in found.values()], width=0.25, label=label)
        axis.axhline(1, color="grey", linewidth=0.8)
        axis.set_xticks(range(len(found)), [arm.replace(", ", "\n") for arm in found])
        axis.set_title(f"{mode}: over plain fine-tuning")
        axis.legend()
    save(figure, path)


def machine(device: str) -> dict[str, Any]:
    """What the numbers were measured on."""
    return {
        "device": torch.cuda.get_device_name()
        if device == "cuda"
        else f"{torch.get_num_threads()} CPU threads",
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


if __name__ == "__main__":
    sys.exit(main())
