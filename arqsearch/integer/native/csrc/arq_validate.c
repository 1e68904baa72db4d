/* Everything that a blob states is checked here once, so that nothing needs to be checked while it runs: no field
 * values, however wrong, lead outside the blob, the arena or defined arithmetic. */
#include "arq_program.h"

/* Elements of one tensor; positions and sizes below are then far from the ends of 32 and 64 bits. */
#define LARGEST_TENSOR ((uint64_t)1 << 28)
/* Kernels, strides and paddings. */
#define LARGEST_WINDOW 65535u
/* Zero points whose product with the sum of a layer's weights (at most 2^31 codes of 8 bits) stays within 63 bits. */
#define LARGEST_ZERO (1 << 24)
/* Packed bits of one layer's weights; positions of bits then fit a size_t of 32 bits. */
#define LARGEST_WEIGHTS (((uint64_t)1 << 32) - 64)

/* Part of the arena, in bytes; empty for the input image. */
typedef struct span {
    uint64_t start, stop;
} span;

static int disjoint(span a, span b)
{
    return a.stop <= b.start || b.stop <= a.start;
}

/* Whether `count` words of constants at `at` lie inside the blob. */
static int block(const uint32_t *words, uint32_t at, uint64_t count)
{
    return at >= ARQ_HEADER_WORDS && count <= words[ARQ_HEAD_WORD_COUNT] &&
           at <= words[ARQ_HEAD_WORD_COUNT] - (uint32_t)count;
}

static uint32_t tensor_offset(const uint32_t *words, uint32_t index)
{
    return words[words[ARQ_HEAD_TENSORS_AT] + index * ARQ_TENSOR_WORDS + 5];
}

static span tensor_span(const uint32_t *words, uint32_t index)
{
    span place = {0, 0};
    if (index != 0) {
        const arq_tensor tensor = arq_describe(words, index);
        place.start = tensor_offset(words, index);
        place.stop = place.start + (uint64_t)arq_elements(&tensor) * arq_storage_bytes(tensor.storage);
    }
    return place;
}

static int valid_tensor(const uint32_t *words, uint32_t index)
{
    const arq_tensor t = arq_describe(words, index);
    if (t.storage > ARQ_STORE_I32 || t.height < 1 || t.width < 1 || t.channels < 1) {
        return 0;
    }
    if (t.height > LARGEST_TENSOR || t.width > LARGEST_TENSOR || t.channels > LARGEST_TENSOR ||
        (uint64_t)t.height * t.width > LARGEST_TENSOR ||
        (uint64_t)t.height * t.width * t.channels > LARGEST_TENSOR) {
        return 0;
    }
    /* value = stored + zero must be an int32. */
    if (t.storage == ARQ_STORE_U8 ? t.zero > INT32_MAX - 255 : t.zero != 0) {
        return 0;
    }
    if (index == 0) {
        return t.storage == ARQ_STORE_I16 && t.height == words[ARQ_HEAD_HEIGHT] && t.width == words[ARQ_HEAD_WIDTH] &&
               t.channels == words[ARQ_HEAD_CHANNELS];
    }
    return tensor_offset(words, index) % 64 == 0 && tensor_span(words, index).stop <= words[ARQ_HEAD_ARENA];
}

/* Read `index` into *tensor; it must exist. */
static int source(const uint32_t *words, uint32_t index, arq_tensor *tensor)
{
    if (index >= words[ARQ_HEAD_TENSORS]) {
        return 0;
    }
    *tensor = arq_describe(words, index);
    return 1;
}

/* As `source`, for a tensor that is written: not the image. */
static int target(const uint32_t *words, uint32_t index, arq_tensor *tensor)
{
    return index != 0 && source(words, index, tensor);
}

/* Input and output of a step in separate places. */
static int through(const uint32_t *words, uint32_t in, uint32_t out, arq_tensor *from, arq_tensor *to)
{
    return source(words, in, from) && target(words, out, to) &&
           disjoint(tensor_span(words, in), tensor_span(words, out));
}

/* As `through` for steps that go element by element: they may also work in place. */
static int elementwise(const uint32_t *words, uint32_t in, uint32_t out, arq_tensor *from, arq_tensor *to)
{
    if (!source(words, in, from) || !target(words, out, to) || arq_elements(from) != arq_elements(to)) {
        return 0;
    }
    return disjoint(tensor_span(words, in), tensor_span(words, out)) ||
           (tensor_offset(words, in) == tensor_offset(words, out) &&
            arq_storage_bytes(from->storage) == arq_storage_bytes(to->storage));
}

static int same_shape(const arq_tensor *a, const arq_tensor *b)
{
    return a->height == b->height && a->width == b->width && a->channels == b->channels;
}

/* Whether a constant can be stored. */
static int storable(const arq_tensor *t, int32_t value)
{
    const int64_t stored = (int64_t)value - t->zero;
    switch (t->storage) {
    case ARQ_STORE_U8:
        return stored >= 0 && stored <= 255;
    case ARQ_STORE_I16:
        return stored >= INT16_MIN && stored <= INT16_MAX;
    default:
        return 1;
    }
}

/* The 32-bit form of entry i: it grows with x, and the clipped product and its sum with the offset fit int32. */
static int valid_fast(const arq_rescale *r, uint32_t i)
{
    const int64_t first = (int64_t)r->fast_lo[i] * r->fast_multiplier[i];
    const int64_t last = (int64_t)r->fast_hi[i] * r->fast_multiplier[i];
    return r->fast_lo[i] <= r->fast_hi[i] && r->fast_multiplier[i] >= 0 && r->fast_shift[i] >= 0 &&
           r->fast_shift[i] <= 31 && first >= INT32_MIN && last <= INT32_MAX &&
           first + r->fast_offset[i] >= INT32_MIN && last + r->fast_offset[i] <= INT32_MAX;
}

/* The rescale at `at` (0: none, which is valid only if `optional`) for `channels` channels. */
static int valid_rescale(const uint32_t *words, uint32_t at, uint32_t channels, int optional)
{
    if (at == 0) {
        return optional;
    }
    if (!block(words, at, 5)) {
        return 0;
    }
    const uint32_t n = words[at];
    if ((n != 1 && n != channels) || words[at + 4] > 1 ||
        !block(words, at, 5 + (uint64_t)n * (words[at + 4] == 1 ? 7u : 2u))) {
        return 0;
    }
    const arq_rescale r = arq_rescale_at(words, at);
    if (r.rounding > ARQ_FLOOR || r.lo > r.hi) {
        return 0;
    }
    for (uint32_t i = 0; i < n; i++) {
        if (r.multiplier[i] < 0 || r.shift[i] < 1 || r.shift[i] > 62 || (r.fast && !valid_fast(&r, i))) {
            return 0;
        }
    }
    return 1;
}

/* Output length of one axis of a sliding window. */
static int valid_axis(uint32_t in, uint32_t out, uint32_t kernel, uint32_t stride, uint32_t before, uint32_t after)
{
    if (kernel < 1 || stride < 1 || kernel > LARGEST_WINDOW || stride > LARGEST_WINDOW || before > LARGEST_WINDOW ||
        after > LARGEST_WINDOW) {
        return 0;
    }
    const uint32_t padded = in + before + after;
    return padded >= kernel && out == (padded - kernel) / stride + 1;
}

static int valid_window(const arq_window *w, const arq_tensor *in, const arq_tensor *out)
{
    return valid_axis(in->height, out->height, w->kernel_h, w->stride_h, w->top, w->bottom) &&
           valid_axis(in->width, out->width, w->kernel_w, w->stride_w, w->left, w->right);
}

static int valid_input(const uint32_t *words, const uint32_t *step)
{
    arq_tensor in, out;
    const uint32_t n = step[4];
    return through(words, step[2], step[3], &in, &out) && same_shape(&in, &out) && in.storage == ARQ_STORE_I16 &&
           (n == 1 || n == in.channels) && step[5] <= 62 && step[6] <= ARQ_FLOOR &&
           arq_signed(step[7]) <= arq_signed(step[8]) && arq_signed(step[9]) <= arq_signed(step[10]) &&
           block(words, step[11], (uint64_t)n * 4);
}

/* Packed weights and their bias. */
static int valid_weights(const uint32_t *words, const arq_conv_step *conv, uint32_t in_per_group, uint32_t out_channels)
{
    if ((conv->bits < 2 || conv->bits > 8) && conv->bits != 16) {
        return 0;
    }
    uint64_t bits = (uint64_t)conv->window.kernel_h * conv->window.kernel_w;
    if (bits > LARGEST_WEIGHTS / in_per_group) {
        return 0;
    }
    bits *= in_per_group;
    if (bits > LARGEST_WEIGHTS / out_channels) {
        return 0;
    }
    bits *= out_channels;
    if (bits > LARGEST_WEIGHTS / conv->bits) {
        return 0;
    }
    bits *= conv->bits;
    return block(words, conv->weights, (bits + 31) / 32) && block(words, conv->bias, out_channels);
}

/* What kernels for sums over stored codes rely on. */
static int valid_class(const arq_conv_step *conv, const arq_tensor *in)
{
    if (conv->sum_class == ARQ_SUM_ANY) {
        return 1;
    }
    return conv->sum_class <= ARQ_SUM_INT16 && conv->depth >= 1 && conv->bits <= 8 && conv->in_max <= 255 &&
           (conv->in_rescale != 0 || in->storage == ARQ_STORE_U8) && conv->in_zero >= -LARGEST_ZERO &&
           conv->in_zero <= LARGEST_ZERO &&
           (!arq_padded(&conv->window) || (conv->in_zero <= 0 && conv->in_zero >= -255));
}

/* The scratch memory holds the copy of the input and four rows of weights, beside all tensors of the step. */
static int valid_scratch(const uint32_t *words, const arq_conv_step *conv, const arq_tensor *in, uint32_t in_per_group)
{
    const uint64_t row = (uint64_t)conv->window.kernel_h * conv->window.kernel_w * in_per_group;
    const uint64_t needed =
        arq_copy_bytes(conv, in->height, in->width, in->channels) + ((8 * row + 63) & ~(uint64_t)63);
    const span place = {conv->scratch, (uint64_t)conv->scratch + conv->scratch_bytes};
    return conv->scratch % 64 == 0 && needed <= conv->scratch_bytes && place.stop <= words[ARQ_HEAD_ARENA] &&
           disjoint(place, tensor_span(words, conv->in)) && disjoint(place, tensor_span(words, conv->out)) &&
           (conv->residual == ARQ_NO_TENSOR || disjoint(place, tensor_span(words, conv->residual)));
}

static int valid_residual(const uint32_t *words, const arq_conv_step *conv, const arq_tensor *out)
{
    arq_tensor residual, unused;
    if (conv->residual == ARQ_NO_TENSOR) {
        return conv->residual_rescale == 0;
    }
    return elementwise(words, conv->residual, conv->out, &residual, &unused) && same_shape(&residual, out) &&
           conv->lo <= conv->hi && valid_rescale(words, conv->residual_rescale, out->channels, 1);
}

static int valid_conv(const uint32_t *words, const uint32_t *step)
{
    const arq_conv_step conv = arq_read_conv(step);
    const arq_window *w = &conv.window;
    arq_tensor in, out;
    if (!through(words, conv.in, conv.out, &in, &out) || conv.flat > 1) {
        return 0;
    }
    const uint32_t own_channels = in.channels;
    if (conv.flat == 1) {
        in = arq_flat(in);
        if (w->kernel_h != 1 || w->kernel_w != 1 || arq_padded(w) || conv.groups != 1) {
            return 0;
        }
    }
    if (!valid_window(w, &in, &out) || conv.groups < 1 || in.channels % conv.groups != 0 ||
        out.channels % conv.groups != 0) {
        return 0;
    }
    if (conv.in_rescale == 0) {
        if (conv.in_zero != in.zero) {
            return 0;
        }
    } else if (conv.in_zero > INT32_MAX - 255 || (!valid_rescale(words, conv.in_rescale, in.channels, 0) &&
                                                  !valid_rescale(words, conv.in_rescale, own_channels, 0))) {
        return 0;
    }
    const uint32_t in_per_group = in.channels / conv.groups;
    return valid_weights(words, &conv, in_per_group, out.channels) && valid_class(&conv, &in) &&
           valid_rescale(words, conv.rescale, out.channels, 1) && valid_residual(words, &conv, &out) &&
           valid_scratch(words, &conv, &in, in_per_group);
}

static int valid_add(const uint32_t *words, const uint32_t *step)
{
    arq_tensor a, b, out;
    return elementwise(words, step[2], step[4], &a, &out) && elementwise(words, step[3], step[4], &b, &out) &&
           same_shape(&a, &out) && same_shape(&b, &out) && valid_rescale(words, step[5], out.channels, 1) &&
           valid_rescale(words, step[6], out.channels, 1) && arq_signed(step[7]) <= arq_signed(step[8]);
}

static int valid_pool(const uint32_t *words, const uint32_t *step)
{
    const arq_window w = arq_read_window(step + 4);
    arq_tensor in, out;
    if (!through(words, step[2], step[3], &in, &out) || in.channels != out.channels || !valid_window(&w, &in, &out)) {
        return 0;
    }
    /* Every window of a max pool then holds an element. */
    return step[0] == ARQ_STEP_SUMPOOL ||
           (w.top < w.kernel_h && w.bottom < w.kernel_h && w.left < w.kernel_w && w.right < w.kernel_w);
}

static int valid_pad(const uint32_t *words, const uint32_t *step)
{
    arq_tensor in, out;
    if (!through(words, step[2], step[3], &in, &out) || in.channels != out.channels || step[4] > LARGEST_WINDOW ||
        step[5] > LARGEST_WINDOW || step[6] > LARGEST_WINDOW || step[7] > LARGEST_WINDOW ||
        out.height != in.height + step[4] + step[5] || out.width != in.width + step[6] + step[7] ||
        !block(words, step[8], in.channels)) {
        return 0;
    }
    for (uint32_t c = 0; c < in.channels; c++) {
        if (!storable(&out, arq_signed(words[step[8] + c]))) {
            return 0;
        }
    }
    return 1;
}

static int valid_channels(const uint32_t *words, const uint32_t *step)
{
    arq_tensor in, out;
    return through(words, step[2], step[3], &in, &out) && in.height == out.height && in.width == out.width &&
           step[4] <= LARGEST_TENSOR && step[5] <= LARGEST_TENSOR && out.channels == in.channels + step[4] + step[5] &&
           storable(&out, 0);
}

static int valid_cut(const uint32_t *bounds, uint32_t in, uint32_t out)
{
    const uint32_t start = bounds[0], stop = bounds[1], step = bounds[2];
    return start < stop && stop <= in && step >= 1 && out == (stop - start - 1) / step + 1;
}

static int valid_slice(const uint32_t *words, const uint32_t *step)
{
    arq_tensor in, out;
    return through(words, step[2], step[3], &in, &out) && valid_cut(step + 4, in.height, out.height) &&
           valid_cut(step + 7, in.width, out.width) && valid_cut(step + 10, in.channels, out.channels);
}

/* Whether a step has `length` words and is valid; any other kind of step is not. */
static int valid_step(const uint32_t *words, const uint32_t *step, uint32_t length)
{
    arq_tensor in, out;
    switch (step[0]) {
    case ARQ_STEP_INPUT:
        return length == ARQ_WORDS_INPUT && valid_input(words, step);
    case ARQ_STEP_CONV:
        return length == ARQ_WORDS_CONV && valid_conv(words, step);
    case ARQ_STEP_RESCALE:
        return length == ARQ_WORDS_RESCALE && elementwise(words, step[2], step[3], &in, &out) &&
               same_shape(&in, &out) && valid_rescale(words, step[4], in.channels, 0);
    case ARQ_STEP_ADD:
        return length == ARQ_WORDS_ADD && valid_add(words, step);
    case ARQ_STEP_SUMPOOL:
    case ARQ_STEP_MAXPOOL:
        return length == ARQ_WORDS_POOL && valid_pool(words, step);
    case ARQ_STEP_PAD:
        return length == ARQ_WORDS_PAD && valid_pad(words, step);
    case ARQ_STEP_CHANNELS:
        return length == ARQ_WORDS_CHANNELS && valid_channels(words, step);
    case ARQ_STEP_SLICE:
        return length == ARQ_WORDS_SLICE && valid_slice(words, step);
    case ARQ_STEP_COPY:
        return length == ARQ_WORDS_COPY && elementwise(words, step[2], step[3], &in, &out);
    default:
        return 0;
    }
}

int arq_valid_program(const uint32_t *words)
{
    const uint32_t tensors = words[ARQ_HEAD_TENSORS];
    if (tensors < 1 || !block(words, words[ARQ_HEAD_TENSORS_AT], (uint64_t)tensors * ARQ_TENSOR_WORDS)) {
        return 0;
    }
    for (uint32_t index = 0; index < tensors; index++) {
        if (!valid_tensor(words, index)) {
            return 0;
        }
    }
    const int32_t pixel_lo = arq_signed(words[ARQ_HEAD_PIXEL_LO]), pixel_hi = arq_signed(words[ARQ_HEAD_PIXEL_HI]);
    if (pixel_lo < INT16_MIN || pixel_hi > INT16_MAX || pixel_lo > pixel_hi ||
        words[ARQ_HEAD_OUTPUT] >= tensors) {
        return 0;
    }
    const arq_tensor output = arq_describe(words, words[ARQ_HEAD_OUTPUT]);
    if (words[ARQ_HEAD_CLASSES] != arq_elements(&output)) {
        return 0;
    }
    uint32_t at = words[ARQ_HEAD_STEPS_AT];
    for (uint32_t step = 0; step < words[ARQ_HEAD_STEPS]; step++) {
        if (!block(words, at, 2) || words[at + 1] < 2 || !block(words, at, words[at + 1]) ||
            !valid_step(words, words + at, words[at + 1])) {
            return 0;
        }
        at += words[at + 1];
    }
    return 1;
}
