/* Trellis-coded quantisation, for the encoder: what search.c, shape.c and quantise.c share. */
#pragma once
#include <math.h>
#include "rac.h"

enum { STATES = 1024 }; /* of a trellis, at most */

/* How the columns of a tensor are quantised (native/trellis.py, Search) */
typedef struct {
    int32_t states, h0, h1;
    int32_t low, levels;         /* deviations that `fine` and `rate` know, in quarter octaves: the lowest, how many */
    int32_t most, tables, lag;   /* the largest integer; classes of rows; blocks that a survivor feeds */
    int64_t lane;                /* rows after which the trellis begins anew */
    const float *rec;            /* magnitudes of -most..most */
    const float *rate;           /* (levels, tables, 2 most + 1) */
    const int8_t *fine;          /* quarter octaves finer than its step that a column is coded; below 0: not at all */
    const uint8_t *row;          /* class of each row, or null: one */
    const float *below, *back;   /* weights of the errors of rows in later rows, and their transposes, or null */
    float far;                   /* units from which on a target is an outlier */
    int32_t sparse;              /* whether numbers that are 0 stay 0; without a trellis only, which has no 0 */
} rac_search;

/* The columns of one block, (cols, rows) column-major, and what becomes of them */
typedef struct {
    int64_t cols, rows, groups;
    const float *plain;
    float *target; /* with the errors of what is behind the block fed back; overwritten by the errors plain - value */
    const float *feed, *step;
    int16_t *out;
    float *recon;
    uint8_t *wild;
    int8_t *fine_of;
} rac_columns;

/* One column: targets in units, costs of the integers of class 0, pointing at that of 0; integers and values of it */
typedef struct {
    int64_t rows, own; /* of the column, of a block of weights of rows */
    const float *x, *rate;
    int16_t *out;
    float *value;
} rac_column;

/* Memory of a search of one column */
typedef struct {
    float *cost;      /* (4, n) */
    int16_t *best;    /* (4, n) */
    uint16_t *choice; /* (lane, max(1, states / 16)) */
} rac_room;

/* Costs of the integers of a row */
static inline const float *rac_rate(const rac_search *s, const rac_column *c, int64_t i) {
    return c->rate + (s->row ? s->row[i] : 0) * (2 * s->most + 1);
}

/* Without a trellis: the integer nearest to x or the next one towards zero, whichever costs less */
static inline int rac_alone(const rac_search *s, const float *rate, float x) {
    const float *v = s->rec + s->most, near = floorf(x + 0.5f);
    const int most = s->most, k = near > (float)most ? most : near < (float)-most ? -most : (int)near;
    const int in = k > 0 ? k - 1 : k < 0 ? k + 1 : 0;
    const float e = x - v[k], f = x - v[in];
    return f * f + rate[in] < e * e + rate[k] ? in : k;
}

/* The state that a branch of parity b to state `to` comes from */
static inline int rac_from(const rac_search *s, int to, int b) {
    const int half = s->states / 2, flip = b ? s->h1 : 0;
    return to < half ? 2 * (to ^ flip) : 2 * ((to - half) ^ (s->h0 & (half - 1)) ^ flip) + 1;
}

void rac_viterbi(const rac_search *s, const rac_column *c, const rac_room *room);
int rac_shaped(const rac_search *s, const rac_column *c);
