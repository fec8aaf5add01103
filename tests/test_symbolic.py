"""Derived laws, one-dimensional SDEs against their closed forms, and the way from sympy to torch."""

import math

import numpy as np
import pytest
import sympy as sp
import torch

from theory.lowering import to_torch
from theory.sde import ExactCovariance, ModelSDE
from theory.symbolic import ScalarSDE, SymbolicModel, balance_law, relu, simplify_relu

a, b, u, v, w, x, y, z = sp.symbols("a b u v w x y z", real=True)
w1, w2, x1, x2 = sp.symbols("w1 w2 x1 x2", real=True)
mu, zeta, lam, sigma = sp.symbols("mu zeta lambda sigma", positive=True)

WELL = ScalarSDE(y, mu * y - y**3, zeta * y)
UHLENBECK = ScalarSDE(y, -lam * y, sigma)
UNIT = SymbolicModel(a * relu(w1 * x1 + w2 * x2), [a, w1, w2], [x1, x2])


# Models ---------------------------------------------------------------------------------------------------------------


def test_relu_balance_law():
    drift, row, law = balance_law(samples=2, features=3)
    assert simplify_relu(drift - law) == 0
    assert simplify_relu(drift + law) != 0
    assert row.shape == (1, 2)
    assert row.is_zero_matrix


@pytest.mark.parametrize(
    ("h", "parameters", "inputs", "observable", "kept"),
    [
        (u * v * x, [u, v], [x], u**2 - v**2, True),
        (u * v * x, [u, v], [x], sp.log(u**2 - v**2), True),
        (u * v * x, [u, v], [x], u**2 + v**2, False),
        (u**2 * v * x, [u, v], [x], u**2 - 2 * v**2, True),
        (u**2 * v * x, [u, v], [x], u**2 - v**2, False),
        (a * sp.tanh(w * x), [a, w], [x], a**2 - w**2, False),
        (UNIT.h, UNIT.parameters, UNIT.inputs, a**2 - w1**2 - w2**2, True),
        (UNIT.h, UNIT.parameters, UNIT.inputs, a**2 - w1**2 - 2 * w2**2, False),
        (UNIT.h, UNIT.parameters, UNIT.inputs, a**2 + w1**2 + w2**2, False),
    ],
)
def test_conservation_laws(h, parameters, inputs, observable, kept):
    assert SymbolicModel(h, parameters, inputs).is_conserved(observable) is kept


def test_two_units_keep_their_balances_apart():
    h = a * relu(w1 * x) + b * relu(w2 * x)
    model = SymbolicModel(h, [a, b, w1, w2], [x])
    assert model.is_conserved(a**2 - w1**2)
    assert not model.is_conserved(a**2 - w2**2)


def test_gradient_flow_is_minus_the_gradient_of_the_loss():
    model = SymbolicModel(a * sp.tanh(w * x), [a, w], [x])
    flow = model.gradient_flow(3)
    loss = sp.Integer(0)
    targets = sp.symbols("y1:4", real=True)
    residuals = [model.h.subs(x, point[0]) - target for point, target in zip(flow.points, targets, strict=True)]
    loss = sum(r**2 for r in residuals) / 6
    expected = -sp.Matrix([sp.diff(loss, parameter) for parameter in (a, w)])
    shown = flow.drift.subs(dict(zip(flow.residuals, residuals, strict=True)))
    assert (shown - expected).applyfunc(sp.simplify).is_zero_matrix
    assert flow.diffusion.shape == (2, 0)


def test_ito_drift_of_a_monomial_by_hand():
    """h = θx: dθ = -r x dt + s x dW, so d θ³ = (-3θ² r x + 3θ s²x²) dt + 3θ² s x dW."""
    sde = SymbolicModel(w * x, [w], [x]).label_noise_sde(1)
    (r,), (s,), ((x_1,),) = sde.residuals, sde.amplitudes, sde.points
    drift, row = sde.ito(w**3)
    assert sp.expand(drift - (-3 * w**2 * r * x_1 + 3 * w * s**2 * x_1**2)) == 0
    assert sp.expand(row[0] - 3 * w**2 * s * x_1) == 0


def test_latex_has_every_parameter_and_can_take_powers():
    text = SymbolicModel(u * v * x**2, [u, v], [x]).latex()
    assert text.count(r"\mathrm{d}W_i") == 2
    assert r"\mathrm{d}u = -\frac{1}{n} \sum_{i} r_i \left(v \left(x^{(i)}\right)^{2}\right) \mathrm{d}t" in text


def test_a_lowered_model_is_its_formula_under_torch_func():
    generator = torch.Generator().manual_seed(0)
    theta = torch.randn(5, 3, generator=generator, dtype=torch.float64)
    X = torch.randn(7, 2, generator=generator, dtype=torch.float64)
    model = UNIT.to_torch()

    def written(at, inputs):
        return at[0] * torch.relu(inputs @ at[1:])

    for at in theta:
        assert torch.allclose(model(at, X), written(at, X), rtol=1e-14, atol=1e-14)
        jacobians = [torch.func.jacrev(f)(at, X) for f in (model, written)]
        assert torch.allclose(*jacobians, rtol=1e-13, atol=1e-13)
        assert torch.allclose(torch.func.jacfwd(model)(at, X), jacobians[1], rtol=1e-13, atol=1e-13)
    batched = torch.func.vmap(model, (0, None))(theta, X)
    assert batched.shape == (5, 7)
    assert torch.equal(model(theta, X), batched)
    assert model(theta.float(), X.float()).dtype == torch.float32
    constant = SymbolicModel(a, [a], [x]).to_torch()
    assert constant(theta[:, :1], X[:, :1]).shape == (5, 7)


def test_the_lowered_model_drives_the_exact_covariance_sde(small):
    symbols = sp.symbols("w1:13", real=True), sp.symbols("x1:13", real=True)
    linear = SymbolicModel(sum(p * q for p, q in zip(*symbols, strict=True)), *symbols).to_torch()
    theta = torch.linspace(-1, 1, 24, dtype=torch.float64).view(2, 12)
    v = torch.linspace(-1, 2, 2 * small.n, dtype=torch.float64).view(2, -1)
    pairs = [ModelSDE(h, small, ExactCovariance(0.1)) for h in (linear, lambda at, X: X @ at)]
    for part, expected in zip(*(sde.f_and_g_prod(0.0, theta, v) for sde in pairs), strict=True):
        assert torch.allclose(part, expected, rtol=1e-12, atol=1e-13)


# One dimension --------------------------------------------------------------------------------------------------------


def test_quartic_well():
    expected = sp.Abs(y) ** (2 * mu / zeta**2 - 2) * sp.exp(-(y**2) / zeta**2)
    assert sp.simplify(WELL.stationary_density() / expected) == 1
    assert sp.simplify(WELL.lyapunov_exponent(0) - (mu - zeta**2 / 2)) == 0


def test_quartic_well_is_a_gamma_law_of_the_square():
    """θ² ~ Gamma(μ/ζ² - ½, scale ζ²): normalisation in closed form and by quadrature, and the mean of θ²."""
    from scipy import integrate, stats

    shape, scale = 1 / 0.36 - 0.5, 0.36
    closed = WELL.normalise(0).subs({mu: 1, zeta: sp.Rational(3, 5)})
    numeric = ScalarSDE(y, y - y**3, 0.6 * y).normalise(0)
    for at in (0.3, 1.0, 1.7):
        law = 2 * at * stats.gamma(shape, scale=scale).pdf(at**2)
        assert float(closed.subs(y, at)) == pytest.approx(law, rel=1e-12)
        assert float(numeric.subs(y, at)) == pytest.approx(law, rel=1e-8)
    both = sp.lambdify(y, ScalarSDE(y, y - y**3, 0.6 * y).normalise(), "numpy")
    mean = 2 * integrate.quad(lambda at: at**2 * both(at), 0, 10)[0]
    assert mean == pytest.approx(shape * scale, rel=1e-8)


def test_ornstein_uhlenbeck_is_gaussian():
    variance = sigma**2 / (2 * lam)
    expected = sp.exp(-(y**2) / (2 * variance)) / sp.sqrt(2 * sp.pi * variance)
    assert sp.simplify(UHLENBECK.normalise() / expected) == 1


@pytest.mark.parametrize(
    "sde",
    [WELL, UHLENBECK, ScalarSDE(y, lam * (mu - y), sigma * sp.sqrt(y)), ScalarSDE(y, -y, sp.sqrt(1 + y**2)),
     ScalarSDE(y, -sp.sin(y), 1), ScalarSDE(y, -mu * y, zeta * y, "stratonovich")],
)  # fmt: skip
def test_no_flux_through_the_stationary_density(sde):
    """b p - ½ (g² p)' = 0 for the Itô form."""
    p, ito = sde.stationary_density(), sde.to_ito()
    flux = (ito.drift * p - sp.diff(ito.diffusion**2 * p, y) / 2) / p
    at = {y: sp.Rational(7, 10), mu: sp.Rational(13, 10), zeta: sp.Rational(4, 5), lam: 2, sigma: sp.Rational(1, 3)}
    assert abs(sp.N(flux.subs(at), 30)) < 1e-20
    assert abs(sp.N(sp.diff(sp.log(p), y).subs(at), 30)) > 1e-3


def test_stratonovich_and_back():
    other = WELL.to_stratonovich()
    assert sp.expand(other.drift - (mu * y - y**3 - zeta**2 * y / 2)) == 0
    assert other.interpretation == "stratonovich"
    assert sp.expand(other.to_ito().drift - WELL.drift) == 0
    assert other.to_stratonovich() is other
    assert WELL.to_ito() is WELL
    assert sp.simplify(other.stationary_density() / WELL.stationary_density()) == 1
    assert sp.expand(other.lyapunov_exponent(0) - WELL.lyapunov_exponent(0)) == 0
    # Read as Stratonovich, geometric Brownian motion without drift stays where it is.
    assert ScalarSDE(y, 0, zeta * y, "stratonovich").lyapunov_exponent(0) == 0
    assert ScalarSDE(y, 0, zeta * y).lyapunov_exponent(0) == -(zeta**2) / 2


def test_lyapunov_exponent_is_the_drift_of_the_logarithm():
    """Away from zero as well: dy = (y - y³) dt + ½(1 - y²) dW at y = 1, b' = -2, g' = -1."""
    assert ScalarSDE(y, y - y**3, (1 - y**2) / 2).lyapunov_exponent(1) == sp.Rational(-5, 2)


def test_a_density_that_has_collapsed_cannot_be_normalised():
    with pytest.raises(ValueError, match="collapses on y = 0"):
        ScalarSDE(y, y - y**3, 2 * y).normalise()
    with pytest.raises(ValueError, match="collapses on y = 0"):
        ScalarSDE(y, y - y**3, sp.sqrt(2) * y).normalise(0, 5)  # the borderline, 1/|y|
    with pytest.raises(ValueError, match="fall off"):
        ScalarSDE(y, y, 1).normalise()
    flat = ScalarSDE(y, 0, 1).normalise(-1, 3)
    assert float(flat) == pytest.approx(0.25, rel=1e-12)


def test_scalar_sde_for_the_simulators():
    sde = WELL.to_stratonovich().to_sde(mu=1.0, zeta=0.5)
    at = torch.tensor([[0.3], [-1.2]], dtype=torch.float64)
    assert torch.allclose(sde.f(0.0, at), at - at**3, rtol=1e-15)
    assert torch.allclose(sde.g(0.0, at), at / 2, rtol=1e-15)
    drift, kick = sde.f_and_g_prod(0.0, at, torch.full_like(at, 3.0))
    assert torch.equal(drift, sde.f(0.0, at))
    assert torch.equal(kick, sde.g_prod(0.0, at, torch.full_like(at, 3.0)))
    assert torch.allclose(kick, 1.5 * at)
    assert (sde.noise_type, sde.sde_type, sde.channels) == ("diagonal", "ito", 1)
    assert sde.f(0.0, at.float()).dtype == torch.float32
    assert UHLENBECK.to_sde(**{"lambda": 2.0, "sigma": 0.1}).g(0.0, at).tolist() == [[0.1], [0.1]]


# Lowering -------------------------------------------------------------------------------------------------------------

EXPRESSIONS = [
    sp.Max(0, x) * y,
    sp.Max(x, y, sp.Rational(1, 10)),
    sp.Min(x, y**2, sp.Rational(1, 10)) - sp.Min(x, 0),
    sp.Max(0, x, y),
    sp.sqrt(2) * x + sp.pi * y - sp.Rational(1, 3) + sp.E,
    x / sp.sqrt(3) - y / 7,
    -x * y / (2 + sp.cos(x)),
    sp.sqrt(x**2 + 1) + (1 + y**2) ** sp.Rational(-1, 3) + 2**x + 1 / sp.sqrt(1 + x**2),
    sp.tanh(x) ** 3 * sp.exp(-(y**2)) + sp.sinh(x) * sp.cosh(y) - sp.sin(x),
    sp.Abs(x) + sp.sign(y) * sp.floor(3 * x) + sp.ceiling(y),
    sp.log(1 + x**2) + sp.atan(x) + sp.asinh(y) + sp.atan2(y, 2) + sp.atan2(1, x) + sp.erf(x),
    sp.Heaviside(x) * y + sp.Heaviside(-y, 1),
    sp.Piecewise((x**2, x < -1), (sp.Rational(1, 3), x < sp.Rational(1, 2)), (y, True)),
    sp.Piecewise((1, sp.And(x > 0, y > 0)), (2, sp.Or(x > 1, sp.Not(y > -1))), (sp.sqrt(2), True)),
    sp.Piecewise((x, sp.Eq(x, 0) | sp.Ne(y, 0)), (0, True)),
    sp.Integer(3),
    sp.sqrt(5) * sp.log(2),
]


@pytest.mark.parametrize("expression", EXPRESSIONS, ids=str)
@pytest.mark.parametrize("cse", [True, False])
def test_lowering_equals_sympy(expression, cse):
    grid = [(s, t) for s in (-1.7, -0.6, 0.2, 0.9, 2.3) for t in (-1.1, -0.4, 0.3, 1.6)]
    at = torch.tensor(grid, dtype=torch.float64)
    shown = to_torch(expression, [x, y], cse=cse)(at[:, 0], at[:, 1])
    assert shown.shape == (20,)
    expected = [float(expression.subs({x: s, y: t})) for s, t in grid]
    assert np.allclose(shown.numpy(), expected, rtol=1e-12, atol=1e-13)
    single = to_torch(expression, [x, y], cse=cse)(at[:, 0].float(), at[:, 1].float())
    assert single.dtype == torch.float32


def test_ties_of_the_relu():
    at = torch.tensor([-1.0, 0.0, 2.0], dtype=torch.float64)
    assert to_torch(sp.Heaviside(x), [x])(at).tolist() == [0, 0, 1]
    assert to_torch(sp.Heaviside(x, 1), [x])(at).tolist() == [0, 1, 1]
    assert to_torch(sp.Heaviside(x, sp.Rational(1, 4)), [x])(at).tolist() == [0, 0.25, 1]
    slope = torch.func.vmap(torch.func.grad(to_torch(relu(x), [x])))(at)
    assert torch.equal(slope, to_torch(sp.diff(relu(x), x), [x])(at))


def test_gradients_through_a_lowered_relu():
    f, df = to_torch(relu(x - y) ** 2 * y, [x, y]), to_torch(sp.diff(relu(x - y) ** 2 * y, y), [x, y])
    s, t = torch.tensor([1.5, -0.5]).double(), torch.tensor([0.4, 0.7]).double().requires_grad_()
    f(s, t).sum().backward()
    assert torch.allclose(t.grad, df(s, t.detach()), rtol=1e-14)
    assert t.grad[0] != 0
    assert t.grad[1] == 0


def test_shapes_and_broadcasting():
    s, t = torch.randn(4, 1, 3, generator=torch.Generator().manual_seed(0)).double(), torch.ones(5, 1).double()
    assert to_torch(x + y, [x, y])(s, t).shape == (4, 5, 3)
    stacked = to_torch([x, y**2, 7], [x, y])(s, t)
    assert stacked.shape == (4, 5, 3, 3)
    assert torch.equal(stacked[..., 0], s.expand(4, 5, 3))
    assert (stacked[..., 2] == 7).all()
    assert to_torch(sp.Matrix([x, y]), [x, y])(s, t).shape == (4, 5, 3, 2)
    matrix = to_torch(sp.Matrix([[x, y, 0], [1, x * y, x]]), [x, y])(s, t)
    assert matrix.shape == (4, 5, 3, 2, 3)
    assert torch.equal(matrix[..., 1, 1], s * t)
    assert torch.equal(to_torch(x + y, [x, y])(s, 2.0), s + 2)  # a plain number follows the tensors
    assert torch.func.vmap(to_torch([x, sp.Piecewise((1, x > 0), (2, True))], [x]))(s).shape == (4, 1, 3, 2)


def test_names_do_not_matter():
    odd = [sp.Symbol(name, real=True) for name in ("lambda", "x_{1}", "unit", "x0", "a1", "torch", "θ²")]
    values = [torch.tensor(0.1 * k + 0.3, dtype=torch.float64) for k in range(7)]
    total = sum(sp.exp(symbol) * symbol for symbol in odd) ** 2 + sum(sp.exp(symbol) * symbol for symbol in odd)
    expected = sum(math.exp(value) * value.item() for value in values)
    assert to_torch(total, odd)(*values).item() == pytest.approx(expected**2 + expected, rel=1e-13)


# Bad input ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (lambda: SymbolicModel(x, [], [x]), "needs parameters"),
        (lambda: SymbolicModel(x * u, [u, x], [x]), "without overlap"),
        (lambda: SymbolicModel(x * u * v, [u], [x]), "v is neither a parameter nor an input"),
        (lambda: UNIT.gradient_flow(0), "at least one"),
        (lambda: SymbolicModel(sp.Symbol("r1") * x, [sp.Symbol("r1")], [x]).gradient_flow(2), "rename that symbol"),
        (lambda: SymbolicModel(sp.Symbol("s1") * x, [sp.Symbol("s1")], [x]).label_noise_sde(2), "rename that symbol"),
        (lambda: UNIT.to_torch()(torch.ones(2), torch.ones(4, 2)), r"give \(..., 3\) and \(n, 2\)"),
        (lambda: UNIT.to_torch()(torch.ones(3), torch.ones(4, 3)), r"give \(..., 3\) and \(n, 2\)"),
        (lambda: ScalarSDE(sp.Symbol("q"), 0, 1), "not declared real"),
        (lambda: ScalarSDE(y, -y, 1, "backward"), "choose 'ito' or 'stratonovich'"),
        (lambda: ScalarSDE(y, -y, 0).stationary_density(), "without noise"),
        (lambda: ScalarSDE(y, sp.exp(sp.sin(y**3)), 1).stationary_density(), "cannot integrate"),
        (lambda: WELL.normalise(1, 1), "low < high"),
        (lambda: WELL.lyapunov_exponent(1), "not invariant"),
        (lambda: WELL.to_sde(mu=1.0), "parameters are mu, zeta"),
        (lambda: WELL.to_sde(mu=1.0, zeta=1.0, eta=2.0), "for nothing else"),
        (lambda: to_torch(x + y, [x]), "y would be left without a value"),
        (lambda: to_torch(x, [x, x]), "listed twice"),
        (lambda: to_torch([], [x]), "at least one"),
        (lambda: to_torch(sp.besselj(0, x), [x]), "besselj has no counterpart"),
        (lambda: to_torch(sp.DiracDelta(x), [x]), "DiracDelta has no counterpart"),
        (lambda: to_torch(sp.I * x, [x]), "not a real number"),
        (lambda: to_torch(x, [x])(), "0 arguments"),
        (lambda: to_torch(x, [x])(2.0), "floating-point tensors"),
        (lambda: to_torch(x, [x])(torch.tensor([1, 2])), "floating-point tensors"),
    ],
)  # fmt: skip
def test_bad_input(fault, message):
    with pytest.raises(ValueError, match=message):
        fault()
