/* Logits of images in a file, for comparing this build with another implementation. A tool for hosts, no part of the
 * library: it uses files and takes its memory from malloc.
 *
 *   check ISA PIXELS LOGITS
 *
 * ISA is auto, portable, avx2, avx512 or neon; PIXELS holds int16 images (height, width, channels), LOGITS receives
 * int32 (classes) of each, both in this machine's byte order. Exit status 3: the instruction set is not supported. */
#include "arq.h"
#include "model.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { EXIT_USAGE = 2, EXIT_UNSUPPORTED = 3 };

static uint64_t arena[ARQ_NETWORK_ARENA_BYTES / 8 + 1];
static int16_t pixels[ARQ_NETWORK_PIXELS];
static int32_t logits[ARQ_NETWORK_CLASSES];

static int failed(const char *what, arq_status status)
{
    fprintf(stderr, "%s: %s\n", what, arq_status_text(status));
    return status == ARQ_ERROR_UNSUPPORTED ? EXIT_UNSUPPORTED : EXIT_FAILURE;
}

static int isa_of(const char *name, arq_isa *isa)
{
    static const arq_isa known[] = {ARQ_ISA_AUTO, ARQ_ISA_PORTABLE, ARQ_ISA_AVX2, ARQ_ISA_AVX512, ARQ_ISA_NEON};
    for (size_t i = 0; i < sizeof known / sizeof known[0]; i++) {
        if (strcmp(name, arq_isa_name(known[i])) == 0) {
            *isa = known[i];
            return 1;
        }
    }
    return 0;
}

static int run(const arq_model *model, FILE *in, FILE *out)
{
    size_t count;
    while ((count = fread(pixels, sizeof pixels[0], ARQ_NETWORK_PIXELS, in)) > 0) {
        const arq_status status = arq_run(model, pixels, count, logits, ARQ_NETWORK_CLASSES, arena, sizeof arena);
        if (status != ARQ_OK) {
            return failed("arq_run", status);
        }
        if (fwrite(logits, sizeof logits, 1, out) != 1) {
            perror("writing logits");
            return EXIT_FAILURE;
        }
    }
    return EXIT_SUCCESS;
}

int main(int argc, char **argv)
{
    arq_model model;
    arq_isa isa = ARQ_ISA_AUTO;
    if (argc != 4 || !isa_of(argv[1], &isa)) {
        fprintf(stderr, "usage: check auto|portable|avx2|avx512|neon PIXELS LOGITS\n");
        return EXIT_USAGE;
    }
    if (!arq_isa_supported(isa)) {
        return failed(argv[1], ARQ_ERROR_UNSUPPORTED);
    }
    arq_status status = arq_open(&model, arq_network_words, ARQ_NETWORK_WORDS);
    if (status != ARQ_OK) {
        return failed("arq_open", status);
    }
    const size_t bytes = arq_prepared_bytes(&model, isa);
    void *prepared = bytes ? malloc(bytes) : NULL;
    status = arq_prepare(&model, isa, prepared, bytes);
    int result = EXIT_FAILURE;
    if (status != ARQ_OK) {
        result = failed("arq_prepare", status);
    } else {
        FILE *in = fopen(argv[2], "rb");
        FILE *out = in ? fopen(argv[3], "wb") : NULL;
        if (out) {
            result = run(&model, in, out);
        } else {
            perror(in ? argv[3] : argv[2]);
        }
        if (out && fclose(out) != 0) {
            perror(argv[3]);
            result = EXIT_FAILURE;
        }
        if (in) {
            (void)fclose(in);
        }
    }
    free(prepared);
    return result;
}
