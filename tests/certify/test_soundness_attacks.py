"""Attacks on the smoothed classifier of a trained integer network stay without success inside certified radii.

The attacks see the network, its noise distribution and its gradients, and end in integer images on the rim of the
certified set; the integer program then votes on fresh noise. The same attacks at larger radii do succeed, so what
they do not find inside is evidence.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from scipy.stats import binomtest, norm

from arqsearch.certify.binomial import clopper_pearson, grey_levels_squared
from arqsearch.certify.line import CertificateLine
from arqsearch.certify.noise import SEARCH, NoiseTable
from arqsearch.certify.rules import certify_image
from arqsearch.certify.smoothing import Classifier, SmoothingSettings, count_votes, first_argmax, program_classifier
from arqsearch.certify.two_class import two_class_radius
from arqsearch.data import load
from arqsearch.integer.lowering import lower
from arqsearch.models.cnn import cnn
from arqsearch.quantize.bitwidths import BitWidths
from arqsearch.quantize.network import QuantizedNet, QuantizeSettings
from arqsearch.quantize.smoothing_losses import integer_noise
from arqsearch.quantize.training import to_pixels, train
from arqsearch.recipe import Objective, Train
from tests.certify.smoothed_attacks import ATTACKS, Pixels, attack, soft_share

SIGMA, ALPHA, N, VOTES, CLASSES = 0.25, 0.001, 3000, 2000, 10
#: p-value below which votes refute a claim about an attacked image.
REFUTED = 1e-5


@dataclass(frozen=True, eq=False)
class Certified:
    """A trained network, its program's classifier, and the images that it certifies at a radius above 0."""

    net: QuantizedNet
    classify: Classifier
    images: Pixels
    lines: list[CertificateLine]

    @property
    def classes(self) -> NDArray[np.int64]:
        """The certified classes."""
        return np.array([line.predicted for line in self.lines])

    @property
    def radii(self) -> NDArray[np.float64]:
        """Certified radii in [0,1] pixels."""
        return np.array([line.radius for line in self.lines])

    def votes(self, images: Pixels, seed: int) -> NDArray[np.int64]:
        """Votes on noise that neither certificate nor attack has seen."""
        found = count_votes(
            self.classify, images, range(len(images)), table=NoiseTable.for_sigma(SIGMA), seed=seed, stage=SEARCH,
            samples=VOTES, batch_size=500,
        )  # fmt: skip
        return np.pad(found, ((0, 0), (0, CLASSES - found.shape[1])))


def certified(count: int, epochs: float) -> Certified:
    """Train on noisy digits, fine-tune at mixed bit-widths, lower, certify the first `count` test images."""
    data, test = load("digits", "train"), load("digits", "test")
    torch.manual_seed(0)
    model = cnn(CLASSES, size="tiny", in_channels=1, image_size=8, width=16, batch_norm=False)
    net = QuantizedNet(model, (1, 8, 8), (0.3,), (0.37,), QuantizeSettings())
    objective = Objective(smoothing="gaussian")
    settings = Train(epochs=epochs, batch_size=64, lr=0.05, objective=objective)
    net.quantized = False
    train(net, data.images, data.labels, settings, SIGMA)
    net.quantized = True
    pixels = to_pixels(data.images[:256])
    net.calibrate([pixels + integer_noise(tuple(pixels.shape), SIGMA, torch.Generator().manual_seed(1))])
    net.set_bitwidths(BitWidths.from_mapping(zip(net.bitwidths.names, [(8, 8), (4, 4), (8, 8)], strict=True)))
    train(net, data.images, data.labels, settings.model_copy(update={"epochs": 2.0, "lr": 0.01}), SIGMA, seed=1)
    program = lower(net.eval(), noise_limit=NoiseTable.for_sigma(SIGMA).hi)
    classify = program_classifier(program, SIGMA)
    smoothing = SmoothingSettings(sigma=SIGMA, n0=100, n=N, alpha=ALPHA, seed=3)
    lines = [
        certify_image(classify, test.images[i], i, None, smoothing, program=program.hash, data=test.identity)
        for i in range(count)
    ]
    kept = [i for i, line in enumerate(lines) if line.certified and line.radius > 0]
    assert len(kept) > 0.8 * count
    assert np.mean([line.predicted == label for line, label in zip(lines, test.labels, strict=False)]) > 0.8
    return Certified(net, classify, test.images[kept], [lines[i] for i in kept])


@pytest.fixture(scope="module")
def target() -> Certified:
    return certified(40, 8.0)


def squared(radii: NDArray[np.float64]) -> NDArray[np.int64]:
    """Certified radii to squared integer distances in grey levels."""
    return np.array([grey_levels_squared(float(radius)) for radius in radii])


def displaced(votes: NDArray[np.int64], classes: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Images at which the votes say that another class is the smoothed one."""
    own = votes[np.arange(len(classes)), classes]
    others = votes.copy()
    others[np.arange(len(classes)), classes] = -1
    pairs = zip(own.tolist(), others.max(1).tolist(), strict=True)
    return np.array([a + b > 0 and binomtest(b, a + b, 0.5, alternative="greater").pvalue < REFUTED for a, b in pairs])


def below(votes: NDArray[np.int64], classes: NDArray[np.int64], bounds: NDArray[np.float64]) -> NDArray[np.bool_]:
    """Images at which the votes say that the certified class is less probable than its bound."""
    own = votes[np.arange(len(classes)), classes].tolist()
    pairs = zip(own, bounds.tolist(), strict=True)
    return np.array([binomtest(k, VOTES, bound, alternative="less").pvalue < REFUTED for k, bound in pairs])


def allowed(wrong: int, images: int) -> bool:
    """Whether this many false certificates are within what α explains."""
    return bool(binomtest(wrong, images, ALPHA, alternative="greater").pvalue > 1e-3)


def test_the_attacked_network_is_the_certified_one(target: Certified) -> None:
    pixels = to_pixels(target.images)
    noisy = pixels + integer_noise(tuple(pixels.shape), SIGMA, torch.Generator().manual_seed(2))
    with torch.no_grad():
        own = first_argmax(target.net(noisy))
    assert (own == target.classify(noisy.permute(0, 2, 3, 1).short())).float().mean() > 0.95


@pytest.mark.parametrize("name", ATTACKS)
@pytest.mark.parametrize("part", [0.5, 1.0])
def test_no_attack_succeeds_inside_the_certified_set(target: Certified, name: str, part: float) -> None:
    limits = squared(target.radii * part)
    found = attack(name, target.net, target.images, target.classes, SIGMA, limits, copies=32, steps=15, seed=5)
    distances = ((found.astype(np.int64) - target.images) ** 2).sum((1, 2, 3))
    assert (distances <= squared(target.radii)).all() and (distances > 0.5 * limits).mean() > 0.9
    votes = target.votes(found, seed=11)
    assert allowed(int(displaced(votes, target.classes).sum()), len(found))
    # The theorem says more than the class: P(F(x'+Z)=A) ≥ Φ(Φ⁻¹(p) − ‖x'−x‖/s), ½ at the certified radius.
    p = np.array([clopper_pearson(line.votes, N, ALPHA) - line.d_tau for line in target.lines])
    bounds = norm.cdf(norm.ppf(p) - np.sqrt(distances) / (255 * SIGMA))
    assert (bounds > 0.4999).all()
    assert allowed(int(below(votes, target.classes, bounds).sum()), len(found))
    # The attack works: the class has lost much of its probability on the way.
    before, after = (v[np.arange(len(found)), target.classes].mean() for v in (target.votes(target.images, 12), votes))
    assert before - after > (0.05 if part < 1 else 0.15) * VOTES


def test_no_attack_succeeds_inside_the_two_class_radius(target: Certified) -> None:
    radii = []
    for line in target.lines:
        radius = two_class_radius(line.estimate, line.predicted, N, SIGMA, ALPHA, line.d_tau)
        radii.append(float(radius or 0))
    limits = squared(np.array(radii))
    assert (np.array(radii) > target.radii).sum() >= 5  # Where it reaches further, it is attacked further out.
    found = attack("pgd", target.net, target.images, target.classes, SIGMA, limits, copies=64, steps=20, seed=6)
    assert allowed(int(displaced(target.votes(found, seed=13), target.classes).sum()), len(found))


@pytest.mark.parametrize("name", ATTACKS)
def test_the_same_attacks_refute_radii_that_are_too_large(target: Certified, name: str) -> None:
    """Certificates twice and four times as large, as from a σ in the wrong unit, do not survive."""
    for factor, share in ((2.0, 0.5), (4.0, 0.9)):
        limits = squared(factor * target.radii)
        wrong = []
        for kind in (name, "random"):
            found = attack(kind, target.net, target.images, target.classes, SIGMA, limits, copies=32, steps=15, seed=7)
            wrong.append(int(displaced(target.votes(found, seed=14), target.classes).sum()))
        assert wrong[0] > share * len(target.images)
        assert not allowed(wrong[0], len(target.images))
        assert wrong[1] < 0.3 * wrong[0], "random directions do nearly as well: this is no attack"


def test_attacks_lower_the_soft_share_on_other_noise(target: Certified) -> None:
    noise = integer_noise((64, *to_pixels(target.images).shape), SIGMA, torch.Generator().manual_seed(9))
    limits, shares = squared(target.radii), {}
    for name in (*ATTACKS, "random"):
        found = attack(name, target.net, target.images, target.classes, SIGMA, limits, copies=32, steps=15, seed=5)
        shares[name] = soft_share(target.net, found, target.classes, noise).mean()
    assert max(shares[name] for name in ATTACKS) < shares["random"] - 0.1


@pytest.mark.slow
@pytest.mark.parametrize("name", ATTACKS)
def test_no_long_attack_succeeds_on_many_images(name: str) -> None:
    target = certified(200, 20.0)
    limits = squared(target.radii)
    for seed in range(3):
        found = attack(name, target.net, target.images, target.classes, SIGMA, limits, copies=64, steps=40, seed=seed)
        votes = target.votes(found, seed=20 + seed)
        assert allowed(int(displaced(votes, target.classes).sum()), len(found))
        assert allowed(int(below(votes, target.classes, np.full(len(found), 0.5)).sum()), len(found))
