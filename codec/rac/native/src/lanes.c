/* ANS lanes to coded symbols (stages/lanes.md). Twin: rac/native/lanes.py. */
#include "tile.h"
#if defined(AVX512)
#include "lanes512.h"
#elif defined(AVX2)
#include "lanes256.h"
#elif defined(NEON)
#include "lanes128.h"
#endif

static inline uint64_t step(uint64_t x, const uint32_t *lut, uint8_t *o, const uint32_t **words, uint32_t *left) {
    const uint32_t e = lut[(x >> 12) & 4095];
    *o = (uint8_t)e;
    x = ((((x >> 24) * (e >> 20)) + ((e >> 8) & 4095)) << 12) | (x & 4095);
    if ((x >> 32) == 0 && *left) {
        x = (x << 32) | *(*words)++;
        --*left;
    }
    return x;
}

/* The next `n` symbols of any number of lanes */
static void rows_plain(rac_lanes *t, int64_t n, int64_t lanes) {
    for (; n > 0; n -= lanes)
        for (int64_t l = 0; l < lanes && l < n; l++)
            t->st[l] = step(t->st[l], t->lut, t->out++, &t->words, t->left + l);
}

/* N tiles of L lanes, `steps` rows of all. A row may read, not take, one word more than it takes. */
INLINED void rows_of(rac_lanes **tile, int64_t steps, const int N, const int L) {
    uint64_t x[64];
    uint32_t left[64];
    const uint32_t *words[4], *lut[4];
    uint8_t *out[4];
    lanes_in(tile, N, L, x, left, words, lut, out);
    for (int64_t t = 0; t < steps * L; t += L)
        _Pragma("GCC unroll 4") for (int k = 0; k < N; k++)
            _Pragma("GCC unroll 4") for (int l = 0; l < L; l++) {
                const int i = k * L + l;
                uint64_t v = x[i];
                const uint32_t e = lut[k][(v >> 12) & 4095], word = *words[k];
                out[k][t + l] = (uint8_t)e;
                v = (((v >> 24) * (e >> 20) + ((e >> 8) & 4095)) << 12) | (v & 4095);
                const uint32_t need = (v >> 32 == 0) & (left[i] != 0);
                x[i] = v << 32 * need | (word & (0 - need)); /* no branch, which would be guessed wrong */
                words[k] += need;
                left[i] -= need;
            }
    lanes_back(tile, N, L, x, left, words, out, steps * L);
}

/* Ways to step several tiles */
typedef struct { int64_t lanes; int tiles; void (*run)(rac_lanes **, int64_t); } way;
#define WAYS(W) W(4, 1) W(4, 2) W(4, 4) W(2, 1) W(2, 2) W(2, 4) W(1, 8) W(1, 16) W(1, 32) W(1, 64)
#define ROWS(n, l) static void rows_##n##x##l(rac_lanes **t, int64_t steps) { rows_of(t, steps, n, l); }
#define WAY(n, l) {l, n, rows_##n##x##l},
WAYS(ROWS)
#ifdef SIMD_WAYS
#define SIMD(n, l) static void simd_##n##x##l(rac_lanes **t, int64_t steps) { SIMD_ROWS(t, steps, n, l); }
#define SIMD_WAY(n, l) {l, n, simd_##n##x##l},
SIMD_WAYS(SIMD)
static const way ways[] = {SIMD_WAYS(SIMD_WAY) WAYS(WAY) {0}};
#else
static const way ways[] = {WAYS(WAY) {0}};
#endif

/* What steps n tiles at once, or else as many as there is something for; run is null where there is nothing */
static const way *way_of(int n, int64_t lanes) {
    const way *found = 0, *w = ways;
    for (; w->run; w++)
        if (w->lanes == lanes && (!found || (w->tiles >= n && w->tiles < found->tiles))) found = w;
    return found ? found : w;
}

/* The next `steps` rows of the first tiles of n, as many as the way takes */
static void run(const way *w, rac_lanes **tile, int n, int64_t steps) {
    rac_lanes *all[SIDE_BY_SIDE];
    for (int k = 0; k < w->tiles; k++) all[k] = tile[k < n ? k : 0]; /* one tile several times: the same is written */
    w->run(all, steps);
}

/* The next `n` symbols of one tile */
void rac_rows(rac_lanes *t, int64_t n, int64_t lanes) {
    const way *w = way_of(1, lanes);
    while (w->run) { /* a row takes at most `lanes` words, so that so many rows are safe */
        const int64_t steps = least(n / lanes, (t->end - t->words) / lanes);
        if (steps < 4) break;
        run(w, &t, 1, steps);
        n -= steps * lanes;
    }
    rows_plain(t, n, lanes);
}

/* How many tiles of so many lanes are decoded side by side, at most; 1: each alone */
int rac_abreast(int64_t lanes) {
    int64_t most = 1;
    for (const way *w = ways; w->run; w++)
        if (w->lanes == lanes && w->tiles > most) most = w->tiles;
    return (int)most;
}

/* Step n tiles until one is at the end of its table, or all but one row */
void rac_side_by_side(rac_lanes **tile, int n, int64_t lanes) {
    const way *w = way_of(n, lanes);
    const int take = !w->run ? 1 : w->tiles < n ? w->tiles : n;
    int64_t steps = w->run ? INT64_MAX : 0;
    for (int k = 0; k < take && steps; k++)
        steps = least(steps, least(tile[k]->rest / lanes, (tile[k]->end - tile[k]->words) / lanes));
    if (steps > 0) run(w, tile, take, steps);
    for (int k = 0; k < take; k++) {
        rac_lanes *t = tile[k];
        t->rest -= steps * lanes;
        if (w->run && t->rest >= lanes && t->end - t->words >= lanes) continue;
        /* the last row of a table, or words near the end of what may be read */
        const int64_t m = w->run && t->rest > lanes ? lanes : t->rest;
        rac_rows(t, m, lanes);
        t->rest -= m;
    }
}
