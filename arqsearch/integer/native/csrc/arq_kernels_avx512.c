/* Kernels for AVX-512 (F, BW, VL, DQ) with VNNI. */
#include "arq_kernels.h"

#ifdef ARQ_WITH_AVX512

#include "arq_avx512_depthwise.h"
#include "arq_avx512_finish.h"
#include "arq_avx512_tiles.h"

/* ---- what follows the sums of a block ------------------------------------------------------------------------- */

/* A block of up to 16 channels of the output. */
typedef struct block {
    const arq_conv *task;
    uint32_t first, valid; /* its first channel, and how many there are */
    uint32_t width;        /* lanes: 8 or 16 */
    int narrow;            /* int16 holds everything on the way */
    lanes main, other;     /* of the sums and of the residual */
    limits limit;
    __m512i unpack, repack; /* dwords of a quad from packed order to four pixels of 16 bytes, and back */
} block;

static uint32_t block_channel(const block *b, uint32_t lane)
{
    const uint32_t c = arq_pack_channel(b->width, lane);
    return b->first + (c < b->valid ? c : 0);
}

/* Whether the residual can be added in int16 (its rescaled value too). */
static int narrow_residual(const arq_conv *task)
{
    const arq_epilogue *after = &task->after;
    const arq_rescale *r = after->residual_rescale;
    if (after->residual == NULL) {
        return 1;
    }
    return after->residual->storage == ARQ_STORE_U8 && after->rescale != NULL && fits16(after->rescale->lo) &&
           fits16(after->rescale->hi) && (r == NULL ? narrow_zero(after->residual->zero)
                                                    : fits16(r->lo) && fits16(r->hi));
}

ARQ_AVX512 static void set_block(block *b, const arq_conv *task, uint32_t index)
{
    const arq_epilogue *after = &task->after;
    const int32_t *rows = arq_pack_row(task->prepared, 16, index, 0);
    const uint32_t left = task->out.channels - 16u * index;
    b->task = task;
    b->first = 16u * index;
    b->valid = left < 16 ? left : 16;
    b->width = arq_pack_width(task->out.channels, index);
    set_prepared(&b->main, rows, 16, rows[16 * ARQ_ROW_FORM], b->width == 8 ? 0x00FF : 0xFFFF, after->rescale);
    b->narrow = task->out.storage == ARQ_STORE_U8 && narrow_zero(task->out.zero) && narrow_residual(task) &&
                after->rescale != NULL;
    if (!b->narrow) {
        return;
    }
    const arq_rescale *r = after->rescale;
    b->limit = after->residual ? make_limits(task->out.zero, after->lo, after->hi)
                               : make_limits(task->out.zero, r->lo, r->hi);
    if (after->residual) {
        uint32_t channel[16];
        for (uint32_t lane = 0; lane < 16; lane++) {
            channel[lane] = block_channel(b, lane);
        }
        set_codes(&b->other, after->residual_rescale, after->residual->zero, channel);
        b->limit.low16 = _mm512_set1_epi16((int16_t)r->lo);
        b->limit.high16 = _mm512_set1_epi16((int16_t)r->hi);
        if (after->residual_rescale) {
            b->limit.other_low16 = _mm512_set1_epi16((int16_t)after->residual_rescale->lo);
            b->limit.other_high16 = _mm512_set1_epi16((int16_t)after->residual_rescale->hi);
        }
    }
    /* Packed dword 4 * group + pixel is natural dword 4 * pixel + place of the group. */
    const __m512i across = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    const __m512i swapped = _mm512_setr_epi32(0, 8, 4, 12, 1, 9, 5, 13, 2, 10, 6, 14, 3, 11, 7, 15);
    const __m512i back = _mm512_setr_epi32(0, 4, 8, 12, 2, 6, 10, 14, 1, 5, 9, 13, 3, 7, 11, 15);
    b->unpack = b->width == 8 ? across : swapped;
    b->repack = b->width == 8 ? across : back;
}

/* Up to four pixels of `valid` bytes, `stride` bytes apart. */
ARQ_AVX512_INLINE __m512i load_pixels(const unsigned char *at, size_t stride, uint32_t valid, uint32_t pixels)
{
    if (valid == 16 && pixels == 4) {
        if (stride == 16) {
            return _mm512_loadu_si512(at);
        }
        const __m256i low = _mm256_inserti128_si256(
            _mm256_castsi128_si256(_mm_loadu_si128((const __m128i *)(const void *)at)),
            _mm_loadu_si128((const __m128i *)(const void *)(at + stride)), 1);
        const __m256i high = _mm256_inserti128_si256(
            _mm256_castsi128_si256(_mm_loadu_si128((const __m128i *)(const void *)(at + 2 * stride))),
            _mm_loadu_si128((const __m128i *)(const void *)(at + 3 * stride)), 1);
        return _mm512_inserti64x4(_mm512_castsi256_si512(low), high, 1);
    }
    unsigned char bytes[64] = {0};
    for (uint32_t p = 0; p < pixels; p++) {
        memcpy(bytes + 16 * p, at + p * stride, valid);
    }
    return _mm512_loadu_si512(bytes);
}

ARQ_AVX512_INLINE void store_pixels(unsigned char *at, size_t stride, uint32_t valid, uint32_t pixels, __m512i v)
{
    if (valid == 16 && pixels == 4) {
        if (stride == 16) {
            _mm512_storeu_si512(at, v);
            return;
        }
        _mm_storeu_si128((__m128i *)(void *)at, _mm512_castsi512_si128(v));
        _mm_storeu_si128((__m128i *)(void *)(at + stride), _mm512_extracti32x4_epi32(v, 1));
        _mm_storeu_si128((__m128i *)(void *)(at + 2 * stride), _mm512_extracti32x4_epi32(v, 2));
        _mm_storeu_si128((__m128i *)(void *)(at + 3 * stride), _mm512_extracti32x4_epi32(v, 3));
        return;
    }
    unsigned char bytes[64];
    _mm512_storeu_si512(bytes, v);
    for (uint32_t p = 0; p < pixels; p++) {
        memcpy(at + p * stride, bytes + 16 * p, valid);
    }
}

/* U8 output of a block: pixels of sums at `v`, four at a time; `pixel` is the first one's place in the output. `whole`:
 * the number of pixels is a multiple of 4, and all 16 channels are there. Constants are copied so that they can stay in
 * registers, which stores of bytes would else invalidate. */
ARQ_AVX512_INLINE void finish_codes(const block *b, const int form, const int whole, const int has_residual,
                                    const __m512i *v, uint32_t pixels, size_t pixel)
{
    const lanes main = b->main;
    const limits limit = b->limit;
    const __m512i unpack = b->unpack;
    const size_t stride = b->task->out.channels;
    const uint32_t valid = whole ? 16 : b->valid;
    size_t at = pixel * stride + b->first;
    unsigned char *out = b->task->out.data;
    for (uint32_t p = 0; p < pixels; p += 4, at += 4 * stride) {
        const uint32_t count = whole || pixels - p >= 4 ? 4 : pixels - p;
        halves y = narrow_sums(&main, 0, form, v + p);
        if (has_residual) {
            const __m512i codes = load_pixels(b->task->after.residual->data + at, stride, valid, count);
            halves r = narrow_codes(&b->other, _mm512_permutexvar_epi32(b->repack, codes));
            y = clip16(y, limit.low16, limit.high16);
            r = clip16(r, limit.other_low16, limit.other_high16);
            y.first = _mm512_adds_epi16(y.first, r.first);
            y.second = _mm512_adds_epi16(y.second, r.second);
        }
        const __m512i codes = _mm512_permutexvar_epi32(unpack, stored_codes(&limit, y));
        store_pixels(out + at, stride, valid, count, codes);
    }
}

ARQ_AVX512_INLINE void finish_block(const block *b, const int form, const __m512i *v, uint32_t pixels, size_t pixel)
{
    if (b->task->after.residual) {
        finish_codes(b, form, 0, 1, v, pixels, pixel);
    } else if (pixels % 4 == 0 && b->valid == 16) {
        finish_codes(b, form, 1, 0, v, pixels, pixel);
    } else {
        finish_codes(b, form, 0, 0, v, pixels, pixel);
    }
}

/* Any other output or residual, one by one. */
ARQ_AVX512 static void finish_any(const block *b, const __m512i *v, uint32_t pixels, size_t pixel)
{
    const arq_conv *task = b->task;
    const int32_t *bias = arq_pack_row(task->prepared, 16, b->first / 16u, ARQ_ROW_BIAS);
    arq_tensor out = task->out;
    for (uint32_t p = 0; p < pixels; p++) {
        const size_t at = (pixel + p) * task->out.channels;
        int32_t own[16];
        _mm512_storeu_si512(own, v[p]);
        for (uint32_t lane = 0; lane < b->width; lane++) {
            const uint32_t c = b->first + arq_pack_channel(b->width, lane);
            if (c < b->first + b->valid) {
                arq_store(&out, at + c, arq_finish_one(&task->after, arq_wrap_add(own[lane], bias[lane]), c, at + c));
            }
        }
    }
}

/* ---- convolution ---------------------------------------------------------------------------------------------- */

enum { FORM_MIXED = 5 }; /* blocks that finish_any completes */

/* The tile of `pixels` pixels from `pixel` on is summed: complete it. */
ARQ_AVX512_INLINE void finish_tile(const block *blocks, const int count, const int form, const __m512i *sums,
                                   uint32_t pixels, size_t pixel)
{
    for (int b = 0; b < count; b++, sums += TILE_PIXELS) {
        if (form == FORM_MIXED) {
            finish_any(&blocks[b], sums, pixels, pixel);
            continue;
        }
        finish_block(&blocks[b], form, sums, pixels, pixel);
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

ARQ_AVX512 static void conv(const arq_conv *task)
{
    if (task->depthwise) {
        depthwise(task);
        return;
    }
    const uint32_t blocks = arq_pack_blocks(task->out.channels);
    for (uint32_t done = 0; done < blocks;) {
        const uint32_t left = blocks - done;
        const uint32_t count = left == 4 || left < 3 ? (left < 2 ? left : 2) : 3;
        conv_blocks(task, done, count);
        done += count;
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
    set_codes(&k, rescale, in_zero, channel);
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
