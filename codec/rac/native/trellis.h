/* The trellis that trellis.c and shape.c search. */
#ifndef RAC_TRELLIS_H
#define RAC_TRELLIS_H
#include "kernels.h"

typedef struct { int states, h0, h1; } rac_code;

static inline int pred(const rac_code *t, int to, int b) { /* the state that a branch of parity b to `to` comes from */
    const int half = t->states / 2;
    return to < half ? 2 * (to ^ (b ? t->h1 : 0)) : 2 * ((to - half) ^ (t->h0 & (half - 1)) ^ (b ? t->h1 : 0)) + 1;
}

/* What one row's error does to the rows behind it, and how far a survivor feeds its own */
typedef struct {
    const float *feed; /* (m / n, n, n), [i, k], k < i: weight of the error of row k in the target of row i of a block of n rows */
    const float *back; /* its transposes */
    int64_t m, n;
    int64_t lag; /* 1..7 blocks of 16 rows */
} rac_shape;

/* What the words of a tensor stand for (stages/trellis.md): the same for all of its tiles */
typedef struct {
    const float *rec;     /* magnitude of each word, 256 */
    int32_t h0, h1, zero; /* the word that stands for 0 */
    int32_t even;         /* whether rec goes in equal steps, without corrections */
    int32_t size;         /* of an element of the tile: 4 float32, 2 BF16 */
} rac_dequant;

void rac_untrellis(const uint8_t *words, int64_t h, int64_t w, const rac_dequant *q, const float *col, const float *row, void *dst,
                   int64_t stride, uint16_t *states);
int rac_shaped(const rac_code *t, int no512, const rac_shape *shape, const float *x, int64_t lane, const float *rate, const uint8_t *row, int most, float far,
               int16_t *out, float *value);
#endif
