"""Sinusoids that can be memorised: the inputs say which training task a point belongs to (Yin et al. 2020)."""

from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray

from metaprior.core.options import Count, NonNegative, checked
from metaprior.core.types import Batch, Splits, Task
from metaprior.tasks.checks import Interval
from metaprior.tasks.synthetic.functions import observations, uniform
from metaprior.tasks.synthetic.sinusoid import Sinusoids, Wave


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class NamedSinusoids:
    """Tasks y = A sin u + noise with the inputs (u, one-hot name), [n, 1 + names].

    Attributes:
        amplitudes: The amplitude of each name.
        trained: The number of names to draw from, the first ones.
        fresh: Whether A is uniform between the outer amplitudes and independent of the name. Otherwise it is the
            amplitude of the name.
        shot: Points of the support.
        query: Points of the query.
        support_domain: The interval of the support's u.
        domain: The interval of the query's u.
        noise: The standard deviation of the noise.
        noisy_query: Whether the query is noisy. The support always is.
        stream: A number that is folded into every key, so that the splits differ.
    """

    amplitudes: Float[Array, " names"]
    trained: int = field(metadata={"static": True})
    fresh: bool = field(metadata={"static": True})
    shot: int = field(metadata={"static": True})
    query: int = field(metadata={"static": True})
    support_domain: Interval = field(metadata={"static": True})
    domain: Interval = field(metadata={"static": True})
    noise: float = field(metadata={"static": True})
    noisy_query: bool = field(metadata={"static": True})
    stream: int = field(metadata={"static": True})

    def sample(self, key: PRNGKeyArray, n: int) -> Task:
        """Draws n tasks.

        Returns:
            Support x [n, shot, 1 + names] and y [n, shot, 1]; the query likewise.
        """
        keys = jax.random.split(jax.random.fold_in(key, self.stream), 4)
        name = jax.random.randint(keys[0], (n, 1), 0, self.trained)
        amplitude = self.amplitudes[name]
        if self.fresh:
            low, high = self.amplitudes[0], self.amplitudes[-1]
            amplitude = low + (high - low) * uniform(keys[1], (n, 1), (0.0, 1.0))
        family = Sinusoids((0.0, 0.0), (0.0, 0.0), (1.0, 1.0), self.noise, 0.0)
        wave = Wave(amplitude, jnp.zeros((n, 1)), jnp.ones((n, 1)))
        code = jax.nn.one_hot(name, self.amplitudes.shape[0])

        def named(batch: Batch) -> Batch:
            shape = (*batch.x.shape[:-1], code.shape[-1])
            return Batch(jnp.concatenate([batch.x, jnp.broadcast_to(code, shape)], -1), batch.y)

        return Task(
            named(observations(keys[2], family, wave, self.shot, self.support_domain, True)),
            named(observations(keys[3], family, wave, self.query, self.domain, self.noisy_query)),
        )


@checked
def sinusoid_nme(
    *,
    shot: Count = 10,
    query: Count = 10,
    test_query: Count = 200,
    amplitude: Interval = (0.1, 4.0),
    names: Count = 20,
    trained: Count | None = None,
    noise: NonNegative = 0.1,
    test_noise: bool = True,
    domain: Interval = (-5.0, 5.0),
    test_domain: Interval = (-4.5, 4.5),
) -> Splits:
    """Makes tasks y = A sin u + noise whose inputs (u, one-hot name of A) give the answer away in training.

    The name of a training task determines its amplitude, so a network can learn all training tasks without their
    supports: the tasks are not mutually exclusive. A test task has a new amplitude and a random name, so only its
    support shows the amplitude. x is [n, 1 + names] and y is [n, 1].

    Args:
        shot: Points of the support.
        query: Points of the query in training.
        test_query: Points of the query in validation and test.
        amplitude: The interval of A. Training has `names` amplitudes at equal distances, from its low to its high end.
            In validation and test, A is uniform.
        names: The number of training amplitudes.
        trained: How many of them occur in training, the smallest ones. By default all. The authors' code draws from the
            first 16 of 20.
        noise: The standard deviation of the noise.
        test_noise: Whether the validation and test queries are noisy too. The support always is.
        domain: The interval of u in training, and of the support's u in validation and test.
        test_domain: The interval of the query's u in validation and test.

    Returns:
        The three sources. Validation and test have the same distribution, with disjoint random keys.

    Raises:
        ValueError: A size below 1, an interval that is not (low, high), a negative noise, or `trained` above `names`.

    References:
        Yin, Tucker, Zhou, Levine & Finn 2020, "Meta-learning without memorization".
    """
    trained = names if trained is None else trained
    if trained > names:
        raise ValueError(f"trained must be at most {names}, the number of names, got {trained}.")
    amplitudes = jnp.asarray(np.linspace(*amplitude, names), float)
    training = NamedSinusoids(amplitudes, trained, False, shot, query, domain, domain, noise, True, 0)
    return Splits(training, *(
        NamedSinusoids(amplitudes, names, True, shot, test_query, domain, test_domain, noise, test_noise, stream)
        for stream in (1, 2)
    ))  # fmt: skip
