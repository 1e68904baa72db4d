/* Runs blobs from files, and damages them, under a sanitiser; driven by the tests beside it.
 *
 *   harness isas                            the instruction sets that this build and processor run, by number
 *   harness run ISA BLOB PIXELS LOGITS      int16 images one after the other -> int32 logits
 *   harness batch FILE                      the same for every line "ISA BLOB PIXELS LOGITS" of a file
 *   harness damage BLOB                     every single-word damage and every truncation must be refused
 *   harness fuzz BLOB SEED COUNT            wrong fields with a right checksum: refused or run, never a crash
 *
 * Buffers have exactly the size that is promised, so that a sanitiser sees every access beyond them.
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "arq.h"

#define FUZZ_ARENA (1u << 18)
#define FUZZ_PIXELS (1u << 16)

static void die(const char *message)
{
    fprintf(stderr, "harness: %s\n", message);
    exit(2);
}

static void *allocate(size_t bytes)
{
    void *memory = malloc(bytes > 0 ? bytes : 1);
    if (memory == NULL) {
        die("out of memory");
    }
    return memory;
}

static void *read_file(const char *path, size_t *bytes)
{
    FILE *file = fopen(path, "rb");
    if (file == NULL || fseek(file, 0, SEEK_END) != 0) {
        die("a file cannot be read");
    }
    const long size = ftell(file);
    rewind(file);
    *bytes = (size_t)size;
    void *memory = allocate(*bytes);
    if (fread(memory, 1, *bytes, file) != *bytes || fclose(file) != 0) {
        die("a file cannot be read");
    }
    return memory;
}

static uint64_t next_random(uint64_t *state)
{
    *state ^= *state << 13;
    *state ^= *state >> 7;
    *state ^= *state << 17;
    return *state;
}

/* Prepares for `isa`; the memory that was needed, to be freed, or null with a status. */
static void *prepare(arq_model *model, arq_isa isa, arq_status *status)
{
    const size_t bytes = arq_prepared_bytes(model, isa);
    void *memory = bytes > 0 ? allocate(bytes) : NULL;
    *status = arq_prepare(model, isa, memory, bytes);
    return memory;
}

static int run_images(arq_isa isa, const char *blob_path, const char *pixels_path, const char *logits_path)
{
    size_t blob_bytes, pixel_bytes;
    uint32_t *words = read_file(blob_path, &blob_bytes);
    int16_t *pixels = read_file(pixels_path, &pixel_bytes);
    arq_model model;
    arq_status status = arq_open(&model, words, blob_bytes / 4);
    if (status != ARQ_OK) {
        fprintf(stderr, "open: %s\n", arq_status_text(status));
        return 10 + (int)status;
    }
    void *prepared = prepare(&model, isa, &status);
    if (status != ARQ_OK) {
        fprintf(stderr, "prepare: %s\n", arq_status_text(status));
        return 20 + (int)status;
    }
    const size_t count = (size_t)model.height * model.width * model.channels;
    int16_t *image = allocate(2 * count);
    int32_t *logits = allocate(4 * (size_t)model.classes);
    unsigned char *arena = allocate(model.arena_bytes);
    FILE *file = fopen(logits_path, "wb");
    if (file == NULL) {
        die("the logits cannot be written");
    }
    for (size_t i = 0; i + count <= pixel_bytes / 2; i += count) {
        memcpy(image, pixels + i, 2 * count);
        memset(arena, (int)(i * 37 + 0xA5) & 0xFF, model.arena_bytes);
        status = arq_run(&model, image, count, logits, model.classes, arena, model.arena_bytes);
        if (status != ARQ_OK) {
            fprintf(stderr, "run: %s\n", arq_status_text(status));
            return 30 + (int)status;
        }
        if (fwrite(logits, 4, model.classes, file) != model.classes) {
            die("the logits cannot be written");
        }
    }
    if (fclose(file) != 0) {
        die("the logits cannot be written");
    }
    free(arena);
    free(logits);
    free(image);
    free(prepared);
    free(pixels);
    free(words);
    return 0;
}

static int run_batch(const char *list_path)
{
    char blob[512], pixels[512], logits[512];
    int isa, status = 0;
    FILE *list = fopen(list_path, "r");
    if (list == NULL) {
        die("the list cannot be read");
    }
    while (status == 0 && fscanf(list, "%d %511s %511s %511s", &isa, blob, pixels, logits) == 4) {
        status = run_images((arq_isa)isa, blob, pixels, logits);
        if (status != 0) {
            fprintf(stderr, "in %s, instruction set %s\n", blob, arq_isa_name((arq_isa)isa));
        }
    }
    fclose(list);
    return status;
}

static int damage(const char *blob_path)
{
    size_t bytes;
    uint32_t *words = read_file(blob_path, &bytes);
    const size_t count = bytes / 4;
    unsigned long tried = 0;
    arq_model model;
    if (arq_open(&model, words, count) != ARQ_OK) {
        die("the undamaged blob is refused");
    }
    for (size_t i = 0; i < count; i++) {
        const uint32_t good = words[i];
        const uint32_t others[] = {~good, good + 1, good - 1, good << 1 | good >> 31, good ^ 0xDEADBEEFu, 0};
        for (size_t bit = 0; bit < 32 + sizeof others / sizeof others[0]; bit++) {
            words[i] = bit < 32 ? good ^ (uint32_t)1 << bit : others[bit - 32];
            if (words[i] == good) {
                continue;
            }
            tried++;
            if (arq_open(&model, words, count) != ARQ_ERROR_MODEL || model.words != NULL) {
                printf("word %lu: %lx as %lx is accepted\n", (unsigned long)i, (unsigned long)good,
                       (unsigned long)words[i]);
                return 1;
            }
        }
        words[i] = good;
    }
    for (size_t shorter = 0; shorter < count; shorter++) {
        uint32_t *part = allocate(4 * shorter);
        memcpy(part, words, 4 * shorter);
        tried++;
        if (arq_open(&model, part, shorter) != ARQ_ERROR_MODEL) {
            printf("%lu of %lu words are accepted\n", (unsigned long)shorter, (unsigned long)count);
            return 1;
        }
        free(part);
    }
    printf("%lu refused\n", tried);
    free(words);
    return 0;
}

/* The checksum of arq_blob.h, bit by bit. */
static uint32_t crc32(const uint32_t *words, size_t count)
{
    uint32_t crc = 0xFFFFFFFFu;
    for (size_t i = 0; i < count; i++) {
        for (int byte = 0; byte < 4; byte++) {
            crc ^= words[i] >> (8 * byte) & 0xFFu;
            for (int bit = 0; bit < 8; bit++) {
                crc = (crc & 1u) != 0 ? crc >> 1 ^ 0xEDB88320u : crc >> 1;
            }
        }
    }
    return ~crc;
}

static uint32_t mutated(const uint32_t *words, size_t count, uint32_t old, uint64_t *state)
{
    static const uint32_t special[] = {0,  1,  2,   3,   4,     5,     7,          8,          16,         31,
                                       32, 62, 63,  64,  65,    128,   255,        256,        65535,      65536,
                                       1u << 20, 1u << 28, 0x7FFFFFFFu, 0x80000000u, 0xFFFFFFFFu, 0xFFFFFF80u};
    const uint64_t r = next_random(state);
    switch (r % 6) {
    case 0:
        return old ^ (uint32_t)1 << (r >> 8) % 32;
    case 1:
        return special[(r >> 8) % (sizeof special / sizeof special[0])];
    case 2:
        return old + (uint32_t)((r >> 8) % 9) - 4;
    case 3:
        return words[(r >> 8) % count];
    case 4:
        return old + 64 * ((uint32_t)((r >> 8) % 9) - 4);
    default:
        return (uint32_t)(r >> 20);
    }
}

/* Runs whatever was accepted on every instruction set; buffers of unreasonable size are left alone. */
static unsigned run_accepted(arq_model *model, uint64_t *state)
{
    const size_t count = (size_t)model->height * model->width * model->channels;
    if (model->arena_bytes > FUZZ_ARENA || count > FUZZ_PIXELS || model->classes > FUZZ_PIXELS) {
        return 0;
    }
    int16_t *pixels = allocate(2 * count);
    int32_t *logits = allocate(4 * (size_t)model->classes);
    unsigned char *arena = allocate(model->arena_bytes);
    const uint64_t span = (uint64_t)(model->pixel_hi - model->pixel_lo) + 1;
    for (size_t i = 0; i < count; i++) {
        pixels[i] = (int16_t)(model->pixel_lo + (int32_t)(next_random(state) % span));
    }
    for (int isa = ARQ_ISA_PORTABLE; isa <= ARQ_ISA_NEON; isa++) {
        arq_status status;
        if (!arq_isa_supported((arq_isa)isa)) {
            continue;
        }
        void *prepared = prepare(model, (arq_isa)isa, &status);
        if (status != ARQ_OK) {
            die("an accepted blob cannot be prepared");
        }
        memset(arena, isa * 77, model->arena_bytes);
        if (arq_run(model, pixels, count, logits, model->classes, arena, model->arena_bytes) != ARQ_OK) {
            die("an accepted blob cannot be run");
        }
        free(prepared);
    }
    free(arena);
    free(logits);
    free(pixels);
    return 1;
}

static int fuzz(const char *blob_path, uint64_t seed, unsigned long rounds)
{
    size_t bytes;
    const uint32_t *good = read_file(blob_path, &bytes);
    const size_t count = bytes / 4;
    uint32_t *words = allocate(bytes);
    uint64_t state = seed * 0x9E3779B97F4A7C15u + 1;
    unsigned long accepted = 0, ran = 0;
    for (unsigned long round = 0; round < rounds; round++) {
        arq_model model;
        memcpy(words, good, bytes);
        for (uint64_t changes = 1 + next_random(&state) % 3; changes > 0; changes--) {
            /* Mostly what decides where memory is accessed: everything but the header's first words. */
            const size_t i = 5 + (size_t)(next_random(&state) % (count - 5));
            words[i] = mutated(good, count, words[i], &state);
        }
        words[3] = crc32(words + 4, count - 4);
        if (arq_open(&model, words, count) == ARQ_OK) {
            accepted++;
            ran += run_accepted(&model, &state);
        }
    }
    printf("%lu refused %lu ran\n", rounds - accepted, ran);
    free(words);
    free((void *)(uintptr_t)good);
    return 0;
}

int main(int argc, char **argv)
{
    if (argc == 2 && strcmp(argv[1], "isas") == 0) {
        for (int isa = ARQ_ISA_PORTABLE; isa <= ARQ_ISA_NEON; isa++) {
            if (arq_isa_supported((arq_isa)isa)) {
                printf("%d ", isa);
            }
        }
        return 0;
    }
    if (argc == 6 && strcmp(argv[1], "run") == 0) {
        return run_images((arq_isa)atoi(argv[2]), argv[3], argv[4], argv[5]);
    }
    if (argc == 3 && strcmp(argv[1], "batch") == 0) {
        return run_batch(argv[2]);
    }
    if (argc == 3 && strcmp(argv[1], "damage") == 0) {
        return damage(argv[2]);
    }
    if (argc == 5 && strcmp(argv[1], "fuzz") == 0) {
        return fuzz(argv[2], strtoul(argv[3], NULL, 10), strtoul(argv[4], NULL, 10));
    }
    die("isas | run ISA BLOB PIXELS LOGITS | batch FILE | damage BLOB | fuzz BLOB SEED COUNT");
    return 2;
}
