/* Words of a trellis to numbers (stages/trellis.md), and numbers to words (stages/lowrank.md). Twins:
 * rac/stages/trellis.py and words.py, bit for bit: plain float32 arithmetic in a fixed order, no contraction to fused
 * operations (setup.py). */
#include "rac.h"

#ifndef AVX512
/* A tile of words to numbers: sign rec[word] col[j] row[i], the state of each column beginning at 0. `states`: room for
 * one of each column and 31 more. Columns one after the other. */
void rac_untrellis(const rac_matrix *words, const rac_dequant *q, const float *col, const float *row,
                   const rac_matrix *dst, uint16_t *states) {
    (void)states;
    for (int64_t j = 0; j < words->cols; j++) {
        unsigned s = 0;
        for (int64_t i = 0; i < words->rows; i++) {
            const uint8_t u = ((const uint8_t *)words->at)[i * words->stride + j];
            const float r = s & 1 ? -q->rec[u] : q->rec[u], v = r * col[j] * row[i];
            if (q->size == 4) ((float *)dst->at)[i * dst->stride + j] = v;
            else ((uint16_t *)dst->at)[i * dst->stride + j] = bf16_of(v);
            s = (s >> 1) ^ (s & 1 ? (unsigned)q->h0 : 0) ^ ((u ^ q->zero) & 1 ? (unsigned)q->h1 : 0);
        }
    }
}
#else
/* Magnitudes of words. Even ones are computed, exactly; others of words of a range of 32 are a permutation of two
 * registers. */
typedef struct {
    const float *rec;
    int even, near;
    __m512 slope, first, low, high;
} magnitudes;

static magnitudes magnitudes_of(const rac_matrix *words, const rac_dequant *q) {
    uint8_t low = 255, high = 0;
    for (int64_t i = 0; !q->even && i < words->rows; i++) {
        const uint8_t *u = (const uint8_t *)words->at + i * words->stride;
        for (int64_t j = 0; j < words->cols; j++) {
            low = u[j] < low ? u[j] : low;
            high = u[j] > high ? u[j] : high;
        }
    }
    const int near = !q->even && high - low < 32;
    float table[32] = {0};
    for (int k = low; near && k <= high; k++) table[k & 31] = q->rec[k]; /* a permutation looks at five bits only */
    return (magnitudes){q->rec, q->even, near, _mm512_set1_ps(q->rec[1] - q->rec[0]), _mm512_set1_ps(q->rec[0]),
                        _mm512_loadu_ps(table), _mm512_loadu_ps(table + 16)};
}

INLINED __m512 magnitude(const magnitudes *m, __m512i u) {
    if (m->even) return _mm512_add_ps(_mm512_mul_ps(_mm512_cvtepi32_ps(u), m->slope), m->first);
    return m->near ? _mm512_permutex2var_ps(m->low, u, m->high) : _mm512_i32gather_ps(u, m->rec, 4);
}

/* Rounded to the upper half of each number, ties to even (not for NaN, which there is none of) */
INLINED __m512i rounded(__m512 v) {
    const __m512i bits = _mm512_castps_si512(v), up = _mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff));
    const __mmask16 odd = _mm512_test_epi32_mask(bits, _mm512_set1_epi32(1 << 16));
    return _mm512_mask_add_epi32(up, odd, up, _mm512_set1_epi32(1));
}

/* 32 numbers, of which `some` are there, to element `at` of dst and on */
INLINED void store(void *dst, int64_t at, int size, const __m512 v[2], __mmask32 some) {
    if (size == 4) {
        _mm512_mask_storeu_ps((float *)dst + at, (__mmask16)some, v[0]);
        _mm512_mask_storeu_ps((float *)dst + at + 16, (__mmask16)(some >> 16), v[1]);
        return;
    }
    uint16_t odd[32]; /* of each pair of halves the upper one */
    for (int k = 0; k < 32; k++) odd[k] = (uint16_t)(2 * k + 1);
    const __m512i upper = _mm512_loadu_si512(odd);
    const __m512i both = _mm512_permutex2var_epi16(rounded(v[0]), upper, rounded(v[1]));
    uint16_t *d = (uint16_t *)dst + at;
    if (some == ~0u) _mm512_storeu_si512(d, both);
    else _mm512_mask_storeu_epi16(d, some, both);
}

/* The same, 32 columns side by side, their states in one register. STRIP rows of all columns, then the next: whole
 * columns would touch as many pages as there are rows. */
void rac_untrellis(const rac_matrix *words, const rac_dequant *q, const float *col, const float *row,
                   const rac_matrix *dst, uint16_t *states) {
    enum { STRIP = 16 };
    const int64_t h = words->rows, w = words->cols;
    const magnitudes m = magnitudes_of(words, q);
    const __m512i one = _mm512_set1_epi16(1), sign = _mm512_set1_epi32(INT32_MIN);
    const __m512i h0 = _mm512_set1_epi16((short)q->h0), h1 = _mm512_set1_epi16((short)q->h1);
    const __mmask32 flip = q->zero & 1 ? ~0u : 0;
    memset(states, 0, 2 * (size_t)w);
    for (int64_t top = 0; top < h; top += STRIP)
        for (int64_t j = 0; j < w; j += 32) {
            const __mmask32 some = (__mmask32)(w - j < 32 ? (1u << (w - j)) - 1 : ~0u);
            const __m512 by[2] = {_mm512_maskz_loadu_ps((__mmask16)some, col + j),
                                  _mm512_maskz_loadu_ps((__mmask16)(some >> 16), col + j + 16)};
            __m512i s = _mm512_loadu_si512(states + j);
            for (int64_t i = top; i < least(h, top + STRIP); i++) {
                const __m256i u = _mm256_maskz_loadu_epi8(some, (const uint8_t *)words->at + i * words->stride + j);
                const __m512 across = _mm512_set1_ps(row[i]);
                const __mmask32 negative = _mm512_test_epi16_mask(s, one);
                const __mmask32 next = _mm512_test_epi16_mask(_mm512_cvtepu8_epi16(u), one) ^ flip;
                s = _mm512_xor_si512(_mm512_srli_epi16(s, 1), _mm512_maskz_mov_epi16(negative, h0));
                s = _mm512_xor_si512(s, _mm512_maskz_mov_epi16(next, h1));
                __m512 v[2];
                for (int g = 0; g < 2; g++) {
                    const __m128i half = g ? _mm256_extracti128_si256(u, 1) : _mm256_castsi256_si128(u);
                    const __m512i bits = _mm512_castps_si512(magnitude(&m, _mm512_cvtepu8_epi32(half)));
                    const __m512i signed_ = _mm512_mask_xor_epi32(bits, (__mmask16)(negative >> 16 * g), bits, sign);
                    v[g] = _mm512_mul_ps(_mm512_mul_ps(_mm512_castsi512_ps(signed_), by[g]), across);
                }
                store(dst->at, i * dst->stride + j, q->size, v, some);
            }
            _mm512_storeu_si512(states + j, s);
        }
}
#endif

/* n numbers to words of F32 (kind 4) or BF16 (kind 2), to the nearest, ties to even; a NaN to the canonical one */
void rac_round(const uint32_t *v, int64_t n, void *dst, int kind) {
    for (int64_t i = 0; i < n; i++) {
        const uint32_t bits = v[i], nan = (bits & 0x7fffffff) > 0x7f800000;
        if (kind == 4) ((uint32_t *)dst)[i] = nan ? 0x7fc00000 : bits;
        else ((uint16_t *)dst)[i] = (uint16_t)(nan ? 0x7fc0 : (bits + 0x7fff + (bits >> 16 & 1)) >> 16);
    }
}
