/* Tiles of lanes/1 (stages/lanes.md, "Tile"): jobs, a tile that is being decoded, and its lanes. */
#pragma once
#include "rac.h"

/* What all tiles of a tensor share */
typedef struct {
    const uint32_t *luts;   /* 4096 entries per table; the symbols of pairs are a | b << 4 */
    const uint16_t *values; /* top of each base symbol (256) */
    const uint32_t *bases;  /* base of each escape */
    const uint8_t *table;   /* of each pair of classes */
    int32_t row_classes, col_classes, skip, lanes, per, word, zero, sign, shift, raw, base, first;
    uint32_t limit; /* tops are below this */
} rac_shared;

/* One tile unit to its words, or to the numbers that these stand for */
typedef struct {
    const uint8_t *unit; /* `size` bytes */
    int64_t size;
    const uint8_t *row_class, *col_class; /* of the tile's rows and columns; null: one class */
    void *dst;                            /* origin of the tile in the dense tensor */
    int64_t rows, cols, stride;           /* elements from row to row */
    const rac_shared *shared;
    const rac_dequant *numbers; /* what the words, bytes, stand for; null: they are the tile */
    const float *row, *col;     /* scales of the tile's rows and columns, where there are numbers */
} rac_job;

/* Tiles of one tensor whose numbers follow each other, and their units as they lie in the file */
typedef struct {
    rac_job all;                /* the whole tensor as if it were one tile; its unit: those of the tiles, padding between */
    const uint8_t *units;       /* of each, 8 bytes of length and 8 of checksum; null: one tile, checked before */
    int64_t first, tiles;       /* number of the first, and how many */
    int64_t tall, wide, word;   /* rows and columns of a tile; bytes of an element of dst */
} rac_span;

enum { RUNS = 4 };

/* Words of 16 bits, or upper halves of words of 32: how wide their fields are, and the tops of their symbols */
typedef struct {
    const int64_t *start; /* of their planes */
    int shift, zero, raw, sign, bf16, runs;
    uint16_t run[RUNS], gap[RUNS]; /* tops of symbols not below run[k] are higher by gap[k] */
} rac_half;

typedef struct {
    const rac_job *job;
    const rac_shared *shared;
    void *dst; /* where words go, `stride` from row to row: the dense tensor, or, */
    int64_t stride;
    uint8_t *coded; /* where they stand for numbers, here */
    const uint8_t *planes, *escape;
    const uint32_t *words, *end; /* the next word of the lanes, and as far as memory may be read */
    int64_t start[6];            /* of the planes */
    int32_t *row, *col;          /* sorted rows and columns; null: as they lie */
    rac_block *blocks, *last;    /* sorted by table: one segment each; behind the last */
    int64_t row_end[257], col_end[257]; /* of the classes */
    void *seq; /* the tile's words in sequence order, to be unsorted at the end; null: straight to dst */
    void *room; /* of rac_unsort_room bytes */
    uint32_t escapes, used;
    uint32_t pairtop[256]; /* both tops of a pair a | b << 4 */
    rac_half half;
    int fast;   /* words, or their upper halves, are joined in registers */
    int counts; /* tops of the symbols that do not escape count up */
    int bytes;  /* words are bytes, and nothing but tops that count up */
} rac_tile;

/* Where the next element of a tile goes */
typedef struct {
    const rac_block *block;
    int64_t in_block, in_tile;
} rac_cursor;

/* What is wrong with a tile (native/prototypes.py, TILE_ERRORS) */
enum { BAD_FILL = 1, BAD_PADDING, BAD_WORD, BAD_STATE, BAD_ESCAPES, BAD_TOP, BAD_PLANE, NO_MEMORY };

void rac_place1(const rac_tile *w, const uint16_t *top, int64_t n, int64_t e, int64_t at, const rac_block *b);
void rac_place2(const rac_tile *w, const uint16_t *top, int64_t n, int64_t e, int64_t at, const rac_block *b);
void rac_place4(const rac_tile *w, const uint16_t *top, int64_t n, int64_t e, int64_t at, const rac_block *b);
void rac_place8(const rac_tile *w, const uint16_t *top, int64_t n, int64_t e, int64_t at, const rac_block *b);
void rac_choose(rac_tile *w);
int rac_emit(rac_tile *w, const uint8_t *sym, int64_t n, rac_cursor *at);
void rac_unsort(rac_tile *w);
size_t rac_unsort_room(const rac_job *job); /* bytes that it needs beside seq */
int rac_has_unsort(int word); /* words of so many bytes */

/* memcpy without the call: runs are short */
static inline void copy_run(void *to, const void *from, int64_t n) {
    char *d = to;
    const char *s = from;
    for (; n >= 32; n -= 32, d += 32, s += 32) memcpy(d, s, 32);
    if (n & 16) { memcpy(d, s, 16); d += 16; s += 16; }
    if (n & 8) { memcpy(d, s, 8); d += 8; s += 8; }
    if (n & 4) { memcpy(d, s, 4); d += 4; s += 4; }
    if (n & 2) { memcpy(d, s, 2); d += 2; s += 2; }
    if (n & 1) *d = *s;
}

static inline uint64_t first_bits(int64_t n) { return n >= 64 ? ~0ull : (1ull << n) - 1; }

/* The lanes of a tile under one table */
typedef struct {
    uint64_t *st;
    uint32_t *left;              /* words of each lane */
    const uint32_t *words, *end; /* the next, and as far as memory may be read */
    const uint32_t *lut;
    uint8_t *out; /* place of the next symbol; row by row, the first of lane 0 */
    int64_t rest; /* symbols left under this table */
} rac_lanes;

/* N tiles of L lanes side by side: their states and words left behind each other, what is of a tile in arrays of its
 * own, so that a compiler keeps what it can in registers */
INLINED void lanes_in(rac_lanes **tile, const int N, const int L, uint64_t *st, uint32_t *left, const uint32_t **words,
                      const uint32_t **lut, uint8_t **out) {
    for (int k = 0; k < N; k++) {
        memcpy(st + L * k, tile[k]->st, 8 * (size_t)L);
        memcpy(left + L * k, tile[k]->left, 4 * (size_t)L);
        words[k] = tile[k]->words;
        lut[k] = tile[k]->lut;
        out[k] = tile[k]->out;
    }
}

/* The same back, `symbols` of each tile later */
INLINED void lanes_back(rac_lanes **tile, const int N, const int L, const uint64_t *st, const uint32_t *left,
                        const uint32_t **words, uint8_t **out, int64_t symbols) {
    for (int k = 0; k < N; k++) {
        memcpy(tile[k]->st, st + L * k, 8 * (size_t)L);
        memcpy(tile[k]->left, left + L * k, 4 * (size_t)L);
        tile[k]->words = words[k];
        tile[k]->out = out[k] + symbols;
    }
}

enum { FEW = 32, SIDE_BY_SIDE = 32 }; /* most lanes of a tile among others; most such tiles at once */

uint64_t rac_xxh3(const uint8_t *p, int64_t n);
int rac_tiles(const rac_job *job, int64_t n, int64_t *at);
int rac_abreast(int64_t lanes);
void rac_rows(rac_lanes *t, int64_t n, int64_t lanes);
void rac_side_by_side(rac_lanes **tile, int n, int64_t lanes);
