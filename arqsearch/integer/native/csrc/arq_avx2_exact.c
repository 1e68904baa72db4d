/* AVX2 epilogue, the slow half: rescaling in 64 bits, and what is finished one element at a time. */
#include "arq_avx2.h"

#ifdef ARQ_WITH_AVX2

ARQ_AVX2 void arq_avx2_join(const arq_strip *strip, size_t vectors)
{
    const __m256i factors = _mm256_set1_epi32(strip->join);
    for (size_t i = 0; strip->halves && i < vectors; ++i) {
        strip->sums[i] = _mm256_madd_epi16(strip->sums[i], factors);
    }
}

/* round(x * M / 2^k) of the even lanes, clipped, in 64 bits. |x * M| < 2^62 and half <= 2^61, so adding 2^62 makes the
 * value non-negative, and 2^62 is a multiple of 2^k: a logical shift gives floor(v / 2^k) + 2^(62 - k). */
ARQ_AVX2_INLINE __m256i round_even_lanes(__m256i x, __m256i multiplier, __m256i shift, uint32_t rounding, __m256i lo,
                                         __m256i hi)
{
    const __m256i one = _mm256_set1_epi64x(1), zero = _mm256_setzero_si256();
    const __m256i offset = _mm256_set1_epi64x((int64_t)1 << 62);
    const __m256i unit = _mm256_sllv_epi64(one, shift);
    /* Half of 2^k; 0 for k = 0 and for floor. */
    const __m256i half = rounding == ARQ_FLOOR ? zero : _mm256_srli_epi64(unit, 1);
    const __m256i v = _mm256_add_epi64(_mm256_mul_epi32(x, multiplier), half);
    __m256i y = _mm256_sub_epi64(_mm256_srlv_epi64(_mm256_add_epi64(v, offset), shift),
                                 _mm256_srlv_epi64(offset, shift));
    if (rounding == ARQ_HALF_EVEN) {
        /* A tie was rounded up: take it back where the result is odd. With k = 0 there are no ties. */
        const __m256i rest = _mm256_and_si256(v, _mm256_sub_epi64(unit, one));
        const __m256i tie = _mm256_and_si256(_mm256_cmpeq_epi64(rest, zero), _mm256_cmpgt_epi64(unit, one));
        y = _mm256_sub_epi64(y, _mm256_and_si256(_mm256_and_si256(tie, y), one));
    }
    y = _mm256_blendv_epi8(y, lo, _mm256_cmpgt_epi64(lo, y));
    return _mm256_blendv_epi8(y, hi, _mm256_cmpgt_epi64(y, hi));
}

/* y = clip(round((sum + bias) * M / 2^k)) in place (exact), or sum + bias without a rescale. `vectors` of 8 lanes a
 * pixel; their constants repeat. */
ARQ_AVX2 void arq_avx2_rescale(const arq_conv *task, const arq_strip *strip, uint32_t lanes, uint32_t vectors)
{
    const arq_rescale *r = task->after.rescale;
    const __m256i *bias = (const __m256i *)(const void *)arq_pack_row(strip->prepared, lanes, strip->block, 0);
    const size_t row = lanes / 8u;
    const __m256i low_half = _mm256_set1_epi64x(0xFFFFFFFF);
    for (uint32_t v = 0; v < vectors; ++v) {
        const __m256i b = arq_avx2_load(bias + v);
        if (r == NULL) {
            for (uint32_t p = 0; p < strip->count; ++p) {
                strip->sums[p * vectors + v] = _mm256_add_epi32(strip->sums[p * vectors + v], b);
            }
            continue;
        }
        const __m256i m = arq_avx2_load(bias + ARQ_ROW_MULTIPLIER * row + v);
        const __m256i k = arq_avx2_load(bias + ARQ_ROW_SHIFT * row + v);
        const __m256i m_odd = _mm256_srli_epi64(m, 32), k_odd = _mm256_srli_epi64(k, 32);
        const __m256i k_even = _mm256_and_si256(k, low_half);
        const __m256i lo = _mm256_set1_epi64x(r->lo), hi = _mm256_set1_epi64x(r->hi);
        for (uint32_t p = 0; p < strip->count; ++p) {
            const __m256i x = _mm256_add_epi32(strip->sums[p * vectors + v], b);
            const __m256i even = round_even_lanes(x, m, k_even, r->rounding, lo, hi);
            const __m256i odd = round_even_lanes(_mm256_srli_epi64(x, 32), m_odd, k_odd, r->rounding, lo, hi);
            strip->sums[p * vectors + v] = _mm256_blend_epi32(even, _mm256_slli_epi64(odd, 32), 0xAA);
        }
    }
}

/* ---- one element at a time ------------------------------------------------------------------------------------ */

/* One sum (without bias) of channel c of a pixel; channels behind the last are padding. */
static void finish_element(const arq_conv *task, uint32_t pixel, uint32_t c, int32_t sum, int32_t bias)
{
    if (c < task->out.channels) {
        const size_t element = (size_t)pixel * task->out.channels + c;
        const int32_t acc = arq_signed((uint32_t)sum + (uint32_t)bias);
        arq_store(&task->out, element, arq_finish_one(&task->after, acc, c, element));
    }
}

void arq_avx2_finish_elements(const arq_conv *task, const arq_strip *strip)
{
    const int32_t *bias = arq_pack_row(strip->prepared, 16, strip->block, ARQ_ROW_BIAS);
    const int32_t *sums = (const int32_t *)(const void *)strip->sums;
    arq_avx2_join(strip, (size_t)strip->count * strip->width / 8);
    for (uint32_t p = 0; p < strip->count; ++p) {
        for (uint32_t lane = 0; lane < strip->width; ++lane) {
            const uint32_t c = strip->channel + arq_pack_channel(strip->width, lane);
            finish_element(task, strip->first + p, c, sums[(size_t)p * strip->width + lane], bias[lane]);
        }
    }
}

/* Lanes of a depthwise block: see arq_pack.h; in a block of 16 channels every other 4 belong to the second pixel. */
void arq_avx2_finish_depthwise_elements(const arq_conv *task, const arq_strip *strip, uint32_t in_block)
{
    const int32_t *bias = arq_pack_row(strip->prepared, 32, strip->block, ARQ_ROW_BIAS);
    const int32_t *sums = (const int32_t *)(const void *)strip->sums;
    const uint32_t pixels = in_block == 32 ? 1 : 2;
    arq_avx2_join(strip, 4 * (size_t)((strip->count + pixels - 1) / pixels));
    for (uint32_t p = 0; p < strip->count; p += pixels, sums += 32) {
        for (uint32_t lane = 0; lane < 32; ++lane) {
            const uint32_t place = 4u * (lane >> 3) + (lane & 3u), half = lane >> 2 & 1u;
            const uint32_t pixel = p + (pixels == 2 ? half : 0);
            if (pixel < strip->count) {
                finish_element(task, strip->first + pixel, strip->channel + place + (pixels == 1 ? 16u * half : 0),
                               sums[lane], bias[lane]);
            }
        }
    }
}

#endif
