/* What the encoder of lanes/1 decides about a tensor: classes of rows and columns, and frequency tables. Twins:
 * rac/encode/code/classes.py, rac/encode/code/fitted.py. */
#include "encode.h"

/* What classes are looked for with: symbols, `weight` of a table, and fractions of the logarithm */
typedef struct {
    int64_t symbols, weight, rounds;
    const int64_t *fraction;
} rac_rules;

enum { MOST_CLASSES = 16 };

/* Number k classes of `each` counts from 0 on as rac_join has grouped them, those that are left in their order; counts of
 * the joined ones are added up. How many are left; group (k) gets the number of each, members (k) may be null */
static int64_t joined(int64_t *agg, const int64_t *members, int64_t k, int64_t g, const rac_rules *r, uint8_t *group,
                      int64_t *room) {
    const int64_t each = g * r->symbols;
    int64_t *copy = room, *size = copy + k * each, *groups = size + k, *own = groups + k, *gain = own + k;
    int64_t *tmp = gain + k * k, left = 0, first = -1;
    uint8_t *alive = (uint8_t *)(void *)(tmp + each);
    int number[256];
    memcpy(copy, agg, (size_t)(k * each) * 8);
    for (int64_t i = 0; i < k; i++) {
        size[i] = members ? members[i] : 0;
        own[i] = alive[i] = 0;
        for (int64_t j = 0; j < each; j++) alive[i] |= agg[i * each + j] != 0;
        if (alive[i] && first < 0) first = i;
    }
    for (int64_t i = 0; i < k; i++) groups[i] = first < 0 ? 0 : alive[i] ? i : first;
    if (first >= 0) rac_join(copy, size, alive, groups, own, gain, tmp, k, g, r->symbols, r->fraction, r->weight);
    for (int64_t i = 0; i < k; i++) number[i] = -1;
    for (int64_t i = 0; i < k; i++) number[groups[i]] = 0;
    for (int64_t i = 0; i < k; i++)
        if (!number[i]) number[i] = (int)left++;
    for (int64_t i = 0; i < k; i++) group[i] = (uint8_t)number[groups[i]];
    if (left == k) return k;
    memcpy(copy, agg, (size_t)(k * each) * 8);
    memset(agg, 0, (size_t)(left * each) * 8);
    for (int64_t i = 0; i < k; i++)
        for (int64_t j = 0; j < each; j++) agg[group[i] * each + j] += copy[i * each + j];
    return left;
}

static int64_t room_of(int64_t k, int64_t each) { return k * each + 3 * k + k * k + each + (k + 7) / 8 + 1; }

/* Classes of n vectors of g tables, at most k of them, and their counts agg (k', g, symbols); k', or -2 */
static int64_t clustered(const uint32_t *hist, int64_t n, int64_t g, int64_t k, const rac_rules *r, uint8_t *classes,
                         int64_t *agg, int64_t *room) {
    int64_t members[MOST_CLASSES] = {0};
    uint8_t group[MOST_CLASSES];
    k = least(k, n);
    if (rac_cluster(hist, n, g, r->symbols, k, r->rounds, r->fraction, classes, agg)) return -2;
    for (int64_t i = 0; i < n; i++) members[classes[i]]++;
    const int64_t left = joined(agg, members, k, g, r, group, room);
    for (int64_t i = 0; i < n; i++) classes[i] = group[classes[i]];
    return left;
}

/* Classes of the rows of symbols (rows, cols) under `kc` classes of columns; as `clustered` */
static int64_t of_rows(const uint8_t *sym, int64_t rows, int64_t cols, const uint8_t *col, int64_t kc, int64_t k,
                       const rac_rules *r, uint8_t *out, int64_t *agg, int64_t *room) {
    const int64_t counters = rows * kc * r->symbols;
    int32_t *at = malloc((size_t)(rows + cols) * 4);
    uint32_t *hist = calloc((size_t)counters, 4);
    int64_t found = -2;
    for (int64_t i = 0; at && i < rows; i++) at[i] = (int32_t)(i * kc);
    for (int64_t i = 0; at && kc > 1 && i < cols; i++) at[rows + i] = col[i];
    if (at && hist) {
        rac_hist(sym, rows, cols, at, kc > 1 ? at + rows : 0, r->symbols, hist);
        found = clustered(hist, rows, kc, k, r, out, agg, room);
    }
    free(at);
    free(hist);
    return found;
}

static int64_t of_cols(const uint8_t *sym, int64_t rows, int64_t cols, const uint8_t *row, int64_t kr, int64_t k,
                       const rac_rules *r, uint8_t *out, int64_t *agg, int64_t *room) {
    uint32_t *hist = calloc((size_t)(cols * kr * r->symbols), 4);
    int64_t found = -2;
    if (hist && !rac_hist_cols(sym, rows, cols, cols, kr > 1 ? row : 0, kr, r->symbols, hist))
        found = clustered(hist, cols, kr, k, r, out, agg, room);
    free(hist);
    return found;
}

/* Classes of rows and columns, at most[0] and most[1] of them, 16 at most; rows are classed a second time where most[2];
 * with one they are not looked for. cells (kr, kc, symbols), of room for the most: counts of each pair of classes; group
 * (kr, kc): its table; found: kr, kc, tables. 0, -2: not enough memory */
int rac_classify(const uint8_t *sym, int64_t rows, int64_t cols, int64_t symbols, int64_t weight, int64_t rounds,
                 const int64_t *most, const int64_t *fraction, uint8_t *row, uint8_t *col, int64_t *cells, uint8_t *group,
                 int64_t *found) {
    const rac_rules r = {symbols, weight, rounds, fraction};
    const int64_t pairs = most[0] * most[1], each = most[0] > most[1] ? most[0] : most[1];
    int64_t kr = 1, kc = 1, room = room_of(pairs, symbols);
    const int64_t one = room_of(MOST_CLASSES, each * symbols);
    if (room < one) room = one;
    int64_t *all = malloc((size_t)(room + pairs * symbols) * 8), *turned = all + room;
    int bad = !all;
    if (!bad && most[0] > 1) bad = (kr = of_rows(sym, rows, cols, 0, 1, most[0], &r, row, cells, all)) < 0;
    if (!bad && most[1] > 1) {
        bad = (kc = of_cols(sym, rows, cols, row, kr, most[1], &r, col, turned, all)) < 0;
        for (int64_t i = 0; !bad && i < kr; i++)
            for (int64_t j = 0; j < kc; j++)
                memcpy(cells + (i * kc + j) * symbols, turned + (j * kr + i) * symbols, (size_t)symbols * 8);
        if (!bad && most[2] && kc > 1) bad = (kr = of_rows(sym, rows, cols, col, kc, most[0], &r, row, cells, all)) < 0;
    }
    if (!bad && most[0] == 1 && most[1] == 1) {
        uint32_t *hist = calloc((size_t)symbols, 4);
        bad = !hist;
        if (hist) rac_hist(sym, rows, cols, 0, 0, symbols, hist);
        for (int64_t i = 0; hist && i < symbols; i++) cells[i] = hist[i];
        free(hist);
    }
    if (!bad) {
        int64_t tables = 1;
        group[0] = 0;
        if (kr * kc > 1) {
            memcpy(turned, cells, (size_t)(kr * kc * symbols) * 8);
            tables = joined(turned, 0, kr * kc, 1, &r, group, all);
        }
        found[0] = kr, found[1] = kc, found[2] = tables;
    }
    free(all);
    return bad ? -2 : 0;
}

/* The `some` largest of n keys, of equal ones the first, get `by` */
static void raise(const int64_t *key, int64_t n, int64_t some, int by, int64_t *f) {
    uint8_t done[256] = {0};
    while (some-- > 0) {
        int64_t best = -1;
        for (int64_t i = 0; i < n; i++)
            if (!done[i] && (best < 0 || key[i] > key[best])) best = i;
        done[best] = 1;
        f[best] += by;
    }
}

/* Counts of n <= 256 symbols to frequencies of sum 4096; see entropy/tables.py */
static void normalise(const int64_t *counts, int64_t n, uint16_t *out) {
    int64_t c[256], f[256], key[256], total = 0, sum = 0, used = 0, top = 0;
    for (int64_t i = 0; i < n; i++) total += counts[i];
    for (int64_t i = 0; i < n; i++) c[i] = total ? counts[i] : 1;
    if (!total) total = n;
    for (int64_t i = 0; i < n; i++) {
        f[i] = c[i] * 4096 / total;
        if (c[i] && !f[i]) f[i] = 1;
        used += c[i] > 0;
        sum += f[i];
    }
    for (int64_t left; (left = 4096 - sum);) {
        int64_t some = 0;
        if (left > 0) {
            for (int64_t i = 0; i < n; i++) key[i] = (c[i] << 20) / (2 * f[i] + 1);
            some = least(left, used / 8 > 1 ? used / 8 : 1);
            raise(key, n, some, 1, f);
            sum += some;
        } else {
            for (int64_t i = 0; i < n; i++) {
                key[i] = f[i] > 1 ? -((c[i] << 20) / (2 * f[i] - 1)) : -INT64_MAX;
                some += f[i] > 1;
            }
            some = least(-left, some / 8 > 1 ? some / 8 : 1);
            raise(key, n, some, -1, f);
            sum -= some;
        }
    }
    for (int64_t i = 0; i < n; i++) top = f[i] > f[top] ? i : top;
    if (f[top] == 4096) { /* a look-up entry has 12 bits for the frequency */
        f[top] = 4095;
        f[top ? top - 1 : 1] = 1;
    }
    for (int64_t i = 0; i < n; i++) out[i] = (uint16_t)f[i];
}

/* Tables of counts (tables, n), which become those of what is coded: with `both` >= 0 pairs below `whole`, the symbols
 * without an escape, that are rarer than one of `rare` are coded as that symbol. freq (tables, n); odd (tables, n): which
 * these are; model and escaping (tables, 256), at the codes of the symbols: see encode.h; packed: bytes of the tables in
 * the shortest order, zeroed room for 4 of each frequency; found: order, bits, length of all symbols in units, odd ones */
void rac_fit(int64_t *counts, int64_t tables, int64_t n, const uint8_t *code, int64_t both, int64_t whole, int64_t rare,
             const int64_t *fraction, uint16_t *freq, uint8_t *odd, uint32_t *model, uint8_t *escaping, uint8_t *packed,
             int64_t *found) {
    memset(odd, 0, (size_t)(tables * n));
    memset(model, 0, (size_t)tables * 1024);
    memset(escaping, 0, (size_t)tables * 256);
    found[2] = found[3] = 0;
    for (int64_t t = 0; t < tables; t++) {
        int64_t *c = counts + t * n, sum = 0, start = 0;
        uint16_t *f = freq + t * n;
        uint32_t *m = model + 256 * t;
        for (int64_t i = 0; i < n; i++) sum += c[i];
        for (int64_t i = 0; both >= 0 && i < whole; i++) {
            if (!c[i] || c[i] * rare >= sum) continue;
            c[both] += c[i];
            c[i] = 0;
            odd[t * n + i] = 1;
            found[3]++;
        }
        normalise(c, n, f);
        for (int64_t i = 0; i < n; i++) {
            m[code[i]] = f[i] | (uint32_t)start << 16;
            start += f[i];
            escaping[256 * t + code[i]] = i >= whole ? 1 : odd[t * n + i] ? 2 : 0;
            found[2] += c[i] * ((12 << 10) - rac_log2_of(f[i], fraction));
        }
        for (int64_t i = 0; i < n; i++)
            if (odd[t * n + i]) m[code[i]] = m[code[both]];
    }
    found[0] = -2;
    for (int order = -2; order < 2; order++) {
        const int64_t bits = rac_golomb(freq, tables, n, order, 0);
        if (order > -2 && (bits + 7) / 8 >= (found[1] + 7) / 8) continue;
        found[0] = order;
        found[1] = bits;
    }
    rac_golomb(freq, tables, n, (int)found[0], packed);
}
