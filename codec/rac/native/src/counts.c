/* Counts of symbols: of all, by the keys of rows and columns, and of classes. Twins: rac/native/lanes.py,
 * rac/encode/code/classes.py. */
#include "rac.h"

#if defined(AVX512)
enum { VECTOR = 64, SIDE = 16 };
#elif defined(AVX2)
enum { VECTOR = 32, SIDE = 8 };
#else
enum { VECTOR = 16, SIDE = 8 };
#endif
typedef uint8_t bytes_of __attribute__((vector_size(VECTOR)));

static uint32_t sum_of(bytes_of v) {
#if defined(AVX512)
    return (uint32_t)_mm512_reduce_add_epi64(_mm512_sad_epu8((__m512i)v, _mm512_setzero_si512()));
#elif defined(AVX2)
    const __m256i s = _mm256_sad_epu8((__m256i)v, _mm256_setzero_si256());
    const __m128i t = _mm_add_epi64(_mm256_castsi256_si128(s), _mm256_extracti128_si256(s, 1));
    return (uint32_t)(_mm_cvtsi128_si64(t) + _mm_extract_epi64(t, 1));
#elif defined(NEON)
    return vaddlvq_u8((uint8x16_t)v);
#else
    uint32_t sum = 0;
    for (int i = 0; i < VECTOR; i++) sum += v[i];
    return sum;
#endif
}

/* found[k] += 1 in each byte of `n` vectors, `stride` bytes apart, that is first + k; n is at most 255 */
INLINED void count_some(const uint8_t *sym, const int32_t *at, int64_t n, int64_t stride, int first, bytes_of *found) {
    bytes_of f[SIDE];
#pragma GCC unroll 16
    for (int k = 0; k < SIDE; k++) f[k] = (bytes_of){0};
    for (int64_t i = 0; i < n; i++) {
        bytes_of v;
        memcpy(&v, sym + (at ? at[i] : i) * stride, VECTOR);
#pragma GCC unroll 16
        for (int k = 0; k < SIDE; k++) f[k] -= (bytes_of)(v == (uint8_t)(first + k));
    }
#pragma GCC unroll 16
    for (int k = 0; k < SIDE; k++) found[k] = f[k];
}

/* Whether any byte of a vector is below `end` */
static int any_below(const uint8_t *v, int end) {
#if defined(AVX512)
    return _mm512_cmplt_epu8_mask(_mm512_loadu_si512(v), _mm512_set1_epi8((char)end)) != 0;
#elif defined(AVX2)
    const __m256i b = _mm256_loadu_si256((const void *)v);
    return _mm256_movemask_epi8(_mm256_cmpeq_epi8(_mm256_max_epu8(b, _mm256_set1_epi8((char)end)), b)) != -1;
#elif defined(NEON)
    return vminvq_u8(vld1q_u8(v)) < end;
#else
    (void)v;
    return end > 0; /* each is looked at */
#endif
}

/* hist[byte] += 1 for whole vectors, 255 at most. Most bytes are among the SIDE that end with the largest: exponents are */
void rac_bytes(const uint8_t *v, int64_t n, uint32_t *hist) {
    uint8_t most = SIDE - 1;
    for (int64_t i = 0; i < n; i++) most = v[i] > most ? v[i] : most;
    int64_t rest = n;
    const int first[2] = {most - (SIDE - 1), most - (2 * SIDE - 1)};
    int end = most + 1;
    for (int k = 0; k < (SIDE == 16 ? 1 : 2) && rest && first[k] >= 0; k++) {
        bytes_of found[SIDE];
        count_some(v, 0, n / VECTOR, VECTOR, end = first[k], found);
        for (int s = 0; s < SIDE; s++) {
            const uint32_t sum = sum_of(found[s]);
            hist[end + s] += sum;
            rest -= sum;
        }
    }
    for (int64_t i = 0; rest && i < n; i += VECTOR) {
        if (!any_below(v + i, end)) continue;
        for (int64_t k = i; k < i + VECTOR; k++)
            if (v[k] < end) {
                hist[v[k]]++;
                rest--;
            }
    }
}

/* hist[symbol] += 1 for a row of symbols below `size`, which is at most 64 */
static void count_row(const uint8_t *sym, int64_t n, int64_t size, uint32_t *hist) {
    int64_t c = 0;
    if (size <= 16) {
        uint32_t few[16] = {0};
        c = n / VECTOR * VECTOR;
        for (int64_t v = 0; v < n / VECTOR; v += 255)
            for (int first = 0; first < size; first += SIDE) {
                bytes_of found[SIDE];
                count_some(sym + v * VECTOR, 0, least(n / VECTOR - v, 255), VECTOR, first, found);
                for (int k = 0; k < SIDE; k++) few[first + k] += sum_of(found[k]);
            }
        for (int64_t i = 0; i < size; i++) hist[i] += few[i];
    } else {
        uint32_t t[4][80]; /* four counters, or equal neighbours wait for each other */
        memset(t, 0, sizeof t);
        for (; c + 4 <= n; c += 4)
            for (int k = 0; k < 4; k++) t[k][sym[c + k]]++;
        for (int64_t i = 0; i < size; i++) hist[i] += t[0][i] + t[1][i] + t[2][i] + t[3][i];
    }
    for (; c < n; c++) hist[sym[c]]++;
}

/* hist[row[r] + col[c]][symbol] += 1; row, col may be null (0) */
void rac_hist(const uint8_t *sym, int64_t rows, int64_t cols, const int32_t *row, const int32_t *col, int64_t size,
              uint32_t *hist) {
    if (col) { /* strips of columns whose counters stay in the cache */
        const int64_t strip = 65536 / size > 64 ? 65536 / size : 64;
        for (int64_t a = 0; a < cols; a += strip) {
            const int64_t b = least(cols, a + strip);
            const uint8_t *s = sym;
            for (int64_t r = 0; r < rows; r++, s += cols) {
                uint32_t *h = hist + (row ? row[r] : 0) * size;
                for (int64_t c = a; c < b; c++) h[col[c] * size + s[c]]++;
            }
        }
        return;
    }
    for (int64_t r = 0; r < rows; r++, sym += cols) {
        uint32_t *h = hist + (row ? row[r] : 0) * size;
        if (size <= 64 && cols >= 64) count_row(sym, cols, size, h);
        else
            for (int64_t c = 0; c < cols; c++) h[sym[c]]++;
    }
}

/* hist[column][class[r]][symbol] += 1 for symbols below `size`, rows `stride` apart, of k classes; class may be null.
 * Counters of columns lie side by side in vectors. 0, or -2: not enough memory */
int rac_hist_cols(const uint8_t *sym, int64_t rows, int64_t cols, int64_t stride, const uint8_t *class, int64_t k,
                  int64_t size, uint32_t *hist) {
    int64_t ends[257] = {0}, next[256], done = 0;
    int32_t *at = malloc((size_t)rows * 4 + 4);
    if (!at) return -2;
    for (int64_t r = 0; r < rows; r++) ends[(class ? class[r] : 0) + 1]++;
    for (int64_t i = 0; i < k; i++) ends[i + 1] += ends[i];
    memcpy(next, ends, sizeof next);
    for (int64_t r = 0; r < rows; r++) at[next[class ? class[r] : 0]++] = (int32_t)r;
    for (; size <= 16 && done + VECTOR <= cols; done += VECTOR)
        for (int64_t i = 0; i < k; i++)
            for (int64_t r = ends[i]; r < ends[i + 1]; r += 255)
                for (int first = 0; first < size; first += SIDE) {
                    bytes_of found[SIDE];
                    count_some(sym + done, at + r, least(ends[i + 1] - r, 255), stride, first, found);
                    for (int64_t c = 0; c < VECTOR; c++)
                        for (int64_t s = 0; s < least(size - first, SIDE); s++)
                            hist[((done + c) * k + i) * size + first + s] += found[s][c];
                }
    for (int64_t r = 0; r < rows; r++) {
        uint32_t *h = hist + (class ? class[r] : 0) * size;
        for (int64_t c = done; c < cols; c++) h[c * k * size + sym[r * stride + c]]++;
    }
    free(at);
    return 0;
}

/* out[class[i]] += hist[i] for n vectors of m counters */
void rac_sum(const uint32_t *hist, const uint8_t *class, int64_t n, int64_t m, int64_t *out) {
    for (int64_t i = 0; i < n; i++, hist += m) {
        int64_t *o = out + class[i] * m;
        for (int64_t j = 0; j < m; j++) o[j] += hist[j];
    }
}
