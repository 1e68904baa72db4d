/* AVX2 epilogue, the plan: whether results can go the quick way of arq_avx2_finish.c, and with what constants.
 *
 * They can where every value between the 32-bit rescaling and the store fits int16: ranges of the rescaled sum, of the
 * rescaled residual and of the results, stored as U8 or I16.
 */
#include "arq_avx2.h"

#ifdef ARQ_WITH_AVX2

static int within(int64_t lo, int64_t hi, int64_t least, int64_t most)
{
    return lo >= least && hi <= most && lo <= hi;
}

ARQ_AVX2 int arq_avx2_residual_lanes(const arq_conv *task, uint32_t first, uint32_t width, arq_avx2_plan *plan)
{
    const arq_rescale *r = task->after.residual_rescale;
    const int32_t zero = task->after.residual->zero;
    const uint32_t different = r == NULL || r->channels == 1 ? 1 : 16;
    int32_t m[16], c[16], s[16];
    if (r != NULL && !r->fast) {
        return 0;
    }
    for (uint32_t lane = 0; lane < 16; ++lane) {
        const arq_pack_range range = {0, 255, 0};
        const uint32_t place = arq_pack_channel(width, lane % width);
        if (lane >= different) {
            m[lane] = m[0];
            c[lane] = c[0];
            s[lane] = s[0];
        } else if (r == NULL) {
            m[lane] = 1;
            c[lane] = zero;
            s[lane] = 0;
        } else {
            const arq_pack_fast fast = arq_pack_fold(r, first + place, zero, &range);
            if (fast.form == ARQ_FORM_FAST) {
                return 0;
            }
            m[lane] = fast.multiplier;
            c[lane] = fast.offset;
            s[lane] = fast.shift;
        }
    }
    for (int v = 0; v < 2; ++v) {
        plan->residual_lanes[v].multiplier = arq_avx2_load(m + 8 * v);
        plan->residual_lanes[v].offset = arq_avx2_load(c + 8 * v);
        plan->residual_lanes[v].shift = arq_avx2_load(s + 8 * v);
        plan->residual_lanes[v].low = plan->residual_lanes[v].high = _mm256_setzero_si256();
    }
    return 1;
}

/* Choose the kind of the residual; returns 0 if it cannot go the quick way. `lo` and `hi` bound the rescaled sum. */
ARQ_AVX2 static int plan_residual(const arq_conv *task, int32_t lo, int32_t hi, arq_avx2_plan *plan)
{
    const arq_epilogue *after = &task->after;
    const arq_rescale *r = after->residual_rescale;
    int64_t first = after->residual->zero, last = first + 255;
    plan->residual = I16_RESIDUAL;
    plan->clip_residual = 0;
    if (after->residual->storage == ARQ_STORE_I16) {
        return r == NULL;
    }
    if (after->residual->storage != ARQ_STORE_U8 || (r != NULL && !r->fast)) {
        return 0;
    }
    plan->residual = U8_RESIDUAL;
    if (r != NULL && r->channels == 1) {
        first = arq_rescale_value(r, after->residual->zero, 0);
        last = arq_rescale_value(r, after->residual->zero + 255, 0);
        plan->clip_residual = first <= r->lo || last >= r->hi;
    } else if (r != NULL) {
        first = r->lo;
        last = r->hi;
        plan->clip_residual = 1;
    }
    if (!within(first, last, INT16_MIN, INT16_MAX)) {
        return 0;
    }
    plan->residual_lo = _mm256_set1_epi16((int16_t)first);
    plan->residual_hi = _mm256_set1_epi16((int16_t)last);
    /* Sums beyond lo or hi: is the last clip reached from there whatever the residual? */
    if (!plan->clip_residual && lo + last <= after->lo && hi + first >= after->hi) {
        plan->residual = LEAN_RESIDUAL;
    }
    plan->by_channel = r != NULL && r->channels > 1;
    return plan->by_channel || arq_avx2_residual_lanes(task, 0, 16, plan);
}

ARQ_AVX2 void arq_avx2_make_plan(const arq_conv *task, arq_avx2_plan *plan)
{
    const arq_epilogue *after = &task->after;
    const int32_t zero = task->out.zero;
    int32_t lo = INT16_MIN, hi = INT16_MAX;
    memset(plan, 0, sizeof *plan);
    plan->residual = NO_RESIDUAL;
    plan->out_u8 = task->out.storage == ARQ_STORE_U8;
    plan->zero = zero;
    if (after->rescale != NULL) {
        lo = after->rescale->lo;
        hi = after->rescale->hi;
    } else if (after->residual != NULL) {
        return; /* nothing bounds y */
    } else if (plan->out_u8 && within(zero, zero, -16384, 16384)) {
        lo = zero;
        hi = zero + 255;
    }
    if (!within(lo, hi, INT16_MIN, INT16_MAX) || task->out.storage == ARQ_STORE_I32) {
        return;
    }
    plan->lo = _mm256_set1_epi16((int16_t)lo);
    plan->hi = _mm256_set1_epi16((int16_t)hi);
    if (after->residual != NULL) {
        if (!plan_residual(task, lo, hi, plan)) {
            return;
        }
        lo = after->lo;
        hi = after->hi;
    }
    if (plan->out_u8) {
        plan->zeros = _mm256_set1_epi16((int16_t)zero);
        plan->out_lo = _mm256_set1_epi8((char)(unsigned char)(lo - zero));
        plan->out_hi = _mm256_set1_epi8((char)(unsigned char)(hi - zero));
        plan->quick = within(zero, zero, -16384, 16384) && within(lo, hi, zero, (int64_t)zero + 255);
    } else {
        plan->out_lo = _mm256_set1_epi16((int16_t)lo);
        plan->out_hi = _mm256_set1_epi16((int16_t)hi);
        plan->quick = within(lo, hi, INT16_MIN, INT16_MAX);
    }
}

#endif
