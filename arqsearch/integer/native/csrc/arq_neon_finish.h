/* What happens to sums in NEON: rescaling, residual, clipping, narrowing. Internal to the NEON kernels.
 *
 * Four lanes at a time; the constants of a block of 16 channels are rows of 16 int32 in the order of the channels
 * (arq_pack.h, with one difference: lanes are in order).
 */
#ifndef ARQ_NEON_FINISH_H
#define ARQ_NEON_FINISH_H

#include <arm_neon.h>

#include "arq_pack.h"

enum { NEON_LANES = 16 };

/* Sums of 16 channels of one pixel, without bias. */
typedef struct neon_sums {
    int32x4_t of[4];
} neon_sums;

/* Rescaling of 16 lanes. */
typedef struct neon_rescale {
    const int32_t *rows; /* ARQ_ROW_* of 16 lanes */
    const arq_rescale *exact; /* null: no rescaling */
    int32_t form;
} neon_rescale;

static inline int32x4_t neon_row(const int32_t *rows, int row, int group)
{
    return vld1q_s32(rows + row * NEON_LANES + 4 * group);
}

/* round(v / 2^k) of two lanes, half up or floor. */
static inline int64x2_t neon_round_shift(int64x2_t v, int64x2_t k, uint32_t rounding)
{
    if (rounding == ARQ_HALF_UP) {
        /* 2^(k - 1), and 0 where k = 0: a shift by -1 drops the 1. */
        v = vaddq_s64(v, vreinterpretq_s64_u64(vshlq_u64(vdupq_n_u64(1), vsubq_s64(k, vdupq_n_s64(1)))));
    }
    return vshlq_s64(v, vnegq_s64(k));
}

static inline int64x2_t neon_clip64(int64x2_t v, int64x2_t lo, int64x2_t hi)
{
    v = vbslq_s64(vcgtq_s64(lo, v), lo, v);
    return vbslq_s64(vcgtq_s64(v, hi), hi, v);
}

/* The 64-bit form: clip(round((x + bias) * multiplier / 2^shift), lo, hi). */
static inline int32x4_t neon_exact(const neon_rescale *r, int group, int32x4_t x)
{
    const int32x4_t m = neon_row(r->rows, ARQ_ROW_MULTIPLIER, group), k = neon_row(r->rows, ARQ_ROW_SHIFT, group);
    x = vaddq_s32(x, neon_row(r->rows, ARQ_ROW_BIAS, group));
    if (r->exact->rounding == ARQ_HALF_EVEN) {
        int32_t value[4], by[4], shift[4];
        vst1q_s32(value, x);
        vst1q_s32(by, m);
        vst1q_s32(shift, k);
        for (int i = 0; i < 4; i++) {
            const int64_t y = arq_round_shift((int64_t)value[i] * by[i], (uint32_t)shift[i], ARQ_HALF_EVEN);
            value[i] = arq_clip(y, r->exact->lo, r->exact->hi);
        }
        return vld1q_s32(value);
    }
    const int64x2_t lo = vdupq_n_s64(r->exact->lo), hi = vdupq_n_s64(r->exact->hi);
    int64x2_t low = vmull_s32(vget_low_s32(x), vget_low_s32(m)), high = vmull_high_s32(x, m);
    low = neon_round_shift(low, vmovl_s32(vget_low_s32(k)), r->exact->rounding);
    high = neon_round_shift(high, vmovl_high_s32(k), r->exact->rounding);
    return vcombine_s32(vmovn_s64(neon_clip64(low, lo, hi)), vmovn_s64(neon_clip64(high, lo, hi)));
}

/* y of four sums (or values less `bias`, for tensors), clipped to lo, hi where there is a rescaling. */
static inline int32x4_t neon_apply(const neon_rescale *r, int group, int32x4_t x)
{
    if (r->exact == NULL) {
        return vaddq_s32(x, neon_row(r->rows, ARQ_ROW_BIAS, group));
    }
    if (r->form == ARQ_FORM_EXACT) {
        return neon_exact(r, group, x);
    }
    if (r->form == ARQ_FORM_FAST) {
        x = vmaxq_s32(x, neon_row(r->rows, ARQ_ROW_LOW, group));
        x = vminq_s32(x, neon_row(r->rows, ARQ_ROW_HIGH, group));
    }
    x = vmlaq_s32(neon_row(r->rows, ARQ_ROW_OFFSET, group), x, neon_row(r->rows, ARQ_ROW_MULTIPLIER, group));
    x = vshlq_s32(x, vnegq_s32(neon_row(r->rows, ARQ_ROW_SHIFT, group)));
    return vminq_s32(vmaxq_s32(x, vdupq_n_s32(r->exact->lo)), vdupq_n_s32(r->exact->hi));
}

/* Constants for the values of a tensor of `zero`, channels first .. first + valid - 1, in `rows` of ARQ_ROWS * 16. The
 * bias stands for the zero point; `range` holds the stored codes. */
static inline neon_rescale neon_tensor_rescale(const arq_rescale *r, const arq_tensor *t, uint32_t first,
                                               uint32_t valid, int32_t *rows)
{
    const arq_pack_range range = {t->storage == ARQ_STORE_U8 ? 0 : INT32_MIN,
                                  t->storage == ARQ_STORE_U8 ? 255 : INT32_MAX, 0};
    const int32_t zero = t->storage == ARQ_STORE_U8 ? t->zero : 0;
    neon_rescale made = {rows, r, r == NULL ? ARQ_FORM_SUM : ARQ_FORM_DIRECT};
    memset(rows, 0, ARQ_ROWS * NEON_LANES * sizeof *rows);
    for (uint32_t lane = 0; lane < valid; lane++) {
        const int32_t own = (int32_t)arq_pack_lane(rows, NEON_LANES, lane, first + lane, zero, r, &range, 1);
        made.form = own < made.form ? own : made.form;
    }
    return made;
}

/* A block of up to 16 channels of the output. */
typedef struct neon_block {
    const arq_conv *task;
    uint32_t first, valid;
    neon_rescale main, other;
    int32_t other_rows[ARQ_ROWS * NEON_LANES];
} neon_block;

static inline void neon_set_block(neon_block *b, const arq_conv *task, uint32_t index)
{
    const uint32_t left = task->out.channels - NEON_LANES * index;
    const arq_epilogue *after = &task->after;
    b->task = task;
    b->first = NEON_LANES * index;
    b->valid = left < NEON_LANES ? left : NEON_LANES;
    b->main.rows = arq_pack_row(task->prepared, NEON_LANES, index, 0);
    b->main.exact = after->rescale;
    b->main.form = b->main.rows[ARQ_ROW_FORM * NEON_LANES];
    if (after->residual != NULL) {
        b->other = neon_tensor_rescale(after->residual_rescale, after->residual, b->first, b->valid, b->other_rows);
    }
}

/* Stored elements at .. at + valid - 1, sign or zero extended; lanes beyond are zero. */
static inline neon_sums neon_load_elements(const arq_tensor *t, size_t at, uint32_t valid)
{
    neon_sums v;
    int16x8_t low, high;
    if (t->storage == ARQ_STORE_U8) {
        uint8_t bytes[16] = {0};
        memcpy(bytes, t->data + at, valid);
        const uint8x16_t all = vld1q_u8(bytes);
        low = vreinterpretq_s16_u16(vmovl_u8(vget_low_u8(all)));
        high = vreinterpretq_s16_u16(vmovl_high_u8(all));
    } else if (t->storage == ARQ_STORE_I16) {
        int16_t words[16] = {0};
        memcpy(words, t->data + 2 * at, 2 * (size_t)valid);
        low = vld1q_s16(words);
        high = vld1q_s16(words + 8);
    } else {
        int32_t wide[16] = {0};
        memcpy(wide, t->data + 4 * at, 4 * (size_t)valid);
        for (int group = 0; group < 4; group++) {
            v.of[group] = vld1q_s32(wide + 4 * group);
        }
        return v;
    }
    v.of[0] = vmovl_s16(vget_low_s16(low));
    v.of[1] = vmovl_high_s16(low);
    v.of[2] = vmovl_s16(vget_low_s16(high));
    v.of[3] = vmovl_high_s16(high);
    return v;
}

/* The low bits of values less the zero point, as arq_store. */
static inline void neon_store_elements(const arq_tensor *t, size_t at, uint32_t valid, const neon_sums *v)
{
    if (t->storage == ARQ_STORE_I32) {
        int32_t wide[16];
        for (int group = 0; group < 4; group++) {
            vst1q_s32(wide + 4 * group, v->of[group]);
        }
        memcpy(t->data + 4 * at, wide, 4 * (size_t)valid);
        return;
    }
    const int32x4_t zero = vdupq_n_s32(t->storage == ARQ_STORE_U8 ? t->zero : 0);
    const int16x8_t low = vmovn_high_s32(vmovn_s32(vsubq_s32(v->of[0], zero)), vsubq_s32(v->of[1], zero));
    const int16x8_t high = vmovn_high_s32(vmovn_s32(vsubq_s32(v->of[2], zero)), vsubq_s32(v->of[3], zero));
    if (t->storage == ARQ_STORE_I16) {
        int16_t words[16];
        vst1q_s16(words, low);
        vst1q_s16(words + 8, high);
        memcpy(t->data + 2 * at, words, 2 * (size_t)valid);
        return;
    }
    const uint8x16_t codes = vreinterpretq_u8_s8(vmovn_high_s16(vmovn_s16(low), high));
    if (valid == 16) {
        vst1q_u8(t->data + at, codes);
        return;
    }
    uint8_t bytes[16];
    vst1q_u8(bytes, codes);
    memcpy(t->data + at, bytes, valid);
}

/* One pixel of the output, complete. A saturated sum lies on the same side of lo, hi as the true one. */
static inline void neon_finish(const neon_block *b, const neon_sums *sums, size_t pixel)
{
    const arq_epilogue *after = &b->task->after;
    const size_t at = pixel * b->task->out.channels + b->first;
    neon_sums y;
    for (int group = 0; group < 4; group++) {
        y.of[group] = neon_apply(&b->main, group, sums->of[group]);
    }
    if (after->residual != NULL) {
        const int32x4_t lo = vdupq_n_s32(after->lo), hi = vdupq_n_s32(after->hi);
        const neon_sums r = neon_load_elements(after->residual, at, b->valid);
        for (int group = 0; group < 4; group++) {
            const int32x4_t sum = vqaddq_s32(y.of[group], neon_apply(&b->other, group, r.of[group]));
            y.of[group] = vminq_s32(vmaxq_s32(sum, lo), hi);
        }
    }
    neon_store_elements(&b->task->out, at, b->valid, &y);
}

#endif
