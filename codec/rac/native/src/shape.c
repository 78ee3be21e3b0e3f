/* Trellis search of a column where the error of a row is fed to the targets of the rows behind it: noise shaping,
 * for errors that are correlated through what the outputs do. Every survivor carries what its own errors feed to the
 * next rows (per-survivor processing, Raheli et al. 1995); the errors of rows `lag` blocks back are those of the
 * best path, and survivors of another past end there. Both versions below do the same arithmetic in the same order. */
#include <math.h>
#include "quantise.h"

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

#ifndef AVX512
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
#else
static float dot(const float *a, const float *b, int64_t n) {
    __m512 s[4] = {_mm512_setzero_ps(), _mm512_setzero_ps(), _mm512_setzero_ps(), _mm512_setzero_ps()};
    for (int64_t i = 0; i < n; i += 64)
        for (int u = 0; u < 4; u++) {
            const int64_t left = n - i - 16 * u;
            if (left <= 0) break;
            const __mmask16 k = left >= 16 ? 0xffff : (__mmask16)((1u << left) - 1);
            const __m512 x = _mm512_maskz_loadu_ps(k, a + i + 16 * u), y = _mm512_maskz_loadu_ps(k, b + i + 16 * u);
            s[u] = _mm512_add_ps(s[u], _mm512_mul_ps(x, y));
        }
    float r[16];
    _mm512_storeu_ps(r, _mm512_add_ps(_mm512_add_ps(s[0], s[2]), _mm512_add_ps(s[1], s[3])));
    for (int w = 8; w; w /= 2)
        for (int u = 0; u < w; u++) r[u] += r[u + w];
    return r[0];
}

/* 16 states y, whose sign is `odd`: the integers of one parity next to them, at most `far` from 0, and towards zero */
static void branches(survivors *s, const sample *row, const float *fed, int n, int g, int b, int16_t *out) {
    const int most = row->most, far = most - ((most & 1) != b);
    const __m512 off = _mm512_set1_ps(0.5f + 2.0f * (float)b), quarter = _mm512_set1_ps(0.25f);
    const __m512 two = _mm512_set1_ps(2.0f), a_half = _mm512_set1_ps(0.5f), zero = _mm512_setzero_ps();
    const __m512 r0 = _mm512_loadu_ps(row->rate - 16), r1 = _mm512_loadu_ps(row->rate), xs = _mm512_set1_ps(row->x);
    const __m512i lowest = _mm512_set1_epi32(-far), largest = _mm512_set1_epi32(far);
    const __m512i low = _mm512_set1_epi32(-16), step = _mm512_set1_epi32(2);
    const __m512 bound = _mm512_set1_ps(1024.0f); /* far beyond every integer; conversions stay in range */
    for (int u = 0; u < n; u += 16) {
        const __m512 t = _mm512_loadu_ps(fed + u), y = g ? _mm512_sub_ps(zero, t) : t;
        __m512 r = _mm512_min_ps(_mm512_mul_ps(_mm512_sub_ps(y, off), quarter), bound);
        r = _mm512_max_ps(r, _mm512_sub_ps(zero, bound));
        __m512i k = _mm512_add_epi32(_mm512_slli_epi32(_mm512_cvtps_epi32(r), 1), _mm512_set1_epi32(b));
        k = _mm512_max_epi32(_mm512_min_epi32(k, largest), lowest);
        const __mmask16 above = _mm512_cmpgt_epi32_mask(k, _mm512_setzero_si512());
        const __m512i in = _mm512_mask_sub_epi32(_mm512_add_epi32(k, step), above, k, step);
        __m512 v = _mm512_add_ps(_mm512_mul_ps(_mm512_cvtepi32_ps(k), two), a_half), ck, cin;
        const __m512 w = _mm512_add_ps(_mm512_mul_ps(_mm512_cvtepi32_ps(in), two), a_half);
        if (_mm512_cmpgt_epi32_mask(k, _mm512_set1_epi32(15)) | _mm512_cmplt_epi32_mask(k, low)) {
            ck = _mm512_i32gather_ps(k, row->rate, 4);
            cin = _mm512_i32gather_ps(in, row->rate, 4);
        } else {
            ck = _mm512_permutex2var_ps(r0, _mm512_sub_epi32(k, low), r1);
            cin = _mm512_permutex2var_ps(r0, _mm512_sub_epi32(in, low), r1);
        }
        if (!row->wild) {
            const __m512 e = _mm512_sub_ps(y, v), f = _mm512_sub_ps(y, w);
            ck = _mm512_add_ps(_mm512_mul_ps(e, e), ck);
            cin = _mm512_add_ps(_mm512_mul_ps(f, f), cin);
        }
        const __mmask16 better = _mm512_cmp_ps_mask(cin, ck, _CMP_LT_OQ);
        const __m512 cost = _mm512_add_ps(_mm512_loadu_ps(s->cost[g] + u), _mm512_min_ps(cin, ck));
        _mm512_storeu_ps(s->branch[g][b] + u, cost);
        v = _mm512_mask_mov_ps(v, better, w);
        k = _mm512_mask_mov_epi32(k, better, in);
        _mm512_storeu_ps(s->left[g][b] + u, row->wild ? zero : g ? _mm512_add_ps(xs, v) : _mm512_sub_ps(xs, v));
        _mm256_storeu_si256((void *)(out + u), _mm512_cvtepi32_epi16(k));
    }
}

static void merge(const rac_search *t, survivors *s, uint16_t *choice) {
    const int n = t->states / 2, blocks = n / 16;
    const rac_order o = rac_order_of(t);
    for (int q = 0; q < blocks; q++) {
        __m512 a = AT(s->branch[0][0], q), b = _mm512_permutexvar_ps(o.h1, AT(s->branch[0][1], q ^ o.b1));
        __mmask16 c = choice[q] = _mm512_cmp_ps_mask(b, a, _CMP_LT_OQ);
        _mm512_storeu_ps(s->next + 16 * q, _mm512_min_ps(b, a));
        a = AT(s->left[0][0], q);
        _mm512_storeu_ps(s->error + 16 * q, _mm512_mask_permutexvar_ps(a, c, o.h1, AT(s->left[0][1], q ^ o.b1)));
        a = _mm512_permutexvar_ps(o.low, AT(s->branch[1][0], q ^ o.b0));
        b = _mm512_permutexvar_ps(o.both, AT(s->branch[1][1], q ^ o.b2));
        c = choice[blocks + q] = _mm512_cmp_ps_mask(b, a, _CMP_LT_OQ);
        _mm512_storeu_ps(s->next + n + 16 * q, _mm512_min_ps(b, a));
        a = _mm512_permutexvar_ps(o.low, AT(s->left[1][0], q ^ o.b0));
        _mm512_storeu_ps(s->error + n + 16 * q, _mm512_mask_permutexvar_ps(a, c, o.both, AT(s->left[1][1], q ^ o.b2)));
    }
    const __m512 base = _mm512_set1_ps(s->next[0]);
    for (int q = 0; q < blocks; q++) {
        const __m512 a = AT(s->next, 2 * q), b = AT(s->next, 2 * q + 1);
        _mm512_storeu_ps(s->cost[0] + 16 * q, _mm512_sub_ps(_mm512_permutex2var_ps(a, o.even, b), base));
        _mm512_storeu_ps(s->cost[1] + 16 * q, _mm512_sub_ps(_mm512_permutex2var_ps(a, o.odd, b), base));
    }
}

INLINED void carry_all(int blocks, rac_order o, const uint16_t *choice, ring *of, int64_t from, int64_t to,
                       const float *error, const float *weight) {
    for (int64_t i = from; i < to; i++) {
        half *own = of[i % AHEAD];
        const __m512 w = _mm512_set1_ps(weight ? weight[i] : 0.0f);
        __m512 next[MAX / 16] = {_mm512_setzero_ps()};
        for (int q = 0; q < blocks; q++) {
            next[q] = _mm512_mask_permutexvar_ps(AT(own[0], q), choice[q], o.h1, AT(own[0], q ^ o.b1));
            const __m512 a = _mm512_permutexvar_ps(o.low, AT(own[1], q ^ o.b0));
            next[blocks + q] = _mm512_mask_permutexvar_ps(a, choice[blocks + q], o.both, AT(own[1], q ^ o.b2));
        }
        for (int q = 0; weight && q < 2 * blocks; q++) next[q] = _mm512_add_ps(next[q], _mm512_mul_ps(w, AT(error, q)));
        for (int q = 0; q < blocks; q++) {
            _mm512_storeu_ps(own[0] + 16 * q, _mm512_permutex2var_ps(next[2 * q], o.even, next[2 * q + 1]));
            _mm512_storeu_ps(own[1] + 16 * q, _mm512_permutex2var_ps(next[2 * q], o.odd, next[2 * q + 1]));
        }
    }
}

static void carry(const rac_search *t, const uint16_t *choice, ring *of, int64_t from, int64_t to, const float *error,
                  const float *weight) {
    const rac_order o = rac_order_of(t);
    if (t->states == 32) carry_all(1, o, choice, of, from, to, error, weight);
    else if (t->states == 64) carry_all(2, o, choice, of, from, to, error, weight);
    else carry_all(t->states / 32, o, choice, of, from, to, error, weight);
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
        merge(t, s, choice);
        const int64_t own = i - i % c->own + c->own; /* rows of the next block of weights are fed nothing */
        carry(t, choice, s->fed, i + 1, least(last, own), s->error, t->back + i * c->own - (own - c->own));
        carry(t, choice, s->past, 0, t->lag, NULL, NULL);
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
