/* Products and Cholesky factors whose order of additions is part of their contract, so that every CPU, compiler and number
 * of threads finds the same bits: no contraction (setup.py), no partial sums. Twins: rac/native/linalg.py. */
#include "kernels.h"
#include <math.h>

enum { DEEP = 128, TALL = 96, BLOCK = 64 }; /* terms and rows at once; columns of a factor */

#define NUMBER float
#define NAMED(f) f##_float
#include "gemm.h"
#undef NUMBER
#undef NAMED
#define NUMBER double
#define NAMED(f) f##_double
#include "gemm.h"

/* Subnormal numbers count whatever the settings of the thread are */
#ifdef HAVE_X86
#define EXACT(work)                          \
    const unsigned before = _mm_getcsr();    \
    _mm_setcsr(0x1f80);                      \
    work;                                    \
    _mm_setcsr(before)
#else
#define EXACT(work) work
#endif

/* t[i][j] += a[i][k] b[k][j] for k = 0..n - 1, one after the other. t (h, w), a (h, n), b (n, w), each with floats from row to
 * row. A part of the format too (stages/lowrank.md, stages/basis.md). */
void rac_product(float *t, int64_t h, int64_t w, int64_t t_stride, const float *a, int64_t a_stride, const float *b,
                 int64_t b_stride, int64_t n) {
    EXACT(product_float(t, h, w, t_stride, a, a_stride, 1, b, b_stride, n));
}

/* The first n numbers of a row, in a block of columns whose own rows of L are `diagonal` and, turned, `of` */
CLONES static void row_of(double *row, int64_t n, const double *diagonal, const double *of) {
    for (int64_t k = 0; k < n; k++) {
        const double x = row[k] /= diagonal[k];
        for (int64_t c = k + 1; c < n; c++) row[c] -= x * of[k * BLOCK + c];
    }
}

static int64_t factor(double *a, int64_t n, double *turned) {
    double diagonal[BLOCK], of[BLOCK * BLOCK];
    for (int64_t from = 0; from < n; from += BLOCK) {
        const int64_t wide = n - from < BLOCK ? n - from : BLOCK, to = from + wide, rest = n - to;
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
            const int64_t high = rest - i < TALL ? rest - i : TALL;
            product_double(a + (to + i) * n + to, high, i + high, n, a + (to + i) * n + from, n, -1, turned, rest, wide);
        }
    }
    return 0;
}

/* The lower triangle of a (n, n), row-major, to L with L L^T = A; what is above the diagonal is left undefined. For k = 0..n - 1:
 * L_kk = sqrt(a_kk), L_ik = a_ik / L_kk, and a_ij -= L_ik L_jk for k < j <= i. turned: scratch (64, n). Returns 0, or 1 + the
 * first column whose a_kk is not above 0. */
int64_t rac_factor(double *a, int64_t n, double *turned) {
    int64_t bad;
    EXACT(bad = factor(a, n, turned));
    return bad;
}
