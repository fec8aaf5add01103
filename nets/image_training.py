"""Training a network on images that lie on its device: one run at a time, on CPU, GPU or several of them.

No data loader, no wait of the host for the device at each step, and everything random a pure function of (root seed,
seed, step): a run that was killed and goes on from its checkpoint gives the numbers of one left alone (bit for bit on a
CPU). For many small runs at once see :mod:`nets.training`.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd

from nets.averaging import WeightAverage, estimate_statistics, has_batch_norm
from nets.checkpoint import Checkpoints, check_owner, owner_of, read, write
from nets.distributed import Ranks
from nets.images import ImageSet
from nets.objective import Loss
from nets.recipe import Feed, Recipe, numerics
from nets.training import OVERFLOW
from theory.trajectory import Probe, Series

CHECK_EVERY = 100  # steps between two looks at the divergence flag, which make the host wait


class Moment:
    """What a probe sees of a run.

    Attributes:
        step: number of steps done.
        module: the network in eval mode; do not change it.
    """

    def __init__(self, step: int, module: nn.Module, average: Callable[[], nn.Module | None]) -> None:
        self.step, self.module, self._average = step, module, average

    @functools.cached_property
    def average(self) -> nn.Module | None:
        """The network of averaged weights, BatchNorm statistics re-estimated on the training set; None without."""
        return self._average()


@dataclass(frozen=True, eq=False)
class Trained:
    """Where a run ended.

    Attributes:
        module: the network in eval mode; of a diverged run its last finite state, statistics re-estimated.
        average: the network of averaged weights; None without averaging and where the run is not finished. Of a
            diverged run it may have moved on to its last finite weights for up to a hundred steps.
        step: number of steps whose effect is in ``module``.
        finished: no step is left; a run that used up its time is not, and goes on when it is called again.
        first_bad_step: the first step whose loss or gradient was not finite (or beyond the square root of the largest
            number), -1 where there was none.
        series: what was measured; steps after a bad one are NaN.
    """

    module: nn.Module
    average: nn.Module | None
    step: int
    finished: bool
    first_bad_step: int
    series: Mapping[str, Series]

    def __getitem__(self, name: str) -> Series:
        if name not in self.series:
            raise ValueError(f"no series '{name}' was recorded: choose among {', '.join(self.series)}.")
        return self.series[name]


def train_images(
    module: nn.Module,
    images: ImageSet,
    recipe: Recipe,
    *,
    seed: int = 0,
    root_seed: int = 0,
    probes: Mapping[str, Probe] | None = None,
    checkpoints: Checkpoints | None = None,
    seconds: float | None = None,
    progress: Callable[[int], None] | None = None,
) -> Trained:
    """Train a copy of the module, in the recipe's precision, on the images' device.

    Called again with the same arguments and a checkpoint it goes on where it was, or returns what it found when
    finished. Under torchrun (:func:`nets.distributed.ranks`) all processes call it alike; process 0 writes.

    Args:
        module: the network in its initial state; it is not changed.
        images: the training set is fed, the test set is for probes.
        seed: of minibatches, augmentation and label noise.
        probes: what to measure after which steps; functions see a :class:`Moment` and return numbers.
        checkpoints: where the run is kept.
        seconds: stop after so long, with a checkpoint, but not before one more step is done.
        progress: called with the number of steps done, every hundred steps.

    Raises:
        ValueError: arguments that do not fit, a checkpoint that cannot be used; a sentence on what to do.
        MemoryError: memory is used up; says up to which step the run is kept.
    """
    if seconds is not None and checkpoints is None:
        raise ValueError("a run with a time limit needs a place to go on from: give checkpoints.")
    with numerics(recipe.deterministic, images.train_x.device):
        run = _Run(module, images, recipe, seed, root_seed, probes or {}, checkpoints)
        return run.until(None if seconds is None else time.monotonic() + seconds, progress)


@torch.no_grad()
def loss_and_accuracy(module: nn.Module, x: Tensor, y: Tensor, loss: Loss, chunk: int = 2048) -> Tensor:
    """Mean loss and share of images whose largest output is their class, shape (2,), in the module's mode.

    For probes of a run that goes on: an infinite loss is a number here, and no error as in :func:`nets.measures.fit`.
    """
    total = torch.zeros(2, dtype=torch.float64, device=x.device)
    for part, labels in zip(x.split(chunk), y.split(chunk), strict=True):
        total += loss_and_hits(module(part), labels, loss)
    return total / len(x)


def loss_and_hits(outputs: Tensor, y: Tensor, loss: Loss) -> Tensor:
    """Sums of the loss and of right answers over outputs (n, classes) with class numbers (n,), shape (2,), float64."""
    return torch.stack([loss.values(outputs, y).sum(), (outputs.argmax(1) == y).sum()]).double()


class _Run:
    def __init__(
        self, module: nn.Module, images: ImageSet, recipe: Recipe, seed: int, root_seed: int,
        probes: Mapping[str, Probe], checkpoints: Checkpoints | None,
    ) -> None:  # fmt: skip
        _check(module, images, recipe, probes)
        self.recipe, self.probes, self.checkpoints, self.ranks = recipe, probes, checkpoints, Ranks.current()
        self.device = images.train_x.device
        self.images = images.to(dtype=recipe.dtype)
        layout = torch.channels_last if recipe.channels_last else torch.preserve_format
        plain: Any = copy.deepcopy(module).to(self.device, recipe.dtype)
        plain = plain.to(memory_format=layout)
        self.owner = owner_of(recipe.identity(), plain, self.images, seed, root_seed) if checkpoints else {}
        self.module = self.ranks.synchronized(plain, self.device, recipe.sync_batch_norm)
        self.feed = Feed(self.images, recipe, seed, root_seed, self.ranks.share(recipe.batch_size))
        self.eta = recipe.schedule.step_sizes(recipe.steps).tolist()
        self.trained = {name: p for name, p in self.module.named_parameters() if p.requires_grad}
        self.parameters = list(self.module.parameters())
        self.average = WeightAverage(self.parameters, recipe.averaging) if recipe.averaging else None
        self.optimizer = torch.optim.SGD(
            self.trained.values(), lr=1.0, momentum=recipe.momentum, fused=True,
            weight_decay=0.0 if recipe.decoupled else recipe.weight_decay,
        )  # fmt: skip
        if recipe.momentum:
            for p in self.trained.values():
                self.optimizer.state[p]["momentum_buffer"] = torch.zeros_like(p)
        # 1 from the first bad step on. The fused optimizer leaves parameters and momentum as they are where this is 1,
        # without asking the host: the protocol of torch.amp.GradScaler.
        self.diverged = torch.zeros((), device=self.device)
        self.optimizer.found_inf = self.diverged  # type: ignore[attr-defined]
        self.bad_steps = torch.zeros((), device=self.device, dtype=torch.float64)
        self.limit = min(OVERFLOW, torch.finfo(recipe.dtype).max ** 0.5)
        self.step, self.first_bad_step = 0, -1
        self.recorded = -1  # the last step at which something was measured
        self.kept = -1, -1  # step and last measured step of the last checkpoint
        self.series: dict[str, list[Tensor]] = {name: [] for name in probes}
        if checkpoints is not None:
            found = self.ranks.from_first(self._find)
            if found is not None:
                self._restore(found)
        forward: Any = self.ranks.averaging_gradients(self.module, self.device)
        self.forward = torch.compile(forward) if recipe.compile else forward
        self.due = {step for probe in probes.values() for step in probe.at.tolist()}

    def until(self, end: float | None, progress: Callable[[int], None] | None) -> Trained:
        """Go on to the last step, to the first bad one, or until the time is over."""
        self.module.train()
        while self.step < self.recipe.steps and self.first_bad_step < 0:
            checking = self.step % CHECK_EVERY == 0
            if (self._saves_here() or self.step in self.due or checking) and self._has_diverged():
                break
            if checking and progress:
                progress(self.step)
            if self._saves_here():
                self._save()
            self._record()
            with self._enough_memory():
                self._advance()
            self.step += 1
            if end is not None and self.step < self.recipe.steps and self._is_over(end):
                if self._has_diverged():
                    break
                self._save()
                return self._result(finished=False)
        if not self._has_diverged():
            self._record()
        self._save()
        if progress:
            progress(self.step)
        return self._result(finished=True)

    def _is_over(self, end: float) -> bool:
        # Several processes have to agree, which makes them wait: not at every step.
        asking = self.ranks.count == 1 or self.step % CHECK_EVERY == 0
        return asking and self.ranks.any(time.monotonic() > end, self.device)

    def _advance(self) -> None:
        recipe, eta = self.recipe, self.eta[self.step]
        x, target = self.feed(self.step)
        with self._autocast():
            outputs = self.forward(x)
        loss = recipe.loss.values(outputs.to(recipe.dtype), target).mean()
        loss.backward()
        self._watch(loss.detach())
        if recipe.decoupled and recipe.weight_decay:
            factor = 1 - eta * recipe.weight_decay * (1 - self.diverged).to(recipe.dtype)
            with torch.no_grad():
                torch._foreach_mul_(list(self.trained.values()), factor)
        self.optimizer.param_groups[0]["lr"] = eta
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self.average is not None:
            self.average.update(self.parameters)

    def _watch(self, loss: Tensor) -> None:
        gradients = [p.grad for p in self.trained.values() if p.grad is not None]
        size = torch.maximum(self.ranks.mean(loss), torch.nn.utils.get_total_norm(gradients))
        bad = ~(size < self.limit)  # NaN is bad too
        torch.maximum(self.diverged, bad.to(self.diverged.dtype), out=self.diverged)
        self.bad_steps += self.diverged

    def _has_diverged(self) -> bool:
        """Read the flag; of a diverged run, go back to the step at which it stood still."""
        count = int(self.bad_steps)
        if count and self.first_bad_step < 0:
            self.step = self.first_bad_step = self.step - count
            if has_batch_norm(self.module):
                self._estimate(self.module)
        return self.first_bad_step >= 0

    def _record(self) -> None:
        if self.step <= self.recorded or self.step not in self.due:
            return
        self.module.eval()
        moment = Moment(self.step, self.module, self._averaged)
        with self._enough_memory():
            measured = {
                name: torch.as_tensor(probe.function(moment)).detach().to("cpu", torch.float64)
                for name, probe in self.probes.items()
                if (probe.at == self.step).any()
            }
        for name, value in measured.items():
            self.series[name].append(value)
        self.recorded = self.step
        self.optimizer.zero_grad()  # a probe may have left gradients
        self.module.train()

    def _averaged(self) -> nn.Module | None:
        if self.average is None:
            return None
        averaged = self.average.module(self.module).eval()
        if has_batch_norm(averaged):
            self._estimate(averaged)
        return averaged

    def _estimate(self, module: nn.Module) -> None:
        with self._autocast():
            estimate_statistics(module, self.images.train_x, min(self.recipe.batch_size, self.images.n))

    def _autocast(self) -> contextlib.AbstractContextManager[Any]:
        lower = self.recipe.precision == "bfloat16"
        return torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=lower)

    @contextlib.contextmanager
    def _enough_memory(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as fault:
            if not isinstance(fault, torch.OutOfMemoryError) and "can't allocate memory" not in str(fault):
                raise  # the second is what torch says on a CPU
            # A pass that broke off may have touched running statistics; without any the state is still that of now.
            if not list(self.module.buffers()) and not self._has_diverged():
                self._save()
            where = (
                f"the run is kept up to step {self.kept[0]}" if self.kept[0] >= 0 else "no checkpoint was written yet"
            )
            raise MemoryError(
                f"the device has no memory left at step {self.step} ({where}): choose a smaller batch, a smaller chunk "
                "for what is measured, precision bfloat16, or more devices, and call again."
            ) from fault

    def _saves_here(self) -> bool:
        places = self.checkpoints
        return places is not None and (self.step % places.every == 0 or self.step in places.keep)

    def _save(self) -> None:
        if self.checkpoints is None or self.kept == (self.step, self.recorded):
            return
        if self.ranks.writes:
            state = self._state()
            if self.step in self.checkpoints.keep:
                write(self.checkpoints.at(self.step), state)
            write(self.checkpoints.path, state)
        self.kept = self.step, self.recorded

    def _state(self) -> dict[str, Any]:
        momentum = {name: self.optimizer.state[p].get("momentum_buffer") for name, p in self.trained.items()}
        names = [name for name, _ in self.module.named_parameters()]
        average = [] if self.average is None else zip(names, self.average.tensors, strict=True)
        return {
            "owner": self.owner,
            "step": self.step,
            "recorded": self.recorded,
            "first_bad_step": self.first_bad_step,
            "parameters": {name: p.detach().cpu() for name, p in self.module.named_parameters()},
            "buffers": {name: b.detach().cpu() for name, b in self.module.named_buffers()},
            "momentum": {name: m.cpu() for name, m in momentum.items() if m is not None},
            "average": {name: mean.cpu() for name, mean in average},
            "probes": self._probes_at(),
            "series": {name: list(rows) for name, rows in self.series.items()},
        }

    def _probes_at(self) -> dict[str, list[int]]:
        return {name: probe.at.tolist() for name, probe in self.probes.items()}

    def _find(self) -> dict[str, Any] | None:
        if self.checkpoints is None or not self.checkpoints.path.exists():
            return None
        found = read(self.checkpoints.path)
        check_owner(self.checkpoints.path, found, self.owner)
        if found["probes"] != self._probes_at():
            raise ValueError(
                f"the checkpoint '{self.checkpoints.path}' recorded {sorted(found['probes'])} and the probes are "
                f"{sorted(self.probes)}, or at other steps: give the same ones."
            )
        return found

    @torch.no_grad()
    def _restore(self, found: Mapping[str, Any]) -> None:
        for name, p in self.module.named_parameters():
            p.copy_(found["parameters"][name])
        for name, b in self.module.named_buffers():
            b.copy_(found["buffers"][name])
        for name, p in self.trained.items():
            if self.recipe.momentum:
                self.optimizer.state[p]["momentum_buffer"].copy_(found["momentum"][name])
        if self.average is not None:
            for mean, stored in zip(self.average.tensors, found["average"].values(), strict=True):
                mean.copy_(stored)
        self.step, self.recorded, self.first_bad_step = found["step"], found["recorded"], found["first_bad_step"]
        self.kept = self.step, self.recorded
        self.series = {name: list(found["series"][name]) for name in self.probes}

    def _result(self, finished: bool) -> Trained:
        series = {}
        for name, probe in self.probes.items():
            rows = self.series[name]
            shape = rows[0].shape if rows else ()
            missing = [torch.full(shape, torch.nan, dtype=torch.float64)] * (len(probe.at) - len(rows))
            series[name] = Series(probe.at, torch.stack([*rows, *missing]))
        averaged = self._averaged() if finished else None
        return Trained(self.module.eval(), averaged, self.step, finished, self.first_bad_step, series)


def _check(module: nn.Module, images: ImageSet, recipe: Recipe, probes: Mapping[str, Probe]) -> None:
    if not any(p.requires_grad for p in module.parameters()):
        raise ValueError("the module has no trainable parameter: set requires_grad on some.")
    for name, part in module.named_modules():
        if isinstance(part, _DropoutNd) and part.p > 0:
            raise ValueError(f"'{name or 'the module'}' is a dropout, a second noise: set its p to 0.")
    for name, probe in probes.items():
        at = probe.at.tolist()
        if not at or at != sorted(set(at)) or at[0] < 0 or at[-1] > recipe.steps:
            raise ValueError(f"the steps at which to measure '{name}' have to ascend between 0 and {recipe.steps}.")
        if probe.weights is not None:
            raise ValueError(f"'{name}' asks for a weighted sum: image runs keep every value, leave weights out.")
    device = images.train_x.device
    with torch.no_grad():
        copied = copy.deepcopy(module).eval().to(device, recipe.dtype)
        shape = copied(images.train_x[:2].to(recipe.dtype)).shape
    if len(shape) != 2 or shape[1] != images.classes:
        raise ValueError(
            f"the module maps 2 images to shape {tuple(shape)} and '{images.name}' has {images.classes} classes: "
            "return one output a class."
        )
