/* The arithmetic that every kernel shares, one definition each. Internal. */
#ifndef ARQ_INLINE_H
#define ARQ_INLINE_H

#include <string.h>

#include "arq_kernels.h"

/* floor(v / 2^k), 0 <= k <= 62; compilers make it one arithmetic shift. */
static inline int64_t arq_shift64(int64_t v, uint32_t k)
{
    return v >= 0 ? v >> k : ~(~v >> k);
}

static inline int32_t arq_shift32(int32_t v, uint32_t k)
{
    return v >= 0 ? v >> k : ~(~v >> k);
}

/* The int32 with the same bits; compilers make it nothing. */
static inline int32_t arq_signed(uint32_t v)
{
    return v <= 0x7FFFFFFFu ? (int32_t)v : -(int32_t)~v - 1;
}

/* a + b modulo 2^32: a blob with a right checksum but wrong fields may exceed what its writer should have proven. */
static inline int32_t arq_wrap_add(int32_t a, int32_t b)
{
    return arq_signed((uint32_t)a + (uint32_t)b);
}

static inline int64_t arq_signed64(uint64_t v)
{
    return v <= (uint64_t)INT64_MAX ? (int64_t)v : -(int64_t)~v - 1;
}

static inline int32_t arq_clip(int64_t v, int32_t lo, int32_t hi)
{
    return v < lo ? lo : v > hi ? hi : (int32_t)v;
}

/* round(v / 2^k); the range proof keeps v + 2^(k-1) within int64. */
static inline int64_t arq_round_shift(int64_t v, uint32_t k, uint32_t rounding)
{
    if (k == 0 || rounding == ARQ_FLOOR) {
        return arq_shift64(v, k);
    }
    const int64_t half = (int64_t)1 << (k - 1);
    if (rounding == ARQ_HALF_UP) {
        return arq_shift64(v + half, k);
    }
    const int64_t down = arq_shift64(v, k);
    const int64_t rest = v - down * ((int64_t)1 << k);
    return down + (rest > half || (rest == half && (down & 1) != 0));
}

/* Exact rescaling of one value of channel c. */
static inline int32_t arq_rescale_one(const arq_rescale *r, int32_t x, uint32_t c)
{
    const uint32_t i = r->channels == 1 ? 0 : c;
    const int64_t scaled = (int64_t)x * r->multiplier[i];
    return arq_clip(arq_round_shift(scaled, (uint32_t)r->shift[i], r->rounding), r->lo, r->hi);
}

/* The same by the 32-bit form, which the writer of the blob proved equal; arq_open proved that it cannot overflow. */
static inline int32_t arq_rescale_fast(const arq_rescale *r, int32_t x, uint32_t c)
{
    const uint32_t i = r->channels == 1 ? 0 : c;
    const int32_t inside = x < r->fast_lo[i] ? r->fast_lo[i] : x > r->fast_hi[i] ? r->fast_hi[i] : x;
    const int32_t y = arq_shift32(inside * r->fast_multiplier[i] + r->fast_offset[i], (uint32_t)r->fast_shift[i]);
    return y < r->lo ? r->lo : y > r->hi ? r->hi : y;
}

/* The quicker of the two. */
static inline int32_t arq_rescale_value(const arq_rescale *r, int32_t x, uint32_t c)
{
    return r->fast ? arq_rescale_fast(r, x, c) : arq_rescale_one(r, x, c);
}

/* Value (zero added) of element i. */
static inline int32_t arq_load(const arq_tensor *t, size_t i)
{
    int16_t narrow;
    int32_t wide;
    switch (t->storage) {
    case ARQ_STORE_U8:
        return (int32_t)t->data[i] + t->zero;
    case ARQ_STORE_I16:
        memcpy(&narrow, t->data + 2 * i, sizeof narrow);
        return narrow;
    default:
        memcpy(&wide, t->data + 4 * i, sizeof wide);
        return wide;
    }
}

static inline void arq_store(const arq_tensor *t, size_t i, int32_t value)
{
    if (t->storage == ARQ_STORE_U8) {
        t->data[i] = (unsigned char)((uint32_t)value - (uint32_t)t->zero);
    } else if (t->storage == ARQ_STORE_I16) {
        const int16_t narrow = (int16_t)value;
        memcpy(t->data + 2 * i, &narrow, sizeof narrow);
    } else {
        memcpy(t->data + 4 * i, &value, sizeof value);
    }
}

/* Weight code i of `bits` bits (2..8, 16), two's complement, packed from the lowest bit of the first word. */
static inline int32_t arq_code(const uint32_t *packed, size_t i, uint32_t bits)
{
    const size_t at = i * bits;
    const uint32_t shift = (uint32_t)(at & 31u);
    uint32_t raw = packed[at >> 5] >> shift;
    if (shift + bits > 32u) {
        raw |= packed[(at >> 5) + 1] << (32u - shift);
    }
    const uint32_t sign = 1u << (bits - 1u);
    return (int32_t)((raw & ((sign << 1) - 1u)) ^ sign) - (int32_t)sign;
}

/* What happens to one accumulator (bias included) of output channel c; `element` is its place in the output. */
static inline int32_t arq_finish_one(const arq_epilogue *after, int32_t acc, uint32_t c, size_t element)
{
    int32_t y = after->rescale ? arq_rescale_value(after->rescale, acc, c) : acc;
    if (after->residual) {
        int32_t r = arq_load(after->residual, element);
        if (after->residual_rescale) {
            r = arq_rescale_value(after->residual_rescale, r, c);
        }
        y = arq_clip((int64_t)y + r, after->lo, after->hi);
    }
    return y;
}

#endif
