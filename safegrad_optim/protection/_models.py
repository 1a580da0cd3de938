"""Models of transformers for the console scripts: options, loading, and what goes wrong, by exit code."""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

HELD, LOST, BAD_INPUT, INCONCLUSIVE, COULD_NOT_RUN = range(5)


class BadInputError(Exception):
    """What the user gave cannot be used."""


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that say how a model is loaded and read."""
    parser.add_argument("--device", help="default: an accelerator if there is one")
    parser.add_argument("--dtype", default="auto", choices=["auto", "bfloat16", "float16", "float32"])
    parser.add_argument("--load-in-4bit", action="store_true", help="quantise the weights by bitsandbytes")
    parser.add_argument("--batch-size", type=positive, default=16, help="prompts at a time")
    parser.add_argument("--limit", type=positive, help="rows to read, drawn at random")
    parser.add_argument("--seed", type=int, default=0, help="of the draw")
    parser.add_argument("--offline", action="store_true", help="read local files only")
    parser.add_argument("--trust-remote-code", action="store_true", help="run code that comes with a model")
    parser.add_argument("--redact", action="store_true", help="row numbers and hashes instead of texts")
    parser.add_argument("--out", type=Path, help="folder for the files of the report")


def positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a whole number >= 1")
    return value


def load_tokenizer(name: str, args: argparse.Namespace) -> Any:
    from transformers import AutoTokenizer

    options: Any = {"local_files_only": args.offline, "trust_remote_code": args.trust_remote_code}
    tokenizer: Any = _read(name, lambda: AutoTokenizer.from_pretrained(name, **options))
    if getattr(tokenizer, "chat_template", None) is None:
        raise BadInputError(f"{name} has no chat template. Give a chat model, or set its chat_template.")
    return tokenizer


def load_model(name: str, args: argparse.Namespace) -> Any:
    import torch
    from transformers import AutoModelForCausalLM

    found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    device = args.device or str(found or "cpu")
    options: Any = {"local_files_only": args.offline, "trust_remote_code": args.trust_remote_code}
    options["dtype"] = args.dtype if args.dtype == "auto" else getattr(torch, args.dtype)
    if args.load_in_4bit:
        from transformers import BitsAndBytesConfig

        options |= {"quantization_config": BitsAndBytesConfig(load_in_4bit=True), "device_map": device}  # type: ignore[no-untyped-call]
    model: Any = _read(name, lambda: AutoModelForCausalLM.from_pretrained(name, **options))
    return (model if args.load_in_4bit else model.to(device)).eval()


def load_adapter(model: Any, name: str, args: argparse.Namespace) -> Any:
    from peft import PeftModel

    return _read(name, lambda: PeftModel.from_pretrained(model, name, local_files_only=args.offline)).eval()


def _read(name: str, load: Callable[[], Any]) -> Any:
    try:
        return load()
    except (OSError, ValueError) as error:
        raise BadInputError(f"{name} cannot be loaded: {error}") from error


def run(name: str, command: Callable[[], int]) -> int:
    """Run a command, and turn what goes wrong into one line and its exit code."""
    import torch

    try:
        return command()
    except (BadInputError, OSError, ValueError, TypeError) as error:
        print(f"{name}: error: {' '.join(str(error).split())}", file=sys.stderr)
        return BAD_INPUT
    except (ImportError, RuntimeError, MemoryError) as error:
        advice = " Try a smaller --batch-size." if isinstance(error, torch.OutOfMemoryError) else ""
        print(f"{name}: could not run: {' '.join(str(error).split())}{advice}", file=sys.stderr)
        return COULD_NOT_RUN
