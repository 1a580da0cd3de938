"""SafeGradOptimizer: any torch optimizer, with gradient surgery inside its step."""

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from safegrad_optim.optimizer._checks import (
    UnprotectedStepError,
    check_alignment,
    check_base,
    check_groups,
    check_own_memory,
)
from safegrad_optim.optimizer._named import in_order, named
from safegrad_optim.optimizer._state import OWN_STATE, StepCounts, as_numbers, from_numbers, without_numbers
from safegrad_optim.parallel import (
    is_distributed_tensor,
    local,
    placed_as,
    require_same,
    sum_over_ranks,
)
from safegrad_optim.surgery import GradientProducts, Gradients, SurgeryStats, combine_, inner_products


class SafeGradOptimizer(Optimizer):
    """Wrap `base_optimizer` so that each step first projects the user gradient off the alignment one.

    g = g_user + c g_align,  c = rho + max(0, -<g_user, g_align>) / ||g_align||^2

    Surgery happens once per `step()`, on the `.grad` that the base optimizer is about to use, so it
    sees the accumulated and unscaled gradient. The alignment gradient is either pulled from
    `alignment` or pushed with `set_alignment_grad`; a pushed one goes first and serves one step.
    Everything else (`param_groups`, `state`, `state_dict`, schedulers, hooks) behaves as the base does.

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
        TypeError: `base_optimizer` is no optimizer, or one that calls a closure several times a step.
        ValueError: an option is out of range, or the base optimizer is differentiable or maximizes.

    Reference: Yi et al., *Gradient Surgery for Safe LLM Fine-Tuning*, arXiv 2508.07172, Algorithm 1.
    """

    def __init__(
        self,
        base_optimizer: Optimizer,
        alignment: Callable[[list[Tensor]], Gradients] | None = None,
        *,
        rho: float = 1.0,
        max_grad_norm: float | None = None,
        refresh_every: int = 1,
        allow_unprotected: bool = False,
    ) -> None:
        if isinstance(base_optimizer, SafeGradOptimizer):
            raise TypeError("base_optimizer is a SafeGradOptimizer already; wrap the bare optimizer.")
        check_base(base_optimizer)
        if alignment is not None and not callable(alignment):
            raise TypeError(
                f"alignment is a {type(alignment).__name__}, expected a callable such as KLAlignment. "
                "Give gradients to set_alignment_grad() instead."
            )
        if not 0.0 <= rho < math.inf:
            raise ValueError(f"rho is {rho}, expected a finite number >= 0 (the paper uses 1).")
        if max_grad_norm is not None and not max_grad_norm > 0.0:
            raise ValueError(f"max_grad_norm is {max_grad_norm}, expected a number > 0 or None.")
        if not isinstance(refresh_every, int) or refresh_every < 1:
            raise ValueError(f"refresh_every is {refresh_every}, expected a whole number >= 1.")
        self.base_optimizer = base_optimizer
        self.alignment = alignment
        self.rho = rho
        self.max_grad_norm = max_grad_norm
        self.refresh_every = refresh_every
        self.allow_unprotected = allow_unprotected
        self._pushed: list[Tensor | None] | None = None
        self._pushed_versions: list[int | None] = []
        self._pulled: list[Tensor | None] | None = None
        self._pulled_for: list[Tensor] = []
        self._pulled_age = 0
        self._stats: SurgeryStats | None = None
        self._steps = 0
        self._unprotected = 0
        self._conflicts: Tensor | int = 0
        self._negligible: Tensor | int = 0
        self._ranks_agree = False
        # Makes the hook registries; Optimizer.__init__ would replace the base's groups and state.
        Optimizer.__setstate__(self, {})

    # What the base owns is read from it at each use: load_state_dict replaces the objects, and FSDP2
    # swaps the parameters inside param_groups.

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        return self.base_optimizer.param_groups

    @param_groups.setter
    def param_groups(self, value: list[dict[str, Any]]) -> None:
        self.base_optimizer.param_groups = value

    @property
    def state(self) -> Any:
        return self.base_optimizer.state

    @state.setter
    def state(self, value: Any) -> None:
        self.base_optimizer.state = value

    @property
    def defaults(self) -> dict[str, Any]:
        return self.base_optimizer.defaults

    @defaults.setter
    def defaults(self, value: dict[str, Any]) -> None:
        self.base_optimizer.defaults = value

    @property
    def stats(self) -> SurgeryStats | None:
        """Statistics of the last protected step as tensors on its device; `None` before the first."""
        return self._stats

    @property
    def counts(self) -> StepCounts:
        """Number of steps so far by kind; reading it waits for the device."""
        return StepCounts(self._steps, int(self._conflicts), int(self._negligible), self._unprotected)

    def set_alignment_grad(
        self,
        grads: Gradients | Mapping[Tensor, Tensor | None] | Mapping[str, Tensor | None],
        named_parameters: Iterable[tuple[str, Tensor]] | None = None,
    ) -> None:
        """Give the alignment gradient of the next step, and of that step only.

        Args:
            grads: one tensor or `None` for each trainable parameter, as a sequence in `param_groups`
                order or as a mapping by parameter or by name. Kept, not copied: do not pass `.grad`
                tensors that are used on.
            named_parameters: `model.named_parameters()`, for a mapping by name; not needed where the
                base optimizer was built from named parameters.

        Raises:
            ValueError: an entry is missing, unknown, or has another shape, dtype or device than its
                parameter; or all entries are `None`. The gradient set before, if any, stays.
        """
        parameters = self._trainable_parameters()
        if isinstance(grads, Mapping):
            names = named(self.param_groups) if named_parameters is None else named_parameters
            ordered = in_order(grads, parameters, names)
        else:
            ordered = list(grads)
        check_alignment(parameters, ordered)
        self._pushed = ordered
        self._pushed_versions = [_version(grad) for grad in ordered]

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Project, combine, clip, and take the base optimizer's step.

        Args:
            closure: reevaluates the model with gradients enabled and returns the loss.

        Returns:
            What `closure` returned, or `None`.

        Raises:
            UnprotectedStepError: there is no alignment gradient, it was modified since it was set or
                shares memory with a `.grad`, or either gradient is not finite. Parameters, state and
                `.grad` are as they were before the step, and training can go on.
            ValueError: the alignment gradients do not fit the parameters; or, at the first step, ranks
                have different options or gradients. Likewise nothing changed.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        # Here as well as at construction: groups may be added, or replaced by load_state_dict.
        check_groups(self.base_optimizer)
        parameters = self._trainable_parameters()
        for parameter in filter(is_distributed_tensor, parameters):
            parameter.grad = placed_as(parameter.grad, parameter)
        user_grads = [parameter.grad for parameter in parameters]
        if all(grad is None for grad in user_grads) or self._is_state_probe(user_grads):
            self.base_optimizer.step()
            return loss
        alignment_grads = self._alignment_grads(parameters)
        if alignment_grads is None:
            self._unprotected += 1
        else:
            check_own_memory(user_grads, alignment_grads)
            products = self._checked_products(user_grads, alignment_grads)
            self._operate(parameters, user_grads, alignment_grads, products)
        self._steps += 1
        self.base_optimizer.step()
        return loss

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Reset the gradients of all parameters, as the base optimizer does."""
        self.base_optimizer.zero_grad(set_to_none=set_to_none)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a parameter group to the base optimizer; the next step pulls a new alignment gradient."""
        self.base_optimizer.add_param_group(param_group)
        self._pulled = None

    def state_dict(self) -> dict[str, Any]:
        """Return the base optimizer's state and, under "safegrad", what a resumed run needs besides.

        The bare optimizer loads it as well and leaves "safegrad" out: the counts, the alignment gradient
        that still serves steps of `refresh_every`, and the `state_dict` of `alignment`. All but the
        gradient is in the first parameter group too, where torch.distributed.checkpoint keeps it.
        """
        for pre_hook in self._optimizer_state_dict_pre_hooks.values():
            pre_hook(self)
        own = self._own_state()
        state_dict = {**self.base_optimizer.state_dict(), OWN_STATE: own}
        first, *others = state_dict["param_groups"]
        state_dict["param_groups"] = [{**first, **as_numbers(own)}, *others]
        for post_hook in self._optimizer_state_dict_post_hooks.values():
            replaced = post_hook(self, state_dict)
            state_dict = state_dict if replaced is None else replaced
        return state_dict

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load the state of this or the bare optimizer; after the latter, a new gradient is pulled.

        Raises:
            ValueError: the state is of a run with another reference or other safety batches. Nothing
                has changed then.
        """
        state_dict = state_dict.copy()
        for pre_hook in self._optimizer_load_state_dict_pre_hooks.values():
            replaced = pre_hook(self, state_dict)
            state_dict = state_dict if replaced is None else replaced
        state_dict["param_groups"], numbers = without_numbers(state_dict["param_groups"])
        own = state_dict.pop(OWN_STATE, from_numbers(numbers))
        pulled = None if own is None else self._fitting(own["pulled"])
        alignment: Any = self.alignment
        if own is not None and own["alignment"] is not None and hasattr(alignment, "load_state_dict"):
            alignment.load_state_dict(own["alignment"])
        self.base_optimizer.load_state_dict(state_dict)
        self._pulled, self._pulled_for = pulled, self._trainable_parameters()
        if own is not None:
            self._pulled_age = own["pulled_age"]
            self._steps, self._conflicts, self._negligible, self._unprotected = own["counts"]
        for post_hook in self._optimizer_load_state_dict_post_hooks.values():
            post_hook(self)

    def train(self) -> None:
        """Switch a schedule-free base optimizer to training weights; nothing for other bases."""
        if hasattr(self.base_optimizer, "train"):
            self.base_optimizer.train()

    def eval(self) -> None:
        """Switch a schedule-free base optimizer to evaluation weights; nothing for other bases."""
        if hasattr(self.base_optimizer, "eval"):
            self.base_optimizer.eval()

    def __getstate__(self) -> dict[str, Any]:
        # As Optimizer does: no hooks, and not the `step` that an LR scheduler put on the instance.
        own = {"base_optimizer", "alignment", "rho", "max_grad_norm", "refresh_every"}
        own |= {"allow_unprotected", "_pushed", "_pushed_versions", "_pulled", "_pulled_for"}
        own |= {"_pulled_age", "_stats", "_steps", "_unprotected", "_conflicts", "_negligible"}
        own |= {"_ranks_agree"}
        return {name: value for name, value in self.__dict__.items() if name in own}

    def __repr__(self) -> str:
        base = repr(self.base_optimizer).replace("\n", "\n  ")
        return (
            f"{type(self).__name__} (rho={self.rho}, refresh_every={self.refresh_every}, "
            f"max_grad_norm={self.max_grad_norm}, alignment={_name(self.alignment)}\n  {base}\n)"
        )

    def _own_state(self) -> dict[str, Any]:
        alignment: Any = self.alignment
        return {
            "counts": list(self.counts),
            "pulled": self._pulled,
            "pulled_age": self._pulled_age,
            "alignment": alignment.state_dict() if hasattr(alignment, "state_dict") else None,
        }

    def _fitting(self, saved: list[Tensor | None] | None) -> list[Tensor | None] | None:
        """A saved alignment gradient on the devices of the parameters, checked to be theirs."""
        if saved is None:
            return None
        parameters = self._trainable_parameters()
        if len(saved) != len(parameters):
            raise ValueError(
                f"The saved alignment gradient is of {len(saved)} parameters, this optimizer has "
                f"{len(parameters)} trainable ones. Freeze the same parameters as the run that saved it."
            )
        grads = [
            None if grad is None else grad.to(parameter.device)
            for grad, parameter in zip(saved, parameters, strict=True)
        ]
        check_alignment(parameters, grads)
        return grads

    def _trainable_parameters(self) -> list[Tensor]:
        parameters = []
        for index, group in enumerate(self.param_groups):
            for parameter in group["params"]:
                if parameter.requires_grad:
                    parameters.append(parameter)
                elif parameter.grad is not None:
                    raise UnprotectedStepError(
                        f"A frozen parameter of shape {tuple(parameter.shape)} in group {index} has a "
                        ".grad, which the base optimizer would apply unprotected. Set its .grad to None."
                    )
        return parameters

    def _is_state_probe(self, user_grads: Gradients) -> bool:
        """Whether torch.distributed.checkpoint is taking a null step to make the optimizer's state."""
        if self.state or any(float(group.get("lr", 1.0)) != 0.0 for group in self.param_groups):
            return False
        present = [grad for grad in user_grads if grad is not None]
        found = torch.tensor(float(any(bool(local(grad).any()) for grad in present)))
        if any(map(is_distributed_tensor, present)):
            # Zeros in the part of one rank say nothing of the others, and all have to go one way.
            found = sum_over_ranks(found)
        return not bool(found)

    def _alignment_grads(self, parameters: list[Tensor]) -> list[Tensor | None] | None:
        if self._pushed is not None:
            return self._take_pushed(parameters)
        if self.alignment is not None:
            return self._pull(parameters, self.alignment)
        if self.allow_unprotected:
            return None
        raise UnprotectedStepError(
            f"No alignment gradient for step {self._steps + 1}: one given to set_alignment_grad() serves "
            "exactly one step. Call it before each step, or construct SafeGradOptimizer with "
            "alignment=KLAlignment(...). Pass allow_unprotected=True to take such steps unprotected."
        )

    def _take_pushed(self, parameters: list[Tensor]) -> list[Tensor | None]:
        grads, versions = self._pushed, self._pushed_versions
        assert grads is not None
        self._pushed, self._pushed_versions = None, []
        check_alignment(parameters, grads)
        for index, (grad, version) in enumerate(zip(grads, versions, strict=True)):
            if grad is not None and _version(grad) != version:
                raise UnprotectedStepError(
                    f"Alignment gradient {index} was modified since it was set, so it no longer is the "
                    "alignment gradient. Give set_alignment_grad() tensors of its own, as grad.clone()."
                )
        return grads

    def _pull(
        self, parameters: list[Tensor], alignment: Callable[[list[Tensor]], Gradients]
    ) -> list[Tensor | None]:
        grads = self._pulled
        # Freezing some parameters and training others must not give one the gradient of another.
        same = [id(parameter) for parameter in parameters] == [id(old) for old in self._pulled_for]
        if grads is None or not same:
            before = [(parameter.grad, _version(parameter.grad)) for parameter in parameters]
            with torch.enable_grad():
                grads = list(alignment(parameters))
            for index, (parameter, (grad, version)) in enumerate(zip(parameters, before, strict=True)):
                if parameter.grad is not grad or _version(grad) != version:
                    raise UnprotectedStepError(
                        f"Computing the alignment gradient changed the user gradient of parameter "
                        f"{index}. {_name(alignment)} has to stash and restore .grad around backward()."
                    )
            check_alignment(parameters, grads)
            self._pulled_for = parameters
            self._pulled_age = 0
        self._pulled_age += 1
        self._pulled = grads if self._pulled_age < self.refresh_every else None
        return grads

    def _checked_products(self, user_grads: Gradients, alignment_grads: Gradients) -> GradientProducts:
        products = inner_products(user_grads, alignment_grads)
        # The only host read of a step: nothing may change before it is known to be protected.
        inner, user_sq, alignment_sq = torch.stack(products[:3]).tolist()
        negligible = not alignment_sq > products.eps**2 * user_sq
        if not self._ranks_agree:
            self._require_agreement(user_sq, alignment_sq)
            # A gradient that is zero on all ranks does not tell whether it is averaged over them.
            self._ranks_agree = not negligible
        for name, sq_norm in (("alignment", alignment_sq), ("user", user_sq)):
            if not math.isfinite(sq_norm):
                self._pulled = None
                raise UnprotectedStepError(
                    f"The {name} gradient is not finite (||g||^2 = {sq_norm}), so no conflict can be "
                    "told. Look for an overflow in its loss; zero_grad() and go on with the next batch."
                )
        if not math.isfinite(inner):
            self._pulled = None
            raise UnprotectedStepError(
                f"The inner product of user and alignment gradient overflows ({inner})."
            )
        if negligible:
            # Zero at the reference, where training starts: it must not serve further steps.
            self._pulled = None
        return products

    def _require_agreement(self, user_sq: float, alignment_sq: float) -> None:
        """Check that all ranks are about to take the same step; replicas would drift apart otherwise."""
        own = {name: getattr(self, name) for name in ("rho", "refresh_every", "max_grad_norm")}
        own |= {"user gradients (by ||g||^2)": user_sq, "alignment gradients (by ||g||^2)": alignment_sq}
        require_same(
            own,
            "Give all ranks the same options, and gradients averaged over them: DistributedDataParallel "
            "and KLAlignment average, what you compute yourself has to be all-reduced.",
        )

    def _operate(
        self,
        parameters: list[Tensor],
        user_grads: Gradients,
        alignment_grads: Gradients,
        products: GradientProducts,
    ) -> None:
        final, stats = combine_(user_grads, alignment_grads, self.rho, products)
        for parameter, grad in zip(parameters, final, strict=True):
            parameter.grad = grad
        if self.max_grad_norm is not None:
            _clip_(parameters, self.max_grad_norm, stats.final_norm.to(torch.float32))
        self._stats = stats
        self._conflicts = self._conflicts + stats.conflict.long()
        self._negligible = self._negligible + stats.negligible.long()


def _clip_(parameters: list[Tensor], max_norm: float, total_norm: Tensor) -> None:
    # As torch.nn.utils.clip_grads_with_norm_, which cannot take sharded and plain gradients together.
    factor = torch.clamp(max_norm / (total_norm + 1e-6), max=1.0)
    for parameter in parameters:
        if parameter.grad is not None:
            grad = local(parameter.grad)
            grad.mul_(factor.to(grad.device))


def _version(grad: Tensor | None) -> int | None:
    return None if grad is None else local(grad)._version


def _name(alignment: object) -> str:
    return repr(alignment) if alignment is None else type(alignment).__name__
