"""The GPU engines against the papers' loops and torchsde, in pieces that are measured once each.

Usage: python benchmarks/gpu.py [--piece NAME ...] [--fresh] [--rounds 5]
       python benchmarks/gpu.py --tiny --device cpu       (does every piece run? nothing is written)

A piece takes less than ten minutes and leaves benchmarks/results/gpu-NAME.json; a piece that has left its file is not
run again without --fresh. Both sides' results are compared before the clock starts, the device has finished before it
stops, and sides that run on the GPU take turns. ``roofline`` in a file holds the fraction reached of each limit: the
seconds a step would take if only that resource were used, at the ceiling measured on the same GPU in the same process.
Another piece is one more function with ``@piece``.
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from diagonal import ETA, QUANTITIES, numpy_loop
from measure import RESULTS, in_turn, row, save, seconds
from torch import Tensor

from nets.diagonal import initial_state, sgd, standard_measurements
from nets.relu import EngineName
from nets.relu import sgd as relu_sgd
from nets.sampling import BatchStream
from simulators.diagonal import integrate_diagonal
from simulators.integrate import integrate
from simulators.noise import BrownianIncrements
from simulators.normals_torch import normal_rows
from simulators.scalar import quartic_well
from theory.device import Repeated, has_triton
from theory.diagonal_sde import DiagonalSDE, to_logs
from theory.minibatch import Minibatch
from theory.normals import fill_rows, normals_key
from theory.problem import gaussian_sparse
from theory.relu_published import two_layer
from theory.schedule import Schedule
from theory.sde import LabelNoise
from theory.trajectory import Probe, linear_grid


@dataclass(frozen=True)
class Bench:
    """Where and how much: ``of(full, tiny)`` is a size, ``finished(run)`` a run whose work is done when it returns."""

    device: torch.device
    tiny: bool
    rounds: int

    def of(self, full: int, tiny: int) -> int:
        return tiny if self.tiny else full

    def finished(self, run: Callable[[], object]) -> Callable[[], object]:
        def waited() -> object:
            result = run()
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)
            return result

        return waited

    def turns(self, runs: Mapping[str, Callable[[], object]]) -> dict[str, list[float]]:
        return in_turn({name: self.finished(run) for name, run in runs.items()}, self.rounds)


@dataclass
class Found:
    """What a piece leaves: comparisons, fractions of a roofline, and sentences on what could not be done."""

    rows: list[dict[str, Any]] = field(default_factory=list)
    roofline: list[dict[str, Any]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


PIECES: dict[str, Callable[[Bench], Found]] = {}


def piece(function: Callable[[Bench], Found]) -> Callable[[Bench], Found]:
    """Make a function a piece, by its name."""
    PIECES[function.__name__] = function
    return function


@functools.cache
def ceilings(bench: Bench) -> dict[str, float]:
    """Bytes a second of memory and L2 cache, multiply-adds a second in registers and in matrix products, float64.

    A loop whose rows of X come from the caches below L2 can reach more than 1 of the L2 limit; it then does not bind.
    """
    on: dict[str, Any] = {"dtype": torch.float64, "device": bench.device}
    found = {}
    for name, size in (("memory, B/s", bench.of(2**27, 2**12)), ("L2 cache, B/s", bench.of(2**19, 2**10))):
        a, b, c = (torch.ones(size, **on) for _ in range(3))
        triad = Repeated(functools.partial(torch.add, b, c, out=a), bench.device)
        times = bench.of(640, 2)  # twenty graphs of 32
        found[name] = 24.0 * size * times / _least(bench, functools.partial(triad, times))
    side = bench.of(8192, 64)
    left, right, out = (torch.ones(side, side, **on) for _ in range(3))
    found["matrix multiply-adds/s"] = side**3 / _least(bench, lambda: torch.mm(left, right, out=out))
    if has_triton(bench.device):
        from gpu_kernels import multiply_adds

        values, times = torch.ones(2**22, **on), 2**12
        found["multiply-adds/s"] = values.numel() * times / _least(bench, lambda: multiply_adds(values, times))
    return found


def _least(bench: Bench, run: Callable[[], object]) -> float:
    """Seconds of the fastest of ten, after one that compiles."""
    bench.finished(run)()
    return min(seconds(bench.finished(run)) for _ in range(10))


def reached(bench: Bench, loop: str, unit: str, took: float, counts: Mapping[str, float]) -> dict[str, Any]:
    """The roofline entry of a loop that takes ``took`` seconds a unit, by what a unit needs of each resource."""
    measured = ceilings(bench)
    limits = {name: count / measured[name] for name, count in counts.items() if name in measured}
    return {
        "loop": loop, "unit": unit, "seconds": took, "counts": dict(counts), "ceilings": measured, "limits": limits,
        "fraction": {name: limit / took for name, limit in limits.items()},
    }  # fmt: skip


@piece
def noise(bench: Bench) -> Found:
    """Standard normals: equal to the CPU's, and how fast beside torch.randn on the same device."""
    key, steps, numbers = normals_key(0, "gpu benchmark"), bench.of(256, 2), bench.of(2**18, 2**10)
    here, cpu = normal_rows(key, 3, 2, 2**10, bench.device).cpu().numpy(), np.empty((2, 2**10))
    fill_rows(key, 3, cpu)
    assert np.abs(here - cpu).max() < 1e-14, "the device's noise is not the CPU's"
    generator = torch.Generator(bench.device).manual_seed(0)
    on: dict[str, Any] = {"dtype": torch.float64, "device": bench.device, "generator": generator}
    runs = {
        "here": lambda: normal_rows(key, 0, steps, numbers, bench.device),
        "torch": lambda: torch.randn(steps, numbers, **on),
    }
    sums = [float(run().square().mean()) for run in runs.values()]  # compiles, and both are of variance 1
    assert all(abs(s - 1) < 5 * (2 / (steps * numbers)) ** 0.5 for s in sums), "a variance is not 1"
    taken = {name: [t / (steps * numbers) for t in times] for name, times in bench.turns(runs).items()}
    work = f"standard normals equal to the CPU's, float64, {steps} x {numbers}"
    result = Found([row(work, "torch.randn", taken["torch"], taken["here"], (sums[1], sums[0]), "normal")])
    result.roofline = [reached(bench, "normals", "normal", min(taken["here"]), {"memory, B/s": 8.0})]
    return result


@piece
def diagonal(bench: Bench) -> Found:
    """Diagonal SGD against the published numpy loop on the host, per seed-step, at full occupancy."""
    host, steps, replicates = gaussian_sparse(80, 200, 20), bench.of(100_001, 200), bench.of(8448, 4)
    problem, seeds, result = host.to(bench.device), range(replicates), Found()
    index, measure = BatchStream(host.n, Minibatch(), [0], 0).block(steps)[0, :, 0], standard_measurements(problem)
    for what, at in (("", torch.empty(0)), (", five quantities at the published 348 points", linear_grid(steps))):
        probes = {name: Probe(measure[name], at, at_once=True) for name in QUANTITIES} if len(at) else {}
        run = functools.partial(
            sgd, problem, initial_state(problem), [Schedule(ETA)], steps, seeds=seeds, probes=probes
        )
        ours, (w, seen) = run(), numpy_loop(host, index, at.long().numpy())
        gap = float(np.abs(ours.final.w[0, 0].cpu().numpy() - w).max())
        assert gap < 1e-9, f"the two disagree by {gap}"
        if len(at):
            mine = np.stack([series.values[:, 0, 0].cpu().numpy() for series in ours.series.values()], 1)
            assert np.allclose(mine[:, :-1], np.array(seen)[:, :-1], rtol=1e-9), "their measured quantities disagree"
        sums = float(w.sum()), float(ours.final.w[0, 0].sum())
        del ours
        loop = functools.partial(numpy_loop, host, index, at.long().numpy())
        taken = bench.turns({"numpy": loop, "here": run})
        theirs = [t / steps for t in taken["numpy"]]
        here = [t / steps / replicates for t in taken["here"]]
        work = f"diagonal SGD, n=80, d=200, {replicates} seeds{what}"
        result.rows.append(row(work, "published numpy loop on the host, one seed", theirs, here, sums, "seed-step"))
        if not len(at):  # per coordinate: ηr·x, two updates, a², -b², the sum over x
            counts = {"multiply-adds/s": 6.0 * 200, "L2 cache, B/s": 8.0 * 200}
            result.roofline.append(reached(bench, work, "seed-step", min(here), counts))
    return result


@piece
def label_noise_sde(bench: Bench) -> Found:
    """The diagonal network's label-noise SDE against torchsde and the generic integrator, all on the same device."""
    host, dt, eta, paths = gaussian_sparse(80, 200, 20), 0.1, 0.1, bench.of(8448, 16)
    few, steps, theirs = bench.of(64, 4), bench.of(512, 8), bench.of(64, 8)
    problem, covariance, result = host.to(bench.device), LabelNoise(eta), Found()
    sde = DiagonalSDE(problem, covariance)
    y0 = to_logs(initial_state(problem)).repeat(paths, 1)

    def increments() -> BrownianIncrements:
        return BrownianIncrements(0, "bench", paths, problem.n, device=bench.device)

    def here(count: int) -> Tensor:
        return integrate_diagonal(problem, covariance, y0, dt, count, increments()).final

    cpu_noise = BrownianIncrements(0, "bench", few, host.n)
    on_cpu = integrate_diagonal(host, covariance, y0[:few].cpu(), dt, theirs, cpu_noise).final
    assert torch.allclose(here(theirs)[:few].cpu(), on_cpu, rtol=1e-9, atol=1e-9), "not the paths of the CPU"
    peers = {"the generic integrator here": lambda: integrate(sde, y0, dt, theirs, increments()).final}
    peers |= _torchsde(bench, sde, y0, dt, theirs, result.notes)
    reference = here(theirs).mean(1)
    for name, peer in peers.items():
        sample = peer().mean(1)
        error = 5 * float((reference.var() + sample.var()) ** 0.5) / paths**0.5
        assert abs(float(reference.mean() - sample.mean())) < error + 1e-12, f"{name} has another law"
        taken = bench.turns({"theirs": peer, "here": lambda: here(steps)})
        each = {"theirs": [t / theirs for t in taken["theirs"]], "here": [t / steps for t in taken["here"]]}
        work = f"diagonal label-noise SDE, n=80, d=200, {paths} paths"
        sums = float(sample.mean()), float(reference.mean())
        result.rows.append(row(work, f"{name}, same device", each["theirs"], each["here"], sums, "step"))
        counts = {"matrix multiply-adds/s": 2.0 * 80 * 200, "L2 cache, B/s": 8.0 * 6 * 200}  # logs: two reads, a write
        result.roofline = [reached(bench, work, "path-step", min(each["here"]) / paths, counts)]
    return result


def _torchsde(
    bench: Bench, sde: DiagonalSDE, y0: Tensor, dt: float, steps: int, notes: list[str]
) -> dict[str, Callable[[], Tensor]]:
    """torchsde at its best safe setting, where it is installed."""
    try:
        import torchsde
    except ImportError:
        notes.append("torchsde is not installed, so it was not compared: pip install torchsde.")
        return {}
    from sde import ForTorchsde

    def run() -> Tensor:
        bm = torchsde.BrownianInterval(
            0.0, dt * steps, (len(y0), sde.channels), dtype=y0.dtype, device=bench.device, dt=dt, entropy=0
        )
        ts = torch.tensor([0.0, dt * steps], dtype=torch.float64)
        with torch.random.fork_rng(devices=[bench.device] if bench.device.type == "cuda" else []):
            return torchsde.sdeint(ForTorchsde(sde), y0, ts, bm=bm, dt=dt, method="euler")[-1]

    return {"torchsde, g_prod and BrownianInterval(dt=dt)": run}


@piece
def relu(bench: Bench) -> Found:
    """ReLU teacher-student SGD replayed as a graph against the same steps one by one, on the same device."""
    published = two_layer()
    problem, start = published.problem.to(bench.device), published.start.to(bench.device)
    steps, replicates = bench.of(1024, 64), bench.of(4096, 4)

    def run(engine: EngineName) -> Tensor:
        seeds = range(replicates)
        return relu_sgd(
            published.network, problem, start, published.schedules[:1], steps, seeds=seeds, engine=engine
        ).final

    ours, theirs = run("replayed"), run("literal")
    assert torch.allclose(ours, theirs, rtol=1e-6, atol=1e-9), "the two disagree"
    taken = bench.turns({"theirs": lambda: run("literal"), "here": lambda: run("replayed")})
    each = {name: [t / steps / replicates for t in times] for name, times in taken.items()}
    sums = float(theirs.mean()), float(ours.mean())
    work = f"ReLU teacher-student SGD, {replicates} seeds"
    return Found([row(work, "the same steps one by one, same device", each["theirs"], each["here"], sums, "seed-step")])


@piece
def well(bench: Bench) -> Found:
    """The quartic well against a loop over steps in torch on the same device."""
    mu, h, levels = 1.5, 0.0025, np.array([1.0, 1.8, 2.5])
    walkers, steps = bench.of(2**16, 64), bench.of(2000, 50)
    start = 2 * np.random.default_rng(0).standard_normal(walkers)
    noise_levels = torch.tensor(levels, device=bench.device).unsqueeze(1)
    generator = torch.Generator(bench.device).manual_seed(0)

    def here() -> np.ndarray:
        return quartic_well(mu, levels, start, h, [steps], 0, "gpu bench", "euler", device=bench.device)[0]

    def loop() -> np.ndarray:
        theta = torch.tensor(start, device=bench.device).repeat(len(levels), 1)
        for _ in range(steps):
            xi = torch.randn(theta.shape, generator=generator, dtype=theta.dtype, device=bench.device)
            theta = theta * (1 + h * (mu - theta.square()) + noise_levels * h**0.5 * xi)
        return theta.cpu().numpy()

    a, b = (np.log(np.abs(run()) + 1e-30) for run in (here, loop))
    error = 5 * np.sqrt(a.var(-1) / walkers + b.var(-1) / walkers)
    assert (np.abs(a.mean(-1) - b.mean(-1)) < error).all(), "the two have different laws"
    cpu = quartic_well(mu, levels, start[:64], h, [50], 0, "gpu bench", "euler")
    same = quartic_well(mu, levels, start[:64], h, [50], 0, "gpu bench", "euler", device=bench.device)
    assert np.allclose(same, cpu, rtol=1e-10), "not the paths of the CPU"
    taken = bench.turns({"theirs": loop, "here": here})
    each = {name: [t / (len(levels) * walkers * steps) for t in times] for name, times in taken.items()}
    work = f"quartic well, Euler, {len(levels)} levels x {walkers} walkers x {steps} steps"
    sums = float(b.mean()), float(a.mean())
    return Found([row(work, "torch loop over steps, same device", each["theirs"], each["here"], sums, "path and step")])


def measure_pieces(names: Iterable[str], bench: Bench, fresh: bool) -> None:
    """Run what is not done yet; keep it, unless it is a tiny trial."""
    for name in names:
        done = RESULTS / f"gpu-{name}.json"
        if done.exists() and not fresh and not bench.tiny:
            print(f"{name}: done already, in {done.name}; --fresh runs it again")
            continue
        print(f"{name}: {PIECES[name].__doc__}")
        found = PIECES[name](bench)
        if bench.tiny:
            for compared in found.rows:
                print(f"  {compared['work']}: agrees with {compared['peer']}, checksums {compared['checksum']}")
            print("  nothing is kept of a trial", *found.notes, sep="\n  ")
        else:
            save(f"gpu-{name}", found.rows, roofline=found.roofline, notes=found.notes)


def main() -> None:
    """Measure what is asked for and not done."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--piece", nargs="+", choices=list(PIECES), default=list(PIECES))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true", help="sizes that say nothing, to see that the pieces run")
    parser.add_argument("--fresh", action="store_true", help="run pieces that are done again")
    options = parser.parse_args()
    device = torch.device(options.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        parser.error("there is no CUDA device here: give --tiny --device cpu to see that the pieces run")
    if device.type != "cuda" and not options.tiny:
        parser.error("only a CUDA device is measured: give --tiny to see that the pieces run on another")
    measure_pieces(options.piece, Bench(device, options.tiny, 1 if options.tiny else options.rounds), options.fresh)


if __name__ == "__main__":
    main()
