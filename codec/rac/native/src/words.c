/* Words of each size: their counts, symbols, bit planes and places (word.h). */
#include "tile.h"

/* Symbols of 16-bit words whose tops have `bits` bits, 8 at most, behind `down` others; returns how many are done */
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
static int64_t symbols512(const uint16_t *v, int64_t n, int down, int bits, const uint8_t *lut, uint8_t *out) {
    /* the first processors with AVX-512 lack the permutation of bytes */
    return __builtin_cpu_supports("avx512vbmi") ? permuted(v, n, down, bits, lut, out) : 0;
}
#else
#define symbols512(...) 0
#endif

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
