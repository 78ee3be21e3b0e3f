/* Tiles of words to the units of lanes/1 (stages/lanes.md, "Tile unit"), and the counts that their tables are made of.
 * Twin: rac/encode/code/lanes.py. */
#include "encode.h"

/* Of words of 1, 2, 4 and 8 bytes */
static rac_symbols *const symbols[] = {rac_symbols1, rac_symbols2, rac_symbols4, rac_symbols8};
static rac_gather *const gather[] = {rac_gather1, rac_gather2, rac_gather4, rac_gather8};
static rac_planes *const planes[] = {rac_planes1, rac_planes2, rac_planes4, rac_planes8};

/* Room for the largest tile, and what is known of the one at hand */
typedef struct {
    const rac_coding *coding;
    int kind;              /* of its words, see above */
    rac_step *steps;       /* of the model */
    uint8_t *flat, *made;  /* words and base symbols in sequence order */
    uint8_t *pairs;        /* of these */
    uint32_t *words;       /* of the lanes */
    int64_t room;          /* for how many */
    rac_block *blocks;
    int32_t *row, *col;
    const uint8_t *in;     /* words in sequence order: `flat`, or the tile itself */
    const uint8_t *base;   /* base symbols: `made`, or the words */
    const uint8_t *sym;    /* coded symbols: `pairs`, or base symbols */
    int64_t n, coded;      /* elements, coded symbols */
    int64_t nseg;
    rac_segment seg[256];
    int64_t elements[256]; /* of the segments */
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
static int64_t cut(work *w, const int64_t *re, const int64_t *ce) {
    const rac_coding *c = w->coding;
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
    int64_t re[257], ce[257];
    const int32_t *row = by_class(p->row_class, p->rows, c->row_classes, w->row, re);
    const int32_t *col = by_class(p->col_class, p->cols, c->col_classes, w->col, ce);
    const int64_t blocks = cut(w, re, ce);
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

static void give_back(work *w) {
    free(w->steps);
    free(w->flat);
}

/* Room for the largest of n tiles; 0 where there is not enough */
static int prepare(work *w, const rac_coding *c, const rac_piece *p, int64_t n) {
    int64_t most = 0, rows = 0, cols = 0;
    for (int64_t i = 0; i < n; i++) {
        most = p[i].rows * p[i].cols > most ? p[i].rows * p[i].cols : most;
        rows = p[i].rows > rows ? p[i].rows : rows;
        cols = p[i].cols > cols ? p[i].cols : cols;
    }
    w->coding = c;
    w->kind = c->word == 1 ? 0 : c->word == 2 ? 1 : c->word == 4 ? 2 : 3;
    w->room = most + 256 + 2 * c->lanes + 16;
    const int64_t blocks = least((int64_t)c->row_classes * c->col_classes, most) * (int64_t)sizeof(rac_block);
    const int64_t sizes[] = {most * c->word, most, most / 2 + 257, 4 * w->room, blocks, 4 * rows, 4 * cols};
    int64_t at[8] = {0};
    for (int k = 0; k < 7; k++) at[k + 1] = at[k] + up16(sizes[k] + 64);
    w->steps = malloc((size_t)c->tables * 256 * sizeof(rac_step));
    w->flat = malloc((size_t)at[7]);
    if (!w->steps || !w->flat) return 0;
    w->made = w->flat + at[1];
    w->pairs = w->flat + at[2];
    w->words = (uint32_t *)(void *)(w->flat + at[3]);
    w->blocks = (rac_block *)(void *)(w->flat + at[4]);
    w->row = (int32_t *)(void *)(w->flat + at[5]);
    w->col = (int32_t *)(void *)(w->flat + at[6]);
    return 1;
}

/* counts[table][symbol] += 1 for the coded symbols of n tiles, (tables, 256); 0, or -2: not enough memory */
int rac_count(const rac_coding *coding, const rac_piece *piece, int64_t n, uint32_t *counts) {
    work w;
    if (!prepare(&w, coding, piece, n)) {
        give_back(&w);
        return -2;
    }
    for (int64_t i = 0; i < n; i++) {
        sequence(&w, piece + i);
        const uint8_t *s = w.sym;
        for (int64_t k = 0; k < w.nseg; s += w.seg[k++].symbols) {
            uint32_t t[3][256], *c = counts + 256 * w.seg[k].table; /* or equal neighbours wait for each other */
            memset(t, 0, sizeof t);
            int64_t j = 0;
            for (; j + 4 <= w.seg[k].symbols; j += 4) {
                c[s[j]]++;
                for (int q = 0; q < 3; q++) t[q][s[j + 1 + q]]++;
            }
            for (; j < w.seg[k].symbols; j++) c[s[j]]++;
            for (int q = 0; q < 256; q++) c[q] += t[0][q] + t[1][q] + t[2][q];
        }
    }
    give_back(&w);
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

/* Escape bytes of the tile, in sequence order; how many */
static int64_t escapes(const work *w, uint8_t *out) {
    const rac_coding *c = w->coding;
    const uint8_t *s = w->sym;
    int64_t n = 0;
    for (int64_t k = 0, e = 0; k < w->nseg; e += w->elements[k++]) {
        const uint8_t *flag = c->escaping + 256 * w->seg[k].table;
        for (int64_t i = 0; i < w->seg[k].symbols; i++, s++) {
            if (!flag[*s]) continue;
            for (int64_t j = i * c->per; j < least((i + 1) * c->per, w->elements[k]); j++) {
                const int b = flag[*s] == 2 ? c->first : w->base[e + j];
                if (b >= c->first) out[n++] = (uint8_t)(top_of(w, e + j) - c->bases[b - c->first]);
            }
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

/* Unit of the tile at hand to `unit`; its bytes, or -1: words and `left` bytes do not suffice */
static int64_t unit_of(work *w, uint8_t *unit, int64_t left) {
    const rac_coding *c = w->coding;
    const int64_t found = rac_lanes_of(w->sym, c->lanes, w->seg, w->nseg, c->model, w->steps, w->words, w->room, w->counts);
    const int64_t directory = 4 + c->skip + 2 * c->lanes, raw = c->shift + c->sign;
    int64_t start[6], sizes[6], all = 0;
    int k = 0;
    for (int b = 32; b; b >>= 1)
        if (raw & b) {
            start[k] = all;
            sizes[k] = (w->n * b + 7) / 8;
            all += up16(sizes[k++]);
        }
    if (found < 0 || up16(directory) + up16(4 * found) + w->n + 16 + all > left) return -1;
    uint8_t *at = put(unit, 0, directory);
    at = put(at, w->words + w->room - found, 4 * found);
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

/* Units of n tiles one after the other to out[0..size), each a multiple of 16 bytes, which sizes[i] gets; planes are
 * stored as they are. 0, -1: they do not fit, -2: not enough memory */
int rac_pack(const rac_coding *coding, const rac_piece *piece, int64_t n, uint8_t *out, int64_t size, int64_t *sizes) {
    work w;
    int bad = prepare(&w, coding, piece, n) ? 0 : -2;
    if (!bad) rac_steps(coding->model, coding->tables, w.steps);
    for (int64_t i = 0; !bad && i < n; i++) {
        sequence(&w, piece + i);
        sizes[i] = unit_of(&w, out, size);
        if (sizes[i] < 0) bad = -1;
        out += sizes[i];
        size -= sizes[i];
    }
    give_back(&w);
    return bad;
}
