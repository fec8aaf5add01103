"""Train an image network at a large step size that decays late, seed after seed; killed and called again it goes on.

python examples/train_images.py                                        # the tiny ResNet on digits, CPU
python examples/train_images.py --train train.parquet --test test.parquet --net resnet18_plain --batch-size 256
torchrun --nproc-per-node=4 examples/train_images.py ...               # several GPUs, or CPU processes
"""

import argparse
from pathlib import Path

import torch

from nets.augment import Augmentation
from nets.distributed import Ranks, ranks
from nets.image_files import read_parquet
from nets.image_seeds import ensemble, train_seeds
from nets.image_training import loss_and_accuracy
from nets.images import digits
from nets.measures import measure_blocks
from nets.published_nets import network
from nets.recipe import Recipe
from nets.resnet import resnet
from theory.schedule_shapes import DecayTo
from theory.trajectory import Probe

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--train", help="parquet file of training images; digits without it")
parser.add_argument("--test", help="parquet file of test images")
parser.add_argument("--net", default="", help="a network of nets.published_nets; the tiny ResNet by default")
parser.add_argument("--step-size", type=float, default=0.3)
parser.add_argument("--decay-at", type=float, default=0.7, help="share of the run before the step size drops")
parser.add_argument("--steps", type=int, default=1000)
parser.add_argument("--batch-size", type=int, default=50)
parser.add_argument("--seeds", type=int, default=2)
parser.add_argument("--out", default="trained", help="folder of the checkpoints")
options = parser.parse_args()

with ranks() as device:
    data = (read_parquet(options.train, options.test) if options.train else digits()).to(device, torch.float32)
    fast = device.type == "cuda"
    recipe = Recipe(
        DecayTo(options.step_size, options.step_size / 10, options.decay_at), options.steps, options.batch_size,
        augmentation=Augmentation(crop=4, flip=True) if options.train else None,
        averaging=0.99, precision="bfloat16" if fast else "float32", channels_last=fast, compile=fast,
    )  # fmt: skip
    shape = {"classes": data.classes, "channels": data.train_x.shape[1], "dtype": torch.float32}
    at = torch.linspace(0, options.steps, 5).long().unique()
    test = Probe(lambda m: loss_and_accuracy(m.average, data.test_x, data.test_y, recipe.loss), at)
    runs = train_seeds(
        lambda seed: network(options.net, seed=seed, **shape) if options.net else resnet(seed=seed, **shape),
        data, recipe, range(options.seeds), folder=Path(options.out), probes={"test": test},
    )  # fmt: skip
    if Ranks.current().writes:
        for step, value in zip(at, ensemble(runs)["test"].values.nanmean(1), strict=True):
            print(f"step {step}: test loss {value[0]:.4f}, accuracy {value[1]:.2%}")
        for block in measure_blocks(runs[0].module, data.train_x[:512], layers={}):
            sparsity = f"{block.sparsity:.3f}, without duplicates {block.distinct_sparsity:.3f}"
            print(f"block {block.name}: sparsity coefficient {sparsity}")
