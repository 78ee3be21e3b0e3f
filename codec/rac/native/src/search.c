/* Viterbi search of one column (encoder). It is held to all paths of short columns, and to itself under each
 * instruction set: plain float32 arithmetic in a fixed order, no contraction to fused operations (setup.py). */
#include <math.h>
#include "states.h"

/* The best coded integer of each subset for sample i, and its cost, in rows of n: subset 2 g + b has sign (-1)^g and
 * the integers of parity b */
static inline void subsets(float x, const float *rec, const float *rate, int most, int64_t i, int64_t n, float *cost,
                           int16_t *best) {
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
            cost[(2 * g + b) * n + i] = better ? d : c;
            best[(2 * g + b) * n + i] = (int16_t)(better ? in : k);
        }
    }
}

#ifdef WIDE
/* Magnitudes and costs of the integers that most samples have */
#ifdef NEON
typedef struct { near_0 rec, rate; } tables;
#else /* looked_up does as much for them */
typedef struct { int none; } tables;
#define are_small(x) 0
#define look_up(table, k, in, c, d) (void)0
#endif

/* The same for the samples i and on in a register, all of one class or each of its own; table: or null */
INLINED void subsets_wide(const rac_search *s, const rac_column *c, int64_t i, const rac_room *room,
                          const tables *table) {
    const float *rec = s->rec + s->most;
    const int most = s->most;
    const floats x = *(const floats *)(c->x + i);
    const int near = table && are_small(x);
    for (int g = 0; g < 2; g++) {
        floats y = x;
        if (g) y = -y;
        for (int b = 0; b < 2; b++) {
            const int64_t at = (2 * g + b) * c->rows + i;
            const floats r = floored((y - 0.5f - 2.0f * (float)b) * 0.25f + 0.5f);
            ints k = held(nearest(r) * 2 + b, most - ((most & 1) != b));
            const ints in = k + 2 + ((k > 0) & -4);
            floats u, v, p, q;
            if (near) look_up(&table->rec, k, in, &u, &v);
            else looked_up(rec, most, k, in, &u, &v);
            if (s->row) looked_up_by_row(c->rate, s->row + i, 2 * most + 1, k, in, &p, &q);
            else if (near) look_up(&table->rate, k, in, &p, &q);
            else looked_up(c->rate, most, k, in, &p, &q);
            p = (y - u) * (y - u) + p;
            q = (y - v) * (y - v) + q;
            const mask better = below(q, p);
            *(floats *)(room->cost + at) = lesser(better, q, p);
            k = (ints)pick(better, (floats)in, (floats)k);
            put_integers(room->best + at, k);
        }
    }
}
#endif

static void all_subsets(const rac_search *s, const rac_column *c, const rac_room *room) {
    int64_t i = 0;
#ifdef WIDE
#ifdef NEON
    if (s->most >= 16) {
        const tables table = {near_0_of(s->rec + s->most), near_0_of(c->rate)};
        for (; i + LANES <= c->rows; i += LANES) subsets_wide(s, c, i, room, &table);
    }
#endif
    for (; i + LANES <= c->rows; i += LANES) subsets_wide(s, c, i, room, 0);
#endif
    for (; i < c->rows; i++)
        subsets(c->x[i], s->rec + s->most, rac_rate(s, c, i), s->most, i, c->rows, room->cost, room->best);
}

#ifndef AVX512
/* Costs c of the states after n samples, and for each the choice of the branch that it is reached by: a bit a state */
static void search_any(const rac_search *t, const float *cost, int64_t rows, int64_t n, uint16_t *choice, float *c) {
    const int s = t->states, words = s < 16 ? 1 : s / 16;
    int from[2][STATES];
    float next[STATES];
    for (int q = 0; q < s; q++)
        for (int b = 0; b < 2; b++) from[b][q] = rac_from(t, q, b);
    for (int64_t i = 0; i < n; i++, cost++, choice += words) {
        for (int w = 0; w < words; w++) choice[w] = 0;
        for (int q = 0; q < s; q++) {
            const float *sub = cost + (q < s / 2 ? 0 : 2 * rows);
            const float a = c[from[0][q]] + sub[0], b = c[from[1][q]] + sub[rows];
            choice[q / 16] |= (uint16_t)((b < a) << (q & 15));
            next[q] = b < a ? b : a;
        }
        const float base = (i & 63) == 63 ? next[0] : 0.0f;
        for (int q = 0; q < s; q++) c[q] = next[q] - base;
    }
}
#endif

#ifdef WIDE
/* One sample: costs of 32 states that follow, number `pair` of such, from those of even states e and of odd ones o, 16
 * `blocks` of each; odd, odd_too: of which the lower and the upper 16 come */
INLINED void step_pair(int blocks, int pair, int odd, int odd_too, flips f, const float *e, const float *o,
                       const floats s[4], uint16_t *choice, float *e_next, float *o_next) {
    floats next[2 * PARTS];
    _Pragma("GCC unroll 2") for (int half = 0; half < 2; half++) {
        const int q = 2 * pair + half, from_odd = half ? odd_too : odd;
        mask m[PARTS];
        _Pragma("GCC unroll 4") for (int k = 0; k < PARTS; k++) {
            const int i = (from_odd ? q - blocks : q) * PARTS + k;
            const floats a = from_odd ? flipped(o, i, f.low) + s[2] : at(e, i) + s[0];
            const floats b = from_odd ? flipped(o, i, f.both) + s[3] : flipped(e, i, f.h1) + s[1];
            m[k] = below(b, a);
            next[half * PARTS + k] = lesser(m[k], b, a);
        }
        *(volatile uint16_t *)(choice + q) = bits(m); /* or compilers make vectors of them first */
    }
    _Pragma("GCC unroll 4") for (int k = 0; k < PARTS; k++) {
        put(e_next, pair * PARTS + k, evens(next[2 * k], next[2 * k + 1]));
        put(o_next, pair * PARTS + k, odds(next[2 * k], next[2 * k + 1]));
    }
}
/* All of them. More than 8 pairs are loops, each of states of one parity. */
INLINED void step(int blocks, flips f, const float *e, const float *o, const float *cost, int64_t rows,
                  uint16_t *choice, float *e_next, float *o_next) {
    const floats s[4] = {all(cost[0]), all(cost[rows]), all(cost[2 * rows]), all(cost[3 * rows])};
#define PAIR(odd, odd_too) step_pair(blocks, pair, odd, odd_too, f, e, o, s, choice, e_next, o_next)
    if (blocks <= 8)
        _Pragma("GCC unroll 8") for (int pair = 0; pair < blocks; pair++)
            PAIR(2 * pair >= blocks, 2 * pair + 1 >= blocks);
    else {
        _Pragma("GCC unroll 4") for (int pair = 0; pair < blocks / 2; pair++) PAIR(0, 0);
        _Pragma("GCC unroll 4") for (int pair = blocks / 2; pair < blocks; pair++) PAIR(1, 1);
    }
#undef PAIR
}

#ifdef AVX512
/* Up to 16 states in one register */
static void search_small(const rac_search *t, const float *cost, int64_t rows, int64_t n, uint16_t *choice,
                         float *out) {
    int32_t from[2][16], sub[2][16];
    float start[16];
    for (int q = 0; q < 16; q++) {
        const int in = q < t->states;
        for (int b = 0; b < 2; b++) {
            from[b][q] = in ? rac_from(t, q, b) : q;
            sub[b][q] = b + (in && q >= t->states / 2 ? 2 : 0);
        }
        start[q] = in ? out[q] : 1e30f;
    }
    const __m512i fa = _mm512_loadu_si512(from[0]), fb = _mm512_loadu_si512(from[1]);
    const __m512i sa = _mm512_loadu_si512(sub[0]), sb = _mm512_loadu_si512(sub[1]);
    const uint16_t some = (uint16_t)((1u << t->states) - 1);
    __m512 c = _mm512_loadu_ps(start);
    for (int64_t i = 0; i < n; i++, cost++) {
        const __m512 w = _mm512_broadcast_f32x4(_mm_set_ps(cost[3 * rows], cost[2 * rows], cost[rows], cost[0]));
        const __m512 a = _mm512_add_ps(_mm512_permutexvar_ps(fa, c), _mm512_permutevar_ps(w, sa));
        const __m512 b = _mm512_add_ps(_mm512_permutexvar_ps(fb, c), _mm512_permutevar_ps(w, sb));
        choice[i] = _mm512_cmp_ps_mask(b, a, _CMP_LT_OQ) & some;
        c = _mm512_min_ps(b, a);
        if ((i & 63) == 63) c = _mm512_sub_ps(c, _mm512_broadcastss_ps(_mm512_castps512_ps128(c)));
    }
    _mm512_storeu_ps(start, c);
    memcpy(out, start, sizeof(float) * (size_t)t->states);
}
#elif defined(NEON)
/* Up to 16 states in R registers, a quarter as many */
INLINED uint8x16_t of_registers(int R, const uint8x16x4_t *c, uint8x16_t at) {
    if (R == 1) return vqtbl1q_u8(c->val[0], at);
    if (R == 2) return vqtbl2q_u8((uint8x16x2_t){{c->val[0], c->val[1]}}, at);
    return vqtbl4q_u8(*c, at);
}
INLINED void search_registers(int R, const rac_search *t, const float *cost, int64_t rows, int64_t n, uint16_t *choice,
                              float *out) {
    uint8x16_t from[2][4];
    uint8x16x4_t c;
    float32x4_t own[4];
    for (int r = 0; r < R; r++) {
        c.val[r] = vld1q_u8((const uint8_t *)(out + 4 * r));
        for (int b = 0; b < 2; b++) {
            uint8_t at[16];
            for (int k = 0; k < 16; k++) at[k] = (uint8_t)(4 * rac_from(t, 4 * r + k / 4, b) + k % 4);
            from[b][r] = vld1q_u8(at);
        }
    }
    for (int64_t i = 0; i < n; i++, cost++) {
        mask m[PARTS] = {0};
        _Pragma("GCC unroll 4") for (int r = 0; r < R; r++) {
            const float *sub = cost + (r < R / 2 || R == 1 ? 0 : 2 * rows);
            float32x4_t sa = vld1q_dup_f32(sub), sb = vld1q_dup_f32(sub + rows);
            if (R == 1) {
                sa = vcombine_f32(vget_low_f32(sa), vld1_dup_f32(sub + 2 * rows));
                sb = vcombine_f32(vget_low_f32(sb), vld1_dup_f32(sub + 3 * rows));
            }
            const float32x4_t a = vaddq_f32(vreinterpretq_f32_u8(of_registers(R, &c, from[0][r])), sa);
            const float32x4_t b = vaddq_f32(vreinterpretq_f32_u8(of_registers(R, &c, from[1][r])), sb);
            m[r] = vcltq_f32(b, a);
            own[r] = vminq_f32(b, a);
        }
        choice[i] = bits(m);
        const float32x4_t base = vdupq_n_f32((i & 63) == 63 ? vgetq_lane_f32(own[0], 0) : 0.0f);
        for (int r = 0; r < R; r++) c.val[r] = vreinterpretq_u8_f32(vsubq_f32(own[r], base));
    }
    for (int r = 0; r < R; r++) vst1q_u8((uint8_t *)(out + 4 * r), c.val[r]);
}
static void search_small(const rac_search *t, const float *cost, int64_t rows, int64_t n, uint16_t *choice, float *c) {
    if (t->states == 16) search_registers(4, t, cost, rows, n, choice, c);
    else if (t->states == 8) search_registers(2, t, cost, rows, n, choice, c);
    else if (t->states == 4) search_registers(1, t, cost, rows, n, choice, c);
    else search_any(t, cost, rows, n, choice, c);
}
#else
#define search_small search_any
#endif

/* 32 `blocks` states */
INLINED void search_wide(int blocks, const rac_search *t, const float *cost, int64_t rows, int64_t n, uint16_t *choice,
                         float *c) {
    const flips f = flips_of(t);
    float e[2][STATES / 2 + 16], o[2][STATES / 2 + 16]; /* before and after a sample, in turns; not 4096 bytes apart */
    for (int u = 0; u < 16 * blocks; u++) {
        e[0][u] = c[2 * u];
        o[0][u] = c[2 * u + 1];
    }
    for (int64_t i = 0; i < n; i++, cost++, choice += 2 * blocks) {
        const int from = i & 1, to = !from;
        step(blocks, f, e[from], o[from], cost, rows, choice, e[to], o[to]);
        const float base = e[to][0];
        for (int u = 0; (i & 63) == 63 && u < 16 * blocks; u++) {
            e[to][u] -= base;
            o[to][u] -= base;
        }
    }
    for (int u = 0; u < 16 * blocks; u++) {
        c[2 * u] = e[n & 1][u];
        c[2 * u + 1] = o[n & 1][u];
    }
}

#ifdef NEON
/* The code of 256 states that files have. With its numbers known, every address is; costs of odd states lie in the order in
 * which they are asked for, number u at u ^ LOW. H1 changes places of neighbours, and LOW of halves, within a register. */
enum { H0 = 166, H1 = 121, LOW = H0 & 127 };
#define CONSTANT(t) ((t)->h0 == H0 && (t)->h1 == H1 && (t)->states == 256)

/* The choice of state q is bit q / 4 % 32 of a word, one insertion for a register, of 4 words for each half of them */
INLINED unsigned place_of(unsigned q) { return (q & 128) | (q & 3) << 5 | (q >> 2 & 31); }

/* One sample for half of the states, from those of one parity, by branches of costs s0, s1; returns the choices */
INLINED uint32x4_t half256(const float *restrict p, float32x4_t s0, float32x4_t s1, int base, float *restrict e,
                           float *restrict o) {
    uint32x4_t low = vdupq_n_u32(0), high = low;
#define REGISTER(i) vld1q_f32(p + 4 * (i))
#define NEXT(n, m, own, other) \
    const float32x4_t a##n = vaddq_f32(own, s0), b##n = vaddq_f32(vrev64q_f32(other), s1); \
    const float32x4_t n = vminq_f32(b##n, a##n); \
    const uint32x4_t m = vcltq_f32(b##n, a##n);
#define PUT(at, x, y) \
    vst1q_f32(e + 4 * (base + (at)), vuzp1q_f32(x, y)); \
    vst1q_f32(o + 4 * ((base + (at)) ^ LOW / 4), vuzp2q_f32(y, x));
#define FOUR(k) { /* registers 2 k, 2 k + 1, and those that H1 makes of them */ \
        const float32x4_t x0 = REGISTER(2 * k), x1 = REGISTER(2 * k + 1); \
        const float32x4_t y0 = REGISTER(30 - 2 * k), y1 = REGISTER(31 - 2 * k); \
        NEXT(n0, m0, x0, y0) NEXT(n1, m1, x1, y1) NEXT(n2, m2, y0, x0) NEXT(n3, m3, y1, x1) \
        low = vsliq_n_u32(vsliq_n_u32(low, m0, 2 * k), m1, 2 * k + 1); \
        high = k ? vsriq_n_u32(high, m3, 2 * k + !k) : m3; \
        high = vsriq_n_u32(high, m2, 2 * k + 1); \
        PUT(k, n0, n1) PUT(15 - k, n2, n3) }
    FOUR(0) FOUR(1) FOUR(2) FOUR(3) FOUR(4) FOUR(5) FOUR(6) FOUR(7)
#undef REGISTER
#undef NEXT
#undef PUT
#undef FOUR
    return vbslq_u32(vdupq_n_u32(0xffff), low, high);
}
__attribute__((noinline)) /* or compilers take what is in memory for registers, and run out of them */
static void step256(const float *e, const float *o, const float *cost, int64_t rows, uint16_t *choice, float *to_e,
                    float *to_o) {
    const uint32x4_t even = half256(e, vld1q_dup_f32(cost), vld1q_dup_f32(cost + rows), 0, to_e, to_o);
    cost += 2 * rows;
    const uint32x4_t odd = half256(o, vld1q_dup_f32(cost), vld1q_dup_f32(cost + rows), 16, to_e, to_o);
    vst1q_u16(choice, vreinterpretq_u16_u32(even));
    vst1q_u16(choice + 8, vreinterpretq_u16_u32(odd));
}
static void search_constant(const float *cost, int64_t rows, int64_t n, uint16_t *choice, float *c) {
    float e[128], o[128], e1[128], o1[128]; /* before a sample of an even number, before one of an odd one */
    for (int u = 0; u < 128; u++) {
        e[u] = c[2 * u];
        o[u] = c[2 * (u ^ LOW) + 1];
    }
    for (int64_t i = 0; i + 1 < n; i += 2, cost += 2, choice += 32) {
        step256(e, o, cost, rows, choice, e1, o1);
        step256(e1, o1, cost + 1, rows, choice + 16, e, o);
        const float base = e[0];
        for (int u = 0; (i & 63) == 62 && u < 128; u++) {
            e[u] -= base;
            o[u] -= base;
        }
    }
    if (n & 1) step256(e, o, cost, rows, choice, e1, o1);
    for (int u = 0; u < 128; u++) {
        c[2 * u] = n & 1 ? e1[u] : e[u];
        c[2 * (u ^ LOW) + 1] = n & 1 ? o1[u] : o[u];
    }
}
#endif

static void search(const rac_search *t, const float *cost, int64_t rows, int64_t n, uint16_t *choice, float *c) {
#ifdef NEON
    if (CONSTANT(t)) {
        search_constant(cost, rows, n, choice, c);
        return;
    }
#endif
    if (t->states == 1024) search_wide(32, t, cost, rows, n, choice, c);
    else if (t->states == 512) search_wide(16, t, cost, rows, n, choice, c);
    else if (t->states == 256) search_wide(8, t, cost, rows, n, choice, c);
    else if (t->states == 128) search_wide(4, t, cost, rows, n, choice, c);
    else if (t->states == 64) search_wide(2, t, cost, rows, n, choice, c);
    else if (t->states == 32) search_wide(1, t, cost, rows, n, choice, c);
    else search_small(t, cost, rows, n, choice, c);
}
#else
static void search(const rac_search *t, const float *cost, int64_t rows, int64_t n, uint16_t *choice, float *c) {
    search_any(t, cost, rows, n, choice, c);
}
#endif

#ifndef NEON
#define CONSTANT(t) 0
INLINED unsigned place_of(unsigned q) { return q; }
#endif

/* Without a trellis (states 1), each sample alone. As rac_viterbi. */
static void scalar(const rac_search *s, const rac_column *c) {
    for (int64_t i = 0; i < c->rows; i++) {
        c->out[i] = (int16_t)rac_alone(s, rac_rate(s, c, i), c->x[i]);
        c->value[i] = s->rec[s->most + c->out[i]];
    }
}

/* The path to state q behind m samples from `a` on. Each step waits for the one before it: as rac_from, no branches */
INLINED void back(const rac_search *s, const rac_column *c, const rac_room *room, int64_t a, int64_t m, int words,
                  unsigned q, int constant) {
    const float *rec = s->rec + s->most;
    const unsigned half = (unsigned)s->states / 2, within = half - 1, low = (unsigned)s->h0 & within;
    const unsigned h1 = (unsigned)s->h1;
    const uint16_t *choice = room->choice + m * words;
    for (int64_t i = a + m - 1; i >= a; i--) {
        choice -= words;
        const unsigned at = constant ? place_of(q) : q, b = choice[at / 16] >> (at & 15) & 1, g = (q & half) != 0;
        const int k = room->best[(2 * g + b) * c->rows + i];
        c->out[i] = (int16_t)k;
        uint32_t value;
        memcpy(&value, rec + k, 4);
        value ^= g << 31;
        memcpy(c->value + i, &value, 4);
        q = 2 * ((q & within) ^ (-g & low) ^ (-b & h1)) + g;
    }
}

/* Integers k of a column of least sum (x - sign rec[k])^2 + rate[k], and their values, sign rec[k] */
void rac_viterbi(const rac_search *s, const rac_column *c, const rac_room *room) {
    if (s->states == 1) {
        scalar(s, c);
        return;
    }
    const int words = s->states < 16 ? 1 : s->states / 16;
    all_subsets(s, c, room);
    for (int64_t a = 0; a < c->rows; a += s->lane) {
        const int64_t m = least(c->rows - a, s->lane);
        float cost[STATES];
        cost[0] = 0.0f;
        for (int q = 1; q < s->states; q++) cost[q] = 1e30f;
        search(s, room->cost + a, c->rows, m, room->choice, cost);
        int q = 0;
        for (int p = 1; p < s->states; p++)
            if (cost[p] < cost[q]) q = p;
        if (CONSTANT(s)) back(s, c, room, a, m, words, (unsigned)q, 1);
        else back(s, c, room, a, m, words, (unsigned)q, 0);
    }
}
