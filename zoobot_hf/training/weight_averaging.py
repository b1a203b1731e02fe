"""The mean of a stage's weights over its steps, kept by the optimizer beside the last step's weights."""

from collections.abc import Callable
from itertools import chain
from typing import Any

import torch
from torch.optim.swa_utils import get_ema_multi_avg_fn


class WeightAverage(torch.optim.Optimizer):
    """What `averaging` adds to an optimizer: the mean of the weights, in which step n counts n + 1 times.

    The start counts once, as step 0. This is polynomial-decay averaging with an exponent of 1 (Shamir and Zhang 2013),
    which follows the weights faster than a plain mean does, and asks for no number.

    The parameters hold either the last step's weights or the mean, and the optimizer's state the other one, so that a
    checkpoint of `Trainer` has all that a resume needs, and its model is the one that was evaluated.

    Args:
        *args: As the optimizer takes them.
        **kwargs: Likewise.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # Adagrad's is filled before the first step.
        for parameter, state in self.state.items():
            state["other_weights"] = parameter.detach().clone()

    @property
    def holds_mean(self) -> bool:
        """Whether the parameters hold the mean."""
        return bool(self.param_groups[0].get("holds_mean", False))

    def train(self) -> None:
        """Puts the last step's weights into the parameters; `Trainer` calls it before each step."""
        self.put(mean=False)

    @torch.no_grad()
    def put(self, *, mean: bool) -> None:
        """Puts one of the two into the parameters.

        Args:
            mean: The mean, and not the last step's weights.
        """
        if mean != self.holds_mean:
            for parameter, state in self.state.items():
                before = parameter.clone()
                parameter.copy_(state["other_weights"])
                state["other_weights"].copy_(before)
            for group in self.param_groups:
                group["holds_mean"] = mean

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """A step of the optimizer; the parameters have to hold the last step's weights.

        Args:
            closure: As in every optimizer.
        """
        groups = [group["params"] for group in self.param_groups]
        trained = [parameter for parameter in chain.from_iterable(groups) if parameter.grad is not None]
        # An optimizer fills a state only where it is empty, so the mean comes into it after the first step.
        starts = {parameter: parameter.detach().clone() for parameter in trained if parameter not in self.state}
        with torch.enable_grad():
            loss = super().step(closure)
        for parameter, start in starts.items():
            self.state[parameter]["other_weights"] = start
        steps = self.param_groups[0].get("averaged_steps", 0) + 1
        means = [state["other_weights"] for state in self.state.values()]
        get_ema_multi_avg_fn(decay=steps / (steps + 2))(means, list(self.state), steps)  # type: ignore[no-untyped-call]
        for group in self.param_groups:
            group["averaged_steps"] = steps
        return loss


def averaging(optimizer_class: type[torch.optim.Optimizer]) -> type[WeightAverage]:
    """The optimizer's class, with the mean of the weights as in `WeightAverage`.

    Args:
        optimizer_class: Any class of optimizers.
    """
    return type(f"Averaging{optimizer_class.__name__}", (WeightAverage, optimizer_class), {})
