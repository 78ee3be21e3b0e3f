/* Exact lengths of tables and symbols, and the joining of classes. Twins: rac/encode/code/classes.py. */
#include "rac.h"

/* Counts of k classes, each g tables of s symbols, and what their lengths are computed with */
typedef struct {
    int64_t g, s;
    const int64_t *fraction; /* 2048 fractions of the logarithm */
    int64_t weight;          /* of the length of a table */
    int64_t *sum;            /* scratch (g, s) */
} counts_of;

static inline int64_t log2_1024(int64_t n, const int64_t *fraction) {
    if (n <= 0) return 0;
    const int e = 63 - __builtin_clzll((unsigned long long)n);
    return ((int64_t)e << 10) + fraction[(e < 11 ? n << (11 - e) : n >> (e - 11)) & 2047];
}

static int64_t length_of(const int64_t *counts, const counts_of *t) {
    int64_t total = 0, data = 0, table = 1536 * t->s;
    for (int64_t i = 0; i < t->s; i++) total += counts[i];
    const int64_t whole = total > 1 ? total : 1;
    for (int64_t i = 0; i < t->s; i++) {
        data += counts[i] * log2_1024(counts[i], t->fraction);
        table += log2_1024(1 + counts[i] * 4096 / whole, t->fraction) / 2;
    }
    return total * log2_1024(total, t->fraction) - data + t->weight * table;
}

/* Length in 2^-10 bit of the symbols and `weight` times their table, for n rows of s counts */
void rac_code_length(const int64_t *counts, int64_t n, int64_t s, const int64_t *fraction, int64_t weight, int64_t *out) {
    const counts_of t = {1, s, fraction, weight, 0};
    for (int64_t k = 0; k < n; k++) out[k] = length_of(counts + k * s, &t);
}

void rac_log2(const int64_t *n, int64_t count, const int64_t *fraction, int64_t *out) {
    for (int64_t i = 0; i < count; i++) out[i] = log2_1024(n[i], fraction);
}

static int64_t class_length(const int64_t *c, const counts_of *t) {
    int64_t sum = 0;
    for (int64_t i = 0; i < t->g; i++) sum += length_of(c + i * t->s, t);
    return sum;
}

/* One of the classes to be joined: its counts, its length, how many rows or columns it has */
typedef struct { const int64_t *counts; int64_t length, members; } one;

/* What joining two classes saves */
static int64_t gain_of(one a, one b, const counts_of *t) {
    for (int64_t i = 0; i < t->g * t->s; i++) t->sum[i] = a.counts[i] + b.counts[i];
    const int64_t both = a.members + b.members;
    const int64_t lists = both * log2_1024(both, t->fraction) - a.members * log2_1024(a.members, t->fraction) -
                          b.members * log2_1024(b.members, t->fraction);
    return a.length + b.length - class_length(t->sum, t) + lists;
}

/* Join classes as long as that saves anything, those first that save the most: agg (k, g, s), size (k) and own (k) are
 * overwritten, groups (k) names the class that each has become; gain (k, k) and tmp (g, s) are scratch */
void rac_join(int64_t *agg, int64_t *size, uint8_t *alive, int64_t *groups, int64_t *own, int64_t *gain, int64_t *tmp,
              int64_t k, int64_t g, int64_t s, const int64_t *fraction, int64_t weight) {
    const counts_of t = {g, s, fraction, weight, tmp};
    const int64_t n = g * s, never = INT64_MIN;
    int64_t left = 0;
#define ONE(i) ((one){agg + (i) * n, own[i], size[i]})
    for (int64_t i = 0; i < k; i++) {
        left += alive[i];
        if (alive[i]) own[i] = class_length(agg + i * n, &t);
    }
    for (int64_t i = 0; i < k; i++)
        for (int64_t j = 0; j < k; j++)
            gain[i * k + j] = i < j && alive[i] && alive[j] ? gain_of(ONE(i), ONE(j), &t) : never;
    while (left > 1) {
        int64_t best = 0;
        for (int64_t q = 1; q < k * k; q++)
            if (gain[q] > gain[best]) best = q;
        if (gain[best] <= 0) break;
        const int64_t i = best / k, j = best % k;
        for (int64_t q = 0; q < n; q++) agg[i * n + q] += agg[j * n + q];
        size[i] += size[j];
        alive[j] = 0;
        left--;
        for (int64_t q = 0; q < k; q++) {
            if (groups[q] == j) groups[q] = i;
            gain[j * k + q] = gain[q * k + j] = never;
        }
        own[i] = class_length(agg + i * n, &t);
        for (int64_t q = 0; q < k; q++) {
            if (q == i || !alive[q]) continue;
            const int64_t a = q < i ? q : i, b = q < i ? i : q;
            gain[a * k + b] = gain_of(ONE(a), ONE(b), &t);
        }
    }
#undef ONE
}
