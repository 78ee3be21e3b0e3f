/* Decoding: frequency tables, lanes, and tiles to dense words (stages/lanes.md). */
#include "lanes.h"
#include "trellis.h"

int rac_abi(void) { return 16; }
int rac_features(void) { return has512(); }

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

void rac_lookup(const uint16_t *freq, int64_t count, int64_t n, const uint8_t *code, uint32_t *out) {
    for (int64_t t = 0; t < count; t++)
        for (int64_t s = 0; s < n; s++, freq++)
            for (uint32_t j = 0, e = code[s] | (uint32_t)*freq << 20; j < *freq; j++) *out++ = e | j << 8;
}

enum { PIECE = 2048, SYMBOLS_AT_ONCE = 16384 };

/* raw[i] = bits of element at + i from the power-of-two planes, largest first, lowest bits in the largest */
#define RAWBITS(T, NAME)                                                                                      \
    CLONES static void NAME(const uint8_t *planes, const int64_t *start, int r, int64_t at, int64_t n, T *raw) { \
        int low = 0, j = 0;                                                                                   \
        if (r == 8) { const uint8_t *q = planes + start[0] + at; for (int64_t i = 0; i < n; i++) raw[i] = q[i]; return; } \
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

/* One tile unit to its words (stages/lanes.md, "Tile"). */
typedef struct {
    const uint8_t *unit;      /* the tile unit, `size` bytes */
    int64_t size;
    const uint8_t *row_class, *col_class; /* of the tile's rows and columns; null: one class */
    void *dst;                /* origin of the tile in the dense tensor */
    int64_t rows, cols, stride; /* words from row to row */
    const float *row, *col;   /* scales of the tile's rows and columns, where there are `numbers` */
    /* the rest is the same for all tiles of a tensor */
    const uint32_t *luts;     /* 4096 entries per table; the symbols of pairs are a | b << 4 */
    const uint16_t *values;   /* top of each base symbol (256) */
    const uint32_t *bases;    /* base of each escape */
    const uint8_t *table;     /* of each pair of classes */
    int32_t row_classes, col_classes, skip, lanes, per, word, zero, sign, shift, raw, base, first;
    uint32_t limit;           /* tops are below this */
    rac_dequant numbers;      /* what the words, bytes, stand for; without a table they are the tile */
} rac_job;

typedef struct {
    const rac_job *job;
    void *dst;                /* where words go, `stride` from row to row: the dense tensor, or, */
    int64_t stride;
    uint8_t *coded;           /* where they stand for numbers, here */
    const uint8_t *planes, *escape;
    const uint32_t *words, *end; /* the next word of the lanes, and as far as memory may be read */
    int64_t start[6];
    int32_t *row, *col;       /* sorted rows and columns; null: as they lie */
    int64_t *blocks;          /* table, rows a..b, columns c..d; sorted by table: one segment each */
    int64_t nblocks;
    int64_t row_end[257], col_end[257]; /* of the classes */
    void *seq;                /* the tile's words in sequence order, to be unsorted at the end; null: straight to dst */
    uint32_t escapes, used;
    uint32_t pairtop[256];    /* both tops of a pair a | b << 4 */
    uint8_t bytetop[16];      /* tops of the base symbols, where all are `small` */
    int small, fast, bf16;    /* fast: 16-bit floats joined in registers; bf16: pairs of small tops, 7 raw bits and the sign */
    int counts;               /* tops of the symbols that do not escape count up */
    int bytes;                /* words are bytes, and nothing but tops that count up */
} rac_work;

static int64_t up16(int64_t n) { return (n + 15) & ~(int64_t)15; }
static int nonzero(const uint8_t *p, int64_t n) {
    for (int64_t i = 0; i < n; i++) if (p[i]) return 1;
    return 0;
}

/* blocks[i] = highest base symbol in the 64 coded symbols from 64 i on */
CLONES static void highest(const uint8_t *sym, int64_t n, int per, uint8_t *blocks) {
    for (int64_t i = 0; i < n; i += 64) {
        uint8_t top = 0;
        int64_t m = n - i < 64 ? n - i : 64;
        if (per == 1) for (int64_t k = 0; k < m; k++) top = sym[i + k] > top ? sym[i + k] : top;
        else for (int64_t k = 0; k < m; k++) {
            uint8_t a = sym[i + k] & 15, b = sym[i + k] >> 4;
            a = a > b ? a : b;
            top = a > top ? a : top;
        }
        blocks[i >> 6] = top;
    }
}

#ifdef HAVE_X86
/* Tops below 256 of pairs a | b << 4, 32 at a time; returns how many pairs are done */
__attribute__((target("avx512f,avx512bw"))) static int64_t pairs512(const uint8_t *sym, int64_t n, const uint8_t *table,
                                                                   uint16_t *val) {
    const __m256i t = _mm256_broadcastsi128_si256(_mm_loadu_si128((const void *)table)), m = _mm256_set1_epi8(15);
    int64_t i = 0;
    for (; i + 32 <= n; i += 32) {
        __m256i s = _mm256_loadu_si256((const void *)(sym + i));
        __m256i a = _mm256_shuffle_epi8(t, _mm256_and_si256(s, m));
        __m256i b = _mm256_shuffle_epi8(t, _mm256_and_si256(_mm256_srli_epi16(s, 4), m));
        for (int h = 0; h < 2; h++) {
            __m512i x = _mm512_cvtepu8_epi32(h ? _mm256_extracti128_si256(a, 1) : _mm256_castsi256_si128(a));
            __m512i y = _mm512_cvtepu8_epi32(h ? _mm256_extracti128_si256(b, 1) : _mm256_castsi256_si128(b));
            _mm512_storeu_si512(val + 2 * i + 32 * h, _mm512_or_si512(x, _mm512_slli_epi32(y, 16)));
        }
    }
    return i;
}
#endif

/* Tops of symbols that count up from `base`: one loop that a compiler vectorises, where the table is a gather */
CLONES static void counted(const uint8_t *sym, int64_t n, uint16_t base, uint16_t *val) {
    for (int64_t q = 0; q < n; q++) val[q] = (uint16_t)(base + sym[q]);
}

/* Tops of `n` elements out of their coded symbols */
static int tops(rac_work *w, const uint8_t *sym, int64_t n, uint16_t *val) {
    const rac_job *j = w->job;
    const int64_t per = j->per, coded = (n + per - 1) / per;
    if (per == 2) {
        int64_t q = 0;
#ifdef HAVE_X86
        if (w->small && has512()) q = pairs512(sym, coded, w->bytetop, val);
#endif
        for (; q < coded; q++) memcpy(val + 2 * q, w->pairtop + sym[q], 4);
    } else if (w->counts) counted(sym, n, j->values[0], val);
    else for (int64_t q = 0; q < n; q++) val[q] = j->values[sym[q]];
    if (j->first >= j->base) return 0;
    uint8_t blocks[PIECE / 64];
    highest(sym, coded, (int)per, blocks);
    for (int64_t i = 0; i < coded; i++) {
        if (!(i & 63) && blocks[i >> 6] < j->first) { i += 63; continue; }
        for (int64_t k = 0; k < per && i * per + k < n; k++) {
            int s = per == 1 ? sym[i] : k ? sym[i] >> 4 : sym[i] & 15;
            if (s < j->first) continue;
            if (w->used >= w->escapes) return 5;
            uint32_t top = j->bases[s - j->first] + w->escape[w->used++];
            if (top >= j->limit) return 6;
            val[i * per + k] = (uint16_t)top;
        }
    }
    return 0;
}

/* memcpy without the call: runs are short */
static inline void copy(void *to, const void *from, int64_t n) {
    char *d = to;
    const char *s = from;
    for (; n >= 32; n -= 32, d += 32, s += 32) memcpy(d, s, 32);
    if (n & 16) { memcpy(d, s, 16); d += 16; s += 16; }
    if (n & 8) { memcpy(d, s, 8); d += 8; s += 8; }
    if (n & 4) { memcpy(d, s, 4); d += 4; s += 4; }
    if (n & 2) { memcpy(d, s, 2); d += 2; s += 2; }
    if (n & 1) *d = *s;
}

/* `n` elements from place `e` of block `b`, place `at` of the tile, to the dense tensor */
#define PLACE(T, NAME, RAW)                                                                                   \
    CLONES static void NAME(const rac_work *w, const uint16_t *val, int64_t n, int64_t e, int64_t at,         \
                            const int64_t *b) {                                                               \
        const rac_job *job = w->job;                                                                          \
        T raw[CHUNK];                                                                                         \
        const int shift = job->shift, zero = job->zero, signat = (int)sizeof(T) * 8 - zero - 1;               \
        const T low = (T)(((T)1 << shift) - 1);                                                               \
        const int64_t cols = b[4] - b[3];                                                                     \
        const int32_t *col = w->col ? w->col + b[3] : 0;                                                      \
        T *const origin = (T *)w->dst;                                                                        \
        const int64_t stride = w->stride;                                                                     \
        int64_t i = b[1] + e / cols, c = e % cols;                                                            \
        for (int64_t f = 0; f < n; f += CHUNK, val += CHUNK) {                                                \
            int64_t m = n - f < CHUNK ? n - f : CHUNK;                                                        \
            RAW(w->planes, w->start, job->raw, at + f, m, raw);                                               \
            if (job->sign) for (int64_t q = 0; q < m; q++)                                                    \
                raw[q] = (T)((T)((T)((T)val[q] << shift) | (T)(raw[q] & low) | (T)((T)(raw[q] >> shift) << signat)) << zero); \
            else for (int64_t q = 0; q < m; q++)                                                              \
                raw[q] = (T)((T)((T)((T)val[q] << shift) | (T)(raw[q] & low)) << zero);                       \
            if (w->seq) { memcpy((T *)w->seq + at + f, raw, (size_t)m * sizeof(T)); continue; }               \
            for (int64_t q = 0; q < m;) {                                                                     \
                int64_t k = cols - c < m - q ? cols - c : m - q;                                              \
                T *d = origin + (w->row ? w->row[i] : i) * stride;                                            \
                if (col) for (int64_t x = 0; x < k; x++) d[col[c + x]] = raw[q + x];                          \
                else copy(d + b[3] + c, raw + q, k * (int64_t)sizeof(T));                                     \
                q += k; c += k;                                                                               \
                if (c == cols) { c = 0; i++; }                                                                \
            }                                                                                                 \
        }                                                                                                     \
    }
PLACE(uint8_t, place1, raw1)
PLACE(uint16_t, place2, raw2)
PLACE(uint32_t, place4, raw4)
PLACE(uint64_t, place8, raw8)

#ifdef HAVE_X86
/* `n` BF16 words, elements `at` and on of the tile, out of their pairs; up to 63 more words of `out` are overwritten */
AVX512BW static int bf16(rac_work *w, const uint8_t *sym, int64_t n, int64_t at, uint16_t *out) {
    const rac_job *j = w->job;
    const uint8_t *plane = w->planes + w->start[0] + at;
    const __m512i table = _mm512_broadcast_i32x4(_mm_loadu_si128((const void *)w->bytetop));
    const __m512i nibble = _mm512_set1_epi8(15), top = _mm512_set1_epi8((char)0x80);
    const __m512i order = _mm512_set_epi64(7, 3, 6, 2, 5, 1, 4, 0), first = _mm512_set1_epi8((char)(j->first < 16 ? j->first : 16));
    for (int64_t i = 0; i < n; i += 64, sym += 32) {
        const __mmask64 some = n - i < 64 ? (1ull << (n - i)) - 1 : ~0ull;
        __m512i s = _mm512_cvtepu8_epi16(_mm256_loadu_si256((const void *)sym));
        s = _mm512_and_si512(_mm512_or_si512(s, _mm512_slli_epi16(s, 4)), nibble);
        const __m512i e = _mm512_permutexvar_epi64(order, _mm512_shuffle_epi8(table, s));
        const __m512i r = _mm512_permutexvar_epi64(order, _mm512_maskz_loadu_epi8(some, plane + i));
        const __m512i low = _mm512_ternarylogic_epi64(top, _mm512_slli_epi16(e, 7), r, 0xca);
        const __m512i high = _mm512_ternarylogic_epi64(top, r, _mm512_srli_epi16(e, 1), 0xca);
        _mm512_storeu_si512(out + i, _mm512_unpacklo_epi8(low, high));
        _mm512_storeu_si512(out + i + 32, _mm512_unpackhi_epi8(low, high));
        uint64_t escaped = _mm512_mask_cmpge_epu8_mask(some, s, first);
        for (; escaped; escaped &= escaped - 1) {
            const int k = __builtin_ctzll(escaped), b = k & 1 ? sym[k >> 1] >> 4 : sym[k >> 1] & 15;
            if (w->used >= w->escapes) return 5;
            const uint32_t t = j->bases[b - j->first] + w->escape[w->used++];
            if (t >= j->limit) return 6;
            out[i + k] = (uint16_t)((out[i + k] & 0x807f) | t << 7);
        }
    }
    return 0;
}
#endif

#ifdef HAVE_X86
static inline uint64_t first_bits(int64_t n) { return n >= 64 ? ~0ull : (1ull << n) - 1; }

/* Raw bits of elements at..at + n, as raw2; raw[0] is that of element at & ~31, and up to 31 more follow the last */
AVX512BW static void raw512(const uint8_t *planes, const int64_t *start, int r, int64_t at, int64_t n, uint16_t *raw) {
    const int64_t from = at & ~(int64_t)31;
    n += at - from;
    for (int64_t i = 0; i < n; i += 32) {
        const int64_t m = n - i < 32 ? n - i : 32, e = from + i;
        __m512i v = _mm512_setzero_si512();
        const int64_t *s = start;
        int low = 0;
        if (r & 8) {
            v = _mm512_cvtepu8_epi16(_mm256_maskz_loadu_epi8((__mmask32)first_bits(m), planes + *s++ + e));
            low = 8;
        }
        if (r & 4) {
            __m512i b = _mm512_cvtepu8_epi32(_mm_maskz_loadu_epi8((__mmask16)first_bits((m + 1) / 2), planes + *s++ + e / 2));
            b = _mm512_and_si512(_mm512_or_si512(b, _mm512_slli_epi32(b, 12)), _mm512_set1_epi16(15));
            v = _mm512_or_si512(v, _mm512_slli_epi16(b, (unsigned)low));
            low += 4;
        }
        if (r & 2) {
            __m512i b = _mm512_cvtepu8_epi64(_mm_maskz_loadu_epi8((__mmask16)first_bits((m + 3) / 4), planes + *s++ + e / 4));
            b = _mm512_or_si512(b, _mm512_slli_epi64(b, 28));
            b = _mm512_and_si512(_mm512_or_si512(b, _mm512_slli_epi64(b, 14)), _mm512_set1_epi16(3));
            v = _mm512_or_si512(v, _mm512_slli_epi16(b, (unsigned)low));
            low += 2;
        }
        if (r & 1) {
            const __m128i b = _mm_maskz_loadu_epi8((__mmask16)first_bits((m + 7) / 8), planes + *s + e / 8);
            v = _mm512_or_si512(v, _mm512_maskz_set1_epi16((__mmask32)_mm_cvtsi128_si32(b), (short)(1 << low)));
        }
        _mm512_storeu_si512(raw + i, v);
    }
}

/* As bf16, for any 16-bit float: pairs of small tops, or single symbols of at most 128 */
AVX512BW static int float16(rac_work *w, const uint8_t *sym, int64_t n, int64_t at, uint16_t *out) {
    const rac_job *j = w->job;
    const unsigned shift = (unsigned)j->shift;
    const __m512i low = _mm512_set1_epi16((short)((1 << shift) - 1)), nibble = _mm512_set1_epi16(15);
    const __m512i t0 = _mm512_loadu_si512(j->values), t1 = _mm512_loadu_si512(j->values + 32);
    const __m512i t2 = _mm512_loadu_si512(j->values + 64), t3 = _mm512_loadu_si512(j->values + 96);
    const __m512i first = _mm512_set1_epi16((short)j->first), half = _mm512_set1_epi16(64);
    uint16_t raw[CHUNK + 64];
    for (int64_t f = 0; f < n; f += CHUNK) {
        const int64_t m = n - f < CHUNK ? n - f : CHUNK;
        raw512(w->planes, w->start, j->raw, at + f, m, raw);
        const uint16_t *bits = raw + ((at + f) & 31);
        for (int64_t i = f; i < f + m; i += 32, bits += 32) {
            const __mmask32 some = (__mmask32)first_bits(f + m - i);
            __m512i s, top;
            if (j->per == 2) {
                s = _mm512_cvtepu8_epi32(_mm_loadu_si128((const void *)(sym + i / 2)));
                s = _mm512_and_si512(_mm512_or_si512(s, _mm512_slli_epi32(s, 12)), nibble);
                top = _mm512_permutexvar_epi16(s, t0);
            } else {
                s = _mm512_cvtepu8_epi16(_mm256_loadu_si256((const void *)(sym + i)));
                top = _mm512_mask_blend_epi16(_mm512_test_epi16_mask(s, half), _mm512_permutex2var_epi16(t0, s, t1),
                                              _mm512_permutex2var_epi16(t2, s, t3));
            }
            const __m512i b = _mm512_loadu_si512(bits), sign = _mm512_slli_epi16(_mm512_srli_epi16(b, shift), 15);
            top = _mm512_or_si512(_mm512_slli_epi16(top, shift), _mm512_and_si512(b, low));
            _mm512_storeu_si512(out + i, _mm512_or_si512(top, sign));
            uint32_t escaped = _mm512_mask_cmpge_epu16_mask(some, s, first);
            for (; escaped; escaped &= escaped - 1) {
                const int64_t k = i + __builtin_ctz(escaped);
                const int c = j->per == 1 ? sym[k] : k & 1 ? sym[k >> 1] >> 4 : sym[k >> 1] & 15;
                if (w->used >= w->escapes) return 5;
                const uint32_t t = j->bases[c - j->first] + w->escape[w->used++];
                if (t >= j->limit) return 6;
                out[k] = (uint16_t)((out[k] & (0x8000 | ((1u << shift) - 1))) | t << shift);
            }
        }
    }
    return 0;
}
static int join(rac_work *w, const uint8_t *sym, int64_t n, int64_t at, uint16_t *out) {
    return w->bf16 ? bf16(w, sym, n, at, out) : float16(w, sym, n, at, out);
}
#endif

#ifdef HAVE_X86
/* Those of 64 symbols at `sym`, n of them there, that are not below `first`; the symbols and `base` to `out` */
__attribute__((target("avx512f,avx512bw"))) static uint64_t bytes512(const uint8_t *sym, int64_t n, int first, int base, uint8_t *out) {
    const uint64_t some = first_bits(n);
    const __m512i s = _mm512_maskz_loadu_epi8(some, sym);
    _mm512_mask_storeu_epi8(out, some, _mm512_add_epi8(s, _mm512_set1_epi8((char)base)));
    return _mm512_mask_cmpge_epu8_mask(some, s, _mm512_set1_epi8((char)first));
}
#endif

/* The same anywhere */
static uint64_t bytes64(const uint8_t *sym, int64_t n, int first, int base, uint8_t *out) {
    uint64_t found = 0;
#ifdef HAVE_X86
    if (has512()) return bytes512(sym, n, first, base, out);
#endif
    for (int64_t k = 0; k < n; k++) {
        out[k] = (uint8_t)(sym[k] + base);
        found |= (uint64_t)(sym[k] >= first) << k;
    }
    return found;
}

/* Bytes out of single symbols whose tops count up */
static int bytes(rac_work *w, const uint8_t *sym, int64_t n, uint8_t *out) {
    const rac_job *j = w->job;
    for (int64_t i = 0; i < n; i += 64) {
        uint64_t escaped = bytes64(sym + i, n - i < 64 ? n - i : 64, j->first, j->values[0], out + i);
        for (; j->first < j->base && escaped; escaped &= escaped - 1) {
            const int64_t k = i + __builtin_ctzll(escaped);
            if (w->used >= w->escapes) return 5;
            const uint32_t value = j->bases[sym[k] - j->first] + w->escape[w->used++];
            if (value >= j->limit) return 6;
            out[k] = (uint8_t)value;
        }
    }
    return 0;
}

/* Coded symbols of the next `n` elements to words in their place; block `b` is at element *e, the tile at *at */
static int emit(rac_work *w, const uint8_t *sym, int64_t n, const int64_t **b, int64_t *e, int64_t *at) {
    const rac_job *j = w->job;
    uint16_t val[2 * PIECE + 64];
    const int64_t piece = PIECE * j->per;
    if (w->bytes && w->seq) {
        int bad = bytes(w, sym, n, (uint8_t *)w->seq + *at);
        *at += n;
        return bad;
    }
#ifdef HAVE_X86
    if (w->fast && w->seq) {
        int bad = join(w, sym, n, *at, (uint16_t *)w->seq + *at);
        *at += n;
        return bad;
    }
#endif
    for (int64_t k = 0; k < n; k += piece, sym += PIECE) {
        int64_t m = n - k < piece ? n - k : piece;
#ifdef HAVE_X86
        if (w->fast) {
            int bad = join(w, sym, m, *at, val);
            if (bad) return bad;
            for (int64_t q = 0; q < m;) {
                const int64_t *o = *b, cols = o[4] - o[3], i = o[1] + *e / cols, c = *e % cols;
                const int64_t r = cols - c < m - q ? cols - c : m - q;
                copy((uint16_t *)w->dst + (w->row ? w->row[i] : i) * w->stride + o[3] + c, val + q, 2 * r);
                q += r; *e += r; *at += r;
                if (c + r == cols && i + 1 == o[2]) { *b += 5; *e = 0; }
            }
            continue;
        }
#endif
        int bad = tops(w, sym, m, val);
        if (bad) return bad;
        for (int64_t q = 0; q < m;) {
            int64_t left = ((*b)[2] - (*b)[1]) * ((*b)[4] - (*b)[3]) - *e, r = left < m - q ? left : m - q;
            switch (j->word) {
                case 1: place1(w, val + q, r, *e, *at, *b); break;
                case 2: place2(w, val + q, r, *e, *at, *b); break;
                case 4: place4(w, val + q, r, *e, *at, *b); break;
                default: place8(w, val + q, r, *e, *at, *b);
            }
            q += r; *e += r; *at += r;
            if (r == left) { *b += 5; *e = 0; }
        }
    }
    return 0;
}

/* Stable counting sort: order[] of n things by class, ends[k] = first place of class k + 1 */
static void by_class(const uint8_t *class, int64_t n, int k, int32_t *order, int64_t *ends) {
    for (int i = 0; i <= k; i++) ends[i] = 0;
    for (int64_t i = 0; i < n; i++) ends[class[i] + 1]++;
    for (int i = 0; i < k; i++) ends[i + 1] += ends[i];
    int64_t next[256];
    for (int i = 0; i < k; i++) next[i] = ends[i];
    for (int64_t i = 0; i < n; i++) order[next[class[i]]++] = (int32_t)i;
}

/* The head of a tile unit: where its streams are, and the states and numbers of words of its lanes */
static int begin(rac_work *w, uint64_t *st, uint32_t *left) {
    const rac_job *job = w->job;
    const int64_t lanes = job->lanes, n = job->rows * job->cols;
    uint32_t nw = 0, ne;
    const uint8_t *u = job->unit;
    const int64_t directory = 4 + job->skip + 2 * lanes; /* `skip` bytes hold what the caller has seen to */
    int64_t at = up16(directory);
    if (job->size < at) return 1;
    memcpy(&ne, u, 4);
    for (int64_t l = 0; l < lanes; l++) {
        uint16_t c;
        memcpy(&c, u + 4 + job->skip + 2 * l, 2);
        nw += left[l] = c;
    }
    const int64_t first = at, esc = first + up16(4 * (int64_t)nw);
    at = esc + up16(ne);
    if (at > job->size) return 1;
    int bad = nonzero(u + directory, first - directory) | nonzero(u + first + 4 * (int64_t)nw, esc - first - 4 * (int64_t)nw) |
              nonzero(u + esc + ne, at - esc - ne);
    w->words = (const uint32_t *)(u + first);
    w->end = w->words + (job->size - first) / 4;
    w->planes = u; w->escape = u + esc; w->escapes = ne; w->used = 0;
    for (int b = 32, k = 0; b; b >>= 1) {
        if (!(job->raw & b)) continue;
        int64_t size = (n * b + 7) / 8;
        if (at + up16(size) > job->size) return 1;
        w->start[k++] = at;
        bad |= nonzero(u + at + size, up16(size) - size);
        if (b < 8 && n * b % 8 && u[at + size - 1] >> (n * b % 8)) return 7;
        at += up16(size);
    }
    if (at != job->size) return 1;
    if (bad) return 2;
    for (int64_t l = 0; l < lanes; l++) {
        st[l] = 0;
        if (left[l]) {
            st[l] = *w->words++;
            if (!st[l]) return 3;
            if (--left[l]) { st[l] = st[l] << 32 | *w->words++; left[l]--; }
        }
    }
    w->small = w->fast = w->bf16 = 0;
    w->counts = 1;
    for (int a = 1; a < job->first; a++) w->counts &= job->values[a] == job->values[0] + a;
    w->bytes = w->counts && job->word == 1 && job->per == 1 && !job->raw && !job->sign && !job->shift && !job->zero;
    if (job->per == 2) {
        uint16_t all = 0;
        for (int a = 0; a < 16; a++) { all |= job->values[a]; w->bytetop[a] = (uint8_t)job->values[a]; }
        w->small = all < 256;
        for (int s = 0; s < 256; s++) w->pairtop[s] = job->values[s & 15] | (uint32_t)job->values[s >> 4] << 16;
    }
#ifdef HAVE_X86
    if (has512() && (w->seq || !w->col) && job->word == 2 && job->zero == 0 && job->sign && (job->per == 2 || job->base <= 128)) {
        w->fast = 1;
        w->bf16 = w->small && job->shift == 7;
    }
#endif
    return 0;
}

/* Whether all of it was used up */
static int ended(const rac_work *w, const uint64_t *st, const uint32_t *left) {
    for (int64_t l = 0; l < w->job->lanes; l++) if (st[l] || left[l]) return 4;
    return w->used == w->escapes ? 0 : 5;
}

/* Elements of the segment that begins with block *b, which goes to the next */
static int64_t segment(const rac_work *w, const int64_t **b) {
    int64_t total = 0;
    for (const int64_t table = **b; *b < w->blocks + 5 * w->nblocks && **b == table; *b += 5)
        total += ((*b)[2] - (*b)[1]) * ((*b)[4] - (*b)[3]);
    return total;
}

static int decode(rac_work *w) {
    const rac_job *job = w->job;
    uint64_t st[1024];
    uint32_t left[1024];
    uint8_t sym[SYMBOLS_AT_ONCE + 1024];
    int bad = begin(w, st, left);
    if (bad) return bad;
    const int64_t per = job->per, lanes = job->lanes, whole = SYMBOLS_AT_ONCE / lanes * lanes;
    const int64_t *b = w->blocks, *here = b;
    int64_t element = 0, place = 0;
    rac_lanes t = {.st = st, .left = left, .words = w->words, .end = w->end};
    while (b < w->blocks + 5 * w->nblocks) {
        t.lut = job->luts + 4096 * b[0];
        const int64_t total = segment(w, &b), coded = (total + per - 1) / per;
        for (int64_t s = 0, got; s < coded; s += got) {
            got = coded - s < whole ? coded - s : whole;
            t.out = sym;
            rows(&t, got, lanes);
            const int64_t rest = total - s * per;
            if ((bad = emit(w, sym, got * per < rest ? got * per : rest, &here, &element, &place))) return bad;
        }
    }
    return ended(w, st, left);
}

#ifdef HAVE_X86
/* Columns of one class among neighbours: they follow each other in the runs of that class, `offset` words from its start */
typedef struct { uint64_t mask; int32_t class, offset; } rac_piece;

/* Words T from sequence order to their places, N at a time, which are 64 bytes. Row r has a run of words for each class of
 * columns, run[class of r][k]; the runs of a class of rows follow each other. Up to 63 bytes behind a run are read. */
#define UNSORT512(T, NAME, N, MASK, EXPAND)                                                                    \
    __attribute__((target("avx512f,avx512bw,avx512vbmi2"))) static void NAME(const rac_work *w, const int64_t *size, \
                                                                             const T **run, rac_piece *piece) { \
        enum { AHEAD = 32 }; /* rows of which the memory is fetched before they are written: tiles are narrow, rows far apart */ \
        const rac_job *j = w->job;                                                                             \
        const int kc = j->col_classes;                                                                         \
        const int64_t cols = j->cols;                                                                          \
        int64_t before[256] = {0}, n = 0;                                                                      \
        for (int64_t c = 0; c < cols; c += N)                                                                  \
            for (int k = 0; k < kc; k++) {                                                                     \
                uint64_t mask = 0;                                                                             \
                for (int64_t x = c; x < cols && x < c + N; x++) mask |= (uint64_t)(j->col_class[x] == k) << (x - c); \
                if (!mask) continue;                                                                           \
                piece[n++] = (rac_piece){mask, k, (int32_t)before[k]};                                         \
                before[k] += __builtin_popcountll(mask);                                                       \
            }                                                                                                  \
        for (int64_t r = 0; r < j->rows; r++) {                                                                \
            const T **p = run + (w->row ? j->row_class[r] : 0) * kc;                                           \
            T *d = (T *)w->dst + r * w->stride;                                                                \
            const rac_piece *q = piece;                                                                        \
            for (int64_t c = 0; c < cols; c += N) {                                                            \
                const uint64_t all = first_bits(cols - c < N ? cols - c : N);                                  \
                __m512i v = _mm512_setzero_si512();                                                            \
                __builtin_prefetch(d + AHEAD * w->stride + c, 1);                                              \
                for (uint64_t have = 0; have != all; have |= q++->mask)                                        \
                    v = _mm512_or_si512(v, EXPAND((MASK)q->mask, _mm512_loadu_si512(p[q->class] + q->offset)));  \
                if (cols - c >= N) _mm512_storeu_si512(d + c, v);                                              \
                else { /* the words behind are another tile's */                                               \
                    T last[N];                                                                                 \
                    _mm512_storeu_si512(last, v);                                                              \
                    copy(d + c, last, (cols - c) * (int64_t)sizeof(T));                                        \
                }                                                                                              \
            }                                                                                                  \
            for (int k = 0; k < kc; k++) if (size[k]) p[k] += size[k];                                         \
        }                                                                                                      \
    }
UNSORT512(uint16_t, unsort16, 32, __mmask32, _mm512_maskz_expand_epi16)
UNSORT512(uint8_t, unsort8, 64, __mmask64, _mm512_maskz_expand_epi8)
static int has_expand(void) { return has512() && __builtin_cpu_supports("avx512vbmi2"); }
#endif

/* A tile before it is decoded: its rows and columns by class, its blocks */
static int prepare(rac_work *w, const rac_job *job) {
    const int kr = job->row_classes, kc = job->col_classes;
    const int64_t h = job->rows, c = job->cols;
    w->job = job;
    w->dst = job->dst;
    w->stride = job->stride;
    w->seq = w->coded = 0;
    if (job->numbers.rec) {
        w->dst = w->coded = malloc((size_t)(h * c) + 64 + 2 * (size_t)(c + 31)); /* and the states of the trellis */
        w->stride = c;
    }
    const size_t most = (size_t)(kr * kc < h * c ? kr * kc : h * c); /* blocks */
    char *scratch = malloc((size_t)(h + c) * 4 + most * 40 + 64);
    w->blocks = (int64_t *)scratch;
    if (!scratch || (job->numbers.rec && !w->coded)) return 8;
    w->row = (int32_t *)(scratch + most * 40);
    w->col = w->row + h;
    w->row_end[0] = w->col_end[0] = 0;
    w->row_end[1] = h;
    w->col_end[1] = c;
    const int64_t *re = w->row_end, *ce = w->col_end;
    if (kr > 1) by_class(job->row_class, h, kr, w->row, w->row_end); else w->row = 0;
    if (kc > 1) by_class(job->col_class, c, kc, w->col, w->col_end); else w->col = 0;
    int rows[256], cols[256], nr = 0, nc = 0; /* the classes that occur: a tile is not charged for others */
    for (int i = 0; i < kr; i++) if (re[i] < re[i + 1]) rows[nr++] = i;
    for (int k = 0; k < kc; k++) if (ce[k] < ce[k + 1]) cols[nc++] = k;
    int64_t first[257] = {0};
    for (int n = 0; n < nr * nc; n++) first[job->table[rows[n / nc] * kc + cols[n % nc]] + 1]++;
    for (int i = 0; i < 256; i++) first[i + 1] += first[i];
    w->nblocks = first[256];
    for (int n = 0; n < nr * nc; n++) {
        const int i = rows[n / nc], k = cols[n % nc], table = job->table[i * kc + k];
        int64_t *b = w->blocks + 5 * first[table]++;
        b[0] = table; b[1] = re[i]; b[2] = re[i + 1]; b[3] = ce[k]; b[4] = ce[k + 1];
    }
#ifdef HAVE_X86
    if (w->col && job->word <= 2 && has_expand() && !(w->seq = malloc((size_t)(h * c + 64) * (size_t)job->word))) return 8;
#endif
    return 0;
}

/* What was decoded to its places */
static int unsort(rac_work *w) {
#ifdef HAVE_X86
    if (w->seq) {
        const rac_job *job = w->job;
        const int kr = job->row_classes, kc = job->col_classes;
        int64_t *re = w->row_end, *ce = w->col_end;
        const void **run = malloc((size_t)kr * kc * sizeof *run);
        const char *at = w->seq;
        rac_piece *pieces = malloc((size_t)(job->cols + 64) * sizeof *pieces);
        const int bad = run && pieces ? 0 : 8;
        if (!bad) {
            for (const int64_t *b = w->blocks; b < w->blocks + 5 * w->nblocks; b += 5) {
                int i = 0, k = 0;
                while (re[i + 1] <= b[1]) i++;
                while (ce[k + 1] <= b[3]) k++;
                run[i * kc + k] = at;
                at += (b[2] - b[1]) * (b[4] - b[3]) * job->word;
            }
            for (int k = 0; k < kc; k++) ce[k] = ce[k + 1] - ce[k];
            if (job->word == 1) unsort8(w, ce, (const uint8_t **)run, pieces);
            else unsort16(w, ce, (const uint16_t **)run, pieces);
        }
        free(pieces);
        free(run);
        return bad;
    }
#endif
    (void)w;
    return 0;
}

/* What the words of a tile stand for, to its place */
static void numbers(const rac_work *w) {
    const rac_job *j = w->job;
    const int64_t states = (j->rows * j->cols + 63) & ~(int64_t)63;
    if (w->coded)
        rac_untrellis(w->coded, j->rows, j->cols, &j->numbers, j->col, j->row, j->dst, j->stride, (uint16_t *)(w->coded + states));
}

static void drop(rac_work *w) {
    free(w->coded);
    free(w->seq);
    free(w->blocks);
}

static int tile(const rac_job *job) {
    rac_work w;
    int bad = prepare(&w, job);
    if (!bad) bad = decode(&w);
    if (!bad) bad = unsort(&w);
    if (!bad) numbers(&w);
    drop(&w);
    return bad;
}

/* A tile of few lanes among others */
typedef struct {
    rac_lanes lanes;
    uint64_t st[FEW];
    uint32_t left[FEW];
    rac_work w;
    uint8_t *sym;              /* all coded symbols of the tile */
    const int64_t *block;      /* of the next segment */
    int64_t number;
} rac_slot;

/* The next segment of a tile; 0 where there is none */
static int next(rac_slot *s) {
    const rac_job *job = s->w.job;
    if (s->block == s->w.blocks + 5 * s->w.nblocks) return 0;
    s->lanes.lut = job->luts + 4096 * s->block[0];
    s->lanes.rest = (segment(&s->w, &s->block) + job->per - 1) / job->per;
    return 1;
}

static int enter(rac_slot *s, const rac_job *job, int64_t number) {
    s->number = number;
    s->sym = 0;
    int bad = prepare(&s->w, job);
    if (bad) return bad;
    const int64_t n = job->rows * job->cols / job->per + s->w.nblocks; /* each segment may end in half a pair */
    if (!(s->lanes.out = s->sym = malloc((size_t)n + 1024))) return 8;
    s->block = s->w.blocks;
    s->lanes.st = s->st;
    s->lanes.left = s->left;
    if ((bad = begin(&s->w, s->st, s->left))) return bad;
    s->lanes.words = s->w.words;
    s->lanes.end = s->w.end;
    next(s);
    return 0;
}

static int leave(rac_slot *s) {
    rac_work *w = &s->w;
    const int64_t per = w->job->per, *b = w->blocks, *here = b;
    int64_t element = 0, place = 0;
    const uint8_t *sym = s->sym;
    while (b < w->blocks + 5 * w->nblocks) {
        const int64_t total = segment(w, &b);
        const int bad = emit(w, sym, total, &here, &element, &place);
        if (bad) return bad;
        sym += (total + per - 1) / per;
    }
    int bad = ended(w, s->st, s->left);
    if (!bad) bad = unsort(w);
    if (!bad) numbers(w);
    return bad;
}

/* The tiles *from.. below n that have as few lanes as the first of them, side by side: one alone leaves the processor waiting
 * for the step before. *from becomes the next tile, *at one that is wrong. */
static int few(const rac_job *job, int64_t *from, int64_t n, int64_t *at) {
    const int64_t lanes = job[*from].lanes;
    rac_slot *room = malloc(SIDE_BY_SIDE * sizeof *room);
    rac_lanes *all[SIDE_BY_SIDE];
    int active = 0, bad = room ? 0 : 8;
    for (int k = 0; !bad && k < SIDE_BY_SIDE; k++) all[k] = &room[k].lanes;
    while (!bad) {
        while (active < SIDE_BY_SIDE && *from < n && job[*from].lanes == lanes && !bad) {
            *at = *from;
            bad = enter((rac_slot *)all[active++], job + *from, *from);
            ++*from;
        }
        if (!active || bad) break;
        side_by_side(all, active, lanes);
        for (int k = 0; k < active && !bad;) {
            rac_slot *s = (rac_slot *)all[k];
            if (s->lanes.rest || next(s)) { k++; continue; }
            *at = s->number;
            bad = leave(s);
            drop(&s->w);
            free(s->sym);
            all[k] = all[--active];
            all[active] = &s->lanes;
        }
    }
    for (int k = 0; k < active; k++) {
        drop(&((rac_slot *)all[k])->w);
        free(((rac_slot *)all[k])->sym);
    }
    free(room);
    return bad;
}

/* The n tiles; the number of one that is wrong in *at. 0, or what is wrong: 1 streams do not fill the unit, 2 padding,
 * 3 zero word, 4 final state, 5 escape counts, 6 escaped value, 7 bits behind a plane, 8 no memory */
int rac_tiles(const rac_job *job, int64_t n, int64_t *at) {
    int bad = 0;
    for (int64_t i = 0; i < n && !bad;) {
        if (is_few(job[i].lanes)) bad = few(job, &i, n, at);
        else bad = tile(job + (*at = i++));
    }
    return bad;
}
