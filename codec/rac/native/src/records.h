/* Records of whole tensors that lie side by side in memory: their heads, and their words. */
#pragma once
#include "tile.h"

enum { RAW, ZSTD, LANES }; /* coders, native/records.py */

/* A record, as its row of the index states it */
typedef struct {
    int64_t stated, stated_size; /* in the text of the run: dtype, name and shape as its head has them */
    int64_t at;                  /* in the bytes of the run */
    int64_t head, payload;       /* bytes */
    uint64_t check;              /* of the head */
    void *out;                   /* its dense words, */
    int64_t size;                /* bytes of them, */
    int32_t word, coder;         /* and of each */
} rac_record;

/* A Zstandard frame: where it is in the bytes of the run, and bytes of what it holds; of which record */
typedef struct { int64_t at, size, holds, record; } rac_frame;

/* What the head of a record says */
typedef struct {
    int64_t rows, cols, tall, wide, tiles; /* of the matrix of words, and of a tile of it */
    int64_t payload;                       /* where that is in the bytes of the run */
    int64_t front;                         /* bytes of the unit in front of the tiles; -1: there is none */
    const uint8_t *units;                  /* of each, 8 bytes of length and 8 of checksum; points into the head */
    rac_shared shared;                     /* of lanes/1, its pointers not yet set, and the rest of its parameters: */
    int64_t tables, order, sizes[3];
    uint16_t values[256];
    uint32_t bases[256];
} rac_stated;

/* What the records of a run are read from */
typedef struct {
    const rac_record *record;
    const uint8_t *text; /* what the rows state */
    const uint8_t *data; /* `size` bytes of the file */
    int64_t size;
    int64_t tile; /* most bytes of a tile */
} rac_run;

static inline int64_t up64(int64_t n) { return (n + 63) & ~(int64_t)63; }
static inline int64_t size_of_unit(const uint8_t *units, int64_t i) {
    uint64_t size;
    memcpy(&size, units + 16 * i, 8);
    return (int64_t)size; /* rac_head has seen that it is one */
}

int rac_head(const rac_run *run, const rac_record *r, uint8_t *copy, rac_stated *s);
