/* Runs of tiles of one tensor, as they lie in the file: checksums, then jobs for rac_tiles, in one call. */
#include "tile.h"

enum { BAD_CHECK = 10 }; /* native/prototypes.py */

/* Tile i of a span, whose unit begins `from` bytes into its data and has `size` */
static rac_job job_of(const rac_span *s, int64_t i, int64_t from, int64_t size) {
    const int64_t across = (s->all.cols + s->wide - 1) / s->wide, k = s->first + i;
    const int64_t r = k / across * s->tall, c = k % across * s->wide;
    rac_job j = s->all;
    j.unit += from;
    j.size = size;
    if (j.row_class) j.row_class += r;
    if (j.col_class) j.col_class += c;
    if (j.row) j.row += r;
    if (j.col) j.col += c;
    j.rows = least(s->tall, j.rows - r);
    j.cols = least(s->wide, j.cols - c);
    /* an address, for the tile (0, 0) may lie outside the memory that is written to */
    j.dst = (void *)((uintptr_t)j.dst + (uintptr_t)((r * j.stride + c) * s->word));
    return j;
}

/* Jobs of the tiles of a span, their bytes checked; *i becomes the number of one that is wrong */
static int enter(const rac_span *s, rac_job *out, int64_t *i) {
    int64_t from = 0;
    for (*i = 0; *i < s->tiles; ++*i) {
        int64_t size = s->all.size;
        if (s->units) {
            uint64_t stated[2]; /* length and checksum */
            memcpy(stated, s->units + 16 * *i, 16);
            if (s->tiles > 1) size = stated[0] > (uint64_t)(s->all.size - from) ? -1 : (int64_t)stated[0];
            if (size < 0) return BAD_FILL;
            if (rac_xxh3(s->all.unit + from, size) != stated[1]) return BAD_CHECK;
        }
        *out++ = job_of(s, *i, from, size);
        from = least(from + up16(size), s->all.size);
    }
    return 0;
}

/* The tiles of n spans; where one is wrong, its span and its number in that to at[0] and at[1]. 0 or what is wrong */
int rac_spans(const rac_span *spans, int64_t n, int64_t *at) {
    int64_t tiles = 0, wrong = 0;
    for (int64_t k = 0; k < n; k++) tiles += spans[k].tiles;
    rac_job *jobs = malloc((size_t)tiles * sizeof *jobs + 1), *next = jobs;
    int bad = jobs ? 0 : NO_MEMORY;
    for (int64_t k = 0; k < n && !bad; next += spans[k++].tiles)
        if ((bad = enter(spans + k, next, at + 1))) at[0] = k;
    if (!bad && (bad = rac_tiles(jobs, tiles, &wrong))) {
        at[0] = 0;
        while (wrong >= spans[at[0]].tiles) wrong -= spans[at[0]++].tiles;
        at[1] = wrong;
    }
    free(jobs);
    return bad;
}
