/* Kernels for NEON (aarch64, ARMv8.0: no dot products needed).
 *
 * Weights are int8, [block of 16 channels][byte of the padded window][channel], and meet one input code at a time,
 * both widened to int16. Where every subset of a sum fits int16 (ARQ_SUM_INT16), eight sums of 16 bits are kept in a
 * vector (one multiply-accumulate makes eight products); otherwise four of 32 bits. Both are exact for codes 0..255.
 */
#include "arq_kernels.h"

#ifdef ARQ_WITH_NEON

#include "arq_neon_finish.h"

enum { NEON_PIXELS = 4 };

/* ---- prepared memory: constants of every block, then the weights of every block -------------------------------- */

static uint32_t blocks_of(uint32_t channels)
{
    return (channels + NEON_LANES - 1u) / NEON_LANES;
}

/* Bytes of a window: channels padded to a multiple of 4, or its taps for a depthwise convolution. */
static size_t window_bytes(uint32_t kernel_h, uint32_t kernel_w, uint32_t in_per_group, int depthwise)
{
    return (size_t)kernel_h * kernel_w * (depthwise ? 1u : (in_per_group + 3u) / 4u * 4u);
}

static const int8_t *block_weights(const arq_conv *task, uint32_t block)
{
    const uint32_t in = task->depthwise ? 1 : task->channels, blocks = blocks_of(task->out.channels);
    const size_t bytes = window_bytes(task->kernel_h, task->kernel_w, in, task->depthwise);
    const size_t at = arq_pack_constant_bytes(blocks, NEON_LANES) + block * bytes * NEON_LANES;
    return (const int8_t *)(const void *)(task->prepared + at);
}

static size_t prepared_bytes(uint32_t out_channels, uint32_t kernel_h, uint32_t kernel_w, uint32_t in_per_group,
                             int depthwise, uint32_t sum_class, const arq_rescale *rescale)
{
    const uint32_t blocks = blocks_of(out_channels);
    (void)sum_class;
    (void)rescale;
    return arq_pack_round64(arq_pack_constant_bytes(blocks, NEON_LANES) +
                            blocks * window_bytes(kernel_h, kernel_w, in_per_group, depthwise) * NEON_LANES);
}

static void prepare(unsigned char *memory, uint32_t out_channels, uint32_t kernel_h, uint32_t kernel_w,
                    uint32_t in_per_group, int depthwise, uint32_t sum_class, uint32_t weight_bits,
                    const uint32_t *packed, const int32_t *bias, int32_t zero, const arq_rescale *rescale)
{
    const arq_pack_source from = {out_channels, kernel_h, kernel_w, in_per_group, sum_class,
                                  weight_bits,  packed,   bias,     zero,         rescale};
    const uint32_t blocks = blocks_of(out_channels), taps = kernel_h * kernel_w;
    const size_t window = window_bytes(kernel_h, kernel_w, in_per_group, depthwise), tap_bytes = window / taps;
    memset(memory, 0, prepared_bytes(out_channels, kernel_h, kernel_w, in_per_group, depthwise, sum_class, rescale));
    for (uint32_t block = 0; block < blocks; block++) {
        int32_t *rows = (int32_t *)(void *)memory + (size_t)block * ARQ_ROWS * NEON_LANES;
        unsigned char *to = memory + arq_pack_constant_bytes(blocks, NEON_LANES) + block * window * NEON_LANES;
        uint32_t channel[NEON_LANES];
        for (uint32_t lane = 0; lane < NEON_LANES; lane++) {
            channel[lane] = NEON_LANES * block + lane;
        }
        arq_pack_constants(rows, NEON_LANES, channel, &from, 1);
        for (uint32_t lane = 0; lane < NEON_LANES && channel[lane] < out_channels; lane++) {
            const size_t codes = (size_t)channel[lane] * taps * in_per_group;
            for (size_t i = 0; i < (size_t)taps * in_per_group; i++) {
                const size_t at = i / in_per_group * tap_bytes + i % in_per_group;
                to[at * NEON_LANES + lane] = (unsigned char)arq_code(packed, codes + i, weight_bits);
            }
        }
    }
}

/* ---- convolution ---------------------------------------------------------------------------------------------- */

static inline neon_sums widen(int16x8_t low, int16x8_t high)
{
    neon_sums v;
    v.of[0] = vmovl_s16(vget_low_s16(low));
    v.of[1] = vmovl_high_s16(low);
    v.of[2] = vmovl_s16(vget_low_s16(high));
    v.of[3] = vmovl_high_s16(high);
    return v;
}

/* Four neighbouring codes as int16. */
static inline int16x4_t four_codes(const unsigned char *at)
{
    uint32_t four;
    memcpy(&four, at, sizeof four);
    return vget_low_s16(vreinterpretq_s16_u16(vmovl_u8(vcreate_u8(four))));
}

/* Sums of four windows in 16 bits. `row_bytes` of the window lie together, every `apart` bytes. */
static inline void sum_narrow(const unsigned char *const in[NEON_PIXELS], const int8_t *weights, uint32_t rows,
                              size_t row_bytes, size_t apart, neon_sums *sums)
{
    int16x8_t low[NEON_PIXELS], high[NEON_PIXELS];
    for (int p = 0; p < NEON_PIXELS; p++) {
        low[p] = high[p] = vdupq_n_s16(0);
    }
    for (size_t y = 0; y < rows; y++) {
        for (size_t at = y * apart; at < y * apart + row_bytes; at += 4, weights += 4 * NEON_LANES) {
            const int8x16_t a = vld1q_s8(weights), b = vld1q_s8(weights + 16);
            const int8x16_t c = vld1q_s8(weights + 32), d = vld1q_s8(weights + 48);
            for (int p = 0; p < NEON_PIXELS; p++) {
                const int16x4_t codes = four_codes(in[p] + at);
                low[p] = vmlaq_lane_s16(low[p], vmovl_s8(vget_low_s8(a)), codes, 0);
                high[p] = vmlaq_lane_s16(high[p], vmovl_high_s8(a), codes, 0);
                low[p] = vmlaq_lane_s16(low[p], vmovl_s8(vget_low_s8(b)), codes, 1);
                high[p] = vmlaq_lane_s16(high[p], vmovl_high_s8(b), codes, 1);
                low[p] = vmlaq_lane_s16(low[p], vmovl_s8(vget_low_s8(c)), codes, 2);
                high[p] = vmlaq_lane_s16(high[p], vmovl_high_s8(c), codes, 2);
                low[p] = vmlaq_lane_s16(low[p], vmovl_s8(vget_low_s8(d)), codes, 3);
                high[p] = vmlaq_lane_s16(high[p], vmovl_high_s8(d), codes, 3);
            }
        }
    }
    for (int p = 0; p < NEON_PIXELS; p++) {
        sums[p] = widen(low[p], high[p]);
    }
}

/* 16 sums of 32 bits, more by the products of 16 weights and one code. */
#define ARQ_ADD_PRODUCTS(acc, w, codes, lane)                                                                        \
    do {                                                                                                             \
        const int16x8_t w_low = vmovl_s8(vget_low_s8(w)), w_high = vmovl_high_s8(w);                                 \
        (acc).of[0] = vmlal_lane_s16((acc).of[0], vget_low_s16(w_low), codes, lane);                                 \
        (acc).of[1] = vmlal_high_lane_s16((acc).of[1], w_low, codes, lane);                                          \
        (acc).of[2] = vmlal_lane_s16((acc).of[2], vget_low_s16(w_high), codes, lane);                                \
        (acc).of[3] = vmlal_high_lane_s16((acc).of[3], w_high, codes, lane);                                         \
    } while (0)

/* The same in 32 bits. */
static inline void sum_wide(const unsigned char *const in[NEON_PIXELS], const int8_t *weights, uint32_t rows,
                            size_t row_bytes, size_t apart, neon_sums *sums)
{
    neon_sums acc[NEON_PIXELS];
    for (int p = 0; p < NEON_PIXELS; p++) {
        acc[p] = widen(vdupq_n_s16(0), vdupq_n_s16(0));
    }
    for (size_t y = 0; y < rows; y++) {
        for (size_t at = y * apart; at < y * apart + row_bytes; at += 4, weights += 4 * NEON_LANES) {
            const int8x16_t a = vld1q_s8(weights), b = vld1q_s8(weights + 16);
            const int8x16_t c = vld1q_s8(weights + 32), d = vld1q_s8(weights + 48);
            for (int p = 0; p < NEON_PIXELS; p++) {
                const int16x4_t codes = four_codes(in[p] + at);
                ARQ_ADD_PRODUCTS(acc[p], a, codes, 0);
                ARQ_ADD_PRODUCTS(acc[p], b, codes, 1);
                ARQ_ADD_PRODUCTS(acc[p], c, codes, 2);
                ARQ_ADD_PRODUCTS(acc[p], d, codes, 3);
            }
        }
    }
    for (int p = 0; p < NEON_PIXELS; p++) {
        sums[p] = acc[p];
    }
}

/* Four pixels of a row at a time; the last ones stand in for those that are missing. */
static void conv_block(const arq_conv *task, const neon_block *b, const int8_t *weights)
{
    const size_t row_bytes = task->kernel_w * task->pixel_bytes, step = task->stride_w * task->pixel_bytes;
    for (size_t y = 0; y < task->out.height; y++) {
        const unsigned char *row = task->input + y * task->stride_h * task->row_bytes;
        for (size_t x = 0; x < task->out.width; x += NEON_PIXELS) {
            const size_t left = task->out.width - x, some = left < NEON_PIXELS ? left : NEON_PIXELS;
            const unsigned char *in[NEON_PIXELS];
            neon_sums sums[NEON_PIXELS];
            for (size_t p = 0; p < NEON_PIXELS; p++) {
                in[p] = row + (x + (p < some ? p : some - 1)) * step;
            }
            if (task->sum_class == ARQ_SUM_INT16) {
                sum_narrow(in, weights, task->kernel_h, row_bytes, task->row_bytes, sums);
            } else {
                sum_wide(in, weights, task->kernel_h, row_bytes, task->row_bytes, sums);
            }
            for (size_t p = 0; p < some; p++) {
                neon_finish(b, &sums[p], y * task->out.width + x + p);
            }
        }
    }
}

/* ---- depthwise ------------------------------------------------------------------------------------------------ */

/* `valid` codes, the rest zeros. */
static inline uint8x16_t load_codes(const unsigned char *at, uint32_t valid)
{
    uint8_t bytes[16] = {0};
    if (valid == 16) {
        return vld1q_u8(at);
    }
    memcpy(bytes, at, valid);
    return vld1q_u8(bytes);
}

static inline neon_sums depthwise_sums(const arq_conv *task, const unsigned char *in, const int8_t *weights,
                                       uint32_t valid)
{
    int16x8_t low = vdupq_n_s16(0), high = vdupq_n_s16(0);
    neon_sums acc = widen(low, high);
    for (size_t y = 0; y < task->kernel_h; y++) {
        for (size_t x = 0; x < task->kernel_w; x++, weights += NEON_LANES) {
            const uint8x16_t codes = load_codes(in + y * task->row_bytes + x * task->pixel_bytes, valid);
            const int16x8_t u_low = vreinterpretq_s16_u16(vmovl_u8(vget_low_u8(codes)));
            const int16x8_t u_high = vreinterpretq_s16_u16(vmovl_high_u8(codes));
            const int8x16_t w = vld1q_s8(weights);
            const int16x8_t w_low = vmovl_s8(vget_low_s8(w)), w_high = vmovl_high_s8(w);
            if (task->sum_class == ARQ_SUM_INT16) {
                low = vmlaq_s16(low, u_low, w_low);
                high = vmlaq_s16(high, u_high, w_high);
            } else {
                acc.of[0] = vmlal_s16(acc.of[0], vget_low_s16(u_low), vget_low_s16(w_low));
                acc.of[1] = vmlal_high_s16(acc.of[1], u_low, w_low);
                acc.of[2] = vmlal_s16(acc.of[2], vget_low_s16(u_high), vget_low_s16(w_high));
                acc.of[3] = vmlal_high_s16(acc.of[3], u_high, w_high);
            }
        }
    }
    return task->sum_class == ARQ_SUM_INT16 ? widen(low, high) : acc;
}

static void depthwise_block(const arq_conv *task, const neon_block *b, const int8_t *weights)
{
    for (size_t y = 0; y < task->out.height; y++) {
        const unsigned char *in = task->input + y * task->stride_h * task->row_bytes + b->first;
        for (size_t x = 0; x < task->out.width; x++, in += task->stride_w * task->pixel_bytes) {
            const neon_sums sums = depthwise_sums(task, in, weights, b->valid);
            neon_finish(b, &sums, y * task->out.width + x);
        }
    }
}

static void conv(const arq_conv *task)
{
    neon_block b;
    for (uint32_t index = 0; index < blocks_of(task->out.channels); index++) {
        neon_set_block(&b, task, index);
        if (task->depthwise) {
            depthwise_block(task, &b, block_weights(task, index));
        } else {
            conv_block(task, &b, block_weights(task, index));
        }
    }
}

/* ---- elementwise ---------------------------------------------------------------------------------------------- */

static void map_u8(const unsigned char *in, int32_t in_zero, unsigned char *out, int32_t out_zero, size_t count,
                   const arq_rescale *rescale, uint32_t channels)
{
    const arq_tensor to = {ARQ_STORE_U8, out_zero, 1, 1, 1, out};
    arq_tensor from = {ARQ_STORE_U8, in_zero, 1, 1, 1, NULL};
    unsigned char last[16];
    int32_t rows[ARQ_ROWS * NEON_LANES];
    for (size_t i = 0; channels != 1 && i < count; i++) {
        const int32_t y = arq_rescale_value(rescale, in[i] + in_zero, (uint32_t)(i % channels));
        out[i] = (unsigned char)((uint32_t)y - (uint32_t)out_zero);
    }
    if (channels != 1) {
        return;
    }
    const neon_rescale r = neon_tensor_rescale(rescale, &from, 0, NEON_LANES, rows);
    for (size_t i = 0; i < count; i += 16) {
        const uint32_t valid = count - i < 16 ? (uint32_t)(count - i) : 16;
        memcpy(last, in + i, valid);
        from.data = last;
        neon_sums y = neon_load_elements(&from, 0, valid);
        for (int group = 0; group < 4; group++) {
            y.of[group] = neon_apply(&r, group, y.of[group]);
        }
        neon_store_elements(&to, i, valid, &y);
    }
}

const arq_kernels *arq_kernels_neon(void)
{
    static const arq_kernels kernels = {ARQ_ISA_NEON, prepared_bytes, prepare, conv, map_u8};
    return &kernels;
}

#else

typedef int arq_no_neon_kernels;

#endif
