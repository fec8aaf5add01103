"""Training on images: equal to torch's SGD and to nets.training, exact resume, dated divergence, bad input."""

import copy
import dataclasses
import re

import pytest
import torch
from torch import nn

from nets.augment import Augmentation
from nets.averaging import estimate_statistics
from nets.checkpoint import Checkpoints
from nets.image_seeds import ensemble, train_seeds
from nets.image_training import Moment, loss_and_accuracy, train_images
from nets.images import digits
from nets.label_noise import FreshNoise, fresh_batch_flips, noisy_targets
from nets.mlp import mlp
from nets.objective import CROSS_ENTROPY, SQUARED, Loss, Objective
from nets.recipe import Recipe
from nets.replicas import Epochs
from nets.resnet import resnet
from nets.training import Batches, train
from theory.minibatch import Minibatch
from theory.schedule import Schedule
from theory.schedule_shapes import Cosine
from theory.trajectory import Probe

DATA = digits(60).subset(60, 40)
EXACT = Recipe(Schedule(0.1, ((0.5, 4.0),)), 12, batch_size=8, precision="float64", loss=SQUARED)


def small(norm="none", seed=0):
    return resnet((2,), (1,), norm=norm, seed=seed)


def recipe(**changes):
    return dataclasses.replace(EXACT, **changes)


def weights(module):
    return torch.cat([p.detach().flatten() for p in module.parameters()])


def every(steps, function=lambda m: weights(m.module)):
    return {"θ": Probe(function, torch.arange(steps + 1))}


@pytest.mark.parametrize("norm", ["none", "batch"])
@pytest.mark.parametrize(("momentum", "decay"), [(0.0, 0.0), (0.9, 0.01)])
def test_it_is_torchs_sgd_on_the_same_batches(norm, momentum, decay):
    module, twin = small(norm), small(norm).train()
    chosen = recipe(momentum=momentum, weight_decay=decay, augmentation=Augmentation(1, True, 2))
    run = train_images(module, DATA, chosen, seed=3, probes=every(12))
    assert torch.equal(weights(module), weights(small(norm)))  # the one given is not changed
    draws, optimizer = Epochs(60, 8, [3], drop_rest=True), torch.optim.SGD(twin.parameters(), 1.0, momentum)
    for k, eta in enumerate(chosen.schedule.step_sizes(12).tolist()):
        assert torch.allclose(run["θ"].values[k], weights(twin), rtol=0, atol=1e-12)
        rows = draws(k)[0]
        x = chosen.augmentation(DATA.train_x[rows], k, seed=3)
        loss = SQUARED.values(twin(x), DATA.train_y[rows]).mean()
        loss = loss + decay / 2 * sum(p.square().sum() for p in twin.parameters())
        optimizer.param_groups[0]["lr"] = eta
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert torch.allclose(run["θ"].values[-1], weights(twin), rtol=0, atol=1e-12)
    assert (run.step, run.finished, run.first_bad_step) == (12, True, -1)
    for (name, b), other in zip(run.module.named_buffers(), twin.buffers(), strict=True):
        assert torch.allclose(b.double(), other.double(), atol=1e-12), name


def test_with_replacement_it_is_the_batched_training_of_small_networks():
    net = mlp((64, 4, 10))
    chosen = recipe(sampling="replacement", momentum=0.5)
    run = train_images(net, DATA, chosen, seed=7)
    objective = Objective(net, DATA.train_x, DATA.train_y, SQUARED)
    flat = train(objective, weights(net), [chosen.schedule], 12, seeds=[7], batch=Minibatch(8), momentum=0.5)
    assert torch.allclose(weights(run.module), flat.final.theta[0, 0], rtol=0, atol=1e-13)


def test_decoupled_weight_decay_acts_on_weights_alone():
    net, decay = mlp((64, 4, 10)), 0.3
    run = train_images(net, DATA, recipe(weight_decay=decay, decoupled=True, momentum=0.9, steps=2))
    twin = copy.deepcopy(net)
    mass = [torch.zeros_like(p) for p in twin.parameters()]
    draws = Epochs(60, 8, [0], drop_rest=True)
    for k, eta in enumerate(EXACT.schedule.step_sizes(2).tolist()):
        rows = draws(k)[0]
        loss = SQUARED.values(twin(DATA.train_x[rows]), DATA.train_y[rows]).mean()
        gradients = torch.autograd.grad(loss, twin.parameters())
        with torch.no_grad():
            for p, m, g in zip(twin.parameters(), mass, gradients, strict=True):
                m.mul_(0.9).add_(g)
                p.copy_((1 - eta * decay) * p - eta * m)
    assert torch.allclose(weights(run.module), weights(twin), rtol=0, atol=1e-13)


@pytest.mark.parametrize("kind", ["any class", "different class", "gaussian"])
def test_label_noise_reaches_the_loss(kind):
    seen = []

    def spy(outputs, targets):
        seen.append(targets.clone())
        return SQUARED.values(outputs, targets)

    noise = FreshNoise(kind, 0.5)
    train_images(small(), DATA, recipe(loss=Loss("spy", spy), label_noise=noise, steps=3), seed=5)
    rows = Epochs(60, 8, [5], drop_rest=True)
    for k, targets in enumerate(seen):
        assert torch.equal(targets, noise(DATA.train_y[rows(k)[0]], 10, k, seed=5, dtype=torch.float64))
    clean = DATA.train_y[rows(0)[0]]
    assert not torch.equal(seen[0] if kind != "gaussian" else seen[0].argmax(1) * 0, clean)
    assert torch.equal(FreshNoise("any class", 0.5)(clean, 10, 1), fresh_batch_flips(clean, 0.5, 10, 1))
    assert torch.equal(FreshNoise("gaussian", 0.1)(clean, 10, 1), noisy_targets(clean, 0.1, 10, 1))


def test_soft_targets_and_labels_have_one_loss():
    outputs = torch.linspace(-2, 2, 30, dtype=torch.float64).view(3, 10).sin()
    labels = torch.tensor([0, 4, 9])
    hot = nn.functional.one_hot(labels, 10).double()
    for loss in (SQUARED, CROSS_ENTROPY):
        assert torch.allclose(loss.values(outputs, hot), loss.values(outputs, labels), atol=1e-15)


def test_the_average_is_what_its_formula_says_and_its_statistics_are_re_estimated():
    tau = 0.8
    probes = every(12) | {"mean": Probe(lambda m: weights(m.average), torch.tensor([0, 5, 12]))}
    run = train_images(small("batch"), DATA, recipe(averaging=tau), probes=probes)
    mean, expected = run["θ"].values[0], {}
    for k, theta in enumerate(run["θ"].values):
        mean = tau * mean + (1 - tau) * theta if k else theta
        expected[k] = mean
    assert torch.allclose(run["mean"].values, torch.stack([expected[k] for k in (0, 5, 12)]), rtol=0, atol=1e-13)
    again = copy.deepcopy(run.average)
    for part in again.modules():
        if isinstance(part, nn.BatchNorm2d):
            part.reset_running_stats()
    estimate_statistics(again, DATA.train_x, 8)
    for one, other in zip(run.average.buffers(), again.buffers(), strict=True):
        assert torch.equal(one, other)
    norms = [part for part in again.modules() if isinstance(part, nn.BatchNorm2d)]
    stem = torch.stack([again[0](x).mean((0, 2, 3)) for x in DATA.train_x[:56].split(8)]).mean(0)
    assert torch.allclose(norms[0].running_mean, stem, atol=1e-12)


@pytest.mark.parametrize("norm", ["none", "batch"])
def test_divergence_is_dated_exactly_and_the_last_finite_state_kept(norm):
    steps, explode = 40, 17

    class Growing:
        label = "small, then far too large"

        def step_sizes(self, steps):
            sizes = torch.full((steps,), 0.05, dtype=torch.float64)
            sizes[explode:] = 1e30
            return sizes

    chosen = recipe(schedule=Growing(), steps=steps, precision="float32", momentum=0.9)
    flat = every(steps)
    run = train_images(small(norm), DATA, chosen, probes=flat)
    alone = train_images(small(norm), DATA, chosen)  # nothing looks at the flag before the end
    theta = run["θ"].values
    assert explode < run.first_bad_step < explode + 4
    for found in (run, alone):
        assert (found.step, found.finished, found.first_bad_step) == (run.first_bad_step, True, run.first_bad_step)
        assert torch.equal(weights(found.module).double(), theta[run.first_bad_step])
        assert torch.isfinite(weights(found.module)).all()
    assert torch.isfinite(theta[: run.first_bad_step + 1]).all()
    assert torch.isnan(theta[run.first_bad_step + 1 :]).all()
    if norm == "none":  # a literal run finds the same step
        with pytest.raises(FloatingPointError, match=f"at {run.first_bad_step}$"):
            _literal(small(norm).float().train(), chosen)


def _literal(module, chosen):
    data, draws = DATA.to(dtype=torch.float32), Epochs(60, 8, [0], drop_rest=True)
    optimizer = torch.optim.SGD(module.parameters(), 1.0, chosen.momentum)
    for k, eta in enumerate(chosen.schedule.step_sizes(chosen.steps).tolist()):
        rows = draws(k)[0]
        loss = SQUARED.values(module(data.train_x[rows]), data.train_y[rows]).mean()
        optimizer.param_groups[0]["lr"] = eta
        optimizer.zero_grad()
        loss.backward()
        norm = torch.stack([p.grad.double().norm() for p in module.parameters()]).norm()
        if not max(loss.double(), norm) < 1.8e19:
            raise FloatingPointError(f"at {k}")
        optimizer.step()


def test_precisions_and_layouts_agree_to_their_rounding():
    exact = train_images(small(), DATA, recipe())
    chosen = recipe(precision="float32")
    single = train_images(small(), DATA, chosen)
    nhwc = train_images(small(), DATA, recipe(precision="float32", channels_last=True, deterministic=True))
    half = train_images(small(), DATA, recipe(precision="bfloat16"))
    scale = weights(exact.module).norm()
    for run, least, most in ((single, 0.0, 1e-5), (nhwc, 0.0, 1e-5), (half, 1e-6, 1e-2)):
        assert weights(run.module).dtype == torch.float32
        assert least <= float((weights(run.module).double() - weights(exact.module)).norm() / scale) < most
    assert not torch.are_deterministic_algorithms_enabled()
    again = train_images(small(), DATA, chosen)
    assert torch.equal(weights(again.module), weights(single.module))


def test_probes_see_the_state_and_leave_the_run_as_it_is():
    seen = []

    def probe(moment: Moment):
        assert not moment.module.training
        assert moment.average is None
        seen.append(moment.step)
        loss = SQUARED.values(moment.module(DATA.test_x), DATA.test_y).mean()
        loss.backward()  # leaves gradients behind
        return loss

    at = torch.tensor([0, 3, 12])
    run = train_images(small("batch"), DATA, recipe(), probes={"loss": Probe(probe, at)})
    assert seen == [0, 3, 12]
    assert torch.equal(weights(run.module), weights(train_images(small("batch"), DATA, recipe()).module))
    value = loss_and_accuracy(run.module, DATA.test_x, DATA.test_y, SQUARED, chunk=7)
    assert float(run["loss"].values[-1]) == pytest.approx(float(value[0]), rel=1e-12)
    right = (run.module(DATA.test_x).argmax(1) == DATA.test_y).double().mean()
    assert float(value[1]) == pytest.approx(float(right))
    with pytest.raises(ValueError, match="choose among loss"):
        run["accuracy"]


def test_seeds_make_an_ensemble(tmp_path):
    probes = {"θ": Probe(lambda m: weights(m.module), torch.tensor([0, 12]))}
    runs = train_seeds(lambda seed: small(seed=seed), DATA, recipe(), [4, 9], folder=tmp_path, probes=probes)
    trajectory = ensemble(runs)
    assert trajectory.dims == ("seed",)
    assert trajectory["θ"].values.shape == (2, 2, len(weights(small())))
    alone = train_images(small(seed=9), DATA, recipe(), seed=9)
    assert torch.equal(trajectory["θ"].values[1, 1], weights(alone.module))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["seed-4.pt", "seed-9.pt"]
    late = {"θ": Probe(lambda m: weights(m.module), torch.tensor([10, 12]))}
    wild = train_images(small(), DATA, recipe(schedule=Schedule(1e30), precision="float32"), probes=late)
    calm = train_images(small(), DATA, recipe(), probes=late)
    mixed = ensemble([wild, calm])
    assert mixed.finite.tolist() == [False, True]
    assert torch.isnan(mixed["θ"].values[:, 0]).all()
    with pytest.raises(ValueError, match="call train_seeds again"):
        ensemble([])


def test_steps_of_an_epoch():
    assert Recipe.per_epoch(DATA, 8) == 7
    with pytest.raises(ValueError, match="choose 1 to 60"):
        Recipe.per_epoch(DATA, 61)
    drawn = torch.cat([Epochs(60, 8, [0], drop_rest=True)(k)[0] for k in range(7)])
    assert len(drawn.unique()) == 56
    assert Batches(60, Minibatch(8), [0])(0).shape == (1, 8)


class Wasteful(nn.Module):
    def __init__(self, fault=torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")):  # noqa: B008
        super().__init__()
        self.inner, self.calls, self.fault = mlp((64, 3, 10)), 0, fault

    def forward(self, x):
        self.calls += self.training
        if self.calls > 6:
            raise self.fault
        return self.inner(x)


def test_out_of_memory_is_one_sentence_and_loses_nothing(tmp_path):
    places = Checkpoints(tmp_path / "run.pt", every=4)
    sentence = re.escape("no memory left at step 6 (the run is kept up to step 6): choose a smaller batch")
    with pytest.raises(MemoryError, match=sentence):
        train_images(Wasteful(), DATA, recipe(), checkpoints=places)
    whole = train_images(mlp((64, 3, 10)), DATA, recipe())
    roomy = Wasteful()
    roomy.calls = -100
    assert torch.equal(weights(train_images(roomy, DATA, recipe(), checkpoints=places).module), weights(whole.module))
    on_cpu = RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes.")
    with pytest.raises(MemoryError, match="no checkpoint was written yet"):
        train_images(Wasteful(on_cpu), DATA, recipe())
    with pytest.raises(RuntimeError, match="something else"):
        train_images(Wasteful(RuntimeError("something else")), DATA, recipe())


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"steps": -1}, "give steps >= 0"),
        ({"batch_size": 0}, "1 or more images"),
        ({"sampling": "shuffle"}, "choose 'epochs' or 'replacement'"),
        ({"momentum": 1.0}, "choose a number in [0, 1)"),
        ({"averaging": -0.1}, "choose a number in [0, 1)"),
        ({"weight_decay": float("nan")}, "choose a number >= 0"),
        ({"precision": "float16"}, "choose float32, bfloat16 or float64"),
    ],
)
def test_bad_recipes(changes, sentence):
    with pytest.raises(ValueError, match=re.escape(sentence)):
        recipe(**changes)


def test_bad_input():
    frozen = mlp((64, 3, 10)).requires_grad_(False)
    for module, sentence in (
        (frozen, "set requires_grad on some"),
        (nn.Sequential(mlp((64, 3, 10)), nn.Dropout(0.5)), "set its p to 0"),
        (mlp((64, 3, 4)), "return one output a class"),
    ):
        with pytest.raises(ValueError, match=sentence):
            train_images(module, DATA, recipe())
    for probe, sentence in (
        (Probe(lambda m: 0, torch.tensor([13])), "ascend between 0 and 12"),
        (Probe(lambda m: 0, torch.tensor([1]), torch.ones(1)), "leave weights out"),
    ):
        with pytest.raises(ValueError, match=sentence):
            train_images(small(), DATA, recipe(), probes={"x": probe})
    with pytest.raises(ValueError, match="choose 1 to 60"):
        train_images(small(), DATA, recipe(batch_size=64))
    with pytest.raises(ValueError, match="give checkpoints"):
        train_images(small(), DATA, recipe(), seconds=1.0)
    with pytest.raises(ValueError, match="there is no label noise 'none'"):
        FreshNoise("none", 0.1)
    with pytest.raises(ValueError, match="from 0 to 1"):
        FreshNoise("any class", 1.1)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("compiled", [False, True])
def test_a_gpu_is_never_waited_for_and_gives_the_cpus_numbers(compiled):
    from nets.image_training import _Run

    data, steps = DATA.to("cuda", torch.float32), 20
    noise, augmentation = FreshNoise("any class", 0.2), Augmentation(1, True, 2)
    exact = recipe(
        steps=steps, momentum=0.9, weight_decay=0.01, averaging=0.9, augmentation=augmentation, label_noise=noise
    )
    on_gpu = train_images(small(), data, exact)
    on_cpu = train_images(small(), DATA, exact)
    assert torch.allclose(weights(on_gpu.module).cpu(), weights(on_cpu.module), rtol=0, atol=1e-10)
    fast = dataclasses.replace(
        exact, precision="bfloat16", channels_last=True, compile=compiled, decoupled=True, sampling="replacement"
    )
    run = _Run(small("batch"), data, fast, 0, 0, {}, None)
    run.module.train()
    for k in range(steps):
        torch.cuda.set_sync_debug_mode("error" if k > 3 else "default")  # compilation and first calls may wait
        try:
            run._advance()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        run.step += 1
    assert not run._has_diverged()


@pytest.mark.slow
def test_compiled_training_is_the_same_training():
    plain = train_images(small("batch"), DATA, recipe())
    compiled = train_images(small("batch"), DATA, recipe(compile=True))
    assert torch.allclose(weights(compiled.module), weights(plain.module), rtol=0, atol=1e-10)


@pytest.mark.slow
def test_a_cosine_run_learns_the_digits():
    data = digits(1500, dtype=torch.float32)
    chosen = Recipe(Cosine(0.05, warmup=0.1), 600, batch_size=64, momentum=0.9, averaging=0.98)
    run = train_images(resnet((8, 16), dtype=torch.float32), data, chosen)
    assert loss_and_accuracy(run.average, data.test_x, data.test_y, CROSS_ENTROPY)[1] > 0.95
