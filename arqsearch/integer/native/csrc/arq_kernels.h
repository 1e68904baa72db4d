/* What arq_model.c asks of a set of kernels; one table for each instruction set. Internal. */
#ifndef ARQ_KERNELS_H
#define ARQ_KERNELS_H

#include "arq.h"
#include "arq_blob.h"

/* Which kernels this build holds, decided here alone. The files of the others compile to nothing. */
#if !defined(ARQ_PORTABLE_ONLY) && defined(__GNUC__)
#if defined(__x86_64__)
#define ARQ_WITH_AVX2 1
#define ARQ_WITH_AVX512 1
#elif defined(__aarch64__) && defined(__ARM_NEON)
#define ARQ_WITH_NEON 1
#endif
#endif

/* clip(round(x * M / 2^k), lo, hi); see "rescale" in arq_blob.h. Per-channel arrays have `channels` (1 or C) entries. */
typedef struct arq_rescale {
    uint32_t channels;
    uint32_t rounding;
    int32_t lo, hi;
    const int32_t *multiplier;
    const int32_t *shift;
    int fast;
    const int32_t *fast_lo, *fast_hi, *fast_multiplier, *fast_offset, *fast_shift;
} arq_rescale;

/* A tensor in memory: value = stored + zero. */
typedef struct arq_tensor {
    uint32_t storage;
    int32_t zero;
    uint32_t height, width, channels;
    unsigned char *data;
} arq_tensor;

/* After the sum: rescale, add the residual, clip, store. `rescale` / `residual` / `residual_rescale` may be null.
 * The output may lie in the residual's place: an element of the residual is read before, and never after, the output's
 * element is written, so no output is computed twice. */
typedef struct arq_epilogue {
    const arq_rescale *rescale;
    const arq_tensor *residual;
    const arq_rescale *residual_rescale;
    int32_t lo, hi; /* clip of the sum, only with a residual */
} arq_epilogue;

/* A convolution over stored codes in a padded image: rows of `row_bytes`, pixels of `pixel_bytes` (channels padded to
 * a multiple of 4), window (0,0) of output (0,0) at `input`. Sums are those of the prepared weights and bias.
 * Nothing may be read past the last pixel of the last window: the image may be a tensor in place, at the arena's end. */
typedef struct arq_conv {
    const unsigned char *input;
    size_t row_bytes, pixel_bytes;
    uint32_t kernel_h, kernel_w, stride_h, stride_w;
    uint32_t channels;          /* of the input, without the padding to 4 */
    int depthwise;              /* groups = channels in = channels out > 1; otherwise there is one group */
    uint32_t sum_class, depth;  /* ARQ_SUM_*: at least ARQ_SUM_U8; depth is at least 1 */
    const unsigned char *prepared; /* this layer's part of the prepared memory */
    arq_epilogue after;
    arq_tensor out;
} arq_conv;

typedef struct arq_kernels {
    arq_isa isa;
    /* Bytes (multiple of 64) and content of a layer's prepared memory, from its weights as they are packed in the
     * blob; `bias` is moved by `zero` times the sum of the weights here. */
    size_t (*prepared_bytes)(uint32_t out_channels, uint32_t kernel_h, uint32_t kernel_w, uint32_t in_per_group,
                             int depthwise, uint32_t sum_class, const arq_rescale *rescale);
    void (*prepare)(unsigned char *memory, uint32_t out_channels, uint32_t kernel_h, uint32_t kernel_w,
                    uint32_t in_per_group, int depthwise, uint32_t sum_class, uint32_t weight_bits,
                    const uint32_t *packed, const int32_t *bias, int32_t zero, const arq_rescale *rescale);
    void (*conv)(const arq_conv *task);
    /* out[i] = stored code of rescale(in[i] + in_zero) for `count` elements of U8; element i is of channel
     * i % channels, and channels is 1 where the rescale holds for all. */
    void (*map_u8)(const unsigned char *in, int32_t in_zero, unsigned char *out, int32_t out_zero, size_t count,
                   const arq_rescale *rescale, uint32_t channels);
} arq_kernels;

/* Defined only where the macro above says so. */
const arq_kernels *arq_kernels_avx2(void);
const arq_kernels *arq_kernels_avx512(void);
const arq_kernels *arq_kernels_neon(void);

#endif
