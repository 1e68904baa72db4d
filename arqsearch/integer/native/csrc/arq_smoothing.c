/* Randomized smoothing in integers: noise, votes, prediction, certificate. See arq_smoothing.h. */
#include "arq_noise.h"

#define LARGEST_PIXEL 255

void arq_philox(const uint32_t counter[4], uint64_t key, uint32_t words[4])
{
    uint32_t c0 = counter[0], c1 = counter[1], c2 = counter[2], c3 = counter[3];
    uint32_t k0 = (uint32_t)key, k1 = (uint32_t)(key >> 32);
    for (int round = 0; round < 10; round++) {
        const uint64_t p0 = (uint64_t)c0 * 0xD2511F53u;
        const uint64_t p1 = (uint64_t)c2 * 0xCD9E8D57u;
        c0 = (uint32_t)(p1 >> 32) ^ c1 ^ k0;
        c2 = (uint32_t)(p0 >> 32) ^ c3 ^ k1;
        c1 = (uint32_t)p1;
        c3 = (uint32_t)p0;
        k0 += 0x9E3779B9u;
        k1 += 0xBB67AE85u;
    }
    words[0] = c0;
    words[1] = c1;
    words[2] = c2;
    words[3] = c3;
}

/* The four words of a block; stream 0 holds the high, stream 1 the low halves. */
static void block_words(const arq_draw *draw, uint32_t block, uint32_t stream, uint32_t words[4])
{
    const uint32_t counter[4] = {block, draw->sample, draw->image_id, draw->stage << 24 | stream};
    arq_philox(counter, draw->seed, words);
}

/* How many thresholds have a high half below `word`; the answer is known to lie in from .. to. */
static uint32_t count_below(const uint32_t *high, uint32_t from, uint32_t to, uint32_t word)
{
    while (from < to) {
        const uint32_t middle = from + (to - from) / 2;
        if (high[middle] < word) {
            from = middle + 1;
        } else {
            to = middle;
        }
    }
    return from;
}

int16_t arq_noise_exact(const arq_draw *draw, uint32_t block, uint32_t lane, uint32_t word)
{
    const arq_noise *noise = draw->noise;
    uint32_t from = 0, to = noise->count;
    if (noise->guide) {
        /* Decided neighbours of an open entry bracket it: mostly down to one threshold. */
        const uint32_t entry = word >> ARQ_GUIDE_SHIFT;
        if (entry > 0 && noise->guide[entry - 1] != ARQ_NOISE_OPEN) {
            from = (uint32_t)(noise->guide[entry - 1] - noise->lo);
        }
        if (entry + 1 < ARQ_GUIDE_ENTRIES && noise->guide[entry + 1] != ARQ_NOISE_OPEN) {
            to = (uint32_t)(noise->guide[entry + 1] - noise->lo);
        }
    }
    uint32_t index = count_below(noise->high, from, to, word);
    if (index < noise->count && noise->high[index] == word) {
        /* The high halves are equal (about once in 2^32 / count words): the low half decides. */
        uint32_t low[4];
        block_words(draw, block, 1, low);
        while (index < noise->count && noise->high[index] == word && noise->low[index] <= low[lane]) {
            index++;
        }
    }
    return (int16_t)(noise->lo + (int32_t)index);
}

/* The smallest and largest noise must leave room for a pixel in int16, and every value must differ from OPEN. */
static arq_status check_noise(const arq_noise *noise)
{
    if (!noise || !noise->high || !noise->low) {
        return ARQ_ERROR_NULL;
    }
    const int64_t hi = (int64_t)noise->lo + noise->count;
    if (noise->count == 0 || noise->lo < -32768 || hi > 32767 - LARGEST_PIXEL) {
        return ARQ_ERROR_ARGUMENT;
    }
    return ARQ_OK;
}

arq_status arq_noise_guide(arq_noise *noise, int16_t *memory, size_t entries)
{
    const arq_status status = check_noise(noise);
    if (status != ARQ_OK) {
        return status;
    }
    if (!memory) {
        return ARQ_ERROR_NULL;
    }
    if (entries != ARQ_GUIDE_ENTRIES) {
        return ARQ_ERROR_SIZE;
    }
    uint32_t below = 0; /* thresholds whose high half lies below the entry's first word */
    for (uint32_t entry = 0; entry < ARQ_GUIDE_ENTRIES; entry++) {
        const uint32_t last = entry << ARQ_GUIDE_SHIFT | 0xFFFFu;
        const uint32_t before = below;
        while (below < noise->count && noise->high[below] <= last) {
            below++;
        }
        memory[entry] = below == before ? (int16_t)(noise->lo + (int32_t)before) : ARQ_NOISE_OPEN;
    }
    noise->guide = memory;
    return ARQ_OK;
}

arq_status arq_noisy(const arq_noise *noise, uint64_t seed, uint32_t stage, uint32_t image_id, uint32_t sample,
                     const uint8_t *image, int16_t *out, size_t count)
{
    const arq_status status = check_noise(noise);
    if (status != ARQ_OK) {
        return status;
    }
    if (!out) {
        return ARQ_ERROR_NULL;
    }
    if (stage > ARQ_STAGE_ESTIMATE) {
        return ARQ_ERROR_ARGUMENT;
    }
    if (count > 0 && (count - 1) / 4 > 0xFFFFFFFEu) {
        return ARQ_ERROR_SIZE; /* blocks are numbered in 32 bits */
    }
    const arq_draw draw = {noise, seed, sample, image_id, stage};
    uint32_t block = noise->guide ? arq_noise_vector(&draw, image, out, (uint32_t)(count / 4)) : 0;
    for (size_t first = (size_t)block * 4; first < count; first += 4, block++) {
        const uint32_t lanes = count - first < 4 ? (uint32_t)(count - first) : 4;
        uint32_t words[4];
        block_words(&draw, block, 0, words);
        for (uint32_t lane = 0; lane < lanes; lane++) {
            int16_t value = noise->guide ? noise->guide[words[lane] >> ARQ_GUIDE_SHIFT] : ARQ_NOISE_OPEN;
            if (value == ARQ_NOISE_OPEN) {
                value = arq_noise_exact(&draw, block, lane, words[lane]);
            }
            const size_t i = first + lane;
            out[i] = (int16_t)(image ? value + image[i] : value);
        }
    }
    return ARQ_OK;
}

arq_status arq_count_votes(const arq_model *model, const arq_noise *noise, uint64_t seed, uint32_t stage,
                           uint32_t image_id, const uint8_t *image, uint32_t first, uint32_t samples, uint32_t *votes,
                           size_t vote_count, const arq_workspace *work)
{
    if (!model || !image || !votes || !work || !work->pixels || !work->logits) {
        return ARQ_ERROR_NULL;
    }
    const arq_status usable = check_noise(noise);
    if (usable != ARQ_OK) {
        return usable;
    }
    if (samples > 0 && first > 0xFFFFFFFFu - (samples - 1)) {
        return ARQ_ERROR_ARGUMENT; /* samples are numbered in 32 bits */
    }
    const size_t pixels = (size_t)model->height * model->width * model->channels;
    if (work->pixel_count != pixels || work->logit_count != model->classes || vote_count != model->classes) {
        return ARQ_ERROR_SIZE;
    }
    if (noise->lo < model->pixel_lo || (int64_t)noise->lo + noise->count + LARGEST_PIXEL > model->pixel_hi) {
        return ARQ_ERROR_RANGE;
    }
    for (uint32_t done = 0; done < samples; done++) {
        arq_status status = arq_noisy(noise, seed, stage, image_id, first + done, image, work->pixels, pixels);
        if (status == ARQ_OK) {
            status = arq_run(model, work->pixels, pixels, work->logits, work->logit_count, work->arena,
                             work->arena_bytes);
        }
        if (status != ARQ_OK) {
            return status;
        }
        votes[arq_first_maximum(work->logits, work->logit_count)]++;
    }
    return ARQ_OK;
}

/* Clear the votes and count `samples` samples from the first on. */
static arq_status count_afresh(const arq_model *model, const arq_noise *noise, uint64_t seed, uint32_t stage,
                               uint32_t image_id, const uint8_t *image, uint32_t samples, uint32_t *votes,
                               size_t vote_count, const arq_workspace *work)
{
    if (!model || !votes) {
        return ARQ_ERROR_NULL;
    }
    if (vote_count != model->classes) {
        return ARQ_ERROR_SIZE;
    }
    for (size_t class = 0; class < vote_count; class++) {
        votes[class] = 0;
    }
    return arq_count_votes(model, noise, seed, stage, image_id, image, 0, samples, votes, vote_count, work);
}

/* The class with most votes, the smallest among equals; `except` (may be `count`: none) is passed over. */
static uint32_t most_votes(const uint32_t *votes, size_t count, size_t except)
{
    size_t best = except == 0 ? 1 : 0;
    for (size_t class = best + 1; class < count; class++) {
        if (class != except && votes[class] > votes[best]) {
            best = class;
        }
    }
    return (uint32_t)best;
}

arq_status arq_predict_smoothed(const arq_model *model, const arq_noise *noise, const arq_predictor *predictor,
                                uint32_t image_id, const uint8_t *image, uint32_t *votes, size_t vote_count,
                                uint32_t *predicted, const arq_workspace *work)
{
    if (!predictor || !predictor->minimum || !predicted) {
        return ARQ_ERROR_NULL;
    }
    if (predictor->n == 0) {
        return ARQ_ERROR_ARGUMENT;
    }
    const arq_status status = count_afresh(model, noise, predictor->seed, ARQ_STAGE_SELECT, image_id, image,
                                           predictor->n, votes, vote_count, work);
    if (status != ARQ_OK) {
        return status;
    }
    const uint32_t first = most_votes(votes, vote_count, vote_count);
    const uint32_t others = vote_count > 1 ? votes[most_votes(votes, vote_count, first)] : 0;
    *predicted = votes[first] >= predictor->minimum[votes[first] + others] ? first : ARQ_ABSTAIN;
    return ARQ_OK;
}

arq_status arq_certify(const arq_model *model, const arq_noise *noise, const arq_certifier *certifier,
                       uint32_t image_id, const uint8_t *image, uint32_t *votes, size_t vote_count,
                       arq_certificate *certificate, const arq_workspace *work)
{
    if (!certifier || !certifier->counts || !certifier->radius_micro || !certificate) {
        return ARQ_ERROR_NULL;
    }
    if (certifier->n0 == 0 || certifier->n == 0 || certifier->radii == 0 || certifier->radius_micro[0] != 0) {
        return ARQ_ERROR_ARGUMENT;
    }
    for (uint32_t i = 1; i < certifier->radii; i++) {
        if (certifier->counts[i] < certifier->counts[i - 1] ||
            certifier->radius_micro[i] <= certifier->radius_micro[i - 1]) {
            return ARQ_ERROR_ARGUMENT;
        }
    }
    arq_status status = count_afresh(model, noise, certifier->seed, ARQ_STAGE_SELECT, image_id, image, certifier->n0,
                                     votes, vote_count, work);
    if (status != ARQ_OK) {
        return status;
    }
    certificate->selected = most_votes(votes, vote_count, vote_count);
    status = count_afresh(model, noise, certifier->seed, ARQ_STAGE_ESTIMATE, image_id, image, certifier->n, votes,
                          vote_count, work);
    if (status != ARQ_OK) {
        return status;
    }
    certificate->votes = votes[certificate->selected];
    certificate->predicted = ARQ_ABSTAIN;
    certificate->radius_micro = 0;
    for (uint32_t i = 0; i < certifier->radii && certificate->votes >= certifier->counts[i]; i++) {
        certificate->predicted = certificate->selected;
        certificate->radius_micro = certifier->radius_micro[i];
    }
    return ARQ_OK;
}
