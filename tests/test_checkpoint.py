"""Checkpoints: a run killed at any moment goes on as if it had not been, files are whole or refused in one sentence."""

import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from nets.augment import Augmentation
from nets.checkpoint import CheckpointError, Checkpoints, digest, read, start_from, write
from nets.image_training import train_images
from nets.images import ImageSet
from nets.objective import SQUARED
from nets.recipe import Recipe
from nets.resnet import resnet
from theory.schedule import Schedule
from theory.streams import named_generator
from theory.trajectory import Probe

ROOT = Path(__file__).parent.parent


def noise_images(seed=0):
    """40 training and 20 test images of nothing: made without reading any file."""
    draw = named_generator(seed, "noise images")
    x = torch.from_numpy(draw.standard_normal((60, 1, 6, 6)))
    y = torch.from_numpy(draw.integers(0, 10, 60))
    return ImageSet(x[:40], y[:40], x[40:], y[40:], 10, "noise")


DATA = noise_images()
RECIPE = Recipe(
    Schedule(0.1), 12, batch_size=8, momentum=0.9, averaging=0.9, augmentation=Augmentation(1), precision="float64"
)


def small(seed=0, width=2):
    return resnet((width,), (1,), norm="batch", seed=seed)


def same(one, other):
    pairs = zip(one.module.state_dict().values(), other.module.state_dict().values(), strict=True)
    averages = zip(one.average.state_dict().values(), other.average.state_dict().values(), strict=True)
    series = ((one[name].values, other[name].values) for name in one.series)
    for a, b in (*pairs, *averages, *series):
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)
    return one.step == other.step


# One process imports everything, then forks a run again and again and kills it at random, until it gets through.
KILLER = """
import dataclasses, os, pathlib, random, signal, sys, time
from tests.test_checkpoint import DATA, RECIPE, Checkpoints, Probe, same, small, torch, train_images
torch.set_num_threads(1)
torch.optim.SGD(small().parameters(), 0.1)  # imports what it needs
folder, wanted = pathlib.Path(sys.argv[1]), int(sys.argv[2])
recipe = dataclasses.replace(RECIPE, steps=30)
probes = {"loss": Probe(lambda m: m.average(DATA.test_x[:9]).square().sum().detach(), torch.arange(0, 31, 3))}
def run(places):
    return train_images(small(), DATA, recipe, probes=probes, checkpoints=places)
alone, start = run(None), time.perf_counter()
run(Checkpoints(folder / "timed.pt", 2))
taken, draw, kills, found, rounds = time.perf_counter() - start, random.Random(0), 0, set(), 0
while kills < wanted:
    places = Checkpoints(folder / f"{rounds}.pt", 2, (12,))
    while True:
        child = os.fork()
        if not child:
            run(places)
            os._exit(0)
        time.sleep(draw.uniform(0, taken))
        os.kill(child, signal.SIGKILL)
        if os.waitpid(child, 0)[1] == 0:
            break
        kills += 1
        found.add(torch.load(places.path)["step"] if places.path.exists() else -1)
        if kills > 3 * wanted:
            run(places)
            break
    assert same(alone, run(places))
    assert places.at(12).exists()
    rounds += 1
print(rounds, kills, len(found - {-1, 30}))
"""


def killed(folder, wanted):
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    shown = subprocess.run(
        [sys.executable, "-c", KILLER, str(folder), str(wanted)],
        capture_output=True, text=True, cwd=ROOT, env=environment, timeout=500,
    )  # fmt: skip
    assert shown.returncode == 0, shown.stderr
    rounds, kills, places = map(int, shown.stdout.split())
    assert rounds >= 1
    assert kills >= wanted
    return places


def test_killed_a_few_times(tmp_path):
    assert killed(tmp_path, 4) >= 1


@pytest.mark.slow
def test_killed_many_times(tmp_path):
    assert killed(tmp_path, 100) >= 10


def test_a_time_limit_ends_a_run_that_then_goes_on(tmp_path):
    probes = {"θ": Probe(lambda m: next(m.module.parameters()).detach().clone(), torch.tensor([0, 2, 4]))}
    short = dataclasses.replace(RECIPE, steps=4)
    whole, calls = train_images(small(), DATA, short, probes=probes), 0
    while True:
        part = train_images(
            small(), DATA, short, probes=probes, checkpoints=Checkpoints(tmp_path / "a.pt"), seconds=0.0
        )
        calls += 1
        if part.finished:
            break
        assert part.step == calls
        assert read(tmp_path / "a.pt")["step"] == calls
    assert calls == 4
    assert same(part, whole)


def test_a_finished_run_is_not_run_again(tmp_path):
    places = Checkpoints(tmp_path / "deep" / "run.pt", 5)
    first = train_images(small(), DATA, RECIPE, checkpoints=places)
    before = places.path.read_bytes()
    again = train_images(small(), DATA, RECIPE, checkpoints=places)
    assert same(first, again)
    assert places.path.read_bytes() == before
    assert [path.name for path in places.path.parent.iterdir()] == ["run.pt"]


def test_a_diverged_run_stays_diverged(tmp_path):
    places = Checkpoints(tmp_path / "run.pt", 5)
    wild = dataclasses.replace(RECIPE, schedule=Schedule(1e30), precision="float32")
    first = train_images(small(), DATA, wild, checkpoints=places)
    again = train_images(small(), DATA, wild, checkpoints=places)
    assert first.first_bad_step == again.first_bad_step >= 0
    assert same(first, again)


@pytest.mark.parametrize(
    ("what", "run"),
    [
        ("recipe", lambda p: train_images(small(), DATA, dataclasses.replace(RECIPE, loss=SQUARED), checkpoints=p)),
        ("network and start", lambda p: train_images(small(width=3), DATA, RECIPE, checkpoints=p)),
        ("start", lambda p: train_images(small(seed=1), DATA, RECIPE, checkpoints=p)),
        ("data", lambda p: train_images(small(), noise_images(1), RECIPE, checkpoints=p)),
        ("seed", lambda p: train_images(small(), DATA, RECIPE, seed=1, checkpoints=p)),
    ],
)
def test_a_checkpoint_of_another_run_is_refused_and_kept(tmp_path, what, run):
    places = Checkpoints(tmp_path / "run.pt")
    train_images(small(), DATA, dataclasses.replace(RECIPE, steps=12), checkpoints=places)
    before = places.path.read_bytes()
    with pytest.raises(CheckpointError, match=f"made with another {what}: it is left as it is"):
        run(places)
    assert places.path.read_bytes() == before


def test_other_probes_are_refused(tmp_path):
    places = Checkpoints(tmp_path / "run.pt")

    def probes(name, at):
        return {name: Probe(lambda m: torch.zeros(()), torch.tensor([at]))}

    train_images(small(), DATA, RECIPE, probes=probes("x", 1), checkpoints=places)
    for other in (probes("y", 1), probes("x", 2), {}):
        with pytest.raises(ValueError, match="give the same ones"):
            train_images(small(), DATA, RECIPE, probes=other, checkpoints=places)


def test_damaged_files_are_refused_and_kept(tmp_path):
    path = tmp_path / "run.pt"
    train_images(small(), DATA, RECIPE, checkpoints=Checkpoints(path))
    whole, contents = path.read_bytes(), digest(read(path))
    for length in (0, 1, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(CheckpointError, match="truncated, damaged or no checkpoint"):
            train_images(small(), DATA, RECIPE, checkpoints=Checkpoints(path))
        assert path.read_bytes() == whole[:length]
    refused = 0
    for place in range(0, len(whole), len(whole) // 100):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        try:  # a bit of padding may change without changing what is in the file
            assert digest(read(path)) == contents
        except CheckpointError:
            refused += 1
    assert refused > 20
    torch.save({"weights": torch.zeros(3)}, path)
    with pytest.raises(CheckpointError, match="no checkpoint of image training"):
        read(path)
    with pytest.raises(CheckpointError, match="there is no checkpoint"):
        read(tmp_path / "nowhere.pt")
    with pytest.raises(CheckpointError, match="choose another folder"):
        write(path / "below" / "a.pt", {})
    with pytest.raises(ValueError, match="choose 1 or more"):
        Checkpoints(path, 0)


def test_fine_tuning_takes_the_weights_alone(tmp_path):
    places = Checkpoints(tmp_path / "run.pt", 100, keep=(6,))
    large = train_images(small(), DATA, RECIPE, checkpoints=places)
    at_six = train_images(small(), DATA, dataclasses.replace(RECIPE, steps=6))
    start = start_from(places.at(6), small(seed=5))
    assert all(torch.equal(a, b) for a, b in zip(start.parameters(), at_six.module.parameters(), strict=True))
    lower = dataclasses.replace(RECIPE, schedule=Schedule(0.01), steps=3)
    tuned = train_images(start, DATA, lower)
    assert same(tuned, train_images(at_six.module, DATA, lower))  # fresh momentum, own schedule, steps from 0
    mean = start_from(places.path, small(), average=True)
    assert all(torch.equal(a, b) for a, b in zip(mean.parameters(), large.average.parameters(), strict=True))
    with pytest.raises(CheckpointError, match="of another network"):
        start_from(places.path, small(width=3))
    plain = Checkpoints(tmp_path / "plain.pt")
    train_images(small(), DATA, dataclasses.replace(RECIPE, averaging=0.0, steps=1), checkpoints=plain)
    with pytest.raises(CheckpointError, match="holds no average"):
        start_from(plain.path, small(), average=True)
