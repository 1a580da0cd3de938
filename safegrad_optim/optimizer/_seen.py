"""The weights that a step starts from are those that the user's gradient is of."""

from collections.abc import Sequence

from torch import Tensor
from torch.utils.hooks import RemovableHandle

from safegrad_optim._torch_private import version
from safegrad_optim.optimizer._checks import UnprotectedStepError


class SeenWeights:
    """Notes the versions of parameters each time a backward pass reaches the first of them.

    FSDP2 gives shards their gradients past autograd, so that nothing is noted there.
    """

    def __init__(self) -> None:
        self._parameters: Sequence[Tensor] = []
        self._versions: list[int] = []
        self._hook: RemovableHandle | None = None

    def watch(self, parameters: Sequence[Tensor]) -> None:
        """Note the versions of these parameters from the next backward pass on."""
        self._versions = []
        if self._hook is None or not parameters or parameters[0] is not self._parameters[0]:
            self.stop()
            if parameters and parameters[0].is_leaf:
                self._hook = parameters[0].register_post_accumulate_grad_hook(self._note)
        self._parameters = parameters

    def stop(self) -> None:
        """Note nothing any more."""
        if self._hook is not None:
            self._hook.remove()
        self._hook = None

    def check(self) -> None:
        """Raise an UnprotectedStepError if one was written to since."""
        if self._versions and self._versions != [*map(version, self._parameters)]:
            raise UnprotectedStepError(
                "Parameters were written to between backward() and step(): the user's gradient is of other "
                "weights than the alignment gradient would be. Give an optimizer that swaps weights "
                "(schedule-free, Lookahead) to SafeGradOptimizer as base_optimizer, not the other way round; "
                "write to weights by hand before backward() or after step()."
            )

    def _note(self, _: Tensor) -> None:
        self._versions = [*map(version, self._parameters)]
