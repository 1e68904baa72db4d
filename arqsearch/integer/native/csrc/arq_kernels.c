/* The portable convolution: C99 on packed weights, for every processor and every step.
 *
 * Four output channels at a time are unpacked into rows of int16 and then slid over the image. Windows are cut at the
 * image's edge (padding holds the value 0), so nothing is copied; the terms of one window's row are contiguous, and
 * compilers turn the sums over them into vector code. Sums are formed in uint32: the writer of the blob proved that
 * they fit int32, and whatever else is in a blob wraps instead of being undefined.
 */
#include "arq_program.h"

#define ROWS 4

/* Window positions first .. stop - 1 of one axis that lie inside the image, for the window that starts at `start`. */
typedef struct cut {
    uint32_t first, stop;
} cut;

static cut cut_window(int32_t start, uint32_t kernel, uint32_t size)
{
    const int32_t end = (int32_t)size - start;
    cut inside;
    inside.first = start < 0 ? (uint32_t)-start : 0;
    inside.stop = end < 0 ? 0 : (uint32_t)end < kernel ? (uint32_t)end : kernel;
    return inside;
}

/* Weight codes first .. first + count - 1. */
static void unpack(const uint32_t *packed, size_t first, size_t count, uint32_t bits, int16_t *codes)
{
    for (size_t i = 0; i < count; i++) {
        codes[i] = (int16_t)arq_code(packed, first + i, bits);
    }
}

/* sums[r] += sum of x[i] * row r [i] over n elements of `in` from `first` on. The products of int16 fit int32. */
static void dot_u8(const arq_tensor *in, size_t first, const int16_t *row, size_t stride, size_t n,
                   uint32_t sums[ROWS])
{
    const unsigned char *x = in->data + first;
    const int16_t zero = (int16_t)in->zero;
    const int16_t *row1 = row + stride, *row2 = row1 + stride, *row3 = row2 + stride;
    uint32_t s0 = 0, s1 = 0, s2 = 0, s3 = 0;
    for (size_t i = 0; i < n; i++) {
        const int16_t value = (int16_t)(x[i] + zero);
        s0 += (uint32_t)(value * row[i]);
        s1 += (uint32_t)(value * row1[i]);
        s2 += (uint32_t)(value * row2[i]);
        s3 += (uint32_t)(value * row3[i]);
    }
    sums[0] += s0;
    sums[1] += s1;
    sums[2] += s2;
    sums[3] += s3;
}

static void dot_i16(const arq_tensor *in, size_t first, const int16_t *row, size_t stride, size_t n,
                    uint32_t sums[ROWS])
{
    const unsigned char *x = in->data + 2 * first;
    const int16_t *row1 = row + stride, *row2 = row1 + stride, *row3 = row2 + stride;
    uint32_t s0 = 0, s1 = 0, s2 = 0, s3 = 0;
    for (size_t i = 0; i < n; i++) {
        int16_t value;
        memcpy(&value, x + 2 * i, sizeof value);
        s0 += (uint32_t)(value * row[i]);
        s1 += (uint32_t)(value * row1[i]);
        s2 += (uint32_t)(value * row2[i]);
        s3 += (uint32_t)(value * row3[i]);
    }
    sums[0] += s0;
    sums[1] += s1;
    sums[2] += s2;
    sums[3] += s3;
}

/* Any storage and zero. */
static void dot_any(const arq_tensor *in, size_t first, const int16_t *row, size_t stride, size_t n,
                    uint32_t sums[ROWS])
{
    for (size_t i = 0; i < n; i++) {
        const uint32_t value = (uint32_t)arq_load(in, first + i);
        for (size_t r = 0; r < ROWS; r++) {
            const int32_t weight = row[r * stride + i];
            sums[r] += value * (uint32_t)weight;
        }
    }
}

typedef void (*dot_function)(const arq_tensor *in, size_t first, const int16_t *row, size_t stride, size_t n,
                             uint32_t sums[ROWS]);

static int narrow_u8(const arq_tensor *t)
{
    return t->storage == ARQ_STORE_U8 && t->zero >= -16384 && t->zero <= 16384;
}

static dot_function choose_dot(const arq_tensor *in)
{
    return narrow_u8(in) ? dot_u8 : in->storage == ARQ_STORE_I16 ? dot_i16 : dot_any;
}

/* Bias of `count` channels, and zeros. */
static void start_sums(const int32_t *bias, uint32_t count, uint32_t sums[ROWS])
{
    for (uint32_t r = 0; r < ROWS; r++) {
        sums[r] = r < count ? (uint32_t)bias[r] : 0;
    }
}

/* Finish and store `count` channels from `channel` on of one position. */
static void finish(const arq_epilogue *after, const arq_tensor *out, size_t position, uint32_t channel, uint32_t count,
                   const uint32_t sums[ROWS])
{
    const size_t element = position * out->channels + channel;
    for (uint32_t r = 0; r < count; r++) {
        arq_store(out, element + r, arq_finish_one(after, arq_signed(sums[r]), channel + r, element + r));
    }
}

/* Channels of one group at a time; `count` (at most 4) output channels from `channel` on. */
static void group_rows(const arq_conv_step *conv, const arq_tensor *in, const int32_t *bias, const int16_t *rows,
                       const arq_epilogue *after, const arq_tensor *out, uint32_t channel, uint32_t count)
{
    const arq_window *w = &conv->window;
    const dot_function dot = choose_dot(in);
    const size_t per_group = in->channels / conv->groups;
    const size_t first = channel / (out->channels / conv->groups) * per_group;
    const size_t stride = per_group * w->kernel_h * w->kernel_w;
    size_t position = 0;
    for (uint32_t y = 0; y < out->height; y++) {
        const int32_t top = (int32_t)(y * w->stride_h) - (int32_t)w->top;
        const cut high = cut_window(top, w->kernel_h, in->height);
        for (uint32_t x = 0; x < out->width; x++, position++) {
            const int32_t left = (int32_t)(x * w->stride_w) - (int32_t)w->left;
            const cut wide = cut_window(left, w->kernel_w, in->width);
            uint32_t sums[ROWS];
            start_sums(bias + channel, count, sums);
            for (uint32_t i = high.first; i < high.stop && wide.first < wide.stop; i++) {
                const size_t line = (size_t)(top + (int32_t)i) * in->width;
                const size_t row = (size_t)i * w->kernel_w;
                if (conv->groups == 1) {
                    dot(in, (line + (size_t)(left + (int32_t)wide.first)) * per_group,
                        rows + (row + wide.first) * per_group, stride, (wide.stop - wide.first) * per_group, sums);
                    continue;
                }
                for (uint32_t j = wide.first; j < wide.stop; j++) {
                    dot(in, (line + (size_t)(left + (int32_t)j)) * in->channels + first, rows + (row + j) * per_group,
                        stride, per_group, sums);
                }
            }
            finish(after, out, position, channel, count, sums);
        }
    }
}

/* One row of a window, `n` pixels of 4 channels each: sums[r] += sum of pixel[r] * tap[r]. */
static void taps_u8(const unsigned char *pixel, size_t channels, int32_t zero, const int16_t *tap, size_t n,
                    uint32_t sums[ROWS])
{
    const int16_t shift = (int16_t)zero;
    for (; n > 0; n--, pixel += channels, tap += ROWS) {
        for (size_t r = 0; r < ROWS; r++) {
            const int16_t value = (int16_t)(pixel[r] + shift);
            sums[r] += (uint32_t)(value * tap[r]);
        }
    }
}

/* The same for any storage and zero, and `count` channels. */
static void taps_any(const arq_tensor *in, size_t first, uint32_t count, const int16_t *tap, size_t n,
                     uint32_t sums[ROWS])
{
    for (; n > 0; n--, first += in->channels, tap += ROWS) {
        for (uint32_t r = 0; r < count; r++) {
            const int32_t weight = tap[r];
            sums[r] += (uint32_t)arq_load(in, first + r) * (uint32_t)weight;
        }
    }
}

/* Depthwise, `count` (at most 4) channels from `channel` on; `taps` holds 4 weights for each place in the window. */
static void depthwise_rows(const arq_conv_step *conv, const arq_tensor *in, const int32_t *bias, const int16_t *taps,
                           const arq_epilogue *after, const arq_tensor *out, uint32_t channel, uint32_t count)
{
    const arq_window *w = &conv->window;
    const int whole = count == ROWS && narrow_u8(in);
    size_t position = 0;
    for (uint32_t y = 0; y < out->height; y++) {
        const int32_t top = (int32_t)(y * w->stride_h) - (int32_t)w->top;
        const cut high = cut_window(top, w->kernel_h, in->height);
        for (uint32_t x = 0; x < out->width; x++, position++) {
            const int32_t left = (int32_t)(x * w->stride_w) - (int32_t)w->left;
            const cut wide = cut_window(left, w->kernel_w, in->width);
            uint32_t sums[ROWS];
            start_sums(bias + channel, count, sums);
            for (uint32_t i = high.first; i < high.stop && wide.first < wide.stop; i++) {
                const size_t pixel = (size_t)(top + (int32_t)i) * in->width + (size_t)(left + (int32_t)wide.first);
                const size_t element = pixel * in->channels + channel;
                const int16_t *tap = taps + ((size_t)i * w->kernel_w + wide.first) * ROWS;
                if (whole) {
                    taps_u8(in->data + element, in->channels, in->zero, tap, wide.stop - wide.first, sums);
                } else {
                    taps_any(in, element, count, tap, wide.stop - wide.first, sums);
                }
            }
            finish(after, out, position, channel, count, sums);
        }
    }
}

void arq_portable_conv(const arq_conv_step *conv, const arq_tensor *in, const uint32_t *packed, const int32_t *bias,
                       int16_t *rows, const arq_epilogue *after, const arq_tensor *out)
{
    const int depthwise = arq_depthwise(conv, in->channels, out->channels);
    const uint32_t out_per_group = out->channels / conv->groups;
    const size_t length = (size_t)(in->channels / conv->groups) * conv->window.kernel_h * conv->window.kernel_w;
    uint32_t channel = 0;
    while (channel < out->channels) {
        const uint32_t left = depthwise ? out->channels - channel : out_per_group - channel % out_per_group;
        const uint32_t count = left < ROWS ? left : ROWS;
        if (depthwise) {
            for (uint32_t r = 0; r < count; r++) {
                for (size_t tap = 0; tap < length; tap++) {
                    rows[tap * ROWS + r] = (int16_t)arq_code(packed, (channel + r) * length + tap, conv->bits);
                }
            }
            depthwise_rows(conv, in, bias, rows, after, out, channel, count);
        } else {
            unpack(packed, channel * length, count * length, conv->bits, rows);
            memset(rows + count * length, 0, (ROWS - count) * length * sizeof *rows);
            group_rows(conv, in, bias, rows, after, out, channel, count);
        }
        channel += count;
    }
}
