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

/* `n` coded symbols of one table, row by row of `lanes`, the first of lane 0; returns the next word */
static const uint32_t *rows_scalar(const uint32_t *lut, const uint32_t *words, uint32_t *left, uint64_t *st,
                                   uint8_t *out, int64_t n, int64_t lanes) {
    for (; n > 0; n -= lanes, out += lanes)
        for (int64_t l = 0; l < lanes && l < n; l++) st[l] = step(st[l], lut, out + l, &words, left + l);
    return words;
}

#ifdef HAVE_X86
#define AVX512BW __attribute__((target("avx512f,avx512bw,avx512vl")))
#define AVX512 __attribute__((target("avx512f,avx512dq,avx512bw,avx512vl")))
/* V x 8 lanes. Plain loads and inserts fetch the table entries: the gathers of some CPUs are slower (docs/experiments.md).
 * Eight words are read for each group whether it needs them or not: the caller leaves so many behind `words`. */
#define ROWS512(NAME, V)                                                                                      \
    AVX512 static const uint32_t *NAME(const uint32_t *lut, const uint32_t *words, uint32_t *left, uint64_t *st, \
                                       uint8_t *out, int64_t steps) {                                         \
        const __m512i m12 = _mm512_set1_epi64(4095), high = _mm512_set1_epi64((int64_t)0xffffffff00000000ull); \
        const __m256i m12s = _mm256_set1_epi32(4095), one = _mm256_set1_epi32(1);                             \
        __m512i x[V];                                                                                         \
        __m256i c[V];                                                                                         \
        for (int k = 0; k < V; k++) {                                                                         \
            x[k] = _mm512_loadu_si512(st + 8 * k);                                                            \
            c[k] = _mm256_loadu_si256((const void *)(left + 8 * k));                                          \
        }                                                                                                     \
        for (int64_t t = 0; t < steps; t++, out += 8 * V) {                                                   \
            _Pragma("GCC unroll 4") for (int k = 0; k < V; k++) {                                             \
                __m128i q = _mm512_cvtepi64_epi16(_mm512_and_si512(_mm512_srli_epi64(x[k], 12), m12));        \
                uint64_t a = (uint64_t)_mm_cvtsi128_si64(q), b = (uint64_t)_mm_extract_epi64(q, 1);           \
                __m128i e0 = _mm_cvtsi32_si128((int)lut[(uint16_t)a]), e1 = _mm_cvtsi32_si128((int)lut[(uint16_t)b]); \
                e0 = _mm_insert_epi32(e0, (int)lut[(uint16_t)(a >> 16)], 1);                                  \
                e0 = _mm_insert_epi32(e0, (int)lut[(uint16_t)(a >> 32)], 2);                                  \
                e0 = _mm_insert_epi32(e0, (int)lut[a >> 48], 3);                                              \
                e1 = _mm_insert_epi32(e1, (int)lut[(uint16_t)(b >> 16)], 1);                                  \
                e1 = _mm_insert_epi32(e1, (int)lut[(uint16_t)(b >> 32)], 2);                                  \
                e1 = _mm_insert_epi32(e1, (int)lut[b >> 48], 3);                                              \
                __m256i e = _mm256_inserti128_si256(_mm256_castsi128_si256(e0), e1, 1);                       \
                _mm_storel_epi64((void *)(out + 8 * k), _mm256_cvtepi32_epi8(e));                             \
                __m512i f = _mm512_cvtepu32_epi64(_mm256_srli_epi32(e, 20));                                  \
                __m512i d = _mm512_cvtepu32_epi64(_mm256_and_si256(_mm256_srli_epi32(e, 8), m12s));           \
                __m512i y = _mm512_add_epi64(_mm512_mullo_epi64(_mm512_srli_epi64(x[k], 24), f), d);             \
                y = _mm512_or_si512(_mm512_slli_epi64(y, 12), _mm512_and_si512(x[k], m12));                   \
                __mmask8 need = _mm512_testn_epi64_mask(y, high);                                             \
                need = _mm256_mask_test_epi32_mask(need, c[k], c[k]);                                         \
                __m256i w = _mm256_maskz_expand_epi32(need, _mm256_loadu_si256((const void *)words));         \
                words += __builtin_popcount(need);                                                            \
                y = _mm512_mask_or_epi64(y, need, _mm512_slli_epi64(y, 32), _mm512_cvtepu32_epi64(w));        \
                c[k] = _mm256_mask_sub_epi32(c[k], need, c[k], one);                                          \
                x[k] = y;                                                                                     \
            }                                                                                                 \
        }                                                                                                     \
        for (int k = 0; k < V; k++) {                                                                         \
            _mm512_storeu_si512(st + 8 * k, x[k]);                                                            \
            _mm256_storeu_si256((void *)(left + 8 * k), c[k]);                                                \
        }                                                                                                     \
        return words;                                                                                         \
    }
ROWS512(rows512x1, 1)
ROWS512(rows512x2, 2)
ROWS512(rows512x4, 4)
#endif

/* As rows_scalar; the memory that may be read goes to `end` */
static const uint32_t *rows(const uint32_t *lut, const uint32_t *words, const uint32_t *end, uint32_t *left,
                            uint64_t *st, uint8_t *out, int64_t n, int64_t lanes) {
#ifdef HAVE_X86
    if (has512() && (lanes == 8 || lanes == 16 || lanes == 32))
        for (;;) { /* a row takes at most `lanes` words, so that so many rows are safe */
            int64_t steps = n / lanes, safe = (end - words) / lanes;
            if (safe < steps) steps = safe;
            if (steps < 4) break;
            words = lanes == 32 ? rows512x4(lut, words, left, st, out, steps)
                  : lanes == 16 ? rows512x2(lut, words, left, st, out, steps) : rows512x1(lut, words, left, st, out, steps);
            out += steps * lanes;
            n -= steps * lanes;
        }
#endif
    return rows_scalar(lut, words, left, st, out, n, lanes);
}

/* Lanes of a tile that has few of them */
enum { FEW = 4, SIDE_BY_SIDE = 8 };
static int is_few(int64_t lanes) { return lanes == 1 || lanes == 2 || lanes == 4; }
typedef struct {
    uint64_t st[FEW];
    uint32_t left[FEW];        /* words of each lane */
    const uint32_t *words, *end; /* the next, and as far as memory may be read */
    const uint32_t *lut;
    uint8_t *out;              /* place of the next symbol */
    int64_t rest;              /* symbols left under this table */
} rac_lanes;

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
/* The words that 8 lanes of four tiles take, two lanes each, and of two tiles, four each; `need`: the lanes that take one */
AVX512 static inline __m256i words_of_2(const uint32_t **at, __mmask8 need) {
    __m128i a = _mm_loadl_epi64((const void *)at[0]), b = _mm_loadl_epi64((const void *)at[2]);
    a = _mm_castps_si128(_mm_loadh_pi(_mm_castsi128_ps(a), (const void *)at[1]));
    b = _mm_castps_si128(_mm_loadh_pi(_mm_castsi128_ps(b), (const void *)at[3]));
    const __m256i w = _mm256_inserti128_si256(_mm256_castsi128_si256(a), b, 1);
    for (int k = 0; k < 4; k++) at[k] += __builtin_popcount(need & 3u << 2 * k);
    return _mm256_mask_mov_epi32(_mm256_shuffle_epi32(w, 0xa0), (__mmask8)(need << 1 & 0xaa), w);
}
AVX512 static inline __m256i words_of_4(const uint32_t **at, __mmask8 need) {
    const __m128i a = _mm_maskz_expand_epi32(need & 15, _mm_loadu_si128((const void *)at[0]));
    const __m128i b = _mm_maskz_expand_epi32(need >> 4, _mm_loadu_si128((const void *)at[1]));
    for (int k = 0; k < 2; k++) at[k] += __builtin_popcount(need & 15u << 4 * k);
    return _mm256_inserti128_si256(_mm256_castsi128_si256(a), b, 1);
}

/* As ROWS_OF, 16 lanes: a row reads the words of all its lanes, whether they are taken or not */
#define SIDE512(NAME, L, WORDS)                                                                                \
    AVX512 static void NAME(rac_lanes **tile, int64_t steps) {                                                 \
        enum { N = 16 / L, T = 8 / L };                                                                        \
        const __m512i m12 = _mm512_set1_epi64(4095), high = _mm512_set1_epi64((int64_t)0xffffffff00000000ull); \
        const __m256i m12s = _mm256_set1_epi32(4095), one = _mm256_set1_epi32(1);                              \
        uint64_t st[16];                                                                                       \
        uint32_t left[16];                                                                                     \
        const uint32_t *words[N], *lut[N];                                                                     \
        uint8_t *out[N];                                                                                       \
        for (int k = 0; k < N; k++) {                                                                          \
            memcpy(st + L * k, tile[k]->st, 8 * L);                                                            \
            memcpy(left + L * k, tile[k]->left, 4 * L);                                                        \
            words[k] = tile[k]->words; lut[k] = tile[k]->lut; out[k] = tile[k]->out;                           \
        }                                                                                                      \
        __m512i x[2] = {_mm512_loadu_si512(st), _mm512_loadu_si512(st + 8)};                                   \
        __m256i c[2] = {_mm256_loadu_si256((const void *)left), _mm256_loadu_si256((const void *)(left + 8))}; \
        for (int64_t t = 0; t < steps * L; t += L)                                                             \
            _Pragma("GCC unroll 2") for (int k = 0; k < 2; k++) {                                              \
                const uint32_t **p = lut + T * k;                                                              \
                const __m128i q = _mm512_cvtepi64_epi16(_mm512_and_si512(_mm512_srli_epi64(x[k], 12), m12));   \
                const uint64_t a = (uint64_t)_mm_cvtsi128_si64(q), b = (uint64_t)_mm_extract_epi64(q, 1);      \
                __m128i e0 = _mm_cvtsi32_si128((int)p[0][(uint16_t)a]), e1 = _mm_cvtsi32_si128((int)p[4 / L][(uint16_t)b]); \
                e0 = _mm_insert_epi32(e0, (int)p[1 / L][(uint16_t)(a >> 16)], 1);                              \
                e0 = _mm_insert_epi32(e0, (int)p[2 / L][(uint16_t)(a >> 32)], 2);                              \
                e0 = _mm_insert_epi32(e0, (int)p[3 / L][a >> 48], 3);                                          \
                e1 = _mm_insert_epi32(e1, (int)p[5 / L][(uint16_t)(b >> 16)], 1);                              \
                e1 = _mm_insert_epi32(e1, (int)p[6 / L][(uint16_t)(b >> 32)], 2);                              \
                e1 = _mm_insert_epi32(e1, (int)p[7 / L][b >> 48], 3);                                          \
                const __m256i e = _mm256_inserti128_si256(_mm256_castsi128_si256(e0), e1, 1);                  \
                const uint64_t s = (uint64_t)_mm_cvtsi128_si64(_mm256_cvtepi32_epi8(e));                       \
                for (int i = 0; i < T; i++) {                                                                  \
                    const uint64_t part = s >> 8 * L * i;                                                      \
                    memcpy(out[T * k + i] + t, &part, L);                                                      \
                }                                                                                              \
                const __m512i f = _mm512_cvtepu32_epi64(_mm256_srli_epi32(e, 20));                             \
                const __m512i d = _mm512_cvtepu32_epi64(_mm256_and_si256(_mm256_srli_epi32(e, 8), m12s));      \
                __m512i y = _mm512_add_epi64(_mm512_mullo_epi64(_mm512_srli_epi64(x[k], 24), f), d);           \
                y = _mm512_or_si512(_mm512_slli_epi64(y, 12), _mm512_and_si512(x[k], m12));                    \
                __mmask8 need = _mm512_testn_epi64_mask(y, high);                                              \
                need = _mm256_mask_test_epi32_mask(need, c[k], c[k]);                                          \
                const __m512i w = _mm512_cvtepu32_epi64(WORDS(words + T * k, need));                           \
                x[k] = _mm512_mask_or_epi64(y, need, _mm512_slli_epi64(y, 32), w);                             \
                c[k] = _mm256_mask_sub_epi32(c[k], need, c[k], one);                                           \
            }                                                                                                  \
        _mm512_storeu_si512(st, x[0]); _mm512_storeu_si512(st + 8, x[1]);                                      \
        _mm256_storeu_si256((void *)left, c[0]); _mm256_storeu_si256((void *)(left + 8), c[1]);                \
        for (int k = 0; k < N; k++) {                                                                          \
            memcpy(tile[k]->st, st + L * k, 8 * L);                                                            \
            memcpy(tile[k]->left, left + L * k, 4 * L);                                                        \
            tile[k]->words = words[k];                                                                         \
            tile[k]->out += steps * L;                                                                         \
        }                                                                                                      \
    }
SIDE512(side512_2, 2, words_of_2)
SIDE512(side512_4, 4, words_of_4)
#endif

typedef void (*rac_side)(rac_lanes **, int64_t);

/* What steps as many of n tiles at once as it can, *take; null: one alone */
static rac_side side_of(int n, int64_t lanes, int *take) {
#ifdef HAVE_X86
    if (has512() && lanes > 1 && n * lanes >= 16) {
        *take = (int)(16 / lanes);
        return lanes == 2 ? side512_2 : side512_4;
    }
#endif
    *take = n >= 4 ? 4 : n >= 2 ? 2 : 1;
    if (n < 2) return 0;
    if (n < 4) return lanes == 1 ? rows_2x1 : lanes == 2 ? rows_2x2 : rows_2x4;
    return lanes == 1 ? rows_4x1 : lanes == 2 ? rows_4x2 : rows_4x4;
}

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
        t->words = rows(t->lut, t->words, t->end, t->left, t->st, t->out, m, lanes);
        t->out += m;
        t->rest -= m;
    }
}
#endif
