/* The blob: one network as little more than its integers, in 32-bit words (so byte order does not matter).
 *
 * Written by arqsearch/integer/native/blob.py, read by arq_model.c. Offsets ("@x") count words from the start of the
 * blob; 0 means "absent". Signed fields are two's complement. 64-bit constants are two words, low word first.
 *
 * header (ARQ_HEADER_WORDS words)
 *   0 magic   1 format version   2 words in all   3 checksum: CRC-32 (IEEE, as zlib's) of all words after this one,
 *   each as four little-endian bytes   4 arithmetic version   5..12 program hash, big-endian bytes of SHA-256
 *   13 height 14 width 15 channels 16 pixel lo 17 pixel hi   18 classes   19 tensors 20 @tensors
 *   21 steps 22 @steps   23 arena bytes   24 output tensor
 *
 * tensor (ARQ_TENSOR_WORDS words): storage, zero, height, width, channels, arena offset in bytes (multiple of 64).
 *   Elements are NHWC, contiguous. value = stored + zero; zero is 0 unless the storage is U8. A vector has height =
 *   width = 1. Tensor 0 is the input image: storage I16, zero 0, no place in the arena.
 *   Tensors share memory in three ways: their lives do not overlap; one is another's flat view (the same offset and
 *   storage, written by no step); or a step that goes element by element writes over an operand with elements of the
 *   same size (RESCALE, ADD, COPY, and CONV over its residual, never over its input).
 *
 * rescale ("@r", in the constants): n, rounding, lo, hi, fast, M[n], k[n], and if fast is 1: a_lo[n], a_hi[n], m[n],
 *   c[n], s[n]; n is 1 or the number of channels.
 *   y = clip(round(x * M / 2^k), lo, hi) in 64 bits, x the value (zero added). Proven by the writer to equal, if
 *   fast, clip((clip(x, a_lo, a_hi) * m + c) >> s, lo, hi) in 32 bits with a flooring shift, without overflow, for
 *   every x that can occur; 0 <= s <= 31, m >= 0. Where possible a_lo..a_hi covers even what codes 0..255 of the input
 *   could give, so that kernels can do without the first clip, and m fits int16. An operand of a sum is clipped to what
 *   the clip of the sum lets through, so lo and hi may be tighter than the program's.
 *
 * steps, one after the other: kind, words of this step (these two included), then the fields below. A step writes
 *   beside what it reads and its scratch memory; RESCALE, ADD, COPY and the residual of a convolution may also lie
 *   exactly in the output's place, with elements of the same size.
 *
 * Limits: 2^28 elements of a tensor; 65535 for kernels, strides and paddings; 2^32 - 64 bits for the weights of a
 *   layer; zero points within +-2^24 for sums over stored codes.
 */
#ifndef ARQ_BLOB_H
#define ARQ_BLOB_H

#define ARQ_MAGIC 0x31515241u /* "ARQ1" */
#define ARQ_FORMAT_VERSION 1u
#define ARQ_ARITHMETIC_VERSION 1u
#define ARQ_HEADER_WORDS 25u
#define ARQ_TENSOR_WORDS 6u
#define ARQ_NO_TENSOR 0xFFFFFFFFu

enum { ARQ_STORE_U8 = 0, ARQ_STORE_I16 = 1, ARQ_STORE_I32 = 2 };
enum { ARQ_HALF_UP = 0, ARQ_HALF_EVEN = 1, ARQ_FLOOR = 2 };

enum {
    /* in, out, n, shift, rounding, pre_lo, pre_hi, lo, hi, @constants: M[n] then B[n], 64-bit; n is 1 or channels.
     * y = clip(round((clip(x, pre_lo, pre_hi) * M + B) / 2^shift), lo, hi) */
    ARQ_STEP_INPUT = 1,
    /* Convolution, depthwise convolution (groups = channels in = channels out) and linear layer (an input of any
     * shape read as 1 x 1 x count: field `flat` = 1, kernel 1 x 1), with everything around it:
     *   0 in, 1 out, 2 flat, 3 kernel h, 4 w, 5 stride h, 6 w, 7 pad top, 8 bottom, 9 left, 10 right, 11 groups,
     *   12 weight bits (2..8 or 16), 13 @weights, 14 @bias (int32 for each output channel),
     *   15 @r of the input or 0, 16 zero of the rescaled input, 17 largest stored code that the (rescaled) input can
     *   hold, 18 @r of the accumulator or 0, 19 residual tensor or ARQ_NO_TENSOR, 20 @r of the residual or 0,
     *   21 lo, 22 hi of the sum, 23 sum class, 24 depth, 25 scratch offset, 26 scratch bytes
     * x = in, rescaled if 15 (the result is then held as U8 with the zero of 16; otherwise 16 is the zero of in);
     * a = bias + sum of w * x in int32, padded positions hold the value 0;
     * y = a rescaled if 18; with a residual: y = clip(y + residual (rescaled if 20), lo, hi); out = y.
     * Weights: (out channels, kernel h, kernel w, in channels / groups), two's complement codes of `weight bits` bits,
     * packed without gaps, the first code in the lowest bits of the first word (a code may span two words).
     * Scratch, up64 rounding up to a multiple of 64, H x W x C the input as it is read (flat: 1 x 1 x count):
     *   a copy of the input, if there is an input rescale, or the class is not ARQ_SUM_ANY and C is no multiple of 4 or
     *   anything is padded: up64((H + top + bottom) * (W + left + right) * (C rounded up to a multiple of 4) + 64), but
     *   up64(H * W * C) for ARQ_SUM_ANY; then four rows of weights as int16:
     *   up64(8 * kernel h * kernel w * channels in / groups).
     * Field 17 counts the code of value 0 where it is larger; it is 0 for an input that is not U8. */
    ARQ_STEP_CONV = 2,
    ARQ_STEP_RESCALE = 3,  /* in, out, @r */
    ARQ_STEP_ADD = 4,      /* a, b, out, @r of a or 0, @r of b or 0, lo, hi: clip(a + b, lo, hi) */
    ARQ_STEP_SUMPOOL = 5,  /* in, out, kernel h, w, stride h, w, pad top, bottom, left, right; padding holds 0 */
    ARQ_STEP_MAXPOOL = 6,  /* the same fields; padding never wins */
    ARQ_STEP_PAD = 7,      /* in, out, top, bottom, left, right, @values (int32 for each channel) */
    ARQ_STEP_CHANNELS = 8, /* in, out, before, after: zero channels (value 0) around */
    ARQ_STEP_SLICE = 9,    /* in, out, rows start, stop, step, columns start, stop, step, channels start, stop, step */
    ARQ_STEP_COPY = 10     /* in, out: same number of elements, in memory order; converts storage */
};

/* Field 23 of a convolution: what is proven of its sums over *stored* codes u (0 .. field 17) of the input. The zero
 * point is moved into the bias: sum w*x + bias = sum w*u + (bias + zero * sum of w), padded positions holding u =
 * -zero. Pairs are neighbours in the order of the prepared weights (channels padded to a multiple of 4: pairs (0,1)
 * and (2,3) of each four; depthwise: taps in raster order, pairs (0,1), (2,3), ..., a missing tap is weight 0). */
enum {
    ARQ_SUM_ANY = 0,   /* nothing: int32 arithmetic on values (any storage, 16-bit weights, other numbers of groups) */
    ARQ_SUM_U8 = 1,    /* input U8, |w| <= 128 (8 bits); every subset of w*u with the moved bias fits int32 */
    ARQ_SUM_PAIRS = 2, /* and every pair fits int16, so does every sum of `depth` consecutive pairs of a lane */
    ARQ_SUM_INT16 = 3  /* and so does every subset of all terms (without bias): no widening before the end */
};

#endif
