"""Search for counter-examples among integer images: projected gradient descent, then annealing of single pixels.

PGD (Madry et al., ICLR 2018) on a differentiable copy of the program, one run for each class that could win and each
start, steps of whole grey levels. What the copy takes for a counter-example counts only when the integer program,
run on it, answers another class.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch
from torch import Tensor

from arqsearch.certify.linf.attack_surrogate import Surrogate
from arqsearch.certify.linf.domain import Domain
from arqsearch.integer.program import IntegerProgram

_FAR = float("inf")
#: What counts of a logit beyond its clip, in turn over runs: nothing nearly (a saturated class falls to a tie), all (it
#: is to leave saturation first).
LEAKS = (0.01, 1.0)
#: Pixels moved at once by annealing, in turn; temperature at its start and end, in logits.
MOVES, HOT, COLD = (1, 2, 3, 4), 0.1, 0.01


@dataclass(frozen=True)
class Budget:
    """How hard to look.

    :param steps: gradient steps of each run.
    :param restarts: runs for each class: two from the middle of the box, then from random corners and random points.
    :param rounds: rounds of annealing from the best images, one batch each.
    """

    steps: int = 20
    restarts: int = 4
    rounds: int = 0


class Attack:
    """Counter-examples of one program.

    :param program: the integer program.
    :param device: torch device for gradients.
    :param batch: images in one pass.
    """

    def __init__(self, program: IntegerProgram, device: str = "cpu", batch: int = 64) -> None:
        self.program, self.batch = program, batch
        self.surrogate = Surrogate(program, device)

    def run(
        self, domain: Domain, targets: Tensor, budget: Budget | None = None, seed: int = 0, deadline: float = _FAR
    ) -> tuple[Tensor, Tensor]:
        """Look for an image of another class in every domain (its `limits` are not looked at).

        :param targets: bool ``(N, K)``: classes to steer to.
        :param seed: of the random choices; without a deadline the same arguments give the same images.
        :param deadline: `time.monotonic` at which to stop.
        :returns: bool ``(N,)`` found, and the images, int16 ``(N, H, W, C)``: counter-examples where found, else the
            nearest to one.
        """
        budget = budget or Budget()
        owner, aim = targets.nonzero(as_tuple=True)
        count = len(owner)
        search = _Search(self, domain, deadline)
        for restart in range(budget.restarts):
            starts = _starts(domain, owner, restart, seed)
            leak = torch.full((count, 1), LEAKS[restart % len(LEAKS)])
            for at in torch.split(torch.arange(count), self.batch):
                if not search.over(owner[at]):
                    self._descend(search, starts[at], owner[at], aim[at], leak[at], budget.steps)
        if budget.rounds:
            for place in targets.any(1).nonzero()[:, 0].tolist():
                self._anneal(search, place, budget.rounds, torch.Generator().manual_seed(seed))
        return search.found, search.best[0]

    def confirmed(self, images: Tensor, labels: Tensor) -> Tensor:
        """Whether the integer program gives each image another class than its label."""
        return self.program.run(images.to(torch.int16)).long().argmax(1) != labels

    def _descend(self, search: _Search, x: Tensor, owner: Tensor, aim: Tensor, leak: Tensor, steps: int) -> None:
        """Runs of one batch: sign steps that shrink from the box's radius to one grey level."""
        domain = search.domain
        low, high, labels = domain.lo[owner].float(), domain.hi[owner].float(), domain.labels[owner]
        radius = ((high - low) / 2).flatten(1).amax(1).ceil().reshape(-1, 1, 1, 1)
        rows = torch.arange(len(x))
        for step in range(steps + 1):
            x = x.detach().requires_grad_()
            logits = self.surrogate.logits(x).cpu()
            search.note(x.detach(), logits.detach(), owner)
            if step == steps or search.over(owner):
                return
            seen = self.surrogate.clipped(logits, leak)
            (gradient,) = torch.autograd.grad((seen[rows, labels] - seen[rows, aim]).sum(), x)
            size = (radius * (1 - step / steps)).round().clamp(min=1)
            x = torch.minimum(torch.maximum(x.detach() - size * gradient.sign(), low), high)

    def _anneal(self, search: _Search, place: int, rounds: int, generator: torch.Generator) -> None:
        """Chains that move a few pixels at a time to an end of their range, with falling temperature.

        A pixel is drawn the oftener the less the gradient says it costs: moving it shifts the sums that are rounded,
        which the straight-through gradient does not see.
        """
        domain, shape = search.domain, search.domain.lo.shape[1:]
        low, high = domain.lo[place].flatten().float(), domain.hi[place].flatten().float()
        free = (high > low).nonzero()[:, 0]
        owner = torch.full((self.batch,), place)
        if not len(free) or search.over(owner):
            return
        labels = domain.labels[owner]
        turn = torch.arange(self.batch) % len(LEAKS)
        leak = torch.tensor(LEAKS)[turn].reshape(-1, 1)
        x = search.best[turn, owner].flatten(1).float()
        start = x.clone().reshape(-1, *shape).requires_grad_()
        score = worst(self.surrogate.clipped(self.surrogate.logits(start).cpu(), leak), labels)
        (gradient,) = torch.autograd.grad(score.sum(), start)
        cost, score = gradient.flatten(1).abs().cpu()[:, free], score.detach()
        weight = 1 / (cost + 0.1 * cost.mean() + 1e-12)
        for step in range(rounds):
            if search.over(owner):
                return
            moved = free[torch.multinomial(weight, MOVES[step % len(MOVES)], replacement=True, generator=generator)]
            up = torch.rand(moved.shape, generator=generator) < 0.5
            tried = x.scatter(1, moved, torch.where(up, high[moved], low[moved]))
            images = tried.reshape(-1, *shape)
            with torch.no_grad():
                logits = self.surrogate.logits(images).cpu()
            search.note(images, logits, owner)
            found = worst(self.surrogate.clipped(logits, leak), labels)
            heat = HOT * (COLD / HOT) ** (step / rounds)
            taken = torch.rand(self.batch, generator=generator) < ((score - found) / heat).exp()
            x[taken], score = tried[taken], torch.where(taken, found, score)


class _Search:
    """The best image so far of every domain, by each of `LEAKS`."""

    def __init__(self, attack: Attack, domain: Domain, deadline: float) -> None:
        self.attack, self.domain, self.deadline = attack, domain, deadline
        self.found = torch.zeros(len(domain), dtype=torch.bool)
        middle = torch.div(domain.lo + domain.hi, 2, rounding_mode="floor").to(torch.int16)
        self.best = torch.stack([middle] * len(LEAKS))
        self.score = torch.full((len(LEAKS), len(domain)), _FAR)

    def over(self, owner: Tensor) -> bool:
        """Whether nothing is left to look for, or no time."""
        return bool(self.found[owner].all()) or time.monotonic() > self.deadline

    def note(self, x: Tensor, logits: Tensor, owner: Tensor) -> None:
        """Keep what is better; what looks like a counter-example is run through the program."""
        attack, labels = self.attack, self.domain.labels[owner]
        images = x.cpu().round().to(torch.int16)
        likely = worst(attack.surrogate.clipped(logits, torch.zeros(len(x), 1)), labels) < 1
        at = (likely & ~self.found[owner]).nonzero()[:, 0]
        if len(at):
            for row in at[attack.confirmed(images[at], labels[at])].tolist():
                if not self.found[owner[row]]:
                    self.found[owner[row]], self.best[:, owner[row]] = True, images[row]
        for number, leak in enumerate(LEAKS):
            score = worst(attack.surrogate.clipped(logits, torch.full((len(x), 1), leak)), labels)
            better = ((score < self.score[number, owner]) & ~self.found[owner]).nonzero()[:, 0]
            for row in better[score[better].argsort(descending=True, stable=True)].tolist():
                self.score[number, owner[row]] = score[row]
                self.best[number, owner[row]] = images[row]


def worst(logits: Tensor, labels: Tensor) -> Tensor:
    """Smallest ``z_y - z_j`` over j != y."""
    rows = torch.arange(len(logits))
    others = logits.clone()
    others[rows, labels] = -_FAR
    return logits[rows, labels] - others.amax(1)


def _starts(domain: Domain, owner: Tensor, restart: int, seed: int) -> Tensor:
    """Where the runs of a restart begin: the middle of the box, random corners, random points."""
    low, high = domain.lo[owner].float(), domain.hi[owner].float()
    if restart < len(LEAKS):
        return ((low + high) / 2).floor()
    chance = torch.rand(low.shape, generator=torch.Generator().manual_seed(seed + 7919 * restart))
    if restart % 4 < 2:
        return torch.minimum((low + chance * (high - low + 1)).floor(), high)
    return torch.where(chance < 0.5, low, high)
