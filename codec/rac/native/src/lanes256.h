/* Rows of lanes by AVX2 (lanes.c), 8 lanes in a pair of vectors: the upper and the lower halves of their states. */
#pragma once
#include "tile.h"

typedef struct {
    __m256i hi, lo, left;
    __m256i at; /* addresses of the next words, where a vector has more than one tile: of 2 lanes each 64 bits, of 4
                   the upper 64 of 128 */
} lanes8;

/* Of each set of lanes that take a word: how many do before each lane */
#define BIT(m, l) ((m) >> (l) & 1)
#define UP3(m) BIT(m, 0) + BIT(m, 1) + BIT(m, 2)
#define UP6(m) UP3(m) + BIT(m, 3) + BIT(m, 4) + BIT(m, 5)
#define BEFORE(m) \
    {0, BIT(m, 0), BIT(m, 0) + BIT(m, 1), UP3(m), UP3(m) + BIT(m, 3), UP3(m) + BIT(m, 3) + BIT(m, 4), UP6(m), \
     UP6(m) + BIT(m, 6)}
#define BEFORE4(m) BEFORE(m), BEFORE(m + 1), BEFORE(m + 2), BEFORE(m + 3)
#define BEFORE16(m) BEFORE4(m), BEFORE4(m + 4), BEFORE4(m + 8), BEFORE4(m + 12)
#define BEFORE64(m) BEFORE16(m), BEFORE16(m + 16), BEFORE16(m + 32), BEFORE16(m + 48)
static const uint8_t before8[256][8] = {BEFORE64(0), BEFORE64(64), BEFORE64(128), BEFORE64(192)};

/* Table entries of 8 lanes, L of each tile. Loads that are merged: gathers are slower on most CPUs, and inserts have
 * one port alone on some (docs/experiments.md). */
INLINED __m256i entries8(const uint32_t *const *lut, __m256i lo, const int L) {
    __m256i p = _mm256_and_si256(_mm256_srli_epi32(lo, 12), _mm256_set1_epi32(4095));
    /* not packed: clang packs with any register, and waits for it */
    p = _mm256_shuffle_epi8(p, _mm256_set1_epi64x(0x0d0c090805040100));
    const uint64_t s0 = (uint64_t)_mm_cvtsi128_si64(_mm256_castsi256_si128(p));
    const uint64_t s1 = (uint64_t)_mm_cvtsi128_si64(_mm256_extracti128_si256(p, 1));
#define ENTRY(k, i) _mm256_set1_epi32((int)lut[(4 * k + i) / L][(uint16_t)(s##k >> 16 * i)])
    const __m256i a = _mm256_blend_epi32(ENTRY(0, 0), ENTRY(0, 1), 2);
    const __m256i b = _mm256_blend_epi32(ENTRY(0, 2), ENTRY(0, 3), 8);
    const __m256i c = _mm256_blend_epi32(ENTRY(1, 0), ENTRY(1, 1), 32);
    const __m256i d = _mm256_blend_epi32(ENTRY(1, 2), ENTRY(1, 3), 128);
    return _mm256_blend_epi32(_mm256_blend_epi32(a, b, 12), _mm256_blend_epi32(c, d, 0xc0), 0xf0);
#undef ENTRY
}

/* The symbols of a row, in the low bytes of the entries, L of each tile */
INLINED void put8(uint8_t *const *out, int64_t t, __m256i e, const int L) {
    e = _mm256_shuffle_epi8(e, _mm256_broadcastsi128_si256(_mm_cvtsi32_si128(0x0c080400)));
    const __m128i a = _mm256_castsi256_si128(e), b = _mm256_extracti128_si256(e, 1);
    if (L >= 8) {
        _mm_storel_epi64((void *)(out[0] + t), _mm_unpacklo_epi32(a, b));
        return;
    }
    const uint32_t half[2] = {(uint32_t)_mm_cvtsi128_si32(a), (uint32_t)_mm_cvtsi128_si32(b)};
#define PUT(i) \
    if (8 / L > i) { \
        const uint32_t part = half[i * L / 4 % 2] >> 8 * L * i % 32; \
        memcpy(out[i] + t, &part, (size_t)L); \
    }
    PUT(0) PUT(1) PUT(2) PUT(3)
#undef PUT
}

/* The words at the addresses of several tiles, as many as a tile has lanes, whether they are taken or not */
INLINED __m256i words8(__m256i at, const int L) {
    const void *p[4] __attribute__((aligned(32)));
    _mm256_store_si256((void *)p, at);
    __asm__ volatile("" : "+m"(p) : : "memory"); /* loads again, which are fewer instructions than parts of vectors taken out */
    if (L == 4) {
        const __m128i a = _mm_loadu_si128(p[1]), b = _mm_loadu_si128(p[3]);
        return _mm256_inserti128_si256(_mm256_castsi128_si256(a), b, 1);
    }
#define TWO(i) _mm_castps_si128(_mm_loadh_pi(_mm_castsi128_ps(_mm_loadl_epi64(p[i])), p[i + 1]))
    return _mm256_inserti128_si256(_mm256_castsi128_si256(TWO(0)), TWO(2), 1);
#undef TWO
}

/* The lower halves `lo` of 8 lanes of which `need` take a word, L of each tile */
INLINED __m256i refilled8(lanes8 *v, const uint32_t **words, __m256i lo, __m256i need, const int L) {
    __m256 w;
    if (L >= 8) {
        const unsigned mask = (unsigned)_mm256_movemask_ps(_mm256_castsi256_ps(need));
        const __m256i before = _mm256_cvtepu8_epi32(_mm_loadl_epi64((const void *)before8[mask]));
        w = _mm256_castsi256_ps(_mm256_permutevar8x32_epi32(_mm256_loadu_si256((const void *)words[0]), before));
        words[0] += __builtin_popcount(mask);
    } else {
        /* how many lanes of the tile before each take one, and how many of all */
        const __m256i one = _mm256_srli_epi32(need, 31);
        __m256i before, all;
        if (L == 4) {
            all = _mm256_add_epi32(one, _mm256_bslli_epi128(one, 4));
            all = _mm256_add_epi32(all, _mm256_bslli_epi128(all, 8));
            before = _mm256_sub_epi32(all, one);
        } else {
            before = _mm256_slli_epi64(one, 32);
            all = _mm256_add_epi32(one, before);
            before = _mm256_add_epi32(before, _mm256_set_epi32(2, 2, 0, 0, 2, 2, 0, 0));
        }
        w = _mm256_permutevar_ps(_mm256_castsi256_ps(words8(v->at, L)), before);
        v->at = _mm256_add_epi64(v->at, _mm256_srli_epi64(all, 30)); /* 4 for each, which count in the upper halves */
    }
    return _mm256_castps_si256(_mm256_blendv_ps(_mm256_castsi256_ps(lo), w, _mm256_castsi256_ps(need)));
}

/* One symbol of each of 8 lanes. Of the 40 bits of x >> 24 the product with the frequency is taken in two parts of 20,
 * so that neither, nor the first with the place in the table, has more than 32. */
INLINED void step8(lanes8 *v, const uint32_t *const *lut, const uint32_t **words, uint8_t *const *out, int64_t t,
                   const int L) {
    const __m256i low12 = _mm256_set1_epi32(4095), none = _mm256_setzero_si256(), e = entries8(lut, v->lo, L);
    put8(out, t, e, L);
    const __m256i f = _mm256_srli_epi32(e, 20), d = _mm256_and_si256(_mm256_srli_epi32(e, 8), low12);
    const __m256i b = _mm256_and_si256(_mm256_slli_epi32(v->hi, 8), _mm256_set1_epi32(0xfff00));
    const __m256i q = _mm256_or_si256(b, _mm256_srli_epi32(v->lo, 24));
    const __m256i first = _mm256_add_epi32(_mm256_mullo_epi32(q, f), d);
    const __m256i second = _mm256_mullo_epi32(_mm256_srli_epi32(v->hi, 12), f);
    const __m256i hi = _mm256_add_epi32(second, _mm256_srli_epi32(first, 20));
    const __m256i lo = _mm256_or_si256(_mm256_slli_epi32(first, 12), _mm256_and_si256(v->lo, low12));
    const __m256i need = _mm256_andnot_si256(_mm256_cmpeq_epi32(v->left, none), _mm256_cmpeq_epi32(hi, none));
    v->hi = _mm256_or_si256(hi, _mm256_and_si256(lo, need));
    v->lo = refilled8(v, words, lo, need, L);
    v->left = _mm256_add_epi32(v->left, need);
}

/* `steps` rows of N tiles of L lanes, in V vectors, each a part of a tile or T tiles. A row may read as many words as
 * it has lanes. Every index is a constant, or the vectors would lie in memory. */
INLINED void rows256_of(rac_lanes **tile, int64_t steps, const int N, const int L) {
    const int V = N * L / 8, T = L < 8 ? 8 / L : 1, P = L < 8 ? 1 : L / 8;
    uint64_t st[64];
    uint32_t left[64];
    const uint32_t *words[16], *lut[16];
    uint8_t *out[16];
    lanes8 v[8];
    lanes_in(tile, N, L, st, left, words, lut, out);
#define ENTER(k) { \
        const __m256 a = _mm256_loadu_ps((const void *)(st + 8 * k)); \
        const __m256 b = _mm256_loadu_ps((const void *)(st + 8 * k + 4)); \
        v[k].lo = _mm256_permute4x64_epi64(_mm256_castps_si256(_mm256_shuffle_ps(a, b, 0x88)), 0xd8); \
        v[k].hi = _mm256_permute4x64_epi64(_mm256_castps_si256(_mm256_shuffle_ps(a, b, 0xdd)), 0xd8); \
        v[k].left = _mm256_loadu_si256((const void *)(left + 8 * k)); \
        if (L == 2) v[k].at = _mm256_loadu_si256((const void *)(words + 4 * k)); \
        if (L == 4) v[k].at = _mm256_set_epi64x((int64_t)words[2 * k + 1], 0, (int64_t)words[2 * k], 0); }
#define EACH(M) M(0) if (V > 1) { M(1) } if (V > 2) { M(2) M(3) } if (V > 4) { M(4) M(5) M(6) M(7) }
    EACH(ENTER)
    const uint32_t *w[4] = {words[0], words[1], words[2], words[3]}; /* of tiles that are vectors */
    uint8_t *const o[4] = {out[0], out[1], out[2], out[3]};
    const uint32_t *const l[4] = {lut[0], lut[1], lut[2], lut[3]};
    for (int64_t t = 0; t < steps * L; t += L) {
#define ROW(k) \
        if (L >= 8) step8(&v[k], &l[k / P], &w[k / P], &o[k / P], t + 8 * (k % P), L); \
        else step8(&v[k], lut + T * k, words + T * k, out + T * k, t, L);
        EACH(ROW)
    }
#define LEAVE(k) { \
        const __m256i a = _mm256_unpacklo_epi32(v[k].lo, v[k].hi), b = _mm256_unpackhi_epi32(v[k].lo, v[k].hi); \
        _mm256_storeu_si256((void *)(st + 8 * k), _mm256_permute2x128_si256(a, b, 0x20)); \
        _mm256_storeu_si256((void *)(st + 8 * k + 4), _mm256_permute2x128_si256(a, b, 0x31)); \
        _mm256_storeu_si256((void *)(left + 8 * k), v[k].left); \
        if (L == 2) _mm256_storeu_si256((void *)(words + 4 * k), v[k].at); \
        if (L == 4) words[2 * k] = (const uint32_t *)_mm256_extract_epi64(v[k].at, 1); \
        if (L == 4) words[2 * k + 1] = (const uint32_t *)_mm256_extract_epi64(v[k].at, 3); \
        if (L >= 8) words[k / P] = w[k / P]; }
    EACH(LEAVE)
    lanes_back(tile, N, L, st, left, words, out, steps * L);
#undef ENTER
#undef EACH
#undef ROW
#undef LEAVE
}
#define SIMD_WAYS(W) \
    W(16, 2) W(8, 2) W(4, 2) W(8, 4) W(4, 4) W(2, 4) W(4, 8) W(2, 8) W(1, 8) W(4, 16) W(2, 16) W(1, 16) W(2, 32) \
    W(1, 32) W(1, 64)
#define SIMD_ROWS rows256_of
