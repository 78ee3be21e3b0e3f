/* t += sign a b of one type of numbers, NUMBER; included once for each (linalg.c), where NAMED(f) names its functions.
 * Every element takes its terms k = 0, 1, ... one after the other, each product rounded before it is added: the tiles below
 * decide what is in registers, never the order. */

#define TILE(name, target, bytes, down, across)                                                                          \
    typedef NUMBER NAMED(name##_register) __attribute__((vector_size(bytes), aligned(sizeof(NUMBER)), may_alias));        \
    target static void NAMED(name)(NUMBER *t, int64_t stride, const NUMBER *a, const NUMBER *b, int64_t n) {              \
        typedef NAMED(name##_register) reg;                                                                               \
        enum { LANES = bytes / sizeof(NUMBER) };                                                                          \
        reg sum[down][across];                                                                                            \
        for (int r = 0; r < down; r++)                                                                                    \
            for (int c = 0; c < across; c++) sum[r][c] = *(const reg *)(t + r * stride + c * LANES);                      \
        for (int64_t k = 0; k < n; k++, a += down, b += across * LANES) {                                                 \
            _Pragma("GCC unroll 8") for (int r = 0; r < down; r++)                                                        \
                _Pragma("GCC unroll 4") for (int c = 0; c < across; c++) sum[r][c] += a[r] * *(const reg *)(b + c * LANES); \
        }                                                                                                                 \
        for (int r = 0; r < down; r++)                                                                                    \
            for (int c = 0; c < across; c++) *(reg *)(t + r * stride + c * LANES) = sum[r][c];                            \
    }

TILE(plain, , 16, 6, 2)
#ifdef HAVE_X86
TILE(avx2, __attribute__((target("avx2"))), 32, 6, 2)
TILE(avx512, __attribute__((target("avx512f"))), 64, 8, 3)
#endif

/* t (h, w), a (h, n), b (n, w), each with numbers from row to row; sign: 1 or -1 */
static void NAMED(product)(NUMBER *t, int64_t h, int64_t w, int64_t t_stride, const NUMBER *a, int64_t a_stride, NUMBER sign,
                           const NUMBER *b, int64_t b_stride, int64_t n) {
    void (*tile)(NUMBER *, int64_t, const NUMBER *, const NUMBER *, int64_t) = NAMED(plain);
    int64_t down = 6, across = 2 * 16 / (int64_t)sizeof(NUMBER);
#ifdef HAVE_X86
    if (has512()) tile = NAMED(avx512), down = 8, across = 3 * 64 / (int64_t)sizeof(NUMBER);
    else if (__builtin_cpu_supports("avx2")) tile = NAMED(avx2), across = 2 * 32 / (int64_t)sizeof(NUMBER);
#endif
    NUMBER left[DEEP * (TALL + 8)], right[DEEP * 3 * 64 / sizeof(NUMBER)], edge[8 * 3 * 64 / sizeof(NUMBER)];
    for (int64_t k = 0; k < n; k += DEEP)
        for (int64_t i = 0; i < h; i += TALL) {
            const int64_t deep = n - k < DEEP ? n - k : DEEP, tall = h - i < TALL ? h - i : TALL;
            for (int64_t r = 0; r < tall + down - 1; r++) /* rows behind the last are not stored */
                for (int64_t q = 0; q < deep; q++)
                    left[(r / down * deep + q) * down + r % down] = r < tall ? sign * a[(i + r) * a_stride + k + q] : 0;
            for (int64_t j = 0; j < w; j += across) {
                const int64_t wide = w - j < across ? w - j : across;
                for (int64_t q = 0; q < deep; q++) {
                    memcpy(right + q * across, b + (k + q) * b_stride + j, (size_t)wide * sizeof(NUMBER));
                    memset(right + q * across + wide, 0, (size_t)(across - wide) * sizeof(NUMBER));
                }
                for (int64_t r = 0; r < tall; r += down) {
                    NUMBER *to = t + (i + r) * t_stride + j;
                    const int64_t high = tall - r < down ? tall - r : down;
                    if (high == down && wide == across) {
                        tile(to, t_stride, left + r * deep, right, deep);
                        continue;
                    }
                    memset(edge, 0, sizeof edge);
                    for (int64_t y = 0; y < high; y++) memcpy(edge + y * across, to + y * t_stride, (size_t)wide * sizeof(NUMBER));
                    tile(edge, across, left + r * deep, right, deep);
                    for (int64_t y = 0; y < high; y++) memcpy(to + y * t_stride, edge + y * across, (size_t)wide * sizeof(NUMBER));
                }
            }
        }
}
#undef TILE
