/* Words of a tile from the order of its classes to their places, where columns have classes: words of one, two and four
 * bytes, a vector of neighbours at a time. AVX-512 expands the columns of a class (bytes and words of two need VBMI2,
 * which its first processors lack); the others, and those, permute bytes. */
#include "simd.h"
#include "tile.h"

#ifdef WIDE
/* Columns of one class among neighbours: they follow each other in the runs of that class, `offset` bytes from its
 * start. Where they go: bytes of a vector, or a bit for each word. */
typedef struct {
    union { uint8_t byte[16]; uint64_t mask; } to;
    int32_t class, offset;
} piece;

enum { STRIP = 64, MOST = 8 }; /* rows that are done before the next neighbours; pieces of a vector in registers */

/* The pieces of the columns c and on, N neighbours; returns how many. before: of each class, so far. */
static int cut(const rac_job *j, int64_t c, int N, int size, int expand, int32_t *before, piece *out) {
    int n = 0;
    const int64_t m = least(j->cols - c, N);
    for (int64_t x = 0; x < m; x++) {
        const int class = j->col_class[c + x];
        int k = 0;
        while (k < n && out[k].class != class) k++;
        if (k == n) {
            out[n].class = class;
            out[n].offset = before[class] * size;
            memset(&out[n].to, expand ? 0 : 0xff, sizeof out->to); /* bytes of 0xff take nothing */
            n++;
        }
        if (expand) out[k].to.mask |= 1ull << x;
        else
            for (int b = 0; b < size; b++)
                out[k].to.byte[x * size + b] = (uint8_t)(before[class] * size - out[k].offset + b);
        before[class]++;
    }
    return n;
}

/* Rows of one class: `from[k]` is the first of piece k, step[k] bytes from row to row */
typedef struct {
    const char *from[MOST];
    int64_t step[MOST];
    const piece *p;
    char *to; /* column of the vector in row 0 */
    const int32_t *row; /* the rows */
    int64_t rows, stride, bytes; /* of the vector, as many as there are columns */
    int more; /* the vector has other pieces already */
} strip;


/* N pieces, a constant, by permutations of 16 bytes */
INLINED void permuted(strip *s, const int N) {
#ifdef NEON
#define V uint8x16_t
#define ADD(v, x, to) vqtbx1q_u8(v, x, to)
#define LOAD(p) vld1q_u8((const uint8_t *)(p))
#define NONE vdupq_n_u8(0)
#define STORE(p, v) vst1q_u8((uint8_t *)(p), v)
#else
#define V __m128i
#define ADD(v, x, to) _mm_or_si128(v, _mm_shuffle_epi8(x, to))
#define LOAD(p) _mm_loadu_si128((const void *)(p))
#define NONE _mm_setzero_si128()
#define STORE(p, v) _mm_storeu_si128((void *)(p), v)
#endif
    V to[MOST];
    const char *from[MOST];
    int64_t step[MOST];
    const int64_t rows = s->rows, stride = s->stride, bytes = s->bytes; /* what is stored may be anything, for all that */
    char *const base = s->to;                                           /* the compiler knows */
    const int32_t *const row = s->row;
    for (int k = 0; k < N; k++) {
        to[k] = LOAD(s->p[k].to.byte);
        from[k] = s->from[k];
        step[k] = s->step[k];
    }
#define SUM                                                                                                            \
    _Pragma("GCC unroll 8") for (int k = 0; k < N; k++) {                                                              \
        v = ADD(v, LOAD(from[k]), to[k]);                                                                              \
        from[k] += step[k];                                                                                            \
    }
    if (bytes == 16 && !s->more)
        for (int64_t r = 0; r < rows; r++) {
            V v = NONE;
            SUM
            STORE(base + row[r] * stride, v);
        }
    else /* the words behind are another tile's */
        for (int64_t r = 0; r < rows; r++) {
            char last[32] = {0};
            if (s->more) memcpy(last, base + row[r] * stride, (size_t)bytes);
            V v = LOAD(last);
            SUM
            STORE(last, v);
            copy_run(base + row[r] * stride, last, bytes);
        }
#undef SUM
#undef V
#undef ADD
#undef LOAD
#undef NONE
#undef STORE
}

#define PERMUTED(n) static void permuted##n(strip *s) { permuted(s, n); }
#define EACH(F) F(1) F(2) F(3) F(4) F(5) F(6) F(7) F(8)
#define ENTRY(n) permuted##n,
EACH(PERMUTED)
static void (*const permute[])(strip *) = {EACH(ENTRY)};

#ifdef AVX512
#define VBMI2 __attribute__((target("avx512vbmi2")))
#define VBMI2_INLINED VBMI2 __attribute__((always_inline)) static inline
VBMI2_INLINED __m512i spread(uint64_t mask, const char *p, const int size) {
    const __m512i v = _mm512_loadu_si512(p);
    if (size == 1) return _mm512_maskz_expand_epi8(mask, v);
    return size == 2 ? _mm512_maskz_expand_epi16((__mmask32)mask, v) : _mm512_maskz_expand_epi32((__mmask16)mask, v);
}
VBMI2_INLINED void expanded(strip *s, const int N, const int size) {
    const char *from[MOST];
    uint64_t mask[MOST];
    int64_t step[MOST];
    const uint64_t all = first_bits(s->bytes);
    const int64_t rows = s->rows, stride = s->stride, bytes = s->bytes;
    char *const base = s->to;
    const int32_t *const row = s->row;
    const int more = s->more;
    for (int k = 0; k < N; k++) {
        mask[k] = s->p[k].to.mask;
        from[k] = s->from[k];
        step[k] = s->step[k];
    }
    for (int64_t r = 0; r < rows; r++) {
        char *d = base + row[r] * stride;
        __m512i v = more ? _mm512_maskz_loadu_epi8(all, d) : _mm512_setzero_si512();
        _Pragma("GCC unroll 8") for (int k = 0; k < N; k++) {
            v = _mm512_or_si512(v, spread(mask[k], from[k], size));
            from[k] += step[k];
        }
        if (bytes == 64) _mm512_storeu_si512(d, v);
        else if (bytes == 32) _mm256_storeu_si256((void *)d, _mm512_castsi512_si256(v));
        else _mm512_mask_storeu_epi8(d, all, v);
    }
}
#define EXPANDED(n)                                                                                                    \
    VBMI2 static void expanded1_##n(strip *s) { expanded(s, n, 1); }                                                   \
    VBMI2 static void expanded2_##n(strip *s) { expanded(s, n, 2); }                                                   \
    VBMI2 static void expanded4_##n(strip *s) { expanded(s, n, 4); }
#define ENTRY1(n) expanded1_##n,
#define ENTRY2(n) expanded2_##n,
#define ENTRY4(n) expanded4_##n,
EACH(EXPANDED)
static void (*const expand[3][MOST])(strip *) = {{EACH(ENTRY1)}, {EACH(ENTRY2)}, {EACH(ENTRY4)}};
static int expands(void) { return __builtin_cpu_supports("avx512vbmi2") != 0; }
#else
static int expands(void) { return 0; }
#endif

int rac_has_unsort(int word) { return word <= 4; }

/* At most so many pieces */
static int64_t pieces(const rac_job *job, int vector) {
    const int64_t N = vector / job->shared->word;
    return (job->cols + N - 1) / N * least(N, job->shared->col_classes);
}
size_t rac_unsort_room(const rac_job *job) {
    const int64_t runs = job->shared->row_classes * (int64_t)job->shared->col_classes;
    return (size_t)(runs * 8 + pieces(job, 16) * (int64_t)sizeof(piece) + (job->cols + 1) * 4);
}

/* The rows of class i in strips: every vector of a strip before the next */
static void rows_of_class(const rac_tile *w, int i, const char **run, const int64_t *step, const piece *p,
                          const int32_t *each, int vector) {
    const int size = w->shared->word;
    const int64_t bytes = w->job->cols * size;
    const int64_t rows = w->job->rows;
    int32_t row[2 * STRIP];
    for (int64_t r = w->row_end[i]; r < w->row_end[i + 1]; r += STRIP) {
        const piece *q = p;
        for (int k = 0; k < 2 * STRIP; k++) row[k] = (int32_t)(r + k);
        strip s = {.row = w->row ? w->row + r : row, .rows = least(w->row_end[i + 1] - r, STRIP), .stride = w->stride * size};
        for (int64_t v = 0; v * vector < bytes; v++) {
            s.to = (char *)w->dst + v * vector;
            s.bytes = least(bytes - v * vector, vector);
            s.more = 0;
            if (v * vector % 64 == 0 && (!w->row || r + 2 * STRIP <= rows)) /* the next strip */
                for (int k = 0; k < STRIP; k++) __builtin_prefetch(s.to + s.row[STRIP + k] * s.stride, 1);
            for (int left = each[v]; left;) {
                const int n = (int)least(left, MOST);
                for (int k = 0; k < n; k++) {
                    s.from[k] = run[q[k].class] + (r - w->row_end[i]) * step[q[k].class] + q[k].offset;
                    s.step[k] = step[q[k].class];
                }
                s.p = q;
#ifdef AVX512
                if (vector == 64) expand[size >> 1][n - 1](&s);
                else
#endif
                    permute[n - 1](&s);
                s.more = 1;
                left -= n;
                q += n;
            }
        }
    }
}

/* `seq` to the places */
void rac_unsort(rac_tile *w) {
    const rac_job *job = w->job;
    const int kr = job->shared->row_classes, kc = job->shared->col_classes, size = job->shared->word;
    const int vector = expands() ? 64 : 16, N = vector / size;
    const int64_t *re = w->row_end, *ce = w->col_end;
    const char **run = w->room, *at = w->seq;
    piece *all = (piece *)(run + kr * kc), *p = all;
    int32_t *each = (int32_t *)(all + pieces(job, 16)), before[256] = {0};
    int64_t step[256];
    for (const rac_block *b = w->blocks; b < w->last; b++) {
        int i = 0, k = 0;
        while (re[i + 1] <= b->r0) i++;
        while (ce[k + 1] <= b->c0) k++;
        run[i * kc + k] = at;
        at += (b->r1 - b->r0) * (b->c1 - b->c0) * size;
    }
    for (int k = 0; k < kc; k++) step[k] = (ce[k + 1] - ce[k]) * size;
    for (int64_t c = 0, v = 0; c < job->cols; c += N, v++)
        p += each[v] = cut(job, c, N, size, vector == 64, before, p);
    for (int i = 0; i < (w->row ? kr : 1); i++) rows_of_class(w, i, run + i * kc, step, all, each, vector);
}
#else
int rac_has_unsort(int word) { return (void)word, 0; }
void rac_unsort(rac_tile *w) { (void)w; }
size_t rac_unsort_room(const rac_job *job) { return (void)job, 0; }
#endif
