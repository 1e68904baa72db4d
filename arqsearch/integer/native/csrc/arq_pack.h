/* How the fast kernels keep the weights, the bias and the rescaling of one convolution. Internal.
 *
 * prepared = constants of every block, then the weights of every block; both start at multiples of 64 bytes.
 *
 * Convolution: a block is 16 output channels, the last one 8 if 8 or fewer remain; missing channels are zeros.
 *   weights   [block][step][lane][4] int8: one step is 4 neighbouring bytes of a padded image row; steps run over the
 *             kernel rows and, in each, over kernel columns and channels (padded to a multiple of 4).
 *             Wide weights are int16, [block][step][half][lane][2]: half 0 has channels 0, 1 of the step, half 1 the
 *             channels 2, 3.
 *   lanes     of a block of 16 hold the channels 0-3, 8-11, 4-7, 12-15, so that two vectors of 8 int32 narrow with
 *             vpackssdw into 16 int16 in order; a block of 8 is in order. (A 512-bit vector narrowed to bytes: one
 *             pshufd 0xD8; four 128-bit vectors: the middle two change places.)
 *   constants [block][row][lane] int32, see ARQ_ROW_*; blocks of 8 use the first half of each row.
 *
 * Depthwise: a block is 32 channels; what is left over (fewer than 32) makes blocks of 16 channels.
 *   weights   [block][pair of taps][2 or 4 vectors][32 bytes]: the two taps of a channel are neighbours; see
 *             arq_pack_depthwise.
 *   lanes     of a block hold the channels 0-3, 16-19, 4-7, 20-23, 8-11, 24-27, 12-15, 28-31; in a block of 16, two
 *             pixels lie side by side, so channel c of a block of 32 stands for channel c mod 16.
 *   constants [block][row][32 lanes] int32.
 *
 * This is the layout of the AVX2 kernels; the others use the parts of it that suit them.
 */
#ifndef ARQ_PACK_H
#define ARQ_PACK_H

#include "arq_inline.h"

/* Rows of the constants of a block. */
enum {
    ARQ_ROW_BIAS = 0,       /* moved bias: what is added to the sum before anything else (ARQ_FORM_SUM and _EXACT) */
    ARQ_ROW_LOW = 1,        /* fast forms, bias folded in: y = (clip(sum, low, high) * multiplier + offset) >> shift */
    ARQ_ROW_HIGH = 2,
    ARQ_ROW_MULTIPLIER = 3, /* of the fast form, or M of the exact one */
    ARQ_ROW_OFFSET = 4,
    ARQ_ROW_SHIFT = 5,      /* of the fast form, or k of the exact one */
    ARQ_ROW_PAIR = 6,       /* ARQ_FORM_DIRECT: two int16 for vpmaddwd on the two int16 parts of a sum */
    ARQ_ROW_FORM = 7,       /* its first word: ARQ_FORM_*, the same for all channels of the block */
    ARQ_ROWS = 8
};

/* How y comes from the sum; the clip to rescale->lo, hi always follows (except for ARQ_FORM_SUM). */
enum {
    ARQ_FORM_SUM = 0,    /* no rescaling: y = sum + bias */
    ARQ_FORM_EXACT = 1,  /* 64 bits: y = round((sum + bias) * multiplier / 2^shift) */
    ARQ_FORM_FAST = 2,   /* 32 bits, with low and high */
    ARQ_FORM_PLAIN = 3,  /* 32 bits; no sum that can occur needs low and high */
    ARQ_FORM_DIRECT = 4  /* as PLAIN, and the multipliers of ARQ_ROW_PAIR fit int16 */
};

static inline size_t arq_pack_round64(size_t bytes)
{
    return (bytes + 63u) & ~(size_t)63u;
}

/* ---- convolution ---------------------------------------------------------------------------------------------- */

static inline uint32_t arq_pack_blocks(uint32_t out_channels)
{
    return (out_channels + 15u) / 16u;
}

static inline uint32_t arq_pack_width(uint32_t out_channels, uint32_t block)
{
    return out_channels - 16u * block <= 8u ? 8u : 16u;
}

/* Channel (within its block) of a lane. */
static inline uint32_t arq_pack_channel(uint32_t width, uint32_t lane)
{
    const uint32_t group = lane >> 2;
    const uint32_t place = group == 1 ? 2 : group == 2 ? 1 : group;
    return width == 8 ? lane : 4u * place + (lane & 3u);
}

/* Steps of 4 bytes in one kernel row. */
static inline uint32_t arq_pack_row_steps(uint32_t kernel_w, uint32_t in_channels)
{
    return kernel_w * ((in_channels + 3u) / 4u);
}

static inline size_t arq_pack_constant_bytes(uint32_t blocks, uint32_t lanes)
{
    return (size_t)blocks * ARQ_ROWS * lanes * 4u;
}

static inline const int32_t *arq_pack_row(const unsigned char *prepared, uint32_t lanes, uint32_t block, uint32_t row)
{
    return (const int32_t *)(const void *)prepared + ((size_t)block * ARQ_ROWS + row) * lanes;
}

/* Weights of a block; every block before it has 16 channels. `bytes`: 1, or 2 for wide weights. */
static inline const unsigned char *arq_pack_weights(const unsigned char *prepared, uint32_t out_channels,
                                                    uint32_t block, size_t steps, uint32_t bytes)
{
    return prepared + arq_pack_constant_bytes(arq_pack_blocks(out_channels), 16) + block * steps * 64u * bytes;
}

static inline size_t arq_pack_conv_bytes(uint32_t out_channels, uint32_t kernel_h, uint32_t kernel_w,
                                         uint32_t in_channels, uint32_t bytes)
{
    const uint32_t blocks = arq_pack_blocks(out_channels);
    const size_t steps = (size_t)kernel_h * arq_pack_row_steps(kernel_w, in_channels);
    const size_t last = 4u * steps * bytes * arq_pack_width(out_channels, blocks - 1);
    return arq_pack_round64(arq_pack_constant_bytes(blocks, 16) + (blocks - 1) * steps * 64u * bytes + last);
}

/* ---- rescaling ------------------------------------------------------------------------------------------------ */

/* The sums (without bias) that codes 0..255 can make with the weights of one channel. */
typedef struct arq_pack_range {
    int64_t lo, hi;
    int64_t total; /* sum of the weights */
} arq_pack_range;

static inline int32_t arq_pack_saturate(int64_t v)
{
    return arq_clip(v, INT32_MIN, INT32_MAX);
}

/* The fast form of channel c as it stands in the constants, and the best ARQ_FORM_* that it allows. */
typedef struct arq_pack_fast {
    int32_t low, high, multiplier, offset, shift;
    uint32_t form;
} arq_pack_fast;

/* low and high may be left out where no sum leaves them, or where leaving them is clipped by lo and hi anyway (the
 * form grows with the sum as the multiplier is not negative), and where 32 bits hold the product of every sum. */
static inline arq_pack_fast arq_pack_fold(const arq_rescale *r, uint32_t c, int32_t bias, const arq_pack_range *range)
{
    const uint32_t i = r->channels == 1 ? 0 : c;
    const int64_t m = r->fast_multiplier[i];
    const int64_t low = r->fast_lo[i], high = r->fast_hi[i], offset = r->fast_offset[i];
    const uint32_t shift = (uint32_t)r->fast_shift[i];
    arq_pack_fast fast;
    fast.low = arq_pack_saturate(low - bias);
    fast.high = arq_pack_saturate(high - bias);
    fast.multiplier = (int32_t)m;
    fast.shift = (int32_t)shift;
    /* (x + bias) * m + offset = x * m + (offset + bias * m), modulo 2^32 as the vectors compute it. */
    const uint32_t folded = (uint32_t)(int32_t)offset + (uint32_t)bias * (uint32_t)(int32_t)m;
    fast.offset = arq_signed(folded);
    const int64_t first = range->lo + bias, last = range->hi + bias;
    const int below = first >= low || arq_shift64(low * m + offset, shift) <= r->lo;
    const int above = last <= high || arq_shift64(high * m + offset, shift) >= r->hi;
    const int small = first >= INT32_MIN && last <= INT32_MAX && m >= 0 && first * m + offset >= INT32_MIN &&
                      last * m + offset <= INT32_MAX;
    fast.form = !below || !above || !small ? ARQ_FORM_FAST : m > INT16_MAX ? ARQ_FORM_PLAIN : ARQ_FORM_DIRECT;
    return fast;
}

/* Fill the constants of one lane; returns the form that its channel allows. `second` is the factor of the second
 * int16 part of a sum: 1, or 16 where it holds the high halves of the weights. */
static inline uint32_t arq_pack_lane(int32_t *rows, uint32_t lanes, uint32_t lane, uint32_t c, int32_t bias,
                                     const arq_rescale *r, const arq_pack_range *range, int32_t second)
{
    rows[ARQ_ROW_BIAS * lanes + lane] = bias;
    if (r == NULL) {
        return ARQ_FORM_SUM;
    }
    if (!r->fast) {
        rows[ARQ_ROW_MULTIPLIER * lanes + lane] = r->multiplier[r->channels == 1 ? 0 : c];
        rows[ARQ_ROW_SHIFT * lanes + lane] = r->shift[r->channels == 1 ? 0 : c];
        return ARQ_FORM_EXACT;
    }
    arq_pack_fast fast = arq_pack_fold(r, c, bias, range);
    if (fast.form == ARQ_FORM_DIRECT && (int64_t)fast.multiplier * second > INT16_MAX) {
        fast.form = ARQ_FORM_PLAIN;
    }
    rows[ARQ_ROW_LOW * lanes + lane] = fast.low;
    rows[ARQ_ROW_HIGH * lanes + lane] = fast.high;
    rows[ARQ_ROW_MULTIPLIER * lanes + lane] = fast.multiplier;
    rows[ARQ_ROW_OFFSET * lanes + lane] = fast.offset;
    rows[ARQ_ROW_SHIFT * lanes + lane] = fast.shift;
    if (fast.form == ARQ_FORM_DIRECT) {
        rows[ARQ_ROW_PAIR * lanes + lane] = fast.multiplier + fast.multiplier * second * 65536;
    }
    return fast.form;
}

/* Sums over codes 0..255 of the `count` weights of output channel o; ARQ_SUM_INT16 promises more. */
static inline arq_pack_range arq_pack_bounds(const uint32_t *packed, uint32_t bits, uint32_t o, size_t count,
                                             uint32_t sum_class)
{
    arq_pack_range range = {0, 0, 0};
    for (size_t i = 0; i < count; ++i) {
        const int32_t w = arq_code(packed, o * count + i, bits);
        range.total += w;
        range.lo += w < 0 ? 255 * w : 0;
        range.hi += w > 0 ? 255 * w : 0;
    }
    if (sum_class == ARQ_SUM_INT16) {
        range.lo = range.lo < INT16_MIN ? INT16_MIN : range.lo;
        range.hi = range.hi > INT16_MAX ? INT16_MAX : range.hi;
    }
    return range;
}

/* ---- filling -------------------------------------------------------------------------------------------------- */

/* One layer as it is given to `prepare` (arq_kernels.h). */
typedef struct arq_pack_source {
    uint32_t out_channels, kernel_h, kernel_w, in_per_group;
    uint32_t sum_class, bits;
    const uint32_t *packed;
    const int32_t *bias;
    int32_t zero;
    const arq_rescale *rescale;
} arq_pack_source;

/* The moved bias: with stored codes u, sum of w * (u + zero) + bias = sum of w * u + (bias + zero * sum of w). */
static inline int32_t arq_pack_bias(const arq_pack_source *from, uint32_t o, const arq_pack_range *range)
{
    return (int32_t)(from->bias[o] + from->zero * range->total);
}

/* Constants of a block; lanes whose channel is missing stay zero. `channel[lane]` is the output channel. */
static inline void arq_pack_constants(int32_t *rows, uint32_t lanes, const uint32_t *channel,
                                      const arq_pack_source *from, int32_t second)
{
    const size_t count = (size_t)from->kernel_h * from->kernel_w * from->in_per_group;
    uint32_t form = from->rescale == NULL ? ARQ_FORM_SUM : ARQ_FORM_DIRECT;
    for (uint32_t lane = 0; lane < lanes; ++lane) {
        const uint32_t o = channel[lane];
        if (o < from->out_channels) {
            const arq_pack_range range = arq_pack_bounds(from->packed, from->bits, o, count, from->sum_class);
            const int32_t bias = arq_pack_bias(from, o, &range);
            const uint32_t own = arq_pack_lane(rows, lanes, lane, o, bias, from->rescale, &range, second);
            form = own < form ? own : form;
        }
    }
    rows[ARQ_ROW_FORM * lanes] = (int32_t)form;
}

/* A whole convolution (not depthwise). `bytes`: 1, or 2 for wide weights. */
static inline void arq_pack_conv(unsigned char *memory, const arq_pack_source *from, uint32_t bytes)
{
    const uint32_t blocks = arq_pack_blocks(from->out_channels);
    const uint32_t in = from->in_per_group, quads = (in + 3u) / 4u;
    const size_t steps = (size_t)from->kernel_h * arq_pack_row_steps(from->kernel_w, in);
    memset(memory, 0, arq_pack_conv_bytes(from->out_channels, from->kernel_h, from->kernel_w, in, bytes));
    for (uint32_t block = 0; block < blocks; ++block) {
        const uint32_t width = arq_pack_width(from->out_channels, block);
        uint32_t channel[16];
        for (uint32_t lane = 0; lane < 16; ++lane) {
            channel[lane] = lane < width ? 16u * block + arq_pack_channel(width, lane) : from->out_channels;
        }
        int32_t *rows = (int32_t *)(void *)memory + (size_t)block * ARQ_ROWS * 16u;
        arq_pack_constants(rows, 16, channel, from, 1);
        unsigned char *to = memory + arq_pack_constant_bytes(blocks, 16) + block * steps * 64u * bytes;
        for (size_t step = 0; step < steps; ++step) {
            const size_t tap = step / quads, first = 4u * (step % quads);
            for (uint32_t lane = 0; lane < width; ++lane) {
                for (uint32_t j = 0; j < 4 && first + j < in && channel[lane] < from->out_channels; ++j) {
                    const size_t at = ((size_t)channel[lane] * from->kernel_h * from->kernel_w + tap) * in + first + j;
                    const int16_t w = (int16_t)arq_code(from->packed, at, from->bits);
                    if (bytes == 1) {
                        to[(step * width + lane) * 4u + j] = (unsigned char)w;
                    } else {
                        memcpy(to + (((2u * step + j / 2u) * width + lane) * 2u + j % 2u) * 2u, &w, 2);
                    }
                }
            }
        }
    }
}

/* ---- depthwise ------------------------------------------------------------------------------------------------ */

static inline uint32_t arq_pack_depthwise_blocks(uint32_t channels)
{
    return channels / 32u + (channels % 32u + 15u) / 16u;
}

/* First channel of a block; blocks from channels / 32 on have 16 channels. */
static inline uint32_t arq_pack_depthwise_first(uint32_t channels, uint32_t block)
{
    const uint32_t full = channels / 32u;
    return block < full ? 32u * block : 32u * full + 16u * (block - full);
}

/* Weights that need ARQ_SUM_U8 are split, w = low + 16 * high with -8 <= low <= 7, so that 8 pairs of taps of either
 * part fit int16 with any code (8 * 2 * 8 * 255 = 32640). */
static inline uint32_t arq_pack_depthwise_vectors(uint32_t sum_class)
{
    return sum_class == ARQ_SUM_U8 ? 4u : 2u;
}

static inline size_t arq_pack_depthwise_bytes(uint32_t channels, uint32_t taps, uint32_t sum_class)
{
    const uint32_t blocks = arq_pack_depthwise_blocks(channels);
    const size_t weights = (size_t)blocks * ((taps + 1u) / 2u) * arq_pack_depthwise_vectors(sum_class) * 32u;
    return arq_pack_round64(arq_pack_constant_bytes(blocks, 32) + weights);
}

static inline const unsigned char *arq_pack_depthwise_weights(const unsigned char *prepared, uint32_t channels,
                                                              uint32_t block, uint32_t taps, uint32_t sum_class)
{
    const size_t block_bytes = (size_t)((taps + 1u) / 2u) * arq_pack_depthwise_vectors(sum_class) * 32u;
    return prepared + arq_pack_constant_bytes(arq_pack_depthwise_blocks(channels), 32) + block * block_bytes;
}

/* [block][pair of taps][vector][32 bytes]: vector 0 goes with vpunpcklbw of the codes of two taps (channels 0-7, then
 * 16-23 of the block), vector 1 with vpunpckhbw (8-15, 24-31); 2 and 3 are their high parts. */
static inline void arq_pack_depthwise(unsigned char *memory, const arq_pack_source *from)
{
    const uint32_t channels = from->out_channels, taps = from->kernel_h * from->kernel_w;
    const uint32_t vectors = arq_pack_depthwise_vectors(from->sum_class), pairs = (taps + 1u) / 2u;
    memset(memory, 0, arq_pack_depthwise_bytes(channels, taps, from->sum_class));
    for (uint32_t block = 0; block < arq_pack_depthwise_blocks(channels); ++block) {
        const uint32_t first = arq_pack_depthwise_first(channels, block);
        const uint32_t mask = block < channels / 32u ? 31u : 15u;
        uint32_t channel[32];
        for (uint32_t lane = 0; lane < 32; ++lane) {
            channel[lane] = first + ((4u * (lane >> 3) + 16u * (lane >> 2 & 1u) + (lane & 3u)) & mask);
        }
        int32_t *rows = (int32_t *)(void *)memory + (size_t)block * ARQ_ROWS * 32u;
        arq_pack_constants(rows, 32, channel, from, vectors == 4 ? 16 : 1);
        unsigned char *to = memory + arq_pack_constant_bytes(arq_pack_depthwise_blocks(channels), 32) +
                            (size_t)block * pairs * vectors * 32u;
        for (uint32_t tap = 0; tap < taps; ++tap) {
            for (uint32_t j = 0; j < 32; ++j) {
                const uint32_t o = first + (j & mask);
                const int32_t w = o < channels ? arq_code(from->packed, (size_t)o * taps + tap, from->bits) : 0;
                const int32_t low = vectors == 4 ? ((w + 8) & 15) - 8 : w;
                unsigned char *at = to + ((size_t)(tap / 2u) * vectors + (j >> 3 & 1u)) * 32u;
                at += 16u * (j >> 4) + 2u * (j & 7u) + tap % 2u;
                at[0] = (unsigned char)low;
                if (vectors == 4) {
                    at[64] = (unsigned char)((w - low) / 16);
                }
            }
        }
    }
}

#endif
