/* Coded symbols to lanes, and what the encoder counts (stages/lanes.md). Twins: rac/native/lanes.py,
 * rac/encode/code/lanes.py. */
#include "encode.h"

#if defined(__SIZEOF_INT128__)
static inline uint64_t mulhi(uint64_t a, uint64_t b) { return (uint64_t)(((unsigned __int128)a * b) >> 64); }
#else
static inline uint64_t mulhi(uint64_t a, uint64_t b) {
    uint64_t al = (uint32_t)a, ah = a >> 32, bl = (uint32_t)b, bh = b >> 32, m = ah * bl + (al * bl >> 32);
    return ah * bh + (m >> 32) + (((uint32_t)m + al * bh) >> 32);
}
#endif

/* `tables` x 256 of what a step takes, out of frequency | start << 16 */
void rac_steps(const uint32_t *model, int64_t tables, rac_step *out) {
    for (int64_t i = 0; i < 256 * tables; i++) {
        const uint64_t f = model[i] & 0xffff, start = model[i] >> 16;
        out[i] = (rac_step){UINT64_MAX / (f ? f : 1), start << 12, (1 << 24) - (f << 12), f};
    }
}

/* Rows of `n` symbols, one of each of the first lanes, the last first; symbols end at `sym`. The quotient q by the
 * frequency f is exact: with r = (2^64 - 1) / f rounded down, (q + 1) r / 2^64 is less than (q + 1) / f, by less than 1 / f
 * as q is below 2^52. */
INLINED uint32_t *few(const uint8_t *sym, int64_t rows, int64_t n, const rac_step *m, uint64_t *st, uint32_t *w,
                      uint32_t *counts) {
    for (; rows > 0; rows--) {
        sym -= n;
        for (int64_t l = n - 1; l >= 0; l--) {
            const rac_step *e = m + sym[l];
            uint64_t x = st[l];
            w[-1] = (uint32_t)x;
            const uint32_t flush = (x >> 52) >= e->freq;
            w -= flush;
            counts[l] += flush;
            x >>= flush * 32;
            st[l] = x + e->start + mulhi((x >> 12) + 1, e->reciprocal) * e->complement;
        }
    }
    return w;
}

/* The same, for numbers of lanes whose states stay in registers */
#define FEW(n)                                                                                                         \
    static uint32_t *few##n(const uint8_t *sym, int64_t rows, const rac_step *m, uint64_t *st, uint32_t *w,            \
                            uint32_t *counts) {                                                                        \
        uint64_t x[n];                                                                                                 \
        uint32_t c[n] = {0};                                                                                           \
        memcpy(x, st, sizeof x);                                                                                       \
        w = few(sym, rows, n, m, x, w, c);                                                                             \
        memcpy(st, x, sizeof x);                                                                                       \
        for (int l = 0; l < n; l++) counts[l] += c[l];                                                                 \
        return w;                                                                                                      \
    }
FEW(1)
FEW(2)
FEW(4)
FEW(8)

#ifdef AVX512
/* 8 lanes a step. A quotient below 2^40 by less than 2^12 is at least 2^-12 below the next integer, and a division of
 * doubles rounds by less, so that it is exact */
INLINED __m512i step(__m512i x, __m512i e, __mmask8 some) {
    const __m512i f = _mm512_and_si512(e, _mm512_set1_epi64(0xffff));
    const __m512i start = _mm512_slli_epi64(_mm512_srli_epi64(e, 16), 12);
    const __m512i less = _mm512_sub_epi64(_mm512_set1_epi64(1 << 24), _mm512_slli_epi64(f, 12));
    const __m512d q = _mm512_div_pd(_mm512_cvtepi64_pd(_mm512_srli_epi64(x, 12)), _mm512_cvtepi64_pd(f));
    const __m512i by = _mm512_mullo_epi64(_mm512_cvttpd_epi64(q), less);
    return _mm512_mask_add_epi64(x, some, _mm512_add_epi64(x, start), by);
}

/* Rows of `blocks` x 16 lanes, `n` symbols in each, the last first; symbols end at `sym` */
INLINED uint32_t *rows(const uint8_t *sym, int64_t rows, int64_t n, int blocks, const uint32_t *m, uint64_t *st,
                       uint32_t *w, uint32_t *counts) {
    for (; rows > 0; rows--) {
        sym -= n;
        for (int b = blocks - 1; b >= 0; b--) {
            const __mmask16 some = (__mmask16)lowest(n - 16 * b);
            const __m512i at = _mm512_cvtepu8_epi32(_mm_maskz_loadu_epi8(some, sym + 16 * b));
            const __m512i e = _mm512_mask_i32gather_epi32(_mm512_set1_epi32(1), some, at, m, 4);
            const __m512i e0 = _mm512_cvtepu32_epi64(_mm512_castsi512_si256(e));
            const __m512i e1 = _mm512_cvtepu32_epi64(_mm512_extracti64x4_epi64(e, 1));
            __m512i x0 = _mm512_loadu_si512(st + 16 * b), x1 = _mm512_loadu_si512(st + 16 * b + 8);
            const __m512i f = _mm512_set1_epi64(0xffff);
            const __mmask8 k0 = _mm512_cmpge_epu64_mask(_mm512_srli_epi64(x0, 52), _mm512_and_si512(e0, f));
            const __mmask8 k1 = _mm512_cmpge_epu64_mask(_mm512_srli_epi64(x1, 52), _mm512_and_si512(e1, f));
            const __mmask16 k = some & (__mmask16)(k0 | k1 << 8);
            __m512i low = _mm512_castsi256_si512(_mm512_cvtepi64_epi32(x0));
            low = _mm512_inserti64x4(low, _mm512_cvtepi64_epi32(x1), 1);
            const int words = __builtin_popcount(k);
            w -= words;
            _mm512_mask_storeu_epi32(w, (__mmask16)lowest(words), _mm512_maskz_compress_epi32(k, low));
            const __m512i c = _mm512_loadu_si512(counts + 16 * b);
            _mm512_storeu_si512(counts + 16 * b, _mm512_mask_add_epi32(c, k, c, _mm512_set1_epi32(1)));
            x0 = _mm512_mask_srli_epi64(x0, (__mmask8)k, x0, 32);
            x1 = _mm512_mask_srli_epi64(x1, (__mmask8)(k >> 8), x1, 32);
            _mm512_storeu_si512(st + 16 * b, step(x0, e0, (__mmask8)some));
            _mm512_storeu_si512(st + 16 * b + 8, step(x1, e1, (__mmask8)(some >> 8)));
        }
    }
    return w;
}
#endif

#ifdef AVX2
/* The low halves of the lanes of a mask, packed at the upper end of four words */
static const int32_t upper[16][8] = {
#define U(a, b, c, d) {a, b, c, d, 0, 0, 0, 0}
    U(0, 0, 0, 0), U(0, 0, 0, 0), U(0, 0, 0, 2), U(0, 0, 0, 2), U(0, 0, 0, 4), U(0, 0, 0, 4), U(0, 0, 2, 4),
    U(0, 0, 2, 4), U(0, 0, 0, 6), U(0, 0, 0, 6), U(0, 0, 2, 6), U(0, 0, 2, 6), U(0, 0, 4, 6), U(0, 0, 4, 6),
    U(0, 2, 4, 6), U(0, 2, 4, 6),
#undef U
};

/* As for AVX-512, 4 lanes a step; integers below 2^52 to doubles and back by the bits of 2^52 */
INLINED __m256i step(__m256i x, __m256i e) {
    const __m256i f = _mm256_and_si256(e, _mm256_set1_epi64x(0xffff)), exponent = _mm256_set1_epi64x(0x4330000000000000);
    const __m256d one = _mm256_castsi256_pd(exponent);
    const __m256d qd = _mm256_sub_pd(_mm256_castsi256_pd(_mm256_or_si256(_mm256_srli_epi64(x, 12), exponent)), one);
    const __m256d fd = _mm256_sub_pd(_mm256_castsi256_pd(_mm256_or_si256(f, exponent)), one);
    const __m256d q = _mm256_floor_pd(_mm256_div_pd(qd, fd));
    const __m256i n = _mm256_xor_si256(_mm256_castpd_si256(_mm256_add_pd(q, one)), exponent);
    const __m256i less = _mm256_sub_epi64(_mm256_set1_epi64x(1 << 24), _mm256_slli_epi64(f, 12));
    __m256i by = _mm256_slli_epi64(_mm256_mul_epu32(_mm256_srli_epi64(n, 32), less), 32);
    by = _mm256_add_epi64(by, _mm256_mul_epu32(n, less));
    return _mm256_add_epi64(_mm256_add_epi64(x, _mm256_slli_epi64(_mm256_srli_epi64(e, 16), 12)), by);
}

/* Rows of `n` lanes, a multiple of 4, the last first; symbols end at `sym` */
INLINED uint32_t *quads(const uint8_t *sym, int64_t rows, int64_t n, const uint32_t *m, uint64_t *st, uint32_t *w,
                        uint32_t *counts) {
    for (; rows > 0; rows--) {
        sym -= n;
        for (int64_t l = n - 4; l >= 0; l -= 4) {
            const __m128i packed = _mm_setr_epi32((int)m[sym[l]], (int)m[sym[l + 1]], (int)m[sym[l + 2]], (int)m[sym[l + 3]]);
            const __m256i e = _mm256_cvtepu32_epi64(packed), f = _mm256_and_si256(e, _mm256_set1_epi64x(0xffff));
            __m256i x = _mm256_loadu_si256((const void *)(st + l));
            const __m256i stay = _mm256_cmpgt_epi64(f, _mm256_srli_epi64(x, 52));
            const int k = ~_mm256_movemask_pd(_mm256_castsi256_pd(stay)) & 15;
            const __m256i at = _mm256_loadu_si256((const void *)upper[k]);
            _mm_storeu_si128((void *)(w - 4), _mm256_castsi256_si128(_mm256_permutevar8x32_epi32(x, at)));
            w -= __builtin_popcount((unsigned)k);
            const __m256i none = _mm256_permutevar8x32_epi32(stay, _mm256_setr_epi32(0, 2, 4, 6, 0, 2, 4, 6));
            __m128i c = _mm_loadu_si128((const void *)(counts + l));
            c = _mm_add_epi32(c, _mm_add_epi32(_mm256_castsi256_si128(none), _mm_set1_epi32(1)));
            _mm_storeu_si128((void *)(counts + l), c);
            x = _mm256_blendv_epi8(_mm256_srli_epi64(x, 32), x, stay);
            _mm256_storeu_si256((void *)(st + l), step(x, e));
        }
    }
    return w;
}

#endif

/* Lanes of the coded symbols of all segments, their words in the order of reading at the end of out[0..size), of
 * which the first 16 are not used; returns how many, or -1 where they do not fit. `model`: frequency | start << 16 of
 * each symbol (tables, 256), `steps` as `rac_steps` makes them of it; counts (up16(lanes)) the words of each lane */
int64_t rac_lanes_of(const uint8_t *sym, int64_t lanes, const rac_segment *seg, int64_t nseg, const uint32_t *model,
                     const rac_step *steps, uint32_t *out, int64_t size, uint32_t *counts) {
    uint64_t st[MOST_LANES] = {0};
    uint32_t *w = out + size;
    memset(counts, 0, (size_t)(lanes + 15) / 16 * 64);
    for (int64_t k = 0; k < nseg; k++) sym += seg[k].symbols;
    while (nseg--) {
        const int64_t table = 256 * seg[nseg].table, n = seg[nseg].symbols, odd = n % lanes, full = n / lanes;
        if (w - out < n + 16) return -1;
#ifdef AVX512
        if (lanes > 8) {
            const uint32_t *m = model + table;
            w = rows(sym, odd > 0, odd, (int)((odd + 15) / 16), m, st, w, counts);
            sym -= odd;
            if (lanes == 32) w = rows(sym, full, 32, 2, m, st, w, counts);
            else if (lanes == 16) w = rows(sym, full, 16, 1, m, st, w, counts);
            else w = rows(sym, full, lanes, (int)((lanes + 15) / 16), m, st, w, counts);
            sym -= full * lanes;
            continue;
        }
#elif defined(AVX2)
        if (lanes > 8 && lanes % 4 == 0) {
            const uint32_t *m = model + table;
            w = few(sym, odd % 4 > 0, odd % 4, steps + table, st + odd / 4 * 4, w, counts + odd / 4 * 4);
            sym -= odd % 4;
            w = quads(sym, odd > 3, odd / 4 * 4, m, st, w, counts);
            sym -= odd / 4 * 4;
            if (lanes == 32) w = quads(sym, full, 32, m, st, w, counts);
            else w = quads(sym, full, lanes, m, st, w, counts);
            sym -= full * lanes;
            continue;
        }
#endif
        w = few(sym, odd > 0, odd, steps + table, st, w, counts);
        sym -= odd;
        if (lanes == 1) w = few1(sym, full, steps + table, st, w, counts);
        else if (lanes == 2) w = few2(sym, full, steps + table, st, w, counts);
        else if (lanes == 4) w = few4(sym, full, steps + table, st, w, counts);
        else if (lanes == 8) w = few8(sym, full, steps + table, st, w, counts);
        else w = few(sym, full, lanes, steps + table, st, w, counts);
        sym -= full * lanes;
    }
    if (w - out < 2 * lanes + 16) return -1;
    for (int64_t l = lanes - 1; l >= 0; l--)
        for (; st[l]; st[l] >>= 32) {
            *--w = (uint32_t)st[l];
            counts[l]++;
        }
    return out + size - w;
}

/* `rac_lanes_of` for one sequence of symbols; -2: not enough memory */
int64_t rac_encode(const uint8_t *sym, int64_t lanes, const rac_segment *seg, int64_t nseg, const uint32_t *model,
                   int64_t tables, uint32_t *out, int64_t size, uint32_t *counts) {
    rac_step *steps = malloc((size_t)tables * 256 * sizeof(rac_step));
    if (!steps) return -2;
    rac_steps(model, tables, steps);
    const int64_t n = rac_lanes_of(sym, lanes, seg, nseg, model, steps, out, size, counts);
    free(steps);
    return n;
}

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
    for (int64_t i = 0; rest && i < n; i++)
        if (v[i] < end) {
            hist[v[i]]++;
            rest--;
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
