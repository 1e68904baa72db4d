/* Kernels for AVX-512 (F, BW, VL, DQ) with VNNI. */
#include "arq_kernels.h"

#ifdef ARQ_WITH_AVX512

#include "arq_avx512_block.h"
#include "arq_avx512_depthwise.h"
#include "arq_avx512_tiles.h"

/* ---- convolution ---------------------------------------------------------------------------------------------- */

enum { FORM_MIXED = 5 }; /* blocks of several forms, or not of U8 */
enum { CACHED_BYTES = 256 * 1024 };

/* The tile of `pixels` pixels from `pixel` on is summed: complete it. */
ARQ_AVX512_INLINE void finish_tile(const block *blocks, const int count, const int form, const __m512i *sums,
                                   uint32_t pixels, size_t pixel)
{
    for (int b = 0; b < count; b++, sums += TILE_PIXELS) {
        if (form == FORM_MIXED) {
            finish_wide(&blocks[b], sums, pixels, pixel);
        } else {
            finish_block(&blocks[b], form, sums, pixels, pixel);
        }
    }
}

/* All pixels of a group of blocks. Pixels are counted in raster order, 8 to a tile, so that a tile may span rows; the
 * last tile repeats the last pixel. */
ARQ_AVX512_INLINE void conv_tiles(const arq_conv *task, const reach *r, const block *blocks, const int count,
                                  const int form)
{
    const size_t width = task->out.width, pixels = width * task->out.height;
    const size_t step = task->stride_w * task->pixel_bytes, row = task->stride_h * task->row_bytes;
    const unsigned char *in_row = task->input; /* of window x = 0 */
    size_t x = 0;
    if (pixels == 1) {
        __m512i sums[TILE_SUMS];
        memset(sums, 0, sizeof sums);
        sum_tile(r, &in_row, sums, 1, count);
        finish_tile(blocks, count, form, sums, 1, 0);
        return;
    }
    for (size_t pixel = 0; pixel < pixels; pixel += TILE_PIXELS) {
        const uint32_t some = pixels - pixel < TILE_PIXELS ? (uint32_t)(pixels - pixel) : TILE_PIXELS;
        const unsigned char *in[TILE_PIXELS];
        __m512i sums[TILE_SUMS];
        if (x == width) {
            x = 0;
            in_row += row;
        }
        if (width - x >= TILE_PIXELS) {
            const unsigned char *at = in_row + x * step;
            ARQ_UNROLL
            for (int p = 0; p < TILE_PIXELS; p++) {
                in[p] = at + (size_t)p * step;
            }
            x += TILE_PIXELS;
        } else {
            for (uint32_t p = 0; p < TILE_PIXELS; p++) {
                if (x == width && p < some) {
                    x = 0;
                    in_row += row;
                }
                in[p] = in_row + (p < some ? x : x - 1) * step;
                x += p < some;
            }
        }
        sum_tile(r, in, sums, TILE_PIXELS, count);
        finish_tile(blocks, count, form, sums, some, pixel);
    }
}

ARQ_AVX512_INLINE void conv_shared(const arq_conv *task, const reach *r, const block *blocks, const int form,
                                   const size_t pixel_bytes, const int pixels)
{
    for (size_t y = 0; y < task->out.height; y++) {
        const unsigned char *in = task->input + y * task->stride_h * task->row_bytes;
        for (size_t x = 0; x < task->out.width; x += (size_t)pixels) {
            __m512i sums[TILE_SUMS];
            sum_shared(r, in + x * pixel_bytes, pixel_bytes, sums, pixels);
            finish_tile(blocks, 1, form, sums, (uint32_t)pixels, y * task->out.width + x);
        }
    }
}

/* A lone block: in the ways that need fewer loads where they apply. */
ARQ_AVX512_INLINE void conv_block(const arq_conv *task, const reach *r, const block *blocks, const int form)
{
    const size_t width = task->out.width;
    if (task->kernel_w != 3 || task->stride_w != 1 || width % TILE_PIXELS != 0 || r->last != 0xFFFF) {
        conv_tiles(task, r, blocks, 1, form);
    } else if (width % (2 * TILE_PIXELS) != 0) {
        conv_shared(task, r, blocks, form, task->pixel_bytes, TILE_PIXELS);
    } else if (task->pixel_bytes == 16) {
        conv_shared(task, r, blocks, form, 16, 2 * TILE_PIXELS);
    } else {
        conv_shared(task, r, blocks, form, task->pixel_bytes, 2 * TILE_PIXELS);
    }
}

typedef void group_function(const arq_conv *task, const reach *r, const block *blocks);

#define ARQ_GROUP(name, form)                                                                                        \
    ARQ_AVX512 static void group_##name##_1(const arq_conv *task, const reach *r, const block *blocks)               \
    {                                                                                                                \
        conv_block(task, r, blocks, form);                                                                           \
    }                                                                                                                \
    ARQ_AVX512 static void group_##name##_2(const arq_conv *task, const reach *r, const block *blocks)               \
    {                                                                                                                \
        conv_tiles(task, r, blocks, 2, form);                                                                        \
    }                                                                                                                \
    ARQ_AVX512 static void group_##name##_3(const arq_conv *task, const reach *r, const block *blocks)               \
    {                                                                                                                \
        conv_tiles(task, r, blocks, 3, form);                                                                        \
    }
ARQ_GROUP(plain, FORM_PLAIN)
ARQ_GROUP(fast, FORM_FAST)
ARQ_GROUP(high, FORM_HIGH)
ARQ_GROUP(mixed, FORM_MIXED)

/* All pixels of the blocks first .. first + count - 1. */
ARQ_AVX512 static void conv_blocks(const arq_conv *task, uint32_t first, uint32_t count)
{
    static group_function *const groups[4][TILE_BLOCKS] = {{group_plain_1, group_plain_2, group_plain_3},
                                                           {group_fast_1, group_fast_2, group_fast_3},
                                                           {group_high_1, group_high_2, group_high_3},
                                                           {group_mixed_1, group_mixed_2, group_mixed_3}};
    block blocks[TILE_BLOCKS];
    reach r;
    const uint32_t width = arq_pack_width(task->out.channels, first + count - 1);
    int plain = 1, fast = 1, high = 1;
    r.rows = task->kernel_h;
    r.row_steps = arq_pack_row_steps(task->kernel_w, task->channels);
    r.row_bytes = task->row_bytes;
    r.weights = arq_pack_weights(task->prepared, task->out.channels, first, r.rows * r.row_steps, 1);
    r.block_bytes = r.rows * r.row_steps * 64u;
    r.last = width == 8 ? 0x00FF : 0xFFFF;
    r.last_step = 4u * width;
    for (uint32_t b = 0; b < count; b++) {
        set_block(&blocks[b], task, first + b);
        const int form = blocks[b].narrow ? blocks[b].main.form : FORM_MIXED;
        plain &= form == FORM_PLAIN;
        fast &= form == FORM_PLAIN || form == FORM_FAST;
        high &= form == FORM_HIGH;
    }
    groups[plain ? 0 : fast ? 1 : high ? 2 : 3][count - 1](task, &r, blocks);
}

ARQ_AVX512 static void conv_rows(const arq_conv *task)
{
    const uint32_t blocks = arq_pack_blocks(task->out.channels);
    for (uint32_t done = 0; done < blocks;) {
        const uint32_t left = blocks - done;
        const uint32_t count = left == 4 || left < 3 ? (left < 2 ? left : 2) : 3;
        conv_blocks(task, done, count);
        done += count;
    }
}

static size_t row_bytes_of(const arq_tensor *t)
{
    const size_t element = t->storage == ARQ_STORE_U8 ? 1 : t->storage == ARQ_STORE_I16 ? 2 : 4;
    return t->width * t->channels * element;
}

/* Every group of blocks passes over all rows, so large images are cut into parts that stay in the second-level
 * cache. */
static void conv(const arq_conv *task)
{
    const size_t in_bytes = task->stride_h * task->row_bytes, out_bytes = row_bytes_of(&task->out);
    const size_t most = CACHED_BYTES / (in_bytes + out_bytes) + 1;
    if (task->depthwise) {
        depthwise(task);
        return;
    }
    for (size_t y = 0; y < task->out.height; y += most) {
        arq_conv part = *task;
        arq_tensor residual;
        part.input += y * in_bytes;
        part.out.data += y * out_bytes;
        part.out.height = task->out.height - y < most ? (uint32_t)(task->out.height - y) : (uint32_t)most;
        if (task->after.residual != NULL) {
            residual = *task->after.residual;
            residual.data += y * row_bytes_of(&residual);
            part.after.residual = &residual;
        }
        conv_rows(&part);
    }
}

/* ---- elementwise ---------------------------------------------------------------------------------------------- */

/* One set of constants for all. */
ARQ_AVX512 static void map_same(const unsigned char *in, int32_t in_zero, unsigned char *out, int32_t out_zero,
                                size_t count, const arq_rescale *rescale)
{
    const uint32_t channel[16] = {0};
    const limits l = make_limits(out_zero, rescale->lo, rescale->hi);
    lanes k;
    set_tensor(&k, rescale, ARQ_STORE_U8, in_zero, channel);
    for (size_t i = 0; i < count; i += 64) {
        const __mmask64 some = count - i < 64 ? ((__mmask64)1 << (count - i)) - 1 : ~(__mmask64)0;
        const __m512i codes = _mm512_maskz_loadu_epi8(some, in + i);
        _mm512_mask_storeu_epi8(out + i, some, stored_codes(&l, narrow_codes(&k, codes)));
    }
}

static void map_u8(const unsigned char *in, int32_t in_zero, unsigned char *out, int32_t out_zero, size_t count,
                   const arq_rescale *rescale, uint32_t channels)
{
    if (channels == 1 && narrow_zero(out_zero)) {
        map_same(in, in_zero, out, out_zero, count, rescale);
        return;
    }
    for (size_t i = 0; i < count; i++) {
        const int32_t y = arq_rescale_value(rescale, in[i] + in_zero, (uint32_t)(i % channels));
        out[i] = (unsigned char)((uint32_t)y - (uint32_t)out_zero);
    }
}

/* ---- the table ------------------------------------------------------------------------------------------------ */

static size_t prepared_bytes(uint32_t out_channels, uint32_t kernel_h, uint32_t kernel_w, uint32_t in_per_group,
                             int is_depthwise, uint32_t sum_class, const arq_rescale *rescale)
{
    (void)sum_class;
    (void)rescale;
    return is_depthwise ? depthwise_bytes(out_channels, kernel_h, kernel_w)
                        : arq_pack_conv_bytes(out_channels, kernel_h, kernel_w, in_per_group, 1);
}

static void prepare(unsigned char *memory, uint32_t out_channels, uint32_t kernel_h, uint32_t kernel_w,
                    uint32_t in_per_group, int is_depthwise, uint32_t sum_class, uint32_t weight_bits,
                    const uint32_t *packed, const int32_t *bias, int32_t zero, const arq_rescale *rescale)
{
    const arq_pack_source from = {out_channels, kernel_h, kernel_w, in_per_group, sum_class,
                                  weight_bits,  packed,   bias,     zero,         rescale};
    if (is_depthwise) {
        pack_depthwise(memory, &from);
    } else {
        arq_pack_conv(memory, &from, 1);
    }
}

const arq_kernels *arq_kernels_avx512(void)
{
    static const arq_kernels kernels = {ARQ_ISA_AVX512, prepared_bytes, prepare, conv, map_u8};
    return &kernels;
}

#else

typedef int arq_no_avx512_kernels;

#endif
