/* Trellis search of a column where the error of a row is fed to the targets of the rows behind it: noise shaping,
 * for errors that are correlated through what the outputs do. Every survivor carries what its own errors feed to the
 * next rows (per-survivor processing, Raheli et al. 1995); the errors of rows `lag` blocks back are those of the
 * best path, and survivors of another past end there. Both versions below do the same arithmetic in the same order. */
#include <math.h>
#include "states.h"

enum { MAX = 256, BLOCK = 16, AHEAD = 128, BLOCKS = AHEAD / BLOCK };

/* States by parity, since all predecessors of one half of the states are even, of the other odd */
typedef float half[MAX / 2];
typedef half ring[2];

/* Of each survivor */
typedef struct {
    ring cost;
    ring fed[AHEAD];              /* to the target of a row */
    ring past[BLOCKS];            /* the state at the start of a block */
    ring branch[2], left[2];      /* [parity of the state][of the integer]: cost, error of the row */
    float next[MAX], error[MAX];  /* of the states that follow, in their order */
} survivors;

/* A row: its target without what survivors feed, whether it is an outlier, the costs of its integers -most..most */
typedef struct {
    float x;
    int wild, most;
    const float *rate;
} sample;

#ifndef WIDE
static float dot(const float *a, const float *b, int64_t n) {
    float s[64] = {0};
    for (int64_t i = 0; i < n; i += 64)
        for (int u = 0; u < 64 && i + u < n; u++) s[u] += a[i + u] * b[i + u];
    for (int w = 32; w; w /= 2)
        for (int u = 0; u < w; u++) s[u] += s[u + w];
    return s[0];
}

/* For each of n states of parity g the cheaper of two integers of parity b: its cost and its error */
static void branches(survivors *s, const sample *row, const float *fed, int n, int g, int b, int16_t *out) {
    const float off = 0.5f + 2.0f * (float)b, x = row->x;
    const int most = row->most, wild = row->wild, far = most - ((most & 1) != b);
    for (int u = 0; u < n; u++) {
        const float y = g ? -fed[u] : fed[u];
        const float r = rintf((y - off) * 0.25f);
        int k = r * 2.0f > (float)(far - b) ? far : r * 2.0f < (float)(-far - b) ? -far : 2 * (int)r + b;
        const int in = k > 0 ? k - 2 : k + 2; /* the next one towards zero */
        float v = 2.0f * (float)k + 0.5f;
        const float w = 2.0f * (float)in + 0.5f, e = wild ? 0.0f : y - v, f = wild ? 0.0f : y - w;
        const float c = e * e + row->rate[k], d = f * f + row->rate[in];
        if (d < c) {
            v = w;
            k = in;
        }
        s->branch[g][b][u] = s->cost[g][u] + (d < c ? d : c);
        s->left[g][b][u] = wild ? 0.0f : g ? x + v : x - v;
        out[u] = (int16_t)k;
    }
}

/* Survivors of the next states */
static void merge(const rac_search *t, survivors *s, uint16_t *choice) {
    for (int i = 0; i < t->states / 16; i++) choice[i] = 0;
    for (int q = 0; q < t->states; q++) {
        const int g = q >= t->states / 2, p = rac_from(t, q, 0) >> 1, r = rac_from(t, q, 1) >> 1;
        const int other = s->branch[g][1][r] < s->branch[g][0][p];
        choice[q / 16] |= (uint16_t)(other << (q & 15));
        s->next[q] = other ? s->branch[g][1][r] : s->branch[g][0][p];
        s->error[q] = other ? s->left[g][1][r] : s->left[g][0][p];
    }
    for (int q = 0; q < t->states; q++) s->cost[q & 1][q >> 1] = s->next[q] - s->next[0];
}

/* What survivors own at from..to of a ring goes to those who follow them, plus their last error times the weight
 * there */
static void carry(const rac_search *t, const uint16_t *choice, ring *of, int64_t from, int64_t to, const float *error,
                  const float *weight) {
    for (int64_t i = from; i < to; i++) {
        half *own = of[i % AHEAD];
        float next[MAX];
        for (int q = 0; q < t->states; q++) {
            const int p = rac_from(t, q, choice[q / 16] >> (q & 15) & 1);
            next[q] = own[p & 1][p >> 1];
            if (weight) next[q] += weight[i] * error[q];
        }
        for (int q = 0; q < t->states; q++) own[q & 1][q >> 1] = next[q];
    }
}
/* Survivors of the next states, who take over what is fed to rows from..to, and the past */
static void proceed(const rac_search *t, survivors *s, uint16_t *choice, int64_t from, int64_t to,
                    const float *weight) {
    merge(t, s, choice);
    carry(t, choice, s->fed, from, to, s->error, weight);
    carry(t, choice, s->past, 0, t->lag, NULL, NULL);
}
#else
static float dot(const float *a, const float *b, int64_t n) {
    floats v[64 / LANES] = {{0}};
    float s[64];
    int64_t i = 0;
    for (; i + 64 <= n; i += 64)
        _Pragma("GCC unroll 16") for (int u = 0; u < 64 / LANES; u++) v[u] += at(a + i, u) * at(b + i, u);
    memcpy(s, v, sizeof s);
    for (int u = 0; i + u < n; u++) s[u] += a[i + u] * b[i + u];
    for (int w = 32; w; w /= 2)
        for (int u = 0; u < w; u++) s[u] += s[u + w];
    return s[0];
}

/* For the states of parity g the cheaper of two integers of parity b: its cost and its error */
static void branches(survivors *s, const sample *row, const float *fed, int n, int g, int b, int16_t *out) {
    const int most = row->most, far = most - ((most & 1) != b);
    const float off = 0.5f + 2.0f * (float)b;
#ifdef NEON
    near_0 rate = {0};
    if (most >= 16) rate = near_0_of(row->rate);
#endif
    for (int i = 0; i < n / LANES; i++) {
        floats y = at(fed, i);
        if (g) y = -y;
        ints k = held(nearest((y - off) * 0.25f) * 2 + b, far); /* next to y */
        const ints in = k + 2 + ((k > 0) & -4);                 /* and the next one towards zero */
        const floats v = 2.0f * floats_of(k) + 0.5f, w = 2.0f * floats_of(in) + 0.5f;
        floats c, d;
#ifdef NEON
        if (most >= 16 && are_small(y)) look_up(&rate, k, in, &c, &d);
        else
#endif
            looked_up(row->rate, most, k, in, &c, &d);
        if (!row->wild) {
            c = (y - v) * (y - v) + c;
            d = (y - w) * (y - w) + d;
        }
        const mask better = below(d, c);
        put(s->branch[g][b], i, at(s->cost[g], i) + lesser(better, d, c));
        const floats value = pick(better, w, v);
        floats left = {0};
        if (!row->wild && g) left = row->x + value;
        else if (!row->wild) left = row->x - value;
        put(s->left[g][b], i, left);
        k = (ints)pick(better, (floats)in, (floats)k);
        put_integers(out + i * LANES, k);
    }
}

/* Survivors of the next states, 32 `blocks` of them */
INLINED void merge(int blocks, const flips *f, survivors *s, uint16_t *choice) {
    const int n = 16 * blocks;
    for (int q = 0; q < blocks; q++) {
        mask m[PARTS], o[PARTS];
        _Pragma("GCC unroll 4") for (int k = 0; k < PARTS; k++) {
            const int i = q * PARTS + k;
            floats a = at(s->branch[0][0], i), b = flipped(s->branch[0][1], i, f->h1);
            m[k] = below(b, a);
            put(s->next, i, lesser(m[k], b, a));
            put(s->error, i, pick(m[k], flipped(s->left[0][1], i, f->h1), at(s->left[0][0], i)));
            a = flipped(s->branch[1][0], i, f->low);
            b = flipped(s->branch[1][1], i, f->both);
            o[k] = below(b, a);
            put(s->next + n, i, lesser(o[k], b, a));
            b = flipped(s->left[1][1], i, f->both);
            put(s->error + n, i, pick(o[k], b, flipped(s->left[1][0], i, f->low)));
        }
        choice[q] = bits(m);
        choice[blocks + q] = bits(o);
    }
    const float base = s->next[0];
    for (int i = 0; i < n / LANES; i++) {
        put(s->cost[0], i, evens(at(s->next, 2 * i), at(s->next, 2 * i + 1)) - base);
        put(s->cost[1], i, odds(at(s->next, 2 * i), at(s->next, 2 * i + 1)) - base);
    }
}

/* What survivors own at from..to of a ring goes to those who follow them, plus their last error times the weight
 * there */
INLINED void carry(int blocks, const flips *f, const uint16_t *choice, ring *of, int64_t from, int64_t to,
                   const float *error, const float *weight) {
    const int weighted = error != NULL; /* a constant, as `weight` would not be */
    const int parts = blocks * PARTS;
    mask m[MAX / LANES];
    for (int i = 0; i < 2 * parts; i++) m[i] = mask_of(choice + i / PARTS, i % PARTS);
    for (int64_t r = from; r < to; r++) {
        half *own = of[r % AHEAD];
        floats next[MAX / LANES];
        const float w = weighted ? weight[r] : 0.0f;
        for (int block = 0; block < blocks; block++) {
            const char *h1 = block_of(own[0], block, f->h1);
            const char *low = block_of(own[1], block, f->low), *both = block_of(own[1], block, f->both);
            _Pragma("GCC unroll 4") for (int k = 0; k < PARTS; k++) {
                const int i = block * PARTS + k;
                floats a = pick(m[i], within(h1, k, f->h1), at(own[0], i));
                floats b = pick(m[parts + i], within(both, k, f->both), within(low, k, f->low));
                if (weighted) {
                    a += w * at(error, i);
                    b += w * at(error, parts + i);
                }
                next[i] = a;
                next[parts + i] = b;
            }
        }
        _Pragma("GCC unroll 4") for (int i = 0; i < parts; i++) {
            put(own[0], i, evens(next[2 * i], next[2 * i + 1]));
            put(own[1], i, odds(next[2 * i], next[2 * i + 1]));
        }
    }
}
INLINED void proceed_wide(int blocks, const rac_search *t, survivors *s, uint16_t *choice, int64_t from, int64_t to,
                          const float *weight) {
    const flips f = flips_of(t);
    merge(blocks, &f, s, choice);
    carry(blocks, &f, choice, s->fed, from, to, s->error, weight);
    carry(blocks, &f, choice, s->past, 0, t->lag, NULL, NULL);
}

static void proceed(const rac_search *t, survivors *s, uint16_t *choice, int64_t from, int64_t to,
                    const float *weight) {
    if (t->states == 32) proceed_wide(1, t, s, choice, from, to, weight);
    else if (t->states == 64) proceed_wide(2, t, s, choice, from, to, weight);
    else if (t->states == 128) proceed_wide(4, t, s, choice, from, to, weight);
    else proceed_wide(8, t, s, choice, from, to, weight);
}
#endif

/* The search of one column */
typedef struct {
    const rac_search *t;
    const rac_column *c;
    survivors *s;
    int16_t *ks;      /* [row of the lane][parity of the state][of the integer][state / 2] */
    uint16_t *choice; /* [row of the lane][state / 16] */
    float *z;         /* errors of the rows that are decided */
    int64_t a, end;   /* the lane */
    int64_t decided;  /* rows before this have the errors of the best path for all survivors */
} shaping;

/* The rows b0..b1 of the column through the trellis */
static void advance(shaping *h, int64_t b0, int64_t b1) {
    const rac_search *t = h->t;
    const rac_column *c = h->c;
    survivors *s = h->s;
    const int n = t->states / 2;
    const int64_t last = least(b0 + (t->lag + 1) * BLOCK, h->end);
    for (int u = 0; u < n; u++)
        for (int g = 0; g < 2; g++) s->past[(b0 - h->a) / BLOCK % t->lag][g][u] = (float)(2 * u + g);
    for (int64_t i = b0; i < b1; i++) {
        const int64_t start = i - i % c->own, before = h->decided - start;
        const float base = c->x[i] + (before > 0 ? dot(t->below + i * c->own, h->z + start, before) : 0.0f);
        half *fed = s->fed[i % AHEAD];
        for (int u = 0; u < n; u++) {
            fed[0][u] += base;
            fed[1][u] += base;
        }
    }
    for (int64_t i = b0; i < b1; i++) {
        half *fed = s->fed[i % AHEAD];
        const sample row = {c->x[i], fabsf(c->x[i]) > t->far, t->most, rac_rate(t, c, i)};
        uint16_t *choice = h->choice + (i - h->a) * (t->states / 16);
        int16_t *k = h->ks + (i - h->a) * 2 * t->states;
        for (int g = 0; g < 2; g++)
            for (int b = 0; b < 2; b++) branches(s, &row, fed[g], n, g, b, k + (2 * g + b) * n);
        const int64_t own = i - i % c->own + c->own; /* rows of the next block of weights are fed nothing */
        proceed(t, s, choice, i + 1, least(last, own), t->back + i * c->own - (own - c->own));
        memset(fed, 0, sizeof s->fed[0]);
    }
}

/* Survivors whose state at the start of block `first` is not that of state `best` end */
static void end_others(shaping *h, int64_t first, int best) {
    survivors *s = h->s;
    half *past = s->past[(first - h->a) / BLOCK % h->t->lag];
    const float is = past[best & 1][best >> 1];
    for (int q = 0; q < h->t->states; q++)
        if (past[q & 1][q >> 1] != is) s->cost[q & 1][q >> 1] = 1e30f;
}

/* The path to state `q` behind row `to` gives the rows that are not decided */
static void trace(const shaping *h, int q, int64_t to) {
    const rac_search *t = h->t;
    const rac_column *c = h->c;
    for (int64_t i = to - 1; i >= h->decided; i--) {
        const int b = h->choice[(i - h->a) * (t->states / 16) + q / 16] >> (q & 15) & 1;
        const int p = rac_from(t, q, b), g = p & 1;
        const int k = h->ks[(i - h->a) * 2 * t->states + (2 * g + b) * (t->states / 2) + (p >> 1)];
        c->out[i] = (int16_t)k;
        c->value[i] = (g ? -1.0f : 1.0f) * (2.0f * (float)k + 0.5f);
        h->z[i] = fabsf(c->x[i]) > t->far ? 0.0f : c->x[i] - c->value[i];
        q = p;
    }
}

/* The rows of one lane */
static void shape_lane(shaping *h) {
    survivors *s = h->s;
    const rac_search *t = h->t;
    for (int u = 0; u < t->states / 2; u++) s->cost[0][u] = s->cost[1][u] = 1e30f;
    s->cost[0][0] = 0.0f;
    memset(s->fed, 0, sizeof s->fed);
    memset(s->past, 0, sizeof s->past);
    h->decided = h->a;
    for (int64_t b0 = h->a; b0 < h->end; b0 += BLOCK) {
        const int64_t b1 = least(h->end, b0 + BLOCK), next = b0 + BLOCK - t->lag * BLOCK;
        advance(h, b0, b1);
        if (b1 < h->end && next <= h->a) continue; /* nothing is decided yet */
        int best = 0;
        for (int q = 1; q < t->states; q++)
            if (s->cost[q & 1][q >> 1] < s->cost[best & 1][best >> 1]) best = q;
        if (b1 < h->end) end_others(h, next, best);
        trace(h, best, b1);
        h->decided = next;
    }
}

/* Without a trellis (states 1): a row after the other. What is 0 stays so in a sparse column, and has no error. */
static int shape_alone(const rac_search *t, const rac_column *c) {
    float *z = calloc((size_t)c->rows, 4);
    for (int64_t i = 0; i < c->rows && z; i++) {
        const int64_t start = i - i % c->own;
        const int kept = t->sparse && c->x[i] == 0.0f;
        const float x = kept ? 0.0f : c->x[i] + dot(t->below + i * c->own, z + start, i - start);
        c->out[i] = (int16_t)rac_alone(t, rac_rate(t, c, i), x);
        c->value[i] = t->rec[t->most + c->out[i]];
        z[i] = kept || fabsf(c->x[i]) > t->far ? 0.0f : c->x[i] - c->value[i];
    }
    free(z);
    return !z;
}

/* Integers and values of a column, of 32 states and more, or 1. Rows further than `far` out are outliers: they have no
 * error, whatever their integer. Returns 0, or 1 without memory. */
int rac_shaped(const rac_search *t, const rac_column *c) {
    if (t->states == 1) return shape_alone(t, c);
    const size_t longest = (size_t)least(t->lane, c->rows), states = (size_t)t->states;
    shaping h = {t, c, malloc(sizeof *h.s), malloc(longest * states * 4), malloc(longest * states / 8),
                 calloc((size_t)c->rows, 4), 0, 0, 0};
    const int bad = !h.s || !h.ks || !h.choice || !h.z;
    for (; h.a < c->rows && !bad; h.a += t->lane) {
        h.end = least(c->rows, h.a + t->lane);
        shape_lane(&h);
    }
    free(h.s);
    free(h.ks);
    free(h.choice);
    free(h.z);
    return bad;
}
