"""SGD, Nudged-SGD and its control (random directions) on any images, at equal step size, seed after seed.

python examples/nudged_sgd.py                                          # a 64-32-10 tanh network on digits, CPU
python examples/nudged_sgd.py --train train.parquet --test test.parquet --net resnet32_nobn --step-size 0.01 \
    --batch-size 128 --steps 8000 --refresh 400                        # published: K = 5 on 2250 images, each epoch
"""

import argparse

import torch

from nets.curvature import hessian
from nets.image_files import read_parquet
from nets.images import digits
from nets.lanczos import eigenpairs
from nets.mlp import mlp
from nets.nudged import NudgedSGD, RandomDirections, SharpestDirections
from nets.objective import CROSS_ENTROPY, FlatNet, Objective
from nets.published_nets import network
from nets.training import Batches
from theory.minibatch import Minibatch

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--train", help="parquet file of training images; digits without it")
parser.add_argument("--test", help="parquet file of test images")
parser.add_argument("--net", default="", help="a network of nets.published_nets; a small MLP by default")
for name, default in (("step-size", 0.3), ("gamma", 0.01)):
    parser.add_argument(f"--{name}", type=float, default=default)
for name, count in (("batch-size", 32), ("steps", 1000), ("refresh", 100), ("k", 5), ("curvature-images", 2250)):
    parser.add_argument(f"--{name}", type=int, default=count)
parser.add_argument("--seeds", type=int, default=3)
options = parser.parse_args()

device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
data = (read_parquet(options.train, options.test) if options.train else digits()).to(device, torch.float32)
looked_at = (data.train_x[: options.curvature_images], data.train_y[: options.curvature_images])
channels, size = data.train_x.shape[1], data.train_x.shape[2]
chunk = 512 if options.net else None  # bounds the activations that a look at the curvature keeps

for seed in range(options.seeds):
    for label in ("SGD", "Nudged-SGD", "random directions"):
        shape = {"seed": seed, "dtype": torch.float32}
        if options.net:
            net = network(options.net, classes=data.classes, channels=channels, size=size, **shape).to(device)
        else:
            net = mlp((channels * size**2, 32, data.classes), gain=0.5, **shape).to(device)
        directions = SharpestDirections(net, *looked_at, k=options.k, chunk=chunk)
        if label != "Nudged-SGD":
            directions = RandomDirections(options.k, seed)
        gamma = 1.0 if label == "SGD" else options.gamma
        optimizer = NudgedSGD(net.parameters(), directions, options.step_size, gamma, refresh=options.refresh)
        draws = Batches(data.n, Minibatch(options.batch_size), [seed])
        net.train()
        for k in range(options.steps):
            rows = draws(k)[0].to(device)
            optimizer.zero_grad()
            CROSS_ENTROPY.values(net(data.train_x[rows]), data.train_y[rows]).mean().backward()
            optimizer.step()
        theta = FlatNet(net).theta
        loss = Objective(net, data.train_x, data.train_y, chunk=chunk).value(theta)
        accuracy = Objective(net, data.test_x, data.test_y, chunk=chunk).accuracy(theta)
        top = eigenpairs(hessian(Objective(net, *looked_at, chunk=chunk), theta), 1, tolerance=1e-2).values[0]
        print(f"seed {seed}, {label}: loss {loss:.4g}, λ₁ {top:.4g}, test accuracy {accuracy:.2%}", flush=True)
