"""SafeGradOptimizer: any torch optimizer, with gradient surgery inside its step."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from safegrad_optim._torch_private import hook_registry, make_hook_registries, without_global_step_hooks
from safegrad_optim.optimizer import _checks, _step
from safegrad_optim.optimizer._gradients import AlignmentCallable
from safegrad_optim.optimizer._guard import StepGuard
from safegrad_optim.optimizer._seen import SeenWeights
from safegrad_optim.optimizer._state import Kept, OwnState, StepCounts, merged, split
from safegrad_optim.parallel import is_distributed_tensor, placed_as
from safegrad_optim.surgery import ConstantRho, Gradients, SurgeryStats

# What schedules and checkpoints ask a base for; others of its methods may step.
_HANDED_ON = ("_get_lr", "consolidate_state_dict")


class SafeGradOptimizer(Optimizer):
    """Wrap `base_optimizer` so that each step first projects the user gradient off the alignment one.

    g = g_user + c g_align,  c = rho + max(0, -<g_user, g_align>) / ||g_align||^2

    Surgery happens once per `step()`, on the `.grad` that the base optimizer is about to use, accumulated
    and unscaled. The alignment gradient is pulled from `alignment`, or pushed with `set_alignment_grad`; a
    pushed one goes first and serves one step. All else (state, schedulers, hooks) behaves as the base does.

    Args:
        base_optimizer: the optimizer that takes the step; it may have state already.
        alignment: called with the trainable parameters in `param_groups` order; returns one alignment
            gradient (or `None`) each, same shapes, dtypes and devices. For example a `KLAlignment`.
        rho: weight of the alignment gradient, >= 0; the paper uses 1.
        max_grad_norm: clip the final gradient to this norm. Clipping `.grad` before the step instead
            would change the balance of the two gradients.
        refresh_every: number of steps that one pulled alignment gradient serves.
        allow_unprotected: take a plain step where no alignment gradient is given, instead of raising.

    Raises:
        TypeError: `base_optimizer` has not what an optimizer has, or it calls a closure several times a step.
        ValueError: an option is out of range, or the base optimizer is differentiable or maximizes.

    Reference: Yi et al., *Gradient Surgery for Safe LLM Fine-Tuning*, arXiv 2508.07172, Algorithm 1.
    """

    alignment = Kept[AlignmentCallable | None]("_own", _checks.check_callable)
    max_grad_norm = Kept[float | None]("_own", _checks.check_max_grad_norm)
    refresh_every = Kept[int]("_own", _checks.check_refresh_every)
    allow_unprotected = Kept[bool]("_own")
    # What the base owns is read from it at each use: load_state_dict replaces the objects, and FSDP2
    # swaps the parameters inside param_groups.
    param_groups = Kept[list[dict[str, Any]]]("base_optimizer")
    state = Kept[Any]("base_optimizer")
    defaults = Kept[dict[str, Any]]("base_optimizer")

    def __init__(
        self,
        base_optimizer: Optimizer,
        alignment: AlignmentCallable | None = None,
        *,
        rho: float = 1.0,
        max_grad_norm: float | None = None,
        refresh_every: int = 1,
        allow_unprotected: bool = False,
    ) -> None:
        _checks.check_base(base_optimizer)
        self.base_optimizer = base_optimizer
        self._own = OwnState(ConstantRho(rho))
        self._guard = StepGuard()
        self._guard.install(base_optimizer)
        self._seen = SeenWeights()
        self._seen.watch(
            [p for group in base_optimizer.param_groups for p in group["params"] if p.requires_grad]
        )
        self.alignment = alignment
        self.max_grad_norm = max_grad_norm
        self.refresh_every = refresh_every
        self.allow_unprotected = allow_unprotected
        # Makes the hook registries; Optimizer.__init__ would replace the base's groups and state.
        make_hook_registries(self)

    @property
    def rho(self) -> float:
        """Weight of the alignment gradient."""
        return self._own.rho.rho

    @rho.setter
    def rho(self, value: float) -> None:
        self._own.rho = ConstantRho(value)

    @property
    def stats(self) -> SurgeryStats | None:
        """Statistics of the last protected step as tensors on its device; `None` before the first."""
        return self._own.stats

    @property
    def counts(self) -> StepCounts:
        """Number of steps so far by kind; reading it waits for the device."""
        return self._own.counts

    def set_alignment_grad(self, grads: Gradients | Mapping[Tensor, Tensor | None]) -> None:
        """Give the alignment gradient of the next step, and of that step only.

        Args:
            grads: one tensor or `None` for each trainable parameter, as a sequence in `param_groups` order
                or as a mapping by parameter; copied.

        Raises:
            ValueError: an entry is missing, unknown, or has another shape, dtype or device than its
                parameter; or all are `None`. The gradient set before, if any, stays.
        """
        self._own.push(_step.trainable_parameters(self.base_optimizer), grads)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Project, combine, clip, and take the base optimizer's step.

        Args:
            closure: reevaluates the model with gradients enabled and returns the loss, which is returned.

        Raises:
            UnprotectedStepError: there is no user or no alignment gradient, computing it changed a `.grad`,
                a gradient is not finite, or parameters were written to since the backward pass. Nothing has
                changed then, and training can go on.
            ValueError: the alignment gradients do not fit the parameters; or, at the first step, ranks
                have different options or gradients. Likewise nothing changed.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        # Here as well as at construction: groups may be added, or replaced by load_state_dict.
        _checks.check_groups(self.base_optimizer)
        parameters = _step.trainable_parameters(self.base_optimizer)
        for parameter in filter(is_distributed_tensor, parameters):
            parameter.grad = placed_as(parameter.grad, parameter)
        user_grads = [parameter.grad for parameter in parameters]
        own = self._own
        if not own.allow_unprotected:
            _step.require_gradients(user_grads)
        is_noop = all(grad is None for grad in user_grads) or _step.is_state_probe(
            self.base_optimizer, user_grads
        )
        # The base may have failed, out of memory for example, and be stepped again.
        if not is_noop and not own.is_final(user_grads):
            self._seen.check()
            self._protect(parameters)
        # Hooks on all optimizers have seen this one's step.
        with self._guard.open(), without_global_step_hooks():
            self.base_optimizer.step()
        own.final = []
        self._seen.watch(parameters)
        return loss

    def _protect(self, parameters: list[Tensor]) -> None:
        """Make the `.grad` of the parameters the final gradient, or count a plain step if that is allowed."""
        own = self._own
        alignment_grads = own.take(parameters)
        if alignment_grads is not None:
            _step.operate_(own, parameters, alignment_grads, _step.moved_by(self.base_optimizer))
        elif own.allow_unprotected:
            own.unprotected += 1
        else:
            raise _checks.UnprotectedStepError(
                f"No alignment gradient for step {own.steps + 1}: a pushed one serves exactly one step. Call "
                "set_alignment_grad() before each, or give an alignment, or allow_unprotected=True."
            )
        own.steps += 1
        own.make_final([parameter.grad for parameter in parameters])

    def unwrap(self) -> Optimizer:
        """Return the base optimizer, which from now on steps by itself, unprotected."""
        self._guard.remove(self.base_optimizer)
        self._seen.stop()
        return self.base_optimizer

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Reset the gradients of all parameters, as the base optimizer does."""
        self.base_optimizer.zero_grad(set_to_none=set_to_none)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a parameter group to the base optimizer; the next step pulls a new alignment gradient."""
        self.base_optimizer.add_param_group(param_group)
        self._own.pulled = None

    def state_dict(self) -> dict[str, Any]:
        """Return the base optimizer's state and, under "safegrad", what a resumed run needs besides.

        That is the counts, rho, the alignment gradient that still serves steps, and the `state_dict` of
        `alignment`. The bare optimizer loads it too and leaves it out. All but the gradient is in the first
        parameter group as well, where torch.distributed.checkpoint keeps it.
        """
        for pre_hook in hook_registry(self, "state_dict_pre").values():
            pre_hook(self)
        state_dict = merged(self.base_optimizer.state_dict(), self._own.state_dict())
        for post_hook in hook_registry(self, "state_dict_post").values():
            replaced = post_hook(self, state_dict)
            state_dict = state_dict if replaced is None else replaced
        return state_dict

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load the state of this or the bare optimizer; after the latter, a new gradient is pulled.

        Raises:
            ValueError: it is of a run with another reference or safety batches; nothing has changed then.
        """
        state_dict = state_dict.copy()
        for pre_hook in hook_registry(self, "load_state_dict_pre").values():
            replaced = pre_hook(self, state_dict)
            state_dict = state_dict if replaced is None else replaced
        state_dict, own = split(state_dict)
        before = self._own.state_dict()
        parameters = _step.trainable_parameters(self.base_optimizer)
        if own is None:
            self._own.pulled = None
        else:
            self._own.load_state_dict(own, parameters)
        try:
            self.base_optimizer.load_state_dict(state_dict)
        except BaseException:
            self._own.load_state_dict(before, parameters)
            raise
        for post_hook in hook_registry(self, "load_state_dict_post").values():
            post_hook(self)

    def train(self) -> None:
        """Switch a schedule-free base optimizer to training weights; nothing for other bases."""
        getattr(self.base_optimizer, "train", lambda: None)()

    def eval(self) -> None:
        """Switch a schedule-free base optimizer to evaluation weights; nothing for other bases."""
        getattr(self.base_optimizer, "eval", lambda: None)()

    def __getattr__(self, name: str) -> Any:
        if name in _HANDED_ON and hasattr(vars(self).get("base_optimizer"), name):
            return getattr(self.base_optimizer, name)
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    def __getstate__(self) -> dict[str, Any]:
        # As Optimizer does: no hooks, and not the `step` that an LR scheduler put on the instance.
        return {"base_optimizer": self.base_optimizer, "_own": self._own, "_guard": self._guard}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        # The base was copied or loaded without its hooks.
        self._guard.install(self.base_optimizer)
        self._seen = SeenWeights()

    def __repr__(self) -> str:
        base = repr(self.base_optimizer).replace("\n", "\n  ")
        alignment = None if self.alignment is None else type(self.alignment).__name__
        return (
            f"{type(self).__name__} (rho={self.rho}, refresh_every={self.refresh_every}, "
            f"max_grad_norm={self.max_grad_norm}, alignment={alignment}\n  {base}\n)"
        )
