"""The options of an inner loop, which all learners that fit phi by steps share."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import optax
from jaxtyping import PyTree, Scalar

from metaprior.core.options import InnerOptimizer, NonNegative, Whole, check_fields
from metaprior.inference.descent import Descent, descend, make_optimizer


@dataclass(frozen=True, kw_only=True)
class InnerLoop:
    """The options of fitting phi to a support.

    A learner's factory takes these fields as keyword options (`passes_options_to`), with its own defaults, and without
    those that have no meaning for it.

    Attributes:
        steps: number of inner steps in training.
        test_steps: number of inner steps on a new task. None uses `steps`.
        rate: learning rate of the inner optimiser, on the *mean* negative log likelihood of the support.
        optimizer: the inner optimiser: the name of an optax optimiser, or an optax transformation, whose own rate then
            replaces `rate`.
        first_order: stop the meta-gradient at each inner gradient (Finn et al. 2017, section 5.2). This saves memory
            and time, and ignores second derivatives.
        remat: recompute inner steps in the backward pass. Memory grows with the logarithm of the number of steps; time
            grows by a factor of that logarithm.
        transductive: predict all queries together. Batch norm then sees them in one batch, so the prediction of one
            query depends on the others. False predicts each query in a separate batch with the support (Nichol et
            al. 2018, section 6.1). The two are the same for networks without batch norm.
    """

    steps: Whole = 1
    test_steps: Whole | None = None
    rate: NonNegative = 0.01
    optimizer: InnerOptimizer | optax.GradientTransformation = "sgd"
    first_order: bool = False
    remat: bool = False
    transductive: bool = True

    def __post_init__(self) -> None:
        check_fields(self)

    @property
    def on_new_task(self) -> int:
        """The number of inner steps on a new task."""
        return self.steps if self.test_steps is None else self.test_steps

    def transformation(self, *, differentiated: bool | None = None, **options: Any) -> optax.GradientTransformation:
        """Returns the inner optimiser as an optax transformation.

        Args:
            differentiated: Whether the meta-gradient flows through the steps. None means unless `first_order`.
            options: Further options of the named optax optimiser.
        """
        if not isinstance(self.optimizer, str):
            return self.optimizer
        through = not self.first_order if differentiated is None else differentiated
        return make_optimizer(self.optimizer, self.rate, differentiated=through, **options)

    def descend(
        self,
        loss: Callable[..., Scalar],
        phi: PyTree,
        optimizer: optax.GradientTransformation | None = None,
    ) -> Descent:
        """Runs the inner steps of training.

        Args:
            loss: The loss of phi.
            phi: The starting point.
            optimizer: The optimiser. None uses that of the options.

        Returns:
            The state after the last step.
        """
        inner = self.transformation() if optimizer is None else optimizer
        return descend(loss, phi, inner, self.steps, first_order=self.first_order, remat=self.remat)
