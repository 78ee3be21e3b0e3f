/* Numbers to words (stages/lowrank.md, stages/basis.md). Twin: rac/stages/trellis.py. */
#include "rac.h"

/* n numbers to words of F32 (kind 4) or BF16 (kind 2), to the nearest, ties to even; a NaN to the canonical one */
void rac_round(const uint32_t *v, int64_t n, void *dst, int kind) {
    for (int64_t i = 0; i < n; i++) {
        const uint32_t bits = v[i], nan = (bits & 0x7fffffff) > 0x7f800000;
        if (kind == 4) ((uint32_t *)dst)[i] = nan ? 0x7fc00000 : bits;
        else ((uint16_t *)dst)[i] = (uint16_t)(nan ? 0x7fc0 : (bits + 0x7fff + (bits >> 16 & 1)) >> 16);
    }
}
