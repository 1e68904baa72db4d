/* AVX2 epilogue: from the sums of a strip to stored results.
 *
 * The quick way handles whole blocks whose results pass through int16 (outputs U8 or I16, residuals U8 or I16): two
 * vectors of 8 int32 narrow into 16 int16, residuals are added there, and the last clip is done on bytes. Saturating
 * instructions are exact in it because each is followed by a clip to a range within the saturated one. What it can do
 * is decided in arq_avx2_plan.c; the rest is in arq_avx2_exact.c.
 */
#include "arq_avx2.h"

#ifdef ARQ_WITH_AVX2

/* Behind the ARQ_FORM_*: the strip holds y itself. */
#define FORM_READY 5

/* ---- arithmetic ----------------------------------------------------------------------------------------------- */

ARQ_AVX2_INLINE arq_avx2_lanes load_lanes(const int32_t *rows, size_t lanes, size_t at, int form)
{
    arq_avx2_lanes k;
    k.low = arq_avx2_load(rows + ARQ_ROW_LOW * lanes + at);
    k.high = arq_avx2_load(rows + ARQ_ROW_HIGH * lanes + at);
    k.multiplier = arq_avx2_load(rows + (form == ARQ_FORM_DIRECT ? ARQ_ROW_PAIR : ARQ_ROW_MULTIPLIER) * lanes + at);
    k.offset = arq_avx2_load(rows + ARQ_ROW_OFFSET * lanes + at);
    k.shift = arq_avx2_load(rows + ARQ_ROW_SHIFT * lanes + at);
    return k;
}

/* y before its last clip. */
ARQ_AVX2_INLINE __m256i rescale8(__m256i x, const arq_avx2_lanes *k, const int form)
{
    if (form == FORM_READY) {
        return x;
    }
    if (form == ARQ_FORM_DIRECT) {
        x = _mm256_madd_epi16(x, k->multiplier);
    } else {
        if (form == ARQ_FORM_FAST) {
            x = _mm256_min_epi32(_mm256_max_epi32(x, k->low), k->high);
        }
        x = _mm256_mullo_epi32(x, k->multiplier);
    }
    return _mm256_srav_epi32(_mm256_add_epi32(x, k->offset), k->shift);
}

/* 16 int16 results (before the last clip) from two vectors of sums. */
ARQ_AVX2_INLINE __m256i narrow(__m256i a, __m256i b, const arq_avx2_lanes *k0, const arq_avx2_lanes *k1,
                               const int form)
{
    return _mm256_packs_epi32(rescale8(a, k0, form), rescale8(b, k1, form));
}

/* Add 16 residuals: int16 values, or codes widened to int16. */
ARQ_AVX2_INLINE __m256i add_residual(__m256i y, __m256i r, const arq_avx2_plan *plan, const int kind)
{
    if (kind != I16_RESIDUAL) {
        const __m256i none = _mm256_setzero_si256();
        const __m256i a = rescale8(_mm256_unpacklo_epi16(r, none), &plan->residual_lanes[0], ARQ_FORM_PLAIN);
        const __m256i b = rescale8(_mm256_unpackhi_epi16(r, none), &plan->residual_lanes[1], ARQ_FORM_PLAIN);
        r = _mm256_packs_epi32(a, b);
    }
    if (kind != LEAN_RESIDUAL) {
        if (plan->clip_residual) {
            r = _mm256_min_epi16(_mm256_max_epi16(r, plan->residual_lo), plan->residual_hi);
        }
        y = _mm256_min_epi16(_mm256_max_epi16(y, plan->lo), plan->hi);
    }
    return _mm256_adds_epi16(y, r);
}

/* The codes of 32 results. */
ARQ_AVX2_INLINE __m256i to_codes(__m256i a, __m256i b, const arq_avx2_plan *plan)
{
    if (plan->zero != 0) {
        a = _mm256_subs_epi16(a, plan->zeros);
        b = _mm256_subs_epi16(b, plan->zeros);
    }
    return _mm256_min_epu8(_mm256_max_epu8(_mm256_packus_epi16(a, b), plan->out_lo), plan->out_hi);
}

ARQ_AVX2_INLINE __m256i to_words(__m256i a, const arq_avx2_plan *plan)
{
    return _mm256_min_epi16(_mm256_max_epi16(a, plan->out_lo), plan->out_hi);
}

ARQ_AVX2_INLINE __m128i load16(const unsigned char *from)
{
    return _mm_loadu_si128((const __m128i *)(const void *)from);
}

ARQ_AVX2_INLINE void store16(unsigned char *to, __m128i bytes)
{
    _mm_storeu_si128((__m128i *)(void *)to, bytes);
}

ARQ_AVX2_INLINE void store32(unsigned char *to, __m256i bytes)
{
    _mm256_storeu_si256((__m256i *)(void *)to, bytes);
}

/* ---- blocks --------------------------------------------------------------------------------------------------- */

/* 16 residuals of one pixel. */
ARQ_AVX2_INLINE __m256i residual16(const unsigned char *from, size_t element, const int kind)
{
    return kind == I16_RESIDUAL ? arq_avx2_load(from + 2 * element) : _mm256_cvtepu8_epi16(load16(from + element));
}

/* Blocks of 16 channels, two pixels at a time; an odd last one is done twice. */
ARQ_AVX2_INLINE void finish16(const arq_conv *task, const arq_avx2_plan *plan, const arq_strip *strip, const int form,
                              const int kind)
{
    const int32_t *rows = arq_pack_row(strip->prepared, 16, strip->block, 0);
    const arq_avx2_lanes k0 = load_lanes(rows, 16, 0, form), k1 = load_lanes(rows, 16, 8, form);
    const unsigned char *from = kind == NO_RESIDUAL ? NULL : task->after.residual->data;
    const size_t channels = task->out.channels;
    const __m256i *sums = strip->sums;
    unsigned char *to = task->out.data;
    size_t element = (size_t)strip->first * channels + strip->channel;
    for (uint32_t p = 0; p < strip->count; p += 2, sums += 4, element += 2 * channels) {
        const size_t odd = p + 1 < strip->count; /* the second pixel is there */
        const size_t next = element + odd * channels;
        __m256i a = narrow(sums[0], sums[1], &k0, &k1, form);
        __m256i b = narrow(sums[2 * odd], sums[2 * odd + 1], &k0, &k1, form);
        if (kind != NO_RESIDUAL) {
            a = add_residual(a, residual16(from, element, kind), plan, kind);
            b = add_residual(b, residual16(from, next, kind), plan, kind);
        }
        if (plan->out_u8) {
            const __m256i codes = _mm256_permute4x64_epi64(to_codes(a, b, plan), 0xD8);
            store16(to + element, _mm256_castsi256_si128(codes));
            store16(to + next, _mm256_extracti128_si256(codes, 1));
        } else {
            store32(to + 2 * element, to_words(a, plan));
            store32(to + 2 * next, to_words(b, plan));
        }
    }
}

/* 8 residuals of each of two pixels in the order of `narrow`: channels 0-3 of both, then 4-7. */
ARQ_AVX2_INLINE __m256i residual8(const unsigned char *from, size_t element, size_t next, const int kind)
{
    if (kind == I16_RESIDUAL) {
        const __m128i a = load16(from + 2 * element), b = load16(from + 2 * next);
        return _mm256_inserti128_si256(_mm256_castsi128_si256(_mm_unpacklo_epi64(a, b)), _mm_unpackhi_epi64(a, b), 1);
    }
    const __m128i a = _mm_loadl_epi64((const __m128i *)(const void *)(from + element));
    const __m128i b = _mm_loadl_epi64((const __m128i *)(const void *)(from + next));
    return _mm256_cvtepu8_epi16(_mm_unpacklo_epi32(a, b));
}

/* Blocks of 8 channels, two pixels at a time: each is one vector of sums. */
ARQ_AVX2_INLINE void finish8(const arq_conv *task, const arq_avx2_plan *plan, const arq_strip *strip, const int form,
                             const int kind)
{
    const arq_avx2_lanes k = load_lanes(arq_pack_row(strip->prepared, 16, strip->block, 0), 16, 0, form);
    const unsigned char *from = kind == NO_RESIDUAL ? NULL : task->after.residual->data;
    const size_t channels = task->out.channels;
    const __m256i *sums = strip->sums;
    unsigned char *to = task->out.data;
    size_t element = (size_t)strip->first * channels + strip->channel;
    for (uint32_t p = 0; p < strip->count; p += 2, sums += 2, element += 2 * channels) {
        const size_t odd = p + 1 < strip->count;
        const size_t next = element + odd * channels;
        __m256i a = narrow(sums[0], sums[odd], &k, &k, form);
        if (kind != NO_RESIDUAL) {
            a = add_residual(a, residual8(from, element, next, kind), plan, kind);
        }
        if (plan->out_u8) {
            const __m256i codes = to_codes(a, a, plan);
            const __m128i both = _mm_unpacklo_epi32(_mm256_castsi256_si128(codes), _mm256_extracti128_si256(codes, 1));
            _mm_storel_epi64((__m128i *)(void *)(to + element), both);
            _mm_storel_epi64((__m128i *)(void *)(to + next), _mm_unpackhi_epi64(both, both));
        } else {
            const __m256i words = to_words(a, plan);
            const __m128i first = _mm256_castsi256_si128(words), last = _mm256_extracti128_si256(words, 1);
            store16(to + 2 * element, _mm_unpacklo_epi64(first, last));
            store16(to + 2 * next, _mm_unpackhi_epi64(first, last));
        }
    }
}

/* A depthwise block: 32 channels of a pixel, or 16 channels of two. */
ARQ_AVX2_INLINE void finish32(const arq_conv *task, const arq_avx2_plan *plan, const arq_strip *strip,
                              uint32_t in_block, const int form)
{
    const int32_t *rows = arq_pack_row(strip->prepared, 32, strip->block, 0);
    const arq_avx2_lanes k0 = load_lanes(rows, 32, 0, form), k1 = load_lanes(rows, 32, 8, form);
    const arq_avx2_lanes k2 = load_lanes(rows, 32, 16, form), k3 = load_lanes(rows, 32, 24, form);
    const uint32_t step = in_block == 32 ? 1 : 2;
    const size_t channels = task->out.channels;
    const __m256i *sums = strip->sums;
    unsigned char *to = task->out.data;
    size_t element = (size_t)strip->first * channels + strip->channel;
    for (uint32_t p = 0; p < strip->count; p += step, sums += 4, element += step * channels) {
        const __m256i a = narrow(sums[0], sums[1], &k0, &k1, form), b = narrow(sums[2], sums[3], &k2, &k3, form);
        const size_t next = element + (in_block == 32 ? 16 : p + 1 < strip->count ? channels : 0);
        __m128i first, last;
        if (plan->out_u8) {
            const __m256i codes = to_codes(a, b, plan);
            first = _mm256_castsi256_si128(codes);
            last = next == element ? first : _mm256_extracti128_si256(codes, 1);
            store16(to + element, first);
            store16(to + next, last);
        } else {
            const __m256i even = to_words(a, plan), odd = to_words(b, plan);
            if (next != element) {
                store32(to + 2 * next, _mm256_permute2x128_si256(even, odd, 0x31));
            }
            store32(to + 2 * element, _mm256_permute2x128_si256(even, odd, 0x20));
        }
    }
}

/* ---- choosing ------------------------------------------------------------------------------------------------- */

/* Bring the sums to one of the forms that the quick way is compiled for. `vectors` of 8 lanes a pixel (or two), `all`
 * in the strip. */
static int ready_form(const arq_conv *task, const arq_strip *strip, uint32_t lanes, uint32_t vectors, size_t all)
{
    const int form = arq_pack_row(strip->prepared, lanes, strip->block, ARQ_ROW_FORM)[0];
    if (form == ARQ_FORM_DIRECT && strip->halves) {
        return form;
    }
    arq_avx2_join(strip, all);
    if (form == ARQ_FORM_DIRECT || form == ARQ_FORM_PLAIN) {
        return ARQ_FORM_PLAIN;
    }
    if (form == ARQ_FORM_FAST) {
        return form;
    }
    arq_avx2_rescale(task, strip, lanes, vectors);
    return FORM_READY;
}

/* One function for each form, in which the compiler knows it. */
#define FINISHERS(name, form)                                                                                         \
    ARQ_AVX2 static void name(const arq_conv *task, const arq_avx2_plan *plan, const arq_strip *strip)                \
    {                                                                                                                 \
        if (strip->width == 16 && plan->residual == NO_RESIDUAL) {                                                    \
            finish16(task, plan, strip, form, NO_RESIDUAL);                                                           \
        } else if (strip->width == 16 && plan->residual == LEAN_RESIDUAL) {                                           \
            finish16(task, plan, strip, form, LEAN_RESIDUAL);                                                         \
        } else if (strip->width == 16 && plan->residual == U8_RESIDUAL) {                                             \
            finish16(task, plan, strip, form, U8_RESIDUAL);                                                           \
        } else if (strip->width == 16) {                                                                              \
            finish16(task, plan, strip, form, I16_RESIDUAL);                                                          \
        } else if (plan->residual == NO_RESIDUAL) {                                                                   \
            finish8(task, plan, strip, form, NO_RESIDUAL);                                                            \
        } else if (plan->residual == I16_RESIDUAL) {                                                                  \
            finish8(task, plan, strip, form, I16_RESIDUAL);                                                           \
        } else {                                                                                                      \
            finish8(task, plan, strip, form, U8_RESIDUAL);                                                            \
        }                                                                                                             \
    }                                                                                                                 \
    ARQ_AVX2 static void name##_depthwise(const arq_conv *task, const arq_avx2_plan *plan, const arq_strip *strip,    \
                                          uint32_t in_block)                                                          \
    {                                                                                                                 \
        finish32(task, plan, strip, in_block, form);                                                                  \
    }

FINISHERS(finish_direct, ARQ_FORM_DIRECT)
FINISHERS(finish_plain, ARQ_FORM_PLAIN)
FINISHERS(finish_fast, ARQ_FORM_FAST)
FINISHERS(finish_ready, FORM_READY)

ARQ_AVX2 void arq_avx2_finish(const arq_conv *task, const arq_avx2_plan *given, const arq_strip *strip)
{
    const uint32_t vectors = strip->width / 8;
    const arq_avx2_plan *plan = given;
    arq_avx2_plan own;
    int quick = given->quick && strip->channel + strip->width <= task->out.channels;
    if (quick && given->by_channel) {
        own = *given;
        plan = &own;
        quick = arq_avx2_residual_lanes(task, strip->channel, strip->width, &own);
    }
    if (!quick) {
        arq_avx2_finish_elements(task, strip);
        return;
    }
    const int form = ready_form(task, strip, 16, vectors, (size_t)strip->count * vectors);
    (form == ARQ_FORM_DIRECT  ? finish_direct
     : form == ARQ_FORM_PLAIN ? finish_plain
     : form == ARQ_FORM_FAST  ? finish_fast
                              : finish_ready)(task, plan, strip);
}

ARQ_AVX2 void arq_avx2_finish_depthwise(const arq_conv *task, const arq_avx2_plan *plan, const arq_strip *strip,
                                        uint32_t in_block)
{
    const uint32_t groups = in_block == 32 ? strip->count : (strip->count + 1) / 2; /* of 4 vectors */
    arq_strip grouped = *strip;
    grouped.count = groups;
    if (strip->channel + in_block > task->out.channels || plan->residual != NO_RESIDUAL || !plan->quick) {
        arq_avx2_finish_depthwise_elements(task, strip, in_block);
        return;
    }
    const int form = ready_form(task, &grouped, 32, 4, 4 * (size_t)groups);
    (form == ARQ_FORM_DIRECT  ? finish_direct_depthwise
     : form == ARQ_FORM_PLAIN ? finish_plain_depthwise
     : form == ARQ_FORM_FAST  ? finish_fast_depthwise
                              : finish_ready_depthwise)(task, plan, strip, in_block);
}

#endif
