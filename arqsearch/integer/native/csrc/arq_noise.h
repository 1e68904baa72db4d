/* What drawing shares with its vector form. Internal. */
#ifndef ARQ_NOISE_H
#define ARQ_NOISE_H

#include "arq_smoothing.h"

/* Top bits of a word that choose an entry of the guide, and the entries. */
#define ARQ_GUIDE_SHIFT 16
#define ARQ_GUIDE_ENTRIES 65536u

/* The noise of one sample: what all its coordinates have in common. */
typedef struct arq_draw {
    const arq_noise *noise;
    uint64_t seed;
    uint32_t sample, image_id, stage;
} arq_draw;

/* The noise of word `lane` of a block, whose high 32 bits are `word`, from the thresholds themselves. */
int16_t arq_noise_exact(const arq_draw *draw, uint32_t block, uint32_t lane, uint32_t word);

/* out = image (may be null) + noise of the first blocks of four coordinates, with the guide of the table. Draws whole
 * vectors only and returns how many blocks it did, at most `blocks`; 0 where the processor has no such form. */
uint32_t arq_noise_vector(const arq_draw *draw, const uint8_t *image, int16_t *out, uint32_t blocks);

#endif
