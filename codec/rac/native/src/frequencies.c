/* Frequency tables (stages/lanes.md, "Tables"), from and to their bytes. Twins: rac/native/frequencies.py,
 * rac/entropy/tables.py. */
#include "rac.h"

/* Order of the exponential-Golomb code of a difference: it grows with the frequency before it */
static int order_after(int32_t previous, int order) {
    const int k = (previous ? 32 - __builtin_clz((unsigned)previous) : 0) / 2 + order;
    return k < 0 ? 0 : k;
}

static int bit(const uint8_t *in, int64_t at) { return in[at >> 3] >> (7 - (at & 7)) & 1; }

/* count tables of n frequencies each out of their bytes. 0 ok, 1 bits run out or are left, 2 bad table */
int rac_tables(const uint8_t *in, int64_t size, int64_t count, int64_t n, int order, uint16_t *freq) {
    int64_t at = 0, end = size * 8;
    for (int64_t t = 0; t < count; t++, freq += n) {
        int32_t prev = 0, sum = 0;
        for (int64_t i = 0; i < n; i++) {
            const int k = order_after(prev, order);
            int q = 0;
            for (;; at++, q++) {
                if (at >= end || q > 13) return 1;
                if (bit(in, at)) break;
            }
            if (at + 1 + q + k > end) return 1;
            uint32_t v = 0;
            for (int b = 0; b <= q + k; b++, at++) v = v << 1 | (uint32_t)bit(in, at);
            v -= 1u << k;
            prev += (int32_t)(v >> 1) ^ -(int32_t)(v & 1);
            if (prev < 0 || prev > 4095) return 2;
            freq[i] = (uint16_t)prev;
            sum += prev;
        }
        if (sum != 4096) return 2;
    }
    if (end - at >= 8) return 1;
    for (; at < end; at++)
        if (bit(in, at)) return 1;
    return 0;
}

/* Look-up entries of tables: code[symbol] | (slot - cumulative) << 8 | frequency << 20 */
void rac_lookup(const uint16_t *freq, int64_t count, int64_t n, const uint8_t *code, uint32_t *out) {
    for (int64_t t = 0; t < count; t++)
        for (int64_t s = 0; s < n; s++, freq++)
            for (uint32_t j = 0, e = code[s] | (uint32_t)*freq << 20; j < *freq; j++) *out++ = e | j << 8;
}

/* Tables to their bytes, MSB first, into zeroed out of 4 bytes for each frequency, or none where that is null; returns bits */
int64_t rac_golomb(const uint16_t *freq, int64_t count, int64_t n, int order, uint8_t *out) {
    int64_t at = 0;
    for (int64_t t = 0; t < count; t++) {
        int32_t prev = 0;
        for (int64_t i = 0; i < n; i++, freq++) {
            const int k = order_after(prev, order);
            const int32_t d = *freq - prev;
            const uint32_t v = (((uint32_t)d << 1) ^ (uint32_t)(d >> 31)) + (1u << k);
            const int width = 32 - __builtin_clz(v), q = width - 1 - k;
            for (int b = 0; out && b < width; b++) {
                const int64_t p = at + q + b;
                out[p >> 3] |= (uint8_t)((v >> (width - 1 - b) & 1) << (7 - (p & 7)));
            }
            at += q + width;
            prev = *freq;
        }
    }
    return at;
}
