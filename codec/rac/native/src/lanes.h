/* ANS lanes to coded symbols (stages/lanes.md): the lanes of one tile, and several tiles of few lanes side by side. */
#ifndef RAC_LANES_H
#define RAC_LANES_H
#include "rac.h"

/* The lanes of a tile under one table */
typedef struct {
    uint64_t *st;
    uint32_t *left;              /* words of each lane */
    const uint32_t *words, *end; /* the next, and as far as memory may be read */
    const uint32_t *lut;
    uint8_t *out; /* place of the next symbol; row by row, the first of lane 0 */
    int64_t rest; /* symbols left under this table */
} rac_lanes;

enum { FEW = 16, SIDE_BY_SIDE = 16 }; /* most lanes of a tile that has few; most such tiles at once */

int rac_few(int64_t lanes);
void rac_rows(rac_lanes *t, int64_t n, int64_t lanes);
void rac_side_by_side(rac_lanes **tile, int n, int64_t lanes);
#endif
