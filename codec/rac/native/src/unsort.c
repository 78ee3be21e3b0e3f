/* Words of a tile from the order of its classes to their places, where columns have classes: sixteen- and eight-bit
 * words, with the expansions of AVX-512 (VBMI2), which its first processors lack. */
#include "tile.h"

#ifdef AVX512
/* Columns of one class among neighbours: they follow each other in the runs of that class, `offset` words from its
 * start */
typedef struct { uint64_t mask; int32_t class, offset; } piece;

enum { AHEAD = 32 }; /* rows of which the memory is fetched before they are written: tiles are narrow, rows far apart */

/* The pieces of all columns, N neighbours after N */
static void cut(const rac_job *j, int N, piece *out) {
    int64_t before[256] = {0};
    for (int64_t c = 0; c < j->cols; c += N)
        for (int k = 0; k < j->shared->col_classes; k++) {
            uint64_t mask = 0;
            for (int64_t x = c; x < j->cols && x < c + N; x++) mask |= (uint64_t)(j->col_class[x] == k) << (x - c);
            if (!mask) continue;
            *out++ = (piece){mask, k, (int32_t)before[k]};
            before[k] += __builtin_popcountll(mask);
        }
}

#define VBMI2 __attribute__((target("avx512vbmi2"))) static
#define VBMI2_INLINED __attribute__((target("avx512vbmi2"), always_inline)) static inline

VBMI2_INLINED __m512i expand(uint64_t mask, __m512i v, int size) {
    return size == 1 ? _mm512_maskz_expand_epi8(mask, v) : _mm512_maskz_expand_epi16((__mmask32)mask, v);
}

/* Words of `size` bytes, a constant, 64 bytes at a time. Row r has a run of words for each class of columns,
 * run[class of r][k]; the runs of a class of rows follow each other, `step` words from row to row. Up to 63 bytes
 * behind a run are read. */
VBMI2_INLINED void unsort(const rac_tile *w, const int64_t *step, const char **run, const piece *pieces,
                          const int size) {
    const rac_job *j = w->job;
    const int kc = j->shared->col_classes, N = 64 / size;
    const int64_t cols = j->cols, stride = w->stride * size;
    for (int64_t r = 0; r < j->rows; r++) {
        const char **p = run + (w->row ? j->row_class[r] : 0) * kc;
        char *d = (char *)w->dst + r * stride;
        const piece *q = pieces;
        for (int64_t c = 0; c < cols; c += N) {
            const uint64_t all = first_bits(least(cols - c, N));
            __m512i v = _mm512_setzero_si512();
            __builtin_prefetch(d + AHEAD * stride + c * size, 1);
            for (uint64_t have = 0; have != all; have |= q++->mask)
                v = _mm512_or_si512(v, expand(q->mask, _mm512_loadu_si512(p[q->class] + q->offset * size), size));
            if (cols - c >= N) _mm512_storeu_si512(d + c * size, v);
            else { /* the words behind are another tile's */
                char last[64];
                _mm512_storeu_si512(last, v);
                copy_run(d + c * size, last, (cols - c) * size);
            }
        }
        for (int k = 0; k < kc; k++)
            if (step[k]) p[k] += step[k] * size;
    }
}
VBMI2 void unsort1(const rac_tile *w, const int64_t *step, const char **run, const piece *p) {
    unsort(w, step, run, p, 1);
}
VBMI2 void unsort2(const rac_tile *w, const int64_t *step, const char **run, const piece *p) {
    unsort(w, step, run, p, 2);
}

int rac_has_unsort(void) { return __builtin_cpu_supports("avx512vbmi2") != 0; }

size_t rac_unsort_room(const rac_job *job) {
    const size_t runs = (size_t)job->shared->row_classes * (size_t)job->shared->col_classes;
    return runs * sizeof(char *) + (size_t)(job->cols + 64) * sizeof(piece);
}

/* `seq` to the places */
void rac_unsort(rac_tile *w) {
    const rac_job *job = w->job;
    const int kc = job->shared->col_classes, word = job->shared->word;
    const int64_t *re = w->row_end, *ce = w->col_end;
    piece *pieces = w->room;
    const char **run = (const char **)(pieces + job->cols + 64), *at = w->seq;
    int64_t step[256];
    for (const rac_block *b = w->blocks; b < w->last; b++) {
        int i = 0, k = 0;
        while (re[i + 1] <= b->r0) i++;
        while (ce[k + 1] <= b->c0) k++;
        run[i * kc + k] = at;
        at += (b->r1 - b->r0) * (b->c1 - b->c0) * word;
    }
    for (int k = 0; k < kc; k++) step[k] = ce[k + 1] - ce[k];
    cut(job, 64 / word, pieces);
    (word == 1 ? unsort1 : unsort2)(w, step, run, pieces);
}
#else
int rac_has_unsort(void) { return 0; }
void rac_unsort(rac_tile *w) { (void)w; }
size_t rac_unsort_room(const rac_job *job) { return (void)job, 0; }
#endif
