/* Open, prepare and run a blob, with the instruction set that the processor has. */
#include "arq_program.h"

/* The CRC register (IEEE 802.3, reflected) after one word of zeros. */
static uint32_t shift_word(uint32_t crc)
{
    for (int bit = 0; bit < 32; bit++) {
        crc = crc >> 1 ^ (0xEDB88320u & (0u - (crc & 1u)));
    }
    return crc;
}

/* CRC-32 of words in little-endian order. The register is linear: its eight half bytes are looked up separately, which
 * a processor does at the same time, in a table small enough for the stack. */
static uint32_t checksum(const uint32_t *words, size_t count)
{
    uint32_t after[8][16];
    for (uint32_t place = 0; place < 8; place++) {
        for (uint32_t half_byte = 0; half_byte < 16; half_byte++) {
            after[place][half_byte] = shift_word(half_byte << (4 * place));
        }
    }
    uint32_t crc = 0xFFFFFFFFu;
    for (size_t i = 0; i < count; i++) {
        const uint32_t x = crc ^ words[i];
        crc = after[0][x & 15u] ^ after[1][x >> 4 & 15u] ^ after[2][x >> 8 & 15u] ^ after[3][x >> 12 & 15u] ^
              after[4][x >> 16 & 15u] ^ after[5][x >> 20 & 15u] ^ after[6][x >> 24 & 15u] ^ after[7][x >> 28];
    }
    return ~crc;
}

static int aligned(const void *pointer, size_t bytes)
{
    return (uintptr_t)pointer % bytes == 0;
}

const char *arq_status_text(arq_status status)
{
    switch (status) {
    case ARQ_OK:
        return "no error";
    case ARQ_ERROR_NULL:
        return "a pointer is null";
    case ARQ_ERROR_SIZE:
        return "a buffer or count does not fit the model";
    case ARQ_ERROR_ALIGNMENT:
        return "memory is not aligned: 8 bytes for the arena and the prepared weights, its elements for an array";
    case ARQ_ERROR_MODEL:
        return "the blob is no model, is damaged, or is of another format or arithmetic version";
    case ARQ_ERROR_RANGE:
        return "a pixel or its noise leaves the range that the model's proofs cover";
    case ARQ_ERROR_UNSUPPORTED:
        return "this processor or build lacks the instruction set";
    case ARQ_ERROR_ARGUMENT:
        return "an argument is out of its stated range";
    default:
        return "unknown status";
    }
}

const char *arq_isa_name(arq_isa isa)
{
    switch (isa) {
    case ARQ_ISA_AUTO:
        return "auto";
    case ARQ_ISA_PORTABLE:
        return "portable";
    case ARQ_ISA_AVX2:
        return "avx2";
    case ARQ_ISA_AVX512:
        return "avx512";
    case ARQ_ISA_NEON:
        return "neon";
    default:
        return "unknown";
    }
}

/* Null where the build or the processor has no kernels of this kind; AUTO and PORTABLE have none of their own. */
static const arq_kernels *kernels_of(arq_isa isa)
{
    switch (isa) {
#ifdef ARQ_WITH_AVX2
    case ARQ_ISA_AVX2:
        return __builtin_cpu_supports("avx2") ? arq_kernels_avx2() : NULL;
#endif
#ifdef ARQ_WITH_AVX512
    case ARQ_ISA_AVX512:
        return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                       __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
                       __builtin_cpu_supports("avx512vnni")
                   ? arq_kernels_avx512()
                   : NULL;
#endif
#ifdef ARQ_WITH_NEON
    case ARQ_ISA_NEON:
        return arq_kernels_neon();
#endif
    default:
        return NULL;
    }
}

int arq_isa_supported(arq_isa isa)
{
    return isa == ARQ_ISA_AUTO || isa == ARQ_ISA_PORTABLE || kernels_of(isa) != NULL;
}

/* AUTO becomes the best that there is. */
static arq_isa resolve(arq_isa isa)
{
    static const arq_isa best_first[] = {ARQ_ISA_AVX512, ARQ_ISA_AVX2, ARQ_ISA_NEON};
    if (isa != ARQ_ISA_AUTO) {
        return isa;
    }
    for (size_t i = 0; i < sizeof best_first / sizeof best_first[0]; i++) {
        if (kernels_of(best_first[i]) != NULL) {
            return best_first[i];
        }
    }
    return ARQ_ISA_PORTABLE;
}

arq_status arq_open(arq_model *model, const uint32_t *words, size_t word_count)
{
    if (model == NULL) {
        return ARQ_ERROR_NULL;
    }
    memset(model, 0, sizeof *model);
    if (words == NULL) {
        return ARQ_ERROR_NULL;
    }
    if (!aligned(words, sizeof *words)) {
        return ARQ_ERROR_ALIGNMENT;
    }
    if (word_count < ARQ_HEADER_WORDS || words[ARQ_HEAD_MAGIC] != ARQ_MAGIC ||
        words[ARQ_HEAD_FORMAT] != ARQ_FORMAT_VERSION || words[ARQ_HEAD_WORD_COUNT] != word_count ||
        words[ARQ_HEAD_ARITHMETIC] != ARQ_ARITHMETIC_VERSION ||
        words[ARQ_HEAD_CHECKSUM] != checksum(words + ARQ_HEAD_ARITHMETIC, word_count - ARQ_HEAD_ARITHMETIC) ||
        !arq_valid_program(words)) {
        return ARQ_ERROR_MODEL;
    }
    model->words = words;
    model->word_count = words[ARQ_HEAD_WORD_COUNT];
    model->height = words[ARQ_HEAD_HEIGHT];
    model->width = words[ARQ_HEAD_WIDTH];
    model->channels = words[ARQ_HEAD_CHANNELS];
    model->pixel_lo = arq_signed(words[ARQ_HEAD_PIXEL_LO]);
    model->pixel_hi = arq_signed(words[ARQ_HEAD_PIXEL_HI]);
    model->classes = words[ARQ_HEAD_CLASSES];
    model->arena_bytes = words[ARQ_HEAD_ARENA];
    model->isa = ARQ_ISA_PORTABLE;
    return ARQ_OK;
}

arq_status arq_program_hash(const arq_model *model, unsigned char hash[32])
{
    if (model == NULL || hash == NULL || model->words == NULL) {
        return ARQ_ERROR_NULL;
    }
    for (size_t i = 0; i < 32; i++) {
        hash[i] = (unsigned char)(model->words[ARQ_HEAD_HASH + i / 4] >> (24 - 8 * (i % 4)));
    }
    return ARQ_OK;
}

/* Bytes of one layer in the prepared memory; 0 for a layer that fast kernels do not run. */
static size_t layer_bytes(const uint32_t *words, const uint32_t *step, const arq_kernels *kernels, arq_conv_step *conv,
                          arq_tensor *in, arq_tensor *out)
{
    *conv = arq_read_conv(step);
    *in = arq_describe(words, conv->in);
    *out = arq_describe(words, conv->out);
    if (conv->flat == 1) {
        *in = arq_flat(*in);
    }
    if (!arq_for_kernels(conv, in->channels, out->channels)) {
        return 0;
    }
    arq_rescale rescale;
    if (conv->rescale != 0) {
        rescale = arq_rescale_at(words, conv->rescale);
    }
    return kernels->prepared_bytes(out->channels, conv->window.kernel_h, conv->window.kernel_w,
                                   in->channels / conv->groups, arq_depthwise(conv, in->channels, out->channels),
                                   conv->sum_class, conv->rescale != 0 ? &rescale : NULL);
}

/* Bytes of all layers; with `memory`, their content is written as well. */
static size_t prepare_layers(const uint32_t *words, const arq_kernels *kernels, unsigned char *memory)
{
    const uint32_t *step = words + words[ARQ_HEAD_STEPS_AT];
    size_t total = 0;
    for (uint32_t s = 0; s < words[ARQ_HEAD_STEPS]; s++, step += step[1]) {
        arq_conv_step conv;
        arq_tensor in, out;
        if (step[0] != ARQ_STEP_CONV) {
            continue;
        }
        const size_t bytes = layer_bytes(words, step, kernels, &conv, &in, &out);
        if (memory != NULL && bytes > 0) {
            arq_rescale rescale;
            if (conv.rescale != 0) {
                rescale = arq_rescale_at(words, conv.rescale);
            }
            kernels->prepare(memory + total, out.channels, conv.window.kernel_h, conv.window.kernel_w,
                             in.channels / conv.groups, arq_depthwise(&conv, in.channels, out.channels),
                             conv.sum_class, conv.bits, words + conv.weights, (const int32_t *)(words + conv.bias),
                             conv.in_zero, conv.rescale != 0 ? &rescale : NULL);
        }
        total += bytes;
    }
    return total;
}

size_t arq_prepared_bytes(const arq_model *model, arq_isa isa)
{
    const arq_kernels *kernels = kernels_of(resolve(isa));
    if (model == NULL || model->words == NULL || kernels == NULL) {
        return 0;
    }
    return prepare_layers(model->words, kernels, NULL);
}

arq_status arq_prepare(arq_model *model, arq_isa isa, void *memory, size_t bytes)
{
    if (model == NULL || model->words == NULL) {
        return ARQ_ERROR_NULL;
    }
    const arq_isa chosen = resolve(isa);
    const arq_kernels *kernels = kernels_of(chosen);
    if (chosen == ARQ_ISA_PORTABLE) {
        model->isa = ARQ_ISA_PORTABLE;
        model->prepared = NULL;
        return ARQ_OK;
    }
    if (kernels == NULL) {
        return isa > ARQ_ISA_NEON ? ARQ_ERROR_ARGUMENT : ARQ_ERROR_UNSUPPORTED;
    }
    const size_t needed = prepare_layers(model->words, kernels, NULL);
    if (needed > 0) {
        if (memory == NULL) {
            return ARQ_ERROR_NULL;
        }
        if (!aligned(memory, 8)) {
            return ARQ_ERROR_ALIGNMENT;
        }
        if (bytes < needed) {
            return ARQ_ERROR_SIZE;
        }
        prepare_layers(model->words, kernels, memory);
    }
    model->isa = chosen;
    model->prepared = memory;
    return ARQ_OK;
}

static int in_range(const int16_t *pixels, size_t count, int32_t lo, int32_t hi)
{
    int16_t least = pixels[0], most = pixels[0];
    for (size_t i = 1; i < count; i++) {
        least = pixels[i] < least ? pixels[i] : least;
        most = pixels[i] > most ? pixels[i] : most;
    }
    return least >= lo && most <= hi;
}

static void run_steps(const arq_model *model, const arq_memory *memory)
{
    const uint32_t *words = model->words;
    const uint32_t *step = words + words[ARQ_HEAD_STEPS_AT];
    const unsigned char *prepared = model->prepared;
    for (uint32_t s = 0; s < words[ARQ_HEAD_STEPS]; s++, step += step[1]) {
        if (step[0] != ARQ_STEP_CONV) {
            arq_run_step(memory, step);
            continue;
        }
        arq_run_conv(memory, step, prepared);
        if (memory->kernels != NULL && prepared != NULL) {
            arq_conv_step conv;
            arq_tensor in, out;
            prepared += layer_bytes(words, step, memory->kernels, &conv, &in, &out);
        }
    }
}

arq_status arq_run(const arq_model *model, const int16_t *pixels, size_t pixel_count, int32_t *logits,
                   size_t logit_count, void *arena, size_t arena_bytes)
{
    if (model == NULL || model->words == NULL || pixels == NULL || logits == NULL ||
        (arena == NULL && model->arena_bytes > 0)) {
        return ARQ_ERROR_NULL;
    }
    if (pixel_count != (size_t)model->height * model->width * model->channels || logit_count != model->classes ||
        arena_bytes < model->arena_bytes) {
        return ARQ_ERROR_SIZE;
    }
    if (!aligned(arena, 8) || !aligned(pixels, sizeof *pixels) || !aligned(logits, sizeof *logits)) {
        return ARQ_ERROR_ALIGNMENT;
    }
    if (!in_range(pixels, pixel_count, model->pixel_lo, model->pixel_hi)) {
        return ARQ_ERROR_RANGE;
    }
    const arq_memory memory = {model->words, pixels, arena, kernels_of(model->isa)};
    run_steps(model, &memory);
    const arq_tensor output = arq_tensor_at(&memory, model->words[ARQ_HEAD_OUTPUT]);
    for (size_t i = 0; i < logit_count; i++) {
        logits[i] = arq_load(&output, i);
    }
    return ARQ_OK;
}

uint32_t arq_first_maximum(const int32_t *logits, size_t count)
{
    size_t best = 0;
    for (size_t i = 1; i < count; i++) {
        best = logits[i] > logits[best] ? i : best;
    }
    return (uint32_t)best;
}
