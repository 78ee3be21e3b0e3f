/* Words of each size: their counts, symbols, bit planes and places (word.h). */
#include "bytes.h"
#include "tile.h"

/* looked_up_1 to _8: symbols of words whose tops have `bits` bits, 8 at most, behind `down` others; returns how many are
 * done. runs512_1 to _8: below. */
#ifdef AVX512
__attribute__((target("avx512vbmi"))) static int64_t permuted(const uint16_t *v, int64_t n, int down, int bits,
                                                              const uint8_t *lut, uint8_t *out) {
    const __m512i t0 = _mm512_loadu_si512(lut), t1 = _mm512_loadu_si512(lut + 64), t2 = _mm512_loadu_si512(lut + 128);
    const __m512i t3 = _mm512_loadu_si512(lut + 192), byte = _mm512_set1_epi16((short)((1 << bits) - 1));
    int64_t i = 0;
    for (; i + 64 <= n; i += 64) {
        const __m512i a = _mm512_and_si512(_mm512_srli_epi16(_mm512_loadu_si512(v + i), (unsigned)down), byte);
        const __m512i b = _mm512_and_si512(_mm512_srli_epi16(_mm512_loadu_si512(v + i + 32), (unsigned)down), byte);
        const __m256i low = _mm512_cvtepi16_epi8(a), high = _mm512_cvtepi16_epi8(b);
        const __m512i x = _mm512_inserti64x4(_mm512_castsi256_si512(low), high, 1);
        const __m512i below = _mm512_permutex2var_epi8(t0, x, t1), above = _mm512_permutex2var_epi8(t2, x, t3);
        _mm512_storeu_si512(out + i, _mm512_mask_blend_epi8(_mm512_movepi8_mask(x), below, above));
    }
    return i;
}
static int64_t looked_up_2(const uint16_t *v, int64_t n, int down, int bits, const uint8_t *lut, uint8_t *out) {
    /* the first processors with AVX-512 lack the permutation of bytes */
    return __builtin_cpu_supports("avx512vbmi") ? permuted(v, n, down, bits, lut, out) : 0;
}
/* A block of a tile of at most 64 columns: the run of each row by one permutation, which ends in bytes that the next run
 * is written over; whether that can be done */
static int runs512_2(const uint16_t *src, int64_t stride, const int32_t *row, const int32_t *col, const rac_block *b,
                     int64_t cols, uint16_t *out) {
    uint16_t at[32] = {0};
    const int64_t m = b->c1 - b->c0;
    if (cols > 64 || m > 32) return 0;
    for (int64_t k = 0; k < m; k++) at[k] = (uint16_t)col[b->c0 + k];
    const __m512i from = _mm512_loadu_si512(at);
    const __mmask32 low = (__mmask32)first_bits(least(cols, 32)), high = (__mmask32)(first_bits(cols) >> 32);
    for (int64_t i = b->r0; i < b->r1; i++, out += m) {
        const uint16_t *s = src + (row ? row[i] : i) * stride;
        const __m512i x = _mm512_maskz_loadu_epi16(low, s), y = _mm512_maskz_loadu_epi16(high, s + 32);
        _mm512_storeu_si512(out, _mm512_permutex2var_epi16(x, from, y));
    }
    return 1;
}
__attribute__((target("avx512vbmi"))) static void runs_1(const uint8_t *src, int64_t stride, const int32_t *row,
                                                         __m512i from, const rac_block *b, int64_t cols, uint8_t *out) {
    const __mmask64 some = first_bits(cols);
    for (int64_t i = b->r0; i < b->r1; i++, out += b->c1 - b->c0) {
        const __m512i x = _mm512_maskz_loadu_epi8(some, src + (row ? row[i] : i) * stride);
        _mm512_storeu_si512(out, _mm512_permutexvar_epi8(from, x));
    }
}
static int runs512_1(const uint8_t *src, int64_t stride, const int32_t *row, const int32_t *col, const rac_block *b,
                     int64_t cols, uint8_t *out) {
    uint8_t at[64] = {0};
    if (cols > 64 || !__builtin_cpu_supports("avx512vbmi")) return 0;
    for (int64_t k = b->c0; k < b->c1; k++) at[k - b->c0] = (uint8_t)col[k];
    runs_1(src, stride, row, _mm512_loadu_si512(at), b, cols, out);
    return 1;
}
#else
#define runs512_1(...) 0
#define runs512_2(...) 0
#endif
#ifdef NEON
/* 16 tops, in bytes whose other bits are those before them */
INLINED uint8x16_t tops_1(const uint8_t *v, int down) { return vshlq_u8(vld1q_u8(v), vdupq_n_s8((int8_t)-down)); }
INLINED uint8x16_t tops_2(const uint16_t *v, int down) {
    const int16x8_t by = vdupq_n_s16((int16_t)-down);
    const uint16x8_t a = vshlq_u16(vld1q_u16(v), by), b = vshlq_u16(vld1q_u16(v + 8), by);
    return vuzp1q_u8(vreinterpretq_u8_u16(a), vreinterpretq_u8_u16(b));
}
INLINED uint16x8_t halves_4(const uint32_t *v, int32x4_t by) {
    const uint32x4_t a = vshlq_u32(vld1q_u32(v), by), b = vshlq_u32(vld1q_u32(v + 4), by);
    return vuzp1q_u16(vreinterpretq_u16_u32(a), vreinterpretq_u16_u32(b));
}
INLINED uint8x16_t tops_4(const uint32_t *v, int down) {
    const int32x4_t by = vdupq_n_s32(-down);
    return vuzp1q_u8(vreinterpretq_u8_u16(halves_4(v, by)), vreinterpretq_u8_u16(halves_4(v + 8, by)));
}
/* Tops of more bits: the 256 up to the largest of a chunk, among which nearly all are */
static int64_t looked_up_more(const uint16_t *v, int64_t n, int down, int bits, const uint8_t *lut, uint8_t *out) {
    const int16x8_t by = vdupq_n_s16((int16_t)-down);
    const uint16x8_t of_top = vdupq_n_u16((uint16_t)((1 << bits) - 1));
    int64_t i = 0;
    while (i + 16 <= n) {
        const int64_t end = i + least((n - i) & ~(int64_t)15, CHUNK);
        uint16x8_t most = vdupq_n_u16(255);
        for (int64_t k = i; k < end; k += 8) most = vmaxq_u16(most, vandq_u16(vshlq_u16(vld1q_u16(v + k), by), of_top));
        const uint16_t first = vmaxvq_u16(most) - 255;
        const table256 t = table256_at(lut + first);
        for (; i < end; i += 16) {
            const uint16x8_t a = vsubq_u16(vandq_u16(vshlq_u16(vld1q_u16(v + i), by), of_top), vdupq_n_u16(first));
            const uint16x8_t b = vsubq_u16(vandq_u16(vshlq_u16(vld1q_u16(v + i + 8), by), of_top), vdupq_n_u16(first));
            vst1q_u8(out + i, look256(&t, vuzp1q_u8(vreinterpretq_u8_u16(a), vreinterpretq_u8_u16(b))));
            if (vmaxvq_u16(vorrq_u16(a, b)) > 255)
                for (int64_t k = i; k < i + 16; k++) out[k] = lut[v[k] >> down & ((1 << bits) - 1)];
        }
    }
    return i;
}
#define LOOKED_UP(size, type)                                                                                          \
    static int64_t looked_up_##size(const type *v, int64_t n, int down, int bits, const uint8_t *lut, uint8_t *out) {  \
        const table256 t = table256_at(lut);                                                                           \
        const uint8x16_t of_top = vdupq_n_u8((uint8_t)((1 << bits) - 1));                                              \
        int64_t i = 0;                                                                                                 \
        for (; i + 16 <= n; i += 16) vst1q_u8(out + i, look256(&t, vandq_u8(tops_##size(v + i, down), of_top)));       \
        return i;                                                                                                      \
    }
LOOKED_UP(1, uint8_t)
LOOKED_UP(2, uint16_t)
LOOKED_UP(4, uint32_t)
#else
#define looked_up_1(...) 0
#define looked_up_4(...) 0
#ifndef AVX512
#define looked_up_2(...) 0
#endif
#endif
#define looked_up_8(...) 0
#define runs512_4(...) 0
#define runs512_8(...) 0

/* n bytes of b bits each to bits side by side: two of them to one of twice as many bits, in place, until they fill it. Up
 * to 7 behind the last are 0. */
static void pack_fields(uint8_t *fields, int64_t n, int b, uint8_t *out) {
    for (; b < 8; b *= 2) {
        uint8_t *to = b == 4 ? out : fields;
        n = (n + 1) / 2;
        for (int64_t i = 0; i < n; i++) {
            uint16_t two;
            memcpy(&two, fields + 2 * i, 2);
            to[i] = (uint8_t)(two | two >> (8 - b));
        }
        if (b < 4) memset(fields + n, 0, 4);
    }
}

#define SIZE 1
#define WORD uint8_t
#include "word.h"
#undef SIZE
#undef WORD
#define SIZE 2
#define WORD uint16_t
#include "word.h"
#undef SIZE
#undef WORD
#define SIZE 4
#define WORD uint32_t
#include "word.h"
#undef SIZE
#undef WORD
#define SIZE 8
#define WORD uint64_t
#include "word.h"
