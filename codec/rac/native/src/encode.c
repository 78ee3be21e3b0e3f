/* Coded symbols to lanes (stages/lanes.md, "Lanes"). Twin: rac/encode/code/tiles.py, through constriction. */
#include "encode.h"

#if defined(AVX512) || defined(AVX2)
/* Lanes stand in slots, WIDE of which are coded in vectors: those of one tile, or few of each of several tiles. Of each row
 * of slots first what the symbols are coded by is looked up, its `entries`: a step does not gather. */
enum { WIDE = 32, ENTRIES = 2048, NEUTRAL = 4096 /* a frequency that leaves a state as it is */ };

/* Rows at the end of what is left of a stream, `stride` entries apart, its first slots at `to`. Behind `lanes` of `width`
 * slots entries are neutral, and so are all of the rows that it does not have */
INLINED void look_up(rac_stream *s, const uint32_t *model, int64_t lanes, int64_t width, int64_t rows, int64_t stride,
                     uint32_t *to) {
    to += rows * stride;
    while (rows > 0) {
        while (!s->left && s->nseg) s->left = s->seg[--s->nseg].symbols;
        const int64_t odd = s->left % lanes, some = odd ? odd : lanes;
        const int64_t n = !s->left ? rows : odd ? 1 : least(rows, s->left / lanes);
        const uint32_t *m = model + 256 * s->seg[s->nseg].table;
        rows -= n;
        if (!s->left) {
            for (int64_t i = 0; i < n; i++) {
                to -= stride;
                for (int64_t l = 0; l < width; l++) to[l] = NEUTRAL;
            }
            return;
        }
        s->left -= n * some;
        if (odd) {
            to -= stride;
            s->sym -= odd;
            for (int64_t l = 0; l < width; l++) to[l] = l < odd ? m[s->sym[l]] : NEUTRAL;
        } else
            for (int64_t i = 0; i < n; i++) {
                to -= stride;
                s->sym -= lanes;
                for (int64_t l = 0; l < width; l++) to[l] = l < lanes ? m[s->sym[l]] : NEUTRAL;
            }
    }
}

static void entries_of(rac_stream *s, const uint32_t *model, int64_t lanes, int64_t width, int64_t rows, int64_t stride,
                       uint32_t *to) {
    switch (lanes) {
    case 1: look_up(s, model, 1, 1, rows, stride, to); return;
    case 2: look_up(s, model, 2, 2, rows, stride, to); return;
    case 4: look_up(s, model, 4, 4, rows, stride, to); return;
    case 8: look_up(s, model, 8, 8, rows, stride, to); return;
    case 16: look_up(s, model, 16, 16, rows, stride, to); return;
    case 32: look_up(s, model, 32, 32, rows, stride, to); return;
    default: look_up(s, model, lanes, width, rows, stride, to);
    }
}
#endif

#if defined(AVX512)
/* 8 lanes a step. A quotient below 2^40 by less than 2^12 is at least 2^-12 below the next integer, and a division of
 * doubles rounds by less, so that it is exact */
INLINED __m512i step(__m512i x, __m512i e) {
    const __m512i f = _mm512_and_si512(e, _mm512_set1_epi64(0xffff));
    const __m512i start = _mm512_slli_epi64(_mm512_srli_epi64(e, 16), 12);
    const __m512i less = _mm512_sub_epi64(_mm512_set1_epi64(1 << 24), _mm512_slli_epi64(f, 12));
    const __m512d q = _mm512_div_pd(_mm512_cvtepi64_pd(_mm512_srli_epi64(x, 12)), _mm512_cvtepi64_pd(f));
    const __m512i by = _mm512_mullo_epi64(_mm512_cvttpd_epi64(q), less);
    return _mm512_add_epi64(_mm512_add_epi64(x, start), by);
}

/* Rows of WIDE slots, `stride` entries apart, the last first; their words end at `w`. masks: the slots that have given a
 * word in each row, counts: how many each has given */
static uint32_t *code(const uint32_t *entries, int64_t rows, int64_t stride, uint64_t *st, uint32_t *w, uint32_t *masks,
                      uint32_t *counts) {
    __m512i x[4], c[2];
    for (int k = 0; k < 4; k++) x[k] = _mm512_loadu_si512(st + 8 * k);
    for (int k = 0; k < 2; k++) c[k] = _mm512_loadu_si512(counts + 16 * k);
    const __m512i f = _mm512_set1_epi64(0xffff), one = _mm512_set1_epi32(1);
    const __m512i even = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
    while (rows-- > 0) {
        uint32_t all = 0;
#pragma GCC unroll 2
        for (int k = 1; k >= 0; k--) {
            const __m512i e = _mm512_loadu_si512(entries + rows * stride + 16 * k);
            const __m512i e0 = _mm512_cvtepu32_epi64(_mm512_castsi512_si256(e));
            const __m512i e1 = _mm512_cvtepu32_epi64(_mm512_extracti64x4_epi64(e, 1));
            const __m512i x0 = x[2 * k], x1 = x[2 * k + 1];
            const __mmask8 k0 = _mm512_cmpge_epu64_mask(_mm512_srli_epi64(x0, 52), _mm512_and_si512(e0, f));
            const __mmask8 k1 = _mm512_cmpge_epu64_mask(_mm512_srli_epi64(x1, 52), _mm512_and_si512(e1, f));
            const __mmask16 some = (__mmask16)(k0 | k1 << 8);
            const int words = __builtin_popcount(some);
            w -= words;
            const __m512i low = _mm512_maskz_compress_epi32(some, _mm512_permutex2var_epi32(x0, even, x1));
            _mm512_mask_storeu_epi32(w, (__mmask16)((1u << words) - 1), low);
            c[k] = _mm512_mask_add_epi32(c[k], some, c[k], one);
            all |= (uint32_t)some << 16 * k;
            x[2 * k] = step(_mm512_mask_srli_epi64(x0, k0, x0, 32), e0);
            x[2 * k + 1] = step(_mm512_mask_srli_epi64(x1, k1, x1, 32), e1);
        }
        masks[rows] = all;
    }
    for (int k = 0; k < 4; k++) _mm512_storeu_si512(st + 8 * k, x[k]);
    for (int k = 0; k < 2; k++) _mm512_storeu_si512(counts + 16 * k, c[k]);
    return w;
}
#elif defined(AVX2)
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

/* As for AVX-512 */
static uint32_t *code(const uint32_t *entries, int64_t rows, int64_t stride, uint64_t *st, uint32_t *w, uint32_t *masks,
                      uint32_t *counts) {
    while (rows-- > 0) {
        uint32_t all = 0;
#pragma GCC unroll 8
        for (int l = WIDE - 4; l >= 0; l -= 4) {
            const __m256i e = _mm256_cvtepu32_epi64(_mm_loadu_si128((const void *)(entries + rows * stride + l)));
            const __m256i f = _mm256_and_si256(e, _mm256_set1_epi64x(0xffff));
            __m256i x = _mm256_loadu_si256((const void *)(st + l));
            const __m256i stay = _mm256_cmpgt_epi64(f, _mm256_srli_epi64(x, 52));
            const uint32_t some = ~(uint32_t)_mm256_movemask_pd(_mm256_castsi256_pd(stay)) & 15;
            const __m256i at = _mm256_loadu_si256((const void *)upper[some]);
            _mm_storeu_si128((void *)(w - 4), _mm256_castsi256_si128(_mm256_permutevar8x32_epi32(x, at)));
            w -= __builtin_popcount(some);
            all |= some << l;
            const __m256i none = _mm256_permutevar8x32_epi32(stay, _mm256_setr_epi32(0, 2, 4, 6, 0, 2, 4, 6));
            __m128i c = _mm_loadu_si128((const void *)(counts + l));
            c = _mm_add_epi32(c, _mm_add_epi32(_mm256_castsi256_si128(none), _mm_set1_epi32(1)));
            _mm_storeu_si128((void *)(counts + l), c);
            x = _mm256_blendv_epi8(_mm256_srli_epi64(x, 32), x, stay);
            _mm256_storeu_si256((void *)(st + l), step(x, e));
        }
        masks[rows] = all;
    }
    return w;
}
#endif

#if defined(AVX512) || defined(AVX2)
static int64_t slots(int64_t lanes) {
    int64_t n = 1;
    if (lanes > WIDE) return (lanes + WIDE - 1) / WIDE * WIDE;
    while (n < lanes) n *= 2;
    return n;
}

int64_t rac_tiles_at_once(int64_t lanes) { return lanes > WIDE ? 1 : WIDE / slots(lanes); }

/* Words of rows, which end at `w`, to the streams that they are of, `width` slots each */
static void deal(const uint32_t *masks, int64_t rows, int64_t width, const uint32_t *w, rac_stream *s) {
    const int shift = __builtin_ctzll((unsigned long long)width);
    while (rows-- > 0)
        for (uint32_t m = masks[rows]; m;) {
            const int l = 31 - __builtin_clz(m);
            *--s[l >> shift].words = *--w;
            m ^= 1u << l;
        }
}

void rac_lanes_of(const uint32_t *model, const rac_step *steps, int64_t lanes, rac_stream *s, int64_t n) {
    const int64_t width = slots(lanes), stride = width > WIDE ? width : WIDE, piece = ENTRIES / stride;
    uint64_t st[MOST_LANES] = {0};
    uint32_t entries[ENTRIES], words[ENTRIES + 16], masks[ENTRIES / WIDE], counts[MOST_LANES] = {0};
    int64_t rows = 0;
    (void)steps;
    for (int64_t i = 0; i < n; i++) {
        int64_t mine = 0;
        for (int64_t k = 0; k < s[i].nseg; k++) mine += (s[i].seg[k].symbols + lanes - 1) / lanes;
        rows = mine > rows ? mine : rows;
    }
    for (int64_t i = 0; i < ENTRIES; i++) entries[i] = NEUTRAL;
    for (; rows > 0; rows -= piece) {
        const int64_t r = least(rows, piece);
        for (int64_t i = 0; i < n; i++) entries_of(s + i, model, lanes, width, r, stride, entries + i * width);
        if (width <= WIDE && n > 1) {
            code(entries, r, stride, st, words + ENTRIES + 16, masks, counts);
            deal(masks, r, width, words + ENTRIES + 16, s);
        } else if (width <= WIDE) s->words = code(entries, r, stride, st, s->words, masks, counts);
        else
            for (int64_t k = r - 1; k >= 0; k--)
                for (int64_t l = width - WIDE; l >= 0; l -= WIDE)
                    s->words = code(entries + k * stride + l, 1, stride, st + l, s->words, masks, counts + l);
    }
    for (int64_t i = 0; i < n; i++, s++)
        for (int64_t l = lanes - 1; l >= 0; l--) {
            s->counts[l] = counts[i * width + l];
            for (uint64_t x = st[i * width + l]; x; x >>= 32) {
                *--s->words = (uint32_t)x;
                s->counts[l]++;
            }
        }
}

void rac_steps(const uint32_t *model, int64_t tables, rac_step *out) { (void)model, (void)tables, (void)out; }
#else
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
        _Pragma("GCC unroll 16") for (int64_t l = n - 1; l >= 0; l--) {
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
FEW(16)
FEW(32)

int64_t rac_tiles_at_once(int64_t lanes) {
    (void)lanes;
    return 1;
}

void rac_lanes_of(const uint32_t *model, const rac_step *steps, int64_t lanes, rac_stream *s, int64_t n) {
    (void)model;
    for (; n > 0; n--, s++) {
        uint64_t st[MOST_LANES] = {0};
        const uint8_t *sym = s->sym;
        uint32_t *w = s->words, *counts = s->counts;
        for (int64_t l = 0; l < lanes; l++) counts[l] = 0;
        for (int64_t k = s->nseg - 1; k >= 0; k--) {
            const int64_t odd = s->seg[k].symbols % lanes, full = s->seg[k].symbols / lanes;
            const rac_step *m = steps + 256 * s->seg[k].table;
            w = few(sym, odd > 0, odd, m, st, w, counts);
            sym -= odd;
            if (lanes == 1) w = few1(sym, full, m, st, w, counts);
            else if (lanes == 2) w = few2(sym, full, m, st, w, counts);
            else if (lanes == 4) w = few4(sym, full, m, st, w, counts);
            else if (lanes == 8) w = few8(sym, full, m, st, w, counts);
            else if (lanes == 16) w = few16(sym, full, m, st, w, counts);
            else if (lanes == 32) w = few32(sym, full, m, st, w, counts);
            else w = few(sym, full, lanes, m, st, w, counts);
            sym -= full * lanes;
        }
        for (int64_t l = lanes - 1; l >= 0; l--)
            for (; st[l]; st[l] >>= 32) {
                *--w = (uint32_t)st[l];
                counts[l]++;
            }
        s->words = w;
    }
}
#endif

/* One sequence of symbols to the end of out[0..size), of `symbols + 2 lanes + 16` words at least; how many, -1 where there is
 * less room, -2: not enough memory. counts (up16(lanes)): words of each lane */
int64_t rac_encode(const uint8_t *sym, int64_t lanes, const rac_segment *seg, int64_t nseg, const uint32_t *model,
                   int64_t tables, uint32_t *out, int64_t size, uint32_t *counts) {
    int64_t n = 0;
    for (int64_t k = 0; k < nseg; k++) n += seg[k].symbols;
    if (size < n + 2 * lanes + 16) return -1;
    rac_step *steps = malloc((size_t)tables * 256 * sizeof(rac_step));
    if (!steps) return -2;
    rac_steps(model, tables, steps);
    memset(counts, 0, (size_t)(lanes + 15) / 16 * 64);
    rac_stream s = {sym + n, seg, nseg, 0, out + size, counts};
    rac_lanes_of(model, steps, lanes, &s, 1);
    free(steps);
    return out + size - s.words;
}
