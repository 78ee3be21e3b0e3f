/* Products that a decoder adds to the numbers of a tensor (stages/lowrank.md, stages/basis.md). The order of the additions is
 * part of the format: every element takes its terms one after the other, each product rounded before it is added (no
 * contraction, setup.py). Twins: rac/native/product.py, rac/stages/trellis.py. */
#include "rac.h"
#ifdef __SSE__
#include <xmmintrin.h>
#endif

enum { WIDE = 16, ACROSS = 4, DOWN = 4, DEEP = 256 };
/* One register of a CPU with AVX-512; the compiler cuts it for others */
typedef float rac_row __attribute__((vector_size(4 * WIDE), aligned(4), may_alias));

/* The terms k = 0..n - 1 of DOWN x ACROSS registers of t; `panel` has ACROSS registers for each k */
static void block(float *t, const float *const a[DOWN], const float *panel, int64_t n) {
    rac_row sum[DOWN][ACROSS], b[ACROSS];
    for (int r = 0; r < DOWN; r++)
        for (int c = 0; c < ACROSS; c++) sum[r][c] = *(const rac_row *)(t + (r * ACROSS + c) * WIDE);
    for (int64_t k = 0; k < n; k++, panel += ACROSS * WIDE) {
        _Pragma("GCC unroll 4") for (int c = 0; c < ACROSS; c++) b[c] = *(const rac_row *)(panel + c * WIDE);
        _Pragma("GCC unroll 4") for (int r = 0; r < DOWN; r++) {
            const float x = a[r][k];
            _Pragma("GCC unroll 4") for (int c = 0; c < ACROSS; c++) sum[r][c] += x * b[c];
        }
    }
    for (int r = 0; r < DOWN; r++)
        for (int c = 0; c < ACROSS; c++) *(rac_row *)(t + (r * ACROSS + c) * WIDE) = sum[r][c];
}

/* t[i][j] += a[i][k] b[k][j] for k = 0..n - 1, one after the other. t (h, w), a (h, n), b (n, w). On x86 subnormal numbers
 * count whatever the settings of the thread are. */
void rac_product(const rac_matrix *t, const rac_matrix *a, const rac_matrix *b) {
#ifdef __SSE__
    const unsigned before = _mm_getcsr();
    _mm_setcsr(0x1f80);
#endif
    const int64_t h = t->rows, w = t->cols, n = b->rows;
    float panel[DEEP * ACROSS * WIDE], sum[DOWN * ACROSS * WIDE];
    for (int64_t j = 0; j < w; j += ACROSS * WIDE) {
        const int64_t m = least(w - j, ACROSS * WIDE);
        for (int64_t k = 0; k < n; k += DEEP) {
            const int64_t deep = least(n - k, DEEP);
            for (int64_t q = 0; q < deep; q++) {
                float *p = panel + q * ACROSS * WIDE;
                memcpy(p, (const float *)b->at + (k + q) * b->stride + j, (size_t)m * 4);
                memset(p + m, 0, (size_t)(ACROSS * WIDE - m) * 4);
            }
            for (int64_t i = 0; i < h; i += DOWN) {
                const float *of[DOWN];
                memset(sum, 0, sizeof sum);
                for (int r = 0; r < DOWN; r++) {
                    const int64_t y = i + r < h ? i + r : h - 1; /* rows behind the last are not stored */
                    of[r] = (const float *)a->at + y * a->stride + k;
                    memcpy(sum + r * ACROSS * WIDE, (float *)t->at + y * t->stride + j, (size_t)m * 4);
                }
                block(sum, of, panel, deep);
                for (int r = 0; r < DOWN && i + r < h; r++)
                    memcpy((float *)t->at + (i + r) * t->stride + j, sum + r * ACROSS * WIDE, (size_t)m * 4);
            }
        }
    }
#ifdef __SSE__
    _mm_setcsr(before);
#endif
}

/* n numbers to words of F32 (kind 4) or BF16 (kind 2), to the nearest, ties to even; a NaN to the canonical one */
void rac_round(const uint32_t *v, int64_t n, void *dst, int kind) {
    for (int64_t i = 0; i < n; i++) {
        const uint32_t bits = v[i], nan = (bits & 0x7fffffff) > 0x7f800000;
        if (kind == 4) ((uint32_t *)dst)[i] = nan ? 0x7fc00000 : bits;
        else ((uint16_t *)dst)[i] = (uint16_t)(nan ? 0x7fc0 : (bits + 0x7fff + (bits >> 16 & 1)) >> 16);
    }
}
