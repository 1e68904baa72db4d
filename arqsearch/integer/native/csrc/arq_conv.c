/* A convolution step: where its input, weights and epilogue lie, and which kernels run it. */
#include "arq_program.h"

/* The place of stored codes in the scratch. */
static arq_tensor codes_at(unsigned char *memory, int32_t zero)
{
    arq_tensor codes = {ARQ_STORE_U8, zero, 1, 1, 1, memory};
    return codes;
}

/* The whole input, rescaled, without any padding. */
static arq_tensor rescaled_copy(const arq_tensor *in, const arq_rescale *rescale, int32_t zero, unsigned char *memory)
{
    arq_tensor copy = codes_at(memory, zero);
    arq_rescale_elements(in, 0, &copy, arq_elements(in), rescale);
    copy.height = in->height;
    copy.width = in->width;
    copy.channels = in->channels;
    return copy;
}

/* `width` pixels of `channels` bytes, lying together at `row`, are moved apart to `stride` bytes each; from the last
 * one on, so that none is overwritten before it has moved. */
static void spread_pixels(unsigned char *row, size_t width, size_t channels, size_t stride)
{
    if (channels == 3) { /* the usual image */
        for (size_t x = width; x-- > 0;) {
            const unsigned char first = row[3 * x], second = row[3 * x + 1], third = row[3 * x + 2];
            row[4 * x] = first;
            row[4 * x + 1] = second;
            row[4 * x + 2] = third;
            row[4 * x + 3] = 0;
        }
        return;
    }
    for (size_t x = width; x-- > 0;) {
        memmove(row + x * stride, row + x * channels, channels);
        memset(row + x * stride + channels, 0, stride - channels);
    }
}

/* The image that fast kernels read: stored codes, rescaled, padded around with the code of value 0 and channels up to
 * a multiple of 4 (the weights there are 0). */
static void padded_copy(const arq_conv_step *conv, const arq_tensor *in, const arq_rescale *rescale,
                        const arq_kernels *kernels, unsigned char *memory)
{
    const arq_window *w = &conv->window;
    const size_t stride = arq_round4(in->channels);
    const size_t before = w->left * stride, middle = in->width * stride, after = w->right * stride;
    const size_t row_bytes = before + middle + after, row_elements = (size_t)in->width * in->channels;
    const int zero_code = (int)(unsigned char)(0u - (uint32_t)conv->in_zero);
    unsigned char *row = memory + w->top * row_bytes;
    memset(memory, zero_code, w->top * row_bytes);
    for (uint32_t y = 0; y < in->height; y++, row += row_bytes) {
        const size_t first = y * row_elements;
        memset(row, zero_code, before);
        if (rescale == NULL) {
            memcpy(row + before, in->data + first, row_elements);
        } else if (in->storage == ARQ_STORE_U8) {
            kernels->map_u8(in->data + first, in->zero, row + before, conv->in_zero, row_elements, rescale,
                            rescale->channels);
        } else {
            const arq_tensor codes = codes_at(row + before, conv->in_zero);
            arq_rescale_elements(in, first, &codes, row_elements, rescale);
        }
        if (stride != in->channels) {
            spread_pixels(row + before, in->width, in->channels, stride);
        }
        memset(row + before + middle, zero_code, after);
    }
    memset(row, zero_code, w->bottom * row_bytes);
}

static void run_prepared(const arq_memory *memory, const arq_conv_step *conv, const arq_tensor *in,
                         const arq_rescale *rescale, const arq_epilogue *after, const arq_tensor *out,
                         const unsigned char *prepared)
{
    arq_conv task;
    task.input = in->data;
    task.pixel_bytes = arq_round4(in->channels);
    task.row_bytes = (in->width + conv->window.left + conv->window.right) * task.pixel_bytes;
    task.kernel_h = conv->window.kernel_h;
    task.kernel_w = conv->window.kernel_w;
    task.stride_h = conv->window.stride_h;
    task.stride_w = conv->window.stride_w;
    task.channels = in->channels;
    task.depthwise = arq_depthwise(conv, in->channels, out->channels);
    task.sum_class = conv->sum_class;
    task.depth = conv->depth;
    task.prepared = prepared;
    task.after = *after;
    task.out = *out;
    if (arq_copy_bytes(conv, in->height, in->width, in->channels) > 0) {
        unsigned char *copy = memory->arena + conv->scratch;
        padded_copy(conv, in, rescale, memory->kernels, copy);
        task.input = copy;
    }
    memory->kernels->conv(&task);
}

void arq_run_conv(const arq_memory *memory, const uint32_t *step, const unsigned char *prepared)
{
    const arq_conv_step conv = arq_read_conv(step);
    const uint32_t *words = memory->words;
    const arq_tensor out = arq_tensor_at(memory, conv.out);
    arq_tensor in = arq_tensor_at(memory, conv.in), residual;
    arq_rescale in_rescale, rescale, residual_rescale;
    arq_epilogue after = {NULL, NULL, NULL, conv.lo, conv.hi};
    if (conv.flat == 1) {
        in = arq_flat(in);
    }
    if (conv.in_rescale != 0) {
        in_rescale = arq_rescale_at(words, conv.in_rescale);
    }
    if (conv.rescale != 0) {
        rescale = arq_rescale_at(words, conv.rescale);
        after.rescale = &rescale;
    }
    if (conv.residual != ARQ_NO_TENSOR) {
        residual = arq_tensor_at(memory, conv.residual);
        after.residual = &residual;
        if (conv.residual_rescale != 0) {
            residual_rescale = arq_rescale_at(words, conv.residual_rescale);
            after.residual_rescale = &residual_rescale;
        }
    }
    if (memory->kernels != NULL && arq_for_kernels(&conv, in.channels, out.channels)) {
        run_prepared(memory, &conv, &in, conv.in_rescale != 0 ? &in_rescale : NULL, &after, &out, prepared);
        return;
    }
    unsigned char *scratch = memory->arena + conv.scratch;
    int16_t *rows = (int16_t *)(void *)(scratch + arq_copy_bytes(&conv, in.height, in.width, in.channels));
    if (conv.in_rescale != 0) {
        in = rescaled_copy(&in, &in_rescale, conv.in_zero, scratch);
    }
    arq_portable_conv(&conv, &in, words + conv.weights, (const int32_t *)(words + conv.bias), rows, &after, &out);
}
