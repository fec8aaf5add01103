"""BatchNorm without a memory: networks that normalise by whatever minibatch they are given, and nothing else."""

from __future__ import annotations

import copy

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm


def on_batch_statistics(module: nn.Module) -> nn.Module:
    """A copy whose BatchNorms normalise by the minibatch in train and eval mode and keep no running statistics.

    It trains as the module itself does in train mode, and being a pure function of parameters and inputs it can be run
    for many parameters at once (``torch.func.vmap``). To evaluate, put the parameters back into the module and
    estimate its statistics on the training set (:func:`nets.averaging.estimate_statistics`).
    """
    module = copy.deepcopy(module)
    for part in module.modules():
        if isinstance(part, _BatchNorm):
            part.track_running_stats = False
            part.running_mean = part.running_var = part.num_batches_tracked = None
    return module
