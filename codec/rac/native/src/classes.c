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
void rac_code_length(const int64_t *counts, int64_t n, int64_t s, const int64_t *fraction, int64_t weight,
                     int64_t *out) {
    const counts_of t = {1, s, fraction, weight, 0};
    for (int64_t k = 0; k < n; k++) out[k] = length_of(counts + k * s, &t);
}

int64_t rac_log2_of(int64_t n, const int64_t *fraction) { return log2_1024(n, fraction); }

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

enum { MOST_CLASSES = 16 };

/* Vectors that are clustered: n times g tables of s symbols */
typedef struct { const uint32_t *hist; int64_t n, g, s; } vectors_of;

/* classes[] of n vectors by the quantiles of their mean symbol, equal ones in their order */
static void begin(const vectors_of *v, int64_t k, uint8_t *classes, uint32_t *key, int32_t *order, int32_t *next) {
    for (int64_t i = 0; i < v->n; i++) {
        uint64_t sum = 0, all = 0;
        const uint32_t *h = v->hist + i * v->g * v->s;
        for (int64_t q = 0; q < v->g; q++)
            for (int64_t j = 0; j < v->s; j++, h++) {
                sum += (uint64_t)*h * (uint64_t)j;
                all += *h;
            }
        key[i] = (uint32_t)((sum << 16) / (all ? all : 1)); /* below 2^24 */
        order[i] = (int32_t)i;
    }
    for (int byte = 0; byte < 24; byte += 8) {
        int64_t at[257] = {0};
        for (int64_t i = 0; i < v->n; i++) at[(key[i] >> byte & 255) + 1]++;
        for (int q = 0; q < 256; q++) at[q + 1] += at[q];
        for (int64_t i = 0; i < v->n; i++) next[at[key[order[i]] >> byte & 255]++] = order[i];
        memcpy(order, next, (size_t)v->n * 4);
    }
    for (int64_t i = 0; i < v->n; i++) classes[order[i]] = (uint8_t)(i * k / v->n);
}

/* The cheapest class of each vector, the first of equal ones; whether one is another than before. cost (g * s, most):
 * lengths, integers below 2^17, so that sums of doubles are exact; `most` is MOST_CLASSES or half of it */
INLINED int nearest(const vectors_of *v, const double *cost, const double *bias, int most, uint8_t *classes) {
    int changed = 0;
    for (int64_t i = 0; i < v->n; i++) {
        const uint32_t *h = v->hist + i * v->g * v->s;
        double sum[MOST_CLASSES];
#ifdef NEON /* fused: as everything is exact, so is that */
        float64x2_t two[MOST_CLASSES / 2];
        for (int q = 0; q < most / 2; q++) two[q] = vld1q_f64(bias + 2 * q);
        for (int64_t j = 0; j < v->g * v->s; j++)
            for (int q = 0; q < most / 2; q++)
                two[q] = vfmaq_n_f64(two[q], vld1q_f64(cost + j * most + 2 * q), (double)h[j]);
        for (int q = 0; q < most / 2; q++) vst1q_f64(sum + 2 * q, two[q]);
#else
        for (int q = 0; q < most; q++) sum[q] = bias[q];
        for (int64_t j = 0; j < v->g * v->s; j++) {
            const double c = h[j];
            for (int q = 0; q < most; q++) sum[q] += c * cost[j * most + q];
        }
#endif
        int best = 0;
        for (int q = 1; q < most; q++) best = sum[q] < sum[best] ? q : best;
        changed |= classes[i] != best;
        classes[i] = (uint8_t)best;
    }
    return changed;
}

static void lengths(const int64_t *agg, const int64_t *members, int64_t k, const vectors_of *v, const int64_t *fraction,
                    int most, double *cost, double *bias) {
    for (int64_t q = 0; q < most; q++) {
        bias[q] = q < k ? (double)(log2_1024(v->n, fraction) - log2_1024(members[q] > 1 ? members[q] : 1, fraction)) : 1e300;
        for (int64_t t = 0; t < v->g; t++) {
            int64_t total = v->s;
            const int64_t *a = agg + (q * v->g + t) * v->s;
            for (int64_t j = 0; q < k && j < v->s; j++) total += 16 * a[j];
            for (int64_t j = 0; j < v->s; j++)
                cost[(t * v->s + j) * most + q] =
                    q < k ? (double)(log2_1024(total, fraction) - log2_1024(16 * a[j] + 1, fraction)) : 0;
        }
    }
}

/* Members and counts agg (k, g, s) of each class */
static void count(const vectors_of *v, const uint8_t *classes, int64_t k, int64_t *members, int64_t *agg) {
    memset(agg, 0, (size_t)(k * v->g * v->s) * 8);
    memset(members, 0, (size_t)k * 8);
    for (int64_t i = 0; i < v->n; i++) members[classes[i]]++;
    rac_sum(v->hist, classes, v->n, v->g * v->s, agg);
}

/* Classes of n vectors of g tables of s counts, at most k <= 16 of them, refined `rounds` times; agg (k, g, s) gets their
 * counts. -2: not enough memory */
int rac_cluster(const uint32_t *hist, int64_t n, int64_t g, int64_t s, int64_t k, int64_t rounds,
                const int64_t *fraction, uint8_t *classes, int64_t *agg) {
    const vectors_of v = {hist, n, g, s};
    int64_t members[MOST_CLASSES];
    double bias[MOST_CLASSES];
    const int most = k <= MOST_CLASSES / 2 ? MOST_CLASSES / 2 : MOST_CLASSES;
    double *cost = malloc((size_t)(g * s * most) * 8 + (size_t)n * 12);
    if (!cost) return -2;
    uint32_t *key = (uint32_t *)(void *)(cost + g * s * most);
    if (k > 1) begin(&v, k, classes, key, (int32_t *)(key + n), (int32_t *)(key + 2 * n));
    else memset(classes, 0, (size_t)n);
    count(&v, classes, k, members, agg);
    for (int64_t r = 0; r < rounds && k > 1; r++) {
        lengths(agg, members, k, &v, fraction, most, cost, bias);
        const int changed = most == MOST_CLASSES ? nearest(&v, cost, bias, MOST_CLASSES, classes)
                                                 : nearest(&v, cost, bias, MOST_CLASSES / 2, classes);
        if (!changed) break;
        count(&v, classes, k, members, agg);
    }
    free(cost);
    return 0;
}
