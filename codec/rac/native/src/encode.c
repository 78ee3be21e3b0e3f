/* Coded symbols to lanes, and what the encoder counts and finds among them (stages/lanes.md). Twins: rac/native/lanes.py. */
#include "rac.h"

#if defined(__SIZEOF_INT128__)
static inline uint64_t mulhi(uint64_t a, uint64_t b) { return (uint64_t)(((unsigned __int128)a * b) >> 64); }
#else
static inline uint64_t mulhi(uint64_t a, uint64_t b) {
    uint64_t al = (uint32_t)a, ah = a >> 32, bl = (uint32_t)b, bh = b >> 32, m = ah * bl + (al * bl >> 32);
    return ah * bh + (m >> 32) + (((uint32_t)m + al * bh) >> 32);
}
#endif

/* What encoding a symbol takes: 2^64 / freq rounded up (0 for 1), start, 2^24 - freq, freq, the last three of 4096ths << 12 */
typedef struct { uint64_t reciprocal, start, complement, freq; } coded;

/* Lanes of the coded symbols of all segments, their words in the order of reading at the end of out[0..size), of which the
 * first is not used; returns how many, or -1 where they do not fit. model (tables, 256). The quotient by the frequency is
 * exact: x >> 12 is below freq << 40, the reciprocal 2^64 / freq rounded up. */
int64_t rac_encode(const uint8_t *sym, int64_t lanes, const rac_segment *seg, int64_t nseg, const coded *model, uint32_t *out,
                   int64_t size, uint32_t *counts) {
    uint64_t st[1024] = {0};
    uint32_t *w = out + size;
    for (int64_t l = 0; l < lanes; l++) counts[l] = 0;
    for (int64_t k = 0; k < nseg; k++) sym += seg[k].symbols;
    while (nseg--) {
        const coded *m = model + 256 * seg[nseg].table;
        int64_t left = seg[nseg].symbols, row = left % lanes ? left % lanes : lanes;
        for (; left > 0; left -= row, row = lanes) {
            if (w - out < row + 1) return -1;
            sym -= row;
            for (int64_t l = row - 1; l >= 0; l--) {
                const coded *e = m + sym[l];
                uint64_t x = st[l];
                w[-1] = (uint32_t)x;
                const uint32_t flush = (x >> 52) >= e->freq;
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
    for (int64_t l = lanes - 1; l >= 0; l--)
        for (; st[l]; st[l] >>= 32) {
            *--w = (uint32_t)st[l];
            counts[l]++;
        }
    return out + size - w;
}

/* Pairs of base symbols, segment by segment of sizes[k] elements: map[a + 16 b] -> coded symbol; an odd last one is paired
 * with symbol 0 */
void rac_pairs(const uint8_t *sym, const int64_t *sizes, int64_t nseg, const uint8_t *map, uint8_t *out) {
    for (int64_t k = 0; k < nseg; sym += sizes[k++]) {
        const int64_t n = sizes[k];
        for (int64_t i = 0; i < n / 2; i++) *out++ = map[sym[2 * i] | sym[2 * i + 1] << 4];
        if (n & 1) *out++ = map[sym[n - 1]];
    }
}

/* Places in the sequence of coded symbols whose flag under their table is set; returns how many */
int64_t rac_find(const uint8_t *sym, const rac_segment *seg, int64_t nseg, const uint8_t *flags, int64_t *found) {
    int64_t n = 0, at = 0;
    for (int64_t k = 0; k < nseg; k++) {
        const uint8_t *f = flags + 256 * seg[k].table;
        for (const int64_t end = at + seg[k].symbols; at < end; at++) {
            found[n] = at;
            n += f[sym[at]];
        }
    }
    return n;
}

/* counts[table][symbol] += 1 for the coded symbols of all segments */
void rac_count(const uint8_t *sym, const rac_segment *seg, int64_t nseg, int64_t size, uint32_t *counts) {
    for (int64_t k = 0; k < nseg; k++) {
        uint32_t *c = counts + seg[k].table * size;
        for (int64_t i = 0; i < seg[k].symbols; i++) c[*sym++]++;
    }
}

/* hist[symbol] += 1 for a row of symbols below `size`, which is at most 64 */
static void count_row(const uint8_t *sym, int64_t n, int64_t size, uint32_t *hist) {
    uint32_t t[4][64]; /* four counters, or equal neighbours wait for each other */
    memset(t, 0, sizeof t);
    int64_t c = 0;
    for (; c + 4 <= n; c += 4)
        for (int k = 0; k < 4; k++) t[k][sym[c + k]]++;
    for (; c < n; c++) t[0][sym[c]]++;
    for (int64_t i = 0; i < size; i++) hist[i] += t[0][i] + t[1][i] + t[2][i] + t[3][i];
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

/* out[class[i]] += hist[i] for n vectors of m counters */
void rac_sum(const uint32_t *hist, const uint8_t *class, int64_t n, int64_t m, int64_t *out) {
    for (int64_t i = 0; i < n; i++, hist += m) {
        int64_t *o = out + class[i] * m;
        for (int64_t j = 0; j < m; j++) o[j] += hist[j];
    }
}
