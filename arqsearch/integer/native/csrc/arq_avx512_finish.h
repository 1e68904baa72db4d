/* What happens to sums in AVX-512: rescaling, residual, clipping, narrowing. Internal to the AVX-512 kernels.
 *
 * A vector holds 16 channels of one pixel in the order of the lanes of arq_pack.h. Four vectors (a "quad") narrow
 * together to 64 bytes, in "packed" order: vpackssdw and vpackuswb work on 128-bit groups, so group g of the result
 * holds group g of all four vectors.
 */
#ifndef ARQ_AVX512_FINISH_H
#define ARQ_AVX512_FINISH_H

#include <immintrin.h>

#include "arq_pack.h"

/* Lets the file compile without -m flags; the caller makes sure that the processor has all of these. */
#define ARQ_AVX512 __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512vnni")))
#define ARQ_AVX512_INLINE ARQ_AVX512 __attribute__((always_inline)) static inline

/* Loops over registers must unroll in full at every optimisation level. */
#ifdef __clang__
#define ARQ_UNROLL _Pragma("clang loop unroll(full)")
#else
#define ARQ_UNROLL _Pragma("GCC unroll 32")
#endif

enum {
    FORM_SUM = 0,   /* y = x + offset */
    FORM_PLAIN = 1, /* y = (x * multiplier + offset) >> shift */
    FORM_FAST = 2,  /* the same of x clipped to low, high */
    FORM_HIGH = 3,  /* 64 bits, x * multiplier + (offset, odd), of which the upper 32 bits are shifted by `shift` */
    FORM_WIDE = 4   /* 64 bits, (x * multiplier + (offset, odd)) rounded to multiples of 2^shift, any rounding */
};

/* Constants of 16 lanes. In the 64-bit forms `offset` belongs to the even lanes and `odd` to the odd ones, and low and
 * high are 64-bit limits of the result (FORM_WIDE). */
typedef struct lanes {
    __m512i low, high, multiplier, offset, odd, shift;
    int form;
    uint32_t rounding;
} lanes;

/* Two vectors of 32 int16: the low halves and the high halves of a quad, in packed order. */
typedef struct halves {
    __m512i first, second;
} halves;

/* ---- rescaling ------------------------------------------------------------------------------------------------ */

ARQ_AVX512_INLINE __m512i odd_lanes(__m512i v)
{
    return _mm512_shuffle_epi32(v, (_MM_PERM_ENUM)0xF5);
}

/* Lanes 0, 2, .. of `even` from its dwords 0, 2, .. and lanes 1, 3, .. from the same dwords of `odd`. */
ARQ_AVX512_INLINE __m512i join_low(__m512i even, __m512i odd)
{
    return _mm512_mask_shuffle_epi32(even, 0xAAAA, odd, (_MM_PERM_ENUM)0xA0);
}

ARQ_AVX512_INLINE __m512i join_high(__m512i even, __m512i odd)
{
    return _mm512_mask_shuffle_epi32(odd, 0x5555, even, (_MM_PERM_ENUM)0xF5);
}

/* round(v / 2^k) as arq_round_shift. */
ARQ_AVX512_INLINE __m512i round_shift(__m512i v, __m512i k, uint32_t rounding)
{
    const __m512i one = _mm512_set1_epi64(1);
    if (rounding != ARQ_FLOOR) {
        const __m512i half = _mm512_sllv_epi64(one, _mm512_sub_epi64(k, one)); /* 0 where k = 0 */
        __m512i up = half;
        if (rounding == ARQ_HALF_EVEN) {
            const __m512i some = _mm512_min_epu64(k, one);
            up = _mm512_sub_epi64(up, some);
            up = _mm512_add_epi64(up, _mm512_and_si512(_mm512_srav_epi64(v, k), some));
        }
        v = _mm512_add_epi64(v, up);
    }
    return _mm512_srav_epi64(v, k);
}

ARQ_AVX512_INLINE __m512i apply_wide(const lanes *k, __m512i x)
{
    __m512i even = _mm512_add_epi64(_mm512_mul_epi32(x, k->multiplier), k->offset);
    __m512i odd = _mm512_add_epi64(_mm512_mul_epi32(odd_lanes(x), odd_lanes(k->multiplier)), k->odd);
    even = round_shift(even, _mm512_srli_epi64(_mm512_slli_epi64(k->shift, 32), 32), k->rounding);
    odd = round_shift(odd, _mm512_srli_epi64(k->shift, 32), k->rounding);
    even = _mm512_min_epi64(_mm512_max_epi64(even, k->low), k->high);
    odd = _mm512_min_epi64(_mm512_max_epi64(odd, k->low), k->high);
    return join_low(even, odd);
}

/* y of 16 sums, before the clip to rescale->lo, hi. `form` is known where this is called. */
ARQ_AVX512_INLINE __m512i apply_form(const lanes *k, int form, __m512i x)
{
    if (form == FORM_SUM) {
        return _mm512_add_epi32(x, k->offset);
    }
    if (form == FORM_HIGH) {
        const __m512i even = _mm512_add_epi64(_mm512_mul_epi32(x, k->multiplier), k->offset);
        const __m512i odd = _mm512_add_epi64(_mm512_mul_epi32(odd_lanes(x), odd_lanes(k->multiplier)), k->odd);
        return _mm512_srav_epi32(join_high(even, odd), k->shift);
    }
    if (form == FORM_WIDE) {
        return apply_wide(k, x);
    }
    if (form == FORM_FAST) {
        x = _mm512_min_epi32(_mm512_max_epi32(x, k->low), k->high);
    }
    return _mm512_srav_epi32(_mm512_add_epi32(_mm512_mullo_epi32(x, k->multiplier), k->offset), k->shift);
}

/* The same where the form is not known: a call, to keep the code small. */
ARQ_AVX512 static __m512i apply_any(const lanes *k, __m512i x)
{
    switch (k->form) {
    case FORM_SUM:
        return apply_form(k, FORM_SUM, x);
    case FORM_PLAIN:
        return apply_form(k, FORM_PLAIN, x);
    case FORM_FAST:
        return apply_form(k, FORM_FAST, x);
    case FORM_HIGH:
        return apply_form(k, FORM_HIGH, x);
    default:
        return apply_form(k, FORM_WIDE, x);
    }
}

/* The 64-bit form of round((x + bias) * m / 2^k), any rounding. */
ARQ_AVX512_INLINE void set_any_exact(lanes *to, __m512i m, __m512i k, __m512i bias, const arq_rescale *r)
{
    to->form = FORM_WIDE;
    to->rounding = r->rounding;
    to->low = _mm512_set1_epi64(r->lo);
    to->high = _mm512_set1_epi64(r->hi);
    to->multiplier = m;
    to->shift = k;
    to->offset = _mm512_mul_epi32(bias, m);
    to->odd = _mm512_mul_epi32(odd_lanes(bias), odd_lanes(m));
}

/* The same, quicker where every k can be made 32 or more: only upper halves are needed. The 64-bit sum cannot overflow
 * as |x * m| < 2^62 and the rounding adds 2^(k - 1) <= 2^61. */
ARQ_AVX512_INLINE void set_exact(lanes *to, __m512i m, __m512i k, __m512i bias, const arq_rescale *r)
{
    const __m512i least = _mm512_set1_epi32(32);
    const __m512i wide_k = _mm512_max_epi32(k, least), up = _mm512_sub_epi32(wide_k, k);
    const __m512i wide_m = _mm512_sllv_epi32(m, up);
    const __mmask16 fits = _mm512_cmpeq_epi32_mask(_mm512_srlv_epi32(wide_m, up), m) &
                           _mm512_cmpge_epi32_mask(wide_m, _mm512_setzero_si512());
    if (fits != 0xFFFF || r->rounding == ARQ_HALF_EVEN) {
        set_any_exact(to, m, k, bias, r);
        return;
    }
    to->form = FORM_HIGH;
    to->rounding = r->rounding;
    to->low = to->high = _mm512_setzero_si512();
    to->multiplier = wide_m;
    to->shift = _mm512_sub_epi32(wide_k, least);
    to->offset = _mm512_mul_epi32(bias, wide_m);
    to->odd = _mm512_mul_epi32(odd_lanes(bias), odd_lanes(wide_m));
    if (r->rounding == ARQ_HALF_UP) {
        const __m512i half = _mm512_set1_epi64((int64_t)1 << 31); /* 2^(k - 1) = 2^31 * 2^(k - 32) */
        const __m512i even_k = _mm512_srli_epi64(_mm512_slli_epi64(to->shift, 32), 32);
        to->offset = _mm512_add_epi64(to->offset, _mm512_sllv_epi64(half, even_k));
        to->odd = _mm512_add_epi64(to->odd, _mm512_sllv_epi64(half, _mm512_srli_epi64(to->shift, 32)));
    }
}

/* From the rows of a block of `stride` lanes, 16 of them from `rows` on. */
ARQ_AVX512_INLINE void set_prepared(lanes *to, const int32_t *rows, uint32_t stride, int form, __mmask16 valid,
                                    const arq_rescale *r)
{
    const __m512i bias = _mm512_maskz_loadu_epi32(valid, rows + ARQ_ROW_BIAS * stride);
    const __m512i m = _mm512_maskz_loadu_epi32(valid, rows + ARQ_ROW_MULTIPLIER * stride);
    const __m512i k = _mm512_maskz_loadu_epi32(valid, rows + ARQ_ROW_SHIFT * stride);
    if (form == ARQ_FORM_EXACT) {
        set_exact(to, m, k, bias, r);
        return;
    }
    to->form = form == ARQ_FORM_SUM ? FORM_SUM : form == ARQ_FORM_FAST ? FORM_FAST : FORM_PLAIN;
    to->rounding = 0;
    to->multiplier = m;
    to->shift = k;
    to->offset = form == ARQ_FORM_SUM ? bias : _mm512_maskz_loadu_epi32(valid, rows + ARQ_ROW_OFFSET * stride);
    to->low = _mm512_maskz_loadu_epi32(valid, rows + ARQ_ROW_LOW * stride);
    to->high = _mm512_maskz_loadu_epi32(valid, rows + ARQ_ROW_HIGH * stride);
    to->odd = bias;
}

/* Row `row` of a block of 16 lanes where all lanes are equal. */
ARQ_AVX512_INLINE __m512i same_row(const int32_t *rows, int row)
{
    return _mm512_set1_epi32(rows[row]);
}

/* For the stored elements of a tensor, channels channel[lane]; r may be null (y = value). */
ARQ_AVX512_INLINE void set_tensor(lanes *to, const arq_rescale *r, uint32_t storage, int32_t zero,
                                  const uint32_t channel[16])
{
    const int codes = storage == ARQ_STORE_U8;
    const arq_pack_range range = {codes ? 0 : INT32_MIN, codes ? 255 : INT32_MAX, 0};
    const int32_t bias = codes ? zero : 0;
    if (r != NULL && r->channels != 1) {
        int32_t rows[16 * ARQ_ROWS] = {0};
        int form = ARQ_FORM_DIRECT;
        for (uint32_t lane = 0; lane < 16; lane++) {
            const int own = (int)arq_pack_lane(rows, 16, lane, channel[lane], bias, r, &range, 1);
            form = own < form ? own : form;
        }
        set_prepared(to, rows, 16, form, 0xFFFF, r);
        return;
    }
    int32_t row[ARQ_ROWS] = {0};
    const int form = (int)arq_pack_lane(row, 1, 0, 0, bias, r, &range, 1);
    if (form == ARQ_FORM_EXACT) {
        set_exact(to, same_row(row, ARQ_ROW_MULTIPLIER), same_row(row, ARQ_ROW_SHIFT), same_row(row, ARQ_ROW_BIAS), r);
        return;
    }
    to->form = form == ARQ_FORM_SUM ? FORM_SUM : form == ARQ_FORM_FAST ? FORM_FAST : FORM_PLAIN;
    to->rounding = 0;
    to->multiplier = same_row(row, ARQ_ROW_MULTIPLIER);
    to->shift = same_row(row, ARQ_ROW_SHIFT);
    to->offset = same_row(row, form == ARQ_FORM_SUM ? ARQ_ROW_BIAS : ARQ_ROW_OFFSET);
    to->low = same_row(row, ARQ_ROW_LOW);
    to->high = same_row(row, ARQ_ROW_HIGH);
    to->odd = to->offset;
}

/* ---- quads ---------------------------------------------------------------------------------------------------- */

/* y of a quad, saturated to int16; vector i has the constants k[i * apart], all of one form. */
ARQ_AVX512_INLINE halves narrow_sums(const lanes *k, size_t apart, int form, const __m512i v[4])
{
    halves y;
    y.first = _mm512_packs_epi32(apply_form(k, form, v[0]), apply_form(k + apart, form, v[1]));
    y.second = _mm512_packs_epi32(apply_form(k + 2 * apart, form, v[2]), apply_form(k + 3 * apart, form, v[3]));
    return y;
}

/* The same of 64 codes in packed order, one set of constants for all. */
ARQ_AVX512_INLINE halves narrow_codes(const lanes *k, __m512i codes)
{
    const __m512i none = _mm512_setzero_si512();
    const __m512i low = _mm512_unpacklo_epi8(codes, none), high = _mm512_unpackhi_epi8(codes, none);
    __m512i v[4];
    v[0] = _mm512_unpacklo_epi16(low, none);
    v[1] = _mm512_unpackhi_epi16(low, none);
    v[2] = _mm512_unpacklo_epi16(high, none);
    v[3] = _mm512_unpackhi_epi16(high, none);
    switch (k->form) {
    case FORM_SUM:
        return narrow_sums(k, 0, FORM_SUM, v);
    case FORM_PLAIN:
        return narrow_sums(k, 0, FORM_PLAIN, v);
    case FORM_FAST:
        return narrow_sums(k, 0, FORM_FAST, v);
    case FORM_HIGH:
        return narrow_sums(k, 0, FORM_HIGH, v);
    default:
        return narrow_sums(k, 0, FORM_WIDE, v);
    }
}

/* Limits of bytes and int16 in every lane. */
typedef struct limits {
    __m512i low8, high8;   /* of the stored codes */
    __m512i zero16;        /* zero point of the output */
    __m512i low16, high16; /* of the rescaled sum, before a residual is added */
    __m512i other_low16, other_high16; /* of the rescaled residual */
} limits;

ARQ_AVX512_INLINE halves clip16(halves y, __m512i low, __m512i high)
{
    y.first = _mm512_min_epi16(_mm512_max_epi16(y.first, low), high);
    y.second = _mm512_min_epi16(_mm512_max_epi16(y.second, low), high);
    return y;
}

/* Stored codes of a quad: saturation is monotone and the limits of the codes lie within 0..255, so clipping once, as
 * bytes, equals clipping y to lo, hi first. */
ARQ_AVX512_INLINE __m512i stored_codes(const limits *l, halves y)
{
    const __m512i first = _mm512_subs_epi16(y.first, l->zero16), second = _mm512_subs_epi16(y.second, l->zero16);
    return _mm512_min_epu8(_mm512_max_epu8(_mm512_packus_epi16(first, second), l->low8), l->high8);
}

static inline int fits16(int32_t v)
{
    return v >= INT16_MIN && v <= INT16_MAX;
}

/* A zero point so small that saturation to int16 cannot hide which side of 0..255 a code lies. */
static inline int narrow_zero(int32_t zero)
{
    return zero >= -16384 && zero <= 16384;
}

/* Limits for U8 output of `zero`, clipped to lo..hi at the end. */
ARQ_AVX512_INLINE limits make_limits(int32_t zero, int32_t lo, int32_t hi)
{
    limits l;
    const int32_t low = arq_clip((int64_t)lo - zero, 0, 255), high = arq_clip((int64_t)hi - zero, 0, 255);
    l.low8 = _mm512_set1_epi8((char)(signed char)(low < 128 ? low : low - 256));
    l.high8 = _mm512_set1_epi8((char)(signed char)(high < 128 ? high : high - 256));
    l.zero16 = _mm512_set1_epi16((int16_t)zero);
    l.low16 = l.other_low16 = _mm512_set1_epi16(INT16_MIN);
    l.high16 = l.other_high16 = _mm512_set1_epi16(INT16_MAX);
    return l;
}

#endif
