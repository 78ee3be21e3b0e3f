/* ANS lanes to coded symbols (stages/lanes.md): the lanes of one tile, and several tiles of few lanes side by side. */
#ifndef RAC_LANES_H
#define RAC_LANES_H
#include "kernels.h"

static inline uint64_t step(uint64_t x, const uint32_t *lut, uint8_t *o, const uint32_t **words, uint32_t *left) {
    uint32_t e = lut[(x >> 12) & 4095];
    *o = (uint8_t)e;
    x = ((((x >> 24) * (e >> 20)) + ((e >> 8) & 4095)) << 12) | (x & 4095);
    if ((x >> 32) == 0 && *left) { x = (x << 32) | *(*words)++; --*left; }
    return x;
}

/* The lanes of a tile under one table */
typedef struct {
    uint64_t *st;
    uint32_t *left;            /* words of each lane */
    const uint32_t *words, *end; /* the next, and as far as memory may be read */
    const uint32_t *lut;
    uint8_t *out;              /* place of the next symbol; row by row, the first of lane 0 */
    int64_t rest;              /* symbols left under this table */
} rac_lanes;

/* The next `n` symbols */
static void rows_scalar(rac_lanes *t, int64_t n, int64_t lanes) {
    for (; n > 0; n -= lanes)
        for (int64_t l = 0; l < lanes && l < n; l++) t->st[l] = step(t->st[l], t->lut, t->out++, &t->words, t->left + l);
}

/* N tiles of L lanes, `steps` rows of all. A row may read, not take, one word more than it takes. */
#define ROWS_OF(NAME, N, L)                                                                                   \
    CLONES static void NAME(rac_lanes **tile, int64_t steps) {                                                \
        uint64_t x[N][L];                                                                                     \
        uint32_t left[N][L];                                                                                  \
        const uint32_t *words[N], *lut[N];                                                                    \
        uint8_t *out[N];                                                                                      \
        for (int k = 0; k < N; k++) {                                                                         \
            memcpy(x[k], tile[k]->st, sizeof x[k]);                                                           \
            memcpy(left[k], tile[k]->left, sizeof left[k]);                                                   \
            words[k] = tile[k]->words; lut[k] = tile[k]->lut; out[k] = tile[k]->out;                          \
        }                                                                                                     \
        for (int64_t t = 0; t < steps * L; t += L)                                                            \
            _Pragma("GCC unroll 4") for (int k = 0; k < N; k++)                                               \
                _Pragma("GCC unroll 4") for (int l = 0; l < L; l++) {                                         \
                    uint64_t v = x[k][l];                                                                     \
                    const uint32_t e = lut[k][(v >> 12) & 4095], word = *words[k];                            \
                    out[k][t + l] = (uint8_t)e;                                                               \
                    v = (((v >> 24) * (e >> 20) + ((e >> 8) & 4095)) << 12) | (v & 4095);                     \
                    const uint32_t need = (v >> 32 == 0) & (left[k][l] != 0);                                 \
                    x[k][l] = v << 32 * need | (word & (0 - need)); /* no branch, which would be guessed wrong */ \
                    words[k] += need;                                                                         \
                    left[k][l] -= need;                                                                       \
                }                                                                                             \
        for (int k = 0; k < N; k++) {                                                                         \
            memcpy(tile[k]->st, x[k], sizeof x[k]);                                                           \
            memcpy(tile[k]->left, left[k], sizeof left[k]);                                                   \
            tile[k]->words = words[k];                                                                        \
            tile[k]->out += steps * L;                                                                        \
        }                                                                                                     \
    }
ROWS_OF(rows_4x1, 4, 1)
ROWS_OF(rows_4x2, 4, 2)
ROWS_OF(rows_4x4, 4, 4)
ROWS_OF(rows_2x1, 2, 1)
ROWS_OF(rows_2x2, 2, 2)
ROWS_OF(rows_2x4, 2, 4)

#ifdef HAVE_X86
#define AVX512BW __attribute__((target("avx512f,avx512bw,avx512vl")))
#define AVX512 __attribute__((target("avx512f,avx512dq,avx512bw,avx512vl")))

/* The words that the 8 lanes of a vector take, which are lanes of one tile, four each of two, or two each of four; `need`:
 * those that take one. As many words are read as there are lanes, whether they are taken or not. */
AVX512 static inline __m256i words_of_8(const uint32_t **at, __mmask8 need) {
    const __m256i w = _mm256_maskz_expand_epi32(need, _mm256_loadu_si256((const void *)at[0]));
    at[0] += __builtin_popcount(need);
    return w;
}
AVX512 static inline __m256i words_of_4(const uint32_t **at, __mmask8 need) {
    const __m128i a = _mm_maskz_expand_epi32(need & 15, _mm_loadu_si128((const void *)at[0]));
    const __m128i b = _mm_maskz_expand_epi32(need >> 4, _mm_loadu_si128((const void *)at[1]));
    for (int k = 0; k < 2; k++) at[k] += __builtin_popcount(need & 15u << 4 * k);
    return _mm256_inserti128_si256(_mm256_castsi128_si256(a), b, 1);
}
AVX512 static inline __m256i words_of_2(const uint32_t **at, __mmask8 need) {
    __m128i a = _mm_loadl_epi64((const void *)at[0]), b = _mm_loadl_epi64((const void *)at[2]);
    a = _mm_castps_si128(_mm_loadh_pi(_mm_castsi128_ps(a), (const void *)at[1]));
    b = _mm_castps_si128(_mm_loadh_pi(_mm_castsi128_ps(b), (const void *)at[3]));
    const __m256i w = _mm256_inserti128_si256(_mm256_castsi128_si256(a), b, 1);
    for (int k = 0; k < 4; k++) at[k] += __builtin_popcount(need & 3u << 2 * k);
    return _mm256_mask_mov_epi32(_mm256_shuffle_epi32(w, 0xa0), (__mmask8)(need << 1 & 0xaa), w);
}

/* As ROWS_OF, in vectors of 8 lanes. A vector is a part of a tile, or several tiles; T tiles of it, P vectors of a tile.
 * Plain loads and inserts fetch the table entries: the gathers of some CPUs are slower (docs/experiments.md). */
#define ROWS512(NAME, N, L, WORDS)                                                                             \
    AVX512 static void NAME(rac_lanes **tile, int64_t steps) {                                                 \
        enum { V = N * L / 8, W = L < 8 ? L : 8, T = 8 / W, P = L / W };                                       \
        const __m512i m12 = _mm512_set1_epi64(4095), high = _mm512_set1_epi64((int64_t)0xffffffff00000000ull); \
        const __m256i m12s = _mm256_set1_epi32(4095), one = _mm256_set1_epi32(1);                              \
        uint64_t st[N * L];                                                                                    \
        uint32_t left[N * L];                                                                                  \
        const uint32_t *words[N], *lut[N];                                                                     \
        uint8_t *out[N];                                                                                       \
        for (int k = 0; k < N; k++) {                                                                          \
            memcpy(st + L * k, tile[k]->st, 8 * L);                                                            \
            memcpy(left + L * k, tile[k]->left, 4 * L);                                                        \
            words[k] = tile[k]->words; lut[k] = tile[k]->lut; out[k] = tile[k]->out;                           \
        }                                                                                                      \
        __m512i x[V];                                                                                          \
        __m256i c[V];                                                                                          \
        for (int k = 0; k < V; k++) {                                                                          \
            x[k] = _mm512_loadu_si512(st + 8 * k);                                                             \
            c[k] = _mm256_loadu_si256((const void *)(left + 8 * k));                                           \
        }                                                                                                      \
        for (int64_t t = 0; t < steps * L; t += L)                                                             \
            _Pragma("GCC unroll 4") for (int k = 0; k < V; k++) {                                              \
                const int first = T * k / P;                                                                   \
                const uint32_t **p = lut + first;                                                              \
                const __m128i q = _mm512_cvtepi64_epi16(_mm512_and_si512(_mm512_srli_epi64(x[k], 12), m12));   \
                const uint64_t a = (uint64_t)_mm_cvtsi128_si64(q), b = (uint64_t)_mm_extract_epi64(q, 1);      \
                __m128i e0 = _mm_cvtsi32_si128((int)p[0][(uint16_t)a]), e1 = _mm_cvtsi32_si128((int)p[4 / W][(uint16_t)b]); \
                e0 = _mm_insert_epi32(e0, (int)p[1 / W][(uint16_t)(a >> 16)], 1);                              \
                e0 = _mm_insert_epi32(e0, (int)p[2 / W][(uint16_t)(a >> 32)], 2);                              \
                e0 = _mm_insert_epi32(e0, (int)p[3 / W][a >> 48], 3);                                          \
                e1 = _mm_insert_epi32(e1, (int)p[5 / W][(uint16_t)(b >> 16)], 1);                              \
                e1 = _mm_insert_epi32(e1, (int)p[6 / W][(uint16_t)(b >> 32)], 2);                              \
                e1 = _mm_insert_epi32(e1, (int)p[7 / W][b >> 48], 3);                                          \
                const __m256i e = _mm256_inserti128_si256(_mm256_castsi128_si256(e0), e1, 1);                  \
                const uint64_t s = (uint64_t)_mm_cvtsi128_si64(_mm256_cvtepi32_epi8(e));                       \
                for (int i = 0; i < T; i++) {                                                                  \
                    const uint64_t part = s >> 8 * W * i % 64;                                                 \
                    memcpy(out[first + i] + t + 8 * (k % P), &part, W);                                        \
                }                                                                                              \
                const __m512i f = _mm512_cvtepu32_epi64(_mm256_srli_epi32(e, 20));                             \
                const __m512i d = _mm512_cvtepu32_epi64(_mm256_and_si256(_mm256_srli_epi32(e, 8), m12s));      \
                __m512i y = _mm512_add_epi64(_mm512_mullo_epi64(_mm512_srli_epi64(x[k], 24), f), d);           \
                y = _mm512_or_si512(_mm512_slli_epi64(y, 12), _mm512_and_si512(x[k], m12));                    \
                __mmask8 need = _mm512_testn_epi64_mask(y, high);                                              \
                need = _mm256_mask_test_epi32_mask(need, c[k], c[k]);                                          \
                const __m512i w = _mm512_cvtepu32_epi64(WORDS(words + first, need));                           \
                x[k] = _mm512_mask_or_epi64(y, need, _mm512_slli_epi64(y, 32), w);                             \
                c[k] = _mm256_mask_sub_epi32(c[k], need, c[k], one);                                           \
            }                                                                                                  \
        for (int k = 0; k < V; k++) {                                                                          \
            _mm512_storeu_si512(st + 8 * k, x[k]);                                                             \
            _mm256_storeu_si256((void *)(left + 8 * k), c[k]);                                                 \
        }                                                                                                      \
        for (int k = 0; k < N; k++) {                                                                          \
            memcpy(tile[k]->st, st + L * k, 8 * L);                                                            \
            memcpy(tile[k]->left, left + L * k, 4 * L);                                                        \
            tile[k]->words = words[k];                                                                         \
            tile[k]->out += steps * L;                                                                         \
        }                                                                                                      \
    }
ROWS512(rows512_16x2, 16, 2, words_of_2)
ROWS512(rows512_8x2, 8, 2, words_of_2)
ROWS512(rows512_8x4, 8, 4, words_of_4)
ROWS512(rows512_4x4, 4, 4, words_of_4)
ROWS512(rows512_1x8, 1, 8, words_of_8)
ROWS512(rows512_2x8, 2, 8, words_of_8)
ROWS512(rows512_4x8, 4, 8, words_of_8)
ROWS512(rows512_1x16, 1, 16, words_of_8)
ROWS512(rows512_2x16, 2, 16, words_of_8)
ROWS512(rows512_1x32, 1, 32, words_of_8)
#endif

typedef void (*rac_side)(rac_lanes **, int64_t);

/* The most tiles at once come first */
typedef struct { int64_t lanes; int tiles; rac_side side; } rac_way;
static const rac_way ways[] = {{1, 4, rows_4x1}, {2, 4, rows_4x2}, {4, 4, rows_4x4}, {1, 2, rows_2x1}, {2, 2, rows_2x2}, {4, 2, rows_2x4}, {0}};
#ifdef HAVE_X86
static const rac_way ways512[] = {{2, 16, rows512_16x2}, {2, 8, rows512_8x2}, {4, 8, rows512_8x4}, {4, 4, rows512_4x4}, {8, 4, rows512_4x8}, {8, 2, rows512_2x8}, {8, 1, rows512_1x8},
                                  {16, 2, rows512_2x16}, {16, 1, rows512_1x16}, {32, 1, rows512_1x32}, {0}};
#endif

/* What steps as many of n tiles at once as it can, *take; null: one, a lane at a time */
static rac_side side_of(int n, int64_t lanes, int *take) {
    const rac_way *w = ways;
#ifdef HAVE_X86
    if (has512()) for (w = ways512; w->side && (w->lanes != lanes || w->tiles > n);) w++;
    if (!w->side) w = ways;
#endif
    while (w->side && (w->lanes != lanes || w->tiles > n)) w++;
    *take = w->side ? w->tiles : 1;
    return w->side;
}

/* `n` symbols of one tile */
static void rows(rac_lanes *t, int64_t n, int64_t lanes) {
    int take;
    const rac_side side = side_of(1, lanes, &take);
    while (side) { /* a row takes at most `lanes` words, so that so many rows are safe */
        int64_t steps = n / lanes, safe = (t->end - t->words) / lanes;
        if (safe < steps) steps = safe;
        if (steps < 4) break;
        side(&t, steps);
        n -= steps * lanes;
    }
    rows_scalar(t, n, lanes);
}

/* Lanes of a tile that has few of them */
enum { FEW = 16, SIDE_BY_SIDE = 16 };
static int is_few(int64_t lanes) { return lanes == 1 || lanes == 2 || lanes == 4 || ((lanes == 8 || lanes == 16) && has512()); }

/* Step n tiles until one is at the end of its table, or all but one row */
static void side_by_side(rac_lanes **tile, int n, int64_t lanes) {
    int take;
    const rac_side side = side_of(n, lanes, &take);
    int64_t steps = side ? INT64_MAX : 0;
    for (int k = 0; k < take && steps; k++) {
        const int64_t full = tile[k]->rest / lanes, safe = (tile[k]->end - tile[k]->words) / lanes;
        if (full < steps) steps = full;
        if (safe < steps) steps = safe;
    }
    if (steps > 0) side(tile, steps);
    for (int k = 0; k < take; k++) {
        rac_lanes *t = tile[k];
        t->rest -= steps * lanes;
        if (side && t->rest >= lanes && (t->end - t->words) >= lanes) continue;
        /* the last row of a table, or words near the end of what may be read */
        const int64_t m = side && t->rest > lanes ? lanes : t->rest;
        rows(t, m, lanes);
        t->rest -= m;
    }
}
#endif
