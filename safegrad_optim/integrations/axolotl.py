"""SafeGrad in Axolotl, by lines of its YAML alone.

    plugins:
      - safegrad_optim.integrations.axolotl.SafeGradPlugin
    max_grad_norm: 0

The safety sources are the recommended ones, made of the training set; P_ref is the model before training,
which with adapters is the base model. What is kept is checked during the run. Axolotl is not installed by
this package.
"""

from typing import Any, Literal

from axolotl.integrations.base import BasePlugin
from axolotl.utils.logging import get_logger
from pydantic import BaseModel

from safegrad_optim.integrations.transformers import protect_trainer
from safegrad_optim.protection import ProtectionCheck
from safegrad_optim.reference import Reference
from safegrad_optim.safety_data import read_jsonl, safety_sources

# Axolotl shows the messages of its own names alone.
LOG = get_logger("axolotl.integrations.safegrad_optim")


class SafeGradArgs(BaseModel):
    """What the YAML may say besides; see `SafeGradOptimizer`, `safety_sources` and `ProtectionCheck`."""

    safegrad_rho: float = 1.0
    safegrad_refresh_every: int = 1
    safegrad_max_grad_norm: float | None = 1.0
    safegrad_requests: str | None = None  # JSONL of "request" and "lookalike"; else the set in this package
    safegrad_on_leak: Literal["warn", "stop", "raise"] = "warn"


class SafeGradPlugin(BasePlugin):  # type: ignore[misc]
    """Wraps the optimizer of Axolotl's trainer, and has its callback check what is kept."""

    def get_input_args(self) -> str:
        """Return where the options are declared."""
        return f"{__name__}.{SafeGradArgs.__name__}"

    def post_trainer_create(self, cfg: Any, trainer: Any) -> None:
        """Protect the trainer, before it makes its optimizer."""
        given = {name: cfg[name] for name in SafeGradArgs.model_fields if name in cfg}
        options = SafeGradArgs(**given)
        path = options.safegrad_requests
        requests = None if path is None else [row for _, row in read_jsonl(path)]
        tokenizer = trainer.processing_class
        sources = safety_sources(trainer.model, tokenizer, trainer.train_dataset, requests=requests)
        LOG.info(str(sources))
        check = ProtectionCheck(trainer.model, tokenizer, sources, on_leak=options.safegrad_on_leak)
        protect_trainer(
            trainer,
            sources,
            rho=options.safegrad_rho,
            refresh_every=options.safegrad_refresh_every,
            max_grad_norm=options.safegrad_max_grad_norm,
            check=check,
            reference=Reference(resumed=bool(cfg.get("resume_from_checkpoint"))),
        )
