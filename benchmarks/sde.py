"""SDE integration against torchsde and diffrax: same equation, same steps, in one process, alternating.

Usage: python benchmarks/sde.py [--rounds 5]        (diffrax is compared when it is installed: pip install diffrax)
Laws are compared first (means within sampling error), then seconds a step are measured; prints ratios with spread and
a checksum of what each computed; writes benchmarks/results/sde.json.
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable

import numpy as np
import torch
import torchsde
from measure import in_turn, row, save
from torch import Tensor

from nets.diagonal import initial_state
from simulators.diagonal import integrate_diagonal
from simulators.integrate import integrate
from simulators.noise import BrownianIncrements
from theory.diagonal_sde import DiagonalSDE, to_logs
from theory.problem import gaussian_sparse
from theory.sde import LabelNoise

PROBLEM, ETA, DT = gaussian_sparse(80, 200, 20), 0.1, 0.1
Run = Callable[[int], Tensor]


class ForTorchsde:
    """The same SDE with float times, in the product form that torchsde takes."""

    noise_type, sde_type = "general", "ito"

    def __init__(self, sde: DiagonalSDE) -> None:
        self._sde = sde

    def f(self, t: Tensor, y: Tensor) -> Tensor:
        return self._sde.f(float(t), y)

    def g_prod(self, t: Tensor, y: Tensor, v: Tensor) -> Tensor:
        return self._sde.g_prod(float(t), y, v)

    def f_and_g_prod(self, t: Tensor, y: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        return self._sde.f_and_g_prod(float(t), y, v)


class Gbm:
    """dy = 0.1 y dt + 0.5 y dW."""

    noise_type, sde_type, channels = "diagonal", "ito", 1

    def f(self, t: object, y: Tensor) -> Tensor:
        return 0.1 * y

    def g(self, t: object, y: Tensor) -> Tensor:
        return 0.5 * y

    def g_prod(self, t: object, y: Tensor, v: Tensor) -> Tensor:
        return 0.5 * y * v

    def f_and_g_prod(self, t: object, y: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        return 0.1 * y, 0.5 * y * v


def diagonal_peers(paths: int) -> dict[str, Run]:
    """Label-noise SDE of the diagonal network, own loss; each runs ``steps`` steps and returns the final states."""
    y0 = to_logs(initial_state(PROBLEM)).repeat(paths, 1)
    covariance = LabelNoise(ETA)
    sde = DiagonalSDE(PROBLEM, covariance)

    def own(steps: int) -> Tensor:
        noise = BrownianIncrements(0, "bench", paths, PROBLEM.n)
        return integrate_diagonal(PROBLEM, covariance, y0, DT, steps, noise).final

    def generic(steps: int) -> Tensor:
        return integrate(sde, y0, DT, steps, BrownianIncrements(0, "bench", paths, PROBLEM.n)).final

    def theirs(steps: int) -> Tensor:
        end = DT * steps
        bm = torchsde.BrownianInterval(0.0, end, (paths, PROBLEM.n), dtype=y0.dtype, dt=DT)
        ts = torch.tensor([0.0, end], dtype=torch.float64)
        return torchsde.sdeint(ForTorchsde(sde), y0, ts, bm=bm, dt=DT, method="euler")[-1]

    peers = {
        "here": own,
        "the generic integrator here": generic,
        "torchsde, g_prod and BrownianInterval(dt=dt)": theirs,
    }
    return peers | _diffrax(y0)


def _diffrax(y0: Tensor) -> dict[str, Run]:
    try:
        import diffrax
        import jax
        import jax.numpy as jnp
    except ImportError:
        return {}
    jax.config.update("jax_enable_x64", True)
    X, y, m = (jnp.asarray(part.numpy()) for part in (PROBLEM.X, PROBLEM.y, PROBLEM.mean_square))
    n, start = PROBLEM.n, jnp.asarray(y0.numpy())

    def residual(state: jax.Array) -> jax.Array:
        a2, b2 = jnp.split(jnp.exp(2 * state), 2, axis=1)
        return (a2 - b2) / 4 @ X.T - y

    def variance(r: jax.Array) -> jax.Array:
        return 2 * ETA / n * (r**2).mean(1, keepdims=True) / 2

    def drift(t: jax.Array, state: jax.Array, args: None) -> jax.Array:
        r = residual(state)
        gradient, shrink = r @ X / n, variance(r) * n * m / 2
        return jnp.concatenate([-gradient - shrink, gradient - shrink], 1)

    class ProductNoise(diffrax.AbstractTerm):
        """G dW as one product; G is never built."""

        path: diffrax.AbstractBrownianPath

        def vf(self, t, state, args):  # type: ignore[no-untyped-def]
            return state

        def contr(self, t0, t1, **_):  # type: ignore[no-untyped-def]
            return self.path.evaluate(t0, t1)

        def prod(self, state, dW):  # type: ignore[no-untyped-def]
            kick = (jnp.sqrt(variance(residual(state))) * dW) @ X
            return jnp.concatenate([kick, -kick], 1)

    def solve(steps: int, key: jax.Array) -> jax.Array:
        path = diffrax.UnsafeBrownianPath(jax.ShapeDtypeStruct((len(start), n), start.dtype), key)
        terms = diffrax.MultiTerm(diffrax.ODETerm(drift), ProductNoise(path))
        solution = diffrax.diffeqsolve(
            terms, diffrax.Euler(), 0.0, DT * steps, DT, start, max_steps=steps + 1,
            adjoint=diffrax.ForwardMode(), stepsize_controller=diffrax.ConstantStepSize(),
        )  # fmt: skip
        return solution.ys[-1]

    compiled = jax.jit(solve, static_argnums=0)
    key = jax.random.PRNGKey(0)

    def run(steps: int) -> Tensor:
        return torch.from_numpy(np.array(compiled(steps, key).block_until_ready()))

    return {"diffrax, Euler with UnsafeBrownianPath and product noise": run}


def gbm_peers(paths: int) -> dict[str, Run]:
    """Scalar geometric Brownian motion: own loop against torchsde as it comes."""
    y0 = torch.ones(paths, 1, dtype=torch.float64)

    def own(steps: int) -> Tensor:
        return integrate(Gbm(), y0, 0.01, steps, BrownianIncrements(0, "gbm", paths, 1)).final

    def theirs(steps: int) -> Tensor:
        # A horizon just short of the last step keeps torchsde's clock from hanging on a remainder of 1e-14.
        ts = torch.tensor([0.0, 0.01 * steps - 1e-6], dtype=torch.float64)
        return torchsde.sdeint(Gbm(), y0, ts, dt=0.01, method="euler")[-1]

    return {"here": own, "torchsde, defaults": theirs}


def compare(work: str, peers: dict[str, Run], steps: int, rounds: int) -> list[dict[str, object]]:
    """Check that means agree, then alternate; ratios are of the first peer's time, round by round."""
    first, *others = peers
    finals = {name: run(steps) for name, run in peers.items()}  # compiles, and is compared first
    reference = finals[first].mean(1)
    for name in others:
        sample = finals[name].mean(1)
        error = 5 * float((reference.std() ** 2 + sample.std() ** 2) ** 0.5) / len(sample) ** 0.5
        assert abs(float(reference.mean() - sample.mean())) < error + 1e-12, f"{name} has another law"
    taken = in_turn({name: functools.partial(run, steps) for name, run in peers.items()}, rounds)
    each = {name: [t / steps for t in times] for name, times in taken.items()}
    sums = {name: float(final.mean()) for name, final in finals.items()}
    return [row(work, name, each[name], each[first], (sums[name], sums[first]), "step") for name in others]


def main() -> None:
    """Measure and report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    rounds, rows = parser.parse_args().rounds, []
    for paths in (64, 4096):
        rows += compare(f"scalar GBM, {paths} paths", gbm_peers(paths), 1000, rounds)
    for paths, steps in ((64, 400), (1024, 60)):
        work = f"diagonal label-noise SDE, n=80, d=200, {paths} paths"
        rows += compare(work, diagonal_peers(paths), steps, rounds)
    save("sde", rows)


if __name__ == "__main__":
    main()
