/* Randomized smoothing in integers: noise, votes, abstention and the certified radius, with no float anywhere.
 *
 * Noise is the rounded Gaussian of docs/certificate-format.md: Philox4x32-10 with key = 64-bit seed and counter words
 * (block of 4 coordinates, sample, image, stage << 24 | stream); stream 0 gives the high, stream 1 the low 32 bits of
 * the 64-bit word u of each coordinate; the noise is the smallest k with u < threshold k, k = lo, lo + 1, ...
 */
#ifndef ARQ_SMOOTHING_H
#define ARQ_SMOOTHING_H

#include "arq.h"

#ifdef __cplusplus
extern "C" {
#endif

enum { ARQ_STAGE_SEARCH = 0, ARQ_STAGE_SELECT = 1, ARQ_STAGE_ESTIMATE = 2 };

/* Thresholds t_lo .. t_(hi-1) (t_hi = 2^64 is not stored), split into halves, ascending; hi = lo + count.
 * guide: optional (may be null) 65536 entries by the top 16 bits of u: the noise where these decide it, else
 * ARQ_NOISE_OPEN. It makes drawing faster and changes nothing. */
typedef struct arq_noise {
    const uint32_t *high;
    const uint32_t *low;
    uint32_t count;
    int32_t lo;
    const int16_t *guide;
} arq_noise;
#define ARQ_NOISE_OPEN 32767

/* Build the guide in memory of 65536 int16 and set noise->guide to it. */
arq_status arq_noise_guide(arq_noise *noise, int16_t *memory, size_t entries);

/* Philox4x32-10. */
void arq_philox(const uint32_t counter[4], uint64_t key, uint32_t words[4]);

/* out[i] = image[i] + noise of coordinate i (image may be null: the noise alone), i < count. */
arq_status arq_noisy(const arq_noise *noise, uint64_t seed, uint32_t stage, uint32_t image_id, uint32_t sample,
                     const uint8_t *image, int16_t *out, size_t count);

/* Working memory of everything below: `pixels` of height * width * channels, `logits` of classes, `arena` as arq_run. */
typedef struct arq_workspace {
    int16_t *pixels;
    size_t pixel_count;
    int32_t *logits;
    size_t logit_count;
    void *arena;
    size_t arena_bytes;
} arq_workspace;

/* votes[class] += 1 for samples first .. first + samples - 1 (votes is not cleared). */
arq_status arq_count_votes(const arq_model *model, const arq_noise *noise, uint64_t seed, uint32_t stage,
                           uint32_t image_id, const uint8_t *image, uint32_t first, uint32_t samples, uint32_t *votes,
                           size_t vote_count, const arq_workspace *work);

/* Prediction of Cohen et al. (PREDICT): the two most frequent classes of n samples of stage SELECT; answers the first
 * if its votes reach minimum[votes of both], a table of n + 1 entries made with the failure probability alpha, else
 * abstains. `votes` is cleared first and holds the votes of the n samples afterwards. */
#define ARQ_ABSTAIN 0xFFFFFFFFu
typedef struct arq_predictor {
    uint64_t seed;
    uint32_t n;
    const uint32_t *minimum; /* n + 1 entries */
} arq_predictor;
arq_status arq_predict_smoothed(const arq_model *model, const arq_noise *noise, const arq_predictor *predictor,
                                uint32_t image_id, const uint8_t *image, uint32_t *votes, size_t vote_count,
                                uint32_t *predicted, const arq_workspace *work);

/* Certification by the fixed rule: n0 samples of stage SELECT choose the class (first maximum), n samples of stage
 * ESTIMATE count its votes n_A. Radius i is certified iff n_A >= counts[i] = K(n, radius i); radii ascend from 0.
 * `votes` is cleared first and holds the votes of the estimate afterwards. */
typedef struct arq_certifier {
    uint64_t seed;
    uint32_t n0, n;
    uint32_t radii;             /* number of radii, at least 1 */
    const uint32_t *counts;     /* K(n, r) of each; non-decreasing; n + 1: not certifiable */
    const uint32_t *radius_micro; /* the radii in millionths of the [0,1] pixel unit; the first is 0 */
} arq_certifier;
typedef struct arq_certificate {
    uint32_t predicted;         /* ARQ_ABSTAIN if not even radius 0 is certified */
    uint32_t selected;          /* the class of the selection, also when abstaining */
    uint32_t votes;             /* n_A */
    uint32_t radius_micro;      /* the largest certified radius of the table */
} arq_certificate;
arq_status arq_certify(const arq_model *model, const arq_noise *noise, const arq_certifier *certifier,
                       uint32_t image_id, const uint8_t *image, uint32_t *votes, size_t vote_count,
                       arq_certificate *certificate, const arq_workspace *work);

#ifdef __cplusplus
}
#endif

#endif
