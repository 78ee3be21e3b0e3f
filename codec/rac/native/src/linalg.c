/* Products and Cholesky factors whose order of additions is part of their contract, so that every CPU, compiler and
 * number of threads finds the same bits: no contraction (setup.py), no partial sums. Twin: rac/native/product.py. */
#include <math.h>
#include "rac.h"
#ifdef __SSE__
#include <xmmintrin.h>
#endif

enum { DEEP = 128, TALL = 96, BLOCK = 64 }; /* terms and rows at once; columns of a factor */
/* Bytes of a register, and the registers of a tile, which are few enough to stay where they are */
#if defined(AVX512)
enum { REGISTER = 64, DOWN = 8, ACROSS = 3 };
#elif defined(__AVX2__)
enum { REGISTER = 32, DOWN = 6, ACROSS = 2 };
#elif defined(NEON)
enum { REGISTER = 16, DOWN = 8, ACROSS = 2 };
#else
enum { REGISTER = 16, DOWN = 6, ACROSS = 2 };
#endif

#define NUMBER float
#define NAMED(f) f##_float
#include "gemm.h"
#undef NUMBER
#undef NAMED
#define NUMBER double
#define NAMED(f) f##_double
#include "gemm.h"

/* Subnormal numbers count whatever the settings of the thread are; `normal` goes back to these */
#ifdef __SSE__
static unsigned exact(void) {
    const unsigned before = _mm_getcsr();
    _mm_setcsr(0x1f80);
    return before;
}
static void normal(unsigned before) { _mm_setcsr(before); }
#else
static unsigned exact(void) { return 0; }
static void normal(unsigned before) { (void)before; }
#endif

/* t[i][j] += a[i][k] b[k][j] for k = 0..n - 1, one after the other. t (h, w), a (h, n), b (n, w). A part of the
 * format too (stages/lowrank.md, stages/basis.md). */
void rac_product(const rac_matrix *t, const rac_matrix *a, const rac_matrix *b) {
    const unsigned before = exact();
    product_float(t, a, 1, b);
    normal(before);
}

/* The first n numbers of a row, in a block of columns whose own rows of L are `diagonal` and, turned, `of` */
static void row_of(double *row, int64_t n, const double *diagonal, const double *of) {
    for (int64_t k = 0; k < n; k++) {
        const double x = row[k] /= diagonal[k];
        for (int64_t c = k + 1; c < n; c++) row[c] -= x * of[k * BLOCK + c];
    }
}

static int64_t factor(double *a, int64_t n, double *turned) {
    double diagonal[BLOCK], of[BLOCK * BLOCK];
    for (int64_t from = 0; from < n; from += BLOCK) {
        const int64_t wide = least(n - from, BLOCK), to = from + wide, rest = n - to;
        for (int64_t i = 0; i < wide; i++) {
            double *row = a + (from + i) * n + from;
            row_of(row, i, diagonal, of);
            for (int64_t k = 0; k < i; k++) {
                of[k * BLOCK + i] = row[k];
                row[i] -= row[k] * row[k];
            }
            if (!(row[i] > 0)) return from + i + 1;
            row[i] = diagonal[i] = sqrt(row[i]);
        }
        for (int64_t i = 0; i < rest; i++) {
            double *row = a + (to + i) * n + from;
            row_of(row, wide, diagonal, of);
            for (int64_t k = 0; k < wide; k++) turned[k * rest + i] = row[k];
        }
        for (int64_t i = 0; i < rest; i += TALL) {
            const int64_t high = least(rest - i, TALL);
            double *row = a + (to + i) * n;
            const rac_matrix t = {row + to, high, i + high, n}, left = {row + from, high, wide, n};
            const rac_matrix right = {turned, wide, i + high, rest};
            product_double(&t, &left, -1, &right);
        }
    }
    return 0;
}

/* The lower triangle of a (n, n), row-major, to L with L L^T = A; what is above the diagonal is left undefined. For
 * k = 0..n - 1: L_kk = sqrt(a_kk), L_ik = a_ik / L_kk, and a_ij -= L_ik L_jk for k < j <= i. turned: scratch (64, n).
 * Returns 0, or 1 + the first column whose a_kk is not above 0. */
int64_t rac_factor(double *a, int64_t n, double *turned) {
    const unsigned before = exact();
    const int64_t bad = factor(a, n, turned);
    normal(before);
    return bad;
}
