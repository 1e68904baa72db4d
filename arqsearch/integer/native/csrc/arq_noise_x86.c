/* Drawing noise with AVX2 or AVX-512: Philox on 4 or 8 blocks at a time, one block in each 64-bit lane.
 *
 * vpmuludq multiplies the low halves of 64-bit lanes and gives whole products, so a product serves as two words: its
 * low half in place, its high half after a shift. High halves of lanes may hold anything between rounds.
 */
#include "arq_noise.h"

#if !defined(ARQ_PORTABLE_ONLY) && defined(__GNUC__) && defined(__x86_64__)

#include <immintrin.h>

enum {
    GROUP_BLOCKS = 16, /* blocks drawn before their words are looked up */
    GROUP = 4 * GROUP_BLOCKS
};

#define AVX2 __attribute__((target("avx2")))
#define AVX512 __attribute__((target("avx512f")))

/* The key of each round, its two words in the low halves of two 64-bit numbers. */
typedef struct round_keys {
    uint32_t low[10], high[10];
} round_keys;

static round_keys expand_key(uint64_t seed)
{
    round_keys keys;
    uint32_t low = (uint32_t)seed, high = (uint32_t)(seed >> 32);
    for (int round = 0; round < 10; round++) {
        keys.low[round] = low;
        keys.high[round] = high;
        low += 0x9E3779B9u;
        high += 0xBB67AE85u;
    }
    return keys;
}

/* Words of GROUP_BLOCKS blocks from `block` on, in the order of the coordinates. */
AVX2 static void words_avx2(const arq_draw *draw, const round_keys *keys, uint32_t block, uint32_t words[GROUP])
{
    enum { SETS = GROUP_BLOCKS / 4 };
    const __m256i m0 = _mm256_set1_epi64x(0xD2511F53);
    const __m256i m1 = _mm256_set1_epi64x(0xCD9E8D57);
    __m256i c0[SETS], c1[SETS], c2[SETS], c3[SETS];
    for (int s = 0; s < SETS; s++) {
        c0[s] = _mm256_add_epi64(_mm256_set1_epi64x((int64_t)block + 4 * s), _mm256_setr_epi64x(0, 1, 2, 3));
        c1[s] = _mm256_set1_epi64x((int64_t)draw->sample);
        c2[s] = _mm256_set1_epi64x((int64_t)draw->image_id);
        c3[s] = _mm256_set1_epi64x((int64_t)draw->stage << 24);
    }
    for (int round = 0; round < 10; round++) {
        const __m256i k0 = _mm256_set1_epi64x((int64_t)keys->low[round]);
        const __m256i k1 = _mm256_set1_epi64x((int64_t)keys->high[round]);
        for (int s = 0; s < SETS; s++) {
            const __m256i p0 = _mm256_mul_epu32(c0[s], m0);
            const __m256i p1 = _mm256_mul_epu32(c2[s], m1);
            c0[s] = _mm256_xor_si256(_mm256_srli_epi64(p1, 32), _mm256_xor_si256(c1[s], k0));
            c2[s] = _mm256_xor_si256(_mm256_srli_epi64(p0, 32), _mm256_xor_si256(c3[s], k1));
            c1[s] = p1;
            c3[s] = p0;
        }
    }
    for (int s = 0; s < SETS; s++) {
        const __m256i front = _mm256_blend_epi32(c0[s], _mm256_slli_epi64(c1[s], 32), 0xAA);
        const __m256i back = _mm256_blend_epi32(c2[s], _mm256_slli_epi64(c3[s], 32), 0xAA);
        const __m256i even = _mm256_unpacklo_epi64(front, back); /* blocks 0 and 2 */
        const __m256i odd = _mm256_unpackhi_epi64(front, back);  /* blocks 1 and 3 */
        _mm256_storeu_si256((__m256i *)(words + 16 * s), _mm256_permute2x128_si256(even, odd, 0x20));
        _mm256_storeu_si256((__m256i *)(words + 16 * s + 8), _mm256_permute2x128_si256(even, odd, 0x31));
    }
}

AVX512 static void words_avx512(const arq_draw *draw, const round_keys *keys, uint32_t block, uint32_t words[GROUP])
{
    enum { SETS = GROUP_BLOCKS / 8 };
    const __m512i m0 = _mm512_set1_epi64(0xD2511F53);
    const __m512i m1 = _mm512_set1_epi64(0xCD9E8D57);
    __m512i c0[SETS], c1[SETS], c2[SETS], c3[SETS];
    for (int s = 0; s < SETS; s++) {
        c0[s] = _mm512_add_epi64(_mm512_set1_epi64((int64_t)block + 8 * s), _mm512_setr_epi64(0, 1, 2, 3, 4, 5, 6, 7));
        c1[s] = _mm512_set1_epi64((int64_t)draw->sample);
        c2[s] = _mm512_set1_epi64((int64_t)draw->image_id);
        c3[s] = _mm512_set1_epi64((int64_t)draw->stage << 24);
    }
    for (int round = 0; round < 10; round++) {
        const __m512i k0 = _mm512_set1_epi64((int64_t)keys->low[round]);
        const __m512i k1 = _mm512_set1_epi64((int64_t)keys->high[round]);
        for (int s = 0; s < SETS; s++) {
            const __m512i p0 = _mm512_mul_epu32(c0[s], m0);
            const __m512i p1 = _mm512_mul_epu32(c2[s], m1);
            /* 0x96 is the truth table of a xor b xor c. */
            c0[s] = _mm512_ternarylogic_epi64(_mm512_srli_epi64(p1, 32), c1[s], k0, 0x96);
            c2[s] = _mm512_ternarylogic_epi64(_mm512_srli_epi64(p0, 32), c3[s], k1, 0x96);
            c1[s] = p1;
            c3[s] = p0;
        }
    }
    const __m512i even_first = _mm512_setr_epi64(0, 1, 8, 9, 2, 3, 10, 11);
    const __m512i odd_first = _mm512_setr_epi64(4, 5, 12, 13, 6, 7, 14, 15);
    for (int s = 0; s < SETS; s++) {
        const __m512i front = _mm512_mask_blend_epi32(0xAAAA, c0[s], _mm512_slli_epi64(c1[s], 32));
        const __m512i back = _mm512_mask_blend_epi32(0xAAAA, c2[s], _mm512_slli_epi64(c3[s], 32));
        const __m512i even = _mm512_unpacklo_epi64(front, back); /* blocks 0, 2, 4, 6 */
        const __m512i odd = _mm512_unpackhi_epi64(front, back);  /* blocks 1, 3, 5, 7 */
        _mm512_storeu_si512(words + 32 * s, _mm512_permutex2var_epi64(even, even_first, odd));
        _mm512_storeu_si512(words + 32 * s + 16, _mm512_permutex2var_epi64(even, odd_first, odd));
    }
}

/* Values of a group by the guide; open ones are looked up in the thresholds. */
AVX2 static void look_up(const arq_draw *draw, uint32_t block, const uint32_t words[GROUP], const uint8_t *image,
                         int16_t *out)
{
    const int16_t *guide = draw->noise->guide;
    int16_t values[GROUP];
    uint64_t open = 0; /* one bit for each value */
    for (int i = 0; i < GROUP; i++) {
        values[i] = guide[words[i] >> ARQ_GUIDE_SHIFT];
    }
    for (int i = 0; i < GROUP; i += 32) {
        const __m256i mark = _mm256_set1_epi16(ARQ_NOISE_OPEN);
        const __m256i a = _mm256_cmpeq_epi16(_mm256_loadu_si256((const __m256i *)(values + i)), mark);
        const __m256i b = _mm256_cmpeq_epi16(_mm256_loadu_si256((const __m256i *)(values + i + 16)), mark);
        const __m256i both = _mm256_permute4x64_epi64(_mm256_packs_epi16(a, b), 0xD8);
        open |= (uint64_t)(uint32_t)_mm256_movemask_epi8(both) << i;
    }
    for (; open != 0; open &= open - 1) {
        const uint32_t i = (uint32_t)__builtin_ctzll(open);
        values[i] = arq_noise_exact(draw, block + i / 4, i % 4, words[i]);
    }
    for (int i = 0; i < GROUP; i += 16) {
        __m256i sum = _mm256_loadu_si256((const __m256i *)(values + i));
        if (image) {
            sum = _mm256_add_epi16(sum, _mm256_cvtepu8_epi16(_mm_loadu_si128((const __m128i *)(image + i))));
        }
        _mm256_storeu_si256((__m256i *)(out + i), sum);
    }
}

uint32_t arq_noise_vector(const arq_draw *draw, const uint8_t *image, int16_t *out, uint32_t blocks)
{
    const int wide = arq_isa_supported(ARQ_ISA_AVX512);
    if (blocks < GROUP_BLOCKS || (!wide && !arq_isa_supported(ARQ_ISA_AVX2))) {
        return 0;
    }
    const round_keys keys = expand_key(draw->seed);
    uint32_t words[GROUP];
    uint32_t block = 0;
    for (; blocks - block >= GROUP_BLOCKS; block += GROUP_BLOCKS) {
        if (wide) {
            words_avx512(draw, &keys, block, words);
        } else {
            words_avx2(draw, &keys, block, words);
        }
        const size_t first = (size_t)block * 4;
        look_up(draw, block, words, image ? image + first : NULL, out + first);
    }
    return block;
}

#else

uint32_t arq_noise_vector(const arq_draw *draw, const uint8_t *image, int16_t *out, uint32_t blocks)
{
    (void)draw;
    (void)image;
    (void)out;
    (void)blocks;
    return 0;
}

#endif
