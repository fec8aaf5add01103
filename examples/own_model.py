"""A model of one's own, h = Σ_j u_j² v_j x_j: one definition gives its SDE, a law, a simulation and the real SGD."""

import sympy as sp
import torch

from nets.sgd import sgd
from simulators.integrate import integrate
from simulators.noise import BrownianIncrements
from theory.problem import gaussian_sparse
from theory.schedule import Schedule
from theory.sde import ExactCovariance, ModelSDE
from theory.symbolic import SymbolicModel
from theory.trajectory import Probe

n, d, steps, eta, seeds = 8, 12, 800, 0.02, 64
u, v, x = (sp.symbols(f"{name}1:{d + 1}", real=True) for name in "uvx")
own = SymbolicModel(sum(a**2 * b * c for a, b, c in zip(u, v, x, strict=True)), [*u, *v], x)

# Gradient flow keeps u² - 2v². Itô's lemma says how label noise moves it: deterministically.
balance = u[0] ** 2 - 2 * v[0] ** 2
print("kept by gradient flow:", own.is_conserved(balance))
drift, diffusion = own.label_noise_sde(samples=1).ito(balance)
print(rf"\mathrm{{d}}({sp.latex(balance)}) = {sp.latex(sp.factor(drift))}\,\mathrm{{d}}t, noise {diffusion[0]}")

# The same definition as a torch function: real SGD and its SDE, from the same start and with the same step size.
h, problem = own.to_torch(), gaussian_sparse(n, d, nonzero=3)
start = torch.full((2 * d,), 0.8, dtype=torch.float64)
measure = Probe(lambda theta: (theta[..., :d] ** 2 - 2 * theta[..., d:] ** 2).mean(-1), torch.tensor([0, steps]))
real = sgd(h, problem, start, [Schedule(eta)], steps, seeds=range(seeds), probes={"balance": measure})
sde = ModelSDE(h, problem, ExactCovariance(eta))
noise = BrownianIncrements(1, "own model", seeds, n)
simulated = integrate(sde, start.repeat(seeds, 1), eta, steps, noise, {"balance": measure})
for name, run in (("SGD", real), ("SDE", simulated)):
    values = run["balance"].values.reshape(2, -1)
    change = (values[1] - values[0])[run.finite.flatten()]
    error = change.std() / len(change) ** 0.5
    print(f"{name}: mean change of u² - 2v²: {change.mean():.4f} ± {error:.4f}, {len(change)}/{seeds} runs finite")
