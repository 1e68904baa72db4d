/* The AVX2 kernels (no VNNI, no AVX-512): their table, the preparation of weights, and the map of codes. */
#include "arq_avx2.h"

#ifdef ARQ_WITH_AVX2

static uint32_t weight_bytes(uint32_t sum_class)
{
    return sum_class == ARQ_SUM_U8 ? 2 : 1;
}

static size_t prepared_bytes(uint32_t out_channels, uint32_t kernel_h, uint32_t kernel_w, uint32_t in_per_group,
                             int depthwise, uint32_t sum_class, const arq_rescale *rescale)
{
    (void)rescale;
    return depthwise ? arq_pack_depthwise_bytes(out_channels, kernel_h * kernel_w, sum_class)
                     : arq_pack_conv_bytes(out_channels, kernel_h, kernel_w, in_per_group, weight_bytes(sum_class));
}

static void prepare(unsigned char *memory, uint32_t out_channels, uint32_t kernel_h, uint32_t kernel_w,
                    uint32_t in_per_group, int depthwise, uint32_t sum_class, uint32_t weight_bits,
                    const uint32_t *packed, const int32_t *bias, int32_t zero, const arq_rescale *rescale)
{
    const arq_pack_source from = {out_channels, kernel_h, kernel_w, in_per_group, sum_class,
                                  weight_bits,  packed,   bias,     zero,         rescale};
    if (depthwise) {
        arq_pack_depthwise(memory, &from);
    } else {
        arq_pack_conv(memory, &from, weight_bytes(sum_class));
    }
}

static void conv(const arq_conv *task)
{
    if (task->depthwise) {
        arq_avx2_depthwise(task);
    } else {
        arq_avx2_conv(task);
    }
}

/* ---- map of codes --------------------------------------------------------------------------------------------- */

/* One stored code. */
static unsigned char map_one(unsigned char code, int32_t in_zero, int32_t out_zero, const arq_rescale *r, uint32_t c)
{
    return (unsigned char)((uint32_t)arq_rescale_value(r, (int32_t)code + in_zero, c) - (uint32_t)out_zero);
}

/* 8 codes as int32, through the fast form of one multiplier. */
ARQ_AVX2_INLINE __m256i map8(const unsigned char *in, __m256i multiplier, __m256i offset, __m128i shift)
{
    const __m256i x = _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *)(const void *)in));
    return _mm256_sra_epi32(_mm256_add_epi32(_mm256_mullo_epi32(x, multiplier), offset), shift);
}

/* Whole 32s of `count` elements; returns how many were done. Needs a fast form that can do without its first clip, and
 * results that pass through int16. */
ARQ_AVX2 static size_t map_vectors(const unsigned char *in, int32_t in_zero, unsigned char *out, int32_t out_zero,
                                   size_t count, const arq_rescale *r)
{
    const arq_pack_range range = {0, 255, 0};
    const arq_pack_fast fast = arq_pack_fold(r, 0, in_zero, &range);
    size_t i = 0;
    if (fast.form == ARQ_FORM_FAST || r->lo < INT16_MIN || r->hi > INT16_MAX || r->lo > r->hi || out_zero < -16384 ||
        out_zero > 16384 || r->lo < out_zero || r->hi > out_zero + 255) {
        return 0;
    }
    const __m256i multiplier = _mm256_set1_epi32(fast.multiplier), offset = _mm256_set1_epi32(fast.offset);
    const __m256i zero = _mm256_set1_epi16((int16_t)out_zero);
    const __m256i lo = _mm256_set1_epi8((char)(unsigned char)(r->lo - out_zero));
    const __m256i hi = _mm256_set1_epi8((char)(unsigned char)(r->hi - out_zero));
    const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
    const __m128i shift = _mm_cvtsi32_si128(fast.shift);
    for (; i + 32 <= count; i += 32) {
        const __m256i a = _mm256_packs_epi32(map8(in + i, multiplier, offset, shift),
                                             map8(in + i + 8, multiplier, offset, shift));
        const __m256i b = _mm256_packs_epi32(map8(in + i + 16, multiplier, offset, shift),
                                             map8(in + i + 24, multiplier, offset, shift));
        const __m256i codes = _mm256_packus_epi16(_mm256_subs_epi16(a, zero), _mm256_subs_epi16(b, zero));
        const __m256i clipped = _mm256_min_epu8(_mm256_max_epu8(codes, lo), hi);
        _mm256_storeu_si256((__m256i *)(void *)(out + i), _mm256_permutevar8x32_epi32(clipped, order));
    }
    return i;
}

/* Many elements with one multiplier and no fast form: all codes first. */
#define TABLE_PAYS 512u

static void map_u8(const unsigned char *in, int32_t in_zero, unsigned char *out, int32_t out_zero, size_t count,
                   const arq_rescale *rescale, uint32_t channels)
{
    size_t i = 0;
    if (channels == 1 && rescale->fast && count >= 32) {
        i = map_vectors(in, in_zero, out, out_zero, count, rescale);
    }
    if (channels == 1 && count - i >= TABLE_PAYS) {
        unsigned char table[256];
        for (uint32_t code = 0; code < 256; ++code) {
            table[code] = map_one((unsigned char)code, in_zero, out_zero, rescale, 0);
        }
        for (; i < count; ++i) {
            out[i] = table[in[i]];
        }
    }
    uint32_t channel = (uint32_t)(i % channels);
    for (; i < count; ++i) {
        out[i] = map_one(in[i], in_zero, out_zero, rescale, channel);
        channel = channel + 1 == channels ? 0 : channel + 1;
    }
}

const arq_kernels *arq_kernels_avx2(void)
{
    static const arq_kernels kernels = {ARQ_ISA_AVX2, prepared_bytes, prepare, conv, map_u8};
    return &kernels;
}

#endif
