"""Every suite, killed after one of its long stages after the other, ends with the bits of a run left in peace."""

import pytest
import torch

from validation import sharpness
from validation.settings import BouncingSettings, CollapseSettings, DiagonalSettings, ReluSettings, RunSettings
from validation.stages import Stages
from validation.suite import Progress, run_suite

CPU = torch.device("cpu")
TINY = {
    "diagonal": RunSettings(
        seeds=2,
        diagonal=DiagonalSettings(
            n=10, d=20, nonzero=3, steps=300, step_sizes=(0.05, 0.1), large_step=0.1, decay_at=(0.5,), decay_by=(2.0,),
            table_steps=200, table_step_sizes=(0.02,),
        ),
    ),
    "relu": RunSettings(
        seeds=2, relu=ReluSettings(("two-layer", "1d"), two_layer_steps=120, one_dimensional_steps=60, seed_factor=1)
    ),
    "collapse": RunSettings(
        seeds=2, collapse=CollapseSettings(("quartic-well", "toy", "linear-network", "networks"), paths=500)
    ),
    "bouncing": RunSettings(
        seeds=2,
        bouncing=BouncingSettings(
            images=64, steps=40, step_sizes=(0.05,), window=60, burn_in=10, directions=24, resnet_images=64,
            resnet_steps=10,
        ),
    ),
}  # fmt: skip


class KilledError(BaseException):
    """Stands for SIGKILL: nothing handles it."""


class Killing(Stages):
    """Ends the run once it has kept a few new stages."""

    left = 1

    def _write(self, path, name, result):
        super()._write(path, name, result)
        self.left -= 1
        if not self.left:
            raise KilledError(name)


def outcome(suite, stages=None):
    return run_suite(suite, TINY[suite], CPU, Progress("quiet", stages=stages))


def bits(found):
    return [repr(check) for check in found.checks], {n: v.values.tobytes() for n, v in found.series.variables.items()}


@pytest.mark.slow
@pytest.mark.parametrize(("suite", "every"), [("diagonal", 1), ("relu", 4), ("collapse", 2), ("bouncing", 3)])
@pytest.mark.filterwarnings("ignore:.*NaN:RuntimeWarning", "ignore:.*egrees of freedom:RuntimeWarning")
def test_killed_after_its_stages_it_ends_with_the_same_bits(suite, every, tmp_path, monkeypatch):
    monkeypatch.setattr(sharpness, "LOOKS", (0, 10, 20, 50, 100, 200))
    expected, said, killed = bits(outcome(suite)), [], []
    while len(killed) < 40:
        stages = Killing(tmp_path / "stages", "code", said.append)
        stages.left = every
        try:
            found = outcome(suite, stages)
            break
        except KilledError as where:
            killed.append(str(where))
    assert bits(found) == expected
    assert said == []
    assert 40 > len(killed) == len(set(killed)) > 2  # every kill was after another stage
