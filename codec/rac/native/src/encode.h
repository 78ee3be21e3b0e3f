/* Tiles to units of lanes/1 (stages/lanes.md, "Tile unit"): what encode.c and pack.c share. */
#pragma once
#include "rac.h"

uint64_t rac_xxh3(const uint8_t *p, int64_t n);

/* Counts, lengths and tables: counts.c, classes.c, frequencies.c */
void rac_hist(const uint8_t *sym, int64_t rows, int64_t cols, const int32_t *row, const int32_t *col, int64_t size,
              uint32_t *hist);
int rac_hist_cols(const uint8_t *sym, int64_t rows, int64_t cols, int64_t stride, const uint8_t *class, int64_t k,
                  int64_t size, uint32_t *hist);
int rac_cluster(const uint32_t *hist, int64_t n, int64_t g, int64_t s, int64_t k, int64_t rounds,
                const int64_t *fraction, uint8_t *classes, int64_t *agg);
void rac_join(int64_t *agg, int64_t *size, uint8_t *alive, int64_t *groups, int64_t *own, int64_t *gain, int64_t *tmp,
              int64_t k, int64_t g, int64_t s, const int64_t *fraction, int64_t weight);
int64_t rac_log2_of(int64_t n, const int64_t *fraction);
int64_t rac_golomb(const uint16_t *freq, int64_t count, int64_t n, int order, uint8_t *out);

enum { MOST_LANES = 1024, MOST_SIDE = 32 /* tiles whose lanes are coded side by side */ };

/* What encoding a symbol takes: (2^64 - 1) / freq, start, 2^24 - freq, freq, the middle two of
 * 4096ths << 12 */
typedef struct { uint64_t reciprocal, start, complement, freq; } rac_step;

void rac_steps(const uint32_t *model, int64_t tables, rac_step *out);

/* Symbols of a tile that go to lanes, and what is left of them: they are coded from the last to the first */
typedef struct {
    const uint8_t *sym;     /* their end */
    const rac_segment *seg; /* in the order of the symbols */
    int64_t nseg, left;     /* segments, and symbols of the one behind these, which is begun; 0 at first */
    uint32_t *words;        /* their end: those of the lanes are put in front of it, at most a word for a symbol and two for a lane,
                             * of which 16 more may be written over */
    uint32_t *counts;       /* words of each lane, of `lanes` */
} rac_stream;

int64_t rac_tiles_at_once(int64_t lanes);
void rac_lanes_of(const uint32_t *model, const rac_step *steps, int64_t lanes, rac_stream *s, int64_t n);

/* What encoding the tiles of a tensor shares */
typedef struct {
    const uint8_t *lut;      /* base symbol of each top (65536); null: words are base symbols */
    const uint32_t *model;   /* (tables, 256) of each coded symbol: a base symbol, or a pair a | b << 4 of them */
    const uint8_t *escaping; /* (tables, 256): 1 where one of the base symbols escapes, 2 where all are first escapes */
    const uint8_t *table;    /* of each pair of classes */
    const uint16_t *bases;   /* of each escape */
    int32_t row_classes, col_classes, tables, lanes, per, word, zero, sign, shift, first, skip;
} rac_coding;

/* A tile of words, `stride` from row to row */
typedef struct {
    const void *words;
    const uint8_t *row_class, *col_class; /* of its rows and columns; null: one class */
    int64_t rows, cols, stride;
} rac_piece;
