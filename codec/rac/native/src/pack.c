/* Tiles of words to the units of lanes/1 (stages/lanes.md, "Tile unit"), and the counts that their tables are made of.
 * Twin: rac/encode/code/lanes.py. */
#include "bytes.h"
#include "encode.h"

/* Of words of 1, 2, 4 and 8 bytes */
static rac_symbols *const symbols[] = {rac_symbols1, rac_symbols2, rac_symbols4, rac_symbols8};
static rac_gather *const gather[] = {rac_gather1, rac_gather2, rac_gather4, rac_gather8};
static rac_planes *const planes[] = {rac_planes1, rac_planes2, rac_planes4, rac_planes8};

/* Room for the largest tile, and what is known of the one at hand */
typedef struct {
    const rac_coding *coding;
    int kind;              /* of its words, see above */
    uint8_t *flat, *made;  /* words and base symbols in sequence order */
    uint8_t *pairs;        /* of these */
    uint32_t *words;       /* of the lanes: their end */
    rac_block *blocks;
    int32_t *row, *col;
    const uint8_t *in;     /* words in sequence order: `flat`, or the tile itself */
    const uint8_t *base;   /* base symbols: `made`, or the words */
    const uint8_t *sym;    /* coded symbols: `pairs`, or base symbols */
    int64_t n, coded;      /* elements, coded symbols */
    int64_t nseg;
    rac_segment seg[256];
    int64_t elements[256]; /* of the segments */
    int64_t row_end[257], col_end[257]; /* of the classes */
    uint32_t counts[MOST_LANES];
} work;

/* Stable counting sort: order[] of n things by class, ends[k] = first place of class k + 1 */
static int32_t *by_class(const uint8_t *class, int64_t n, int k, int32_t *order, int64_t *ends) {
    for (int i = 0; i <= k; i++) ends[i] = 0;
    if (!class || k == 1) {
        for (int i = 1; i <= k; i++) ends[i] = n;
        return 0;
    }
    for (int64_t i = 0; i < n; i++) ends[class[i] + 1]++;
    for (int i = 0; i < k; i++) ends[i + 1] += ends[i];
    int64_t next[256];
    for (int i = 0; i < k; i++) next[i] = ends[i];
    for (int64_t i = 0; i < n; i++) order[next[class[i]]++] = (int32_t)i;
    for (int64_t i = n; i < n + 8; i++) order[i] = 0; /* rac_gather reads them */
    return order;
}

/* Blocks and segments of a tile, by table; how many blocks */
static int64_t cut(work *w) {
    const rac_coding *c = w->coding;
    const int64_t *re = w->row_end, *ce = w->col_end;
    int64_t first[257] = {0}, sum[256] = {0}, blocks = 0;
    for (int pass = 0; pass < 2; pass++) {
        for (int i = 0; i < c->row_classes; i++)
            for (int j = 0; j < c->col_classes; j++) {
                const int64_t n = (re[i + 1] - re[i]) * (ce[j + 1] - ce[j]), t = c->table[i * c->col_classes + j];
                if (!n) continue;
                if (pass) w->blocks[first[t]++] = (rac_block){t, re[i], re[i + 1], ce[j], ce[j + 1]};
                else {
                    first[t + 1]++;
                    sum[t] += n;
                    blocks++;
                }
            }
        for (int t = 0; !pass && t < 256; t++) first[t + 1] += first[t];
    }
    w->nseg = w->coded = 0;
    for (int t = 0; t < 256; t++) {
        if (!sum[t]) continue;
        w->elements[w->nseg] = sum[t];
        w->seg[w->nseg] = (rac_segment){(sum[t] + c->per - 1) / c->per, t};
        w->coded += w->seg[w->nseg++].symbols;
    }
    return blocks;
}

/* Words, base symbols and coded symbols of a tile in sequence order */
static void sequence(work *w, const rac_piece *p) {
    const rac_coding *c = w->coding;
    const int32_t *row = by_class(p->row_class, p->rows, c->row_classes, w->row, w->row_end);
    const int32_t *col = by_class(p->col_class, p->cols, c->col_classes, w->col, w->col_end);
    const int64_t blocks = cut(w);
    w->n = p->rows * p->cols;
    w->in = p->words;
    if (row || col || p->stride != p->cols) {
        gather[w->kind](p->words, p->stride, row, col, w->blocks, blocks, w->flat);
        w->in = w->flat;
    }
    w->base = w->in;
    if (c->lut) {
        symbols[w->kind](w->in, w->n, c->zero, c->sign, c->shift, c->lut, w->made);
        w->base = w->made;
    }
    w->sym = w->base;
    if (c->per == 1) return;
    const uint8_t *s = w->base;
    uint8_t *out = w->pairs;
    w->sym = out;
    for (int64_t k = 0; k < w->nseg; s += w->elements[k++]) {
        const int64_t n = w->elements[k];
        for (int64_t i = 0; i < n / 2; i++) out[i] = (uint8_t)(s[2 * i] | s[2 * i + 1] << 4);
        if (n & 1) out[n / 2] = s[n - 1];
        out += w->seg[k].symbols;
    }
}

enum { SIDE = 1 << 19 }; /* words of tiles that are packed side by side, about */

/* Room for the largest of n tiles, `side` times; null where there is not enough */
static work *prepare(const rac_coding *c, const rac_piece *p, int64_t n, int64_t *side) {
    int64_t most = 1, rows = 0, cols = 0;
    for (int64_t i = 0; i < n; i++) {
        most = p[i].rows * p[i].cols > most ? p[i].rows * p[i].cols : most;
        rows = p[i].rows > rows ? p[i].rows : rows;
        cols = p[i].cols > cols ? p[i].cols : cols;
    }
    *side = least(*side, least(n, 1 + SIDE / most));
    const int64_t room = most + 256 + 2 * c->lanes + 16;
    const int64_t blocks = least((int64_t)c->row_classes * c->col_classes, most) * (int64_t)sizeof(rac_block);
    const int64_t sizes[] = {most * c->word, most, most / 2 + 257, 4 * room, blocks, 4 * rows, 4 * cols};
    int64_t at[8] = {0};
    for (int k = 0; k < 7; k++) at[k + 1] = at[k] + up16(sizes[k] + 64);
    uint8_t *all = malloc((size_t)(up16(*side * (int64_t)sizeof(work)) + *side * at[7]));
    if (!all) return 0;
    work *w = (work *)(void *)all;
    all += up16(*side * (int64_t)sizeof(work));
    for (int64_t i = 0; i < *side; i++, all += at[7]) {
        w[i].coding = c;
        w[i].kind = c->word == 1 ? 0 : c->word == 2 ? 1 : c->word == 4 ? 2 : 3;
        w[i].flat = all;
        w[i].made = all + at[1];
        w[i].pairs = all + at[2];
        w[i].words = (uint32_t *)(void *)(all + at[3]) + room;
        w[i].blocks = (rac_block *)(void *)(all + at[4]);
        w[i].row = (int32_t *)(void *)(all + at[5]);
        w[i].col = (int32_t *)(void *)(all + at[6]);
    }
    return w;
}

/* counts[table][symbol] += 1 for the coded symbols of n tiles, (tables, 256); 0, or -2: not enough memory */
int rac_count(const rac_coding *coding, const rac_piece *piece, int64_t n, uint32_t *counts) {
    int64_t side = 1;
    work *w = prepare(coding, piece, n, &side);
    if (!w) return -2;
    for (int64_t i = 0; i < n; i++) {
        sequence(w, piece + i);
        const uint8_t *s = w->sym;
        for (int64_t k = 0; k < w->nseg; s += w->seg[k++].symbols) {
            uint32_t t[3][256], *c = counts + 256 * w->seg[k].table; /* or equal neighbours wait for each other */
            memset(t, 0, sizeof t);
            int64_t j = 0;
            for (; j + 4 <= w->seg[k].symbols; j += 4) {
                c[s[j]]++;
                for (int q = 0; q < 3; q++) t[q][s[j + 1 + q]]++;
            }
            for (; j < w->seg[k].symbols; j++) c[s[j]]++;
            for (int q = 0; q < 256; q++) c[q] += t[0][q] + t[1][q] + t[2][q];
        }
    }
    free(w);
    return 0;
}

/* Top of element i of the tile */
static uint32_t top_of(const work *w, int64_t i) {
    const rac_coding *c = w->coding;
    uint64_t v = 0;
    memcpy(&v, w->in + i * c->word, (size_t)c->word);
    v >>= c->zero;
    if (c->sign) v &= (1ull << (8 * c->word - c->zero - 1)) - 1;
    return (uint32_t)(v >> c->shift);
}

#ifdef AVX512
/* The symbols i of 64 whose flag[symbol] is not 0, by the table of which as bits, 256 */
__attribute__((target("avx512vbmi"))) static uint64_t flagged(const uint8_t *s, int64_t n, const uint8_t *flag) {
    const __m512i x = _mm512_maskz_loadu_epi8(n >= 64 ? ~0ull : (1ull << n) - 1, s);
    const __m512i low = _mm512_permutex2var_epi8(_mm512_loadu_si512(flag), x, _mm512_loadu_si512(flag + 64));
    const __m512i high = _mm512_permutex2var_epi8(_mm512_loadu_si512(flag + 128), x, _mm512_loadu_si512(flag + 192));
    const __m512i f = _mm512_mask_blend_epi8(_mm512_movepi8_mask(x), low, high);
    return _mm512_test_epi8_mask(f, f) & (n >= 64 ? ~0ull : (1ull << n) - 1);
}
static int quick(void) { return __builtin_cpu_supports("avx512vbmi"); }
#else
#define quick() 0
#define flagged(s, n, flag) 0ull
#endif

/* The first symbol from i on, below n, whose flag is not 0, or n */
static int64_t next_escape(const uint8_t *s, int64_t i, int64_t n, const uint8_t *flag, int fast) {
    for (; fast && i < n; i += 64) {
        const uint64_t found = flagged(s + i, n - i, flag);
        if (found) return i + __builtin_ctzll(found);
    }
#ifdef NEON
    const table256 t = table256_at(flag);
    while (i + 16 <= n && !vmaxvq_u8(look256(&t, vld1q_u8(s + i)))) i += 16;
#endif
    while (i < n && !flag[s[i]]) i++;
    return least(i, n);
}

/* Escape bytes of the tile, in sequence order; how many */
static int64_t escapes(const work *w, uint8_t *out) {
    const rac_coding *c = w->coding;
    const uint8_t *s = w->sym;
    const int fast = quick();
    int64_t n = 0;
    for (int64_t k = 0, e = 0; k < w->nseg; s += w->seg[k].symbols, e += w->elements[k++]) {
        const uint8_t *flag = c->escaping + 256 * w->seg[k].table;
        const int64_t end = w->seg[k].symbols;
        for (int64_t i = next_escape(s, 0, end, flag, fast); i < end; i = next_escape(s, i + 1, end, flag, fast))
            for (int64_t j = i * c->per; j < least((i + 1) * c->per, w->elements[k]); j++) {
                const int b = flag[s[i]] == 2 ? c->first : w->base[e + j];
                if (b >= c->first) out[n++] = (uint8_t)(top_of(w, e + j) - c->bases[b - c->first]);
            }
    }
    return n;
}

/* `size` bytes, and zeros up to the next multiple of 16 */
static uint8_t *put(uint8_t *to, const void *from, int64_t size) {
    if (from) memcpy(to, from, (size_t)size);
    memset(to + size, 0, (size_t)(up16(size) - size));
    return to + up16(size);
}

/* Unit of a tile, the first of whose words is at `words`, to `unit`; its bytes, or -1: `left` bytes do not suffice */
static int64_t unit_of(work *w, const uint32_t *words, uint8_t *unit, int64_t left) {
    const rac_coding *c = w->coding;
    const int64_t found = w->words - words;
    const int64_t directory = 4 + c->skip + 2 * c->lanes, raw = c->shift + c->sign;
    int64_t start[6], sizes[6], all = 0;
    int k = 0;
    for (int b = 32; b; b >>= 1)
        if (raw & b) {
            start[k] = all;
            sizes[k] = (w->n * b + 7) / 8;
            all += up16(sizes[k++]);
        }
    if (up16(directory) + up16(4 * found) + w->n + 16 + all > left) return -1;
    uint8_t *at = put(unit, 0, directory);
    at = put(at, words, 4 * found);
    const int64_t escaped = escapes(w, at);
    at = put(at, 0, escaped);
    for (int j = 0; j < k; j++) put(at + start[j], 0, sizes[j]);
    planes[w->kind](w->in, w->n, c->zero, c->sign, c->shift, at, start);
    const uint32_t few = (uint32_t)escaped;
    memcpy(unit, &few, 4);
    for (int j = 0; j < k && c->skip; j++) {
        const uint32_t size = (uint32_t)sizes[j];
        memcpy(unit + 4 + 4 * j, &size, 4);
    }
    for (int64_t l = 0; l < c->lanes; l++) {
        const uint16_t count = (uint16_t)w->counts[l];
        memcpy(unit + 4 + c->skip + 2 * l, &count, 2);
    }
    return at + all - unit;
}

/* Units of n tiles one after the other to out[0..size), each a multiple of 16 bytes; planes are stored as they are. table:
 * length and XXH3-64 of each. 0, -1: they do not fit, -2: not enough memory */
int rac_pack(const rac_coding *coding, const rac_piece *piece, int64_t n, uint8_t *out, int64_t size,
             uint64_t *table) {
    rac_stream s[MOST_SIDE];
    int64_t side = rac_tiles_at_once(coding->lanes);
    work *w = prepare(coding, piece, n, &side);
    rac_step *steps = malloc((size_t)coding->tables * 256 * sizeof(rac_step));
    int bad = w && steps ? 0 : -2;
    if (!bad) rac_steps(coding->model, coding->tables, steps);
    for (int64_t i = 0, some; !bad && i < n; i += some) {
        some = least(side, n - i);
        for (int64_t k = 0; k < some; k++) {
            sequence(w + k, piece + i + k);
            s[k] = (rac_stream){w[k].sym + w[k].coded, w[k].seg, w[k].nseg, 0, w[k].words, w[k].counts};
        }
        rac_lanes_of(coding->model, steps, coding->lanes, s, some);
        for (int64_t k = 0; !bad && k < some; k++) {
            const int64_t bytes = unit_of(w + k, s[k].words, out, size);
            if (bytes < 0) {
                bad = -1;
                break;
            }
            *table++ = (uint64_t)bytes;
            *table++ = rac_xxh3(out, bytes); /* while it is near */
            out += bytes;
            size -= bytes;
        }
    }
    free(steps);
    free(w);
    return bad;
}
