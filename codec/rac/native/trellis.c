/* Trellis-coded quantisation: Viterbi search of one column (encoder), columns of a tile to numbers (decoder).
 * The decoder has a numpy twin in rac/quantize/trellis.py that the tests hold it to, bit for bit: plain float32 arithmetic
 * in a fixed order, no contraction to fused operations (setup.py). The search is held to all paths of short columns. */
#include <math.h>
#include "trellis.h"

/* The best coded integer of each subset for a sample: subset 2 g + b has sign (-1)^g and the integers of parity b */
static inline void subsets(float x, const float *rec, const float *rate, int most, float *cost, int16_t *best) {
    for (int g = 0; g < 2; g++) {
        const float y = g ? -x : x;
        for (int b = 0; b < 2; b++) {
            float r = floorf((y - 0.5f - 2.0f * (float)b) * 0.25f + 0.5f);
            int far = most - ((most & 1) != b), k = b; /* the largest integer of this parity */
            if (r * 2.0f + (float)b > (float)far) k = far;
            else if (r * 2.0f + (float)b < (float)-far) k = -far;
            else k = 2 * (int)r + b;
            int in = k > 0 ? k - 2 : k + 2; /* the next one towards zero */
            const float e = y - rec[k], f = y - rec[in];
            const float c = e * e + rate[k], d = f * f + rate[in];
            const int better = d < c;
            cost[2 * g + b] = better ? d : c;
            best[2 * g + b] = (int16_t)(better ? in : k);
        }
    }
}

static void search_plain(const rac_code *t, const float *cost, int64_t n, uint16_t *choice, float *c) {
    const int s = t->states, words = s < 16 ? 1 : s / 16;
    int from[2][256];
    float next[256];
    for (int q = 0; q < s; q++) { from[0][q] = pred(t, q, 0); from[1][q] = pred(t, q, 1); }
    for (int64_t i = 0; i < n; i++, cost += 4, choice += words) {
        for (int w = 0; w < words; w++) choice[w] = 0;
        for (int q = 0; q < s; q++) {
            const float *sub = cost + (q < s / 2 ? 0 : 2);
            const float a = c[from[0][q]] + sub[0], b = c[from[1][q]] + sub[1];
            choice[q / 16] |= (uint16_t)((b < a) << (q & 15));
            next[q] = b < a ? b : a;
        }
        const float base = (i & 63) == 63 ? next[0] : 0.0f;
        for (int q = 0; q < s; q++) c[q] = next[q] - base;
    }
}

#ifdef HAVE_X86
#define AVX __attribute__((target("avx512f,avx512dq,avx512bw,avx512vl")))
/* Up to 16 states in one register */
AVX static void search_small(const rac_code *t, const float *cost, int64_t n, uint16_t *choice, float *out) {
    int32_t from[2][16], sub[2][16];
    float start[16];
    for (int q = 0; q < 16; q++) {
        const int in = q < t->states;
        for (int b = 0; b < 2; b++) {
            from[b][q] = in ? pred(t, q, b) : q;
            sub[b][q] = b + (in && q >= t->states / 2 ? 2 : 0);
        }
        start[q] = in ? out[q] : 1e30f;
    }
    const __m512i fa = _mm512_loadu_si512(from[0]), fb = _mm512_loadu_si512(from[1]);
    const __m512i sa = _mm512_loadu_si512(sub[0]), sb = _mm512_loadu_si512(sub[1]);
    const uint16_t some = (uint16_t)((1u << t->states) - 1);
    __m512 c = _mm512_loadu_ps(start);
    for (int64_t i = 0; i < n; i++, cost += 4) {
        const __m512 w = _mm512_broadcast_f32x4(_mm_loadu_ps(cost));
        const __m512 a = _mm512_add_ps(_mm512_permutexvar_ps(fa, c), _mm512_permutevar_ps(w, sa));
        const __m512 b = _mm512_add_ps(_mm512_permutexvar_ps(fb, c), _mm512_permutevar_ps(w, sb));
        choice[i] = _mm512_cmp_ps_mask(b, a, _CMP_LT_OQ) & some;
        c = _mm512_min_ps(b, a);
        if ((i & 63) == 63) c = _mm512_sub_ps(c, _mm512_broadcastss_ps(_mm512_castps512_ps128(c)));
    }
    _mm512_storeu_ps(start, c);
    memcpy(out, start, sizeof(float) * (size_t)t->states);
}

/* 32 states and more: states by parity, since all predecessors of one half of the states are even, of the other odd */
AVX static void search_large(const rac_code *t, const float *cost, int64_t n, uint16_t *choice, float *c) {
    const int half = t->states / 2, blocks = half / 16, low = t->h0 & (half - 1), both = low ^ t->h1;
    float e[128], o[128], next[256];
    int32_t x1[16], x0[16], x2[16], even[16], odd[16];
    for (int i = 0; i < 16; i++) {
        x1[i] = i ^ (t->h1 & 15); x0[i] = i ^ (low & 15); x2[i] = i ^ (both & 15);
        even[i] = 2 * i; odd[i] = 2 * i + 1;
    }
    const __m512i p1 = _mm512_loadu_si512(x1), p0 = _mm512_loadu_si512(x0), p2 = _mm512_loadu_si512(x2);
    const __m512i ev = _mm512_loadu_si512(even), od = _mm512_loadu_si512(odd);
    for (int u = 0; u < half; u++) { e[u] = c[2 * u]; o[u] = c[2 * u + 1]; }
    for (int64_t i = 0; i < n; i++, cost += 4, choice += 2 * blocks) {
        const __m512 s0 = _mm512_set1_ps(cost[0]), s1 = _mm512_set1_ps(cost[1]);
        const __m512 s2 = _mm512_set1_ps(cost[2]), s3 = _mm512_set1_ps(cost[3]);
        for (int q = 0; q < blocks; q++) {
            const __m512 a = _mm512_add_ps(_mm512_loadu_ps(e + 16 * q), s0);
            const __m512 b = _mm512_add_ps(_mm512_permutexvar_ps(p1, _mm512_loadu_ps(e + 16 * (q ^ (t->h1 >> 4)))), s1);
            choice[q] = _mm512_cmp_ps_mask(b, a, _CMP_LT_OQ);
            _mm512_storeu_ps(next + 16 * q, _mm512_min_ps(b, a));
            const __m512 f = _mm512_add_ps(_mm512_permutexvar_ps(p0, _mm512_loadu_ps(o + 16 * (q ^ (low >> 4)))), s2);
            const __m512 g = _mm512_add_ps(_mm512_permutexvar_ps(p2, _mm512_loadu_ps(o + 16 * (q ^ (both >> 4)))), s3);
            choice[blocks + q] = _mm512_cmp_ps_mask(g, f, _CMP_LT_OQ);
            _mm512_storeu_ps(next + half + 16 * q, _mm512_min_ps(g, f));
        }
        const __m512 base = _mm512_set1_ps((i & 63) == 63 ? next[0] : 0.0f);
        for (int q = 0; q < blocks; q++) {
            const __m512 a = _mm512_loadu_ps(next + 32 * q), b = _mm512_loadu_ps(next + 32 * q + 16);
            _mm512_storeu_ps(e + 16 * q, _mm512_sub_ps(_mm512_permutex2var_ps(a, ev, b), base));
            _mm512_storeu_ps(o + 16 * q, _mm512_sub_ps(_mm512_permutex2var_ps(a, od, b), base));
        }
    }
    for (int u = 0; u < half; u++) { c[2 * u] = e[u]; c[2 * u + 1] = o[u]; }
}
#endif

static void search(const rac_code *t, int no512, const float *cost, int64_t n, uint16_t *choice, float *c) {
#ifdef HAVE_X86
    if (!no512 && has512()) {
        if (t->states >= 32) search_large(t, cost, n, choice, c);
        else search_small(t, cost, n, choice, c);
        return;
    }
#endif
    search_plain(t, cost, n, choice, c);
}

/* Without a trellis (states 1), each sample alone: the nearest integer or the next one towards zero. As `viterbi`. */
static void scalar(const float *x, int64_t n, const float *rec, const float *rate, const uint8_t *row, int most, int16_t *out, float *value) {
    for (int64_t i = 0; i < n; i++) {
        const float *v = rec + most, *r = rate + (row ? row[i] : 0) * (2 * most + 1) + most, near = floorf(x[i] + 0.5f);
        const int k = near > (float)most ? most : near < (float)-most ? -most : (int)near, in = k > 0 ? k - 1 : k < 0 ? k + 1 : 0;
        const float e = x[i] - v[k], f = x[i] - v[in];
        out[i] = (int16_t)(f * f + r[in] < e * e + r[k] ? in : k);
        value[i] = v[out[i]];
    }
}

/* One lane: integers k of least sum (x - sign rec[k])^2 + rate[k]. rec and the rows of rate have 2 most + 1 entries, for
 * -most..most; row[i] is the table of sample i. The trellis begins anew every `lane` samples. cost, best: scratch (n, 4);
 * choice: scratch (n, max(1, states / 16)). out: k; value: sign rec[k]. */
static void viterbi(const rac_code *t, int no512, const float *x, int64_t n, int64_t lane, const float *rec, const float *rate,
                    const uint8_t *row, int most, int16_t *out, float *value, float *cost, int16_t *best, uint16_t *choice) {
    if (t->states == 1) {
        scalar(x, n, rec, rate, row, most, out, value);
        return;
    }
    const int words = t->states < 16 ? 1 : t->states / 16, wide = 2 * most + 1;
    for (int64_t i = 0; i < n; i++) subsets(x[i], rec + most, rate + (row ? row[i] : 0) * wide + most, most, cost + 4 * i, best + 4 * i);
    for (int64_t a = 0; a < n; a += lane) {
        const int64_t m = n - a < lane ? n - a : lane;
        float c[256];
        c[0] = 0.0f;
        for (int q = 1; q < t->states; q++) c[q] = 1e30f;
        search(t, no512, cost + 4 * a, m, choice, c);
        int s = 0;
        for (int q = 1; q < t->states; q++) if (c[q] < c[s]) s = q;
        for (int64_t i = m - 1; i >= 0; i--) {
            const int b = choice[i * words + s / 16] >> (s & 15) & 1, p = pred(t, s, b), g = p & 1;
            const int k = best[4 * (a + i) + 2 * g + b];
            out[a + i] = (int16_t)k;
            value[a + i] = g ? -rec[most + k] : rec[most + k];
            s = p;
        }
    }
}

/* The whole number nearest to 4 log2 x of x > 0, without libm, whose last bit differs between machines; linalg/exact.py */
static int quarters(double x) {
    static const double eighths[4] = {0.5452538663326288, 0.6484197773255049, 0.7711054127039705, 0.9170040432046713};
    int e;
    const double m = frexp(x, &e);
    int q = 4 * e - 4;
    for (int i = 0; i < 4; i++) q += m >= eighths[i];
    return q;
}

/* 2**(e / 4), the binary32 numbers of stages/trellis.md, section 3 */
static float power(int e) {
    static const float within[4] = {1.0f, 0x1.306fe0p0f, 0x1.6a09e6p0f, 0x1.ae89fap0f};
    return ldexpf(within[e & 3], e >> 2);
}

/* The columns of a block from the last to the first, each after the errors of the ones behind it are fed back
 * (align/triangular.py). All arrays are column-major. plain, target (cols, m): the columns, and the
 * same with the errors of what is behind the block fed back; target is overwritten by the errors plain - value. feed (groups, cols, cols): [j, i]
 * weight of the error of column i in the target of j < i, of each of so many blocks of rows of one size; step (cols). The deviation of a target in steps, in quarter octaves
 * from `low`, says how the column is coded: fine[q] quarter octaves finer than its step, with the costs rate[q] (tables, 2
 * most + 1), or not at all where fine[q] < 0: its values are 0. fine_of (cols) tells what was taken. out, recon, wild (cols, m):
 * integers, values, and where a target lies further than `far` units out: an outlier, whose value is the target itself.
 * below, back: the errors of rows are fed to the rows below them (rac_shape), or NULL; then rec is not corrected. no512: without AVX-512.
 * Returns 0, or 1 without memory. */
int rac_trellis_block(int states, int h0, int h1, const float *plain, float *target, int64_t cols, int64_t m, int64_t lane, const float *feed,
                      const float *step, const float *rec, const float *rate, const int8_t *fine, int low, int levels,
                      const uint8_t *row, int64_t tables, int most, float far, int16_t *out, float *recon, uint8_t *wild,
                      int8_t *fine_of, const float *below, const float *back, int64_t groups, int lag, int no512) {
    const rac_code t = {states, h0, h1};
    const int words = states < 16 ? 1 : states / 16, wide = 2 * most + 1;
    float *x = malloc((size_t)m * (4 + 16)), *cost = x + m;
    int16_t *best = malloc((size_t)m * 8);
    uint16_t *choice = malloc((size_t)(lane < m ? lane : m) * (size_t)words * 2);
    int bad = !x || !best || !choice;
    const int64_t own = m / groups;
    const rac_shape shape = {below, back, m, own, lag};
    for (int64_t j = cols - 1; j >= 0 && !bad; j--) {
        float *g = target + j * m, *v = recon + j * m;
        for (int64_t i = j + 1; i < cols; i++) {
            const float *e = target + i * m;
            for (int64_t a = 0; a < groups; a++) {
                const float w = feed[(a * cols + j) * cols + i];
                if (w != 0.0f) for (int64_t r = a * own; r < (a + 1) * own; r++) g[r] += w * e[r];
            }
        }
        double square = 0;
        for (int64_t r = 0; r < m; r++) square += (double)g[r] * g[r];
        const double ratio = step[j] > 0 ? sqrt(square / (double)m) / step[j] : 0;
        int q = ratio > 0 ? quarters(ratio) - low : 0;
        q = q < 0 ? 0 : q < levels ? q : levels - 1;
        fine_of[j] = step[j] > 0 && ratio > 0 ? fine[q] : -1;
        memset(wild + j * m, 0, (size_t)m);
        if (fine_of[j] < 0) {
            memset(out + j * m, 0, (size_t)m * 2);
            memset(v, 0, (size_t)m * 4);
            memcpy(g, plain + j * m, (size_t)m * 4);
            continue;
        }
        const float unit = step[j] * power(-fine_of[j]), inverse = 1.0f / unit;
        for (int64_t r = 0; r < m; r++) x[r] = g[r] * inverse;
        const float *costs = rate + (int64_t)q * tables * wide;
        if (below) bad = rac_shaped(&t, no512, &shape, x, lane, costs + most, row, most, far, out + j * m, v);
        else viterbi(&t, no512, x, m, lane, rec, costs, row, most, out + j * m, v, cost, best, choice);
        for (int64_t r = 0; r < m; r++) {
            const int out_of_range = fabsf(x[r]) > far;
            wild[j * m + r] = (uint8_t)out_of_range;
            v[r] = out_of_range ? g[r] : v[r] * unit;
            g[r] = plain[j * m + r] - v[r];
        }
    }
    free(x); free(best); free(choice);
    return bad;
}

typedef struct {
    const uint8_t *words; /* (h, w) */
    int64_t h, w;
    const rac_dequant *q;
    const float *col, *row;
    void *dst;            /* `stride` elements from row to row */
    int64_t stride;
} rac_numbers;

static inline uint16_t bf16(float v) {
    uint32_t bits;
    memcpy(&bits, &v, 4);
    return (uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

/* Columns one after the other */
static void numbers_plain(const rac_numbers *n) {
    for (int64_t j = 0; j < n->w; j++) {
        unsigned s = 0;
        for (int64_t i = 0; i < n->h; i++) {
            const uint8_t u = n->words[i * n->w + j];
            const float r = s & 1 ? -n->q->rec[u] : n->q->rec[u], v = r * n->col[j] * n->row[i];
            if (n->q->size == 4) ((float *)n->dst)[i * n->stride + j] = v;
            else ((uint16_t *)n->dst)[i * n->stride + j] = bf16(v);
            s = (s >> 1) ^ (s & 1 ? (unsigned)n->q->h0 : 0) ^ ((u ^ n->q->zero) & 1 ? (unsigned)n->q->h1 : 0);
        }
    }
}

#ifdef HAVE_X86
/* Rounded to the upper half of each number, ties to even (not for NaN, which there is none of) */
AVX static inline __m512i rounded(__m512 v) {
    const __m512i bits = _mm512_castps_si512(v), up = _mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff));
    return _mm512_mask_add_epi32(up, _mm512_test_epi32_mask(bits, _mm512_set1_epi32(1 << 16)), up, _mm512_set1_epi32(1));
}

/* 32 columns side by side, their states in one register. Even magnitudes are computed, exactly; others of words of a range of 32
 * are a permutation of two registers. STRIP rows of all columns, then the next: whole columns would touch as many pages as there
 * are rows. */
AVX static void numbers512(const rac_numbers *n, uint16_t *states) {
    enum { STRIP = 16 };
    const float *rec = n->q->rec;
    const int even = n->q->even;
    const __m512 slope = _mm512_set1_ps(rec[1] - rec[0]), first = _mm512_set1_ps(rec[0]);
    uint8_t low = 255, high = 0;
    for (int64_t i = 0; !even && i < n->h * n->w; i++) {
        low = n->words[i] < low ? n->words[i] : low;
        high = n->words[i] > high ? n->words[i] : high;
    }
    const int near = !even && high - low < 32;
    float table[32] = {0};
    for (int k = low; near && k <= high; k++) table[k & 31] = rec[k]; /* a permutation looks at five bits only */
    const __m512 t0 = _mm512_loadu_ps(table), t1 = _mm512_loadu_ps(table + 16);
    const __m512i one = _mm512_set1_epi16(1), sign = _mm512_set1_epi32(INT32_MIN);
    const __m512i h0 = _mm512_set1_epi16((short)n->q->h0), h1 = _mm512_set1_epi16((short)n->q->h1);
    const __mmask32 flip = n->q->zero & 1 ? ~0u : 0;
    uint16_t uppers[32];
    for (int k = 0; k < 32; k++) uppers[k] = (uint16_t)(2 * k + 1);
    const __m512i upper = _mm512_loadu_si512(uppers);
    for (int64_t top = 0; top < n->h; top += STRIP)
        for (int64_t j = 0; j < n->w; j += 32) {
            const __mmask32 some = n->w - j < 32 ? (1u << (n->w - j)) - 1 : ~0u;
            const __mmask16 half[2] = {(__mmask16)some, (__mmask16)(some >> 16)};
            const __m512 col[2] = {_mm512_maskz_loadu_ps(half[0], n->col + j), _mm512_maskz_loadu_ps(half[1], n->col + j + 16)};
            __m512i s = _mm512_loadu_si512(states + j);
            for (int64_t i = top; i < n->h && i < top + STRIP; i++) {
                const __m512 row = _mm512_set1_ps(n->row[i]);
                const __m256i words = _mm256_maskz_loadu_epi8(some, n->words + i * n->w + j);
                const __mmask32 negative = _mm512_test_epi16_mask(s, one);
                const __mmask32 next = _mm512_test_epi16_mask(_mm512_cvtepu8_epi16(words), one) ^ flip;
                s = _mm512_xor_si512(_mm512_srli_epi16(s, 1), _mm512_maskz_mov_epi16(negative, h0));
                s = _mm512_xor_si512(s, _mm512_maskz_mov_epi16(next, h1));
                __m512 v[2];
                for (int g = 0; g < 2; g++) {
                    const __m512i u = _mm512_cvtepu8_epi32(g ? _mm256_extracti128_si256(words, 1) : _mm256_castsi256_si128(words));
                    const __mmask16 minus = (__mmask16)(negative >> 16 * g);
                    v[g] = even ? _mm512_add_ps(_mm512_mul_ps(_mm512_cvtepi32_ps(u), slope), first)
                         : near ? _mm512_permutex2var_ps(t0, u, t1) : _mm512_i32gather_ps(u, rec, 4);
                    v[g] = _mm512_castsi512_ps(_mm512_mask_xor_epi32(_mm512_castps_si512(v[g]), minus, _mm512_castps_si512(v[g]), sign));
                    v[g] = _mm512_mul_ps(_mm512_mul_ps(v[g], col[g]), row);
                }
                if (n->q->size == 4) {
                    float *d = (float *)n->dst + i * n->stride + j;
                    _mm512_mask_storeu_ps(d, half[0], v[0]);
                    _mm512_mask_storeu_ps(d + 16, half[1], v[1]);
                } else {
                    uint16_t *d = (uint16_t *)n->dst + i * n->stride + j;
                    const __m512i both = _mm512_permutex2var_epi16(rounded(v[0]), upper, rounded(v[1]));
                    if (some == ~0u) _mm512_storeu_si512(d, both);
                    else _mm512_mask_storeu_epi16(d, some, both);
                }
            }
            _mm512_storeu_si512(states + j, s);
        }
}
#endif

/* A tile of words (h, w) to numbers (stages/trellis.md): sign rec[word] col[j] row[i], the state of each column beginning
 * at 0. `states`: room for w + 31 of them. */
void rac_untrellis(const uint8_t *words, int64_t h, int64_t w, const rac_dequant *q, const float *col, const float *row, void *dst,
                   int64_t stride, uint16_t *states) {
    const rac_numbers n = {words, h, w, q, col, row, dst, stride};
#ifdef HAVE_X86
    if (has512()) {
        memset(states, 0, 2 * (size_t)w);
        numbers512(&n, states);
        return;
    }
#endif
    (void)states;
    numbers_plain(&n);
}
