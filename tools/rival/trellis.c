/* Viterbi search over the 65,536 states of a bitshift trellis (QTIP, arXiv 2406.11235), costs in 16 bits.
 *
 * State s of a step is followed by (s << k | b) mod 65536 for b < 2^k, and stands for values[s]. Two states have the same
 * followers where their lower 16 - k bits are equal, so that 2^(16 - k) sums are all that one step hands to the next:
 *
 *   after[g] = min over t < 2^k of before[s >> k] + (w - values[s])^2,   s = t << (16 - k) | g
 *
 * Numbers are fixed point. A difference saturates at 16 bits, is doubled k - 2 times (saturating too), and the upper 16
 * bits of its square are the cost; sums saturate at 65,535 after the least sum of the step before was taken off. A sum
 * that is large never is of the best path. All sums are kept, and the way back finds again which t each minimum is of.
 * The loop for AVX-512 and the plain one find the same states. */
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#ifdef __AVX512BW__
#include <immintrin.h>
#endif

enum { STATES = 65536, ALL = 65535, NEAR = 128 };

static unsigned cost(unsigned before, unsigned least, int w, int value, int k)
{
    int d = w - value;
    d = d > 32767 ? 32767 : d < -32768 ? -32768 : d;
    for (int i = 2; i < k; i++) d = 2 * d > 32767 ? 32767 : 2 * d < -32768 ? -32768 : 2 * d;
    const unsigned sum = (before > least ? before - least : 0) + (unsigned)((d * d) >> 16);
    return sum > ALL ? ALL : sum;
}

/* One step: the sums after it. `least` is taken off the sums before; the new least is returned. */
static inline __attribute__((always_inline)) unsigned step(int16_t w, const int k, unsigned least, const int16_t *values,
                                                           const uint16_t *before, uint16_t *after)
{
    const int groups = STATES >> k, stride = groups >> k, many = 1 << k;
#ifdef __AVX512BW__
    const __m512i lane = _mm512_set_epi16(31, 30, 29, 28, 27, 26, 25, 24, 23, 22, 21, 20, 19, 18, 17, 16, 15, 14, 13, 12,
                                          11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
    const __m512i number = _mm512_set1_epi16(w), off = _mm512_set1_epi16((short)least);
    __m512i lowest = _mm512_set1_epi16(-1), sums[16];
    for (int part = 0; part < stride; part += 32) {
#pragma GCC unroll 16
        for (int t = 0; t < many; t++) sums[t] = _mm512_subs_epu16(_mm512_loadu_si512(before + t * stride + part), off);
        for (int j = 0; j < many; j++) {
            const int g = (part << k) + 32 * j;
            const __m512i from = _mm512_srli_epi16(_mm512_add_epi16(lane, _mm512_set1_epi16((short)(32 * j))), k);
            __m512i best = _mm512_set1_epi16(-1);
#pragma GCC unroll 16
            for (int t = 0; t < many; t++) {
                __m512i d = _mm512_subs_epi16(number, _mm512_loadu_si512(values + t * groups + g));
                if (k > 2) d = _mm512_adds_epi16(d, d);
                if (k > 3) d = _mm512_adds_epi16(d, d);
                d = _mm512_adds_epu16(_mm512_permutexvar_epi16(from, sums[t]), _mm512_mulhi_epi16(d, d));
                best = _mm512_min_epu16(d, best);
            }
            _mm512_storeu_si512(after + g, best);
            lowest = _mm512_min_epu16(lowest, best);
        }
    }
    uint16_t found[32];
    _mm512_storeu_si512(found, lowest);
    unsigned out = ALL;
    for (int i = 0; i < 32; i++) out = found[i] < out ? found[i] : out;
    return out;
#else
    unsigned out = ALL;
    for (int g = 0; g < groups; g++) {
        unsigned best = ALL;
        for (int t = 0; t < many; t++) {
            const unsigned sum = cost(before[t * stride + (g >> k)], least, w, values[t * groups + g], k);
            best = sum < best ? sum : best;
        }
        after[g] = (uint16_t)best;
        out = best < out ? best : out;
    }
    return out;
#endif
}

static unsigned step2(int16_t w, unsigned least, const int16_t *values, const uint16_t *before, uint16_t *after)
{
    return step(w, 2, least, values, before, after);
}

static unsigned step3(int16_t w, unsigned least, const int16_t *values, const uint16_t *before, uint16_t *after)
{
    return step(w, 3, least, values, before, after);
}

static unsigned step4(int16_t w, unsigned least, const int16_t *values, const uint16_t *before, uint16_t *after)
{
    return step(w, 4, least, values, before, after);
}

/* The best path of w (n,), which before the first and after the last step has the lower bits `bound` (-1: any). */
static void path(const int16_t *w, int n, int k, const int16_t *values, int bound, uint16_t *sums, unsigned *least,
                 uint16_t *states)
{
    const int groups = STATES >> k;
    memset(sums, bound < 0 ? 0 : 255, sizeof(uint16_t) * (size_t)groups);
    if (bound >= 0) sums[bound] = 0;
    least[0] = 0;
    for (int i = 0; i < n; i++) {
        const uint16_t *before = sums + (size_t)i * groups;
        uint16_t *after = sums + (size_t)(i + 1) * groups;
        least[i + 1] = (k == 2 ? step2 : k == 3 ? step3 : step4)(w[i], least[i], values, before, after);
    }
    int g = bound;
    if (g < 0)
        for (g = 0; sums[(size_t)n * groups + g] != least[n];) g++;
    for (int i = n - 1; i >= 0; i--) {
        const uint16_t *before = sums + (size_t)i * groups;
        int s = g;
        unsigned best = ALL + 1;
        for (int t = 0; t < 1 << k; t++) {
            const int one = t << (16 - k) | g;
            const unsigned sum = cost(before[one >> k], least[i], w[i], values[one], k);
            if (sum < best) best = sum, s = one;
        }
        states[i] = (uint16_t)s;
        g = s >> k;
    }
}

/* States (count, n) of sequences w (count, n), each a ring: the last state is followed by the first. The bits at which
 * a ring closes are those of the best open path through its last and first NEAR steps (all of them, where n is less than
 * twice that). k: 2, 3 or 4 bits. -1: no memory. */
int rings(const int16_t *w, long count, int n, int k, const int16_t *values, uint16_t *states)
{
    const int half = n / 2 < NEAR ? n / 2 : NEAR;
    uint16_t *sums = malloc(sizeof(uint16_t) * ((size_t)n + 1) * (STATES >> k)), found[2 * NEAR];
    unsigned *least = malloc(sizeof(unsigned) * ((size_t)n + 1));
    int16_t turned[2 * NEAR];
    for (long i = 0; sums && least && i < count; i++) {
        const int16_t *one = w + i * n;
        memcpy(turned, one + n - half, sizeof(int16_t) * (size_t)half);
        memcpy(turned + half, one, sizeof(int16_t) * (size_t)half);
        path(turned, 2 * half, k, values, -1, sums, least, found);
        path(one, n, k, values, found[half] >> k, sums, least, states + i * n);
    }
    const int out = sums && least ? 0 : -1;
    free(sums), free(least);
    return out;
}
