/* What the AVX2 kernels share: the strip of sums between a convolution and its epilogue. Internal. */
#ifndef ARQ_AVX2_H
#define ARQ_AVX2_H

#include "arq_pack.h"

#ifdef ARQ_WITH_AVX2

#include <immintrin.h>

/* Every function that holds vectors says so itself: the rest of the build needs no compiler flag. */
#define ARQ_AVX2 __attribute__((target("avx2")))
#define ARQ_AVX2_INLINE static inline __attribute__((always_inline, target("avx2")))

/* Output pixels whose sums are formed before they are finished: their sums stay in the first-level cache. */
#define ARQ_STRIP 64u
/* A tile that is not full computes its last pixel again, into this room. */
#define ARQ_STRIP_SLACK 8u

/* Sums of one block of channels: 16 (or 8) int32 lanes a pixel for a convolution, 32 for a depthwise one. */
typedef struct arq_strip {
    const unsigned char *prepared; /* of the layer */
    uint32_t block;
    uint32_t channel, width;       /* first channel and number of lanes (8, 16; depthwise 32) */
    uint32_t first, count;         /* pixels of the output, in memory order */
    int halves;                    /* a lane holds two int16 parts, not one int32 */
    int32_t join;                  /* what vpmaddwd multiplies the parts with */
    __m256i *sums;
} arq_strip;

/* Constants of one vector of 8 lanes. */
typedef struct arq_avx2_lanes {
    __m256i low, high, multiplier, offset, shift;
} arq_avx2_lanes;

/* Kinds of residuals. A lean one is U8, and neither it nor the sum needs a clip before they are added. */
enum { NO_RESIDUAL = 0, LEAN_RESIDUAL = 1, U8_RESIDUAL = 2, I16_RESIDUAL = 3 };

/* What the epilogue of a whole convolution needs besides the constants of its blocks. */
typedef struct arq_avx2_plan {
    int quick;                         /* results pass through int16; otherwise one element at a time */
    int residual;
    int out_u8;
    int clip_residual;                 /* its clip can matter */
    int by_channel;                    /* it is rescaled with a multiplier for each channel */
    int32_t zero;                      /* of the output */
    __m256i zeros;                     /* all int16 */
    __m256i lo, hi;                    /* int16: of a rescaled sum, before a residual */
    __m256i residual_lo, residual_hi;  /* int16 */
    __m256i out_lo, out_hi;            /* int16 values, or bytes of codes */
    arq_avx2_lanes residual_lanes[2];  /* of a U8 residual; `low` and `high` are not used */
} arq_avx2_plan;

/* arq_avx2_plan.c. Lanes of a U8 residual, from channel `first` on: code -> (code * multiplier + offset) >> shift;
 * returns 0 where there is no such form. */
void arq_avx2_make_plan(const arq_conv *task, arq_avx2_plan *plan);
int arq_avx2_residual_lanes(const arq_conv *task, uint32_t first, uint32_t width, arq_avx2_plan *plan);

/* arq_avx2_finish.c. A block of a depthwise convolution has 32 or 16 channels. */
void arq_avx2_finish(const arq_conv *task, const arq_avx2_plan *plan, const arq_strip *strip);
void arq_avx2_finish_depthwise(const arq_conv *task, const arq_avx2_plan *plan, const arq_strip *strip,
                               uint32_t in_block);

/* arq_avx2_exact.c: `vectors` of 8 lanes hold a pixel (depthwise: or two), `lanes` is the length of a row of constants.
 * Join two int16 parts of each sum; rescale sums in place without the 32-bit form; finish what the plan cannot. */
void arq_avx2_join(const arq_strip *strip, size_t vectors);
void arq_avx2_rescale(const arq_conv *task, const arq_strip *strip, uint32_t lanes, uint32_t vectors);
void arq_avx2_finish_elements(const arq_conv *task, const arq_strip *strip);
void arq_avx2_finish_depthwise_elements(const arq_conv *task, const arq_strip *strip, uint32_t in_block);

void arq_avx2_conv(const arq_conv *task);
void arq_avx2_depthwise(const arq_conv *task);

/* Where the windows of a strip's pixels start, in bytes; the last one is repeated to fill a tile. */
static inline void arq_avx2_windows(const arq_conv *task, uint32_t first, uint32_t count, size_t *offsets)
{
    uint32_t x = first % task->out.width;
    const size_t step = (size_t)task->stride_w * task->pixel_bytes;
    size_t line = (size_t)(first / task->out.width) * task->stride_h * task->row_bytes, at = line + x * step;
    for (uint32_t p = 0; p < count; ++p) {
        offsets[p] = at;
        at += step;
        if (++x == task->out.width) {
            x = 0;
            line += (size_t)task->stride_h * task->row_bytes;
            at = line;
        }
    }
    for (uint32_t p = count; p < count + ARQ_STRIP_SLACK; ++p) {
        offsets[p] = offsets[count - 1];
    }
}

ARQ_AVX2_INLINE __m256i arq_avx2_load(const void *from)
{
    return _mm256_loadu_si256((const __m256i *)from);
}

/* Pins a sum where it is: compilers otherwise regroup the additions of unrolled steps and run out of registers. */
#define ARQ_AVX2_KEEP(sum) __asm__("" : "+x"(sum))

/* Before a loop over registers. gcc needs to be told below -O3; clang unrolls such loops early only if it is not. */
#ifdef __clang__
#define ARQ_AVX2_UNROLL
#else
#define ARQ_AVX2_UNROLL _Pragma("GCC unroll 8")
#endif

/* Four bytes, eight times. */
ARQ_AVX2_INLINE __m256i arq_avx2_broadcast(const unsigned char *from)
{
    int32_t four;
    memcpy(&four, from, sizeof four);
    return _mm256_set1_epi32(four);
}

#endif
#endif
