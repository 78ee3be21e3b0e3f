/* Vectors of the registers of an instruction set, and the steps of emit.c and unsort.c that C has no words for: where
 * WIDE is defined, their bytes. */
#pragma once
#include "rac.h"

#if defined AVX512
#define WIDE 64
#elif defined AVX2
#define WIDE 32
#elif defined NEON
#define WIDE 16
#endif

#ifdef WIDE
enum { LANES = WIDE / 2 };
#define VECTOR(name, type) typedef type name __attribute__((vector_size(WIDE)))
VECTOR(wide16, uint16_t);
VECTOR(signed16, int16_t);
VECTOR(wide32, uint32_t);
VECTOR(wide64, uint64_t);

INLINED wide16 load16(const void *p) {
    wide16 v;
    memcpy(&v, p, WIDE);
    return v;
}

/* LANES bytes */
INLINED wide16 bytes16(const uint8_t *p) {
#if defined AVX512
    return (wide16)_mm512_cvtepu8_epi16(_mm256_loadu_si256((const void *)p));
#elif defined AVX2
    return (wide16)_mm256_cvtepu8_epi16(_mm_loadu_si128((const void *)p));
#else
    return (wide16)vmovl_u8(vld1_u8(p));
#endif
}

/* LANES fields of 4 bits */
INLINED wide16 fours16(const uint8_t *p) {
#if defined AVX512
    const wide32 v = (wide32)_mm512_cvtepu8_epi32(_mm_loadu_si128((const void *)p));
#elif defined AVX2
    const wide32 v = (wide32)_mm256_cvtepu8_epi32(_mm_loadl_epi64((const void *)p));
#else
    uint32_t four;
    memcpy(&four, p, 4);
    const uint8x8_t both = vreinterpret_u8_u32(vdup_n_u32(four)); /* bytes k / 2 of fields k, then its half */
    const int16x8_t half = {0, -4, 0, -4, 0, -4, 0, -4};
    return (wide16)vshlq_u16(vmovl_u8(vzip1_u8(both, both)), half) & 15;
#endif
#ifndef NEON
    return (wide16)(v | v << 12) & 15;
#endif
}

/* LANES fields of 2 bits */
INLINED wide16 twos16(const uint8_t *p) {
#if defined AVX512
    wide64 v = (wide64)_mm512_cvtepu8_epi64(_mm_loadl_epi64((const void *)p));
#elif defined AVX2
    int four;
    memcpy(&four, p, 4);
    wide64 v = (wide64)_mm256_cvtepu8_epi64(_mm_cvtsi32_si128(four));
#else
    uint16_t two;
    memcpy(&two, p, 2);
    const int16x8_t field = {0, -2, -4, -6, -8, -10, -12, -14};
    return (wide16)vshlq_u16(vdupq_n_u16(two), field) & 3;
#endif
#ifndef NEON
    v |= v << 28;
    return (wide16)(v | v << 14) & 3;
#endif
}

/* LANES fields of one bit */
INLINED wide16 ones16(const uint8_t *p) {
#if defined AVX512
    uint32_t bits;
    memcpy(&bits, p, 4);
    return (wide16)_mm512_maskz_set1_epi16(bits, 1);
#elif defined AVX2
    const wide16 each = {1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1 << 10, 1 << 11, 1 << 12, 1 << 13, 1 << 14, 1 << 15};
    uint16_t bits;
    memcpy(&bits, p, 2);
#else
    const wide16 each = {1, 2, 4, 8, 16, 32, 64, 128};
    const uint16_t bits = *p;
#endif
#ifndef AVX512
    return (wide16)((((wide16){0} + bits) & each) != 0) & 1;
#endif
}

/* Bit PER_LANE * k says whether lane k is not below `least`; both are below 2^15 */
#if defined AVX512
enum { PER_LANE = 1 };
INLINED uint64_t not_below16(wide16 v, wide16 least) {
    return _mm512_cmpge_epi16_mask((__m512i)v, (__m512i)least);
}
#elif defined AVX2
enum { PER_LANE = 2 };
INLINED uint64_t not_below16(wide16 v, wide16 least) {
    return ~(uint32_t)_mm256_movemask_epi8(_mm256_cmpgt_epi16((__m256i)least, (__m256i)v)) & 0x55555555u;
}
#else
enum { PER_LANE = 8 };
INLINED uint64_t not_below16(wide16 v, wide16 least) {
    return vget_lane_u64(vreinterpret_u64_u8(vmovn_u16(vcgeq_u16((uint16x8_t)v, (uint16x8_t)least))), 0) &
           0x0101010101010101u;
}
#endif

/* Pairs of symbols a | b << 4 and the lowest raw bits, bytes, to BF16 words: STEP at once. Tables: of the upper and the
 * lower byte that a top adds. */
#if defined AVX512
enum { STEP = 64 };
typedef struct { __m512i high, low; } tops16;
INLINED __m512i nibbles(const uint8_t *sym) {
    const __m512i s = _mm512_cvtepu8_epi16(_mm256_loadu_si256((const void *)sym));
    return _mm512_and_si512(_mm512_or_si512(s, _mm512_slli_epi16(s, 4)), _mm512_set1_epi8(15));
}
INLINED tops16 tops_of(const uint8_t *high, const uint8_t *low) {
    return (tops16){_mm512_broadcast_i32x4(_mm_loadu_si128((const void *)high)),
                    _mm512_broadcast_i32x4(_mm_loadu_si128((const void *)low))};
}
INLINED void join_pairs(const tops16 *t, const uint8_t *sym, const uint8_t *raw, uint16_t *out) {
    const __m512i order = _mm512_set_epi64(7, 3, 6, 2, 5, 1, 4, 0), top = _mm512_set1_epi8((char)0x80);
    const __m512i s = _mm512_permutexvar_epi64(order, nibbles(sym));
    const __m512i r = _mm512_permutexvar_epi64(order, _mm512_loadu_si512(raw));
    const __m512i low = _mm512_ternarylogic_epi64(top, _mm512_shuffle_epi8(t->low, s), r, 0xca);
    const __m512i high = _mm512_ternarylogic_epi64(top, r, _mm512_shuffle_epi8(t->high, s), 0xca);
    _mm512_storeu_si512(out, _mm512_unpacklo_epi8(low, high));
    _mm512_storeu_si512(out + 32, _mm512_unpackhi_epi8(low, high));
}
/* Bit PER_WORD * k says whether symbol k of the pairs is not below `least` */
enum { PER_WORD = 1 };
INLINED uint64_t pairs_not_below(const uint8_t *sym, int least) {
    return _mm512_cmpge_epu8_mask(nibbles(sym), _mm512_set1_epi8((char)least));
}
#elif defined AVX2
enum { STEP = 32 };
typedef struct { __m256i high, low; } tops16;
INLINED __m256i nibbles(const uint8_t *sym) {
    const __m256i s = _mm256_cvtepu8_epi16(_mm_loadu_si128((const void *)sym));
    return _mm256_and_si256(_mm256_or_si256(s, _mm256_slli_epi16(s, 4)), _mm256_set1_epi8(15));
}
INLINED tops16 tops_of(const uint8_t *high, const uint8_t *low) {
    return (tops16){_mm256_broadcastsi128_si256(_mm_loadu_si128((const void *)high)),
                    _mm256_broadcastsi128_si256(_mm_loadu_si128((const void *)low))};
}
INLINED void join_pairs(const tops16 *t, const uint8_t *sym, const uint8_t *raw, uint16_t *out) {
    const __m256i s = _mm256_permute4x64_epi64(nibbles(sym), 0xd8), top = _mm256_set1_epi8((char)0x80);
    const __m256i r = _mm256_permute4x64_epi64(_mm256_loadu_si256((const void *)raw), 0xd8);
    const __m256i low = _mm256_or_si256(_mm256_andnot_si256(top, r), _mm256_shuffle_epi8(t->low, s));
    const __m256i high = _mm256_or_si256(_mm256_and_si256(top, r), _mm256_shuffle_epi8(t->high, s));
    _mm256_storeu_si256((void *)out, _mm256_unpacklo_epi8(low, high));
    _mm256_storeu_si256((void *)(out + 16), _mm256_unpackhi_epi8(low, high));
}
enum { PER_WORD = 1 };
INLINED uint64_t pairs_not_below(const uint8_t *sym, int least) {
    return (uint32_t)~_mm256_movemask_epi8(_mm256_cmpgt_epi8(_mm256_set1_epi8((char)least), nibbles(sym)));
}
#else
enum { STEP = 32 };
typedef struct { uint8x16_t high, low; } tops16;
INLINED tops16 tops_of(const uint8_t *high, const uint8_t *low) { return (tops16){vld1q_u8(high), vld1q_u8(low)}; }
INLINED void join_pairs(const tops16 *t, const uint8_t *sym, const uint8_t *raw, uint16_t *out) {
    const uint8x16_t s = vld1q_u8(sym), table = vsliq_n_u8(vshrq_n_u8(t->low, 7), t->high, 1);
    const uint8x16_t a = vqtbl1q_u8(table, vandq_u8(s, vdupq_n_u8(15))), b = vqtbl1q_u8(table, vshrq_n_u8(s, 4));
    const uint8x16x2_t top = {{vzip1q_u8(a, b), vzip2q_u8(a, b)}};
    for (int k = 0; k < 2; k++) {
        const uint8x16_t r = vld1q_u8(raw + 16 * k);
        const uint8x16x2_t both = {{vsliq_n_u8(r, top.val[k], 7), vsriq_n_u8(r, top.val[k], 1)}};
        vst2q_u8((uint8_t *)(out + 16 * k), both);
    }
}
enum { PER_WORD = 2 };
INLINED uint64_t pairs_not_below(const uint8_t *sym, int least) {
    const uint8x16_t s = vld1q_u8(sym), l = vdupq_n_u8((uint8_t)least);
    const uint8x16_t a = vcgeq_u8(vandq_u8(s, vdupq_n_u8(15)), l), b = vcgeq_u8(vshrq_n_u8(s, 4), l);
    /* a byte of each, of which four bits of a, then four of b, are kept for each symbol */
    const uint8x16_t both = vbslq_u8(vdupq_n_u8(0x33), a, b);
    const uint8x8_t four = vshrn_n_u16(vreinterpretq_u16_u8(both), 4);
    return vget_lane_u64(vreinterpret_u64_u8(four), 0) & 0x5555555555555555u;
}
#endif

/* Bit PER_BYTE * k says whether byte k of WIDE is not below `least`; the bytes and `base` to `out` */
#if defined AVX512
enum { PER_BYTE = 1 };
INLINED uint64_t add_bytes(const uint8_t *sym, int base, int least, uint8_t *out) {
    const __m512i s = _mm512_loadu_si512(sym);
    _mm512_storeu_si512(out, _mm512_add_epi8(s, _mm512_set1_epi8((char)base)));
    return _mm512_cmpge_epu8_mask(s, _mm512_set1_epi8((char)least));
}
#elif defined AVX2
enum { PER_BYTE = 1 };
INLINED uint64_t add_bytes(const uint8_t *sym, int base, int least, uint8_t *out) {
    const __m256i s = _mm256_loadu_si256((const void *)sym), l = _mm256_set1_epi8((char)least);
    _mm256_storeu_si256((void *)out, _mm256_add_epi8(s, _mm256_set1_epi8((char)base)));
    return (uint32_t)_mm256_movemask_epi8(_mm256_cmpeq_epi8(_mm256_max_epu8(s, l), s));
}
#else
enum { PER_BYTE = 4 };
INLINED uint64_t add_bytes(const uint8_t *sym, int base, int least, uint8_t *out) {
    const uint8x16_t s = vld1q_u8(sym);
    vst1q_u8(out, vaddq_u8(s, vdupq_n_u8((uint8_t)base)));
    const uint16x8_t found = vreinterpretq_u16_u8(vcgeq_u8(s, vdupq_n_u8((uint8_t)least)));
    return vget_lane_u64(vreinterpret_u64_u8(vshrn_n_u16(found, 4)), 0) & 0x1111111111111111u;
}
#endif
#endif
