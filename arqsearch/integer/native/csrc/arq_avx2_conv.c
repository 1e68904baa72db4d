/* AVX2 convolution: sums of a strip of output pixels for a block of 16 (or 8) channels.
 *
 * A tile holds 6, 4 or 1 pixels x 16 channels (8 pixels x 8 channels) in registers and walks over the window: each step
 * broadcasts 4 neighbouring codes of a pixel and multiplies them with the weights of 8 channels at a time. Pixels have
 * pointers of their own, so tiles run on across the ends of rows. With 12 (or 8) sums in registers the loop is bound by
 * its vpmaddubsw and vpaddw, not by loads.
 *
 * Two ways to multiply:
 *   bytes  vpmaddubsw + vpaddw: two int16 parts a channel (32 products in 2 instructions). Exact as long as the parts
 *          fit int16: to the end for ARQ_SUM_INT16, for `depth` steps for ARQ_SUM_PAIRS, then they are widened.
 *   words  vpmaddwd + vpaddd on weights of int16: exact for any 8-bit codes. The codes under a strip are widened into a
 *          buffer once; where they are too many for it, each broadcast is widened by itself.
 */
#include "arq_avx2.h"

#ifdef ARQ_WITH_AVX2

/* How one step multiplies. */
enum {
    BYTES = 0,   /* int16 parts */
    JOINED = 1,  /* as BYTES, but each product is widened at once: depth 1 */
    WORDS = 2,   /* int16 weights, codes widened before: a step is half as many channels */
    SPREAD = 3   /* int16 weights, codes widened here */
};

/* What all tiles of a strip have in common. */
typedef struct walk {
    const unsigned char *input;
    size_t row_bytes;
    uint32_t rows, steps; /* of the kernel; steps of 4 bytes in each row */
    const unsigned char *weights;
} walk;

/* One step: the products of `vectors` x 8 channels with 4 bytes of each pixel. `pixels`, `vectors` and `kind` are
 * constants where this is expanded, so that `sums` are registers. Returns the weights of the next step. */
ARQ_AVX2_INLINE const unsigned char *one_step(const int pixels, const int vectors, const int kind,
                                              const unsigned char *const *from, size_t at,
                                              const unsigned char *weights, __m256i sums[8][2])
{
    const int loads = kind == SPREAD ? 2 * vectors : vectors;
    __m256i w[4];
    ARQ_AVX2_UNROLL
    for (int v = 0; v < loads; ++v) {
        w[v] = arq_avx2_load(weights + 32 * v);
    }
    ARQ_AVX2_UNROLL
    for (int p = 0; p < pixels; ++p) {
        const __m256i x = arq_avx2_broadcast(from[p] + at);
        ARQ_AVX2_UNROLL
        for (int v = 0; v < vectors; ++v) {
            __m256i sum = sums[p][v];
            if (kind == BYTES) {
                sum = _mm256_add_epi16(sum, _mm256_maddubs_epi16(x, w[v]));
            } else if (kind == JOINED) {
                const __m256i pair = _mm256_maddubs_epi16(x, w[v]);
                sum = _mm256_add_epi32(sum, _mm256_madd_epi16(pair, _mm256_set1_epi16(1)));
            } else if (kind == WORDS) {
                sum = _mm256_add_epi32(sum, _mm256_madd_epi16(x, w[v]));
            } else {
                /* bytes 0, 1 and 2, 3 of each four, as int16 */
                const __m256i low = _mm256_shuffle_epi8(x, _mm256_set1_epi32((int32_t)0x80018000u));
                const __m256i high = _mm256_shuffle_epi8(x, _mm256_set1_epi32((int32_t)0x80038002u));
                sum = _mm256_add_epi32(sum, _mm256_madd_epi16(low, w[v]));
                sum = _mm256_add_epi32(sum, _mm256_madd_epi16(high, w[vectors + v]));
            }
            ARQ_AVX2_KEEP(sum);
            sums[p][v] = sum;
        }
    }
    return weights + 32 * loads;
}

/* Sums of `pixels` x (8 * vectors) channels over the whole window. */
ARQ_AVX2_INLINE void tile(const int pixels, const int vectors, const int kind, const walk *over, const size_t *offsets,
                          __m256i *to)
{
    const unsigned char *weights = over->weights, *from[8];
    const size_t length = 4 * (size_t)over->steps;
    __m256i sums[8][2];
    size_t start = 0;
    ARQ_AVX2_UNROLL
    for (int p = 0; p < pixels; ++p) {
        from[p] = over->input + offsets[p];
        ARQ_AVX2_UNROLL
        for (int v = 0; v < vectors; ++v) {
            sums[p][v] = _mm256_setzero_si256();
        }
    }
    for (uint32_t row = 0; row < over->rows; ++row, start += over->row_bytes) {
        const size_t stop = start + length;
        size_t at = start;
        for (; at + 8 <= stop; at += 8) {
            weights = one_step(pixels, vectors, kind, from, at, weights, sums);
            weights = one_step(pixels, vectors, kind, from, at + 4, weights, sums);
        }
        if (at < stop) {
            weights = one_step(pixels, vectors, kind, from, at, weights, sums);
        }
    }
    ARQ_AVX2_UNROLL
    for (int p = 0; p < pixels; ++p) {
        ARQ_AVX2_UNROLL
        for (int v = 0; v < vectors; ++v) {
            _mm256_storeu_si256(to + vectors * p + v, sums[p][v]);
        }
    }
}

/* The same in int16 parts that are widened and added to the int32 sums at `to` after every `depth` steps. */
ARQ_AVX2_INLINE void deep_tile(const int pixels, const int vectors, uint32_t depth, const walk *over,
                               const size_t *offsets, __m256i *to)
{
    const __m256i ones = _mm256_set1_epi16(1);
    const unsigned char *weights = over->weights, *from[8];
    const size_t length = 4 * (size_t)over->steps;
    __m256i sums[8][2];
    size_t start = 0, room = 4 * (size_t)depth;
    ARQ_AVX2_UNROLL
    for (int p = 0; p < pixels; ++p) {
        from[p] = over->input + offsets[p];
        ARQ_AVX2_UNROLL
        for (int v = 0; v < vectors; ++v) {
            sums[p][v] = _mm256_setzero_si256();
            _mm256_storeu_si256(to + vectors * p + v, sums[p][v]);
        }
    }
    for (uint32_t row = 0; row < over->rows; ++row, start += over->row_bytes) {
        const size_t stop = start + length;
        for (size_t at = start; at < stop;) {
            const size_t until = stop - at < room ? stop : at + room;
            room -= until - at;
            for (; at < until; at += 4) {
                weights = one_step(pixels, vectors, BYTES, from, at, weights, sums);
            }
            if (room == 0 || (at == stop && row + 1 == over->rows)) {
                room = 4 * (size_t)depth;
                ARQ_AVX2_UNROLL
                for (int p = 0; p < pixels; ++p) {
                    ARQ_AVX2_UNROLL
                    for (int v = 0; v < vectors; ++v) {
                        __m256i *total = to + vectors * p + v;
                        const __m256i wide = _mm256_madd_epi16(sums[p][v], ones);
                        _mm256_storeu_si256(total, _mm256_add_epi32(_mm256_loadu_si256(total), wide));
                        sums[p][v] = _mm256_setzero_si256();
                    }
                }
            }
        }
    }
}

/* Tiles of the named kind over `count` pixels: as many large ones as fit, then 4 at a time, a single one as such. */
#define STRIP_OF_TILES(name, kind)                                                                                    \
    ARQ_AVX2 static void name##_16(const walk *over, const size_t *offsets, uint32_t count, __m256i *sums)            \
    {                                                                                                                 \
        uint32_t p = 0;                                                                                               \
        for (; p + 6 <= count; p += 6) {                                                                              \
            tile(6, 2, kind, over, offsets + p, sums + 2 * p);                                                        \
        }                                                                                                             \
        for (; p + 1 < count; p += 4) {                                                                               \
            tile(4, 2, kind, over, offsets + p, sums + 2 * p);                                                        \
        }                                                                                                             \
        if (p < count) {                                                                                              \
            tile(1, 2, kind, over, offsets + p, sums + 2 * p);                                                        \
        }                                                                                                             \
    }                                                                                                                 \
    ARQ_AVX2 static void name##_8(const walk *over, const size_t *offsets, uint32_t count, __m256i *sums)             \
    {                                                                                                                 \
        for (uint32_t p = 0; p < count; p += 8) {                                                                     \
            tile(8, 1, kind, over, offsets + p, sums + p);                                                            \
        }                                                                                                             \
    }

STRIP_OF_TILES(bytes, BYTES)
STRIP_OF_TILES(joined, JOINED)
STRIP_OF_TILES(words, WORDS)

/* Rare (see above): one size is enough. */
ARQ_AVX2 static void spread(const walk *over, const size_t *offsets, uint32_t count, uint32_t width, __m256i *sums)
{
    for (uint32_t p = 0; p < count; ++p) {
        if (width == 16) {
            tile(1, 2, SPREAD, over, offsets + p, sums + 2 * p);
        } else {
            tile(1, 1, SPREAD, over, offsets + p, sums + p);
        }
    }
}

ARQ_AVX2 static void deep(const walk *over, const size_t *offsets, uint32_t count, uint32_t width, uint32_t depth,
                          __m256i *sums)
{
    for (uint32_t p = 0; p < count; p += width == 16 ? 4 : 8) {
        if (width == 16) {
            deep_tile(4, 2, depth, over, offsets + p, sums + 2 * p);
        } else {
            deep_tile(8, 1, depth, over, offsets + p, sums + p);
        }
    }
}

/* Room for the widened codes under a strip. */
#define WIDE_BYTES 32768u

/* The bytes of the image that the windows of pixels first .. first + count - 1 touch. */
static void touched(const arq_conv *task, uint32_t first, uint32_t count, size_t *begin, size_t *end)
{
    const uint32_t width = task->out.width, last = first + count - 1;
    const uint32_t top = first / width, bottom = last / width;
    const uint32_t left = top == bottom ? first % width : 0, right = top == bottom ? last % width : width - 1;
    *begin = (size_t)top * task->stride_h * task->row_bytes + (size_t)left * task->stride_w * task->pixel_bytes;
    *end = ((size_t)bottom * task->stride_h + task->kernel_h - 1) * task->row_bytes +
           ((size_t)right * task->stride_w + task->kernel_w) * task->pixel_bytes;
}

/* Widen codes begin .. end - 1 (their number is a multiple of 4). */
ARQ_AVX2 static void widen(const unsigned char *input, size_t begin, size_t end, unsigned char *wide)
{
    size_t i = begin;
    for (; i + 16 <= end; i += 16) {
        const __m128i codes = _mm_loadu_si128((const __m128i *)(const void *)(input + i));
        _mm256_storeu_si256((__m256i *)(void *)(wide + 2 * (i - begin)), _mm256_cvtepu8_epi16(codes));
    }
    for (; i < end; ++i) {
        wide[2 * (i - begin)] = input[i];
        wide[2 * (i - begin) + 1] = 0;
    }
}

static void strip_sums(const arq_conv *task, const walk *over, const size_t *offsets, int wide, arq_strip *strip)
{
    const uint32_t all = over->rows * over->steps, count = strip->count, width = strip->width;
    strip->halves = 0;
    if (task->sum_class == ARQ_SUM_U8) {
        if (!wide) {
            spread(over, offsets, count, width, strip->sums);
        } else if (width == 16) {
            words_16(over, offsets, count, strip->sums);
        } else {
            words_8(over, offsets, count, strip->sums);
        }
    } else if (task->sum_class == ARQ_SUM_INT16 || task->depth >= all) {
        strip->halves = 1;
        if (width == 16) {
            bytes_16(over, offsets, count, strip->sums);
        } else {
            bytes_8(over, offsets, count, strip->sums);
        }
    } else if (task->depth > 1) {
        deep(over, offsets, count, width, task->depth, strip->sums);
    } else if (width == 16) {
        joined_16(over, offsets, count, strip->sums);
    } else {
        joined_8(over, offsets, count, strip->sums);
    }
}

ARQ_AVX2 void arq_avx2_conv(const arq_conv *task)
{
    const uint32_t pixels = task->out.height * task->out.width, blocks = arq_pack_blocks(task->out.channels);
    const uint32_t bytes = task->sum_class == ARQ_SUM_U8 ? 2 : 1;
    const uint32_t steps = arq_pack_row_steps(task->kernel_w, task->channels);
    size_t offsets[ARQ_STRIP + ARQ_STRIP_SLACK], begin = 0, end = 0;
    __m256i sums[2 * (ARQ_STRIP + ARQ_STRIP_SLACK)];
    __m256i wide[WIDE_BYTES / sizeof(__m256i)];
    arq_avx2_plan plan;
    uint32_t count;
    arq_avx2_make_plan(task, &plan);
    for (uint32_t first = 0; first < pixels; first += count) {
        walk over = {task->input, task->row_bytes, task->kernel_h, steps, NULL};
        int use_wide = 0;
        count = pixels - first < ARQ_STRIP ? pixels - first : ARQ_STRIP;
        arq_avx2_windows(task, first, count, offsets);
        if (task->sum_class == ARQ_SUM_U8) {
            touched(task, first, count, &begin, &end);
            while (2 * (end - begin) > WIDE_BYTES && count > 1) {
                count = count > 8 ? (count / 2 + 3) & ~3u : count / 2;
                touched(task, first, count, &begin, &end);
            }
            use_wide = 2 * (end - begin) <= WIDE_BYTES;
            arq_avx2_windows(task, first, count, offsets);
            if (use_wide) {
                widen(task->input, begin, end, (unsigned char *)wide);
                for (uint32_t p = 0; p < count + ARQ_STRIP_SLACK; ++p) {
                    offsets[p] = 2 * (offsets[p] - begin);
                }
                over.input = (const unsigned char *)wide;
                over.row_bytes = 2 * task->row_bytes;
                over.steps = 2 * steps;
            }
        }
        for (uint32_t block = 0; block < blocks; ++block) {
            arq_strip strip = {task->prepared, block, 16 * block, 16, first, count, 0, 0x00010001, sums};
            strip.width = arq_pack_width(task->out.channels, block);
            over.weights = arq_pack_weights(task->prepared, task->out.channels, block,
                                            (size_t)task->kernel_h * steps, bytes);
            strip_sums(task, &over, offsets, use_wide, &strip);
            arq_avx2_finish(task, &plan, &strip);
        }
    }
}

#endif
