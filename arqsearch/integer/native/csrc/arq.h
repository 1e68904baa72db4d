/* arqsearch integer networks in C99: open, prepare, run. No allocation, no floating point, no libm.
 *
 * A network is an array of 32-bit words (the "blob", see arq_blob.h). All memory is the caller's:
 *
 *   arq_model model;
 *   arq_open(&model, blob, blob_words);                            checks everything that will be used
 *   arq_prepare(&model, ARQ_ISA_AUTO, prepared, prepared_bytes);   optional: weights in the layout of fast kernels
 *   arq_run(&model, pixels, pixel_count, logits, logit_count, arena, arena_bytes);
 *
 * After arq_open the model is only read: threads may share it, each with an arena of its own.
 * Without arq_prepare the portable kernels unpack the weights as they go, in the arena.
 */
#ifndef ARQ_H
#define ARQ_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

typedef enum arq_status {
    ARQ_OK = 0,
    ARQ_ERROR_NULL = 1,        /* a pointer is null */
    ARQ_ERROR_SIZE = 2,        /* a buffer or count does not fit the model */
    ARQ_ERROR_ALIGNMENT = 3,   /* arena or prepared memory is not aligned to 8 bytes, or an array not to its elements */
    ARQ_ERROR_MODEL = 4,       /* the blob is no model, damaged, or of another format or arithmetic version */
    ARQ_ERROR_RANGE = 5,       /* a pixel (or noise) leaves the range that the proofs cover */
    ARQ_ERROR_UNSUPPORTED = 6, /* this processor or build lacks the instruction set that was asked for */
    ARQ_ERROR_ARGUMENT = 7     /* any other argument is out of its stated range */
} arq_status;

/* A sentence for people; never null. */
const char *arq_status_text(arq_status status);

typedef enum arq_isa {
    ARQ_ISA_AUTO = 0,     /* the fastest that this processor runs */
    ARQ_ISA_PORTABLE = 1,
    ARQ_ISA_AVX2 = 2,
    ARQ_ISA_AVX512 = 3,   /* AVX-512 BW/VL with VNNI */
    ARQ_ISA_NEON = 4
} arq_isa;

/* Whether this build and processor run `isa` (AUTO and PORTABLE: always 1). */
int arq_isa_supported(arq_isa isa);
const char *arq_isa_name(arq_isa isa);

/* Read-only view of an opened blob; its fields are filled by arq_open and arq_prepare. */
typedef struct arq_model {
    const uint32_t *words;
    uint32_t word_count;
    uint32_t height, width, channels; /* of the input image */
    int32_t pixel_lo, pixel_hi;       /* inclusive range of pixel values that the proofs cover */
    uint32_t classes;
    uint32_t arena_bytes;             /* what arq_run needs */
    const unsigned char *prepared;    /* weights in the layout of the kernels of `isa`; null: none */
    arq_isa isa;                      /* ARQ_ISA_PORTABLE until arq_prepare chose another */
} arq_model;

/* Check the blob (magic, versions, checksum, every offset, shape and size) and describe it in *model, which is cleared
 * on failure. The blob is not copied and must stay. `word_count` must be that of the blob exactly. */
arq_status arq_open(arq_model *model, const uint32_t *words, size_t word_count);

/* SHA-256 of the integer program, 32 bytes. */
arq_status arq_program_hash(const arq_model *model, unsigned char hash[32]);

/* Bytes that arq_prepare needs for `isa` (AUTO: the one it would choose); 0 for ARQ_ISA_PORTABLE, and where arq_prepare
 * would fail. */
size_t arq_prepared_bytes(const arq_model *model, arq_isa isa);

/* Expand the weights once into `memory`, which must stay and whose alignment must be 8 bytes (64 is faster). `memory`
 * may be null where arq_prepared_bytes is 0. On failure the model is as it was. */
arq_status arq_prepare(arq_model *model, arq_isa isa, void *memory, size_t bytes);

/* Logits of one image: int16 pixels (height, width, channels), int32 logits (classes).
 * pixel_count and logit_count are numbers of elements and must fit exactly; the arena, aligned to 8 bytes, may be
 * larger than needed, and its content does not matter. */
arq_status arq_run(const arq_model *model, const int16_t *pixels, size_t pixel_count, int32_t *logits,
                   size_t logit_count, void *arena, size_t arena_bytes);

/* The predicted class: the first maximum. `count` is at least 1. */
uint32_t arq_first_maximum(const int32_t *logits, size_t count);

#ifdef __cplusplus
}
#endif

#endif
