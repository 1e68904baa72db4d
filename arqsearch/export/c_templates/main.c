/* Example and self-test: runs the test vectors, then predicts and certifies one image with noise drawn here, and
 * compares every number with that of the reference. All memory is static; there is no floating point.
 *
 * Argument: the instruction set (auto, portable, avx2, avx512, neon). Returns 0 if everything is equal. */
#include "arq.h"
#include "model.h"
#include "port.h"
#include "test_vectors.h"

#include <string.h>

#if defined(__GNUC__)
#define FAST_ALIGNMENT __attribute__((aligned(64)))
#else
#define FAST_ALIGNMENT
#endif

/* Arrays of 64-bit words have the alignment that the library asks for. */
static uint64_t arena[ARQ_NETWORK_ARENA_BYTES / 8 + 1] FAST_ALIGNMENT;
#if !defined(ARQ_PORTABLE_ONLY)
static uint64_t prepared[ARQ_NETWORK_PREPARED_BYTES / 8 + 1] FAST_ALIGNMENT;
#endif
static int32_t logits[ARQ_NETWORK_CLASSES];

static void write_number(uint32_t value)
{
    char text[11];
    size_t at = sizeof text - 1;
    text[at] = '\0';
    do {
        text[--at] = (char)('0' + value % 10);
        value /= 10;
    } while (value != 0);
    port_write(text + at);
}

static void write_signed(int32_t value)
{
    if (value < 0) {
        port_write("-");
    }
    write_number(value < 0 ? 0u - (uint32_t)value : (uint32_t)value);
}

static int failed(const char *what, arq_status status)
{
    port_write("FAILED: ");
    port_write(what);
    port_write(": ");
    port_write(arq_status_text(status));
    port_write("\n");
    return 1;
}

static arq_status isa_of(const char *name, arq_isa *isa)
{
    static const arq_isa known[] = {ARQ_ISA_AUTO, ARQ_ISA_PORTABLE, ARQ_ISA_AVX2, ARQ_ISA_AVX512, ARQ_ISA_NEON};
    for (size_t i = 0; i < sizeof known / sizeof known[0]; i++) {
        if (strcmp(name, arq_isa_name(known[i])) == 0) {
            *isa = known[i];
            return ARQ_OK;
        }
    }
    return ARQ_ERROR_ARGUMENT;
}

/* Weights in the layout of the fast kernels; without this the portable kernels run. */
static arq_status prepare(arq_model *model, arq_isa isa)
{
#if defined(ARQ_PORTABLE_ONLY)
    return arq_prepare(model, isa == ARQ_ISA_AUTO ? ARQ_ISA_PORTABLE : isa, NULL, 0);
#else
    return arq_prepare(model, isa, prepared, sizeof prepared);
#endif
}

/* Returns how many of the test images have a logit that is not the expected one, -1 after an error. */
static int run_vectors(const arq_model *model)
{
    int wrong = 0;
    for (uint32_t image = 0; image < ARQ_TEST_IMAGES; image++) {
        const arq_status status = arq_run(model, arq_test_pixels[image], ARQ_NETWORK_PIXELS, logits,
                                          ARQ_NETWORK_CLASSES, arena, sizeof arena);
        if (status != ARQ_OK) {
            (void)failed("arq_run", status);
            return -1;
        }
        const int equal = memcmp(logits, arq_test_logits[image], sizeof logits) == 0;
        wrong += !equal;
        port_write("image ");
        write_number(image);
        port_write(": class ");
        write_number(arq_first_maximum(logits, ARQ_NETWORK_CLASSES));
        port_write(equal ? ", equal, logits" : ", DIFFERENT, logits");
        for (uint32_t i = 0; i < ARQ_NETWORK_CLASSES; i++) {
            port_write(" ");
            write_signed(logits[i]);
        }
        port_write("\n");
    }
    return wrong;
}

#if ARQ_NETWORK_SMOOTHING
static int16_t noisy[ARQ_NETWORK_PIXELS];
static uint32_t votes[ARQ_NETWORK_CLASSES];

static void write_class(const char *label, uint32_t class_index)
{
    port_write(label);
    if (class_index == ARQ_ABSTAIN) {
        port_write("abstains");
    } else {
        write_number(class_index);
    }
}

static void write_end(int equal)
{
    port_write(equal ? ", equal\n" : ", DIFFERENT\n");
}

/* Returns how many of prediction and certificate differ, -1 after an error. */
static int run_smoothed(const arq_model *model)
{
    const arq_workspace work = {noisy, ARQ_NETWORK_PIXELS, logits, ARQ_NETWORK_CLASSES, arena, sizeof arena};
    uint32_t predicted = ARQ_ABSTAIN;
    arq_certificate found;
    arq_status status = arq_predict_smoothed(model, &arq_network_noise, &arq_test_predictor, arq_test_image_id,
                                             arq_test_image, votes, ARQ_NETWORK_CLASSES, &predicted, &work);
    if (status != ARQ_OK) {
        (void)failed("arq_predict_smoothed", status);
        return -1;
    }
    int equal = predicted == arq_test_predicted && memcmp(votes, arq_test_predict_votes, sizeof votes) == 0;
    int wrong = !equal;
    port_write("prediction from ");
    write_number(arq_test_predictor.n);
    write_class(" samples: ", predicted);
    write_end(equal);
    status = arq_certify(model, &arq_network_noise, &arq_test_certifier, arq_test_image_id, arq_test_image, votes,
                         ARQ_NETWORK_CLASSES, &found, &work);
    if (status != ARQ_OK) {
        (void)failed("arq_certify", status);
        return -1;
    }
    equal = found.predicted == arq_test_certificate.predicted && found.selected == arq_test_certificate.selected &&
            found.votes == arq_test_certificate.votes && found.radius_micro == arq_test_certificate.radius_micro &&
            memcmp(votes, arq_test_certify_votes, sizeof votes) == 0;
    wrong += !equal;
    write_class("certificate: ", found.predicted);
    port_write(", votes ");
    write_number(found.votes);
    port_write(" of ");
    write_number(arq_test_certifier.n);
    port_write(", radius ");
    write_number(found.radius_micro);
    port_write(" millionths");
    write_end(equal);
    return wrong;
}
#endif

int main(int argc, char **argv)
{
    arq_model model;
    arq_isa isa = ARQ_ISA_AUTO;
    arq_status status = argc > 1 ? isa_of(argv[1], &isa) : ARQ_OK;
    if (status != ARQ_OK) {
        return failed("instruction set (auto, portable, avx2, avx512, neon)", status);
    }
    status = arq_open(&model, arq_network_words, ARQ_NETWORK_WORDS);
    if (status != ARQ_OK) {
        return failed("arq_open", status);
    }
    if (model.arena_bytes != ARQ_NETWORK_ARENA_BYTES || model.classes != ARQ_NETWORK_CLASSES) {
        return failed("model.h", ARQ_ERROR_MODEL);
    }
    status = prepare(&model, isa);
    if (status != ARQ_OK) {
        return failed("arq_prepare", status);
    }
    port_write("kernels: ");
    port_write(arq_isa_name(model.isa));
    port_write("\n");
    int wrong = run_vectors(&model);
#if ARQ_NETWORK_SMOOTHING
    if (wrong >= 0) {
        const int more = run_smoothed(&model);
        wrong = more < 0 ? more : wrong + more;
    }
#endif
    port_write(wrong == 0 ? "ALL EQUAL\n" : "NOT EQUAL\n");
    return wrong != 0;
}
