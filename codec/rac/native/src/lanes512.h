/* Rows of lanes by AVX-512 (lanes.c), 16 lanes in a pair of vectors: the upper and the lower halves of their states. */
#pragma once
#include "tile.h"

typedef struct {
    __m512i hi, lo, left;
    __m512i at; /* addresses of the next words, where a vector has more than two tiles: of 2 lanes each 64 bits, of 4
                   the upper 64 of 128 */
} lanes16;

/* Table entries of 16 lanes, L of each tile. Loads that are merged: the gathers of some CPUs are slower, and inserts
 * have one port alone on others (docs/experiments.md). */
INLINED __m512i entries16(const uint32_t *const *lut, __m512i lo, const int L) {
    const __m256i p = _mm512_cvtepi32_epi16(_mm512_and_si512(_mm512_srli_epi32(lo, 12), _mm512_set1_epi32(4095)));
    const __m128i a = _mm256_castsi256_si128(p), b = _mm256_extracti128_si256(p, 1);
    const uint64_t s0 = (uint64_t)_mm_cvtsi128_si64(a), s1 = (uint64_t)_mm_extract_epi64(a, 1);
    const uint64_t s2 = (uint64_t)_mm_cvtsi128_si64(b), s3 = (uint64_t)_mm_extract_epi64(b, 1);
    __m128i q0, q1, q2, q3;
#define ENTRY(k, i) _mm_cvtsi32_si128((int)lut[(4 * k + i) / L][(uint16_t)(s##k >> 16 * i)])
#define FOUR(k) \
    q##k = _mm_mask_broadcastd_epi32(ENTRY(k, 0), 2, ENTRY(k, 1)); \
    q##k = _mm_mask_broadcastd_epi32(q##k, 4, ENTRY(k, 2)); \
    q##k = _mm_mask_broadcastd_epi32(q##k, 8, ENTRY(k, 3));
    FOUR(0) FOUR(1) FOUR(2) FOUR(3)
#undef FOUR
#undef ENTRY
    const __m256i low = _mm256_inserti128_si256(_mm256_castsi128_si256(q0), q1, 1);
    const __m256i high = _mm256_inserti128_si256(_mm256_castsi128_si256(q2), q3, 1);
    return _mm512_inserti64x4(_mm512_castsi256_si512(low), high, 1);
}

/* The symbols of a row, in the low bytes of the entries, L of each tile */
INLINED void put16(uint8_t *const *out, int64_t t, __m512i e, const int L) {
    const __m128i s = _mm512_cvtepi32_epi8(e);
    if (L >= 16) {
        _mm_storeu_si128((void *)(out[0] + t), s);
        return;
    }
    const uint64_t half[2] = {(uint64_t)_mm_cvtsi128_si64(s), (uint64_t)_mm_extract_epi64(s, 1)};
#define PUT(i) \
    if (16 / L > i) { \
        const uint64_t part = half[i * L / 8 % 2] >> 8 * L * i % 64; \
        memcpy(out[i] + t, &part, (size_t)L); \
    }
    PUT(0) PUT(1) PUT(2) PUT(3) PUT(4) PUT(5) PUT(6) PUT(7)
#undef PUT
}

/* The words at the addresses of many tiles, as many as a tile has lanes, whether they are taken or not */
INLINED __m512i words16(__m512i at, const int L) {
    const void *p[8] __attribute__((aligned(64)));
    _mm512_store_si512(p, at);
    __asm__ volatile("" : "+m"(p) : : "memory"); /* loads again, which are fewer instructions than parts of vectors taken out */
    if (L == 4) {
        __m512i w = _mm512_castsi128_si512(_mm_loadu_si128(p[1]));
        w = _mm512_inserti32x4(w, _mm_loadu_si128(p[3]), 1);
        w = _mm512_inserti32x4(w, _mm_loadu_si128(p[5]), 2);
        return _mm512_inserti32x4(w, _mm_loadu_si128(p[7]), 3);
    }
#define TWO(i) _mm_castps_si128(_mm_loadh_pi(_mm_castsi128_ps(_mm_loadl_epi64(p[i])), p[i + 1]))
    const __m256i low = _mm256_inserti128_si256(_mm256_castsi128_si256(TWO(0)), TWO(2), 1);
    const __m256i high = _mm256_inserti128_si256(_mm256_castsi128_si256(TWO(4)), TWO(6), 1);
#undef TWO
    return _mm512_inserti64x4(_mm512_castsi256_si512(low), high, 1);
}

/* The lower halves `lo` of 16 lanes of which `need` take a word, L of each tile */
INLINED __m512i refilled16(lanes16 *v, const uint32_t **words, __m512i lo, __mmask16 need, const int L) {
    if (L >= 16) {
        lo = _mm512_mask_expand_epi32(lo, need, _mm512_loadu_si512(words[0]));
        words[0] += __builtin_popcount(need);
        return lo;
    }
    if (L == 8) {
        const __m256i a = _mm256_maskz_expand_epi32((__mmask8)need, _mm256_loadu_si256((const void *)words[0]));
        const __m256i b = _mm256_maskz_expand_epi32((__mmask8)(need >> 8), _mm256_loadu_si256((const void *)words[1]));
        words[0] += __builtin_popcount(need & 255);
        words[1] += __builtin_popcount(need >> 8);
        return _mm512_mask_mov_epi32(lo, need, _mm512_inserti64x4(_mm512_castsi256_si512(a), b, 1));
    }
    /* how many lanes of the tile before each take one, and how many of all */
    const __m512i one = _mm512_maskz_set1_epi32(need, 1);
    __m512i before, all;
    if (L == 4) {
        all = _mm512_add_epi32(one, _mm512_bslli_epi128(one, 4));
        all = _mm512_add_epi32(all, _mm512_bslli_epi128(all, 8));
        before = _mm512_sub_epi32(all, one);
    } else {
        before = _mm512_slli_epi64(one, 32);
        all = _mm512_add_epi32(one, before);
        before = _mm512_add_epi32(before, _mm512_set_epi32(2, 2, 0, 0, 2, 2, 0, 0, 2, 2, 0, 0, 2, 2, 0, 0));
    }
    const __m512 w = _mm512_castsi512_ps(words16(v->at, L));
    v->at = _mm512_add_epi64(v->at, _mm512_srli_epi64(all, 30)); /* 4 for each, which count in the upper halves */
    return _mm512_castps_si512(_mm512_mask_permutevar_ps(_mm512_castsi512_ps(lo), need, w, before));
}

/* One symbol of each of 16 lanes. Of the 40 bits of x >> 24 the product with the frequency is taken in two parts of 20,
 * so that neither, nor the first with the place in the table, has more than 32. */
INLINED void step16(lanes16 *v, const uint32_t *const *lut, const uint32_t **words, uint8_t *const *out, int64_t t,
                    const int L) {
    const __m512i low12 = _mm512_set1_epi32(4095), one = _mm512_set1_epi32(1), e = entries16(lut, v->lo, L);
    put16(out, t, e, L);
    const __m512i f = _mm512_srli_epi32(e, 20), d = _mm512_and_si512(_mm512_srli_epi32(e, 8), low12);
    const __m512i a = _mm512_srli_epi32(v->lo, 24), b = _mm512_slli_epi32(v->hi, 8);
    const __m512i q = _mm512_ternarylogic_epi32(b, _mm512_set1_epi32(0xfff00), a, 0xea); /* (b & 0xfff00) | a */
    const __m512i first = _mm512_add_epi32(_mm512_mullo_epi32(q, f), d);
    const __m512i second = _mm512_mullo_epi32(_mm512_srli_epi32(v->hi, 12), f);
    const __m512i hi = _mm512_add_epi32(second, _mm512_srli_epi32(first, 20));
    const __m512i lo = _mm512_ternarylogic_epi32(low12, v->lo, _mm512_slli_epi32(first, 12), 0xca);
    __m512i some = _mm512_min_epu32(v->left, one);
    __asm__("" : "+v"(some)); /* or clang makes two tests of it, one behind the other */
    const __mmask16 need = _mm512_cmpgt_epu32_mask(some, hi); /* hi is 0, left is not */
    v->hi = _mm512_mask_mov_epi32(hi, need, lo);
    v->lo = refilled16(v, words, lo, need, L);
    v->left = _mm512_mask_sub_epi32(v->left, need, v->left, one);
}

/* `steps` rows of N tiles of L lanes, in V vectors, each a part of a tile or T tiles. A row may read as many words as
 * it has lanes. Every index is a constant, or the vectors would lie in memory. */
INLINED void rows512_of(rac_lanes **tile, int64_t steps, const int N, const int L) {
    const int V = N * L / 16, T = L < 16 ? 16 / L : 1, P = L < 16 ? 1 : L / 16;
    uint64_t st[64];
    uint32_t left[64];
    const uint32_t *words[32], *lut[32];
    uint8_t *out[32];
    lanes16 v[4];
    const __m512i even = _mm512_set_epi32(30, 28, 26, 24, 22, 20, 18, 16, 14, 12, 10, 8, 6, 4, 2, 0);
    lanes_in(tile, N, L, st, left, words, lut, out);
#define ENTER(k) { \
        const __m512i a = _mm512_loadu_si512(st + 16 * k), b = _mm512_loadu_si512(st + 16 * k + 8); \
        v[k].lo = _mm512_permutex2var_epi32(a, even, b); \
        v[k].hi = _mm512_permutex2var_epi32(a, _mm512_add_epi32(even, _mm512_set1_epi32(1)), b); \
        v[k].left = _mm512_loadu_si512(left + 16 * k); \
        if (L == 2) v[k].at = _mm512_loadu_si512(words + 8 * k); \
        if (L == 4) v[k].at = _mm512_maskz_expand_epi64(0xaa, _mm512_maskz_loadu_epi64(15, words + 4 * k)); }
#define EACH(M) M(0) if (V > 1) { M(1) } if (V > 2) { M(2) M(3) }
    EACH(ENTER)
    const uint32_t *w[4] = {words[0], words[1], words[2], words[3]}; /* of tiles that are vectors */
    uint8_t *const o[4] = {out[0], out[1], out[2], out[3]};
    const uint32_t *const l[4] = {lut[0], lut[1], lut[2], lut[3]};
    for (int64_t t = 0; t < steps * L; t += L) {
#define ROW(k) \
        if (L >= 16) step16(&v[k], &l[k / P], &w[k / P], &o[k / P], t + 16 * (k % P), L); \
        else step16(&v[k], lut + T * k, words + T * k, out + T * k, t, L);
        EACH(ROW)
    }
#define LEAVE(k) { \
        const __m512i order = _mm512_set_epi32(23, 7, 22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0); \
        _mm512_storeu_si512(st + 16 * k, _mm512_permutex2var_epi32(v[k].lo, order, v[k].hi)); \
        const __m512i behind = _mm512_add_epi32(order, _mm512_set1_epi32(8)); \
        _mm512_storeu_si512(st + 16 * k + 8, _mm512_permutex2var_epi32(v[k].lo, behind, v[k].hi)); \
        _mm512_storeu_si512(left + 16 * k, v[k].left); \
        if (L == 2) _mm512_storeu_si512(words + 8 * k, v[k].at); \
        if (L == 4) _mm512_mask_storeu_epi64(words + 4 * k, 15, _mm512_maskz_compress_epi64(0xaa, v[k].at)); \
        if (L >= 16) words[k / P] = w[k / P]; }
    EACH(LEAVE)
    lanes_back(tile, N, L, st, left, words, out, steps * L);
#undef ENTER
#undef EACH
#undef ROW
#undef LEAVE
}
#define SIMD_WAYS(W) \
    W(32, 2) W(16, 2) W(8, 2) W(16, 4) W(8, 4) W(4, 4) W(8, 8) W(4, 8) W(2, 8) W(4, 16) W(2, 16) W(1, 16) W(2, 32) \
    W(1, 32) W(1, 64)
#define SIMD_ROWS rows512_of
