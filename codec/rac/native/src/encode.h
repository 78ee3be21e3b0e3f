/* Tiles to units of lanes/1 (stages/lanes.md, "Tile unit"): what encode.c and pack.c share. */
#pragma once
#include "rac.h"

enum { MOST_LANES = 1024 };

/* What encoding a symbol takes: (2^64 - 1) / freq, start, 2^24 - freq, freq, the middle two of
 * 4096ths << 12 */
typedef struct { uint64_t reciprocal, start, complement, freq; } rac_step;

void rac_steps(const uint32_t *model, int64_t tables, rac_step *out);
int64_t rac_lanes_of(const uint8_t *sym, int64_t lanes, const rac_segment *seg, int64_t nseg, const uint32_t *model,
                     const rac_step *steps, uint32_t *out, int64_t size, uint32_t *counts);

/* A mask of the lowest n bits, of at most 16 */
static inline uint32_t lowest(int64_t n) { return n >= 16 ? 0xffff : n <= 0 ? 0 : (1u << n) - 1; }

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
