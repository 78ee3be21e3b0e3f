/* ANS lanes to coded symbols (stages/lanes.md). Twin: rac/native/lanes.py. */
#include "tile.h"

static inline uint64_t step(uint64_t x, const uint32_t *lut, uint8_t *o, const uint32_t **words, uint32_t *left) {
    const uint32_t e = lut[(x >> 12) & 4095];
    *o = (uint8_t)e;
    x = ((((x >> 24) * (e >> 20)) + ((e >> 8) & 4095)) << 12) | (x & 4095);
    if ((x >> 32) == 0 && *left) {
        x = (x << 32) | *(*words)++;
        --*left;
    }
    return x;
}

/* The next `n` symbols of any number of lanes */
static void rows_plain(rac_lanes *t, int64_t n, int64_t lanes) {
    for (; n > 0; n -= lanes)
        for (int64_t l = 0; l < lanes && l < n; l++)
            t->st[l] = step(t->st[l], t->lut, t->out++, &t->words, t->left + l);
}

/* N tiles of L lanes, `steps` rows of all. A row may read, not take, one word more than it takes. */
INLINED void rows_of(rac_lanes **tile, int64_t steps, const int N, const int L) {
    uint64_t x[4][4];
    uint32_t left[4][4];
    const uint32_t *words[4], *lut[4];
    uint8_t *out[4];
    for (int k = 0; k < N; k++) {
        memcpy(x[k], tile[k]->st, 8 * (size_t)L);
        memcpy(left[k], tile[k]->left, 4 * (size_t)L);
        words[k] = tile[k]->words;
        lut[k] = tile[k]->lut;
        out[k] = tile[k]->out;
    }
    for (int64_t t = 0; t < steps * L; t += L)
        _Pragma("GCC unroll 4") for (int k = 0; k < N; k++)
            _Pragma("GCC unroll 4") for (int l = 0; l < L; l++) {
                uint64_t v = x[k][l];
                const uint32_t e = lut[k][(v >> 12) & 4095], word = *words[k];
                out[k][t + l] = (uint8_t)e;
                v = (((v >> 24) * (e >> 20) + ((e >> 8) & 4095)) << 12) | (v & 4095);
                const uint32_t need = (v >> 32 == 0) & (left[k][l] != 0);
                x[k][l] = v << 32 * need | (word & (0 - need)); /* no branch, which would be guessed wrong */
                words[k] += need;
                left[k][l] -= need;
            }
    for (int k = 0; k < N; k++) {
        memcpy(tile[k]->st, x[k], 8 * (size_t)L);
        memcpy(tile[k]->left, left[k], 4 * (size_t)L);
        tile[k]->words = words[k];
        tile[k]->out += steps * L;
    }
}

#ifdef AVX512
/* The words that the 8 lanes of a vector take, which are lanes of one tile, four each of two, or two each of four;
 * `need`: those that take one. As many words are read as there are lanes, whether they are taken or not. */
INLINED __m256i words_of_8(const uint32_t **at, __mmask8 need) {
    const __m256i w = _mm256_maskz_expand_epi32(need, _mm256_loadu_si256((const void *)at[0]));
    at[0] += __builtin_popcount(need);
    return w;
}
INLINED __m256i words_of_4(const uint32_t **at, __mmask8 need) {
    const __m128i a = _mm_maskz_expand_epi32(need & 15, _mm_loadu_si128((const void *)at[0]));
    const __m128i b = _mm_maskz_expand_epi32(need >> 4, _mm_loadu_si128((const void *)at[1]));
    for (int k = 0; k < 2; k++) at[k] += __builtin_popcount(need & 15u << 4 * k);
    return _mm256_inserti128_si256(_mm256_castsi128_si256(a), b, 1);
}
INLINED __m256i words_of_2(const uint32_t **at, __mmask8 need) {
    __m128i a = _mm_loadl_epi64((const void *)at[0]), b = _mm_loadl_epi64((const void *)at[2]);
    a = _mm_castps_si128(_mm_loadh_pi(_mm_castsi128_ps(a), (const void *)at[1]));
    b = _mm_castps_si128(_mm_loadh_pi(_mm_castsi128_ps(b), (const void *)at[3]));
    const __m256i w = _mm256_inserti128_si256(_mm256_castsi128_si256(a), b, 1);
    for (int k = 0; k < 4; k++) at[k] += __builtin_popcount(need & 3u << 2 * k);
    return _mm256_mask_mov_epi32(_mm256_shuffle_epi32(w, 0xa0), (__mmask8)(need << 1 & 0xaa), w);
}

/* Table entries of 8 states, W lanes of each tile. Plain loads and inserts: the gathers of some CPUs are slower
 * (docs/experiments.md). */
INLINED __m256i entries(const uint32_t **p, __m512i x, const int W) {
    const __m128i q = _mm512_cvtepi64_epi16(_mm512_and_si512(_mm512_srli_epi64(x, 12), _mm512_set1_epi64(4095)));
    const uint64_t a = (uint64_t)_mm_cvtsi128_si64(q), b = (uint64_t)_mm_extract_epi64(q, 1);
    __m128i e0 = _mm_cvtsi32_si128((int)p[0][(uint16_t)a]), e1 = _mm_cvtsi32_si128((int)p[4 / W][(uint16_t)b]);
    e0 = _mm_insert_epi32(e0, (int)p[1 / W][(uint16_t)(a >> 16)], 1);
    e0 = _mm_insert_epi32(e0, (int)p[2 / W][(uint16_t)(a >> 32)], 2);
    e0 = _mm_insert_epi32(e0, (int)p[3 / W][a >> 48], 3);
    e1 = _mm_insert_epi32(e1, (int)p[5 / W][(uint16_t)(b >> 16)], 1);
    e1 = _mm_insert_epi32(e1, (int)p[6 / W][(uint16_t)(b >> 32)], 2);
    e1 = _mm_insert_epi32(e1, (int)p[7 / W][b >> 48], 3);
    return _mm256_inserti128_si256(_mm256_castsi128_si256(e0), e1, 1);
}

/* 8 states after a step that yielded the entries `e`, without the words that are taken; `need`: those that take one */
INLINED __m512i stepped(__m512i x, __m256i e, __m256i left, __mmask8 *need) {
    const __m512i f = _mm512_cvtepu32_epi64(_mm256_srli_epi32(e, 20));
    const __m512i d = _mm512_cvtepu32_epi64(_mm256_and_si256(_mm256_srli_epi32(e, 8), _mm256_set1_epi32(4095)));
    __m512i y = _mm512_add_epi64(_mm512_mullo_epi64(_mm512_srli_epi64(x, 24), f), d);
    y = _mm512_or_si512(_mm512_slli_epi64(y, 12), _mm512_and_si512(x, _mm512_set1_epi64(4095)));
    *need = _mm512_testn_epi64_mask(y, _mm512_set1_epi64((int64_t)0xffffffff00000000ull));
    *need = _mm256_mask_test_epi32_mask(*need, left, left);
    return y;
}

/* As rows_of, in V vectors of 8 lanes. A vector is a part of a tile, or several tiles; T tiles of it, P vectors of a
 * tile. */
INLINED void rows512_of(rac_lanes **tile, int64_t steps, const int N, const int L) {
    const int V = N * L / 8, W = L < 8 ? L : 8, T = 8 / W, P = L / W;
    uint64_t st[32];
    uint32_t left[32];
    const uint32_t *words[16], *lut[16];
    uint8_t *out[16];
    for (int k = 0; k < N; k++) {
        memcpy(st + L * k, tile[k]->st, 8 * (size_t)L);
        memcpy(left + L * k, tile[k]->left, 4 * (size_t)L);
        words[k] = tile[k]->words;
        lut[k] = tile[k]->lut;
        out[k] = tile[k]->out;
    }
    __m512i x[4];
    __m256i c[4];
    for (int k = 0; k < V; k++) {
        x[k] = _mm512_loadu_si512(st + 8 * k);
        c[k] = _mm256_loadu_si256((const void *)(left + 8 * k));
    }
    for (int64_t t = 0; t < steps * L; t += L)
        _Pragma("GCC unroll 4") for (int k = 0; k < V; k++) {
            const int first = T * k / P;
            const __m256i e = entries(lut + first, x[k], W);
            const uint64_t s = (uint64_t)_mm_cvtsi128_si64(_mm256_cvtepi32_epi8(e));
            for (int i = 0; i < T; i++) {
                const uint64_t part = s >> 8 * W * i % 64;
                memcpy(out[first + i] + t + 8 * (k % P), &part, (size_t)W);
            }
            __mmask8 need;
            const __m512i y = stepped(x[k], e, c[k], &need);
            const uint32_t **at = words + first;
            const __m256i taken = L == 2 ? words_of_2(at, need) : L == 4 ? words_of_4(at, need) : words_of_8(at, need);
            x[k] = _mm512_mask_or_epi64(y, need, _mm512_slli_epi64(y, 32), _mm512_cvtepu32_epi64(taken));
            c[k] = _mm256_mask_sub_epi32(c[k], need, c[k], _mm256_set1_epi32(1));
        }
    for (int k = 0; k < V; k++) {
        _mm512_storeu_si512(st + 8 * k, x[k]);
        _mm256_storeu_si256((void *)(left + 8 * k), c[k]);
    }
    for (int k = 0; k < N; k++) {
        memcpy(tile[k]->st, st + L * k, 8 * (size_t)L);
        memcpy(tile[k]->left, left + L * k, 4 * (size_t)L);
        tile[k]->words = words[k];
        tile[k]->out += steps * L;
    }
}
#endif

/* Ways to step several tiles; the most tiles at once come first */
typedef struct { int64_t lanes; int tiles; void (*run)(rac_lanes **, int64_t); } way;
#define WAYS(W) W(4, 1) W(4, 2) W(4, 4) W(2, 1) W(2, 2) W(2, 4)
#define ROWS(n, l) static void rows_##n##x##l(rac_lanes **t, int64_t steps) { rows_of(t, steps, n, l); }
#define WAY(n, l) {l, n, rows_##n##x##l},
WAYS(ROWS)
#ifdef AVX512
#define WAYS512(W) W(16, 2) W(8, 2) W(8, 4) W(4, 4) W(4, 8) W(2, 8) W(1, 8) W(2, 16) W(1, 16) W(1, 32)
#define ROWS512(n, l) static void rows512_##n##x##l(rac_lanes **t, int64_t steps) { rows512_of(t, steps, n, l); }
#define WAY512(n, l) {l, n, rows512_##n##x##l},
WAYS512(ROWS512)
static const way ways[] = {WAYS512(WAY512) WAYS(WAY) {0}};
#else
static const way ways[] = {WAYS(WAY) {0}};
#endif

/* What steps as many of n tiles at once as it can; tiles is 0 where there is nothing for so many lanes */
static const way *way_of(int n, int64_t lanes) {
    const way *w = ways;
    while (w->run && (w->lanes != lanes || w->tiles > n)) w++;
    return w;
}

/* The next `n` symbols of one tile */
void rac_rows(rac_lanes *t, int64_t n, int64_t lanes) {
    const way *w = way_of(1, lanes);
    while (w->run) { /* a row takes at most `lanes` words, so that so many rows are safe */
        const int64_t steps = least(n / lanes, (t->end - t->words) / lanes);
        if (steps < 4) break;
        w->run(&t, steps);
        n -= steps * lanes;
    }
    rows_plain(t, n, lanes);
}

/* Whether tiles of so many lanes are decoded side by side */
int rac_few(int64_t lanes) {
#ifdef AVX512
    if (lanes == 8 || lanes == 16) return 1;
#endif
    return lanes == 1 || lanes == 2 || lanes == 4;
}

/* Step n tiles until one is at the end of its table, or all but one row */
void rac_side_by_side(rac_lanes **tile, int n, int64_t lanes) {
    const way *w = way_of(n, lanes);
    const int take = w->run ? w->tiles : 1;
    int64_t steps = w->run ? INT64_MAX : 0;
    for (int k = 0; k < take && steps; k++)
        steps = least(steps, least(tile[k]->rest / lanes, (tile[k]->end - tile[k]->words) / lanes));
    if (steps > 0) w->run(tile, steps);
    for (int k = 0; k < take; k++) {
        rac_lanes *t = tile[k];
        t->rest -= steps * lanes;
        if (w->run && t->rest >= lanes && t->end - t->words >= lanes) continue;
        /* the last row of a table, or words near the end of what may be read */
        const int64_t m = w->run && t->rest > lanes ? lanes : t->rest;
        rac_rows(t, m, lanes);
        t->rest -= m;
    }
}
