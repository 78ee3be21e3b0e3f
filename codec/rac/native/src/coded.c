/* Products of float32 inputs with weights of a byte or two: int8 codes with scales of rows and columns, or words of
 * BF16. The weights are those that a decoder makes, rounded as it rounds them; each sum has 16 parts, part i the
 * terms k = i, i + 16, ... one after the other, that are then added in pairs: the same bits on every CPU and with any
 * number of threads, for a row of the weight is one thread's. Twin: rac/native/coded.py. */
#include "coded.h"

enum { ROWS = 4, PARTS = 16, DEEP = 256, MANY = 32 }; /* rows, parts; columns and inputs at once */
enum { FAR = 8192, PIECE = 1 << 17 };                   /* bytes: asked for ahead; of a turn of a thread */
#if defined(AVX512)
enum { REGISTER = 64 };
#elif defined(AVX2)
enum { REGISTER = 32 };
#else
enum { REGISTER = 16 };
#endif
enum { LANES = REGISTER / 4, REGISTERS = PARTS / LANES };
typedef float reg __attribute__((vector_size(REGISTER), aligned(4), may_alias));
typedef uint32_t ureg __attribute__((vector_size(REGISTER), aligned(4), may_alias));
typedef int32_t ireg __attribute__((vector_size(REGISTER), aligned(4), may_alias));
typedef float four __attribute__((vector_size(16), aligned(4), may_alias));
typedef struct { reg at[REGISTERS]; } sixteen;

/* LANES codes as numbers */
INLINED reg numbers_of(const int8_t *p) {
#if defined(AVX512)
    return (reg)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const void *)p)));
#elif defined(AVX2)
    return (reg)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const void *)p)));
#else
    const ireg v = {p[0], p[1], p[2], p[3]};
    return __builtin_convertvector(v, reg);
#endif
}

/* LANES words as numbers */
INLINED reg words_of(const uint16_t *p) {
#if defined(AVX512)
    return (reg)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const void *)p)), 16);
#elif defined(AVX2)
    return (reg)_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const void *)p)), 16);
#elif defined(NEON)
    return (reg)vshll_n_u16(vld1_u16(p), 16);
#else
    const ureg v = {p[0], p[1], p[2], p[3]};
    return (reg)(v << 16);
#endif
}

/* Weights k..k + 15 of a row that begins at `row`; `column` are the scales from k on */
INLINED sixteen weights(int kind, const void *row, int64_t k, const float *column, float scale) {
    sixteen w;
    for (int i = 0; i < REGISTERS; i++) {
        if (kind == WORDS) {
            w.at[i] = words_of((const uint16_t *)row + k + i * LANES);
            continue;
        }
        w.at[i] = numbers_of((const int8_t *)row + k + i * LANES) * *(const reg *)(column + i * LANES) * scale;
        if (kind == ROUNDED) {
            /* to the 8 bits of BF16, ties to even (Veltkamp), where nothing is subnormal or overflows: in fewer steps
             * than with integers */
            const reg up = w.at[i] * 65537;
            w.at[i] = up - (up - w.at[i]);
        }
    }
    return w;
}

INLINED void add(sixteen *sum, const sixteen *w, const float *x) {
    for (int i = 0; i < REGISTERS; i++) sum->at[i] += w->at[i] * *(const reg *)(x + i * LANES);
}

INLINED void store(float *to, const sixteen *v) {
    for (int i = 0; i < REGISTERS; i++) *(reg *)(to + i * LANES) = v->at[i];
}

INLINED sixteen load(const float *from) {
    sixteen v;
    for (int i = 0; i < REGISTERS; i++) v.at[i] = *(const reg *)(from + i * LANES);
    return v;
}

INLINED float total(const float *parts) {
    const four *p = (const four *)parts;
    const four s = (p[0] + p[2]) + (p[1] + p[3]);
    return (s[0] + s[2]) + (s[1] + s[3]);
}

/* Columns from..to of ROWS rows, as the 16 from a multiple of 16 on; those behind `in` are zeros of a copy */
typedef struct {
    const char *row[ROWS];
    float scale[ROWS];
} block;

typedef struct {
    char row[ROWS][2 * PARTS];
    float column[PARTS];
} tail;

INLINED int64_t width(int kind) { return kind == WORDS ? 2 : 1; }

INLINED block behind(int kind, const rac_coded *w, const block *b, tail *copy) {
    const int64_t whole = w->in / PARTS * PARTS, rest = w->in - whole;
    block out = *b;
    memset(copy, 0, sizeof *copy);
    for (int r = 0; r < ROWS; r++) {
        memcpy(copy->row[r], b->row[r] + whole * width(kind), (size_t)(rest * width(kind)));
        out.row[r] = copy->row[r];
    }
    if (kind != WORDS) memcpy(copy->column, w->columns + whole, (size_t)rest * 4);
    return out;
}

/* y[r] of one input */
INLINED void one(int kind, const rac_coded *w, const block *b, const float *x, float *y) {
    const int64_t whole = w->in / PARTS * PARTS;
    sixteen sum[ROWS];
    memset(sum, 0, sizeof sum);
    for (int64_t k = 0; k < whole; k += PARTS) {
        /* the ROWS rows lie side by side, so that this meets each line of the memory that comes next once */
        for (int i = 0; i < width(kind); i++) __builtin_prefetch(b->row[0] + (k * width(kind) + i * PARTS) * ROWS + FAR);
        for (int r = 0; r < ROWS; r++) {
            const sixteen v = weights(kind, b->row[r], k, w->columns + k, b->scale[r]);
            add(sum + r, &v, x + k);
        }
    }
    if (whole < w->in) {
        tail copy;
        float last[PARTS] = {0};
        const block at = behind(kind, w, b, &copy);
        memcpy(last, x + whole, (size_t)(w->in - whole) * 4);
        for (int r = 0; r < ROWS; r++) {
            const sixteen v = weights(kind, at.row[r], 0, copy.column, b->scale[r]);
            add(sum + r, &v, last);
        }
    }
    for (int r = 0; r < ROWS; r++) {
        float parts[PARTS];
        store(parts, sum + r);
        y[r] = total(parts);
    }
}

/* y[m * ROWS + r] of up to MANY inputs: DEEP columns of the weights become numbers, which every input then meets */
INLINED void several(int kind, const rac_coded *w, const block *b, const float *x, int64_t n, float *y) {
    float wide[ROWS][DEEP], sums[MANY][ROWS][PARTS];
    memset(sums, 0, (size_t)n * sizeof *sums);
    for (int64_t from = 0; from < w->in; from += DEEP) {
        const int64_t deep = least(DEEP, w->in - from), whole = deep / PARTS * PARTS;
        for (int r = 0; r < ROWS; r++)
            for (int64_t k = 0; k < whole; k += PARTS) {
                const sixteen v = weights(kind, b->row[r], from + k, w->columns + from + k, b->scale[r]);
                store(wide[r] + k, &v);
            }
        if (whole < deep) {
            tail copy;
            const block at = behind(kind, w, b, &copy);
            for (int r = 0; r < ROWS; r++) {
                const sixteen v = weights(kind, at.row[r], 0, copy.column, b->scale[r]);
                store(wide[r] + whole, &v);
            }
        }
        for (int64_t m = 0; m < n; m++) {
            const float *in = x + m * w->in + from;
            sixteen sum[ROWS];
            for (int r = 0; r < ROWS; r++) sum[r] = load(sums[m][r]);
            for (int64_t k = 0; k < whole; k += PARTS)
                for (int r = 0; r < ROWS; r++) {
                    const sixteen v = load(wide[r] + k);
                    add(sum + r, &v, in + k);
                }
            if (whole < deep) {
                float last[PARTS] = {0};
                memcpy(last, in + whole, (size_t)(deep - whole) * 4);
                for (int r = 0; r < ROWS; r++) {
                    const sixteen v = load(wide[r] + whole);
                    add(sum + r, &v, last);
                }
            }
            for (int r = 0; r < ROWS; r++) store(sums[m][r], sum + r);
        }
    }
    for (int64_t m = 0; m < n; m++)
        for (int r = 0; r < ROWS; r++) y[m * ROWS + r] = total(sums[m][r]);
}

/* Rows from..to of the weight, for inputs of a kind that is a constant */
INLINED void rows_of(int kind, const rac_coded *w, const float *x, int64_t n, float *y, int64_t from, int64_t to) {
    for (int64_t at = from; at < to; at += ROWS) {
        const int64_t rows = least(ROWS, to - at);
        block b;
        for (int64_t r = 0; r < ROWS; r++) { /* behind the last row comes the last row, whose sums are dropped */
            const int64_t row = at + least(r, rows - 1);
            b.row[r] = (const char *)w->codes + row * w->in * width(kind);
            b.scale[r] = kind == WORDS ? 1 : w->rows[row];
        }
        for (int64_t m = 0; m < n; m += MANY) {
            const int64_t inputs = least(MANY, n - m);
            float sums[MANY * ROWS];
            if (inputs == 1) one(kind, w, &b, x + m * w->in, sums);
            else several(kind, w, &b, x + m * w->in, inputs, sums);
            for (int64_t i = 0; i < inputs; i++)
                memcpy(y + (m + i) * w->out + at, sums + i * ROWS, (size_t)rows * 4);
        }
    }
}

/* What numbers apart add to rows from..to */
static void add_apart(const rac_coded *w, const float *x, int64_t n, float *y, int64_t from, int64_t to) {
    int64_t i = 0, end = w->apart;
    while (i < end) { /* the first in row `from` or behind */
        const int64_t middle = (i + end) / 2;
        if (w->places[2 * middle] < from) i = middle + 1;
        else end = middle;
    }
    for (; i < w->apart && w->places[2 * i] < to; i++)
        for (int64_t m = 0; m < n; m++)
            y[m * w->out + w->places[2 * i]] += x[m * w->in + w->places[2 * i + 1]] * w->values[i];
}

static void part(const rac_coded *w, const float *x, int64_t n, float *y, int64_t from, int64_t to) {
    if (w->kind == WORDS) rows_of(WORDS, w, x, n, y, from, to);
    else if (w->kind == ROUNDED) rows_of(ROUNDED, w, x, n, y, from, to);
    else rows_of(EXACT, w, x, n, y, from, to);
    add_apart(w, x, n, y, from, to);
}

/* A product that several threads make, in pieces of `step` rows */
typedef struct {
    const rac_coded *w;
    const float *x;
    float *y;
    int64_t n, step, pieces;
} task;

/* Do a piece that nobody has begun; 0 where there is none. `open` counts them, below the number of the product, so
 * that who looked at an earlier product takes none of this. */
static int take(rac_team *team) {
    uint64_t open = __atomic_load_n(&team->open, __ATOMIC_ACQUIRE);
    do
        if (!(uint32_t)open) return 0;
    while (!__atomic_compare_exchange_n(&team->open, &open, open - 1, 1, __ATOMIC_ACQ_REL, __ATOMIC_ACQUIRE));
    const task *t = team->task;
    const int64_t from = (t->pieces - (int64_t)(uint32_t)open) * t->step;
    part(t->w, t->x, t->n, t->y, from, least(from + t->step, t->w->out));
    __atomic_fetch_sub(&team->left, 1, __ATOMIC_RELEASE);
    return 1;
}

static void take_all(void *team) {
    while (take(team)) continue;
}

static void wait_a_little(void) {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("isb");
#endif
}

/* y (n, out) = x (n, in) W'. With a team, its threads, or those that are in
 * `rac_help`, take part. */
void rac_multiply(const rac_coded *w, const float *x, int64_t n, float *y, rac_team *team) {
    const int64_t all = w->out * w->in * width((int)w->kind), threads = team ? team->threads : 1;
    const int64_t turns = (all / threads / PIECE + 1) * threads;
    const int64_t step = ((w->out + turns - 1) / turns + ROWS - 1) / ROWS * ROWS;
    const int64_t pieces = step ? (w->out + step - 1) / step : 0;
    int free = 0;
    if (threads < 2 || pieces < 2 || pieces > INT32_MAX ||
        !__atomic_compare_exchange_n(&team->busy, &free, 1, 0, __ATOMIC_ACQUIRE, __ATOMIC_RELAXED)) {
        part(w, x, n, y, 0, w->out);
        return;
    }
    const task shared = {w, x, y, n, step, pieces};
    team->task = &shared;
    __atomic_store_n(&team->left, pieces, __ATOMIC_RELAXED);
    const uint64_t number = (__atomic_load_n(&team->open, __ATOMIC_RELAXED) >> 32) + 1;
    __atomic_store_n(&team->open, number << 32 | (uint64_t)pieces, __ATOMIC_RELEASE);
    if (team->parallel) team->parallel(take_all, team, (unsigned)threads, 0);
    else take_all(team);
    while (__atomic_load_n(&team->left, __ATOMIC_ACQUIRE)) wait_a_little();
    __atomic_store_n(&team->busy, 0, __ATOMIC_RELEASE);
}

/* Take part in products until none came for `turns` looks */
void rac_help(rac_team *team, int64_t turns) {
    for (int64_t i = 0; i < turns; i++)
        if (take(team)) i = 0;
        else wait_a_little();
}
