/* A block of up to 16 output channels in AVX-512: what follows its sums. Internal to the AVX-512 kernels. */
#ifndef ARQ_AVX512_BLOCK_H
#define ARQ_AVX512_BLOCK_H

#include "arq_avx512_finish.h"

/* A block of up to 16 channels of the output. */
typedef struct block {
    const arq_conv *task;
    uint32_t first, valid; /* its first channel, and how many there are */
    uint32_t width;        /* lanes: 8 or 16 */
    int narrow;            /* U8 output, and int16 holds everything on the way */
    int wide;              /* int32 does */
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
           fits16(after->rescale->hi) &&
           (r == NULL ? narrow_zero(after->residual->zero) : fits16(r->lo) && fits16(r->hi));
}

/* Whether int32 holds the sum of y and the residual. */
static int wide_residual(const arq_conv *task)
{
    const int32_t most = (int32_t)1 << 29;
    const arq_rescale *r = task->after.rescale, *other = task->after.residual_rescale;
    if (task->after.residual == NULL) {
        return 1;
    }
    return r != NULL && r->lo >= -most && r->hi <= most &&
           (other == NULL ? task->after.residual->storage != ARQ_STORE_I32 : other->lo >= -most && other->hi <= most);
}

ARQ_AVX512 static void set_block(block *b, const arq_conv *task, uint32_t index)
{
    const arq_epilogue *after = &task->after;
    const arq_rescale *r = after->rescale, *other = after->residual_rescale;
    const int32_t *rows = arq_pack_row(task->prepared, 16, index, 0);
    const uint32_t left = task->out.channels - 16u * index;
    b->task = task;
    b->first = 16u * index;
    b->valid = left < 16 ? left : 16;
    b->width = arq_pack_width(task->out.channels, index);
    b->wide = wide_residual(task);
    set_prepared(&b->main, rows, 16, rows[16 * ARQ_ROW_FORM], b->width == 8 ? 0x00FF : 0xFFFF, r);
    if (after->residual) {
        uint32_t channel[16];
        for (uint32_t lane = 0; lane < 16; lane++) {
            channel[lane] = block_channel(b, lane);
        }
        set_tensor(&b->other, other, after->residual->storage, after->residual->zero, channel);
    }
    b->narrow = task->out.storage == ARQ_STORE_U8 && narrow_zero(task->out.zero) && r != NULL && narrow_residual(task);
    if (!b->narrow) {
        return;
    }
    b->limit = make_limits(task->out.zero, after->residual ? after->lo : r->lo, after->residual ? after->hi : r->hi);
    if (after->residual) {
        b->limit.low16 = _mm512_set1_epi16((int16_t)r->lo);
        b->limit.high16 = _mm512_set1_epi16((int16_t)r->hi);
        if (other) {
            b->limit.other_low16 = _mm512_set1_epi16((int16_t)other->lo);
            b->limit.other_high16 = _mm512_set1_epi16((int16_t)other->hi);
        }
    }
    /* Packed dword 4 * group + pixel is natural dword 4 * pixel + place of the group. */
    const __m512i across = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    const __m512i swapped = _mm512_setr_epi32(0, 8, 4, 12, 1, 9, 5, 13, 2, 10, 6, 14, 3, 11, 7, 15);
    const __m512i back = _mm512_setr_epi32(0, 4, 8, 12, 2, 6, 10, 14, 1, 5, 9, 13, 3, 7, 11, 15);
    b->unpack = b->width == 8 ? across : swapped;
    b->repack = b->width == 8 ? across : back;
}

/* Byte p * 16 + c is channel c of pixel p: `count` (up to 4) pixels of `valid` channels, `stride` bytes apart. */
ARQ_AVX512_INLINE __m512i load_pixels(const unsigned char *at, size_t stride, uint32_t valid, uint32_t count)
{
    if (valid == 16 && count == 4 && stride == 16) {
        return _mm512_loadu_si512(at);
    }
    const __mmask16 channels = (__mmask16)(0xFFFFu >> (16 - valid));
    __m128i pixel[4];
    ARQ_UNROLL
    for (uint32_t p = 0; p < 4; p++) {
        pixel[p] = _mm_maskz_loadu_epi8(p < count ? channels : 0, p < count ? at + p * stride : at);
    }
    const __m256i low = _mm256_inserti128_si256(_mm256_castsi128_si256(pixel[0]), pixel[1], 1);
    const __m256i high = _mm256_inserti128_si256(_mm256_castsi128_si256(pixel[2]), pixel[3], 1);
    return _mm512_inserti64x4(_mm512_castsi256_si512(low), high, 1);
}

ARQ_AVX512_INLINE void store_pixel(unsigned char *at, uint32_t valid, __m128i v)
{
    if (valid == 16) {
        _mm_storeu_si128((__m128i *)(void *)at, v);
    } else if (valid == 8) {
        _mm_storel_epi64((__m128i *)(void *)at, v);
    } else {
        _mm_mask_storeu_epi8(at, (__mmask16)(0xFFFFu >> (16 - valid)), v);
    }
}

ARQ_AVX512_INLINE void store_pixels(unsigned char *at, size_t stride, uint32_t valid, uint32_t count, __m512i v)
{
    if (valid == 16 && count == 4 && stride == 16) {
        _mm512_storeu_si512(at, v);
        return;
    }
    store_pixel(at, valid, _mm512_castsi512_si128(v));
    if (count > 1) {
        store_pixel(at + stride, valid, _mm512_extracti32x4_epi32(v, 1));
    }
    if (count > 2) {
        store_pixel(at + 2 * stride, valid, _mm512_extracti32x4_epi32(v, 2));
    }
    if (count > 3) {
        store_pixel(at + 3 * stride, valid, _mm512_extracti32x4_epi32(v, 3));
    }
}

/* U8 output of a block: pixels of sums at `v`, four at a time; `pixel` is the first one's place in the output. `valid`
 * channels of the block are there; `whole`: the number of pixels is a multiple of 4. Constants are copied so that they
 * can stay in registers, which stores of bytes would else invalidate. */
ARQ_AVX512_INLINE void finish_codes(const block *b, const int form, const uint32_t valid, const int whole,
                                    const int has_residual, const __m512i *v, uint32_t pixels, size_t pixel)
{
    const lanes main = b->main;
    const limits limit = b->limit;
    const __m512i unpack = b->unpack;
    const size_t stride = b->task->out.channels;
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
    const int whole = pixels % 4 == 0;
    if (b->task->after.residual) {
        if (whole && b->valid == 16) {
            finish_codes(b, form, 16, 1, 1, v, pixels, pixel);
        } else {
            finish_codes(b, form, b->valid, 0, 1, v, pixels, pixel);
        }
    } else if (whole && b->valid == 16) {
        finish_codes(b, form, 16, 1, 0, v, pixels, pixel);
    } else if (whole && b->valid == 8) {
        finish_codes(b, form, 8, 1, 0, v, pixels, pixel);
    } else {
        finish_codes(b, form, b->valid, 0, 0, v, pixels, pixel);
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

/* Dwords 4 .. 7 and 8 .. 11 change places: from the lanes of 16 channels to their order, and back. */
ARQ_AVX512_INLINE __m512i swap_middle(const block *b, __m512i v)
{
    return b->width == 8 ? v : _mm512_shuffle_i32x4(v, v, 0xD8);
}

ARQ_AVX512_INLINE __m512i load_elements(const arq_tensor *t, size_t at, __mmask16 some)
{
    if (t->storage == ARQ_STORE_U8) {
        return _mm512_cvtepu8_epi32(_mm_maskz_loadu_epi8(some, t->data + at));
    }
    if (t->storage == ARQ_STORE_I16) {
        return _mm512_cvtepi16_epi32(_mm256_maskz_loadu_epi16(some, t->data + 2 * at));
    }
    return _mm512_maskz_loadu_epi32(some, t->data + 4 * at);
}

ARQ_AVX512_INLINE void store_elements(const arq_tensor *t, size_t at, __mmask16 some, __m512i v)
{
    if (t->storage == ARQ_STORE_U8) {
        v = _mm512_sub_epi32(v, _mm512_set1_epi32(t->zero));
        _mm_mask_storeu_epi8(t->data + at, some, _mm512_cvtepi32_epi8(v));
    } else if (t->storage == ARQ_STORE_I16) {
        _mm256_mask_storeu_epi16(t->data + 2 * at, some, _mm512_cvtepi32_epi16(v));
    } else {
        _mm512_mask_storeu_epi32(t->data + 4 * at, some, v);
    }
}

ARQ_AVX512_INLINE __m512i clip32(__m512i v, int32_t lo, int32_t hi)
{
    return _mm512_min_epi32(_mm512_max_epi32(v, _mm512_set1_epi32(lo)), _mm512_set1_epi32(hi));
}

/* Any output or residual. */
ARQ_AVX512 static void finish_wide(const block *b, const __m512i *v, uint32_t pixels, size_t pixel)
{
    const arq_epilogue *after = &b->task->after;
    const arq_rescale *r = after->rescale, *other = after->residual_rescale;
    const __mmask16 some = (__mmask16)(0xFFFFu >> (16 - b->valid));
    if (!b->wide) {
        finish_any(b, v, pixels, pixel);
        return;
    }
    for (uint32_t p = 0; p < pixels; p++) {
        const size_t at = (pixel + p) * b->task->out.channels + b->first;
        __m512i y = apply_any(&b->main, v[p]);
        if (r) {
            y = clip32(y, r->lo, r->hi);
        }
        if (after->residual) {
            __m512i x = apply_any(&b->other, swap_middle(b, load_elements(after->residual, at, some)));
            if (other) {
                x = clip32(x, other->lo, other->hi);
            }
            y = clip32(_mm512_add_epi32(y, x), after->lo, after->hi);
        }
        store_elements(&b->task->out, at, some, swap_middle(b, y));
    }
}

#endif
