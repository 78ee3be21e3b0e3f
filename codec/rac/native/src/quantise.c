/* The columns of a block to integers, each after the errors of the ones behind it are fed back
 * (linalg/triangular.py). */
#include <math.h>
#include "quantise.h"

/* The errors of the columns behind column j to its targets g */
static void feed(const rac_columns *b, int64_t j, float *g) {
    const int64_t own = b->rows / b->groups;
    for (int64_t i = j + 1; i < b->cols; i++) {
        const float *e = b->target + i * b->rows;
        for (int64_t a = 0; a < b->groups; a++) {
            const float w = b->feed[(a * b->cols + j) * b->cols + i];
            if (w == 0.0f) continue;
            for (int64_t r = a * own; r < (a + 1) * own; r++) g[r] += w * e[r];
        }
    }
}

/* The whole number nearest to 4 log2 x of x > 0, without libm, whose last bit differs between machines;
 * linalg/exact.py */
static int quarters(double x) {
    static const double eighths[4] = {0.5452538663326288, 0.6484197773255049, 0.7711054127039705, 0.9170040432046713};
    int e;
    const double m = frexp(x, &e);
    int q = 4 * e - 4;
    for (int i = 0; i < 4; i++) q += m >= eighths[i];
    return q;
}

/* 2**(e / 4), the binary32 numbers of stages/trellis.md, section 3 */
static float power(int e) {
    static const float within[4] = {1.0f, 0x1.306fe0p0f, 0x1.6a09e6p0f, 0x1.ae89fap0f};
    return ldexpf(within[e & 3], e >> 2);
}

/* Which of the levels the deviation of targets in steps falls to, of a sparse column those of what is not 0 in it; -1
 * where there is none */
static int level_of(const rac_search *s, const float *plain, const float *g, int64_t rows, float step) {
    double square = 0;
    int64_t n = s->sparse ? 0 : rows;
    for (int64_t r = 0; r < rows; r++) {
        if (s->sparse && plain[r] == 0.0f) continue;
        square += (double)g[r] * g[r];
        n += s->sparse;
    }
    const double ratio = step > 0 && n > 0 ? sqrt(square / (double)n) / step : 0;
    if (!(step > 0 && ratio > 0)) return -1;
    const int q = quarters(ratio) - s->low;
    return q < 0 ? 0 : q < s->levels ? q : s->levels - 1;
}

/* Quantises the columns of a block from the last to the first; a target that is too far out is an outlier, whose
 * value is the target itself. Returns 0, or 1 without memory. */
int rac_quantise(const rac_search *s, const rac_columns *b) {
    const int64_t m = b->rows, words = s->states < 16 ? 1 : s->states / 16, wide = 2 * s->most + 1;
    float *x = malloc((size_t)m * (4 + 16));
    const rac_room room = {x + m, malloc((size_t)m * 8), malloc((size_t)least(s->lane, m) * (size_t)words * 2)};
    int bad = !x || !room.best || !room.choice;
    for (int64_t j = b->cols - 1; j >= 0 && !bad; j--) {
        float *g = b->target + j * m, *v = b->recon + j * m;
        const float *plain = b->plain + j * m;
        feed(b, j, g);
        const int q = level_of(s, plain, g, m, b->step[j]);
        b->fine_of[j] = q < 0 ? -1 : s->fine[q];
        memset(b->wild + j * m, 0, (size_t)m);
        if (b->fine_of[j] < 0) { /* not coded: its values are 0 */
            memset(b->out + j * m, 0, (size_t)m * 2);
            memset(v, 0, (size_t)m * 4);
            memcpy(g, plain, (size_t)m * 4);
            continue;
        }
        const float unit = b->step[j] * power(-b->fine_of[j]), inverse = 1.0f / unit;
        for (int64_t r = 0; r < m; r++) x[r] = s->sparse && plain[r] == 0.0f ? 0.0f : g[r] * inverse;
        const float *rate = s->rate + (int64_t)q * s->tables * wide + s->most;
        const rac_column c = {m, m / b->groups, x, rate, b->out + j * m, v};
        if (s->below) bad = rac_shaped(s, &c);
        else rac_viterbi(s, &c, &room);
        for (int64_t r = 0; r < m; r++) {
            const int out_of_range = fabsf(x[r]) > s->far;
            b->wild[j * m + r] = (uint8_t)out_of_range;
            v[r] = out_of_range ? g[r] : v[r] * unit;
            g[r] = plain[r] - v[r];
        }
    }
    free(x);
    free(room.best);
    free(room.choice);
    return bad;
}
