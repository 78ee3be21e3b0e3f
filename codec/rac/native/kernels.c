/* Decode and analysis kernels. Plain C, no Python headers; loaded through ctypes (which releases the GIL).
 * Every loop has a numpy or numba twin in the package that the tests hold it to, bit for bit. */
#include <stdint.h>
#include <string.h>
#if defined(__x86_64__) && defined(__GNUC__)
#include <immintrin.h>
#define HAVE_X86 1
#endif

static inline uint64_t step(uint64_t x, const uint32_t *lut, uint8_t *o, const uint32_t *words, uint32_t *p,
                            uint32_t end) {
    uint32_t e = lut[(x >> 12) & 4095];
    *o = (uint8_t)e;
    x = ((((x >> 24) * (e >> 20)) + ((e >> 8) & 4095)) << 12) | (x & 4095);
    if ((x >> 32) == 0 && *p < end) x = (x << 32) | words[(*p)++];
    return x;
}

static void rows_scalar(const uint32_t *lut, const uint32_t *words, uint32_t *ptr, const uint32_t *end,
                        uint64_t *st, uint8_t *out, int64_t steps, int64_t lanes, int64_t used) {
    int64_t l = 0;
    for (; l + 4 <= used; l += 4) {
        uint64_t a = st[l], b = st[l + 1], c = st[l + 2], d = st[l + 3];
        uint32_t pa = ptr[l], pb = ptr[l + 1], pc = ptr[l + 2], pd = ptr[l + 3];
        uint8_t *o = out + l;
        for (int64_t t = 0; t < steps; t++, o += lanes) {
            a = step(a, lut, o, words, &pa, end[l]);
            b = step(b, lut, o + 1, words, &pb, end[l + 1]);
            c = step(c, lut, o + 2, words, &pc, end[l + 2]);
            d = step(d, lut, o + 3, words, &pd, end[l + 3]);
        }
        st[l] = a; st[l + 1] = b; st[l + 2] = c; st[l + 3] = d;
        ptr[l] = pa; ptr[l + 1] = pb; ptr[l + 2] = pc; ptr[l + 3] = pd;
    }
    for (; l < used; l++) {
        uint64_t a = st[l];
        uint32_t pa = ptr[l];
        for (int64_t t = 0; t < steps; t++) a = step(a, lut, out + t * lanes + l, words, &pa, end[l]);
        st[l] = a; ptr[l] = pa;
    }
}

#ifdef HAVE_X86
#define AVX512 __attribute__((target("avx512f,avx512dq,avx512bw,avx512vl")))
#define ROWS512(NAME, V)                                                                                      \
    AVX512 static void NAME(const uint32_t *lut, const uint32_t *words, uint32_t *ptr, const uint32_t *end,   \
                            uint64_t *st, uint8_t *out, int64_t steps, int64_t lanes) {                       \
        const __m512i m12 = _mm512_set1_epi64(4095), high = _mm512_set1_epi64((int64_t)0xffffffff00000000ull); \
        const __m256i m12s = _mm256_set1_epi32(4095), one = _mm256_set1_epi32(1);                             \
        __m512i x[V];                                                                                         \
        __m256i p[V], en[V];                                                                                  \
        for (int k = 0; k < V; k++) {                                                                         \
            x[k] = _mm512_loadu_si512(st + 8 * k);                                                            \
            p[k] = _mm256_loadu_si256((const void *)(ptr + 8 * k));                                           \
            en[k] = _mm256_loadu_si256((const void *)(end + 8 * k));                                          \
        }                                                                                                     \
        for (int64_t t = 0; t < steps; t++, out += lanes) {                                                   \
            _Pragma("GCC unroll 4") for (int k = 0; k < V; k++) {                                             \
                __m512i slot = _mm512_and_si512(_mm512_srli_epi64(x[k], 12), m12);                            \
                __m256i e = _mm512_i64gather_epi32(slot, lut, 4);                                             \
                _mm_storel_epi64((void *)(out + 8 * k), _mm256_cvtepi32_epi8(e));                             \
                __m512i f = _mm512_cvtepu32_epi64(_mm256_srli_epi32(e, 20));                                  \
                __m512i d = _mm512_cvtepu32_epi64(_mm256_and_si256(_mm256_srli_epi32(e, 8), m12s));           \
                __m512i y = _mm512_add_epi64(_mm512_mullo_epi64(_mm512_srli_epi64(x[k], 24), f), d);          \
                y = _mm512_or_si512(_mm512_slli_epi64(y, 12), _mm512_and_si512(x[k], m12));                   \
                __mmask8 need = _mm512_testn_epi64_mask(y, high);                                             \
                need = _mm256_mask_cmplt_epu32_mask(need, p[k], en[k]);                                       \
                __m256i w = _mm256_mmask_i32gather_epi32(_mm256_setzero_si256(), need, p[k], words, 4);       \
                y = _mm512_mask_or_epi64(y, need, _mm512_slli_epi64(y, 32), _mm512_cvtepu32_epi64(w));        \
                p[k] = _mm256_mask_add_epi32(p[k], need, p[k], one);                                          \
                x[k] = y;                                                                                     \
            }                                                                                                 \
        }                                                                                                     \
        for (int k = 0; k < V; k++) {                                                                         \
            _mm512_storeu_si512(st + 8 * k, x[k]);                                                            \
            _mm256_storeu_si256((void *)(ptr + 8 * k), p[k]);                                                 \
        }                                                                                                     \
    }
ROWS512(rows512x1, 1)
ROWS512(rows512x2, 2)
ROWS512(rows512x4, 4)
static int has512(void) {
    static int known = -1;
    if (known < 0) {
        __builtin_cpu_init();
        known = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
                __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl");
    }
    return known;
}
#else
static int has512(void) { return 0; }
#endif

int rac_features(void) { return has512(); }

static void rows(const uint32_t *lut, const uint32_t *words, uint32_t *ptr, const uint32_t *end, uint64_t *st,
                 uint8_t *out, int64_t steps, int64_t lanes) {
    int64_t l = 0;
#ifdef HAVE_X86
    if (has512() && steps > 8) {
        for (; l + 32 <= lanes; l += 32) rows512x4(lut, words, ptr + l, end + l, st + l, out + l, steps, lanes);
        for (; l + 16 <= lanes; l += 16) rows512x2(lut, words, ptr + l, end + l, st + l, out + l, steps, lanes);
        for (; l + 8 <= lanes; l += 8) rows512x1(lut, words, ptr + l, end + l, st + l, out + l, steps, lanes);
    }
#endif
    if (l < lanes) rows_scalar(lut, words, ptr + l, end + l, st + l, out + l, steps, lanes, lanes - l);
}

/* Decode all segments of a tile to symbols. seg[2k] symbols under table seg[2k+1]. 0, or 1: bad final state. */
int rac_ans_decode(const uint32_t *luts, const uint32_t *words, const uint16_t *count, int64_t lanes,
                   const int64_t *seg, int64_t nseg, uint8_t *out) {
    uint64_t st[1024];
    uint32_t ptr[1024], end[1024], at = 0;
    for (int64_t l = 0; l < lanes; l++) {
        ptr[l] = at; end[l] = at += count[l];
        uint64_t x = 0;
        if (ptr[l] < end[l]) x = words[ptr[l]++];
        if (ptr[l] < end[l]) x = x << 32 | words[ptr[l]++];
        st[l] = x;
    }
    for (int64_t k = 0; k < nseg; k++) {
        const uint32_t *lut = luts + 4096 * seg[2 * k + 1];
        int64_t full = seg[2 * k] / lanes, rest = seg[2 * k] % lanes;
        rows(lut, words, ptr, end, st, out, full, lanes);
        out += full * lanes;
        rows_scalar(lut, words, ptr, end, st, out, 1, lanes, rest);
        out += rest;
    }
    int bad = 0;
    for (int64_t l = 0; l < lanes; l++) bad |= st[l] != 0 || ptr[l] != end[l];
    return bad;
}

/* hist[(v & mask) >> shift] += 1 for n words; returns the OR of all words */
#define SCAN(T, NAME)                                                                                         \
    uint64_t NAME(const T *v, int64_t n, uint64_t mask, int shift, uint32_t *hist) {                          \
        T all = 0;                                                                                            \
        for (int64_t i = 0; i < n; i++) { all |= v[i]; hist[(uint16_t)((v[i] & (T)mask) >> shift)]++; }       \
        return all;                                                                                           \
    }
SCAN(uint8_t, rac_scan1)
SCAN(uint16_t, rac_scan2)
SCAN(uint32_t, rac_scan4)
SCAN(uint64_t, rac_scan8)

/* hist[row[r] + col[c]][symbol] += 1; row, col may be null (0) */
void rac_hist(const uint8_t *sym, int64_t rows_, int64_t cols, const int32_t *row, const int32_t *col, int64_t size,
              uint32_t *hist) {
    for (int64_t r = 0; r < rows_; r++, sym += cols) {
        uint32_t *h = hist + (row ? row[r] : 0) * size;
        if (col) for (int64_t c = 0; c < cols; c++) h[col[c] * size + sym[c]]++;
        else for (int64_t c = 0; c < cols; c++) h[sym[c]]++;
    }
}

/* symbols (n) in sequence order -> lane-major pieces, segment by segment */
void rac_to_lanes(const uint8_t *sym, int64_t lanes, const int64_t *seg, int64_t nseg, const int64_t *start,
                  uint8_t *out) {
    int64_t pos[1024];
    for (int64_t l = 0; l < lanes; l++) pos[l] = start[l];
    for (int64_t k = 0; k < nseg; k++) {
        int64_t n = seg[2 * k];
        for (int64_t l = 0; l < lanes; l++) {
            int64_t p = pos[l];
            for (int64_t i = l; i < n; i += lanes) out[p++] = sym[i];
            pos[l] = p;
        }
        sym += n;
    }
}


/* lut[word top] for every word: words to symbols (encoder) */
#define SYMBOLS(T, NAME)                                                                                      \
    void NAME(const T *v, int64_t n, int z, int sign, int shift, const uint8_t *lut, uint8_t *out) {          \
        T mask = (T)~(T)0; int bits = (int)sizeof(T) * 8 - z;                                                 \
        if (bits < (int)sizeof(T) * 8) mask = (T)(((T)1 << bits) - 1);                                        \
        if (sign) mask = (T)(mask >> 1);                                                                      \
        for (int64_t i = 0; i < n; i++) out[i] = lut[(uint16_t)(((T)(v[i] >> z) & mask) >> shift)];           \
    }
SYMBOLS(uint8_t, rac_symbols1)
SYMBOLS(uint16_t, rac_symbols2)
SYMBOLS(uint32_t, rac_symbols4)
SYMBOLS(uint64_t, rac_symbols8)

/* Exponential-Golomb frequency tables (stages/lanes.md, "Tables"). 0 ok, 1 bits run out or are left, 2 bad table */
int rac_tables(const uint8_t *in, int64_t size, int64_t count, int64_t n, int order, uint16_t *freq) {
    int64_t at = 0, end = size * 8;
    for (int64_t t = 0; t < count; t++, freq += n) {
        int32_t prev = 0, sum = 0;
        for (int64_t i = 0; i < n; i++) {
            int k = (prev ? 32 - __builtin_clz((unsigned)prev) : 0) / 2 + order, q = 0;
            if (k < 0) k = 0;
            for (;; at++, q++) {
                if (at >= end || q > 13) return 1;
                if (in[at >> 3] >> (7 - (at & 7)) & 1) break;
            }
            if (at + 1 + q + k > end) return 1;
            uint32_t v = 0;
            for (int b = 0; b <= q + k; b++, at++) v = v << 1 | (in[at >> 3] >> (7 - (at & 7)) & 1);
            v -= 1u << k;
            prev += (int32_t)(v >> 1) ^ -(int32_t)(v & 1);
            if (prev < 0 || prev > 4095) return 2;
            freq[i] = (uint16_t)prev;
            sum += prev;
        }
        if (sum != 4096) return 2;
    }
    if (end - at >= 8) return 1;
    for (; at < end; at++) if (in[at >> 3] >> (7 - (at & 7)) & 1) return 1;
    return 0;
}

void rac_lookup(const uint16_t *freq, int64_t count, int64_t n, uint32_t *out) {
    for (int64_t t = 0; t < count; t++)
        for (int64_t s = 0; s < n; s++, freq++)
            for (uint32_t j = 0, e = (uint32_t)s | (uint32_t)*freq << 20; j < *freq; j++) *out++ = e | j << 8;
}

/* Positions (ascending) and values of escaped symbols; bytes lie lane after lane. -1 if a lane's count is wrong */
int64_t rac_escapes(const uint8_t *sym, int64_t lanes, const int64_t *seg, int64_t nseg, int64_t first,
                    const uint32_t *bases, const uint8_t *bytes, const uint16_t *count, int64_t *pos,
                    uint32_t *top) {
    uint32_t ptr[1024], end[1024], at = 0;
    int64_t found = 0, off = 0;
    for (int64_t l = 0; l < lanes; l++) { ptr[l] = at; end[l] = at += count[l]; }
    for (int64_t k = 0; k < nseg; k++) {
        int64_t n = seg[2 * k];
        for (int64_t b = 0; b < n; b += 64) {
            int64_t stop = b + 64 < n ? b + 64 : n;
            uint8_t any = 0;
            for (int64_t i = b; i < stop; i++) any |= sym[off + i] >= first;
            if (!any) continue;
            for (int64_t i = b; i < stop; i++)
                if (sym[off + i] >= first) {
                    int64_t l = i % lanes;
                    if (ptr[l] >= end[l]) return -1;
                    pos[found] = off + i;
                    top[found++] = bases[sym[off + i] - first] + bytes[ptr[l]++];
                }
        }
        off += n;
    }
    for (int64_t l = 0; l < lanes; l++) if (ptr[l] != end[l]) return -1;
    return found;
}

#if defined(HAVE_X86) && defined(__linux__) && !defined(__clang__)
#define CLONES __attribute__((target_clones("arch=x86-64-v4", "avx2", "default")))
#else
#define CLONES
#endif
enum { CHUNK = 1024 };

/* raw[i] = bits of element at + i from the power-of-two planes, largest first, lowest bits in the largest */
#define RAWBITS(T, NAME)                                                                                      \
    CLONES static void NAME(const uint8_t *planes, const int64_t *start, int r, int64_t at, int64_t n, T *raw) { \
        int low = 0, j = 0;                                                                                   \
        for (int64_t i = 0; i < n; i++) raw[i] = 0;                                                           \
        for (int b = 32; b; b >>= 1) {                                                                        \
            if (!(r & b)) continue;                                                                           \
            const uint8_t *p = planes + start[j++];                                                           \
            if (b == 32) { const uint32_t *q = (const uint32_t *)p + at; for (int64_t i = 0; i < n; i++) raw[i] |= (T)((uint64_t)q[i] << low); } \
            else if (b == 16) { const uint16_t *q = (const uint16_t *)p + at; for (int64_t i = 0; i < n; i++) raw[i] |= (T)q[i] << low; } \
            else if (b == 8) { const uint8_t *q = p + at; for (int64_t i = 0; i < n; i++) raw[i] |= (T)((T)q[i] << low); } \
            else if (b == 4 && !(at & 1)) {                                                                   \
                const uint8_t *q = p + (at >> 1);                                                             \
                for (int64_t i = 0; i < n >> 1; i++) {                                                        \
                    raw[2 * i] |= (T)((T)(q[i] & 15) << low); raw[2 * i + 1] |= (T)((T)(q[i] >> 4) << low);    \
                }                                                                                             \
                if (n & 1) raw[n - 1] |= (T)((T)(q[n >> 1] & 15) << low);                                     \
            } else {                                                                                          \
                int per = 8 / b, lg = b == 4 ? 1 : b == 2 ? 2 : 3;                                            \
                for (int64_t i = 0; i < n; i++)                                                               \
                    raw[i] |= (T)((T)(p[(at + i) >> lg] >> ((at + i) & (per - 1)) * b & ((1 << b) - 1)) << low); \
            }                                                                                                 \
            low += b;                                                                                         \
        }                                                                                                     \
    }
RAWBITS(uint8_t, raw1)
RAWBITS(uint16_t, raw2)
RAWBITS(uint32_t, raw4)
RAWBITS(uint64_t, raw8)

/* Symbols of rows x cols elements in sequence order to words at dst[row[i] * stride + col[j]]; row, col may be
 * null (as they lie). pos/top are the tile's escapes, *esc the next one; at is the element's place in the tile. */
#define MERGE(T, NAME, RAW)                                                                                   \
    CLONES void NAME(const uint8_t *sym, int64_t at, int64_t rows_, int64_t cols, const int32_t *row,         \
                     const int32_t *col, T *dst, int64_t stride, const uint32_t *value, int z, int sign,      \
                     int shift, const uint8_t *planes, const int64_t *start, int r, const int64_t *pos,       \
                     const uint32_t *top, int64_t nesc, int64_t *esc) {                                       \
        T raw[CHUNK]; uint32_t val[CHUNK];                                                                    \
        const int signat = (int)sizeof(T) * 8 - z - 1;                                                        \
        const T low = (T)(((T)1 << shift) - 1);                                                               \
        int64_t e = *esc, total = rows_ * cols, i = 0, j = 0;                                                 \
        for (int64_t b = 0; b < total; b += CHUNK) {                                                          \
            int64_t n = b + CHUNK < total ? CHUNK : total - b;                                                \
            RAW(planes, start, r, at + b, n, raw);                                                            \
            for (int64_t q = 0; q < n; q++) val[q] = value[sym[at + b + q]];                                  \
            for (; e < nesc && pos[e] < at + b + n; e++) val[pos[e] - at - b] = top[e];                       \
            if (sign) for (int64_t q = 0; q < n; q++)                                                         \
                raw[q] = (T)((T)((T)((T)val[q] << shift) | (T)(raw[q] & low) | (T)((T)(raw[q] >> shift) << signat)) << z); \
            else for (int64_t q = 0; q < n; q++)                                                              \
                raw[q] = (T)((T)((T)((T)val[q] << shift) | (T)(raw[q] & low)) << z);                          \
            for (int64_t q = 0; q < n;) {                                                                     \
                int64_t m = cols - j < n - q ? cols - j : n - q;                                              \
                T *d = dst + (row ? row[i] : i) * stride;                                                     \
                if (col) for (int64_t c = 0; c < m; c++) d[col[j + c]] = raw[q + c];                          \
                else memcpy(d + j, raw + q, (size_t)m * sizeof(T));                                           \
                q += m; j += m;                                                                               \
                if (j == cols) { j = 0; i++; }                                                                \
            }                                                                                                 \
        }                                                                                                     \
        *esc = e;                                                                                             \
    }
MERGE(uint8_t, rac_merge1, raw1)
MERGE(uint16_t, rac_merge2, raw2)
MERGE(uint32_t, rac_merge4, raw4)
MERGE(uint64_t, rac_merge8, raw8)
