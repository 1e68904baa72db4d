/* What kernel_harness.c draws and computes without the kernels: random numbers, rescalings and weights at the limits of
 * each sum class; rounding in int64 by division. */
#ifndef KERNEL_RANDOM_H
#define KERNEL_RANDOM_H

#include <stdlib.h>
#include <string.h>

#include "arq_kernels.h"

static uint64_t state = 1;

static uint32_t draw(uint32_t n) /* 0 .. n - 1 */
{
    state ^= state << 13;
    state ^= state >> 7;
    state ^= state << 17;
    return (uint32_t)((state >> 20) % n);
}

static int32_t between(int32_t lo, int32_t hi)
{
    return lo + (int32_t)draw((uint32_t)(hi - lo) + 1u);
}

static void *allocate(size_t bytes)
{
    void *memory = malloc(bytes ? bytes : 1); /* aligned to no more than the contract says */
    if (memory == NULL) {
        abort();
    }
    return memory;
}

/* ---- the reference -------------------------------------------------------------------------------------------- */

static int64_t floor_divide(int64_t v, int64_t by)
{
    return v / by - (v % by != 0 && v < 0);
}

static int64_t round_divide(int64_t v, uint32_t k, uint32_t rounding)
{
    const int64_t by = (int64_t)1 << k, down = floor_divide(v, by), rest = v - down * by;
    const int up = rounding == ARQ_FLOOR      ? 0
                   : rounding == ARQ_HALF_UP ? 2 * rest >= by
                                             : 2 * rest > by || (2 * rest == by && down % 2 != 0);
    return down + up;
}

static int64_t clip(int64_t v, int64_t lo, int64_t hi)
{
    return v < lo ? lo : v > hi ? hi : v;
}

static int64_t rescaled(const arq_rescale *r, int64_t x, uint32_t c)
{
    const uint32_t i = r->channels == 1 ? 0 : c;
    return clip(round_divide(x * r->multiplier[i], (uint32_t)r->shift[i], r->rounding), r->lo, r->hi);
}

static int64_t value_of(const arq_tensor *t, size_t i)
{
    int16_t narrow;
    int32_t wide;
    if (t->storage == ARQ_STORE_U8) {
        return (int64_t)t->data[i] + t->zero;
    }
    if (t->storage == ARQ_STORE_I16) {
        memcpy(&narrow, t->data + 2 * i, 2);
        return narrow;
    }
    memcpy(&wide, t->data + 4 * i, 4);
    return wide;
}

/* ---- random rescaling ----------------------------------------------------------------------------------------- */

typedef struct owned_rescale {
    arq_rescale r;
    int32_t *arrays[7];
} owned_rescale;

/* A rescaling of values in xlo[c] .. xhi[c] to lo .. hi, with a 32-bit form if that can be had. */
static void make_rescale(owned_rescale *own, uint32_t channels, const int64_t *xlo, const int64_t *xhi, uint32_t all,
                         int32_t lo, int32_t hi)
{
    const int want_fast = draw(4) != 0;
    static const uint32_t widths[] = {1, 15, 15, 16, 20, 24, 26, 31};
    const uint32_t bits = widths[draw(8)];
    for (int a = 0; a < 7; ++a) {
        own->arrays[a] = allocate(channels * sizeof(int32_t));
    }
    own->r.channels = channels;
    own->r.rounding = draw(3);
    own->r.lo = lo;
    own->r.hi = hi;
    own->r.fast = want_fast && own->r.rounding != ARQ_HALF_EVEN;
    for (uint32_t c = 0; c < channels; ++c) {
        int64_t first = xlo[c], last = xhi[c], reach, span = (int64_t)hi - lo;
        for (uint32_t other = 0; channels == 1 && other < all; ++other) {
            first = xlo[other] < first ? xlo[other] : first;
            last = xhi[other] > last ? xhi[other] : last;
        }
        reach = (last > -first ? last : -first) + 1;
        const int64_t m = bits == 1 ? 1 : between((int32_t)(1u << (bits - 1)), (int32_t)((1u << bits) - 1u));
        uint32_t k = draw(4) == 0 ? 0 : 1;
        /* reach * m / 2^k about as large as the range of results, or a few times that */
        while (k < 62 && (reach * m >> k) > span * between(1, 4)) {
            ++k;
        }
        own->arrays[0][c] = (int32_t)m;
        own->arrays[1][c] = (int32_t)k;
        /* The 32-bit form: the same numbers, x cut where 32 bits end. */
        const int64_t offset = own->r.rounding == ARQ_FLOOR || k == 0 || k > 31 ? 0 : (int64_t)1 << (k - 1);
        int64_t a_lo = first, a_hi = last;
        const int64_t lowest = -(((int64_t)1 << 31) / m) + 1, highest = (((int64_t)1 << 31) - 1 - offset) / m - 1;
        a_lo = a_lo < lowest ? lowest : a_lo;
        a_hi = a_hi > highest ? highest : a_hi;
        const int low_enough = a_lo == first || round_divide(a_lo * m, k, own->r.rounding) <= lo;
        const int high_enough = a_hi == last || round_divide(a_hi * m, k, own->r.rounding) >= hi;
        if (k > 31 || a_lo > a_hi || !low_enough || !high_enough) {
            own->r.fast = 0;
            a_lo = a_hi = 0;
        }
        own->arrays[2][c] = (int32_t)a_lo;
        own->arrays[3][c] = (int32_t)a_hi;
        own->arrays[4][c] = (int32_t)m;
        own->arrays[5][c] = (int32_t)offset;
        own->arrays[6][c] = (int32_t)(k > 31 ? 0 : k);
    }
    own->r.multiplier = own->arrays[0];
    own->r.shift = own->arrays[1];
    own->r.fast_lo = own->arrays[2];
    own->r.fast_hi = own->arrays[3];
    own->r.fast_multiplier = own->arrays[4];
    own->r.fast_offset = own->arrays[5];
    own->r.fast_shift = own->arrays[6];
}

static void free_rescale(owned_rescale *own)
{
    for (int a = 0; a < 7; ++a) {
        free(own->arrays[a]);
    }
}

/* ---- random weights at the limits of a class ------------------------------------------------------------------ */

/* One weight in -most .. most - 1 whose products stay within what is left of int16 either way. */
static int32_t draw_weight(int32_t most, int32_t left_up, int32_t left_down, int hard)
{
    const int32_t up = left_up < most ? left_up : most - 1, down = left_down < most ? left_down : most;
    const int32_t pick = (int32_t)draw(10);
    if (hard && pick < 4) {
        return up;
    }
    if (hard && pick < 8) {
        return -down;
    }
    return between(-down, up);
}

/* Sum of the weights of one sign over a pair. */
static int32_t of_sign(const int32_t *weights, size_t i, int32_t sign)
{
    return (weights[i] * sign > 0 ? weights[i] * sign : 0) + (weights[i + 1] * sign > 0 ? weights[i + 1] * sign : 0);
}

/* `steps` groups of 2 * lanes weights; pair j of every step is one lane. `real[i]` is 0 for padding. */
static void fill_weights(int32_t *weights, const unsigned char *real, size_t steps, size_t lanes, uint32_t sum_class,
                         uint32_t depth, int32_t umax, int32_t most)
{
    /* Split into halves of 4 bits, 8 and -8 have the largest low part, 127 and -128 the largest high one. */
    static const int32_t constants[] = {8, -8, 120, 127, -128};
    const int32_t constant = most == 128 && sum_class == ARQ_SUM_U8 && draw(2) == 0 ? constants[draw(5)] : 0;
    const int hard = draw(2) == 0;
    int32_t up = INT16_MAX / umax, down = -INT16_MIN / umax;
    memset(weights, 0, 2 * steps * lanes * sizeof *weights);
    for (size_t step = 0; step < steps; ++step) {
        for (size_t lane = 0; lane < lanes; ++lane) {
            const size_t at = (step * lanes + lane) * 2;
            if (sum_class == ARQ_SUM_PAIRS) {
                up = INT16_MAX / umax;
                down = -INT16_MIN / umax;
                for (size_t back = 1; back < depth && back <= step; ++back) {
                    up -= of_sign(weights, at - 2 * lanes * back, 1);
                    down -= of_sign(weights, at - 2 * lanes * back, -1);
                }
            }
            for (size_t j = 0; j < 2; ++j) {
                if (real[at + j]) {
                    const int any = sum_class == ARQ_SUM_U8;
                    const int32_t drawn = draw_weight(most, any ? most : up, any ? most : down, hard);
                    const int32_t w = constant != 0 ? constant : drawn;
                    weights[at + j] = w;
                    up -= w > 0 ? w : 0;
                    down -= w < 0 ? -w : 0;
                }
            }
        }
    }
}

#endif
