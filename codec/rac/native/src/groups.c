/* Codes of groups to numbers (stages/groups.md), and words out of bit planes (stages/bits.md). Twins: rac/stages/groups.py,
 * rac/stages/bits.py. All products are exact. */
#include "rac.h"

/* Codes (h, w) to words of F32 (kind 4) or BF16 (kind 2); column 0 is column `first` of its group. scales, zeros: (h, ...) of
 * the groups; zeros may be one for all. Returns the bits that occur in any code. */
int rac_ungroup(const rac_matrix *codes, const rac_matrix *scales, const rac_matrix *zeros, const rac_matrix *dst, int64_t group,
                int64_t first, int kind) {
    uint8_t seen = 0;
    const int same = zeros->rows * zeros->cols == 1;
    const int64_t w = codes->cols;
    for (int64_t y = 0; y < codes->rows; y++) {
        const uint8_t *u = (const uint8_t *)codes->at + y * codes->stride, *z = zeros->at;
        const float *scale = (const float *)scales->at + y * scales->stride;
        if (!same) z += y * zeros->stride;
        int64_t end = group - first;
        for (int64_t x = 0, g = 0; x < w; x = end, end += group, g++) {
            const int64_t last = least(end, w);
            const float by = scale[g];
            const int32_t zero = z[same ? 0 : g];
            if (kind == 4) {
                float *to = (float *)dst->at + y * dst->stride;
                for (int64_t j = x; j < last; j++) to[j] = (float)((int32_t)u[j] - zero) * by;
            } else {
                uint16_t *to = (uint16_t *)dst->at + y * dst->stride;
                for (int64_t j = x; j < last; j++) to[j] = bf16_of((float)((int32_t)u[j] - zero) * by);
            }
        }
        for (int64_t j = 0; j < w; j++) seen |= u[j];
    }
    return seen;
}

/* n words of `bits` bits out of their planes, each of which begins at a multiple of 16 */
void rac_unbits(const uint8_t *unit, int64_t n, int bits, uint8_t *words) {
    int low = 0;
    for (int p = 8; p; p /= 2) {
        if (!(bits & p)) continue;
        const int per = 8 / p, mask = (1 << p) - 1;
        const int64_t whole = n / per;
        if (!low) memset(words, 0, (size_t)n);
        if (p == 8) memcpy(words, unit, (size_t)n);
        else if (p == 4)
            for (int64_t i = 0; i < whole; i++) {
                words[2 * i] = unit[i] & 15;
                words[2 * i + 1] = unit[i] >> 4;
            }
        else if (p == 2)
            for (int64_t i = 0; i < whole; i++) { /* a byte into four */
                const uint32_t u = unit[i];
                uint32_t v;
                memcpy(&v, words + 4 * i, 4);
                v |= ((u | u << 6 | u << 12 | u << 18) & 0x03030303) << low;
                memcpy(words + 4 * i, &v, 4);
            }
        else
            for (int64_t i = 0; i < whole; i++) { /* a byte into eight: bit k stays in byte k, then moves to its end */
                const uint64_t u = unit[i] * 0x0101010101010101u & 0x8040201008040201u;
                uint64_t v;
                memcpy(&v, words + 8 * i, 8);
                v |= ((u + 0x7f7f7f7f7f7f7f7fu) >> 7 & 0x0101010101010101u) << low;
                memcpy(words + 8 * i, &v, 8);
            }
        for (int64_t i = whole * per; i < n; i++) words[i] |= (uint8_t)((unit[i / per] >> i % per * p & mask) << low);
        unit += (n * p + 127) / 128 * 16;
        low += p;
    }
}
