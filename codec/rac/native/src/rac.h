/* What the kernels share. Plain C without the Python headers, loaded through ctypes (native/library.py), which
 * releases the GIL. Every source is compiled once for each instruction set (setup.py); what is written for one alone is
 * under #ifdef AVX512, AVX2 or NEON, of which at most one is defined. Every loop has a numpy or numba twin in the
 * package that the tests hold it to, bit for bit, under each instruction set. */
#pragma once
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#ifdef __AVX512VL__ /* with F, BW and DQ: setup.py asks for all four */
#include <immintrin.h>
#define AVX512 1
#elif defined(__AVX2__) && defined(__BMI2__)
#include <immintrin.h>
#define AVX2 1
#elif defined(__aarch64__) && defined(__ARM_NEON) && !defined(RAC_GENERIC)
#include <arm_neon.h>
#define NEON 1
#endif

#define INLINED __attribute__((always_inline)) static inline /* sizes that are constants at the call become constants */

enum { CHUNK = 1024 }; /* words that are joined or split at once */

/* A matrix with columns side by side, `stride` elements from row to row */
typedef struct { void *at; int64_t rows, cols, stride; } rac_matrix;

/* Rows from r0 below r1, columns from c0 below c1, both sorted by class, that are coded under one table */
typedef struct { int64_t table, r0, r1, c0, c1; } rac_block;

/* Symbols that are coded one after the other under one table */
typedef struct { int64_t symbols, table; } rac_segment;

/* Symbols, sequence order and planes of words of 1, 2, 4 and 8 bytes (word.h) */
typedef void rac_symbols(const void *words, int64_t n, int zero, int sign, int shift, const uint8_t *lut, uint8_t *out);
typedef void rac_gather(const void *tile, int64_t stride, const int32_t *row, const int32_t *col, const rac_block *b,
                        int64_t n, void *out);
typedef void rac_planes(const void *words, int64_t n, int zero, int sign, int shift, uint8_t *out, const int64_t *start);
rac_symbols rac_symbols1, rac_symbols2, rac_symbols4, rac_symbols8;
rac_gather rac_gather1, rac_gather2, rac_gather4, rac_gather8;
rac_planes rac_planes1, rac_planes2, rac_planes4, rac_planes8;

void rac_bytes(const uint8_t *v, int64_t n, uint32_t *hist);
void rac_sum(const uint32_t *hist, const uint8_t *class, int64_t n, int64_t m, int64_t *out);

/* What the words of a tensor stand for (stages/trellis.md): the same for all of its tiles */
typedef struct {
    const float *rec;     /* magnitude of each word, 256 */
    int32_t h0, h1, zero; /* the word that stands for 0 */
    int32_t size;         /* of an element of the tile: 4 float32, 2 BF16 */
} rac_dequant;

void rac_untrellis(const rac_matrix *words, const rac_dequant *q, const float *col, const float *row,
                   const rac_matrix *dst, uint16_t *states);

static inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
static inline int64_t up16(int64_t n) { return (n + 15) & ~(int64_t)15; }

/* Upper half of the bits of a float, rounded to the nearest, ties to even; not for NaN */
static inline uint16_t bf16_of(float v) {
    uint32_t bits;
    memcpy(&bits, &v, 4);
    return (uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}
