/* Sums of tiles of 8 pixels by 16 to 48 output channels, with vpdpbusd. Internal to the AVX-512 kernels.
 *
 * vpdpbusd adds four products u8 * s8 to an int32 without saturation, so it is exact for every class of sums. Four
 * neighbouring bytes of a pixel are broadcast and meet one vector of weights for each block of 16 channels; the sums
 * stay in registers. Two multiplications and two loads can start in a cycle, so a tile of P pixels by C blocks is
 * bound by multiplications where P + C loads are fewer than P * C.
 */
#ifndef ARQ_AVX512_TILES_H
#define ARQ_AVX512_TILES_H

#include "arq_avx512_finish.h"

enum { TILE_PIXELS = 8, TILE_BLOCKS = 3 };

/* What all tiles of a convolution share. */
typedef struct reach {
    size_t rows, row_steps; /* of the window: rows, and steps of 4 bytes in each */
    size_t row_bytes;       /* from row to row of the window */
    const unsigned char *weights;
    size_t block_bytes;     /* weights of a block */
    __mmask16 last;         /* lanes of the last block of the tile: 8 or 16 */
    size_t last_step;       /* bytes of a step in it */
} reach;

/* sums[block * TILE_PIXELS + pixel] */
enum { TILE_SUMS = TILE_BLOCKS * TILE_PIXELS };

ARQ_AVX512_INLINE __m512i four_bytes(const unsigned char *at)
{
    int32_t four;
    memcpy(&four, at, sizeof four);
    return _mm512_set1_epi32(four);
}

/* Window p starts at in[p]; the windows may lie anywhere. */
ARQ_AVX512_INLINE void sum_tile(const reach *r, const unsigned char **in, __m512i *sums,
                                const int pixels, const int blocks)
{
    const size_t block_bytes = r->block_bytes, last_step = r->last_step, row_steps = r->row_steps;
    const unsigned char *weights = r->weights, *last = weights + (size_t)(blocks - 1) * block_bytes;
    const __mmask16 mask = r->last;
    __m512i acc[TILE_BLOCKS][TILE_PIXELS];
    ARQ_UNROLL
    for (int b = 0; b < blocks; b++) {
        ARQ_UNROLL
        for (int p = 0; p < pixels; p++) {
            acc[b][p] = _mm512_setzero_si512();
        }
    }
    for (size_t y = 0, start = 0; y < r->rows; y++, start += r->row_bytes) {
        for (size_t at = start; at < start + 4 * row_steps; at += 4) {
            __m512i w[TILE_BLOCKS];
            ARQ_UNROLL
            for (int b = 0; b < blocks - 1; b++) {
                w[b] = _mm512_loadu_si512(weights + (size_t)b * block_bytes);
            }
            w[blocks - 1] = _mm512_maskz_loadu_epi32(mask, last);
            ARQ_UNROLL
            for (int p = 0; p < pixels; p++) {
                const __m512i four = four_bytes(in[p] + at);
                ARQ_UNROLL
                for (int b = 0; b < blocks; b++) {
                    acc[b][p] = _mm512_dpbusd_epi32(acc[b][p], four, w[b]);
                }
            }
            weights += 64;
            last += last_step;
        }
    }
    ARQ_UNROLL
    for (int b = 0; b < blocks; b++) {
        ARQ_UNROLL
        for (int p = 0; p < pixels; p++) {
            sums[b * TILE_PIXELS + p] = acc[b][p];
        }
    }
}

/* The same for one block, windows of 3 columns and `pixels` (8 or 16) neighbouring pixels `pixel_bytes` apart: every
 * column is loaded once for the three windows that it belongs to, as loads are what binds tiles of one block. */
ARQ_AVX512_INLINE void sum_shared(const reach *r, const unsigned char *in, const size_t pixel_bytes, __m512i *sums,
                                  const int pixels)
{
    const size_t column = 16 * pixel_bytes; /* weights of a kernel column: 64 bytes for each step of 4 */
    const unsigned char *weights = r->weights;
    __m512i acc[2 * TILE_PIXELS];
    ARQ_UNROLL
    for (int p = 0; p < pixels; p++) {
        acc[p] = _mm512_setzero_si512();
    }
    for (size_t y = 0; y < r->rows; y++, in += r->row_bytes, weights += 2 * column) {
        for (size_t at = 0; at < pixel_bytes; at += 4, weights += 64) {
            const __m512i w[3] = {_mm512_loadu_si512(weights), _mm512_loadu_si512(weights + column),
                                  _mm512_loadu_si512(weights + 2 * column)};
            ARQ_UNROLL
            for (int x = 0; x < pixels + 2; x++) {
                const __m512i four = four_bytes(in + at + (size_t)x * pixel_bytes);
                ARQ_UNROLL
                for (int k = 2; k >= 0; k--) {
                    if (x - k >= 0 && x - k < pixels) {
                        acc[x - k] = _mm512_dpbusd_epi32(acc[x - k], four, w[k]);
                    }
                }
            }
        }
    }
    ARQ_UNROLL
    for (int p = 0; p < pixels; p++) {
        sums[p] = acc[p];
    }
}

#endif
