"""Is it right on a GPU, and what does it cost there: one command, one table, and a JSON line of each row.

    cd examples
    python -m benchmarks.gpu                        # some 5 minutes on a card with 80 GB
    python -m benchmarks.gpu --quick                # 90 seconds
    python -m benchmarks.gpu --device cpu --tiny    # its own paths, anywhere

Weights are random and made on the device. Sections stand in the order of their worth, each with a limit of
time; lines are written as they come. What a package is missing for is said and left out.
"""

import argparse
import gc
import importlib.util
import json
import platform
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

import safegrad_optim
from benchmarks.cost import surgery
from benchmarks.gpu_models import RECIPE, Rows, Setup, lora, model_of, quantised
from common.meter import Meter
from safegrad_optim import KLAlignment, Reference, combine

Line = dict[str, Any]
Step = Callable[[], None]
Section = Callable[[argparse.Namespace], Iterator[Line]]

LIMIT, QUICK_LIMIT = 60.0, 20.0  # seconds a section
QUICK_SECTIONS = 4
# Surgery against float64, by dtype: rounding of an entry at the scale of the largest.
TOLERANCES = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 8e-3, torch.float16: 1e-3}


def main(arguments: list[str] | None = None) -> int:
    args = parse(arguments)
    if args.device == "cuda" and not torch.cuda.is_available():
        print("gpu: error: there is no GPU. --device cpu --tiny runs the same paths.", file=sys.stderr)
        return 2
    torch.manual_seed(0)
    warnings.filterwarnings("ignore", category=FutureWarning)
    args.output.parent.mkdir(parents=True, exist_ok=True)
    lines: list[Line] = []
    with args.output.open("w", encoding="utf-8") as file:
        for section in chosen(args):
            for line in limited(section, args):
                lines.append({"section": section.__name__, **line, **machine(args.device)})
                file.write(json.dumps(lines[-1]) + "\n")
                file.flush()
                print(row_of(lines[-1]), flush=True)
    print(f"\n{len(lines)} lines in {args.output}, of {machine(args.device)['card']}.")
    wrong = [line for line in lines if line.get("right") is False]
    return 1 if wrong else 0


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument(
        "--quick", action="store_true", help="the first sections alone, and fewer repetitions"
    )
    parser.add_argument("--tiny", action="store_true", help="tiny models in place of all others")
    parser.add_argument("--only", nargs="+", choices=[section.__name__ for section in SECTIONS])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--output", type=Path, default=Path("outputs/gpu.jsonl"))
    return parser.parse_args(arguments)


def chosen(args: argparse.Namespace) -> list[Section]:
    """The sections that were asked for, in their order."""
    if args.only is None:
        return [*SECTIONS[: QUICK_SECTIONS if args.quick else None]]
    return [section for section in SECTIONS if section.__name__ in args.only]


def limited(section: Section, args: argparse.Namespace) -> Iterator[Line]:
    """The lines of a section, as far as its time goes, and what it stopped at."""
    began = time.perf_counter()
    limit = QUICK_LIMIT if args.quick else LIMIT
    try:
        for line in section(args):
            yield line
            if time.perf_counter() - began > limit:
                yield {"case": f"stopped after {limit:.0f} s"}
                return
    except torch.cuda.OutOfMemoryError as error:
        yield {"case": f"out of memory: {str(error).splitlines()[0]}"}
    finally:
        gc.collect()
        if args.device == "cuda":
            torch.cuda.empty_cache()


def row_of(line: Line) -> str:
    """A row of the table."""
    known = {"section", "case", "card", "versions"}
    values = ", ".join(
        f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}"
        for name, value in line.items()
        if name not in known
    )
    return f"| {line['section']} | {line['case']} | {values} |"


def machine(device: str) -> Line:
    """What the numbers were measured on."""
    card = torch.cuda.get_device_name() if device == "cuda" else f"{torch.get_num_threads()} CPU threads"
    versions = {
        "safegrad_optim": safegrad_optim.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
    }
    return {"card": card, "versions": versions}


# Sections


def correctness(args: argparse.Namespace) -> Iterator[Line]:
    """Surgery against float64, and the gradient of a tiny model against the CPU's."""
    for dtype, tolerance in TOLERANCES.items():
        user, alignment = surgery.gradients(
            [(300, 7), (40_001,), (3, 5, 4), *[(8, 64)] * 50], dtype, args.device
        )
        surgery.conflicting(user, alignment)
        torch._foreach_add_(user, [torch.randn_like(grad) for grad in user])
        found, _ = combine(user, alignment, 1.0)
        error = max(
            float((one.double() - other).abs().max() / other.abs().max())
            for one, other in zip(found, exact(user, alignment), strict=True)
            if one is not None
        )
        name = str(dtype).removeprefix("torch.")
        yield {"case": f"surgery in {name}", "relative error": error, "right": error <= tolerance}
    gradients = []
    for device in ("cpu", args.device):
        torch.manual_seed(0)
        model = lora(model_of("tiny", "cpu", torch.float32)).to(device)
        setup = Setup(model, 2, 16)
        torch.manual_seed(1)
        alignment_of = KLAlignment(model, setup.rows_of(Rows(2, 16, 4)))
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        torch.manual_seed(2)
        with torch.no_grad():
            for parameter in trained:
                parameter += 0.1 * torch.randn(parameter.shape).to(device)
        gradients.append(
            torch.cat([grad.cpu().flatten() for grad in alignment_of(trained) if grad is not None])
        )
    error = float((gradients[0] - gradients[1]).norm() / gradients[0].norm())
    yield {"case": "alignment gradient, CPU and device", "relative error": error, "right": error <= 1e-4}


def exact(user: list[Tensor], alignment: list[Tensor]) -> list[Tensor]:
    """The paper's Eq. 3 to 5 in float64, tensor by tensor."""
    us, als = ([grad.double() for grad in grads] for grads in (user, alignment))
    inner = sum(float((u * a).sum()) for u, a in zip(us, als, strict=True))
    square = sum(float((a * a).sum()) for a in als)
    coefficient = 1.0 + max(0.0, -inner) / square
    return [u + coefficient * a for u, a in zip(us, als, strict=True)]


def waits(args: argparse.Namespace) -> Iterator[Line]:
    """How often the host waits for the device in a step."""
    setup = Setup(lora(model_of("tiny", args.device, torch.bfloat16)), 4, 32)
    cases: dict[str, dict[str, Any]] = {
        "cached reference": {},
        "live reference": {"reference": Reference(cache=None)},
        "gradient used again": {"refresh_every": 1000},
        "default recipe": {},
    }
    for case, options in cases.items():
        step = setup.protected(RECIPE if case == "default recipe" else [Rows(4, 32, 8)], **options)
        for _ in range(2):
            step()
        if args.device != "cuda":
            yield {"case": case, "waits": "only told on a GPU"}
            continue
        torch.cuda.set_sync_debug_mode("warn")
        with warnings.catch_warnings(record=True) as found:
            warnings.simplefilter("always")
            step()
        torch.cuda.set_sync_debug_mode("default")
        count = sum("synchroniz" in str(warning.message) for warning in found)
        yield {"case": case, "waits": count, "right": count == 1}


def surgery_alone(args: argparse.Namespace) -> Iterator[Line]:
    """Surgery over 2.5 copies, the least that memory allows, beside other ways to write it."""
    cases: dict[str, surgery.Shapes] = {
        "LoRA of 8B, 192 tensors": surgery.llama_lora_shapes(),
        "all-linear LoRA of 8B, 448 tensors": [*[(8, 4096), (4096, 8)] * 128, *[(8, 14336), (14336, 8)] * 96],
        "SmolLM2-135M, 272 tensors": surgery.smollm2_shapes(),
        "1.2e9 elements, 146 tensors": surgery.of_size(1_240_000_000, 146),
    }
    for case, shapes in cases.items():
        if args.tiny:
            shapes = [tuple(min(8, size) for size in sizes) for sizes in shapes]
        for dtype in (torch.float32, torch.bfloat16):
            names = ["safegrad", "upcast", "flatten"]
            timings = surgery.compare(names, shapes, dtype, args.device, 5 if args.quick else 15)
            floor = timings.pop("floor").low
            name = str(dtype).removeprefix("torch.")
            yield {
                "case": f"{case}, {name}",
                "floor ms": 1e3 * floor,
                **{f"{way} ms": 1e3 * timing.median for way, timing in timings.items()},
                "over floor": timings["safegrad"].median / floor,
                "over flatten": timings["safegrad"].median / timings["flatten"].median,
            }


def lora_8b(args: argparse.Namespace) -> Iterator[Line]:
    """A LoRA step at 8B's shape, 8 rows of 512 tokens."""
    setup = Setup(lora(model_of(shape(args, "8B"), args.device, torch.bfloat16)), *user_size(args, 8, 512))
    yield from over_plain(
        setup,
        {
            "8 rows of 64": setup.protected([Rows(8, 64, 32)]),
            "2 rows of 64": setup.protected([Rows(2, 64, 32)]),
            "default recipe": setup.protected(RECIPE),
            "default recipe, k = 2": setup.protected(RECIPE, refresh_every=2),
            "8 rows of 64, k = 4": setup.protected([Rows(8, 64, 32)], refresh_every=4),
            "8 rows of 256, 128 compared": setup.protected([Rows(8, 256, 128)]),
            "8 rows of 64, live reference": setup.protected(
                [Rows(8, 64, 32)], reference=Reference(cache=None)
            ),
        },
        args,
    )
    setup.model.gradient_checkpointing_enable({"use_reentrant": False})
    setup.model.enable_input_require_grads()
    yield from over_plain(setup, {"default recipe, checkpointing": setup.protected(RECIPE)}, args)


def small(args: argparse.Namespace) -> Iterator[Line]:
    """A LoRA step at 135M's shape, 8 rows of 64 tokens, where launches are what takes time."""
    for case in ("eager", "torch.compile"):
        setup = Setup(
            lora(model_of(shape(args, "135M"), args.device, torch.bfloat16)), *user_size(args, 8, 64)
        )
        if case == "torch.compile":
            setup.model.compile()
        arms = {
            f"8 rows of 64, {case}": setup.protected([Rows(8, 64, 32)]),
            f"default recipe, {case}": setup.protected(RECIPE),
        }
        yield from over_plain(setup, arms, args)


def four_bit(args: argparse.Namespace) -> Iterator[Line]:
    """QLoRA at 8B's shape: nf4 weights, gradient checkpointing."""
    if importlib.util.find_spec("bitsandbytes") is None:
        yield {"case": "left out: bitsandbytes is not installed"}
        return
    model = quantised(model_of(shape(args, "8B"), args.device, torch.bfloat16))
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.enable_input_require_grads()
    setup = Setup(lora(model), *user_size(args, 8, 512))
    yield from over_plain(setup, {"default recipe": setup.protected(RECIPE)}, args)


def full_1b(args: argparse.Namespace) -> Iterator[Line]:
    """Full fine-tuning at 1B's shape, 8 rows of 256 tokens, with AdamW's two fast ways and both caches."""
    fused = {"fused": True} if args.device == "cuda" else {"foreach": True}
    for case, options in (("foreach", {"foreach": True}), ("fused", fused)):
        for cache in ("hidden", "logits"):
            setup = Setup(model_of(shape(args, "1B"), args.device, torch.bfloat16), *user_size(args, 8, 256))
            arm = setup.protected(RECIPE, reference=Reference(cache=cache), **options)
            yield from over_plain(setup, {f"default recipe, {case}, cache of {cache}": arm}, args, **options)


SECTIONS: tuple[Any, ...] = (correctness, waits, surgery_alone, lora_8b, small, four_bit, full_1b)


def shape(args: argparse.Namespace, name: str) -> str:
    return "tiny" if args.tiny else name


def user_size(args: argparse.Namespace, rows: int, tokens: int) -> tuple[int, int]:
    return (2, 16) if args.tiny else (rows, tokens)


def over_plain(
    setup: Setup, arms: dict[str, Step], args: argparse.Namespace, **options: Any
) -> Iterator[Line]:
    """Time and peak memory of arms over those of a plain step, all in turns on one model."""
    # Protected ones first: before it is first called, an alignment checks that nothing has been trained yet.
    steps = {**arms, "plain": setup.plain(**options)}
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    peaks: dict[str, int] = {}
    for repetition in range((2 if args.tiny else 4 if args.quick else 8) + 2):
        for name, step in steps.items():
            meter = Meter(args.device)
            # A whole round of the longest refresh, so that each arm has its share of new gradients.
            with meter:
                for _ in range(4):
                    step()
            if repetition > 1:
                seconds[name].append(meter_seconds(meter) / 4)
                peaks[name] = max(peaks.get(name, 0), meter.peak_bytes)
    plain = statistics.median(seconds["plain"])
    for name in ("plain", *arms):
        value = statistics.median(seconds[name])
        yield {
            "case": name,
            "ms": 1e3 * value,
            "over plain": value / plain,
            "peak GB": peaks[name] / 1e9,
            "peak over plain": peaks[name] / peaks["plain"],
        }


def meter_seconds(meter: Meter) -> float:
    meter.lap()
    return meter.median_seconds


if __name__ == "__main__":
    sys.exit(main())
