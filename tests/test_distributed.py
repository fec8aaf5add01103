"""Two processes train one network: the same numbers as one process with the same minibatches."""

import dataclasses
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from nets.augment import Augmentation
from nets.checkpoint import Checkpoints, read
from nets.distributed import Ranks
from nets.image_training import train_images
from nets.images import ImageSet
from nets.label_noise import FreshNoise
from nets.recipe import Recipe
from nets.resnet import resnet
from theory.schedule import Schedule
from theory.streams import named_generator
from theory.trajectory import Probe

ROOT = Path(__file__).parent.parent
DRAW = named_generator(0, "noise images")
X, Y = torch.from_numpy(DRAW.standard_normal((60, 1, 6, 6))), torch.from_numpy(DRAW.integers(0, 10, 60))
DATA = ImageSet(X[:40], Y[:40], X[40:], Y[40:], 10, "noise")
RECIPE = Recipe(
    Schedule(0.1, ((0.5, 4.0),)), 12, batch_size=8, momentum=0.9, weight_decay=0.01, averaging=0.9,
    augmentation=Augmentation(1, True, 2), label_noise=FreshNoise("any class", 0.2), precision="float64",
)  # fmt: skip
PROBES = {"loss": Probe(lambda m: m.average(DATA.test_x).square().sum().detach(), torch.tensor([0, 5, 12]))}

# Under torchrun one of its processes; by itself it imports everything once and forks two.
WORKER = """
import os, pathlib, sys
from tests.test_distributed import *
from nets.distributed import ranks
torch.set_num_threads(1)
torch.optim.SGD(resnet((4,), (1,)).parameters(), 0.1)  # imports what it needs
folder, mine, recipe = pathlib.Path(sys.argv[1]), 1, dataclasses.replace(RECIPE, sync_batch_norm=False)
if "RANK" not in os.environ:
    mine = os.fork()
    os.environ |= {"RANK": str(int(mine == 0)), "LOCAL_RANK": str(int(mine == 0))}
with ranks() as device:
    me = Ranks.current()
    for norm in ("none", "group", "batch"):
        places = Checkpoints(folder / f"{norm}.pt", 5, (5,))
        run = train_images(resnet((4,), (1,), norm=norm), DATA, recipe, probes=PROBES, checkpoints=places)
        torch.save([run.module.state_dict(), run["loss"].values], folder / f"{norm}-rank{me.rank}.pt")
    places = Checkpoints(folder / "none.pt")
    for name, norm, width, chosen in (
        ("share", "none", 4, dataclasses.replace(recipe, batch_size=9)),
        ("norm", "batch", 4, RECIPE),
        ("other", "none", 3, recipe),
    ):
        try:
            train_images(resnet((width,), (1,), norm=norm), DATA, chosen, probes=PROBES, checkpoints=places)
        except ValueError as fault:
            (folder / f"{name}-{me.rank}").write_text(str(fault))
if not mine:
    os._exit(0)
if mine > 1:
    assert os.waitpid(mine, 0)[1] == 0
"""


def two_processes(folder):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    environment |= {"OMP_NUM_THREADS": "1", "WORLD_SIZE": "2", "GLOO_SOCKET_IFNAME": "lo"}
    shown = subprocess.run(
        [sys.executable, "-c", WORKER, str(folder)], capture_output=True, text=True, cwd=ROOT, env=environment,
        timeout=300,
    )  # fmt: skip
    assert shown.returncode == 0, shown.stderr


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    two_processes(folder)
    return folder


@pytest.mark.parametrize("norm", ["none", "group"])
def test_two_processes_give_the_numbers_of_one(trained, norm):
    alone = train_images(resnet((4,), (1,), norm=norm), DATA, RECIPE, probes=PROBES)
    for rank in range(2):
        state, losses = torch.load(trained / f"{norm}-rank{rank}.pt")
        assert torch.allclose(losses, alone["loss"].values, rtol=1e-12, atol=1e-12)
        for name, value in alone.module.state_dict().items():
            assert torch.allclose(state[name], value, rtol=0, atol=1e-12), name
    moved = alone.module.state_dict()["0.weight"] - resnet((4,), (1,), norm=norm).state_dict()["0.weight"]
    assert moved.abs().max() > 1e-3


def test_statistics_of_each_share_are_another_training(trained):
    alone = train_images(resnet((4,), (1,), norm="batch"), DATA, dataclasses.replace(RECIPE, sync_batch_norm=False))
    states = [torch.load(trained / f"batch-rank{rank}.pt")[0] for rank in range(2)]
    for name, p in alone.module.named_parameters():
        assert torch.equal(states[0][name], states[1][name])
        assert not torch.allclose(states[0][name], p, rtol=0, atol=1e-6)


def test_one_process_goes_on_where_two_were(trained, tmp_path):
    places = Checkpoints(tmp_path / "run.pt")
    shutil.copy(trained / "none-step5.pt", places.path)
    chosen = dataclasses.replace(RECIPE, sync_batch_norm=False)
    assert read(places.path)["step"] == 5
    run = train_images(resnet((4,), (1,)), DATA, chosen, probes=PROBES, checkpoints=places)
    state, losses = torch.load(trained / "none-rank0.pt")
    assert torch.allclose(losses, run["loss"].values, rtol=1e-12, atol=1e-12)
    for name, value in run.module.state_dict().items():
        assert torch.allclose(state[name], value, rtol=0, atol=1e-12), name


def test_every_process_says_what_is_wrong(trained):
    sentences = {
        "share": "choose a multiple of 2",
        "norm": "set sync_batch_norm=False",
        "other": "was made with another network and start",
    }
    for name, sentence in sentences.items():
        for rank in range(2):
            assert sentence in (trained / f"{name}-{rank}").read_text()


def test_shares_are_disjoint_and_complete():
    shares = [Ranks(rank, 4).share(12) for rank in range(4)]
    assert torch.cat([torch.arange(12)[share] for share in shares]).tolist() == list(range(12))
    assert Ranks().share(7) == slice(0, 7)
    assert Ranks.current() == Ranks()


@pytest.mark.slow
def test_torchrun(tmp_path):
    script = tmp_path / "worker.py"
    script.write_text(WORKER)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    shown = subprocess.run(
        [*torchrun, str(script), str(tmp_path)], capture_output=True, text=True, cwd=ROOT, env=environment, timeout=400
    )
    assert shown.returncode == 0, shown.stderr
    test_two_processes_give_the_numbers_of_one(tmp_path, "group")
