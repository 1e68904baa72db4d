/* The fields of a blob by name, for everything that reads one. Internal. */
#ifndef ARQ_PROGRAM_H
#define ARQ_PROGRAM_H

#include "arq_inline.h"
#include "arq_kernels.h"

/* Words of the header. */
enum {
    ARQ_HEAD_MAGIC = 0,
    ARQ_HEAD_FORMAT = 1,
    ARQ_HEAD_WORD_COUNT = 2,
    ARQ_HEAD_CHECKSUM = 3,
    ARQ_HEAD_ARITHMETIC = 4,
    ARQ_HEAD_HASH = 5,
    ARQ_HEAD_HEIGHT = 13,
    ARQ_HEAD_WIDTH = 14,
    ARQ_HEAD_CHANNELS = 15,
    ARQ_HEAD_PIXEL_LO = 16,
    ARQ_HEAD_PIXEL_HI = 17,
    ARQ_HEAD_CLASSES = 18,
    ARQ_HEAD_TENSORS = 19,
    ARQ_HEAD_TENSORS_AT = 20,
    ARQ_HEAD_STEPS = 21,
    ARQ_HEAD_STEPS_AT = 22,
    ARQ_HEAD_ARENA = 23,
    ARQ_HEAD_OUTPUT = 24
};

/* Words of every kind of step, kind and length included. */
enum {
    ARQ_WORDS_INPUT = 12,
    ARQ_WORDS_CONV = 29,
    ARQ_WORDS_RESCALE = 5,
    ARQ_WORDS_ADD = 9,
    ARQ_WORDS_POOL = 12,
    ARQ_WORDS_PAD = 9,
    ARQ_WORDS_CHANNELS = 6,
    ARQ_WORDS_SLICE = 13,
    ARQ_WORDS_COPY = 4
};

/* One image on its way through a model. `kernels` is null for the portable path. */
typedef struct arq_memory {
    const uint32_t *words;
    const int16_t *pixels;
    unsigned char *arena;
    const arq_kernels *kernels;
} arq_memory;

typedef struct arq_window {
    uint32_t kernel_h, kernel_w, stride_h, stride_w, top, bottom, left, right;
} arq_window;

typedef struct arq_conv_step {
    uint32_t in, out, flat;
    arq_window window;
    uint32_t groups, bits, weights, bias, in_rescale;
    int32_t in_zero;
    uint32_t in_max, rescale, residual, residual_rescale;
    int32_t lo, hi;
    uint32_t sum_class, depth, scratch, scratch_bytes;
} arq_conv_step;

/* Tensor without its data: what the blob says about it. */
static inline arq_tensor arq_describe(const uint32_t *words, uint32_t index)
{
    const uint32_t *at = words + words[ARQ_HEAD_TENSORS_AT] + (size_t)index * ARQ_TENSOR_WORDS;
    arq_tensor tensor;
    tensor.storage = at[0];
    tensor.zero = arq_signed(at[1]);
    tensor.height = at[2];
    tensor.width = at[3];
    tensor.channels = at[4];
    tensor.data = NULL;
    return tensor;
}

static inline arq_tensor arq_tensor_at(const arq_memory *memory, uint32_t index)
{
    arq_tensor tensor = arq_describe(memory->words, index);
    if (index == 0) {
        /* No step writes tensor 0, so the pixels stay as they are. */
        tensor.data = (unsigned char *)(uintptr_t)memory->pixels;
    } else {
        tensor.data = memory->arena + memory->words[memory->words[ARQ_HEAD_TENSORS_AT] + index * ARQ_TENSOR_WORDS + 5];
    }
    return tensor;
}

static inline size_t arq_elements(const arq_tensor *t)
{
    return (size_t)t->height * t->width * t->channels;
}

/* The same elements as one vector. */
static inline arq_tensor arq_flat(arq_tensor t)
{
    t.channels = (uint32_t)arq_elements(&t);
    t.height = 1;
    t.width = 1;
    return t;
}

static inline uint32_t arq_storage_bytes(uint32_t storage)
{
    return storage == ARQ_STORE_U8 ? 1 : storage == ARQ_STORE_I16 ? 2 : 4;
}

/* The rescale at word `at`; `words` is any part of the blob's memory that starts at the blob's first word. */
static inline arq_rescale arq_rescale_at(const uint32_t *words, uint32_t at)
{
    const int32_t *head = (const int32_t *)(words + at);
    const uint32_t n = words[at];
    const int32_t *entries = head + 5;
    arq_rescale r;
    r.channels = n;
    r.rounding = words[at + 1];
    r.lo = head[2];
    r.hi = head[3];
    r.fast = head[4] == 1;
    r.multiplier = entries;
    r.shift = entries + n;
    r.fast_lo = r.fast ? entries + 2 * (size_t)n : NULL;
    r.fast_hi = r.fast ? entries + 3 * (size_t)n : NULL;
    r.fast_multiplier = r.fast ? entries + 4 * (size_t)n : NULL;
    r.fast_offset = r.fast ? entries + 5 * (size_t)n : NULL;
    r.fast_shift = r.fast ? entries + 6 * (size_t)n : NULL;
    return r;
}

static inline arq_window arq_read_window(const uint32_t *at)
{
    arq_window window;
    window.kernel_h = at[0];
    window.kernel_w = at[1];
    window.stride_h = at[2];
    window.stride_w = at[3];
    window.top = at[4];
    window.bottom = at[5];
    window.left = at[6];
    window.right = at[7];
    return window;
}

static inline arq_conv_step arq_read_conv(const uint32_t *step)
{
    const uint32_t *field = step + 2;
    arq_conv_step conv;
    conv.in = field[0];
    conv.out = field[1];
    conv.flat = field[2];
    conv.window = arq_read_window(field + 3);
    conv.groups = field[11];
    conv.bits = field[12];
    conv.weights = field[13];
    conv.bias = field[14];
    conv.in_rescale = field[15];
    conv.in_zero = arq_signed(field[16]);
    conv.in_max = field[17];
    conv.rescale = field[18];
    conv.residual = field[19];
    conv.residual_rescale = field[20];
    conv.lo = arq_signed(field[21]);
    conv.hi = arq_signed(field[22]);
    conv.sum_class = field[23];
    conv.depth = field[24];
    conv.scratch = field[25];
    conv.scratch_bytes = field[26];
    return conv;
}

static inline int arq_padded(const arq_window *w)
{
    return (w->top | w->bottom | w->left | w->right) != 0;
}

static inline uint32_t arq_round4(uint32_t channels)
{
    return (channels + 3u) & ~3u;
}

/* Whether fast kernels see this as depthwise: groups = channels in = channels out > 1. */
static inline int arq_depthwise(const arq_conv_step *conv, uint32_t channels_in, uint32_t channels_out)
{
    return conv->groups > 1 && conv->groups == channels_in && conv->groups == channels_out;
}

/* Whether fast kernels run this step: sums over stored codes, in one group or depthwise. */
static inline int arq_for_kernels(const arq_conv_step *conv, uint32_t channels_in, uint32_t channels_out)
{
    return conv->sum_class != ARQ_SUM_ANY && (conv->groups == 1 || arq_depthwise(conv, channels_in, channels_out));
}

/* Bytes of the input's copy in the scratch, which the unpacked weights follow; see arq_blob.h. */
static inline uint64_t arq_copy_bytes(const arq_conv_step *conv, uint32_t height, uint32_t width, uint32_t channels)
{
    const arq_window *w = &conv->window;
    uint64_t bytes = 0;
    if (conv->sum_class == ARQ_SUM_ANY) {
        bytes = conv->in_rescale != 0 ? (uint64_t)height * width * channels : 0;
    } else if (arq_padded(w) || conv->in_rescale != 0 || channels % 4 != 0) {
        bytes = ((uint64_t)height + w->top + w->bottom) * ((uint64_t)width + w->left + w->right) * arq_round4(channels);
        bytes += 64;
    }
    return (bytes + 63) & ~(uint64_t)63;
}

/* arq_validate.c: whether everything behind a correct header and checksum can be run. */
int arq_valid_program(const uint32_t *words);

/* arq_steps.c: every step but the convolution. */
void arq_run_step(const arq_memory *memory, const uint32_t *step);

/* arq_steps.c: out[0 .. count - 1] = rescaled in[first ..], where element first + i is of channel
 * i % rescale->channels. */
void arq_rescale_elements(const arq_tensor *in, size_t first, const arq_tensor *out, size_t count,
                          const arq_rescale *rescale);

/* arq_conv.c: `prepared` is this layer's part of the prepared memory, null on the portable path. */
void arq_run_conv(const arq_memory *memory, const uint32_t *step, const unsigned char *prepared);

/* arq_kernels.c: the convolution over `in` (the rescaled copy where there is one); `rows` holds four unpacked rows of
 * weights. */
void arq_portable_conv(const arq_conv_step *conv, const arq_tensor *in, const uint32_t *packed, const int32_t *bias,
                       int16_t *rows, const arq_epilogue *after, const arq_tensor *out);

#endif
