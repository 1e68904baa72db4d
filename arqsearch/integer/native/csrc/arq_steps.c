/* Every step but the convolution. Values pass through short rows of int32; loops over them have one storage and one
 * kind of rescaling each, so that compilers can turn them into vector code. */
#include "arq_program.h"

/* Values handled at once. */
#define CHUNK 64

static size_t smaller(size_t a, size_t b)
{
    return a < b ? a : b;
}

static void load_row(const arq_tensor *t, size_t first, size_t count, int32_t *row)
{
    if (t->storage == ARQ_STORE_U8) {
        for (size_t i = 0; i < count; i++) {
            row[i] = (int32_t)t->data[first + i] + t->zero;
        }
    } else if (t->storage == ARQ_STORE_I16) {
        for (size_t i = 0; i < count; i++) {
            int16_t narrow;
            memcpy(&narrow, t->data + 2 * (first + i), sizeof narrow);
            row[i] = narrow;
        }
    } else {
        memcpy(row, t->data + 4 * first, 4 * count);
    }
}

static void store_row(const arq_tensor *t, size_t first, size_t count, const int32_t *row)
{
    if (t->storage == ARQ_STORE_U8) {
        for (size_t i = 0; i < count; i++) {
            t->data[first + i] = (unsigned char)((uint32_t)row[i] - (uint32_t)t->zero);
        }
    } else if (t->storage == ARQ_STORE_I16) {
        for (size_t i = 0; i < count; i++) {
            const int16_t narrow = (int16_t)row[i];
            memcpy(t->data + 2 * (first + i), &narrow, sizeof narrow);
        }
    } else {
        memcpy(t->data + 4 * first, row, 4 * count);
    }
}

/* Rescale values of the channels `channel`, `channel` + 1, ... in place. */
static void rescale_row(const arq_rescale *r, uint32_t channel, size_t count, int32_t *row)
{
    if (!r->fast) {
        for (size_t i = 0; i < count; i++) {
            row[i] = arq_rescale_one(r, row[i], channel + (uint32_t)i);
        }
    } else if (r->channels == 1) {
        const int32_t fast_lo = r->fast_lo[0], fast_hi = r->fast_hi[0], multiplier = r->fast_multiplier[0];
        const int32_t offset = r->fast_offset[0], lo = r->lo, hi = r->hi;
        const uint32_t shift = (uint32_t)r->fast_shift[0];
        for (size_t i = 0; i < count; i++) {
            const int32_t x = row[i] < fast_lo ? fast_lo : row[i] > fast_hi ? fast_hi : row[i];
            const int32_t y = arq_shift32(x * multiplier + offset, shift);
            row[i] = y < lo ? lo : y > hi ? hi : y;
        }
    } else {
        for (size_t i = 0; i < count; i++) {
            row[i] = arq_rescale_fast(r, row[i], channel + (uint32_t)i);
        }
    }
}

/* Whether two tensors hold the same value as the same bytes. */
static int same_bytes(const arq_tensor *a, const arq_tensor *b)
{
    return a->storage == b->storage && a->zero == b->zero;
}

/* `count` elements as they are, converting the storage. */
static void copy_elements(const arq_tensor *in, size_t from, const arq_tensor *out, size_t to, size_t count)
{
    const size_t bytes = arq_storage_bytes(in->storage);
    if (same_bytes(in, out)) {
        memmove(out->data + to * bytes, in->data + from * bytes, count * bytes);
        return;
    }
    for (size_t i = 0; i < count; i += CHUNK) {
        int32_t row[CHUNK];
        const size_t part = smaller(CHUNK, count - i);
        load_row(in, from + i, part, row);
        store_row(out, to + i, part, row);
    }
}

/* `count` elements of one value. */
static void fill_elements(const arq_tensor *out, size_t to, size_t count, int32_t value)
{
    if (out->storage == ARQ_STORE_U8) {
        memset(out->data + to, (int)(unsigned char)((uint32_t)value - (uint32_t)out->zero), count);
        return;
    }
    for (size_t i = 0; i < count; i++) {
        arq_store(out, to + i, value);
    }
}

static int64_t constant64(const uint32_t *at)
{
    return arq_signed64((uint64_t)at[1] << 32 | at[0]);
}

/* Channel by channel, so that the multiplier and the offset stay in registers; half up is a floor after adding a half.
 * Sums are formed in uint64 (their range is proven by the writer). */
static void run_input(const arq_memory *memory, const uint32_t *step)
{
    const arq_tensor in = arq_tensor_at(memory, step[2]), out = arq_tensor_at(memory, step[3]);
    const uint32_t n = step[4], shift = step[5], rounding = step[6];
    const int32_t pre_lo = arq_signed(step[7]), pre_hi = arq_signed(step[8]);
    const int32_t lo = arq_signed(step[9]), hi = arq_signed(step[10]);
    const uint32_t *constants = memory->words + step[11];
    const size_t count = arq_elements(&in);
    const uint64_t half = rounding == ARQ_HALF_UP && shift > 0 ? (uint64_t)1 << (shift - 1) : 0;
    for (size_t c = 0; c < n; c++) {
        const uint64_t multiplier = (uint64_t)constant64(constants + 2 * c);
        const uint64_t offset = (uint64_t)constant64(constants + 2 * (n + c)) + half;
        for (size_t i = c; i < count; i += n) {
            int16_t pixel;
            memcpy(&pixel, in.data + 2 * i, sizeof pixel);
            const int32_t x = pixel < pre_lo ? pre_lo : pixel > pre_hi ? pre_hi : pixel;
            const int64_t sum = arq_signed64((uint64_t)(int64_t)x * multiplier + offset);
            const int64_t y =
                rounding == ARQ_HALF_EVEN ? arq_round_shift(sum, shift, ARQ_HALF_EVEN) : arq_shift64(sum, shift);
            arq_store(&out, i, arq_clip(y, lo, hi));
        }
    }
}

/* Codes with one multiplier for all of them: through a table. */
static void map_codes(const unsigned char *in, int32_t in_zero, unsigned char *out, int32_t out_zero, size_t count,
                      const arq_rescale *rescale)
{
    unsigned char table[256];
    for (uint32_t code = 0; code < 256; code++) {
        const int32_t y = arq_rescale_value(rescale, (int32_t)code + in_zero, 0);
        table[code] = (unsigned char)((uint32_t)y - (uint32_t)out_zero);
    }
    for (size_t i = 0; i < count; i++) {
        out[i] = table[in[i]];
    }
}

void arq_rescale_elements(const arq_tensor *in, size_t first, const arq_tensor *out, size_t count,
                          const arq_rescale *rescale)
{
    if (rescale->channels == 1 && in->storage == ARQ_STORE_U8 && out->storage == ARQ_STORE_U8 && count >= 512) {
        map_codes(in->data + first, in->zero, out->data, out->zero, count, rescale);
        return;
    }
    const size_t channels = rescale->channels == 1 ? count : rescale->channels;
    for (size_t start = 0; start < count; start += channels) {
        for (size_t c = 0; c < channels; c += CHUNK) {
            int32_t row[CHUNK];
            const size_t part = smaller(CHUNK, channels - c);
            load_row(in, first + start + c, part, row);
            rescale_row(rescale, (uint32_t)c, part, row);
            store_row(out, start + c, part, row);
        }
    }
}

static void run_rescale(const arq_memory *memory, const uint32_t *step)
{
    const arq_tensor in = arq_tensor_at(memory, step[2]), out = arq_tensor_at(memory, step[3]);
    const arq_rescale rescale = arq_rescale_at(memory->words, step[4]);
    const size_t count = arq_elements(&in);
    if (memory->kernels != NULL && in.storage == ARQ_STORE_U8 && out.storage == ARQ_STORE_U8) {
        memory->kernels->map_u8(in.data, in.zero, out.data, out.zero, count, &rescale, rescale.channels);
    } else {
        arq_rescale_elements(&in, 0, &out, count, &rescale);
    }
}

static void run_add(const arq_memory *memory, const uint32_t *step)
{
    const arq_tensor a = arq_tensor_at(memory, step[2]), b = arq_tensor_at(memory, step[3]);
    const arq_tensor out = arq_tensor_at(memory, step[4]);
    const int32_t lo = arq_signed(step[7]), hi = arq_signed(step[8]);
    const size_t count = arq_elements(&a);
    arq_rescale of_a, of_b;
    int whole = 1;
    if (step[5] != 0) {
        of_a = arq_rescale_at(memory->words, step[5]);
        whole = of_a.channels == 1;
    }
    if (step[6] != 0) {
        of_b = arq_rescale_at(memory->words, step[6]);
        whole = whole && of_b.channels == 1;
    }
    const uint32_t channels = whole ? (uint32_t)count : a.channels;
    for (size_t first = 0; first < count; first += channels) {
        for (uint32_t c = 0; c < channels; c += CHUNK) {
            int32_t row[CHUNK], other[CHUNK];
            const size_t part = smaller(CHUNK, channels - c);
            load_row(&a, first + c, part, row);
            load_row(&b, first + c, part, other);
            if (step[5] != 0) {
                rescale_row(&of_a, c, part, row);
            }
            if (step[6] != 0) {
                rescale_row(&of_b, c, part, other);
            }
            for (size_t i = 0; i < part; i++) {
                row[i] = arq_clip((int64_t)row[i] + other[i], lo, hi);
            }
            store_row(&out, first + c, part, row);
        }
    }
}

/* First and last + 1 place of a window inside the image, along one axis. */
static void clip_window(uint32_t index, uint32_t stride, uint32_t kernel, uint32_t before, uint32_t size,
                        uint32_t *first, uint32_t *stop)
{
    const uint32_t start = index * stride; /* counted from the padding's beginning */
    const uint32_t end = start + kernel > before ? start + kernel - before : 0;
    *first = start > before ? start - before : 0;
    *stop = end < size ? end : size;
}

/* Sums (in uint32; their range is proven) or maxima of `part` channels over one window, left in `row`. */
static void pool_window(const arq_tensor *in, int maximum, const uint32_t rows[2], const uint32_t columns[2],
                        uint32_t channel, size_t part, int32_t row[CHUNK])
{
    for (size_t i = 0; i < part; i++) {
        row[i] = maximum ? INT32_MIN : 0;
    }
    for (uint32_t y = rows[0]; y < rows[1]; y++) {
        for (uint32_t x = columns[0]; x < columns[1]; x++) {
            int32_t values[CHUNK];
            load_row(in, ((size_t)y * in->width + x) * in->channels + channel, part, values);
            if (maximum) {
                for (size_t i = 0; i < part; i++) {
                    row[i] = values[i] > row[i] ? values[i] : row[i];
                }
            } else {
                for (size_t i = 0; i < part; i++) {
                    row[i] = arq_signed((uint32_t)row[i] + (uint32_t)values[i]);
                }
            }
        }
    }
}

static void run_pool(const arq_memory *memory, const uint32_t *step)
{
    const arq_tensor in = arq_tensor_at(memory, step[2]), out = arq_tensor_at(memory, step[3]);
    const arq_window w = arq_read_window(step + 4);
    size_t position = 0;
    for (uint32_t y = 0; y < out.height; y++) {
        uint32_t rows[2];
        clip_window(y, w.stride_h, w.kernel_h, w.top, in.height, &rows[0], &rows[1]);
        for (uint32_t x = 0; x < out.width; x++, position++) {
            uint32_t columns[2];
            clip_window(x, w.stride_w, w.kernel_w, w.left, in.width, &columns[0], &columns[1]);
            for (uint32_t c = 0; c < in.channels; c += CHUNK) {
                int32_t row[CHUNK];
                const size_t part = smaller(CHUNK, in.channels - c);
                pool_window(&in, step[0] == ARQ_STEP_MAXPOOL, rows, columns, c, part, row);
                store_row(&out, position * out.channels + c, part, row);
            }
        }
    }
}

/* `count` pixels of the padding's constants. */
static void fill_pixels(const arq_tensor *out, size_t pixel, size_t count, const uint32_t *values)
{
    for (size_t element = pixel * out->channels; count > 0; count--) {
        for (uint32_t c = 0; c < out->channels; c++, element++) {
            arq_store(out, element, arq_signed(values[c]));
        }
    }
}

static void run_pad(const arq_memory *memory, const uint32_t *step)
{
    const arq_tensor in = arq_tensor_at(memory, step[2]), out = arq_tensor_at(memory, step[3]);
    const uint32_t top = step[4], bottom = step[5], left = step[6], right = step[7];
    const uint32_t *values = memory->words + step[8];
    const size_t row = (size_t)in.width * in.channels;
    size_t pixel = (size_t)top * out.width;
    fill_pixels(&out, 0, pixel, values);
    for (uint32_t y = 0; y < in.height; y++) {
        fill_pixels(&out, pixel, left, values);
        copy_elements(&in, y * row, &out, (pixel + left) * out.channels, row);
        fill_pixels(&out, pixel + left + in.width, right, values);
        pixel += out.width;
    }
    fill_pixels(&out, pixel, (size_t)bottom * out.width, values);
}

static void run_channels(const arq_memory *memory, const uint32_t *step)
{
    const arq_tensor in = arq_tensor_at(memory, step[2]), out = arq_tensor_at(memory, step[3]);
    const uint32_t before = step[4];
    const size_t pixels = (size_t)in.height * in.width;
    fill_elements(&out, 0, pixels * out.channels, 0);
    for (size_t p = 0; p < pixels; p++) {
        copy_elements(&in, p * in.channels, &out, p * out.channels + before, in.channels);
    }
}

static void run_slice(const arq_memory *memory, const uint32_t *step)
{
    const arq_tensor in = arq_tensor_at(memory, step[2]), out = arq_tensor_at(memory, step[3]);
    const uint32_t *rows = step + 4, *columns = step + 7, *channels = step + 10;
    size_t to = 0;
    for (uint32_t y = 0; y < out.height; y++) {
        const size_t line = (size_t)(rows[0] + y * rows[2]) * in.width;
        for (uint32_t x = 0; x < out.width; x++, to += out.channels) {
            const size_t from = (line + columns[0] + x * columns[2]) * in.channels + channels[0];
            if (channels[2] == 1) {
                copy_elements(&in, from, &out, to, out.channels);
                continue;
            }
            for (uint32_t c = 0; c < out.channels; c++) {
                arq_store(&out, to + c, arq_load(&in, from + (size_t)c * channels[2]));
            }
        }
    }
}

void arq_run_step(const arq_memory *memory, const uint32_t *step)
{
    switch (step[0]) {
    case ARQ_STEP_INPUT:
        run_input(memory, step);
        break;
    case ARQ_STEP_RESCALE:
        run_rescale(memory, step);
        break;
    case ARQ_STEP_ADD:
        run_add(memory, step);
        break;
    case ARQ_STEP_SUMPOOL:
    case ARQ_STEP_MAXPOOL:
        run_pool(memory, step);
        break;
    case ARQ_STEP_PAD:
        run_pad(memory, step);
        break;
    case ARQ_STEP_CHANNELS:
        run_channels(memory, step);
        break;
    case ARQ_STEP_SLICE:
        run_slice(memory, step);
        break;
    default: { /* ARQ_STEP_COPY: arq_open saw that there is no other */
        const arq_tensor in = arq_tensor_at(memory, step[2]), out = arq_tensor_at(memory, step[3]);
        copy_elements(&in, 0, &out, 0, arq_elements(&in));
    }
    }
}
