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

int rac_shaped(const rac_code *t, int no512, const rac_shape *shape, const float *x, int64_t lane, const float *rate, const uint8_t *row, int most, float far,
               int16_t *out, float *value);
#endif
