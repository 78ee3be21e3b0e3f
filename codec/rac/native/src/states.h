/* Registers of floats, for what goes over the states of a trellis 16 at once: the few operations that each instruction
 * set writes in its own way. */
#pragma once
#include "quantise.h"

#if defined(AVX512)
enum { LANES = 16 };
typedef __mmask16 mask;
#elif defined(AVX2)
enum { LANES = 8 };
typedef __m256 mask;
#elif defined(NEON)
enum { LANES = 4 };
typedef uint32x4_t mask;
#endif

#if defined(AVX512) || defined(AVX2) || defined(NEON)
#define WIDE 1
enum { PARTS = 16 / LANES }; /* registers of 16 states */
typedef float floats __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef int32_t ints __attribute__((vector_size(4 * LANES), aligned(4), may_alias));

/* Register i of an array */
INLINED floats at(const float *p, int i) { return *(const floats *)(p + i * LANES); }
INLINED void put(float *p, int i, floats v) { *(floats *)(p + i * LANES) = v; }
INLINED floats all(float x) { return x - (floats){0}; }

/* below: where b < a. pick: b there, else a. bits: of 16 states. evens, odds: of two registers one after the other */
#if defined(AVX512)
INLINED mask below(floats b, floats a) { return _mm512_cmp_ps_mask((__m512)b, (__m512)a, _CMP_LT_OQ); }
INLINED floats pick(mask m, floats b, floats a) { return (floats)_mm512_mask_mov_ps((__m512)a, m, (__m512)b); }
INLINED floats lesser(mask m, floats b, floats a) { (void)m; return (floats)_mm512_min_ps((__m512)b, (__m512)a); }
INLINED uint16_t bits(const mask m[PARTS]) { return m[0]; }
INLINED mask mask_of(const uint16_t *bits, int part) { (void)part; return *bits; }
INLINED floats moved(floats v, ints order) { return (floats)_mm512_permutexvar_ps((__m512i)order, (__m512)v); }
#define EVERY(first) \
    _mm512_set_epi32(first + 30, first + 28, first + 26, first + 24, first + 22, first + 20, first + 18, first + 16, \
                     first + 14, first + 12, first + 10, first + 8, first + 6, first + 4, first + 2, first)
INLINED floats evens(floats a, floats b) { return (floats)_mm512_permutex2var_ps((__m512)a, EVERY(0), (__m512)b); }
INLINED floats odds(floats a, floats b) { return (floats)_mm512_permutex2var_ps((__m512)a, EVERY(1), (__m512)b); }
#undef EVERY
#elif defined(AVX2)
INLINED mask below(floats b, floats a) { return _mm256_cmp_ps((__m256)b, (__m256)a, _CMP_LT_OQ); }
INLINED floats pick(mask m, floats b, floats a) { return (floats)_mm256_blendv_ps((__m256)a, (__m256)b, m); }
INLINED floats lesser(mask m, floats b, floats a) { (void)m; return (floats)_mm256_min_ps((__m256)b, (__m256)a); }
INLINED uint16_t bits(const mask m[PARTS]) {
    return (uint16_t)(_mm256_movemask_ps(m[0]) | _mm256_movemask_ps(m[1]) << 8);
}
INLINED mask mask_of(const uint16_t *bits, int part) {
    const __m256i bit = _mm256_set_epi32(128, 64, 32, 16, 8, 4, 2, 1);
    const __m256i all_of = _mm256_set1_epi32(((const uint8_t *)bits)[part]);
    return _mm256_castsi256_ps(_mm256_cmpeq_epi32(_mm256_and_si256(all_of, bit), bit));
}
INLINED floats moved(floats v, ints order) { return (floats)_mm256_permutevar8x32_ps((__m256)v, (__m256i)order); }
INLINED floats pairs(__m256 v) {
    return (floats)_mm256_castpd_ps(_mm256_permute4x64_pd(_mm256_castps_pd(v), 0xd8));
}
INLINED floats evens(floats a, floats b) { return pairs(_mm256_shuffle_ps((__m256)a, (__m256)b, 0x88)); }
INLINED floats odds(floats a, floats b) { return pairs(_mm256_shuffle_ps((__m256)a, (__m256)b, 0xdd)); }
#else
INLINED mask below(floats b, floats a) { return vcltq_f32((float32x4_t)b, (float32x4_t)a); }
INLINED floats pick(mask m, floats b, floats a) { return (floats)vbslq_f32(m, (float32x4_t)b, (float32x4_t)a); }
INLINED floats lesser(mask m, floats b, floats a) { (void)m; return (floats)vminq_f32((float32x4_t)b, (float32x4_t)a); }
INLINED uint16_t bits(const mask m[PARTS]) {
    static const uint8_t bit[16] = {1, 2, 4, 8, 16, 32, 64, 128, 1, 2, 4, 8, 16, 32, 64, 128};
    const uint16x8_t a = vuzp1q_u16((uint16x8_t)m[0], (uint16x8_t)m[1]);
    const uint16x8_t b = vuzp1q_u16((uint16x8_t)m[2], (uint16x8_t)m[3]);
    uint8x16_t v = vandq_u8(vuzp1q_u8((uint8x16_t)a, (uint8x16_t)b), vld1q_u8(bit));
    v = vpaddq_u8(v, v);
    v = vpaddq_u8(v, v);
    return vgetq_lane_u16((uint16x8_t)vpaddq_u8(v, v), 0);
}
INLINED mask mask_of(const uint16_t *bits, int part) {
    const uint32x4_t bit = {1u << 4 * part, 2u << 4 * part, 4u << 4 * part, 8u << 4 * part};
    return vtstq_u32(vdupq_n_u32(*bits), bit);
}
INLINED floats moved(floats v, ints order) { return (floats)vqtbl1q_u8((uint8x16_t)v, (uint8x16_t)order); }
INLINED floats evens(floats a, floats b) { return (floats)vuzp1q_f32((float32x4_t)a, (float32x4_t)b); }
INLINED floats odds(floats a, floats b) { return (floats)vuzp2q_f32((float32x4_t)a, (float32x4_t)b); }
#endif

/* Predecessors of states, of which those of one half are even, of the other odd: a xor of the number among its kind, as
 * everything in a linear trellis. Which register, and the order within it. */
typedef struct { size_t by; ints order; } flip; /* bytes to registers */
INLINED flip flip_of(int by) {
    static const int32_t lane[16] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    const ints order = *(const ints *)lane ^ (by & (LANES - 1));
#ifdef NEON /* the bytes of them */
    return (flip){(size_t)(by / LANES) * sizeof(floats), order * 0x04040404 + 0x03020100};
#else
    return (flip){(size_t)(by / LANES) * sizeof(floats), order};
#endif
}
INLINED floats flipped(const float *p, int i, flip f) {
    return moved(*(const floats *)((const char *)p + ((size_t)i * sizeof(floats) ^ f.by)), f.order);
}

/* The same in two steps, for loops: the 16 states that those of a block of 16 come from, and register k of these */
INLINED const char *block_of(const float *p, int block, flip f) {
    return (const char *)p + ((size_t)block * 64 ^ (f.by & ~(size_t)63));
}
INLINED floats within(const char *block, int k, flip f) {
    return moved(*(const floats *)(block + ((size_t)k * sizeof(floats) ^ (f.by & 63))), f.order);
}

typedef struct { flip h1, low, both; } flips;
INLINED flips flips_of(const rac_search *t) {
    const int low = t->h0 & (t->states / 2 - 1);
    return (flips){flip_of(t->h1), flip_of(low), flip_of(low ^ t->h1)};
}

/* nearest: whole numbers, at most 1024 from 0. floored: the largest ones below. held: at most `far` from 0. looked_up:
 * costs of the integers k and in of -most..most, the rates of which begin at that of 0 */
#if defined(AVX512)
#define M(f) _mm512_##f
typedef __m512 of_floats;
typedef __m512i of_ints;
#elif defined(AVX2)
#define M(f) _mm256_##f
typedef __m256 of_floats;
typedef __m256i of_ints;
#endif
typedef int16_t shorts __attribute__((vector_size(2 * LANES), aligned(2), may_alias));
INLINED floats floats_of(ints k) { return __builtin_convertvector(k, floats); }
INLINED void put_integers(int16_t *p, ints k) { *(shorts *)p = __builtin_convertvector(k, shorts); }
/* The same for costs of rows of several classes */
INLINED void looked_up_by_row(const float *rate, const uint8_t *row, int wide, ints k, ints in, floats *c, floats *d) {
    for (int i = 0; i < LANES; i++) {
        const float *of = rate + row[i] * wide;
        (*c)[i] = of[k[i]];
        (*d)[i] = of[in[i]];
    }
}
#ifdef NEON
INLINED floats floored(floats v) { return (floats)vrndmq_f32((float32x4_t)v); }
INLINED ints nearest(floats v) {
    const float32x4_t most = vdupq_n_f32(1024.0f);
    return (ints)vcvtnq_s32_f32(vmaxq_f32(vminq_f32((float32x4_t)v, most), vnegq_f32(most)));
}
INLINED ints held(ints k, int far) {
    return (ints)vmaxq_s32(vminq_s32((int32x4_t)k, vdupq_n_s32(far)), vdupq_n_s32(-far));
}
/* Numbers of the integers -16 to 15, among which are those next to samples that are small, and the next towards zero */
typedef struct { uint8x16x4_t below, from; } near_0;
INLINED near_0 near_0_of(const float *of) {
    const uint8_t *p = (const uint8_t *)(of - 16);
    return (near_0){vld1q_u8_x4(p), vld1q_u8_x4(p + 64)};
}
INLINED int are_small(floats x) { return vmaxvq_f32(vabsq_f32((float32x4_t)x)) < 26.0f; } /* integers are about half */
INLINED floats look_at(const near_0 *t, ints k) {
    const uint8x16_t at = (uint8x16_t)((k + 16) * 0x04040404 + 0x03020100); /* bytes of them */
    return (floats)vqtbx4q_u8(vqtbl4q_u8(t->below, at), t->from, veorq_u8(at, vdupq_n_u8(64)));
}
INLINED void look_up(const near_0 *t, ints k, ints in, floats *c, floats *d) {
    *c = look_at(t, k);
    *d = look_at(t, in);
}
INLINED void looked_up(const float *rate, int most, ints k, ints in, floats *c, floats *d) {
    (void)most;
    for (int i = 0; i < LANES; i++) {
        (*c)[i] = rate[k[i]];
        (*d)[i] = rate[in[i]];
    }
}
#else
INLINED ints nearest(floats v) {
    const floats most = all(1024.0f);
    return (ints)M(cvtps_epi32)(M(max_ps)(M(min_ps)((of_floats)v, (of_floats)most), (of_floats)-most));
}
INLINED ints held(ints k, int far) {
    return (ints)M(max_epi32)(M(min_epi32)((of_ints)k, M(set1_epi32)(far)), M(set1_epi32)(-far));
}
#ifdef AVX512
INLINED floats floored(floats v) {
    return (floats)_mm512_roundscale_ps((__m512)v, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
}
INLINED int are_near(ints k) { /* -16 to 15 */
    return !_mm512_cmpgt_epu32_mask((__m512i)(k + 16), _mm512_set1_epi32(31));
}
INLINED floats of_near(const float *rate, ints k) {
    return (floats)_mm512_permutex2var_ps((__m512)at(rate, -1), (__m512i)(k + 16), (__m512)at(rate, 0));
}
INLINED floats of_any(const float *rate, ints k) { return (floats)_mm512_i32gather_ps((__m512i)k, rate, 4); }
#else
INLINED floats floored(floats v) { return (floats)_mm256_floor_ps((__m256)v); }
INLINED int are_near(ints k) {
    const __m256i far = _mm256_and_si256((__m256i)(k + 16), _mm256_set1_epi32(-32));
    return _mm256_testz_si256(far, far);
}
INLINED floats of_near(const float *rate, ints k) { /* permutations look at three bits, choices at the sign */
    const __m256 high = (__m256)(k << 28);
    const __m256 a = _mm256_blendv_ps((__m256)moved(at(rate, -2), k), (__m256)moved(at(rate, -1), k), high);
    const __m256 b = _mm256_blendv_ps((__m256)moved(at(rate, 0), k), (__m256)moved(at(rate, 1), k), high);
    return (floats)_mm256_blendv_ps(b, a, (__m256)k);
}
INLINED floats of_any(const float *rate, ints k) { return (floats)_mm256_i32gather_ps(rate, (__m256i)k, 4); }
#endif
INLINED void looked_up(const float *rate, int most, ints k, ints in, floats *c, floats *d) {
    if (most >= 16 && are_near(k)) { /* and the one towards zero, too */
        *c = of_near(rate, k);
        *d = of_near(rate, in);
    } else {
        *c = of_any(rate, k);
        *d = of_any(rate, in);
    }
}
#undef M
#endif
#endif
