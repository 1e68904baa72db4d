/* Depthwise convolution in AVX-512. Internal to the AVX-512 kernels.
 *
 * Four neighbouring rows of one column of the image, 64 channels of each, are interleaved so that every int32 lane
 * holds four taps of its channel, and meet their weights in vpdpbusd. Interleaving leaves the channels in packed order
 * (arq_avx512_finish.h): lane 4 * g + i of vector j is channel 16 * g + 4 * j + i of the block, and narrowing four
 * vectors to bytes puts them back in order.
 *
 * prepared = constants [block][row][vector][lane],
 *            then weights [block][kernel column][group of 4 rows][vector][lane][4]
 */
#ifndef ARQ_AVX512_DEPTHWISE_H
#define ARQ_AVX512_DEPTHWISE_H

#include "arq_avx512_finish.h"

enum { DEPTHWISE_CHANNELS = 64 };

static uint32_t depthwise_blocks(uint32_t channels)
{
    return (channels + DEPTHWISE_CHANNELS - 1u) / DEPTHWISE_CHANNELS;
}

static uint32_t depthwise_channel(uint32_t lane)
{
    return 16u * (lane >> 2 & 3u) + 4u * (lane >> 4) + (lane & 3u);
}

/* Bytes of the weights of a block. */
static size_t depthwise_weights(uint32_t kernel_h, uint32_t kernel_w)
{
    return (size_t)kernel_w * ((kernel_h + 3u) / 4u) * 4u * DEPTHWISE_CHANNELS;
}

static size_t depthwise_bytes(uint32_t channels, uint32_t kernel_h, uint32_t kernel_w)
{
    const uint32_t blocks = depthwise_blocks(channels);
    return arq_pack_constant_bytes(blocks, DEPTHWISE_CHANNELS) + blocks * depthwise_weights(kernel_h, kernel_w);
}

static void pack_depthwise(unsigned char *memory, const arq_pack_source *from)
{
    const uint32_t blocks = depthwise_blocks(from->out_channels), taps = from->kernel_h * from->kernel_w;
    const uint32_t groups = (from->kernel_h + 3u) / 4u;
    const size_t block_bytes = depthwise_weights(from->kernel_h, from->kernel_w);
    memset(memory, 0, depthwise_bytes(from->out_channels, from->kernel_h, from->kernel_w));
    for (uint32_t index = 0; index < blocks; index++) {
        int32_t *rows = (int32_t *)(void *)memory + (size_t)index * ARQ_ROWS * DEPTHWISE_CHANNELS;
        unsigned char *to = memory + arq_pack_constant_bytes(blocks, DEPTHWISE_CHANNELS) + index * block_bytes;
        uint32_t channel[DEPTHWISE_CHANNELS];
        for (uint32_t lane = 0; lane < DEPTHWISE_CHANNELS; lane++) {
            channel[lane] = index * DEPTHWISE_CHANNELS + depthwise_channel(lane);
        }
        arq_pack_constants(rows, DEPTHWISE_CHANNELS, channel, from, 1);
        for (uint32_t tap = 0; tap < taps; tap++) {
            const uint32_t y = tap / from->kernel_w, x = tap % from->kernel_w;
            unsigned char *at = to + ((size_t)x * groups + y / 4u) * 4u * DEPTHWISE_CHANNELS + y % 4u;
            for (uint32_t lane = 0; lane < DEPTHWISE_CHANNELS; lane++) {
                if (channel[lane] < from->out_channels) {
                    const size_t code = (size_t)channel[lane] * taps + tap;
                    at[4 * lane] = (unsigned char)arq_code(from->packed, code, from->bits);
                }
            }
        }
    }
}

/* A block of up to 64 channels. */
typedef struct wide_block {
    const arq_conv *task;
    uint32_t first, valid;
    __mmask64 mask;
    const unsigned char *weights;
    const int32_t *rows;
    int form; /* of all its channels for U8 output without a residual, else FORM_SUM */
    lanes main[4];
    limits limit;
} wide_block;

ARQ_AVX512 static void set_wide_block(wide_block *b, const arq_conv *task, uint32_t index)
{
    const arq_rescale *r = task->after.rescale;
    const uint32_t blocks = depthwise_blocks(task->out.channels);
    const uint32_t left = task->out.channels - index * DEPTHWISE_CHANNELS;
    b->task = task;
    b->first = index * DEPTHWISE_CHANNELS;
    b->valid = left < DEPTHWISE_CHANNELS ? left : DEPTHWISE_CHANNELS;
    b->mask = ~(__mmask64)0 >> (DEPTHWISE_CHANNELS - b->valid);
    b->rows = arq_pack_row(task->prepared, DEPTHWISE_CHANNELS, index, 0);
    b->weights = task->prepared + arq_pack_constant_bytes(blocks, DEPTHWISE_CHANNELS) +
                 index * depthwise_weights(task->kernel_h, task->kernel_w);
    b->form = FORM_SUM;
    if (task->out.storage == ARQ_STORE_U8 && narrow_zero(task->out.zero) && r != NULL && !task->after.residual) {
        const uint32_t lanes_apart = DEPTHWISE_CHANNELS;
        int high = 1;
        for (uint32_t j = 0; j < 4; j++) {
            set_prepared(&b->main[j], b->rows + 16 * j, lanes_apart, b->rows[lanes_apart * ARQ_ROW_FORM], 0xFFFF, r);
            high &= b->main[j].form != FORM_WIDE;
        }
        for (uint32_t j = 0; j < 4 && !high; j++) { /* one form for all */
            const int32_t *rows = b->rows + 16 * j;
            set_any_exact(&b->main[j], _mm512_loadu_si512(rows + ARQ_ROW_MULTIPLIER * lanes_apart),
                          _mm512_loadu_si512(rows + ARQ_ROW_SHIFT * lanes_apart),
                          _mm512_loadu_si512(rows + ARQ_ROW_BIAS * lanes_apart), r);
        }
        b->form = b->main[0].form;
        b->limit = make_limits(task->out.zero, r->lo, r->hi);
    }
}

/* Sums of the output pixel at element `at`, one by one. */
ARQ_AVX512 static void finish_lanes(const wide_block *b, const __m512i acc[4], size_t at)
{
    int32_t sums[DEPTHWISE_CHANNELS];
    arq_tensor out = b->task->out;
    for (uint32_t j = 0; j < 4; j++) {
        _mm512_storeu_si512(sums + 16 * j, acc[j]);
    }
    for (uint32_t lane = 0; lane < DEPTHWISE_CHANNELS; lane++) {
        const uint32_t c = depthwise_channel(lane);
        if (c < b->valid) {
            const int32_t sum = arq_wrap_add(sums[lane], b->rows[DEPTHWISE_CHANNELS * ARQ_ROW_BIAS + lane]);
            arq_store(&out, at + c, arq_finish_one(&b->task->after, sum, b->first + c, at + c));
        }
    }
}

/* Four vectors of sums of the output pixel at element `at`. `full`: all 64 channels are there. */
ARQ_AVX512_INLINE void finish_pixel(const wide_block *b, const int form, const int full, const __m512i acc[4],
                                    unsigned char *out, size_t at)
{
    if (form == FORM_SUM) {
        finish_lanes(b, acc, at);
        return;
    }
    const __m512i codes = stored_codes(&b->limit, narrow_sums(b->main, 1, form, acc));
    if (full) {
        _mm512_storeu_si512(out + at, codes);
    } else {
        _mm512_mask_storeu_epi8(out + at, b->mask, codes);
    }
}

ARQ_AVX512_INLINE __m512i load_codes(const unsigned char *at, const int full, __mmask64 mask)
{
    return full ? _mm512_loadu_si512(at) : _mm512_maskz_loadu_epi8(mask, at);
}

/* Rows 0 .. rows - 1 (1 to 4) of a column, interleaved. */
ARQ_AVX512_INLINE void interleave(const unsigned char *at, size_t row_bytes, uint32_t rows, const int full,
                                  __mmask64 mask, __m512i column[4])
{
    const __m512i none = _mm512_setzero_si512();
    const __m512i a = load_codes(at, full, mask);
    const __m512i b = rows > 1 ? load_codes(at + row_bytes, full, mask) : none;
    const __m512i c = rows > 2 ? load_codes(at + 2 * row_bytes, full, mask) : none;
    const __m512i d = rows > 3 ? load_codes(at + 3 * row_bytes, full, mask) : none;
    const __m512i ab_low = _mm512_unpacklo_epi8(a, b), ab_high = _mm512_unpackhi_epi8(a, b);
    const __m512i cd_low = _mm512_unpacklo_epi8(c, d), cd_high = _mm512_unpackhi_epi8(c, d);
    column[0] = _mm512_unpacklo_epi16(ab_low, cd_low);
    column[1] = _mm512_unpackhi_epi16(ab_low, cd_low);
    column[2] = _mm512_unpacklo_epi16(ab_high, cd_high);
    column[3] = _mm512_unpackhi_epi16(ab_high, cd_high);
}

/* A column of the image belongs to three outputs: the last of `now`, the middle of `next`, the first of `later`. */
ARQ_AVX512_INLINE void add_column(const __m512i column[4], __m512i w[3][4], __m512i now[4], __m512i next[4],
                                  __m512i later[4])
{
    ARQ_UNROLL
    for (int j = 0; j < 4; j++) {
        now[j] = _mm512_dpbusd_epi32(now[j], column[j], w[2][j]);
        next[j] = _mm512_dpbusd_epi32(next[j], column[j], w[1][j]);
        later[j] = _mm512_dpbusd_epi32(_mm512_setzero_si512(), column[j], w[0][j]);
    }
}

/* One row of outputs from element `at` on, kernel 3 x 3, stride 1: three sums take turns, so that each column is
 * interleaved once. */
ARQ_AVX512_INLINE void row_of_three(const wide_block *b, const int form, const int full, const unsigned char *in,
                                    size_t at)
{
    const size_t step = b->task->pixel_bytes, row_bytes = b->task->row_bytes, channels = b->task->out.channels;
    const __mmask64 mask = b->mask;
    unsigned char *out = b->task->out.data;
    __m512i column[4], w[3][4], one[4], two[4], three[4];
    ARQ_UNROLL
    for (int j = 0; j < 4; j++) {
        one[j] = two[j] = three[j] = _mm512_setzero_si512();
        ARQ_UNROLL
        for (int x = 0; x < 3; x++) {
            w[x][j] = _mm512_loadu_si512(b->weights + 64 * (4 * x + j));
        }
    }
    interleave(in, row_bytes, 3, full, mask, column);
    add_column(column, w, two, three, one);
    interleave(in + step, row_bytes, 3, full, mask, column);
    add_column(column, w, three, one, two);
    in += 2 * step;
    for (uint32_t left = b->task->out.width;; left -= 3) {
        interleave(in, row_bytes, 3, full, mask, column);
        add_column(column, w, one, two, three);
        finish_pixel(b, form, full, one, out, at);
        if (left == 1) {
            return;
        }
        interleave(in + step, row_bytes, 3, full, mask, column);
        add_column(column, w, two, three, one);
        finish_pixel(b, form, full, two, out, at + channels);
        if (left == 2) {
            return;
        }
        interleave(in + 2 * step, row_bytes, 3, full, mask, column);
        add_column(column, w, three, one, two);
        finish_pixel(b, form, full, three, out, at + 2 * channels);
        if (left == 3) {
            return;
        }
        in += 3 * step;
        at += 3 * channels;
    }
}

/* One row of outputs, any kernel and stride. */
ARQ_AVX512_INLINE void any_row(const wide_block *b, const int form, const int full, const uint32_t kernel_h,
                               const uint32_t kernel_w, const unsigned char *in, size_t at)
{
    const arq_conv *task = b->task;
    const size_t row_bytes = task->row_bytes, channels = task->out.channels, end = at + task->out.width * channels;
    const size_t pixel_bytes = task->pixel_bytes, step = task->stride_w * pixel_bytes;
    const __mmask64 mask = b->mask;
    unsigned char *out = task->out.data;
    for (; at < end; at += channels, in += step) {
        const unsigned char *weights = b->weights, *window = in;
        __m512i acc[4];
        ARQ_UNROLL
        for (int j = 0; j < 4; j++) {
            acc[j] = _mm512_setzero_si512();
        }
        for (uint32_t x = 0; x < kernel_w; x++, window += pixel_bytes) {
            for (uint32_t y = 0; y < kernel_h; y += 4, weights += 256) {
                __m512i column[4];
                interleave(window + y * row_bytes, row_bytes, kernel_h - y, full, mask, column);
                ARQ_UNROLL
                for (int j = 0; j < 4; j++) {
                    acc[j] = _mm512_dpbusd_epi32(acc[j], column[j], _mm512_loadu_si512(weights + 64 * j));
                }
            }
        }
        finish_pixel(b, form, full, acc, out, at);
    }
}

ARQ_AVX512_INLINE void depthwise_rows(const wide_block *b, const int form, const int full)
{
    const arq_conv *task = b->task;
    const int three = task->kernel_h == 3 && task->kernel_w == 3;
    for (size_t y = 0; y < task->out.height; y++) {
        const unsigned char *in = task->input + y * task->stride_h * task->row_bytes + b->first;
        const size_t at = y * task->out.width * task->out.channels + b->first;
        if (three && task->stride_w == 1) {
            row_of_three(b, form, full, in, at);
        } else if (three) {
            any_row(b, form, full, 3, 3, in, at);
        } else {
            any_row(b, form, full, task->kernel_h, task->kernel_w, in, at);
        }
    }
}

#define ARQ_DEPTHWISE(name, form)                                                                                    \
    ARQ_AVX512 static void depthwise_##name(const wide_block *b)                                                     \
    {                                                                                                                \
        if (b->valid == DEPTHWISE_CHANNELS) {                                                                        \
            depthwise_rows(b, form, 1);                                                                              \
        } else {                                                                                                     \
            depthwise_rows(b, form, 0);                                                                              \
        }                                                                                                            \
    }
ARQ_DEPTHWISE(plain, FORM_PLAIN)
ARQ_DEPTHWISE(fast, FORM_FAST)
ARQ_DEPTHWISE(high, FORM_HIGH)
ARQ_DEPTHWISE(wide, FORM_WIDE)
ARQ_DEPTHWISE(any, FORM_SUM)

ARQ_AVX512 static void depthwise(const arq_conv *task)
{
    wide_block b;
    for (uint32_t index = 0; index < depthwise_blocks(task->out.channels); index++) {
        set_wide_block(&b, task, index);
        switch (b.form) {
        case FORM_PLAIN:
            depthwise_plain(&b);
            break;
        case FORM_FAST:
            depthwise_fast(&b);
            break;
        case FORM_HIGH:
            depthwise_high(&b);
            break;
        case FORM_WIDE:
            depthwise_wide(&b);
            break;
        default:
            depthwise_any(&b);
        }
    }
}

#endif
