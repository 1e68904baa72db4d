"""C text of what goes with the network: the tables of smoothing, and test vectors with the reference's answers."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from arqsearch.export import c_source as C
from arqsearch.export.c_smoothing import Certifier, Predictor, SmoothedVector, SmoothingTables, halves


def smoothing_files(tables: SmoothingTables) -> dict[str, str]:
    """``smoothing.h`` and ``smoothing.c``: noise thresholds, certifier and predictor."""
    table, certifier = tables.noise, tables.certifier
    largest = certifier.radius_micro[-1] / 1_000_000
    about = (
        f"Tables of smoothed prediction and certification at sigma = {table.sigma} in [0,1] pixels.\n"
        f"Certifier: {certifier.n0} samples select the class, {certifier.n} bound its probability, failure\n"
        f"probability {certifier.alpha} for an image; radii 0 .. {largest}. Predictor: {tables.predictor.n} samples."
    )
    body = (
        "/* Without a guide: a server copies it and calls arq_noise_guide on the copy. */\n"
        "extern const arq_noise arq_network_noise;\n"
        "extern const arq_certifier arq_network_certifier;\n"
        "extern const arq_predictor arq_network_predictor;\n"
    )
    high, low = halves(table)
    members = ["threshold_high", "threshold_low", C.unsigned(len(high)), str(table.lo), "NULL"]
    parts = [
        C.array("static const uint32_t threshold_high[]", high, unsigned=True),
        C.array("static const uint32_t threshold_low[]", low, unsigned=True),
        C.structure("const arq_noise arq_network_noise", members),
        *_certifier("certifier", "arq_network_certifier", tables.certifier, tables.seed),
        *_predictor("predictor", "arq_network_predictor", tables.predictor, tables.seed),
    ]
    return {
        "smoothing.h": C.header("ARQ_NETWORK_SMOOTHING_H", about, ['"arq_smoothing.h"'], body),
        "smoothing.c": C.source(about, ['"smoothing.h"'], "\n".join(parts)),
    }


def vector_files(
    pixels: NDArray[np.int16], logits: NDArray[np.int32], smoothed: SmoothedVector | None, seed: int
) -> dict[str, str]:
    """``test_vectors.h`` and ``test_vectors.c``.

    :param pixels: ``(N, H, W, C)``.
    :param logits: of the reference, ``(N, classes)``.
    :param smoothed: None leaves prediction and certification out.
    :param seed: 64-bit key of the noise generator.
    """
    about = "Images and the answers of the reference implementation."
    body = (
        f"#define ARQ_TEST_IMAGES {len(pixels)}\n"
        "extern const int16_t arq_test_pixels[ARQ_TEST_IMAGES][ARQ_NETWORK_PIXELS];\n"
        "extern const int32_t arq_test_logits[ARQ_TEST_IMAGES][ARQ_NETWORK_CLASSES];\n"
    )
    parts = [
        C.array("const int16_t arq_test_pixels[ARQ_TEST_IMAGES][ARQ_NETWORK_PIXELS]", pixels.reshape(len(pixels), -1)),
        C.array("const int32_t arq_test_logits[ARQ_TEST_IMAGES][ARQ_NETWORK_CLASSES]", logits),
    ]
    includes = ['"model.h"']
    if smoothed:
        includes.append('"smoothing.h"')
        body += (
            "\n/* One image, predicted and certified with few samples. */\n"
            "extern const uint8_t arq_test_image[ARQ_NETWORK_PIXELS];\n"
            "extern const uint32_t arq_test_image_id;\n"
            "extern const arq_predictor arq_test_predictor;\n"
            "extern const uint32_t arq_test_predict_votes[ARQ_NETWORK_CLASSES];\n"
            "extern const uint32_t arq_test_predicted;\n"
            "extern const arq_certifier arq_test_certifier;\n"
            "extern const uint32_t arq_test_certify_votes[ARQ_NETWORK_CLASSES];\n"
            "extern const arq_certificate arq_test_certificate;\n"
        )
        outcome = (smoothed.certified, smoothed.selected, smoothed.certify_votes[smoothed.selected],
                   smoothed.radius_micro)  # fmt: skip
        votes = "const uint32_t arq_test_{}_votes[ARQ_NETWORK_CLASSES]"
        parts += [
            C.array("const uint8_t arq_test_image[ARQ_NETWORK_PIXELS]", smoothed.image.ravel()),
            f"const uint32_t arq_test_image_id = {smoothed.image_id}u;\n",
            *_predictor("predictor", "arq_test_predictor", smoothed.predictor, seed),
            C.array(votes.format("predict"), smoothed.predict_votes),
            f"const uint32_t arq_test_predicted = {smoothed.predicted}u;\n",
            *_certifier("certifier", "arq_test_certifier", smoothed.certifier, seed),
            C.array(votes.format("certify"), smoothed.certify_votes),
            C.structure("const arq_certificate arq_test_certificate", [C.unsigned(value) for value in outcome]),
        ]
    return {
        "test_vectors.h": C.header("ARQ_TEST_VECTORS_H", about, includes, body),
        "test_vectors.c": C.source(about, ['"test_vectors.h"'], "\n".join(parts)),
    }


def _certifier(prefix: str, name: str, certifier: Certifier, seed: int) -> list[str]:
    members = [
        f"UINT64_C({seed})", C.unsigned(certifier.n0), C.unsigned(certifier.n), C.unsigned(len(certifier.counts)),
        f"{prefix}_counts", f"{prefix}_radius_micro",
    ]  # fmt: skip
    return [
        C.array(f"static const uint32_t {prefix}_counts[]", certifier.counts),
        C.array(f"static const uint32_t {prefix}_radius_micro[]", certifier.radius_micro),
        C.structure(f"const arq_certifier {name}", members),
    ]


def _predictor(prefix: str, name: str, predictor: Predictor, seed: int) -> list[str]:
    members = [f"UINT64_C({seed})", C.unsigned(predictor.n), f"{prefix}_minimum"]
    return [
        C.array(f"static const uint32_t {prefix}_minimum[]", predictor.minimum),
        C.structure(f"const arq_predictor {name}", members),
    ]
