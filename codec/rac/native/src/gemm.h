/* t += sign a b of one type of numbers, NUMBER; included once for each (linalg.c), where NAMED(f) names its
 * functions. Every element takes its terms k = 0, 1, ... one after the other, each product rounded before it is
 * added: the tiles below decide what is in registers, never the order. */

typedef NUMBER NAMED(reg) __attribute__((vector_size(REGISTER), aligned(sizeof(NUMBER)), may_alias));
enum { NAMED(LANES) = REGISTER / sizeof(NUMBER), NAMED(WIDE) = ACROSS * NAMED(LANES) };

/* The terms k = 0..n - 1 of DOWN x ACROSS registers of t: DOWN numbers of a and a row of b for each */
static void NAMED(tile)(NUMBER *t, int64_t stride, const NUMBER *a, const NUMBER *b, int64_t n) {
    NAMED(reg) sum[DOWN][ACROSS];
    for (int r = 0; r < DOWN; r++)
        for (int c = 0; c < ACROSS; c++) sum[r][c] = *(const NAMED(reg) *)(t + r * stride + c * NAMED(LANES));
    for (int64_t k = 0; k < n; k++, a += DOWN, b += NAMED(WIDE)) {
#ifdef NEON /* multiplies by a number of a register as well as by a register */
        NAMED(reg) own[DOWN / NAMED(LANES)];
        memcpy(own, a, sizeof own);
#define LEFT(r) own[r / NAMED(LANES)][r % NAMED(LANES)]
#else
#define LEFT(r) a[r]
#endif
        _Pragma("GCC unroll 8") for (int r = 0; r < DOWN; r++)
            _Pragma("GCC unroll 4") for (int c = 0; c < ACROSS; c++)
                sum[r][c] += LEFT(r) * *(const NAMED(reg) *)(b + c * NAMED(LANES));
#undef LEFT
    }
    for (int r = 0; r < DOWN; r++)
        for (int c = 0; c < ACROSS; c++) *(NAMED(reg) *)(t + r * stride + c * NAMED(LANES)) = sum[r][c];
}

/* t (h, w), a (h, n), b (n, w); sign: 1 or -1 */
static void NAMED(product)(const rac_matrix *t, const rac_matrix *a, NUMBER sign, const rac_matrix *b) {
    enum { WIDE = NAMED(WIDE) };
    const int64_t h = t->rows, w = t->cols, n = b->rows;
    NUMBER left[DEEP * (TALL + DOWN)], right[DEEP * WIDE], edge[DOWN * WIDE];
    for (int64_t k = 0; k < n; k += DEEP)
        for (int64_t i = 0; i < h; i += TALL) {
            const int64_t deep = least(n - k, DEEP), tall = least(h - i, TALL);
            const NUMBER *from = (const NUMBER *)a->at + i * a->stride + k;
            for (int64_t r = 0; r < tall + DOWN - 1; r++) /* rows behind the last are not stored */
                for (int64_t q = 0; q < deep; q++)
                    left[(r / DOWN * deep + q) * DOWN + r % DOWN] = r < tall ? sign * from[r * a->stride + q] : 0;
            for (int64_t j = 0; j < w; j += WIDE) {
                const int64_t wide = least(w - j, WIDE);
                for (int64_t q = 0; q < deep; q++) {
                    const NUMBER *row = (const NUMBER *)b->at + (k + q) * b->stride + j;
                    memcpy(right + q * WIDE, row, (size_t)wide * sizeof(NUMBER));
                    memset(right + q * WIDE + wide, 0, (size_t)(WIDE - wide) * sizeof(NUMBER));
                }
                for (int64_t r = 0; r < tall; r += DOWN) {
                    NUMBER *to = (NUMBER *)t->at + (i + r) * t->stride + j;
                    const int64_t high = least(tall - r, DOWN);
                    const size_t size = (size_t)wide * sizeof(NUMBER);
                    if (high == DOWN && wide == WIDE) {
                        NAMED(tile)(to, t->stride, left + r * deep, right, deep);
                        continue;
                    }
                    memset(edge, 0, sizeof edge);
                    for (int64_t y = 0; y < high; y++) memcpy(edge + y * WIDE, to + y * t->stride, size);
                    NAMED(tile)(edge, WIDE, left + r * deep, right, deep);
                    for (int64_t y = 0; y < high; y++) memcpy(to + y * t->stride, edge + y * WIDE, size);
                }
            }
        }
}
