/* Encoding: counts, classes of rows and columns, and dense words to lanes and planes (stages/lanes.md). */
#include "kernels.h"

/* hist[(v & mask) >> shift] += 1 for n words; returns the OR of all words */
#define SCAN(T, NAME)                                                                                         \
    uint64_t NAME(const T *v, int64_t n, uint64_t mask, int shift, uint32_t *hist) {                          \
        T all = 0;                                                                                            \
        int64_t i = 0;                                                                                        \
        const uint64_t size = (mask >> shift) + 1;                                                            \
        if (size <= 2048 && n >= 8192) { /* four counters, or equal neighbours wait for each other */         \
            uint32_t t[4][2048];                                                                              \
            memset(t, 0, sizeof t);                                                                           \
            for (; i + 4 <= n; i += 4) {                                                                      \
                all |= v[i] | v[i + 1] | v[i + 2] | v[i + 3];                                                 \
                t[0][(v[i] & (T)mask) >> shift]++; t[1][(v[i + 1] & (T)mask) >> shift]++;                     \
                t[2][(v[i + 2] & (T)mask) >> shift]++; t[3][(v[i + 3] & (T)mask) >> shift]++;                 \
            }                                                                                                 \
            for (uint64_t k = 0; k < size; k++) hist[k] += t[0][k] + t[1][k] + t[2][k] + t[3][k];             \
        }                                                                                                     \
        for (; i < n; i++) { all |= v[i]; hist[(uint16_t)((v[i] & (T)mask) >> shift)]++; }                    \
        return all;                                                                                           \
    }
SCAN(uint8_t, rac_scan1)
SCAN(uint16_t, rac_scan2)
SCAN(uint32_t, rac_scan4)
SCAN(uint64_t, rac_scan8)

/* hist[row[r] + col[c]][symbol] += 1; row, col may be null (0) */
void rac_hist(const uint8_t *sym, int64_t rows_, int64_t cols, const int32_t *row, const int32_t *col, int64_t size,
              uint32_t *hist) {
    if (col) { /* strips of columns whose counters stay in the cache */
        const int64_t strip = 65536 / size > 64 ? 65536 / size : 64;
        for (int64_t a = 0; a < cols; a += strip) {
            const int64_t b = cols - a < strip ? cols : a + strip;
            const uint8_t *s = sym;
            for (int64_t r = 0; r < rows_; r++, s += cols) {
                uint32_t *h = hist + (row ? row[r] : 0) * size;
                for (int64_t c = a; c < b; c++) h[col[c] * size + s[c]]++;
            }
        }
        return;
    }
    for (int64_t r = 0; r < rows_; r++, sym += cols) {
        uint32_t *h = hist + (row ? row[r] : 0) * size;
        if (size > 64 || cols < 64) for (int64_t c = 0; c < cols; c++) h[sym[c]]++;
        else { /* four counters, or equal neighbours wait for each other */
            uint32_t t[4][64];
            memset(t, 0, sizeof t);
            int64_t c = 0;
            for (; c + 4 <= cols; c += 4) { t[0][sym[c]]++; t[1][sym[c + 1]]++; t[2][sym[c + 2]]++; t[3][sym[c + 3]]++; }
            for (; c < cols; c++) t[0][sym[c]]++;
            for (int64_t i = 0; i < size; i++) h[i] += t[0][i] + t[1][i] + t[2][i] + t[3][i];
        }
    }
}

static inline int64_t log2_1024(int64_t n, const int64_t *fraction) {
    if (n <= 0) return 0;
    int e = 63 - __builtin_clzll((unsigned long long)n);
    return ((int64_t)e << 10) + fraction[(e < 11 ? n << (11 - e) : n >> (e - 11)) & 2047];
}

/* Length in 2^-10 bit of the symbols and `weight` times their table, for n rows of s counts (encode/classes.py) */
void rac_code_length(const int64_t *counts, int64_t n, int64_t s, const int64_t *fraction, int64_t weight, int64_t *out) {
    for (int64_t k = 0; k < n; k++, counts += s) {
        int64_t total = 0, data = 0, table = 1536 * s;
        for (int64_t i = 0; i < s; i++) total += counts[i];
        int64_t t = total > 1 ? total : 1;
        for (int64_t i = 0; i < s; i++) {
            data += counts[i] * log2_1024(counts[i], fraction);
            table += log2_1024(1 + counts[i] * 4096 / t, fraction) / 2;
        }
        out[k] = total * log2_1024(total, fraction) - data + weight * table;
    }
}

/* out[class[i]] += hist[i] for n vectors of m counters */
void rac_sum(const uint32_t *hist, const uint8_t *class, int64_t n, int64_t m, int64_t *out) {
    for (int64_t i = 0; i < n; i++, hist += m) {
        int64_t *o = out + class[i] * m;
        for (int64_t j = 0; j < m; j++) o[j] += hist[j];
    }
}

void rac_log2(const int64_t *n, int64_t count, const int64_t *fraction, int64_t *out) {
    for (int64_t i = 0; i < count; i++) out[i] = log2_1024(n[i], fraction);
}

static int64_t row_length(const int64_t *c, int64_t g, int64_t s, const int64_t *fraction, int64_t weight) {
    int64_t sum = 0, one;
    for (int64_t i = 0; i < g; i++, c += s) { rac_code_length(c, 1, s, fraction, weight, &one); sum += one; }
    return sum;
}

static int64_t pair_gain(const int64_t *a, const int64_t *b, int64_t la, int64_t lb, int64_t ma, int64_t mb, int64_t g,
                         int64_t s, const int64_t *fraction, int64_t weight, int64_t *tmp) {
    for (int64_t i = 0; i < g * s; i++) tmp[i] = a[i] + b[i];
    int64_t lists = (ma + mb) * log2_1024(ma + mb, fraction) - ma * log2_1024(ma, fraction) - mb * log2_1024(mb, fraction);
    return la + lb - row_length(tmp, g, s, fraction, weight) + lists;
}

/* encode/classes.py join: agg (k, g, s), size (k) and own (k) are overwritten; gain (k, k) and tmp (g, s) are scratch */
void rac_join(int64_t *agg, int64_t *size, uint8_t *alive, int64_t *groups, int64_t *own, int64_t *gain, int64_t *tmp,
              int64_t k, int64_t g, int64_t s, const int64_t *fraction, int64_t weight) {
    const int64_t n = g * s, never = INT64_MIN;
    int64_t left = 0;
    for (int64_t i = 0; i < k; i++) { left += alive[i]; if (alive[i]) own[i] = row_length(agg + i * n, g, s, fraction, weight); }
    for (int64_t i = 0; i < k; i++)
        for (int64_t j = 0; j < k; j++)
            gain[i * k + j] = i < j && alive[i] && alive[j] ? pair_gain(agg + i * n, agg + j * n, own[i], own[j], size[i],
                                                                      size[j], g, s, fraction, weight, tmp) : never;
    while (left > 1) {
        int64_t best = 0;
        for (int64_t q = 1; q < k * k; q++) if (gain[q] > gain[best]) best = q;
        if (gain[best] <= 0) break;
        int64_t i = best / k, j = best % k;
        for (int64_t q = 0; q < n; q++) agg[i * n + q] += agg[j * n + q];
        size[i] += size[j];
        alive[j] = 0;
        left--;
        for (int64_t q = 0; q < k; q++) { if (groups[q] == j) groups[q] = i; gain[j * k + q] = gain[q * k + j] = never; }
        own[i] = row_length(agg + i * n, g, s, fraction, weight);
        for (int64_t q = 0; q < k; q++) {
            if (q == i || !alive[q]) continue;
            int64_t a = q < i ? q : i, b = q < i ? i : q;
            gain[a * k + b] = pair_gain(agg + a * n, agg + b * n, own[a], own[b], size[a], size[b], g, s, fraction, weight, tmp);
        }
    }
}

/* Exponential-Golomb code of tables (stages/lanes.md), MSB first, into zeroed out; returns bits, out may be null */
int64_t rac_golomb(const uint16_t *freq, int64_t count, int64_t n, int order, uint8_t *out) {
    int64_t at = 0;
    for (int64_t t = 0; t < count; t++) {
        int32_t prev = 0;
        for (int64_t i = 0; i < n; i++, freq++) {
            int k = (prev ? 32 - __builtin_clz((unsigned)prev) : 0) / 2 + order;
            if (k < 0) k = 0;
            int32_t d = *freq - prev;
            uint32_t v = (((uint32_t)d << 1) ^ (uint32_t)(d >> 31)) + (1u << k);
            int width = 32 - __builtin_clz(v), q = width - 1 - k;
            if (out) for (int b = 0; b < width; b++) {
                int64_t p = at + q + b;
                out[p >> 3] |= (uint8_t)((v >> (width - 1 - b) & 1) << (7 - (p & 7)));
            }
            at += q + width;
            prev = *freq;
        }
    }
    return at;
}

/* Elements of a tile to sequence order, block by block; row, col may be null */
#define GATHER(T, NAME)                                                                                       \
    void NAME(const T *src, int64_t stride, const int32_t *row, const int32_t *col, const int64_t *b, int64_t n, T *out) { \
        for (int64_t k = 0; k < n; k++, b += 5)                                                               \
            for (int64_t i = b[1]; i < b[2]; i++) {                                                           \
                const T *s = src + (row ? row[i] : i) * stride;                                               \
                if (col) for (int64_t c = b[3]; c < b[4]; c++) *out++ = s[col[c]];                            \
                else { memcpy(out, s + b[3], (size_t)(b[4] - b[3]) * sizeof(T)); out += b[4] - b[3]; }        \
            }                                                                                                 \
    }
GATHER(uint8_t, rac_gather1)
GATHER(uint16_t, rac_gather2)
GATHER(uint32_t, rac_gather4)
GATHER(uint64_t, rac_gather8)

#if defined(__SIZEOF_INT128__)
static inline uint64_t mulhi(uint64_t a, uint64_t b) { return (uint64_t)(((unsigned __int128)a * b) >> 64); }
#else
static inline uint64_t mulhi(uint64_t a, uint64_t b) {
    uint64_t al = (uint32_t)a, ah = a >> 32, bl = (uint32_t)b, bh = b >> 32, m = ah * bl + (al * bl >> 32);
    return ah * bh + (m >> 32) + (((uint32_t)m + al * bh) >> 32);
}
#endif
typedef struct { uint64_t reciprocal, start, complement, freq; } rac_symbol;

/* Lanes of the coded symbols of all segments (symbols, table), their words in the order of reading at the end of
 * out[0..size), of which the first is not used; returns how many, or -1 where they do not fit. model (tables, 256).
 * The quotient by the frequency is exact: x >> 12 is below freq << 40, the reciprocal 2^64 / freq rounded up. */
int64_t rac_encode(const uint8_t *sym, int64_t lanes, const int64_t *seg, int64_t nseg, const rac_symbol *model,
                   uint32_t *out, int64_t size, uint32_t *counts) {
    uint64_t st[1024] = {0};
    uint32_t *w = out + size;
    int64_t n = 0;
    for (int64_t l = 0; l < lanes; l++) counts[l] = 0;
    for (int64_t k = 0; k < nseg; k++) n += seg[2 * k];
    sym += n;
    while (nseg--) {
        const rac_symbol *m = model + 256 * seg[2 * nseg + 1];
        int64_t left = seg[2 * nseg], row = left % lanes ? left % lanes : lanes;
        for (; left > 0; left -= row, row = lanes) {
            if (w - out < row + 1) return -1;
            sym -= row;
            for (int64_t l = row - 1; l >= 0; l--) {
                const rac_symbol *e = m + sym[l];
                uint64_t x = st[l];
                w[-1] = (uint32_t)x;
                uint32_t flush = (x >> 52) >= e->freq;
                w -= flush;
                counts[l] += flush;
                x >>= flush * 32;
                uint64_t q = x >> 12;
                q = e->reciprocal ? mulhi(q, e->reciprocal) : q;
                st[l] = x + e->start + q * e->complement;
            }
        }
    }
    if (w - out < 2 * lanes + 1) return -1;
    for (int64_t l = lanes - 1; l >= 0; l--) {
        if (!st[l]) continue;
        *--w = (uint32_t)st[l];
        counts[l]++;
        if (st[l] >> 32) { *--w = (uint32_t)(st[l] >> 32); counts[l]++; }
    }
    return out + size - w;
}

/* Pairs of base symbols, segment by segment of sizes[k] elements: map[a + 16 b] -> coded symbol; an odd last one is
 * paired with symbol 0 */
void rac_pairs(const uint8_t *sym, const int64_t *sizes, int64_t nseg, const uint8_t *map, uint8_t *out) {
    for (int64_t k = 0; k < nseg; sym += sizes[k++]) {
        int64_t n = sizes[k];
        for (int64_t i = 0; i < n / 2; i++) *out++ = map[sym[2 * i] | sym[2 * i + 1] << 4];
        if (n & 1) *out++ = map[sym[n - 1]];
    }
}

/* Places in the sequence of coded symbols whose flag under their table is set; returns how many */
int64_t rac_find(const uint8_t *sym, const int64_t *seg, int64_t nseg, const uint8_t *flags, int64_t *found) {
    int64_t n = 0, at = 0;
    for (int64_t k = 0; k < nseg; k++) {
        const uint8_t *f = flags + 256 * seg[2 * k + 1];
        for (int64_t end = at + seg[2 * k]; at < end; at++) { found[n] = at; n += f[sym[at]]; }
    }
    return n;
}

/* counts[table][symbol] += 1 for the coded symbols of all segments */
void rac_count(const uint8_t *sym, const int64_t *seg, int64_t nseg, int64_t size, uint32_t *counts) {
    for (int64_t k = 0; k < nseg; k++) {
        uint32_t *c = counts + seg[2 * k + 1] * size;
        for (int64_t i = 0; i < seg[2 * k]; i++) c[*sym++]++;
    }
}

/* lut[word top] for every word: words to symbols (encoder) */
#define SYMBOLS(T, NAME)                                                                                      \
    void NAME(const T *v, int64_t n, int z, int sign, int shift, const uint8_t *lut, uint8_t *out) {   \
        T mask = (T)~(T)0; int bits = (int)sizeof(T) * 8 - z;                                                 \
        if (bits < (int)sizeof(T) * 8) mask = (T)(((T)1 << bits) - 1);                                        \
        if (sign) mask = (T)(mask >> 1);                                                                      \
        for (int64_t i = 0; i < n; i++) out[i] = lut[(uint16_t)(((T)(v[i] >> z) & mask) >> shift)];           \
    }
#ifdef HAVE_X86
/* rac_symbols2 for tops of 8 bits; returns how many words are done */
__attribute__((target("avx512f,avx512bw,avx512vbmi"))) static int64_t symbols512(const uint16_t *v, int64_t n, unsigned down,
                                                                                int bits, const uint8_t *lut, uint8_t *out) {
    const __m512i t0 = _mm512_loadu_si512(lut), t1 = _mm512_loadu_si512(lut + 64), t2 = _mm512_loadu_si512(lut + 128);
    const __m512i t3 = _mm512_loadu_si512(lut + 192), byte = _mm512_set1_epi16((short)((1 << bits) - 1));
    int64_t i = 0;
    for (; i + 64 <= n; i += 64) {
        __m512i a = _mm512_and_si512(_mm512_srli_epi16(_mm512_loadu_si512(v + i), down), byte);
        __m512i b = _mm512_and_si512(_mm512_srli_epi16(_mm512_loadu_si512(v + i + 32), down), byte);
        __m512i x = _mm512_inserti64x4(_mm512_castsi256_si512(_mm512_cvtepi16_epi8(a)), _mm512_cvtepi16_epi8(b), 1);
        _mm512_storeu_si512(out + i, _mm512_mask_blend_epi8(_mm512_movepi8_mask(x), _mm512_permutex2var_epi8(t0, x, t1),
                                                            _mm512_permutex2var_epi8(t2, x, t3)));
    }
    return i;
}
#endif
SYMBOLS(uint8_t, rac_symbols1)
static SYMBOLS(uint16_t, rac_symbols_2)
SYMBOLS(uint32_t, rac_symbols4)
SYMBOLS(uint64_t, rac_symbols8)

void rac_symbols2(const uint16_t *v, int64_t n, int z, int sign, int shift, const uint8_t *lut, uint8_t *out) {
    int64_t done = 0;
#ifdef HAVE_X86
    if (has512() && __builtin_cpu_supports("avx512vbmi") && 16 - z - sign - shift <= 8)
        done = symbols512(v, n, (unsigned)(z + shift), 16 - z - sign - shift, lut, out);
#endif
    rac_symbols_2(v + done, n - done, z, sign, shift, lut, out + done);
}

/* Raw bits of n words to their planes (encoder), largest plane first */
#define PLANES(T, NAME)                                                                                       \
    CLONES void NAME(const T *v, int64_t n, int z, int sign, int shift, int r, uint8_t *out, const int64_t *start) { \
        T raw[CHUNK];                                                                                         \
        const T low = (T)(((T)1 << shift) - 1);                                                               \
        const int signat = (int)sizeof(T) * 8 - z - 1;                                                        \
        for (int64_t f = 0; f < n; f += CHUNK, v += CHUNK) {                                                  \
            int64_t m = n - f < CHUNK ? n - f : CHUNK;                                                        \
            if (sign) for (int64_t i = 0; i < m; i++)                                                         \
                raw[i] = (T)((T)((T)(v[i] >> z) & low) | (T)((T)((T)(v[i] >> z) >> signat) << shift));        \
            else for (int64_t i = 0; i < m; i++) raw[i] = (T)((T)(v[i] >> z) & low);                          \
            int k = 0, at = 0;                                                                                \
            for (int b = 32; b; b >>= 1) {                                                                    \
                if (!(r & b)) continue;                                                                       \
                uint8_t *p = out + start[k++];                                                                \
                if (b == 32) { uint32_t *q = (uint32_t *)p + f; for (int64_t i = 0; i < m; i++) q[i] = (uint32_t)((uint64_t)raw[i] >> at); } \
                else if (b == 16) { uint16_t *q = (uint16_t *)p + f; for (int64_t i = 0; i < m; i++) q[i] = (uint16_t)(raw[i] >> at); } \
                else if (b == 8) { uint8_t *q = p + f; for (int64_t i = 0; i < m; i++) q[i] = (uint8_t)(raw[i] >> at); } \
                else {                                                                                        \
                    const int each = 8 / b; const uint8_t mask = (uint8_t)((1 << b) - 1);                     \
                    for (int64_t i = 0; i < m; i += each) {                                                   \
                        uint8_t byte = 0;                                                                     \
                        for (int x = 0; x < each && i + x < m; x++) byte |= (uint8_t)(((uint8_t)(raw[i + x] >> at) & mask) << x * b); \
                        p[(f + i) / each] = byte;                                                             \
                    }                                                                                         \
                }                                                                                             \
                at += b;                                                                                      \
            }                                                                                                 \
        }                                                                                                     \
    }
PLANES(uint8_t, rac_planes1)
PLANES(uint16_t, rac_planes2)
PLANES(uint32_t, rac_planes4)
PLANES(uint64_t, rac_planes8)
