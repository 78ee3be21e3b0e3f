/* Trellis search of a column where the error of a row is fed to the targets of the rows behind it: noise shaping, for errors
 * that are correlated through what the outputs do (encode/lossy.py). Every survivor carries what its own errors feed to the
 * next rows (per-survivor processing, Raheli et al. 1995); the errors of rows `lag` blocks back are those of the best path, and
 * survivors of another past end there. Both versions below do the same arithmetic in the same order. */
#include <math.h>
#include "trellis.h"

enum { MAX = 256, BLOCK = 16, AHEAD = 128, BLOCKS = AHEAD / BLOCK };

/* Of each survivor; states by parity, since all predecessors of one half of the states are even, of the other odd */
typedef struct {
    float cost[2][MAX / 2];
    float fed[AHEAD][2][MAX / 2];              /* to the target of a row, in a ring */
    float past[BLOCKS][2][MAX / 2];            /* the state at the start of a block, in a ring */
    float branch[2][2][MAX / 2], left[2][2][MAX / 2]; /* [parity of the state][of the integer]: cost, error of the row */
    float next[MAX], error[MAX];               /* of the states that follow, in their order */
} survivors;

typedef struct {
    float (*dot)(const float *, const float *, int64_t);
    void (*branches)(survivors *s, int half, int g, int b, const float *fed, float x, int wild, const float *rate, int most, int16_t *k);
    void (*merge)(const rac_code *t, survivors *s, uint16_t *choice);
    void (*carry)(const rac_code *t, const uint16_t *choice, float (*ring)[2][MAX / 2], int64_t from, int64_t to, const float *error, const float *weight);
} kernel;

static float dot_plain(const float *a, const float *b, int64_t n) {
    float s[64] = {0};
    for (int64_t i = 0; i < n; i += 64) for (int u = 0; u < 64 && i + u < n; u++) s[u] += a[i + u] * b[i + u];
    for (int w = 32; w; w /= 2) for (int u = 0; u < w; u++) s[u] += s[u + w];
    return s[0];
}

/* For each state of parity g the cheaper of two integers of parity b: its cost and its error */
static void branches_plain(survivors *s, int half, int g, int b, const float *fed, float x, int wild, const float *rate, int most, int16_t *out) {
    const float off = 0.5f + 2.0f * (float)b;
    const int far = most - ((most & 1) != b);
    for (int u = 0; u < half; u++) {
        const float y = g ? -fed[u] : fed[u];
        const float r = rintf((y - off) * 0.25f);
        int k = r * 2.0f > (float)(far - b) ? far : r * 2.0f < (float)(-far - b) ? -far : 2 * (int)r + b;
        const int in = k > 0 ? k - 2 : k + 2; /* the next one towards zero */
        float v = 2.0f * (float)k + 0.5f;
        const float w = 2.0f * (float)in + 0.5f, e = wild ? 0.0f : y - v, f = wild ? 0.0f : y - w;
        const float c = e * e + rate[k], d = f * f + rate[in];
        if (d < c) { v = w; k = in; }
        s->branch[g][b][u] = s->cost[g][u] + (d < c ? d : c);
        s->left[g][b][u] = wild ? 0.0f : g ? x + v : x - v;
        out[u] = (int16_t)k;
    }
}

/* Survivors of the next states */
static void merge_plain(const rac_code *t, survivors *s, uint16_t *choice) {
    const int half = t->states / 2;
    for (int i = 0; i < t->states / 16; i++) choice[i] = 0;
    for (int q = 0; q < t->states; q++) {
        const int g = q >= half, p = pred(t, q, 0) >> 1, r = pred(t, q, 1) >> 1;
        const int other = s->branch[g][1][r] < s->branch[g][0][p];
        choice[q / 16] |= (uint16_t)(other << (q & 15));
        s->next[q] = other ? s->branch[g][1][r] : s->branch[g][0][p];
        s->error[q] = other ? s->left[g][1][r] : s->left[g][0][p];
    }
    for (int q = 0; q < t->states; q++) s->cost[q & 1][q >> 1] = s->next[q] - s->next[0];
}

/* What survivors own at from..to of a ring goes to those who follow them, plus their last error times the weight there */
static void carry_plain(const rac_code *t, const uint16_t *choice, float (*ring)[2][MAX / 2], int64_t from, int64_t to, const float *error, const float *weight) {
    for (int64_t i = from; i < to; i++) {
        float (*own)[MAX / 2] = ring[i % AHEAD], next[MAX];
        for (int q = 0; q < t->states; q++) {
            const int p = pred(t, q, choice[q / 16] >> (q & 15) & 1);
            next[q] = own[p & 1][p >> 1];
            if (weight) next[q] += weight[i] * error[q];
        }
        for (int q = 0; q < t->states; q++) own[q & 1][q >> 1] = next[q];
    }
}

#ifdef HAVE_X86
#define AVX __attribute__((target("avx512f,avx512dq,avx512bw,avx512vl")))
AVX static float dot512(const float *a, const float *b, int64_t n) {
    __m512 s[4] = {_mm512_setzero_ps(), _mm512_setzero_ps(), _mm512_setzero_ps(), _mm512_setzero_ps()};
    for (int64_t i = 0; i < n; i += 64)
        for (int u = 0; u < 4; u++) {
            const int64_t left = n - i - 16 * u;
            if (left <= 0) break;
            const __mmask16 k = left >= 16 ? 0xffff : (__mmask16)((1u << left) - 1);
            s[u] = _mm512_add_ps(s[u], _mm512_mul_ps(_mm512_maskz_loadu_ps(k, a + i + 16 * u), _mm512_maskz_loadu_ps(k, b + i + 16 * u)));
        }
    float r[16];
    _mm512_storeu_ps(r, _mm512_add_ps(_mm512_add_ps(s[0], s[2]), _mm512_add_ps(s[1], s[3])));
    for (int w = 8; w; w /= 2) for (int u = 0; u < w; u++) r[u] += r[u + w];
    return r[0];
}

AVX static void branches512(survivors *s, int half, int g, int b, const float *fed, float x, int wild, const float *rate, int most, int16_t *out) {
    const int far = most - ((most & 1) != b);
    const __m512 off = _mm512_set1_ps(0.5f + 2.0f * (float)b), quarter = _mm512_set1_ps(0.25f), two = _mm512_set1_ps(2.0f), half_ = _mm512_set1_ps(0.5f);
    const __m512 r0 = _mm512_loadu_ps(rate - 16), r1 = _mm512_loadu_ps(rate), xs = _mm512_set1_ps(x), zero = _mm512_setzero_ps();
    const __m512i least = _mm512_set1_epi32(-far), largest = _mm512_set1_epi32(far), low = _mm512_set1_epi32(-16), step = _mm512_set1_epi32(2);
    const __m512 bound = _mm512_set1_ps(1024.0f); /* far beyond every integer; conversions stay in range */
    for (int u = 0; u < half; u += 16) {
        const __m512 t = _mm512_loadu_ps(fed + u), y = g ? _mm512_sub_ps(zero, t) : t;
        const __m512 r = _mm512_max_ps(_mm512_min_ps(_mm512_mul_ps(_mm512_sub_ps(y, off), quarter), bound), _mm512_sub_ps(zero, bound));
        __m512i k = _mm512_add_epi32(_mm512_slli_epi32(_mm512_cvtps_epi32(r), 1), _mm512_set1_epi32(b));
        k = _mm512_max_epi32(_mm512_min_epi32(k, largest), least);
        const __mmask16 above = _mm512_cmpgt_epi32_mask(k, _mm512_setzero_si512());
        const __m512i in = _mm512_mask_sub_epi32(_mm512_add_epi32(k, step), above, k, step);
        __m512 v = _mm512_add_ps(_mm512_mul_ps(_mm512_cvtepi32_ps(k), two), half_), ck, cin;
        const __m512 w = _mm512_add_ps(_mm512_mul_ps(_mm512_cvtepi32_ps(in), two), half_);
        if (_mm512_cmpgt_epi32_mask(k, _mm512_set1_epi32(15)) | _mm512_cmplt_epi32_mask(k, low)) {
            ck = _mm512_i32gather_ps(k, rate, 4);
            cin = _mm512_i32gather_ps(in, rate, 4);
        } else {
            ck = _mm512_permutex2var_ps(r0, _mm512_sub_epi32(k, low), r1);
            cin = _mm512_permutex2var_ps(r0, _mm512_sub_epi32(in, low), r1);
        }
        if (!wild) {
            const __m512 e = _mm512_sub_ps(y, v), f = _mm512_sub_ps(y, w);
            ck = _mm512_add_ps(_mm512_mul_ps(e, e), ck);
            cin = _mm512_add_ps(_mm512_mul_ps(f, f), cin);
        }
        const __mmask16 better = _mm512_cmp_ps_mask(cin, ck, _CMP_LT_OQ);
        _mm512_storeu_ps(s->branch[g][b] + u, _mm512_add_ps(_mm512_loadu_ps(s->cost[g] + u), _mm512_min_ps(cin, ck)));
        v = _mm512_mask_mov_ps(v, better, w);
        k = _mm512_mask_mov_epi32(k, better, in);
        _mm512_storeu_ps(s->left[g][b] + u, wild ? zero : g ? _mm512_add_ps(xs, v) : _mm512_sub_ps(xs, v));
        _mm256_storeu_si256((void *)(out + u), _mm512_cvtepi32_epi16(k));
    }
}

/* Order of the predecessors within 16, and which 16: a xor, as everything in a linear trellis */
typedef struct { __m512i h1, low, both, even, odd; int b1, b0, b2; } order;

AVX static inline order order_of(const rac_code *t) {
    const int half = t->states / 2, low = t->h0 & (half - 1), both = low ^ t->h1;
    const __m512i i = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0), d = _mm512_slli_epi32(i, 1);
    return (order){
        _mm512_xor_si512(i, _mm512_set1_epi32(t->h1 & 15)), _mm512_xor_si512(i, _mm512_set1_epi32(low & 15)), _mm512_xor_si512(i, _mm512_set1_epi32(both & 15)),
        d, _mm512_add_epi32(d, _mm512_set1_epi32(1)), t->h1 >> 4, low >> 4, both >> 4};
}

#define AT(array, q) _mm512_loadu_ps((array) + 16 * (q))
AVX static void merge512(const rac_code *t, survivors *s, uint16_t *choice) {
    const int half = t->states / 2, blocks = half / 16;
    const order o = order_of(t);
    for (int q = 0; q < blocks; q++) {
        __m512 a = AT(s->branch[0][0], q), b = _mm512_permutexvar_ps(o.h1, AT(s->branch[0][1], q ^ o.b1));
        __mmask16 c = choice[q] = _mm512_cmp_ps_mask(b, a, _CMP_LT_OQ);
        _mm512_storeu_ps(s->next + 16 * q, _mm512_min_ps(b, a));
        _mm512_storeu_ps(s->error + 16 * q, _mm512_mask_permutexvar_ps(AT(s->left[0][0], q), c, o.h1, AT(s->left[0][1], q ^ o.b1)));
        a = _mm512_permutexvar_ps(o.low, AT(s->branch[1][0], q ^ o.b0));
        b = _mm512_permutexvar_ps(o.both, AT(s->branch[1][1], q ^ o.b2));
        c = choice[blocks + q] = _mm512_cmp_ps_mask(b, a, _CMP_LT_OQ);
        _mm512_storeu_ps(s->next + half + 16 * q, _mm512_min_ps(b, a));
        a = _mm512_permutexvar_ps(o.low, AT(s->left[1][0], q ^ o.b0));
        _mm512_storeu_ps(s->error + half + 16 * q, _mm512_mask_permutexvar_ps(a, c, o.both, AT(s->left[1][1], q ^ o.b2)));
    }
    const __m512 base = _mm512_set1_ps(s->next[0]);
    for (int q = 0; q < blocks; q++) {
        const __m512 a = AT(s->next, 2 * q), b = AT(s->next, 2 * q + 1);
        _mm512_storeu_ps(s->cost[0] + 16 * q, _mm512_sub_ps(_mm512_permutex2var_ps(a, o.even, b), base));
        _mm512_storeu_ps(s->cost[1] + 16 * q, _mm512_sub_ps(_mm512_permutex2var_ps(a, o.odd, b), base));
    }
}

AVX __attribute__((always_inline)) static inline void carry_all(int blocks, order o, const uint16_t *choice, float (*ring)[2][MAX / 2], int64_t from,
                                                                int64_t to, const float *error, const float *weight) {
    for (int64_t i = from; i < to; i++) {
        float (*own)[MAX / 2] = ring[i % AHEAD];
        const __m512 w = _mm512_set1_ps(weight ? weight[i] : 0.0f);
        __m512 next[MAX / 16] = {_mm512_setzero_ps()};
        for (int q = 0; q < blocks; q++) {
            next[q] = _mm512_mask_permutexvar_ps(AT(own[0], q), choice[q], o.h1, AT(own[0], q ^ o.b1));
            const __m512 a = _mm512_permutexvar_ps(o.low, AT(own[1], q ^ o.b0));
            next[blocks + q] = _mm512_mask_permutexvar_ps(a, choice[blocks + q], o.both, AT(own[1], q ^ o.b2));
        }
        if (weight) for (int q = 0; q < 2 * blocks; q++) next[q] = _mm512_add_ps(next[q], _mm512_mul_ps(w, AT(error, q)));
        for (int q = 0; q < blocks; q++) {
            _mm512_storeu_ps(own[0] + 16 * q, _mm512_permutex2var_ps(next[2 * q], o.even, next[2 * q + 1]));
            _mm512_storeu_ps(own[1] + 16 * q, _mm512_permutex2var_ps(next[2 * q], o.odd, next[2 * q + 1]));
        }
    }
}

AVX static void carry512(const rac_code *t, const uint16_t *choice, float (*ring)[2][MAX / 2], int64_t from, int64_t to, const float *error, const float *weight) {
    const order o = order_of(t);
    if (t->states == 32) carry_all(1, o, choice, ring, from, to, error, weight);
    else if (t->states == 64) carry_all(2, o, choice, ring, from, to, error, weight);
    else carry_all(t->states / 32, o, choice, ring, from, to, error, weight);
}
#endif

/* Integers and values of a column of m targets x in units. rate: costs of the integers -most..most, pointing at that of 0,
 * row[i] the table of row i. Rows further than `far` out are outliers: they have no error, whatever their integer. 32 states
 * and more; no512: without AVX-512. Returns 0, or 1 without memory. */
int rac_shaped(const rac_code *t, int no512, const rac_shape *shape, const float *x, int64_t lane, const float *rate, const uint8_t *row, int most, float far,
               int16_t *out, float *value) {
    const int half = t->states / 2, words = t->states / 16, wide = 2 * most + 1;
    const int64_t m = shape->m, n = shape->n, longest = lane < m ? lane : m;
    kernel f = {dot_plain, branches_plain, merge_plain, carry_plain};
#ifdef HAVE_X86
    if (!no512 && has512()) f = (kernel){dot512, branches512, merge512, carry512};
#endif
    survivors *s = malloc(sizeof *s);
    int16_t *ks = malloc((size_t)longest * (size_t)t->states * 4);
    uint16_t *choice = malloc((size_t)longest * (size_t)words * 2);
    float *z = calloc((size_t)m, 4);
    const int64_t lag = shape->lag;
    const int bad = !s || !ks || !choice || !z;
    for (int64_t a = 0; a < m && !bad; a += lane) {
        const int64_t end = m - a < lane ? m : a + lane;
        for (int u = 0; u < half; u++) s->cost[0][u] = s->cost[1][u] = 1e30f;
        s->cost[0][0] = 0.0f;
        memset(s->fed, 0, sizeof s->fed);
        memset(s->past, 0, sizeof s->past);
        int64_t decided = a; /* rows before this have the errors of the best path for all survivors */
        for (int64_t b0 = a; b0 < end; b0 += BLOCK) {
            const int64_t b1 = end - b0 < BLOCK ? end : b0 + BLOCK, reach = b0 + (lag + 1) * BLOCK, last = reach < end ? reach : end;
            for (int u = 0; u < half; u++)
                for (int g = 0; g < 2; g++) s->past[(b0 - a) / BLOCK % lag][g][u] = (float)(2 * u + g);
            for (int64_t i = b0; i < b1; i++) {
                const int64_t start = i - i % n;
                const float base = x[i] + (decided > start ? f.dot(shape->feed + i * n, z + start, decided - start) : 0.0f);
                float (*fed)[MAX / 2] = s->fed[i % AHEAD];
                for (int u = 0; u < half; u++) { fed[0][u] += base; fed[1][u] += base; }
            }
            for (int64_t i = b0; i < b1; i++) {
                float (*fed)[MAX / 2] = s->fed[i % AHEAD];
                const float *r = rate + (row ? row[i] : 0) * wide;
                uint16_t *c = choice + (i - a) * words;
                for (int g = 0; g < 2; g++)
                    for (int b = 0; b < 2; b++)
                        f.branches(s, half, g, b, fed[g], x[i], fabsf(x[i]) > far, r, most, ks + (i - a) * 2 * t->states + (2 * g + b) * half);
                f.merge(t, s, c);
                const int64_t own = i - i % n + n; /* rows of the next block of weights are fed nothing */
                f.carry(t, c, s->fed, i + 1, last < own ? last : own, s->error, shape->back + i * n - (own - n));
                f.carry(t, c, s->past, 0, lag, NULL, NULL);
                memset(fed, 0, sizeof s->fed[0]);
            }
            int best = 0;
            for (int q = 1; q < t->states; q++) if (s->cost[q & 1][q >> 1] < s->cost[best & 1][best >> 1]) best = q;
            const int64_t next = b0 + BLOCK - lag * BLOCK;
            if (b1 < end && next <= a) continue; /* nothing is decided yet */
            if (b1 < end) {
                float (*past)[MAX / 2] = s->past[(next - a) / BLOCK % lag];
                const float is = past[best & 1][best >> 1];
                for (int q = 0; q < t->states; q++) if (past[q & 1][q >> 1] != is) s->cost[q & 1][q >> 1] = 1e30f;
            }
            int q = best;
            for (int64_t i = b1 - 1; i >= decided; i--) {
                const int b = choice[(i - a) * words + q / 16] >> (q & 15) & 1, p = pred(t, q, b), g = p & 1;
                const int k = ks[(i - a) * 2 * t->states + (2 * g + b) * half + (p >> 1)];
                out[i] = (int16_t)k;
                value[i] = (g ? -1.0f : 1.0f) * (2.0f * (float)k + 0.5f);
                z[i] = fabsf(x[i]) > far ? 0.0f : x[i] - value[i];
                q = p;
            }
            decided = next;
        }
    }
    free(s); free(ks); free(choice); free(z);
    return bad;
}
