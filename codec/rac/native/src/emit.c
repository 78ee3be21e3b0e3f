/* Coded symbols of a tile to words: the tops of the symbols and escapes, joined with the raw bits of the planes. Twins:
 * rac/stages/lanes. */
#include "simd.h"
#include "tile.h"

enum { PIECE = 2048, AHEAD = 16 }; /* symbols at once; rows of which the memory is fetched before they are written */

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

/* Tops of `n` elements out of their coded symbols */
static int tops(rac_tile *w, const uint8_t *sym, int64_t n, uint16_t *val) {
    const rac_shared *s = w->shared;
    const int64_t per = s->per, coded = (n + per - 1) / per;
    if (per == 2)
        for (int64_t q = 0; q < coded; q++) memcpy(val + 2 * q, w->pairtop + sym[q], 4);
    else if (w->counts) { /* a loop that a compiler vectorises, where the table is a gather */
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

/* Bytes out of single symbols whose tops count up; up to WIDE - 1 more of `out` are overwritten */
static int bytes(rac_tile *w, const uint8_t *sym, int64_t n, uint8_t *out) {
    const rac_shared *s = w->shared;
    const int first = s->first, base = s->values[0];
#ifdef WIDE
    for (int64_t i = 0; i < n; i += WIDE) {
        uint64_t found = add_bytes(sym + i, base, first, out + i);
        for (; first < s->base && found; found &= found - 1) {
            const int64_t k = i + __builtin_ctzll(found) / PER_BYTE;
            if (k >= n) break;
#else
    for (int64_t i = 0; i < n; i += 64) {
        uint64_t found = 0;
        for (int64_t k = 0; k < least(n - i, 64); k++) {
            out[i + k] = (uint8_t)(sym[i + k] + base);
            found |= (uint64_t)(sym[i + k] >= first) << k;
        }
        for (; first < s->base && found; found &= found - 1) {
            const int64_t k = i + __builtin_ctzll(found);
#endif
            uint32_t top;
            const int bad = escaped(w, sym[k], &top);
            if (bad) return bad;
            out[k] = (uint8_t)top;
        }
    }
    return 0;
}

#ifdef WIDE
/* The bytes from p on, at least n of them, and up to `most` may be read: where they end at `end`, a copy */
INLINED const uint8_t *readable(const uint8_t *p, const uint8_t *end, int64_t most, uint8_t *copy) {
    if (end - p >= most) return p;
    memset(copy, 0, (size_t)most);
    if (p < end) memcpy(copy, p, (size_t)(end - p));
    return copy;
}

/* Sixteen bits each out of n pairs of small tops with eight raw bits, elements `at` and on of the tile; up to STEP - 1
 * more are overwritten */
static int bf16(rac_tile *w, const uint8_t *sym, int64_t n, int64_t at, uint16_t *out) {
    const uint8_t *plane = w->planes + *w->half.start;
    const uint8_t *const end = plane + w->job->rows * w->job->cols;
    uint8_t high[16], low[16], copy[STEP];
    for (int a = 0; a < 16; a++) {
        high[a] = (uint8_t)(w->shared->values[a] >> 1);
        low[a] = (uint8_t)(w->shared->values[a] << 7);
    }
    const tops16 t = tops_of(high, low);
    const int first = w->shared->first < 16 ? w->shared->first : 16;
    plane += at;
    const int64_t whole = end - plane - STEP; /* behind it a vector reaches over the end of the plane */
    for (int64_t i = 0; i < n; i += STEP, sym += STEP / 2) {
        join_pairs(&t, sym, i <= whole ? plane + i : readable(plane + i, end, STEP, copy), out + i);
        for (uint64_t found = pairs_not_below(sym, first); found; found &= found - 1) {
            const int64_t k = __builtin_ctzll(found) / PER_WORD;
            if (i + k >= n) break;
            uint32_t top;
            const int bad = escaped(w, k & 1 ? sym[k >> 1] >> 4 : sym[k >> 1] & 15, &top);
            if (bad) return bad;
            out[i + k] = (uint16_t)((out[i + k] & 0x807f) | top << 7);
        }
    }
    return 0;
}

/* Raw bits of elements at..at + n, from planes of less than 16 bits together; raw[0] is that of element
 * at & ~(LANES - 1), and up to LANES - 1 more follow the last */
static void raw16(const rac_tile *w, int64_t at, int64_t n, uint16_t *raw) {
    const int64_t all = w->job->rows * w->job->cols;
    const int r = w->half.raw;
    for (int64_t e = at & ~(int64_t)(LANES - 1); e < at + n; e += LANES, raw += LANES) {
        wide16 v = {0};
        uint8_t copy[LANES];
        const int64_t *s = w->half.start;
        int low = 0;
#define PLANE(bits, fields)                                                                                            \
    if (r & bits) {                                                                                                    \
        const uint8_t *p = w->planes + *s++, *end = p + (all * bits + 7) / 8;                                          \
        v |= fields(readable(p + e * bits / 8, end, LANES * bits / 8, copy)) << low;                                   \
        low += bits;                                                                                                   \
    }
        PLANE(8, bytes16)
        PLANE(4, fours16)
        PLANE(2, twos16)
        PLANE(1, ones16)
#undef PLANE
        memcpy(raw, &v, WIDE);
    }
}

/* As bf16, for any tops in a few runs, and single symbols too; up to LANES - 1 more are overwritten */
INLINED int any16(rac_tile *w, const uint8_t *sym, int64_t n, int64_t at, uint16_t *out, const int per) {
    const rac_half h = w->half;
    const wide16 none = {0}, low = none + (uint16_t)((1 << h.shift) - 1), first = none + (uint16_t)w->shared->first;
    const uint16_t keep = (uint16_t)(((1u << h.shift) - 1) << h.zero | (h.sign ? 0x8000 : 0));
    uint16_t raw[CHUNK + 2 * LANES];
    for (int64_t f = 0; f < n; f += CHUNK) {
        const int64_t m = least(n - f, CHUNK);
        raw16(w, at + f, m, raw);
        const uint16_t *bits = raw + ((at + f) & (LANES - 1));
        for (int64_t i = f; i < f + m; i += LANES, bits += LANES) {
            const wide16 s = per == 2 ? fours16(sym + i / 2) : bytes16(sym + i), b = load16(bits);
            wide16 top = s + w->shared->values[0];
            for (int k = 0; k < h.runs; k++) top += (wide16)((signed16)s >= (signed16)(none + h.run[k])) & h.gap[k];
            top = (top << h.shift | (b & low) | b >> h.shift << (15 - h.zero)) << h.zero;
            memcpy(out + i, &top, WIDE);
            for (uint64_t found = not_below16(s, first); found; found &= found - 1) {
                const int64_t k = i + __builtin_ctzll(found) / PER_LANE;
                if (k >= f + m) break;
                uint32_t t;
                const int bad = escaped(w, per == 1 ? sym[k] : k & 1 ? sym[k >> 1] >> 4 : sym[k >> 1] & 15, &t);
                if (bad) return bad;
                out[k] = (uint16_t)((out[k] & keep) | t << (h.shift + h.zero));
            }
        }
    }
    return 0;
}
static int singles(rac_tile *w, const uint8_t *sym, int64_t n, int64_t at, uint16_t *out) {
    return any16(w, sym, n, at, out, 1);
}
static int pairs(rac_tile *w, const uint8_t *sym, int64_t n, int64_t at, uint16_t *out) {
    return any16(w, sym, n, at, out, 2);
}

/* The words, or their upper halves, out of symbols, where the tile is `fast` */
static int join(rac_tile *w, const uint8_t *sym, int64_t n, int64_t at, uint16_t *out) {
    return (w->half.bf16 ? bf16 : w->shared->per == 2 ? pairs : singles)(w, sym, n, at, out);
}

/* Words of four bytes out of their upper halves, elements `at` and on of the tile */
static void whole(const rac_tile *w, const uint16_t *half, int64_t n, int64_t at, uint32_t *out) {
    if (w->shared->raw & 16) {
        const uint16_t *low = (const uint16_t *)(w->planes + w->start[0]) + at;
        for (int64_t i = 0; i < n; i++) out[i] = (uint32_t)half[i] << 16 | low[i];
    } else
        for (int64_t i = 0; i < n; i++) out[i] = (uint32_t)half[i] << 16;
}
#else /* nothing is `fast` */
#define join(w, sym, n, at, val) ((void)(val), (void)(n), 0)
#define whole(...)
#endif

/* What rac_half is for; 0 where the words are no such */
static int halves(rac_tile *w) {
    const rac_shared *s = w->shared;
    rac_half *h = &w->half;
    const int low = s->word == 4 ? 16 : 0;
    *h = (rac_half){.start = w->start, .shift = s->shift, .zero = s->zero, .raw = s->raw, .sign = s->sign};
    if (s->word != 2 && s->word != 4) return 0;
    if (low && s->zero >= low) h->zero -= low;
    else if (low && !s->zero && s->shift >= low) { /* the first plane has the lower halves */
        h->shift -= low;
        h->raw -= low;
        h->start++;
    } else if (low) return 0;
    for (int a = 1; a < s->first; a++) {
        const uint16_t gap = (uint16_t)(s->values[a] - s->values[a - 1] - 1);
        if (!gap) continue;
        if (h->runs == RUNS) return 0;
        h->run[h->runs] = (uint16_t)a;
        h->gap[h->runs++] = gap;
    }
    h->bf16 = s->per == 2 && s->sign && h->shift == 7 && !h->zero && s->values[s->first - 1] < 256;
    return h->raw < 16;
}

/* How symbols become words: once w->seq is known */
void rac_choose(rac_tile *w) {
    const rac_shared *s = w->shared;
    w->counts = 1;
    for (int a = 1; a < s->first; a++) w->counts &= s->values[a] == s->values[0] + a;
    w->bytes = w->counts && s->word == 1 && s->per == 1 && !s->raw && !s->sign && !s->shift && !s->zero;
    w->fast = halves(w);
#ifndef WIDE
    w->fast = 0;
#endif
    if (w->col && !w->seq) w->fast = 0;
    if (s->per == 2 && !w->fast)
        for (int p = 0; p < 256; p++) w->pairtop[p] = s->values[p & 15] | (uint32_t)s->values[p >> 4] << 16;
}

/* The next m words of a tile without classes of columns, joined, to their places */
INLINED void put_words(const rac_tile *w, const char *val, int64_t m, rac_cursor *at, const int size) {
    const int64_t stride = w->stride * size;
    char *const dst = w->dst;
    at->in_tile += m;
    for (const char *const end = val + m * size; val < end;) {
        const rac_block *o = at->block;
        const int64_t cols = (o->c1 - o->c0) * size;
        int64_t i = o->r0, c = at->in_block * size; /* bytes of row i that are there already */
        if (c >= cols) {
            i += c / cols;
            c %= cols;
        }
        const int64_t left = (o->r1 - i) * cols - c, whole = least(left, end - val);
        for (const char *const last = val + whole; val < last; c = 0, i++) {
            const int64_t r = least(cols - c, last - val);
            if (i + AHEAD < o->r1) { /* runs are short, and the next is somewhere else */
                const char *next = dst + (w->row ? w->row[i + AHEAD] : i + AHEAD) * stride + o->c0 * size + c;
                for (int64_t b = 0; b < r; b += 64) __builtin_prefetch(next + b, 1);
            }
            copy_run(dst + (w->row ? w->row[i] : i) * stride + o->c0 * size + c, val, r);
            val += r;
        }
        at->in_block += whole / size;
        if (whole == left) {
            at->block++;
            at->in_block = 0;
        }
    }
}
static void put_runs(const rac_tile *w, const uint16_t *val, int64_t m, rac_cursor *at) {
    uint32_t words[2 * PIECE];
    if (w->shared->word == 2) {
        put_words(w, (const char *)val, m, at, 2);
        return;
    }
    whole(w, val, m, at->in_tile, words);
    put_words(w, (const char *)words, m, at, 4);
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

/* Coded symbols of the next `n` elements to words in sequence order */
static int put_seq(rac_tile *w, const uint8_t *sym, int64_t n, rac_cursor *at) {
    uint16_t val[2 * PIECE + 64];
    const int64_t piece = PIECE * w->shared->per, here = at->in_tile;
    at->in_tile += n;
    if (w->bytes) return bytes(w, sym, n, (uint8_t *)w->seq + here);
    if (w->shared->word == 2) return join(w, sym, n, here, (uint16_t *)w->seq + here);
    for (int64_t k = 0; k < n; k += piece, sym += PIECE) {
        const int64_t m = least(n - k, piece);
        const int bad = join(w, sym, m, here + k, val);
        if (bad) return bad;
        whole(w, val, m, here + k, (uint32_t *)w->seq + here + k);
    }
    return 0;
}

/* Coded symbols of the next `n` elements to words in their place; 0 or what is wrong */
int rac_emit(rac_tile *w, const uint8_t *sym, int64_t n, rac_cursor *at) {
    uint16_t val[2 * PIECE + 64];
    const int64_t piece = PIECE * w->shared->per;
    if (w->seq && (w->bytes || w->fast)) return put_seq(w, sym, n, at);
    for (int64_t k = 0; k < n; k += piece, sym += PIECE) {
        const int64_t m = least(n - k, piece);
        const int bad = w->fast ? join(w, sym, m, at->in_tile, val) : tops(w, sym, m, val);
        if (bad) return bad;
        (w->fast ? put_runs : put_tops)(w, val, m, at);
    }
    return 0;
}
