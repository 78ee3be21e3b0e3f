/* Tables of 256 bytes in registers of NEON, looked up 16 at once. */
#pragma once
#include "rac.h"

#ifdef NEON
typedef struct { uint8x16x4_t part[4]; } table256;
INLINED table256 table256_at(const uint8_t *p) {
    return (table256){{vld1q_u8_x4(p), vld1q_u8_x4(p + 64), vld1q_u8_x4(p + 128), vld1q_u8_x4(p + 192)}};
}
/* Of a part whose indices these are not, nothing is taken */
INLINED uint8x16_t look256(const table256 *t, uint8x16_t i) {
    uint8x16_t v = vqtbl4q_u8(t->part[0], i);
    v = vqtbx4q_u8(v, t->part[1], veorq_u8(i, vdupq_n_u8(64)));
    v = vqtbx4q_u8(v, t->part[2], veorq_u8(i, vdupq_n_u8(128)));
    return vqtbx4q_u8(v, t->part[3], veorq_u8(i, vdupq_n_u8(192)));
}
#endif
