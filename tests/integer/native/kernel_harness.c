/* Compares one set of kernels with a naive reference on random tasks: kernel_harness NAME COUNT SEED.
 *
 * Exit status 0: all equal; 1: a difference (printed); 77: this processor or build lacks the instruction set.
 * Weights reach the limits of each sum class and codes the largest value, so that a saturating or wrapping sum shows.
 * Buffers are exactly as long as the contract says, between guard bytes: under AddressSanitizer no access may leave
 * them. The reference computes in int64 from codes and shares nothing with the kernels.
 */
#include <stdio.h>

#include "kernel_random.h"

#define GUARD 64

/* ---- one task ------------------------------------------------------------------------------------------------- */

typedef struct shape {
    uint32_t out_channels, channels, kernel_h, kernel_w, stride_h, stride_w, out_h, out_w, width;
    int depthwise;
    uint32_t sum_class, depth, bits;
    int32_t umax, zero;
} shape;

static shape draw_shape(void)
{
    static const uint32_t channels[] = {1, 2, 3, 4, 5, 8, 10, 12, 16, 20, 24, 30, 32, 40, 48, 64, 96, 144};
    static const uint32_t depths[] = {1, 1, 2, 3, 5, 9, 30, 1000};
    static const int32_t most[] = {1, 3, 15, 63, 127, 255, 255};
    shape s;
    s.depthwise = draw(3) == 0;
    s.out_channels = channels[draw(18)];
    s.channels = s.depthwise ? s.out_channels : channels[draw(18)];
    s.kernel_h = draw(s.depthwise ? 4 : 8) == 0 ? 5 + draw(3) : 1 + draw(3);
    s.kernel_w = draw(3) != 0 ? s.kernel_h : 1 + draw(4);
    s.stride_h = draw(3) != 0 ? 1 : draw(4) != 0 ? 2 : 3;
    s.stride_w = draw(10) == 0 ? 1 + draw(3) : s.stride_h;
    s.out_h = draw(4) == 0 ? 1 : 1 + draw(12);
    s.out_w = draw(4) == 0 ? 1 : 1 + draw(20);
    if (!s.depthwise && draw(12) == 0) { /* a linear layer, at times too long for any buffer */
        s.kernel_h = s.kernel_w = s.out_h = s.out_w = 1;
        s.channels = draw(2) == 0 ? 1000 + draw(1000) : 17000 + draw(4000);
    }
    s.width = (s.out_w - 1) * s.stride_w + s.kernel_w + draw(3);
    s.sum_class = ARQ_SUM_U8 + draw(3);
    s.depth = s.sum_class == ARQ_SUM_PAIRS ? depths[draw(8)] : 1;
    s.umax = most[draw(7)];
    s.bits = draw(2) == 0 ? 8 : 2 + draw(7);
    s.zero = draw(2) == 0 ? 0 : between(-255, 3);
    return s;
}

/* Everything of one task, and the same numbers as the reference reads them. */
typedef struct job {
    shape s;
    size_t pixel_bytes, row_bytes, image_bytes, taps, pixels;
    unsigned char *image;
    int32_t *weights; /* [out][tap][channel of the group] */
    int32_t *bias;
    int64_t *lo, *hi; /* of the accumulators of each channel */
    uint32_t *packed;
    arq_tensor out, residual;
    unsigned char *out_memory;
    owned_rescale rescale, residual_rescale;
    int has_rescale, has_residual, has_residual_rescale;
    int32_t sum_lo, sum_hi;
} job;

static size_t group_channels(const shape *s)
{
    return s->depthwise ? 1 : s->channels;
}

static void make_weights(job *j)
{
    const shape *s = &j->s;
    const size_t in = group_channels(s), padded = s->depthwise ? 1 : (in + 3) / 4 * 4;
    const size_t terms = j->taps * padded, even = terms + (terms & 1), count = j->taps * in;
    const size_t lanes = s->depthwise ? 1 : 2;
    const int32_t most = 1 << (s->bits - 1);
    int32_t *row = allocate(even * sizeof *row);
    unsigned char *real = allocate(even);
    j->weights = allocate(s->out_channels * count * sizeof *j->weights);
    j->bias = allocate(s->out_channels * sizeof *j->bias);
    j->lo = allocate(s->out_channels * sizeof *j->lo);
    j->hi = allocate(s->out_channels * sizeof *j->hi);
    for (size_t i = 0; i < even; ++i) {
        real[i] = i < terms && i % padded < in;
    }
    for (uint32_t o = 0; o < s->out_channels; ++o) {
        fill_weights(row, real, even / (2 * lanes), lanes, s->sum_class, s->depth, s->umax, most);
        j->bias[o] = between(-3000, 3000);
        j->lo[o] = j->hi[o] = j->bias[o];
        for (size_t i = 0; i < count; ++i) {
            const int32_t w = row[i / in * padded + i % in];
            j->weights[o * count + i] = w;
            j->lo[o] += (int64_t)w * ((w > 0 ? 0 : s->umax) + s->zero);
            j->hi[o] += (int64_t)w * ((w > 0 ? s->umax : 0) + s->zero);
        }
    }
    const size_t words = (s->out_channels * count * s->bits + 31) / 32;
    j->packed = allocate(4 * words);
    memset(j->packed, 0, 4 * words);
    for (size_t i = 0; i < s->out_channels * count * s->bits; ++i) {
        const uint32_t bit = ((uint32_t)j->weights[i / s->bits] >> (i % s->bits)) & 1u;
        j->packed[i / 32] |= bit << (i % 32);
    }
    free(row);
    free(real);
}

/* Codes: random, all at the limit, or at the limit where one channel's weights have one sign. */
static void make_image(job *j)
{
    const shape *s = &j->s;
    const uint32_t mode = draw(4), favourite = draw(s->out_channels);
    const int32_t sign = draw(2) == 0 ? 1 : -1;
    const size_t in = group_channels(s);
    j->pixel_bytes = (s->channels + 3) / 4 * 4;
    j->row_bytes = j->pixel_bytes * s->width;
    j->image_bytes = ((s->out_h - 1) * s->stride_h + s->kernel_h - 1) * j->row_bytes +
                     ((s->out_w - 1) * s->stride_w + s->kernel_w) * j->pixel_bytes;
    j->image = allocate(j->image_bytes);
    for (size_t i = 0; i < j->image_bytes; ++i) {
        const int odd = draw(2) == 0;
        j->image[i] = (unsigned char)(mode == 0   ? draw((uint32_t)s->umax + 1)
                                      : mode == 1 ? (uint32_t)s->umax
                                                  : (odd ? (uint32_t)s->umax : draw((uint32_t)s->umax + 1)));
    }
    if (mode == 3) { /* the first window */
        for (size_t tap = 0; tap < j->taps; ++tap) {
            for (size_t c = 0; c < in; ++c) {
                const size_t channel = s->depthwise ? favourite : c;
                const int32_t w = j->weights[(favourite * j->taps + tap) * in + c];
                j->image[tap / s->kernel_w * j->row_bytes + tap % s->kernel_w * j->pixel_bytes + channel] =
                    (unsigned char)(w * sign > 0 ? s->umax : 0);
            }
        }
    }
}

static size_t storage_bytes(uint32_t storage)
{
    return storage == ARQ_STORE_U8 ? 1 : storage == ARQ_STORE_I16 ? 2 : 4;
}

/* What may come out; the range of results that a storage holds. */
static void draw_range(uint32_t storage, int32_t *zero, int32_t *lo, int32_t *hi)
{
    *zero = storage == ARQ_STORE_U8 && draw(2) == 0 ? between(-200, 100) : 0;
    if (storage == ARQ_STORE_U8) {
        const int32_t width = draw(2) == 0 ? 15 : between(0, 255);
        *lo = *zero + (draw(2) == 0 ? 0 : between(0, 255 - width));
        *hi = *lo + width;
    } else if (storage == ARQ_STORE_I16) {
        *lo = draw(2) == 0 ? -32767 : between(-32768, 10);
        *hi = draw(2) == 0 ? 32767 : between(10, 32767);
    } else {
        *lo = draw(2) == 0 ? INT32_MIN / 2 : between(-100000, 0);
        *hi = draw(2) == 0 ? INT32_MAX / 2 : between(0, 100000);
    }
}

static void make_epilogue(job *j)
{
    const shape *s = &j->s;
    const size_t count = j->pixels * s->out_channels;
    int32_t lo, hi, unused;
    j->has_rescale = draw(6) != 0;
    j->has_residual = draw(2) == 0;
    memset(&j->out, 0, sizeof j->out);
    j->out.storage = !j->has_rescale && !j->has_residual ? ARQ_STORE_I32 : draw(5) < 3 ? ARQ_STORE_U8 : 1 + draw(2);
    j->out.height = s->out_h;
    j->out.width = s->out_w;
    j->out.channels = s->out_channels;
    draw_range(j->out.storage, &j->out.zero, &lo, &hi);
    j->sum_lo = lo;
    j->sum_hi = hi;
    if (j->has_residual) {
        j->residual = j->out;
        j->residual.storage = draw(2) == 0 ? ARQ_STORE_U8 : draw(3);
        draw_range(j->residual.storage, &j->residual.zero, &unused, &unused);
        j->residual.data = allocate(count * storage_bytes(j->residual.storage));
        for (size_t i = 0; i < count * storage_bytes(j->residual.storage); ++i) {
            j->residual.data[i] = (unsigned char)draw(256);
        }
        j->has_residual_rescale = draw(3) != 0;
        if (j->has_residual_rescale) {
            const int64_t first = j->residual.storage == ARQ_STORE_U8    ? j->residual.zero
                                  : j->residual.storage == ARQ_STORE_I16 ? INT16_MIN
                                                                         : INT32_MIN;
            const int64_t last = j->residual.storage == ARQ_STORE_U8    ? j->residual.zero + 255
                                 : j->residual.storage == ARQ_STORE_I16 ? INT16_MAX
                                                                        : INT32_MAX;
            const uint32_t channels = draw(2) == 0 ? 1 : s->out_channels;
            int64_t *firsts = allocate(channels * sizeof *firsts), *lasts = allocate(channels * sizeof *lasts);
            for (uint32_t c = 0; c < channels; ++c) {
                firsts[c] = first;
                lasts[c] = last;
            }
            const int32_t size = draw(2) == 0 ? 32767 : between(1, 300);
            make_rescale(&j->residual_rescale, channels, firsts, lasts, channels, -size, size);
            free(firsts);
            free(lasts);
        }
        if (draw(2) == 0) {
            lo = -32767; /* what a residual's operand is rescaled to; at times the bounds themselves differ */
            hi = 32767;
        }
    }
    if (j->has_rescale) {
        make_rescale(&j->rescale, draw(3) == 0 ? 1 : s->out_channels, j->lo, j->hi, s->out_channels, lo, hi);
    }
    j->out_memory = allocate(count * storage_bytes(j->out.storage) + 2 * GUARD);
    memset(j->out_memory, 0xA5, count * storage_bytes(j->out.storage) + 2 * GUARD);
    j->out.data = j->out_memory + GUARD;
}

static int64_t expected(const job *j, uint32_t y, uint32_t x, uint32_t o)
{
    const shape *s = &j->s;
    const size_t in = group_channels(s), element = ((size_t)y * s->out_w + x) * s->out_channels + o;
    int64_t sum = j->bias[o];
    for (size_t tap = 0; tap < j->taps; ++tap) {
        const size_t row = y * s->stride_h + tap / s->kernel_w, column = x * s->stride_w + tap % s->kernel_w;
        const unsigned char *pixel = j->image + row * j->row_bytes + column * j->pixel_bytes;
        for (size_t c = 0; c < in; ++c) {
            const int64_t code = pixel[s->depthwise ? o : c];
            sum += j->weights[((size_t)o * j->taps + tap) * in + c] * (code + s->zero);
        }
    }
    if (j->has_rescale) {
        sum = rescaled(&j->rescale.r, sum, o);
    }
    if (j->has_residual) {
        int64_t r = value_of(&j->residual, element);
        r = j->has_residual_rescale ? rescaled(&j->residual_rescale.r, r, o) : r;
        sum = clip(sum + r, j->sum_lo, j->sum_hi);
    }
    return sum;
}

static int compare(const job *j, uint32_t number)
{
    const shape *s = &j->s;
    const size_t bytes = j->pixels * s->out_channels * storage_bytes(j->out.storage);
    for (size_t i = 0; i < GUARD; ++i) {
        if (j->out_memory[i] != 0xA5 || j->out_memory[GUARD + bytes + i] != 0xA5) {
            printf("task %u: written outside the output\n", number);
            return 1;
        }
    }
    for (uint32_t y = 0; y < s->out_h; ++y) {
        for (uint32_t x = 0; x < s->out_w; ++x) {
            for (uint32_t o = 0; o < s->out_channels; ++o) {
                const int64_t want = expected(j, y, x, o);
                const int64_t got = value_of(&j->out, ((size_t)y * s->out_w + x) * s->out_channels + o);
                if (got != want) {
                    printf("task %u: %s %ux%u stride %ux%u, %u -> %u channels, class %u depth %u, %u-bit weights, "
                           "codes to %d: output (%u, %u, %u) of %ux%u is %lld, not %lld (rescale %d fast %d rounding "
                           "%d, residual %d storage %u rescale %d, out %u)\n",
                           number, s->depthwise ? "depthwise" : "conv", s->kernel_h, s->kernel_w, s->stride_h,
                           s->stride_w, s->channels, s->out_channels, s->sum_class, s->depth, s->bits, s->umax, y, x,
                           o, s->out_h, s->out_w, (long long)got, (long long)want, j->has_rescale,
                           j->has_rescale ? j->rescale.r.fast : 0, j->has_rescale ? (int)j->rescale.r.rounding : 0,
                           j->has_residual, j->has_residual ? j->residual.storage : 0, j->has_residual_rescale,
                           j->out.storage);
                    return 1;
                }
            }
        }
    }
    return 0;
}

static int run_task(const arq_kernels *kernels, uint32_t number)
{
    job j;
    arq_conv task;
    memset(&j, 0, sizeof j);
    j.s = draw_shape();
    j.taps = (size_t)j.s.kernel_h * j.s.kernel_w;
    j.pixels = (size_t)j.s.out_h * j.s.out_w;
    make_weights(&j);
    make_image(&j);
    make_epilogue(&j);
    const shape *s = &j.s;
    const arq_rescale *rescale = j.has_rescale ? &j.rescale.r : NULL;
    const uint32_t in = (uint32_t)group_channels(s);
    const size_t bytes = kernels->prepared_bytes(s->out_channels, s->kernel_h, s->kernel_w, in, s->depthwise,
                                                 s->sum_class, rescale);
    unsigned char *prepared = allocate(bytes);
    int wrong = bytes % 64 != 0;
    memset(prepared, 0x5A, bytes);
    kernels->prepare(prepared, s->out_channels, s->kernel_h, s->kernel_w, in, s->depthwise, s->sum_class, s->bits,
                     j.packed, j.bias, s->zero, rescale);
    memset(&task, 0, sizeof task);
    task.input = j.image;
    task.row_bytes = j.row_bytes;
    task.pixel_bytes = j.pixel_bytes;
    task.kernel_h = s->kernel_h;
    task.kernel_w = s->kernel_w;
    task.stride_h = s->stride_h;
    task.stride_w = s->stride_w;
    task.channels = s->channels;
    task.depthwise = s->depthwise;
    task.sum_class = s->sum_class;
    task.depth = s->depth;
    task.prepared = prepared;
    task.after.rescale = rescale;
    task.after.residual = j.has_residual ? &j.residual : NULL;
    task.after.residual_rescale = j.has_residual_rescale ? &j.residual_rescale.r : NULL;
    task.after.lo = j.sum_lo;
    task.after.hi = j.sum_hi;
    task.out = j.out;
    kernels->conv(&task);
    wrong |= compare(&j, number);
    free_rescale(&j.rescale);
    free_rescale(&j.residual_rescale);
    free(j.residual.data);
    free(j.out_memory);
    free(j.image);
    free(j.packed);
    free(j.hi);
    free(j.lo);
    free(j.bias);
    free(j.weights);
    free(prepared);
    return wrong;
}

/* ---- map of codes --------------------------------------------------------------------------------------------- */

static int run_map(const arq_kernels *kernels, uint32_t number)
{
    const uint32_t channels = draw(2) == 0 ? 1 : 1 + draw(40);
    const size_t count = draw(3) == 0 ? draw(3000) : draw(200);
    unsigned char *in = allocate(count), *out = allocate(count + 2 * GUARD);
    int64_t *lo = allocate(channels * sizeof *lo), *hi = allocate(channels * sizeof *hi);
    const int32_t zero = between(-255, 10);
    int32_t out_zero, first, last;
    owned_rescale own;
    int wrong = 0;
    for (size_t i = 0; i < count; ++i) {
        in[i] = (unsigned char)draw(256);
    }
    for (uint32_t c = 0; c < channels; ++c) {
        lo[c] = zero;
        hi[c] = zero + 255;
    }
    draw_range(ARQ_STORE_U8, &out_zero, &first, &last);
    make_rescale(&own, channels, lo, hi, channels, first, last);
    memset(out, 0xA5, count + 2 * GUARD);
    kernels->map_u8(in, zero, out + GUARD, out_zero, count, &own.r, channels);
    for (size_t i = 0; i < count + 2 * GUARD && !wrong; ++i) {
        const int inside = i >= GUARD && i < count + GUARD;
        const int64_t want =
            inside ? rescaled(&own.r, in[i - GUARD] + zero, (uint32_t)((i - GUARD) % channels)) - out_zero : 0xA5;
        if (out[i] != want) {
            printf("map %u: element %lld of %zu, %u channels: %d, not %lld\n", number, (long long)i - GUARD, count,
                   channels, out[i], (long long)want);
            wrong = 1;
        }
    }
    free_rescale(&own);
    free(lo);
    free(hi);
    free(in);
    free(out);
    return wrong;
}

/* ---- which kernels -------------------------------------------------------------------------------------------- */

static const arq_kernels *find(const char *name)
{
#ifdef ARQ_WITH_AVX2
    if (strcmp(name, "avx2") == 0 && arq_isa_supported(ARQ_ISA_AVX2)) {
        return arq_kernels_avx2();
    }
#endif
#ifdef ARQ_WITH_AVX512
    if (strcmp(name, "avx512") == 0 && arq_isa_supported(ARQ_ISA_AVX512)) {
        return arq_kernels_avx512();
    }
#endif
#ifdef ARQ_WITH_NEON
    if (strcmp(name, "neon") == 0 && arq_isa_supported(ARQ_ISA_NEON)) {
        return arq_kernels_neon();
    }
#endif
    (void)name;
    return NULL;
}

int main(int argc, char **argv)
{
    const arq_kernels *kernels = argc == 4 ? find(argv[1]) : NULL;
    if (kernels == NULL) {
        printf("no such kernels here\n");
        return 77;
    }
    const uint32_t count = (uint32_t)strtoul(argv[2], NULL, 10);
    const uint64_t seed = strtoull(argv[3], NULL, 10);
    for (uint32_t i = 0; i < count; ++i) {
        state = (seed << 32) + i + 1; /* each task by itself, to be found again */
        state *= 0x9E3779B97F4A7C15u;
        draw(2);
        if (run_task(kernels, i) || run_map(kernels, i)) {
            return 1;
        }
    }
    printf("%u tasks equal\n", count);
    return 0;
}
