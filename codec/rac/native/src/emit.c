/* Coded symbols of a tile to words: the tops of the symbols and escapes, joined with the raw bits of the planes. Twins:
 * rac/stages/lanes. */
#include "tile.h"

enum { PIECE = 2048 }; /* symbols at once */

/* The value of the escape of base symbol `s` in *top; 0 or what is wrong */
static inline int escaped(rac_tile *w, int s, uint32_t *top) {
    if (w->used >= w->escapes) return BAD_ESCAPES;
    *top = w->shared->bases[s - w->shared->first] + w->escape[w->used++];
    return *top >= w->shared->limit ? BAD_TOP : 0;
}

/* blocks[i] = highest base symbol in the 64 coded symbols from 64 i on */
static void highest(const uint8_t *sym, int64_t n, int per, uint8_t *blocks) {
    for (int64_t i = 0; i < n; i += 64) {
        const int64_t m = least(n - i, 64);
        uint8_t top = 0;
        if (per == 1)
            for (int64_t k = 0; k < m; k++) top = sym[i + k] > top ? sym[i + k] : top;
        else
            for (int64_t k = 0; k < m; k++) {
                uint8_t a = sym[i + k] & 15, b = sym[i + k] >> 4;
                a = a > b ? a : b;
                top = a > top ? a : top;
            }
        blocks[i >> 6] = top;
    }
}

#ifdef AVX512
/* Tops below 256 of pairs a | b << 4, 32 at a time; returns how many pairs are done */
static int64_t pairs512(const uint8_t *sym, int64_t n, const uint8_t *table, uint16_t *val) {
    int64_t i = 0;
    const __m256i t = _mm256_broadcastsi128_si256(_mm_loadu_si128((const void *)table)), m = _mm256_set1_epi8(15);
    for (; i + 32 <= n; i += 32) {
        const __m256i s = _mm256_loadu_si256((const void *)(sym + i));
        const __m256i a = _mm256_shuffle_epi8(t, _mm256_and_si256(s, m));
        const __m256i b = _mm256_shuffle_epi8(t, _mm256_and_si256(_mm256_srli_epi16(s, 4), m));
        for (int h = 0; h < 2; h++) {
            const __m512i x = _mm512_cvtepu8_epi32(h ? _mm256_extracti128_si256(a, 1) : _mm256_castsi256_si128(a));
            const __m512i y = _mm512_cvtepu8_epi32(h ? _mm256_extracti128_si256(b, 1) : _mm256_castsi256_si128(b));
            _mm512_storeu_si512(val + 2 * i + 32 * h, _mm512_or_si512(x, _mm512_slli_epi32(y, 16)));
        }
    }
    return i;
}
#else
#define pairs512(...) 0
#endif

/* Tops of `n` elements out of their coded symbols */
static int tops(rac_tile *w, const uint8_t *sym, int64_t n, uint16_t *val) {
    const rac_shared *s = w->shared;
    const int64_t per = s->per, coded = (n + per - 1) / per;
    if (per == 2) {
        int64_t q = w->small ? pairs512(sym, coded, w->bytetop, val) : 0;
        for (; q < coded; q++) memcpy(val + 2 * q, w->pairtop + sym[q], 4);
    } else if (w->counts) { /* a loop that a compiler vectorises, where the table is a gather */
        const uint16_t base = s->values[0];
        for (int64_t q = 0; q < n; q++) val[q] = (uint16_t)(base + sym[q]);
    } else
        for (int64_t q = 0; q < n; q++) val[q] = s->values[sym[q]];
    if (s->first >= s->base) return 0;
    uint8_t blocks[PIECE / 64];
    highest(sym, coded, (int)per, blocks);
    for (int64_t i = 0; i < coded; i++) {
        if (!(i & 63) && blocks[i >> 6] < s->first) {
            i += 63;
            continue;
        }
        for (int64_t k = 0; k < per && i * per + k < n; k++) {
            const int c = per == 1 ? sym[i] : k ? sym[i] >> 4 : sym[i] & 15;
            uint32_t top;
            if (c < s->first) continue;
            const int bad = escaped(w, c, &top);
            if (bad) return bad;
            val[i * per + k] = (uint16_t)top;
        }
    }
    return 0;
}

/* Of 64 symbols at `sym`, n of them there: which are not below `first`; the symbols and `base` to `out` */
static uint64_t bytes64(const uint8_t *sym, int64_t n, int first, int base, uint8_t *out) {
#ifdef AVX512
    const uint64_t some = first_bits(n);
    const __m512i s = _mm512_maskz_loadu_epi8(some, sym);
    _mm512_mask_storeu_epi8(out, some, _mm512_add_epi8(s, _mm512_set1_epi8((char)base)));
    return _mm512_mask_cmpge_epu8_mask(some, s, _mm512_set1_epi8((char)first));
#else
    uint64_t found = 0;
    for (int64_t k = 0; k < n; k++) {
        out[k] = (uint8_t)(sym[k] + base);
        found |= (uint64_t)(sym[k] >= first) << k;
    }
    return found;
#endif
}

/* Bytes out of single symbols whose tops count up */
static int bytes(rac_tile *w, const uint8_t *sym, int64_t n, uint8_t *out) {
    const rac_shared *s = w->shared;
    const int first = s->first, base = s->values[0];
    for (int64_t i = 0; i < n; i += 64) {
        uint64_t found = bytes64(sym + i, least(n - i, 64), first, base, out + i);
        for (; first < s->base && found; found &= found - 1) {
            const int64_t k = i + __builtin_ctzll(found);
            uint32_t top;
            const int bad = escaped(w, sym[k], &top);
            if (bad) return bad;
            out[k] = (uint8_t)top;
        }
    }
    return 0;
}

#ifdef AVX512
/* `n` BF16 words, elements `at` and on of the tile, out of their pairs; up to 63 more words of `out` are overwritten */
static int bf16(rac_tile *w, const uint8_t *sym, int64_t n, int64_t at, uint16_t *out) {
    const uint8_t *plane = w->planes + w->start[0] + at;
    const int least_escape = w->shared->first < 16 ? w->shared->first : 16;
    const __m512i table = _mm512_broadcast_i32x4(_mm_loadu_si128((const void *)w->bytetop));
    const __m512i nibble = _mm512_set1_epi8(15), top = _mm512_set1_epi8((char)0x80);
    const __m512i order = _mm512_set_epi64(7, 3, 6, 2, 5, 1, 4, 0), first = _mm512_set1_epi8((char)least_escape);
    for (int64_t i = 0; i < n; i += 64, sym += 32) {
        const __mmask64 some = first_bits(n - i);
        __m512i s = _mm512_cvtepu8_epi16(_mm256_loadu_si256((const void *)sym));
        s = _mm512_and_si512(_mm512_or_si512(s, _mm512_slli_epi16(s, 4)), nibble);
        const __m512i e = _mm512_permutexvar_epi64(order, _mm512_shuffle_epi8(table, s));
        const __m512i r = _mm512_permutexvar_epi64(order, _mm512_maskz_loadu_epi8(some, plane + i));
        const __m512i low = _mm512_ternarylogic_epi64(top, _mm512_slli_epi16(e, 7), r, 0xca);
        const __m512i high = _mm512_ternarylogic_epi64(top, r, _mm512_srli_epi16(e, 1), 0xca);
        _mm512_storeu_si512(out + i, _mm512_unpacklo_epi8(low, high));
        _mm512_storeu_si512(out + i + 32, _mm512_unpackhi_epi8(low, high));
        uint64_t found = _mm512_mask_cmpge_epu8_mask(some, s, first);
        for (; found; found &= found - 1) {
            const int k = __builtin_ctzll(found);
            uint32_t t;
            const int bad = escaped(w, k & 1 ? sym[k >> 1] >> 4 : sym[k >> 1] & 15, &t);
            if (bad) return bad;
            out[i + k] = (uint16_t)((out[i + k] & 0x807f) | t << 7);
        }
    }
    return 0;
}

/* Raw bits of elements at..at + n, from planes of less than 16 bits together; raw[0] is that of element at & ~31,
 * and up to 31 more follow the last */
static void raw512(const rac_tile *w, int64_t at, int64_t n, uint16_t *raw) {
    const int64_t from = at & ~(int64_t)31;
    const int r = w->shared->raw;
    n += at - from;
    for (int64_t i = 0; i < n; i += 32) {
        const int64_t m = least(n - i, 32), e = from + i, *s = w->start;
        __m512i v = _mm512_setzero_si512();
        int low = 0;
        if (r & 8) {
            v = _mm512_cvtepu8_epi16(_mm256_maskz_loadu_epi8((__mmask32)first_bits(m), w->planes + *s++ + e));
            low = 8;
        }
        if (r & 4) {
            const __m128i q = _mm_maskz_loadu_epi8((__mmask16)first_bits((m + 1) / 2), w->planes + *s++ + e / 2);
            __m512i b = _mm512_cvtepu8_epi32(q);
            b = _mm512_and_si512(_mm512_or_si512(b, _mm512_slli_epi32(b, 12)), _mm512_set1_epi16(15));
            v = _mm512_or_si512(v, _mm512_slli_epi16(b, (unsigned)low));
            low += 4;
        }
        if (r & 2) {
            const __m128i q = _mm_maskz_loadu_epi8((__mmask16)first_bits((m + 3) / 4), w->planes + *s++ + e / 4);
            __m512i b = _mm512_cvtepu8_epi64(q);
            b = _mm512_or_si512(b, _mm512_slli_epi64(b, 28));
            b = _mm512_and_si512(_mm512_or_si512(b, _mm512_slli_epi64(b, 14)), _mm512_set1_epi16(3));
            v = _mm512_or_si512(v, _mm512_slli_epi16(b, (unsigned)low));
            low += 2;
        }
        if (r & 1) {
            const __m128i b = _mm_maskz_loadu_epi8((__mmask16)first_bits((m + 7) / 8), w->planes + *s + e / 8);
            v = _mm512_or_si512(v, _mm512_maskz_set1_epi16((__mmask32)_mm_cvtsi128_si32(b), (short)(1 << low)));
        }
        _mm512_storeu_si512(raw + i, v);
    }
}

/* As bf16, for any 16-bit float: pairs of small tops, or single symbols of at most 128 */
static int float16(rac_tile *w, const uint8_t *sym, int64_t n, int64_t at, uint16_t *out) {
    const rac_shared *j = w->shared;
    const unsigned shift = (unsigned)j->shift;
    const __m512i low = _mm512_set1_epi16((short)((1 << shift) - 1)), nibble = _mm512_set1_epi16(15);
    const __m512i t0 = _mm512_loadu_si512(j->values), t1 = _mm512_loadu_si512(j->values + 32);
    const __m512i t2 = _mm512_loadu_si512(j->values + 64), t3 = _mm512_loadu_si512(j->values + 96);
    const __m512i first = _mm512_set1_epi16((short)j->first), half = _mm512_set1_epi16(64);
    uint16_t raw[CHUNK + 64];
    for (int64_t f = 0; f < n; f += CHUNK) {
        const int64_t m = least(n - f, CHUNK);
        raw512(w, at + f, m, raw);
        const uint16_t *bits = raw + ((at + f) & 31);
        for (int64_t i = f; i < f + m; i += 32, bits += 32) {
            __m512i s, top;
            if (j->per == 2) {
                s = _mm512_cvtepu8_epi32(_mm_loadu_si128((const void *)(sym + i / 2)));
                s = _mm512_and_si512(_mm512_or_si512(s, _mm512_slli_epi32(s, 12)), nibble);
                top = _mm512_permutexvar_epi16(s, t0);
            } else {
                s = _mm512_cvtepu8_epi16(_mm256_loadu_si256((const void *)(sym + i)));
                const __m512i below = _mm512_permutex2var_epi16(t0, s, t1);
                const __m512i above = _mm512_permutex2var_epi16(t2, s, t3);
                top = _mm512_mask_blend_epi16(_mm512_test_epi16_mask(s, half), below, above);
            }
            const __m512i b = _mm512_loadu_si512(bits), sign = _mm512_slli_epi16(_mm512_srli_epi16(b, shift), 15);
            top = _mm512_or_si512(_mm512_slli_epi16(top, shift), _mm512_and_si512(b, low));
            _mm512_storeu_si512(out + i, _mm512_or_si512(top, sign));
            uint32_t found = _mm512_mask_cmpge_epu16_mask((__mmask32)first_bits(f + m - i), s, first);
            for (; found; found &= found - 1) {
                const int64_t k = i + __builtin_ctz(found);
                uint32_t t;
                const int bad = escaped(w, j->per == 1 ? sym[k] : k & 1 ? sym[k >> 1] >> 4 : sym[k >> 1] & 15, &t);
                if (bad) return bad;
                out[k] = (uint16_t)((out[k] & (0x8000 | ((1u << shift) - 1))) | t << shift);
            }
        }
    }
    return 0;
}

/* 16-bit floats out of symbols, where the tile is `fast` */
static int join(rac_tile *w, const uint8_t *sym, int64_t n, int64_t at, uint16_t *out) {
    return w->bf16 ? bf16(w, sym, n, at, out) : float16(w, sym, n, at, out);
}
#else
#define join(...) 0
#endif

/* The next m words of a tile without classes of columns, joined, to their places */
static void put_runs(const rac_tile *w, const uint16_t *val, int64_t m, rac_cursor *at) {
    for (int64_t q = 0; q < m;) {
        const rac_block *o = at->block;
        const int64_t cols = o->c1 - o->c0, i = o->r0 + at->in_block / cols, c = at->in_block % cols;
        const int64_t r = least(cols - c, m - q);
        copy_run((uint16_t *)w->dst + (w->row ? w->row[i] : i) * w->stride + o->c0 + c, val + q, 2 * r);
        q += r;
        at->in_block += r;
        at->in_tile += r;
        if (c + r == cols && i + 1 == o->r1) {
            at->block++;
            at->in_block = 0;
        }
    }
}

/* The next m tops, joined with their raw bits, to their places */
static void put_tops(const rac_tile *w, const uint16_t *val, int64_t m, rac_cursor *at) {
    for (int64_t q = 0; q < m;) {
        const rac_block *b = at->block;
        const int64_t left = (b->r1 - b->r0) * (b->c1 - b->c0) - at->in_block, r = least(left, m - q);
        switch (w->shared->word) {
            case 1: rac_place1(w, val + q, r, at->in_block, at->in_tile, b); break;
            case 2: rac_place2(w, val + q, r, at->in_block, at->in_tile, b); break;
            case 4: rac_place4(w, val + q, r, at->in_block, at->in_tile, b); break;
            default: rac_place8(w, val + q, r, at->in_block, at->in_tile, b);
        }
        q += r;
        at->in_block += r;
        at->in_tile += r;
        if (r == left) {
            at->block++;
            at->in_block = 0;
        }
    }
}

/* Coded symbols of the next `n` elements to words in their place; 0 or what is wrong */
int rac_emit(rac_tile *w, const uint8_t *sym, int64_t n, rac_cursor *at) {
    uint16_t val[2 * PIECE + 64];
    const int64_t piece = PIECE * w->shared->per, here = at->in_tile;
    if (w->seq && (w->bytes || w->fast)) {
        at->in_tile += n;
        return w->bytes ? bytes(w, sym, n, (uint8_t *)w->seq + here) : join(w, sym, n, here, (uint16_t *)w->seq + here);
    }
    for (int64_t k = 0; k < n; k += piece, sym += PIECE) {
        const int64_t m = least(n - k, piece);
        const int bad = w->fast ? join(w, sym, m, at->in_tile, val) : tops(w, sym, m, val);
        if (bad) return bad;
        (w->fast ? put_runs : put_tops)(w, val, m, at);
    }
    return 0;
}
