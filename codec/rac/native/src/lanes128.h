/* Rows of lanes by NEON (lanes.c), 4 lanes in a pair of vectors: the upper and the lower halves of their states. */
#pragma once
#include "tile.h"

typedef struct {
    uint32x4_t hi, lo, left;
    uint64x2_t at; /* addresses of the next words, where a vector has two tiles */
} lanes4;

/* Of each set of lanes that take a word, lane l of which counts (1 << l) + 64: the bytes of the word that each takes */
#define BIT(m, l) ((m) >> (l) & 1)
#define WORD_OF(i) 4 * (i), 4 * (i) + 1, 4 * (i) + 2, 4 * (i) + 3
#define BYTES(m) [m + 64 * (BIT(m, 0) + BIT(m, 1) + BIT(m, 2) + BIT(m, 3))] = \
    {WORD_OF(0), WORD_OF(BIT(m, 0)), WORD_OF(BIT(m, 0) + BIT(m, 1)), WORD_OF(BIT(m, 0) + BIT(m, 1) + BIT(m, 2))}
#define BYTES4(m) BYTES(m), BYTES(m + 1), BYTES(m + 2), BYTES(m + 3)
static const uint8_t bytes_of[272][16] = {BYTES4(0), BYTES4(4), BYTES4(8), BYTES4(12)};

/* Table entries of 4 lanes, L of each tile */
INLINED uint32x4_t entries4(const uint32_t *const *lut, uint32x4_t lo, const int L) {
    const uint64x2_t p = vreinterpretq_u64_u32(lo);
    const uint64_t a = vgetq_lane_u64(p, 0), b = vgetq_lane_u64(p, 1);
    const uint32_t *const l0 = lut[0], *const l1 = lut[L < 4];
    const uint32x2_t e0 = vld1_dup_u32(l0 + (a >> 12 & 4095)), e1 = vld1_dup_u32(l0 + (a >> 44 & 4095));
    const uint32x2_t e2 = vld1_dup_u32(l1 + (b >> 12 & 4095)), e3 = vld1_dup_u32(l1 + (b >> 44 & 4095));
    return vcombine_u32(vzip1_u32(e0, e1), vzip1_u32(e2, e3));
}

/* One symbol of each of 4 lanes, in the low bytes of what is returned. Of the 40 bits of x >> 24 the product with the
 * frequency is taken in two parts of 20, so that neither, nor the first with the place in the table, has more than
 * 32. */
INLINED uint32x4_t step4(lanes4 *v, const uint32_t *const *lut, const uint32_t **words, const int L) {
    const uint32x4_t e = entries4(lut, v->lo, L);
    const uint32x4_t f = vshrq_n_u32(e, 20), d = vandq_u32(vshrq_n_u32(e, 8), vdupq_n_u32(4095));
    const uint32x4_t q = vandq_u32(vsriq_n_u32(vshlq_n_u32(v->hi, 8), v->lo, 24), vdupq_n_u32(0xfffff));
    const uint32x4_t first = vmlaq_u32(d, q, f), second = vmulq_u32(vshrq_n_u32(v->hi, 12), f);
    const uint32x4_t hi = vsraq_n_u32(second, first, 20), lo = vsliq_n_u32(v->lo, first, 12);
    const uint32x4_t need = vcgtq_u32(vminq_u32(v->left, vdupq_n_u32(1)), hi); /* hi is 0, left is not */
    uint32x4_t w;
    if (L >= 4) {
        static const uint32_t each[4] = {65, 66, 68, 72};
        const uint32_t some = vaddvq_u32(vandq_u32(need, vld1q_u32(each)));
        w = vreinterpretq_u32_u8(vqtbl1q_u8(vreinterpretq_u8_u32(vld1q_u32(words[0])), vld1q_u8(bytes_of[some])));
        words[0] = (const uint32_t *)((const char *)words[0] + (some >> 4));
    } else {
        const uint64x2_t own = vreinterpretq_u64_u32(need), one = vreinterpretq_u64_u32(vshrq_n_u32(need, 31));
        const uint32x2_t a = vld1_u32((const uint32_t *)vgetq_lane_u64(v->at, 0));
        const uint32x2_t b = vld1_u32((const uint32_t *)vgetq_lane_u64(v->at, 1));
        w = vcombine_u32(a, b); /* the second lane of a tile takes the first word where the first lane takes none */
        w = vbslq_u32(vreinterpretq_u32_u64(vshlq_n_u64(own, 32)), w, vtrn1q_u32(w, w));
        v->at = vsraq_n_u64(v->at, vaddq_u64(one, vshlq_n_u64(one, 32)), 30);
    }
    v->hi = vbslq_u32(need, lo, hi);
    v->lo = vbslq_u32(need, w, lo);
    v->left = vaddq_u32(v->left, need);
    return e;
}

/* Low bytes of the entries of 4 vectors */
INLINED uint8x16_t bytes16(uint32x4_t a, uint32x4_t b, uint32x4_t c, uint32x4_t d) {
    const uint16x8_t low = vuzp1q_u16(vreinterpretq_u16_u32(a), vreinterpretq_u16_u32(b));
    const uint16x8_t high = vuzp1q_u16(vreinterpretq_u16_u32(c), vreinterpretq_u16_u32(d));
    return vuzp1q_u8(vreinterpretq_u8_u16(low), vreinterpretq_u8_u16(high));
}

INLINED void enter4(lanes4 *v, const uint64_t *st, const uint64_t *second, uint32x4_t left) {
    const uint64x2_t a = vld1q_u64(st), b = vld1q_u64(second);
    v->lo = vuzp1q_u32(vreinterpretq_u32_u64(a), vreinterpretq_u32_u64(b));
    v->hi = vuzp2q_u32(vreinterpretq_u32_u64(a), vreinterpretq_u32_u64(b));
    v->left = left;
}
INLINED void leave4(const lanes4 *v, uint64_t *st, uint64_t *second) {
    vst1q_u64(st, vreinterpretq_u64_u32(vzip1q_u32(v->lo, v->hi)));
    vst1q_u64(second, vreinterpretq_u64_u32(vzip2q_u32(v->lo, v->hi)));
}

/* `steps` rows of a tile of 32 lanes, 16 at once: registers have no room for more, and what compilers put elsewhere costs
 * more than the states in memory */
INLINED void rows128_32(rac_lanes *tile, int64_t steps) {
    const uint32_t *words = tile->words, *lut = tile->lut;
    uint8_t *out = tile->out;
    lanes4 v[8];
    uint32x4_t e[4];
    for (int k = 0; k < 8; k++) enter4(v + k, tile->st + 4 * k, tile->st + 4 * k + 2, vld1q_u32(tile->left + 4 * k));
    for (int64_t t = 0; t < 2 * steps; t++, out += 16) {
        lanes4 *own = v + 4 * (t & 1);
        _Pragma("GCC unroll 4") for (int k = 0; k < 4; k++) e[k] = step4(own + k, &lut, &words, 32);
        vst1q_u8(out, bytes16(e[0], e[1], e[2], e[3]));
    }
    for (int k = 0; k < 8; k++) {
        leave4(v + k, tile->st + 4 * k, tile->st + 4 * k + 2);
        vst1q_u32(tile->left + 4 * k, v[k].left);
    }
    tile->words = words;
    tile->out = out;
}

/* `steps` rows of N tiles of L lanes, in V vectors, each a part of a tile or T tiles. A row may read as many words as
 * it has lanes. Every index is a constant, or the vectors would lie in memory. */
INLINED void rows128_of(rac_lanes **tile, int64_t steps, const int N, const int L) {
    const int V = N * L / 4, T = L < 4 ? 2 : 1, P = L < 4 ? 1 : L / 4;
    const uint32_t *words[8] = {0}, *lut[8];
    uint8_t *out[8];
    lanes4 v[8];
    uint32x4_t e[8];
    if (L == 32) {
        rows128_32(tile[0], steps);
        return;
    }
    for (int k = 0; k < N; k++) {
        words[k] = tile[k]->words;
        lut[k] = tile[k]->lut;
        out[k] = tile[k]->out;
    }
#define STATE(k) (tile[T * k / P]->st + 4 * (k % P))
#define SECOND(k) tile[2 * k + 1]
#define LEFT(k) (tile[T * k / P]->left + 4 * (k % P))
#define ENTER(k) { \
        const uint64x2_t a = vld1q_u64(STATE(k)), b = vld1q_u64(L < 4 ? SECOND(k)->st : STATE(k) + 2); \
        v[k].lo = vuzp1q_u32(vreinterpretq_u32_u64(a), vreinterpretq_u32_u64(b)); \
        v[k].hi = vuzp2q_u32(vreinterpretq_u32_u64(a), vreinterpretq_u32_u64(b)); \
        v[k].left = L < 4 ? vcombine_u32(vld1_u32(LEFT(k)), vld1_u32(SECOND(k)->left)) : vld1q_u32(LEFT(k)); \
        if (L < 4) v[k].at = vld1q_u64((const void *)(words + 2 * k)); }
#define EACH(M) M(0) if (V > 1) { M(1) } if (V > 2) { M(2) M(3) }
    EACH(ENTER)
    const uint32_t *w[4] = {words[0], words[1], words[2], words[3]}; /* of tiles that are vectors or more */
    for (int64_t t = 0; t < steps * L; t += L) {
#define ROW(k) e[k] = L < 4 ? step4(&v[k], lut + 2 * k, words + 2 * k, L) : step4(&v[k], lut + k / P, &w[k / P], L);
        EACH(ROW)
#define PUT(k) \
        if (L >= 16 && k % 4 == 0) \
            vst1q_u8(out[k / P] + t + 4 * (k % P), bytes16(e[k], e[k | 1], e[k | 2], e[k | 3])); \
        if (L == 8 && k % 2 == 0) vst1_u8(out[k / P] + t, vget_low_u8(bytes16(e[k], e[k | 1], e[k], e[k]))); \
        if (L < 8) { \
            const uint32_t s = vgetq_lane_u32(vreinterpretq_u32_u8(bytes16(e[k], e[k], e[k], e[k])), 0); \
            memcpy(out[T * k] + t, &s, (size_t)L); \
            if (L < 4) memcpy(out[2 * k + 1] + t, (const char *)&s + 2, 2); \
        }
        EACH(PUT)
    }
#define LEAVE(k) { \
        vst1q_u64(STATE(k), vreinterpretq_u64_u32(vzip1q_u32(v[k].lo, v[k].hi))); \
        vst1q_u64(L < 4 ? SECOND(k)->st : STATE(k) + 2, vreinterpretq_u64_u32(vzip2q_u32(v[k].lo, v[k].hi))); \
        if (L >= 4) vst1q_u32(LEFT(k), v[k].left); \
        else { \
            vst1_u32(LEFT(k), vget_low_u32(v[k].left)); \
            vst1_u32(SECOND(k)->left, vget_high_u32(v[k].left)); \
            vst1q_u64((void *)(words + 2 * k), v[k].at); \
        } \
        if (L >= 4) words[k / P] = w[k / P]; }
    EACH(LEAVE)
    for (int k = 0; k < N; k++) {
        tile[k]->words = words[k];
        tile[k]->out = out[k] + steps * L;
    }
#undef STATE
#undef SECOND
#undef LEFT
#undef ENTER
#undef EACH
#undef ROW
#undef PUT
#undef LEAVE
}
#define SIMD_WAYS(W) W(8, 2) W(4, 2) W(4, 4) W(2, 4) W(1, 4) W(2, 8) W(1, 8) W(1, 16) W(1, 32)
#define SIMD_ROWS rows128_of
