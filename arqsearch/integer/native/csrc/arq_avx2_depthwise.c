/* AVX2 depthwise convolution: lanes are channels, two taps are interleaved and multiplied at once.
 *
 * A vector holds 32 channels of one pixel, or (in the blocks of 16 channels that are left over) 16 channels of two
 * neighbouring output pixels. Products of two taps are int16 and added as such for as many pairs as fit, then widened.
 * Weights of ARQ_SUM_U8 are split into low + 16 * high, each part summed like small weights (see arq_pack.h).
 */
#include "arq_avx2.h"

#ifdef ARQ_WITH_AVX2

/* What vpmaddwd multiplies the two int16 parts of a sum with: (sum, 0) or (low, high). */
#define PLAIN_JOIN 0x00000001
#define SPLIT_JOIN 0x00100001

/* What all pixels of a strip have in common. */
typedef struct walk {
    const unsigned char *input;    /* first channel of the block */
    const size_t *offsets;         /* of each pixel's window */
    size_t row_bytes, pixel_bytes;
    uint32_t kernel_w, taps;
    uint32_t depth;                /* pairs of taps between widenings */
    uint32_t dwords;               /* that a block of 16 channels may read of a pixel: 1 .. 4 */
    const unsigned char *weights;
} walk;

/* Codes of one tap: 32 channels of a pixel, or 16 of two pixels. */
ARQ_AVX2_INLINE __m256i tap_codes(const unsigned char *first, const unsigned char *second, uint32_t dwords,
                                  const int wide)
{
    if (wide) {
        return arq_avx2_load(first);
    }
    if (dwords == 4) {
        const __m128i low = _mm_loadu_si128((const __m128i *)(const void *)first);
        const __m128i high = _mm_loadu_si128((const __m128i *)(const void *)second);
        return _mm256_inserti128_si256(_mm256_castsi128_si256(low), high, 1);
    }
    const __m128i mask = _mm_cmpgt_epi32(_mm_set1_epi32((int32_t)dwords), _mm_setr_epi32(0, 1, 2, 3));
    const __m128i low = _mm_maskload_epi32((const int *)(const void *)first, mask);
    const __m128i high = _mm_maskload_epi32((const int *)(const void *)second, mask);
    return _mm256_inserti128_si256(_mm256_castsi128_si256(low), high, 1);
}

/* ---- 3 x 3, sums in int16 to the end -------------------------------------------------------------------------- */

/* Two taps of one vector, at byte offsets `a` and `b` of its windows. */
ARQ_AVX2_INLINE void add_taps(const unsigned char *const window[2], size_t a, size_t b, const __m256i weights[4],
                              const int wide, const int split, __m256i part[4])
{
    __m256i first = tap_codes(window[0] + a, window[1] + a, 4, wide);
    __m256i second = tap_codes(window[0] + b, window[1] + b, 4, wide);
    ARQ_AVX2_KEEP(first); /* loaded once */
    ARQ_AVX2_KEEP(second);
    const __m256i low = _mm256_unpacklo_epi8(first, second), high = _mm256_unpackhi_epi8(first, second);
    const int parts = split ? 4 : 2;
    ARQ_AVX2_UNROLL
    for (int v = 0; v < parts; ++v) {
        part[v] = _mm256_add_epi16(part[v], _mm256_maddubs_epi16(v % 2 == 0 ? low : high, weights[v]));
        ARQ_AVX2_KEEP(part[v]);
    }
}

/* Two vectors share their weights where registers suffice. Blocks of 32 channels: a vector is a pixel; of 16: two.
 * Pixels missing at the end are the last one again (arq_avx2_windows). `wide` and `split` are constants. */
ARQ_AVX2_INLINE void sums_3x3(const walk *over, const arq_strip *strip, const int wide, const int split)
{
    const int vectors = split ? 1 : 2, pixels = wide ? 1 : 2, parts = split ? 4 : 2;
    const unsigned char *weights = over->weights;
    const size_t column = over->pixel_bytes, row = over->row_bytes;
    __m256i *sums = strip->sums;
    for (uint32_t n = 0; n < strip->count; n += (uint32_t)(vectors * pixels), sums += 4 * vectors) {
        const size_t *offsets = over->offsets + n;
        const unsigned char *window[2][2];
        __m256i part[2][4];
        ARQ_AVX2_UNROLL
        for (int i = 0; i < vectors; ++i) {
            window[i][0] = over->input + offsets[pixels * i];
            window[i][1] = over->input + offsets[pixels * i + pixels - 1];
            ARQ_AVX2_UNROLL
            for (int v = 0; v < 4; ++v) {
                part[i][v] = _mm256_setzero_si256();
            }
        }
#define PAIR(number, a, b)                                                                                            \
    do {                                                                                                              \
        __m256i w[4];                                                                                                 \
        ARQ_AVX2_UNROLL                                                                                               \
        for (int v = 0; v < parts; ++v) {                                                                             \
            w[v] = arq_avx2_load(weights + (number) * 32 * parts + 32 * v);                                           \
            if (!split) {                                                                                             \
                ARQ_AVX2_KEEP(w[v]);                                                                                  \
            }                                                                                                         \
        }                                                                                                             \
        ARQ_AVX2_UNROLL                                                                                               \
        for (int i = 0; i < vectors; ++i) {                                                                           \
            add_taps(window[i], a, b, w, wide, split, part[i]);                                                       \
        }                                                                                                             \
    } while (0)
        PAIR(0, 0, column);
        PAIR(1, 2 * column, row);
        PAIR(2, row + column, row + 2 * column);
        PAIR(3, 2 * row, 2 * row + column);
        PAIR(4, 2 * row + 2 * column, 2 * row + 2 * column); /* the weight of a tenth tap is 0 */
        ARQ_AVX2_UNROLL
        for (int i = 0; i < vectors; ++i) {
            ARQ_AVX2_UNROLL
            for (int v = 0; v < 2; ++v) {
                sums[4 * i + 2 * v] = _mm256_unpacklo_epi16(part[i][v], part[i][v + 2]);
                sums[4 * i + 2 * v + 1] = _mm256_unpackhi_epi16(part[i][v], part[i][v + 2]);
            }
        }
    }
}

/* Functions of their own, so that each has all registers. */
#define A_3X3(name, wide, split)                                                                                      \
    ARQ_AVX2 static __attribute__((noinline)) void name(const walk *over, const arq_strip *strip)                     \
    {                                                                                                                 \
        sums_3x3(over, strip, wide, split);                                                                           \
    }

A_3X3(sums_3x3_32, 1, 0)
A_3X3(sums_3x3_32_split, 1, 1)
A_3X3(sums_3x3_16, 0, 0)
A_3X3(sums_3x3_16_split, 0, 1)

/* ---- any window, class and number of channels ----------------------------------------------------------------- */

/* Add two int16 parts of each channel to the int32 sums, and clear them. */
ARQ_AVX2_INLINE void widen(__m256i *low, __m256i *high, __m256i join, __m256i *sums)
{
    sums[0] = _mm256_add_epi32(sums[0], _mm256_madd_epi16(_mm256_unpacklo_epi16(*low, *high), join));
    sums[1] = _mm256_add_epi32(sums[1], _mm256_madd_epi16(_mm256_unpackhi_epi16(*low, *high), join));
    *low = *high = _mm256_setzero_si256();
}

/* The sums of one vector, as int32. Parts 0 and 1 hold the sums (or their low parts), 2 and 3 the high parts. */
ARQ_AVX2_INLINE void sum_window(const walk *over, const unsigned char *first, const unsigned char *second,
                                __m256i join, const int wide, const int split, __m256i *sums)
{
    const int vectors = split ? 4 : 2;
    const unsigned char *weights = over->weights;
    __m256i part[4], total[4];
    uint32_t column = 0, room = over->depth;
    size_t offset = 0, line = 0;
    ARQ_AVX2_UNROLL
    for (int v = 0; v < 4; ++v) {
        part[v] = total[v] = _mm256_setzero_si256();
    }
    for (uint32_t tap = 0; tap < over->taps; tap += 2, weights += 32 * vectors) {
        __m256i codes[2];
        for (uint32_t j = 0; j < 2; ++j) {
            codes[j] = tap_codes(first + offset, second + offset, over->dwords, wide);
            if (tap + j + 1 < over->taps) { /* the weight of a tap behind the last is 0 */
                offset += over->pixel_bytes;
                if (++column == over->kernel_w) {
                    column = 0;
                    line += over->row_bytes;
                    offset = line;
                }
            }
        }
        const __m256i low = _mm256_unpacklo_epi8(codes[0], codes[1]);
        const __m256i high = _mm256_unpackhi_epi8(codes[0], codes[1]);
        ARQ_AVX2_UNROLL
        for (int v = 0; v < vectors; ++v) {
            const __m256i w = arq_avx2_load(weights + 32 * v);
            part[v] = _mm256_add_epi16(part[v], _mm256_maddubs_epi16(v % 2 == 0 ? low : high, w));
        }
        if (--room == 0) {
            room = over->depth;
            widen(&part[0], &part[2], join, total);
            widen(&part[1], &part[3], join, total + 2);
        }
    }
    widen(&part[0], &part[2], join, total);
    widen(&part[1], &part[3], join, total + 2);
    ARQ_AVX2_UNROLL
    for (int v = 0; v < 4; ++v) {
        sums[v] = total[v];
    }
}

ARQ_AVX2_INLINE void sums_of(const walk *over, const arq_strip *strip, const int wide, const int split)
{
    const __m256i join = _mm256_set1_epi32(split ? SPLIT_JOIN : PLAIN_JOIN);
    __m256i *sums = strip->sums;
    for (uint32_t n = 0; n < strip->count; n += wide ? 1 : 2, sums += 4) {
        const size_t *offsets = over->offsets + n;
        sum_window(over, over->input + offsets[0], over->input + offsets[1], join, wide, split, sums);
    }
}

ARQ_AVX2 static void sums_32(const walk *over, const arq_strip *strip)
{
    sums_of(over, strip, 1, 0);
}

ARQ_AVX2 static void sums_32_split(const walk *over, const arq_strip *strip)
{
    sums_of(over, strip, 1, 1);
}

ARQ_AVX2 static void sums_16(const walk *over, const arq_strip *strip)
{
    sums_of(over, strip, 0, 0);
}

ARQ_AVX2 static void sums_16_split(const walk *over, const arq_strip *strip)
{
    sums_of(over, strip, 0, 1);
}

ARQ_AVX2 void arq_avx2_depthwise(const arq_conv *task)
{
    const uint32_t channels = task->out.channels, pixels = task->out.height * task->out.width;
    const uint32_t taps = task->kernel_h * task->kernel_w, pairs = (taps + 1) / 2;
    const int split = task->sum_class == ARQ_SUM_U8;
    const uint32_t depth = task->sum_class == ARQ_SUM_INT16 ? pairs : split ? 8 : task->depth;
    const int square = task->kernel_h == 3 && task->kernel_w == 3 && depth >= pairs;
    size_t offsets[ARQ_STRIP + ARQ_STRIP_SLACK];
    __m256i sums[4 * (ARQ_STRIP + ARQ_STRIP_SLACK)];
    arq_avx2_plan plan;
    arq_avx2_make_plan(task, &plan);
    for (uint32_t p = 0; p < pixels; p += ARQ_STRIP) {
        const uint32_t count = pixels - p < ARQ_STRIP ? pixels - p : ARQ_STRIP;
        arq_avx2_windows(task, p, count, offsets);
        for (uint32_t block = 0; block < arq_pack_depthwise_blocks(channels); ++block) {
            const uint32_t first = arq_pack_depthwise_first(channels, block), left = (channels - first + 3u) / 4u;
            const int wide = block < channels / 32, small = square && left >= 4;
            const arq_strip strip = {task->prepared, block, first, 32, p, count, small,
                                     split ? SPLIT_JOIN : PLAIN_JOIN, sums};
            const walk over = {task->input + first, offsets, task->row_bytes, task->pixel_bytes, task->kernel_w, taps,
                               depth, left < 4 ? left : 4,
                               arq_pack_depthwise_weights(task->prepared, channels, block, taps, task->sum_class)};
            if (small && wide) {
                (split ? sums_3x3_32_split : sums_3x3_32)(&over, &strip);
            } else if (small) {
                (split ? sums_3x3_16_split : sums_3x3_16)(&over, &strip);
            } else if (wide) {
                (split ? sums_32_split : sums_32)(&over, &strip);
            } else {
                (split ? sums_16_split : sums_16)(&over, &strip);
            }
            arq_avx2_finish_depthwise(task, &plan, &strip, wide ? 32 : 16);
        }
    }
}

#endif
